"""The MXFP4 format: E2M1 elements with one E8M0 scale per block of 32, and the four scale rules.

Format: OCP Microscaling Formats (MX) specification v1.0. A block is 32 consecutive elements of the last axis.
An element is a nibble ``s e e m`` with the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; element 2i is the low nibble of
byte i, element 2i+1 the high one. A scale byte b means 2**(b - 127); 255 means the block is NaN.

Scale rules. Write the block's largest magnitude as ``amax = m * 2**e`` with 1 <= m < 2. The scale exponent is e - 2,
plus one where the mantissa is too large:

========  ==================  ==========================================================
mode      plus one where      used by
========  ==================  ==========================================================
"floor"   never               OCP MX v1.0 text, microxcaling
"even"    m >= 1.75           AMD Quark, AITER's Triton kernels, compressed-tensors
"rceil"   m > 1.5             NVIDIA (cuDNN, modelopt), AITER's HIP kernels
"ceil"    m > 1               torchao's CEIL
========  ==================  ==========================================================

As float32 bits that is one integer rule: add a constant below the exponent field and drop the mantissa. No float
log2 is taken anywhere, because its rounding puts some blocks one scale off.

Range ends, the same for every provider: the exponent is clamped below at scale byte 0 (block maxima under 2**-125);
the largest finite maxima get byte 253; a block holding Inf or NaN gets byte 255 and all its codes are 0; an all-zero
block gets byte 0. Elements round to nearest, ties to even, and saturate at 6. The sign of zero is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput

BLOCK = 32
NAN_SCALE = 255
MAX_NORMAL = 6.0

#: What each scale mode adds to the float32 bits of amax before the mantissa is dropped.
SCALE_ADDEND = {
    "even": 0x200000,  # carries from m = 1.75 up
    "floor": 0,
    "rceil": 0x3FFFFF,  # carries from just above m = 1.5
    "ceil": 0x7FFFFF,  # carries from just above m = 1
}

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_E2M1_MAX_EXPONENT = 2  # 6 = 1.5 * 2**2
_MANTISSA_BITS = 23


def check_scale_mode(scale_mode: str) -> None:
    if not isinstance(scale_mode, str) or scale_mode not in SCALE_ADDEND:
        raise UnsupportedInput(
            f"scale_mode: got {scale_mode!r}, allowed {', '.join(map(repr, SCALE_ADDEND))}; take the mode the "
            "checkpoint was made with ('even' for AMD Quark, 'rceil' for NVIDIA tools)"
        )


def check_input(name: str, x: Tensor) -> None:
    """Refuse a tensor that cannot be quantised along its last axis."""
    if x.dtype not in INPUT_DTYPES:
        raise UnsupportedInput(
            f"{name}.dtype: got {x.dtype}, allowed {', '.join(map(str, INPUT_DTYPES))}; convert it first"
        )
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK != 0:
        raise UnsupportedInput(
            f"{name}: got shape {tuple(x.shape)}, allowed [..., N] with N a positive multiple of {BLOCK} "
            "(the MXFP4 block); pad the last axis with zeros"
        )


def packed_shapes(x: Tensor) -> tuple[list[int], list[int]]:
    """Shapes of the packed codes and of the scales of ``x [..., N]``."""
    *leading, n = x.shape
    return [*leading, n // 2], [*leading, n // BLOCK]


def fake_quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty contiguous outputs of a quantisation of ``x``."""
    codes, scales = packed_shapes(x)
    return x.new_empty(codes, dtype=torch.uint8), x.new_empty(scales, dtype=torch.uint8)


def _just_above(value: float) -> float:
    return float(torch.nextafter(torch.tensor(value), torch.tensor(float("inf"))))


# A value v gets the code of the number of boundaries <= v. Midpoints between neighbours are boundaries; where the tie
# goes down to the even code, the boundary is the next float32.
_ROUNDING_BOUNDARIES = (_just_above(0.25), 0.75, _just_above(1.25), 1.75, _just_above(2.5), 3.5, _just_above(5.0))


def quantize(x: Tensor, scale_mode: str) -> tuple[Tensor, Tensor]:
    """MXFP4 of ``x [..., N]``: packed codes uint8 ``[..., N/2]`` and scales uint8 ``[..., N/32]``, both contiguous."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    magnitude_bits = blocks.contiguous().view(torch.int32) & 0x7FFFFFFF
    # As integers NaN > Inf > every finite value, so amax carries a NaN along.
    amax_bits = magnitude_bits.amax(-1)
    finite = amax_bits < 0x7F800000
    rounded = torch.where(finite, amax_bits, 0) + SCALE_ADDEND[scale_mode]
    scales = ((rounded >> _MANTISSA_BITS) - _E2M1_MAX_EXPONENT).clamp(min=0)
    # The reciprocal 2**(127 - byte) as bits; byte <= 253 keeps it a normal number, so the product is exact unless it
    # falls below the normal range, where every value rounds to code 0 anyway.
    reciprocal = _power_of_two(127 - scales)
    scaled = (blocks * reciprocal.unsqueeze(-1)).abs()
    # Compared one by one, because a tensor of boundaries would be copied from the host, which CUDA graphs forbid.
    codes = torch.zeros_like(scaled, dtype=torch.int32)
    for boundary in _ROUNDING_BOUNDARIES:
        codes += scaled >= boundary
    codes = torch.where(torch.signbit(blocks), codes | 8, codes)
    codes = torch.where(finite.unsqueeze(-1), codes, 0).to(torch.uint8)
    low, high = codes.unflatten(-1, (BLOCK // 2, 2)).unbind(-1)
    packed = (low | (high << 4)).flatten(-2)
    return packed.contiguous(), torch.where(finite, scales, NAN_SCALE).to(torch.uint8)


def dequantize(packed: Tensor, scales: Tensor) -> Tensor:
    """float32 values of packed codes ``[..., N/2]`` and scales ``[..., N/32]``; a block with scale 255 is NaN."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).int()
    exponents, mantissas = (codes >> 1) & 3, codes & 1
    # 0 and 0.5 have no leading one. From the bits, not from a table: CUDA graphs forbid copying one from the host.
    magnitudes = torch.where(exponents == 0, mantissas * 0.5, (1 + mantissas * 0.5) * _power_of_two(exponents - 1))
    elements = torch.where(codes >= 8, -magnitudes, magnitudes).unflatten(-1, (-1, BLOCK))
    # In two factors, because 2**-127 (byte 0) is not a normal float32.
    exponent = scales.int() - 127
    half = exponent >> 1
    factor = torch.where(scales == NAN_SCALE, torch.nan, _power_of_two(half))
    rest = _power_of_two(exponent - half)
    result: Tensor = (elements * factor.unsqueeze(-1) * rest.unsqueeze(-1)).flatten(-2)
    return result


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent as float32, for int32 exponents in -126..127."""
    power: Tensor = ((exponent + 127) << _MANTISSA_BITS).view(torch.float32)
    return power
