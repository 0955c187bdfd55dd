"""A second norm of the same rows: one of other columns of the tensor that a fused norm reads, which is not quantised.

As in multi-head latent attention, where one projection gives ``[q_a | kv_c | k_pe]``. It is looked for from the first
norm's input: back to the tensor that this is a part of, and from there to the norms of all its parts.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from fusionpasses.patterns import _rms_norm
from fusionpasses.patterns._graph import effect_of, is_contiguous, same_shape, tensor_of
from fusionpasses.patterns._pass import Guard, first_failure
from fusionpasses.patterns._rms_norm import RmsNorm
from fusionpasses.patterns._views import ROW_VIEWS, is_row_view
from fusionpasses.report import Where

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default

#: What takes a part of a tensor; of the first, each result is one.
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
_SLICES = (aten.slice.Tensor, aten.select.int)
#: What may stand before and behind that.
_MOVES = (*ROW_VIEWS, aten.permute.default)

#: Steps from a part to a norm of it: cast, product, cast, weight, cast.
_STEPS = 5


@dataclasses.dataclass(eq=False)
class Second:
    """A norm that may become the second one of an op, and what the op is without it.

    Attributes:
        norm: the second norm.
        first: the norm that is quantised.
        base: the tensor that the inputs of both are parts of.
        quants: those of the first.
        other_readers: what else reads the first.
        ordered: nodes of the graph that must keep their order.
        no_provider: why whoever runs the op without the second norm cannot run it with one; "" if that can.
    """

    norm: RmsNorm
    first: RmsNorm
    base: fx.Node
    quants: list[fx.Node]
    other_readers: list[fx.Node]
    ordered: list[fx.Node]
    no_provider: str


# --- guards ---------------------------------------------------------------------------------------------------------


def _check_norm(s: Second) -> str | None:
    return _rms_norm.illegal(s.norm)


def _check_first(s: Second) -> str | None:
    if s.other_readers:
        return f"{s.other_readers[0].name} also reads the first norm, and no op returns both"
    return None


def _check_rows(s: Second) -> str | None:
    x, x2 = tensor_of(s.first.x), tensor_of(s.norm.x)
    if x is None or x2 is None:
        return "its input is not a tensor of this graph"
    if x2.dtype != x.dtype:
        return f"its input is {x2.dtype} and that of the first norm {x.dtype}"
    if not same_shape(x.shape[:-1], x2.shape[:-1]):
        return f"its input has the rows {list(x2.shape[:-1])} and that of the first norm {list(x.shape[:-1])}"
    return None


def _check_inside(s: Second) -> str | None:
    for node in s.norm.nodes:
        if node is not s.norm.root:
            for user in node.users:
                if user not in s.norm.nodes:
                    return f"{user.name} also reads {node.name} inside it, so Inductor would compute it as well"
    return None


def _check_strides(s: Second) -> str | None:
    value = tensor_of(s.norm.root)
    if value is None or not is_contiguous(value):
        strides = "unknown strides" if value is None else f"strides {list(value.stride())}"
        return f"its result has {strides}; the fused op returns it contiguous"
    return None


def _check_inputs(s: Second) -> str | None:
    if _computed_from((s.norm.x, s.norm.weight), s.quants, s.base):
        return "it is computed from what the first norm's quant gives"
    if _computed_from((s.first.x, s.first.weight), [s.norm.root], s.base):
        return "the first norm is computed from it"
    return None


def _check_order(s: Second) -> str | None:
    first = min(*s.first.nodes, *s.norm.nodes)
    last = max(s.norm.root, *s.quants)
    for node in s.ordered:
        if first < node < last:
            return f"{effect_of(node)} between the two norms"
    return None


def _check_provider(s: Second) -> str | None:
    return s.no_provider or None


#: What must hold of a second norm to be taken into the fused op; else it is left outside.
GUARDS = (
    Guard("norm", "the second norm meets the conditions of a norm, above", _check_norm),
    Guard("first norm", "nothing but its quants reads the first norm", _check_first),
    Guard("rows", "both inputs have one dtype and, but for the last axis, one shape", _check_rows),
    Guard("inside", "nothing else reads what is computed inside the second norm", _check_inside),
    Guard("strides", "the second norm is contiguous", _check_strides),
    Guard("inputs", "neither norm is computed from what the op gives", _check_inputs),
    Guard("order", "nothing between the norms and the quants writes to a tensor or draws random numbers", _check_order),
    Guard("provider", "who runs the op without the second norm can run it with it", _check_provider),
)


# --- finding it -----------------------------------------------------------------------------------------------------


def find(
    first: RmsNorm,
    quants: list[fx.Node],
    other_readers: list[fx.Node],
    ordered: list[fx.Node],
    anchors: Container[Any],
    no_provider: str,
) -> tuple[RmsNorm | None, list[str]]:
    """The second norm to take in, and notes: which it is, and why others of the same rows were left outside.

    ``anchors`` are the ops that quantise. A norm that one of these reads is a site of its own, and not looked at.
    """
    base = base_of(first.x)
    if base is None:
        return None, []
    taken: RmsNorm | None = None
    notes: list[str] = []
    for readings in _norms_of_parts(base):
        if any(norm.root is first.root or _is_quantised(norm.root, anchors) for norm in readings):
            continue
        candidates = [Second(norm, first, base, quants, other_readers, ordered, no_provider) for norm in readings]
        reasons = [first_failure(GUARDS, each) for each in candidates]
        if None not in reasons:
            legal = [reason for each, reason in zip(candidates, reasons, strict=True) if _check_norm(each) is None]
            notes.append(f"{_name(readings[0])} was left outside: {(legal or reasons)[0]}")
        elif taken is not None:
            notes.append(f"{_name(readings[0])} was left outside: the op takes one, and has that")
        else:
            taken = readings[reasons.index(None)]
            notes.append(f"{_name(taken)} was taken in")
    return taken, notes


def base_of(node: fx.Node) -> fx.Node | None:
    """The tensor that this is a part of, or None if it is no part of another."""
    part = False
    while True:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            break
        if node.target is operator.getitem and source.target in _SPLITS and isinstance(source.args[0], fx.Node):
            node, part = source.args[0], True
        elif node.target in _SLICES:
            node, part = source, True
        elif node.target in _MOVES:
            node = source
        else:
            break
    return node if part else None


def _parts(base: fx.Node) -> Iterator[fx.Node]:
    stack = [base]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user.args[:1] != (node,):
                continue
            if user.target in _SPLITS:
                stack += (taken := [u for u in user.users if u.target is operator.getitem])
                yield from taken
            elif user.target in (*_SLICES, *_MOVES):
                stack.append(user)
                yield user


def _norms_of_parts(base: fx.Node) -> list[list[RmsNorm]]:
    """The norms of parts of a tensor, in graph order; each as the readings of it, from the last step backwards.

    A norm without its last cast, or without its weight, is one, too. It counts if something else reads it: what only
    the next step reads is better left to the kernel that Inductor makes of both.
    """
    norms = [norm for part in _parts(base) if base_of(part) is base for norm in _norms_of(part)]
    norms.sort(key=lambda norm: norm.root)
    inner = {node for norm in norms for node in norm.nodes if node is not norm.root}
    return [
        [norm, *(each for each in reversed(norms) if each is not norm and _is_read_behind(each.root, norm))]
        for norm in norms
        if norm.root not in inner
    ]


def _is_read_behind(step: fx.Node, norm: RmsNorm) -> bool:
    return step in norm.nodes and any(user not in norm.nodes for user in step.users)


def _norms_of(x: fx.Node) -> Iterator[RmsNorm]:
    if not _is_averaged(x):
        return  # recognising takes longer than this
    reached = {x: None}
    frontier = [x]
    for _ in range(_STEPS):
        frontier = [
            user
            for node in frontier
            for user in node.users
            if user.target in (_CAST, aten.mul.Tensor) and user not in reached
        ]
        reached |= dict.fromkeys(frontier)
    for node in reached:
        norm = _rms_norm.recognise(node)
        if norm is not None and norm.x is x:
            yield norm


def _is_averaged(x: fx.Node) -> bool:
    """Is a mean taken of something up to two steps from x?"""
    nodes = [x]
    for _ in range(3):
        nodes = [user for node in nodes for user in node.users]
        if any(node.target is aten.mean.dim for node in nodes):
            return True
    return False


def _is_quantised(root: fx.Node, anchors: Container[Any]) -> bool:
    return any(user.target in anchors or (is_row_view(user) and _is_quantised(user, anchors)) for user in root.users)


def _computed_from(nodes: Iterable[object], results: list[fx.Node], base: fx.Node) -> bool:
    """Is one of ``nodes`` computed from one of ``results``? The base is not: both norms read it."""
    stack = [node for node in nodes if isinstance(node, fx.Node)]
    seen = {base}
    while stack:
        node = stack.pop()
        if node in results:
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def _name(norm: RmsNorm) -> str:
    where = Where.of(norm.root.meta)
    return f"the second norm of the same rows, {where.module or 'at ' + where.line.partition(' in ')[0]},"
