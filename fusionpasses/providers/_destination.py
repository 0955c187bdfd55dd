"""Where the launch of a quant writes: codes and scales, or the numbers that they mean in the order of a product."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionpasses.ops import _mxfp4
from fusionpasses.providers import _launch


class Destination(NamedTuple):
    """Of ``x [..., N]``; what quant kernels call ``TOKEN_TILES`` and ``FLAGS`` goes with it."""

    codes: Tensor  #: or bfloat16 numbers in order (``kernels/_token_order.py``)
    scales: Tensor | None  #: or the int32 flags of ``mxfp4_gemm_wgmma``, which become 0, if it is that
    token_tiles: int | None  #: None: codes and scales

    @property
    def constants(self) -> dict[str, Any]:
        flags = 0 if self.token_tiles is None or self.scales is None else self.scales.numel()
        return {"TOKEN_TILES": self.token_tiles, "FLAGS": flags}

    def programs(self, tokens: int, row_blocks: int, tile: int) -> tuple[tuple[int, int], bool]:
        """The grid where threads may have any blocks (``_token_order.place_of``), and whether some have none."""
        places = -(-tokens // 8) * 8 * row_blocks
        return (-(-places // tile), 1), tokens % 8 != 0 or places % tile != 0


def outputs(x: Tensor) -> Destination:
    """Codes and scales that an op returns."""
    return Destination(*_mxfp4.fake_quantized(x), None)


def in_scratch(x: Tensor) -> Destination:
    """Codes and scales that only this call uses."""
    codes, scales = (_launch.scratch(x, tuple(shape), torch.uint8) for shape in _mxfp4.packed_shapes(x))
    return Destination(codes, scales, None)
