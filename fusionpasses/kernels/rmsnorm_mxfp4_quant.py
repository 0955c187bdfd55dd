"""One kernel for residual add, RMSNorm and MXFP4 quantisation, each part but the last one optional.

One program does one row, held in registers as a tile ``[TILE_BLOCKS, 32]`` of MXFP4 blocks, so x is read once and a
block's scale is a reduction along the tile's short axis. Plain Triton: nothing here depends on the GPU's vendor.

Rounding. Every elementwise step rounds once, to nearest, ties to even, as the same step in torch does; contraction to
FMA is switched off. Given the same ``rstd``, the bytes are therefore the same on every target.

``rstd = 1 / sqrt(sum(x**2) / N + eps)``, each of the four operations after the sum correctly rounded. The last two
together are within 1.5 ulp of the reciprocal square root of their argument (seen by trying every mantissa). A thread
adds k squares and a tree of depth d adds the threads' sums, so the sum's relative error is at most
``(k + d) * 2**-24``, of which the square root passes on half; k + d is at most 42 up to N = 32768.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = tl.constexpr(32)

#: Blocks in one program where rows may be cut anywhere (quantisation alone).
CHUNK_BLOCKS = 64

_ELEMENTS_PER_THREAD = 32
_MAX_THREADS = 1024
_WARP_SIZE = 64 if torch.version.hip else 32


def launch_options(row_blocks: int, warp_size: int = _WARP_SIZE) -> dict[str, int]:
    """Tile size and compile options for rows of this many blocks."""
    tile_blocks: int = triton.next_power_of_2(row_blocks)
    threads = min(tile_blocks * BLOCK.value // _ELEMENTS_PER_THREAD, _MAX_THREADS)
    return {
        "TILE_BLOCKS": tile_blocks,
        "num_warps": max(threads // warp_size, 1),
        # Whether it is on otherwise depends on the Triton version.
        "enable_fp_fusion": False,
    }


@triton.jit
def _e2m1(magnitude):
    """E2M1 code of a magnitude, NaN to 0: binary search among the seven midpoints.

    The comparison is ``>=`` where the even code is the upper neighbour and ``>`` where it is the lower one.
    """
    upper = magnitude >= 1.75
    middle = magnitude >= tl.where(upper, 3.5, 0.75)
    odd = magnitude > tl.where(upper, tl.where(middle, 5.0, 2.5), tl.where(middle, 1.25, 0.25))
    return tl.where(upper, 4, 0) | tl.where(middle, 2, 0) | tl.where(odd, 1, 0)


@triton.jit
def rmsnorm_mxfp4_quant(
    x_ptr,
    residual_ptr,  # None: nothing is added, and there is no sum
    weight_ptr,  # None: no weight
    codes_ptr,
    scales_ptr,
    sum_ptr,
    norm_ptr,  # None: the normed row is not stored
    x_row_stride,
    residual_row_stride,
    total_blocks,  # None: all rows are full; else the last row ends at this block of the whole tensor
    eps,
    ROW_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    SCALE_ADDEND: tl.constexpr,
    NORM: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,  # to x's dtype
    ROUND_RESULT: tl.constexpr,  # to x's dtype; else it stays float32
):
    x_dtype = x_ptr.dtype.element_ty
    # 64 bits before the first product: rows times stride passes 2**31 in tensors that fit a GPU.
    row = tl.program_id(0).to(tl.int64)
    first_block = row * ROW_BLOCKS
    block = tl.arange(0, TILE_BLOCKS)
    inside = block < ROW_BLOCKS
    if total_blocks is not None:
        inside = inside & (first_block + block < total_blocks)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None]

    values = tl.load(x_ptr + row * x_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_row_stride + column, mask=mask, other=0.0)
        # What is normed is the rounded sum, the one that later layers read.
        rounded_sum = (values + residual.to(tl.float32)).to(x_dtype)
        tl.store(sum_ptr + first_block * BLOCK + column, rounded_sum, mask=mask)
        values = rounded_sum.to(tl.float32)

    if NORM:
        mean_square = tl.div_rn(tl.sum(values * values), ROW_BLOCKS * BLOCK)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
        values = values * rstd
        if ROUND_BEFORE_WEIGHT:
            values = values.to(x_dtype).to(tl.float32)
        if weight_ptr is not None:
            values = values * tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if ROUND_RESULT:
            values = values.to(x_dtype).to(tl.float32)
        if norm_ptr is not None:
            norm = values.to(norm_ptr.dtype.element_ty)
            tl.store(norm_ptr + first_block * BLOCK + column, norm, mask=mask)

    # Scale: integers throughout. As integers NaN > Inf > every finite magnitude, so amax carries a NaN along.
    bits = values.to(tl.int32, bitcast=True)
    magnitude_bits = bits & 0x7FFFFFFF
    amax_bits = tl.max(magnitude_bits, axis=1)
    finite = amax_bits < 0x7F800000
    exponent = tl.where(finite, amax_bits, 0) + SCALE_ADDEND
    scale = tl.maximum((exponent >> 23) - 2, 0)
    tl.store(scales_ptr + first_block + block, tl.where(finite, scale, 255).to(tl.uint8), mask=inside)

    # A block that is not finite gets factor 0 and no signs: its products are 0 or NaN, so all its codes are 0.
    reciprocal = tl.where(finite, (254 - scale) << 23, 0).to(tl.float32, bitcast=True)
    sign_bit = tl.where(finite, 8, 0)
    codes = _e2m1(magnitude_bits.to(tl.float32, bitcast=True) * reciprocal[:, None])
    codes = codes | ((bits >> 28) & sign_bit[:, None])

    low, high = tl.split(tl.reshape(codes, [TILE_BLOCKS, BLOCK // 2, 2]))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = (low | (high << 4)).to(tl.uint8)
    tl.store(codes_ptr + first_block * (BLOCK // 2) + byte, packed, mask=mask)
