"""Says what a quantised tensor is when it is no recognised RMSNorm: almost one, something made of one, or neither."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusionpasses.patterns._rms_norm import recognise
from fusionpasses.patterns._views import is_row_view
from fusionpasses.report import NOTHING, REFUSED, Where

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default

#: What a norm's scale may end in, and what the recogniser asks for instead.
NEAR_MISSES: dict[Any, str] = {
    aten.rsqrt.default: "an rsqrt-based norm in a spelling the recogniser does not have",
    aten.sqrt.default: "the norm divides by a square root (x / sqrt(v)); write x * torch.rsqrt(v)",
    aten.pow.Tensor_Scalar: "the norm's scale is a power (v ** -0.5); write torch.rsqrt(v)",
    aten.linalg_vector_norm.default: "the norm is taken with vector_norm; write x * torch.rsqrt(mean + eps)",
}

#: Steps that may lie between a quant and a norm's scale.
_ELEMENTWISE = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.mul.Scalar,
    aten.reciprocal.default,
    aten.relu.default,
    _CAST,
}
_MOVES = {
    aten.slice.Tensor,
    aten.select.int,
    aten.permute.default,
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.cat.default,
    aten.index.Tensor,
}
_REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.var_mean.correction}
_LOOK_BACK = 8  # steps between a norm's result and its root; the longest accepted spelling has three


def explain(node: fx.Node) -> tuple[str, str]:
    """Status and reason for a quant of ``node``, which :func:`recognise` did not take; no reason if it is no norm."""
    walked = [node]
    frontier, seen = [node], {node}
    for _ in range(_LOOK_BACK):
        following: list[fx.Node] = []
        for current in frontier:
            if current is not node and current.target in NEAR_MISSES and _is_row_statistic(current):
                return _explain_root(node, current, walked)
            if current.target in _ELEMENTWISE or current.target in _MOVES or is_row_view(current):
                following += [n for n in current.all_input_nodes if n not in seen]
                seen.update(following)
        frontier = following
        walked += following
    return NOTHING, ""


def _explain_root(node: fx.Node, root: fx.Node, walked: list[fx.Node]) -> tuple[str, str]:
    # Looked for only now: recognising every node on the way of every quant would cost as much as the fusions.
    for between in walked:
        if between is not node and (norm := recognise(between)) is not None and root in norm.nodes:
            module = Where.of(between.meta).module
            return NOTHING, f"{node.target} stands between the norm{f' {module}' if module else ''} and the quant"
    if _subtracts_mean(root):
        return NOTHING, "the quantised tensor comes from a layer norm (the mean is subtracted), not from an RMSNorm"
    return REFUSED, NEAR_MISSES[root.target] + _detail(root)


def _is_row_statistic(node: fx.Node) -> bool:
    """Is this root taken of a reduction, and so one number per row?"""
    if node.target is aten.pow.Tensor_Scalar and node.args[1] not in (0.5, -0.5):
        return False
    return any(n.target in _REDUCTIONS for n in _ancestors(node, 4))


def _ancestors(node: fx.Node, depth: int) -> list[fx.Node]:
    found, frontier = [node], [node]
    for _ in range(depth):
        frontier = [n for f in frontier for n in f.all_input_nodes]
        found += frontier
    return found


def _subtracts_mean(node: fx.Node) -> bool:
    means = (aten.var_mean.correction, aten.var.correction, aten.sub.Tensor)
    return any(n.target in means for n in _ancestors(node, 4))


def _detail(node: fx.Node) -> str:
    """The step before the root that differs from the accepted spellings, when it can be named."""
    for user in node.users:
        if user.target is _CAST:
            return f" (the scale is rounded to {user.args[1]} before it is applied)"
    for ancestor in _ancestors(node, 3):
        if ancestor.target is aten.sum.dim_IntList:
            return " (it sums the squares; write mean)"
        if ancestor.target in (aten.add.Tensor, aten.mean.dim) and ancestor.kwargs:
            given = ", ".join(f"{k}={v}" for k, v in ancestor.kwargs.items())
            return f" ({ancestor.target} has {given})"
        if ancestor.target is aten.mean.dim and len(ancestor.args) < 3:
            return " (the mean does not keep its dim)"
    return ""
