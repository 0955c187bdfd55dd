"""``mxfp4_gemm_a16w4(x, w_codes, w_scales, bias=None, *, layout="linear", rows=None, shift=0)``: weight-only product.

``out = x @ dequantise(w).T + bias``, accumulated in float32, rounded once to x's dtype.

Args:
    x: ``[..., K]`` bfloat16, float16 or float32.
    w_codes, w_scales, bias, layout, rows, shift: as of ``mxfp4_gemm``.

Returns:
    ``[..., N]`` contiguous, in x's dtype. A product of an element of x and an MXFP4 number is exact in float32 if x has
    16 bits; providers add them up in orders of their own: each sum is within ``K * 2**-24`` of the sum of the products'
    magnitudes, then rounded. The same call gives the same bytes.

Raises:
    UnsupportedInput: shapes, dtypes or strides that do not fit together, or an input that requires grad in grad mode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.ops._op import Sample, declare
from fusionpasses.ops.mxfp4_gemm import weights


def check(
    x: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "linear",
    rows: int | None = None,
    shift: int = 0,
) -> None:
    _mxfp4.check_input("x", x)
    n = _mxfp4_weight.check_weight(w_codes, w_scales, layout, rows, shift, x.shape[-1])
    _mxfp4_weight.check_bias(bias, n)


def reference(
    x: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "linear",
    rows: int | None = None,
    shift: int = 0,
) -> Tensor:
    out = x.float() @ _mxfp4_weight.linear(w_codes, w_scales, layout, rows, shift, x.shape[-1]).T
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).contiguous()


def fake(
    x: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "linear",
    rows: int | None = None,
    shift: int = 0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_codes.shape[0] if rows is None else rows))


def samples(device: torch.device) -> Iterator[Sample]:
    for weight, keywords, n, k in weights(device):
        bias = torch.randn(n, device=device)
        for shape in ((5, k), (2, 3, k), (0, k), (k,)):
            for dtype in _mxfp4.INPUT_DTYPES:
                x = torch.randn(shape, device=device).to(dtype)
                yield (x, *weight), dict(keywords)
                yield (x, *weight, bias), dict(keywords)


OP = declare(
    "mxfp4_gemm_a16w4.default",
    '(Tensor x, Tensor w_codes, Tensor w_scales, Tensor? bias=None, *, str layout="linear", int? rows=None, '
    'int shift=0, str provider="auto") -> Tensor',
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
