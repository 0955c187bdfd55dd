"""``rmsnorm_add_mxfp4_quant(x, residual, weight, eps, ...)``: residual add, RMSNorm, dynamic MXFP4 quantisation.

Overloads:
    default -> (codes, scales, sum)
    with_norm -> (codes, scales, sum, norm): also the normed tensor, for readers that are not quantised

``sum = x + residual`` in their common dtype (rounded once); the norm is that of the rounded sum. x and residual have
the same shape and dtype, each with any strides. Everything else is as in ``rmsnorm_mxfp4_quant``; all outputs are
contiguous, sum has the dtype of x.

Raises:
    UnsupportedInput: an argument outside the above, or an input that requires grad in grad mode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4, _rms_norm, rmsnorm_mxfp4_quant
from fusionpasses.ops._op import Sample, declare
from fusionpasses.ops._then_gemm import declare_then_gemm

ARGUMENTS = (
    "(Tensor x, Tensor residual, Tensor? weight, float eps, *, str cast_order, ScalarType? norm_dtype=None, "
    'str scale_mode="even", str provider="auto")'
)


def check(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> None:
    _rms_norm.check(x, weight, eps, cast_order, scale_mode, norm_dtype)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise UnsupportedInput(
            f"residual: got {residual.dtype} {tuple(residual.shape)} on {residual.device}, allowed {x.dtype} "
            f"{tuple(x.shape)} on {x.device}, as x; expand or convert it first"
        )


def reference_with_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    norm = _rms_norm.reference(total, weight, eps, cast_order, norm_dtype)
    return *_mxfp4.quantize(norm, scale_mode), total, norm


def reference(*args: object, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, total, _ = reference_with_norm(*args, **kwargs)  # type: ignore[arg-type]
    return codes, scales, total


def fake_with_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_mxfp4.fake_quantized(x), x.new_empty(x.shape), _rms_norm.fake(x, weight, cast_order, norm_dtype)


def fake(x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
    return *_mxfp4.fake_quantized(x), x.new_empty(x.shape)


def samples(device: torch.device) -> Iterator[Sample]:
    for (x, *rest), kwargs in rmsnorm_mxfp4_quant.samples(device):
        yield (x, torch.randn_like(x), *rest), kwargs
    strided = torch.randn(3, 64, device=device)
    yield (strided, torch.randn(3, 128, device=device)[:, 64:], None, 1e-6), {"cast_order": "cast_scale"}


OP = declare(
    "rmsnorm_add_mxfp4_quant.default",
    ARGUMENTS + " -> (Tensor codes, Tensor scales, Tensor sum)",
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
OP_WITH_NORM = declare(
    "rmsnorm_add_mxfp4_quant.with_norm",
    ARGUMENTS + " -> (Tensor codes, Tensor scales, Tensor sum, Tensor norm)",
    check=check,
    reference=reference_with_norm,
    fake=fake_with_norm,
    samples=samples,
)
OP_THEN_GEMM = declare_then_gemm(OP, ARGUMENTS, ", Tensor sum")
