"""One kernel for residual add, RMSNorm and MXFP4 quantisation, the add and the stored norm optional.

A program keeps one row (or several short ones) in registers, so x is read once, and goes on to the row one grid
further. Plain Triton but for the forms that ``ISA`` chooses and the programmatic launch: nothing else depends on the
vendor.

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

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _mxfp4, _pieces, _token_order
from fusionpasses.kernels._mxfp4 import BLOCK, PTX
from fusionpasses.kernels.arch import Arch


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def launch_options(
    rows: int,
    row_blocks: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    adds: bool,
    norm_dtype: torch.dtype | None,
    cast_order: str,
    arch: Arch,
) -> tuple[dict[str, int | bool | None], int]:
    """Tile and compile options for this many rows of this many blocks, and how many programs to start.

    ``norm_dtype`` is that of the normed row that is stored; None: it is not.

    Measured on an H200 (132 multiprocessors), mostly in bfloat16, at widths 512 to 32768 and 64 to 32768 rows, in CUDA
    graphs. sm_100 and sm_120 take the same choices; other architectures take the plain one, a program for every row, as
    everyone does for few rows.
    """
    warp = arch.warp_size
    # Longer rows than registers hold are read twice, in chunks; the second time they come from a cache.
    tile_blocks = _next_power_of_2(row_blocks) if row_blocks <= 512 else 256
    chunks = -(-row_blocks // tile_blocks)
    rows_per_program = max(warp // tile_blocks, 1)
    stores_norm = norm_dtype is not None
    stores = adds or stores_norm
    few = rows <= arch.processors
    wide = row_blocks > 256
    floats = torch.float32 in (dtype, weight_dtype, norm_dtype)
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
        # Left to itself ptxas spills a few bytes of float32 rather than take these.
        max_registers = 128 if floats and stores else None
    elif floats:
        if stores:
            max_registers = None if wide else 128
        elif not few:
            ahead, resident_warps = True, 16
            keep_weight = not wide or dtype != torch.float32
    elif stores:
        # A program for every row is best, for stores give the loads of other rows time. ptxas has to be told that more
        # registers are welcome, or it loads x after the residual to save some.
        if rows_per_program > 1:
            pass
        elif not wide and dtype == torch.bfloat16:
            # Masked, the loads come early with fewer, and more programs fit.
            masked = tile_blocks != row_blocks
            few_suffice = masked and not stores_norm and cast_order == "cast_scale"
            max_registers = 80 if few_suffice and arch.name == "sm_90" else 96
        elif not wide:
            # Lifting small blocks takes registers of its own; with a stored norm ptxas is left to itself.
            max_registers = None if stores_norm else 96
        elif not few and rows < 16 * arch.processors:
            max_registers, resident_warps = 96, 16
        elif not few and not stores_norm and dtype == torch.bfloat16:
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
        "REREAD": row_blocks > 512,
        # 3 % faster where x fits the L2, up to 15 % slower where it does not.
        "STREAM": not stores and keep_weight and chunks == 1 and rows * row_blocks * 32 * dtype.itemsize <= 40_000_000,
        "num_warps": num_warps,
        # Whether it is on otherwise depends on the Triton version.
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options |= {"maxnreg": max_registers, "launch_pdl": True}
    return options, programs


@triton.jit
def _load_block(base, block, inside, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    """A block for each thread, as four pieces; ``block`` counts from ``base``."""
    pieces = ()
    for p in tl.static_range(4):
        pieces = pieces + (_pieces.load_piece(base, block * BLOCK + p * 8, inside, MASKED, EVICTION),)
    return pieces


@triton.jit
def _store_block(base, block, pieces, mask, MASKED: tl.constexpr):
    for p in tl.static_range(4):
        _pieces.store_piece(base, block * BLOCK + p * 8, pieces[p], mask, MASKED)


@triton.jit
def _load_rows(
    base,
    exists,
    ROW_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MASKED_ROWS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Whole rows in registers, a tuple of chunks; zeros past a row's end and for rows that do not exist."""
    chunks = ()
    for c in tl.static_range(CHUNKS):
        block = tl.arange(0, TILE_BLOCKS)[None, :] + c * TILE_BLOCKS
        pieces = _load_block(
            base, block, (block < ROW_BLOCKS) & exists, MASKED_ROWS or (c + 1) * TILE_BLOCKS > ROW_BLOCKS, EVICTION
        )
        chunks = chunks + (pieces,)
    return chunks


@triton.jit
def _add_blocks(a, b, dtype: tl.constexpr, ISA: tl.constexpr):
    total = ()
    for p in tl.static_range(4):
        total = total + (_pieces.add(a[p], b[p], dtype, ISA),)
    return total


@triton.jit
def _add_squares(squares, pieces, dtype: tl.constexpr):
    for p in tl.static_range(4):
        squares += _mxfp4.sum_of_squares(_pieces.floats_of(pieces[p], dtype))
    return squares


@triton.jit
def _normalize_and_quantize(
    pieces,
    weight,  # of the same columns; None: no weight
    rstd,
    block,
    mask,
    codes_ptr,
    scales_ptr,
    row,
    row_norm,  # None: the normed row is not stored
    dtype: tl.constexpr,
    weight_dtype: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE_ADDEND: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    ROUND_RESULT: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    ISA: tl.constexpr,
):
    ROUNDS: tl.constexpr = ROUND_RESULT and dtype != tl.float32
    WORDS: tl.constexpr = ROUNDS and ISA == PTX
    # Rounded before the weight, the rest is arithmetic of x's dtype, two elements at a time.
    IN_WORDS: tl.constexpr = ROUND_BEFORE_WEIGHT and ROUNDS and (weight is None or weight_dtype == dtype)
    values = ()
    for p in tl.static_range(4):
        e = _pieces.times(_pieces.floats_of(pieces[p], dtype), rstd)
        if ROUND_BEFORE_WEIGHT and dtype != tl.float32:
            words = _pieces.to_words(e, dtype, ISA)
            if not IN_WORDS:
                e = _pieces.to_floats(words, dtype)
        if weight is not None:
            if IN_WORDS:
                words = _pieces.multiply_words(words, weight[p], dtype, ISA)
            else:
                e = _pieces.multiply(e, _pieces.floats_of(weight[p], weight_dtype))
        if ROUNDS:
            if not IN_WORDS:
                words = _pieces.to_words(e, dtype, ISA)
            if not WORDS:
                e = _pieces.to_floats(words, dtype)
        if row_norm is not None:
            if row_norm.dtype.scalar.element_ty == dtype and dtype != tl.float32:
                normed = words
            elif WORDS:
                normed = _pieces.to_floats(words, dtype)
            else:
                normed = e
            _pieces.store_piece(row_norm, block * BLOCK + p * 8, normed, mask, MASKED)
        if WORDS:
            values = values + (words,)
        else:
            values = values + (e,)
    codes, scale = _mxfp4.quantize(values, dtype, SCALE_ADDEND, WORDS, ISA)
    if TOKEN_TILES is None:
        row_codes = codes_ptr + row * (ROW_BLOCKS * BLOCK // 2)
        _mxfp4.store_quantized(row_codes, scales_ptr + row * ROW_BLOCKS, block, codes, scale, mask, MASKED)
    else:
        _token_order.store(codes_ptr, row, block, codes, scale, mask, ROW_BLOCKS, TOKEN_TILES, MASKED, ISA)


@triton.jit(do_not_specialize=["rows"])
def rmsnorm_mxfp4_quant(
    x_ptr,
    residual_ptr,  # None: nothing is added, and there is no sum
    weight_ptr,  # None: no weight
    codes_ptr,  # or numbers, in a product's order
    scales_ptr,  # or a product's flags
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
    AHEAD: tl.constexpr,  # load the next row before this one is done; without a residual
    KEEP_WEIGHT: tl.constexpr,  # in registers, from the start
    REREAD: tl.constexpr,  # the row does not fit the registers: chunk by chunk, and again to quantise it
    STREAM: tl.constexpr,  # tell L1 to keep the weight rather than rows
    SCALE_ADDEND: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,  # to x's dtype
    ROUND_RESULT: tl.constexpr,  # to x's dtype; else it stays float32
    TOKEN_TILES: tl.constexpr,  # None: codes and scales; else of _token_order
    FLAGS: tl.constexpr,
    ISA: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight_dtype: tl.constexpr = dtype if weight_ptr is None else weight_ptr.dtype.element_ty
    MASKED: tl.constexpr = ROWS > 1 or CHUNKS * TILE_BLOCKS > ROW_BLOCKS
    ROW_POLICY: tl.constexpr = "evict_first" if STREAM else ""
    WEIGHT_POLICY: tl.constexpr = "evict_last" if STREAM else ""
    if ISA == PTX:
        # Launched before the kernel in front has ended (``launch_pdl``): wait for its writes, let the next one come.
        gdc_wait()
        gdc_launch_dependents()
    block0 = tl.arange(0, TILE_BLOCKS)[None, :]
    within = tl.arange(0, ROWS)[:, None]
    # 64 bits before the first product: rows times stride passes 2**31 in tensors that fit a GPU.
    first = tl.program_id(0).to(tl.int64) * ROWS
    step = tl.num_programs(0).to(tl.int64) * ROWS

    if AHEAD:
        row = first + within
        next_x = _load_rows(
            x_ptr + row * x_row_stride, row < rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, ROWS > 1, ROW_POLICY
        )
    if KEEP_WEIGHT and weight_ptr is not None:
        # As many rows as the tile has, all the same one: a smaller tensor than a tile gets another layout.
        no_row = tl.zeros([ROWS, 1], tl.int64)
        all_weight = _load_rows(weight_ptr + no_row, no_row == 0, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, False, WEIGHT_POLICY)

    for start in tl.range(first, rows, step, num_stages=1):
        row = start + within
        row_x = x_ptr + row * x_row_stride
        if residual_ptr is not None:
            row_residual = residual_ptr + row * residual_row_stride
            row_sum = sum_ptr + row * (ROW_BLOCKS * BLOCK)
        row_norm = None if norm_ptr is None else norm_ptr + row * (ROW_BLOCKS * BLOCK)

        squares = tl.zeros([ROWS, TILE_BLOCKS], tl.float32)
        if REREAD:
            for c in range(CHUNKS):
                block = block0 + c * TILE_BLOCKS
                mask = (block < ROW_BLOCKS) & (row < rows)
                pieces = _load_block(row_x, block, mask, MASKED, "")
                if residual_ptr is not None:
                    residual = _load_block(row_residual, block, mask, MASKED, "")
                    pieces = _add_blocks(pieces, residual, dtype, ISA)
                    _store_block(row_sum, block, pieces, mask, MASKED)
                squares = _add_squares(squares, pieces, dtype)
        else:
            if AHEAD:
                # After the last row, that one once more: cheaper than a mask on every load.
                ahead = tl.minimum(row + step, rows - 1)
                x = next_x
                next_x = _load_rows(
                    x_ptr + ahead * x_row_stride, ahead < rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, ROWS > 1, ROW_POLICY
                )
            else:
                x = _load_rows(row_x, row < rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, ROWS > 1, ROW_POLICY)
            if residual_ptr is not None:
                residual = _load_rows(row_residual, row < rows, ROW_BLOCKS, TILE_BLOCKS, CHUNKS, ROWS > 1, ROW_POLICY)
            kept = ()
            for c in tl.static_range(CHUNKS):
                pieces = x[c]
                if residual_ptr is not None:
                    # What is normed is the rounded sum, the one that later layers read.
                    pieces = _add_blocks(pieces, residual[c], dtype, ISA)
                    block = block0 + c * TILE_BLOCKS
                    _store_block(row_sum, block, pieces, (block < ROW_BLOCKS) & (row < rows), MASKED)
                squares = _add_squares(squares, pieces, dtype)
                kept = kept + (pieces,)
        total = tl.sum(squares, axis=1)
        mean_square = tl.div_rn(total, ROW_BLOCKS * 32.0)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]

        if REREAD:
            for c in range(CHUNKS):
                block = block0 + c * TILE_BLOCKS
                mask = (block < ROW_BLOCKS) & (row < rows)
                # The inputs, not the sum: another thread may have stored that.
                pieces = _load_block(row_x, block, mask, MASKED, "")
                if residual_ptr is not None:
                    residual = _load_block(row_residual, block, mask, MASKED, "")
                    pieces = _add_blocks(pieces, residual, dtype, ISA)
                weight = None if weight_ptr is None else _load_block(weight_ptr, block, block < ROW_BLOCKS, MASKED, "")
                _normalize_and_quantize(
                    pieces,
                    weight,
                    rstd,
                    block,
                    mask,
                    codes_ptr,
                    scales_ptr,
                    row,
                    row_norm,
                    dtype,
                    weight_dtype,
                    MASKED,
                    SCALE_ADDEND,
                    ROUND_BEFORE_WEIGHT,
                    ROUND_RESULT,
                    ROW_BLOCKS,
                    TOKEN_TILES,
                    ISA,
                )
        else:
            for c in tl.static_range(CHUNKS):
                block = block0 + c * TILE_BLOCKS
                if weight_ptr is None:
                    weight = None
                elif KEEP_WEIGHT:
                    weight = all_weight[c]
                else:
                    weight = _load_block(
                        weight_ptr, block, block < ROW_BLOCKS, (c + 1) * TILE_BLOCKS > ROW_BLOCKS, WEIGHT_POLICY
                    )
                _normalize_and_quantize(
                    kept[c],
                    weight,
                    rstd,
                    block,
                    (block < ROW_BLOCKS) & (row < rows),
                    codes_ptr,
                    scales_ptr,
                    row,
                    row_norm,
                    dtype,
                    weight_dtype,
                    MASKED,
                    SCALE_ADDEND,
                    ROUND_BEFORE_WEIGHT,
                    ROUND_RESULT,
                    ROW_BLOCKS,
                    TOKEN_TILES,
                    ISA,
                )
    if TOKEN_TILES is not None:
        _token_order.lower_flags(scales_ptr, FLAGS)
