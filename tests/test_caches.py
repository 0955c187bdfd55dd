"""Compile caches: they hit when nothing changed and miss when something did, and a hit shows the stored report.

Most tests stay in one process: Dynamo forgets between two compilations, and the caches on disk are read again. What
only another process can show runs in one, see ``child``.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Norm, Projection, Trainable, compile_and_run, mxfp4_linear, tokens
from torch import Tensor, fx, nn
from torch._inductor.codecache import CacheBase
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import fusionpasses as fp
from fusionpasses import anchors, backend, pipeline, probes, providers, records
from fusionpasses.probes import Verdict
from fusionpasses.report import CACHE_UNKNOWN, COMPILED, FROM_CACHE, GraphReport

HIT, MISS = {"hit": 1}, {"miss": 1}
ONE = {"rmsnorm_mxfp4_quant": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path) -> Iterator[pathlib.Path]:
    """An empty compile cache for each test; gives the folder of the records."""
    with fresh_cache(dir=str(tmp_path)):
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        yield pathlib.Path(cache_dir()) / "fusionpasses"


def comparable(report: fp.Report) -> list[dict[str, Any]]:
    """A report without what differs between a compilation and a hit."""
    return [{k: v for k, v in g.items() if k != "source"} for g in report.to_dict()["graphs"]]


# --- hit or miss ------------------------------------------------------------------------------------------------------


def test_nothing_changed():
    model, x = Projection(), tokens()
    cold = compile_and_run(model, x)
    assert (cold.fx, cold.aot, cold.sources) == (MISS, {"miss": 1, "saved": 1}, [COMPILED])
    warm = compile_and_run(model, x)
    assert (warm.fx, warm.aot, warm.sources) == (HIT, HIT, [FROM_CACHE])
    assert warm.report.counts == ONE
    assert comparable(warm.report) == comparable(cold.report)
    assert "graph 0/0 (inference), from cache: " in str(warm.report)
    assert torch.equal(warm.output, cold.output)


def change_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "source_digest", lambda: "other sources")


def change_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours,) = anchors._registered.values()
    other = anchors.Anchor(
        "other::quant.default", "other::quant(Tensor x) -> (Tensor, Tensor)", "even", None, "row_major"
    )
    monkeypatch.setattr(
        anchors.Anchor, "target", property(lambda self: torch.ops.fusionpasses.dynamic_mxfp4_quant.default)
    )
    monkeypatch.setattr(anchors, "_registered", {other.op: other, ours.op: ours})


def change_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "probe_triton", lambda: Verdict(False, "taken away by a test"))


def change_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "distribution_version", lambda name: "0.0.0")


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "sources": change_sources,
    "anchors": change_anchors,
    "a probe's verdict": change_verdict,
    "a version": change_version,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_outside_the_graph_is_a_miss(change, monkeypatch):
    model, x = Projection(), tokens()
    compile_and_run(model, x)
    with monkeypatch.context() as changed:
        change(changed)
        other = compile_and_run(model, x)
    assert (other.fx, other.aot["miss"], other.sources) == (MISS, 1, [COMPILED])
    # Back to what it was: both entries are there.
    assert compile_and_run(model, x).sources == [FROM_CACHE]


@pytest.mark.parametrize("settings", [{"provider": "reference"}, {"passes": ()}], ids=["provider", "passes"])
def test_another_config_is_a_miss(settings):
    model, x = Projection(), tokens()
    compile_and_run(model, x)
    other = compile_and_run(model, x, backend=fp.fusion_backend(**settings))
    assert (other.fx, other.sources) == (MISS, [COMPILED])


def test_the_digest_covers_every_source_file_and_its_name(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "pipeline.py").write_text("")
    (package / "inner" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(pipeline, "__file__", str(package / "pipeline.py"))
    digest = pipeline.source_digest.__wrapped__
    seen = [digest()]
    (package / "inner" / "a.py").write_text("x = 2\n")
    seen.append(digest())
    (package / "inner" / "a.py").rename(package / "inner" / "b.py")
    seen.append(digest())
    assert len(set(seen)) == 3
    (package / "notes.txt").write_text("not source")
    assert digest() == seen[-1]


def test_an_option_of_inductor_is_a_miss():
    model, x = Projection(), tokens()
    compile_and_run(model, x)
    assert compile_and_run(model, x, options={"epilogue_fusion": False}).sources == [COMPILED]


def test_a_disabled_pass_has_its_own_entry_and_record():
    model, x = Projection(), tokens()
    with torch._inductor.config.patch(disabled_passes="rmsnorm_mxfp4_quant"):
        compile_and_run(model, x)
    enabled = compile_and_run(model, x)
    assert (enabled.sources, enabled.report.counts) == ([COMPILED], ONE)
    with torch._inductor.config.patch(disabled_passes="rmsnorm_mxfp4_quant"):
        again = compile_and_run(model, x)
    assert (again.sources, again.report.counts) == ([FROM_CACHE], {})
    assert len(again.report.graphs[0].messages) == 1


class Hashed(CustomGraphPass):
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, graph: fx.Graph) -> None: ...

    def uuid(self) -> str:
        return self.name


def test_who_was_chosen_is_part_of_the_identity(monkeypatch):
    """In another process AITER may be here, and its import fail."""
    before = pipeline.identity(fp.FusionConfig(), ())
    assert pipeline.identity(fp.FusionConfig(), ()) == before
    monkeypatch.setattr(providers, "decided", lambda device_type: {"mxfp4_gemm.default": "somebody else"})
    assert pipeline.identity(fp.FusionConfig(), ()) != before


def test_the_users_pass_is_part_of_the_identity():
    model, x, hook = Projection(), tokens(), "post_grad_custom_pre_pass"
    compile_and_run(model, x, options={hook: Hashed("one")})
    assert compile_and_run(model, x, options={hook: Hashed("one")}).sources == [FROM_CACHE]
    assert compile_and_run(model, x, options={hook: Hashed("two")}).sources == [COMPILED]


# --- whose report is shown --------------------------------------------------------------------------------------------


class Other(nn.Module):
    """As many parameters of the same shapes as Projection; another graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = Norm(eps=1e-3), mxfp4_linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x)[:, :32].repeat(1, 2))


def test_models_that_share_a_cache_get_their_own_reports():
    models: list[nn.Module] = [Projection(), Other(), Projection(eps=1e-3)]
    cold = [compile_and_run(m, tokens()) for m in models]
    assert [c.sources for c in cold] == [[COMPILED]] * 3
    warm = [compile_and_run(m, tokens()) for m in reversed(models)]
    assert [w.sources for w in warm] == [[FROM_CACHE]] * 3
    assert [comparable(w.report) for w in reversed(warm)] == [comparable(c.report) for c in cold]
    assert [w.report.counts for w in reversed(warm)] == [ONE, {}, ONE]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Projection()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.body(hidden)


def test_a_graph_that_differs_in_names_only_shows_its_own_places():
    """Inductor's cache does not see names, so it hits; modules and lines must be those of the model at hand."""
    compile_and_run(Projection(), tokens())
    wrapped = compile_and_run(Wrapped(), tokens())
    assert (wrapped.fx, wrapped.sources) == (HIT, [FROM_CACHE])
    (site,) = wrapped.report.fused
    assert [site.where.module, *(a.module for a in site.anchors)] == ["body.norm", "body.proj"]
    assert "self.body(hidden)" in site.where.stack_trace


def test_the_first_length_of_a_dynamic_graph_does_not_matter():
    model = Projection()
    compile_and_run(model, tokens(4), dynamic=True)
    assert compile_and_run(model, tokens(9), dynamic=True).sources == [FROM_CACHE]


def test_grad_mode_does_not_matter_where_nothing_requires_grad():
    model = Projection()
    compile_and_run(model, tokens())
    assert compile_and_run(model, tokens(), grad=True).sources == [FROM_CACHE]


def test_what_requires_grad_does_not_matter_with_grad_mode_off():
    model = Projection()
    compile_and_run(model, tokens())
    assert compile_and_run(model, tokens().requires_grad_()).sources == [FROM_CACHE]


class SpelledOtherwise(Norm):
    """Norm with ``x.to(torch.float32)`` for ``x.float()``: another Dynamo graph, the same post-grad graph."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def test_a_hit_of_another_graph_is_not_given_its_report():
    """The code is that of a graph which came from elsewhere; of this one's sites nothing is known, and it says so."""
    model = Projection()
    compile_and_run(model, tokens())
    model.norm = SpelledOtherwise()
    result = compile_and_run(model, tokens())
    assert (result.fx, result.sources, result.report.sites()) == (HIT, [CACHE_UNKNOWN], [])


# --- the record -------------------------------------------------------------------------------------------------------


def only_file(folder: pathlib.Path) -> pathlib.Path:
    (file,) = folder.iterdir()
    return file


def test_without_a_record_the_report_says_so(cache):
    compile_and_run(Projection(), tokens())
    only_file(cache).unlink()
    result = compile_and_run(Projection(), tokens())
    assert (result.fx, result.sources) == (HIT, [CACHE_UNKNOWN])
    assert result.report.sites() == []
    assert str(result.report).endswith("graph 0/0 (cached), from cache, report unavailable")
    # Nothing is known, so nothing is stored that would pass for a report.
    assert list(cache.iterdir()) == []


CORRUPT = {
    "empty": "",
    "cut off": '{"format": 1, "graphs": [{"compile_id"',
    "a list": "[]",
    "no graphs": "{}",
    "graphs are no list": '{"graphs": {"a": 1}}',
    "a graph without fields": '{"graphs": [{}]}',
    "an unknown field": '{"graphs": [{"compile_id": "0", "kind": "", "source": "", "sites": [], "new": 1}]}',
    "a field of another type": '{"graphs": [{"compile_id": "", "kind": "", "source": "", "sites": [], "pass_ms": ""}]}',
    "not text": "\x00\x01",
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_record_is_ignored_with_a_warning(content, cache, caplog):
    compile_and_run(Projection(), tokens())
    only_file(cache).write_text(content)
    result = compile_and_run(Projection(), tokens())
    assert (result.fx, result.sources, result.report.sites()) == (HIT, [CACHE_UNKNOWN], [])
    (message,) = [r.getMessage() for r in caplog.records if r.name == "fusionpasses.records"]
    assert message.startswith("a stored report could not be read, and is ignored: ")
    assert only_file(cache).name in message


def test_a_cache_that_cannot_be_written_costs_the_record_only(monkeypatch, caplog):
    def full(key: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "_write", full)
    result = compile_and_run(Projection(), tokens())
    assert result.report.counts == ONE
    (message,) = [r.getMessage() for r in caplog.records if r.name == "fusionpasses.records"]
    assert message.startswith("the report could not be stored beside the compile cache: ")


def test_a_record_is_written_whole_or_not_at_all(cache, monkeypatch):
    def fail(source: str, target: str) -> None:
        raise OSError("interrupted")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="interrupted"):
        records._write("key", b"content")
    assert list(cache.iterdir()) == []


def test_no_record_where_the_caches_are_off(cache):
    compile_and_run(Projection(), tokens(), options={"post_grad_custom_pre_pass": lambda graph: None})
    with torch._inductor.config.patch(force_disable_caches=True):
        compile_and_run(Projection(), tokens())
    assert not cache.exists()


# --- training ---------------------------------------------------------------------------------------------------------


def train(model: nn.Module, backward: bool = True, **settings: Any) -> Any:
    return compile_and_run(model, tokens().requires_grad_(), backward=backward, grad=True, **settings)


def kinds(result: Any) -> list[tuple[str, str]]:
    return [(g.kind, g.source) for g in result.report.graphs]


def test_a_warm_start_restores_forward_and_backward():
    model = Trainable()
    cold, warm = train(model), train(model)
    assert kinds(cold) == [("forward", COMPILED), ("backward", COMPILED)]
    assert kinds(warm) == [("forward", FROM_CACHE), ("backward", FROM_CACHE)]
    assert warm.fx == {"hit": 2}
    assert comparable(warm.report) == comparable(cold.report)
    assert [s.op for s in warm.report.fused] == ["rmsnorm_mxfp4_quant.with_norm"]


def test_a_backward_compiled_late_is_added_to_the_record():
    """backward() is what compiles it, here in the second process: its forward comes from the cache."""
    model = Trainable()
    assert kinds(train(model, backward=False)) == [("forward", COMPILED)]
    assert kinds(train(model)) == [("forward", FROM_CACHE), ("backward", COMPILED)]
    assert kinds(train(model)) == [("forward", FROM_CACHE), ("backward", FROM_CACHE)]


def test_a_backward_that_another_graph_left_in_the_cache_is_not_silent():
    model = Trainable()
    train(model)
    model.watching.scale_mode = "floor"  # another forward graph, the same backward graph
    for forward in (COMPILED, FROM_CACHE):
        result = train(model)
        assert kinds(result) == [("forward", forward), ("backward", CACHE_UNKNOWN)]
        assert result.report.counts == ONE


def session(key: str | None = "key") -> tuple[fp.FusionBackend, Any]:
    fusing = fp.fusion_backend()
    made = backend._Session(fusing, "0/0", records.SourceIndex(fx.GraphModule({}, fx.Graph())))
    made.key = key
    return fusing, made


def hit() -> None:
    torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] += 1


def test_session_with_one_graph_compiled_and_one_from_the_cache():
    _, first = session()
    with first:
        first.add(GraphReport("0/0", "forward", COMPILED, nodes_before=1))
        first.add(GraphReport("0/0", "backward", COMPILED, nodes_before=2))
    fusing, second = session()
    with second:
        second.add(GraphReport("0/0", "forward", COMPILED, nodes_before=3))
        hit()
    seen = [(g.kind, g.source, g.nodes_before) for g in fusing.report.graphs]
    assert seen == [("forward", COMPILED, 3), ("backward", FROM_CACHE, 2)]
    # The record now holds both, the newer forward among them.
    fusing, third = session()
    with third:
        hit()
    assert [(g.kind, g.nodes_before) for g in fusing.report.graphs] == [("forward", 3), ("backward", 2)]


def test_session_with_one_graph_compiled_and_one_unknown():
    fusing, mixed = session()
    with mixed:
        mixed.add(GraphReport("0/0", "forward", COMPILED))
        hit()
    expected = [("forward", COMPILED), ("cached", CACHE_UNKNOWN)]
    assert [(g.kind, g.source) for g in fusing.report.graphs] == expected
    fusing, later = session()
    with later:
        hit()
    assert [(g.kind, g.source) for g in fusing.report.graphs] == [("forward", FROM_CACHE), ("cached", CACHE_UNKNOWN)]


def test_session_whose_backward_is_compiled_again_after_the_record_was_shown():
    _, first = session()
    with first:
        first.add(GraphReport("0/0", "forward", COMPILED, nodes_before=1))
        first.add(GraphReport("0/0", "backward", COMPILED, nodes_before=2))
    fusing, second = session()
    with second:
        hit()
    second.add(GraphReport("0/0", "backward", COMPILED, nodes_before=3))
    seen = [(g.kind, g.source, g.nodes_before) for g in fusing.report.graphs]
    assert seen == [("forward", FROM_CACHE, 1), ("backward", COMPILED, 3)]


def test_session_without_a_key_keeps_nothing(cache):
    fusing, off = session(key=None)
    with off:
        off.add(GraphReport("0/0", "inference", COMPILED))
    assert [g.source for g in fusing.report.graphs] == [COMPILED]
    assert not cache.exists()


# --- the key ----------------------------------------------------------------------------------------------------------


def graph_of(function: Any, size: object = 4) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = size
    graph.output(graph.call_function(function, (x,)))
    return fx.GraphModule({}, graph)


def key_of(gm: fx.GraphModule, identity: object = "id", **patches: object) -> str:
    return records.graph_key(identity, patches, gm, [])


def make_function(name: str, module: str) -> Callable[..., Any]:
    def function(x: Any) -> Any:
        return x

    function.__name__ = function.__qualname__ = name
    function.__module__ = module
    return function


def test_key_does_not_depend_on_addresses_orders_or_names():
    one, other = (graph_of(make_function("f", "m")) for _ in range(2))
    for node in other.graph.nodes:
        node.name = f"{node.name}_renamed"
    assert key_of(one) == key_of(other)
    assert key_of(one, a={1, 2}, b={"x": 1, "y": 2}) == key_of(one, b={"y": 2, "x": 1}, a={2, 1})
    assert key_of(graph_of(len, "s77")) == key_of(graph_of(len, "s3"))


def test_key_depends_on_everything_else(monkeypatch):
    plain = key_of(graph_of(make_function("f", "m")))
    others = [
        key_of(graph_of(make_function("g", "m"))),
        key_of(graph_of(make_function("f", "n"))),
        key_of(graph_of(make_function("f", "m"), size=5)),
        key_of(graph_of(make_function("f", "m"), size="s0")),
        key_of(graph_of(make_function("f", "m")), identity="other"),
        key_of(graph_of(make_function("f", "m")), epilogue_fusion=False),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        others.append(key_of(graph_of(make_function("f", "m"))))
    with torch._inductor.config.patch(epilogue_fusion=False):
        others.append(key_of(graph_of(make_function("f", "m"))))
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        others.append(key_of(graph_of(make_function("f", "m"))))
    with monkeypatch.context() as patch:  # a report may speak of the GPU
        patch.setattr(CacheBase, "get_system", lambda: {"hash": "another GPU"})
        others.append(key_of(graph_of(make_function("f", "m"))))
    assert len({plain, *others}) == 1 + len(others)
    assert key_of(graph_of(make_function("f", "m"))) == plain


def test_key_of_two_symbols_is_not_that_of_one_twice():
    def two(first: str, second: str) -> str:
        graph = fx.Graph()
        a, b = graph.placeholder("a"), graph.placeholder("b")
        a.meta["example_value"], b.meta["example_value"] = first, second
        graph.output((a, b))
        return key_of(fx.GraphModule({}, graph))

    assert two("s1", "s2") == two("s8", "s3")
    assert two("s1", "s2") != two("s1", "s1")


# --- torch's private cache artifacts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["module", "class"])
def test_a_torch_without_cache_artifacts_costs_only_those(gone, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="fusionpasses.records")
    if gone == "module":
        monkeypatch.setitem(sys.modules, "torch.compiler._cache", None)
    else:
        import torch.compiler._cache as private

        monkeypatch.delattr(private.CacheArtifactFactory, "_artifact_types")
    records.register_artifact()
    (record,) = [r for r in caplog.records if r.name == "fusionpasses.records"]
    assert record.levelno == logging.DEBUG
    assert "reports will not be in torch.compiler.save_cache_artifacts()" in record.getMessage()


def test_registering_again_changes_nothing():
    from torch.compiler._cache import CacheArtifactFactory

    known = CacheArtifactFactory._artifact_types["fusionpasses_report"]
    records.register_artifact()
    assert CacheArtifactFactory._artifact_types["fusionpasses_report"] is known


# --- other processes --------------------------------------------------------------------------------------------------

MODEL = """
import torch
from helpers import Norm, mxfp4_linear

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj = Norm(), mxfp4_linear()

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        scaled = self.norm.weight * normed.to(x.dtype)  # the norm
        return self.proj(scaled)  # the quant
"""
BLANK_LINES = 5


#: fusionpasses comes first and alone, as in a user's program.
START = """
import sys, fusionpasses
light = "torch._inductor" not in sys.modules
import test_caches
test_caches.child(sys.argv[1], light)
"""


def child(folder: str, light: bool) -> None:
    """Compile the model of ``folder``; write what happened to ``result.json``, and the artifacts to ``artifacts``."""
    artifacts = pathlib.Path(folder, "load")
    loaded = None
    if artifacts.exists():
        loaded = torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    sys.path.insert(0, folder)
    from model import Model  # type: ignore[import-not-found]

    result = compile_and_run(Model(), tokens())
    hooked = compile_and_run(Model(), tokens(), options={"post_grad_custom_pre_pass": Hashed("of the child")})
    saved = torch.compiler.save_cache_artifacts()
    if saved is not None:
        pathlib.Path(folder, "artifacts").write_bytes(saved[0])
    content = {
        "light": light,
        "loaded": None if loaded is None else loaded.artifacts.get("fusionpasses_report"),
        "fx": result.fx,
        "aot": result.aot,
        "report": result.report.to_dict(),
        "text": str(result.report),
        "lines": [[s.where.line, *(a.line for a in s.anchors)] for s in result.report.sites()],
        "hooked": hooked.sources,
    }
    pathlib.Path(folder, "result.json").write_text(json.dumps(content))


def run_child(
    folder: pathlib.Path, compile_cache: pathlib.Path, blank_lines: int = 0, **variables: str
) -> dict[str, Any]:
    (folder / "model.py").write_text("\n" * blank_lines + MODEL)
    here = pathlib.Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", START, str(folder)],
        check=True,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("TORCH", "FUSION"))},
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
            "TORCHINDUCTOR_CACHE_DIR": str(compile_cache),
            **variables,
        },
    )
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def cold(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, dict[str, Any]]:
    """The first process: its folder, its compile cache, and what happened."""
    folder, compile_cache = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("cache")
    result = run_child(folder, compile_cache)
    (folder / "artifacts").rename(folder / "first_artifacts")  # later processes save theirs
    return folder, compile_cache, result


def line_numbers(result: dict[str, Any]) -> list[list[int]]:
    return [[int(re.search(r"model\.py:(\d+)", line)[1]) for line in lines] for lines in result["lines"]]  # type: ignore[index]


def test_first_process(cold):
    _, _, result = cold
    assert (result["fx"], result["aot"]["miss"], result["hooked"]) == (MISS, 1, [COMPILED])
    lines = MODEL.splitlines()
    (norm, quant), *rest = line_numbers(result)
    assert rest == []
    assert (lines[norm - 1].endswith("# the norm"), lines[quant - 1].endswith("# the quant")) == (True, True)


def test_second_process_hits_and_shows_the_report_with_the_new_lines(cold):
    folder, compile_cache, first = cold
    second = run_child(folder, compile_cache, blank_lines=BLANK_LINES)
    assert (second["fx"], second["aot"], second["hooked"]) == (HIT, HIT, [FROM_CACHE])
    (graph,), (before,) = second["report"]["graphs"], first["report"]["graphs"]
    assert graph["source"] == FROM_CACHE
    assert [(s["status"], s["op"]) for s in graph["sites"]] == [("fused", "rmsnorm_mxfp4_quant.default")]
    assert (graph["ops_after"], graph["nodes_after"]) == (before["ops_after"], before["nodes_after"])
    assert line_numbers(second) == [[n + BLANK_LINES for n in lines] for lines in line_numbers(first)]
    assert "from cache" in second["text"]


def test_a_pass_disabled_by_the_environment_is_reported_in_a_process_that_could_hit(cold):
    folder, compile_cache, _ = cold
    result = run_child(folder, compile_cache, TORCHINDUCTOR_DISABLED_PASSES="rmsnorm_mxfp4_quant")
    (graph,) = result["report"]["graphs"]
    assert (result["fx"], graph["source"]) == (MISS, COMPILED)
    assert {site["status"] for site in graph["sites"]} == {"nothing to fuse"}
    assert "pass rmsnorm_mxfp4_quant was switched off by TORCHINDUCTOR_DISABLED_PASSES" in result["text"]


def test_cache_artifacts_bring_the_report_along(cold, tmp_path):
    """``import fusionpasses`` is all it takes before ``load_cache_artifacts``, and it does not import Inductor."""
    folder, _, first = cold
    (tmp_path / "load").write_bytes((folder / "first_artifacts").read_bytes())
    result = run_child(tmp_path, tmp_path / "another_cache")
    assert result["light"]
    assert len(result["loaded"]) == 2  # of the model compiled with and without a pass of the user's
    assert (result["fx"], result["aot"], result["hooked"]) == (HIT, HIT, [FROM_CACHE])
    assert line_numbers(result) == line_numbers(first)
    assert result["report"]["graphs"][0]["source"] == FROM_CACHE


def test_a_record_made_in_ci_serves_outside():
    """torch turns a check of custom ops on where the variable CI is set; its caches hit all the same."""
    import torch._functorch.config

    from fusionpasses.records import _ambient

    texts = []
    for value in (True, False):
        with torch._functorch.config.patch(error_on_custom_op_aliasing=value):
            texts.append(str(_ambient()))
    assert texts[0] == texts[1]
