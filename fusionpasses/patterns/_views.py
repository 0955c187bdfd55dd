"""Views between a norm and its quant: those that keep every row of the last axis as it is.

Quantising per row commutes with such a view, so the fused op works on the norm's own shape and the same view is
replayed on its results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses.patterns._graph import call, same_shape, tensor_of

aten = torch.ops.aten

#: Views that may keep rows, and where their new sizes are; None when the sizes follow from the input.
ROW_VIEWS: dict[Any, int | None] = {
    aten.reshape.default: 1,
    aten.view.default: 1,
    aten._unsafe_view.default: 1,
    aten.squeeze.default: None,
    aten.squeeze.dim: None,
    aten.squeeze.dims: None,
    aten.unsqueeze.default: None,
}

_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def is_row_view(node: fx.Node) -> bool:
    """Does this node only regroup the leading axes of its input?"""
    if node.op != "call_function" or node.target not in ROW_VIEWS or node.kwargs:
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or not before.dim() or not after.dim():
        return False
    # The same number of elements in rows of the same width, in row-major order: the same rows.
    return same_shape(before.shape[-1:], after.shape[-1:]) and _removed(node) is not None


def _removed(view: fx.Node) -> list[int] | None:
    """Axes that a squeeze removes, none for another view; None if the last is among them, or it is not known which."""
    before, after = tensor_of(view.args[0]), tensor_of(view)
    if view.target not in _SQUEEZES or before is None or after is None:
        return []
    rank = before.dim()
    named: Any = view.args[1] if len(view.args) > 1 else range(rank)
    axes = sorted({axis % rank for axis in ([named] if isinstance(named, int) else named)})
    removed = [axis for axis in axes if statically_known_true(before.shape[axis] == 1)]
    return removed if len(removed) == rank - after.dim() and rank - 1 not in removed else None


def through_row_views(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node below the row views that end in ``node``, and those views from it up to ``node``."""
    views: list[fx.Node] = []
    while is_row_view(node):
        views.append(node)
        source = node.args[0]
        if not isinstance(source, fx.Node):  # a view of a constant; nothing to walk to
            break
        node = source
    views.reverse()
    return node, views


def replay(graph: fx.Graph, node: fx.Node, views: list[fx.Node], provenance: fx.Node) -> fx.Node:
    """Apply the same views to ``node``, whose rows have another width."""
    for view in views:
        if view.target in _SQUEEZES:
            # By number: of codes and scales another axis may be of size 1, the last one.
            removed = _removed(view)
            if removed:
                node = call(graph, aten.squeeze.dims, (node, removed), {}, provenance=provenance)
            continue
        args = [node, *view.args[1:]]
        sizes_at = ROW_VIEWS[view.target]
        if sizes_at is not None:
            sizes = args[sizes_at]
            width = node.meta["val"].shape[-1]
            args[sizes_at] = [*sizes[:-1], width]  # type: ignore[index,misc]
        node = call(graph, view.target, tuple(args), {}, provenance=provenance)
    return node
