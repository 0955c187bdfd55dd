"""Joins what ``then_gemm.py`` joined: a gated MLP's two products, where the first can quantise what the second reads.

``<quant>.then_gemm`` with the weights of gate and up, and the ``silu_mul_mxfp4_quant.then_gemm`` that alone reads its
halves, become ``<quant>.then_mlp``, which means the two. As there, nothing but that changes; the report counts all four
ops as before and says how many were joined.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fusionpasses import remarks
from fusionpasses.kernels import arch
from fusionpasses.ops._then_mlp import BEHIND
from fusionpasses.patterns._graph import bound_arguments, call, erase_dead, same_shape, storage_of, tensor_of
from fusionpasses.then_gemm import has_effect, results_of

ours = torch.ops.fusionpasses

#: Of this step, for Inductor's bisector and ``TORCHINDUCTOR_DISABLED_PASSES``.
NAME = "then_mlp"

#: Each quant with the product of gate and up, and the overload that goes on to the MLP's end.
THEN_MLP: dict[Any, Any] = {
    ours.dynamic_mxfp4_quant.then_gemm: ours.dynamic_mxfp4_quant.then_mlp,
    ours.rmsnorm_mxfp4_quant.then_gemm: ours.rmsnorm_mxfp4_quant.then_mlp,
    ours.rmsnorm_add_mxfp4_quant.then_gemm: ours.rmsnorm_add_mxfp4_quant.then_mlp,
}
_GATED = ours.silu_mul_mxfp4_quant.then_gemm
_VIEWS = {operator.getitem, torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default}
_VIEWS |= {torch.ops.aten.slice.Tensor, torch.ops.aten.view.default}


class Mlp(NamedTuple):
    """A quant with the product of gate and up, that product in the graph, and what alone reads it.

    Both are run by one provider, and a token is their last axis.
    """

    first: fx.Node
    gate_up: fx.Node
    second: fx.Node


def saves_a_launch(mlp: Mlp) -> bool:
    """Does the product of gate and up, run by our Triton kernels on the GPU that is here, quantise what it gives?"""
    of_first, of_second = bound_arguments(mlp.first), bound_arguments(mlp.second)
    gate_up, out = tensor_of(mlp.gate_up), tensor_of(mlp.second)
    x = tensor_of(mlp.first.args[0])
    if gate_up is None or out is None or x is None or remarks.architecture(out.device) is None:
        return False
    sizes = *gate_up.shape, out.shape[-1], x.shape[-1]
    if (
        of_first["provider"] != "triton"
        or not all(isinstance(size, int) for size in sizes)
        or not gate_up.numel()
        or of_first["bias"] is not None
        or {gate_up.dtype, of_second["act_dtype"] or gate_up.dtype} != {torch.bfloat16}
    ):
        return False
    from fusionpasses.kernels import gemm_choice

    tokens, rows = gate_up.shape[:-1].numel(), gate_up.shape[-1]
    layouts = {"layout": of_first["layout"], "layout_behind": of_second["layout"]}
    return gemm_choice.gated(tokens, rows, x.shape[-1], out.shape[-1], arch.of(out.device), **layouts) is not None


def join(graph: fx.Graph, pays: Callable[[Mlp], bool] = saves_a_launch) -> list[str]:
    """Join the MLPs for which it pays; lines for the report."""
    joined: Counter[str] = Counter()
    writers = [node for node in graph.nodes if has_effect(node)]
    for node in list(graph.nodes):
        mlp = _mlp_of(node)
        if mlp is not None and _may_move(mlp, writers) and pays(mlp):
            joined[node.target._opname] += 1
            _join(graph, mlp)
    return [
        f"{count} {name} joined with the gated MLP behind: the product of gate and up quantises what the next one reads"
        for name, count in joined.items()
    ]


def _mlp_of(first: fx.Node) -> Mlp | None:
    if first.target not in THEN_MLP:
        return None
    gate_up: fx.Node | None = first
    if isinstance(first.meta.get("val"), tuple):
        gate_up = (results_of(first) or {}).get(0)
    readers = set() if gate_up is None else _readers(gate_up)
    second = readers.pop() if len(readers) == 1 else None
    if gate_up is None or second is None or second.target is not _GATED:
        return None
    of_first, of_second = bound_arguments(first), bound_arguments(second)
    if {of_first["axes"], of_second["axes"]} != {1} or of_first["provider"] != of_second["provider"]:
        return None
    whole, gate, up = map(tensor_of, (gate_up, of_second["gate"], of_second["up"]))
    if whole is None or gate is None or up is None:
        return None
    half = gate.shape[-1]
    are_halves = all(
        storage_of(part) == storage_of(whole)
        and same_shape(part.shape, (*whole.shape[:-1], half))
        and same_shape(part.stride(), whole.stride())
        and same_shape((part.storage_offset(),), (whole.storage_offset() + first_column,))
        for part, first_column in ((gate, 0), (up, half))
    )
    return Mlp(first, gate_up, second) if are_halves and whole.shape[-1] == 2 * half else None


def _views(node: fx.Node) -> set[fx.Node]:
    """Views of a node, and of those; only of the kinds that halves are."""
    found = {node}
    for user in node.users:
        if user.target in _VIEWS:
            found |= _views(user)
    return found


def _readers(node: fx.Node) -> set[fx.Node]:
    """What reads a node or views of it."""
    views = _views(node)
    return {user for view in views for user in view.users} - views


def _may_move(mlp: Mlp, writers: Sequence[fx.Node]) -> bool:
    """Can the second stand where the first is? What it takes besides gate and up must be there, and not written to."""
    between = [node for node in writers if mlp.first < node < mlp.second]
    others = [of for name, of in bound_arguments(mlp.second).items() if name not in ("gate", "up")]
    return not between and all(node < mlp.first for node in others if isinstance(node, fx.Node))


def _join(graph: fx.Graph, mlp: Mlp) -> None:
    first, gate_up, second = mlp
    of_second = bound_arguments(second)
    behind = {given: of_second[name] for given, name in BEHIND.items()}
    values = first.meta["val"]
    value = (second.meta["val"], *values[1:]) if isinstance(values, tuple) else second.meta["val"]
    kwargs = {name: of for name, of in first.kwargs.items() if name != "axes"} | behind
    with graph.inserting_before(first):
        joined = call(graph, THEN_MLP[first.target], first.args, kwargs, provenance=first, value=value)
    out = joined
    if isinstance(values, tuple):
        with graph.inserting_after(joined):
            out = call(graph, operator.getitem, (joined, 0), {}, provenance=second, value=second.meta["val"])
        for user in list(first.users):
            if user is not gate_up:
                user.replace_input_with(first, joined)
    second.replace_all_uses_with(out)
    views = sorted(_views(gate_up))
    erase_dead([first, *views, second])
