"""Recognises ``activation(gate) * up`` in a post-grad graph, and says why when it is only almost that.

Two tables of small patterns are tried. PRODUCTS go from the node that is quantised back to the activation, through the
product with up and casts; ACTIVATIONS go from there to gate. Both are printed into debug dumps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternExpr
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses.ops._mxfp4 import BLOCK, INPUT_DTYPES
from fusionpasses.ops.silu_mul_mxfp4_quant import GELU_CUBIC, GELU_SCALE
from fusionpasses.patterns._graph import same_shape, tensor_of
from fusionpasses.patterns._pass import Guard, Spelling, first_failure
from fusionpasses.patterns._views import is_row_view
from fusionpasses.report import NOTHING, REFUSED

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)


def _call(target: Any, *args: Any) -> CallFunction:
    # Readers are looked at by hand, so an inner node may have any number of users.
    return CallFunction(target, *args, _users=MULTIPLE)


def _either_order(a: Any, b: Any) -> list[PatternExpr]:
    return [_call(aten.mul.Tensor, a, b), _call(aten.mul.Tensor, b, a)]


def _products() -> tuple[Spelling, ...]:
    activated, up = KeywordArg("activated"), KeywordArg("up")
    rounded = _call(_CAST, activated, KeywordArg("rounded_to"))
    result: list[Spelling] = []
    for name, factor in (("cast_mul", rounded), ("mul", activated)):
        for product in _either_order(factor, up):
            result.append(Spelling(f"{name}, then cast", _call(_CAST, product, KeywordArg("result_dtype"))))
    for name, factor in (("cast_mul", rounded), ("mul", activated)):
        for product in _either_order(factor, up):
            result.append(Spelling(name, product))
    return tuple(result)


def _activations() -> tuple[Spelling, ...]:
    gate = KeywordArg("gate")
    result: list[Spelling] = []
    for upcast in (True, False):

        def wide(upcast: bool = upcast) -> PatternExpr:
            # A pattern of its own for each use: one node, or as many equal ones as the author wrote x.float().
            return _call(_CAST, gate, KeywordArg("compute_dtype")) if upcast else gate

        suffix = ", upcast" if upcast else ""
        exp = _call(aten.exp.default, _call(aten.neg.default, wide()))
        result.append(Spelling(f"silu{suffix}", _call(aten.div.Tensor, wide(), _call(aten.add.Tensor, exp, 1))))
        sigmoid = _call(aten.sigmoid.default, wide())
        for product in _either_order(wide(), sigmoid):
            result.append(Spelling(f"x_sigmoid{suffix}", product))
        if upcast:  # left to type promotion, which widens gate to the same float32
            for product in _either_order(gate, sigmoid):
                result.append(Spelling("x_sigmoid, upcast in the sigmoid", product))
        cube = _call(aten.mul.Tensor, _call(aten.mul.Tensor, wide(), wide()), wide())
        inner = _call(aten.add.Tensor, wide(), _call(aten.mul.Tensor, cube, GELU_CUBIC))
        tanh = _call(aten.tanh.default, _call(aten.mul.Tensor, inner, GELU_SCALE))
        for product in _either_order(_call(aten.mul.Tensor, wide(), 0.5), _call(aten.add.Tensor, tanh, 1)):
            result.append(Spelling(f"gelu_tanh{suffix}", product))
    return tuple(result)


PRODUCTS = _products()
ACTIVATIONS = _activations()


@dataclasses.dataclass(eq=False)
class Gated:
    """A recognised product of an activation.

    Attributes:
        root: the node that holds the product; its readers read it.
        nodes: every node from gate and up to root, root included, gate and up excluded.
        curve: those of the activation.
        gate, up: operands as they stand in the graph, up before a cast that only widens it.
        activation: as the fused op takes it.
        rounded_to: dtype of the cast of the activation, or None.
        spelling: for reports.
    """

    root: fx.Node
    nodes: list[fx.Node]
    curve: list[fx.Node]
    gate: Any
    up: Any
    activation: str
    rounded_to: torch.dtype | None
    spelling: str

    @property
    def act_dtype(self) -> torch.dtype:
        value = tensor_of(self.root)
        if value is None:
            raise TypeError(f"{self.root} holds no tensor")
        return value.dtype

    @property
    def cast_order(self) -> str:
        """As the fused op takes it."""
        gate, curve = tensor_of(self.gate), tensor_of(self.curve[-1])
        if gate is None or curve is None or gate.dtype == torch.float32:
            return "cast_mul"
        if curve.dtype == gate.dtype:
            return "cast_each"
        return "cast_mul" if self.rounded_to is not None else "mul_cast"


def recognise(root: fx.Node) -> Gated | None:
    """The product whose result is ``root``, in any accepted spelling.

    A product can be read in two ways (which factor is activated?): one that holds the guards goes first.
    """
    first = None
    for gated in _readings(root):
        if illegal(gated) is None:
            return gated
        first = first or gated
    return first


def _readings(root: fx.Node) -> Iterator[Gated]:
    if root.op != "call_function" or root.target not in (aten.mul.Tensor, _CAST):
        return
    for product in PRODUCTS:
        match = product.pattern.match(root) if product.pattern is not None else None
        if not isinstance(match, Match) or not isinstance(match.kwargs["activated"], fx.Node):
            continue
        for spelling, inner in _activations_at(match.kwargs["activated"]):
            outer = match.kwargs
            gated = Gated(
                root=root,
                nodes=list(dict.fromkeys([*inner.nodes, *match.nodes])),
                curve=sorted(inner.nodes),
                gate=inner.kwargs["gate"],
                up=outer["up"],
                activation=spelling.name.partition(",")[0],
                rounded_to=outer.get("rounded_to"),
                spelling=f"{spelling.name}; {product.name}",
            )
            _read_up_before_widening(gated)
            yield gated


def _activations_at(node: fx.Node) -> Iterator[tuple[Spelling, Match]]:
    if node.target not in (aten.div.Tensor, aten.mul.Tensor):
        return
    for spelling in ACTIVATIONS:
        match = spelling.pattern.match(node) if spelling.pattern is not None else None
        if isinstance(match, Match):
            yield spelling, match
            return


def _read_up_before_widening(gated: Gated) -> None:
    """``up.float()``, where the op's own product is that of float32, or rounds an exact one: the cast adds nothing."""
    gate, up = tensor_of(gated.gate), tensor_of(gated.up)
    if gate is None or up is None or gated.up.target is not _CAST or up.dtype != torch.float32:
        return
    narrow = tensor_of(gated.up.args[0])
    if narrow is None or narrow.dtype != gate.dtype or gate.dtype == torch.float32:
        return
    # In 16 bits the op rounds the product at once; the graph's is only where it is cast afterwards.
    in_float32 = gated.rounded_to is None and gated.cast_order != "cast_each"
    if in_float32 or gated.act_dtype == gate.dtype:
        gated.nodes.insert(0, gated.up)
        gated.up = gated.up.args[0]


# --- guards ---------------------------------------------------------------------------------------------------------


def _check_kwargs(gated: Gated) -> str | None:
    for node in gated.nodes:
        if node.kwargs:
            given = ", ".join(f"{k}={v}" for k, v in node.kwargs.items())
            return f"{node.target} of the activation is called with {given}, which the fused op does not have"
    return None


def _check_gate(gated: Gated) -> str | None:
    gate = tensor_of(gated.gate)
    if gate is None:
        return "gate is not a tensor of this graph"
    if gate.dtype not in INPUT_DTYPES:
        return f"gate is {gate.dtype}; the fused op takes {', '.join(map(str, INPUT_DTYPES))}"
    return None


def _check_up(gated: Gated) -> str | None:
    gate, up, root = tensor_of(gated.gate), tensor_of(gated.up), tensor_of(gated.root)
    if up is None or gate is None or root is None:
        return f"the activation is multiplied by {gated.up}, which is not a tensor; the fused op multiplies by up"
    for name, value in (("up", up), ("gate", gate)):
        if not same_shape(value.shape, root.shape):
            return f"{name} of shape {list(value.shape)} is broadcast to {list(root.shape)}"
    if up.dtype != gate.dtype:
        return f"up is {up.dtype} and gate {gate.dtype}; the fused op takes the same dtype"
    return None


def _check_arithmetic(gated: Gated) -> str | None:
    gate = tensor_of(gated.gate)
    for node in gated.curve:
        value = tensor_of(node)
        if value is None or gate is None:
            return f"{node.target} of the activation has no known dtype"
        if value.dtype == torch.float32:
            continue
        if gated.activation != "x_sigmoid" or value.dtype != gate.dtype or gated.cast_order != "cast_each":
            return (
                f"the activation is computed in {value.dtype} ({node.target}), rounding each step; the fused op "
                "computes it in float32. Write F.silu or F.gelu, or gate.float() first"
            )
    return None


def _check_casts(gated: Gated) -> str | None:
    gate = tensor_of(gated.gate)
    if gate is None:
        return None
    if gated.rounded_to is not None and gated.rounded_to != gate.dtype:
        how = "widened" if gated.rounded_to == torch.float32 else "rounded"
        return (
            f"the activation is {how} to {gated.rounded_to} before the product; the fused op rounds to gate's "
            f"{gate.dtype}"
        )
    if gated.act_dtype not in (gate.dtype, torch.float32):
        return f"the product is {gated.act_dtype}; the fused op gives {gate.dtype} (that of gate) or float32"
    return None


def _check_clamps(gated: Gated) -> str | None:
    for name, node in (("gate", gated.gate), ("up", gated.up)):
        if _below_casts(node).target in _CLAMPS:
            return f"{name} is clamped before the product; the fused op does not clamp, and Inductor does both at once"
    return None


def _check_width(gated: Gated) -> str | None:
    gate = tensor_of(gated.gate)
    width = gate.shape[-1] if gate is not None and gate.dim() else None
    if not isinstance(width, int):
        return f"the width of gate ({width}) is symbolic; it must be known when compiling"
    if width % BLOCK != 0:
        return f"the width {width} is not a multiple of {BLOCK}, the MXFP4 block"
    return None


def _check_layout(gated: Gated) -> str | None:
    for name, node in (("gate", gated.gate), ("up", gated.up)):
        value = tensor_of(node)
        apart = value.stride(-1) if value is not None else None
        if apart is None or not statically_known_true(apart == 1):
            return (
                f"the elements of a row of {name} are {apart} apart, as where gate and up take turns; a kernel of "
                "whole rows would copy it first. Inductor's own reads it as it is"
            )
    return None


#: What must hold of a recognised product before it may be rewritten, in the order it is checked.
GUARDS = (
    Guard("plain calls", "no node of the activation has keyword arguments", _check_kwargs),
    Guard("gate", "gate is bfloat16, float16 or float32", _check_gate),
    Guard("up", "up is a tensor of gate's dtype, and neither is broadcast", _check_up),
    Guard(
        "arithmetic",
        "the activation is computed in float32, or in gate's dtype as `gate * sigmoid(gate)`",
        _check_arithmetic,
    ),
    Guard("clamps", "gate and up are not clamped on the way", _check_clamps),
    Guard(
        "casts", "the activation is rounded to gate's dtype, if at all; the product to that or float32", _check_casts
    ),
    Guard("width", f"the last axis is static and a multiple of {BLOCK}", _check_width),
    Guard("layout", "neighbours of a row of gate, and of up, are neighbours in memory", _check_layout),
)


def illegal(gated: Gated) -> str | None:
    """Why this product cannot be part of a fused op, or None."""
    return first_failure(GUARDS, gated)


# --- near misses ----------------------------------------------------------------------------------------------------

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
    *_CLAMPS,
    _CAST,
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
        return NOTHING, alone if any(_activations_at(_below_casts(node))) else ""
    for activation in walked[1:]:
        known = next(_activations_at(activation), None)
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
    if any(n.target in _CLAMPS for n in walked):
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


def _below_casts(node: fx.Node) -> fx.Node:
    while (node.target is _CAST or is_row_view(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _multiplies_two(node: fx.Node) -> bool:
    """Is it a product of two tensors of its shape that do not come from the same one? GELU itself is not."""
    node = _below_casts(node)
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
