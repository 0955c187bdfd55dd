"""One kernel for residual add, RMSNorm and MXFP4 quantisation, the add and the stored norm optional.

A program keeps one row (or several short ones) in registers, so x is read once, and goes on to the row one grid
further. Plain Triton but for the PTX of ``_mxfp4`` and the programmatic launch: nothing else depends on the vendor.

Rounding. Every elementwise step rounds once, to nearest, ties to even, as the same step in torch does; contraction to
FMA is switched off, except in the sum of squares, which asks for it, and in the codes, where the product is exact.
Given the same ``rstd``, the bytes are therefore the same on every target.

``rstd = 1 / sqrt(sum(x**2) / N + eps)``, each of the four operations after the sum correctly rounded. The last two
together are within 1.5 ulp of the reciprocal square root of their argument (seen by trying every mantissa). A thread
adds the squares of eight elements, then these sums of its k pieces, and a tree of depth d adds the threads' sums, so
the sum's relative error is at most ``(8 + k + d) * 2**-24``, of which the square root passes on half; 8 + k + d is at
most 30 up to N = 32768.
"""

# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _mxfp4
from fusionpasses.kernels._mxfp4 import BLOCK
from fusionpasses.kernels.arch import Arch


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def launch_options(
    rows: int, row_blocks: int, itemsize: int, weight_itemsize: int, adds: bool, stores_norm: bool, arch: Arch
) -> tuple[dict[str, int | bool | None], int]:
    """Tile and compile options for this many rows of this many blocks, and how many programs to start.

    Item sizes are in bytes; ``weight_itemsize`` is 0 without a weight. Measured on an H200 (132 multiprocessors),
    mostly in bfloat16, at widths 512 to 32768 and 64 to 32768 rows, in CUDA graphs. sm_100 and sm_120 take the same
    choices; other architectures take the plain one, a program for every row, as everyone does for few rows.
    """
    warp = arch.warp_size
    # More than 512 blocks are taken in chunks of 256, as many as a thread's registers hold on every architecture.
    tile_blocks = _next_power_of_2(row_blocks) if row_blocks <= 512 else 256
    chunks = -(-row_blocks // tile_blocks)
    rows_per_program = max(warp // tile_blocks, 1)
    stores = adds or stores_norm
    few = rows <= arch.processors
    wide = row_blocks > 256
    floats = max(itemsize, weight_itemsize) == 4
    ahead = False
    # The weight in registers, loaded with the first row: that hides its latency, if the registers suffice.
    keep_weight = not wide or (few and chunks == 1)
    max_registers: int | None = None
    # Warps that stay on a multiprocessor (as many as the registers allow), their programs looping over rows.
    # None: a program for every row.
    resident_warps: int | None = None

    if not arch.hopper_ptx:
        pass
    elif chunks > 1:
        resident_warps = 8 if stores else 16
    elif floats:
        if stores:
            max_registers = None if wide else 128
        elif not few:
            ahead, resident_warps = True, 16
            keep_weight = not wide or itemsize == 2
    elif stores:
        # A program for every row is best, for stores give the loads of other rows time. ptxas has to be told that more
        # registers are welcome, or it loads x after the residual to save some.
        if not wide:
            masked = tile_blocks != row_blocks
            max_registers = 80 if masked and not stores_norm else 96
        elif not few and rows < 16 * arch.processors:
            max_registers, resident_warps = 96, 16
        elif not few:
            max_registers = 64
    elif few:
        pass
    elif wide and rows < 16 * arch.processors:
        ahead, keep_weight, resident_warps = True, True, 16
    elif wide:
        ahead, resident_warps = True, 16
        tile_blocks, chunks = 256, 2
    else:
        if tile_blocks == 256:
            tile_blocks, chunks = 128, 2
        resident_warps = 20 if chunks == 1 else 12
        num_warps = max(tile_blocks * rows_per_program // warp, 1)
        # The next row in registers leaves room for fewer programs; it pays from three rows for each of them.
        ahead = rows >= 3 * rows_per_program * arch.processors * (resident_warps // num_warps)
        if not ahead:
            resident_warps = 28 if chunks == 1 else 16

    num_warps = max(tile_blocks * rows_per_program // warp, 1)
    programs = -(-rows // rows_per_program)
    if resident_warps is not None:
        programs = min(programs, arch.processors * (resident_warps // num_warps))
    options: dict[str, int | bool | None] = {
        "ROWS": rows_per_program,
        "TILE_BLOCKS": tile_blocks,
        "CHUNKS": chunks,
        "AHEAD": ahead,
        "KEEP_WEIGHT": keep_weight,
        "REREAD": floats and row_blocks > 512,
        # 3 % faster where x fits the L2, up to 15 % slower where it does not.
        "STREAM": not stores and keep_weight and chunks == 1 and rows * row_blocks * 32 * itemsize <= 40_000_000,
        "num_warps": num_warps,
        # Whether it is on otherwise depends on the Triton version.
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options |= {"maxnreg": max_registers, "launch_pdl": True}
    return options, programs


@triton.jit
def _load_rows(
    ptr,
    row,
    stride,
    rows,
    ROW_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MASKED_ROWS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Four pieces for each of the row's chunks; zeros past its end and for rows that do not exist."""
    block = tl.arange(0, TILE_BLOCKS)[None, :]
    pieces = ()
    for c in tl.static_range(CHUNKS):
        mask = (block + c * TILE_BLOCKS < ROW_BLOCKS) & (row < rows)
        for p in tl.static_range(4):
            column = block * BLOCK + (c * TILE_BLOCKS * BLOCK + p * 8)
            piece = _mxfp4.load_piece(
                ptr + row * stride, column, mask, MASKED_ROWS or (c + 1) * TILE_BLOCKS > ROW_BLOCKS, EVICTION
            )
            pieces = pieces + (piece,)
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
    AHEAD: tl.constexpr,  # load the next row before this one is done
    KEEP_WEIGHT: tl.constexpr,  # in registers, from the start
    REREAD: tl.constexpr,  # the row does not fit the registers: read it again to quantise it
    STREAM: tl.constexpr,  # tell L1 to keep the weight rather than rows
    SCALE_ADDEND: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,  # to x's dtype
    ROUND_RESULT: tl.constexpr,  # to x's dtype; else it stays float32
    PTX: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    ROUNDS: tl.constexpr = ROUND_RESULT and dtype != tl.float32
    WORDS: tl.constexpr = ROUNDS and PTX
    MASKED: tl.constexpr = ROWS > 1 or CHUNKS * TILE_BLOCKS > ROW_BLOCKS
    ROW_POLICY: tl.constexpr = "evict_first" if STREAM else ""
    WEIGHT_POLICY: tl.constexpr = "evict_last" if STREAM else ""
    # Rounded before the weight, the rest is arithmetic of x's dtype, two elements at a time.
    IN_WORDS: tl.constexpr = (
        ROUND_BEFORE_WEIGHT and ROUNDS and (weight_ptr is None or weight_ptr.dtype.element_ty == dtype)
    )
    if PTX:
        # Launched before the kernel in front has ended (``launch_pdl``): wait for its writes, let the next one come.
        gdc_wait()
        gdc_launch_dependents()
    block0 = tl.arange(0, TILE_BLOCKS)[None, :]
    within = tl.arange(0, ROWS)[:, None]
    # 64 bits before the first product: rows times stride passes 2**31 in tensors that fit a GPU.
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0).to(tl.int64) * ROWS

    if AHEAD:
        next_x = _load_rows(
            x_ptr, first + within, x_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, ROWS > 1, ROW_POLICY
        )
        if residual_ptr is not None:
            next_residual = _load_rows(
                residual_ptr,
                first + within,
                residual_row_stride,
                rows,
                ROW_BLOCKS,
                TILE_BLOCKS,
                CHUNKS,
                ROWS > 1,
                ROW_POLICY,
            )
    if KEEP_WEIGHT and weight_ptr is not None:
        # As many rows as the tile has, all the same one: a smaller tensor than a tile gets another layout.
        no_row = tl.zeros([ROWS, 1], tl.int64)
        weight = _load_rows(weight_ptr, no_row, 0, 1, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, False, WEIGHT_POLICY)

    for start in tl.range(first, rows, step, num_stages=1):
        row = start + within
        if AHEAD:
            # After the last row, that one once more: cheaper than a mask on every load.
            ahead = tl.minimum(row + step, rows - 1)
            x = next_x
            next_x = _load_rows(x_ptr, ahead, x_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, ROWS > 1, ROW_POLICY)
            if residual_ptr is not None:
                residual = next_residual
                next_residual = _load_rows(
                    residual_ptr,
                    ahead,
                    residual_row_stride,
                    rows,
                    ROW_BLOCKS,
                    TILE_BLOCKS,
                    CHUNKS,
                    ROWS > 1,
                    ROW_POLICY,
                )
        else:
            x = _load_rows(x_ptr, row, x_row_stride, rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, ROWS > 1, ROW_POLICY)
            if residual_ptr is not None:
                residual = _load_rows(
                    residual_ptr,
                    row,
                    residual_row_stride,
                    rows,
                    ROW_BLOCKS,
                    TILE_BLOCKS,
                    CHUNKS,
                    ROWS > 1,
                    ROW_POLICY,
                )

        kept = ()
        squares = tl.zeros([ROWS, TILE_BLOCKS], tl.float32)
        for c in tl.static_range(CHUNKS):
            mask = (block0 + c * TILE_BLOCKS < ROW_BLOCKS) & (row < rows)
            for p in tl.static_range(4):
                piece = x[c * 4 + p]
                if residual_ptr is not None:
                    # What is normed is the rounded sum, the one that later layers read.
                    piece = _mxfp4.add(piece, residual[c * 4 + p], dtype, PTX)
                    column = block0 * BLOCK + (c * TILE_BLOCKS * BLOCK + p * 8)
                    _mxfp4.store_piece(sum_ptr + row * (ROW_BLOCKS * BLOCK), column, piece, mask, MASKED)
                squares += _mxfp4.sum_of_squares(_mxfp4.floats_of(piece, dtype))
                if not REREAD:
                    kept = kept + (piece,)
        total = tl.sum(squares, axis=1)
        mean_square = tl.div_rn(total, ROW_BLOCKS * 32.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]

        for c in tl.static_range(CHUNKS):
            mask = (block0 + c * TILE_BLOCKS < ROW_BLOCKS) & (row < rows)
            values = ()
            for p in tl.static_range(4):
                column = block0 * BLOCK + (c * TILE_BLOCKS * BLOCK + p * 8)
                if not REREAD:
                    piece = kept[c * 4 + p]
                else:
                    # The inputs, not the sum: another thread may have stored that.
                    piece = _mxfp4.load_piece(x_ptr + row * x_row_stride, column, mask, MASKED, "")
                    if residual_ptr is not None:
                        again = _mxfp4.load_piece(residual_ptr + row * residual_row_stride, column, mask, MASKED, "")
                        piece = _mxfp4.add(piece, again, dtype, PTX)
                e = _mxfp4.times(_mxfp4.floats_of(piece, dtype), rstd)
                if ROUND_BEFORE_WEIGHT and dtype != tl.float32:
                    words = _mxfp4.to_words(e, dtype, PTX)
                    if not IN_WORDS:
                        e = _mxfp4.to_floats(words, dtype)
                if weight_ptr is not None:
                    if KEEP_WEIGHT:
                        w = weight[c * 4 + p]
                    else:
                        inside = block0 + c * TILE_BLOCKS < ROW_BLOCKS
                        w = _mxfp4.load_piece(
                            weight_ptr, column, inside, (c + 1) * TILE_BLOCKS > ROW_BLOCKS, WEIGHT_POLICY
                        )
                    if IN_WORDS:
                        words = _mxfp4.multiply_words(words, w, dtype, PTX)
                    else:
                        e = _mxfp4.multiply(e, _mxfp4.floats_of(w, weight_ptr.dtype.element_ty))
                if ROUNDS:
                    if not IN_WORDS:
                        words = _mxfp4.to_words(e, dtype, PTX)
                    if not WORDS:
                        e = _mxfp4.to_floats(words, dtype)
                if norm_ptr is not None:
                    if norm_ptr.dtype.element_ty == dtype and dtype != tl.float32:
                        piece = words
                    elif WORDS:
                        piece = _mxfp4.to_floats(words, dtype)
                    else:
                        piece = e
                    _mxfp4.store_piece(norm_ptr + row * (ROW_BLOCKS * BLOCK), column, piece, mask, MASKED)
                if WORDS:
                    values = values + (words,)
                else:
                    values = values + (e,)
            codes, scale = _mxfp4.quantize(values, dtype, SCALE_ADDEND, WORDS)
            _mxfp4.store_quantized(
                codes_ptr + (row * ROW_BLOCKS + c * TILE_BLOCKS) * (BLOCK // 2),
                scales_ptr + (row * ROW_BLOCKS + c * TILE_BLOCKS),
                block0,
                codes,
                scale,
                mask,
                MASKED,
            )
