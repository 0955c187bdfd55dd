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
from fusionpasses.config import PROVIDER_CHOICES
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.ops import _mxfp4
from fusionpasses.ops._op import OPS
from fusionpasses.probes import Verdict
from fusionpasses.providers import _aiter_import, _aiter_rules, aiter, triton

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


def summed(**changed):
    x = changed.get("x", empty(4, 64))
    return {"residual": torch.empty_like(x), **norm(**{"x": x, **changed})}


GFX1250 = _aiter_rules.Target("gfx1250", True)
QUANT, NORM, NORM_AND = "dynamic_mxfp4_quant.default", "rmsnorm_mxfp4_quant.default", "rmsnorm_mxfp4_quant.with_norm"
ADD, ADD_AND = "rmsnorm_add_mxfp4_quant.default", "rmsnorm_add_mxfp4_quant.with_norm"
ACT, ROPE, CONCAT = "silu_mul_mxfp4_quant.default", "fused_rope_mla_kv_cache.absorbed", "concat_and_cache_mla.default"
GEMM = "mxfp4_gemm.default"

#: Op, a call that is accepted, its twin that is not, the rule that refuses, words of the reason; target of the twin.
REFUSED = [
    (
        QUANT,
        {"x": empty(4, 64), "scale_mode": "even"},
        {"x": empty(4, 64), "scale_mode": "rceil"},
        "_even_scales",
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
    (NORM, norm(), norm(scale_mode="floor"), "_even_scales", "'floor'"),
    (NORM, norm(x=empty(1, 2**20)), norm(x=empty(1, 2**20 + 32)), "_row_fits", "rows of 1048608"),
    (NORM, norm(), norm(weight=None), "_a_weight", "None"),
    (NORM, norm(), norm(), "_own_kernel_only_on_gfx1250", "Gluon", GFX1250),
    (NORM, norm(), norm(cast_order="cast_scale"), "_norm_rounded_nowhere", "before the weight"),
    (NORM, norm(x=empty(4, 64), norm_dtype=None), norm(norm_dtype=None), "_norm_rounded_nowhere", "unrounded"),
    (NORM, norm(), norm(x=empty(0, 64, dtype=BF16)), "some_rows", "no rows"),
    (NORM, norm(), norm(x=strided((2, 3, 64), (999, 64, 1))), "rows_evenly_apart", "evenly apart"),
    (NORM, norm(), norm(x=strided((4, 64), (1, 4), BF16)), "elements_of_a_row_together", "last stride of 1"),
    (NORM, norm(), norm(weight=strided((64,), (2,), BF16)), "elements_of_a_row_together", "weight"),
    (NORM, norm(x=empty(2**21 - 1, 1024)), norm(x=empty(2**21, 1024)), "offsets_in_32_bits", "32 bits"),
    (
        NORM_AND,
        norm(x=empty(4, 64)),
        norm(),
        "_norm_in_its_dtype",
        "dtype of x",
    ),
    (ADD, summed(), summed(x=empty(4, 64, dtype=BF16)), "_sum_rounded_nowhere", "rounded sum"),
    (ADD, summed(), summed(residual=strided((4, 64), (1, 4))), "elements_of_a_row_together", "residual"),
    (ADD_AND, summed(), summed(weight=None), "_a_weight", "None"),
    (ACT, gated(), gated(scale_mode="ceil"), "_even_scales", "'ceil'"),
    (ACT, gated(), gated(activation="gelu_tanh"), "_silu", "gelu_tanh"),
    (ACT, gated(), gated(activation="x_sigmoid"), "_silu", "x_sigmoid"),
    (ACT, gated(), gated(cast_order="cast_mul"), "_product_rounded_nowhere", "rounds the activation"),
    (ACT, gated(empty(4, 128), cast_order="cast_mul"), gated(act_dtype=None), "_product_rounded_nowhere", "unrounded"),
    (ACT, gated(), gated(empty(0, 128, dtype=BF16)), "some_rows", "no rows"),
    (ACT, gated(), gated(strided((2, 3, 128), (999, 128, 1), BF16)), "rows_evenly_apart", "evenly apart"),
    (ACT, gated(), gated(up=empty(4, 64, dtype=BF16)), "_halves_of_one_tensor", "two tensors"),
    (ROPE, rotated(), rotated(style="interleaved_to_neox"), "_style_of_aiter", "reads them"),
    (ROPE, rotated(), rotated(negative_slots="wrap"), "_negative_slots_skipped", "'wrap'"),
    (ROPE, rotated(), rotated(cos=empty(5, 8), sin=empty(5, 8)), "_angles_rounded_alike", "float32"),
    (ROPE, rotated(), rotated(), "_zeros_keep_their_sign", "0 - x", _aiter_rules.Target("gfx950", False)),
    (ROPE, rotated(), rotated(sin=strided((5, 8), (16, 1), BF16)), "_cos_and_sin_alike", "those of cos"),
    (ROPE, rotated(), rotated(q_nope=empty(5, 3, 64, dtype=BF16)), "_q_nope_as_wide_as_kv_c", "width 64"),
    (ROPE, rotated(), rotated(q_nope=empty(5, 0, 32, dtype=BF16)), "some_rows", "no rows"),
    (ROPE, rotated(), rotated(q_pe=strided((5, 3, 16), (2**29, 16, 1), BF16)), "offsets_in_32_bits", "32 bits"),
    (ROPE, rotated(), rotated(), "_own_kernel_only_on_gfx1250", "Gluon", GFX1250),
    (CONCAT, cached(), cached(dtype=FP16, kv_cache=empty(12, 48, dtype=BF16)), "_bfloat16_rows", "float16"),
    (CONCAT, cached(), cached(kv_cache=empty(12, 48, dtype=torch.float8_e4m3fn)), "_bfloat16_cache", "saturate"),
    (CONCAT, cached(), cached(kv_cache=empty(12, 48, dtype=torch.uint8)), "_bfloat16_cache", "NVFP4"),
    (CONCAT, cached(), cached(pe_cache=empty(12, 16, dtype=BF16)), "_one_cache", "one cache"),
    (CONCAT, cached(), cached(kv_cache=strided((3, 4, 48), (999, 48, 1), BF16)), "_slots_evenly_apart", "evenly apart"),
    (CONCAT, cached(), cached(latent=48), "_powers_of_two", "widths 48 and 16"),
    (CONCAT, cached(), cached(tokens=0), "some_rows", "no rows"),
    (GEMM, product(), product(), "_fp4_arithmetic", "gfx942", _aiter_rules.Target("gfx942", True)),
    (GEMM, product(), product(bias=empty(32)), "_no_bias", "bias"),
    (GEMM, product(), product(layout="tiles"), "_layout_of_aiter", "'tiles'"),
    (GEMM, product(out_dtype=FP16), product(out_dtype=FP32), "_sixteen_bits_out", "float32"),
    (GEMM, product(k=512), product(k=320), "_width_in_256", "K: got 320"),
    (GEMM, product(), product(tokens=0), "some_rows", "no rows"),
    (GEMM, product(), product(n=0), "_some_weight", "no rows"),
    (
        GEMM,
        product(),
        product(x_codes=strided((5, 128), (256, 1), torch.uint8)),
        "_contiguous_codes",
        "positive ones",
    ),
    (GEMM, product(tokens=256, n=2**17), product(tokens=256, n=2**18), "_partial_sums_in_32_bits", "32 bits"),
    (GEMM, shuffled(tokens=256, n=2**17), shuffled(tokens=256, n=2**18), "_partial_sums_in_32_bits", "32 bits"),
    (GEMM, shuffled(), shuffled(bias=empty(64)), "_no_bias", "bias"),
    (GEMM, shuffled(), shuffled(tokens=0), "some_rows", "no rows"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[f"{c[0]}-{c[3]}-{i}" for i, c in enumerate(REFUSED)])
def test_a_call_is_refused_by_its_rule_and_its_twin_is_accepted(case):
    op, accepted, refused, rule, words, target = (*case, TARGET)[:6]
    answer = _aiter_rules.accepts(op, accepted, "new", TARGET, finite=True)
    assert answer, answer.why
    answer = _aiter_rules.accepts(op, refused, "new", target, finite=True)
    assert not answer
    assert words in answer.why
    reasons = {r.__name__: r(_aiter_rules.Call(refused, target)) for r in _aiter_rules.RULES[op]}
    assert [name for name, reason in reasons.items() if reason] == [rule], reasons


def test_every_rule_has_a_case():
    assert {rule.__name__ for rules in _aiter_rules.RULES.values() for rule in rules} == {case[3] for case in REFUSED}


def test_norms_are_accepted_where_nothing_is_rounded():
    for dtype, wide_weight, order, norm_dtype, mode in itertools.product(
        _mxfp4.INPUT_DTYPES, (False, True), ("cast_scale", "scale_cast"), (None, FP32), _mxfp4.SCALE_ADDEND
    ):
        x = empty(4, 64, dtype=dtype)
        call = norm(x=x, cast_order=order, norm_dtype=norm_dtype, scale_mode=mode)
        call["weight"] = empty(64, dtype=FP32 if wide_weight else dtype)
        unrounded = dtype == FP32 or (order == "scale_cast" and norm_dtype == FP32)
        answer = _aiter_rules.accepts(NORM, call, "new", TARGET, finite=True)
        assert bool(answer) == (unrounded and mode == "even"), answer.why
        answer = _aiter_rules.accepts(ADD, {**call, "residual": x}, "new", TARGET, finite=True)
        assert bool(answer) == (dtype == FP32 and mode == "even"), answer.why


def test_gated_activations_are_accepted_where_nothing_is_rounded():
    from fusionpasses.ops.silu_mul_mxfp4_quant import contracts

    for dtype, (activation, order), act_dtype in itertools.product(_mxfp4.INPUT_DTYPES, contracts(), (None, FP32)):
        call = gated(empty(4, 128, dtype=dtype), activation=activation, cast_order=order, act_dtype=act_dtype)
        answer = _aiter_rules.accepts(ACT, call, "new", TARGET, finite=True)
        unrounded = dtype == FP32 or (order == "mul_cast" and act_dtype == FP32)
        assert bool(answer) == (unrounded and activation == "silu"), answer.why


def test_what_quantises_needs_the_promise_and_a_new_release():
    quantising = {QUANT, NORM, NORM_AND, ADD, ADD_AND, ACT}
    for op in _aiter_numerics.CAPABILITY:
        exact, promised = _aiter_numerics.serves(op, "new"), _aiter_numerics.serves(op, "new", finite=True)
        assert promised
        assert bool(exact) == (op in (ROPE, CONCAT)), op
        if not exact:
            assert "provider='aiter_finite'" in exact.why
        old = _aiter_numerics.serves(op, "old", finite=True)
        assert bool(old) == (op not in quantising)
        if not old:
            assert "away from zero" in old.why
    assert not _aiter_numerics.serves(QUANT, "newer")
    for op, why in _aiter_numerics.NEVER.items():
        assert _aiter_numerics.serves(op) == Verdict(False, why)
    assert _aiter_numerics.CAPABILITY.keys() | _aiter_numerics.NEVER.keys() == OPS.keys()
    assert _aiter_rules.RULES.keys() == aiter.ADAPTERS.keys() == _aiter_numerics.CAPABILITY.keys()


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
        answer = aiter.judge(op, arguments, finite=True)
        assert bool(answer) == (group in ("rope", "concat", "gemm"))
        if group == "shuffled":
            assert answer.why == "AITER's gemm_afp4wfp4_preshuffle is not here"
            continue
        if "norm" in op and op.endswith("with_norm"):
            continue  # old releases do not return it
        function, _ = _aiter_import.load(_aiter_numerics.CAPABILITY[op])
        before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        aiter_cases.compare(op, aiter._RUN[op](function, "old", arguments), args, before, kwargs)


def test_slots_and_positions_out_of_range_do_not_reach_aiter(installed):
    """Its kernel would write and read there; for our Triton kernel on an AMD GPU such tokens are skipped, too."""
    op, args, kwargs = next(case for case in aiter_cases.rope(CPU) if case[2]["positions"] is not None)
    args = list(args)
    args[7] = torch.tensor([7, -1, 99, 11, 3])
    before = args[4].clone()
    aiter.ADAPTERS[op](*args, **kwargs)  # the fake looks
    assert not torch.equal(args[4], before)


def test_a_write_is_told_to_autograd_once_and_of_the_cache_alone(installed):
    _, args, _ = next(iter(aiter_cases.concat(CPU)))
    versions = [arg._version for arg in args]
    aiter.ADAPTERS[CONCAT](*args)
    assert args[2]._version == versions[2] + 1
    assert [a._version for i, a in enumerate(args) if i != 2] == [v for i, v in enumerate(versions) if i != 2]


def test_a_refused_call_is_run_by_triton(installed, monkeypatch):
    seen = []
    for op in aiter.ADAPTERS:
        monkeypatch.setitem(triton.ADAPTERS, op, lambda *args, op=op, **kwargs: seen.append((op, args, kwargs)))
    x = torch.randn(4, 64)
    aiter.ADAPTERS[QUANT](x)
    aiter.FINITE_ADAPTERS[QUANT](x[:0])
    aiter.FINITE_ADAPTERS[NORM](x.bfloat16(), torch.ones(64), 1e-6, cast_order="cast_scale")
    assert [op for op, _, _ in seen] == [QUANT, QUANT, NORM]
    assert seen[2][2] == {"cast_order": "cast_scale"}


def test_partial_sums_in_bfloat16_are_refused(installed, monkeypatch):
    monkeypatch.setattr(aiter_fakes, "_USE_GEMM_SPLITK_BF16", True, raising=False)
    answer = aiter.judge(GEMM, product(), finite=True)
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
    answer = aiter.judge(GEMM, shuffled(tokens, n, k), finite=True)
    if installed == "old":
        assert not answer
        return
    assert asked == [(tokens, n, k // 2, True)]
    assert bool(answer) == (words is None)
    assert answer or answer.why.startswith(words)


def test_a_table_of_tiles_that_fails_is_a_reason(installed, monkeypatch):
    def table(*sizes):
        raise KeyError("any")

    monkeypatch.setattr(aiter_fakes, "_get_config", table)
    answer = aiter.judge(GEMM, shuffled(), finite=True)
    assert not answer
    if installed == "new":
        assert answer.why == "layout: got 'shuffled', and AITER's table of tiles failed with KeyError: 'any'"
    assert aiter.judge(GEMM, product(), finite=True)


def test_a_shuffled_weight_needs_a_release_whose_product_of_one_was_read():
    assert _aiter_rules.accepts(GEMM, shuffled(), "new", TARGET, finite=True)
    assert not _aiter_rules.accepts(GEMM, shuffled(), "new", TARGET)
    answer = _aiter_rules.accepts(GEMM, shuffled(), "old", TARGET, finite=True)
    assert answer == Verdict(False, "gemm_afp4wfp4_preshuffle of this release ('old') was never read")
    assert _aiter_rules.accepts(GEMM, product(), "old", TARGET, finite=True)


# Who is chosen.


def test_aiter_is_chosen_where_it_is_exact(installed):
    assert providers.select(ROPE, "cuda") == providers.select(CONCAT, "cuda") == "aiter"
    assert providers.select(ROPE, "cpu") == "reference"
    for op in (QUANT, NORM, ACT, GEMM, "mxfp4_gemm_a16w4.default", "fused_rope_mla_kv_cache.with_k"):
        assert providers.select(op, "cuda") == "triton"
    assert providers.implementation("aiter", ROPE) is aiter.ADAPTERS[ROPE]
    assert providers.implementation("aiter_finite", QUANT) is aiter.FINITE_ADAPTERS[QUANT]
    assert [name for name in PROVIDER_CHOICES if providers.is_rule(name)] == ["aiter", "aiter_finite"]
    for op in aiter.ADAPTERS:
        assert providers.rule(op).startswith(f"each call of {op} is run by AITER if its metadata agree (")
        assert providers.rule(op).endswith("), else by Triton")


def test_what_was_promised_is_chosen_by_name(installed):
    with pytest.raises(ProviderUnavailable, match=r"finite inputs only.*loses a NaN.*'aiter_finite' admits it"):
        providers.select(QUANT, "cuda", "aiter")
    if installed == "new":
        assert providers.select(QUANT, "cuda", "aiter_finite") == "aiter_finite"
    else:
        with pytest.raises(ProviderUnavailable, match="away from zero"):
            providers.select(QUANT, "cuda", "aiter_finite")


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


def test_a_backend_that_asks_for_aiter_raises_with_the_reason():
    model = fp.quantize_mxfp4(torch.nn.Sequential(torch.nn.RMSNorm(64), torch.nn.Linear(64, 64)))
    with torch.no_grad(), pytest.raises(Exception, match=r"provider 'aiter' was asked for rmsnorm_mxfp4_quant"):
        torch.compile(model, backend=fp.fusion_backend(provider="aiter"))(torch.randn(4, 64))


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


GROUPS = [*aiter_cases.GROUPS, "golden", "refused"]


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
    assert tally.decided > 0.95 or group in ("gemm", "shuffled")


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_of_aiter_in_the_interpreter(group):
    source = os.environ.get("AITER_SOURCE", "")
    if not pathlib.Path(source, "aiter", "ops", "triton").is_dir():
        pytest.skip(f"AITER_SOURCE={source!r} names no checkout of ROCm/aiter")
    pytest.importorskip("triton")
    tally = aiter_check.run(pathlib.Path(source), group, interpret=True, seconds=600)
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
    if group in ("gemm", "shuffled") and name != "gfx950":
        pytest.skip(f"{name}: AITER's FP4 product is for gfx950")
    if group == "rope" and not aiter._keeps_zeros():
        pytest.skip("this Triton compiles -x as 0 - x, so turned pairs of zeros differ in sign")
    checked(aiter_cases.run(group, aiter_cases.Machine("cuda")), group)


@pytest.mark.rocm
@pytest.mark.skipif(bool(rocm()), reason=rocm() or "-")
def test_a_model_is_given_to_aiter():
    for op in (ROPE, CONCAT):
        assert providers.select(op, "cuda") == "aiter"
    assert providers.select(QUANT, "cuda", "aiter_finite") == "aiter_finite"
