"""The latent cache of multi-head latent attention (MLA), and the one function that writes to it.

A token's row is ``[kv_c | k_pe]``: L compressed elements, then R rotated ones. A slot is the number of a row.

Layouts. ``kv_cache`` is flat ``[slots, L + R]`` or paged ``[blocks, block, L + R]``, where slot s is row ``s % block``
of block ``s // block``. It may be a view (one layer of a stacked cache, a range of slots) with any strides, if the last
is 1 and no two of its elements share memory. With ``pe_cache``, there are two caches of the same leading shape:
``kv_cache`` ``[..., L]`` for kv_c and ``pe_cache`` ``[..., R]`` for k_pe. Caches must not overlap each other nor any
input; that is not checked.

Dtypes. The model's dtype: rows are copied. float8_e4m3fn, or uint8 holding such bytes: ``row / cache_scale`` or
``row * (1 / cache_scale)`` in float32, saturated at +-448, rounded to nearest even; without ``cache_scale`` the row
itself. The two ways to scale differ in the last bit before the rounding, and so in bytes. Infinities saturate, a NaN
stays one.

A slot below 0 means, by ``negative_slots``:

========  ==========================================================  =============================
mode      slot < 0                                                    same as
========  ==========================================================  =============================
"skip"    nothing is written for that token                           serving engines' cache kernels
"wrap"    counts from the end: -1 is the last slot                    index_put_, cache[slots] = rows
"error"   refused                                                     index_copy_
========  ==========================================================  =============================

A slot of ``capacity`` or more, and below ``-capacity`` for "wrap", is refused in every mode: on a CPU by
UnsupportedInput before anything is written, on a GPU by a device assert, because reading the slots back would stop the
host. Nothing is written for such a token either way, so never outside the cache.

If a slot occurs twice, the reference keeps the row of the last token, on every device. torch promises no order for
index_put_ and index_copy_, nor do serving engines; a provider that launches a kernel need not keep this one.

Under torch.compile the write is in place, without a copy of the cache, for all these views. One case is wrong, in
Inductor (pytorch/pytorch#198068, torch 2.13): of a stacked cache whose *sizes are dynamic*, ``cache[layer]`` loses its
offset and layer 0 is written. Keep the sizes static (``torch._dynamo.mark_static``), or pass each layer's cache as a
tensor of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _indices

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.uint8)
NEGATIVE_SLOTS = ("skip", "wrap", "error")
SCALINGS = ("divide", "reciprocal")

_FP8_MAX = 448.0


def check_negative_slots(negative_slots: str) -> None:
    if not isinstance(negative_slots, str) or negative_slots not in NEGATIVE_SLOTS:
        raise UnsupportedInput(
            f"negative_slots: got {negative_slots!r}, allowed 'skip' (write nothing), 'wrap' (count from the end, as "
            "index_put_) or 'error' (as index_copy_); serving engines pad with -1 and mean 'skip'"
        )


def check(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    pe_cache: Tensor | None,
    cache_scale: Tensor | None,
    scaling: str,
) -> None:
    """Refuse rows, caches or slots outside the contract; looks at metadata only."""
    _check_rows(kv_c, k_pe)
    latent, rope = kv_c.shape[1], k_pe.shape[-1]
    if pe_cache is None:
        _check_cache("kv_cache", kv_cache, latent + rope, f"{latent} of kv_c and {rope} of k_pe", k_pe)
    else:
        _check_cache("kv_cache", kv_cache, latent, "of kv_c, because pe_cache takes k_pe", k_pe)
        _check_cache("pe_cache", pe_cache, rope, "of k_pe", k_pe)
        if pe_cache.shape[:-1] != kv_cache.shape[:-1] or pe_cache.dtype != kv_cache.dtype:
            raise UnsupportedInput(
                f"pe_cache: got {pe_cache.dtype} {tuple(pe_cache.shape)}, allowed {kv_cache.dtype} "
                f"{(*kv_cache.shape[:-1], rope)}, the slots and dtype of kv_cache {tuple(kv_cache.shape)}; allocate "
                "both alike"
            )
    _indices.check("slots", slots, kv_c.shape[0], k_pe.device)
    _check_scale(kv_cache, cache_scale, scaling, k_pe)


def _check_rows(kv_c: Tensor, k_pe: Tensor) -> None:
    if kv_c.dtype not in MODEL_DTYPES:
        raise UnsupportedInput(
            f"kv_c.dtype: got {kv_c.dtype}, allowed {', '.join(map(str, MODEL_DTYPES))}; convert it first"
        )
    if kv_c.dim() != 2 or kv_c.shape[1] == 0:
        raise UnsupportedInput(
            f"kv_c: got shape {tuple(kv_c.shape)}, allowed [tokens, L] with L > 0; flatten batch and sequence"
        )
    tokens = kv_c.shape[0]
    if k_pe.dim() not in (2, 3) or k_pe.shape[0] != tokens or (k_pe.dim() == 3 and k_pe.shape[1] != 1):
        raise UnsupportedInput(
            f"k_pe: got shape {tuple(k_pe.shape)}, allowed [{tokens}, R] or [{tokens}, 1, R], the tokens of kv_c "
            f"{tuple(kv_c.shape)}; flatten batch and sequence"
        )
    if k_pe.shape[-1] == 0 or k_pe.shape[-1] % 2 != 0:
        raise UnsupportedInput(
            f"k_pe: got shape {tuple(k_pe.shape)}, allowed a positive even width R: RoPE turns pairs; split the head "
            "elsewhere"
        )
    if k_pe.dtype != kv_c.dtype:
        raise UnsupportedInput(f"k_pe.dtype: got {k_pe.dtype}, allowed {kv_c.dtype}, that of kv_c; convert one")
    _indices.check_device("kv_c", kv_c, k_pe.device)


def _check_cache(name: str, cache: Tensor, width: int, because: str, k_pe: Tensor) -> None:
    if cache.dtype not in (k_pe.dtype, *FP8_DTYPES):
        raise UnsupportedInput(
            f"{name}.dtype: got {cache.dtype}, allowed {k_pe.dtype} (that of k_pe), torch.float8_e4m3fn, or "
            "torch.uint8 holding float8_e4m3fn; allocate the cache in one of them"
        )
    if cache.dim() not in (2, 3) or cache.shape[-1] != width:
        raise UnsupportedInput(
            f"{name}: got shape {tuple(cache.shape)}, allowed [slots, {width}] or [blocks, block, {width}] "
            f"({because}); pass one layer of a stacked cache, and view other layouts as one of these"
        )
    if cache.stride(-1) != 1:
        raise UnsupportedInput(
            f"{name}: got strides {cache.stride()}, allowed a last stride of 1; keep the elements of a row together"
        )
    # From the smallest step up, each must clear everything inside it. Axes of size 1 are never stepped along.
    extent = 1
    steps = [(stride, size) for stride, size in zip(cache.stride(), cache.shape, strict=True) if size != 1]
    for stride, size in sorted(steps):
        if stride < extent:
            raise UnsupportedInput(
                f"{name}: got shape {tuple(cache.shape)} with strides {cache.stride()}, allowed a tensor whose "
                "elements do not share memory; pass the tensor before expand() or as_strided()"
            )
        extent += (size - 1) * stride
    _indices.check_device(name, cache, k_pe.device)


def _check_scale(kv_cache: Tensor, cache_scale: Tensor | None, scaling: str, k_pe: Tensor) -> None:
    if not isinstance(scaling, str) or scaling not in SCALINGS:
        raise UnsupportedInput(
            f"scaling: got {scaling!r}, allowed 'divide' (row / cache_scale) or 'reciprocal' (row * (1 / "
            "cache_scale)); take what wrote the rest of the cache: bytes differ"
        )
    if cache_scale is None:
        return
    if kv_cache.dtype not in FP8_DTYPES:
        raise UnsupportedInput(
            f"cache_scale: got one with a cache of {kv_cache.dtype}, allowed with float8_e4m3fn and uint8 caches only; "
            "leave it None"
        )
    if cache_scale.dtype != torch.float32 or cache_scale.dim() > 1 or cache_scale.numel() != 1:
        raise UnsupportedInput(
            f"cache_scale: got {cache_scale.dtype} {tuple(cache_scale.shape)}, allowed torch.float32 with one element, "
            "[] or [1]; call once per layer"
        )
    _indices.check_device("cache_scale", cache_scale, k_pe.device)


def write(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    negative_slots: str,
    pe_cache: Tensor | None,
    cache_scale: Tensor | None,
    scaling: str,
) -> None:
    """Write the row ``[kv_c | k_pe]`` of each token to its slot. Arguments as checked by :func:`check`.

    Raises:
        UnsupportedInput: on a CPU, for a slot out of range; nothing was written. A device assert on a GPU.
    """
    capacity = kv_cache.shape[:-1].numel()
    wanted = slots.long()
    if negative_slots == "wrap":
        wanted = torch.where(wanted < 0, wanted + capacity, wanted)
    inside = (wanted >= 0) & (wanted < capacity)
    skipped = wanted < 0 if negative_slots == "skip" else torch.zeros_like(inside)
    lowest = {"skip": "slot", "wrap": f"{-capacity} <= slot", "error": "0 <= slot"}[negative_slots]
    _indices.require(
        inside | skipped,
        slots,
        "slots",
        f"{lowest} < {capacity} with negative_slots={negative_slots!r} and a cache of {capacity} slots",
        "pad with -1 and negative_slots='skip' where nothing is to be written",
    )
    if slots.shape[0] == 0 or capacity == 0:
        return
    target, source, nothing = _one_writer_per_slot(torch.where(inside, wanted, -1))
    k_pe = k_pe.reshape(k_pe.shape[0], k_pe.shape[-1])
    parts = [(kv_cache, torch.cat((kv_c, k_pe), -1))] if pe_cache is None else [(kv_cache, kv_c), (pe_cache, k_pe)]
    for cache, rows in parts:
        if cache.dtype in FP8_DTYPES:
            # As bytes, because not every torch can index float8.
            cache, rows = cache.view(torch.uint8), _to_fp8(rows, cache_scale, scaling).view(torch.uint8)
        place = (target,) if cache.dim() == 2 else (target // cache.shape[1], target % cache.shape[1])
        cache.index_put_(place, torch.where(nothing, cache[place], rows[source]))


def _one_writer_per_slot(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where to write for each token, whose row, and whether nothing is to be written at all.

    ``target`` holds slots, and -1 for tokens without one. How many tokens write is not known to the host, so all of
    them do, and those whose row must not be seen repeat another token's write: one that has the same slot and comes
    later, or any, for a token without a slot. Equal bytes may be written in any order. If no token has a slot, all
    write to row 0 what it held.
    """
    ordered, order = torch.sort(target, stable=True)
    target = torch.where(target < 0, ordered[-1], target)
    source = order[torch.searchsorted(ordered, target, right=True) - 1]
    return target.clamp(min=0), source, ordered[-1] < 0


def _to_fp8(rows: Tensor, cache_scale: Tensor | None, scaling: str) -> Tensor:
    wide = rows.float()
    if cache_scale is not None:
        scale = cache_scale.reshape(())
        wide = wide / scale if scaling == "divide" else wide * (1.0 / scale)
    return wide.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
