"""What AITER computes, on the five things that decide bytes, and which of our ops it can run at all: ``serves``.

``NUMERICS`` has that for each function of AITER and each generation of its releases; ``standings`` is what doctor and
the report say of it. A user chooses by the provider's name how much of it may differ: ``LEVELS``. Which calls of an op
may go there is a question of their arguments: ``providers/_aiter_rules.py``. Nothing here imports AITER.

The facts are from AITER's source (ROCm/aiter e404860, 2026-08-22, "new"; amd-aiter 0.1.7, "old") and from runs of its
kernels in Triton's interpreter and on an H200. Nothing was run on an AMD GPU yet; ``pytest -m rocm`` is the check that
does.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import NamedTuple

from fusionpasses._verdict import Verdict


class Level(enum.IntEnum):
    """How far AITER may be from our contract; each admits what those before it do."""

    EXACT = 0  # the same bytes, whatever the inputs
    FINITE = 1  # the same bytes, given the PROMISE
    FAST = 2  # float32 is kept where our contract rounds: other bytes for ordinary inputs


#: The names of the provider. "auto" takes the first.
LEVELS = {"aiter": Level.EXACT, "aiter_finite": Level.FINITE, "aiter_fast": Level.FAST}

#: What a user promises by asking for the provider "aiter_finite", or "aiter_fast".
PROMISE = "nothing quantised, and no scale, is Inf, NaN or as large as 1.75 * 2**127"
_SWITCHES = {
    Level.EXACT: "provider='auto' and 'aiter' admit it",
    Level.FINITE: f"provider='aiter_finite' admits it, if {PROMISE}",
    Level.FAST: f"provider='aiter_fast' admits it, with other bytes for ordinary inputs, if {PROMISE}",
}
_NO_SWITCH = "no setting admits it"


def switch(level: Level | None) -> str:
    """The setting that admits what is of this level, in words; None: there is none."""
    return _NO_SWITCH if level is None else _SWITCHES[level]


#: How AITER's answer to one question of numerics stands to our contract.
SAME = "the same"
FINITE = "the same for finite inputs"
UNROUNDED = "float32 where ours rounds"
SOME_UNROUNDED = "float32 where ours rounds, in some calls"  # RULES say which
BY_ARGUMENTS = "the same for some arguments"  # RULES say which
DIFFERS = "different"

#: The least level that admits a difference; those that depend on the arguments are asked of each call.
_LEAST = {SAME: Level.EXACT, FINITE: Level.FINITE, UNROUNDED: Level.FAST, DIFFERS: None}
_OF_SOME_CALLS = {
    SOME_UNROUNDED: "(where ours rounds, provider='aiter_fast' admits it)",
    BY_ARGUMENTS: f"(else {_NO_SWITCH})",
}


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

    def facts(self) -> dict[str, Fact]:
        return {field.name.replace("_", " "): getattr(self, field.name) for field in dataclasses.fields(self)}

    def against(self) -> list[str]:
        """What differs from our contract in every call, as ``dimension: what AITER does``; the worst first."""
        order = (DIFFERS, UNROUNDED, FINITE)
        facts = self.facts().items()
        return [f"{name}: {fact.theirs}" for agrees in order for name, fact in facts if fact.agrees == agrees]

    def by_call(self) -> list[str]:
        """What differs in some calls, by their arguments, and, where a level admits others, what admits those."""
        some = {name: fact for name, fact in self.facts().items() if fact.agrees in _OF_SOME_CALLS}
        if self.least() is None:
            return [f"{name}: {fact.theirs}" for name, fact in some.items()]
        return [f"{name}: {fact.theirs} {_OF_SOME_CALLS[fact.agrees]}" for name, fact in some.items()]

    def least(self) -> Level | None:
        """The least level that admits any call; None if none does."""
        levels = [_LEAST[fact.agrees] for fact in self.facts().values() if fact.agrees in _LEAST]
        return None if None in levels else max(level for level in levels if level is not None)


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
        SOME_UNROUNDED,
    ),
    Fact("row * (1 / scale) without saturation; ours saturates at 448", BY_ARGUMENTS),
)

#: By function of AITER and generation of its releases.
NUMERICS: dict[str, dict[str, Numerics]] = {
    "dynamic_mxfp4_quant": _quantising(Fact("none but that of the codes", SAME)),
    "fused_rms_mxfp4_quant": _quantising(
        Fact(
            "float32 from the residual sum to the codes; the norm is that of the sum before it is rounded",
            SOME_UNROUNDED,
        )
    ),
    "act_mul_and_mxfp4_quant": _quantising(Fact("float32 from gate and up to the codes", SOME_UNROUNDED)),
    "fused_qk_rope_cat_and_cache_mla": {"new": _ROPE, "old": _ROPE},
    "fused_qk_rope_concat_and_cache_mla": {
        "new": Numerics(
            _NOT_QUANTISED,
            _NOT_QUANTISED,
            Fact("copied", SAME),
            # Our contract rounds each product where the angles have the dtype of q, and these must.
            Fact(
                "float32 with angles of the dtype of q, which ours round at each step; FMAs are not excluded", UNROUNDED
            ),
            Fact("row * (1 / scale) without saturation, of k that was not rounded before", BY_ARGUMENTS),
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
# The same sums. Those of old releases were never read.
for _name in ("gemm_afp4wfp4_preshuffle", "gemm_afp4wfp4_preshuffled_scales"):
    NUMERICS[_name] = {"new": NUMERICS["gemm_afp4wfp4"]["new"]}

#: The functions of AITER that run an op of ours (``packet.overload``), in the order in which a call tries them. Without
#: the first, AITER is not had for the op.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "dynamic_mxfp4_quant.default": ("dynamic_mxfp4_quant",),
    "rmsnorm_mxfp4_quant.default": ("fused_rms_mxfp4_quant",),
    "rmsnorm_mxfp4_quant.with_norm": ("fused_rms_mxfp4_quant",),
    "rmsnorm_mxfp4_quant.with_second": ("fused_rms_mxfp4_quant",),
    "rmsnorm_add_mxfp4_quant.default": ("fused_rms_mxfp4_quant",),
    "rmsnorm_add_mxfp4_quant.with_norm": ("fused_rms_mxfp4_quant",),
    "silu_mul_mxfp4_quant.default": ("act_mul_and_mxfp4_quant",),
    "fused_rope_mla_kv_cache.absorbed": ("fused_qk_rope_cat_and_cache_mla", "fused_qk_rope_concat_and_cache_mla"),
    "concat_and_cache_mla.default": ("fused_qk_rope_cat_and_cache_mla",),
    "mxfp4_gemm.default": ("gemm_afp4wfp4", "gemm_afp4wfp4_preshuffle", "gemm_afp4wfp4_preshuffled_scales"),
}

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


#: Functions of AITER that come near an op, and that no adapter calls for it, with the reason.
UNUSED: dict[str, dict[str, str]] = {
    "concat_and_cache_mla.default": {"fused_qk_rope_concat_and_cache_mla": "it writes no cache without a query"},
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
        level: the least that admits any call; None if none does.
    """

    op: str
    function: str
    release: str
    ruled_out: tuple[str, ...]
    by_call: tuple[str, ...]
    level: Level | None

    @property
    def switch(self) -> str:
        """The setting that admits it, or that there is none."""
        return switch(self.level)

    def __str__(self) -> str:
        if self.level is Level.EXACT:
            return f"{self.function} is exact, for the calls that its rules accept"
        why = "; ".join((*self.ruled_out, self.switch, *(f"in some calls, {each}" for each in self.by_call)))
        if not self.function:
            return why
        stands = {
            Level.FINITE: "exact for finite inputs only",
            Level.FAST: "float32 where ours rounds",
            None: "not exact",
        }
        return f"{self.function} is {stands[self.level]}: {why}"


def standings(op: str, release: str | None = None) -> list[Standing]:
    """Each function of AITER's that comes near an op, and how it stands to it. No AITER is needed.

    ``release`` is "new", "old" or None for both.
    """
    if op in NEVER:
        return [Standing(op, "", "any", (NEVER[op],), (), None)]
    if op not in FUNCTIONS:
        return [Standing(op, "", "any", (f"AITER has nothing for {op}",), (), None)]
    found = []
    for function, reason in {**dict.fromkeys(FUNCTIONS[op], ""), **UNUSED.get(op, {})}.items():
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
    ruled_out = (*([reason] if reason else []), *numerics.against())
    return Standing(op, function, "", ruled_out, tuple(numerics.by_call()), None if reason else numerics.least())


@functools.cache
def least(function: str, release: str | None = None) -> Level | None:
    """The least level that admits any call of a function of AITER's; of any release, if ``release`` is None."""
    levels = [each.least() for name, each in NUMERICS[function].items() if release in (None, name)]
    return min((level for level in levels if level is not None), default=None)


@functools.cache
def serves(op: str, release: str | None = None, *, level: Level = Level.EXACT, function: str | None = None) -> Verdict:
    """Can AITER run any call of ``op`` at this level? ``release`` is "new", "old" or None for any; no AITER is needed.

    ``function``: by this one of FUNCTIONS; None: by the first.
    """
    if op not in FUNCTIONS:
        return Verdict(False, str(standings(op)[0]))
    name = function or FUNCTIONS[op][0]
    if release not in (None, *NUMERICS[name]):
        return Verdict(False, differences(name, release))
    of_function = [each for each in standings(op, release) if each.function == name]
    for each in of_function:
        if each.level is not None and each.level <= level:
            return Verdict(True, admitted(name, each.level))
    return Verdict(False, str(of_function[0]))


def differences(function: str, release: str | None = None) -> str:
    """What a function of AITER's does otherwise in every call; of any release, what the one nearest to ours does."""
    if release not in (None, *NUMERICS[function]):
        return f"{function} of this release ({release!r}) was never read"
    numerics = [each for name, each in NUMERICS[function].items() if release in (None, name)]
    nearest: list[str] = min((each.against() for each in numerics), key=len)
    return "; ".join(nearest)


def admitted(function: str, level: Level) -> str:
    """What a call of AITER's function is that this level is the least to admit, in words."""
    if level is Level.EXACT:
        return f"{function} is exact, for the calls that its rules accept"
    if level is Level.FINITE:
        return f"{function} is exact, given that {PROMISE}"
    return f"{function} keeps float32 where ours rounds, as was asked for: other bytes, also given that {PROMISE}"
