"""MXFP4 arithmetic shared by the kernels; a thread has whole blocks of 32 elements.

Layout. Four pieces (``_pieces.py``) are a block. So the scale needs no exchange between threads, everything is
elementwise, and the 16 bytes of codes are made in the thread that loaded the elements: no layout conversion, no shared
memory. A warp's loads are 64 bytes apart; L1 puts them together. With a quarter of a block in each thread loads are
next to each other, but an H200 takes 85 us instead of 71 for 16384 x 7168 in bfloat16, because what is done once for a
block is then done four times.

Rounding. E2M1's magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 have the codes 0 to 7, and with ties to even codes::

    code(s) = min(round(2 s), round(s + 2), round(s / 2 + 4)),   ties to even

because each of the three is E2M1's step in its own part and above the others elsewhere. A fused multiply-add does the
scaling and one such rounding at once: in ``s + M``, with M large, the sum's last bit is worth a step. One addend does
two parts, M = 2**k - 2, where the last bit of sums below 2**k is worth 1/2 and from there on 1: it is crossed at
s = 2. The third part is ``s / 2 + 2**k``. Both sums have the bits ``bits(M) + code``. As s is the element times a
power of two, there is exactly one rounding, whatever the dtype the sum is made in: float32 (k = 23), bfloat16 (k = 7)
or float16 (k = 10).

``ISA``. Of ``arch.py``: which instructions there are. With ``PTX``, codes of two elements are made at once, in the
arithmetic of their 16-bit dtype. Each form rounds as the others do, so the bytes are the same.
"""

# ruff: noqa: RET505, RUF005
# mypy: disable-error-code="assignment"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl

from fusionpasses.kernels import _pieces, arch

#: Elements that share a scale.
BLOCK = tl.constexpr(32)
NAN_MAXIMUM = tl.constexpr(arch.NAN_MAXIMUM)
PTX = tl.constexpr(arch.PTX)


def _codes_ptx(kind: str, addend: int, far_addend: int, saturate: bool) -> str:
    """PTX for eight codes: ``$0`` from magnitudes ``$1-$4``, signed words ``$5-$8``, factor ``$9``, half of it ``$10``.

    ``addend`` and ``far_addend`` are the bits of 2**k - 2 and 2**k in ``kind``.
    """
    twice = 0x10001  # the same in both halves of a word
    lines = [
        ".reg .b32 near, far, most, sum, sign, even, odd, h<4>, q<2>;",
        f"mov.b32 near, {addend * twice};",
        f"mov.b32 far, {far_addend * twice};",
        f"mov.b32 most, {(addend + 7) * twice};",
    ]
    for i in range(4):
        lines += [
            f"fma.rn.{kind} h{i}, ${1 + i}, $9, near;",
            f"fma.rn.{kind} sum, ${1 + i}, $10, far;",
            f"min.u16x2 h{i}, h{i}, sum;",  # positive numbers compare as integers
        ]
        if saturate:
            lines.append(f"min.u16x2 h{i}, h{i}, most;")
    # Bytes of q0: codes 0, 2, 1, 3; of q1: 4, 6, 5, 7. What the addends leave is a constant.
    for i in range(2):
        lines += [
            f"mad.lo.u32 q{i}, h{2 * i + 1}, 256, h{2 * i};",
            f"sub.u32 q{i}, q{i}, {addend * twice * 257 % 2**32};",
            f"prmt.b32 sign, ${5 + 2 * i}, ${6 + 2 * i}, 0x7351;",
            "shr.u32 sign, sign, 4;",
            f"lop3.b32 q{i}, sign, 0x08080808, q{i}, 0xEA;",  # (sign & mask) | q
        ]
    lines += ["prmt.b32 even, q0, q1, 0x5410;", "prmt.b32 odd, q0, q1, 0x7632;", "mad.lo.u32 $0, odd, 16, even;"]
    return "{\n" + "\n".join(lines) + "\n}"


_CODES_BF16 = tl.constexpr(_codes_ptx("bf16x2", 0x42FC, 0x4300, saturate=False))
_CODES_BF16_SATURATE = tl.constexpr(_codes_ptx("bf16x2", 0x42FC, 0x4300, saturate=True))
_CODES_FP16 = tl.constexpr(_codes_ptx("f16x2", 0x63FC, 0x6400, saturate=False))
_CODES_FP16_SATURATE = tl.constexpr(_codes_ptx("f16x2", 0x63FC, 0x6400, saturate=True))


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
def _magnitudes(w):
    return w[0] & 0x7FFF7FFF, w[1] & 0x7FFF7FFF, w[2] & 0x7FFF7FFF, w[3] & 0x7FFF7FFF


@triton.jit
def _amax_of_words(a):
    # As integers NaN > Inf > every finite magnitude, in each half.
    maximum: tl.constexpr = "max.u16x2 $0, $1, $2;"
    return _pieces.packed(maximum, _pieces.packed(maximum, a[0], a[1]), _pieces.packed(maximum, a[2], a[3]))


@triton.jit
def _magnitude(value, ISA: tl.constexpr):
    """To be compared by _max: a float32 where its instruction takes magnitudes for nothing, else the bits of one."""
    if ISA >= NAN_MAXIMUM:
        return tl.abs(value)
    else:
        return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _max(a, b):
    """NaN wins; as integers NaN > Inf > every finite magnitude."""
    if a.dtype == tl.float32:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.maximum(a, b)


@triton.jit
def _amax(e, ISA: tl.constexpr):
    low01 = _max(_magnitude(e[0], ISA), _magnitude(e[1], ISA))
    low23 = _max(_magnitude(e[2], ISA), _magnitude(e[3], ISA))
    high01 = _max(_magnitude(e[4], ISA), _magnitude(e[5], ISA))
    high23 = _max(_magnitude(e[6], ISA), _magnitude(e[7], ISA))
    return _max(_max(low01, low23), _max(high01, high23))


@triton.jit
def _code(e, factor, half_factor, SATURATE: tl.constexpr):
    magnitude = tl.abs(e)
    total = tl.minimum(tl.fma(magnitude, factor, 8388606.0), tl.fma(magnitude, half_factor, 8388608.0))
    if SATURATE:
        total = tl.minimum(total, 8388611.0)
    # 0x4AFFFFFC are the bits of 2**23 - 2.
    return (total.to(tl.uint32, bitcast=True) - 0x4AFFFFFC) | ((e.to(tl.uint32, bitcast=True) >> 28) & 8)


@triton.jit
def _codes(e, factor, half_factor, SATURATE: tl.constexpr):
    """Eight codes in a word, the first in the lowest nibble."""
    return (
        _code(e[0], factor, half_factor, SATURATE)
        | (_code(e[1], factor, half_factor, SATURATE) << 4)
        | (_code(e[2], factor, half_factor, SATURATE) << 8)
        | (_code(e[3], factor, half_factor, SATURATE) << 12)
        | (_code(e[4], factor, half_factor, SATURATE) << 16)
        | (_code(e[5], factor, half_factor, SATURATE) << 20)
        | (_code(e[6], factor, half_factor, SATURATE) << 24)
        | (_code(e[7], factor, half_factor, SATURATE) << 28)
    )


@triton.jit
def _codes_of_words(a, w, factor, half_factor, dtype: tl.constexpr, SATURATE: tl.constexpr):
    """The same from words ``w`` and their magnitudes."""
    BF16: tl.constexpr = _CODES_BF16_SATURATE if SATURATE else _CODES_BF16
    FP16: tl.constexpr = _CODES_FP16_SATURATE if SATURATE else _CODES_FP16
    CODES: tl.constexpr = BF16 if dtype == tl.bfloat16 else FP16
    operands = [a[0], a[1], a[2], a[3], w[0], w[1], w[2], w[3], factor, half_factor]
    return tl.inline_asm_elementwise(CODES, "=r,r,r,r,r,r,r,r,r,r,r", operands, dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _scale_exponent(amax_bits, SCALE_ADDEND: tl.constexpr):
    """The scale's byte plus two, from the float32 bits of a finite amax. Integers throughout."""
    return tl.maximum((amax_bits.to(tl.uint32, bitcast=True) + SCALE_ADDEND) >> 23, 2)


@triton.jit
def _quantize_floats(e, SCALE_ADDEND: tl.constexpr, SATURATE: tl.constexpr, ISA: tl.constexpr):
    amax = _max(_max(_amax(e[0], ISA), _amax(e[1], ISA)), _max(_amax(e[2], ISA), _amax(e[3], ISA)))
    amax_bits = amax.to(tl.int32, bitcast=True)
    exponent = _scale_exponent(amax_bits, SCALE_ADDEND)
    # 2**(127 - byte), byte = exponent - 2 at most 253; half of it may be subnormal, but neither ever rounds.
    factor = ((256 - exponent) << 23).to(tl.float32, bitcast=True)
    codes = ()
    for p in tl.static_range(4):
        codes = codes + (_codes(e[p], factor, factor * 0.5, SATURATE),)
    return amax_bits, exponent, codes


@triton.jit
def _bf16_factors(exponent):
    """``2**(127 - byte)`` and half of it, each as a pair of bfloat16."""
    factor = ((256 - exponent) << 7) * 0x10001
    return factor, _pieces.multiply_word(factor, tl.full(factor.shape, 0x3F003F00, tl.uint32), tl.bfloat16, PTX)


@triton.jit
def _quantize_words(w, dtype: tl.constexpr, SCALE_ADDEND: tl.constexpr, SATURATE: tl.constexpr):
    maximum: tl.constexpr = "max.u16x2 $0, $1, $2;"
    a = (_magnitudes(w[0]), _magnitudes(w[1]), _magnitudes(w[2]), _magnitudes(w[3]))
    low = _pieces.packed(maximum, _amax_of_words(a[0]), _amax_of_words(a[1]))
    amax = _pieces.packed(maximum, low, _pieces.packed(maximum, _amax_of_words(a[2]), _amax_of_words(a[3])))
    # As float32 bits; the sign is clear, so the larger half is the larger integer.
    half = tl.maximum(amax & 0xFFFF, amax >> 16)
    amax_bits = _pieces.low(half, dtype).to(tl.int32, bitcast=True)
    exponent = _scale_exponent(amax_bits, SCALE_ADDEND)
    if dtype == tl.bfloat16:
        factor, half_factor = _bf16_factors(exponent)
    else:
        # float16 ends at 2**15; small blocks are brought near first. That is exact: their elements are below 2**-10.
        # For blocks smaller than float16 can hold (that is zero) any factor does.
        power = tl.minimum(129 - exponent.to(tl.int32, bitcast=True), 27)
        lift = tl.where(power > 13, 13, 0)
        factor = (((power - lift + 15) << 10) * 0x10001).to(tl.uint32, bitcast=True)
        half_factor = _pieces.multiply_word(factor, tl.full(factor.shape, 0x38003800, tl.uint32), dtype, PTX)
        lift_factor = (((lift + 15) << 10) * 0x10001).to(tl.uint32, bitcast=True)
        lifts = (lift_factor, lift_factor, lift_factor, lift_factor)
        a = (
            _pieces.multiply_words(a[0], lifts, dtype, PTX),
            _pieces.multiply_words(a[1], lifts, dtype, PTX),
            _pieces.multiply_words(a[2], lifts, dtype, PTX),
            _pieces.multiply_words(a[3], lifts, dtype, PTX),
        )
    codes = ()
    for p in tl.static_range(4):
        codes = codes + (_codes_of_words(a[p], w[p], factor, half_factor, dtype, SATURATE),)
    return amax_bits, exponent, codes


@triton.jit
def quantize(e, dtype: tl.constexpr, SCALE_ADDEND: tl.constexpr, WORDS: tl.constexpr, ISA: tl.constexpr):
    """A block per thread to four words of codes and a scale byte.

    ``e`` is a tuple of four pieces: of four words of ``dtype`` if ``WORDS`` (PTX only), of eight float32 if not.
    """
    # Only with the addend 0 can an element scale to 7 or more, which rounds to 8.
    SATURATE: tl.constexpr = SCALE_ADDEND == 0
    if WORDS:
        amax_bits, exponent, codes = _quantize_words(e, dtype, SCALE_ADDEND, SATURATE)
    else:
        amax_bits, exponent, codes = _quantize_floats(e, SCALE_ADDEND, SATURATE, ISA)
    # A block that is not finite gets codes 0, whatever its elements gave.
    finite = amax_bits < 0x7F800000
    words = ()
    for p in tl.static_range(4):
        words = words + (tl.where(finite, codes[p], 0),)
    return words, tl.where(finite, exponent - 2, 255).to(tl.uint8)


@triton.jit
def quantize_quarter(piece, SCALE_ADDEND: tl.constexpr, WORDS: tl.constexpr, ISA: tl.constexpr):
    """As quantize, a quarter of a block in each of four neighbouring threads, of bfloat16: a word of codes, the scale.

    ``piece`` has one axis; it is four words if ``WORDS`` (PTX only), eight float32 if not.
    """
    SATURATE: tl.constexpr = SCALE_ADDEND == 0
    if WORDS:
        magnitudes = _magnitudes(piece)
        pairs = _amax_of_words(magnitudes)
        amax_bits = _of_four(
            _pieces.low(tl.maximum(pairs & 0xFFFF, pairs >> 16), tl.bfloat16).to(tl.int32, bitcast=True)
        )
        exponent = _scale_exponent(amax_bits, SCALE_ADDEND)
        factor, half_factor = _bf16_factors(exponent)
        codes = _codes_of_words(magnitudes, piece, factor, half_factor, tl.bfloat16, SATURATE)
    else:
        amax_bits = _of_four(_amax(piece, ISA).to(tl.int32, bitcast=True))
        exponent = _scale_exponent(amax_bits, SCALE_ADDEND)
        factor = ((256 - exponent) << 23).to(tl.float32, bitcast=True)
        codes = _codes(piece, factor, factor * 0.5, SATURATE)
    finite = amax_bits < 0x7F800000
    return tl.where(finite, codes, 0), tl.where(finite, exponent - 2, 255).to(tl.uint8)


@triton.jit
def _of_four(value):
    """The largest of four neighbouring threads, in each of them."""
    THREADS: tl.constexpr = value.shape[0]
    most = tl.max(tl.reshape(value, [THREADS // 4, 4]), 1)
    return tl.reshape(tl.broadcast_to(most[:, None], [THREADS // 4, 4]), [THREADS])


@triton.jit
def store_quantized(codes_ptr, scales_ptr, block, codes, scale, mask, MASKED: tl.constexpr):
    """Store what quantize gave; ``block`` counts blocks from both pointers."""
    word = block * 4
    _pieces.store4(codes_ptr.to(tl.pointer_type(tl.uint32)) + word, codes, mask, MASKED)
    # The same as scales_ptr + block, but hides from Triton that neighbouring bytes are neighbours: it would move the
    # scales through shared memory, with a barrier, to store them in fewer instructions.
    scale_at = scales_ptr + (word >> 2)
    if MASKED:
        tl.store(scale_at, scale, mask=mask)
    else:
        tl.store(scale_at, scale)
