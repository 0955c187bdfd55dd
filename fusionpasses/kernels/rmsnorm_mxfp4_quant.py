"""One kernel for residual add, RMSNorm and MXFP4 quantisation, the add and the stored norm optional.

A program keeps one row (or several short ones) in registers, so x is read once, and goes on to the row one grid
further. Plain Triton but for the PTX of ``_mxfp4``: nothing else here depends on the GPU's vendor.

Rounding. Every elementwise step rounds once, to nearest, ties to even, as the same step in torch does; contraction to
FMA is switched off, except in the sum of squares, which asks for it. Given the same ``rstd``, the bytes are therefore
the same on every target.

``rstd = 1 / sqrt(sum(x**2) / N + eps)``, each of the four operations after the sum correctly rounded. The last two
together are within 1.5 ulp of the reciprocal square root of their argument (seen by trying every mantissa). A thread
adds the squares of eight elements, then these sums of its k pieces, and a tree of depth d adds the threads' sums, so
the sum's relative error is at most ``(8 + k + d) * 2**-24``, of which the square root passes on half; 8 + k + d is at
most 30 up to N = 32768.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl

from fusionpasses.kernels import _mxfp4
from fusionpasses.kernels._mxfp4 import BLOCK


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def launch_options(row_blocks: int, itemsize: int, adds: bool, warp_size: int) -> tuple[dict[str, int], int]:
    """Tile and compile options for rows of this many blocks, and how many programs to start per multiprocessor.

    H200, bfloat16, 16384 rows, in parts of the speed of a copy of as many bytes, for tiles TILE_BLOCKS x CHUNKS,
    measured on a draft of this kernel: they rank the options; docs/kernels.md has the times of the kernel as it is.

    =====  ===========================================  ===========================================
    N      norm                                         add + norm
    =====  ===========================================  ===========================================
    2880   32 x 3: 0.87, 64 x 2: 0.68, 128 x 1: 0.75    32 x 3: 0.83, 64 x 2: 0.85, 128 x 1: 0.96
    4096   64 x 2: 0.92, 128 x 1: 0.89, 32 x 4: 0.60    64 x 2: 0.81, 128 x 1: 0.85, 32 x 4: 0.54
    7168   128 x 2: 0.85, 256 x 1: 0.77, 64 x 4: 0.60   128 x 2: 0.84, 256 x 1: 0.89, 64 x 4: 0.59
    16384  512 x 1: 0.79                                512 x 1: 0.82
    =====  ===========================================  ===========================================

    What matters most is to load a row ahead and to keep the weight in registers: without both, 0.48 at N = 16384.
    """
    tile_blocks = _next_power_of_2(row_blocks)
    rows_per_program, chunks = 1, 1
    # The next row and the weight take two or three times the registers of a row.
    ahead = itemsize == 2 and row_blocks <= 512
    # As many programs as their registers allow; one more would run after the others, alone.
    blocks_per_processor = 512
    if tile_blocks < 2 * warp_size:
        rows_per_program = 2 * warp_size // tile_blocks
    elif not ahead:
        # More than 512 threads have too few registers each.
        chunks = max(tile_blocks // 512, 1)
    elif not adds and tile_blocks <= 256:
        # Blocks in one thread share what is done once for a row, and three parts of a power of two waste less.
        if row_blocks <= tile_blocks // 4 * 3 and tile_blocks >= 4 * warp_size:
            chunks = 3
            tile_blocks = tile_blocks // 4
            blocks_per_processor = 256
        else:
            chunks = 2
            tile_blocks = tile_blocks // 2
            blocks_per_processor = 384
    if chunks > 1 and not ahead:
        tile_blocks = tile_blocks // chunks
    return {
        "ROWS": rows_per_program,
        "TILE_BLOCKS": tile_blocks,
        "CHUNKS": chunks,
        "PIECES": 4,
        "AHEAD": ahead,
        "REREAD": row_blocks * itemsize >= 512 and not ahead,
        "num_warps": max(tile_blocks * rows_per_program // warp_size, 1),
        # Whether it is on otherwise depends on the Triton version.
        "enable_fp_fusion": False,
    }, max(blocks_per_processor // (tile_blocks * rows_per_program), 1)


@triton.jit
def _load_rows(
    ptr,
    row,
    stride,
    rows,
    ROW_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """CHUNKS * PIECES pieces of each row; zeros past its end and for rows that do not exist."""
    block = tl.arange(0, TILE_BLOCKS)[None, :, None]
    column = block * BLOCK + tl.arange(0, 4 // PIECES)[None, None, :] * (8 * PIECES)
    pieces = ()
    for c in tl.static_range(CHUNKS):
        if (c + 1) * TILE_BLOCKS > ROW_BLOCKS:
            mask = (block + c * TILE_BLOCKS < ROW_BLOCKS) & (row < rows)
        else:
            mask = row < rows
        mask = tl.broadcast_to(mask, (column + row * 0).shape)
        for p in tl.static_range(PIECES):
            at = column + (c * TILE_BLOCKS * BLOCK + p * 8)
            pieces = pieces + (_mxfp4.load_piece(ptr + row * stride, at, mask, True),)
    return pieces


@triton.jit(do_not_specialize=["rows"])
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
    rows,
    eps,
    ROW_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PIECES: tl.constexpr,
    AHEAD: tl.constexpr,  # load the next row and keep the weight, in registers
    REREAD: tl.constexpr,  # the row does not fit the registers: read it again to quantise it
    SCALE_ADDEND: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,  # to x's dtype
    ROUND_RESULT: tl.constexpr,  # to x's dtype; else it stays float32
    PTX: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    LANES: tl.constexpr = 4 // PIECES
    ROUNDS: tl.constexpr = ROUND_RESULT and dtype != tl.float32
    MASKED: tl.constexpr = ROWS > 1 or CHUNKS * TILE_BLOCKS > ROW_BLOCKS
    block0 = tl.arange(0, TILE_BLOCKS)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    column0 = block0 * BLOCK + lane * (8 * PIECES)
    within = tl.arange(0, ROWS)[:, None, None]
    # 64 bits before the first product: rows times stride passes 2**31 in tensors that fit a GPU.
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0).to(tl.int64) * ROWS
    no_row = tl.zeros([1, 1, 1], tl.int64)

    if AHEAD:
        next_x = _load_rows(x_ptr, first + within, x_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, PIECES)
        if residual_ptr is not None:
            next_residual = _load_rows(
                residual_ptr, first + within, residual_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, PIECES
            )
        if weight_ptr is not None:
            weight = _load_rows(weight_ptr, no_row, 0, 1, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, PIECES)

    for start in tl.range(first, rows, step, num_stages=1):
        row = start + within
        if AHEAD:
            x = next_x
            next_x = _load_rows(x_ptr, row + step, x_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, PIECES)
            if residual_ptr is not None:
                residual = next_residual
                next_residual = _load_rows(
                    residual_ptr, row + step, residual_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, PIECES
                )
        else:
            x = _load_rows(x_ptr, row, x_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, PIECES)
            if residual_ptr is not None:
                residual = _load_rows(
                    residual_ptr, row, residual_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, PIECES
                )

        kept = ()
        squares = tl.zeros([ROWS, TILE_BLOCKS, LANES], tl.float32)
        for c in tl.static_range(CHUNKS):
            mask = (block0 + c * TILE_BLOCKS < ROW_BLOCKS) & (row < rows)
            for p in tl.static_range(PIECES):
                piece = x[c * PIECES + p]
                if residual_ptr is not None:
                    # What is normed is the rounded sum, the one that later layers read.
                    piece = _mxfp4.add(piece, residual[c * PIECES + p], dtype, PTX)
                    _mxfp4.store_piece(
                        sum_ptr + row * (ROW_BLOCKS * BLOCK),
                        column0 + (c * TILE_BLOCKS * BLOCK + p * 8),
                        piece,
                        mask,
                        MASKED,
                    )
                squares += _mxfp4.sum_of_squares(_mxfp4.floats_of(piece, dtype, ROWS, TILE_BLOCKS, LANES))
                if not REREAD:
                    kept = kept + (piece,)
        total = tl.sum(tl.reshape(squares, [ROWS, TILE_BLOCKS * LANES]), axis=1)
        mean_square = tl.div_rn(total, ROW_BLOCKS * 32.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None, None]

        for c in tl.static_range(CHUNKS):
            mask = (block0 + c * TILE_BLOCKS < ROW_BLOCKS) & (row < rows)
            values = ()
            for p in tl.static_range(PIECES):
                column = column0 + (c * TILE_BLOCKS * BLOCK + p * 8)
                if not REREAD:
                    piece = kept[c * PIECES + p]
                else:
                    # The inputs, not the sum: another thread may have stored that.
                    piece = _mxfp4.load_piece(x_ptr + row * x_row_stride, column, mask, MASKED)
                    if residual_ptr is not None:
                        again = _mxfp4.load_piece(residual_ptr + row * residual_row_stride, column, mask, MASKED)
                        piece = _mxfp4.add(piece, again, dtype, PTX)
                e = _mxfp4.times(_mxfp4.floats_of(piece, dtype, ROWS, TILE_BLOCKS, LANES), rstd)
                if ROUND_BEFORE_WEIGHT and dtype != tl.float32:
                    words = _mxfp4.to_words(e, dtype, PTX)
                    e = _mxfp4.to_floats(words, dtype)
                if weight_ptr is not None:
                    if AHEAD:
                        w = weight[c * PIECES + p]
                    else:
                        inside = block0 + c * TILE_BLOCKS + lane * 0 < ROW_BLOCKS
                        w = _mxfp4.load_piece(weight_ptr, column, inside, MASKED)
                    if ROUND_BEFORE_WEIGHT and ROUNDS and weight_ptr.dtype.element_ty == dtype:
                        w4 = _mxfp4.split4(w, 1, TILE_BLOCKS, LANES)
                        words = _mxfp4.multiply_words(words, w4, dtype, PTX)
                    else:
                        w8 = _mxfp4.floats_of(w, weight_ptr.dtype.element_ty, 1, TILE_BLOCKS, LANES)
                        e = _mxfp4.multiply(e, w8)
                        if ROUNDS:
                            words = _mxfp4.to_words(e, dtype, PTX)
                elif ROUNDS:
                    words = _mxfp4.to_words(e, dtype, PTX)
                if ROUNDS:
                    e = _mxfp4.to_floats(words, dtype)
                if norm_ptr is not None:
                    if norm_ptr.dtype.element_ty == tl.float32:
                        piece = _mxfp4.join8(e, ROWS, TILE_BLOCKS, LANES)
                    else:
                        piece = _mxfp4.join4(words, ROWS, TILE_BLOCKS, LANES)
                    _mxfp4.store_piece(
                        norm_ptr + row * (ROW_BLOCKS * BLOCK),
                        column,
                        piece,
                        mask,
                        MASKED,
                    )
                values = values + (e,)
            codes, scale = _mxfp4.quantize(values, SCALE_ADDEND, ROUNDS and dtype == tl.bfloat16, PTX)
            _mxfp4.store_quantized(
                codes_ptr + (row * ROW_BLOCKS + c * TILE_BLOCKS) * (BLOCK // 2),
                scales_ptr + (row * ROW_BLOCKS + c * TILE_BLOCKS),
                block0,
                lane,
                codes,
                scale,
                mask,
                MASKED,
                PIECES,
            )
