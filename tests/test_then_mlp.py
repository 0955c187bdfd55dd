"""Gated MLPs in one call: in graphs, in what is launched, and on a GPU by the bytes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import helpers
import pytest
import torch
from test_then_gemm import H200, layer, traced
from torch import Tensor, fx, nn

import fusionpasses as fp
from fusionpasses import remarks, then_gemm, then_mlp
from fusionpasses._verdict import Verdict
from fusionpasses.ops import OPS, _mxfp4, _mxfp4_weight
from fusionpasses.probes import probe_triton
from fusionpasses.testing import assert_equivalent, capture

ours = torch.ops.fusionpasses
needs_triton = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)


# ---- graphs


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it paid on any machine."""
    monkeypatch.setattr(then_gemm, "join", functools.partial(then_gemm.join, pays=lambda pair: Verdict(True, "")))
    monkeypatch.setattr(then_mlp, "join", functools.partial(then_mlp.join, pays=lambda mlp: True))


def joined(report: Any) -> list[list[str]]:
    return [line.split()[:2] for line in report.messages if "gated MLP" in line]


class Tokens(nn.Module):
    """Of three axes, without a norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.up = fp.Mxfp4Linear.from_linear(nn.Linear(64, 128, bias=False))
        self.down = fp.Mxfp4Linear.from_linear(nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).split(64, -1)
        return self.down(nn.functional.gelu(gate, approximate="tanh") * up)


@pytest.mark.usefixtures("everywhere")
def test_joined_graphs_compute_the_same() -> None:
    model, inputs = layer()
    with torch.no_grad():
        (graph,) = assert_equivalent(model, inputs).graphs
        assert joined(graph.report) == [["1", "rmsnorm_add_mxfp4_quant"]]
        (graph,) = assert_equivalent(Tokens().eval(), (helpers.random(2, 3, 64),)).graphs
        assert joined(graph.report) == [["1", "dynamic_mxfp4_quant"]]


@pytest.mark.usefixtures("everywhere")
def test_counts_and_sites_are_those_of_all_ops() -> None:
    model, inputs = layer()
    with torch.no_grad():
        report = capture(model, inputs).graphs[0].report
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(then_mlp, "join", lambda graph: [])
            apart = capture(model, inputs).graphs[0].report
    assert report.ops_after == {op: count for op, count in apart.ops_after.items() if op != "aten.split"}
    assert report.nodes_after < apart.nodes_after
    assert [site.lines() for site in report.sites] == [site.lines() for site in apart.sites]


def test_nothing_is_joined_where_nothing_is_saved() -> None:
    """On a CPU no product quantises what it gives."""
    model, inputs = layer()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        pays = functools.partial(then_gemm.join, pays=lambda pair: Verdict(True, ""))
        patch.setattr(then_gemm, "join", pays)
        report = capture(model, inputs).graphs[0].report
    assert [line for line in report.messages if "joined" in line]
    assert not joined(report)


@pytest.mark.usefixtures("everywhere")
@torch.no_grad()
def test_generated_code_calls_it() -> None:
    model, inputs = layer()
    plain = torch.compile(model)(*inputs)
    torch._dynamo.reset()
    for got, want in zip(torch.compile(model, backend=fp.fusion_backend())(*inputs), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


def _weights() -> dict[str, Tensor]:
    names = ("w_codes", "w_scales"), ("down_codes", "down_scales")
    weights = (_mxfp4.quantize(torch.randn(rows, 64), "even") for rows in (128, 40))
    return {
        name: tensor
        for pair, weight in zip(names, weights, strict=True)
        for name, tensor in zip(pair, weight, strict=True)
    }


def _mlp(change: Callable[..., Any] | None = None, *, halves: Any = None, behind: Any = None) -> Callable[..., Any]:
    def function(x: Tensor, w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Any:
        wide = ours.dynamic_mxfp4_quant.then_gemm(x, w_codes=w, w_scales=s, out_dtype=torch.bfloat16)
        more = () if change is None else (change(wide, dw),)
        gate, up = wide.chunk(2, -1) if halves is None else halves(wide)
        dw = dw if behind is None else behind(dw)
        y = ours.silu_mul_mxfp4_quant.then_gemm(
            gate, up, cast_order="cast_mul", w_codes=dw, w_scales=ds, out_dtype=torch.float32
        )
        return y, *more

    return function


#: What is joined, and what is not; why.
FREE = {
    "chunk": _mlp(),
    "split": _mlp(halves=lambda y: y.split([64, 64], -1)),
    "slices": _mlp(halves=lambda y: (y[..., :64], y[..., 64:])),
}
HINDERED = {
    "the product of gate and up is read otherwise": _mlp(lambda y, _: y.sum()),
    "gate alone is": _mlp(lambda y, _: y[:, :64].sum()),
    "up comes first": _mlp(halves=lambda y: y.chunk(2, -1)[::-1]),
    "gate is up": _mlp(halves=lambda y: (y[:, :64], y[:, :64])),
    "they overlap": _mlp(halves=lambda y: (y[:, :64], y[:, 32:96])),
    "they take turns": _mlp(halves=lambda y: (y[:, ::2], y[:, 1::2])),
    "a part is left over": lambda x, w, s, dw, ds: _mlp(halves=lambda y: (y[:, :64], y[:, 64:128]))(
        x, torch.cat([w, w]), torch.cat([s, s]), dw, ds
    ),
    "rows are copied": _mlp(halves=lambda y: [part.flip(0) for part in y.chunk(2, -1)]),
    "the weight comes later": _mlp(behind=lambda w: w ^ 1),
    "something is written between": _mlp(lambda y, w: w.copy_(w ^ 1)),
}


@pytest.mark.parametrize("what", FREE)
def test_halves_in_any_spelling(what: str) -> None:
    x, weights = torch.randn(3, 64), _weights().values()
    graph = traced(FREE[what], x, *weights)
    assert [line.split()[:2] for line in then_mlp.join(graph, lambda mlp: True)] == [["1", "dynamic_mxfp4_quant"]]
    module = fx.GraphModule({}, graph)
    assert torch.equal(module(x, *weights)[0], FREE[what](x, *weights)[0])


@pytest.mark.parametrize("why", HINDERED)
def test_others_are_left_as_they_are(why: str) -> None:
    graph = traced(HINDERED[why], torch.randn(3, 64), *_weights().values())
    before = str(graph)
    assert then_mlp.join(graph, lambda mlp: True) == []
    assert str(graph) == before


# ---- where it pays


def calls(tokens: int, inner: int, width: int, device: str) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Each joined op for prepared weights."""

    def weight(rows: int, columns: int) -> tuple[Any, ...]:
        if device == "meta":
            tiles = -(-rows // 16), -(-columns // 128)
            shapes = (*tiles, 1024), (*tiles, 64)
            return *(torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes), 0
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
        scales = torch.randint(116, 122, (rows, columns // 32), dtype=torch.uint8, device=device)
        return _mxfp4_weight.prepare(codes, scales)

    up, down = weight(2 * inner, width), weight(width, inner)
    kwargs: dict[str, Any] = {"w_codes": up[0], "w_scales": up[1], "shift": up[2], "rows": 2 * inner}
    kwargs |= {"down_codes": down[0], "down_scales": down[1], "down_shift": down[2], "down_rows": width}
    kwargs |= {"layout": "tiles", "down_layout": "tiles", "out_dtype": torch.bfloat16, "down_dtype": torch.bfloat16}
    make = torch.empty if device == "meta" else torch.randn
    x, y = (make(tokens, width, device=device).bfloat16() for _ in range(2))
    norm = torch.ones(width, dtype=torch.bfloat16, device=device)
    activated = kwargs | {"activation": "silu", "act_cast_order": "cast_mul"}
    yield "dynamic_mxfp4_quant.then_mlp", (x,), activated
    yield "dynamic_mxfp4_quant.then_mlp", (x,), kwargs | {"activation": "gelu_tanh", "act_cast_order": "mul_cast"}
    yield "dynamic_mxfp4_quant.then_mlp", (x,), kwargs | {"activation": "x_sigmoid", "act_cast_order": "cast_each"}
    yield "rmsnorm_mxfp4_quant.then_mlp", (x, norm, 1e-6), activated | {"cast_order": "cast_scale"}
    yield "rmsnorm_add_mxfp4_quant.then_mlp", (x, y, norm, 1e-6), activated | {"cast_order": "cast_scale"}


SIZES = [
    (9, 18432, 7168, True),
    (32, 18432, 7168, True),
    (32, 8192, 4096, True),
    (33, 18432, 7168, False),  # more than four tiles of tokens
    (8, 18432, 7168, False),  # gate_up by mma.sync
    (32, 1024, 7168, False),  # and here
    (32, 18432 + 32, 7168, False),  # the second product's x is no whole columns
    (0, 18432, 7168, False),
]


@needs_triton
@pytest.mark.parametrize(("tokens", "inner", "width", "pays"), SIZES)
def test_it_pays_where_the_first_product_is_of_wgmma(
    monkeypatch: pytest.MonkeyPatch, tokens: int, inner: int, width: int, pays: bool
) -> None:
    monkeypatch.setattr(remarks, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(then_mlp.arch, "of", lambda device: H200)
    for change in ({}, {"bias": 1}, {"provider": "aiter"}, {"out_dtype": torch.float16}, {"layout": "linear"}):
        graph = fx.Graph()
        _, (x,), kwargs = next(calls(tokens, inner, width, "meta"))
        node = graph.placeholder("x")
        node.meta["val"] = x
        of_first = {key: kwargs[key] for key in ("layout", "out_dtype", "rows")} | {"provider": "triton"} | change
        weights = {key: graph.placeholder(key) for key in ("w_codes", "w_scales")}
        first = graph.call_function(ours.dynamic_mxfp4_quant.then_gemm, (node,), of_first | weights)
        first.meta["val"] = torch.empty(tokens, 2 * inner, dtype=of_first["out_dtype"], device="meta")
        of_second = {"layout": "tiles", "rows": width, "out_dtype": torch.bfloat16, "provider": "triton"}
        second = graph.call_function(
            ours.silu_mul_mxfp4_quant.then_gemm, (first, first), of_second | weights | {"cast_order": "cast_mul"}
        )
        second.meta["val"] = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
        assert then_mlp.saves_a_launch(then_mlp.Mlp(first, first, second)) == (pays and not change), change
    monkeypatch.setattr(remarks, "architecture", lambda device: None)
    assert not then_mlp.saves_a_launch(then_mlp.Mlp(first, first, second))


@needs_triton
@pytest.mark.parametrize(("tokens", "inner", "width", "pays"), SIZES)
def test_what_is_launched(tokens: int, inner: int, width: int, pays: bool) -> None:
    from fusionpasses.providers import triton as provider
    from tools.configs import TARGETS
    from tools.launches import _pretended

    for name, args, kwargs in calls(tokens, inner, width, "meta"):
        with _pretended(provider, TARGETS["sm_90"]) as recorded:
            outputs = provider.ADAPTERS[name](*args, **kwargs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        assert first.shape == (tokens, width)
        names = [launch.kernel.__name__ for launch in recorded]
        assert ("silu_mul_mxfp4_quant" in names) == (not pays and tokens > 0)
        if pays:
            assert names[1:] == ["mxfp4_gemm_wgmma", "mxfp4_gemm_wgmma"]
            assert [launch.constants["GATE_TILES"] for launch in recorded[1:]] == [inner // 16, None]
    if pays:
        for change in ({"act_dtype": torch.float32}, {"bias": torch.empty(2 * inner, device="meta")}):
            with _pretended(provider, TARGETS["sm_90"]) as recorded:
                provider.ADAPTERS[name](*args, **kwargs | change)
            assert "silu_mul_mxfp4_quant" in [launch.kernel.__name__ for launch in recorded], change


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels")
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)
@pytest.mark.parametrize("tokens", [9, 12, 16, 17, 20, 24, 25, 31, 32])
@pytest.mark.parametrize(("inner", "width"), [(18432, 7168), (16384, 4096), (9984, 7168)])
def test_gpu_bytes_are_those_of_the_two_ops(tokens: int, inner: int, width: int) -> None:
    torch.manual_seed(tokens)
    for name, args, kwargs in calls(tokens, inner, width, "cuda"):
        from fusionpasses.ops._then_mlp import apart

        of_first, of_second = apart(kwargs)
        made = OPS[name.replace("mlp", "gemm")].overload(*args, **of_first, provider="triton")
        wide, *others = made if isinstance(made, tuple) else (made,)
        out = ours.silu_mul_mxfp4_quant.then_gemm(*wide.chunk(2, -1), **of_second, provider="triton")
        for _ in range(3):  # in full, then replayed
            got = OPS[name].overload(*args, **kwargs, provider="triton")
            for one, two in zip(got if isinstance(got, tuple) else (got,), (out, *others), strict=True):
                assert torch.equal(one, two), f"{name} {tokens} x {width}, {inner}"
