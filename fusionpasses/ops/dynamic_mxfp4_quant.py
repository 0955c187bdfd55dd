"""``dynamic_mxfp4_quant(x, scale_mode="even") -> (codes, scales)``: dynamic MXFP4 quantisation of activations.

Args:
    x: ``[..., N]`` bfloat16, float16 or float32, N a positive multiple of 32, any strides, zero rows allowed.
    scale_mode: "even", "floor", "rceil" or "ceil"; see ``fusionpasses/ops/_mxfp4.py``.

Returns:
    codes: uint8 ``[..., N/2]``, contiguous, element 2i in the low nibble of byte i.
    scales: uint8 (E8M0) ``[..., N/32]``, contiguous, row-major.

Raises:
    UnsupportedInput: another dtype or width, an unknown scale mode, or an input that requires grad in grad mode.

Source of the format: OCP Microscaling Formats (MX) v1.0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.ops import _mxfp4
from fusionpasses.ops._op import Sample, declare
from fusionpasses.ops._then_gemm import declare_then_gemm


def check(x: Tensor, scale_mode: str = "even") -> None:
    _mxfp4.check_input("x", x)
    _mxfp4.check_scale_mode(scale_mode)


def reference(x: Tensor, scale_mode: str = "even") -> tuple[Tensor, Tensor]:
    return _mxfp4.quantize(x, scale_mode)


def fake(x: Tensor, scale_mode: str = "even") -> tuple[Tensor, Tensor]:
    return _mxfp4.fake_quantized(x)


def samples(device: torch.device) -> Iterator[Sample]:
    for dtype in _mxfp4.INPUT_DTYPES:
        for scale_mode in _mxfp4.SCALE_ADDEND:
            yield (torch.randn(3, 96, device=device, dtype=dtype), scale_mode), {}
    yield (torch.randn(2, 3, 5, 64, device=device),), {}
    yield (torch.randn(4, 128, device=device)[:, :64],), {}
    yield (torch.randn(5, 2, 64, device=device).transpose(0, 1),), {}
    yield (torch.randn(0, 64, device=device),), {}
    yield (torch.randn(32, device=device),), {}
    yield (torch.tensor([[1.0, float("inf")] * 16, [float("nan"), 2.0] * 16, [-0.0, 0.0] * 16], device=device),), {}


ARGUMENTS = '(Tensor x, str scale_mode="even", *, str provider="auto")'

OP = declare(
    "dynamic_mxfp4_quant.default",
    ARGUMENTS + " -> (Tensor codes, Tensor scales)",
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
OP_THEN_GEMM = declare_then_gemm(OP, ARGUMENTS)
