"""MXFP4 quantisation alone. Blocks do not depend on each other, so programs cut the tensor anywhere.

Bytes: exactly those of the reference, for every input, on every target.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl

from fusionpasses.kernels import _mxfp4
from fusionpasses.kernels._mxfp4 import BLOCK


def launch_options(blocks: int, warp_size: int) -> dict[str, int]:
    """Tile and compile options for a tensor of this many blocks.

    H200, bfloat16, N = 7168, microseconds for (PIECES, num_warps), measured on a draft of this kernel: they rank the
    options; docs/kernels.md has the times of the kernel as it is.

    =====  ======  ======  ======  ======
    rows   (2, 1)  (4, 1)  (4, 2)  (4, 4)
    =====  ======  ======  ======  ======
    64     2.30    2.38    2.36    2.38
    1024   10.5    6.94    7.11    7.12
    16384          73.8    70.5    70.8
    =====  ======  ======  ======  ======
    """
    # Few blocks: two threads for a block fill more of the GPU, and a program is as small as it gets.
    pieces = 2 if blocks < 1 << 16 else 4
    num_warps = 1 if blocks < 1 << 18 else 2
    return {
        "PIECES": pieces,
        "TILE_BLOCKS": num_warps * warp_size * pieces // 4,
        "num_warps": num_warps,
        # Whether it is on otherwise depends on the Triton version.
        "enable_fp_fusion": False,
    }


@triton.jit
def dynamic_mxfp4_quant(
    x_ptr,
    codes_ptr,
    scales_ptr,
    x_row_stride,  # None: one row, cut along the first axis of the grid; else the axes are (rows, cuts of a row)
    row_blocks,
    TILE_BLOCKS: tl.constexpr,
    PIECES: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE_ADDEND: tl.constexpr,
    PTX: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    LANES: tl.constexpr = 4 // PIECES
    # 64 bits before the first product: rows times stride passes 2**31 in tensors that fit a GPU.
    if x_row_stride is None:
        start = tl.program_id(0).to(tl.int64) * TILE_BLOCKS
        source = x_ptr + start * BLOCK
        first = start
    else:
        row = tl.program_id(0).to(tl.int64)
        start = tl.program_id(1).to(tl.int64) * TILE_BLOCKS
        source = x_ptr + row * x_row_stride + start * BLOCK
        first = row * row_blocks + start
    block = tl.arange(0, TILE_BLOCKS)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    column = block * BLOCK + lane * (8 * PIECES)
    mask = start + block < row_blocks
    pieces = ()
    for p in tl.static_range(PIECES):
        pieces = pieces + (_mxfp4.load_piece(source, column + p * 8, mask, MASKED),)
    e = ()
    for p in tl.static_range(PIECES):
        e = e + (_mxfp4.floats_of(pieces[p], dtype, 1, TILE_BLOCKS, LANES),)
    codes, scale = _mxfp4.quantize(e, SCALE_ADDEND, dtype == tl.bfloat16, PTX)
    _mxfp4.store_quantized(
        codes_ptr + first * (BLOCK // 2), scales_ptr + first, block, lane, codes, scale, mask, MASKED, PIECES
    )
