"""The calls of our ops for which AITER gives, byte for byte, what they mean: ``accepts``.

``RULES`` has, for each op, functions of a call's metadata that return None, or the reason why the call must not go to
AITER. Some are about roundings, some about what AITER's kernels do not check and then read or write elsewhere. They
look at no data, so what depends on data (Inf and NaN) is in ``_aiter_numerics.py``, and what the adapters put right
(slots and positions out of range) in ``aiter.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionpasses._aiter_numerics import function_for, serves
from fusionpasses.probes import Verdict

#: AITER's kernels compute these offsets in 32 bits.
_INT32 = 2**31

#: Of a tensor in a Triton kernel; the norm's kernel holds a whole row in one.
_LARGEST_TENSOR = 2**20

#: Parts into which AITER's tuned configurations cut K, at most; kept with a margin.
_MOST_PARTS = 32


#: From so many tokens on, AITER's product of a shuffled weight takes their scales shuffled, too.
MANY_TOKENS = 32
#: And rows of them as a multiple of this.
SCALE_ROWS = 256


class Target(NamedTuple):
    """What AITER's kernels are compiled for, and by what.

    Attributes:
        architecture: "gfx950", ..
        keeps_zeros: does this Triton compile ``-x`` as a negation? Up to 3.6 it is ``0 - x``, which makes +0 of +0.
    """

    architecture: str
    keeps_zeros: bool


class Call(NamedTuple):
    """A call of an op of ours, as its metadata: only shapes, strides, dtypes and storages of tensors are looked at."""

    arguments: Mapping[str, Any]
    target: Target

    def of(self, name: str) -> Any:
        return self.arguments[name]


#: The reason why AITER would not give what a call means, or None.
Rule = Callable[[Call], "str | None"]


def accepts(op: str, arguments: Mapping[str, Any], release: str, target: Target, *, finite: bool = False) -> Verdict:
    """Does AITER give, byte for byte, what this call of ``op`` means?

    Args:
        op: ``packet.overload``.
        arguments: all of the op's but ``provider``, by name, already checked; fake tensors will do.
        release: "new" or "old", as the import tells.
        target: what AITER's kernels are compiled for, and by what.
        finite: the user has promised what ``_aiter_numerics.PROMISE`` says.
    """
    answer = serves(op, release, finite=finite, function=function_for(op, arguments))
    if not answer:
        return answer
    call = Call(arguments, target)
    for rule in RULES[op]:
        reason = rule(call)
        if reason is not None:
            return Verdict(False, reason)
    return answer


def rule_in_words(op: str) -> str:
    """The recorded run-time rule of an op that a graph gives to AITER."""
    names = ", ".join(rule.__name__.strip("_").replace("_", " ") for rule in RULES[op])
    return f"each call of {op} is run by AITER if its metadata agree ({names}), else by Triton"


def row_stride(x: Tensor) -> int | None:
    """The one distance between consecutive rows of ``x [..., N]``, or None where they are not evenly apart."""
    leading = [
        (size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1
    ]  # an axis of size 1 is never stepped along
    if any(outer != size * inner for (_, outer), (size, inner) in itertools.pairwise(leading)):
        return None
    return leading[-1][1] if leading else x.shape[-1] * x.stride(-1)


def slot_stride(cache: Tensor) -> int | None:
    """The distance between consecutive slots of a cache, or None where blocks are apart."""
    if cache.dim() == 2:
        return cache.stride(0)
    if cache.shape[0] != 1 and cache.shape[1] != 1 and cache.stride(0) != cache.shape[1] * cache.stride(1):
        return None
    return cache.stride(1) if cache.shape[1] != 1 else cache.stride(0)


# Rules of several ops.


def _even_scales(call: Call) -> str | None:
    mode = call.of("scale_mode")
    return None if mode == "even" else f"scale_mode: got {mode!r}; AITER's Triton kernels know 'even' alone"


def _rows(*names: str) -> tuple[Rule, ...]:
    def some_rows(call: Call) -> str | None:
        if call.of(names[0]).numel() > 0:
            return None
        return f"{names[0]}: got no rows {tuple(call.of(names[0]).shape)}; AITER divides by their number"

    def rows_evenly_apart(call: Call) -> str | None:
        for name in names:
            if row_stride(call.of(name)) is None:
                return f"{name}: got strides {call.of(name).stride()}; AITER takes rows that are evenly apart"
        return None

    return some_rows, rows_evenly_apart


def _own_kernel_only_on_gfx1250(call: Call) -> str | None:
    if call.target.architecture != "gfx1250":
        return None
    return "gfx1250: AITER has a kernel of its own (Gluon) for it, whose roundings were not verified"


def _reach(*tensors: Tensor) -> int:
    """The largest offset of an element, of all tensors."""
    return max(
        sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        for x in tensors
    )


def _offsets(*names: str) -> Rule:
    def offsets_in_32_bits(call: Call) -> str | None:
        given = [call.of(name) for name in names if call.of(name) is not None]
        # Outputs are contiguous and no larger than the largest input read as one.
        reach = max(_reach(*given), max(x.numel() for x in given))
        return None if reach < _INT32 else f"offsets: got up to {reach}; AITER computes them in 32 bits"

    return offsets_in_32_bits


# RMSNorm.


def _together(*names: str) -> Rule:
    def elements_of_a_row_together(call: Call) -> str | None:
        for name in names:
            if call.of(name) is not None and call.of(name).stride(-1) != 1:
                return f"{name}: got strides {call.of(name).stride()}; AITER takes a last stride of 1, unchecked"
        return None

    return elements_of_a_row_together


def _row_fits(call: Call) -> str | None:
    n = call.of("x").shape[-1]
    return None if n <= _LARGEST_TENSOR else f"x: got rows of {n}; AITER holds one in a tensor of {_LARGEST_TENSOR}"


def _a_weight(call: Call) -> str | None:
    return None if call.of("weight") is not None else "weight: got None; AITER reads one"


def _norm_rounded_nowhere(call: Call) -> str | None:
    x, cast_order, norm_dtype = call.of("x"), call.of("cast_order"), call.of("norm_dtype")
    if x.dtype == torch.float32:
        return None
    if cast_order == "cast_scale":
        return f"cast_order: got 'cast_scale', which rounds to {x.dtype} before the weight; AITER does not"
    if norm_dtype != torch.float32:
        return f"norm_dtype: got {norm_dtype or x.dtype}; AITER quantises the float32 norm, unrounded"
    return None


def _norm_in_its_dtype(call: Call) -> str | None:
    x, norm_dtype = call.of("x"), call.of("norm_dtype")
    if norm_dtype in (None, x.dtype):
        return None
    return f"norm_dtype: got {norm_dtype}; AITER returns the norm in the dtype of x ({x.dtype})"


def _sum_rounded_nowhere(call: Call) -> str | None:
    dtype = call.of("x").dtype
    if dtype == torch.float32:
        return None
    return f"x.dtype: got {dtype}; AITER norms the sum before it is rounded, ours is the norm of the rounded sum"


# Gated activation.


def _silu(call: Call) -> str | None:
    activation = call.of("activation")
    if activation == "silu":
        return None
    return f"activation: got {activation!r}; AITER computes it by other steps, silu alone by ours"


def _product_rounded_nowhere(call: Call) -> str | None:
    gate, cast_order, act_dtype = call.of("gate"), call.of("cast_order"), call.of("act_dtype")
    if gate.dtype == torch.float32:
        return None
    if cast_order != "mul_cast":
        return f"cast_order: got {cast_order!r}, which rounds the activation to {gate.dtype}; AITER does not"
    if act_dtype != torch.float32:
        return f"act_dtype: got {act_dtype or gate.dtype}; AITER quantises the float32 product, unrounded"
    return None


def _halves_of_one_tensor(call: Call) -> str | None:
    gate, up = call.of("gate"), call.of("up")
    one = gate.untyped_storage()._cdata == up.untyped_storage()._cdata
    start = gate.storage_offset() + gate.shape[-1] * gate.stride(-1)
    if one and up.stride() == gate.stride() and up.storage_offset() == start:
        return None
    return "gate, up: got two tensors, or parts in another order; AITER takes [gate | up] as one"


# RoPE and the latent cache.


def _bfloat16_rows(call: Call) -> str | None:
    dtype = call.of("kv_c").dtype
    if dtype == torch.bfloat16:
        return None
    return f"kv_c.dtype: got {dtype}; where AITER rounds as ours do is known of bfloat16 alone"


def _bfloat16_cache(call: Call) -> str | None:
    dtype = call.of("kv_cache").dtype
    if dtype == torch.bfloat16:
        return None
    if dtype == torch.uint8:
        return "kv_cache.dtype: got torch.uint8, float8 by our contract; AITER takes that for NVFP4"
    return f"kv_cache.dtype: got {dtype}; AITER does not saturate (float8) or does not take it"


def _one_cache(call: Call) -> str | None:
    return None if call.of("pe_cache") is None else "pe_cache: got one; AITER writes kv_c and k_pe to one cache"


def _slots_evenly_apart(call: Call) -> str | None:
    cache = call.of("kv_cache")
    if slot_stride(cache) is not None:
        return None
    return f"kv_cache: got strides {cache.stride()}; AITER takes slots that are evenly apart"


def _powers_of_two(call: Call) -> str | None:
    latent, rope = call.of("kv_c").shape[-1], call.of("k_pe").shape[-1]
    if latent & (latent - 1) == 0 and rope & (rope - 1) == 0:
        return None
    return f"kv_c, k_pe: got widths {latent} and {rope}; AITER's kernel needs powers of two, unchecked"


def _negative_slots_skipped(call: Call) -> str | None:
    meaning = call.of("negative_slots")
    return None if meaning == "skip" else f"negative_slots: got {meaning!r}; AITER writes nothing for one ('skip')"


def _style_of_aiter(call: Call) -> str | None:
    style = call.of("style")
    if style != "interleaved_to_neox":
        return None
    return f"style: got {style!r}; AITER writes pairs where it reads them"


def _zeros_keep_their_sign(call: Call) -> str | None:
    if call.target.keeps_zeros:
        return None
    return "Triton: got one that compiles -x as 0 - x; AITER turns a pair of zeros by it and may lose the sign of one"


def _angles_rounded_alike(call: Call) -> str | None:
    q, cos = call.of("q_pe"), call.of("cos")
    if cos.dtype == q.dtype:
        return None
    return (
        f"cos.dtype: got {cos.dtype} with q_pe {q.dtype}; AITER does not round k before it is written, and may use FMAs"
    )


def _cos_and_sin_alike(call: Call) -> str | None:
    cos, sin = call.of("cos"), call.of("sin")
    if cos.stride() == sin.stride():
        return None
    return f"sin: got strides {sin.stride()}; AITER reads it with those of cos {cos.stride()}, unchecked"


def _q_nope_as_wide_as_kv_c(call: Call) -> str | None:
    n, latent = call.of("q_nope").shape[-1], call.of("kv_c").shape[-1]
    return None if n == latent else f"q_nope: got width {n} with kv_c of {latent}; AITER takes equal ones"


# Products.


def _fp4_arithmetic(call: Call) -> str | None:
    if call.target.architecture == "gfx950":
        return None
    return f"{call.target.architecture}: AITER's FP4 product was read for gfx950 alone"


def _no_bias(call: Call) -> str | None:
    return None if call.of("bias") is None else "bias: got one; AITER's product has none, and ours is rounded once"


def _layout_of_aiter(call: Call) -> str | None:
    layout = call.of("layout")
    return None if layout in ("linear", "shuffled") else f"layout: got {layout!r}; AITER reads 'linear' and 'shuffled'"


def _sixteen_bits_out(call: Call) -> str | None:
    dtype = call.of("out_dtype")
    return None if dtype != torch.float32 else f"out_dtype: got {dtype}; AITER promises bfloat16 and float16"


def _width_in_256(call: Call) -> str | None:
    width = call.of("x_codes").shape[-1] * 2
    if width % 256 == 0:
        return None
    return f"K: got {width}; AITER's products of K % 256 != 0 are known to go wrong (aiter#4176)"


def _contiguous_codes(call: Call) -> str | None:
    for name in ("x_codes", "x_scales"):
        if not call.of(name).is_contiguous():
            return f"{name}: got strides {call.of(name).stride()}; AITER assumes positive ones, unchecked"
    return None


def _partial_sums_in_32_bits(call: Call) -> str | None:
    x, w = call.of("x_codes"), call.of("w_codes")
    rows, n = x.shape[:-1].numel(), call.of("rows") or w.shape[0]
    reach = max(x.numel(), w.numel(), rows * n * _MOST_PARTS if rows <= 256 else 0)
    return None if reach < _INT32 else f"offsets: got up to {reach}; AITER computes them in 32 bits"


def _some_weight(call: Call) -> str | None:
    return None if call.of("w_codes").numel() > 0 else "w_codes: got no rows; AITER divides by their number"


def tile_of_shuffled(tile: Mapping[str, Any], rows: int, n: int, width: int) -> str | None:
    """The reason why AITER's product of ``rows`` tokens and a shuffled weight must not have this tile, or None."""
    m, columns, depth = tile["BLOCK_SIZE_M"], tile["BLOCK_SIZE_N"], tile["BLOCK_SIZE_K"]
    if n % columns != 0:
        return f"N: got {n} with AITER's tile of {columns}; it reads beyond the weight, unchecked"
    if width % depth != 0:
        return f"K: got {width} with AITER's tile of {depth}; its kernel has no code for a rest"
    # Scales of few tokens are as they are, of others in pieces of 32 rows, padded to SCALE_ROWS.
    if m > 16 if rows < MANY_TOKENS else m < 32 or SCALE_ROWS % m != 0:
        return f"tokens: got {rows} with AITER's tile of {m}; it would read their scales in the other layout"
    return None


_NORM: tuple[Rule, ...] = (_even_scales, _row_fits, _a_weight, _own_kernel_only_on_gfx1250)
_NORM_ALONE: tuple[Rule, ...] = (
    *_NORM,
    _norm_rounded_nowhere,
    *_rows("x"),
    _together("x", "weight"),
    _offsets("x"),
)
_NORM_OF_SUM: tuple[Rule, ...] = (
    *_NORM,
    _sum_rounded_nowhere,
    *_rows("x", "residual"),
    _together("x", "residual", "weight"),
    _offsets("x", "residual"),
)
_CACHE: tuple[Rule, ...] = (
    _bfloat16_rows,
    _bfloat16_cache,
    _one_cache,
    _slots_evenly_apart,
    _powers_of_two,
    _own_kernel_only_on_gfx1250,
    _rows("kv_c")[0],
)

#: What must hold of a call of an op (``packet.overload``), in the order in which it is asked.
RULES: dict[str, tuple[Rule, ...]] = {
    "dynamic_mxfp4_quant.default": (_even_scales, *_rows("x")),
    "rmsnorm_mxfp4_quant.default": _NORM_ALONE,
    "rmsnorm_mxfp4_quant.with_norm": (*_NORM_ALONE, _norm_in_its_dtype),
    "rmsnorm_add_mxfp4_quant.default": _NORM_OF_SUM,
    "rmsnorm_add_mxfp4_quant.with_norm": (*_NORM_OF_SUM, _norm_in_its_dtype),
    "silu_mul_mxfp4_quant.default": (
        _even_scales,
        _silu,
        _product_rounded_nowhere,
        *_rows("gate"),
        _halves_of_one_tensor,
    ),
    "fused_rope_mla_kv_cache.absorbed": (
        *_CACHE,
        _negative_slots_skipped,
        _style_of_aiter,
        _angles_rounded_alike,
        _zeros_keep_their_sign,
        _cos_and_sin_alike,
        _q_nope_as_wide_as_kv_c,
        _rows("q_nope")[0],
        _offsets("q_nope", "q_pe", "k_pe", "kv_c", "cos"),
    ),
    "concat_and_cache_mla.default": (*_CACHE, _offsets("kv_c", "k_pe")),
    "mxfp4_gemm.default": (
        _fp4_arithmetic,
        _no_bias,
        _layout_of_aiter,
        _sixteen_bits_out,
        _width_in_256,
        _rows("x_codes")[0],
        _some_weight,
        _contiguous_codes,
        _partial_sums_in_32_bits,
    ),
}
