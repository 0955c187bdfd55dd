"""What launches of a product with an MXFP4 weight are given, whichever kernel it is."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusionpasses.kernels.arch import Arch
from fusionpasses.providers._destination import Destination


class Product(NamedTuple):
    """``out = x @ w.T * 2**shift + bias``, of at least one token and one row."""

    x: Tensor  #: bfloat16, contiguous or of two dimensions; or codes, contiguous
    x_scales: Tensor | None  #: of codes, contiguous
    w_codes: Tensor
    w_scales: Tensor
    bias: Tensor | None
    out: Tensor  #: contiguous, ``tokens * rows`` elements
    tokens: int
    rows: int
    width: int
    layout: str  #: of the weight: "linear" or "tiles"
    shift: int
    gpu: Arch
    ordered: Destination | None = None  #: x as this product puts it in order; then x is not read

    @property
    def x_stride(self) -> int:
        """From a row of x to the next, in elements."""
        if self.x_scales is not None:
            return self.width // 2
        return self.x.stride(0) if self.x.dim() == 2 else self.width
