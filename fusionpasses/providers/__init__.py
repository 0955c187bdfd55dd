"""Who runs an op: the providers, in order of preference, and the one function that chooses.

The choice depends on the device type and the probes only, so it can be made at compile time; compiled graphs carry
it as the ``provider`` argument of the op. Eager calls (``provider="auto"``) use the same function.

"aiter" and "aiter_finite" name a rule rather than a kernel: AITER runs the calls that it is proved to run exactly, and
Triton the others. It asks for sizes and strides: where they are numbers when compiling, ``who_runs.settle`` asks then,
and writes the answer into the graph; where they are symbols, the rule stays there, and each call is asked.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from fusionpasses import _aiter_numerics
from fusionpasses.config import PROVIDER_CHOICES
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.probes import Verdict, probe_aiter, probe_aiter_kernel, probe_hip_architecture, probe_triton
from fusionpasses.providers import _aiter_import

log = logging.getLogger(__name__)

#: Every provider that may be chosen, most preferred first.
PREFERENCE = ("aiter", "triton", "reference")

#: Only where it is asked for by name, because the user promises something: ``_aiter_numerics.PROMISE``.
BY_NAME = ("aiter_finite",)

#: Module, and its table of adapters.
_ADAPTERS = {
    "triton": ("triton", "ADAPTERS"),
    "aiter": ("aiter", "ADAPTERS"),
    "aiter_finite": ("aiter", "FINITE_ADAPTERS"),
}

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
    """Can ``provider`` run ``op`` (``packet.overload``) on this type of device, and why not? Imports nothing."""
    if provider == "reference":
        return Verdict(True, "plain torch, any device")
    if is_rule(provider):
        return _aiter(op, device_type, finite=provider == "aiter_finite")
    if op not in _IMPLEMENTS[provider]:
        return Verdict(False, f"{provider} has no kernel for {op}")
    if device_type != "cuda":
        return Verdict(False, f"{provider} serves GPU tensors (device type 'cuda'), not {device_type!r}")
    return probe_triton()


def _aiter(op: str, device_type: str, *, finite: bool) -> Verdict:
    exact = _aiter_numerics.serves(op, finite=finite)
    if not exact:
        return exact
    if device_type != "cuda":
        return Verdict(False, f"aiter serves GPU tensors (device type 'cuda'), not {device_type!r}")
    there = probe_aiter_kernel(_aiter_numerics.CAPABILITY[op])
    # The calls that AITER must not run are Triton's, and its own kernels are written in Triton.
    return there and probe_triton() and Verdict(True, f"{there.why}; {exact.why}")


@functools.cache
def _imports(provider: str, op: str) -> Verdict:
    """Does what a provider needs for an op import? Asked once it is to be used."""
    if is_rule(provider):
        try:
            _, release = _aiter_import.load(_aiter_numerics.CAPABILITY[op])
        except ProviderUnavailable as error:
            # Found, and chosen before others for that: who runs the op instead must not be a surprise.
            log.warning("%s cannot run %s: %s", provider, op, error)
            return Verdict(False, str(error))
        return _aiter_numerics.serves(op, release, finite=provider == "aiter_finite")
    return Verdict(True, "imported with the package")


def usable(provider: str, op: str, device_type: str) -> Verdict:
    """The verdict, and where it is yes what the import says: what is found is loaded."""
    answer = verdict(provider, op, device_type)
    loaded = _imports(provider, op) if answer else answer
    return answer if loaded else loaded


@functools.cache
def select(op: str, device_type: str, requested: str = "auto") -> str:
    """Name of the provider that runs ``op`` on this device type.

    Raises:
        ProviderUnavailable: ``requested`` is unknown, or cannot serve.
    """
    if requested == "auto":
        return next(name for name in PREFERENCE if usable(name, op, device_type))
    if requested not in (*PREFERENCE, *BY_NAME):
        raise ProviderUnavailable(
            f"provider: got {requested!r}, allowed {', '.join(map(repr, PROVIDER_CHOICES))}; "
            "use 'auto' to let the probes decide"
        )
    answer = usable(requested, op, device_type)
    if not answer:
        raise ProviderUnavailable(
            f"provider {requested!r} was asked for {op} and cannot serve: {_all_of_it(requested, op, answer.why)}; "
            "use provider='auto' "
            f"(it would take {select(op, device_type)!r}) or move the tensors"
        )
    return requested


def _all_of_it(provider: str, op: str, why: str) -> str:
    """The first reason why a provider cannot serve, and what else is missing of AITER, so that nobody asks in vain."""
    reasons = [why]
    if is_rule(provider):
        here = [probe_hip_architecture(), probe_aiter()]
        if op in _aiter_numerics.CAPABILITY:
            here.append(probe_aiter_kernel(_aiter_numerics.CAPABILITY[op]))
        reasons += [each.why for each in here if not each]
    kept = [each for i, each in enumerate(reasons) if not any(each in earlier for earlier in reasons[:i])]
    return "; ".join(kept)


@functools.cache
def implementation(provider: str, op: str) -> Callable[..., object]:
    """The adapter function of a provider for an op; imports the provider's module."""
    name, table = _ADAPTERS[provider]
    module = importlib.import_module(f"fusionpasses.providers.{name}")
    adapters: dict[str, Callable[..., object]] = getattr(module, table)
    return adapters[op]


def is_rule(provider: str) -> bool:
    """Does the name mean that each call is asked for, rather than a kernel?"""
    return provider in ("aiter", *BY_NAME)


def rule(op: str) -> str:
    """What decides who runs a call that the graph gives to AITER, in words."""
    from fusionpasses.providers import _aiter_rules

    return _aiter_rules.rule_in_words(op)


def ruled_out(op: str, device_type: str) -> str:
    """Why AITER, which is here and has something for an op, is not given it by default; "" where it is."""
    function = _aiter_numerics.CAPABILITY.get(op)
    if function is None or device_type != "cuda" or not probe_aiter_kernel(function):
        return ""
    exact = _aiter_numerics.serves(op)
    return "" if exact else exact.why


def foreseen(provider: str, op: str, arguments: dict[str, Any]) -> Verdict:
    """What that rule comes to for arguments without symbols: yes, or why the call will be Triton's."""
    from fusionpasses.providers import aiter

    return aiter.judge(op, arguments, finite=provider == "aiter_finite")


def summary(device_type: str) -> dict[str, dict[str, str]]:
    """Verdict of every provider for every op on a device type, as text: part of the cache identity."""
    ops = sorted(set().union(*_IMPLEMENTS.values()))
    return {
        op: {
            name: f"{bool(answer)}: {answer.why}"
            for name in (*PREFERENCE, *BY_NAME)
            for answer in [verdict(name, op, device_type)]
        }
        for op in ops
    }
