"""What the kernels load, compute with and store: eight elements of a thread.

A thread loads eight elements as a *piece*: four 32-bit words of a 16-bit dtype in one load of 16 bytes, or eight
float32 in two. A piece is a tuple of tensors ``[ROWS, COLUMNS]``, so everything is elementwise in the thread that
loaded it: no layout conversion, no shared memory.

``ISA``. Of ``arch.py``: which instructions there are. With ``PTX``, two elements of a 16-bit dtype share a register and
an instruction. Each form rounds as the others do, so the bytes are the same.
"""

# ruff: noqa: RET505
# (Triton needs the else of a constexpr if.)

from __future__ import annotations

import triton
import triton.language as tl

from fusionpasses.kernels import arch

NAN_MAXIMUM = tl.constexpr(arch.NAN_MAXIMUM)
ROUNDS_BF16 = tl.constexpr(arch.ROUNDS_BF16)
PTX = tl.constexpr(arch.PTX)


@triton.jit
def split4(t):
    """``[ROWS, BLOCKS, 4]`` to four ``[ROWS, BLOCKS]``."""
    even, odd = tl.split(tl.reshape(t, [t.shape[0], t.shape[1], 2, 2]))
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def join4(t):
    return tl.reshape(tl.join(tl.join(t[0], t[2]), tl.join(t[1], t[3])), [t[0].shape[0], t[0].shape[1], 4])


@triton.jit
def packed(instruction: tl.constexpr, a, b):
    """A PTX instruction of two operands, on words."""
    return tl.inline_asm_elementwise(instruction, "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def low(word, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def high(word, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _rounded_bits(value, dtype: tl.constexpr):
    return value.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _bf16_in_upper_half(value):
    """Bits of a float32, of which the upper half is the value rounded to bfloat16.

    The sum carries into the upper half what rounds up, and past the mantissa's end into the exponent. It must not carry
    a NaN over the end, so payloads of more than the upper half are cut: positive ones as signed integers, which
    negative numbers are below, then negative ones as unsigned, which positive numbers are below.
    Arithmetic gives quiet NaNs only, so no payload ends up empty.
    """
    bits = tl.minimum(value.to(tl.int32, bitcast=True), 0x7FFF0000).to(tl.uint32, bitcast=True)
    bits = tl.minimum(bits, 0xFFFF0000)
    return bits + (0x7FFF + ((bits >> 16) & 1))


@triton.jit
def pack(low, high, dtype: tl.constexpr, ISA: tl.constexpr):
    """Two float32, rounded to a 16-bit dtype, in one word."""
    if ISA == PTX and dtype == tl.bfloat16:
        return packed("cvt.rn.bf16x2.f32 $0, $2, $1;", low, high)
    elif ISA == PTX:
        return packed("cvt.rn.f16x2.f32 $0, $2, $1;", low, high)
    elif dtype == tl.bfloat16 and ISA < ROUNDS_BF16:
        # Left to the compiler, every element is compared with NaN, and the results fill an AMD GPU's scalar registers.
        upper = _bf16_in_upper_half(high) & 0xFFFF0000
        return upper | (_bf16_in_upper_half(low) >> 16)
    else:
        return _rounded_bits(low, dtype) | (_rounded_bits(high, dtype) << 16)


@triton.jit
def multiply_word(a, b, dtype: tl.constexpr, ISA: tl.constexpr):
    """Products of the halves. A float32 product of two 16-bit numbers is exact, so both forms round once."""
    if ISA == PTX and dtype == tl.bfloat16:
        return packed("mul.rn.bf16x2 $0, $1, $2;", a, b)
    elif ISA == PTX:
        return packed("mul.rn.f16x2 $0, $1, $2;", a, b)
    else:
        return pack(low(a, dtype) * low(b, dtype), high(a, dtype) * high(b, dtype), dtype, ISA)


@triton.jit
def add_word(a, b, dtype: tl.constexpr, ISA: tl.constexpr):
    """Sums of the halves. float32 has over twice the precision of either dtype, so rounding twice changes nothing."""
    if ISA == PTX and dtype == tl.bfloat16:
        return packed("add.rn.bf16x2 $0, $1, $2;", a, b)
    elif ISA == PTX:
        return packed("add.rn.f16x2 $0, $1, $2;", a, b)
    else:
        return pack(low(a, dtype) + low(b, dtype), high(a, dtype) + high(b, dtype), dtype, ISA)


@triton.jit
def add(a, b, dtype: tl.constexpr, ISA: tl.constexpr):
    """Sum of two loaded pieces of ``dtype``."""
    if dtype == tl.float32:
        return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7]
    else:
        return (
            add_word(a[0], b[0], dtype, ISA),
            add_word(a[1], b[1], dtype, ISA),
            add_word(a[2], b[2], dtype, ISA),
            add_word(a[3], b[3], dtype, ISA),
        )


@triton.jit
def to_words(e, dtype: tl.constexpr, ISA: tl.constexpr):
    """Eight float32, rounded to a 16-bit dtype, as four words."""
    return (
        pack(e[0], e[1], dtype, ISA),
        pack(e[2], e[3], dtype, ISA),
        pack(e[4], e[5], dtype, ISA),
        pack(e[6], e[7], dtype, ISA),
    )


@triton.jit
def to_floats(w, dtype: tl.constexpr):
    """Four words of a 16-bit dtype as eight float32."""
    return (
        low(w[0], dtype),
        high(w[0], dtype),
        low(w[1], dtype),
        high(w[1], dtype),
        low(w[2], dtype),
        high(w[2], dtype),
        low(w[3], dtype),
        high(w[3], dtype),
    )


@triton.jit
def multiply_words(a, b, dtype: tl.constexpr, ISA: tl.constexpr):
    return (
        multiply_word(a[0], b[0], dtype, ISA),
        multiply_word(a[1], b[1], dtype, ISA),
        multiply_word(a[2], b[2], dtype, ISA),
        multiply_word(a[3], b[3], dtype, ISA),
    )


@triton.jit
def multiply(e, w):
    return e[0] * w[0], e[1] * w[1], e[2] * w[2], e[3] * w[3], e[4] * w[4], e[5] * w[5], e[6] * w[6], e[7] * w[7]


@triton.jit
def times(e, f):
    return e[0] * f, e[1] * f, e[2] * f, e[3] * f, e[4] * f, e[5] * f, e[6] * f, e[7] * f


@triton.jit
def _four(ptr):
    """Pointers to four neighbours, along a last axis."""
    return ptr[:, :, None] + tl.arange(0, 4)[None, None, :]


@triton.jit
def _load4(ptr, mask, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    if MASKED:
        return split4(tl.load(_four(ptr), mask=mask[:, :, None], other=0, eviction_policy=EVICTION))
    else:
        return split4(tl.load(_four(ptr), eviction_policy=EVICTION))


@triton.jit
def store4(ptr, values, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(_four(ptr), join4(values), mask=mask[:, :, None])
    else:
        tl.store(_four(ptr), join4(values))


@triton.jit
def load_piece(base, column, mask, MASKED: tl.constexpr, EVICTION: tl.constexpr):
    """Eight elements per thread from ``base + column``: four words of a 16-bit dtype, or eight float32.

    ``base`` is a pointer (or pointers) to the dtype, ``column`` counts elements and is a multiple of eight. Where the
    mask is off (looked at if ``MASKED``), zeros.
    """
    if base.dtype.scalar.element_ty == tl.float32:
        return _load4(base + column, mask, MASKED, EVICTION) + _load4(base + (column + 4), mask, MASKED, EVICTION)
    else:
        return _load4(base.to(tl.pointer_type(tl.uint32)) + column // 2, mask, MASKED, EVICTION)


@triton.jit
def store_piece(base, column, piece, mask, MASKED: tl.constexpr):
    """The other way round; ``piece`` as load_piece gives it."""
    if base.dtype.scalar.element_ty == tl.float32:
        store4(base + column, (piece[0], piece[1], piece[2], piece[3]), mask, MASKED)
        store4(base + (column + 4), (piece[4], piece[5], piece[6], piece[7]), mask, MASKED)
    else:
        store4(base.to(tl.pointer_type(tl.uint32)) + column // 2, piece, mask, MASKED)


@triton.jit
def floats_of(piece, dtype: tl.constexpr):
    """A loaded piece as eight float32."""
    if dtype == tl.float32:
        return piece
    else:
        return to_floats(piece, dtype)
