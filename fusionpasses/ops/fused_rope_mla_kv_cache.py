"""``fused_rope_mla_kv_cache(q_pe, k_pe, kv_c, kv_cache, cos, sin, slots, ...)``: RoPE and the write to the MLA cache.

Rotates q_pe and k_pe by the same angles and writes the row ``[kv_c | rope(k_pe)]`` of each token to its slot.

Overloads:
    default -> q: rope(q_pe)
    with_k -> (q, k): also rope(k_pe), for attention over expanded keys (prefill); absorbed attention reads the cache
    absorbed -> q: cat([q_nope, rope(q_pe)], -1), what absorbed attention multiplies with the cache's rows; takes q_nope
        as its first argument
    absorbed_with_k -> (q, k): both
    absorbed_bmm -> q: cat([bmm(q_nope, w_uk).transpose(0, 1), rope(q_pe)], -1), where the bmm, which absorbs the
        up-projection of keys, writes into its part of the query; takes q_nope and w_uk as its first arguments
    absorbed_bmm_with_k -> (q, k): both

Args:
    q_nope: ``[T, H, N]`` in the dtype of q_pe, any strides. Of absorbed_bmm, as its first factor: ``[H, T, P]``.
    w_uk: ``[H, P, N]`` in the dtype of q_pe, any strides.
    q_pe: ``[T, H, R]`` bfloat16, float16 or float32, R even, any strides, T may be 0.
    k_pe: ``[T, R]`` or ``[T, 1, R]`` in the same dtype, any strides.
    kv_c: ``[T, L]`` in the same dtype, any strides.
    kv_cache: written, as is pe_cache; nothing else is. See ``fusionpasses/ops/_kv_cache.py`` for layouts and dtypes.
    cos, sin: per token ``[T, R/2]`` or ``[T, R]``; or tables ``[P, R/2]`` or ``[P, R]``, with positions. In the dtype
        of q_pe or float32, which decides the roundings: ``fusionpasses/ops/_rope.py``. Any strides.
    slots: int32 or int64 ``[T]``.
    style: "neox", "interleaved" or "interleaved_to_neox": ``fusionpasses/ops/_rope.py``.
    negative_slots: "skip", "wrap" or "error": what a slot below 0 means. q and k are rotated whatever it is.
    pe_cache: the second of two caches ``[..., L]`` and ``[..., R]``, or None.
    positions: int32 or int64 ``[T]``, rows of cos and sin as ``cos[positions]``: a negative one counts from the end.
    cache_scale, scaling: for float8 caches. The k that is written is the k that is returned, so it is rounded to the
        model's dtype before it is scaled.

Returns:
    q ``[T, H, R]``, or ``[T, H, N + R]`` when absorbed, and k in the shape of k_pe; in the dtype of q_pe, contiguous.
    Every provider gives the same bytes, except where a slot occurs twice. The product of absorbed_bmm is torch.bmm's,
    with what that depends on: the device, its library, ``torch.backends``.

Raises:
    UnsupportedInput: an argument outside the above, or an input that requires grad in grad mode; on a CPU also a slot
        or a position out of range. Nothing was written. On a GPU the latter are device asserts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _indices, _kv_cache, _rope
from fusionpasses.ops._op import Sample, declare

_ARGUMENTS = (
    "Tensor q_pe, Tensor k_pe, Tensor kv_c, Tensor(a!) kv_cache, Tensor cos, Tensor sin, Tensor slots, *, "
    "str style, str negative_slots, Tensor(b!)? pe_cache=None, Tensor? positions=None, Tensor? cache_scale=None, "
    'str scaling="divide", str provider="auto")'
)


def check(
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    kv_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    *,
    style: str,
    negative_slots: str,
    pe_cache: Tensor | None = None,
    positions: Tensor | None = None,
    cache_scale: Tensor | None = None,
    scaling: str = "divide",
) -> None:
    _rope.check_style(style)
    _kv_cache.check_negative_slots(negative_slots)
    _kv_cache.check(kv_c, k_pe, kv_cache, slots, pe_cache, cache_scale, scaling)
    tokens, width = k_pe.shape[0], k_pe.shape[-1]
    if q_pe.dim() != 3 or q_pe.shape[0] != tokens or q_pe.shape[2] != width or q_pe.dtype != k_pe.dtype:
        raise UnsupportedInput(
            f"q_pe: got {q_pe.dtype} {tuple(q_pe.shape)}, allowed {k_pe.dtype} [{tokens}, heads, {width}], the tokens, "
            f"width and dtype of k_pe {tuple(k_pe.shape)}; flatten batch and sequence, put heads second"
        )
    _indices.check_device("q_pe", q_pe, k_pe.device)
    _rope.check_tables(q_pe, cos, sin, positions)


def check_absorbed(q_nope: Tensor, q_pe: Tensor, *args: Any, **kwargs: Any) -> None:
    check(q_pe, *args, **kwargs)
    if q_nope.dim() != 3 or q_nope.shape[:2] != q_pe.shape[:2] or q_nope.dtype != q_pe.dtype:
        raise UnsupportedInput(
            f"q_nope: got {q_nope.dtype} {tuple(q_nope.shape)}, allowed {q_pe.dtype} [{q_pe.shape[0]}, "
            f"{q_pe.shape[1]}, N], the tokens, heads and dtype of q_pe; transpose it if heads are first"
        )
    _indices.check_device("q_nope", q_nope, q_pe.device)


def check_absorbed_bmm(q_nope: Tensor, w_uk: Tensor, q_pe: Tensor, *args: Any, **kwargs: Any) -> None:
    check(q_pe, *args, **kwargs)
    tokens, heads = q_pe.shape[:2]
    if q_nope.dim() != 3 or q_nope.shape[:2] != (heads, tokens) or q_nope.dtype != q_pe.dtype:
        raise UnsupportedInput(
            f"q_nope: got {q_nope.dtype} {tuple(q_nope.shape)}, allowed {q_pe.dtype} [{heads}, {tokens}, P], the "
            "heads, tokens and dtype of q_pe; transpose it if tokens are first"
        )
    if w_uk.dim() != 3 or w_uk.shape[:2] != (heads, q_nope.shape[2]) or w_uk.dtype != q_pe.dtype:
        raise UnsupportedInput(
            f"w_uk: got {w_uk.dtype} {tuple(w_uk.shape)}, allowed {q_pe.dtype} [{heads}, {q_nope.shape[2]}, N], what "
            f"q_nope {tuple(q_nope.shape)} is multiplied with for each head"
        )
    for name, tensor in (("q_nope", q_nope), ("w_uk", w_uk)):
        _indices.check_device(name, tensor, q_pe.device)


def reference_with_k(
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    kv_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    *,
    style: str,
    negative_slots: str,
    pe_cache: Tensor | None = None,
    positions: Tensor | None = None,
    cache_scale: Tensor | None = None,
    scaling: str = "divide",
) -> tuple[Tensor, Tensor]:
    cos, sin = _rope.gather(cos, sin, positions)
    q, k = _rope.rotate(q_pe, cos, sin, style), _rope.rotate(k_pe, cos, sin, style)
    _kv_cache.write(kv_c, k, kv_cache, slots, negative_slots, pe_cache, cache_scale, scaling)
    return q, k


def reference(*args: Any, **kwargs: Any) -> Tensor:
    return reference_with_k(*args, **kwargs)[0]


def reference_absorbed_with_k(q_nope: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    q, k = reference_with_k(*args, **kwargs)
    return torch.cat((q_nope, q), -1).contiguous(), k


def reference_absorbed(*args: Any, **kwargs: Any) -> Tensor:
    return reference_absorbed_with_k(*args, **kwargs)[0]


def reference_absorbed_bmm_with_k(q_nope: Tensor, w_uk: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    product = q_nope.new_empty((*q_nope.shape[:2], w_uk.shape[2]))
    torch.bmm(q_nope, w_uk, out=product)  # autocast leaves it alone
    return reference_absorbed_with_k(product.transpose(0, 1), *args, **kwargs)


def reference_absorbed_bmm(*args: Any, **kwargs: Any) -> Tensor:
    return reference_absorbed_bmm_with_k(*args, **kwargs)[0]


def fake(q_pe: Tensor, *args: object, **kwargs: object) -> Tensor:
    return q_pe.new_empty(q_pe.shape)


def fake_with_k(q_pe: Tensor, k_pe: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    return q_pe.new_empty(q_pe.shape), k_pe.new_empty(k_pe.shape)


def fake_absorbed(q_nope: Tensor, q_pe: Tensor, *args: object, **kwargs: object) -> Tensor:
    return q_pe.new_empty((*q_pe.shape[:2], q_nope.shape[2] + q_pe.shape[2]))


def fake_absorbed_with_k(
    q_nope: Tensor, q_pe: Tensor, k_pe: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return fake_absorbed(q_nope, q_pe), k_pe.new_empty(k_pe.shape)


def fake_absorbed_bmm(q_nope: Tensor, w_uk: Tensor, q_pe: Tensor, *args: object, **kwargs: object) -> Tensor:
    return fake_absorbed(w_uk, q_pe)


def fake_absorbed_bmm_with_k(
    q_nope: Tensor, w_uk: Tensor, q_pe: Tensor, k_pe: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    return fake_absorbed(w_uk, q_pe), k_pe.new_empty(k_pe.shape)


def samples(device: torch.device) -> Iterator[Sample]:
    heads, latent, rope = 3, 16, 8

    def tokens(dtype: torch.dtype, count: int = 5) -> tuple[Tensor, Tensor, Tensor]:
        # Views of what the projections give, as in a model.
        q = torch.randn(count, heads, 12 + rope, device=device, dtype=dtype)
        joint = torch.randn(count, latent + rope, device=device, dtype=dtype)
        return q[..., 12:], joint[:, latent:], joint[:, :latent]

    def angles(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = torch.rand(rows, width, device=device) * 6
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def cache(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    slots = torch.tensor([7, -1, 0, 10, 3], device=device)
    positions = torch.tensor([4, 0, 8, 8, 2], device=device)
    bf16, fp16, fp32, fp8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
    scale = {"cache_scale": torch.tensor([0.75], device=device)}

    yield (
        (*tokens(bf16), cache(12, 24, dtype=bf16), *angles(5, 4, bf16), slots),
        {"style": "neox", "negative_slots": "skip"},
    )
    q_pe, k_pe, kv_c = tokens(fp16)
    yield (
        (q_pe, k_pe.unsqueeze(1), kv_c, cache(3, 4, 24, dtype=fp16), *angles(9, 8, fp32), slots.int()),
        {"style": "interleaved", "negative_slots": "wrap", "positions": positions.int()},
    )
    yield (
        (*tokens(fp32), cache(3, 2, 4, 24, dtype=fp32)[:, 1], *angles(5, 8, fp32), slots.abs()),
        {"style": "interleaved_to_neox", "negative_slots": "error"},
    )
    yield (
        (*tokens(bf16), cache(3, 4, 16, dtype=bf16), *angles(9, 4, fp32), slots),
        {
            "style": "interleaved",
            "negative_slots": "skip",
            "positions": positions,
            "pe_cache": cache(2, 3, 4, 8, dtype=bf16)[1],
        },
    )
    yield (
        # float8 as bytes, because opcheck cannot compare float8.
        (*tokens(bf16), cache(12, 24, dtype=fp8).view(torch.uint8), *angles(5, 4, bf16), slots),
        {"style": "neox", "negative_slots": "skip", "scaling": "reciprocal", **scale},
    )
    yield (
        (*tokens(bf16), cache(3, 4, 24, dtype=fp8).view(torch.uint8), *angles(5, 4, fp32), slots),
        {"style": "interleaved_to_neox", "negative_slots": "wrap", **scale},
    )
    yield (
        (*tokens(bf16, 0), cache(12, 24, dtype=bf16), *angles(0, 4, bf16), slots[:0]),
        {"style": "neox", "negative_slots": "skip"},
    )


def samples_absorbed(device: torch.device) -> Iterator[Sample]:
    for (q_pe, *rest), kwargs in samples(device):
        # As the absorbing bmm gives it: heads first in memory.
        q_nope = torch.randn(q_pe.shape[1], q_pe.shape[0], 16, device=device, dtype=q_pe.dtype).transpose(0, 1)
        yield (q_nope, q_pe, *rest), kwargs


def samples_absorbed_bmm(device: torch.device) -> Iterator[Sample]:
    for (q_pe, *rest), kwargs in samples(device):
        tokens, heads, rope = q_pe.shape
        # Views of what the projections give, as in a model. Small numbers, whose products are exact in any order.
        q = torch.randint(-3, 3, (tokens, heads, 12 + rope), device=device).to(q_pe.dtype) + 0.5
        w_uk = torch.randint(-3, 3, (heads, 12 + 16, 16), device=device).to(q_pe.dtype)[:, :12] + 0.5
        yield (q[..., :12].transpose(0, 1), w_uk, q_pe, *rest), kwargs


OP = declare(
    "fused_rope_mla_kv_cache.default",
    f"({_ARGUMENTS} -> Tensor",
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
OP_WITH_K = declare(
    "fused_rope_mla_kv_cache.with_k",
    f"({_ARGUMENTS} -> (Tensor q, Tensor k)",
    check=check,
    reference=reference_with_k,
    fake=fake_with_k,
    samples=samples,
)
OP_ABSORBED = declare(
    "fused_rope_mla_kv_cache.absorbed",
    f"(Tensor q_nope, {_ARGUMENTS} -> Tensor",
    check=check_absorbed,
    reference=reference_absorbed,
    fake=fake_absorbed,
    samples=samples_absorbed,
)
OP_ABSORBED_WITH_K = declare(
    "fused_rope_mla_kv_cache.absorbed_with_k",
    f"(Tensor q_nope, {_ARGUMENTS} -> (Tensor q, Tensor k)",
    check=check_absorbed,
    reference=reference_absorbed_with_k,
    fake=fake_absorbed_with_k,
    samples=samples_absorbed,
)
OP_ABSORBED_BMM = declare(
    "fused_rope_mla_kv_cache.absorbed_bmm",
    f"(Tensor q_nope, Tensor w_uk, {_ARGUMENTS} -> Tensor",
    check=check_absorbed_bmm,
    reference=reference_absorbed_bmm,
    fake=fake_absorbed_bmm,
    samples=samples_absorbed_bmm,
)
OP_ABSORBED_BMM_WITH_K = declare(
    "fused_rope_mla_kv_cache.absorbed_bmm_with_k",
    f"(Tensor q_nope, Tensor w_uk, {_ARGUMENTS} -> (Tensor q, Tensor k)",
    check=check_absorbed_bmm,
    reference=reference_absorbed_bmm_with_k,
    fake=fake_absorbed_bmm_with_k,
    samples=samples_absorbed_bmm,
)
