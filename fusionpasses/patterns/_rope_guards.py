"""What must hold of a recognised rotation before it may be rewritten, and what was recognised."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from fusionpasses.ops._mxfp4 import INPUT_DTYPES
from fusionpasses.patterns._graph import same_shape, tensor_of
from fusionpasses.patterns._pass import Guard, first_failure
from fusionpasses.patterns._rope_parts import Part, Table, pair_columns

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Join:
    """Two results brought into one tensor: one after the other ("halves") or element by element ("pairs")."""

    layout: str
    first: fx.Node
    second: fx.Node
    axes: tuple[int, ...]
    nodes: tuple[fx.Node, ...]

    @property
    def on_last_axis(self) -> bool:
        value = tensor_of(self.first)
        if value is None:
            return False
        rank = value.dim() + (self.layout == "pairs")
        return all(isinstance(axis, int) and axis % rank == rank - 1 for axis in self.axes)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """One of the four products of a rotation, with the sign it is summed with."""

    sign: int
    part: Part
    table: Table


@dataclasses.dataclass(eq=False)
class Rope:
    """A recognised rotation.

    Attributes:
        root: the node that holds the rotated tensor, in x's shape and dtype once the guards hold.
        x: the tensor that is rotated, R = its last axis wide. A slice, if only a part of a head is rotated.
        cos, sin: the angles; see :class:`Table`. A full-width table is indexed by the element that is written.
        read, written: where pairs are read from x and written to the result: "halves" or "pairs".
        style: as the fused op takes it; "" if it has none.
        products: of the first and of the second result, the one with cos before the one with sin.
        joins: how results are brought together, and rotate_half's halves.
        arithmetic: the nodes that multiply and add.
        casts: those that round the result.
        nodes: every node of the rotation, root and the views of the tables included, x and the tables excluded.
        spelling: for reports.
    """

    root: fx.Node
    x: fx.Node
    cos: Table
    sin: Table
    read: str
    written: str
    style: str
    products: tuple[tuple[Product, Product], tuple[Product, Product]]
    joins: list[Join]
    arithmetic: list[fx.Node]
    casts: list[fx.Node]
    nodes: list[fx.Node]
    spelling: str

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype every product and sum is rounded to, which the tables must be handed to the op in."""
        dtypes = {value.dtype for node in self.arithmetic if (value := tensor_of(node)) is not None}
        return dtypes.pop() if len(dtypes) == 1 else None

    @property
    def rounding(self) -> str:
        """ "each step": to x's dtype after every product and sum; "once": computed in float32, then rounded."""
        x = tensor_of(self.x)
        return "each step" if x is not None and self.compute_dtype == x.dtype else "once"


def _width(rope: Rope) -> Any:
    x = tensor_of(rope.x)
    return x.shape[-1] if x is not None and x.dim() else None


def _all(rope: Rope) -> tuple[Product, Product, Product, Product]:
    (p, q), (r, s) = rope.products
    return p, q, r, s


def _check_kwargs(rope: Rope) -> str | None:
    for node in rope.nodes:
        if node.kwargs and node.target is not aten.clone.default:  # a memory format changes no value
            given = ", ".join(f"{k}={v}" for k, v in node.kwargs.items())
            return f"{node.target} of the rotation is called with {given}, which the fused op does not have"
    return None


def _check_real(rope: Rope) -> str | None:
    if rope.cos.component:
        return (
            "the rotation multiplies complex numbers, which torch's kernels round in their own way (on a CPU some "
            "elements by an FMA, others not); write it with real cos and sin"
        )
    return None


def _check_width(rope: Rope) -> str | None:
    width = _width(rope)
    if not isinstance(width, int):
        return f"the rotated width ({width}) is symbolic; it must be known when compiling"
    if width % 2 or not width:
        return f"the rotated width {width} is odd"
    return None


def _check_join(rope: Rope) -> str | None:
    for join in rope.joins:
        if not join.on_last_axis:
            return f"its halves are joined along axis {list(join.axes)}; the fused op rotates the last axis"
    return None


def check_parts(rope: Rope) -> str | None:
    a, b = pair_columns(rope.read or "halves", range(_width(rope)))
    read = [p.part.columns for p in _all(rope)]
    if rope.read and read == [a, b, b, a]:
        return None
    seen = ", ".join("?" if c is None else f"{c.start}:{c.stop}" + (f":{c.step}" if c.step != 1 else "") for c in read)
    return (
        f"its products read the elements {seen} of a {_width(rope)}-wide tensor; a rotation reads its two halves, or "
        "even and odd elements, crosswise"
    )


def _check_style(rope: Rope) -> str | None:
    if not rope.style:
        return f"it reads {rope.read} and writes {rope.written}, which is no style of the fused op"
    return None


def _check_direction(rope: Rope) -> str | None:
    signs = tuple(p.sign for p in _all(rope))
    if signs == (1, 1, 1, -1):
        return "it rotates the other way (a * cos + b * sin, b * cos - a * sin); negate sin where it is computed"
    if signs != (1, -1, 1, 1):
        shown = "".join("+" if sign > 0 else "-" for sign in signs)
        return f"it is no rotation: its products have the signs {shown}, those of a rotation are +-++"
    return None


def _check_shape(rope: Rope) -> str | None:
    x, root = tensor_of(rope.x), tensor_of(rope.root)
    if x is None or root is None or not same_shape(x.shape, root.shape):
        return "the rotated tensor has another shape than its input: the tables broadcast it, or it is regrouped"
    return None


def _check_tables(rope: Rope) -> str | None:
    (p, q), (r, s) = rope.products
    for name, table, first, second in (("cos", rope.cos, p.table, r.table), ("sin", rope.sin, q.table, s.table)):
        if not first.same_angles(dataclasses.replace(second, columns=first.columns)):
            return f"the two results are multiplied by different tables for {name}, {first.base} and {second.base}"
        if first.axes != second.axes:
            return f"{first.base} is broadcast in different ways for the two results"
        parts = pair_columns(rope.written, table.columns)
        if first.columns != second.columns and (first.columns, second.columns) != parts:
            return f"the two results are multiplied by different columns of {first.base} for {name}"
        width = len(table.columns) if table.columns is not None else None
        if width not in (_width(rope), _width(rope) // 2):
            return f"{name} has no last axis of {_width(rope) // 2} or {_width(rope)} angles: {table.base}"
    return None


def _check_one_shape(rope: Rope) -> str | None:
    cos, sin = tensor_of(rope.cos.base), tensor_of(rope.sin.base)
    if cos is None or sin is None or cos.dtype != sin.dtype:
        return "cos and sin have different dtypes"
    if len(rope.cos.columns or ()) != len(rope.sin.columns or ()) or rope.cos.axes != rope.sin.axes:
        return "cos and sin are broadcast in different ways"
    if not same_shape(cos.shape[:-1], sin.shape[:-1]):
        return f"cos has the shape {list(cos.shape)} and sin {list(sin.shape)}"
    return None


def _check_arithmetic(rope: Rope) -> str | None:
    x, dtype = tensor_of(rope.x), rope.compute_dtype
    if x is None or x.dtype not in INPUT_DTYPES:
        return (
            f"x is {x.dtype if x is not None else 'no tensor'}; the fused op takes {', '.join(map(str, INPUT_DTYPES))}"
        )
    if dtype is None:
        return "its products and sums are rounded to different dtypes"
    if dtype not in (x.dtype, torch.float32):
        return f"it is computed in {dtype}; the fused op computes in x's {x.dtype} or in float32"
    return None


def _check_result(rope: Rope) -> str | None:
    x, root = tensor_of(rope.x), tensor_of(rope.root)
    if x is None or root is None:
        return "the rotated tensor is unknown"
    for node in (*rope.casts, rope.root):
        value = tensor_of(node)
        if value is None or value.dtype != x.dtype:
            got = value.dtype if value is not None else "unknown"
            return f"its result is {got}; the fused op rounds to x's {x.dtype}"
    return None


#: What must hold of a recognised rotation before it may be rewritten, in the order it is checked.
GUARDS = (
    Guard("plain calls", "no node of the rotation has keyword arguments (alpha=, ...)", _check_kwargs),
    Guard("real arithmetic", "it is spelled with real numbers", _check_real),
    Guard("width", "the rotated axis is static and even", _check_width),
    Guard("axis", "results are joined along the last axis", _check_join),
    Guard("elements", "each product reads one half of x, or its even or odd elements", check_parts),
    Guard("style", "the op has the combination of where pairs are read and written", _check_style),
    Guard("direction", "a * cos - b * sin and b * cos + a * sin", _check_direction),
    Guard("shape", "x has the shape of the result", _check_shape),
    Guard("tables", "both results use one cos and one sin, R/2 or R wide", _check_tables),
    Guard("alike", "cos and sin have one dtype and are broadcast alike", _check_one_shape),
    Guard(
        "arithmetic", "x is bfloat16, float16 or float32; all is computed in its dtype or in float32", _check_arithmetic
    ),
    Guard("result", "the result is rounded to x's dtype, and nothing to another", _check_result),
)


def illegal(rope: Rope) -> str | None:
    """Why this rotation cannot be part of a fused op, or None."""
    return first_failure(GUARDS, rope)
