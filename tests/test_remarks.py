"""What the report says of a graph as a whole."""

import pytest
import torch
from helpers import HIDDEN, Norm, linear, mxfp4_linear, tokens
from torch import nn
from torch._inductor.utils import fresh_cache

import fusionpasses as fp
from fusionpasses import remarks
from fusionpasses.probes import Verdict, probe_fp4_arithmetic
from fusionpasses.report import COMPILED, FROM_CACHE
from fusionpasses.testing import capture

WITHOUT = ("sm_75", "sm_80", "sm_89", "sm_90", "gfx90a", "gfx942", "gfx1100", "gfx1201")
WITH = ("sm_100", "sm_103", "sm_110", "sm_120", "sm_121", "gfx950", "gfx1250")
UNKNOWN = ("interpreted", "gfx1300", "sm_", "xyz")


def said(count, name):
    return (
        f"{count} mxfp4_gemm (W4A4) on {name}, which has no FP4 arithmetic: unless the checkpoint was made for W4A4, "
        'weight-only (quantize_mxfp4(act="none")) is more exact, and its products are as fast'
    )


@pytest.fixture
def on(monkeypatch):
    """``on("sm_90")``: graphs of the CPU pass for those of such a GPU."""

    def choose(name):
        monkeypatch.setattr(remarks, "architecture", lambda device: name)

    return choose


def model(act="mxfp4"):
    """Three linears, one of them quantised by its norm, and one that stays bfloat16."""
    made = nn.Sequential(Norm(), *(linear(seed) for seed in (2, 3, 4, 5)))
    return fp.quantize_mxfp4(made, lambda name, _: name != "4", act=act)


def messages(of, *inputs):
    with torch.no_grad():
        return [graph.report.messages for graph in capture(of, inputs).graphs]


# --- what a GPU has ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITHOUT)
def test_gpus_without_fp4_arithmetic(name):
    assert probe_fp4_arithmetic(name) == Verdict(False, f"{name} has no FP4 arithmetic")


@pytest.mark.parametrize("name", WITH + UNKNOWN)
def test_of_others_it_is_not_said(name):
    assert probe_fp4_arithmetic(name)


def test_a_cpu_has_no_architecture():
    assert remarks.architecture(torch.device("cpu")) is None


def test_a_gpu_that_is_not_here_has_no_architecture(monkeypatch):
    """Its fake tensors are enough to compile a graph."""
    assert remarks.architecture(torch.device("cuda", 4096)) is None
    monkeypatch.setattr(remarks, "probe_gpu", lambda: Verdict(False, "none"))
    assert remarks.architecture(torch.device("cuda")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_that_is_here_has_one():
    name = remarks.architecture(torch.device("cuda", 0))
    assert name == remarks.arch.of(torch.device("cuda", 0)).name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_report_speaks_of_the_gpu_that_is_here():
    name = remarks.arch.of(torch.device("cuda", 0)).name
    got = messages(model().cuda(), tokens().cuda())
    assert got == [[] if probe_fp4_arithmetic(name) else [said(3, name)]]


# --- W4A4 without FP4 arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_w4a4_is_remarked_on_with_the_count_of_its_products(on, name):
    on(name)
    assert messages(model(), tokens()) == [[said(3, name)]]


@pytest.mark.parametrize("name", ["sm_100", "sm_120", "gfx950", None])
def test_not_where_there_is_fp4_arithmetic_and_not_on_a_cpu(on, name):
    on(name)
    assert messages(model(), tokens()) == [[]]


def test_nothing_is_said_of_a_graph_of_the_cpu():
    assert messages(model(), tokens()) == [[]]


def test_not_of_weight_only_products_nor_of_a_model_that_is_not_quantised(on):
    on("sm_90")
    assert messages(model(act="none"), tokens()) == [[]]
    assert messages(nn.Sequential(Norm(), linear()), tokens()) == [[]]


def test_only_w4a4_products_are_counted(on):
    on("sm_90")
    mixed = nn.Sequential(mxfp4_linear(), fp.Mxfp4Linear.from_linear(linear(), act="none"))
    assert messages(mixed, tokens()) == [[said(1, "sm_90")]]


def test_each_graph_counts_its_own(on):
    on("sm_90")
    first, second = mxfp4_linear(), nn.Sequential(mxfp4_linear(4), mxfp4_linear(5))

    def broken(x):
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)

    assert messages(broken, tokens()) == [[said(1, "sm_90")], [said(2, "sm_90")]]


def test_gpus_of_two_kinds_are_told_apart(monkeypatch):
    graph = torch.fx.Graph()
    for _ in range(4):
        graph.call_function(torch.ops.fusionpasses.mxfp4_gemm.default).meta["val"] = torch.empty(1)
    names = iter(("sm_90", "gfx942", "sm_90", "sm_100"))
    monkeypatch.setattr(remarks, "architecture", lambda device: next(names))
    assert remarks.of_graph(graph) == [said(2, "sm_90"), said(1, "gfx942")]


def test_it_is_printed_and_survives_the_compile_cache(on, tmp_path):
    on("sm_90")
    of, x = model(), torch.randn(4, HIDDEN).bfloat16()
    with fresh_cache(dir=str(tmp_path)):
        for source in (COMPILED, FROM_CACHE):
            torch._dynamo.reset()
            backend = fp.fusion_backend()
            with torch.no_grad():
                torch.compile(of, backend=backend)(x)
            (graph,) = backend.report.graphs
            assert (graph.source, graph.messages) == (source, [said(3, "sm_90")])
            assert f"\n  {said(3, 'sm_90')}\n" in str(backend.report)
