"""``rmsnorm_mxfp4_quant(x, weight, eps, ...)``: RMSNorm, then dynamic MXFP4 quantisation of the result.

Overloads:
    default -> (codes, scales)
    with_norm -> (codes, scales, norm): also the normed tensor, for readers that are not quantised

Args:
    x: ``[..., N]`` bfloat16, float16 or float32, N a positive multiple of 32, any strides, zero rows allowed.
    weight: ``[N]`` in x's dtype or float32, or None.
    eps: added to the mean square.
    cast_order, norm_dtype: where the norm is rounded; see ``fusionpasses/ops/_rms_norm.py``.
    scale_mode: see ``fusionpasses/ops/_mxfp4.py``.

Returns:
    codes uint8 ``[..., N/2]``, scales uint8 ``[..., N/32]``, norm ``[..., N]`` in ``norm_dtype``; all contiguous.
    Given the same float32 ``rsqrt(mean(x**2) + eps)``, every provider gives the same bytes; that one number may
    differ by the bound its provider states.

Raises:
    UnsupportedInput: an argument outside the above, or an input that requires grad in grad mode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.ops import _mxfp4, _rms_norm
from fusionpasses.ops._op import Sample, declare

_ARGUMENTS = (
    "(Tensor x, Tensor? weight, float eps, *, str cast_order, ScalarType? norm_dtype=None, "
    'str scale_mode="even", str provider="auto")'
)


def check(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> None:
    _rms_norm.check(x, weight, eps, cast_order, scale_mode, norm_dtype)


def reference_with_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor, Tensor]:
    norm = _rms_norm.reference(x, weight, eps, cast_order, norm_dtype)
    return *_mxfp4.quantize(norm, scale_mode), norm


def reference(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    codes, scales, _ = reference_with_norm(*args, **kwargs)  # type: ignore[arg-type]
    return codes, scales


def fake_with_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor, Tensor]:
    return *_mxfp4.fake_quantized(x), _rms_norm.fake(x, weight, cast_order, norm_dtype)


def fake(x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return _mxfp4.fake_quantized(x)


def samples(device: torch.device) -> Iterator[Sample]:
    for dtype in _mxfp4.INPUT_DTYPES:
        for cast_order in _rms_norm.CAST_ORDERS:
            x = torch.randn(3, 96, device=device, dtype=dtype)
            weight = torch.randn(96, device=device)
            yield (x, weight.to(dtype), 1e-6), {"cast_order": cast_order}
            yield (x, weight, 1e-5), {"cast_order": cast_order, "scale_mode": "rceil"}
            yield (x, weight, 1e-5), {"cast_order": cast_order, "norm_dtype": dtype, "scale_mode": "floor"}
            yield (x, None, 0.0), {"cast_order": cast_order, "norm_dtype": torch.float32, "scale_mode": "ceil"}
    weight = torch.randn(64, device=device)
    for x in (
        torch.randn(2, 3, 5, 64, device=device),
        torch.randn(4, 128, device=device)[:, :64],
        torch.randn(5, 2, 64, device=device).transpose(0, 1),
        torch.randn(0, 64, device=device),
        torch.randn(64, device=device),
        torch.zeros(2, 64, device=device),
    ):
        yield (x, weight, 1e-6), {"cast_order": "scale_cast"}


OP = declare(
    "rmsnorm_mxfp4_quant.default",
    _ARGUMENTS + " -> (Tensor codes, Tensor scales)",
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
OP_WITH_NORM = declare(
    "rmsnorm_mxfp4_quant.with_norm",
    _ARGUMENTS + " -> (Tensor codes, Tensor scales, Tensor norm)",
    check=check,
    reference=reference_with_norm,
    fake=fake_with_norm,
    samples=samples,
)
