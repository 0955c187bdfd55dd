"""What must hold of a call for AITER's kernels of RoPE and the latent cache: conditions as of ``_aiter_conditions.py``.

Those of the Triton kernel, which also writes rows alone, come first; then those of the HIP op. The latter were read in
its C++ (``csrc/kernels/cache_kernels.cu``), where an argument that its checks refuse may end the process, and where
much is not checked. It never ran here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpasses.providers._aiter_conditions import INT32, Call, slot_stride

#: The head width that the HIP op's kernels for decoding turn, and the latent width of the one for many tokens.
HIP_ROPE, HIP_LATENT = 64, 512
#: Its kernel of one head for each program takes fewer tokens than this, and slots that are blocks of their own.
_HIP_TOKENS = 256


def bfloat16_rows(call: Call) -> str | None:
    dtype = call.of("kv_c").dtype
    if dtype == torch.bfloat16:
        return None
    return f"kv_c.dtype: got {dtype}; where AITER rounds as ours do is known of bfloat16 alone"


def bfloat16_cache(call: Call) -> str | None:
    dtype = call.of("kv_cache").dtype
    if dtype == torch.bfloat16:
        return None
    if dtype == torch.uint8:
        return "kv_cache.dtype: got torch.uint8, float8 by our contract; AITER takes that for NVFP4"
    return f"kv_cache.dtype: got {dtype}; AITER does not saturate (float8) or does not take it"


def one_cache(call: Call) -> str | None:
    return None if call.of("pe_cache") is None else "pe_cache: got one; AITER writes kv_c and k_pe to one cache"


def slots_evenly_apart(call: Call) -> str | None:
    cache = call.of("kv_cache")
    if slot_stride(cache) is not None:
        return None
    return f"kv_cache: got strides {cache.stride()}; AITER takes slots that are evenly apart"


def powers_of_two(call: Call) -> str | None:
    latent, rope = call.of("kv_c").shape[-1], call.of("k_pe").shape[-1]
    if latent & (latent - 1) == 0 and rope & (rope - 1) == 0:
        return None
    return f"kv_c, k_pe: got widths {latent} and {rope}; AITER's kernel needs powers of two, unchecked"


def negative_slots_skipped(call: Call) -> str | None:
    meaning = call.of("negative_slots")
    return None if meaning == "skip" else f"negative_slots: got {meaning!r}; AITER writes nothing for one ('skip')"


def style_of_aiter(call: Call) -> str | None:
    style = call.of("style")
    if style != "interleaved_to_neox":
        return None
    return f"style: got {style!r}; AITER writes pairs where it reads them"


def zeros_keep_their_sign(call: Call) -> str | None:
    if call.target.keeps_zeros:
        return None
    return "Triton: got one that compiles -x as 0 - x; AITER turns a pair of zeros by it and may lose the sign of one"


def angles_rounded_alike(call: Call) -> str | None:
    q, cos = call.of("q_pe"), call.of("cos")
    if cos.dtype == q.dtype:
        return None
    return (
        f"cos.dtype: got {cos.dtype} with q_pe {q.dtype}; AITER does not round k before it is written, and may use FMAs"
    )


def cos_and_sin_alike(call: Call) -> str | None:
    cos, sin = call.of("cos"), call.of("sin")
    if cos.stride() == sin.stride():
        return None
    return f"sin: got strides {sin.stride()}; AITER reads it with those of cos {cos.stride()}, unchecked"


def q_nope_as_wide_as_kv_c(call: Call) -> str | None:
    n, latent = call.of("q_nope").shape[-1], call.of("kv_c").shape[-1]
    return None if n == latent else f"q_nope: got width {n} with kv_c of {latent}; AITER takes equal ones"


# The HIP op.


def hip_architecture(call: Call) -> str | None:
    name = call.target.architecture
    if name in ("gfx942", "gfx950"):
        return None
    return f"{name}: AITER's HIP kernels were read for gfx942 and gfx950 alone"


def cache_of_model_dtype(call: Call) -> str | None:
    dtype, cache = call.of("kv_c").dtype, call.of("kv_cache").dtype
    if cache == dtype:
        return None
    return f"kv_cache.dtype: got {cache} with rows of {dtype}; AITER does not saturate (float8) or does not take it"


def angles_of_model_dtype(call: Call) -> str | None:
    q, cos = call.of("q_pe"), call.of("cos")
    if cos.dtype == q.dtype:
        return None
    return f"cos.dtype: got {cos.dtype} with q_pe {q.dtype}; AITER takes its bytes for those of {q.dtype}, unchecked"


def angles_in_a_row(call: Call) -> str | None:
    for name in ("cos", "sin"):
        if not call.of(name).is_contiguous():
            return f"{name}: got strides {call.of(name).stride()}; AITER takes a contiguous table, unchecked"
    return None


def hip_widths(call: Call) -> str | None:
    rope, angles = call.of("k_pe").shape[-1], call.of("cos").shape[-1]
    if rope == HIP_ROPE and angles * 2 == HIP_ROPE:
        return None
    return (
        f"k_pe, cos: got widths {rope} and {angles}; AITER's kernels that write the query of every token turn "
        f"{HIP_ROPE} by {HIP_ROPE // 2} angles"
    )


def _block(call: Call) -> int:
    cache: Tensor = call.of("kv_cache")
    return 1 if cache.dim() == 2 else cache.shape[1]


def _by_heads(call: Call) -> bool:
    """Does AITER take the kernel of one head for each program?"""
    tokens, latent = call.of("kv_c").shape
    return bool(latent <= HIP_LATENT and _block(call) == 1 and tokens < _HIP_TOKENS)


def hip_rounds_bfloat16(call: Call) -> str | None:
    """Not every compiler, nor every kernel, rounds to it: what is cut off, or no number at all, is not "float32"."""
    dtype, target = call.of("kv_c").dtype, call.target
    if dtype != torch.bfloat16:
        return None
    if target.rocm < 7:
        return f"ROCm: got {target.rocm} with {dtype}; before 7, AITER's HIP ops are compiled with integers for it"
    if target.architecture == "gfx950" or _by_heads(call):
        return None
    return (
        f"{target.architecture}: with {dtype}, AITER's kernel for many tokens cuts k off there, and does not round it"
    )


def hip_kernel_for_decoding(call: Call) -> str | None:
    """Only two of AITER's kernels write the query of a token without a slot; the others are refused by an abort."""
    kv_c, block, heads = call.of("kv_c"), _block(call), call.of("q_nope").shape[1]
    tokens, latent = kv_c.shape
    if _by_heads(call):
        # Threads take pieces of a row; 32 of them turn k and the head of q.
        piece = 4 if kv_c.dtype == torch.float32 or 64 <= latent <= 128 else 8
        if latent % piece == 0 and latent // piece >= HIP_ROPE // 2:
            return None
    elif latent == HIP_LATENT and latent * heads >= 2048:
        return None
    return (
        f"kv_c: got {tokens} tokens of {latent}, {heads} heads and blocks of {block}; AITER has kernels for "
        f"{HIP_LATENT} with 4 heads and more, or for fewer than {_HIP_TOKENS} tokens and blocks of 1"
    )


def hip_rows_together(call: Call) -> str | None:
    for name in ("q_nope", "q_pe", "kv_c", "k_pe"):
        if call.of(name).stride(-1) != 1:
            return f"{name}: got strides {call.of(name).stride()}; AITER takes a last stride of 1, not always checked"
    return None


def hip_rows_aligned(call: Call) -> str | None:
    for name in ("q_nope", "kv_c", "kv_cache"):
        x = call.of(name)
        starts = [x.storage_offset(), *(stride for size, stride in _steps(x) if size != 1)]
        if any(start * x.element_size() % 16 != 0 for start in starts):
            return (
                f"{name}: got strides {x.stride()} from {x.storage_offset()}; AITER moves 16 bytes at once, unchecked"
            )
    return None


def _steps(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, without the last axis."""
    return list(zip(x.shape, x.stride(), strict=True))[:-1]


def query_in_32_bits(call: Call) -> str | None:
    # [q_nope, q_pe], which is written, is larger than either.
    reach = call.of("q_nope").numel() + call.of("q_pe").numel()
    return None if reach < INT32 else f"offsets: got up to {reach} in the query; AITER computes them in 32 bits"


def hip_offsets_in_32_bits(call: Call) -> str | None:
    q = call.of("q_nope")
    # Of one token's heads, and some that are looked ahead to. Tokens, and slots, are counted in 64 bits.
    reach = (q.shape[1] + 8) * q.stride(1) * q.element_size()
    strides = [s for name in ("q_nope", "q_pe", "kv_c", "k_pe", "kv_cache") for s in call.of(name).stride()]
    reach = max(reach, *strides)
    return None if reach < INT32 else f"offsets: got up to {reach}; AITER computes them in 32 bits"
