"""MXFP4 arithmetic shared by the kernels, on eight elements per thread at a time.

Layout. A thread loads 16 bytes of a 16-bit dtype as four 32-bit words and keeps them apart (``split4``), so that
everything after is elementwise and a packed output word of eight codes is made in the thread that loaded the eight
elements: no layout conversion, no shared memory. ``PIECES`` such loads per thread are one after the other in memory;
with four of them a thread has a whole block of 32, and the scale needs no exchange between threads. On an H200
(16384 x 7168, bfloat16) quantisation alone takes 101 us with one piece, 76 us with two, 71 us with four; a copy of
as many bytes 72 us.

PTX. The functions with a ``PTX`` argument have a portable form and one that spells out the packed instruction, which
LLVM does not find for the pairs wanted here. Both round the same way, so their bytes are the same. PTX needs sm_90.
"""

# ruff: noqa: RET505
# (Triton needs the else of a constexpr if, and does not know (*a, b).)

from __future__ import annotations

import triton
import triton.language as tl

#: Elements that share a scale.
BLOCK = tl.constexpr(32)
#: Elements in 16 bytes of a 16-bit dtype: one piece.
PIECE = tl.constexpr(8)


@triton.jit
def split4(t, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """``[ROWS, BLOCKS, LANES, 4]`` to four ``[ROWS, BLOCKS, LANES]``."""
    even, odd = tl.split(tl.reshape(t, [ROWS, BLOCKS, LANES, 2, 2]))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def split8(t, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    even, odd = tl.split(tl.reshape(t, [ROWS, BLOCKS, LANES, 4, 2]))
    t0, t2, t4, t6 = split4(even, ROWS, BLOCKS, LANES)
    t1, t3, t5, t7 = split4(odd, ROWS, BLOCKS, LANES)
    return t0, t1, t2, t3, t4, t5, t6, t7


@triton.jit
def join4(t, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    return tl.reshape(tl.join(tl.join(t[0], t[2]), tl.join(t[1], t[3])), [ROWS, BLOCKS, LANES, 4])


@triton.jit
def join8(t, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    even = join4((t[0], t[2], t[4], t[6]), ROWS, BLOCKS, LANES)
    odd = join4((t[1], t[3], t[5], t[7]), ROWS, BLOCKS, LANES)
    return tl.reshape(tl.join(even, odd), [ROWS, BLOCKS, LANES, 8])


@triton.jit
def _low(word, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _high(word, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _rounded_bits(value, dtype: tl.constexpr):
    return value.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _pack(low, high, dtype: tl.constexpr, PTX: tl.constexpr):
    """Two float32, rounded to a 16-bit dtype, in one word."""
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1
            )
    else:
        return _rounded_bits(low, dtype) | (_rounded_bits(high, dtype) << 16)


@triton.jit
def _multiply(a, b, dtype: tl.constexpr, PTX: tl.constexpr):
    """Products of the halves. A float32 product of two 16-bit numbers is exact, so both forms round once."""
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
            )
    else:
        return _pack(_low(a, dtype) * _low(b, dtype), _high(a, dtype) * _high(b, dtype), dtype, PTX)


@triton.jit
def _add(a, b, dtype: tl.constexpr, PTX: tl.constexpr):
    """Sums of the halves. float32 has over twice the precision of either dtype, so rounding twice changes nothing."""
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
            )
    else:
        return _pack(_low(a, dtype) + _low(b, dtype), _high(a, dtype) + _high(b, dtype), dtype, PTX)


@triton.jit
def add(a, b, dtype: tl.constexpr, PTX: tl.constexpr):
    """Sum of two loaded tensors: words of ``dtype``, or float32."""
    if dtype == tl.float32:
        return a + b
    else:
        return _add(a, b, dtype, PTX)


@triton.jit
def to_words(e, dtype: tl.constexpr, PTX: tl.constexpr):
    """Eight float32, rounded to a 16-bit dtype, as four words."""
    return (
        _pack(e[0], e[1], dtype, PTX),
        _pack(e[2], e[3], dtype, PTX),
        _pack(e[4], e[5], dtype, PTX),
        _pack(e[6], e[7], dtype, PTX),
    )


@triton.jit
def to_floats(w, dtype: tl.constexpr):
    """Four words of a 16-bit dtype as eight float32."""
    return (
        _low(w[0], dtype),
        _high(w[0], dtype),
        _low(w[1], dtype),
        _high(w[1], dtype),
        _low(w[2], dtype),
        _high(w[2], dtype),
        _low(w[3], dtype),
        _high(w[3], dtype),
    )


@triton.jit
def multiply_words(a, b, dtype: tl.constexpr, PTX: tl.constexpr):
    return (
        _multiply(a[0], b[0], dtype, PTX),
        _multiply(a[1], b[1], dtype, PTX),
        _multiply(a[2], b[2], dtype, PTX),
        _multiply(a[3], b[3], dtype, PTX),
    )


@triton.jit
def multiply(e, w):
    return e[0] * w[0], e[1] * w[1], e[2] * w[2], e[3] * w[3], e[4] * w[4], e[5] * w[5], e[6] * w[6], e[7] * w[7]


@triton.jit
def times(e, f):
    return e[0] * f, e[1] * f, e[2] * f, e[3] * f, e[4] * f, e[5] * f, e[6] * f, e[7] * f


@triton.jit
def sum_of_squares(e):
    # Contraction is asked for here, so that it is the same on every target. Squares of 16-bit numbers are exact anyway.
    s = e[0] * e[0]
    s = tl.fma(e[1], e[1], s)
    s = tl.fma(e[2], e[2], s)
    s = tl.fma(e[3], e[3], s)
    s = tl.fma(e[4], e[4], s)
    s = tl.fma(e[5], e[5], s)
    s = tl.fma(e[6], e[6], s)
    return tl.fma(e[7], e[7], s)


@triton.jit
def load_piece(base, column, mask, MASKED: tl.constexpr):
    """Eight elements per thread from ``base + column``: ``[..., 4]`` words of a 16-bit dtype, or ``[..., 8]`` float32.

    ``base`` is a pointer (or pointers) to the dtype, ``column`` counts elements and is a multiple of eight.
    """
    if base.dtype.scalar.element_ty == tl.float32:
        at = (base + column)[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
    else:
        words = base.to(tl.pointer_type(tl.uint32)) + (column // 2)
        at = words[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
    if MASKED:
        return tl.load(at, mask=mask[:, :, :, None], other=0)
    else:
        return tl.load(at)


@triton.jit
def store_piece(base, column, value, mask, MASKED: tl.constexpr):
    """The other way round; ``value`` as load_piece gives it."""
    if base.dtype.scalar.element_ty == tl.float32:
        at = (base + column)[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
    else:
        words = base.to(tl.pointer_type(tl.uint32)) + (column // 2)
        at = words[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
    if MASKED:
        tl.store(at, value, mask=mask[:, :, :, None])
    else:
        tl.store(at, value)


@triton.jit
def floats_of(piece, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr):
    """A loaded piece as eight float32."""
    if dtype == tl.float32:
        return split8(piece, ROWS, BLOCKS, LANES)
    else:
        return to_floats(split4(piece, ROWS, BLOCKS, LANES), dtype)


@triton.jit
def _max(a, b):
    # NaN has to win. NVIDIA has this as one instruction; as integers it would be an extra AND for each element.
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _amax(e):
    low = _max(_max(tl.abs(e[0]), tl.abs(e[1])), _max(tl.abs(e[2]), tl.abs(e[3])))
    return _max(low, _max(_max(tl.abs(e[4]), tl.abs(e[5])), _max(tl.abs(e[6]), tl.abs(e[7]))))


@triton.jit
def _sticky(value):
    """The value cut to nine significant bits, the last one set if anything was cut: it rounds to E2M1 the same way."""
    bits = value.to(tl.uint32, bitcast=True)
    return ((bits | ((bits & 0x7FFF) + 0x7FFF)) & 0xFFFF8000).to(tl.float32, bitcast=True)


@triton.jit
def _nibbles(low, high, SATURATE: tl.constexpr, PTX: tl.constexpr):
    """E2M1 of two numbers below 8, given times 2**-14: nibbles at the top of each 16-bit half, junk below them.

    Times 2**-14, E2M1's smallest normal number is float16's, so the bits of a float16 that are left after rounding
    away nine are those of the E2M1 code, subnormals included. The conversion to float16 is exact for nine significant
    bits from 0.25 up, and what is smaller stays on its side of 0.25. Both halves are rounded at once; no carry leaves
    a half, because exponents are at most 3.
    """
    halves = _pack(low, high, tl.float16, PTX)
    halves = halves + 0x00FF00FF + ((halves >> 9) & 0x00010001)
    if SATURATE:
        halves = halves - ((halves & 0x10001000) >> 3)  # 8 to 6, the codes 0b1000 and 0b0111
    return (halves & 0x80008000) | ((halves << 3) & 0x7FFF7FFF)


@triton.jit
def _codes(e, factor, SATURATE: tl.constexpr, SHORT: tl.constexpr, PTX: tl.constexpr):
    """Eight codes in a word, the first in the lowest nibble."""
    if not SHORT:
        e = (
            _sticky(e[0]),
            _sticky(e[1]),
            _sticky(e[2]),
            _sticky(e[3]),
            _sticky(e[4]),
            _sticky(e[5]),
            _sticky(e[6]),
            _sticky(e[7]),
        )
    e = times(e, factor)
    n01 = _nibbles(e[0], e[1], SATURATE, PTX)
    n23 = _nibbles(e[2], e[3], SATURATE, PTX)
    n45 = _nibbles(e[4], e[5], SATURATE, PTX)
    n67 = _nibbles(e[6], e[7], SATURATE, PTX)
    # Codes 0, 2, 1, 3, each in the upper half of its byte.
    low = ((n01 >> 8) & 0x00FF00FF) | (n23 & 0xFF00FF00)
    high = ((n45 >> 8) & 0x00FF00FF) | (n67 & 0xFF00FF00)
    if PTX:
        even = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )
        odd = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        even = (low & 0xFFFF) | (high << 16)
        odd = (low >> 16) | (high & 0xFFFF0000)
    return ((even >> 4) & 0x0F0F0F0F) | (odd & 0xF0F0F0F0)


@triton.jit
def quantize(e, SCALE_ADDEND: tl.constexpr, SHORT: tl.constexpr, PTX: tl.constexpr):
    """A tuple of PIECES pieces of eight float32 to codes ``[ROWS, BLOCKS, LANES, PIECES]`` and scale bytes.

    ``SHORT``: no element has more than eight significant bits. Scales are integers throughout.
    """
    PIECES: tl.constexpr = len(e)
    amax = _amax(e[0])
    if PIECES >= 2:
        amax = _max(amax, _amax(e[1]))
    if PIECES == 4:
        amax = _max(amax, _max(_amax(e[2]), _amax(e[3])))
    # As integers NaN > Inf > every finite magnitude.
    amax_bits = amax.to(tl.int32, bitcast=True)
    if PIECES < 4:
        amax_bits = tl.max(amax_bits, axis=2)[:, :, None]
    finite = amax_bits < 0x7F800000
    exponent = tl.maximum((amax_bits.to(tl.uint32, bitcast=True) + SCALE_ADDEND) >> 23, 2)
    # 2**(127 - scale), scale = exponent - 2 at most 253; with 2**-14 it may be subnormal, but never rounds.
    factor = ((256 - exponent) << 23).to(tl.float32, bitcast=True) * 6.103515625e-05
    # Only with the addend 0 can an element scale to 7 or more, which rounds to 8.
    SATURATE: tl.constexpr = SCALE_ADDEND == 0
    # A block that is not finite gets codes 0, whatever its elements gave.
    c0 = tl.where(finite, _codes(e[0], factor, SATURATE, SHORT, PTX), 0)
    if PIECES == 1:
        codes = c0[:, :, :, None]
    else:
        c1 = tl.where(finite, _codes(e[1], factor, SATURATE, SHORT, PTX), 0)
        if PIECES == 2:
            codes = tl.join(c0, c1)
        else:
            c2 = tl.where(finite, _codes(e[2], factor, SATURATE, SHORT, PTX), 0)
            c3 = tl.where(finite, _codes(e[3], factor, SATURATE, SHORT, PTX), 0)
            codes = join4((c0, c1, c2, c3), c0.shape[0], c0.shape[1], 1)
    scale = tl.where(finite, exponent - 2, 255).to(tl.uint8)
    return codes, tl.broadcast_to(scale, c0.shape)


@triton.jit
def store_quantized(codes_ptr, scales_ptr, block, lane, codes, scale, mask, MASKED: tl.constexpr, PIECES: tl.constexpr):
    """Store what quantize gave; ``block`` counts blocks from both pointers, ``lane`` the threads of a block."""
    word = block * 4 + lane * PIECES
    at = (codes_ptr.to(tl.pointer_type(tl.uint32)) + word)[:, :, :, None] + tl.arange(0, PIECES)[None, None, None, :]
    # The same as scales_ptr + block, but hides from Triton that neighbouring bytes are neighbours: it would move the
    # scales through shared memory, with a barrier, to store them in fewer instructions.
    scale_at = scales_ptr + (word >> 2)
    if MASKED:
        tl.store(at, codes, mask=mask[:, :, :, None])
        tl.store(scale_at, scale, mask=mask & (lane == 0))
    else:
        tl.store(at, codes)
        tl.store(scale_at, scale, mask=lane == 0)
