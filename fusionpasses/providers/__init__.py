"""Who runs an op: the providers, in order of preference, and the one function that chooses.

The choice depends on the device type and the probes only, so it can be made at compile time; compiled graphs carry
it as the ``provider`` argument of the op. Eager calls (``provider="auto"``) use the same function.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from fusionpasses.config import PROVIDER_CHOICES
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.probes import Verdict, probe_triton

#: Every provider, most preferred first.
PREFERENCE = ("triton", "reference")

#: Ops (``packet.overload``) that a provider other than the reference implements, known without importing it.
_IMPLEMENTS: dict[str, frozenset[str]] = {
    "triton": frozenset(
        {
            "dynamic_mxfp4_quant.default",
            "rmsnorm_mxfp4_quant.default",
            "rmsnorm_mxfp4_quant.with_norm",
            "rmsnorm_add_mxfp4_quant.default",
            "rmsnorm_add_mxfp4_quant.with_norm",
            "silu_mul_mxfp4_quant.default",
            "silu_mul_mxfp4_quant.with_act",
            "fused_rope_mla_kv_cache.default",
            "fused_rope_mla_kv_cache.with_k",
            "fused_rope_mla_kv_cache.absorbed",
            "fused_rope_mla_kv_cache.absorbed_with_k",
            "fused_rope_mla_kv_cache.absorbed_bmm",
            "fused_rope_mla_kv_cache.absorbed_bmm_with_k",
            "concat_and_cache_mla.default",
            "mxfp4_gemm.default",
            "mxfp4_gemm_a16w4.default",
        }
    ),
}


def verdict(provider: str, op: str, device_type: str) -> Verdict:
    """Can ``provider`` run ``op`` (``packet.overload``) on tensors of this device type, and why not."""
    if provider == "reference":
        return Verdict(True, "plain torch, any device")
    if op not in _IMPLEMENTS[provider]:
        return Verdict(False, f"{provider} has no kernel for {op}")
    if device_type != "cuda":
        return Verdict(False, f"{provider} serves GPU tensors (device type 'cuda'), not {device_type!r}")
    return probe_triton()


@functools.cache
def select(op: str, device_type: str, requested: str = "auto") -> str:
    """Name of the provider that runs ``op`` on this device type.

    Raises:
        ProviderUnavailable: ``requested`` is unknown, or cannot serve.
    """
    if requested == "auto":
        return next(name for name in PREFERENCE if verdict(name, op, device_type))
    if requested not in PREFERENCE:
        raise ProviderUnavailable(
            f"provider: got {requested!r}, allowed {', '.join(map(repr, PROVIDER_CHOICES))}; "
            "use 'auto' to let the probes decide"
        )
    answer = verdict(requested, op, device_type)
    if not answer:
        raise ProviderUnavailable(
            f"provider {requested!r} was asked for {op} and cannot serve: {answer.why}; use provider='auto' "
            f"(it would take {select(op, device_type)!r}) or move the tensors"
        )
    return requested


@functools.cache
def implementation(provider: str, op: str) -> Callable[..., object]:
    """The adapter function of a provider for an op; imports the provider's module."""
    module = importlib.import_module(f"fusionpasses.providers.{provider}")
    adapters: dict[str, Callable[..., object]] = module.ADAPTERS
    return adapters[op]


def summary(device_type: str) -> dict[str, dict[str, str]]:
    """Verdict of every provider for every op on a device type, as text: part of the cache identity."""
    ops = sorted(set().union(*_IMPLEMENTS.values()))
    return {
        op: {
            name: f"{bool(answer)}: {answer.why}" for name in PREFERENCE for answer in [verdict(name, op, device_type)]
        }
        for op in ops
    }
