"""What AITER computes, on the five things that decide bytes, and which of our ops it can run at all: ``serves``.

``NUMERICS`` has that for each function of AITER and each generation of its releases; ``standings`` is what doctor and
the report say of it. Which calls of an op may go there is a question of their arguments: ``providers/_aiter_rules.py``.
Nothing here imports AITER.

The facts are from AITER's source (ROCm/aiter e404860, 2026-08-22, "new"; amd-aiter 0.1.7, "old") and from runs of its
kernels in Triton's interpreter and on an H200. Nothing was run on an AMD GPU yet; ``pytest -m rocm`` is the check that
does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fusionpasses._verdict import Verdict

#: How AITER's answer to one question of numerics stands to our contract.
SAME = "the same"
FINITE = "the same for finite inputs"  # the user may know what the metadata does not say: provider "aiter_finite"
BY_ARGUMENTS = "the same for some arguments"  # RULES say which
DIFFERS = "different"

#: What a user promises by asking for the provider "aiter_finite".
PROMISE = "nothing quantised, and no scale, is Inf, NaN or as large as 1.75 * 2**127"
_FINITE_SWITCH = f"provider='aiter_finite' admits it, if {PROMISE}"
_NOTHING_TO_SWITCH = "no setting admits it"
_NO_SWITCH = "no setting admits it, since ordinary inputs give other bytes"


class Fact(NamedTuple):
    """What AITER does, in words, and how that stands to our contract."""

    theirs: str
    agrees: str


_NOTHING_SCALED = Fact("no cache is written", SAME)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Where a function of AITER stands on the five things that decide bytes."""

    scale_rule: Fact
    ties: Fact
    non_finite: Fact
    rounding: Fact
    cache_scaling: Fact = _NOTHING_SCALED

    def against(self) -> list[str]:
        """What differs from our contract, as ``dimension: what AITER does``."""
        return self._which(DIFFERS)

    def against_unless_finite(self) -> list[str]:
        return self._which(FINITE)

    def by_call(self) -> list[str]:
        return self._which(BY_ARGUMENTS)

    def _which(self, agrees: str) -> list[str]:
        facts = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return [f"{name.replace('_', ' ')}: {fact.theirs}" for name, fact in facts if fact.agrees == agrees]


_EVEN = Fact("even", SAME)
_NOT_QUANTISED = Fact("nothing is quantised", SAME)
_QUANT_NON_FINITE = Fact(
    "AITER gives Inf and magnitudes from 1.75 * 2**127 scale 254 and loses a NaN; ours are 255 with codes 0, and 253",
    FINITE,
)


def _quantising(rounding: Fact) -> dict[str, Numerics]:
    old_ties = Fact("away from zero, and wrong below 1 (aiter#974); ours go to even", DIFFERS)
    return {
        "new": Numerics(_EVEN, Fact("to even", SAME), _QUANT_NON_FINITE, rounding),
        "old": Numerics(_EVEN, old_ties, _QUANT_NON_FINITE, rounding),
    }


_ROPE = Numerics(
    _NOT_QUANTISED,
    _NOT_QUANTISED,
    Fact("copied", SAME),
    Fact(
        "bfloat16 angles: each product and the sum are rounded, as ours; float32 or float16: a product may be "
        "contracted into an FMA, and float32 angles leave k unrounded before it is scaled",
        BY_ARGUMENTS,
    ),
    Fact("row * (1 / scale) without saturation; ours saturates at 448", BY_ARGUMENTS),
)

#: By function of AITER and generation of its releases.
NUMERICS: dict[str, dict[str, Numerics]] = {
    "dynamic_mxfp4_quant": _quantising(Fact("none but that of the codes", SAME)),
    "fused_rms_mxfp4_quant": _quantising(
        Fact(
            "float32 from the residual sum to the codes; the norm is that of the sum before it is rounded", BY_ARGUMENTS
        )
    ),
    "act_mul_and_mxfp4_quant": _quantising(Fact("float32 from gate and up to the codes", BY_ARGUMENTS)),
    "fused_qk_rope_cat_and_cache_mla": {"new": _ROPE, "old": _ROPE},
    "fused_qk_rope_concat_and_cache_mla": {
        "new": Numerics(
            _NOT_QUANTISED,
            _NOT_QUANTISED,
            Fact("copied", SAME),
            # Our contract rounds each product where the angles have the dtype of q, and these must.
            Fact(
                "float32 with angles of the dtype of q, which ours round at each step; FMAs are not excluded", DIFFERS
            ),
            Fact("row * (1 / scale) without saturation, of k that was not rounded before", DIFFERS),
        )
    },
    "gemm_afp4wfp4": dict.fromkeys(
        ("new", "old"),
        Numerics(
            _NOT_QUANTISED,
            _NOT_QUANTISED,
            Fact("what matrix cores make of scales 255 (NaN) and 0 was not verified", FINITE),
            # Our contract is a bound on the error of a float32 sum in any order.
            Fact("sums in float32, of parts of K, too", SAME),
        ),
    ),
}
# The same sums. The first of old releases was never read.
NUMERICS["gemm_afp4wfp4_preshuffle"] = {"new": NUMERICS["gemm_afp4wfp4"]["new"]}
NUMERICS["gemm_afp4wfp4_preshuffled_scales"] = NUMERICS["gemm_afp4wfp4"]

#: The function of AITER that runs an op of ours (``packet.overload``).
CAPABILITY = {
    "dynamic_mxfp4_quant.default": "dynamic_mxfp4_quant",
    "rmsnorm_mxfp4_quant.default": "fused_rms_mxfp4_quant",
    "rmsnorm_mxfp4_quant.with_norm": "fused_rms_mxfp4_quant",
    "rmsnorm_add_mxfp4_quant.default": "fused_rms_mxfp4_quant",
    "rmsnorm_add_mxfp4_quant.with_norm": "fused_rms_mxfp4_quant",
    "silu_mul_mxfp4_quant.default": "act_mul_and_mxfp4_quant",
    "fused_rope_mla_kv_cache.absorbed": "fused_qk_rope_cat_and_cache_mla",
    "concat_and_cache_mla.default": "fused_qk_rope_cat_and_cache_mla",
    "mxfp4_gemm.default": "gemm_afp4wfp4",
}

#: The function that runs it instead where its argument ``layout`` is this.
BY_LAYOUT = {"mxfp4_gemm.default": {"shuffled": "gemm_afp4wfp4_preshuffle"}}


def function_for(op: str, arguments: Mapping[str, Any]) -> str:
    """The function of AITER that a call of ``op`` (one of CAPABILITY) with these arguments is for."""
    return BY_LAYOUT.get(op, {}).get(str(arguments.get("layout")), CAPABILITY[op])


_NEEDS_ROTATED_K = "AITER leaves k of a token whose slot is negative unwritten; ours is rotated whatever the slot"
_QUERY_ALONE = "AITER writes the query as [q_nope | rope(q_pe)], never rope(q_pe) alone"
_BMM = "AITER would copy what the bmm gives into the query; the Triton provider's bmm writes it there"

#: Ops that AITER has something like, and never run by it, with the reason.
NEVER = {
    "silu_mul_mxfp4_quant.with_act": "AITER's act_mul_and_mxfp4_quant does not return the product",
    "fused_rope_mla_kv_cache.default": _QUERY_ALONE,
    "fused_rope_mla_kv_cache.with_k": f"{_QUERY_ALONE}; and {_NEEDS_ROTATED_K}",
    "fused_rope_mla_kv_cache.absorbed_with_k": _NEEDS_ROTATED_K,
    "fused_rope_mla_kv_cache.absorbed_bmm": _BMM,
    "fused_rope_mla_kv_cache.absorbed_bmm_with_k": f"{_BMM}; and {_NEEDS_ROTATED_K}",
    "mxfp4_gemm_a16w4.default": "AITER's gemm_a16wfp4 quantises the activations; ours multiplies them as they are",
}


#: Functions of AITER that come near an op, and that no adapter calls, with the reason beside NUMERICS.
UNUSED: dict[str, dict[str, str]] = {
    "fused_rope_mla_kv_cache.absorbed": {"fused_qk_rope_concat_and_cache_mla": ""},
    "concat_and_cache_mla.default": {"fused_qk_rope_concat_and_cache_mla": "it writes no cache without a query"},
    "mxfp4_gemm.default": {
        "gemm_afp4wfp4_preshuffled_scales": "it takes shuffled scales with codes that are not, which no layout is",
    },
}


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a function of AITER's stands to an op of ours.

    Attributes:
        op: ``packet.overload``.
        function: AITER's; empty where it has nothing like the op.
        release: "new", "old", or "any" where they stand alike.
        ruled_out: what keeps it from calls under "auto" and "aiter", as ``dimension: what AITER does``; empty if exact.
        by_call: what rules out some calls, by their arguments; likewise.
        switch: the setting that admits it, or that there is none.
    """

    op: str
    function: str
    release: str
    ruled_out: tuple[str, ...]
    by_call: tuple[str, ...]
    switch: str

    def __str__(self) -> str:
        if not self.ruled_out:
            return f"{self.function} is exact, for the calls that its rules accept"
        why = f"{'; '.join(self.ruled_out)}; {self.switch}"
        if not self.function:
            return why
        return f"{self.function} is {'exact for finite inputs only' if self.promise_helps else 'not exact'}: {why}"

    @property
    def promise_helps(self) -> bool:
        return self.switch == _FINITE_SWITCH


def standings(op: str, release: str | None = None) -> list[Standing]:
    """Each function of AITER's that comes near an op, and how it stands to it. No AITER is needed.

    ``release`` is "new", "old" or None for both.
    """
    if op in NEVER:
        return [Standing(op, "", "any", (NEVER[op],), (), _NOTHING_TO_SWITCH)]
    if op not in CAPABILITY:
        return [Standing(op, "", "any", (f"AITER has nothing for {op}",), (), _NOTHING_TO_SWITCH)]
    found = []
    used = dict.fromkeys((CAPABILITY[op], *BY_LAYOUT.get(op, {}).values()), "")
    for function, reason in {**used, **UNUSED.get(op, {})}.items():
        of_function = {
            generation: _standing(op, function, numerics, reason)
            for generation, numerics in NUMERICS[function].items()
            if release in (None, generation)
        }
        alike = (
            len(NUMERICS[function]) == len(of_function) > 1 and len({str(each) for each in of_function.values()}) == 1
        )
        for generation, each in list(of_function.items())[: 1 if alike else None]:
            found.append(dataclasses.replace(each, release="any" if alike else generation))
    return found


def _standing(op: str, function: str, numerics: Numerics, reason: str) -> Standing:
    differs, unless_finite = numerics.against(), numerics.against_unless_finite()
    ruled_out = (*([reason] if reason else []), *differs, *unless_finite)
    if reason or differs:
        switch = _NO_SWITCH if differs else _NOTHING_TO_SWITCH
    else:
        switch = _FINITE_SWITCH if ruled_out else "provider='auto' and 'aiter' admit it"
    return Standing(op, function, "", ruled_out, tuple(numerics.by_call()), switch)


def serves(op: str, release: str | None = None, *, finite: bool = False, function: str | None = None) -> Verdict:
    """Can AITER run any call of ``op`` exactly? ``release`` is "new", "old" or None for any; no AITER is needed.

    ``finite``: the user has given the PROMISE. ``function``: by this one (``function_for``), not that of most calls.
    """
    if op not in CAPABILITY:
        return Verdict(False, standings(op)[0].ruled_out[0])
    name = function or CAPABILITY[op]
    if release not in (None, *NUMERICS[name]):
        return Verdict(False, f"{name} of this release ({release!r}) was never read")
    verdicts = [_verdict(each, finite) for each in standings(op, release) if each.function == name]
    return next(filter(None, verdicts), verdicts[0])


def _verdict(standing: Standing, finite: bool) -> Verdict:
    if not standing.ruled_out:
        return Verdict(True, str(standing))
    if finite and standing.promise_helps:
        return Verdict(True, f"{standing.function} is exact, given that {PROMISE}")
    return Verdict(False, str(standing))
