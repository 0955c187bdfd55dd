"""Words of eight codes as bfloat16, for products.

A code becomes a bfloat16 by moving its bits, sign to sign and magnitude to the lowest bits of the exponent and the
highest of the mantissa: that is its value times 2**-126, and exact.
"""

# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment,misc"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl

from fusionpasses.kernels import _pieces
from fusionpasses.kernels._pieces import PTX

#: Layouts of a weight: as checkpoints have it; prepared, its bits in the order in which they are taken out.
LINEAR = tl.constexpr(0)
TILES = tl.constexpr(1)


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
def times(words, word, ISA: tl.constexpr):
    return (
        _pieces.multiply_word(words[0], word, tl.bfloat16, ISA),
        _pieces.multiply_word(words[1], word, tl.bfloat16, ISA),
        _pieces.multiply_word(words[2], word, tl.bfloat16, ISA),
        _pieces.multiply_word(words[3], word, tl.bfloat16, ISA),
    )


@triton.jit
def apart(w, ISA: tl.constexpr):
    """Eight elements, in pairs of neighbours, in pairs j, j + 4."""
    even = _low_halves(w[0], w[2], ISA), _high_halves(w[0], w[2], ISA)
    return even + (_low_halves(w[1], w[3], ISA), _high_halves(w[1], w[3], ISA))


@triton.jit
def together(p, ISA: tl.constexpr):
    """The other way round."""
    low = _low_halves(p[0], p[1], ISA), _low_halves(p[2], p[3], ISA)
    return low + (_high_halves(p[0], p[1], ISA), _high_halves(p[2], p[3], ISA))


@triton.jit
def _pairs(word, LAYOUT: tl.constexpr):
    """Eight codes as four pairs of bfloat16, times 2**-126.

    Pair j holds codes j and j + 4 of a word of a checkpoint; 2 * j and 2 * j + 1 of a prepared one.
    """
    if LAYOUT == TILES:
        # Nine instructions; a fourth pair of a single shift has no place in the word beside the others.
        turned = (word >> 6) | (word << 26)
        last = ((word << 6) & 0x80C080C0) | ((word >> 2) & 0x01000100)
        return word & 0x81C081C0, (word << 4) & 0x81C081C0, turned & 0x81C081C0, last
    else:
        return (
            ((word << 12) & 0x80008000) | ((word << 6) & 0x01C001C0),
            ((word << 8) & 0x80008000) | ((word << 2) & 0x01C001C0),
            ((word << 4) & 0x80008000) | ((word >> 2) & 0x01C001C0),
            (word & 0x80008000) | ((word >> 6) & 0x01C001C0),
        )


@triton.jit
def power(byte):
    """A scale byte as a pair of bfloat16: 2**(byte - 127), NaN for 255."""
    bits = tl.where(byte == 0, 0x40, byte << 7)
    return tl.where(byte == 255, 0x7FFF, bits) * 0x00010001


@triton.jit
def scaled(word, scale, LAYOUT: tl.constexpr, ISA: tl.constexpr):
    """Values of eight codes, as four pairs; ``scale`` a pair of bfloat16."""
    pairs = _pairs(word, LAYOUT)
    if LAYOUT == LINEAR:
        # 2**126 first: then the product is exact for every scale.
        pairs = times(pairs, tl.full(word.shape, 0x7E807E80, tl.uint32), ISA)
    return times(pairs, scale, ISA)


@triton.constexpr_function
def _times_half_text(half):
    # ptxas has the multiplication read that half for both.
    return (
        "{ .reg .b16 s<2>; .reg .b32 pair; mov.b32 {s0, s1}, $2; "
        f"mov.b32 pair, {{s{half}, s{half}}}; mul.rn.bf16x2 $0, $1, pair; }}"
    )


@triton.jit
def _times_half(a, pair, HALF: tl.constexpr, ISA: tl.constexpr):
    """Both halves of ``a`` times one of ``pair``."""
    if ISA == PTX:
        return _pieces.packed(_times_half_text(HALF), a, pair)
    else:
        return _pieces.multiply_word(a, ((pair >> (16 * HALF)) & 0xFFFF) * 0x00010001, tl.bfloat16, ISA)


@triton.jit
def factors(word):
    """The exponents of a prepared tile's four blocks as bfloat16: blocks 0 and 2, then 1 and 3."""
    return (word << 7) & 0x7F807F80, (word >> 1) & 0x7F807F80


@triton.jit
def scaled_of_tile(word, factors_of_row, q: tl.constexpr, ISA: tl.constexpr):
    """Values of the eight codes of a word of a prepared tile's block q, as four pairs."""
    pairs = _pairs(word, TILES)
    HALF: tl.constexpr = q // 2
    pair = factors_of_row[q % 2]
    return (
        _times_half(pairs[0], pair, HALF, ISA),
        _times_half(pairs[1], pair, HALF, ISA),
        _times_half(pairs[2], pair, HALF, ISA),
        _times_half(pairs[3], pair, HALF, ISA),
    )


@triton.jit
def two_words(base):
    return tl.split(tl.load(base[:, None] + tl.arange(0, 2)[None, :]))


@triton.jit
def four_words(base, mask, MODIFIER: tl.constexpr):
    pointers = base[:, None] + tl.arange(0, 4)[None, :]
    if mask is None:
        words = tl.load(pointers, cache_modifier=MODIFIER)
    else:
        words = tl.load(pointers, mask=mask[:, None], other=0, cache_modifier=MODIFIER)
    even, odd = tl.split(tl.reshape(words, [words.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3
