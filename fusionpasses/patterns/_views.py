"""Views between a norm and its quant: those that keep every row of the last axis as it is.

Quantising per row commutes with such a view, so the fused op works on the norm's own shape and the same view is
replayed on its results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

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


def is_row_view(node: fx.Node) -> bool:
    """Does this node only regroup the leading axes of its input?"""
    if node.op != "call_function" or node.target not in ROW_VIEWS or node.kwargs:
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or not before.dim() or not after.dim():
        return False
    # The same number of elements in rows of the same width, in row-major order: the same rows.
    return same_shape(before.shape[-1:], after.shape[-1:])


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
        args = [node, *view.args[1:]]
        sizes_at = ROW_VIEWS[view.target]
        if sizes_at is not None:
            sizes = args[sizes_at]
            width = node.meta["val"].shape[-1]
            args[sizes_at] = [*sizes[:-1], width]  # type: ignore[index,misc]
        node = call(graph, view.target, tuple(args), {}, provenance=provenance)
    return node
