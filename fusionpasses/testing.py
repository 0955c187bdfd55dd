"""Assertions for users' own CI: what fuses, and that it computes the same. No code is generated, so they are quick.

::

    from fusionpasses.testing import assert_equivalent, assert_fused
    with torch.no_grad():
        assert_fused(model, (x,), {"rmsnorm_mxfp4_quant": 4, "rmsnorm_add_mxfp4_quant": 3})
        assert_equivalent(model, (x,))
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fusionpasses.anchors import registered_anchors
from fusionpasses.backend import FusionBackend, as_dynamo_error
from fusionpasses.config import FusionConfig, did_you_mean, resolve_inductor_options
from fusionpasses.errors import BadConfig, FusionError, NotEquivalent, OpCountMismatch, UnsupportedInput
from fusionpasses.ops import OPS
from fusionpasses.report import GraphReport, Report


@dataclasses.dataclass
class Comparison:
    """The largest differences seen between a graph before and after the passes, over all graphs and runs.

    Attributes:
        tensors: how many outputs and written inputs were compared.
        unequal: how many of those were not byte-equal.
        max_abs: largest absolute difference of a floating-point one.
        bytes_differ: fraction of differing bytes in the worst integer one.
    """

    tensors: int = 0
    unequal: int = 0
    max_abs: float = 0.0
    bytes_differ: float = 0.0


@dataclasses.dataclass
class CapturedGraph:
    """A post-grad graph before and after the passes, and the report of what they did to it."""

    before: fx.GraphModule
    after: fx.GraphModule
    report: GraphReport


@dataclasses.dataclass
class Capture:
    """Result of :func:`capture`.

    Attributes:
        graphs: every post-grad graph, in the order the passes saw them: subgraphs before the graphs that call them.
        output: what the model returned, computed by interpreting the graphs before the passes.
        comparison: differences of the graphs after the passes, on the same inputs.
    """

    graphs: list[CapturedGraph]
    output: Any
    comparison: Comparison

    @property
    def report(self) -> Report:
        return Report([g.report for g in self.graphs])


def count_ops(graph: fx.Graph | fx.GraphModule) -> dict[str, int]:
    """Calls per op packet: ``{"rmsnorm_mxfp4_quant": 4, "aten.mul": 12}``, ours without namespace.

    A call wrapped by ``auto_functionalized`` counts as the op inside it.
    """
    from fusionpasses.pipeline import count_ops

    return count_ops(graph.graph if isinstance(graph, fx.GraphModule) else graph)


def capture(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    backend: FusionBackend | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: Mapping[str, Any] | None = None,
    backward: Callable[[Any], torch.Tensor] | None = None,
) -> Capture:
    """Run ``model(*inputs)`` through Dynamo, AOTAutograd and Inductor's post-grad passes, and interpret the graphs.

    Every graph is interpreted twice on the inputs it really gets: as it was before the fusion passes and as it is
    after them. Nothing is compiled. Resets Dynamo before and after, so that code compiled earlier in this process is
    compiled again when it is next called.

    Args:
        model: module or function.
        inputs, kwargs: its arguments.
        backend: whose settings to use; a default ``fusion_backend()`` when None.
        dynamic, fullgraph, options: as for torch.compile.
        backward: makes a scalar of the output, whose gradients are then computed, to capture backward graphs too.
    """
    import torch._dynamo

    if not isinstance(inputs, (tuple, list)):
        raise BadConfig(
            f"inputs: got {type(inputs).__name__}, allowed a tuple or list of the model's arguments; for one argument "
            "write (x,)"
        )
    if backend is not None and not isinstance(backend, FusionBackend):
        raise BadConfig(f"backend: got {backend!r}, allowed what fusion_backend() returns, or None for its defaults")
    resolve_inductor_options(None, options)
    backend = backend or FusionBackend(FusionConfig(), registered_anchors())
    recorder = _Recorder(backend, dict(options or {}))
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, backend=recorder, dynamic=dynamic, fullgraph=fullgraph)
        output = compiled(*inputs, **(kwargs or {}))
        if backward is not None:
            backward(output).backward()
    finally:
        torch._dynamo.reset()
    return Capture(recorder.graphs, output, recorder.comparison)


def assert_fused(
    model: Callable[..., Any], inputs: Sequence[Any], expected: Mapping[str, int], **options: Any
) -> Capture:
    """Assert how many ops the compiled graphs of ``model(*inputs)`` hold.

    Args:
        model, inputs: module or function, and its arguments.
        expected: op packet to exact count, ``{"rmsnorm_mxfp4_quant": 4}``. A foreign op is ``namespace.packet``; a
            count of 0 asserts absence.
        options: as for :func:`capture`.

    Raises:
        OpCountMismatch: a count differs. The message has the counts and the sites that were left, with reasons.
        BadConfig: ``expected`` is empty or names what cannot be an op.
        NotEquivalent: nothing of the model was compiled, so that nothing could be checked.
    """
    _check_expected(expected)
    result = _capture_something(model, inputs, options)
    counts: dict[str, int] = {}
    for graph in result.graphs:
        for name, count in graph.report.ops_after.items():
            counts[name] = counts.get(name, 0) + count
    wrong = {op: (n, counts.get(op, 0)) for op, n in expected.items() if counts.get(op, 0) != n}
    if wrong:
        lines = [f"{op}: got {got}, expected {want}" for op, (want, got) in wrong.items()]
        raise OpCountMismatch(
            "the compiled graphs do not hold the expected ops:\n  "
            + "\n  ".join(lines)
            + f"\nThe sites below say what was fused and why the rest was not.\n{result.report}"
        )
    return result


def assert_equivalent(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    max_abs: float = 0.0,
    max_bytes_differ: float = 0.0,
    **options: Any,
) -> Capture:
    """Assert that every graph computes the same after the passes as before them, on these inputs.

    Outputs and written inputs must be equal byte by byte. That is so on the CPU; on a GPU the fused kernels may sum
    in another order, and bounds can be given.

    Args:
        model, inputs: module or function, and its arguments.
        max_abs: largest difference allowed in a floating-point tensor.
        max_bytes_differ: fraction of bytes that may differ in an integer tensor.
        options: as for :func:`capture`.

    Raises:
        NotEquivalent: a difference beyond the bounds, or nothing was compiled and so nothing compared.
    """
    result = _capture_something(model, inputs, options)
    c = result.comparison
    exact = max_abs == 0 and max_bytes_differ == 0
    if c.unequal and (exact or c.max_abs > max_abs or c.bytes_differ > max_bytes_differ):
        raise NotEquivalent(
            f"{c.unequal} of {c.tensors} tensors differ after the passes: floating-point ones by up to {c.max_abs:g} "
            f"(allowed {max_abs:g}), integer ones in up to {c.bytes_differ:.2%} of the bytes (allowed "
            f"{max_bytes_differ:.2%}). Please report it with this listing.\n{result.report}"
        )
    return result


def _capture_something(model: Callable[..., Any], inputs: Sequence[Any], options: dict[str, Any]) -> Capture:
    """A capture that an assertion may rest on: one without graphs would pass anything."""
    result = capture(model, inputs, **options)
    if not result.graphs or not result.comparison.tensors:
        raise NotEquivalent(
            f"nothing was compared: got {len(result.graphs)} graphs and {result.comparison.tensors} tensors, allowed "
            "at least one of each. The model fell back to eager (TORCH_LOGS=graph_breaks says where), or it "
            "computes nothing"
        )
    return result


def _check_expected(expected: Mapping[str, int]) -> None:
    ours = {op.packet_name for op in OPS.values()}
    if not isinstance(expected, Mapping) or not expected:
        raise BadConfig(f"expected: got {expected!r}, allowed a mapping from op to count: {{'rmsnorm_mxfp4_quant': 4}}")
    for name in expected:
        packet = name.removeprefix("fusionpasses::").removeprefix("fusionpasses.").partition(".")[0]
        if name not in ours and (packet in ours or "." not in name or "::" in name):
            hint = f" (did you mean {packet!r}?)" if packet in ours else did_you_mean(name, ours)
            raise BadConfig(
                f"expected: got {name!r}, allowed {', '.join(map(repr, sorted(ours)))}, or namespace.packet for other "
                f"ops; overloads are counted together{hint}"
            )


class _Recorder:
    """A backend that captures and interprets instead of compiling."""

    def __init__(self, backend: FusionBackend, options: dict[str, Any]) -> None:
        self._backend = backend
        self._options = options
        self.graphs: list[CapturedGraph] = []
        self.comparison = Comparison()

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        try:
            return self._capture(gm, inputs)
        except FusionError as error:
            raise as_dynamo_error(self, error) from None

    def _capture(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        from fusionpasses.dynamo_floats import specialize_norm_eps
        from fusionpasses.pipeline import Pipeline, compose

        specialize_norm_eps(gm, self._backend.anchors)
        before: dict[int, fx.GraphModule] = {}
        after: dict[int, fx.GraphModule] = {}
        reports: list[tuple[int, GraphReport]] = []
        current: list[int] = []

        def observe(stage: str, graph: fx.Graph) -> None:
            module = graph.owning_module
            if module is None:
                raise TypeError("a post-grad graph without a module cannot be interpreted")
            current[:] = [id(module)]
            kept = before if stage == "before" else after
            kept[id(module)] = _copy(module, kept)

        pipeline = Pipeline(
            self._backend.config,
            self._backend.anchors,
            record=lambda report: reports.append((current[0], report)),
            observe=observe,
        )

        def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
            from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop
            from torch._inductor.fx_passes.post_grad import view_to_reshape
            from torch._inductor.virtualized import V

            first = len(reports)
            # What compile_fx does before these passes: they never see a view, and see these fake values.
            view_to_reshape(gm)
            with torch.no_grad():
                fake_mode = fake_tensor_prop(gm, example_inputs)
            with V.set_fake_mode(fake_mode):
                _recursive_post_grad_passes(gm, is_inference=bool(kwargs.get("is_inference", False)))
            for key, report in reports[first:]:
                self.graphs.append(CapturedGraph(before[key], after[key], report))
            if id(gm) not in before:  # a graph without calls; no pass runs
                before[id(gm)] = after[id(gm)] = gm
            return _boxed(self._runner(before[id(gm)], after[id(gm)]))

        patches = resolve_inductor_options(None, self._options)
        patches["post_grad_custom_pre_pass"], _ = compose(patches.get("post_grad_custom_pre_pass"), pipeline)
        patches["force_disable_caches"] = True
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(gm, inputs, inner_compile=inner_compile, config_patches=patches)  # type: ignore[arg-type]

    def _runner(self, before: fx.GraphModule, after: fx.GraphModule) -> Callable[[Sequence[Any]], Any]:
        def run(arguments: Sequence[Any]) -> Any:
            second = _clone(arguments)
            with torch.no_grad(), _same_random_numbers():
                outputs_after = fx.Interpreter(after).run(*second)
            with torch.no_grad():
                outputs = fx.Interpreter(before).run(*arguments)
            _compare((outputs, arguments), (outputs_after, second), self.comparison)
            return outputs

        return run


def _copy(module: fx.GraphModule, subgraphs: Mapping[int, fx.GraphModule]) -> fx.GraphModule:
    """The graph as it is now. Its subgraphs are the copies kept at the same stage: the passes saw them earlier."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    copied = fx.GraphModule(module, graph)
    for name, child in module.named_children():
        if id(child) in subgraphs and hasattr(copied, name):
            setattr(copied, name, subgraphs[id(child)])
    return copied


def _boxed(run: Callable[[Sequence[Any]], Any]) -> Callable[..., Any]:
    """AOTAutograd's boxed convention: one list, which the callee empties."""

    def call(arguments: list[Any]) -> Any:
        values = list(arguments)
        arguments.clear()
        return run(values)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _clone(arguments: Sequence[Any]) -> list[Any]:
    """Copies of tensors, strides kept; arguments that share storage go on sharing it."""
    copies: dict[int, torch.Tensor] = {}

    def clone(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage.clone())
        copied = torch.empty(0, dtype=value.dtype, device=value.device)
        return copied.set_(
            copies[storage.data_ptr()].untyped_storage(), value.storage_offset(), value.size(), value.stride()
        )

    return [clone(a) for a in arguments]


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave the generators as they were, so that the next run draws the same numbers."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _compare(a: Any, b: Any, into: Comparison) -> None:
    for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            if x is not y and x != y:
                into.unequal += 1
                into.max_abs = into.bytes_differ = float("inf")
            continue
        if x.is_meta:
            raise UnsupportedInput("inputs: got meta tensors, allowed tensors with values to compare; use the CPU")
        into.tensors += 1
        if x.dtype != y.dtype or x.shape != y.shape or _strides(x) != _strides(y):
            into.unequal += 1
            into.max_abs = into.bytes_differ = float("inf")
            continue
        if _equal_bytes(x, y):
            continue
        into.unequal += 1
        if x.dtype.is_floating_point:
            # Equal infinities and NaNs on both sides are no difference; one on one side is an infinite one.
            same = (x == y) | (x.isnan() & y.isnan())
            difference = torch.where(same, 0.0, (x.double() - y.double()).abs())
            worst = float(difference.nan_to_num(nan=float("inf")).max())
            into.max_abs = max(into.max_abs, worst)
        else:
            into.bytes_differ = max(into.bytes_differ, float((x != y).double().mean()))


def _strides(x: torch.Tensor) -> list[int]:
    """Strides that say where an element is: not those of axes of size one, nor of an empty tensor."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


def _equal_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.numel() == 0:
        return True
    # A single element may have any stride, which contiguous() keeps and a view as bytes refuses.
    of_x, of_y = (z.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for z in (x, y))
    return torch.equal(of_x, of_y)
