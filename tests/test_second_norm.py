"""A second norm of the same rows is taken into the op of the first: every spelling, and a twin for each reason."""

import dataclasses
import itertools

import aiter_fakes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fusionpasses as fp
from fusionpasses import anchors
from fusionpasses.patterns import _second_norm
from fusionpasses.patterns._rms_norm import recognise
from fusionpasses.report import FUSED, REFUSED
from fusionpasses.testing import assert_equivalent, capture

ours = torch.ops.fusionpasses
quant = ours.dynamic_mxfp4_quant
aten = torch.ops.aten
WITH_SECOND = "rmsnorm_mxfp4_quant.with_second"
DEFAULT = "rmsnorm_mxfp4_quant.default"


def norm(x, w, eps=1e-6):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def bf16(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def inputs(*leading, first=64, second=96, rest=16):
    """``[q_a | kv_c | k_pe]``, and the weights of two norms."""
    return bf16(*(leading or (4,)), first + second + rest), bf16(first), bf16(second)


def run(model, *arguments, **options):
    with torch.no_grad():
        return assert_equivalent(model, arguments, **options)


def ops(result):
    return sorted((s.status, s.op) for s in result.report.sites())


def calls(result, target):
    return sum(n.target is target for n in result.graphs[-1].after.graph.nodes)


# --- what fuses ------------------------------------------------------------------------------------------------------


def test_the_norms_of_latent_attention_are_one_op():
    def model(rows, w, w2):
        q_a, kv_c, k_pe = rows.split([64, 96, 16], -1)
        return *quant(norm(q_a, w, 1e-6)), norm(kv_c, w2, 1e-5), k_pe

    result = run(model, *inputs())
    assert ops(result) == [(FUSED, WITH_SECOND)]
    (site,) = result.report.fused
    assert len(site.anchors) == 1
    (note,) = site.notes
    assert note.startswith("the second norm of the same rows, at ")
    assert note.endswith(", was taken in")
    assert calls(result, aten.rsqrt.default) == 0
    (fused,) = (n for n in result.graphs[-1].after.graph.nodes if n.target is ours.rmsnorm_mxfp4_quant.with_second)
    assert (fused.args[2], fused.args[5]) == (1e-6, 1e-5)
    assert fused.kwargs == {
        "cast_order": "cast_scale",
        "norm_dtype": torch.bfloat16,
        "cast_order2": "cast_scale",
        "norm_dtype2": torch.bfloat16,
        "scale_mode": "even",
        "provider": "reference",
    }


def test_the_module_of_the_second_norm_is_named():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_a_norm, self.kv_a_norm = (torch.nn.RMSNorm(n, eps=1e-6, dtype=torch.bfloat16) for n in (64, 96))

        def forward(self, rows):
            return *quant(self.q_a_norm(rows[:, :64])), self.kv_a_norm(rows[:, 64:160])

    (site,) = run(Attention(), inputs()[0]).report.fused
    assert site.notes == ("the second norm of the same rows, kv_a_norm, was taken in",)


@pytest.mark.parametrize("second_first", [False, True])
def test_readers_of_the_second_norm_may_stand_before_the_first(second_first):
    """Training graphs keep the author's order, so that readers and inputs must move."""

    def model(rows, w, w2, p):
        q_a, kv_c, _ = rows.split([64, 96, 16], -1)
        if second_first:
            early = (norm(kv_c, w2) * p).sum()
            return early, *quant(norm(q_a, w))
        codes, scales = quant(norm(q_a, w))
        return (norm(rows[:, 64:160], w2 + 1) * p).sum(), codes, scales

    p = torch.randn(96, requires_grad=True)
    result = capture(model, (*inputs(), p), backward=lambda out: out[0])
    assert ops(result) == [(FUSED, WITH_SECOND)]
    assert result.comparison.unequal == 0
    assert p.grad is not None
    names = [str(n.target) for n in result.graphs[0].before.graph.nodes]
    assert (names.index("aten.sum.default") < names.index("fusionpasses.dynamic_mxfp4_quant.default")) == second_first
    result.graphs[0].after.graph.lint()


def test_every_layer_has_its_pair():
    def model(rows, w, w2):
        out = []
        for _ in range(3):
            q_a, kv_c, _ = rows.split([64, 96, 16], -1)
            codes, scales = quant(norm(q_a, w))
            latent = norm(kv_c, w2)
            out.append(latent)
            rows = rows + codes.sum().to(rows.dtype) + scales.sum().to(rows.dtype) + latent.sum()
        return *out, rows

    result = run(model, *inputs())
    assert ops(result) == [(FUSED, WITH_SECOND)] * 3
    assert calls(result, aten.rsqrt.default) == 0


@pytest.mark.parametrize("second_first", [False, True])
def test_rows_that_are_written_afterwards_are_read_before(second_first):
    """The graph is functional, and the op that moves must not read late."""

    def model(rows, w, w2):
        if second_first:
            latent = norm(rows[:, 64:160], w2)
            codes, scales = quant(norm(rows[:, :64], w))
        else:
            codes, scales = quant(norm(rows[:, :64], w))
            latent = norm(rows[:, 64:160], w2)
        rows.mul_(2)
        return codes, scales, latent, norm(rows[:, :64], w)

    result = run(model, *inputs())
    assert ops(result) == [(FUSED, WITH_SECOND)]


def test_two_quants_of_the_first_norm_and_one_scale_mode():
    def model(rows, w, w2):
        y = norm(rows[..., :64], w)
        return *quant(y, "ceil"), *quant(y.reshape(-1, 64), "ceil"), norm(rows[..., 64:160], w2)

    result = run(model, *inputs(2, 3))
    assert ops(result) == [(FUSED, WITH_SECOND)]
    assert len(result.report.fused[0].anchors) == 2


def test_a_cast_that_is_not_all_that_reads_the_norm_stays_outside():
    def model(rows, w, w2):
        y = norm(rows[:, 64:160], w2)
        return *quant(norm(rows[:, :64], w)), y, y.float() * 3

    result = run(model, *inputs())
    assert ops(result) == [(FUSED, WITH_SECOND)]
    (fused,) = (n for n in result.graphs[-1].after.graph.nodes if n.target is ours.rmsnorm_mxfp4_quant.with_second)
    assert fused.kwargs["norm_dtype2"] == torch.bfloat16


def test_the_one_that_comes_first_is_taken():
    def model(rows, w):
        a, b, c = rows.split([64, 64, 64], -1)
        return *quant(norm(a, w)), norm(c, w, 1e-5), norm(b, w, 1e-4)

    result = run(model, bf16(4, 192), bf16(64))
    assert ops(result) == [(FUSED, WITH_SECOND)]
    taken, left = result.report.fused[0].notes
    assert taken.endswith("was taken in")
    assert left.endswith("was left outside: the op takes one, and has that")
    (fused,) = (n for n in result.graphs[-1].after.graph.nodes if n.target is ours.rmsnorm_mxfp4_quant.with_second)
    before = [n for n in result.graphs[-1].before.graph.nodes if n.target is aten.rsqrt.default]
    assert fused.args[5] == before[1].args[0].args[1] if before[0].args[0].args[1] == 1e-6 else 1e-6


def test_two_quantised_norms_share_a_third():
    """The last in the graph is judged first, and takes it."""

    def model(rows, w):
        a, b, c = rows.split([64, 64, 64], -1)
        return *quant(norm(a, w)), *quant(norm(b, w)), norm(c, w)

    result = run(model, bf16(4, 192), bf16(64))
    assert ops(result) == [(FUSED, DEFAULT), (FUSED, WITH_SECOND)]
    assert [s.notes for s in result.report.fused if s.op == DEFAULT] == [()]


# --- the twins: what stays outside, with its reason ------------------------------------------------------------------


def _left(result, *, op=DEFAULT):
    """The reason in the note of the one site."""
    assert ops(result) == [(FUSED, op)], str(result.report)
    (note,) = result.report.fused[0].notes
    assert note.startswith("the second norm of the same rows, ")
    assert calls(result, aten.rsqrt.default) == 1
    return note.partition(" was left outside: ")[2]


def test_a_width_that_is_no_multiple_of_32():
    def model(rows, w, w2):
        return *quant(norm(rows[:, :64], w)), norm(rows[:, 64:104], w2)

    assert _left(run(model, bf16(4, 176), bf16(64), bf16(40))).startswith("the width 40 is not a multiple of 32")


def test_statistics_in_bfloat16():
    def model(rows, w):
        x = rows[:, 64:]
        return *quant(norm(rows[:, :64], w)), x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    assert _left(run(model, bf16(4, 160), bf16(64))).startswith("the norm's statistics are computed in torch.bfloat16")


def test_a_gate_is_no_weight():
    """And what is left of the norm without it is better computed with the gate."""

    def model(rows, w, gate):
        h = rows[:, 64:160].float()
        normed = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
        return *quant(norm(rows[:, :64], w)), normed * gate

    reason = _left(run(model, *inputs()[:2], bf16(4, 96)))
    assert reason == "the norm is multiplied by a tensor of shape [4, 96], not by a weight [96]"


def test_a_first_norm_that_something_else_reads():
    def model(rows, w, w2):
        y = norm(rows[:, :64], w)
        return *quant(y), y, norm(rows[:, 64:160], w2)

    reason = _left(run(model, *inputs()), op="rmsnorm_mxfp4_quant.with_norm")
    assert reason == "output also reads the first norm, and no op returns both"


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        (lambda rows: rows[:2, 64:160], "[2]"),
        (lambda rows: rows[:, 64:160].reshape(2, 2, 96), "[2, 2]"),
        (lambda rows: rows[0, 64:160], "[]"),
    ],
    ids=["fewer", "grouped", "one"],
)
def test_other_rows(part, rows):
    def model(x, w, w2):
        return *quant(norm(x[:, :64], w)), norm(part(x), w2)

    assert _left(run(model, *inputs())) == f"its input has the rows {rows} and that of the first norm [4]"


def test_a_step_inside_that_something_else_reads():
    def model(rows, w, w2):
        h = rows[:, 64:160].float()
        r = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return *quant(norm(rows[:, :64], w)), w2 * (h * r).bfloat16(), r

    reason = _left(run(model, *inputs()))
    assert reason.startswith("output also reads rsqrt")
    assert reason.endswith("inside it, so Inductor would compute it as well")


def test_a_second_norm_that_trains_keeps_its_gradient():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(96, dtype=torch.bfloat16))
            self.linear = torch.nn.Linear(96, 32, dtype=torch.bfloat16)

        def forward(self, rows, w):
            with torch.no_grad():
                codes, scales = quant(norm(rows[:, :64], w))
            return self.linear(norm(rows[:, 64:160], self.weight)).float().sum(), codes, scales

    model = Model()
    result = capture(model, inputs()[:2], backward=lambda out: out[0])
    assert [g.report.kind for g in result.graphs] == ["forward", "backward"]
    assert ops(result) == [(FUSED, WITH_SECOND)]
    assert result.comparison.unequal == 0
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_second_norm_whose_strides_are_others():
    def model(rows, w, w2):
        rows = rows.transpose(0, 1)
        return *quant(norm(rows[..., :64], w)), norm(rows[..., 64:160], w2)

    reason = _left(run(model, *inputs(2, 3)))
    assert reason.startswith("its result has strides [")
    assert reason.endswith("; the fused op returns it contiguous")


def test_a_second_norm_that_is_computed_from_the_codes():
    def model(rows, w):
        codes, scales = quant(norm(rows[:, :64], w))
        return codes, scales, norm(rows[:, 64:160], codes.sum(0).repeat(3).bfloat16())

    assert _left(run(model, *inputs()[:2])) == "it is computed from what the first norm's quant gives"


def test_a_first_norm_that_is_computed_from_the_second():
    def model(rows, w2):
        latent = norm(rows[:, 64:160], w2)
        return *quant(norm(rows[:, :64], latent[0, :64])), latent

    rows, _, w2 = inputs()
    assert _left(run(model, rows, w2)) == "the first norm is computed from it"


def test_a_write_between_the_norms():
    """Such a graph does not come out of AOTAutograd today; the guard holds if one ever does."""
    from fusionpasses.pipeline import Pipeline

    with torch._subclasses.FakeTensorMode() as mode:
        values = {name: mode.from_tensor(torch.randn(*size)) for name, size in {"rows": (4, 128), "w": (64,)}.items()}

    def report_of(write):
        graph = torch.fx.Graph()

        def add(target, *args):
            node = graph.call_function(target, args)
            with mode:
                node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
            return node

        def normed(x):
            mean = add(aten.mean.dim, add(aten.pow.Tensor_Scalar, x, 2), [-1], True)
            return add(
                aten.mul.Tensor, add(aten.mul.Tensor, x, add(aten.rsqrt.default, add(aten.add.Tensor, mean, 1.0))), w
            )

        rows, w = (graph.placeholder(name) for name in values)
        rows.meta["val"], w.meta["val"] = values.values()
        first = normed(add(aten.slice.Tensor, rows, 1, 0, 64))
        codes = add(quant.default, first)
        x2 = add(aten.slice.Tensor, rows, 1, 64, 128)
        if write:
            add(aten.mul_.Tensor, rows, 2.0)
        graph.output((codes, normed(x2)))
        reports = []
        module = torch.fx.GraphModule({}, graph)
        Pipeline(fp.FusionConfig(), anchors.registered_anchors(), record=reports.append)(module.graph)
        return reports[0].sites

    (plain,), (written,) = report_of(False), report_of(True)
    assert (plain.status, plain.op) == (FUSED, WITH_SECOND)
    assert (written.status, written.op) == (FUSED, DEFAULT)
    assert written.notes[0].endswith("was left outside: aten.mul_.Tensor writes to a tensor between the two norms")


@pytest.mark.parametrize("second_first", [False, True])
@pytest.mark.parametrize("viewed", [False, True])
def test_a_second_norm_with_a_quant_of_its_own_is_a_site_of_its_own(viewed, second_first):
    def model(rows, w, w2):
        def second():
            y = norm(rows[..., 64:160], w2)
            return quant(y.reshape(-1, 96) if viewed else y)

        def first():
            return quant(norm(rows[..., :64], w))

        return (*second(), *first()) if second_first else (*first(), *second())

    result = run(model, *inputs(2, 3))
    assert ops(result) == [(FUSED, DEFAULT)] * 2
    assert [s.notes for s in result.report.fused] == [(), ()]


def test_a_second_norm_whose_quant_is_refused_is_still_a_site_of_its_own():
    def model(rows, w, w2):
        second = norm(rows[:, 64:160], w2)
        return *quant(norm(rows[:, :64], w)), *quant(second, "even"), *quant(second, "ceil")

    result = run(model, *inputs())
    assert ops(result) == [
        (FUSED, DEFAULT),
        (FUSED, "rmsnorm_mxfp4_quant.with_norm"),
        (REFUSED, "dynamic_mxfp4_quant.default"),
    ]


@pytest.mark.parametrize(
    "inputs_of",
    [
        lambda rows, other: (rows[:, :64], other[:, 64:160]),
        lambda rows, other: (rows, other[:, :96]),
        lambda rows, other: (rows, rows),
        lambda rows, other: (rows.unsqueeze(0), rows.reshape(1, 4, 96)),
        lambda rows, other: ((rows - other)[:, :64], (rows * other)[:, 64:]),
        lambda rows, other: (rows[:, :64] * 2, rows[:, 64:]),
    ],
    ids=["another tensor", "a whole tensor", "the same tensor", "views of it", "products", "changed in between"],
)
def test_norms_of_what_is_no_part_of_one_tensor_are_not_looked_at(inputs_of):
    def model(rows, other):
        one, two = inputs_of(rows, other)
        return *quant(norm(one, one.flatten(0, -2)[0])), norm(two, two.flatten(0, -2)[1])

    result = run(model, bf16(4, 96), bf16(4, 160) if "160" in str(inputs_of.__code__.co_consts) else bf16(4, 96))
    assert ops(result) == [(FUSED, DEFAULT)]
    assert result.report.fused[0].notes == ()


def test_a_residual_add_is_taken_in_and_the_second_norm_is_not_asked_for():
    def model(rows, residual, w, w2):
        total = rows[:, :64] + residual
        return *quant(norm(total, w)), norm(rows[:, 64:160], w2), total

    rows, w, w2 = inputs()
    result = run(model, rows, bf16(4, 64), w, w2)
    assert ops(result) == [(FUSED, "rmsnorm_add_mxfp4_quant.default")]
    assert result.report.fused[0].notes == ()


def test_a_part_that_is_not_normed_is_no_second_norm():
    def model(rows, w):
        return (
            *quant(norm(rows[:, :64], w)),
            F.layer_norm(rows[:, 64:160], (96,)),
            rows[:, 160:].float().pow(2).mean(-1),
        )

    result = run(model, *inputs()[:2])
    assert ops(result) == [(FUSED, DEFAULT)]
    assert result.report.fused[0].notes == ()


def test_a_provider_that_cannot_run_both_keeps_the_first_alone(monkeypatch):
    def model(rows, w):
        a, b = rows.split([64, 64], -1)
        return *quant(norm(a, w)), norm(b, w)

    arguments = torch.randn(4, 128), torch.randn(64)
    assert ops(run(model, *arguments)) == [(FUSED, WITH_SECOND)]
    real = _second_norm_providers().usable

    def usable(provider, op, device_type):
        return (
            real(provider, op, device_type) if op != WITH_SECOND else fp.has_mxfp4_gemm().__class__(False, "not mine")
        )

    monkeypatch.setattr(_second_norm_providers(), "usable", usable)
    reason = _left(run(model, *arguments))
    assert reason == "reference would run the op without it, and cannot with it: not mine"


def _second_norm_providers():
    from fusionpasses import providers

    return providers


@pytest.mark.parametrize("release", ["new"])
def test_the_promise_to_aiter_keeps_the_first_norm_with_it(release, monkeypatch):
    from fusionpasses import providers

    with aiter_fakes.installed(release, monkeypatch):
        assert providers.usable("aiter_finite", DEFAULT, "cuda")
        assert providers.usable("aiter_finite", WITH_SECOND, "cuda")


def test_random_numbers_are_drawn_in_the_same_order():
    """What reads the second norm moves behind the fused op, and so past what draws from the same seed."""

    def between(rows, w, w2):
        latent = norm(rows[:, 64:160], w2)
        drawn = torch.multinomial(latent.float().softmax(-1), 2), torch.multinomial(rows.float().softmax(-1), 3)
        return *quant(norm(rows[:, :64], w)), *drawn

    result = run(between, *inputs())
    assert ops(result) == [(FUSED, DEFAULT)]
    (note,) = result.report.fused[0].notes
    assert note.endswith("was left outside: aten.multinomial.default draws random numbers between the two norms")

    def outside(rows, w, w2):
        before = torch.multinomial(rows.float().softmax(-1), 3)
        codes, scales = quant(norm(rows[:, :64], w))
        latent = norm(rows[:, 64:160], w2)
        return codes, scales, before, torch.multinomial(latent.float().softmax(-1), 2)

    assert ops(run(outside, *inputs())) == [(FUSED, WITH_SECOND)]


def test_each_guard_by_itself():
    """Those that no model above can break: parts of one tensor have one dtype."""

    def facts(**changed):
        graph = torch.fx.Graph()
        tensors = {"x": torch.empty(4, 64), "x2": torch.empty(4, 96), **changed}
        nodes = {}
        for name, value in tensors.items():
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = value

        def normed(x):
            def add(target, *args):
                node = graph.call_function(target, args)
                node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
                return node

            mean = add(aten.mean.dim, add(aten.pow.Tensor_Scalar, x, 2), [-1], True)
            return recognise(add(aten.mul.Tensor, x, add(aten.rsqrt.default, add(aten.add.Tensor, mean, 1e-6))))

        first, second = normed(nodes["x"]), normed(nodes["x2"])
        return _second_norm.Second(second, first, nodes["x"], [first.root], [], [], "")

    guard = {g.name: g.check for g in _second_norm.GUARDS}
    assert {name: check(facts()) for name, check in guard.items()} == dict.fromkeys(guard)
    assert guard["rows"](facts(x2=torch.empty(4, 96, dtype=torch.float64))) == (
        "its input is torch.float64 and that of the first norm torch.float32"
    )
    assert "unknown strides" not in str(guard["strides"](facts(x2=torch.empty(96, 4).t())))
    assert "its result has strides [1, 4]" in guard["strides"](facts(x2=torch.empty(96, 4).t()))
    assert guard["provider"](dataclasses.replace(facts(), no_provider="nobody")) == "nobody"


# --- generated -------------------------------------------------------------------------------------------------------

GENERATE = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclasses.dataclass(frozen=True)
class Half:
    """How one of the two norms is written."""

    library: bool
    square: str
    order: str  # "cast_scale", "scale_cast", "no cast"
    weight: str  # "same", "fp32", "none"
    weight_first: bool
    eps: float

    def __call__(self, x, w):
        if self.library:
            return F.rms_norm(x, x.shape[-1:], None if self.weight == "none" else w.to(x.dtype), self.eps)
        h = x.float()
        squared = h.pow(2) if self.square == "pow" else h * h
        y = h * torch.rsqrt(squared.mean(-1, keepdim=True) + self.eps)
        if self.order == "cast_scale":
            y = y.to(x.dtype)
        if self.weight != "none":
            y = w * y if self.weight_first else y * w
        return y.to(x.dtype) if self.order == "scale_cast" else y

    def make_weight(self, n, dtype):
        return bf16(n).to(torch.float32 if self.weight == "fp32" else dtype)


halves = st.builds(
    Half,
    library=st.sampled_from([False, False, True]),
    square=st.sampled_from(["pow", "x*x"]),
    order=st.sampled_from(["cast_scale", "scale_cast", "no cast"]),
    weight=st.sampled_from(["same", "fp32", "none"]),
    weight_first=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-6, 0.1]),
)

#: From the rows, and the two widths, to the two parts; those with "equal" need equal widths.
PARTS = {
    "split": lambda x, n, n2: x.split([n, n2, x.shape[-1] - n - n2], -1)[:2],
    "slices": lambda x, n, n2: (x[..., :n], x[..., n : n + n2]),
    "slice of a slice": lambda x, n, n2: (x[..., :n], x[..., n:][..., :n2]),
    "narrow": lambda x, n, n2: (x.narrow(-1, 0, n), x.narrow(-1, n, n2)),
    "overlapping": lambda x, n, n2: (x[..., :n], x[..., n - 32 : n - 32 + n2]),
    "chunk, equal": lambda x, n, n2: x[..., : 2 * n].chunk(2, -1),
    "unbind, equal": lambda x, n, n2: x[..., : 2 * n].unflatten(-1, (2, n)).unbind(-2),
    "viewed": lambda x, n, n2: (x[..., :n].unsqueeze(0), x.unsqueeze(0)[..., n : n + n2]),
}


@dataclasses.dataclass(frozen=True)
class Legal:
    dtype: torch.dtype
    leading: tuple[int, ...]
    widths: tuple[int, int]
    parts: str
    first: Half
    second: Half
    second_first: bool
    reader: str  # of the second norm
    quants: int
    scale_mode: str
    dynamic: bool

    def __call__(self, rows, w, w2, m):
        n, n2 = self.widths
        x, x2 = PARTS[self.parts](rows, n, n2)
        out = []

        def quantise():
            y = self.first(x, w)
            for i in range(self.quants):
                out.extend(quant(y.reshape(-1, n) if i else y, self.scale_mode))

        def read():
            y = self.second(x2, w2)
            out.append(
                {"returned": lambda: y, "product": lambda: y.float() @ m, "view": lambda: y.reshape(-1, n2)}[
                    self.reader
                ]()
            )

        for step in (read, quantise) if self.second_first else (quantise, read):
            step()
        return out


legal_variants = st.builds(
    Legal,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    leading=st.sampled_from([(6,), (1,), (2, 3), (2, 1, 3)]),
    widths=st.sampled_from([(64, 64), (96, 96)]) | st.sampled_from([(64, 96), (96, 32), (32, 160)]),
    parts=st.sampled_from(list(PARTS)),
    first=halves,
    second=halves,
    second_first=st.booleans(),
    reader=st.sampled_from(["returned", "product", "view"]),
    quants=st.integers(1, 2),
    scale_mode=st.sampled_from(["even", "floor", "rceil", "ceil"]),
    dynamic=st.sampled_from([False, False, True]),
).filter(lambda v: "equal" not in v.parts or v.widths[0] == v.widths[1])


@GENERATE
@given(legal_variants)
def test_legal_variants_fuse_and_change_no_byte(variant):
    n, n2 = variant.widths
    rows = bf16(*variant.leading, n + n2 + 48).to(variant.dtype)
    if variant.dynamic:
        for dim, size in enumerate(rows.shape[:-1]):
            if size > 1:
                torch._dynamo.mark_dynamic(rows, dim)
    weights = variant.first.make_weight(n, variant.dtype), variant.second.make_weight(n2, variant.dtype)
    with torch.no_grad():
        result = capture(variant.__call__, (rows, *weights, torch.randn(n2, 8)))
    sites = result.report.sites()
    assert [(s.status, s.op) for s in sites] == [(FUSED, WITH_SECOND)], f"{variant}\n{result.report}"
    assert len(sites[0].anchors) == variant.quants
    assert [note.rpartition(", ")[2] for note in sites[0].notes] == ["was taken in"], f"{variant}\n{result.report}"
    assert calls(result, aten.rsqrt.default) == 0
    assert result.comparison.tensors > 0
    assert result.comparison.unequal == 0, f"{variant}\n{result.comparison}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("order", "order2"),
    [(a, b) for a, b in itertools.product(["cast_scale", "scale_cast", "no cast"], repeat=2) if a != b],
)
def test_each_norm_keeps_its_own_roundings(dtype, order, order2):
    halves = [Half(False, "pow", o, "same", True, 1e-6) for o in (order, order2)]
    variant = Legal(dtype, (6,), (64, 96), "split", *halves, False, "returned", 1, "even", False)
    with torch.no_grad():
        result = capture(variant.__call__, (bf16(6, 208).to(dtype), bf16(64).to(dtype), bf16(96).to(dtype), None))
    assert ops(result) == [(FUSED, WITH_SECOND)]
    assert result.comparison.unequal == 0
    if dtype != torch.float32:
        (fused,) = (n for n in result.graphs[-1].after.graph.nodes if n.target is ours.rmsnorm_mxfp4_quant.with_second)
        for given, end in ((order, ""), (order2, "2")):
            # Without a cast, what is quantised or returned is float32.
            assert fused.kwargs[f"cast_order{end}"] == given.replace("no cast", "scale_cast")
            assert fused.kwargs[f"norm_dtype{end}"] == (torch.float32 if given == "no cast" else dtype)
