"""The pass, site by site: which variant, which refusal, which note. Each case that fires has a twin that must not."""

import pytest
import torch

import fusionpasses as fp
from fusionpasses import OpCountMismatch, anchors
from fusionpasses.report import FUSED, NOTHING, REFUSED
from fusionpasses.testing import assert_equivalent, assert_fused, capture, count_ops

quant = torch.ops.fusionpasses.dynamic_mxfp4_quant


def norm(x, w, eps=1e-6):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def bf16(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def run(model, *inputs, **options):
    """The sites of a model that was proven equivalent."""
    with torch.no_grad():
        return assert_equivalent(model, inputs, **options)


def ops(result):
    return [(s.status, s.op) for s in result.report.sites()]


# --- which variant ---------------------------------------------------------------------------------------------------


def test_three_quants_of_one_norm_are_one_op():
    result = run(lambda x, w: [t for _ in range(3) for t in quant(norm(x, w))], bf16(4, 64), bf16(64))
    # Written three times, the norm is computed three times: there is no common-subexpression elimination here.
    assert [op for _, op in ops(result)] == ["rmsnorm_mxfp4_quant.default"] * 3

    def shared(x, w):
        y = norm(x, w)
        return [t for _ in range(3) for t in quant(y)]

    result = run(shared, bf16(4, 64), bf16(64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]
    assert len(result.report.fused[0].anchors) == 3


def test_two_scale_modes_on_one_norm():
    def model(x, w):
        y = norm(x, w)
        return *quant(y, "even"), *quant(y, "rceil")

    result = run(model, bf16(4, 64), bf16(64))
    assert sorted(ops(result)) == [
        (FUSED, "rmsnorm_mxfp4_quant.with_norm"),
        (REFUSED, "dynamic_mxfp4_quant.default"),
    ]
    assert "one scale mode" in result.report.refused[0].reason


@pytest.mark.parametrize("swap", [False, True])
def test_residual_add_in_either_order_with_the_sum_used_later(swap):
    def model(x, r, w, m):
        s = r + x if swap else x + r
        y = norm(s, w)
        early = s * 3  # reads the sum before the norm in the graph
        return *quant(y), s, early, y @ m

    result = run(model, bf16(2, 3, 64), bf16(2, 3, 64), bf16(64), bf16(64, 8))
    assert ops(result) == [(FUSED, "rmsnorm_add_mxfp4_quant.with_norm")]
    after = result.graphs[0].after
    assert "aten.add" not in {k for k in count_ops(after) if k == "aten.add"}


def test_a_reader_of_the_sum_that_stands_before_the_norm():
    """Training graphs keep the author's order: the reader must move behind the op that now makes the sum."""

    def model(x, r, w, p):
        s = x + r
        early = (s * p).sum()
        return early, *quant(norm(s, w))

    p = torch.randn(64, requires_grad=True)
    result = capture(model, (bf16(4, 64), bf16(4, 64), bf16(64), p), backward=lambda out: out[0])
    assert ops(result) == [(FUSED, "rmsnorm_add_mxfp4_quant.default")]
    assert result.comparison.unequal == 0
    before = [str(n.target) for n in result.graphs[0].before.graph.nodes]
    assert before.index("aten.sum.default") < before.index("aten.rsqrt.default")
    assert p.grad is not None


def test_chain_of_residual_blocks():
    """Each norm's sum is the next one's residual: rewritten last to first, they must not lose each other."""

    def model(x, w):
        for _ in range(4):
            codes, scales = quant(norm(x, w))
            x = x + codes.sum(-1, keepdim=True).to(x.dtype) + scales.sum().to(x.dtype)
        return quant(norm(x, w)), x

    result = run(model, bf16(4, 64), bf16(64))
    assert len(result.report.fused) == 5


def test_norm_saved_for_backward_is_returned():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(64, dtype=torch.bfloat16))
            self.linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)

        def forward(self, x):
            y = norm(x, self.weight)
            with torch.no_grad():
                codes, scales = quant(y.detach())
            return self.linear(y).float().sum(), codes, scales

    model = Model()
    result = capture(model, (bf16(4, 64),), backward=lambda out: out[0])
    assert [g.report.kind for g in result.graphs] == ["forward", "backward"]
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.with_norm")]
    assert "other readers" in result.report.fused[0].notes[0]  # the backward reads rsqrt, too
    assert result.comparison.unequal == 0
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g.abs().sum() > 0 for g in grads.values())


def test_gradients_of_a_training_model_are_those_of_eager():
    torch.manual_seed(0)
    weight = torch.rand(64, requires_grad=True)
    x = torch.randn(4, 64)

    def model(x, weight):
        y = norm(x, weight)
        with torch.no_grad():
            codes, _ = quant(y.detach())
        return (y * y).sum(), codes

    expected, codes = model(x, weight)
    (gradient,) = torch.autograd.grad(expected, weight)
    result = capture(model, (x, weight), backward=lambda out: out[0])
    assert result.report.fused
    assert torch.equal(result.output[1], codes)
    torch.testing.assert_close(weight.grad, gradient)


def test_internals_with_readers_are_kept_and_noted():
    def model(x, w):
        h = x.float()
        r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return *quant(w * (h * r).to(x.dtype)), r

    site = run(model, bf16(4, 64), bf16(64)).report.fused[0]
    assert len(site.notes) == 1
    assert site.notes[0].startswith("rsqrt inside the norm has other readers")


# --- the better variant refused: a note ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (lambda x, r: torch.add(x, r, alpha=3), "alpha=3"),
        (lambda x, r: x + r[:1], "broadcast"),
        (lambda x, r: x + r[..., :1], "broadcast"),
        (lambda x, r: x.float() + r, "torch.float32"),
    ],
    ids=["alpha", "broadcast rows", "broadcast columns", "mixed dtypes"],
)
def test_an_add_that_is_no_plain_residual_stays_outside_with_a_note(add, words):
    def model(x, r, w):
        s = add(x, r)
        return *quant(norm(s, w)), s

    w = torch.randn(64) if "float32" in words else bf16(64)
    result = run(model, bf16(4, 64), bf16(4, 64), w)
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]
    (note,) = result.report.fused[0].notes
    assert note.startswith("the residual add was left outside:")
    assert words in note


def test_a_number_added_is_no_residual():
    result = run(lambda x, w: quant(norm(x + 1.0, w)), bf16(4, 64), bf16(64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]
    assert result.report.fused[0].notes == ()


def test_a_weight_computed_from_the_sum_leaves_the_add_outside():
    def model(x, r):
        s = x + r
        w = s[0] * 2.0
        return *quant(norm(s, w)), s

    result = run(model, bf16(4, 64), bf16(4, 64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]
    assert "the weight is computed from the sum" in result.report.fused[0].notes[0]


def test_two_sums_whose_weights_depend_on_each_other():
    """Taking both adds in would make a cycle: the one that is judged second stays outside."""

    def swapped(a, b, c, d):
        s1, s2 = a + b, c + d
        return *quant(norm(s1, s2.mean(0))), *quant(norm(s2, s1.mean(0)))

    def crossed(a, b, c, d):
        second = a + b
        n = second.mean(0)
        first = c + d
        return *quant(norm(first, n)), *quant(norm(second, first.mean(0)))

    for model in (swapped, crossed):
        result = run(model, *(bf16(4, 64) for _ in range(4)))
        assert sorted(op for _, op in ops(result)) == ["rmsnorm_add_mxfp4_quant.default", "rmsnorm_mxfp4_quant.default"]
        assert [n for s in result.report.fused for n in s.notes] == [
            "the residual add was left outside: the weight is computed from the sum"
        ]


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (lambda s: s.view(-1, 64), "aten.reshape.default stands between it and the norm"),
        (lambda s: s.transpose(0, 1), "aten.permute.default stands between it and the norm"),
    ],
)
def test_an_add_behind_a_view_stays_outside_with_a_note(between, words):
    def model(x, r, w):
        s = x + r
        return *quant(norm(between(s), w)), s

    result = run(model, bf16(2, 4, 64), bf16(2, 4, 64), bf16(64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]
    assert result.report.fused[0].notes == (f"the residual add was left outside: {words}",)


@pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10 puts the norm before the draws itself")
def test_random_numbers_are_drawn_in_the_same_order():
    """What reads the sum moves behind the fused op, and so past what draws from the same seed."""

    def between(x, r, w):
        s = x + r
        drawn = torch.multinomial(s.float().softmax(-1), 2), torch.multinomial(x.float().softmax(-1), 3)
        return *quant(norm(s, w)), *drawn

    result = run(between, bf16(4, 64), bf16(4, 64), bf16(64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]
    assert result.report.fused[0].notes == (
        "the residual add was left outside: aten.multinomial.default draws random numbers between the add and the norm",
    )

    def outside(x, r, w):
        before = torch.multinomial(x.float().softmax(-1), 3)
        s = x + r
        return *quant(norm(s, w)), before, torch.multinomial(s.float().softmax(-1), 2)

    assert ops(run(outside, bf16(4, 64), bf16(4, 64), bf16(64))) == [(FUSED, "rmsnorm_add_mxfp4_quant.default")]


def test_a_random_number_between_a_norm_and_its_quant_is_no_reason():
    def model(x, w):
        n = norm(x, w)
        return torch.multinomial(x.float().softmax(-1), 2), *quant(n)

    assert ops(run(model, bf16(4, 64), bf16(64))) == [(FUSED, "rmsnorm_mxfp4_quant.default")]


def test_a_weight_computed_after_the_sum_takes_the_add_in():
    def model(x, r, w):
        s = x + r
        return *quant(norm(s, 1.0 + w)), s

    result = run(model, bf16(4, 64), bf16(4, 64), bf16(64))
    assert ops(result) == [(FUSED, "rmsnorm_add_mxfp4_quant.default")]


def test_a_transposed_sum_stays_outside_and_a_transposed_norm_is_refused_only_for_other_readers():
    def model(x, r, w):
        s = x.transpose(0, 1) + r.transpose(0, 1)
        return *quant(norm(s, w)), s

    result = run(model, bf16(3, 4, 64), bf16(3, 4, 64), bf16(64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]
    assert "strides" in result.report.fused[0].notes[0]

    def read_elsewhere(x, r, w):
        y = norm(x.transpose(0, 1) + r.transpose(0, 1), w)
        return *quant(y), y

    result = run(read_elsewhere, bf16(3, 4, 64), bf16(3, 4, 64), bf16(64))
    assert [s.status for s in result.report.sites()] == [REFUSED]
    assert "strides" in result.report.refused[0].reason


# --- what surrounds the site -----------------------------------------------------------------------------------------


def test_written_inputs_keep_their_order():
    """x is written in place after the norm read it; the graph is functional, and the fused op must not read late."""

    def model(x, w):
        y = norm(x, w)
        x.mul_(2)
        codes, scales = quant(y)
        return codes, scales, norm(x, w)

    result = run(model, bf16(4, 64), bf16(64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]


def test_a_write_between_norm_and_quant_is_refused():
    """Such a graph does not come out of AOTAutograd today; the guard holds if one ever does."""
    graph = torch.fx.Graph()
    aten = torch.ops.aten
    with torch._subclasses.FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(4, 64))
        weight = mode.from_tensor(torch.randn(64))

    def add(target, *args):
        node = graph.call_function(target, args)
        with mode:
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["val"], w.meta["val"] = fake, weight

    def build(write):
        mean = add(aten.mean.dim, add(aten.pow.Tensor_Scalar, x, 2), [-1], True)
        y = add(aten.mul.Tensor, add(aten.mul.Tensor, x, add(aten.rsqrt.default, add(aten.add.Tensor, mean, 1e-6))), w)
        if write:
            add(aten.mul_.Tensor, x, 2.0)
        return add(quant.default, y)

    graph.output((build(write=False), build(write=True)))
    module = torch.fx.GraphModule({}, graph)
    from fusionpasses.pipeline import Pipeline

    reports = []
    Pipeline(fp.FusionConfig(), anchors.registered_anchors(), record=reports.append)(module.graph)
    assert [s.status for s in reports[0].sites] == [FUSED, REFUSED]
    assert "aten.mul_.Tensor writes to a tensor" in reports[0].sites[1].reason


def test_providers_are_written_into_the_graph():
    def model(x, w):
        return *quant(norm(x, w)), *quant(x)

    result = run(model, bf16(4, 64), bf16(64))
    providers = [n.kwargs.get("provider") for n in result.graphs[0].after.graph.nodes if "mxfp4" in str(n.target)]
    assert providers == ["reference", "reference"]
    assert [s.provider for s in result.report.fused] == ["reference"]


@pytest.mark.parametrize("contiguous", [True, False])
def test_generated_code_hands_the_fused_op_the_strides_the_graph_says(contiguous):
    """Without a stride tag Inductor may hand a transposed buffer to an op that a pass inserted."""

    def model(x, r, w):
        s = (x + r).transpose(0, 1)
        s = s.contiguous() if contiguous else s
        return *quant(norm(s, w)), s

    inputs = bf16(8, 4, 64), bf16(8, 4, 64), bf16(64)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        backend = fp.fusion_backend()
        got = torch.compile(model, backend=backend)(*inputs)
        assert backend.report.counts == {"rmsnorm_mxfp4_quant": 1}
        for g, e in zip(got, model(*inputs), strict=True):
            assert torch.equal(g, e)
            assert g.stride() == e.stride()


# --- other people's quant ops ----------------------------------------------------------------------------------------

library = torch.library.Library("fusionpasses_tests", "DEF")
library.define("their_quant(Tensor x, int group=32, bool swizzle=False) -> (Tensor, Tensor)")
library.define("column_quant(Tensor x) -> (Tensor, Tensor)")
library.define("moded_quant(Tensor x, str rounding) -> (Tensor, Tensor)")
library.define("writes_quant(Tensor x, Tensor(a!) out) -> (Tensor, Tensor)")
library.define("one_result(Tensor x) -> Tensor")
library.impl("their_quant", lambda x, group=32, swizzle=False: quant(x, "rceil"), "CompositeExplicitAutograd")
library.impl("moded_quant", lambda x, rounding: quant(x, rounding), "CompositeExplicitAutograd")


library.define("write_row(Tensor x, Tensor(a!) cache) -> ()")


def _write_row(x, cache):
    cache[0].copy_(x)


library.impl("write_row", _write_row, "CompositeExplicitAutograd")


def _column(x):
    codes, scales = quant(x)
    return codes, scales.t().contiguous().t()


library.impl("column_quant", _column, "CompositeExplicitAutograd")
theirs = torch.ops.fusionpasses_tests


@pytest.fixture
def registry(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr(anchors, "_registered", dict(anchors._registered))


def test_a_foreign_quant_is_fused_once_registered(registry):
    def model(x, r, w):
        s = x + r
        return *theirs.their_quant(norm(s, w)), s

    inputs = bf16(2, 4, 64), bf16(2, 4, 64), bf16(64)
    assert run(model, *inputs).report.sites() == []
    fp.register_anchor(theirs.their_quant, scale_mode="rceil")
    result = run(model, *inputs)
    assert ops(result) == [(FUSED, "rmsnorm_add_mxfp4_quant.default")]
    fused = next(n for n in result.graphs[0].after.graph.nodes if "rmsnorm" in str(n.target))
    assert fused.kwargs["scale_mode"] == "rceil"
    with torch.no_grad():
        assert_fused(model, inputs, {"rmsnorm_add_mxfp4_quant": 1, "fusionpasses_tests.their_quant": 0})


def test_a_foreign_quant_with_other_arguments_is_left_alone(registry):
    fp.register_anchor(theirs.their_quant.default, scale_mode="rceil")
    result = run(lambda x, w: theirs.their_quant(norm(x, w), 32, True), bf16(4, 64), bf16(64))
    assert ops(result) == [(REFUSED, "fusionpasses_tests::their_quant.default")]
    assert "swizzle=True, which its registration does not cover" in result.report.refused[0].reason


def test_a_foreign_quant_whose_scales_lie_otherwise_is_left_alone(registry):
    fp.register_anchor(theirs.column_quant, scale_mode="even")
    result = run(lambda x, w: theirs.column_quant(norm(x, w)), bf16(4, 64), bf16(64))
    assert ops(result) == [(REFUSED, "fusionpasses_tests::column_quant.default")]
    assert "strides [1, 4]" in result.report.refused[0].reason


def test_a_foreign_quant_that_carries_its_mode(registry):
    fp.register_anchor(theirs.moded_quant, scale_mode_argument="rounding")

    def model(x, w):
        y = norm(x, w)
        return *theirs.moded_quant(y, "ceil"), *quant(y, "ceil")

    result = run(model, bf16(4, 64), bf16(64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]  # theirs and ours mean the same: one op
    assert len(result.report.fused[0].anchors) == 2


@pytest.mark.parametrize(
    ("op", "kwargs", "words"),
    [
        (theirs.writes_quant, {"scale_mode": "even"}, "mutates its arguments"),
        (theirs.one_result, {"scale_mode": "even"}, "allowed (Tensor x, ...) -> (Tensor codes, Tensor scales)"),
        (theirs.their_quant, {}, "exactly one of them"),
        (theirs.their_quant, {"scale_mode": "even", "scale_mode_argument": "group"}, "exactly one of them"),
        (theirs.their_quant, {"scale_mode": "up"}, "scale_mode: got 'up'"),
        (theirs.their_quant, {"scale_mode": "even", "layout": "swizzled"}, "layout: got 'swizzled'"),
        (theirs.moded_quant, {"scale_mode_argument": "round"}, "did you mean 'rounding'?"),
        (torch.relu, {"scale_mode": "even"}, "allowed a torch.ops overload"),
        (torch.ops.aten.add, {"scale_mode": "even"}, "allowed an overload; name one"),
    ],
)
def test_what_cannot_be_an_anchor(registry, op, kwargs, words):
    with pytest.raises(fp.BadConfig) as error:
        fp.register_anchor(op, **kwargs)
    assert words in str(error.value)


def test_an_op_has_one_meaning(registry):
    fp.register_anchor(theirs.their_quant, scale_mode="rceil")
    fp.register_anchor(theirs.their_quant, scale_mode="rceil")
    with pytest.raises(fp.BadConfig, match="registered already"):
        fp.register_anchor(theirs.their_quant, scale_mode="even")


# --- the assertions users get ----------------------------------------------------------------------------------------


def test_assert_fused_tells_what_was_left_and_why():
    def model(x, w):
        return quant(norm(x, w).relu())

    with torch.no_grad():
        assert_fused(model, (bf16(4, 64), bf16(64)), {"rmsnorm_mxfp4_quant": 0, "dynamic_mxfp4_quant": 1})
        with pytest.raises(OpCountMismatch) as error:
            assert_fused(model, (bf16(4, 64), bf16(64)), {"rmsnorm_mxfp4_quant": 1})
    assert "rmsnorm_mxfp4_quant: got 0, expected 1" in str(error.value)
    assert "aten.relu.default stands between the norm and the quant" in str(error.value)


def test_assert_equivalent_catches_a_wrong_rewrite(monkeypatch):
    """The proof must be able to fail: a pass that swaps the cast order changes bytes."""
    from fusionpasses.patterns.rmsnorm_mxfp4_quant import RmsNormMxfp4Quant

    original = RmsNormMxfp4Quant._rewrite

    def swapped(self, c, *rest):
        c.norm.cast_order = "scale_cast"
        return original(self, c, *rest)

    monkeypatch.setattr(RmsNormMxfp4Quant, "_rewrite", swapped)
    torch.manual_seed(0)
    with torch.no_grad(), pytest.raises(fp.NotEquivalent, match=r"tensors differ after the passes: .* integer ones"):
        assert_equivalent(lambda x, w: quant(norm(x, w)), (bf16(64, 256), bf16(256)))


def test_count_ops_sees_through_auto_functionalized():
    def model(x, cache):
        theirs.write_row(x, cache)
        return cache + 1

    with torch.no_grad():
        result = capture(model, (torch.randn(4), torch.randn(2, 4)))
    assert count_ops(result.graphs[0].before)["fusionpasses_tests.write_row"] == 1
    assert result.comparison.unequal == 0


def test_sites_of_a_loop_are_counted_one_by_one():
    """Three norms at one source line, by one module, are three sites."""

    def model(x, w):
        for _ in range(3):
            x = x + quant(torch.tanh(x))[0].sum().to(x.dtype)
        for _ in range(3):
            h = x.float()
            x = x + quant((h / torch.sqrt(h.pow(2).mean(-1, keepdim=True))).to(x.dtype))[0].sum().to(x.dtype)
        return x

    result = run(model, bf16(4, 64), bf16(64))
    assert [s.status for s in result.report.sites()] == [NOTHING] * 3 + [REFUSED] * 3


def test_a_mean_over_all_dims_is_refused():
    def model(x):
        h = x.float()
        return quant((h * torch.rsqrt(h.pow(2).mean(None, keepdim=True) + 1e-6)).to(x.dtype))

    result = run(model, bf16(4, 64))
    assert [s.status for s in result.report.sites()] == [REFUSED]
    assert "over dims [0, 1]" in result.report.refused[0].reason


def test_a_norm_of_a_norm_fuses_the_last():
    def plain(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    result = run(lambda x: quant(plain(plain(x))), torch.randn(4, 64))
    assert ops(result) == [(FUSED, "rmsnorm_mxfp4_quant.default")]


@pytest.mark.parametrize(
    "follows", [lambda y, r: r + y, lambda y, r: y * torch.nn.functional.softplus(r)], ids=["add", "gate"]
)
def test_what_is_made_of_a_norm_is_no_misspelt_norm(follows):
    result = run(lambda x, r, w: quant(follows(norm(x, w), r)), bf16(4, 64), bf16(4, 64), bf16(64))
    assert [s.status for s in result.report.sites()] == [NOTHING]
    assert "stands between the norm and the quant" in result.report.sites()[0].reason


def test_a_pass_that_is_not_enabled_says_so():
    backend = fp.fusion_backend(passes=())
    result = run(lambda x, w: quant(norm(x, w)), bf16(4, 64), bf16(64), backend=backend)
    assert result.report.sites() == []
    assert result.report.graphs[0].messages == [
        "not run, because passes=(): rmsnorm_mxfp4_quant, silu_mul_mxfp4_quant, fused_rope_mla_kv_cache, "
        "dynamic_mxfp4_quant, then_gemm, then_mlp"
    ]


def test_nothing_to_fuse_is_said_without_alarm():
    result = run(lambda x: quant(x @ x.T), bf16(64, 64))
    assert ops(result) == [(NOTHING, "dynamic_mxfp4_quant.default")]
    assert result.report.refused == []
