"""The passes as one Inductor hook: order, timing, report, dumps, cache identity.

Runs at ``post_grad_custom_pre_pass``, where the graph is functional and normalised but Inductor's own patterns have
not run: they would turn a residual add after a GEMM into ``addmm`` and hide it from the norm.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import operator
import pathlib
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch._inductor.config
import torch._inductor.custom_graph_pass
from torch import fx
from torch._functorch.aot_autograd import get_aot_compilation_context  # type: ignore[attr-defined]
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging import trace_structured  # type: ignore[attr-defined]
from torch.fx.passes.graph_transform_observer import GraphTransformObserver

from fusionpasses import probes, providers, remarks, then_gemm, then_mlp, who_runs
from fusionpasses.anchors import Anchor
from fusionpasses.config import FusionConfig
from fusionpasses.dump import DumpFolder
from fusionpasses.patterns import PASS_NAMES, pass_class
from fusionpasses.report import COMPILED, GraphReport

if TYPE_CHECKING:
    from fusionpasses.patterns._pass import FusionPass

log = logging.getLogger(__name__)

_HIGHER_ORDER_WRAPPERS = ("auto_functionalized", "auto_functionalized_v2")


@functools.cache
def source_digest() -> str:
    """Hash of every source file of this package. Ops that a pass inserts are not in Inductor's own cache key."""
    root = pathlib.Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def identity(config: FusionConfig, anchors: tuple[Anchor, ...]) -> str:
    """Everything outside the graph that decides what the passes do, as one hash for Inductor's compile caches."""
    parts = {
        "sources": source_digest(),
        "config": repr(config),
        "anchors": [repr(a) for a in anchors],
        "providers": {kind: (providers.summary(kind), providers.decided(kind)) for kind in ("cpu", "cuda")},
        "versions": {
            "torch": torch.__version__,
            **{name: probes.distribution_version(name) for name in ("triton", "amd-aiter")},
        },
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def op_name(target: Any) -> str:
    """Name of an op packet for counting: without namespace for ours, ``aten.mul`` otherwise."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname
        return name if target.namespace == "fusionpasses" else f"{target.namespace}.{name}"
    return str(getattr(target, "__name__", target))


def count_ops(graph: fx.Graph) -> dict[str, int]:
    """Calls per op packet; a call wrapped by auto_functionalized counts as the op inside it, a joined one as both."""
    counts: Counter[str] = Counter()
    then = dict.fromkeys(then_gemm.THEN_GEMM.values(), ("mxfp4_gemm",))
    then |= dict.fromkeys(then_mlp.THEN_MLP.values(), ("mxfp4_gemm", "silu_mul_mxfp4_quant", "mxfp4_gemm"))
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        target: Any = node.target
        if getattr(target, "__name__", "") in _HIGHER_ORDER_WRAPPERS and node.args:
            target = node.args[0]
        counts[op_name(target)] += 1
        counts.update(then.get(target, ()))
    return dict(counts)


class Pipeline(CustomGraphPass):
    """The fusion passes for one call of the backend. Inductor calls it once per post-grad graph.

    Args:
        config, anchors: what to do.
        record: called with the report of each graph as it is made.
        lookup: called when Inductor asks for the uuid, which it does before it looks for a graph in its cache.
        compile_id: Dynamo's id of the frame, for reports.
        dump: where to write graphs, or None. Compile caches are bypassed then, because a hit would run no pass.
        observe: called with ``(stage, graph)``, stage "before" and "after", around the passes.
    """

    def __init__(
        self,
        config: FusionConfig,
        anchors: tuple[Anchor, ...],
        *,
        record: Callable[[GraphReport], None],
        lookup: Callable[[], None] = lambda: None,
        compile_id: str = "",
        dump: DumpFolder | None = None,
        observe: Callable[[str, fx.Graph], None] | None = None,
    ) -> None:
        self._config = config
        self._anchors = anchors
        self._record = record
        self._lookup = lookup
        self._compile_id = compile_id
        self._dump = dump
        self._observe = observe

    def uuid(self) -> str | None:
        self._lookup()
        return None if self._dump is not None else identity(self._config, self._anchors)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        # AOTInductor copies its config patches; the copy must report to the same place.
        return self

    def passes(self) -> list[FusionPass]:
        enabled = PASS_NAMES if self._config.passes is None else self._config.passes
        keep = self._dump is not None
        return [pass_class(n)(self._config, self._anchors, keep_subgraphs=keep) for n in PASS_NAMES if n in enabled]

    def __call__(self, graph: fx.Graph) -> None:
        report = GraphReport(self._compile_id or "?", _kind(graph), COMPILED)
        report.nodes_before, report.ops_before = len(graph.nodes), count_ops(graph)
        module: Any = graph.owning_module
        dump = self._dump.graph() if self._dump is not None else None
        if self._observe is not None:
            self._observe("before", graph)
        left_out = [name for name in PASS_NAMES if self._config.passes is not None and name not in self._config.passes]
        if left_out:
            names = ", ".join((*left_out, then_gemm.NAME, then_mlp.NAME))
            report.messages.append(f"not run, because passes={self._config.passes}: {names}")
        start = time.perf_counter()
        who_runs.pin_providers(graph)
        seconds = time.perf_counter() - start
        passes = self.passes()
        for number, fusion_pass in enumerate(passes):
            if dump is not None:
                dump.before(number, fusion_pass, module)
            self._trace(module, f"fusionpasses_before_{fusion_pass.name}")
            start = time.perf_counter()
            # Through the observer, so that Inductor's bisector and its switch for single passes see ours too.
            ran = GraphTransformObserver(module, fusion_pass.name, subsystem="post_grad_passes").apply_graph_pass(
                fusion_pass.run
            )
            seconds += time.perf_counter() - start
            if ran is None:
                report.messages.append(
                    f"pass {fusion_pass.name} was switched off by TORCHINDUCTOR_DISABLED_PASSES or the bisector"
                )
            if dump is not None:
                dump.after(number, fusion_pass, module)
            self._trace(module, f"fusionpasses_after_{fusion_pass.name}")
        from fusionpasses.patterns._pass import verdicts

        report.sites = verdicts(passes)
        report.messages += who_runs.settle(graph, report.sites, self._config.provider)
        report.messages += remarks.of_graph(graph)
        if not left_out:
            start = time.perf_counter()
            said = GraphTransformObserver(module, then_gemm.NAME, subsystem="post_grad_passes").apply_graph_pass(
                then_gemm.join
            )
            if said is not None and said.joined:
                mlps = GraphTransformObserver(module, then_mlp.NAME, subsystem="post_grad_passes").apply_graph_pass(
                    then_mlp.join
                )
                said.joined.extend(mlps or ())
            seconds += time.perf_counter() - start
            if said is not None:
                report.messages += [*said.joined, *said.left]
            if said is not None and said.joined:
                self._trace(module, f"fusionpasses_after_{then_gemm.NAME}")
                if dump is not None:
                    dump.joined(len(passes), said.joined, module)
        report.pass_ms = seconds * 1e3
        if self._observe is not None:
            self._observe("after", graph)
        report.nodes_after, report.ops_after = len(graph.nodes), count_ops(graph)
        if dump is not None:
            graph.lint()
            dump.finish(report)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "fusionpasses_report", "encoding": "string"},
            payload_fn=lambda: str(report),
        )
        log.debug("%s", report)
        self._record(report)

    @staticmethod
    def _trace(module: fx.GraphModule, name: str) -> None:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": "string"},
            payload_fn=lambda: readable(module),
        )


class _Chain(CustomGraphPass):
    """The user's own passes, then ours, as one pass: torch before 2.13 takes a single one per hook."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self._parts = parts

    def uuid(self) -> tuple[Any, ...] | None:
        uuids = tuple(p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._parts)
        return uuids if all(uuids) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Chain:
        return self

    def __call__(self, graph: fx.Graph, **kwargs: Any) -> None:
        for part in self._parts:
            part(graph, **(kwargs if _wants_inference(part) else {}))


def _inference_aware() -> type[Any] | None:
    """torch's base class of passes that are told whether the graph is for inference; since torch 2.12."""
    return getattr(torch._inductor.custom_graph_pass, "CustomInferenceAwareGraphPass", None)


def _wants_inference(part: Any) -> bool:
    aware = _inference_aware()
    return aware is not None and isinstance(part, aware)


def compose(user: Any, pipeline: Pipeline) -> tuple[CustomGraphPass, str]:
    """One hook that runs the user's passes and then ours, and a warning when theirs turn the compile caches off.

    ``user`` is what the options hold for the hook; when that is nothing, Inductor's global config is asked.
    """
    user = user or torch._inductor.config.post_grad_custom_pre_pass or ()
    parts = tuple(user) if isinstance(user, (list, tuple)) else (user,)
    if not parts:
        return pipeline, ""
    chain = _Chain((*parts, pipeline))
    aware = _inference_aware()
    if aware is not None and any(map(_wants_inference, parts)):
        chain = type("_InferenceAwareChain", (_Chain, aware), {})((*parts, pipeline))
    unhashed = [repr(p) for p in parts if not isinstance(p, CustomGraphPass) or not p.uuid()]
    if not unhashed:
        return chain, ""
    return chain, (
        f"Inductor's compile caches are off, because {', '.join(unhashed)} at post_grad_custom_pre_pass is not a "
        "torch._inductor.custom_graph_pass.CustomGraphPass with a uuid(); make it one to compile faster next time"
    )


def is_ours(hook: object) -> bool:
    """Is this value of Inductor's hook one that :func:`compose` has made?"""
    return isinstance(hook, (Pipeline, _Chain))


def readable(module: fx.GraphModule) -> str:
    """The graph as Python text with shapes, strides and source lines, as Inductor's own logs print it."""
    text = str(module.print_readable(print_output=False, include_stride=True, include_device=True))
    return text.replace("class <lambda>(", "class GraphModule(", 1)  # Inductor's name for it is no Python


def _kind(graph: fx.Graph) -> str:
    # Names of inputs tell forward from backward, except in the bodies of torch.cond.
    compiling = being_compiled()
    if compiling:
        return compiling
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    if any(n.startswith("tangents") for n in names):
        return "backward"
    return "forward" if any(n.startswith("primals") for n in names) else "inference"


def being_compiled() -> str:
    """What AOTAutograd is having compiled now: "inference", "forward" or "backward"; "" when that is not known."""
    for name in get_aot_compilation_context()[0]:  # "0_forward"
        kind = name.rpartition("_")[2]
        if kind in ("inference", "forward", "backward"):
            return kind
    return ""


__all__ = ["Pipeline", "count_ops", "identity"]
