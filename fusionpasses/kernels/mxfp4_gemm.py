"""Product of a few tokens with an MXFP4 weight, by tensor cores that take what a thread has loaded.

The weight is the left operand of ``mma.m16n8k16``: a warp has tiles of 16 weight rows by 128 elements of K, and eight
tokens at a time are the right operand. The sum over k may run in any order, so k is numbered such that the codes a
thread loads at once are those it has to give the tensor core, and threads exchange nothing:

==========  =========================================  ============================  ==================================
layout      thread ``4 * g + c`` has, of rows g, g+8   as                            scales
==========  =========================================  ============================  ==================================
LINEAR      block c of four blocks of 32 codes         the checkpoint has them       bytes of the checkpoint; a code
                                                                                     takes two multiplications
TILES       quarter c of each of the four blocks       a tile is 1024 bytes in a     exponents of bfloat16 that make up
                                                       row; bits of a word in the    for the codes' small ones: one
                                                       order they are taken out      multiplication
==========  =========================================  ============================  ==================================

All multiplications by scales are by powers of two and exact, where ``ops/_mxfp4_weight.prepare`` allows TILES; so the
result is float32 sums of exact products.

Warps of a program have the same rows and cut K among them, so that a program reads x once for all its rows: x and not
the weight is what most bytes come from L2 for, otherwise. Programs may cut K, too (``SPLIT``). Tiles are on their way
to shared memory some steps ahead, each thread's part to a place of its own (``STAGES``): in registers, ptxas would put
the load off to where it is used. Sums are added in a fixed order: a result has the same bytes in every call.
"""

# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment,misc"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _mxfp4_words, _shared_memory
from fusionpasses.kernels._mxfp4_words import LINEAR, TILES
from fusionpasses.kernels._pieces import PTX
from fusionpasses.kernels.arch import Arch

#: A weight of so many codes and more is large: it is not in the L2 cache when it is read a second time.
LARGE = 2**26


class _Tiles(NamedTuple):
    """Tiles that are good for some weight each, and their costs in ``_cost``, in microseconds."""

    choices: tuple[tuple[int, int, int], ...]  #: row tiles, warps at most, stages
    of_x: float  #: of eight tokens of a column of 128, for a row tile
    alone: float  #: how much longer warps that are too few take: to the power of this
    part: float  #: of a part of K, besides its sums
    parts: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)  #: into which K may be cut


#: For 8, 16 and 32 tokens. Up to 24 choices of each were measured, with up to 8 parts of K, on an H200 for 13 weights
#: between 576 x 7168 and 36864 x 7168; for 16 tokens six once more, for 8 of the weights.
_TILES = {
    1: _Tiles(((1, 8, 4), (3, 8, 3), (4, 8, 4), (6, 8, 4)), 0.012, 0.5, 0.1),
    2: _Tiles(((2, 8, 3), (3, 4, 3), (5, 8, 3), (5, 4, 3)), 0.008, 0.4, 0.1, (1, 2, 4, 8)),
    4: _Tiles(((3, 4, 4), (4, 4, 8), (4, 8, 4)), 0.012, 0.5, 0.4),
}
#: Where programs decode x: ``of_x``, and for 8 and 16 tokens; more rows share what it costs.
_OF_CODES = 0.042
_TILES_OF_CODES = {
    1: _Tiles(((1, 8, 4), (3, 4, 3), (4, 8, 3), (5, 8, 3), (6, 8, 3)), _OF_CODES, 0.5, 0.1),
    2: _Tiles(((3, 4, 3), (4, 8, 4), (5, 8, 3), (6, 4, 3)), _OF_CODES, 0.5, 0.4),
}
#: The same for LINEAR, of which nothing is on its way: a scale byte is too little to be copied to shared memory.
_TILES_OF_LINEAR = {
    1: _Tiles(((1, 4, 0),), 0.012, 0.5, 0.1),
    2: _Tiles(((2, 8, 0), (3, 4, 0), (4, 8, 0)), 0.012, 0.5, 0.1),
    4: _Tiles(((3, 4, 0), (4, 8, 0)), 0.012, 0.5, 0.1),
}
#: Warps of a multiprocessor that registers suffice for, and how many keep it busy.
_WARPS = {1: (28, 12), 2: (16, 14), 4: (12, 8)}


def for_few_tokens(tokens: int, rows: int, width: int, arch: Arch) -> bool:
    """Is it ``mxfp4_gemm`` that runs? Else ``mxfp4_dequantize``, and torch's product.

    To write a weight in bfloat16 and read it again takes a small one's product twice as long, and a large one's three
    times; mxfp4_gemm takes every 32 tokens about as long as the first 32.
    """
    return arch.hopper_ptx and tokens <= (128 if rows * width >= LARGE else 64)


def decodes_tokens(tokens: int, rows: int, width: int) -> bool:
    """Does every program decode MXFP4 x? Else it is put in order, and made bfloat16, once for all.

    That is a launch more, which takes longer than to decode a few in the programs of a weight that is not large. With
    16 tokens, on an H200, 7168 x 2048 is faster with x in order and 2112 x 7168 is slower; nothing between them was
    measured.
    """
    return rows * width < LARGE and (tokens <= 8 or (tokens <= 16 and rows < width))


def launch_options(
    tokens: int, rows: int, width: int, arch: Arch, layout: str, *, decodes: bool = False
) -> dict[str, int | bool]:
    """Tile and compile options: of the choices above and ways to cut K, what should take least time.

    ``decodes``: every program decodes x.
    """
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4
    if layout == "linear":
        tiles = _TILES_OF_LINEAR[token_tiles]
        tiles = tiles._replace(of_x=_OF_CODES) if decodes else tiles
    else:
        tiles = (_TILES_OF_CODES if decodes else _TILES)[token_tiles]
    columns = -(-width // 128)
    least = None
    for row_tiles, most_warps, stages in tiles.choices:
        if row_tiles == 6 and columns <= 16:
            stages = 3  # 24576 x 1536 takes 10.3 us, and 13.8 with four; a long K takes the same, but three spill
        k_warps = min(most_warps, triton.next_power_of_2(columns))
        groups = -(-tokens // (8 * token_tiles)) * -(-rows // (16 * row_tiles))
        most_parts = 1 if groups >= 2 * arch.processors else max(1, columns // k_warps)
        for split in tiles.parts:
            if split > most_parts:
                break
            cost = _cost(tiles, tokens, rows, columns, row_tiles, token_tiles, k_warps, split, arch.processors)
            if least is None or cost < least[0]:
                least = cost, row_tiles, k_warps, stages, split
    _, row_tiles, k_warps, stages, split = least
    return {
        "ROW_TILES": row_tiles,
        "TOKEN_TILES": token_tiles,
        "K_WARPS": k_warps,
        "STAGES": stages,
        "SPLIT": split,
        "num_warps": k_warps,
        "enable_fp_fusion": False,
        "launch_pdl": True,
    }


def _cost(
    tiles: _Tiles,
    tokens: int,
    rows: int,
    columns: int,
    row_tiles: int,
    token_tiles: int,
    k_warps: int,
    split: int,
    processors: int,
) -> float:
    """Microseconds on an H200, but for what all choices have in common.

    What it chooses took 1 % longer than the best that was measured, at most 11 %; with layout LINEAR 6 %, at most 20 %.
    """
    programs = -(-tokens // (8 * token_tiles)) * -(-rows // (16 * row_tiles)) * split
    of_program = row_tiles * -(-columns // (k_warps * split)) * k_warps
    tile = 0.035 * (0.9 + 0.1 * token_tiles) + tiles.of_x * token_tiles / row_tiles
    most_warps, enough_warps = _WARPS[token_tiles]
    left = -(-programs // processors)  # of the multiprocessor that has most
    cost = 0.0
    while left > 0:
        at_once = min(left, max(1, most_warps // k_warps))
        too_few = max(1.0, enough_warps / (at_once * k_warps)) ** tiles.alone
        cost += at_once * (of_program * tile * too_few + 0.02 * k_warps)
        left -= at_once
    if split > 1:
        # A launch, and sums that are written and read.
        cost += 0.3 + split * (tiles.part + 2e-6 * tokens * rows)
    return cost


@triton.jit
def _mma(a0, a1, a2, a3, b0, b1, c):
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


# ---- what a thread loads


@triton.jit
def _load_weights(
    w_ptr,
    scales_ptr,
    first,
    rows,
    column,
    g,
    c,
    ROW_TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """For each tile, words of rows g and g + 8 and the words of their scales, four and one each.

    There are no masks: of a row or column that is not there, the last one is loaded; its product is not stored, or is
    with zeros. Then its scale must not make it infinite, which no prepared one does.
    """
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    weights = ()
    is_block = column * 4 + c < BLOCKS
    column = tl.minimum(column, COLUMNS - 1)
    for r in tl.static_range(ROW_TILES):
        if LAYOUT == TILES:
            tile = tl.minimum(first + r, (rows - 1) // 16)
            at = tile.to(tl.int64) * COLUMNS + column
            words = w_ptr.to(tl.pointer_type(tl.uint32)) + at * 256 + (g * 4 + c) * 4
            low = _mxfp4_words.four_words(words, None, ".cg")
            high = _mxfp4_words.four_words(words + 128, None, ".cg")
            s_low, s_high = _mxfp4_words.two_words(scales_ptr.to(tl.pointer_type(tl.uint32)) + at * 16 + g * 2)
        else:
            block = tl.minimum(column * 4 + c, BLOCKS - 1)
            row = (first + r) * 16 + g
            at_low = tl.minimum(row, rows - 1).to(tl.int64) * BLOCKS + block
            at_high = tl.minimum(row + 8, rows - 1).to(tl.int64) * BLOCKS + block
            low = _mxfp4_words.four_words(w_ptr.to(tl.pointer_type(tl.uint32)) + at_low * 4, None, ".cg")
            high = _mxfp4_words.four_words(w_ptr.to(tl.pointer_type(tl.uint32)) + at_high * 4, None, ".cg")
            s_low = tl.load(scales_ptr + at_low).to(tl.uint32)
            s_high = tl.load(scales_ptr + at_high).to(tl.uint32)
            if not EVEN:
                s_low = tl.where(is_block, s_low, 127)
                s_high = tl.where(is_block, s_high, 127)
        weights = weights + ((low, high, s_low, s_high),)
    return weights


@triton.jit
def load_tokens(
    x_ptr,
    x_scales_ptr,
    first_token,
    tokens,
    x_stride,
    x_scales_stride,
    column,
    g,
    c,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
    LAYOUT: tl.constexpr,
    ISA: tl.constexpr,
):
    """The elements of token g of eight that meet the words of a weight row: four times four pairs.

    Of a token that is not there, the last one is loaded; what is beyond K is zero.
    """
    PACKED: tl.constexpr = x_scales_ptr is not None
    token = tl.minimum(first_token + g, tokens - 1).to(tl.int64)
    row = x_ptr.to(tl.pointer_type(tl.uint32)) + token * (x_stride // (4 if PACKED else 2))
    result = ()
    for q in tl.static_range(4):
        if LAYOUT == TILES:
            block, quarter = column * 4 + q, c
        else:
            block, quarter = column * 4 + c, q
        inside = None if EVEN else block < BLOCKS
        if PACKED:
            word = tl.load(row + (block * 4 + quarter), mask=inside, other=None if EVEN else 0)
            byte = tl.load(x_scales_ptr + (token * x_scales_stride + tl.minimum(block, BLOCKS - 1)))
            pairs = _mxfp4_words.scaled(word, _mxfp4_words.power(byte.to(tl.uint32)), LINEAR, ISA)
            result = result + (_mxfp4_words.together(pairs, ISA) if LAYOUT == TILES else pairs,)
        else:
            w = _mxfp4_words.four_words(row + (block * 16 + quarter * 4), inside, "")
            result = result + (w if LAYOUT == TILES else _mxfp4_words.apart(w, ISA),)
    return result


@triton.jit
def _arranged(x_ptr, tile, column, lane, q: tl.constexpr, BLOCKS: tl.constexpr):
    """Where the q-th four pairs of eight tokens are, which ``mxfp4_gemm_arrange`` has put in order."""
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    return x_ptr.to(tl.pointer_type(tl.uint32)) + (((tile * COLUMNS + column) * 4 + q) * 128 + lane * 4)


# ---- sums


@triton.jit
def scale_of(word, q: tl.constexpr, LAYOUT: tl.constexpr):
    if LAYOUT == TILES:
        return ((word >> (8 * q)) & 0xFF) * 0x00800080
    else:
        return _mxfp4_words.power(word)


@triton.jit
def _add_tile(acc, weight, x, TOKEN_TILES: tl.constexpr, LAYOUT: tl.constexpr, ISA: tl.constexpr):
    """Sums of a tile's rows with all tokens, four for each tile of tokens, after one more tile of the weight."""
    low, high, s_low, s_high = weight
    for q in tl.static_range(4):
        a = _mxfp4_words.scaled(low[q], scale_of(s_low, q, LAYOUT), LAYOUT, ISA)
        b = _mxfp4_words.scaled(high[q], scale_of(s_high, q, LAYOUT), LAYOUT, ISA)
        new = ()
        for n in tl.static_range(TOKEN_TILES):
            y = x[n * 4 + q]
            t = (acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3])
            t = _mma(a[0], b[0], a[1], b[1], y[0], y[1], t)
            t = _mma(a[2], b[2], a[3], b[3], y[2], y[3], t)
            new = new + (t[0], t[1], t[2], t[3])
        acc = new
    return acc


# ---- weights on their way to shared memory, where each thread reads what it has copied itself


@triton.jit
def _stage(
    place,
    place_of_scales,
    weight,
    scales,
    column,
    left,
    AHEAD: tl.constexpr,
    ROW_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    APART: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Begins to copy what a thread needs of the tile that comes AHEAD tiles after the first of a column; or zeros."""
    r: tl.constexpr = AHEAD % ROW_TILES
    AFTER: tl.constexpr = AHEAD // ROW_TILES * APART
    OFFSET: tl.constexpr = r * COLUMNS + AFTER
    exists = (column + AFTER < COLUMNS) & (r < left)
    _shared_memory.copy16(place, weight + OFFSET * 1024, exists)
    _shared_memory.copy16(place + THREADS * 16, weight + (OFFSET * 1024 + 512), exists)
    _shared_memory.copy8(place_of_scales, scales + OFFSET * 64, exists)
    _shared_memory.commit(place)


@triton.jit
def _staged(place, place_of_scales, STAGES: tl.constexpr, THREADS: tl.constexpr):
    """The oldest tile on its way."""
    _shared_memory.wait(place, STAGES - 1)
    low = _shared_memory.read16(place)
    high = _shared_memory.read16(place + THREADS * 16)
    s_low, s_high = _shared_memory.read8(place_of_scales)
    return low, high, s_low, s_high


@triton.jit(do_not_specialize=["tokens"])
def mxfp4_gemm_arrange(
    x_ptr,
    x_scales_ptr,  # None: x is bfloat16
    out_ptr,  # bfloat16, of whole tiles
    tokens,
    x_stride,
    x_scales_stride,
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
    WARPS: tl.constexpr,
    ISA: tl.constexpr,
):
    """Tokens in the order in which the threads of ``mxfp4_gemm`` load them, 16 bytes each; codes become bfloat16.

    Once for all rows of the weight. It must wait before it lets ``mxfp4_gemm`` start, which relies on that.
    """
    BLOCKS: tl.constexpr = K // 32
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    if ISA == PTX:
        gdc_wait()
        gdc_launch_dependents()
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 32
    tile = tl.program_id(1)
    column = tl.program_id(0) * WARPS + thread // 32
    x = load_tokens(
        x_ptr,
        x_scales_ptr,
        tile * 8,
        tokens,
        x_stride,
        x_scales_stride,
        column,
        lane // 4,
        lane % 4,
        BLOCKS,
        False,
        LAYOUT,
        ISA,
    )
    for q in tl.static_range(4):
        words = tl.reshape(tl.join(tl.join(x[q][0], x[q][2]), tl.join(x[q][1], x[q][3])), [WARPS * 32, 4])
        pointers = _arranged(out_ptr, tile, column, lane, q, BLOCKS)[:, None] + tl.arange(0, 4)[None, :]
        tl.store(pointers, words, mask=(column < COLUMNS)[:, None])


# ---- results


@triton.jit
def store_tile(sums, r, n, row, token, bias_ptr, out_ptr, tokens, rows, factor, exists):
    """What a warp has of a tile of 16 rows and 8 tokens, the r-th and n-th after ``row`` and ``token``."""
    for i in tl.static_range(4):
        row_i = row + r * 16 + 8 * (i // 2)
        token_i = token + n * 8 + i % 2
        value = sums[i] * factor
        stored = exists & (row_i < rows) & (token_i < tokens)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + row_i, mask=stored, other=0).to(tl.float32)
        tl.store(out_ptr + (token_i.to(tl.int64) * rows + row_i), value.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _sum_of_warps(place, K_WARPS: tl.constexpr):
    """In the order of the warps."""
    total = (0.0, 0.0, 0.0, 0.0)
    for warp in tl.static_range(K_WARPS):
        new = ()
        words = _shared_memory.read16(place + warp * 512)
        for i in tl.static_range(4):
            new = new + (total[i] + words[i].to(tl.float32, bitcast=True),)
        total = new
    return total


@triton.jit
def _store_sums(
    acc,
    thread,
    place,
    bias_ptr,
    out_ptr,
    first_row,
    first_token,
    tokens,
    rows,
    factor,
    COUNT: tl.constexpr,  # of tiles of 16 rows and 8 tokens
    AT_ONCE: tl.constexpr,  # that there is room for in shared memory
    TOKEN_TILES: tl.constexpr,
    K_WARPS: tl.constexpr,
):
    row = first_row + thread % 32 // 4
    token = first_token + thread % 4 * 2
    if K_WARPS == 1:
        for t in tl.static_range(COUNT):
            sums = acc[4 * t], acc[4 * t + 1], acc[4 * t + 2], acc[4 * t + 3]
            r, n = t // TOKEN_TILES, t % TOKEN_TILES
            store_tile(sums, r, n, row, token, bias_ptr, out_ptr, tokens, rows, factor, thread >= 0)
    else:
        warp = thread // 32
        _shared_memory.wait(place, 0)
        for begin in tl.static_range(0, COUNT, AT_ONCE):
            _shared_memory.barrier(place)
            for t in tl.static_range(begin, min(begin + AT_ONCE, COUNT)):
                sums = acc[4 * t], acc[4 * t + 1], acc[4 * t + 2], acc[4 * t + 3]
                _shared_memory.write16(place + (t - begin) * (K_WARPS * 512), sums)
            _shared_memory.barrier(place)
            # Tiles are dealt out to the warps.
            for i in tl.static_range(0, min(AT_ONCE, COUNT - begin), K_WARPS):
                mine = i + warp
                exists = mine < min(AT_ONCE, COUNT - begin)
                sums = _sum_of_warps(place + (tl.where(exists, mine, 0) * K_WARPS - warp) * 512, K_WARPS)
                r, n = (begin + mine) // TOKEN_TILES, (begin + mine) % TOKEN_TILES
                store_tile(sums, r, n, row, token, bias_ptr, out_ptr, tokens, rows, factor, exists)


@triton.jit(do_not_specialize=["tokens", "rows"])
def mxfp4_gemm(
    x_ptr,  # bfloat16, or codes
    x_scales_ptr,  # None: x is bfloat16
    w_ptr,
    w_scales_ptr,
    bias_ptr,  # or None
    out_ptr,
    tokens,
    rows,
    x_stride,  # None: x is arranged
    factor,  # float32, a power of two that all sums take
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
    ROW_TILES: tl.constexpr,
    TOKEN_TILES: tl.constexpr,  # of eight tokens
    K_WARPS: tl.constexpr,
    STAGES: tl.constexpr,  # tiles of the weight that a thread has on their way; 0: it waits for each
    SPLIT: tl.constexpr,  # of K over programs, each with its sums [tokens, rows] in out
    ISA: tl.constexpr,
):
    BLOCKS: tl.constexpr = K // 32
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    APART: tl.constexpr = K_WARPS * SPLIT
    STEPS: tl.constexpr = (COLUMNS + APART - 1) // APART
    EVEN: tl.constexpr = BLOCKS % (4 * APART) == 0
    SUMS: tl.constexpr = TOKEN_TILES * 4
    THREADS: tl.constexpr = K_WARPS * 32
    # One element for each thread, in one dimension: Triton has no choice which thread has which, and each thread holds
    # what the tensor core expects of it.
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    g = lane // 4
    c = lane % 4
    first = tl.program_id(1) * ROW_TILES
    start = tl.program_id(2) * K_WARPS + thread // 32
    first_token = tl.program_id(0) * (TOKEN_TILES * 8)
    # Where x is arranged, the kernel before is mxfp4_gemm_arrange, which has itself waited for all that may have
    # written the weight: only x is to be waited for.
    if ISA == PTX and x_stride is not None:
        gdc_wait()

    SIZE: tl.constexpr = THREADS * 40
    AT_ONCE: tl.constexpr = STAGES * 5 // 2 if STAGES > 0 else 4
    place = thread
    if STAGES > 0 or K_WARPS > 1:
        place = _shared_memory.places(thread, THREADS * 16 * AT_ONCE + THREADS * (STAGES % 2 * 8))
    if STAGES > 0:
        place_of_scales = place + THREADS * 32 - thread * 8
        at = first.to(tl.int64) * COLUMNS + start
        weight = w_ptr.to(tl.uint64, bitcast=True).to(tl.int64) + at * 1024 + lane * 16
        scales = w_scales_ptr.to(tl.uint64, bitcast=True).to(tl.int64) + at * 64 + g * 8
        left = (rows + 15) // 16 - first
        for i in tl.static_range(STAGES):
            to = place + SIZE * i, place_of_scales + SIZE * i
            _stage(to[0], to[1], weight, scales, start, left, i, ROW_TILES, COLUMNS, APART, THREADS)
        slot = tl.zeros([THREADS], tl.int32)
    if ISA == PTX:
        if x_stride is None:
            gdc_wait()
        gdc_launch_dependents()

    acc = ()
    for _ in tl.static_range(ROW_TILES * SUMS):
        acc = acc + (tl.zeros([THREADS], tl.float32),)
    for step in tl.range(STEPS):
        column = start + step * APART
        if STAGES == 0:
            weights = _load_weights(w_ptr, w_scales_ptr, first, rows, column, g, c, ROW_TILES, BLOCKS, EVEN, LAYOUT)
        x = ()
        for n in tl.static_range(TOKEN_TILES):
            if x_stride is None:
                tile = tl.minimum(tl.program_id(0) * TOKEN_TILES + n, (tokens - 1) // 8)
                for q in tl.static_range(4):
                    exists = None if EVEN else column < COLUMNS
                    x = x + (_mxfp4_words.four_words(_arranged(x_ptr, tile, column, lane, q, BLOCKS), exists, ""),)
            else:
                x = x + load_tokens(
                    x_ptr,
                    x_scales_ptr,
                    first_token + n * 8,
                    tokens,
                    x_stride,
                    BLOCKS,
                    column,
                    g,
                    c,
                    BLOCKS,
                    EVEN,
                    LAYOUT,
                    ISA,
                )
        new = ()
        for r in tl.static_range(ROW_TILES):
            part = ()
            for i in tl.static_range(SUMS):
                part = part + (acc[r * SUMS + i],)
            if STAGES > 0:
                tile = _staged(place + slot, place_of_scales + slot, STAGES, THREADS)
                to = place + slot, place_of_scales + slot
                _stage(to[0], to[1], weight, scales, column, left, r + STAGES, ROW_TILES, COLUMNS, APART, THREADS)
                slot = tl.where(slot == SIZE * (STAGES - 1), 0, slot + SIZE)
                new = new + _add_tile(part, tile, x, TOKEN_TILES, LAYOUT, ISA)
            else:
                new = new + _add_tile(part, weights[r], x, TOKEN_TILES, LAYOUT, ISA)
        acc = new
        if STAGES > 0:
            weight += APART * 1024
            scales += APART * 64

    _store_sums(
        acc,
        thread,
        place,
        bias_ptr,
        out_ptr + tl.program_id(2) * (tokens.to(tl.int64) * rows),
        first * 16,
        first_token,
        tokens,
        rows,
        factor,
        ROW_TILES * TOKEN_TILES,
        AT_ONCE,
        TOKEN_TILES,
        K_WARPS,
    )
