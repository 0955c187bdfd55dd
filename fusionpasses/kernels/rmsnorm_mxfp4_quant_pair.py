"""Two RMSNorms of the same rows in one launch: the first programs norm and quantise rows of x, the others norm x2.

For sizes at which a launch takes longer than what it does: one token of DeepSeek-V3 has 1536 and 512 elements here. A
program keeps its rows in registers, as ``rmsnorm_mxfp4_quant.py`` does, and does each step by the same functions on the
same tile, so the bytes of both parts are those of that kernel: a row's squares are added in an order that depends on
its tile alone, how many blocks and chunks, and not on how many rows a program has. Roundings and the bound of the sum
are there, too.

Programs of both parts have the same number of threads, those of the longer tile; of the shorter one a program then has
more rows.
"""

# ruff: noqa: RET505, RUF005, SIM108
# mypy: disable-error-code="assignment"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _pieces, _token_order
from fusionpasses.kernels import rmsnorm_mxfp4_quant as one_norm
from fusionpasses.kernels._mxfp4 import BLOCK, PTX
from fusionpasses.kernels.arch import Arch


def launch_options(
    rows: int,
    row_blocks: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    cast_order: str,
    row_blocks2: int,
    weight_dtype2: torch.dtype | None,
    norm_dtype2: torch.dtype,
    cast_order2: str,
    arch: Arch,
) -> tuple[dict[str, int | bool | None], int, int] | None:
    """Tile and compile options, and how many programs to start for x and for x2; None: a launch for each is needed.

    That is, for rows of more than 8192 elements: they need not fit the registers of one program.
    """
    if max(row_blocks, row_blocks2) > 256:
        return None
    # The tiles that each would have by itself, because they decide in which order squares are added.
    one, _ = one_norm.launch_options(rows, row_blocks, dtype, weight_dtype, False, None, cast_order, arch)
    two, _ = one_norm.launch_options(rows, row_blocks2, dtype, weight_dtype2, False, norm_dtype2, cast_order2, arch)
    tile, chunks, tile2, chunks2 = (int(o[name] or 0) for o in (one, two) for name in ("TILE_BLOCKS", "CHUNKS"))
    # A block for each thread.
    num_warps = max(tile // arch.warp_size, tile2 // arch.warp_size, 1)
    threads = num_warps * arch.warp_size
    options: dict[str, int | bool | None] = {
        "ROWS": threads // tile,
        "TILE_BLOCKS": tile,
        "CHUNKS": chunks,
        "ROWS2": threads // tile2,
        "TILE_BLOCKS2": tile2,
        "CHUNKS2": chunks2,
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options["launch_pdl"] = True
    return options, -(-rows * tile // threads), -(-rows * tile2 // threads)


@triton.jit
def _places(program, ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    """Each thread's row and block.

    Rows of a program follow one another in a tensor of one row, so that the threads of a row are neighbours: of a
    tensor [ROWS, TILE_BLOCKS] some releases of Triton make the rows' neighbours that, and sum in another order.
    """
    if ROWS == 1:
        return program + tl.zeros([1, 1], tl.int64), tl.arange(0, TILE_BLOCKS)[None, :]
    else:
        thread = tl.arange(0, ROWS * TILE_BLOCKS)[None, :]
        return program * ROWS + thread // TILE_BLOCKS, thread % TILE_BLOCKS


@triton.jit
def _load_rows(base, block, exists, ROW_BLOCKS: tl.constexpr, TILE_BLOCKS: tl.constexpr, CHUNKS: tl.constexpr):
    """Whole rows in registers, a tuple of chunks; zeros past their ends and where ``exists`` is off (None: nowhere)."""
    chunks = ()
    for c in tl.static_range(CHUNKS):
        at = block + c * TILE_BLOCKS
        if exists is None:
            pieces = one_norm._load_block(base, at, at < ROW_BLOCKS, (c + 1) * TILE_BLOCKS > ROW_BLOCKS, "")
        else:
            pieces = one_norm._load_block(base, at, (at < ROW_BLOCKS) & exists, True, "")
        chunks = chunks + (pieces,)
    return chunks


@triton.jit
def _rows_and_weight(
    x_ptr,
    weight_ptr,
    row,
    block,
    x_row_stride,
    rows,
    ROW_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A program's rows in registers, and the weight, whose latency so is that of x."""
    # The last program may have fewer rows than others.
    exists = None if ROWS == 1 else row < rows
    x = _load_rows(x_ptr + row * x_row_stride, block, exists, ROW_BLOCKS, TILE_BLOCKS, CHUNKS)
    weight = ()
    if weight_ptr is not None:
        # Whole tensors as of x: smaller ones would get another layout.
        weight = _load_rows(weight_ptr + tl.zeros_like(row), block, None, ROW_BLOCKS, TILE_BLOCKS, CHUNKS)
    return x, weight


@triton.jit
def _rstd_of(
    x,
    eps,
    dtype: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """For each thread, of its row."""
    squares = tl.zeros([1, ROWS * TILE_BLOCKS], tl.float32)
    for c in tl.static_range(CHUNKS):
        squares = one_norm._add_squares(squares, x[c], dtype)
    total = tl.sum(tl.reshape(squares, [ROWS, TILE_BLOCKS]), axis=1)
    mean_square = tl.div_rn(total, ROW_BLOCKS * 32.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))[:, None]
    if ROWS == 1:
        return rstd
    else:
        return tl.reshape(tl.broadcast_to(rstd, [ROWS, TILE_BLOCKS]), [1, ROWS * TILE_BLOCKS])


@triton.jit
def _normalize(
    pieces,
    weight,  # of the same columns; None: no weight
    rstd,
    block,
    mask,
    row_norm,
    dtype: tl.constexpr,
    weight_dtype: tl.constexpr,
    MASKED: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    ROUND_RESULT: tl.constexpr,
    ISA: tl.constexpr,
):
    """The steps of ``one_norm._normalize_and_quantize`` up to the stored norm."""
    ROUNDS: tl.constexpr = ROUND_RESULT and dtype != tl.float32
    IN_WORDS: tl.constexpr = ROUND_BEFORE_WEIGHT and ROUNDS and (weight is None or weight_dtype == dtype)
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
            e = _pieces.to_floats(words, dtype)
        if row_norm.dtype.scalar.element_ty == dtype and dtype != tl.float32:
            normed = words
        else:
            normed = e
        _pieces.store_piece(row_norm, block * BLOCK + p * 8, normed, mask, MASKED)


@triton.jit(do_not_specialize=["rows", "programs"])
def rmsnorm_mxfp4_quant_pair(
    x_ptr,
    weight_ptr,  # None: no weight
    x2_ptr,
    weight2_ptr,  # None: no weight
    codes_ptr,  # or numbers, in a product's order
    scales_ptr,  # or a product's flags
    norm2_ptr,
    x_row_stride,
    x2_row_stride,
    rows,
    programs,  # of x; the others are of x2
    eps,
    eps2,
    ROW_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROW_BLOCKS2: tl.constexpr,
    ROWS2: tl.constexpr,
    TILE_BLOCKS2: tl.constexpr,
    CHUNKS2: tl.constexpr,
    SCALE_ADDEND: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,  # to x's dtype
    ROUND_RESULT: tl.constexpr,  # to x's dtype; else it stays float32
    ROUND_BEFORE_WEIGHT2: tl.constexpr,
    ROUND_RESULT2: tl.constexpr,
    TOKEN_TILES: tl.constexpr,  # None: codes and scales; else of _token_order
    FLAGS: tl.constexpr,
    ISA: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight_dtype: tl.constexpr = dtype if weight_ptr is None else weight_ptr.dtype.element_ty
    weight_dtype2: tl.constexpr = dtype if weight2_ptr is None else weight2_ptr.dtype.element_ty
    MASKED: tl.constexpr = ROWS > 1 or CHUNKS * TILE_BLOCKS > ROW_BLOCKS
    MASKED2: tl.constexpr = ROWS2 > 1 or CHUNKS2 * TILE_BLOCKS2 > ROW_BLOCKS2
    if ISA == PTX:
        # Launched before the kernel in front has ended (``launch_pdl``): wait for its writes, let the next one come.
        gdc_wait()
        gdc_launch_dependents()
    # 64 bits before the first product: rows times stride passes 2**31 in tensors that fit a GPU.
    program = tl.program_id(0).to(tl.int64)
    if program < programs:
        row, first = _places(program, ROWS, TILE_BLOCKS)
        x, weight = _rows_and_weight(
            x_ptr, weight_ptr, row, first, x_row_stride, rows, ROW_BLOCKS, ROWS, TILE_BLOCKS, CHUNKS
        )
        rstd = _rstd_of(x, eps, dtype, ROW_BLOCKS, ROWS, TILE_BLOCKS, CHUNKS)
        for c in tl.static_range(CHUNKS):
            block = first + c * TILE_BLOCKS
            one_norm._normalize_and_quantize(
                x[c],
                None if weight_ptr is None else weight[c],
                rstd,
                block,
                (block < ROW_BLOCKS) & (row < rows),
                codes_ptr,
                scales_ptr,
                row,
                None,
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
        row2, first2 = _places(program - programs, ROWS2, TILE_BLOCKS2)
        x2, weight2 = _rows_and_weight(
            x2_ptr, weight2_ptr, row2, first2, x2_row_stride, rows, ROW_BLOCKS2, ROWS2, TILE_BLOCKS2, CHUNKS2
        )
        rstd2 = _rstd_of(x2, eps2, dtype, ROW_BLOCKS2, ROWS2, TILE_BLOCKS2, CHUNKS2)
        for c2 in tl.static_range(CHUNKS2):
            block2 = first2 + c2 * TILE_BLOCKS2
            _normalize(
                x2[c2],
                None if weight2_ptr is None else weight2[c2],
                rstd2,
                block2,
                (block2 < ROW_BLOCKS2) & (row2 < rows),
                norm2_ptr + row2 * (ROW_BLOCKS2 * BLOCK),
                dtype,
                weight_dtype2,
                MASKED2,
                ROUND_BEFORE_WEIGHT2,
                ROUND_RESULT2,
                ISA,
            )
    if TOKEN_TILES is not None:
        _token_order.lower_flags(scales_ptr, FLAGS)
