"""Small questions to ask of post-grad FX graphs, and small edits of them, shared by the passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

#: Metadata that ties a node to the user's source; copied to the nodes that replace it.
PROVENANCE = ("stack_trace", "nn_module_stack", "from_node", "source_fn_stack", "custom")


#: Where a pass leaves, in a node's ``meta``, the site that the node was made for, until ``who_runs.settle``.
SITE = "fusionpasses_site"


def tensor_of(node: object) -> torch.Tensor | None:
    """The fake tensor a node stands for, or None when it is not a node or not a tensor."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":  # constants of a frozen graph carry no fake value
        owner: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            owner = getattr(owner, part, None)
        value = owner
    return value if isinstance(value, torch.Tensor) else None


def storage_of(tensor: torch.Tensor) -> object:
    """The same for a fake tensor and its views."""
    return tensor.untyped_storage()._cdata


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Are two shapes known to be equal, symbols included?"""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def is_contiguous(tensor: torch.Tensor) -> bool:
    """Is the tensor known to be contiguous? Adds no guard on symbolic sizes."""
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not statically_known_true(size == 1):
            if not statically_known_true(stride == expected):
                return False
            expected = expected * size
    return True


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call of an OpOverload by schema name, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"bound_arguments: got {node.format_node()}, allowed a call of an OpOverload")
    bound: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif position < len(node.args):
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = argument.default_value
    return bound


def ordered_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that must not pass each other, though nothing in the graph says so.

    They write to one of their arguments, which in a functional graph only its epilogue does, or draw random numbers,
    which are other ones in another order.
    """
    return [node for node in graph.nodes if writes(node) or _draws(node)]


def writes(node: fx.Node) -> bool:
    """Does it write to one of its arguments?"""
    return _is_op(node) and node.target._schema.is_mutable  # type: ignore[union-attr]


def effect_of(node: fx.Node) -> str:
    """What one of ``ordered_nodes`` does, in words."""
    return f"{node.target} {'writes to a tensor' if writes(node) else 'draws random numbers'}"


def _draws(node: fx.Node) -> bool:
    return _is_op(node) and torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


def _is_op(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def depends_on(node: object, ancestor: fx.Node) -> bool:
    """Is ``node`` computed from ``ancestor``?

    Asked of weights, which are inputs or a step from one. Places in the graph say nothing here: a sum that was taken
    into an op stands behind its readers until the pass ends.
    """
    if not isinstance(node, fx.Node):
        return False
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is ancestor:
            return True
        if current in seen:
            continue
        seen.add(current)
        stack.extend(current.all_input_nodes)
    return False


def call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    provenance: fx.Node,
    value: Any = None,
) -> fx.Node:
    """Insert a call at the graph's insertion point, with its fake value and the provenance of another node.

    ``value`` is the fake value when the caller has one: running the op on fake tensors costs a millisecond.
    """
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = _fake_value(target, args, kwargs) if value is None else value
    for key in PROVENANCE:
        if key in provenance.meta:
            node.meta[key] = provenance.meta[key]
    return node


def _fake_value(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def value_of(node: fx.Node) -> Any:
        return node.meta["val"] if "val" in node.meta else tensor_of(node)

    fake_args, fake_kwargs = fx.map_arg((args, kwargs), value_of)
    fake_mode = detect_fake_mode((fake_args, fake_kwargs))
    with fake_mode if fake_mode is not None else contextlib.nullcontext():
        return target(*fake_args, **fake_kwargs)


def erase_dead(nodes: Iterable[fx.Node]) -> None:
    """Erase those of ``nodes`` that nothing reads, last first, so that whole dead chains go."""
    for node in sorted(set(nodes), reverse=True):
        if not node.users:
            node.graph.erase_node(node)
