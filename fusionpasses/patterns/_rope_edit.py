"""Puts the arguments of ``fused_rope_mla_kv_cache`` in the shapes it takes, and its results back in the model's."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses.patterns._graph import call, same_shape, tensor_of
from fusionpasses.patterns._mla_write import Write
from fusionpasses.patterns._rope_guards import Rope
from fusionpasses.patterns._rope_parts import Table, same_value

aten = torch.ops.aten


def head_axis_of(q: torch.Tensor, k: torch.Tensor) -> int | None:
    """The axis of q that k has with size 1, or not at all, all others being equal."""
    last = int(q.dim()) - 2
    for axis in [last, *range(last)]:
        rest = (*q.shape[:axis], *q.shape[axis + 1 :])
        if axis < 0 or not q.dim() - 1 <= k.dim() <= q.dim():
            return None
        if k.dim() == q.dim() and not statically_known_true(k.shape[axis] == 1):
            continue
        of_k = (*k.shape[:axis], *k.shape[axis + 1 :]) if k.dim() == q.dim() else tuple(k.shape)
        if same_shape(rest, of_k):
            return int(axis)
    return None


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Are strides known to be equal, but for axes of size 1?"""
    return all(
        statically_known_true(size == 1) or statically_known_true(x == y)
        for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def tokens_first(rank: int, head_axis: int) -> list[int]:
    """The order of q's axes in which the op takes it: tokens, heads, the width."""
    return [*(axis for axis in range(rank - 1) if axis != head_axis), head_axis, rank - 1]


def angle_axes(table: Table, x: torch.Tensor, head_axis: int | None) -> list[int | None] | None:
    """For each axis of tokens of x, the axis of the table's base, None where it is broadcast; None if heads differ."""
    base = tensor_of(table.base)
    missing = x.dim() - len(table.axes)
    axes: list[int | None] = []
    for axis in range(x.dim() - 1):
        at = table.axes[axis - missing] if axis >= missing else None
        if at is not None and base is not None and statically_known_true(base.shape[at] == 1):
            at = None
        if axis != head_axis:
            axes.append(at)
        elif at is not None:
            return None
    return axes


@dataclasses.dataclass(frozen=True, eq=False)
class Gathered:
    """Tables of which a rotation takes rows by position, for itself alone.

    Attributes:
        cos, sin: the tables ``[P, width]``.
        positions: the rows.
        axes: those of positions, for each axis of tokens of the rotated q; None where they are broadcast.
        nodes: what takes the rows.
    """

    cos: fx.Node
    sin: fx.Node
    positions: fx.Node
    axes: list[int | None]
    nodes: list[fx.Node]


def gathered(q: Rope, k: Rope, head_axis: int) -> Gathered | None:
    """The tables and positions of ``cos[positions]``, ``sin[positions]``, if only these two rotations read the rows."""
    inside = {*q.nodes, *k.nodes}
    tables_read = [table for rope in (q, k) for table in (rope.cos, rope.sin)]
    bases = {table.base for table in tables_read}
    # All layers' rotations may read one view of the rows, such as that which makes room for the heads.
    if any(user not in inside for table in tables_read for node in (table.base, *table.nodes) for user in node.users):
        return None
    found = [_rows_of(table.base) for table in (q.cos, q.sin)]
    x = tensor_of(q.x)
    if x is None or found[0] is None or found[1] is None or not same_value(found[0][1], found[1][1]):
        return None
    axes = [angle_axes(table, x, head_axis) for table in (q.cos, q.sin)]
    tables = [tensor_of(rows[0]) for rows in found if rows is not None]
    if axes[0] is None or axes[0] != axes[1] or any(t is None or t.dtype != q.compute_dtype for t in tables):
        return None
    if len({t.device for t in (*tables, tensor_of(found[0][1])) if t is not None}) != 1:
        return None
    return Gathered(found[0][0], found[1][0], found[0][1], axes[0], list(bases))


def _rows_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``table[positions]`` taken apart; Inductor has made that of index_select, too.

    Not an embedding: it refuses negative positions, which count from the end for the op.
    """
    if node.target is not aten.index.Tensor or node.kwargs:
        return None
    table, indices = node.args
    if not isinstance(indices, (list, tuple)) or len(indices) != 1:
        return None
    values = tensor_of(table), tensor_of(indices[0])
    if values[0] is None or values[1] is None or values[0].dim() != 2:
        return None
    if values[1].dtype not in (torch.int32, torch.int64):
        return None
    return table, indices[0]  # type: ignore[return-value]


def who_knows(size: torch.SymInt, known: Sequence[fx.Node]) -> tuple[fx.Node, int | None] | None:
    """The first of these nodes that is the size, or an axis of a tensor among them that has it."""
    for node in known:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and statically_known_true(value == size):
            return node, None
        tensor = tensor_of(node)
        for axis, other in enumerate(() if tensor is None else tensor.shape):
            if statically_known_true(other == size):
                return node, axis
    return None


class Edit:
    """Nodes for the op's arguments and results, at the graph's insertion point."""

    def __init__(self, graph: fx.Graph, provenance: fx.Node, shared: dict[Any, fx.Node]) -> None:
        self.graph = graph
        self.provenance = provenance
        self.shared = shared  # by all sites: angles that are in the op's form already

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        return call(self.graph, target, args, kwargs or {}, provenance=self.provenance)

    def fused(self, op: Any, kwargs: dict[str, Any], after: list[fx.Node]) -> fx.Node:
        """The functional call, whose results are those of the op, then the next versions of what it writes."""
        # Values are put together: auto_functionalized_v2 on fake tensors takes 5 ms.
        arguments = [a.name for a in op._schema.arguments if "Tensor" in str(a.type) and not a.alias_info]
        values = {name: tensor_of(kwargs.get(name)) for name in arguments}
        q, k = values["q_pe"], values["k_pe"]
        mode = detect_fake_mode(q)
        if q is None or k is None or mode is None:
            raise RuntimeError("a site without fake values was to be rewritten")
        with mode:
            # The last axis of w_uk is that of its product with q_nope.
            nope = values.get("w_uk", values.get("q_nope"))
            given = [q.new_empty((*q.shape[:2], q.shape[2] + (0 if nope is None else nope.shape[2])))]
            if len(op._schema.returns) == 2:
                given.append(k.new_empty(k.shape))
        value = (*given, *(node.meta["val"] for node in after))
        return call(self.graph, auto_functionalized_v2, (op,), kwargs, provenance=self.provenance, value=value)

    def getitem(self, node: fx.Node, index: int) -> fx.Node:
        return call(
            self.graph,
            operator.getitem,
            (node, index),
            {},
            provenance=self.provenance,
            value=node.meta["val"][index],
        )

    def shape(self, node: fx.Node) -> Any:
        value = tensor_of(node)
        return () if value is None else value.shape

    def size(self, node: fx.Node, axis: int) -> Any:
        """The size of an axis: a number, or a node that asks for it."""
        size = self.shape(node)[axis]
        return self.call(aten.sym_size.int, (node, axis)) if isinstance(size, torch.SymInt) else size

    def reshape(self, node: fx.Node, sizes: list[Any]) -> fx.Node:
        shape = self.shape(node)
        # Not asked of -1, which is what is left; and no node that stands for a size is looked at.
        known = [(size, new) for size, new in zip(shape, sizes, strict=False) if not isinstance(new, int) or new >= 0]
        same = all(isinstance(new, int) and statically_known_true(size == new) for size, new in known)
        if len(shape) == len(sizes) and same and len(sizes) - len(known) <= 1:
            return node
        return self.call(aten.reshape.default, (node, sizes))

    def permute(self, node: fx.Node, dims: list[int]) -> fx.Node:
        return node if dims == sorted(dims) else self.call(aten.permute.default, (node, dims))

    def strided_as(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """``node`` with the strides of the node that it replaces, on which later views rest: its own, or contiguous."""
        value, wanted = tensor_of(node), tensor_of(like)
        if value is None or wanted is None or same_strides(value, wanted):
            return node
        return self.call(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})

    def unordered(
        self, node: fx.Node, like: fx.Node, order: list[int], known: Sequence[fx.Node] | None = None
    ) -> fx.Node:
        """A result of the op with the axes of ``like``, which it has in this order; only its width may differ.

        ``known``: who is asked for sizes, because ``like`` shall go; tensors and sizes. None: ``like`` may stay.
        """
        if known is None:
            sizes = [self.size(like, axis) for axis in order[:-1]]
        else:
            sizes = []
            for axis in order[:-1]:
                size = self.shape(like)[axis]
                knows = who_knows(size, known) if isinstance(size, torch.SymInt) else None
                if knows is not None:
                    node_of, axis_of = knows
                    sizes.append(node_of if axis_of is None else self.size(node_of, axis_of))
                else:
                    sizes.append(size if isinstance(size, int) else -1)  # what is left
        node = self.reshape(node, [*sizes, self.shape(node)[-1]])
        return self.permute(node, [order.index(axis) for axis in range(len(order))])

    def columns(self, table: Table, base: fx.Node) -> fx.Node:
        """The columns of ``base`` that ``table`` takes of its own."""
        if table.whole or table.columns is None:
            return base
        columns, last = table.columns, len(self.shape(base)) - 1
        return self.call(aten.slice.Tensor, (base, last, columns.start, columns.stop, columns.step))

    def angles(self, rope: Rope, table: Table, head_axis: int) -> fx.Node:
        """The table as the op takes it: a row for each token, in the dtype that the rotation is computed in."""
        x, base = tensor_of(rope.x), tensor_of(table.base)
        if x is None or base is None:
            raise RuntimeError("angles without fake values were to be rewritten")
        axes = angle_axes(table, x, head_axis) or []
        # A size that is a symbol is asked of this rotation's x, which may come after those of other sites.
        alike = None not in axes or all(isinstance(size, int) for size in x.shape)
        key = (table.base, table.columns, rope.compute_dtype, *axes, *(x.shape if None in axes and alike else ()))
        if alike and key in self.shared:
            return self.shared[key]
        node = self.columns(table, table.base)
        if base.dtype != rope.compute_dtype:
            node = self.call(torch.ops.prims.convert_element_type.default, (node, rope.compute_dtype))
        node = self.per_token(node, axes, rope.x, head_axis, width=True)
        if alike:
            self.shared[key] = node
        return node

    def per_token(
        self, node: fx.Node, axes: list[int | None], x: fx.Node, head_axis: int, *, width: bool = False
    ) -> fx.Node:
        """``node`` with its axes flattened to one that counts the tokens of x; ``width``: but for its last axis.

        ``axes`` are those of ``node`` for each axis of tokens of x, None where it is broadcast.
        """
        rank = len(self.shape(node)) - width
        last = [self.shape(node)[-1]] if width else []
        kept = [axis for axis in axes if axis is not None]
        rest = [axis for axis in range(rank) if axis not in kept]  # of size 1
        node = self.permute(node, [*rest, *kept, *([rank] if width else [])])
        if None in axes:
            tokens = [axis for axis in range(len(self.shape(x)) - 1) if axis != head_axis]
            sizes = [self.size(x, axis) for axis in tokens]
            ones = [1 if axis is None else size for axis, size in zip(axes, sizes, strict=True)]
            node = self.call(aten.expand.default, (self.reshape(node, [*ones, *last]), [*sizes, *last]))
        return self.reshape(node, [-1, *last])

    def slots(self, write: Write, rows: fx.Node) -> fx.Node:
        """The slot of each of the rows."""
        if write.slots is not None:
            return write.slots
        # Rows that fill the part in order: slot i for token i.
        device = write.parts[0].part.device
        options = {"start": 0, "step": 1, "dtype": torch.int64, "device": device, "requires_grad": False}
        return self.call(torch.ops.prims.iota.default, (self.size(rows, 0),), options)
