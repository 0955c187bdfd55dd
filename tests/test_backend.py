"""``torch.compile(backend=fusion_backend(), ...)``: each way to call it fuses, reports, leaves the rest to Inductor."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from helpers import Norm, Projection, Residual, Trainable, Unnormed, compile_and_run, linear, tokens
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import fusionpasses as fp
from fusionpasses import anchors, backend, dynamo_floats
from fusionpasses.backend import compile_fn
from fusionpasses.patterns import PASS_NAMES
from fusionpasses.report import ANCHORS, GraphReport, Site, Where

ONE = {"rmsnorm_mxfp4_quant": 1}
PRE, POST = "post_grad_custom_pre_pass", "post_grad_custom_post_pass"


@pytest.fixture(scope="module", autouse=True)
def _own_cache() -> Iterator[None]:
    """One compile cache for this file: graphs that several tests share are generated once."""
    with fresh_cache():
        yield


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- modes, options, shapes -------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "dynamic": {"dynamic": True},
    "fullgraph": {"fullgraph": True},
    "dynamic, fullgraph": {"dynamic": True, "fullgraph": True},
    "mode=default": {"mode": "default"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    "an option": {"options": {"epilogue_fusion": False}},
    "an option spelled with a dash": {"options": {"epilogue-fusion": False}},
    "freezing": {"options": {"freezing": True}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_of_torch_compile_fuses(settings):
    model, x = Projection(), tokens()
    result = compile_and_run(model, x, **settings)
    assert result.report.counts == ONE
    assert torch.equal(result.output, model(x))


@pytest.mark.parametrize("settings", [{}, {"dynamic": True}], ids=["default", "dynamic"])
def test_a_residual_add_goes_into_the_fused_op(settings):
    model, x, y = Residual(), tokens(), tokens(seed=5)
    result = compile_and_run(model, x, y, **settings)
    assert result.report.counts == {"rmsnorm_add_mxfp4_quant": 1}
    assert torch.equal(result.output, model(x, y))


def test_nothing_fuses_where_no_norm_feeds_the_quant():
    model, x = Unnormed(), tokens()
    result = compile_and_run(model, x)
    assert result.report.counts == {}
    (site,) = result.report.sites()
    assert (site.status, site.op) == ("nothing to fuse", "dynamic_mxfp4_quant.default")
    assert torch.equal(result.output, model(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mode):
    """With grad mode on and nothing that requires grad, the graph is an inference graph too."""
    model, x = Projection(), tokens()
    fusing = fp.fusion_backend()
    with mode():
        output = torch.compile(model, backend=fusing)(x)
    assert fusing.report.counts == ONE
    assert [g.kind for g in fusing.report.graphs] == ["inference"]
    assert output.is_inference() == (mode is torch.inference_mode)


def test_dynamic_eps_is_why_the_analysis_restarts(monkeypatch):
    """The twin of the dynamic=True cases: left to Dynamo, the eps of a module is a graph input, and is refused."""
    monkeypatch.setattr(dynamo_floats, "specialize_norm_eps", lambda gm, anchors: None)
    result = compile_and_run(Projection(), tokens(), dynamic=True)
    assert result.report.counts == {}
    assert "eps is" in result.report.refused[0].reason


def test_dynamic_shapes_compile_once():
    model, fusing = Projection(), fp.fusion_backend()
    compiled = torch.compile(model, backend=fusing, dynamic=True)
    with torch.no_grad():
        for length in (4, 7, 64):
            assert torch.equal(compiled(tokens(length)), model(tokens(length)))
    assert len(fusing.report.graphs) == 1


def test_mark_dynamic():
    model, fusing = Projection(), fp.fusion_backend()
    compiled = torch.compile(model, backend=fusing)
    x = tokens()
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        compiled(x)
        assert torch.equal(compiled(tokens(9)), model(tokens(9)))
    assert fusing.report.counts == ONE
    assert len(fusing.report.graphs) == 1


def test_a_new_length_recompiles_once_and_is_reported():
    """The twin of mark_dynamic: unmarked, the second length makes a second graph, and that one is dynamic."""
    model, fusing = Projection(), fp.fusion_backend()
    compiled = torch.compile(model, backend=fusing)
    with torch.no_grad():
        for length in (4, 9, 11):
            compiled(tokens(length))
    assert [g.compile_id for g in fusing.report.graphs] == ["0/0", "0/1"]
    assert fusing.report.counts == {"rmsnorm_mxfp4_quant": 2}


def fused_inputs(graph: fx.Graph) -> list[str]:
    return [a.op for n in graph.nodes if str(n.target).startswith("fusionpasses.rms") for a in n.all_input_nodes]


@pytest.mark.parametrize(("freezing", "weight"), [(True, "get_attr"), (False, "placeholder")])
def test_freezing_makes_the_weight_a_constant_and_still_fuses(freezing, weight):
    seen: list[list[str]] = []
    # As an option, freezing does nothing on its own: Dynamo asks the global setting whether to hand parameters over.
    with torch._inductor.config.patch({"freezing": freezing, POST: lambda graph: seen.append(fused_inputs(graph))}):
        result = compile_and_run(Projection(), tokens())
    assert seen == [["placeholder", weight]]
    assert result.report.counts == ONE


def test_reduce_overhead_reaches_inductor_through_transformers_compile_config():
    """transformers passes a CompileConfig as keywords, after copying it: the report must not end up in the copy."""
    from transformers import CompileConfig

    seen: list[bool] = []
    fusing = fp.fusion_backend()
    keywords = CompileConfig(backend=fusing, mode="reduce-overhead").to_dict()
    look = {PRE: lambda graph: seen.append(torch._inductor.config.triton.cudagraphs)}
    with torch._inductor.config.patch(look), torch.no_grad():
        torch.compile(Projection().forward, **keywords)(tokens())
    assert seen == [True]
    assert fusing.report.counts == ONE


# --- training, sub-graphs, graph breaks, export -----------------------------------------------------------------------


def test_training_graph():
    model, x = Trainable(), tokens()
    eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = model(eager_x)
    expected.float().square().sum().backward()
    weight_grad, model.trained.weight.grad = model.trained.weight.grad, None

    result = compile_and_run(model, compiled_x, backward=True)
    assert [g.kind for g in result.report.graphs] == ["forward", "backward"]
    # The bfloat16 branch reads the norm, so the fused op returns it.
    assert [s.op for s in result.report.fused] == ["rmsnorm_mxfp4_quant.with_norm"]
    assert result.report.refused == []
    for got, want in (
        (result.output, expected),
        (compiled_x.grad, eager_x.grad),
        (model.trained.weight.grad, weight_grad),
    ):
        # Inductor keeps float32 where eager rounds to bfloat16, which has 8 bits.
        assert (got - want).abs().max() <= 2**-6 * want.abs().max()


def test_quantising_what_requires_grad_is_refused_eagerly():
    with pytest.raises(fp.UnsupportedInput, match=r"has no gradient.*pass x.detach\(\)"):
        Projection()(tokens().requires_grad_())


def test_quantising_what_requires_grad_is_refused_when_compiling():
    fusing = fp.fusion_backend()
    with pytest.raises(TorchRuntimeError, match=r"UnsupportedInput.*has no gradient.*pass x.detach\(\)"):
        compile_and_run(Projection(), tokens().requires_grad_(), backend=fusing, grad=True)
    assert fusing.report.graphs == []


def test_what_requires_grad_can_be_quantised_with_grad_mode_off():
    assert compile_and_run(Projection(), tokens().requires_grad_()).report.counts == ONE


class Regions(nn.Module):
    """Two layers that share one compiled region."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer() for _ in range(2)])
        self.region = torch.compiler.nested_compile_region(lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.region(layer, x)
        return x


def test_nested_regions_are_fused_and_reported():
    model, x = Regions(Projection), tokens()
    result = compile_and_run(model, x)
    # The region's body is compiled once and called twice; the graph around it holds no site.
    assert [len(g.sites) for g in result.report.graphs] == [1, 0]
    assert result.report.counts == ONE
    assert torch.equal(result.output, model(x))


def test_nested_regions_without_a_norm_are_reported():
    result = compile_and_run(Regions(Unnormed), tokens())
    assert [s.status for s in result.report.sites()] == ["nothing to fuse"]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fusible, self.other = Projection(), Unnormed()

    def forward(self, flag: Tensor, x: Tensor) -> Tensor:
        return torch.cond(flag, self.fusible, self.other, (x,))


def test_branches_of_cond_are_fused_and_reported():
    model, x, fusing = Branches(), tokens(), fp.fusion_backend()
    compiled = torch.compile(model, backend=fusing)
    with torch.no_grad():
        for flag in (torch.tensor(True), torch.tensor(False)):
            assert torch.equal(compiled(flag, x), model(flag, x))
    assert len(fusing.report.graphs) == 3  # two branches and the graph that chooses
    assert [s.status for s in fusing.report.sites()] == ["fused", "nothing to fuse"]


class TrainedBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Trainable(), linear()

    def forward(self, flag: Tensor, x: Tensor) -> Tensor:
        return torch.cond(flag, self.one, self.other, (x,))


def test_branches_of_cond_in_training_count_as_forward_and_backward():
    """Their inputs have names that tell nothing, unlike those of the graph around them."""
    result = compile_and_run(TrainedBranches(), torch.tensor(True), tokens().requires_grad_(), backward=True)
    assert [g.kind for g in result.report.graphs] == ["forward"] * 3 + ["backward"] * 3
    assert [s.op for s in result.report.fused] == ["rmsnorm_mxfp4_quant.with_norm"]


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Projection(), Projection()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_a_graph_break_gives_two_graphs():
    model, x = Broken(), tokens()
    result = compile_and_run(model, x)
    assert [g.compile_id for g in result.report.graphs] == ["0/0", "1/0"]
    assert [s.where.module for s in result.report.fused] == ["first.norm", "second.norm"]
    assert torch.equal(result.output, model(x))


def test_a_graph_without_calls_is_reported_as_empty():
    """Inductor returns early for it, and no pass is called."""
    result = compile_and_run(lambda x: x.detach(), tokens())
    assert [(g.kind, g.source) for g in result.report.graphs] == [("empty", "compiled")]


def test_export_keeps_the_quant_as_one_op_and_the_program_fuses():
    model, x = Projection(), tokens()
    program = torch.export.export(model, (x,))
    ours = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("fusionpasses.")]
    assert ours == ["fusionpasses.dynamic_mxfp4_quant.default", "fusionpasses.mxfp4_gemm.default"]
    assert torch.equal(program.module()(x), model(x))
    result = compile_and_run(program.module(), x)
    assert result.report.counts == ONE
    assert torch.equal(result.output, model(x))


def test_export_with_a_dynamic_length():
    model = Projection()
    program = torch.export.export(model, (tokens(),), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    assert torch.equal(program.module()(tokens(7)), model(tokens(7)))


# --- by name ----------------------------------------------------------------------------------------------------------


def test_backend_by_name():
    """``backend="fusionpasses"`` where the package is installed; its entry point's function where it is not."""
    name = "fusionpasses"
    by_name: Any = name if name in torch._dynamo.list_backends() else compile_fn
    with torch.no_grad():
        output = torch.compile(Projection(), backend=by_name, mode="max-autotune")(tokens())
    assert fp.last_report().counts == ONE
    assert torch.equal(output, Projection()(tokens()))


def test_the_entry_point_names_compile_fn():
    import pathlib

    project = (pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."torch_dynamo_backends"]\nfusionpasses = "fusionpasses.backend:compile_fn"' in project


# --- the user's own passes --------------------------------------------------------------------------------------------


def our_ops(graph: fx.Graph) -> list[str]:
    return [
        n.target._opname
        for n in graph.nodes
        if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "fusionpasses"
    ]


BEFORE, AFTER = ["dynamic_mxfp4_quant", "mxfp4_gemm"], ["rmsnorm_mxfp4_quant", "mxfp4_gemm"]


class Hashed(CustomGraphPass):
    """A pass as Inductor asks for: with a uuid, so that the compile caches stay on."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(our_ops(graph))

    def uuid(self) -> str:
        return "a pass of test_backend.py"


def bare(seen: list[Any]) -> Callable[[fx.Graph], None]:
    return lambda graph: seen.append(our_ops(graph))


#: How a user may set the hook, and how often their pass runs then.
USER_PASSES: dict[str, tuple[Callable[[list[Any]], Any], int]] = {
    "function": (bare, 1),
    "list": (lambda seen: [bare(seen), Hashed(seen)], 2),
    "tuple": (lambda seen: (Hashed(seen), Hashed(seen)), 2),
    "CustomGraphPass": (Hashed, 1),
}

if hasattr(torch._inductor.custom_graph_pass, "CustomInferenceAwareGraphPass"):  # since torch 2.12

    class Aware(torch._inductor.custom_graph_pass.CustomInferenceAwareGraphPass):
        def __init__(self, seen: list[Any]) -> None:
            self.seen = seen

        def __call__(self, graph: fx.Graph, is_inference: bool) -> None:
            assert is_inference
            self.seen.append(our_ops(graph))

        def uuid(self) -> str:
            return "an aware pass of test_backend.py"

    USER_PASSES["CustomInferenceAwareGraphPass"] = (Aware, 1)
    USER_PASSES["mixed"] = (lambda seen: [Aware(seen), bare(seen), Hashed(seen)], 3)


@pytest.mark.parametrize("through", ["options", "config"])
@pytest.mark.parametrize("form", USER_PASSES)
def test_the_users_pass_runs_before_ours(form, through):
    make, times = USER_PASSES[form]
    seen: list[Any] = []
    patch = {PRE: make(seen)}
    # Without caches: a hit would run no pass, theirs or ours.
    with torch._inductor.config.patch(force_disable_caches=True, **(patch if through == "config" else {})):
        result = compile_and_run(Projection(), tokens(), options=patch if through == "options" else None)
    assert seen == [BEFORE] * times
    assert result.report.counts == ONE


def test_options_go_before_the_global_config():
    from_options: list[Any] = []
    from_config: list[Any] = []
    with torch._inductor.config.patch({PRE: bare(from_config)}):
        compile_and_run(Projection(), tokens(), options={PRE: bare(from_options)})
    assert (from_options, from_config) == ([BEFORE], [])


@pytest.mark.parametrize("through", ["options", "config"])
def test_the_users_post_pass_runs_after_ours(through):
    seen: list[Any] = []
    patch = {POST: bare(seen)}
    with torch._inductor.config.patch(patch if through == "config" else {}):
        compile_and_run(Projection(), tokens(), options=patch if through == "options" else None)
    assert seen == [AFTER]


def test_a_graph_the_users_pass_changed_is_what_ours_sees():
    def spoil_the_norm(graph: fx.Graph) -> None:
        (add,) = [n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor]
        add.update_kwarg("alpha", 2)

    result = compile_and_run(Projection(), tokens(), options={PRE: spoil_the_norm})
    assert result.report.counts == {}
    assert "alpha=2" in result.report.sites()[0].reason


def test_a_pass_without_uuid_turns_the_caches_off_and_says_so(caplog):
    result = compile_and_run(Projection(), tokens(), options={PRE: bare([])})
    assert (result.fx, result.aot) == ({"bypass": 1}, {"bypass": 1})
    (record,) = [r for r in caplog.records if r.name == "fusionpasses.backend"]
    assert record.levelno == logging.WARNING
    assert "compile caches are off, because" in record.getMessage()
    assert "make it one to compile faster next time" in record.getMessage()


def test_a_pass_with_uuid_leaves_the_caches_on(caplog):
    result = compile_and_run(Projection(), tokens(), options={PRE: Hashed([])})
    assert "bypass" not in {**result.fx, **result.aot}
    assert [r for r in caplog.records if r.name == "fusionpasses.backend"] == []


# --- equality, copies, reports ----------------------------------------------------------------------------------------


def graphs_of_two(first: fp.FusionBackend, second: fp.FusionBackend) -> int:
    model, x = Projection(), tokens()
    counters.clear()
    with torch.no_grad():
        torch.compile(model, backend=first)(x)
        torch.compile(model, backend=second)(x)
    return counters["stats"]["unique_graphs"]


def test_equal_backends_do_not_recompile():
    first, second = fp.fusion_backend(), fp.fusion_backend()
    assert first == second
    assert hash(first) == hash(second)
    assert graphs_of_two(first, second) == 1
    # The second compiled nothing, and says so.
    assert (len(first.report.graphs), second.report.graphs) == (1, [])


def test_the_order_and_repetition_of_passes_make_no_other_backend():
    name = "rmsnorm_mxfp4_quant"
    assert fp.fusion_backend(passes=[name, name]) == fp.fusion_backend(passes=(name,))


@pytest.mark.parametrize("settings", [{"provider": "reference"}, {"passes": ()}])
def test_other_backends_recompile(settings):
    first, second = fp.fusion_backend(), fp.fusion_backend(**settings)
    assert first != second
    assert graphs_of_two(first, second) == 2


def test_a_backend_is_equal_to_nothing_else():
    assert fp.fusion_backend() != compile_fn
    assert fp.fusion_backend() != type("Other", (fp.FusionBackend,), {})(
        fp.FusionConfig(), anchors.registered_anchors()
    )


@pytest.fixture
def own_quant(monkeypatch) -> Iterator[Any]:
    """A quant op of the user's, and a registry of anchors that forgets it afterwards."""
    monkeypatch.setattr(anchors, "_registered", dict(anchors._registered))
    with torch.library._scoped_library("test_backend", "FRAGMENT") as library:
        library.define("quant(Tensor x) -> (Tensor, Tensor)")
        library.impl(
            "quant", lambda x: torch.ops.fusionpasses.dynamic_mxfp4_quant(x, "even"), "CompositeExplicitAutograd"
        )
        torch.library.register_fake(
            "test_backend::quant",
            lambda x: (x.new_empty(4, 32, dtype=torch.uint8), x.new_empty(4, 2, dtype=torch.uint8)),
            lib=library,
        )
        yield torch.ops.test_backend.quant.default


def test_a_registered_anchor_makes_another_backend_that_fuses_into_it(own_quant):
    norm = Norm()
    before = fp.fusion_backend()
    fp.register_anchor(own_quant, scale_mode="even")
    after = fp.fusion_backend()
    assert before != after
    for fusing, counts in ((before, {}), (after, ONE)):
        assert compile_and_run(lambda x: own_quant(norm(x)), tokens(), backend=fusing).report.counts == counts


def test_last_report_is_that_of_the_backend_that_compiled_last():
    first, second = fp.fusion_backend(), fp.fusion_backend(provider="reference")
    compile_and_run(Projection(), tokens(), backend=first)
    assert fp.last_report() is first.report
    compile_and_run(Projection(), tokens(), backend=second)
    assert fp.last_report() is second.report
    compile_and_run(Unnormed(), tokens(), backend=first)
    assert fp.last_report() is first.report
    assert len(first.report.graphs) == 2


def test_an_empty_report():
    assert str(fp.Report()) == "fusionpasses: nothing was compiled yet; call the compiled model once"
    assert str(fp.fusion_backend().report) == str(fp.Report())
    assert fp.Report().to_dict() == {"graphs": []}
    assert (fp.Report().counts, fp.Report().fused, fp.Report().refused) == ({}, [], [])


def site(pass_name: str, status: str, op: str, anchors: int = 0, **rest: Any) -> Site:
    places = tuple(Where(f"layers.{i}") for i in range(anchors))
    return Site(pass_name, status, op, Where("norm"), places, **rest)


def test_a_report_says_what_the_anchors_of_each_pass_are():
    norm, _, rope, _ = PASS_NAMES
    one = [site(norm, "fused", "rmsnorm_mxfp4_quant.default", 2, provider="triton", notes=("a note",))]
    two = [
        site(rope, "fused", "fused_rope_mla_kv_cache.absorbed", 1, provider="reference"),
        site(rope, "refused", "aten.index_put.default", 1, reason="a reason"),
        site(rope, "nothing to fuse", "rope", reason="another"),
    ]
    ops = {"dynamic_mxfp4_quant": 2, "aten.mul": 9, "mylib.concat_and_cache_mla": 1}, {"fused_rope_mla_kv_cache": 1}
    graphs = [GraphReport("0/0", "inference", "compiled", 20, 10, *ops, sites) for sites in ([*one, *two], two[1:])]
    assert str(fp.Report(graphs)).splitlines() == [
        "fusionpasses: 2 graphs, 2 sites fused (2 quants, 1 cache write), 2 refused, 2 with nothing to fuse",
        "graph 0/0 (inference), compiled: 20 -> 10 nodes, passes took 0.0 ms",
        "  op                          before  after",
        "  dynamic_mxfp4_quant              2      0",
        "  fused_rope_mla_kv_cache          0      1",
        "  mylib.concat_and_cache_mla       1      0",
        "  fused (2):",
        "    rmsnorm_mxfp4_quant.default [triton]  norm",
        "        at source line unknown",
        "        quant for layers.0, layers.1 at source line unknown",
        "        note: a note",
        "    fused_rope_mla_kv_cache.absorbed [reference]  norm",
        "        at source line unknown",
        "        cache write for layers.0 at source line unknown",
        "  refused (1):",
        "    aten.index_put.default  norm",
        "        at source line unknown",
        "        cache write for layers.0 at source line unknown",
        "        because a reason",
        "  nothing to fuse (1):",
        "    rope  norm",
        "        at source line unknown",
        "        because another",
        *str(graphs[1]).splitlines(),
    ]
    without_module = Site(rope, "fused", "", Where("layers.0"), (Where(), Where(stack_trace="?")))
    assert without_module.lines()[2:] == ["    cache write at source line unknown"]
    # Nothing is counted where nothing was fused.
    assert str(fp.Report(graphs[1:])).startswith("fusionpasses: 1 graph, 0 sites fused, 1 refused, 1 with nothing")


def test_every_pass_has_a_word_for_its_anchors():
    assert tuple(ANCHORS) == PASS_NAMES


def test_a_deep_copy_reports_to_the_same_place():
    fusing = fp.fusion_backend()
    copied = copy.deepcopy({"backend": fusing})["backend"]
    assert copied == fusing
    compile_and_run(Projection(), tokens(), backend=copied)
    assert fusing.report.counts == ONE


def test_a_compiled_model_can_be_deep_copied():
    fusing = fp.fusion_backend()
    compiled = torch.compile(Projection(), backend=fusing)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(compiled)(tokens()), compiled(tokens()))
    assert len(fusing.report.graphs) >= 1


def test_repr_names_the_settings():
    text = "fusion_backend(FusionConfig(provider='reference', passes=()))"
    assert repr(fp.fusion_backend(provider="reference", passes=[])) == text


def test_what_dynamo_asks_of_a_backend():
    fusing = fp.fusion_backend()
    assert fusing.__name__ == fusing.compiler_name == "fusionpasses"
    assert "freezing" in fusing.get_compiler_config()
    fusing.reset()


# --- passes and providers ---------------------------------------------------------------------------------------------


def test_no_passes_fuse_nothing():
    model, x = Projection(), tokens()
    result = compile_and_run(model, x, backend=fp.fusion_backend(passes=()))
    (graph,) = result.report.graphs
    message = f"not run, because passes=(): {', '.join((*PASS_NAMES, 'then_gemm', 'then_mlp'))}"
    assert (graph.sites, graph.messages, graph.ops_before) == ([], [message], graph.ops_after)


has_disabled_passes = pytest.mark.skipif(
    not hasattr(torch._inductor.config, "disabled_passes"), reason="torch 2.10 has no such setting"
)


@has_disabled_passes
def test_a_disabled_pass_is_reported():
    with torch._inductor.config.patch(disabled_passes="rmsnorm_mxfp4_quant"):
        result = compile_and_run(Projection(), tokens())
    (graph,) = result.report.graphs
    # The pass that is on has looked at the quant.
    assert [(site.pass_name, site.status) for site in graph.sites] == [("silu_mul_mxfp4_quant", "nothing to fuse")]
    message = "pass rmsnorm_mxfp4_quant was switched off by TORCHINDUCTOR_DISABLED_PASSES or the bisector"
    assert graph.messages == [message]
    assert f"\n  {message}\n" in str(graph)


@has_disabled_passes
def test_a_pass_that_runs_is_not_reported_as_disabled():
    with torch._inductor.config.patch(disabled_passes="another_pass"):
        result = compile_and_run(Projection(), tokens())
    assert result.report.graphs[0].messages == []
    assert result.report.counts == ONE


def test_a_provider_asked_for_is_used_and_written_into_the_graph():
    providers: list[str] = []

    def look(graph: fx.Graph) -> None:
        providers.extend(n.kwargs["provider"] for n in graph.nodes if str(n.target).startswith("fusionpasses."))

    backend = fp.fusion_backend(provider="reference")
    result = compile_and_run(Projection(), tokens(), backend=backend, options={POST: look})
    assert providers == ["reference", "reference"]
    assert [s.provider for s in result.report.fused] == ["reference"]


def test_a_provider_that_cannot_serve_is_an_error_when_compiling():
    fusing = fp.fusion_backend(provider="triton")
    text = (
        "provider 'triton' was asked for rmsnorm_mxfp4_quant.default and cannot serve: triton serves GPU tensors "
        r"\(device type 'cuda'\), not 'cpu'; use provider='auto' \(it would take 'reference'\) or move the tensors"
    )
    with pytest.raises(fp.ProviderUnavailable, match=text):
        compile_and_run(Projection(), tokens(), backend=fusing)
    assert fusing.report.graphs == []


def test_a_provider_that_is_not_needed_may_be_unavailable():
    """The twin: nothing to fuse, so nobody is asked."""
    assert compile_and_run(Unnormed(), tokens(), backend=fp.fusion_backend(provider="triton")).report.fused == []


# --- refusals when compiling ------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown option": ({"options": {"freezin": True}}, r"got 'freezin'.*did you mean 'freezing'\?"),
    "wrong type": ({"options": {"freezing": "yes"}}, "got 'yes' of type str, allowed bool"),
    "unknown mode": ({"mode": "max-autotun"}, r"got 'max-autotun'.*did you mean 'max-autotune'\?"),
    "mode=lite": ({"mode": "lite"}, "mode='lite' switches Inductor's post-grad passes off"),
    "no post-grad passes": (
        {"options": {"use_post_grad_passes": False}},
        "use_post_grad_passes=False switches Inductor's post-grad passes off",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_before_anything_is_compiled(case):
    settings, text = REFUSED[case]
    fusing = fp.fusion_backend()
    with pytest.raises(fp.BadConfig, match=text) as error:
        compile_and_run(Projection(), tokens(), backend=fusing, **settings)
    # Also the class that every failing backend raises, for code that knows Dynamo only.
    assert isinstance(error.value, BackendCompilerFailed)
    assert type(error.value.inner_exception) is fp.BadConfig
    assert fusing.report.graphs == []
    assert counters["inductor"] == {}


def test_an_error_of_inductor_is_passed_on_and_its_graph_is_not_reported():
    def fail(graph: fx.Graph) -> None:
        raise ZeroDivisionError("raised after the fusion passes")

    fusing = fp.fusion_backend()
    with pytest.raises(BackendCompilerFailed, match="raised after the fusion passes"):
        compile_and_run(Projection(), tokens(), backend=fusing, options={POST: fail})
    assert fusing.report.graphs == []
    compile_and_run(Projection(), tokens(), backend=fusing)
    assert fusing.report.counts == ONE


def test_the_default_backend_is_made_once_per_set_of_anchors(own_quant):
    first = backend._default_backend(anchors.registered_anchors())
    assert backend._default_backend(anchors.registered_anchors()) is first
    fp.register_anchor(own_quant, scale_mode="even")
    assert backend._default_backend(anchors.registered_anchors()) is not first
