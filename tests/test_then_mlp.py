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
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

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


def _mlp(
    change: Callable[..., Any] | None = None, *, halves: Any = None, behind: Any = None, provider: str = "auto"
) -> Callable[..., Any]:
    def function(x: Tensor, w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Any:
        wide = ours.dynamic_mxfp4_quant.then_gemm(x, w_codes=w, w_scales=s, out_dtype=torch.bfloat16)
        more = () if change is None else (change(wide, dw),)
        gate, up = wide.chunk(2, -1) if halves is None else halves(wide)
        dw = dw if behind is None else behind(dw)
        y = ours.silu_mul_mxfp4_quant.then_gemm(
            gate, up, cast_order="cast_mul", w_codes=dw, w_scales=ds, out_dtype=torch.float32, provider=provider
        )
        return y, *more

    return function


#: What is joined, and what is not; why.
FREE = {
    "chunk": _mlp(),
    "split": _mlp(halves=lambda y: y.split([64, 64], -1)),
    "slices": _mlp(halves=lambda y: (y[..., :64], y[..., 64:])),
    "by name": lambda *tensors: _by_name(*tensors),
}
HINDERED = {
    "the product of gate and up is read otherwise": _mlp(lambda y, _: y.sum()),
    "gate alone is": _mlp(lambda y, _: y[:, :64].sum()),
    "up comes first": _mlp(halves=lambda y: y.chunk(2, -1)[::-1]),
    "gate is up": _mlp(halves=lambda y: (y[:, :64], y[:, :64])),
    "they overlap": _mlp(halves=lambda y: (y[:, :64], y[:, 32:96])),
    "they take turns": _mlp(halves=lambda y: (y[:, ::2], y[:, 1::2])),
    "rows take turns": _mlp(halves=lambda y: (y.view(6, 64)[:3], y.view(6, 64)[1:4])),
    "up is of another tensor": _mlp(halves=lambda y: (y[:, :64], torch.ones(3, 128, dtype=torch.bfloat16)[:, 64:])),
    "a part is left over": lambda x, w, s, dw, ds: _mlp(halves=lambda y: (y[:, :64], y[:, 64:128]))(
        x, torch.cat([w, w]), torch.cat([s, s]), dw, ds
    ),
    "rows are copied": _mlp(halves=lambda y: [part.flip(0) for part in y.chunk(2, -1)]),
    "the weight comes later": _mlp(behind=lambda w: w ^ 1),
    "something is written between": _mlp(lambda y, w: w.copy_(w ^ 1)),
    "other providers": _mlp(provider="reference"),
    "the product's bias is gate": lambda *tensors: _biased(*tensors),
    "a token is the first's two last axes": lambda *tensors: _of_two_axes(*tensors),
    "a token is the second's two last axes": lambda *tensors: _to_two_axes(*tensors),
}


def _by_name(x: Tensor, w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> tuple[Tensor]:
    gate, up = ours.dynamic_mxfp4_quant.then_gemm(x, w_codes=w, w_scales=s, out_dtype=torch.bfloat16).chunk(2, -1)
    of_down = {"w_codes": dw, "w_scales": ds, "out_dtype": torch.float32}
    return (ours.silu_mul_mxfp4_quant.then_gemm(gate, up=up, cast_order="cast_mul", **of_down),)


def _biased(x: Tensor, w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Tensor:
    gate, up = ours.dynamic_mxfp4_quant.then_gemm(x[0], w_codes=w, w_scales=s, out_dtype=torch.float32).chunk(2, -1)
    of_down = {"w_codes": dw, "w_scales": ds, "out_dtype": torch.float32, "bias": gate[:40]}
    y: Tensor = ours.silu_mul_mxfp4_quant.then_gemm(gate, up, cast_order="cast_mul", **of_down)
    of_down |= {"w_codes": torch.cat([dw, dw])[:64], "w_scales": torch.cat([ds, ds])[:64], "bias": gate}
    return y + ours.silu_mul_mxfp4_quant.then_gemm(gate, up, cast_order="cast_mul", **of_down)[:40]


def _of_two_axes(x: Tensor, w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Tensor:
    of_up = {"w_codes": w, "w_scales": s, "out_dtype": torch.bfloat16, "axes": 2}
    gate, up = ours.dynamic_mxfp4_quant.then_gemm(x.view(3, 2, 32), **of_up).chunk(2, -1)
    of_down = {"w_codes": dw, "w_scales": ds, "out_dtype": torch.float32}
    y: Tensor = ours.silu_mul_mxfp4_quant.then_gemm(gate, up, cast_order="cast_mul", **of_down)
    return y


def _to_two_axes(x: Tensor, w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Tensor:
    of_up = {"w_codes": w, "w_scales": s, "out_dtype": torch.bfloat16}
    gate, up = ours.dynamic_mxfp4_quant.then_gemm(x, **of_up).chunk(2, -1)
    of_down = {"w_codes": torch.cat([dw] * 3, 1), "w_scales": torch.cat([ds] * 3, 1), "out_dtype": torch.float32}
    y: Tensor = ours.silu_mul_mxfp4_quant.then_gemm(gate, up, cast_order="cast_mul", axes=2, **of_down)
    return y


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


def test_the_bias_may_be_no_half() -> None:
    """Of one product, not of the two of ``_biased``, which read gate and up twice."""

    def function(x: Tensor, w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Tensor:
        gate, up = ours.dynamic_mxfp4_quant.then_gemm(x, w_codes=w, w_scales=s, out_dtype=torch.float32).chunk(2, -1)
        of_down = {"w_codes": dw, "w_scales": ds, "out_dtype": torch.float32, "bias": gate}
        y: Tensor = ours.silu_mul_mxfp4_quant.then_gemm(gate, up, cast_order="cast_mul", **of_down)
        return y

    weights = _weights() | dict(
        zip(("down_codes", "down_scales"), _mxfp4.quantize(torch.randn(64, 64), "even"), strict=True)
    )
    graph = traced(function, torch.randn(64), *weights.values())
    before = str(graph)
    assert then_mlp.join(graph, lambda mlp: True) == []
    assert str(graph) == before


def test_results_that_no_tracer_takes_are_left() -> None:
    def function(x: Tensor, w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
        of_up = {"w_codes": w, "w_scales": s, "out_dtype": torch.bfloat16}
        quant = ours.rmsnorm_add_mxfp4_quant
        y, total = quant.then_gemm(x, x, None, 1e-6, cast_order="scale_cast", **of_up)
        gate, up = y.chunk(2, -1)
        of_down = {"w_codes": dw, "w_scales": ds, "out_dtype": torch.float32}
        return ours.silu_mul_mxfp4_quant.then_gemm(gate, up, cast_order="cast_mul", **of_down), total

    for place in (1, -1):
        graph = traced(function, torch.randn(3, 64), *_weights().values())
        (first,) = (node for node in graph.nodes if node.target is ours.rmsnorm_add_mxfp4_quant.then_gemm)
        (total,) = (user for user in first.users if user.args[1] == 1)
        total.args = (first, place)
        assert len(then_mlp.join(graph, lambda mlp: True)) == (place == 1)
        graph.lint()


def test_messages_name_arguments_of_the_call() -> None:
    x, good = torch.randn(3, 64), _weights() | {"out_dtype": torch.float32, "down_dtype": torch.float32}
    good |= {"act_cast_order": "cast_mul"}
    assert ours.dynamic_mxfp4_quant.then_mlp(x, **good).shape == (3, 40)
    three = _mxfp4.quantize(torch.randn(96, 64), "even")
    for change, text in (
        ({"down_codes": good["down_codes"].int()}, "down_codes.dtype: got torch.int32"),
        ({"down_scales": good["down_scales"][1:]}, "down_scales: got"),
        ({"down_bias": torch.ones(3)}, "down_bias: got"),
        ({"down_dtype": torch.int8}, "down_dtype: got torch.int8"),
        ({"down_layout": "other"}, "down_layout: got 'other'"),
        ({"down_rows": 3}, "down_rows, down_shift: got 3 and 0"),
        ({"act_cast_order": "other"}, "act_cast_order: got 'other'"),
        ({"act_scale_mode": "other"}, "act_scale_mode: got 'other'"),
        ({"activation": "other"}, "activation: got 'other'"),
        ({"w_codes": good["w_codes"].int()}, "w_codes.dtype: got torch.int32"),
        (dict(zip(("w_codes", "w_scales"), three, strict=True)), "w_codes: got 96 rows, allowed multiples of 64"),
    ):
        with pytest.raises(fp.UnsupportedInput, match=f"^{text}"):
            ours.dynamic_mxfp4_quant.then_mlp(x, **good | change)


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
    (20, 18432, 7168 + 128, False),  # the first's x is no whole steps
    (20, 2048, 4096, False),  # of a size that did not run on a GPU: three tiles of tokens, one warpgroup
    (9, 4352, 4096, False),  # nor with a second product by mma.sync
]


@needs_triton
@pytest.mark.parametrize(("tokens", "inner", "width", "pays"), SIZES)
def test_it_pays_where_the_first_product_is_of_wgmma(
    monkeypatch: pytest.MonkeyPatch, tokens: int, inner: int, width: int, pays: bool
) -> None:
    monkeypatch.setattr(remarks, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(then_mlp.arch, "of", lambda device: H200)
    changes: list[tuple[str, Any]] = [("bias", 1), ("provider", "aiter"), ("out_dtype", torch.float16)]
    changes += [("layout", "linear"), ("second act_dtype", torch.float32), ("second layout", "linear")]
    each = [({}, {name[7:]: of}) if name.startswith("second") else ({name: of}, {}) for name, of in changes]
    for change, of_behind in (*each, ({}, {})):
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
            ours.silu_mul_mxfp4_quant.then_gemm,
            (first, first),
            of_second | weights | {"cast_order": "cast_mul"} | of_behind,
        )
        second.meta["val"] = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
        mlp = then_mlp.Mlp(first, first, second)
        assert then_mlp.saves_a_launch(mlp) == (pays and not change and not of_behind), (change, of_behind)
    if tokens:
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            mode.shape_env.create_unbacked_symint()
            first.meta["val"] = torch.empty(mode.shape_env.create_unbacked_symint(), 2 * inner, dtype=torch.bfloat16)
            assert not then_mlp.saves_a_launch(mlp)
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
        moved = torch.empty(kwargs["w_codes"].numel() + 16, dtype=torch.uint8)
        moved = moved[8 - moved.data_ptr() % 16 :][: kwargs["w_codes"].numel()].view(kwargs["w_codes"].shape)
        for change in (
            {"act_dtype": torch.float32},
            {"bias": torch.empty(2 * inner, device="meta")},
            {"out_dtype": torch.float16},
            {"w_codes": moved},
        ):
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
