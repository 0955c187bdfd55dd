"""The assertions users rest their CI on must be able to fail, and must not pass for want of anything to check."""

import pytest
import torch

import fusionpasses as fp
from fusionpasses.testing import assert_equivalent, assert_fused, capture

quant = torch.ops.fusionpasses.dynamic_mxfp4_quant


def norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


X, W = torch.randn(4, 64), torch.randn(64)
MODEL = lambda x, w: quant(norm(x, w))  # noqa: E731


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def mutated(monkeypatch, change):
    """Assert on MODEL with a pass whose result is changed afterwards."""
    from fusionpasses.pipeline import Pipeline

    original = Pipeline.__call__

    def run(self, graph):
        observe, self._observe = self._observe, None
        observe("before", graph)
        original(self, graph)
        change(graph)
        observe("after", graph)

    monkeypatch.setattr(Pipeline, "__call__", run)


def wrap_output(target, *args):
    def change(graph):
        output = graph.output_node()
        results = list(output.args[0])
        i = next(i for i, n in enumerate(results) if n.meta["val"].dtype.is_floating_point)
        with graph.inserting_before(output):
            results[i] = graph.call_function(target, (results[i], *args))
        output.args = (tuple(results),)

    return change


@pytest.mark.parametrize(
    "change",
    [
        wrap_output(torch.ops.aten.add.Tensor, 1e-3),
        wrap_output(torch.ops.aten.to.dtype, torch.float64),
        wrap_output(torch.ops.aten.mul.Tensor, float("nan")),
        wrap_output(lambda x: x.t().contiguous().t()),
        wrap_output(lambda x: torch.where(x == 0, -x, x)),
    ],
    ids=["value", "dtype", "nan", "strides", "sign of zero"],
)
def test_every_kind_of_difference_is_caught(monkeypatch, change):
    def model(x, w):
        return *quant(norm(x, w)), x * 1.0

    x = X.clone()
    x[0] = 0.0
    assert_equivalent(model, (x, W))
    mutated(monkeypatch, change)
    with pytest.raises(fp.NotEquivalent, match="1 of "):
        assert_equivalent(model, (x, W))


def test_bounds_admit_what_they_say(monkeypatch):
    def model(x, w):
        return *quant(norm(x, w)), x * 1.0

    x = X.clone()
    x[0, 0] = float("inf")  # on both sides: no difference
    mutated(monkeypatch, wrap_output(torch.ops.aten.add.Tensor, 1e-3))
    result = assert_equivalent(model, (x, W), max_abs=2e-3)
    assert 0 < result.comparison.max_abs < 2e-3
    with pytest.raises(fp.NotEquivalent, match=r"allowed 0.0001"):
        assert_equivalent(model, (x, W), max_abs=1e-4)


def test_a_model_that_is_not_compiled_passes_nothing():
    hidden = torch.compiler.disable(lambda x: quant(x))

    def eager(x):
        return hidden(x)

    with pytest.raises(fp.NotEquivalent, match="nothing was compared: got 0 graphs"):
        assert_equivalent(eager, (X,))
    with pytest.raises(fp.NotEquivalent, match="nothing was compared"):
        assert_fused(eager, (X,), {"rmsnorm_mxfp4_quant": 0})


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({}, "expected: got {}"),
        ({"rmsnorm_mxfp4_quant"}, "allowed a mapping"),
        (1, "allowed a mapping"),
        ({"rmsnorm_mxfp4_qunat": 0}, "did you mean 'rmsnorm_mxfp4_quant'?"),
        ({"rmsnorm_mxfp4_quant.default": 1}, "overloads are counted together (did you mean 'rmsnorm_mxfp4_quant'?)"),
        ({"fusionpasses::rmsnorm_mxfp4_quant": 1}, "did you mean 'rmsnorm_mxfp4_quant'?"),
        ({"mylib::quant": 1}, "or namespace.packet for other ops"),
    ],
)
def test_an_expectation_that_means_nothing_is_refused(expected, words):
    with pytest.raises(fp.BadConfig) as error:
        assert_fused(MODEL, (X, W), expected)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: capture(MODEL, X), fp.BadConfig, "for one argument write (x,)"),
        (lambda: capture(MODEL, (X, W), backend="inductor"), fp.BadConfig, "allowed what fusion_backend() returns"),
        (lambda: capture(MODEL, (X, W), options={"nope": 1}), fp.BadConfig, "options: got 'nope'"),
        (
            lambda: capture(MODEL, (X, W), backend=fp.fusion_backend(provider="triton")),
            fp.ProviderUnavailable,
            "serves GPU tensors",
        ),
        (lambda: capture(MODEL, (X, W)).report.sites("fusd"), fp.BadConfig, "status: got 'fusd'"),
        (
            lambda: assert_equivalent(MODEL, (X.to("meta"), W.to("meta"))),
            fp.UnsupportedInput,
            "got meta tensors",
        ),
    ],
)
def test_wrong_calls_say_what_to_do(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value)


def test_the_backend_without_parentheses():
    with pytest.raises(Exception, match=r"Write backend=fusion_backend\(\), with parentheses"):
        torch.compile(MODEL, backend=fp.fusion_backend)(X, W)
    with pytest.raises(fp.BadConfig, match=r"mode and options go to torch.compile"):
        fp.fusion_backend(mode="reduce-overhead")


def test_graphs_are_those_that_a_compile_gives_the_passes():
    """Inductor has turned views into reshapes by then, and computed fake values anew, which alias where views do."""

    def model(x):
        return (x @ x).view(2, 8).transpose(0, 1) * 2

    (graph,) = capture(model, (torch.randn(4, 4),)).graphs
    nodes = {node.target: node for node in graph.before.graph.nodes}
    assert torch.ops.aten.view.default not in nodes
    reshaped, product = (nodes[op].meta["val"] for op in (torch.ops.aten.reshape.default, torch.ops.aten.mm.default))
    assert reshaped.untyped_storage()._cdata == product.untyped_storage()._cdata


@torch.no_grad()
def test_a_single_element_may_have_any_stride():
    """As ``grid[:, 0]`` of one image has."""
    grid = torch.tensor([[1, 4, 4]])
    result = assert_equivalent(lambda x, column: (x + 1, column * 2), (torch.randn(3), grid[:, 0]))
    assert result.comparison.unequal == 0
    assert_equivalent(lambda x, column: (x + 1, column), (torch.randn(3), grid.float()[:, 0]))
