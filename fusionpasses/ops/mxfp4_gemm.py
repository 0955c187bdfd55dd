"""``mxfp4_gemm(x_codes, x_scales, w_codes, w_scales, bias=None, *, out_dtype, layout="linear", rows=None, shift=0)``:
W4A4 matrix product.

``out = dequantise(x) @ dequantise(w).T + bias``, accumulated in float32, rounded once to ``out_dtype``.

Args:
    x_codes, x_scales: uint8 ``[..., K/2]`` and ``[..., K/32]``, as ``dynamic_mxfp4_quant`` returns them.
    w_codes, w_scales: the weight ``[N, K]``, contiguous, in one of the layouts of ``ops/_mxfp4_weight.py``:
        uint8 ``[N, K/2]`` and ``[N, K/32]`` if "linear".
    bias: ``[N]`` or None.
    out_dtype: bfloat16, float16 or float32.
    layout: "linear", "tiles" for what ``prepare`` returned, "shuffled" or "shuffled_scales" for what ``shuffle`` did.
    rows, shift: None and 0 if "linear"; else N, and the shift that ``prepare`` returned, or 0.

Returns:
    ``[..., N]`` contiguous. Products of two MXFP4 numbers are exact in float32; providers add them up in orders of
    their own: each sum is within ``K * 2**-24`` of the sum of the products' magnitudes, then rounded. The same call
    gives the same bytes.

Raises:
    UnsupportedInput: shapes, dtypes or strides that do not fit together, or an input that requires grad in grad mode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.ops._op import Sample, declare


def check(
    x_codes: Tensor,
    x_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    layout: str = "linear",
    rows: int | None = None,
    shift: int = 0,
) -> None:
    for name, tensor in (("x_codes", x_codes), ("x_scales", x_scales)):
        if tensor.dtype != torch.uint8:
            raise UnsupportedInput(f"{name}.dtype: got {tensor.dtype}, allowed torch.uint8; use .view(torch.uint8)")
    if x_codes.dim() == 0:
        raise UnsupportedInput("x_codes: got a 0-d tensor, allowed [..., K/2]; quantise rows")
    n = _mxfp4_weight.check_weight(w_codes, w_scales, layout, rows, shift, x_codes.shape[-1] * 2)
    allowed = (*x_codes.shape[:-1], x_codes.shape[-1] * 2 // _mxfp4.BLOCK)
    if tuple(x_scales.shape) != allowed:
        raise UnsupportedInput(
            f"x_scales: got shape {tuple(x_scales.shape)} for codes {tuple(x_codes.shape)}, allowed {allowed}: one "
            f"scale per {_mxfp4.BLOCK} codes"
        )
    _mxfp4_weight.check_bias(bias, n)
    if out_dtype not in _mxfp4.INPUT_DTYPES:
        raise UnsupportedInput(f"out_dtype: got {out_dtype}, allowed {', '.join(map(str, _mxfp4.INPUT_DTYPES))}")


def reference(
    x_codes: Tensor,
    x_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    layout: str = "linear",
    rows: int | None = None,
    shift: int = 0,
) -> Tensor:
    x = _mxfp4.dequantize(x_codes, x_scales)
    out = x @ _mxfp4_weight.linear(w_codes, w_scales, layout, rows, shift, x.shape[-1]).T
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype).contiguous()


def fake(
    x_codes: Tensor,
    x_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    layout: str = "linear",
    rows: int | None = None,
    shift: int = 0,
) -> Tensor:
    return x_codes.new_empty((*x_codes.shape[:-1], w_codes.shape[0] if rows is None else rows), dtype=out_dtype)


def samples(device: torch.device) -> Iterator[Sample]:
    for weight, keywords, n, k in weights(device):
        bias = torch.randn(n, device=device)
        for shape in ((5, k), (2, 3, k), (0, k), (k,)):
            x = _mxfp4.quantize(torch.randn(shape, device=device), "even")
            for out_dtype in _mxfp4.INPUT_DTYPES:
                yield (*x, *weight), {"out_dtype": out_dtype, **keywords}
                yield (*x, *weight, bias), {"out_dtype": out_dtype, **keywords}


def weights(device: torch.device) -> Iterator[tuple[tuple[Tensor, Tensor], dict[str, object], int, int]]:
    """A weight in each layout, the keywords that say so, N and K."""
    codes, scales = _mxfp4.quantize(torch.randn(40, 160, device=device), "even")
    yield (codes, scales), {}, 40, 160
    w_codes, w_scales, shift = _mxfp4_weight.prepare(codes, scales)
    yield (w_codes, w_scales), {"layout": "tiles", "rows": 40, "shift": shift}, 40, 160
    codes, scales = _mxfp4.quantize(torch.randn(32, 256, device=device), "even")
    for layout in _mxfp4_weight.SHUFFLED:
        w_codes, w_scales = _mxfp4_weight.shuffle(codes, scales, layout)
        yield (w_codes, w_scales), {"layout": layout, "rows": 32}, 32, 256


OP = declare(
    "mxfp4_gemm.default",
    "(Tensor x_codes, Tensor x_scales, Tensor w_codes, Tensor w_scales, Tensor? bias=None, *, ScalarType out_dtype, "
    'str layout="linear", int? rows=None, int shift=0, str provider="auto") -> Tensor',
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
