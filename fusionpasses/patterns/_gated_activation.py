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

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)


def _call(target: Any, *args: Any) -> CallFunction:
    # Readers are looked at by hand, so an inner node may have any number of users.
    return CallFunction(target, *args, _users=MULTIPLE)


def _either_order(a: Any, b: Any) -> list[PatternExpr]:
    return [_call(aten.mul.Tensor, a, b), _call(aten.mul.Tensor, b, a)]


def _products() -> tuple[Spelling, ...]:
    activated, up = KeywordArg("activated"), KeywordArg("up")
    rounded = _call(CAST, activated, KeywordArg("rounded_to"))
    result: list[Spelling] = []
    for name, factor in (("cast_mul", rounded), ("mul", activated)):
        for product in _either_order(factor, up):
            result.append(Spelling(f"{name}, then cast", _call(CAST, product, KeywordArg("result_dtype"))))
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
            return _call(CAST, gate, KeywordArg("compute_dtype")) if upcast else gate

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
    if root.op != "call_function" or root.target not in (aten.mul.Tensor, CAST):
        return
    for product in PRODUCTS:
        match = product.pattern.match(root) if product.pattern is not None else None
        if not isinstance(match, Match) or not isinstance(match.kwargs["activated"], fx.Node):
            continue
        for spelling, inner in activations_at(match.kwargs["activated"]):
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


def activations_at(node: fx.Node) -> Iterator[tuple[Spelling, Match]]:
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
    if gate is None or up is None or gated.up.target is not CAST or up.dtype != torch.float32:
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


def below_casts(node: fx.Node) -> fx.Node:
    while (node.target is CAST or is_row_view(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _check_clamps(gated: Gated) -> str | None:
    for name, node in (("gate", gated.gate), ("up", gated.up)):
        if below_casts(node).target in CLAMPS:
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
