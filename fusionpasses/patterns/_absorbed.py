"""Recognises the query of absorbed attention: ``cat([q_nope, rope(q_pe)], -1)``, read by nothing else.

The rotated q may reach the cat through a permutation and views that regroup tokens. The fused op takes q_nope as
``[T, H, N]`` and gives the whole query, so that the cat, which would copy both, disappears.

q_nope comes from a bmm over heads, which absorbs the up-projection of keys. If nothing else reads the product, the op
takes its factors, and the product is written where the query wants it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses.patterns._graph import is_contiguous, same_shape, storage_of, tensor_of
from fusionpasses.patterns._rope import Rope
from fusionpasses.patterns._rope_edit import tokens_first, who_knows
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
        product: if q_nope is the transposed product ``[H, T, N]`` of a bmm, the views between, and last the bmm.
    """

    cat: fx.Node
    q_nope: fx.Node
    order: list[int]
    nodes: list[fx.Node]
    product: list[fx.Node]

    @property
    def inputs(self) -> list[fx.Node]:
        """What the op reads for it."""
        return self.product[-1].all_input_nodes if self.product else [self.q_nope]

    def know_sizes(self, rope: Rope) -> list[fx.Node]:
        """Tensors and sizes that stay when the product's nodes go."""
        inside = {*self.product}
        sources = [source for node in reversed(self.product) for source in node.all_input_nodes]
        return [rope.x, *(source for source in sources if source not in inside)]


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
    found = None if user is None else _of_cat(user, node, axes, wanted, [*nodes, user])
    if found is not None and found.product:
        sizes = [size for size in found.q_nope.meta["val"].shape if isinstance(size, torch.SymInt)]
        if sum(who_knows(size, found.know_sizes(rope)) is None for size in sizes) > 1:
            found.product = []
    return found


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
    return Absorbed(cat, parts[0], order, nodes, _product(parts[0], order))


def _product(q_nope: fx.Node, order: list[int]) -> list[fx.Node]:
    """The views from a bmm over heads to q_nope, and the bmm; nothing if something else reads it.

    A bmm's result is contiguous. So strides tell which element is where in its views (a reshape is one if it shares the
    storage): q_nope is the transposed product if its tokens, in order, and its heads are as far apart as the product's.
    """
    nodes = [q_nope]
    while nodes[-1].target in (*_REGROUP, aten.permute.default) and isinstance(nodes[-1].args[0], fx.Node):
        nodes.append(nodes[-1].args[0])
    product, value = tensor_of(nodes[-1]), tensor_of(q_nope)
    if nodes[-1].target is not aten.bmm.default or nodes[-1].kwargs or any(len(n.users) != 1 for n in nodes):
        return []
    if product is None or value is None or not is_contiguous(product) or storage_of(value) != storage_of(product):
        return []
    value = value.permute(order)
    *tokens, heads, last = zip(value.shape, value.stride(), strict=True)
    strides = [(heads, product.stride(0)), (last, product.stride(2))]
    apart = product.stride(1)
    for axis in reversed(tokens):
        strides.append((axis, apart))
        apart *= axis[0]
    as_wanted = all(
        statically_known_true(size == 1) or statically_known_true(got == want) for (size, got), want in strides
    )
    return nodes if as_wanted and same_shape((heads[0], last[0]), (product.shape[0], product.shape[2])) else []


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _moves_ones_only(axes: list[int], wanted: list[int], x: torch.Tensor) -> bool:
    """Are elements in the order in which the op gives them, whatever axes of size 1 stand between?"""
    long = [axis for axis in axes if not statically_known_true(x.shape[axis] == 1)]
    return long == [axis for axis in wanted if axis in long]
