"""Quants joined with their product: in graphs, in what is launched, and on a GPU by the bytes."""

from __future__ import annotations

import functools
import operator
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fusionpasses as fp
from fusionpasses import remarks, then_gemm
from fusionpasses._verdict import Verdict
from fusionpasses.kernels.arch import Arch
from fusionpasses.ops import OPS, _mxfp4, _mxfp4_weight
from fusionpasses.probes import probe_triton
from fusionpasses.testing import assert_equivalent, capture

ours = torch.ops.fusionpasses
needs_triton = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)
H200 = Arch("sm_90", warp_size=32, processors=132)


# ---- graphs


class Layer(nn.Module):
    """A norm of a sum, a gated activation, and what projects each; all that a decoder layer's quants may be."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.norm = helpers.Norm(64)
        self.up = fp.Mxfp4Linear.from_linear(nn.Linear(64, 128, bias=False))
        self.down = fp.Mxfp4Linear.from_linear(nn.Linear(64, 64))
        self.out = fp.Mxfp4Linear.from_linear(nn.Linear(64, 96, bias=False))
        self.other = fp.Mxfp4Linear.from_linear(nn.Linear(64, 32, bias=False)) if shared else None

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        residual = x + residual
        normed = self.norm(residual)
        gate, up = self.up(normed).chunk(2, -1)
        rest = () if self.other is None else (self.other(normed),)
        return self.out(self.down(nn.functional.silu(gate) * up)), residual, *rest


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it paid on any machine."""
    monkeypatch.setattr(then_gemm, "join", functools.partial(then_gemm.join, pays=lambda pair: Verdict(True, "")))


def layer(**options: bool) -> tuple[Layer, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Layer(**options).eval(), (helpers.random(3, 64), helpers.random(3, 64, seed=5))


@pytest.mark.usefixtures("everywhere")
def test_joined_graphs_compute_the_same() -> None:
    model, inputs = layer()
    with torch.no_grad():
        result = assert_equivalent(model, inputs)
    (graph,) = result.graphs
    joined = [line for line in graph.report.messages if "joined with the mxfp4_gemm behind" in line]
    quants = "rmsnorm_add_mxfp4_quant", "silu_mul_mxfp4_quant", "dynamic_mxfp4_quant"
    assert [line.split()[:2] for line in joined] == [["1", quant] for quant in quants]


@pytest.mark.usefixtures("everywhere")
def test_counts_and_sites_are_those_of_both_ops() -> None:
    model, inputs = layer()
    with torch.no_grad():
        joined = capture(model, inputs).graphs[0].report
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(then_gemm, "join", lambda graph: then_gemm.Said([], []))
            apart = capture(model, inputs).graphs[0].report
    assert joined.ops_after == apart.ops_after
    assert joined.nodes_after < apart.nodes_after
    assert [site.lines() for site in joined.sites] == [site.lines() for site in apart.sites]


def test_nothing_is_joined_where_nothing_is_saved() -> None:
    """On a CPU no kernel puts tokens in order."""
    model, inputs = layer()
    with torch.no_grad():
        report = capture(model, inputs).graphs[0].report
    assert not [line for line in report.messages if "joined" in line]


@pytest.mark.usefixtures("everywhere")
def test_not_where_only_some_passes_are_asked_for() -> None:
    model, inputs = layer()
    with torch.no_grad():
        backend = fp.fusion_backend(passes=("rmsnorm_mxfp4_quant",))
        torch.compile(model, backend=backend)(*inputs)
    (report,) = backend.report.graphs
    assert report.messages[0].endswith(
        ": silu_mul_mxfp4_quant, fused_rope_mla_kv_cache, dynamic_mxfp4_quant, then_gemm, then_mlp"
    )
    assert not [line for line in report.messages if "joined" in line]


def test_what_pairs_lack_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("FUSION_DEBUG_DUMP", str(tmp_path))
    lacks = functools.partial(then_gemm.join, pays=lambda pair: Verdict(False, "more than this"))
    monkeypatch.setattr(then_gemm, "join", lacks)
    model, inputs = layer()
    with torch.no_grad():
        (graph,) = assert_equivalent(model, inputs).graphs
    said = [line for line in graph.report.messages if "joined" in line]
    assert [line.split()[:2] for line in said] == [
        ["1", quant] for quant in ("rmsnorm_add_mxfp4_quant", "silu_mul_mxfp4_quant", "dynamic_mxfp4_quant")
    ]
    assert all(line.endswith("not joined with the mxfp4_gemm behind, which takes more than this") for line in said)
    with torch.no_grad():
        torch.compile(model, backend=fp.fusion_backend())(*inputs)
    assert [path for path in tmp_path.rglob("*") if "rmsnorm_mxfp4_quant" in path.name]
    assert not [path for path in tmp_path.rglob("*") if "then_gemm" in path.name]


@pytest.mark.usefixtures("everywhere")
def test_codes_that_two_products_read_are_left() -> None:
    model, inputs = layer(shared=True)
    with torch.no_grad():
        (graph,) = assert_equivalent(model, inputs).graphs
    joined = [line.split()[1] for line in graph.report.messages if "joined" in line]
    assert joined == ["silu_mul_mxfp4_quant", "dynamic_mxfp4_quant"]


def traced(function: Any, *inputs: Tensor) -> fx.Graph:
    graph: fx.Graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    graph.eliminate_dead_code()
    return graph


def _weight(rows: int = 32, width: int = 64) -> tuple[Tensor, Tensor]:
    return _mxfp4.quantize(torch.randn(rows, width), "even")


def _join(graph: fx.Graph) -> list[str]:
    said = then_gemm.join(graph, pays=lambda pair: Verdict(True, ""))
    graph.lint()
    assert said.left == []
    return said.joined


def test_a_quant_without_other_results_becomes_the_product() -> None:
    def function(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return ours.mxfp4_gemm(*ours.dynamic_mxfp4_quant(x), w, s, out_dtype=torch.float32).relu()

    inputs = (torch.randn(3, 64), *_weight())
    graph = traced(function, *inputs)
    assert len(_join(graph)) == 1
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [ours.dynamic_mxfp4_quant.then_gemm, torch.ops.aten.relu.default]
    assert torch.equal(fx.GraphModule({}, graph)(*inputs), function(*inputs))


@pytest.mark.parametrize("quant", ["dynamic", "norm"])
def test_results_that_are_flattened_to_tokens_are_joined(quant: str) -> None:
    def function(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        if quant == "dynamic":
            codes, scales = ours.dynamic_mxfp4_quant(x)
        else:
            codes, scales = ours.rmsnorm_mxfp4_quant(x, None, 1e-6, cast_order="scale_cast")
        return ours.mxfp4_gemm(codes.view(3, 64), scales.view(3, 4), w, s, out_dtype=torch.float32)

    inputs = (torch.randn(2, 3, 64).transpose(0, 1), *_weight(32, 128))
    graph = traced(function, *inputs)
    assert not then_gemm.takes_an_order(then_gemm._pair_of(_first_op(graph)))  # on a CPU
    assert len(_join(graph)) == 1
    (joined,) = [node for node in graph.nodes if node.op == "call_function"]
    assert joined.kwargs["axes"] == 2
    assert torch.equal(fx.GraphModule({}, graph)(*inputs), function(*inputs))


def _first_op(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "call_function")


def test_graphs_that_no_tracer_makes_are_left() -> None:
    def function(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        codes, scales, total = ours.rmsnorm_add_mxfp4_quant(x, x, None, 1e-6, cast_order="scale_cast")
        return ours.mxfp4_gemm(codes, scales, w, s, out_dtype=torch.float32), total

    def untold(quant: fx.Node) -> None:
        del quant.meta["val"]

    def from_behind(quant: fx.Node) -> None:
        (total,) = (user for user in quant.users if user.args[1] == 2)
        total.args = (quant, -1)

    def twice(quant: fx.Node) -> None:
        with quant.graph.inserting_after(quant):
            again = quant.graph.call_function(operator.getitem, (quant, 2))
        again.meta["val"] = quant.meta["val"][2]
        output = quant.graph.output_node()
        output.args = ((*output.args[0], again),)

    def wait(quant: fx.Node) -> None:
        with quant.graph.inserting_after(next(iter(quant.users))):
            quant.graph.call_function(
                torch.ops.aten._assert_async.msg, (quant.graph.find_nodes(op="placeholder")[0], "")
            )

    for edit in (untold, from_behind, twice, wait):
        graph = traced(function, torch.randn(3, 64), *_weight())
        edit(_first_op(graph))
        assert _join(graph) == [], edit.__name__
    assert len(_join(traced(function, torch.randn(3, 64), *_weight()))) == 1


def test_axes_that_the_input_has_not_are_refused() -> None:
    (w, s), x = _weight(), torch.randn(3, 64)
    for axes in (0, 3):
        with pytest.raises(fp.UnsupportedInput, match=f"axes: got {axes}, allowed 1 to 2"):
            ours.dynamic_mxfp4_quant.then_gemm(x, w_codes=w, w_scales=s, out_dtype=torch.float32, axes=axes)


@needs_triton
def test_every_joined_op_has_an_adapter_that_may_be_chosen() -> None:
    from fusionpasses.providers import _IMPLEMENTS
    from fusionpasses.providers.triton import ADAPTERS

    names = {str(joined).partition(".")[2] for joined in then_gemm.THEN_GEMM.values()}
    assert names == {name for name in OPS if name.endswith("then_gemm")}
    assert names == {name for name in ADAPTERS if name.endswith("then_gemm")}
    assert names <= _IMPLEMENTS["triton"]


HINDERED = {
    "a scale is read": lambda x, w, s: _apart(x, w, s, lambda codes, scales: scales.float()),
    "codes are returned": lambda x, w, s: _apart(x, w, s, lambda codes, scales: codes),
    "scales of another quant": lambda x, w, s: ours.mxfp4_gemm(
        ours.dynamic_mxfp4_quant(x)[0], ours.dynamic_mxfp4_quant(x + 1)[1], w, s, out_dtype=torch.float32
    ),
    "a view between": lambda x, w, s: ours.mxfp4_gemm(
        *(part.view(1, *part.shape) for part in ours.dynamic_mxfp4_quant(x)), w, s, out_dtype=torch.float32
    ),
    "codes and scales flattened to other tokens": lambda x, w, s: _otherwise(x, w, s),
    "codes are the weight": lambda x, w, s: _of_itself(x),
    "codes are returned, and flattened": lambda x, w, s: _flat(x, w, s),
    "what reads both is no product": lambda x, w, s: torch.cat([part.view(-1) for part in ours.dynamic_mxfp4_quant(x)]),
    "weight-only": lambda x, w, s: ours.mxfp4_gemm_a16w4(x, w, s),
    "the weight comes later": lambda x, w, s: _late(x, w, s),
    "something is written between": lambda x, w, s: _written(x, w, s),
}


def _apart(x: Tensor, w: Tensor, s: Tensor, read: Any) -> tuple[Tensor, Tensor]:
    codes, scales = ours.dynamic_mxfp4_quant(x)
    return ours.mxfp4_gemm(codes, scales, w, s, out_dtype=torch.float32), read(codes, scales)


def _flat(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = ours.dynamic_mxfp4_quant(x.view(3, 2, 32))
    y = ours.mxfp4_gemm(codes.view(3, 32), scales.view(3, 2), w, s, out_dtype=torch.float32)
    return y, codes


def _otherwise(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    codes, scales = ours.dynamic_mxfp4_quant(torch.cat([x, x, x, x]).view(2, 3, 2, 64))  # two axes become one, not last
    return ours.mxfp4_gemm(codes.view(6, 2, 32), scales.view(6, 2, 2), w, s, out_dtype=torch.float32)


def _of_itself(x: Tensor) -> Tensor:
    codes, scales = ours.dynamic_mxfp4_quant(x)
    return ours.mxfp4_gemm(codes, scales, codes, scales, out_dtype=torch.float32)


def _late(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    codes, scales = ours.dynamic_mxfp4_quant(x)
    return ours.mxfp4_gemm(codes, scales, w ^ 1, s, out_dtype=torch.float32)


def _written(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    codes, scales = ours.dynamic_mxfp4_quant(x)
    w.copy_(w ^ 1)
    return ours.mxfp4_gemm(codes, scales, w, s, out_dtype=torch.float32)


def _drawn(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = ours.dynamic_mxfp4_quant(x)
    noise = torch.bernoulli(x.sigmoid())
    return noise, ours.mxfp4_gemm(codes, scales, w, s, out_dtype=torch.float32)


@pytest.mark.parametrize("why", HINDERED)
def test_others_are_left_as_they_are(why: str) -> None:
    graph = traced(HINDERED[why], torch.randn(3, 64), *_weight())
    before = str(graph)
    assert _join(graph) == []
    assert str(graph) == before


def test_the_second_of_two_quants_is_joined_all_the_same() -> None:
    """What hinders one is of no other's concern; random numbers hinder none."""

    def function(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return (
            ours.mxfp4_gemm(*ours.dynamic_mxfp4_quant(x + 2), w, s, out_dtype=torch.float32),  # before what is written
            _written(x, w, s),
            *_drawn(x, w, s),
            ours.mxfp4_gemm(*ours.dynamic_mxfp4_quant(x * 2), w, s, out_dtype=torch.float32),
        )

    graph = traced(function, torch.randn(3, 64), *_weight())
    assert [line.split()[:2] for line in _join(graph)] == [["3", "dynamic_mxfp4_quant"]]


# ---- where it pays


def pair_of(tokens: int, rows: int, width: int, layout: str, **providers: str) -> then_gemm.Pair:
    graph = fx.Graph()
    names = ("x", "w", "s")
    tiles = -(-rows // 16), -(-width // 128)
    shapes = {"x": (tokens, width), "w": (*tiles, 1024), "s": (*tiles, 64)}
    if layout == "linear":
        shapes |= {"w": (rows, width // 2), "s": (rows, width // 32)}
    x, w, s = (graph.placeholder(name) for name in names)
    for node, name in zip((x, w, s), names, strict=True):
        node.meta["val"] = torch.empty(
            shapes[name], dtype=torch.bfloat16 if name == "x" else torch.uint8, device="meta"
        )
    quant = graph.call_function(ours.dynamic_mxfp4_quant.default, (x,), {"provider": providers.get("quant", "triton")})
    quant.meta["val"] = _mxfp4.fake_quantized(x.meta["val"])
    codes, scales = (graph.call_function(operator.getitem, (quant, i)) for i in range(2))
    codes.meta["val"], scales.meta["val"] = quant.meta["val"]
    gemm = graph.call_function(
        ours.mxfp4_gemm.default,
        (codes, scales, w, s),
        {"out_dtype": torch.bfloat16, "layout": layout, "rows": rows, "provider": providers.get("gemm", "triton")},
    )
    gemm.meta["val"] = torch.empty(tokens, rows, dtype=torch.bfloat16, device="meta")
    return then_gemm.Pair(quant, {0: codes, 1: scales}, gemm, 1)


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "layout", "pays"),
    [
        (32, 36864, 7168, "tiles", True),
        (640, 36864, 7168, "tiles", True),
        (1, 7168, 16384, "tiles", True),
        (32, 2112, 7168, "tiles", True),
        (16, 24576, 1536, "tiles", True),
        (1, 2112, 7168, "tiles", True),  # alone, each program decodes tokens
        (20, 4096, 4096 + 256, "tiles", True),
        (20, 4096, 4096 + 128, "tiles", False),  # wgmma, which weight-only is not
        (32, 0, 7168, "tiles", False),
        (16, 2112, 7168, "tiles", True),
        (32, 36864, 7168, "linear", False),
        (641, 36864, 7168, "tiles", False),  # dequantised, then BLAS
        (32, 36864, 7168 + 128, "tiles", False),  # half a step of wgmma
        (32, 2112, 7168 + 32, "tiles", False),  # a quarter of a column
        (0, 36864, 7168, "tiles", False),
        (640, 64, 2**23, "tiles", False),  # places of 33 bits
    ],
)
def test_it_pays_where_the_product_takes_tokens_in_order(
    monkeypatch: pytest.MonkeyPatch, tokens: int, rows: int, width: int, layout: str, pays: bool
) -> None:
    monkeypatch.setattr(remarks, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(then_gemm.arch, "of", lambda device: H200)
    pair = pair_of(tokens, rows, width, layout)
    assert then_gemm.takes_an_order(pair).ok == pays
    for other in ("reference", "aiter"):
        assert not then_gemm.takes_an_order(pair_of(tokens, rows, width, layout, quant=other))
        assert not then_gemm.takes_an_order(pair_of(tokens, rows, width, layout, gemm=other))
    assert then_gemm.takes_an_order(pair._replace(axes=2)).ok == pays
    norm = pair.quant.graph.call_function(ours.rmsnorm_mxfp4_quant.default, pair.quant.args, pair.quant.kwargs)
    assert not then_gemm.takes_an_order(pair._replace(quant=norm, axes=2))
    monkeypatch.setattr(remarks, "architecture", lambda device: None)
    assert not then_gemm.takes_an_order(pair)


@needs_triton
@pytest.mark.parametrize(
    ("layout", "gpu", "provider", "said"),
    [
        ("tiles", H200, "triton", True),
        ("linear", H200, "triton", False),  # no product of it takes an order
        ("tiles", Arch("gfx950", warp_size=64, processors=256), "triton", False),  # nor one there
        ("tiles", H200, "reference", False),
    ],
)
def test_sizes_that_are_no_numbers_are_said(
    monkeypatch: pytest.MonkeyPatch, layout: str, gpu: Arch, provider: str, said: bool
) -> None:
    monkeypatch.setattr(remarks, "architecture", lambda device: gpu.name)
    monkeypatch.setattr(then_gemm.arch, "of", lambda device: gpu)
    pair = pair_of(32, 2112, 7168, layout, quant=provider, gemm=provider)
    graph = pair.gemm.graph
    tokens = ShapeEnv().create_unbacked_symint()
    x: Any = next(iter(graph.nodes))
    results = pair.quant, *pair.results.values(), pair.gemm
    with FakeTensorMode(shape_env=tokens.node.shape_env):
        x.meta["val"] = torch.empty(tokens, 7168, dtype=torch.bfloat16, device="meta")
        pair.quant.meta["val"] = _mxfp4.fake_quantized(x.meta["val"])
        for place, result in pair.results.items():
            result.meta["val"] = pair.quant.meta["val"][place]
        pair.gemm.meta["val"] = torch.empty(tokens, 2112, dtype=torch.bfloat16, device="meta")
    graph.output(pair.gemm)
    before = str(graph)
    line = "1 dynamic_mxfp4_quant not joined with the mxfp4_gemm behind, which takes sizes that are numbers when"
    assert [text.startswith(line) for text in then_gemm.join(graph).left] == [True] * said
    assert str(graph) == before
    assert all(node in graph.nodes for node in results)


# ---- what is launched


def calls(tokens: int, rows: int, width: int, device: str = "meta") -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """Each joined op for a prepared weight."""
    if device == "meta":
        tiles = -(-rows // 16), -(-width // 128)
        codes = torch.empty(*tiles, 1024, dtype=torch.uint8, device="meta")
        prepared: tuple[Any, ...] = codes, torch.empty(*tiles, 64, dtype=torch.uint8, device="meta"), 0
    else:
        codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device=device)
        scales = torch.randint(118, 126, (rows, width // 32), dtype=torch.uint8, device=device)
        prepared = _mxfp4_weight.prepare(codes, scales)
    of_gemm = {"w_codes": prepared[0], "w_scales": prepared[1], "layout": "tiles", "rows": rows, "shift": prepared[2]}
    of_gemm["out_dtype"] = torch.bfloat16
    if device == "meta":
        wide = torch.empty(tokens, 2 * width, dtype=torch.bfloat16, device=device)
    else:
        wide = torch.randn(tokens, 2 * width, device=device).bfloat16()
    x, y = wide[:, :width], wide[:, width:]
    weight = torch.ones(width, dtype=torch.bfloat16, device=device)
    second = (x, weight, 1e-6, y[:, :512], weight[:512], 1e-5)
    yield "dynamic_mxfp4_quant.then_gemm", (x,), of_gemm
    if width % 128 == 0:
        heads = wide.view(2 * width // 128, tokens, 128)[: width // 128].transpose(0, 1)  # as a bmm gives them
        yield "dynamic_mxfp4_quant.then_gemm", (heads,), of_gemm | {"axes": 2}
        yield "rmsnorm_mxfp4_quant.then_gemm", (heads, None, 1e-6), of_gemm | {"cast_order": "cast_scale", "axes": 2}
    yield "rmsnorm_mxfp4_quant.then_gemm", (x, weight, 1e-6), of_gemm | {"cast_order": "cast_scale"}
    yield "rmsnorm_add_mxfp4_quant.then_gemm", (x, y, weight, 1e-6), of_gemm | {"cast_order": "cast_scale"}
    orders = {"cast_order": "cast_scale", "cast_order2": "cast_scale"}
    yield "rmsnorm_mxfp4_quant.with_second_then_gemm", second, of_gemm | orders
    yield "silu_mul_mxfp4_quant.then_gemm", (x, y), of_gemm | {"cast_order": "cast_mul"}


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "rows", "width", "kernels"),
    [
        (32, 36864, 7168, ["mxfp4_gemm_wgmma"]),
        (32, 36864, 7168 + 128, ["mxfp4_gemm_interleave", "mxfp4_gemm_wgmma"]),
        (32, 2112, 7168, ["mxfp4_gemm", "mxfp4_gemm_sum"]),
        (32, 2112, 7168 + 32, ["mxfp4_gemm_arrange", "mxfp4_gemm", "mxfp4_gemm_sum"]),
        (8, 2112, 7168, ["mxfp4_gemm", "mxfp4_gemm_sum"]),
        (16, 2112, 7168, ["mxfp4_gemm", "mxfp4_gemm_sum"]),
        (8, 2112, 7168 + 32, ["mxfp4_gemm", "mxfp4_gemm_sum"]),  # decoded in each program
        (20, 4096, 4096, ["mxfp4_gemm_wgmma"]),  # mxfp4_gemm if it were weight-only
        (0, 2112, 7168, []),
    ],
)
def test_a_quant_that_may_leaves_tokens_in_order(tokens: int, rows: int, width: int, kernels: list[str]) -> None:
    from fusionpasses.providers import triton as provider
    from tools.configs import TARGETS
    from tools.launches import _pretended

    for name, args, kwargs in calls(tokens, rows, width):
        with _pretended(provider, TARGETS["sm_90"]) as recorded:
            outputs = provider.ADAPTERS[name](*args, **kwargs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        assert first.shape == (tokens, rows)
        of_quant, *of_product = recorded or [None]
        if "norm" in name and "axes" in kwargs:
            assert tokens == 0 or of_quant.constants["TOKEN_TILES"] is None
            continue
        assert [launch.kernel.__name__ for launch in of_product] == kernels
        if of_quant is not None:
            in_order = width % 256 == 0
            assert (of_quant.constants["TOKEN_TILES"] is not None) == in_order
            if kernels[0] == "mxfp4_gemm":  # scales of x
                assert ("x_scales_ptr" in of_product[0].constants) == in_order


# ---- on a GPU


compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)


@pytest.mark.gpu
@compiled
@needs_hopper
@pytest.mark.parametrize(
    ("tokens", "rows", "width"),
    [
        *((1, 8192, 8192), (1, 7168, 16384), (8, 2112, 7168), (12, 24576, 1536), (17, 2112, 7168), (32, 2112, 7168)),
        *((20, 24576, 1536), (32, 36864, 7168), (64, 18432, 7168), (100, 18432, 7168), (640, 8192, 8192)),
        *((32, 2112, 7200), (32, 8192, 8320), (700, 2112, 7168)),
    ],
)
def test_gpu_bytes_are_those_of_the_two_ops(tokens: int, rows: int, width: int) -> None:
    torch.manual_seed(tokens)
    for name, args, kwargs in calls(tokens, rows, width, "cuda"):
        of_quant = {key: value for key, value in kwargs.items() if key.startswith("cast_order")}
        of_gemm = {key: value for key, value in kwargs.items() if key not in of_quant}
        quant = OPS[name.removesuffix("then_gemm").rstrip("._") + (".default" if ".then" in name else "")]
        codes, scales, *others = quant.overload(*args, **of_quant, provider="triton")
        product = {key: value for key, value in of_gemm.items() if key != "axes"}
        codes, scales = (part.flatten(-of_gemm.get("axes", 1)) for part in (codes, scales))
        want = ours.mxfp4_gemm(codes, scales, **product, provider="triton"), *others
        for _ in range(3):  # in full, then replayed
            got = OPS[name].overload(*args, **kwargs, provider="triton")
            for one, two in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
                assert torch.equal(one, two), f"{name} {tokens} x {width}, {rows} rows"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 700), rows=st.integers(1, 40000), blocks=st.integers(1, 600))
def test_the_order_asked_for_is_one_that_the_product_reads(tokens: int, rows: int, blocks: int) -> None:
    if not probe_triton():
        pytest.skip(probe_triton().why)
    from fusionpasses.kernels import gemm_choice

    choice = gemm_choice.choose(tokens, rows, 32 * blocks, H200, w4a4=True, layout="tiles")
    order = gemm_choice.token_order(choice, tokens, rows, 32 * blocks, "tiles")
    if order is None:
        return
    assert choice.kernel == ("mxfp4_gemm_wgmma" if order else "mxfp4_gemm")
    assert order in (0, choice.options["TOKEN_TILES"])
    assert blocks % (4 * int(choice.options.get("UNROLLED", 1))) == 0
