"""What must hold of a call for AITER's kernels to give what it means: quants, norms, activations and products.

A condition is a function of a call's metadata that returns None, or the reason why the call must not go to AITER.
``_aiter_rules.py`` says which conditions a call of an op must meet; those of RoPE and the cache are in
``_aiter_rope_conditions.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionpasses.ops import _rms_norm

#: AITER's kernels compute these offsets in 32 bits.
INT32 = 2**31

#: Of a tensor in a Triton kernel; the norm's kernel holds a whole row in one.
_LARGEST_TENSOR = 2**20

#: Parts into which AITER's tuned configurations cut K, at most; kept with a margin.
_MOST_PARTS = 32

#: What AITER calls the activations of our contract; "x_sigmoid" is SiLU with a rounding more.
ACTIVATIONS = {"silu": "silu", "x_sigmoid": "silu", "gelu_tanh": "gelu_tanh"}

#: From so many tokens on, AITER's product of a shuffled weight takes their scales shuffled, too.
MANY_TOKENS = 32
#: And rows of them as a multiple of this.
SCALE_ROWS = 256


class Target(NamedTuple):
    """What AITER's kernels are compiled for, and by what.

    Attributes:
        architecture: "gfx950", ..
        keeps_zeros: does this Triton compile ``-x`` as a negation? Up to 3.6 it is ``0 - x``, which makes +0 of +0.
        rocm: the first number of ROCm's version, whose compiler makes AITER's HIP ops; 0 where there is none.
    """

    architecture: str
    keeps_zeros: bool
    rocm: int


class Call(NamedTuple):
    """A call of an op of ours, as its metadata: only shapes, strides, dtypes and storages of tensors are looked at."""

    arguments: Mapping[str, Any]
    target: Target

    def of(self, name: str) -> Any:
        return self.arguments[name]


#: The reason why AITER would not give what a call means, or None.
Condition = Callable[[Call], "str | None"]


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


# Of several ops.


def even_scales(call: Call) -> str | None:
    mode = call.of("scale_mode")
    return None if mode == "even" else f"scale_mode: got {mode!r}; AITER's Triton kernels know 'even' alone"


def rows_of(*names: str) -> tuple[Condition, ...]:
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


def own_kernel_only_on_gfx1250(call: Call) -> str | None:
    if call.target.architecture != "gfx1250":
        return None
    return "gfx1250: AITER has a kernel of its own (Gluon) for it, whose roundings were not verified"


def farthest(*tensors: Tensor) -> int:
    """The largest offset of an element, of all tensors."""
    return max(
        sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        for x in tensors
    )


def offsets_of(*names: str) -> Condition:
    def offsets_in_32_bits(call: Call) -> str | None:
        given = [call.of(name) for name in names if call.of(name) is not None]
        # Outputs are contiguous and no larger than the largest input read as one.
        reach = max(farthest(*given), max(x.numel() for x in given))
        return None if reach < INT32 else f"offsets: got up to {reach}; AITER computes them in 32 bits"

    return offsets_in_32_bits


# RMSNorm.


def together_in(*names: str) -> Condition:
    def elements_of_a_row_together(call: Call) -> str | None:
        for name in names:
            if call.of(name) is not None and call.of(name).stride(-1) != 1:
                return f"{name}: got strides {call.of(name).stride()}; AITER takes a last stride of 1, unchecked"
        return None

    return elements_of_a_row_together


def row_fits_in(name: str) -> Condition:
    def row_fits(call: Call) -> str | None:
        n = call.of(name).shape[-1]
        if n <= _LARGEST_TENSOR:
            return None
        return f"{name}: got rows of {n}; AITER holds one in a tensor of {_LARGEST_TENSOR}"

    return row_fits


def a_weight_in(name: str) -> Condition:
    def a_weight(call: Call) -> str | None:
        return None if call.of(name) is not None else f"{name}: got None; AITER reads one"

    return a_weight


def norm_rounded_nowhere(call: Call) -> str | None:
    x, cast_order, norm_dtype = call.of("x"), call.of("cast_order"), call.of("norm_dtype")
    if x.dtype == torch.float32:
        return None
    if cast_order == "cast_scale":
        return f"cast_order: got 'cast_scale', which rounds to {x.dtype} before the weight; AITER does not"
    if norm_dtype != torch.float32:
        return f"norm_dtype: got {norm_dtype or x.dtype}; AITER quantises the float32 norm, unrounded"
    return None


def norm_in_dtype_of_x(number: str = "") -> Condition:
    """``number``: that of the norm, as it ends the names of its arguments."""

    def norm_in_its_dtype(call: Call) -> str | None:
        x = call.of(f"x{number}")
        others = (call.of(f"{name}{number}") for name in ("weight", "cast_order", "norm_dtype"))
        dtype = _rms_norm.result_dtype(x, *others)
        if dtype == x.dtype:
            return None
        return f"norm_dtype{number}: got {dtype}; AITER returns the norm in the dtype of x ({x.dtype})"

    return norm_in_its_dtype


def second_norm_rounded_once(call: Call) -> str | None:
    x, cast_order = call.of("x2"), call.of("cast_order2")
    if x.dtype == torch.float32 or cast_order != "cast_scale":
        return None
    return f"cast_order2: got 'cast_scale', which rounds to {x.dtype} before the weight; AITER does not"


def sum_rounded_nowhere(call: Call) -> str | None:
    dtype = call.of("x").dtype
    if dtype == torch.float32:
        return None
    return f"x.dtype: got {dtype}; AITER norms the sum before it is rounded, ours is the norm of the rounded sum"


# Gated activation.


def activation_of_aiter(call: Call) -> str | None:
    activation = call.of("activation")
    if activation in ACTIVATIONS:
        return None
    return f"activation: got {activation!r}; AITER leaves out one that it does not know, unchecked"


def silu(call: Call) -> str | None:
    activation = call.of("activation")
    if activation == "silu":
        return None
    return f"activation: got {activation!r}; AITER computes it by other float32 steps, silu alone by ours"


def product_rounded_nowhere(call: Call) -> str | None:
    gate, cast_order, act_dtype = call.of("gate"), call.of("cast_order"), call.of("act_dtype")
    if gate.dtype == torch.float32:
        return None
    if cast_order != "mul_cast":
        return f"cast_order: got {cast_order!r}, which rounds the activation to {gate.dtype}; AITER does not"
    if act_dtype != torch.float32:
        return f"act_dtype: got {act_dtype or gate.dtype}; AITER quantises the float32 product, unrounded"
    return None


def halves_of_one_tensor(call: Call) -> str | None:
    gate, up = call.of("gate"), call.of("up")
    one = gate.untyped_storage()._cdata == up.untyped_storage()._cdata
    start = gate.storage_offset() + gate.shape[-1] * gate.stride(-1)
    if one and up.stride() == gate.stride() and up.storage_offset() == start:
        return None
    return "gate, up: got two tensors, or parts in another order; AITER takes [gate | up] as one"


# Products.


def fp4_arithmetic(call: Call) -> str | None:
    if call.target.architecture == "gfx950":
        return None
    return f"{call.target.architecture}: AITER's FP4 product was read for gfx950 alone"


def no_bias(call: Call) -> str | None:
    return None if call.of("bias") is None else "bias: got one; AITER's product has none, and ours is rounded once"


def in_layout(layout: str) -> Condition:
    def layout_of_aiter(call: Call) -> str | None:
        got = call.of("layout")
        if got == layout:
            return None
        return f"layout: got {got!r}; AITER reads 'linear', 'shuffled' and 'shuffled_scales'"

    return layout_of_aiter


def sixteen_bits_out(call: Call) -> str | None:
    dtype = call.of("out_dtype")
    return None if dtype != torch.float32 else f"out_dtype: got {dtype}; AITER promises bfloat16 and float16"


def width_in_256(call: Call) -> str | None:
    width = call.of("x_codes").shape[-1] * 2
    if width % 256 == 0:
        return None
    return f"K: got {width}; AITER's products of K % 256 != 0 are known to go wrong (aiter#4176)"


def contiguous_codes(call: Call) -> str | None:
    for name in ("x_codes", "x_scales"):
        if not call.of(name).is_contiguous():
            return f"{name}: got strides {call.of(name).stride()}; AITER assumes positive ones, unchecked"
    return None


def partial_sums_in_32_bits(call: Call) -> str | None:
    x, w = call.of("x_codes"), call.of("w_codes")
    rows, n = x.shape[:-1].numel(), call.of("rows") or w.shape[0]
    reach = max(x.numel(), w.numel(), rows * n * _MOST_PARTS if rows <= 256 else 0)
    return None if reach < INT32 else f"offsets: got up to {reach}; AITER computes them in 32 bits"


def some_weight(call: Call) -> str | None:
    return None if call.of("w_codes").numel() > 0 else "w_codes: got no rows; AITER divides by their number"


def enough_tokens(call: Call) -> str | None:
    tokens = call.of("x_codes").shape[:-1].numel()
    if tokens >= MANY_TOKENS:
        return None
    return f"tokens: got {tokens}; AITER's product of a weight with shuffled scales takes {MANY_TOKENS} and more"


def tile_of_shuffled(tile: Mapping[str, Any], rows: int, n: int, width: int) -> str | None:
    """The reason why AITER's product of ``rows`` tokens and a shuffled weight must not have this tile, or None."""
    m, depth = tile["BLOCK_SIZE_M"], tile["BLOCK_SIZE_K"]
    if width % depth != 0:
        return f"K: got {width} with AITER's tile of {depth}; its kernel has no code for a rest"
    # Scales of few tokens are as they are, of others in pieces of 32 rows, padded to SCALE_ROWS.
    if m > 16 if rows < MANY_TOKENS else m < 32 or SCALE_ROWS % m != 0:
        return f"tokens: got {rows} with AITER's tile of {m}; it would read their scales in the other layout"
    return columns_of_shuffled(tile, n)


def tile_of_shuffled_scales(tile: Mapping[str, Any], rows: int, n: int, width: int) -> str | None:
    """The same of a weight whose scales alone are shuffled. A rest of K is masked there, in whole pieces of 256."""
    m, depth = tile["BLOCK_SIZE_M"], tile["BLOCK_SIZE_K"]
    if depth < 256:
        return f"K: got {width} with AITER's tile of {depth}; its kernel takes scales apart in pieces of 256 columns"
    # A tile of fewer than 32 tokens reads their scales as they are.
    if m >= 32 and SCALE_ROWS % m != 0:
        return f"tokens: got {rows} with AITER's tile of {m}; it would read beyond their scales, unchecked"
    return columns_of_shuffled(tile, n)


def columns_of_shuffled(tile: Mapping[str, Any], n: int) -> str | None:
    # AITER takes tiles of fewer columns for tiles of 32.
    columns = max(tile["BLOCK_SIZE_N"], 32)
    return (
        None
        if n % columns == 0
        else f"N: got {n} with AITER's tile of {columns}; it reads beyond the weight, unchecked"
    )
