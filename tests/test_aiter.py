"""The AITER provider: which calls it takes, what it makes of AITER's results, who is chosen.

AITER itself is not needed. Where a checkout of ROCm/aiter is named by the environment variable AITER_SOURCE, its Triton
kernels run in the interpreter under our adapters; ``pytest -m rocm`` runs them, compiled, on an AMD GPU.
"""

import itertools
import os
import pathlib

import aiter_fakes
import numpy as np
import pytest
import torch

import fusionpasses as fp
from benchmarks import aiter_cases, aiter_check
from fusionpasses import _aiter_numerics, probes, providers
from fusionpasses._aiter_numerics import FUNCTIONS, Level
from fusionpasses.config import PROVIDER_CHOICES
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.ops import _mxfp4
from fusionpasses.ops._op import OPS
from fusionpasses.probes import Verdict
from fusionpasses.providers import _aiter_conditions, _aiter_import, _aiter_rules, aiter, triton

TARGET, CPU = aiter_cases.TARGET, aiter_cases.Machine("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# What may go to AITER.


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def strided(shape, strides, dtype=FP32):
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def plain(**changed):
    return {"x": empty(4, 64), "scale_mode": "even", **changed}


def norm(**changed):
    x = changed.pop("x", empty(4, 64, dtype=BF16))
    weight = changed.pop("weight", empty(x.shape[-1], dtype=x.dtype))
    given = {
        "x": x,
        "weight": weight,
        "eps": 1e-6,
        "cast_order": "scale_cast",
        "norm_dtype": FP32,
        "scale_mode": "even",
    }
    return {**given, **changed}


def two_norms(**changed):
    given = {"x2": empty(4, 96, dtype=BF16), "weight2": empty(96, dtype=BF16), "eps2": 1e-6}
    given |= {"cast_order2": "scale_cast", "norm_dtype2": BF16}
    return {**norm(), **given, **changed}


def gated(gate_up=None, **changed):
    gate, up = (empty(4, 128, dtype=BF16) if gate_up is None else gate_up).chunk(2, -1)
    given = {"gate": gate, "up": up, "activation": "silu", "cast_order": "mul_cast", "act_dtype": FP32}
    return {**given, "scale_mode": "even", **changed}


def cached(**changed):
    dtype, latent, rope, tokens = BF16, changed.pop("latent", 32), changed.pop("rope", 16), changed.pop("tokens", 5)
    dtype = changed.pop("dtype", dtype)
    cache = empty(3, 4, latent + rope, dtype=dtype)
    given = {"kv_c": empty(tokens, latent, dtype=dtype), "k_pe": empty(tokens, rope, dtype=dtype), "kv_cache": cache}
    given |= {"slots": empty(tokens, dtype=torch.int64), "pe_cache": None, "cache_scale": None, "scaling": "divide"}
    return {**given, **changed}


def rotated(**changed):
    latent, rope, tokens = changed.get("latent", 32), changed.get("rope", 16), changed.get("tokens", 5)
    table = empty(tokens, rope // 2, dtype=BF16)
    given = {"q_nope": empty(tokens, 3, latent, dtype=BF16), "q_pe": empty(tokens, 3, rope, dtype=BF16)}
    given |= {"cos": table, "sin": table, "style": "neox", "negative_slots": "skip", "positions": None}
    return {
        **given,
        **cached(**{k: v for k, v in changed.items() if k not in given}),
        **{k: v for k, v in changed.items() if k in given},
    }


def product(tokens=5, n=32, k=256, **changed):
    x = {"x_codes": empty(tokens, k // 2, dtype=torch.uint8), "x_scales": empty(tokens, k // 32, dtype=torch.uint8)}
    w = {"w_codes": empty(n, k // 2, dtype=torch.uint8), "w_scales": empty(n, k // 32, dtype=torch.uint8)}
    return {**x, **w, "bias": None, "out_dtype": BF16, "layout": "linear", "rows": None, "shift": 0, **changed}


def shuffled(tokens=5, n=64, k=512, **changed):
    w = {"w_codes": empty(n // 16, k * 8, dtype=torch.uint8), "w_scales": empty(n // 32, k, dtype=torch.uint8)}
    return product(tokens, n, k, **w, **{"layout": "shuffled", "rows": n, **changed})


def scaled(tokens=40, n=64, k=512, **changed):
    w = {"w_codes": empty(n, k // 2, dtype=torch.uint8), "w_scales": empty(n // 32, k, dtype=torch.uint8)}
    return product(tokens, n, k, **w, **{"layout": "shuffled_scales", "rows": n, **changed})


def blocks(latent=512, rope=64, dtype=BF16, strides=None):
    """Blocks that are apart, which AITER's Triton kernel cannot write to."""
    width = latent + rope
    return strided((3, 4, width), strides or (9 * width, width, 1), dtype)


def decoded(latent=512, rope=64, tokens=5, heads=4, dtype=BF16, **changed):
    """A call for AITER's HIP op."""
    q = {"q_nope": empty(tokens, heads, latent, dtype=dtype), "q_pe": empty(tokens, heads, rope, dtype=dtype)}
    rows = {"kv_c": empty(tokens, latent, dtype=dtype), "k_pe": empty(tokens, rope, dtype=dtype)}
    angles = dict.fromkeys(("cos", "sin"), empty(tokens, 32, dtype=dtype))
    cache = changed.pop("kv_cache", None)
    cache = blocks(latent, rope, dtype) if cache is None else cache
    return {**rotated(tokens=tokens), **q, **rows, **angles, "kv_cache": cache, **changed}


def flat(latent=512, tokens=5, dtype=BF16, **changed):
    """The same, of widths that its kernel for slots that are blocks of their own takes."""
    return decoded(latent, 64, tokens, 4, dtype, kv_cache=empty(12, latent + 64, dtype=dtype), **changed)


def summed(**changed):
    x = changed.get("x", empty(4, 64))
    return {"residual": torch.empty_like(x), **norm(**{"x": x, **changed})}


GFX942, ROCM6 = _aiter_conditions.Target("gfx942", True, 7), _aiter_conditions.Target("gfx950", True, 6)
GFX1250 = _aiter_conditions.Target("gfx1250", True, 7)
QUANT, NORM, NORM_AND = "dynamic_mxfp4_quant.default", "rmsnorm_mxfp4_quant.default", "rmsnorm_mxfp4_quant.with_norm"
BOTH = "rmsnorm_mxfp4_quant.with_second"
ADD, ADD_AND = "rmsnorm_add_mxfp4_quant.default", "rmsnorm_add_mxfp4_quant.with_norm"
ACT, ROPE, CONCAT = "silu_mul_mxfp4_quant.default", "fused_rope_mla_kv_cache.absorbed", "concat_and_cache_mla.default"
GEMM = "mxfp4_gemm.default"

#: Op, a call that is accepted, its twin that is not, the rule that refuses, words of the reason; target of the twin.
REFUSED = [
    (
        QUANT,
        {"x": empty(4, 64), "scale_mode": "even"},
        {"x": empty(4, 64), "scale_mode": "rceil"},
        "even_scales",
        "'even'",
    ),
    (
        QUANT,
        {"x": empty(1, 64), "scale_mode": "even"},
        {"x": empty(0, 64), "scale_mode": "even"},
        "some_rows",
        "no rows",
    ),
    (
        QUANT,
        plain(x=strided((2, 3, 64), (384, 128, 2))),
        plain(x=strided((2, 3, 64), (500, 128, 2))),
        "rows_evenly_apart",
        "evenly apart",
    ),
    (NORM, norm(), norm(scale_mode="floor"), "even_scales", "'floor'"),
    (NORM, norm(x=empty(1, 2**20)), norm(x=empty(1, 2**20 + 32)), "row_fits", "rows of 1048608"),
    (NORM, norm(), norm(weight=None), "a_weight", "None"),
    (NORM, norm(), norm(), "own_kernel_only_on_gfx1250", "Gluon", GFX1250),
    (NORM, norm(), norm(cast_order="cast_scale"), "norm_rounded_nowhere", "before the weight"),
    (NORM, norm(x=empty(4, 64), norm_dtype=None), norm(norm_dtype=None), "norm_rounded_nowhere", "unrounded"),
    (NORM, norm(), norm(x=empty(0, 64, dtype=BF16)), "some_rows", "no rows"),
    (NORM, norm(), norm(x=strided((2, 3, 64), (999, 64, 1))), "rows_evenly_apart", "evenly apart"),
    (NORM, norm(), norm(x=strided((4, 64), (1, 4), BF16)), "elements_of_a_row_together", "last stride of 1"),
    (NORM, norm(), norm(weight=strided((64,), (2,), BF16)), "elements_of_a_row_together", "weight"),
    (NORM, norm(x=empty(2**21 - 1, 1024)), norm(x=empty(2**21, 1024)), "offsets_in_32_bits", "32 bits"),
    (
        NORM_AND,
        norm(x=empty(4, 64)),
        norm(),
        "norm_in_its_dtype",
        "dtype of x",
    ),
    (BOTH, two_norms(), two_norms(cast_order2="cast_scale"), "second_norm_rounded_once", "cast_order2"),
    (BOTH, two_norms(), two_norms(norm_dtype=None), "norm_rounded_nowhere", "unrounded"),
    (BOTH, two_norms(), two_norms(norm_dtype2=FP32), "norm_in_its_dtype", "norm_dtype2"),
    (BOTH, two_norms(), two_norms(weight2=None), "a_weight", "weight2"),
    (BOTH, two_norms(), two_norms(weight2=strided((96,), (2,), BF16)), "elements_of_a_row_together", "weight2"),
    (BOTH, two_norms(), two_norms(x2=strided((4, 96), (1, 4), BF16)), "elements_of_a_row_together", "x2"),
    (
        BOTH,
        two_norms(x2=empty(1, 2**20, dtype=BF16), weight2=empty(2**20, dtype=BF16)),
        two_norms(x2=empty(1, 2**20 + 32, dtype=BF16), weight2=empty(2**20 + 32, dtype=BF16)),
        "row_fits",
        "x2: got rows of 1048608",
    ),
    (BOTH, two_norms(), two_norms(x2=strided((2, 2, 96), (999, 96, 1), BF16)), "rows_evenly_apart", "x2"),
    (BOTH, two_norms(), two_norms(x2=strided((4, 96), (2**30, 1), BF16)), "offsets_in_32_bits", "32 bits"),
    (ADD, summed(), summed(x=empty(4, 64, dtype=BF16)), "sum_rounded_nowhere", "rounded sum"),
    (ADD, summed(), summed(residual=strided((4, 64), (1, 4))), "elements_of_a_row_together", "residual"),
    (ADD_AND, summed(), summed(weight=None), "a_weight", "None"),
    (ACT, gated(), gated(scale_mode="ceil"), "even_scales", "'ceil'"),
    (ACT, gated(), gated(activation="gelu_tanh"), "silu", "gelu_tanh"),
    (ACT, gated(), gated(activation="x_sigmoid"), "silu", "x_sigmoid"),
    (ACT, gated(), gated(activation="relu"), "activation_of_aiter", "leaves out one that it does not know"),
    (ACT, gated(), gated(cast_order="cast_mul"), "product_rounded_nowhere", "rounds the activation"),
    (ACT, gated(empty(4, 128), cast_order="cast_mul"), gated(act_dtype=None), "product_rounded_nowhere", "unrounded"),
    (ACT, gated(), gated(empty(0, 128, dtype=BF16)), "some_rows", "no rows"),
    (ACT, gated(), gated(strided((2, 3, 128), (999, 128, 1), BF16)), "rows_evenly_apart", "evenly apart"),
    (ACT, gated(), gated(up=empty(4, 64, dtype=BF16)), "halves_of_one_tensor", "two tensors"),
    (ROPE, rotated(), rotated(style="interleaved_to_neox"), "style_of_aiter", "reads them"),
    (ROPE, rotated(), rotated(negative_slots="wrap"), "negative_slots_skipped", "'wrap'"),
    (ROPE, rotated(), rotated(cos=empty(5, 8), sin=empty(5, 8)), "angles_rounded_alike", "float32"),
    (ROPE, rotated(), rotated(), "zeros_keep_their_sign", "0 - x", _aiter_conditions.Target("gfx950", False, 7)),
    (ROPE, rotated(), rotated(sin=strided((5, 8), (16, 1), BF16)), "cos_and_sin_alike", "those of cos"),
    (ROPE, rotated(), rotated(q_nope=empty(5, 3, 64, dtype=BF16)), "q_nope_as_wide_as_kv_c", "width 64"),
    (ROPE, rotated(), rotated(q_nope=empty(5, 0, 32, dtype=BF16)), "some_rows", "no rows"),
    (ROPE, rotated(), rotated(q_pe=strided((5, 3, 16), (2**29, 16, 1), BF16)), "offsets_in_32_bits", "32 bits"),
    (
        ROPE,
        rotated(q_nope=strided((5, 2**23, 32), (0, 32, 1), BF16), q_pe=strided((5, 2**23, 16), (0, 16, 1), BF16)),
        rotated(q_nope=strided((5, 9 << 20, 32), (0, 32, 1), BF16), q_pe=strided((5, 9 << 20, 16), (0, 16, 1), BF16)),
        "query_in_32_bits",
        "in the query",
    ),
    (ROPE, rotated(), rotated(), "own_kernel_only_on_gfx1250", "Gluon", GFX1250),
    (CONCAT, cached(), cached(dtype=FP16, kv_cache=empty(12, 48, dtype=BF16)), "bfloat16_rows", "float16"),
    (CONCAT, cached(), cached(kv_cache=empty(12, 48, dtype=torch.float8_e4m3fn)), "bfloat16_cache", "saturate"),
    (CONCAT, cached(), cached(kv_cache=empty(12, 48, dtype=torch.uint8)), "bfloat16_cache", "NVFP4"),
    (CONCAT, cached(), cached(pe_cache=empty(12, 16, dtype=BF16)), "one_cache", "one cache"),
    (CONCAT, cached(), cached(kv_cache=strided((3, 4, 48), (999, 48, 1), BF16)), "slots_evenly_apart", "evenly apart"),
    (CONCAT, cached(), cached(latent=48), "powers_of_two", "widths 48 and 16"),
    (CONCAT, cached(), cached(tokens=0), "some_rows", "no rows"),
    (GEMM, product(), product(), "fp4_arithmetic", "gfx942", _aiter_conditions.Target("gfx942", True, 7)),
    (GEMM, product(), product(bias=empty(32)), "no_bias", "bias"),
    (GEMM, product(), product(layout="tiles"), "layout_of_aiter", "'tiles'"),
    (GEMM, product(out_dtype=FP16), product(out_dtype=FP32), "sixteen_bits_out", "float32"),
    (GEMM, product(k=512), product(k=320), "width_in_256", "K: got 320"),
    (GEMM, product(), product(tokens=0), "some_rows", "no rows"),
    (GEMM, product(), product(n=0), "some_weight", "no rows"),
    (
        GEMM,
        product(),
        product(x_codes=strided((5, 128), (256, 1), torch.uint8)),
        "contiguous_codes",
        "positive ones",
    ),
    (GEMM, product(tokens=256, n=2**17), product(tokens=256, n=2**18), "partial_sums_in_32_bits", "32 bits"),
    (GEMM, shuffled(tokens=256, n=2**17), shuffled(tokens=256, n=2**18), "partial_sums_in_32_bits", "32 bits"),
    (GEMM, shuffled(), shuffled(bias=empty(64)), "no_bias", "bias"),
    (GEMM, shuffled(), shuffled(tokens=0), "some_rows", "no rows"),
    (GEMM, scaled(), scaled(tokens=31), "enough_tokens", "32 and more"),
    (GEMM, scaled(), scaled(bias=empty(64)), "no_bias", "bias"),
    (GEMM, scaled(tokens=256, n=2**17), scaled(tokens=256, n=2**18), "partial_sums_in_32_bits", "32 bits"),
]

#: The same of AITER's HIP op, which is asked after its Triton kernel, and for "aiter_fast" alone.
REFUSED_BY_HIP = [
    (decoded(dtype=FP16), decoded(dtype=FP16), "hip_architecture", "gfx942 and gfx950 alone", GFX1250),
    (decoded(dtype=FP16), decoded(kv_cache=blocks(dtype=FP16)), "cache_of_model_dtype", "rows of torch.bfloat16"),
    (decoded(), decoded(kv_cache=blocks(dtype=torch.float8_e4m3fn)), "cache_of_model_dtype", "does not saturate"),
    (decoded(), decoded(kv_cache=blocks(dtype=torch.uint8)), "cache_of_model_dtype", "does not take it"),
    (decoded(), decoded(pe_cache=empty(3, 4, 64, dtype=BF16)), "one_cache", "one cache"),
    (decoded(), decoded(negative_slots="wrap"), "negative_slots_skipped", "'wrap'"),
    (decoded(), decoded(style="interleaved_to_neox"), "style_of_aiter", "reads them"),
    (decoded(), decoded(q_nope=empty(5, 4, 256, dtype=BF16)), "q_nope_as_wide_as_kv_c", "width 256"),
    (decoded(tokens=1), decoded(tokens=0), "some_rows", "no rows"),
    (decoded(), decoded(cos=empty(5, 32), sin=empty(5, 32)), "angles_of_model_dtype", "takes its bytes for those of"),
    (decoded(), decoded(cos=strided((5, 32), (64, 1), BF16)), "angles_in_a_row", "cos: got strides (64, 1)"),
    (decoded(), decoded(sin=strided((5, 32), (64, 1), BF16)), "angles_in_a_row", "sin: got strides (64, 1)"),
    (decoded(), decoded(rope=32), "hip_widths", "widths 32 and 32"),
    (decoded(), decoded(cos=empty(5, 64, dtype=BF16), sin=empty(5, 64, dtype=BF16)), "hip_widths", "64 and 64"),
    (decoded(heads=4), decoded(heads=3), "hip_kernel_for_decoding", "3 heads and blocks of 4"),
    (decoded(latent=512), decoded(latent=1024), "hip_kernel_for_decoding", "5 tokens of 1024"),
    (flat(latent=384), decoded(latent=384), "hip_kernel_for_decoding", "5 tokens of 384"),
    (flat(latent=384, tokens=255), flat(latent=384, tokens=256), "hip_kernel_for_decoding", "256 tokens"),
    (flat(latent=320), flat(latent=248), "hip_kernel_for_decoding", "tokens of 248"),
    (flat(latent=128, dtype=FP16), flat(latent=96, dtype=FP16), "hip_kernel_for_decoding", "tokens of 96"),
    (flat(latent=136, dtype=FP32), flat(latent=136, dtype=FP16), "hip_kernel_for_decoding", "tokens of 136"),
    (decoded(), decoded(), "hip_rounds_bfloat16", "cuts k off there", GFX942),
    (decoded(), decoded(), "hip_rounds_bfloat16", "compiled with integers for it", ROCM6),
    (decoded(), decoded(q_pe=strided((5, 4, 64), (512, 128, 2), BF16)), "hip_rows_together", "q_pe: got strides"),
    (decoded(), decoded(kv_c=strided((5, 512), (1024, 2), BF16)), "hip_rows_together", "kv_c: got strides"),
    (decoded(), decoded(q_nope=strided((5, 4, 512), (2304, 516, 1), BF16)), "hip_rows_aligned", "16 bytes at once"),
    (decoded(), decoded(kv_c=empty(5 * 576 + 4, dtype=BF16)[4:].view(5, 576)[:, :512]), "hip_rows_aligned", "from 4"),
    (decoded(), decoded(kv_cache=blocks(strides=(9000, 580, 1))), "hip_rows_aligned", "kv_cache: got strides"),
    (
        decoded(q_nope=strided((5, 4, 512), (2304, 2**26, 1), BF16)),
        decoded(q_nope=strided((5, 4, 512), (2304, 2**27, 1), BF16)),
        "hip_offsets_in_32_bits",
        "32 bits",
    ),
    (decoded(), decoded(kv_cache=blocks(strides=(2**31, 576, 1))), "hip_offsets_in_32_bits", "got up to 2147483648"),
]


def choose(op, arguments, release="new", target=TARGET, level=Level.FINITE):
    """Who runs a call where every function of AITER's is here."""
    return _aiter_rules.choose(op, arguments, target, level=level, look=lambda function: (release, ""))


def accepts(*args, **keywords):
    return choose(*args, **keywords).verdict


def conditions_of(route):
    return (*route.meant, *route.conditions, *route.roundings)


def refusing(conditions, arguments, target):
    call = _aiter_conditions.Call(arguments, target)
    return list(dict.fromkeys(condition.__name__ for condition in conditions if condition(call)))


@pytest.mark.parametrize("case", REFUSED, ids=[f"{c[0]}-{c[3]}-{i}" for i, c in enumerate(REFUSED)])
def test_a_call_is_refused_by_its_rule_and_its_twin_is_accepted(case):
    op, accepted, refused, rule, words, target = (*case, TARGET)[:6]
    function, answer = choose(op, accepted)
    assert answer, answer.why
    answer = accepts(op, refused, target=target)
    assert not answer
    assert words in answer.why
    route = _aiter_rules.RULES[op][function]
    hard = refusing((*route.meant, *route.conditions), refused, target)
    wide, answer_wide = choose(op, refused, target=target, level=Level.FAST)
    if rule in {condition.__name__ for condition in route.roundings}:
        assert (hard, refusing(route.roundings, refused, target)) == ([], [rule])
        # What is only not rounded is had by asking for that.
        assert (wide, bool(answer_wide)) == (function, True)
        assert answer.why.endswith(
            "; provider='aiter_fast' admits it, with other bytes for ordinary inputs, if nothing quantised, and no "
            "scale, is Inf, NaN or as large as 1.75 * 2**127"
        )
        assert "keeps float32 where ours rounds, as was asked for: other bytes" in answer_wide.why
    else:
        assert hard == [rule]
        assert not answer_wide
        assert answer.why.endswith("; no setting admits it")
        assert words in answer_wide.why


@pytest.mark.parametrize("case", REFUSED_BY_HIP, ids=[f"{c[2]}-{i}" for i, c in enumerate(REFUSED_BY_HIP)])
def test_a_call_is_refused_by_a_rule_of_the_hip_op_and_its_twin_is_accepted(case):
    accepted, refused, rule, words, target = (*case, TARGET)[:5]
    function, answer = choose(ROPE, accepted, level=Level.FAST)
    assert answer, answer.why
    assert function == "fused_qk_rope_concat_and_cache_mla"
    for level in (Level.EXACT, Level.FINITE):
        answer = accepts(ROPE, accepted, level=level)
        assert not answer
        assert "provider='aiter_fast' admits it" in answer.why
        assert function not in answer.why  # whose reasons nobody asked for
    answer = accepts(ROPE, refused, target=target, level=Level.FAST)
    assert not answer
    assert words in answer.why
    assert answer.why.endswith("; no setting admits it")
    assert refusing(conditions_of(_aiter_rules.RULES[ROPE][function]), refused, target) == [rule]
    # Both functions are said to refuse, each with its reason, unless it is the same one.
    triton = refusing(_aiter_rules.RULES[ROPE]["fused_qk_rope_cat_and_cache_mla"].conditions, refused, target)
    assert (f"; nor by {function}: " in answer.why) == (triton[:1] != [rule])


def test_the_hip_op_runs_where_what_it_writes_is_rounded():
    hip = "fused_qk_rope_concat_and_cache_mla"
    for call, target in (
        (decoded(dtype=FP16), GFX942),
        (decoded(dtype=FP32), ROCM6),
        (flat(latent=384), GFX942),
        (decoded(), TARGET),
    ):
        assert choose(ROPE, call, target=target, level=Level.FAST).function == hip
    assert not accepts(ROPE, flat(latent=384), target=ROCM6, level=Level.FAST)


@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 32), (32,), (4, 64)])
def test_codes_and_scales_have_the_strides_of_the_contract(shape):
    x = torch.randn(shape)
    codes, scales = _mxfp4.quantize(x.view(-1, shape[-1]), "even")
    # As AITER makes them: of one block a row, contiguous with a stride that nobody steps by.
    scales = torch.empty_strided(scales.shape, (1, len(scales)), dtype=torch.uint8).copy_(scales)
    want = _mxfp4.fake_quantized(x)
    for got, contract in zip(aiter._conformed(x, codes, scales), want, strict=True):
        assert (got.shape, got.stride()) == (contract.shape, contract.stride())


def test_every_rule_has_a_case():
    every = {
        c.__name__ for routes in _aiter_rules.RULES.values() for route in routes.values() for c in conditions_of(route)
    }
    assert every == {case[3] for case in REFUSED} | {case[2] for case in REFUSED_BY_HIP}


def test_norms_are_accepted_where_nothing_is_rounded():
    for dtype, wide_weight, order, norm_dtype, mode in itertools.product(
        _mxfp4.INPUT_DTYPES, (False, True), ("cast_scale", "scale_cast"), (None, FP32), _mxfp4.SCALE_ADDEND
    ):
        x = empty(4, 64, dtype=dtype)
        call = norm(x=x, cast_order=order, norm_dtype=norm_dtype, scale_mode=mode)
        call["weight"] = empty(64, dtype=FP32 if wide_weight else dtype)
        unrounded = dtype == FP32 or (order == "scale_cast" and norm_dtype == FP32)
        for op, exact in ((NORM, unrounded), (ADD, dtype == FP32)):
            given = call if op == NORM else {**call, "residual": x}
            answer = accepts(op, given)
            assert bool(answer) == (exact and mode == "even"), answer.why
            assert bool(accepts(op, given, level=Level.FAST)) == (mode == "even")
            # The norm that is returned has a dtype, whatever was asked for.
            stored = op.replace("default", "with_norm")
            result = OPS[stored].fake(
                x, *((x,) if op == ADD else ()), call["weight"], 1e-6, cast_order=order, norm_dtype=norm_dtype
            )[-1]
            answer = accepts(stored, given, level=Level.FAST)
            assert bool(answer) == (mode == "even" and result.dtype == dtype), answer.why


def test_gated_activations_are_accepted_where_nothing_is_rounded():
    from fusionpasses.ops.silu_mul_mxfp4_quant import contracts

    for dtype, (activation, order), act_dtype in itertools.product(_mxfp4.INPUT_DTYPES, contracts(), (None, FP32)):
        call = gated(empty(4, 128, dtype=dtype), activation=activation, cast_order=order, act_dtype=act_dtype)
        answer = accepts(ACT, call)
        unrounded = dtype == FP32 or (order == "mul_cast" and act_dtype == FP32)
        assert bool(answer) == (unrounded and activation == "silu"), answer.why
        assert accepts(ACT, call, level=Level.FAST)


def test_a_level_admits_what_those_before_it_do_and_says_which_it_took():
    words = {
        Level.EXACT: "is exact, for the calls that its rules accept",
        Level.FINITE: "is exact, given that nothing quantised",
        Level.FAST: "keeps float32 where ours rounds, as was asked for",
    }
    for op, arguments, least in (
        (ROPE, rotated(), Level.EXACT),
        (QUANT, plain(), Level.FINITE),
        (NORM, norm(), Level.FINITE),
        (GEMM, product(), Level.FINITE),
        (NORM, norm(cast_order="cast_scale"), Level.FAST),
        (ROPE, rotated(cos=empty(5, 8), sin=empty(5, 8)), Level.FAST),
    ):
        for level in Level:
            answer = accepts(op, arguments, level=level)
            assert bool(answer) == (level >= least), answer.why
            assert not answer or words[least] in answer.why
            if not answer:
                name = next(name for name, at in _aiter_numerics.LEVELS.items() if at == least)
                assert f"provider={name!r} admits it" in answer.why
                assert answer.why.count("admit") == 1


def test_what_is_wrong_is_admitted_by_no_level():
    for op, arguments in ((QUANT, plain()), (NORM, norm()), (ACT, gated()), (ADD, summed())):
        answer = accepts(op, arguments, "old", level=Level.FAST)
        assert not answer
        assert answer.why.startswith("ties: away from zero, and wrong below 1")
        assert answer.why.endswith("; no setting admits it")
    for cache in (torch.float8_e4m3fn, torch.uint8):
        answer = accepts(ROPE, rotated(kv_cache=empty(3, 4, 48, dtype=cache)), level=Level.FAST)
        assert not answer
        assert answer.why.endswith("; no setting admits it")


def test_what_quantises_needs_the_promise_and_a_new_release():
    quantising = {QUANT, NORM, NORM_AND, BOTH, ADD, ADD_AND, ACT}
    for op in FUNCTIONS:
        exact, promised = _aiter_numerics.serves(op, "new"), _aiter_numerics.serves(op, "new", level=Level.FINITE)
        assert promised
        assert bool(exact) == (op in (ROPE, CONCAT)), op
        if not exact:
            assert "provider='aiter_finite'" in exact.why
        for level in (Level.FINITE, Level.FAST):
            old = _aiter_numerics.serves(op, "old", level=level)
            assert bool(old) == (op not in quantising)
            if not old:
                assert "away from zero" in old.why
                assert "no setting admits it" in old.why
    assert not _aiter_numerics.serves(QUANT, "newer")
    for op, why in _aiter_numerics.NEVER.items():
        assert _aiter_numerics.serves(op, level=Level.FAST) == Verdict(False, f"{why}; no setting admits it")
    # What is joined is Triton's already.
    assert FUNCTIONS.keys() | _aiter_numerics.NEVER.keys() == {op for op in OPS if "then_" not in op}
    routes = {(op, function) for op, functions in FUNCTIONS.items() for function in functions}
    assert routes == {(op, function) for op, of_op in _aiter_rules.RULES.items() for function in of_op}
    assert routes == aiter._RUN.keys()
    for provider in _aiter_numerics.LEVELS:
        assert aiter.ADAPTERS[provider].keys() == FUNCTIONS.keys()


# What is made of AITER's results.


@pytest.fixture(params=["new", "old"])
def installed(request, monkeypatch):
    """An AITER of one generation on a machine with an MI350; its functions are fakes."""
    with aiter_fakes.installed(request.param, monkeypatch):
        yield request.param


@pytest.mark.parametrize("group", aiter_cases.GROUPS)
def test_results_are_those_of_the_contract(installed, group):
    if installed == "new":
        tally = aiter_cases.run(group, CPU)
        assert tally.failures == []
        # The fakes are the references.
        assert tally.cases == tally.equal > 0
        return
    for op, args, kwargs in aiter_cases.GROUPS[group](CPU):
        arguments = aiter.bound(op, args, kwargs)
        answer = aiter.judge(op, arguments, Level.FINITE)
        assert bool(answer) == (group in ("rope", "concat", "gemm"))
        name = {"shuffled": "gemm_afp4wfp4_preshuffle", "shuffled_scales": "gemm_afp4wfp4_preshuffled_scales"}.get(
            group
        )
        if name is not None:
            assert answer.why == f"AITER's {name} is not here; no setting admits it"
            continue
        if "norm" in op and op.endswith("with_norm"):
            continue  # old releases do not return it
        name = FUNCTIONS[op][0]
        function, _ = _aiter_import.load(name)
        before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        aiter_cases.compare(op, aiter._RUN[op, name](function, "old", arguments), args, before, kwargs)


@pytest.mark.parametrize("group", aiter_cases.FAST)
def test_what_keeps_float32_is_given_to_aiter_where_it_was_asked_for(installed, group):
    tally = aiter_cases.run(group, CPU)
    assert tally.failures == []
    if installed == "new" or group == "fast_rope":
        assert tally.cases == tally.equal + tally.within > 0
        # The fakes are the references, in float32.
        assert tally.within == 0
        assert 0.001 < tally.other < 0.1 if group != "fast_rope" else tally.other == 0
    else:
        assert tally.cases == tally.refused > 0


@pytest.mark.parametrize("installed", ["new"], indirect=True)  # old releases are given nothing of it
def test_what_keeps_float32_differs_by_less_than_one_percent_of_codes(installed):
    """What the documentation says of ordinary inputs in bfloat16."""
    torch.manual_seed(0)
    x, weight = torch.randn(256, 1024).bfloat16(), torch.randn(1024).bfloat16()
    for op, args, kwargs in (
        (NORM, (x, weight, 1e-6), {"cast_order": "cast_scale"}),
        (ADD, (x, x.flip(0), weight, 1e-6), {"cast_order": "cast_scale"}),
        (ACT, x.chunk(2, -1), {"cast_order": "cast_mul"}),
    ):
        got, exact = aiter.ADAPTERS["aiter_fast"][op](*args, **kwargs)[0], OPS[op].reference(*args, **kwargs)[0]
        nibbles = (got & 15 != exact & 15).float().mean() / 2 + (got >> 4 != exact >> 4).float().mean() / 2
        assert 0.002 < nibbles < 0.02, float(nibbles)


def test_slots_and_positions_out_of_range_do_not_reach_aiter(installed):
    """Its kernel would write and read there; for our Triton kernel on an AMD GPU such tokens are skipped, too."""
    op, args, kwargs = next(case for case in aiter_cases.rope(CPU) if case[2]["positions"] is not None)
    args = list(args)
    args[7] = torch.tensor([7, -1, 99, 11, 3])
    before = args[4].clone()
    aiter.ADAPTERS["aiter"][op](*args, **kwargs)  # the fake looks
    assert not torch.equal(args[4], before)
    if installed == "new":
        op, args, kwargs = next(case for case in aiter_cases.hip(CPU) if case[2]["positions"] is not None)
        slots = args[7].clone()
        slots[:3] = torch.tensor([400, 2**31 - 1, -7])
        before = args[4].clone()
        aiter.ADAPTERS["aiter_fast"][op](*args[:7], slots, **kwargs)
        assert int((args[4] != before).any(-1).sum()) == 2


def test_a_write_is_told_to_autograd_once_and_of_the_cache_alone(installed):
    _, args, _ = next(iter(aiter_cases.concat(CPU)))
    versions = [arg._version for arg in args]
    aiter.ADAPTERS["aiter"][CONCAT](*args)
    assert args[2]._version == versions[2] + 1
    assert [a._version for i, a in enumerate(args) if i != 2] == [v for i, v in enumerate(versions) if i != 2]
    if installed == "new":
        op, args, kwargs = next(iter(aiter_cases.hip(CPU)))
        versions = [arg._version for arg in args]
        aiter.ADAPTERS["aiter_fast"][op](*args, **kwargs)
        assert [a._version - v for a, v in zip(args, versions, strict=True)] == [0, 0, 0, 0, 1, 0, 0, 0]


def test_a_refused_call_is_run_by_triton(installed, monkeypatch):
    seen = []
    for op in FUNCTIONS:
        monkeypatch.setitem(triton.ADAPTERS, op, lambda *args, op=op, **kwargs: seen.append((op, args, kwargs)))
    x = torch.randn(4, 64)
    aiter.ADAPTERS["aiter"][QUANT](x)
    aiter.ADAPTERS["aiter_finite"][QUANT](x[:0])
    aiter.ADAPTERS["aiter_finite"][NORM](x.bfloat16(), torch.ones(64), 1e-6, cast_order="cast_scale")
    assert [op for op, _, _ in seen] == [QUANT, QUANT, NORM]
    assert seen[2][2] == {"cast_order": "cast_scale"}
    aiter.ADAPTERS["aiter_fast"][QUANT](x[:0])
    aiter.ADAPTERS["aiter_fast"][NORM](x.bfloat16(), torch.ones(64), 1e-6, cast_order="cast_scale")
    assert [op for op, _, _ in seen[3:]] == [QUANT] + [NORM] * (installed == "old")


def test_the_first_function_is_needed_and_others_are_not(installed, monkeypatch):
    load = _aiter_import.load

    def without(*missing):
        def ask(name):
            if name in missing:
                raise ProviderUnavailable(f"{name} is gone")
            return load(name)

        monkeypatch.setattr(_aiter_import, "load", ask)

    without("fused_qk_rope_concat_and_cache_mla", "gemm_afp4wfp4_preshuffled_scales")
    assert aiter.judge(ROPE, rotated(), Level.FAST)
    answer = aiter.judge(ROPE, decoded(), Level.FAST)
    assert not answer
    assert (
        "; nor by fused_qk_rope_concat_and_cache_mla: fused_qk_rope_concat_and_cache_mla is gone; no sett" in answer.why
    )
    assert (
        aiter.judge(GEMM, scaled(), Level.FAST).why == "gemm_afp4wfp4_preshuffled_scales is gone; no setting admits it"
    )
    without("fused_qk_rope_cat_and_cache_mla")
    with pytest.raises(ProviderUnavailable, match="is gone"):
        aiter.judge(ROPE, rotated(), Level.FAST)


def test_only_functions_that_may_run_a_call_are_imported(installed, monkeypatch):
    asked, load = [], _aiter_import.load
    monkeypatch.setattr(_aiter_import, "load", lambda name: asked.append(name) or load(name))
    aiter.judge(ROPE, decoded(), Level.FINITE)
    aiter.judge(GEMM, product(layout="tiles"), Level.FAST)
    assert asked == []
    aiter.judge(GEMM, scaled(), Level.FAST)
    assert asked == ["gemm_afp4wfp4_preshuffled_scales"]


def test_partial_sums_in_bfloat16_are_refused(installed, monkeypatch):
    monkeypatch.setattr(aiter_fakes, "_USE_GEMM_SPLITK_BF16", True, raising=False)
    answer = aiter.judge(GEMM, product(), Level.FINITE)
    assert not answer
    assert "set_use_gemm_splitk_bf16" in answer.why


@pytest.mark.parametrize(
    ("tokens", "n", "k", "tile", "words"),
    [
        (5, 96, 512, (16, 64, 256), "N: got 96 with AITER's tile of 64; it reads beyond the weight"),
        (5, 64, 768, (16, 64, 512), "K: got 768 with AITER's tile of 512; its kernel has no code for a rest"),
        (31, 64, 512, (32, 64, 256), "tokens: got 31 with AITER's tile of 32; it would read their scales"),
        (32, 64, 512, (16, 64, 256), "tokens: got 32 with AITER's tile of 16; it would read their scales"),
        (600, 64, 512, (512, 64, 256), "tokens: got 600 with AITER's tile of 512"),
        (31, 96, 512, (16, 16, 512), None),
        (32, 64, 512, (256, 64, 512), None),
    ],
)
def test_a_tile_that_a_product_must_not_have_is_refused(installed, tokens, n, k, tile, words, monkeypatch):
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K")
    asked = []

    def table(*sizes):
        asked.append(sizes)
        return {**dict(zip(names, tile, strict=True)), "NUM_KSPLIT": 8}, True

    monkeypatch.setattr(aiter_fakes, "_get_config", table)
    answer = aiter.judge(GEMM, shuffled(tokens, n, k), Level.FINITE)
    if installed == "old":
        assert not answer
        return
    assert asked == [(tokens, n, k // 2, True)]
    assert bool(answer) == (words is None)
    assert answer or answer.why.startswith(words)
    assert answer or answer.why.endswith("; no setting admits it")


@pytest.mark.parametrize(
    ("tokens", "n", "k", "tile", "words"),
    [
        (40, 96, 512, (32, 64, 256, 1), "N: got 96 with AITER's tile of 64; it reads beyond the weight"),
        (40, 96, 512, (32, 16, 256, 1), None),
        (40, 64, 768, (32, 64, 512, 1), None),
        (40, 64, 512, (32, 64, 128, 1), "K: got 512 with AITER's tile of 128; its kernel takes scales apart in pieces"),
        # As AITER cuts K: the fake leaves the step as it is.
        (40, 64, 512, (32, 64, 256, 2), None),
        (40, 64, 512, (32, 64, 128, 2), "K: got 512 with AITER's tile of 128"),
        (40, 64, 512, (16, 64, 256, 1), None),
        (
            600,
            64,
            512,
            (512, 64, 256, 1),
            "tokens: got 600 with AITER's tile of 512; it would read beyond their scales",
        ),
        (600, 64, 512, (256, 64, 256, 1), None),
    ],
)
def test_a_tile_of_a_product_with_shuffled_scales_that_it_must_not_have_is_refused(
    installed, tokens, n, k, tile, words, monkeypatch
):
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "NUM_KSPLIT")
    asked = []

    def table(*sizes):
        asked.append(sizes)
        return dict(zip(names, tile, strict=True)), True

    monkeypatch.setattr(aiter_fakes, "_get_config", table)
    answer = aiter.judge(GEMM, scaled(tokens, n, k), Level.FINITE)
    if installed == "old":
        assert not answer
        return
    assert set(asked) == {(tokens, n, k // 2, False)}
    assert bool(answer) == (words is None)
    assert answer or answer.why.startswith(words)


def test_steps_of_k_are_judged_as_aiter_will_take_them(installed, monkeypatch):
    tile = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 256, "NUM_KSPLIT": 4}
    monkeypatch.setattr(aiter_fakes, "_get_config", lambda *sizes: (tile, True))
    monkeypatch.setattr(aiter_fakes, "get_splitk", lambda half, depth, parts: (half, depth // 2, parts))
    if installed == "new":
        assert aiter.judge(GEMM, scaled(), Level.FINITE).why.startswith("K: got 512 with AITER's tile of 128")
        # One step takes all of it: there is one part, which AITER does not cut.
        assert aiter.judge(GEMM, scaled(k=256), Level.FINITE)


def test_a_table_of_tiles_that_fails_is_a_reason(installed, monkeypatch):
    def table(*sizes):
        raise KeyError("any")

    monkeypatch.setattr(aiter_fakes, "_get_config", table)
    answer = aiter.judge(GEMM, shuffled(), Level.FINITE)
    assert not answer
    if installed == "new":
        assert answer.why.startswith("layout: got 'shuffled', and AITER's table of tiles failed with KeyError: 'any'; ")
    assert aiter.judge(GEMM, product(), Level.FINITE)


def test_a_shuffled_weight_needs_a_release_whose_product_of_one_was_read():
    for call, name in ((shuffled(), "gemm_afp4wfp4_preshuffle"), (scaled(), "gemm_afp4wfp4_preshuffled_scales")):
        assert choose(GEMM, call) == (name, accepts(GEMM, call))
        assert not accepts(GEMM, call, level=Level.EXACT)
        answer = accepts(GEMM, call, "old")
        assert answer == Verdict(False, f"{name} of this release ('old') was never read; no setting admits it")
    assert accepts(GEMM, product(), "old")
    answer = accepts(ROPE, decoded(), "old", level=Level.FAST)
    assert not answer
    assert (
        "; nor by fused_qk_rope_concat_and_cache_mla: fused_qk_rope_concat_and_cache_mla of this release" in answer.why
    )


# Who is chosen.


def test_aiter_is_chosen_where_it_is_exact(installed):
    assert providers.select(ROPE, "cuda") == providers.select(CONCAT, "cuda") == "aiter"
    assert providers.select(ROPE, "cpu") == "reference"
    for op in (QUANT, NORM, ACT, GEMM, "mxfp4_gemm_a16w4.default", "fused_rope_mla_kv_cache.with_k"):
        assert providers.select(op, "cuda") == "triton"
    for name in ("aiter", "aiter_finite", "aiter_fast"):
        assert providers.implementation(name, ROPE) is aiter.ADAPTERS[name][ROPE]
    assert len({id(adapters[ROPE]) for adapters in aiter.ADAPTERS.values()}) == 3
    assert [name for name in PROVIDER_CHOICES if providers.is_rule(name)] == list(_aiter_numerics.LEVELS)
    assert list(_aiter_numerics.LEVELS) == ["aiter", *providers.BY_NAME]
    for name, op in itertools.product(_aiter_numerics.LEVELS, FUNCTIONS):
        if _aiter_numerics.serves(op, level=_aiter_numerics.LEVELS[name]):
            assert providers.rule(op, name).startswith(f"each call of {op} is run by AITER if its metadata agree (")
            assert providers.rule(op, name).endswith("), else by Triton")


def test_a_rule_in_words_has_what_is_asked_under_a_name_alone():
    assert "norm rounded nowhere" in providers.rule(NORM, "aiter_finite")
    assert "norm rounded nowhere" not in providers.rule(NORM, "aiter_fast")
    assert "some rows, rows evenly apart" in providers.rule(NORM, "aiter_fast")
    assert "hip" not in providers.rule(ROPE, "aiter")
    assert "hip" not in providers.rule(ROPE, "aiter_finite")
    words = providers.rule(ROPE, "aiter_fast")
    assert words.index("powers of two") < words.index(") or (hip architecture, ")
    assert "angles rounded alike" not in words


def test_what_was_promised_is_chosen_by_name(installed):
    with pytest.raises(ProviderUnavailable, match=r"finite inputs only.*loses a NaN.*'aiter_finite' admits it"):
        providers.select(QUANT, "cuda", "aiter")
    for name in ("aiter_finite", "aiter_fast"):
        if installed == "new":
            assert providers.select(QUANT, "cuda", name) == name
        else:
            with pytest.raises(ProviderUnavailable, match=r"away from zero.*no setting admits it"):
                providers.select(QUANT, "cuda", name)


def test_a_name_that_cannot_serve_raises_with_the_whole_reason(installed, monkeypatch):
    with pytest.raises(ProviderUnavailable, match=r"'aiter' was asked for .*with_k and cannot serve: AITER writes the"):
        providers.select("fused_rope_mla_kv_cache.with_k", "cuda", "aiter")
    with pytest.raises(ProviderUnavailable, match="GPU tensors"):
        providers.select(ROPE, "cpu", "aiter")
    monkeypatch.setattr(providers, "probe_aiter_kernel", probes.probe_aiter_kernel)
    providers.select.cache_clear()
    with pytest.raises(ProviderUnavailable, match=r"not built for ROCm \(HIP\), which AITER needs"):
        providers.select(ROPE, "cuda", "aiter")


def test_a_failed_import_is_said_and_the_next_provider_taken(installed, monkeypatch, caplog):
    def load(capability):
        raise ProviderUnavailable("RuntimeError: ROCm version file not found")

    monkeypatch.setattr(_aiter_import, "load", load)
    assert providers.select(ROPE, "cuda") == "triton"
    assert "ROCm version file not found" in caplog.text
    with pytest.raises(ProviderUnavailable, match="ROCm version file not found"):
        providers.select(ROPE, "cuda", "aiter")


@pytest.mark.parametrize("name", ["aiter", "aiter_finite", "aiter_fast"])
def test_a_backend_that_asks_for_aiter_raises_with_the_reason(name):
    with pytest.raises(
        ProviderUnavailable, match=rf"provider '{name}' was asked for and can run no op here: "
    ) as raised:
        fp.fusion_backend(provider=name)
    for missing in ("is not built for ROCm", "AITER is not installed", "use provider='auto'"):
        assert missing in str(raised.value)
    assert str(raised.value).count("is not built for ROCm") == 1


@pytest.mark.parametrize("name", ["auto", "triton", "reference"])
def test_a_backend_that_asks_for_what_is_here_raises_nothing(name):
    fp.fusion_backend(provider=name)


def test_a_backend_that_asks_for_aiter_where_it_is_raises_nothing(installed):
    for name in ("aiter", "aiter_finite", "aiter_fast"):
        fp.fusion_backend(provider=name)


# What AITER itself says.


GOLDEN = pathlib.Path(__file__).parent / "golden" / "aiter"


@pytest.mark.parametrize(("prefix", "style"), [("neox_", "neox"), ("gptj_", "interleaved")])
def test_golden_rope_and_cache(prefix, style):
    """In float32, whose products AITER's interpreted kernel does not contract. README.md describes the arrays."""
    data = np.load(GOLDEN / "golden_aiter_rope_cat_mla.npz")
    given = {
        name: aiter_cases.numbers(data[prefix + name])
        for name in ("q_nope", "q_pe", "k_nope", "k_pe", "pos", "cos", "sin", "slots", "k_scale", "q_out", "k_pe_out")
    }
    kept = aiter_cases.numbers(data[prefix + "kv_cache_bf16"])
    cache = torch.full((16, 48), -7.0)
    q, k = OPS["fused_rope_mla_kv_cache.absorbed_with_k"].reference(
        given["q_nope"],
        given["q_pe"],
        given["k_pe"],
        given["k_nope"].squeeze(1),
        cache,
        given["cos"],
        given["sin"],
        given["slots"],
        style=style,
        negative_slots="skip",
        positions=given["pos"],
    )
    assert aiter_cases.same_bytes(q, given["q_out"])
    # AITER leaves k of a token without a slot as it was: why it never runs the ops that return k.
    written = given["slots"] >= 0
    assert aiter_cases.same_bytes(k[written], given["k_pe_out"][written])
    assert bool((given["k_pe_out"][~written] == 55).all())
    rows = cache[given["slots"][written]] * (1 / given["k_scale"])
    assert aiter_cases.same_bytes(rows.bfloat16(), kept.squeeze(1)[given["slots"][written]])
    untouched = torch.ones(16, dtype=torch.bool)
    untouched[given["slots"][written]] = False
    assert bool((kept[untouched] == -7).all())


GROUPS = [*aiter_cases.GROUPS, *aiter_cases.FAST, "golden", "refused"]


PRODUCTS = ("gemm", "shuffled", "shuffled_scales")


def checked(tally, group):
    """The tally of AITER's own kernels is as the contract says."""
    assert tally.failures == []
    if group != "refused" and tally.refused:
        assert tally.refused == tally.cases or group == "golden"
        pytest.skip("this AITER is of a release that rounds otherwise, and is refused")
    exact = {"quant", "rope", "concat", "golden"}
    assert tally.cases == (tally.refused if group == "refused" else tally.equal + tally.within) > 0
    assert tally.within == 0 or group not in exact
    # Nearly all of the bytes of the other quants are decided.
    assert tally.decided > 0.95 or group in (*PRODUCTS, "fast_rope", "hip")
    assert tally.other < 0.1
    assert tally.other > 0 or group not in ("fast_rms", "fast_act")


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "hip"])
def test_kernels_of_aiter_in_the_interpreter(group):
    source = os.environ.get("AITER_SOURCE", "")
    if not pathlib.Path(source, "aiter", "ops", "triton").is_dir():
        pytest.skip(f"AITER_SOURCE={source!r} names no checkout of ROCm/aiter")
    pytest.importorskip("triton")
    tally = aiter_check.run(pathlib.Path(source), group, ["--interpret"], 600)
    checked(aiter_cases.Tally(**tally), group)


def rocm():
    """Why AITER cannot be asked on this machine, or ""."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return "no AMD GPU"
    return ""


@pytest.mark.rocm
@pytest.mark.skipif(bool(rocm()), reason=rocm() or "-")
@pytest.mark.parametrize("group", GROUPS)
def test_kernels_of_aiter_on_a_gpu(group):
    name = aiter.arch.of(torch.device("cuda", torch.cuda.current_device())).name
    if group in PRODUCTS and name != "gfx950":
        pytest.skip(f"{name}: AITER's FP4 product is for gfx950")
    if group == "hip" and name not in ("gfx942", "gfx950"):
        pytest.skip(f"{name}: AITER's HIP kernels were read for gfx942 and gfx950")
    if group in ("rope", "fast_rope") and not aiter._keeps_zeros():
        pytest.skip("this Triton compiles -x as 0 - x, so turned pairs of zeros differ in sign")
    # In float32, a product of a rotation may be part of an FMA.
    machine = aiter_cases.Machine("cuda", rounds=group not in ("fast_rope", "hip"))
    checked(aiter_cases.run(group, machine), group)


@pytest.mark.rocm
@pytest.mark.skipif(bool(rocm()), reason=rocm() or "-")
def test_a_model_is_given_to_aiter():
    for op in (ROPE, CONCAT):
        assert providers.select(op, "cuda") == "aiter"
    assert providers.select(QUANT, "cuda", "aiter_finite") == "aiter_finite"
