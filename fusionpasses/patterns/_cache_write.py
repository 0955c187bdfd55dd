"""Writes into a part of a tensor, as they look in a functional graph.

``cache[l].view(-1, D)[slots] = rows`` has become a chain: views from the tensor down to the part that is written, the
write itself, and for each view its inverse, which puts the part back:

    select(cache, 0, l) -> reshape -> index_put(., [slots], rows) -> reshape -> select_scatter(cache, ., 0, l)

The result is the tensor's next version; a ``copy_`` at the end of the graph stores the last one. What is recognised is
all of that: the version before, the version after, and the part, as sizes and strides within the version before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from fusionpasses.patterns._graph import bound_arguments, same_shape, storage_of, tensor_of

aten = torch.ops.aten

#: Views that keep every element; undone by another of them.
_RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
#: Views that leave something out, and what puts the part back: (tensor, part, the view's other arguments).
_INVERSE: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
_VIEW_OF: dict[Any, Any] = {scatter: view for view, scatter in _INVERSE.items()}
VIEWS = (*_RESHAPES, *_INVERSE, aten.permute.default)

#: Nodes that may be the innermost of a write.
TARGETS: tuple[Any, ...] = (aten.index_put.default, aten.index_copy.default, *_VIEW_OF)

#: A view's target, its arguments beyond the tensor, and its keyword arguments.
_Step = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(eq=False)
class CacheWrite:
    """A write of rows into a part of a tensor.

    Attributes:
        before: the version that is written to.
        after: the version with the rows in it.
        part: fake tensor ``[..., D]`` with the sizes, strides and offset of the part within ``before``.
        rows: what is written: ``[..., D]``, or broadcast to that.
        indices: index tensors of the part's leading axes, or None when the rows fill the whole part in order.
        accumulate: the rows are added to what was there.
        nodes: the write, the chain back to ``after``, and the views.
        negative: what a negative index means, "wrap" or "error".
        place: how the call of a mutating op tells where the part is, if that is what writes.
    """

    before: fx.Node
    after: fx.Node
    part: torch.Tensor
    rows: fx.Node
    indices: tuple[fx.Node, ...] | None
    accumulate: bool
    nodes: list[fx.Node]
    negative: str = "wrap"
    place: dict[str, Any] | None = None


def recognise(node: fx.Node) -> CacheWrite | None:
    """The write whose innermost node this is: an ``index_put`` of whole rows, or an assignment to a slice or an entry.

    None for anything else, and for a chain that does not end at a tensor that something is done with.
    """
    if node.target is aten.index_put.default:
        return _indexed(node)
    if node.target is aten.index_copy.default:  # Inductor makes index_put of it, unless a user drops that rule
        return _copied(node)
    if node.target in _VIEW_OF:
        return _assigned(node)
    return None


def _indexed(node: fx.Node) -> CacheWrite | None:
    bound = bound_arguments(node)
    part, indices, rows = bound["self"], bound["indices"], bound["values"]
    value = tensor_of(part)
    if value is None or not isinstance(rows, fx.Node) or not 0 < len(indices) < value.dim():
        return None
    # Whole rows: leading axes are indexed, each by integers.
    for index in indices:
        indexing = tensor_of(index)
        if indexing is None or indexing.dtype not in (torch.int32, torch.int64):
            return None
    write = put_back(part, node, rows, tuple(indices), [node])
    return None if write is None else dataclasses.replace(write, accumulate=bool(bound["accumulate"]))


def _copied(node: fx.Node) -> CacheWrite | None:
    bound = bound_arguments(node)
    part, index, rows = bound["self"], bound["index"], bound["source"]
    if bound["dim"] != 0 or tensor_of(part) is None or not isinstance(rows, fx.Node):
        return None
    write = put_back(part, node, rows, (index,), [node])
    return None if write is None else dataclasses.replace(write, negative="error")


def _assigned(scatter: fx.Node) -> CacheWrite | None:
    """``tensor[...] = rows``: a part put back that was not made from the tensor, or that is ``copy(part, rows)``."""
    tensor, source = scatter.args[:2]
    if scatter.kwargs.keys() - {"dim", "start", "end", "step", "index"}:
        return None
    if not isinstance(tensor, fx.Node) or not isinstance(source, fx.Node):
        return None
    if source.target is aten.copy.default:
        part, rows = source.args[:2]
        if source.kwargs or not isinstance(part, fx.Node) or not isinstance(rows, fx.Node):
            return None
        return put_back(part, source, rows, None, [source])
    if _comes_from(source, tensor):
        return None  # the outer step of a write that is recognised at its innermost node
    view = _VIEW_OF[scatter.target]
    step = (view, scatter.args[2:], dict(scatter.kwargs))
    return put_back(tensor, scatter, source, None, [scatter], step)


def put_back(
    part: fx.Node,
    written: fx.Node,
    rows: fx.Node,
    indices: tuple[fx.Node, ...] | None,
    nodes: list[fx.Node],
    *inner: _Step,
) -> CacheWrite | None:
    """Undo the views below ``part``, one by one, with the nodes above ``written`` that do the same.

    ``inner`` are steps from ``part`` to what is written, if that is a part of it.
    """
    views = [*inner]
    below: list[fx.Node] = []
    while part.target in VIEWS:
        parent = part.args[0]
        if not isinstance(parent, fx.Node):
            return None
        parent_written = _parent_written(part, parent, written)
        if parent_written is None:
            if part.target in _INVERSE:
                return None  # a part that is not put back: nothing writes to a tensor here
            break  # the previous version, which happens to end with a view
        views.append((part.target, part.args[1:], dict(part.kwargs)))
        below += [node for node in (part, parent_written.args[0]) if isinstance(node, fx.Node) and node.target in VIEWS]
        part = parent
        nodes.append(parent_written)
        written = parent_written
    nodes += [node for node in dict.fromkeys(below) if node not in nodes and node is not part]
    return _finished(part, written, views[::-1], rows, indices, nodes)


def _parent_written(part: fx.Node, parent: fx.Node, written: fx.Node) -> fx.Node | None:
    """The only reader of ``written``, if it makes the next version of ``parent`` of it."""
    whole = tensor_of(parent)
    if whole is None or len(written.users) != 1:
        return None
    (user,) = written.users
    if part.target in _RESHAPES:
        value = tensor_of(user)
        reshapes = user.target in _RESHAPES and value is not None and same_shape(value.shape, whole.shape)
        return user if reshapes else None
    if part.target is aten.permute.default:
        dims: Any = part.args[1]
        back: Any = user.args[1] if user.target is aten.permute.default else []
        undone = [dims[i] % len(dims) for i in back] == list(range(len(dims)))
        return user if undone else None
    same = user.target is _INVERSE[part.target] and user.args[1:2] == (written,)
    if same and (user.args[2:], user.kwargs) == (part.args[1:], part.kwargs) and _same_value(user.args[0], parent):
        return user
    return None


def _finished(
    before: fx.Node,
    after: fx.Node,
    views: list[_Step],
    rows: fx.Node,
    indices: tuple[fx.Node, ...] | None,
    nodes: list[fx.Node],
) -> CacheWrite | None:
    whole, next_whole = tensor_of(before), tensor_of(after)
    if whole is None or next_whole is None or not same_shape(whole.shape, next_whole.shape):
        return None
    part = _fake_part(whole, views)
    if part is None:
        return None
    return CacheWrite(before, after, part, rows, indices, False, nodes)


def _fake_part(whole: torch.Tensor, views: list[_Step]) -> torch.Tensor | None:
    """The views, on fake tensors; None if one of them had to copy."""
    mode = detect_fake_mode(whole)
    if mode is None:
        return None
    part = whole
    with mode:
        for target, args, kwargs in views:
            args, kwargs = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
            part = target(part, *args, **kwargs)
    return part if storage_of(part) == storage_of(whole) else None


def _comes_from(node: fx.Node, tensor: fx.Node) -> bool:
    """Is ``node`` an updated part of ``tensor``: a write, at the end of a chain that begins with views of it?"""
    while node.target in (*VIEWS, *_VIEW_OF, aten.index_put.default, aten.index_copy.default, aten.copy.default):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        if _same_value(source, tensor):
            return True
        node = source
    return False


def _same_value(a: object, b: object) -> bool:
    """The same node, or the same views of the same node. (Inference graphs keep duplicates.)"""
    if a is b:
        return True
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a == b)
    return (
        a.target is b.target
        and a.target in VIEWS
        and a.kwargs == b.kwargs
        and len(a.args) == len(b.args)
        and all(_same_value(x, y) for x, y in zip(a.args, b.args, strict=True))
    )
