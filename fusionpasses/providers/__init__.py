"""Who runs an op: the providers, in order of preference, and the one function that chooses.

The choice depends on the device type and the probes only, so it can be made at compile time; compiled graphs carry
it as the ``provider`` argument of the op. Eager calls (``provider="auto"``) use the same function.

"aiter", "aiter_finite" and "aiter_fast" name a rule rather than a kernel: AITER runs the calls that it is proved to run
exactly, or as nearly as was asked for, and Triton the others. It asks for sizes and strides: where they are numbers
when compiling, ``who_runs.settle`` asks then, and writes the answer into the graph; where they are symbols, the rule
stays there, and each call is asked.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from fusionpasses import _aiter_numerics, probes
from fusionpasses._aiter_numerics import FUNCTIONS, LEVELS, Level
from fusionpasses.config import PROVIDER_CHOICES
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.probes import Verdict, probe_aiter, probe_aiter_kernel, probe_hip_architecture, probe_triton
from fusionpasses.providers import _aiter_import

log = logging.getLogger(__name__)

#: Every provider that may be chosen, most preferred first.
PREFERENCE = ("aiter", "triton", "reference")

#: Only where one is asked for by name, because the user promises something (``_aiter_numerics.PROMISE``), or does
#: without roundings.
BY_NAME = ("aiter_finite", "aiter_fast")

#: Ops (``packet.overload``) that a provider other than the reference implements, known without importing it.
_IMPLEMENTS: dict[str, frozenset[str]] = {
    "triton": frozenset(
        {
            "dynamic_mxfp4_quant.default",
            "dynamic_mxfp4_quant.then_gemm",
            "dynamic_mxfp4_quant.then_mlp",
            "rmsnorm_mxfp4_quant.default",
            "rmsnorm_mxfp4_quant.with_norm",
            "rmsnorm_mxfp4_quant.with_second",
            "rmsnorm_mxfp4_quant.then_gemm",
            "rmsnorm_mxfp4_quant.then_mlp",
            "rmsnorm_mxfp4_quant.with_second_then_gemm",
            "rmsnorm_add_mxfp4_quant.default",
            "rmsnorm_add_mxfp4_quant.with_norm",
            "rmsnorm_add_mxfp4_quant.then_gemm",
            "rmsnorm_add_mxfp4_quant.then_mlp",
            "silu_mul_mxfp4_quant.default",
            "silu_mul_mxfp4_quant.with_act",
            "silu_mul_mxfp4_quant.then_gemm",
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
        return _aiter(op, device_type, LEVELS[provider])
    if op not in _IMPLEMENTS[provider]:
        return Verdict(False, f"{provider} has no kernel for {op}")
    if device_type != "cuda":
        return Verdict(False, f"{provider} serves GPU tensors (device type 'cuda'), not {device_type!r}")
    return probe_triton()


def _aiter(op: str, device_type: str, level: Level) -> Verdict:
    served = _aiter_numerics.serves(op, level=level)
    if not served:
        return served
    if device_type != "cuda":
        return Verdict(False, f"aiter serves GPU tensors (device type 'cuda'), not {device_type!r}")
    there = probe_aiter_kernel(FUNCTIONS[op][0])
    # The calls that AITER must not run are Triton's, and its own kernels are written in Triton.
    return there and probe_triton() and Verdict(True, f"{there.why}; {served.why}")


@functools.cache
def _imports(provider: str, op: str) -> Verdict:
    """Does what a provider needs for an op import? Asked once it is to be used."""
    if is_rule(provider):
        try:
            _, release = _aiter_import.load(FUNCTIONS[op][0])
        except ProviderUnavailable as error:
            # Found, and chosen before others for that: who runs the op instead must not be a surprise.
            log.warning("%s cannot run %s: %s", provider, op, error)
            return Verdict(False, str(error))
        return _aiter_numerics.serves(op, release, level=LEVELS[provider])
    return Verdict(True, "imported with the package")


def usable(provider: str, op: str, device_type: str) -> Verdict:
    """The verdict, and where it is yes what the import says: what is found is loaded."""
    answer = verdict(provider, op, device_type)
    loaded = _imports(provider, op) if answer else answer
    return answer if loaded else loaded


def require(requested: str) -> None:
    """Nothing, if a provider that was named can run an op on a GPU of this machine; AITER is imported for that.

    Raises:
        ProviderUnavailable: it can run none, so that whatever is compiled would not have it.
    """
    if requested == "auto" or requested not in (*PREFERENCE, *BY_NAME):
        return
    answers = {}
    for op in sorted(_IMPLEMENTS["triton"]):
        answers[op] = usable(requested, op, "cuda")
        if answers[op]:
            return
    if is_rule(requested):  # why an op is none that AITER runs anywhere says nothing about this machine
        answers = {op: why for op, why in answers.items() if _aiter_numerics.serves(op, level=LEVELS[requested])}
    reasons = dict.fromkeys(_all_of_it(requested, op, answer.why) for op, answer in answers.items())
    raise ProviderUnavailable(
        f"provider {requested!r} was asked for and can run no op here: {'; '.join(reasons)}; use provider='auto'"
    )


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
        if op in FUNCTIONS:
            here.append(probe_aiter_kernel(FUNCTIONS[op][0]))
        reasons += [each.why for each in here if not each]
    kept = [each for i, each in enumerate(reasons) if not any(each in earlier for earlier in reasons[:i])]
    return "; ".join(kept)


@functools.cache
def implementation(provider: str, op: str) -> Callable[..., object]:
    """The adapter function of a provider for an op; imports the provider's module."""
    if is_rule(provider):
        from fusionpasses.providers import aiter

        return aiter.ADAPTERS[provider][op]
    adapters: dict[str, Callable[..., object]]
    adapters = importlib.import_module(f"fusionpasses.providers.{provider}").ADAPTERS
    return adapters[op]


def is_rule(provider: str) -> bool:
    """Does the name mean that each call is asked for, rather than a kernel?"""
    return provider in LEVELS


def rule(op: str, provider: str) -> str:
    """What decides who runs a call that the graph gives to AITER under this name, in words."""
    from fusionpasses.providers import _aiter_rules

    return _aiter_rules.rule_in_words(op, LEVELS[provider])


def ruled_out(op: str, device_type: str, arguments: Callable[[], dict[str, Any] | None]) -> str:
    """Why AITER, which is here and has something for an op, is not given a call by default; "" where it is.

    ``arguments()`` without symbols, or None where they are not known: then of the op as a whole. Asked where AITER is
    here alone. Imports no AITER.
    """
    if op not in FUNCTIONS or device_type != "cuda" or not probe_aiter_kernel(FUNCTIONS[op][0]):
        return ""
    served = _aiter_numerics.serves(op)
    if served:
        return ""
    known = arguments()
    if known is None:
        return served.why
    from fusionpasses.providers import _aiter_rules, aiter

    return _aiter_rules.choose(
        op, known, aiter.target(known), level=Level.EXACT, look=lambda function: (None, "")
    ).verdict.why


def foreseen(provider: str, op: str, arguments: dict[str, Any]) -> Verdict:
    """What that rule comes to for arguments without symbols: yes, or why the call will be Triton's."""
    from fusionpasses.providers import aiter

    return aiter.judge(op, arguments, LEVELS[provider])


def decided(device_type: str) -> dict[str, str]:
    """Who runs every op on a device type by default: part of the cache identity. Imports AITER where it is here.

    What one process found out by importing AITER is not so in another in which that fails.
    """
    return {op: select(op, device_type) for op in sorted(_IMPLEMENTS["triton"])}


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


for _cached in (_imports, select):
    probes.forget_with(_cached.cache_clear)
