"""What a rotation reads: elements of a tensor, entries of a table, and which nodes only say where they are.

Slices, splits, unbinds and selects of the last axis are all read as a source and the columns taken from it, a
``range``. Views of a table that only broadcast it are taken off, so that tables can be compared.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses.patterns._graph import bound_arguments, same_shape, tensor_of

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
VIEWS = [aten.view.default, aten.reshape.default, aten._unsafe_view.default]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Columns of the last axis of ``source``, perhaps negated, as they enter a product.

    A widening to float32 is exact, so it is looked through, before and after the columns are taken.
    """

    source: fx.Node
    columns: range | None
    negated: bool
    nodes: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The cos or sin of a rotation.

    Attributes:
        operand: the node a product reads.
        base: the node below it that holds the angles: broadcasting views and the choice of columns taken off. Casts
            and attention scaling belong to the angles and stay.
        columns: those of base's last axis that are used, R/2 or R of them; None when they are not known.
        axes: for each axis of the operand, the axis of base it is, or None where one of size 1 was inserted.
        nodes: from operand down to base, base excluded.
        component: "real" or "imag" of a complex table, else "".
    """

    operand: fx.Node
    base: fx.Node
    columns: range | None
    axes: tuple[int | None, ...]
    nodes: tuple[fx.Node, ...]
    component: str = ""

    @property
    def inserted(self) -> tuple[int, ...]:
        """Axes of the operand that base does not have."""
        return tuple(i for i, axis in enumerate(self.axes) if axis is None)

    @property
    def whole(self) -> bool:
        """Are all columns of base used?"""
        base = tensor_of(self.base)
        return base is not None and self.columns is not None and self.columns == range(base.shape[-1])

    def same_angles(self, other: Table) -> bool:
        return (
            self.columns is not None
            and self.columns == other.columns
            and self.component == other.component
            and same_value(self.base, other.base)
        )

    def joined_with(self, second: Table, written: str) -> Table:
        """One table as wide as x, if this one and ``second`` are the parts of it for the two results; else this one."""
        if self.columns and second.columns and self.columns != second.columns:
            both = range(self.columns.start, self.columns.start + 2 * len(self.columns))
            if pair_columns(written, both) == (self.columns, second.columns):
                return dataclasses.replace(self, columns=both, nodes=(*self.nodes, *second.nodes))
        return self


def pair_columns(layout: str, columns: range | None) -> tuple[range | None, range | None]:
    """The columns of the first and of the second elements of all pairs."""
    if columns is None:
        return None, None
    if layout == "pairs":
        return columns[0::2], columns[1::2]
    return columns[: len(columns) // 2], columns[len(columns) // 2 :]


def layout_of(p: Part, q: Part) -> str | None:
    """How two parts, in either order, make up a whole tensor: its "halves", its "pairs", or None."""
    if p.columns is None or q.columns is None:
        return None
    whole = range(len(p.columns) + len(q.columns))
    for layout in ("halves", "pairs"):
        a, b = pair_columns(layout, whole)
        if (p.columns, q.columns) in ((a, b), (b, a)):
            return layout
    return None


def is_widening(node: fx.Node) -> bool:
    """A cast to float32 that changes no value."""
    source = tensor_of(node.args[0]) if node.target is CAST and not node.kwargs else None
    return source is not None and node.args[1] == torch.float32 and source.dtype in (torch.bfloat16, torch.float16)


def _widened(node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    while is_widening(node) and isinstance(node.args[0], fx.Node):
        nodes.append(node)
        node = node.args[0]
    return node


def whole_of(node: fx.Node) -> Part:
    """``node`` as a whole, a widening looked through."""
    nodes: list[fx.Node] = []
    node = _widened(node, nodes)
    return Part(node, _all_columns(node), False, tuple(nodes))


def part_of(node: fx.Node) -> Part:
    """The columns that ``node`` takes of a tensor; all of its own when it takes none."""
    nodes: list[fx.Node] = []
    negated = False
    node = _widened(node, nodes)
    while node.target is aten.neg.default and isinstance(node.args[0], fx.Node):
        nodes.append(node)
        negated = not negated
        node = _widened(node.args[0], nodes)
    taken = columns_taken(node)
    if taken is None:
        return Part(node, _all_columns(node), negated, tuple(nodes))
    source, columns, between = taken
    nodes += between
    return Part(_widened(source, nodes), columns, negated, tuple(nodes))


def _all_columns(node: fx.Node) -> range | None:
    value = tensor_of(node)
    width = value.shape[-1] if value is not None and value.dim() else None
    return range(width) if isinstance(width, int) else None


def columns_taken(node: fx.Node) -> tuple[fx.Node, range, list[fx.Node]] | None:
    """The tensor ``node`` takes columns of its last axis from, which ones, and the nodes that take them."""
    if node.op != "call_function":
        return None
    if node.target is aten.slice.Tensor:
        return _sliced(node)
    if node.target is aten.select.int:
        at, holder = node.args[2] if len(node.args) == 3 else None, node
    elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        at, holder = node.args[1], node.args[0]
    else:
        return None
    if not isinstance(at, int) or at < 0 or not isinstance(holder.args[0], fx.Node):
        return None
    nodes = list(dict.fromkeys([node, holder]))
    if holder.target in (aten.split.Tensor, aten.split_with_sizes.default):
        return _piece(holder, at, nodes)
    if holder.target in (aten.unbind.int, aten.select.int):
        return _unfolded(holder, at, nodes)
    return None


def _sliced(node: fx.Node) -> tuple[fx.Node, range, list[fx.Node]] | None:
    bound = bound_arguments(node)
    source, columns = bound["self"], _all_columns(bound["self"])
    limits = [bound["start"], bound["end"], bound["step"]]
    if columns is None or not all(limit is None or isinstance(limit, int) for limit in limits):
        return None
    if not _is_last(bound["dim"], source, 1):
        return None
    return source, columns[slice(*limits)], [node]


def _piece(split: fx.Node, at: int, nodes: list[fx.Node]) -> tuple[fx.Node, range, list[fx.Node]] | None:
    source: Any = split.args[0]
    columns, sizes = _all_columns(source), split.args[1]
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if columns is None or not _is_last(dim, source, 1):
        return None
    if isinstance(sizes, int):
        return source, columns[at * sizes : (at + 1) * sizes], nodes
    if not isinstance(sizes, (list, tuple)):
        return None
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) != len(sizes):
        return None
    start = sum(known[:at])
    return source, columns[start : start + known[at]], nodes


def _unfolded(select: fx.Node, at: int, nodes: list[fx.Node]) -> tuple[fx.Node, range, list[fx.Node]] | None:
    """One of the two halves or neighbours of a last axis viewed as two axes, [2, n] or [n, 2]."""
    view: Any = select.args[0]
    dim = select.args[1] if len(select.args) > 1 else select.kwargs.get("dim", 0)
    if view.target not in VIEWS or not isinstance(view.args[0], fx.Node):
        return None
    before, after, columns = tensor_of(view.args[0]), tensor_of(view), _all_columns(view.args[0])
    if before is None or after is None or columns is None:
        return None
    n = len(columns) // 2
    nodes = [*nodes, view]
    for layout, axes, from_end in (("pairs", (n, 2), 1), ("halves", (2, n), 2)):
        if same_shape(after.shape, (*before.shape[:-1], *axes)) and _is_last(dim, view, from_end) and at < 2:
            taken = pair_columns(layout, columns)[at]
            return None if taken is None else (view.args[0], taken, nodes)
    return None


def _is_last(dim: object, source: fx.Node, from_end: int) -> bool:
    value = tensor_of(source)
    return value is not None and isinstance(dim, int) and dim % value.dim() == value.dim() - from_end


# --- tables ----------------------------------------------------------------------------------------------------------


def table_of(operand: fx.Node) -> Table:
    """The table that a product reads through ``operand``."""
    value = tensor_of(operand)
    axes: list[int | None] = list(range(value.dim() if value is not None else 0))
    columns: range | None = None
    nodes: list[fx.Node] = []
    node = operand
    while node.op == "call_function":
        taken = columns_taken(node) if columns is None and _holds_angles(axes, node) else None
        if taken is not None:
            node, columns, between = taken
            nodes += between
            continue
        mapping = _broadcast(node)
        if mapping is None or not isinstance(node.args[0], fx.Node):
            break
        nodes.append(node)
        axes = [None if axis is None else mapping[axis] for axis in axes]
        node = node.args[0]
    if columns is None and _holds_angles(axes, node):
        columns = _all_columns(node)
    return Table(operand, node, columns, tuple(axes), tuple(nodes))


def _holds_angles(axes: list[int | None], node: fx.Node) -> bool:
    """Is the operand's last axis the last axis of ``node``?"""
    value = tensor_of(node)
    return value is not None and bool(axes) and axes[-1] == value.dim() - 1


def _broadcast(node: fx.Node) -> list[int | None] | None:
    """For a view that only inserts or widens axes of size 1, the axis of its input each of its axes is."""
    before, after = tensor_of(node.args[0]) if node.args else None, tensor_of(node)
    if before is None or after is None or node.kwargs:
        return None
    new = after.dim() - before.dim()
    if node.target is aten.unsqueeze.default and isinstance(node.args[1], int):
        at = node.args[1] % after.dim()
        return [None if d == at else d - (d > at) for d in range(after.dim())]
    if node.target is aten.expand.default:
        # Columns may have been taken above: the axis they are counted on must not change.
        if not same_shape(before.shape[-1:], after.shape[-1:]):
            return None
        return [None if d < new else d - new for d in range(after.dim())]
    if node.target in VIEWS:
        mapping: list[int | None] = [None] * after.dim()
        left = before.dim() - 1
        for d in reversed(range(after.dim())):
            if left >= 0 and statically_known_true(after.shape[d] == before.shape[left]):
                mapping[d] = left
                left -= 1
            elif not statically_known_true(after.shape[d] == 1):
                return None
        return mapping if left < 0 else None
    return None


def same_value(a: object, b: object, depth: int = 8) -> bool:
    """Are two nodes the same, or the same calls of the same nodes?

    Inference graphs see no common-subexpression elimination: what an author wrote twice stands there twice.
    """
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and bool(a == b)
    if a is b:
        return True
    if depth == 0 or a.op != "call_function" or a.target is not b.target or set(a.kwargs) != set(b.kwargs):
        return False
    if a.target is not operator.getitem:
        target = a.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
            return False
        # An empty tensor or a random one is another each time.
        if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags or "empty" in str(target):
            return False
    if not a.all_input_nodes:
        return False
    pairs = [*zip(a.args, b.args, strict=False), *((a.kwargs[key], b.kwargs[key]) for key in a.kwargs)]
    return len(a.args) == len(b.args) and all(same_value(x, y, depth - 1) for x, y in pairs)


def deinterleaved(x: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The tensor whose elements ``x`` holds as evens, then odds (view [n, 2], transpose, reshape), and those nodes."""
    nodes = [x]
    for targets in (VIEWS, [aten.clone.default], [aten.permute.default], VIEWS):
        node = nodes[-1]
        if node.target in targets and isinstance(node.args[0], fx.Node):
            nodes.append(node.args[0])
        elif aten.clone.default not in targets:  # only that step may be missing
            return None
    source, view, order = nodes[-1], tensor_of(nodes[-2]), nodes[-3].args[1]
    before, after, columns = tensor_of(source), tensor_of(x), _all_columns(source)
    if before is None or after is None or view is None or columns is None or not isinstance(order, (list, tuple)):
        return None
    rank = view.dim()
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if [d % rank for d in order if isinstance(d, int)] != swapped or not same_shape(before.shape, after.shape):
        return None
    if len(columns) % 2 or not same_shape(view.shape, (*before.shape[:-1], len(columns) // 2, 2)):
        return None
    whole = whole_of(source)
    return whole.source, [*nodes[:-1], *whole.nodes]
