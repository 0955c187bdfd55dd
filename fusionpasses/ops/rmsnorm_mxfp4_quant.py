"""``rmsnorm_mxfp4_quant(x, weight, eps, ...)``: RMSNorm, then dynamic MXFP4 quantisation of the result.

Overloads:
    default -> (codes, scales)
    with_norm -> (codes, scales, norm): also the normed tensor, for readers that are not quantised
    with_second -> (codes, scales, norm2): also another RMSNorm, of a tensor x2 of the same rows, which is not quantised

``with_second`` is what multi-head latent attention has behind its first projection ``[q_a | kv_c | k_pe]``: q_a is
normed and quantised, kv_c is normed and written to the cache. The two share nothing but their rows: it is two kernels
in one launch. There is no form of it that adds a residual, because no model we know adds one there.

Args:
    x: ``[..., N]`` bfloat16, float16 or float32, N a positive multiple of 32, any strides, zero rows allowed.
    weight: ``[N]`` in x's dtype or float32, or None.
    eps: added to the mean square.
    cast_order, norm_dtype: where the norm is rounded; see ``fusionpasses/ops/_rms_norm.py``.
    scale_mode: see ``fusionpasses/ops/_mxfp4.py``.
    x2: ``[..., N2]`` with x's leading shape, dtype and device, N2 a positive multiple of 32 (which is what a thread of
        the kernels has, though nothing of it is quantised), any strides. It may be x, or overlap it.
    weight2, eps2, cast_order2, norm_dtype2: of the second norm, as those of the first.

Returns:
    codes uint8 ``[..., N/2]``, scales uint8 ``[..., N/32]``, norm ``[..., N]`` in ``norm_dtype``, norm2 ``[..., N2]``
    in ``norm_dtype2``; all contiguous. norm2 is what ``with_norm`` gives as the norm of x2.
    Given the same float32 ``rsqrt(mean(x**2) + eps)``, every provider gives the same bytes; that one number may
    differ by the bound its provider states.

Raises:
    UnsupportedInput: an argument outside the above, or an input that requires grad in grad mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4, _rms_norm
from fusionpasses.ops._op import Sample, declare
from fusionpasses.ops._then_gemm import declare_then_gemm

ARGUMENTS = (
    "(Tensor x, Tensor? weight, float eps, *, str cast_order, ScalarType? norm_dtype=None, "
    'str scale_mode="even", str provider="auto")'
)
_ARGUMENTS_WITH_SECOND = (
    "(Tensor x, Tensor? weight, float eps, Tensor x2, Tensor? weight2, float eps2, *, str cast_order, "
    "ScalarType? norm_dtype=None, str cast_order2, ScalarType? norm_dtype2=None, "
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


def check_with_second(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    x2: Tensor,
    weight2: Tensor | None,
    eps2: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    cast_order2: str,
    norm_dtype2: torch.dtype | None = None,
    scale_mode: str = "even",
) -> None:
    _rms_norm.check(x, weight, eps, cast_order, scale_mode, norm_dtype)
    if x2.dtype != x.dtype or x2.device != x.device or x2.shape[:-1] != x.shape[:-1] or x2.dim() != x.dim():
        raise UnsupportedInput(
            f"x2: got {x2.dtype} {tuple(x2.shape)} on {x2.device}, allowed {x.dtype} {(*x.shape[:-1], 'N2')} on "
            f"{x.device}, as x but for the width; norm it by itself"
        )
    if x2.shape[-1] == 0 or x2.shape[-1] % _mxfp4.BLOCK != 0:
        raise UnsupportedInput(
            f"x2: got shape {tuple(x2.shape)}, allowed [..., N2] with N2 a positive multiple of {_mxfp4.BLOCK}; norm "
            "it by itself"
        )
    _rms_norm.check(x2, weight2, eps2, cast_order2, scale_mode, norm_dtype2, number="2")


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


def reference_with_second(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    x2: Tensor,
    weight2: Tensor | None,
    eps2: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    cast_order2: str,
    norm_dtype2: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor, Tensor]:
    norm = _rms_norm.reference(x, weight, eps, cast_order, norm_dtype)
    norm2 = _rms_norm.reference(x2, weight2, eps2, cast_order2, norm_dtype2)
    return *_mxfp4.quantize(norm, scale_mode), norm2


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


def fake_with_second(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    x2: Tensor,
    weight2: Tensor | None,
    eps2: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    cast_order2: str,
    norm_dtype2: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor, Tensor]:
    return *_mxfp4.fake_quantized(x), _rms_norm.fake(x2, weight2, cast_order2, norm_dtype2)


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


def samples_with_second(device: torch.device) -> Iterator[Sample]:
    for dtype in _mxfp4.INPUT_DTYPES:
        # As in latent attention: neighbouring columns of one tensor, whose last ones are neither's.
        x, x2, _ = torch.randn(3, 192, device=device, dtype=dtype).split([96, 64, 32], -1)
        weight, weight2 = torch.randn(96, device=device), torch.randn(64, device=device)
        for order, order2 in itertools.product(_rms_norm.CAST_ORDERS, repeat=2):
            orders = {"cast_order": order, "cast_order2": order2}
            yield (x, weight.to(dtype), 1e-6, x2, weight2.to(dtype), 1e-5), orders
            yield (x, weight, 1e-6, x2, None, 0.0), {**orders, "norm_dtype2": torch.float32, "scale_mode": "rceil"}
            yield (x, None, 0.0, x2, weight2, 1e-5), {**orders, "norm_dtype": dtype, "norm_dtype2": dtype}
    orders = {"cast_order": "scale_cast", "cast_order2": "cast_scale"}
    weight, weight2 = torch.randn(64, device=device), torch.randn(160, device=device)
    for x, x2 in (
        (torch.randn(2, 3, 5, 64, device=device), torch.randn(2, 3, 5, 160, device=device)),
        (torch.randn(2, 5, 64, device=device), torch.randn(5, 2, 160, device=device).transpose(0, 1)),
        (torch.randn(5, 2, 64, device=device).transpose(0, 1), torch.randn(2, 5, 320, device=device)[..., 160:]),
        (torch.randn(0, 64, device=device), torch.randn(0, 160, device=device)),
        (torch.randn(64, device=device), torch.randn(160, device=device)),
    ):
        yield (x, weight, 1e-6, x2, weight2, 1e-5), orders
    x = torch.randn(3, 64, device=device)
    yield (x, weight, 1e-6, x, weight, 1e-6), orders


OP = declare(
    "rmsnorm_mxfp4_quant.default",
    ARGUMENTS + " -> (Tensor codes, Tensor scales)",
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
OP_WITH_NORM = declare(
    "rmsnorm_mxfp4_quant.with_norm",
    ARGUMENTS + " -> (Tensor codes, Tensor scales, Tensor norm)",
    check=check,
    reference=reference_with_norm,
    fake=fake_with_norm,
    samples=samples,
)
OP_WITH_SECOND = declare(
    "rmsnorm_mxfp4_quant.with_second",
    _ARGUMENTS_WITH_SECOND + " -> (Tensor codes, Tensor scales, Tensor norm2)",
    check=check_with_second,
    reference=reference_with_second,
    fake=fake_with_second,
    samples=samples_with_second,
)
OP_THEN_GEMM = declare_then_gemm(OP, ARGUMENTS)
OP_WITH_SECOND_THEN_GEMM = declare_then_gemm(OP_WITH_SECOND, _ARGUMENTS_WITH_SECOND, ", Tensor norm2")
