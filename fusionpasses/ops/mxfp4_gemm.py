"""``mxfp4_gemm(x_codes, x_scales, w_codes, w_scales, bias=None, *, out_dtype)``: W4A4 matrix product.

``out = dequantise(x) @ dequantise(w).T + bias``, accumulated in float32, rounded once to ``out_dtype``.

Args:
    x_codes, x_scales: uint8 ``[..., K/2]`` and ``[..., K/32]``, as ``dynamic_mxfp4_quant`` returns them.
    w_codes, w_scales: uint8 ``[N, K/2]`` and ``[N, K/32]``, row-major: the layout of checkpoints.
    bias: ``[N]`` or None.
    out_dtype: bfloat16, float16 or float32.

Returns:
    ``[..., N]`` contiguous.

Raises:
    UnsupportedInput: shapes or dtypes that do not fit together, or an input that requires grad in grad mode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4
from fusionpasses.ops._op import Sample, declare


def check(
    x_codes: Tensor,
    x_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> None:
    for name, tensor in (("x_codes", x_codes), ("x_scales", x_scales), ("w_codes", w_codes), ("w_scales", w_scales)):
        if tensor.dtype != torch.uint8:
            raise UnsupportedInput(f"{name}.dtype: got {tensor.dtype}, allowed torch.uint8; use .view(torch.uint8)")
    if x_codes.dim() == 0 or w_codes.dim() != 2 or w_codes.shape[1] != x_codes.shape[-1]:
        raise UnsupportedInput(
            f"w_codes: got shape {tuple(w_codes.shape)} with x_codes {tuple(x_codes.shape)}, allowed [N, K/2] and "
            f"[..., K/2] with one width K; x is {x_codes.shape[-1] * 2 if x_codes.dim() else 0} wide and the weight "
            f"{w_codes.shape[-1] * 2}"
        )
    per_scale = _mxfp4.BLOCK // 2
    for name, codes, scales in (("x_scales", x_codes, x_scales), ("w_scales", w_codes, w_scales)):
        allowed = (*codes.shape[:-1], codes.shape[-1] // per_scale)
        if codes.shape[-1] % per_scale != 0 or tuple(scales.shape) != allowed:
            raise UnsupportedInput(
                f"{name}: got shape {tuple(scales.shape)} for codes {tuple(codes.shape)}, allowed {allowed}: "
                f"one scale per {per_scale} bytes of codes"
            )
    if bias is not None and tuple(bias.shape) != (w_codes.shape[0],):
        raise UnsupportedInput(
            f"bias: got shape {tuple(bias.shape)}, allowed [{w_codes.shape[0]}], the rows of w_codes"
        )
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
) -> Tensor:
    x = _mxfp4.dequantize(x_codes, x_scales)
    out = x @ _mxfp4.dequantize(w_codes, w_scales).T
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
) -> Tensor:
    return x_codes.new_empty((*x_codes.shape[:-1], w_codes.shape[0]), dtype=out_dtype)


def samples(device: torch.device) -> Iterator[Sample]:
    weight = _mxfp4.quantize(torch.randn(48, 64, device=device), "even")
    bias = torch.randn(48, device=device)
    for shape in ((5, 64), (2, 3, 64), (0, 64), (64,)):
        x = _mxfp4.quantize(torch.randn(shape, device=device), "even")
        for out_dtype in _mxfp4.INPUT_DTYPES:
            yield (*x, *weight), {"out_dtype": out_dtype}
            yield (*x, *weight, bias), {"out_dtype": out_dtype}


OP = declare(
    "mxfp4_gemm.default",
    "(Tensor x_codes, Tensor x_scales, Tensor w_codes, Tensor w_scales, Tensor? bias=None, *, "
    'ScalarType out_dtype, str provider="auto") -> Tensor',
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
