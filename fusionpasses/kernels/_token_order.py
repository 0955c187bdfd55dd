"""Quantised tokens as a product wants them: bfloat16 numbers, in the order in which its threads load them.

What ``mxfp4_gemm_arrange`` and ``mxfp4_gemm_interleave`` make of codes and scales, by the kernel that quantises.
A thread has a block of 32 elements of one token, ``row``; eight tokens are a tile, four blocks a column. Words are
pairs of bfloat16, word j of a quarter of a block the elements ``2 * j`` and ``2 * j + 1`` of its eight:

===========  ===========================================================================================
TOKEN_TILES  where word j of quarter c of block q of a token g of a tile is
===========  ===========================================================================================
0            for ``mxfp4_gemm``: ``(((tile * columns + column) * 4 + q) * 8 + g) * 16 + c * 4 + j``
n            for ``mxfp4_gemm_wgmma``, n tiles together:
             ``((((tile // n * columns + column) * 4 + q) * 4 + j) * n + tile % n) * 32 + g * 4 + c``
===========  ===========================================================================================

Only of widths that are whole columns, and for ``mxfp4_gemm_wgmma`` whole steps: what would be beyond is not written. Of
a tile's tokens that are not there neither; whatever they hold, no sum of another token takes it.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"
# (Triton does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl

from fusionpasses.kernels import _mxfp4_words, _pieces
from fusionpasses.kernels._mxfp4_words import LINEAR


@triton.jit
def lower_flags(flags_ptr, FLAGS: tl.constexpr):
    """``mxfp4_gemm_wgmma``'s int32 flags become 0; all programs do a part."""
    if FLAGS > 0:
        at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        for first in tl.range(at * 128, FLAGS, tl.num_programs(0) * tl.num_programs(1) * 128):
            flag = first + tl.arange(0, 128)
            tl.store(flags_ptr + flag, 0, mask=flag < FLAGS)


@triton.jit
def place_of(at, BLOCKS: tl.constexpr):
    """Row and block of the at-th thread, where blocks may go to any: a warp has eight tokens, four blocks of each.

    What it stores at once is whole lines of memory so; of a single token it would be 16 bytes in each of 32.
    """
    at = at.to(tl.int32)
    column = at // 32
    tile = column // (BLOCKS // 4)
    return tile * 8 + at // 4 % 8, (column - tile * (BLOCKS // 4)) * 4 + at % 4


@triton.jit
def store(
    out_ptr,
    row,
    block,  # of a row; both of each thread
    codes,
    scale,
    mask,
    BLOCKS: tl.constexpr,  # of a row
    TOKEN_TILES: tl.constexpr,
    MASKED: tl.constexpr,
    ISA: tl.constexpr,
):
    """Four words of codes and a scale byte, as ``_mxfp4.quantize`` gives them, as numbers in their places."""
    COLUMNS: tl.constexpr = BLOCKS // 4
    row, block = row.to(tl.int32), block.to(tl.int32)
    column, q = block // 4, block % 4
    tile, g = row // 8, row % 8
    power = _mxfp4_words.power(scale.to(tl.uint32))
    eighths = ()
    for c in tl.static_range(4):
        pairs = _mxfp4_words.scaled(codes[c], power, LINEAR, ISA)
        eighths = eighths + (_mxfp4_words.together(pairs, ISA),)
    words = out_ptr.to(tl.pointer_type(tl.uint32))
    if TOKEN_TILES == 0:
        place = words + (((tile * COLUMNS + column) * 4 + q) * 8 + g) * 16
        for c in tl.static_range(4):
            _pieces.store4(place + c * 4, eighths[c], mask, MASKED)
    else:
        group, part = tile // TOKEN_TILES, tile % TOKEN_TILES
        place = words + ((((group * COLUMNS + column) * 4 + q) * 4) * TOKEN_TILES + part) * 32 + g * 4
        for j in tl.static_range(4):
            of_eighths = eighths[0][j], eighths[1][j], eighths[2][j], eighths[3][j]
            _pieces.store4(place + j * (TOKEN_TILES * 32), of_eighths, mask, MASKED)


@triton.jit
def store_quarter(
    out_ptr,
    row,
    block,  # of a row
    quarter,  # of the block; all three of each thread
    codes,  # a word
    scale,
    mask,
    BLOCKS: tl.constexpr,  # of a row
    TOKEN_TILES: tl.constexpr,
    ISA: tl.constexpr,
):
    """The same of a quarter of a block in each thread, as ``_mxfp4.quantize_quarter`` gives it."""
    tile, g = row // 8, row % 8
    column, q = block // 4, block % 4
    pairs = _mxfp4_words.scaled(codes, _mxfp4_words.power(scale.to(tl.uint32)), LINEAR, ISA)
    eight = _mxfp4_words.together(pairs, ISA)
    words = out_ptr.to(tl.pointer_type(tl.uint32))
    for j in tl.static_range(4):
        if TOKEN_TILES == 0:
            at = (((tile * (BLOCKS // 4) + column) * 4 + q) * 8 + g) * 16 + quarter * 4 + j
        else:
            first = ((tile // TOKEN_TILES * (BLOCKS // 4) + column) * 4 + q) * 4 + j
            at = (first * TOKEN_TILES + tile % TOKEN_TILES) * 32 + g * 4 + quarter
        tl.store(words + at, eight[j], mask=mask)
