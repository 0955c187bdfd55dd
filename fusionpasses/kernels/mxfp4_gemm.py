"""Product of a few tokens with an MXFP4 weight, by tensor cores that take what a thread has loaded.

The weight is the left operand of ``mma.m16n8k16``: a warp has tiles of 16 weight rows by 128 elements of K, and eight
tokens at a time are the right operand. The sum over k may run in any order, so k is numbered such that the codes a
thread loads at once are those it has to give the tensor core, and nothing goes through shared memory:

==========  =========================================  ============================  ==================================
layout      thread ``4 * g + c`` has, of rows g, g+8   as                            scales
==========  =========================================  ============================  ==================================
LINEAR      block c of four blocks of 32 codes         the checkpoint has them       bytes of the checkpoint; a code
                                                                                     takes two multiplications
TILES       quarter c of each of the four blocks       a tile is 1024 bytes in a     exponents of bfloat16 that make up
                                                       row; bits of a word in the    for the codes' small ones: one
                                                       order they are taken out      multiplication
==========  =========================================  ============================  ==================================

A code becomes a bfloat16 by moving its bits, sign to sign and magnitude to the lowest bits of the exponent and the
highest of the mantissa: that is its value times 2**-126, and exact. All multiplications that follow are by powers of
two and exact, too, where ``ops/_mxfp4_weight.prepare`` allows TILES; so the result is float32 sums of exact products.

A thread loads 16 bytes of each token for 16 bytes of a weight row; from 9 tokens on, these loads would be what binds,
scattered as they are over eight rows of x. So x is put in the order of the threads first (``mxfp4_gemm_arrange``), and
MXFP4 tokens become bfloat16 there, once and not for each row of the weight.

Warps of a program share rows, or cut K among them (``K_WARPS``); then their sums are added in a fixed order: a result
has the same bytes in every call.
"""

# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment,misc"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _pieces
from fusionpasses.kernels._pieces import PTX
from fusionpasses.kernels.arch import Arch

LINEAR = tl.constexpr(0)
TILES = tl.constexpr(1)

#: A weight of so many codes and more is large: what is read ahead of it would drive itself out of L2.
LARGE = 2**26


def for_few_tokens(tokens: int, rows: int, width: int, arch: Arch) -> bool:
    """Is it ``mxfp4_gemm`` that runs? Else ``mxfp4_dequantize``, and torch's product.

    To write a weight in bfloat16 and read it again takes a small one's product twice as long, and a large one's three
    times; mxfp4_gemm reads x once for each 16 or 32 rows of the weight, which takes longer from there on.
    """
    return arch.hopper_ptx and tokens <= (64 if rows * width >= LARGE else 32)


def launch_options(tokens: int, rows: int, width: int, arch: Arch) -> dict[str, int | bool]:
    """Tile and compile options, and whether x is put in order first.

    Measured on an H200 with weights of 18432 x 7168, 2112 x 7168 and 7168 x 2048, in CUDA graphs: some 30 choices for
    1, 16 and 32 tokens each. Many warps of few registers are best for few tokens, each with a tile of 16 rows.
    """
    large = rows * width >= LARGE
    # Too few tiles to give each multiprocessor eight warps of its own.
    narrow = -(-rows // 16) * 4 < 8 * arch.processors
    if tokens <= 8 or (narrow and tokens <= 16):
        chosen = (1, 1, 1, 8 if narrow else 4, 0 if large else 4)
    elif narrow:
        chosen = (1, 4, 1, 8, 0)
    elif tokens <= 16:
        chosen = (2, 2, 1, 4, 0) if large else (1, 2, 2, 4, 2)
    else:
        chosen = (2, 4, 2, 2, 4) if large else (2, 4, 1, 4, 2)
    row_tiles, token_tiles, row_warps, k_warps, fetched = chosen
    columns = -(-width // 128)
    k_warps = min(k_warps, triton.next_power_of_2(columns))
    return {
        "ROW_TILES": row_tiles,
        "TOKEN_TILES": token_tiles,
        "ROW_WARPS": row_warps,
        "K_WARPS": k_warps,
        "FETCHED": fetched,
        "ARRANGED": tokens > 8,
        "num_warps": row_warps * k_warps,
        "enable_fp_fusion": False,
        "launch_pdl": True,
    }


def dequantize_options(arch: Arch) -> dict[str, int | bool]:
    """Two words a thread: one takes twice as long on an H200, more take 2 % longer."""
    options: dict[str, int | bool] = {
        "UNROLLED": 2,
        "LANES": 4 * arch.warp_size,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options["launch_pdl"] = True
    return options


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


@triton.jit
def _low_halves(a, b, ISA: tl.constexpr):
    if ISA == PTX:
        return _pieces.packed("prmt.b32 $0, $1, $2, 0x5410;", a, b)
    else:
        return (a & 0xFFFF) | (b << 16)


@triton.jit
def _high_halves(a, b, ISA: tl.constexpr):
    if ISA == PTX:
        return _pieces.packed("prmt.b32 $0, $1, $2, 0x7632;", a, b)
    else:
        return (a >> 16) | (b & 0xFFFF0000)


@triton.jit
def _times(words, word, ISA: tl.constexpr):
    return (
        _pieces.multiply_word(words[0], word, tl.bfloat16, ISA),
        _pieces.multiply_word(words[1], word, tl.bfloat16, ISA),
        _pieces.multiply_word(words[2], word, tl.bfloat16, ISA),
        _pieces.multiply_word(words[3], word, tl.bfloat16, ISA),
    )


@triton.jit
def _apart(w, ISA: tl.constexpr):
    """Eight elements, in pairs of neighbours, in pairs j, j + 4."""
    even = _low_halves(w[0], w[2], ISA), _high_halves(w[0], w[2], ISA)
    return even + (_low_halves(w[1], w[3], ISA), _high_halves(w[1], w[3], ISA))


@triton.jit
def _together(p, ISA: tl.constexpr):
    """The other way round."""
    low = _low_halves(p[0], p[1], ISA), _low_halves(p[2], p[3], ISA)
    return low + (_high_halves(p[0], p[1], ISA), _high_halves(p[2], p[3], ISA))


# ---- codes to bfloat16


@triton.jit
def _pairs(word, LAYOUT: tl.constexpr):
    """Eight codes as four pairs of bfloat16, times 2**-126.

    Pair j holds codes j and j + 4 of a word of a checkpoint; 2 * j and 2 * j + 1 of a prepared one.
    """
    if LAYOUT == TILES:
        last = ((word << 1) & 0x80008000) | ((word >> 5) & 0x01000100) | ((word >> 4) & 0x00C000C0)
        return word & 0x81C081C0, (word << 3) & 0x81C081C0, (word << 6) & 0x81C081C0, last
    else:
        return (
            ((word << 12) & 0x80008000) | ((word << 6) & 0x01C001C0),
            ((word << 8) & 0x80008000) | ((word << 2) & 0x01C001C0),
            ((word << 4) & 0x80008000) | ((word >> 2) & 0x01C001C0),
            (word & 0x80008000) | ((word >> 6) & 0x01C001C0),
        )


@triton.jit
def _power(byte):
    """A scale byte as a pair of bfloat16: 2**(byte - 127), NaN for 255."""
    bits = tl.where(byte == 0, 0x40, byte << 7)
    return tl.where(byte == 255, 0x7FFF, bits) * 0x00010001


@triton.jit
def _scaled(word, scale, LAYOUT: tl.constexpr, ISA: tl.constexpr):
    """Values of eight codes, as four pairs; ``scale`` a pair of bfloat16."""
    pairs = _pairs(word, LAYOUT)
    if LAYOUT == LINEAR:
        # 2**126 first: then the product is exact for every scale.
        pairs = _times(pairs, tl.full(word.shape, 0x7E807E80, tl.uint32), ISA)
    return _times(pairs, scale, ISA)


# ---- what a thread loads


@triton.jit
def _two_words(base):
    return tl.split(tl.load(base[:, None] + tl.arange(0, 2)[None, :]))


@triton.jit
def _four_words(base, mask, MODIFIER: tl.constexpr):
    pointers = base[:, None] + tl.arange(0, 4)[None, :]
    if mask is None:
        words = tl.load(pointers, cache_modifier=MODIFIER)
    else:
        words = tl.load(pointers, mask=mask[:, None], other=0, cache_modifier=MODIFIER)
    even, odd = tl.split(tl.reshape(words, [words.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


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
    LAYOUT: tl.constexpr,
):
    """For each tile, words of rows g and g + 8 and the words of their scales, four and one each.

    There are no masks: of a row or column that is not there, the last one is loaded; its product is not stored, or is
    with zeros.
    """
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    weights = ()
    column = tl.minimum(column, COLUMNS - 1)
    for r in tl.static_range(ROW_TILES):
        if LAYOUT == TILES:
            tile = tl.minimum(first + r, (rows - 1) // 16)
            at = tile.to(tl.int64) * COLUMNS + column
            words = w_ptr.to(tl.pointer_type(tl.uint32)) + at * 256 + (g * 4 + c) * 4
            low = _four_words(words, None, ".cg")
            high = _four_words(words + 128, None, ".cg")
            s_low, s_high = _two_words(scales_ptr.to(tl.pointer_type(tl.uint32)) + at * 16 + g * 2)
        else:
            block = tl.minimum(column * 4 + c, BLOCKS - 1)
            row = (first + r) * 16 + g
            at_low = tl.minimum(row, rows - 1).to(tl.int64) * BLOCKS + block
            at_high = tl.minimum(row + 8, rows - 1).to(tl.int64) * BLOCKS + block
            low = _four_words(w_ptr.to(tl.pointer_type(tl.uint32)) + at_low * 4, None, ".cg")
            high = _four_words(w_ptr.to(tl.pointer_type(tl.uint32)) + at_high * 4, None, ".cg")
            s_low = tl.load(scales_ptr + at_low).to(tl.uint32)
            s_high = tl.load(scales_ptr + at_high).to(tl.uint32)
        weights = weights + ((low, high, s_low, s_high),)
    return weights


@triton.jit
def _fetch_weights(w_ptr, scales_ptr, first, rows, column, lane, ROW_TILES: tl.constexpr, BLOCKS: tl.constexpr):
    """Has L2 read the tiles of a column: to wait for DRAM in a later step, a thread would need more registers.

    Eight threads fetch the lines of a tile, a ninth those of its scales, the other half of the warp the next tile.
    """
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    line = lane % 16
    for r in tl.static_range(0, ROW_TILES, 2):
        tile = first + r + lane // 16
        at = tile.to(tl.int64) * COLUMNS + column
        weight = w_ptr.to(tl.uint64, bitcast=True).to(tl.int64) + at * 1024 + line * 128
        scales = scales_ptr.to(tl.uint64, bitcast=True).to(tl.int64) + at * 64
        wanted = (line < 9) & (column < COLUMNS) & (tile * 16 < rows) & (lane // 16 + r < ROW_TILES)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r",
            [tl.where(line < 8, weight, scales), wanted.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _load_tokens(
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
            pairs = _scaled(word, _power(byte.to(tl.uint32)), LINEAR, ISA)
            result = result + (_together(pairs, ISA) if LAYOUT == TILES else pairs,)
        else:
            w = _four_words(row + (block * 16 + quarter * 4), inside, "")
            result = result + (w if LAYOUT == TILES else _apart(w, ISA),)
    return result


@triton.jit
def _arranged(x_ptr, tile, column, lane, q: tl.constexpr, BLOCKS: tl.constexpr):
    """Where the q-th four pairs of eight tokens are, which ``mxfp4_gemm_arrange`` has put in order."""
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    return x_ptr.to(tl.pointer_type(tl.uint32)) + (((tile * COLUMNS + column) * 4 + q) * 128 + lane * 4)


# ---- sums


@triton.jit
def _scale_of(word, q: tl.constexpr, LAYOUT: tl.constexpr):
    if LAYOUT == TILES:
        return ((word >> (8 * q)) & 0xFF) * 0x00800080
    else:
        return _power(word)


@triton.jit
def _add_tile(acc, weight, x, TOKEN_TILES: tl.constexpr, LAYOUT: tl.constexpr, ISA: tl.constexpr):
    """Sums of a tile's rows with all tokens, four for each tile of tokens, after one more tile of the weight."""
    low, high, s_low, s_high = weight
    for q in tl.static_range(4):
        a = _scaled(low[q], _scale_of(s_low, q, LAYOUT), LAYOUT, ISA)
        b = _scaled(high[q], _scale_of(s_high, q, LAYOUT), LAYOUT, ISA)
        new = ()
        for n in tl.static_range(TOKEN_TILES):
            y = x[n * 4 + q]
            t = (acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3])
            t = _mma(a[0], b[0], a[1], b[1], y[0], y[1], t)
            t = _mma(a[2], b[2], a[3], b[3], y[2], y[3], t)
            new = new + (t[0], t[1], t[2], t[3])
        acc = new
    return acc


@triton.jit
def _joined(t, COUNT: tl.constexpr):
    """``COUNT`` tensors, a power of two, as one with further axes of two."""
    if COUNT == 1:
        return t[0]
    else:
        pairs = ()
        for i in tl.static_range(COUNT // 2):
            pairs = pairs + (tl.join(t[2 * i], t[2 * i + 1]),)
        return _joined(pairs, COUNT // 2)


@triton.jit
def _parted(t, COUNT: tl.constexpr):
    """The other way round, of ``[N, COUNT]``."""
    if COUNT == 1:
        return (tl.reshape(t, [t.shape[0]]),)
    else:
        a, b = tl.split(tl.reshape(t, [t.shape[0], COUNT // 2, 2]))
        return _parted(a, COUNT // 2) + _parted(b, COUNT // 2)


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
    """Tokens in the order in which the threads of ``mxfp4_gemm`` load them, 16 bytes each; codes become bfloat16."""
    BLOCKS: tl.constexpr = K // 32
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    if ISA == PTX:
        gdc_wait()
        gdc_launch_dependents()
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 32
    tile = tl.program_id(1)
    column = tl.program_id(0) * WARPS + thread // 32
    x = _load_tokens(
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


@triton.jit(do_not_specialize=["tokens", "rows"])
def mxfp4_gemm(
    x_ptr,  # bfloat16
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
    ROW_TILES: tl.constexpr,  # of a warp
    TOKEN_TILES: tl.constexpr,  # of eight tokens
    ROW_WARPS: tl.constexpr,
    K_WARPS: tl.constexpr,
    FETCHED: tl.constexpr,  # steps that the weight is brought to L2 ahead
    ISA: tl.constexpr,
):
    BLOCKS: tl.constexpr = K // 32
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    STEPS: tl.constexpr = (COLUMNS + K_WARPS - 1) // K_WARPS
    EVEN: tl.constexpr = BLOCKS % (4 * K_WARPS) == 0
    SUMS: tl.constexpr = TOKEN_TILES * 4
    # One element for each thread, in one dimension: Triton has no choice which thread has which, and each thread holds
    # what the tensor core expects of it.
    thread = tl.arange(0, ROW_WARPS * K_WARPS * 32)
    lane = thread % 32
    g = lane // 4
    c = lane % 4
    first = (tl.program_id(1) * ROW_WARPS + thread // 32 % ROW_WARPS) * ROW_TILES
    start = thread // (32 * ROW_WARPS)
    first_token = tl.program_id(0) * (TOKEN_TILES * 8)
    FETCHES: tl.constexpr = FETCHED if LAYOUT == TILES and ISA == PTX else 0
    # Even before the kernel in front has ended: what it may still write is written to L2, too.
    for step in tl.static_range(FETCHES):
        _fetch_weights(w_ptr, w_scales_ptr, first, rows, start + step * K_WARPS, lane, ROW_TILES, BLOCKS)
    if ISA == PTX:
        gdc_wait()
        gdc_launch_dependents()

    acc = ()
    for _ in tl.static_range(ROW_TILES * SUMS):
        acc = acc + (tl.zeros([ROW_WARPS * K_WARPS * 32], tl.float32),)
    for step in tl.range(STEPS):
        column = start + step * K_WARPS
        if FETCHES > 0:
            ahead = column + FETCHES * K_WARPS
            _fetch_weights(w_ptr, w_scales_ptr, first, rows, ahead, lane, ROW_TILES, BLOCKS)
        weights = _load_weights(w_ptr, w_scales_ptr, first, rows, column, g, c, ROW_TILES, BLOCKS, LAYOUT)
        x = ()
        for n in tl.static_range(TOKEN_TILES):
            if x_stride is None:
                tile = tl.minimum(tl.program_id(0) * TOKEN_TILES + n, (tokens - 1) // 8)
                for q in tl.static_range(4):
                    exists = None if EVEN else column < COLUMNS
                    x = x + (_four_words(_arranged(x_ptr, tile, column, lane, q, BLOCKS), exists, ""),)
            else:
                x = x + _load_tokens(
                    x_ptr, None, first_token + n * 8, tokens, x_stride, 0, column, g, c, BLOCKS, EVEN, LAYOUT, ISA
                )
        new = ()
        for r in tl.static_range(ROW_TILES):
            part = ()
            for i in tl.static_range(SUMS):
                part = part + (acc[r * SUMS + i],)
            new = new + _add_tile(part, weights[r], x, TOKEN_TILES, LAYOUT, ISA)
        acc = new

    if K_WARPS > 1:
        COUNT: tl.constexpr = ROW_TILES * SUMS
        every = _joined(acc, COUNT)
        acc = _parted(tl.sum(tl.reshape(every, [K_WARPS, ROW_WARPS * 32, COUNT]), axis=0), COUNT)
    lane = tl.arange(0, ROW_WARPS * 32)
    tile = tl.program_id(1) * (ROW_WARPS * ROW_TILES) + lane // 32 * ROW_TILES
    for r in tl.static_range(ROW_TILES):
        for i in tl.static_range(2):
            row = (tile + r) * 16 + lane % 32 // 4 + 8 * i
            bias = 0.0
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)
            for n in tl.static_range(TOKEN_TILES):
                for j in tl.static_range(2):
                    token = first_token + n * 8 + lane % 4 * 2 + j
                    value = acc[r * SUMS + n * 4 + i * 2 + j] * factor + bias
                    at = token.to(tl.int64) * rows + row
                    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=(row < rows) & (token < tokens))


@triton.jit(do_not_specialize=["words"])
def mxfp4_dequantize(
    w_ptr,
    scales_ptr,
    out_ptr,  # bfloat16 [rows, K]
    words,
    rows,
    shift,  # 2**shift is what all values take, in TILES
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
    UNROLLED: tl.constexpr,
    LANES: tl.constexpr,
    ISA: tl.constexpr,
):
    """The weight in bfloat16, exact but where that has no such number. A thread makes eight of a word."""
    BLOCKS: tl.constexpr = K // 32
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    if ISA == PTX:
        gdc_wait()
        gdc_launch_dependents()
    for i in tl.static_range(UNROLLED):
        at = (tl.program_id(0).to(tl.int64) * UNROLLED + i) * LANES + tl.arange(0, LANES)
        word = tl.load(w_ptr.to(tl.pointer_type(tl.uint32)) + at, mask=at < words, other=0)
        if LAYOUT == TILES:
            part = (at % 256).to(tl.int32)
            row = at // (COLUMNS * 256) * 16 + part // 128 * 8 + part % 128 // 16
            column = (at // 256 % COLUMNS).to(tl.int32)
            block = column * 4 + part % 4
            element = block * 32 + part % 16 // 4 * 8
            exists = (row < rows) & (block < BLOCKS)
            byte = at // 256 * 64 + part % 128 // 16 * 8 + part // 128 * 4 + part % 4
        else:
            row = at // (BLOCKS * 4)
            element = (at % (BLOCKS * 4)).to(tl.int32) * 8
            exists = at < words
            byte = at // 4
        scale = tl.load(scales_ptr + byte, mask=exists, other=127).to(tl.uint32)
        scale = scale * 0x00800080 if LAYOUT == TILES else _power(scale)
        v = _scaled(word, scale, LAYOUT, ISA)
        if LAYOUT == LINEAR:
            v = _together(v, ISA)
        else:
            v = _times(v, tl.full(word.shape, (shift + 127) * 0x00800080, tl.uint32), ISA)
        eight = tl.reshape(tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3])), [LANES, 4])
        out = out_ptr.to(tl.pointer_type(tl.uint32)) + (row * K + element) // 2
        tl.store(out[:, None] + tl.arange(0, 4)[None, :], eight, mask=exists[:, None])
