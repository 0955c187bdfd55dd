"""Why a quantised tensor is no gated activation that the fused op has: what it is made of instead, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusionpasses.patterns._gated_activation import CAST, CLAMPS, activations_at, below_casts, recognise
from fusionpasses.patterns._graph import same_shape, tensor_of
from fusionpasses.patterns._views import is_row_view
from fusionpasses.report import NOTHING, REFUSED

aten = torch.ops.aten

#: What activations are made of, and what the recogniser asks for instead.
NEAR_MISSES: dict[Any, str] = {
    aten.sigmoid.default: "it is gated by a sigmoid that is no silu: x * sigmoid(x) of one x",
    aten.silu.default: "silu was not decomposed; the fused op computes x / (1 + exp(-x))",
    aten.gelu.default: "gelu was not decomposed; the fused op computes the tanh form, step by step",
    aten.erf.default: "the activation is the exact GELU (erf); the fused op has approximate='tanh'",
    aten.tanh.default: "the activation is a tanh that is no tanh-GELU in F.gelu's spelling",
    aten.relu.default: "the activation is made of a relu; the fused op has silu and tanh-GELU",
    aten.exp.default: "the activation is made of exp(x), but not spelled as F.silu is",
}
#: Steps that may lie between the product and what makes it an activation.
_ELEMENTWISE = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.pow.Tensor_Scalar,
    aten.neg.default,
    aten.reciprocal.default,
    *CLAMPS,
    CAST,
}
_LOOK_BACK = 12  # steps; GELU has eight
_MOST_STEPS = 64  # of a factor, until what is left counts as where it begins


def explain(node: fx.Node) -> tuple[str, str]:
    """Status and reason for a quant of ``node``, which :func:`recognise` did not take.

    No reason if it is no product of an activation.
    """
    if node.target is aten.glu.default:
        return REFUSED, "F.glu gates by a sigmoid; the fused op has silu and tanh-GELU"
    if node.target not in _ELEMENTWISE:
        return NOTHING, ""
    walked = _walk(node)
    roots = [n for n in walked if n.target in NEAR_MISSES and not _is_softmax(n)]
    if not roots:
        return NOTHING, ""
    for between in walked[1:]:
        if recognise(between) is not None:
            return NOTHING, f"{node.target} stands between the gated activation and the quant"
    if not _multiplies_two(node):
        alone = "the quantised tensor is an activation alone; the fused op multiplies it by up"
        return NOTHING, alone if any(activations_at(below_casts(node))) else ""
    for activation in walked[1:]:
        known = next(activations_at(activation), None)
        if known is not None:
            name = known[0].name.partition(",")[0]
            steps = ", ".join(str(step.target) for step in _behind(activation, walked))
            reason = f"the activation is {name}, but the fused op does not do all that follows it: {steps}"
            return REFUSED, reason + _views_among(walked[1:])
    # What is nearest to the product names the activation: its own steps come after it.
    root = roots[0]
    reason = NEAR_MISSES[root.target]
    inner = root.all_input_nodes[0]
    if root.target is aten.sigmoid.default and inner.target is aten.mul.Tensor and isinstance(inner.args[1], float):
        reason += f" (its argument is multiplied by {inner.args[1]})"
    if any(n.target in CLAMPS for n in walked):
        reason += " (and values are clamped)"
    return REFUSED, reason + _views_among(walked[1:])


def _views_among(walked: list[fx.Node]) -> str:
    if any(map(is_row_view, walked)):
        return "; nor does the recogniser look through a view between the activation and the product"
    return ""


def _walk(node: fx.Node) -> list[fx.Node]:
    """The node and what it is computed from by elementwise steps, nearest first."""
    seen, frontier = {node: None}, [node]
    for _ in range(_LOOK_BACK):
        steps = [n for n in frontier if n.target in _ELEMENTWISE or is_row_view(n)]
        frontier = [n for n in dict.fromkeys(n for step in steps for n in step.all_input_nodes) if n not in seen]
        seen |= dict.fromkeys(frontier)
    return [*seen]


def _behind(node: fx.Node, walked: list[fx.Node]) -> list[fx.Node]:
    """Those that are computed from a node, in order."""
    behind = {node: None}
    for step in sorted(walked):
        if any(source in behind for source in step.all_input_nodes):
            behind[step] = None
    return [*behind][1:]


def _sources(node: fx.Node) -> set[fx.Node]:
    """What a factor is computed from: where elementwise steps and activations begin."""
    seen, frontier = {node}, [node]
    sources: set[fx.Node] = set()
    while frontier:
        current = frontier.pop()
        steps = current.target in _ELEMENTWISE or current.target in NEAR_MISSES or is_row_view(current)
        if not steps or len(seen) > _MOST_STEPS:
            sources.add(current)
            continue
        following = [n for n in current.all_input_nodes if n not in seen]
        frontier += following
        seen.update(following)
    return sources


def _multiplies_two(node: fx.Node) -> bool:
    """Is it a product of two tensors of its shape that do not come from the same one? GELU itself is not."""
    node = below_casts(node)
    value = tensor_of(node)
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2 or value is None:
        return False
    factors = [tensor_of(factor) for factor in node.all_input_nodes]
    if not all(factor is not None and same_shape(factor.shape, value.shape) for factor in factors):
        return False
    # All of GELU's factors come from one tensor.
    return len(set().union(*map(_sources, node.all_input_nodes))) > 1


def _is_softmax(node: fx.Node) -> bool:
    return node.target is aten.exp.default and node.all_input_nodes[0].target is aten.sub.Tensor
