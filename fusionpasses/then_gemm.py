"""Joins a quant and the product that alone reads what it gives, where the kernels have something to hand over.

Some products read quantised tokens in an order of their own (``kernels/_token_order.py``). They put them into it with
a kernel, or decode them in each program. The kernel that quantises may as well write that order, and then lets the
product start, and fetch its weight, at once. So, after the passes, such a quant and its ``mxfp4_gemm`` become one call,
``<quant>.then_gemm``, which means the two. Nothing but that changes: it is neither a fusion of the model's arithmetic
nor a site of the report, which counts both ops as before and has a line that says how many were joined.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fusionpasses import remarks
from fusionpasses._verdict import Verdict
from fusionpasses.kernels import arch
from fusionpasses.patterns._graph import bound_arguments, call, erase_dead, same_shape, tensor_of, writes

ours = torch.ops.fusionpasses

#: Of this step, for Inductor's bisector and ``TORCHINDUCTOR_DISABLED_PASSES``.
NAME = "then_gemm"

#: Each quant, and the overload that goes on to the product.
THEN_GEMM: dict[Any, Any] = {
    ours.dynamic_mxfp4_quant.default: ours.dynamic_mxfp4_quant.then_gemm,
    ours.rmsnorm_mxfp4_quant.default: ours.rmsnorm_mxfp4_quant.then_gemm,
    ours.rmsnorm_mxfp4_quant.with_second: ours.rmsnorm_mxfp4_quant.with_second_then_gemm,
    ours.rmsnorm_add_mxfp4_quant.default: ours.rmsnorm_add_mxfp4_quant.then_gemm,
    ours.silu_mul_mxfp4_quant.default: ours.silu_mul_mxfp4_quant.then_gemm,
}
_GEMM = ours.mxfp4_gemm.default
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class Pair(NamedTuple):
    """A quant, its results in the graph by place, and the product that reads the first two and is the only one to."""

    quant: fx.Node
    results: dict[int, fx.Node]
    gemm: fx.Node
    axes: int  #: of the codes, at their end, that are flattened to a token


class Said(NamedTuple):
    """Lines for the report."""

    joined: list[str]
    left: list[str]  #: what others lack


#: What is not worth a word in the report.
_NO = Verdict(False, "")


def takes_an_order(pair: Pair) -> Verdict:
    """Is the product, run by our Triton kernels on the GPU that is here, one that takes its tokens in order?"""
    if {pair.quant.kwargs.get("provider"), pair.gemm.kwargs.get("provider")} != {"triton"}:
        return _NO
    if pair.axes > 1 and pair.quant.target is not ours.dynamic_mxfp4_quant.default:
        return _NO  # its programs have rows
    arguments = bound_arguments(pair.gemm)
    out, codes = tensor_of(pair.gemm), tensor_of(arguments["x_codes"])
    if out is None or codes is None or remarks.architecture(out.device) is None:
        return _NO
    gpu, layout = arch.of(out.device), arguments["layout"]
    sizes = *out.shape, codes.shape[-1]
    if not all(isinstance(size, int) for size in sizes):
        # For some numbers it might pay: what is chosen is chosen once, for all of them.
        return Verdict(False, "sizes that are numbers when the graph is compiled") if _may_pay(gpu, layout) else _NO
    tokens, rows, width = out.shape[:-1].numel(), sizes[-2], sizes[-1] * 2
    if not tokens or not rows:
        return _NO
    from fusionpasses.kernels import gemm_choice

    choice = gemm_choice.choose(tokens, rows, width, gpu, w4a4=True, layout=layout)
    in_order = gemm_choice.token_order(choice, tokens, rows, width, layout) is not None
    return Verdict(True, choice.why) if in_order else _NO


def _may_pay(gpu: arch.Arch, layout: str) -> bool:
    return gpu.hopper_ptx and layout == "tiles"


def join(graph: fx.Graph, pays: Callable[[Pair], Verdict] = takes_an_order) -> Said:
    """Join the pairs for which it pays, and say so."""
    joined: Counter[str] = Counter()
    lacking: Counter[tuple[str, str]] = Counter()
    writers = [node for node in graph.nodes if has_effect(node)]
    for node in list(graph.nodes):
        pair = _pair_of(node)
        if pair is None or not _may_move(pair, writers):
            continue
        name, verdict = f"{node.target._opname}.{node.target._overloadname}".removesuffix(".default"), pays(pair)
        if verdict:
            joined[name] += 1
            _join(graph, pair)
        elif verdict.why:
            lacking[name, verdict.why] += 1
    behind = "joined with the mxfp4_gemm behind"
    return Said(
        [
            f"{count} {name} {behind}: tokens are handed over in the order that its kernel reads"
            for name, count in joined.items()
        ],
        [f"{count} {name} not {behind}, which takes {why}" for (name, why), count in lacking.items()],
    )


def _pair_of(quant: fx.Node) -> Pair | None:
    if quant.target not in THEN_GEMM or not quant.args:
        return None
    results = results_of(quant)
    if len(quant.meta.get("val", ())) != len(quant.target._schema.returns):  # type: ignore[union-attr]
        return None
    if results is None or not {0, 1} <= results.keys():
        return None
    codes, scales = _flattened(results[0]), _flattened(results[1])
    readers = {*codes.users, *scales.users}
    gemm = next(iter(readers), None)
    if gemm is None or len(readers) > 1 or gemm.target is not _GEMM:
        return None
    arguments = bound_arguments(gemm)
    given = arguments.pop("x_codes"), arguments.pop("x_scales")
    if given != (codes, scales) or any(value in given for value in arguments.values()):
        return None
    axes = {_axes(results[i], given[i]) for i in range(2)}
    return Pair(quant, results, gemm, axes.pop()) if len(axes) == 1 and 0 not in axes else None


def results_of(node: fx.Node) -> dict[int, fx.Node] | None:
    """What is taken of a node's results, by place; None if something else reads it, or takes one again."""
    results: dict[int, fx.Node] = {}
    for user in node.users:
        place: Any = user.args[1] if user.target is operator.getitem else None
        if not isinstance(place, int) or place < 0 or place in results:
            return None
        results[place] = user
    return results


def _flattened(result: fx.Node) -> fx.Node:
    """The view of a quant's result that alone is read, or the result."""
    users = list(result.users)
    return users[0] if len(users) == 1 and users[0].target in _VIEWS else result


def _axes(result: fx.Node, view: object) -> int:
    """How many last axes of a result a view makes one, 1 if it is the result; 0 if it is another view."""
    before, after = tensor_of(result), tensor_of(view)
    if before is None or after is None:
        return 0
    kept = after.dim() - 1
    whole = kept < before.dim() and same_shape(before.shape[:kept], after.shape[:-1])
    return before.dim() - kept if whole else 0


def has_effect(node: fx.Node) -> bool:
    """Does it do anything that what comes after may see: write, or wait for another stream?"""
    if node.op != "call_function":
        return False
    waits = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "streams"
    return waits or writes(node) or node.is_impure(impure_random=False)


def _may_move(pair: Pair, writers: Sequence[fx.Node]) -> bool:
    """Can the product stand where the quant is? What it takes must be there, and not be written to before it."""
    between = [node for node in writers if pair.quant < node < pair.gemm]
    arguments = bound_arguments(pair.gemm)
    tokens = arguments["x_codes"], arguments["x_scales"]
    others = [node for node in pair.gemm.all_input_nodes if node not in tokens]
    return not between and all(node < pair.quant for node in others)


def _join(graph: fx.Graph, pair: Pair) -> None:
    quant, results, gemm, axes = pair
    kwargs = bound_arguments(gemm)
    views = kwargs.pop("x_codes"), kwargs.pop("x_scales")
    if axes > 1:
        kwargs["axes"] = axes
    others: tuple[Any, ...] = tuple(quant.meta["val"][2:])
    value: Any = (gemm.meta["val"], *others) if others else gemm.meta["val"]
    with graph.inserting_before(quant):
        joined = call(graph, THEN_GEMM[quant.target], quant.args, quant.kwargs | kwargs, provenance=quant, value=value)
    if not others:
        gemm.replace_all_uses_with(joined)
    else:
        with graph.inserting_after(joined):
            out = call(graph, operator.getitem, (joined, 0), {}, provenance=gemm, value=gemm.meta["val"])
        gemm.replace_all_uses_with(out)
        for place, result in results.items():
            if place >= 2:
                result.args = (joined, place - 1)
    erase_dead([quant, *results.values(), *views, gemm])
