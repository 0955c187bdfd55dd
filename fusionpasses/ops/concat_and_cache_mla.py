"""``concat_and_cache_mla(kv_c, k_pe, kv_cache, slots, ...)``: write ``[kv_c | k_pe]`` into the latent cache.

The building block for a model that is written plainly: rotate q_pe and k_pe with any spelling of RoPE, then call this.
It has the shape of the op of the same name in serving engines, whose negative slots are padding.

Args:
    kv_c: ``[T, L]`` bfloat16, float16 or float32, any strides, T may be 0: the compressed keys and values.
    k_pe: ``[T, R]`` or ``[T, 1, R]`` in the same dtype, already rotated, R even, any strides.
    kv_cache: written. ``[slots, L + R]`` or ``[blocks, block, L + R]``, in the dtype of kv_c, float8_e4m3fn, or uint8
        holding that; or the part for kv_c, ``[..., L]``, when there is a pe_cache. May be a view; layouts, strides and
        roundings are in ``fusionpasses/ops/_kv_cache.py``.
    slots: int32 or int64 ``[T]``, each below the capacity. Nothing is written for a negative one.
    pe_cache: written. ``[..., R]`` with the leading shape and dtype of kv_cache, or None.
    cache_scale: float32 ``[]`` or ``[1]``, for float8 caches, or None for 1.
    scaling: "divide" (row / cache_scale) or "reciprocal" (row * (1 / cache_scale)).

Returns:
    Nothing. The mutation is in the schema, so torch.compile functionalises the op and keeps it in order with other
    readers and writers of the cache.

Raises:
    UnsupportedInput: an argument outside the above, or an input that requires grad in grad mode; on a CPU also a slot
        out of range. Nothing was written. On a GPU a slot out of range is a device assert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.ops import _kv_cache
from fusionpasses.ops._op import Sample, declare


def check(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    *,
    pe_cache: Tensor | None = None,
    cache_scale: Tensor | None = None,
    scaling: str = "divide",
) -> None:
    _kv_cache.check(kv_c, k_pe, kv_cache, slots, pe_cache, cache_scale, scaling)


def reference(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    *,
    pe_cache: Tensor | None = None,
    cache_scale: Tensor | None = None,
    scaling: str = "divide",
) -> None:
    _kv_cache.write(kv_c, k_pe, kv_cache, slots, "skip", pe_cache, cache_scale, scaling)


def fake(*args: object, **kwargs: object) -> None:
    return None


def samples(device: torch.device) -> Iterator[Sample]:
    def rows(dtype: torch.dtype, tokens: int = 5) -> tuple[Tensor, Tensor]:
        joint = torch.randn(tokens, 24, device=device, dtype=dtype)
        return joint[:, :16], joint[:, 16:]

    slots = torch.tensor([7, -1, 0, 11, 3], device=device)
    scale = torch.tensor([0.75], device=device)
    kv_c, k_pe = rows(torch.bfloat16)
    yield (kv_c, k_pe, torch.randn(12, 24, device=device, dtype=torch.bfloat16), slots), {}
    stacked = torch.randn(3, 2, 4, 24, device=device, dtype=torch.bfloat16)
    yield (kv_c, k_pe.unsqueeze(1), stacked[:, 1].contiguous(), slots.int()), {}
    yield (kv_c, k_pe, stacked[:, 1], slots), {}
    kv_c, k_pe = rows(torch.float16)
    two = {"pe_cache": torch.randn(12, 8, device=device, dtype=torch.float16)}
    yield (kv_c, k_pe, torch.randn(12, 16, device=device, dtype=torch.float16), slots), two
    kv_c, k_pe = rows(torch.float32)
    # float8 as bytes, because opcheck cannot compare float8.
    as_bytes = torch.zeros(3, 4, 24, device=device, dtype=torch.uint8)
    yield (kv_c, k_pe, as_bytes, slots), {"cache_scale": scale[0]}
    yield (kv_c, k_pe, as_bytes.flatten(0, 1), slots), {"cache_scale": scale, "scaling": "reciprocal"}
    yield (kv_c, k_pe, torch.randn(12, 24, device=device), torch.full((5,), -1, device=device)), {}
    yield (*rows(torch.float32, 0), torch.randn(12, 24, device=device), slots[:0]), {}


OP = declare(
    "concat_and_cache_mla.default",
    "(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slots, *, Tensor(b!)? pe_cache=None, "
    'Tensor? cache_scale=None, str scaling="divide", str provider="auto") -> ()',
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
