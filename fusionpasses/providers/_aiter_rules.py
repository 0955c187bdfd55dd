"""The calls of our ops that go to AITER: ``choose``.

``RULES`` has, for each op and each function of AITER's that runs it, conditions: functions of a call's metadata that
return None, or the reason why the call must not go there. Most are about what AITER's kernels do not check and then
read or write elsewhere, or about what they do otherwise; those hold whatever was asked for. Some are about roundings
that AITER leaves out, and a user may do without those (``Level.FAST``). They look at no data, so what depends on data
(Inf and NaN) is in ``_aiter_numerics.py``, and what adapters put right (slots and positions out of range) in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fusionpasses import _aiter_numerics
from fusionpasses._aiter_numerics import FUNCTIONS, Level
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.probes import Verdict
from fusionpasses.providers import _aiter_conditions as of
from fusionpasses.providers import _aiter_rope_conditions as rope
from fusionpasses.providers._aiter_conditions import Call, Condition, Target


class Route(NamedTuple):
    """What must hold of a call of an op to be run by one function of AITER's.

    Attributes:
        conditions: in the order in which they are asked; whatever the level.
        roundings: where our contract rounds and AITER keeps float32. Not asked of calls at ``Level.FAST``.
        meant: tells the calls that the function is for from those of the op's other functions.
    """

    conditions: tuple[Condition, ...]
    roundings: tuple[Condition, ...] = ()
    meant: tuple[Condition, ...] = ()


_NORM = (of.even_scales, of.row_fits_in("x"), of.a_weight_in("weight"), of.own_kernel_only_on_gfx1250)
_NORM_ALONE = (*_NORM, *of.rows_of("x"), of.together_in("x", "weight"), of.offsets_of("x"))
_NORM_OF_SUM = (
    *_NORM,
    *of.rows_of("x", "residual"),
    of.together_in("x", "residual", "weight"),
    of.offsets_of("x", "residual"),
)
_SECOND_NORM = (
    *_NORM_ALONE,
    of.row_fits_in("x2"),
    of.a_weight_in("weight2"),
    of.rows_of("x2")[1],
    of.together_in("x2", "weight2"),
    of.offsets_of("x2"),
    of.norm_in_dtype_of_x("2"),
)
_NORM_ROUNDED = (of.norm_rounded_nowhere,)
_SUM_ROUNDED = (of.sum_rounded_nowhere,)
_CACHE = (
    rope.bfloat16_rows,
    rope.bfloat16_cache,
    rope.one_cache,
    rope.slots_evenly_apart,
    rope.powers_of_two,
    of.own_kernel_only_on_gfx1250,
    of.rows_of("kv_c")[0],
)
_ROTATION = (rope.negative_slots_skipped, rope.style_of_aiter, rope.q_nope_as_wide_as_kv_c, of.rows_of("q_nope")[0])
_PRODUCT = (
    of.fp4_arithmetic,
    of.no_bias,
    of.sixteen_bits_out,
    of.width_in_256,
    of.rows_of("x_codes")[0],
    of.some_weight,
    of.contiguous_codes,
    of.partial_sums_in_32_bits,
)

#: By op (``packet.overload``) and function of AITER.
RULES: dict[str, dict[str, Route]] = {
    "dynamic_mxfp4_quant.default": {"dynamic_mxfp4_quant": Route((of.even_scales, *of.rows_of("x")))},
    "rmsnorm_mxfp4_quant.default": {"fused_rms_mxfp4_quant": Route(_NORM_ALONE, _NORM_ROUNDED)},
    "rmsnorm_mxfp4_quant.with_norm": {
        "fused_rms_mxfp4_quant": Route((*_NORM_ALONE, of.norm_in_dtype_of_x()), _NORM_ROUNDED)
    },
    "rmsnorm_mxfp4_quant.with_second": {
        "fused_rms_mxfp4_quant": Route(_SECOND_NORM, (*_NORM_ROUNDED, of.second_norm_rounded_once))
    },
    "rmsnorm_add_mxfp4_quant.default": {"fused_rms_mxfp4_quant": Route(_NORM_OF_SUM, _SUM_ROUNDED)},
    "rmsnorm_add_mxfp4_quant.with_norm": {
        "fused_rms_mxfp4_quant": Route((*_NORM_OF_SUM, of.norm_in_dtype_of_x()), _SUM_ROUNDED)
    },
    "silu_mul_mxfp4_quant.default": {
        "act_mul_and_mxfp4_quant": Route(
            (of.even_scales, of.activation_of_aiter, *of.rows_of("gate"), of.halves_of_one_tensor),
            (of.silu, of.product_rounded_nowhere),
        )
    },
    "fused_rope_mla_kv_cache.absorbed": {
        "fused_qk_rope_cat_and_cache_mla": Route(
            (
                *_CACHE,
                *_ROTATION,
                rope.zeros_keep_their_sign,
                rope.cos_and_sin_alike,
                of.offsets_of("q_nope", "q_pe", "k_pe", "kv_c", "cos"),
                rope.query_in_32_bits,
            ),
            (rope.angles_rounded_alike,),
        ),
        "fused_qk_rope_concat_and_cache_mla": Route(
            (
                rope.hip_architecture,
                rope.cache_of_model_dtype,
                rope.one_cache,
                *_ROTATION,
                of.rows_of("kv_c")[0],
                rope.angles_of_model_dtype,
                rope.angles_in_a_row,
                rope.hip_widths,
                rope.hip_kernel_for_decoding,
                rope.hip_rounds_bfloat16,
                rope.hip_rows_together,
                rope.hip_rows_aligned,
                rope.hip_offsets_in_32_bits,
            )
        ),
    },
    "concat_and_cache_mla.default": {
        "fused_qk_rope_cat_and_cache_mla": Route((*_CACHE, of.offsets_of("kv_c", "k_pe")))
    },
    "mxfp4_gemm.default": {
        "gemm_afp4wfp4": Route(_PRODUCT, meant=(of.in_layout("linear"),)),
        "gemm_afp4wfp4_preshuffle": Route(_PRODUCT, meant=(of.in_layout("shuffled"),)),
        "gemm_afp4wfp4_preshuffled_scales": Route(
            (*_PRODUCT, of.enough_tokens), meant=(of.in_layout("shuffled_scales"),)
        ),
    },
}


class Ruling(NamedTuple):
    """What one function of AITER's makes of a call.

    Attributes:
        level: the least that admits the call; None if none does.
        why: what keeps it from levels below that, or from all.
        meant: is the function the one for such calls?
    """

    level: Level | None
    why: str
    meant: bool


def ruling(op: str, function: str, arguments: Mapping[str, Any], target: Target, release: str | None = None) -> Ruling:
    """``release`` is "new", "old" or None, for any that has the function."""
    call, route = Call(arguments, target), RULES[op][function]
    least = _aiter_numerics.least(function, release)
    if least is None:
        return Ruling(None, _aiter_numerics.differences(function, release), True)
    for conditions, level, meant in ((route.meant, None, False), (route.conditions, None, True)):
        why = next(filter(None, (condition(call) for condition in conditions)), None)
        if why is not None:
            return Ruling(level, why, meant)
    why = next(filter(None, (condition(call) for condition in route.roundings)), None)
    if why is not None:
        return Ruling(Level.FAST, why, True)
    return Ruling(least, _aiter_numerics.differences(function, release), True)


#: ``look(function)``: the release of a function that is here, and what else keeps a call from it ("" for nothing).
#: Raises ProviderUnavailable if it is not here.
Look = Callable[[str], "tuple[str | None, str]"]


class Choice(NamedTuple):
    """Which function of AITER's runs a call, "" for none; the verdict says why."""

    function: str
    verdict: Verdict


def choose(op: str, arguments: Mapping[str, Any], target: Target, *, level: Level, look: Look) -> Choice:
    """The function of AITER that runs this call of ``op`` at a level: the first of ``FUNCTIONS[op]`` that may.

    Args:
        op: ``packet.overload``.
        arguments: all of the op's but ``provider``, by name, already checked; fake tensors will do.
        target: what AITER's kernels are compiled for, and by what.
        level: what was asked for.
        look: asked of a function that may run the call, as far as its metadata tell.

    Raises:
        ProviderUnavailable: the first function, without which AITER is not had for the op, is not here.
    """
    # By how near a function came: those that were refused, that differ by more than was asked for, that are for others.
    refusals: tuple[dict[str, str], ...] = ({}, {}, {})
    helps: list[Level] = []
    for function in FUNCTIONS[op]:
        each, refused, first = ruling(op, function, arguments, target), "", function == FUNCTIONS[op][0]
        # The first was loaded when AITER was chosen; others only for a call that they may run.
        if each.level is not None and (each.level <= level or first):
            try:
                release, refused = look(function)
            except ProviderUnavailable as error:
                if first:
                    raise
                release, refused = None, str(error)
            each = ruling(op, function, arguments, target, release)
        if each.level is not None and not refused:
            if each.level <= level:
                return Choice(function, Verdict(True, _aiter_numerics.admitted(function, each.level)))
            helps.append(each.level)
        least = _aiter_numerics.least(function)
        beyond = least is not None and least > level
        refusals[2 if not each.meant else 1 if beyond else 0].setdefault(refused or each.why, function)
    nearest = next(filter(None, refusals))
    why = [reason if i == 0 else f"nor by {name}: {reason}" for i, (reason, name) in enumerate(nearest.items())]
    return Choice("", Verdict(False, "; ".join((*why, _aiter_numerics.switch(min(helps, default=None))))))


def rule_in_words(op: str, level: Level) -> str:
    """The recorded run-time rule of an op that a graph gives to AITER: the conditions of each function in question."""
    alternatives = []
    for function, route in RULES[op].items():
        least = _aiter_numerics.least(function)
        if least is not None and least <= level:
            asked = (*route.meant, *route.conditions, *(() if level is Level.FAST else route.roundings))
            names = dict.fromkeys(condition.__name__.replace("_", " ") for condition in asked)
            alternatives.append(f"({', '.join(names)})")
    return f"each call of {op} is run by AITER if its metadata agree {' or '.join(alternatives)}, else by Triton"
