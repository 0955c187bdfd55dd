"""The Triton provider's adapters of ``fused_rope_mla_kv_cache`` and ``concat_and_cache_mla``.

Bytes are the reference's for every input on every GPU, but for a slot that occurs twice: which token's row it gets is
not defined then. A slot or position out of range is a device assert, after which nothing of that token is in the cache;
builds for AMD GPUs have no asserts, there it is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusionpasses.kernels import arch
from fusionpasses.kernels import rope_mla_kv_cache as kernel
from fusionpasses.ops import _kv_cache
from fusionpasses.providers import _launch


def _fused_rope_mla_kv_cache(q_pe: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    q = q_pe.new_empty(q_pe.shape)
    _launch_rope(None, q_pe, *args, **kwargs, q=q, k=None)
    return q


def _fused_rope_mla_kv_cache_with_k(q_pe: Tensor, k_pe: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    q, k = q_pe.new_empty(q_pe.shape), k_pe.new_empty(k_pe.shape)
    _launch_rope(None, q_pe, k_pe, *args, **kwargs, q=q, k=k)
    return q, k


def _fused_rope_mla_kv_cache_absorbed(q_nope: Tensor, q_pe: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    q = q_pe.new_empty((*q_pe.shape[:2], q_nope.shape[2] + q_pe.shape[2]))
    _launch_rope(q_nope, q_pe, *args, **kwargs, q=q, k=None)
    return q


def _fused_rope_mla_kv_cache_absorbed_with_k(
    q_nope: Tensor, q_pe: Tensor, k_pe: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    q = q_pe.new_empty((*q_pe.shape[:2], q_nope.shape[2] + q_pe.shape[2]))
    k = k_pe.new_empty(k_pe.shape)
    _launch_rope(q_nope, q_pe, k_pe, *args, **kwargs, q=q, k=k)
    return q, k


def _fused_rope_mla_kv_cache_absorbed_bmm(
    q_nope: Tensor, w_uk: Tensor, q_pe: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    q = q_pe.new_empty((*q_pe.shape[:2], w_uk.shape[2] + q_pe.shape[2]))
    _launch_rope(None, q_pe, *args, **kwargs, q=q, k=None)
    # Behind it, because only this package's kernels start before the one in front has ended.
    _launch.torch_call(_multiply_into, q_nope, w_uk, q)
    return q


def _fused_rope_mla_kv_cache_absorbed_bmm_with_k(
    q_nope: Tensor, w_uk: Tensor, q_pe: Tensor, k_pe: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    q = q_pe.new_empty((*q_pe.shape[:2], w_uk.shape[2] + q_pe.shape[2]))
    k = k_pe.new_empty(k_pe.shape)
    _launch_rope(None, q_pe, k_pe, *args, **kwargs, q=q, k=k)
    _launch.torch_call(_multiply_into, q_nope, w_uk, q)
    return q, k


def _multiply_into(q_nope: Tensor, w_uk: Tensor, q: Tensor) -> None:
    """The product, into the first columns of the query: BLAS takes rows that are further apart than they are wide."""
    heads, tokens, _ = q_nope.shape
    width = q.shape[2]
    torch.bmm(q_nope, w_uk, out=q.as_strided((heads, tokens, w_uk.shape[2]), (width, heads * width, 1)))


def _concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    *,
    pe_cache: Tensor | None = None,
    cache_scale: Tensor | None = None,
    scaling: str = "divide",
) -> None:
    _launch_rope(
        None,
        None,
        k_pe,
        kv_c,
        kv_cache,
        None,
        None,
        slots,
        style="neox",
        negative_slots="skip",
        pe_cache=pe_cache,
        cache_scale=cache_scale,
        scaling=scaling,
        q=None,
        k=None,
    )


#: The adapter of each op (``packet.overload``): the op's arguments without ``provider``, already checked.
ADAPTERS: dict[str, Callable[..., Any]] = {
    "fused_rope_mla_kv_cache.default": _fused_rope_mla_kv_cache,
    "fused_rope_mla_kv_cache.with_k": _fused_rope_mla_kv_cache_with_k,
    "fused_rope_mla_kv_cache.absorbed": _fused_rope_mla_kv_cache_absorbed,
    "fused_rope_mla_kv_cache.absorbed_with_k": _fused_rope_mla_kv_cache_absorbed_with_k,
    "fused_rope_mla_kv_cache.absorbed_bmm": _fused_rope_mla_kv_cache_absorbed_bmm,
    "fused_rope_mla_kv_cache.absorbed_bmm_with_k": _fused_rope_mla_kv_cache_absorbed_bmm_with_k,
    "concat_and_cache_mla.default": _concat_and_cache_mla,
}


def _launch_rope(
    q_nope: Tensor | None,
    q_pe: Tensor | None,
    k_pe: Tensor,
    kv_c: Tensor,
    kv_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slots: Tensor,
    *,
    style: str,
    negative_slots: str,
    q: Tensor | None,
    k: Tensor | None,
    pe_cache: Tensor | None = None,
    positions: Tensor | None = None,
    cache_scale: Tensor | None = None,
    scaling: str = "divide",
) -> None:
    """Launch the kernel; without q_nope, the first columns of q that are not q_pe's are left as they are."""
    tokens, latent = kv_c.shape
    rope = k_pe.shape[-1]
    if tokens == 0:
        return
    heads = 1 if q_pe is None else q_pe.shape[1]
    nope = 0 if q is None else q.shape[2] - rope
    copied_nope = 0 if q_nope is None else nope
    q_nope, q_pe, k_pe, kv_c = _together(q_nope), _together(q_pe), _together(k_pe), _together(kv_c)
    cos, sin, slots, positions = _together(cos), _together(sin), _together(slots), _together(positions)
    scaled: str | None = None
    if kv_cache.dtype in _kv_cache.FP8_DTYPES:
        scaled = "none" if cache_scale is None else {"divide": "divide", "reciprocal": "multiply"}[scaling]
    page, cache_strides, pe_cache_strides = _paging(kv_cache, pe_cache)
    rows = [tensor for tensor in (q_nope, q_pe, k_pe, kv_c, cos, sin, kv_cache, pe_cache) if tensor is not None]
    vector = 8 if rope % 16 == 0 and nope % 8 == 0 and latent % 8 == 0 and all(map(_in_words, rows)) else 1
    gpu = arch.of(k_pe.device)
    options: dict[str, Any] = kernel.launch_options(tokens, heads, copied_nope, rope, vector, gpu)
    lanes = options["LANES"]
    # Rows of q, with those that are left out of the last tokens taken together.
    q_rows = 0 if q_pe is None else -(-tokens // options["TOGETHER"]) * options["TOGETHER"] * heads
    copied = 0 if options["JOINED"] else q_rows * copied_nope // vector
    k_programs = -(-tokens * rope // (2 * vector * lanes))
    row_programs = k_programs - (-tokens * (latent // vector) // (lanes * options["ROW_COPIES"]))
    q_programs = row_programs - (-q_rows * rope // (2 * vector * lanes))
    programs = q_programs - (-copied // (lanes * options["COPIES"]))
    with _launch.on_device_of(k_pe):
        _launch.launch(
            kernel.rope_mla_kv_cache,
            (programs,),
            q_nope,
            q_pe,
            k_pe,
            kv_c,
            cos,
            sin,
            positions,
            slots,
            kv_cache,
            pe_cache,
            cache_scale,
            q,
            k,
            tokens,
            k_programs,
            row_programs,
            q_programs,
            kv_cache.shape[:-1].numel(),
            None if cos is None else cos.shape[0],
            *(q_nope.stride()[:2] if q_nope is not None else (None, None)),
            *(q_pe.stride()[:2] if q_pe is not None else (None, None)),
            k_pe.stride(0),
            kv_c.stride(0),
            None if cos is None else cos.stride(0),
            None if sin is None else sin.stride(0),
            *cache_strides,
            *pe_cache_strides,
            HEADS=heads,
            NOPE=nope,
            LATENT=latent,
            ROPE=rope,
            FULL=cos is not None and cos.shape[1] == rope,
            READ_WOVEN=style.startswith("interleaved"),
            WRITE_WOVEN=style == "interleaved",
            NEGATIVE_SLOTS=negative_slots,
            PAGE=page,
            SCALING=scaled,
            VECTOR=vector,
            ISA=gpu.isa,
            mutates=(kv_cache,) if pe_cache is None else (kv_cache, pe_cache),
            **options,
        )


def _together(x: Any) -> Any:
    """The tensor, or a copy of it, with the elements of a row next to each other."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _in_words(x: Tensor) -> bool:
    """Do all rows start at multiples of 4 bytes? The kernel loads 32-bit words then, and Triton sees whether it can
    load several at once."""
    return x.data_ptr() % 4 == 0 and all(stride * x.element_size() % 4 == 0 for stride in x.stride()[:-1])


_Strides = tuple[int | None, int | None]


def _paging(kv_cache: Tensor, pe_cache: Tensor | None) -> tuple[int | None, _Strides, _Strides]:
    """Slots in a block, and strides of blocks and slots of both caches; None where a slot's number times one stride
    finds its row."""
    caches = [cache for cache in (kv_cache, pe_cache) if cache is not None]
    page: int | None = None
    strides: list[_Strides] = [(None, cache.stride(-2)) for cache in caches]
    if any(cache.dim() == 3 and cache.stride(0) != cache.shape[1] * cache.stride(1) for cache in caches):
        page, strides = kv_cache.shape[1], [(cache.stride(0), cache.stride(1)) for cache in caches]
    return page, strides[0], strides[1] if pe_cache is not None else (None, None)
