"""Recognises the query of absorbed attention: ``cat([q_nope, rope(q_pe)], -1)``, read by nothing else.

The rotated q may reach the cat through a permutation and views that regroup tokens. The fused op takes q_nope as
``[T, H, N]`` and gives the whole query, so that the cat, which would copy both, disappears.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses.patterns._graph import is_contiguous, same_shape, tensor_of
from fusionpasses.patterns._rope import Rope
from fusionpasses.patterns._rope_edit import tokens_first
from fusionpasses.patterns._rope_parts import VIEWS

aten = torch.ops.aten
_REGROUP = (*VIEWS, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)


@dataclasses.dataclass(eq=False)
class Absorbed:
    """The cat that makes the query.

    Attributes:
        cat: the query.
        q_nope: its first part.
        order: the order of cat's axes in which the op takes and gives them: tokens, heads, the width.
        nodes: the views between the rotation and the cat, and the cat.
    """

    cat: fx.Node
    q_nope: fx.Node
    order: list[int]
    nodes: list[fx.Node]


def recognise(rope: Rope, head_axis: int) -> Absorbed | None:
    """The query that the rotated q is a part of, if it is read by nothing else and the op gives it in its strides."""
    x = tensor_of(rope.x)
    if x is None:
        return None
    wanted = tokens_first(x.dim(), head_axis)
    axes: list[int] | None = list(range(x.dim()))  # for each axis the one of q it is; None once tokens are regrouped
    nodes: list[fx.Node] = []
    node, user = rope.root, _only_reader(rope.root)
    while user is not None and user.target is not aten.cat.default:
        before, after = tensor_of(node), tensor_of(user)
        if before is None or after is None or user.kwargs:
            return None
        if user.target is aten.permute.default and axes is not None:
            dims = user.args[1]
            axes = [axes[d] for d in dims]  # type: ignore[union-attr, index]
        elif user.target in _REGROUP and (axes is None or _moves_ones_only(axes, wanted, x)):
            if after.dim() < 3 or not same_shape(after.shape[-2:], (x.shape[head_axis], x.shape[-1])):
                return None
            axes = None
        else:
            return None
        nodes.append(user)
        node, user = user, _only_reader(user)
    if user is None:
        return None
    return _of_cat(user, node, axes, wanted, [*nodes, user])


def _of_cat(
    cat: fx.Node, rotated: fx.Node, axes: list[int] | None, wanted: list[int], nodes: list[fx.Node]
) -> Absorbed | None:
    parts, whole = cat.args[0], tensor_of(cat)
    dim = cat.args[1] if len(cat.args) > 1 else 0
    if whole is None or cat.kwargs or dim not in (-1, whole.dim() - 1):
        return None
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or parts[1] is not rotated or parts[0] is rotated:
        return None
    q_nope, q = tensor_of(parts[0]), tensor_of(rotated)
    if not isinstance(parts[0], fx.Node) or q_nope is None or q is None:
        return None
    if q_nope.dtype != q.dtype or q_nope.device != q.device or not isinstance(whole.shape[-1], int):
        return None
    order = list(range(whole.dim())) if axes is None else [axes.index(axis) for axis in wanted]
    # Attention reads it in these strides. A copy into other ones would cost as much as the cat.
    if not is_contiguous(whole.permute(order)):
        return None
    return Absorbed(cat, parts[0], order, nodes)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _moves_ones_only(axes: list[int], wanted: list[int], x: torch.Tensor) -> bool:
    """Are elements in the order in which the op gives them, whatever axes of size 1 stand between?"""
    long = [axis for axis in axes if not statically_known_true(x.shape[axis] == 1)]
    return long == [axis for axis in wanted if axis in long]
