"""The activation of a gated MLP, its product with up, and MXFP4 quantisation. Blocks do not depend on each other.

A thread has one block of 32 of gate and of up. Programs cut the blocks of all rows anywhere, not each row by itself, so
none idles at a row's end; the two halves of one tensor are two tensors with a row stride.

Rounding. Every step rounds once, to nearest, ties to even, as the same step in torch does, but for the exponential;
contraction to FMA is switched off where it is not asked for. Given the same float32 activation (with CAST_ORDER
"cast_each", the same sigmoid), the bytes are therefore the reference's, on every target.

The activations share ``4 / (1 + exp(-v))``, made of one ``exp2`` by hardware. ``v * log2(e)`` is taken in two parts,
because its rounding alone would be an error of 40 ulp at v = -80. Interpreted, where exp2 is within 1 ulp (as AMD
documents of its own; NVIDIA documents 2, which adds one to what follows):

* silu and x * sigmoid are within 4 ulp of the real number (3.4 seen); torch's float32 ones are, too (2.2 and 3.2 seen).
  From torch's silu on a CPU the kernel's is 2 ulp away on every bfloat16, 3 on every float16 and 4 on float32.
  Where x > 18, and where exp(-x) is infinite, they are equal.
* GELU's ``tanh(v/2)`` is ``2 / (1 + exp(-v)) - 1``, so ``tanh + 1`` is rounded where torch rounds it: on the left,
  where most digits cancel, it is a multiple of 2**-24 in torch as here. The result is within ``abs(x) * 2**-22`` of
  torch's.
"""

# ruff: noqa: RET505, RUF005, SIM108
# mypy: disable-error-code="assignment"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _mxfp4, _pieces, _token_order
from fusionpasses.kernels._mxfp4 import BLOCK, PTX
from fusionpasses.kernels.arch import Arch

#: log2(e) is the sum of these two.
_LOG2E = tl.constexpr(1.44269502162933349609375)
_LOG2E_REST = tl.constexpr(1.92596299112661746887e-8)
_QUARTER_OF_LN2 = tl.constexpr(0.693147180559945309417 / 4)
#: Below, torch's float32 exp(-v) is infinite.
_EXP_IS_FINITE_FROM = tl.constexpr(-88.7228317260742)


def launch_options(rows: int, row_blocks: int, arch: Arch) -> dict[str, int | bool]:
    """Tile and compile options for this many rows of this many blocks.

    As for the quant alone, where 2 to 8 warps are within 3 % of each other on an H200; a single one where four would
    leave multiprocessors without a program. Not measured for this kernel yet.
    """
    warps = 4 if rows * row_blocks >= 4 * arch.warp_size * arch.processors else 1
    options: dict[str, int | bool] = {
        "TILE_BLOCKS": warps * arch.warp_size,
        "num_warps": warps,
        # Whether it is on otherwise depends on the Triton version.
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options["launch_pdl"] = True
    return options


@triton.jit
def _four_sigmoid(v, ISA: tl.constexpr):
    """``4 / (1 + exp(-v))``: of a quarter of the sum, so that its reciprocal stays a normal number."""
    v = tl.minimum(v, 127.0)
    power = v * -_LOG2E
    # Less what rounding took from the power. (Everything below is signed such that nothing has to be negated: Triton's
    # -x is an instruction.)
    rest = tl.fma(v, _LOG2E_REST, tl.fma(v, _LOG2E, power))
    minus_sum = tl.fma(tl.exp2(power), tl.fma(rest, _QUARTER_OF_LN2, -0.25), -0.25)
    if ISA == PTX:
        # Divided correctly, each element has a branch of its own for numbers that do not occur here, and half as many
        # instructions again.
        instructions: tl.constexpr = "{ .reg .f32 t; neg.f32 t, $1; rcp.approx.ftz.f32 $0, t; }"
        near = tl.inline_asm_elementwise(instructions, "=f,f", [minus_sum], dtype=tl.float32, is_pure=True, pack=1)
        reciprocal = tl.fma(near, tl.fma(minus_sum, near, 1.0), near)
    else:
        reciprocal = tl.div_rn(-1.0, minus_sum)
    return tl.where(v < _EXP_IS_FINITE_FROM, 0.0, reciprocal)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr, CAST_ORDER: tl.constexpr, ISA: tl.constexpr):
    """Of float32; the sigmoid alone where that is rounded first."""
    if CAST_ORDER == "cast_each":
        return _four_sigmoid(x, ISA) * 0.25
    elif ACTIVATION == "gelu_tanh":
        inner = (x + x * x * x * 0.044715) * 0.7978845608028654
        # Subtracting 1 is what rounds tanh.
        tanh = _four_sigmoid(inner * 2.0, ISA) * 0.5 - 1.0
        return x * 0.5 * (tanh + 1.0)
    else:
        return x * 0.25 * _four_sigmoid(x, ISA)


@triton.jit
def _activations(e, ACTIVATION: tl.constexpr, CAST_ORDER: tl.constexpr, ISA: tl.constexpr):
    return (
        _activation(e[0], ACTIVATION, CAST_ORDER, ISA),
        _activation(e[1], ACTIVATION, CAST_ORDER, ISA),
        _activation(e[2], ACTIVATION, CAST_ORDER, ISA),
        _activation(e[3], ACTIVATION, CAST_ORDER, ISA),
        _activation(e[4], ACTIVATION, CAST_ORDER, ISA),
        _activation(e[5], ACTIVATION, CAST_ORDER, ISA),
        _activation(e[6], ACTIVATION, CAST_ORDER, ISA),
        _activation(e[7], ACTIVATION, CAST_ORDER, ISA),
    )


@triton.jit
def gated_product(
    gate,
    up,  # both pieces as loaded
    dtype: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CAST_ORDER: tl.constexpr,
    ROUNDS: tl.constexpr,
    ISA: tl.constexpr,
):
    """Of a piece: four words of a 16-bit dtype if it is rounded to that, else eight float32."""
    e = _activations(_pieces.floats_of(gate, dtype), ACTIVATION, CAST_ORDER, ISA)
    if CAST_ORDER != "mul_cast" and dtype != tl.float32:
        words = _pieces.to_words(e, dtype, ISA)
        if CAST_ORDER == "cast_each":
            words = _pieces.multiply_words(words, gate, dtype, ISA)
        return _pieces.multiply_words(words, up, dtype, ISA)
    else:
        e = _pieces.multiply(e, _pieces.floats_of(up, dtype))
        if ROUNDS:
            return _pieces.to_words(e, dtype, ISA)
        else:
            return e


@triton.jit(do_not_specialize=["row_blocks", "blocks"])
def silu_mul_mxfp4_quant(
    gate_ptr,
    up_ptr,
    codes_ptr,  # or numbers, in a product's order
    scales_ptr,  # or a product's flags
    act_ptr,  # None: the product is not stored
    gate_row_stride,  # None, as up's: both are contiguous, and row_blocks is not looked at
    up_row_stride,
    row_blocks,
    blocks,  # of all rows
    TILE_BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CAST_ORDER: tl.constexpr,  # of float32 always "mul_cast"
    ROUND_RESULT: tl.constexpr,  # to gate's dtype; with "mul_cast" it may stay float32
    SCALE_ADDEND: tl.constexpr,
    K_BLOCKS: tl.constexpr,  # of a product's row
    TOKEN_TILES: tl.constexpr,  # None: codes and scales; else of _token_order
    FLAGS: tl.constexpr,
    ISA: tl.constexpr,
):
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    ROUNDS: tl.constexpr = (CAST_ORDER != "mul_cast" or ROUND_RESULT) and dtype != tl.float32
    WORDS: tl.constexpr = ROUNDS and ISA == PTX
    if ISA == PTX:
        # Launched before the kernel in front has ended (``launch_pdl``): wait for its writes, let the next one come.
        gdc_wait()
        gdc_launch_dependents()
    within = tl.arange(0, TILE_BLOCKS)[None, :]
    # 64 bits before the first product: offsets pass 2**31 in tensors that fit a GPU.
    first = tl.program_id(0).to(tl.int64) * TILE_BLOCKS
    if TOKEN_TILES is not None:
        row, block = _token_order.place_of(first + within, K_BLOCKS)
        mask = row < (blocks // K_BLOCKS).to(tl.int32)
        gate_row = gate_ptr + row.to(tl.int64) * gate_row_stride
        up_row = up_ptr + row.to(tl.int64) * up_row_stride
    elif gate_row_stride is None:
        gate_row = gate_ptr + first * BLOCK
        up_row = up_ptr + first * BLOCK
        block = within
        mask = first + within < blocks
    else:
        # Dividing 32 bits takes a fraction of what dividing 64 does. Unsigned, the last tile cannot pass the end.
        if blocks.dtype == tl.int32:
            at = tl.program_id(0).to(tl.uint32) * TILE_BLOCKS + within.to(tl.uint32)
            row = at // row_blocks.to(tl.uint32)
            block = (at - row * row_blocks.to(tl.uint32)).to(tl.int32)
            mask = at < blocks.to(tl.uint32)
        else:
            at = first + within
            row = at // row_blocks
            block = at - row * row_blocks
            mask = at < blocks
        gate_row = gate_ptr + row.to(tl.int64) * gate_row_stride
        up_row = up_ptr + row.to(tl.int64) * up_row_stride
    gates = ()
    ups = ()
    for p in tl.static_range(4):
        gates = gates + (_pieces.load_piece(gate_row, block * BLOCK + p * 8, mask, MASKED, ""),)
    for p in tl.static_range(4):
        ups = ups + (_pieces.load_piece(up_row, block * BLOCK + p * 8, mask, MASKED, ""),)
    values = ()
    for p in tl.static_range(4):
        product = gated_product(gates[p], ups[p], dtype, ACTIVATION, CAST_ORDER, ROUNDS, ISA)
        if ROUNDS and not WORDS:
            e = _pieces.to_floats(product, dtype)
        else:
            e = product
        if act_ptr is not None:
            if act_ptr.dtype.element_ty == dtype and dtype != tl.float32:
                act = product
            elif WORDS:
                act = _pieces.to_floats(product, dtype)
            else:
                act = e
            _pieces.store_piece(act_ptr + first * BLOCK, within * BLOCK + p * 8, act, mask, MASKED)
        values = values + (e,)
    codes, scale = _mxfp4.quantize(values, dtype, SCALE_ADDEND, WORDS, ISA)
    if TOKEN_TILES is None:
        _mxfp4.store_quantized(codes_ptr + first * (BLOCK // 2), scales_ptr + first, within, codes, scale, mask, MASKED)
    else:
        _token_order.lower_flags(scales_ptr, FLAGS)
        _token_order.store(codes_ptr, row, block, codes, scale, mask, K_BLOCKS, TOKEN_TILES, MASKED, ISA)
