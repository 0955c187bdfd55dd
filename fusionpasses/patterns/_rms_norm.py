"""Recognises RMSNorm in a post-grad graph, in any of its spellings, and says why when it is only almost one.

Two tables of small patterns are tried on a node. TAILS go from the node that is quantised back to the normalised
tensor, through weight and casts; NORMALISE goes from there to the norm's input. Both are printed into debug dumps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternExpr

from fusionpasses.ops._mxfp4 import BLOCK, INPUT_DTYPES
from fusionpasses.patterns._graph import same_shape, tensor_of
from fusionpasses.patterns._pass import Guard, Spelling, first_failure
from fusionpasses.patterns._views import is_row_view

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default


def _call(target: Any, *args: Any) -> CallFunction:
    # Readers are looked at by hand, so an inner node may have any number of users.
    return CallFunction(target, *args, _users=MULTIPLE)


def _either_order(a: Any, b: Any) -> list[PatternExpr]:
    return [_call(aten.mul.Tensor, a, b), _call(aten.mul.Tensor, b, a)]


def _tails() -> tuple[Spelling, ...]:
    normed, weight = KeywordArg("normed"), KeywordArg("weight")
    rounded = _call(_CAST, normed, KeywordArg("rounded_to"))
    result: list[Spelling] = []
    for product in _either_order(weight, rounded):
        result.append(Spelling("cast_scale, then cast", _call(_CAST, product, KeywordArg("result_dtype"))))
    for product in _either_order(weight, normed):
        result.append(Spelling("scale_cast", _call(_CAST, product, KeywordArg("result_dtype"))))
    for product in _either_order(weight, rounded):
        result.append(Spelling("cast_scale", product))
    for product in _either_order(weight, normed):
        result.append(Spelling("scale", product))
    result.append(Spelling("cast, no weight", _call(_CAST, normed, KeywordArg("result_dtype"))))
    result.append(Spelling("no weight", None))
    return tuple(result)


def _normalise() -> tuple[Spelling, ...]:
    result = []
    x = KeywordArg("x")
    for upcast in (True, False):

        def wide(upcast: bool = upcast) -> PatternExpr:
            # A pattern of its own for each use: one node, or as many equal ones as the author wrote x.float(), since
            # inference graphs see no common-subexpression elimination.
            return _call(_CAST, x, KeywordArg("compute_dtype")) if upcast else x

        for square in ("pow", "x*x"):
            squared = (
                _call(aten.pow.Tensor_Scalar, wide(), 2) if square == "pow" else _call(aten.mul.Tensor, wide(), wide())
            )
            mean = _call(aten.mean.dim, squared, KeywordArg("dims"), True)
            for add in (aten.add.Tensor, aten.add.Scalar):  # written by hand; decomposed from F.rms_norm
                rsqrt = _call(aten.rsqrt.default, _call(add, mean, KeywordArg("eps")))
                for product in _either_order(wide(), rsqrt):
                    result.append(Spelling(f"{square}{', upcast' if upcast else ''}", product))
    return tuple(result)


TAILS = _tails()
NORMALISE = _normalise()


@dataclasses.dataclass(eq=False)
class RmsNorm:
    """A recognised norm.

    Attributes:
        root: the node that holds the result; its readers read the norm.
        nodes: every node of the norm, root included, x and weight excluded.
        statistics: those that compute ``x * rsqrt(mean(x*x) + eps)``.
        x, weight, eps: operands as they stand in the graph; the guards establish their kinds.
        cast_order: as the fused op takes it.
        rounded_to: dtype of the cast before the weight, or None.
        spelling: for reports.
    """

    root: fx.Node
    nodes: list[fx.Node]
    statistics: list[fx.Node]
    x: Any
    weight: Any
    eps: Any
    dims: Any
    cast_order: str
    rounded_to: torch.dtype | None
    spelling: str

    @property
    def norm_dtype(self) -> torch.dtype:
        value = tensor_of(self.root)
        if value is None:
            raise TypeError(f"{self.root} holds no tensor")
        return value.dtype


def recognise(root: fx.Node) -> RmsNorm | None:
    """The RMSNorm whose result is ``root``, in any accepted spelling; its guards are not yet checked."""
    if root.op != "call_function" or root.target not in (aten.mul.Tensor, _CAST):
        return None
    for tail in TAILS:
        if tail.pattern is None:
            normed, tail_nodes, captured = root, [], {}
        else:
            match = tail.pattern.match(root)
            if not isinstance(match, Match) or not isinstance(match.kwargs["normed"], fx.Node):
                continue
            normed, tail_nodes, captured = match.kwargs["normed"], list(match.nodes), match.kwargs
        for normalise in NORMALISE:
            inner = normalise.pattern.match(normed) if normalise.pattern is not None else None
            if not isinstance(inner, Match):
                continue
            return RmsNorm(
                root=root,
                nodes=list(dict.fromkeys([*tail_nodes, *inner.nodes])),
                statistics=list(inner.nodes),
                x=inner.kwargs["x"],
                weight=captured.get("weight"),
                eps=inner.kwargs["eps"],
                dims=inner.kwargs["dims"],
                cast_order="cast_scale" if tail.name.startswith("cast_scale") else "scale_cast",
                rounded_to=captured.get("rounded_to"),
                spelling=f"{tail.name}; {normalise.name}",
            )
    return None


def _check_kwargs(norm: RmsNorm) -> str | None:
    for node in norm.nodes:
        if node.kwargs:
            given = ", ".join(f"{k}={v}" for k, v in node.kwargs.items())
            return f"{node.target} of the norm is called with {given}, which the fused op does not have"
    return None


def _check_x(norm: RmsNorm) -> str | None:
    x = tensor_of(norm.x)
    if x is None:
        return "the norm's input is not a tensor of this graph"
    if x.dtype not in INPUT_DTYPES:
        return f"the norm's input is {x.dtype}; the fused op takes {', '.join(map(str, INPUT_DTYPES))}"
    root = tensor_of(norm.root)
    if root is None or not same_shape(x.shape, root.shape):
        return "the norm's result has another shape than its input: it is broadcast"
    return None


def _check_statistics(norm: RmsNorm) -> str | None:
    for node in norm.statistics:
        value = tensor_of(node)
        if value is None or value.dtype != torch.float32:
            return (
                f"the norm's statistics are computed in {value.dtype if value is not None else 'an unknown dtype'} "
                f"({node.target}); the fused op computes them in float32. Write x.float() first"
            )
    return None


def _check_axis(norm: RmsNorm) -> str | None:
    x = tensor_of(norm.x)
    rank = x.dim() if x is not None else 0
    if [d % rank for d in norm.dims] != [rank - 1]:
        return (
            f"the mean is taken over dims {list(norm.dims)} of a {rank}-D tensor; the fused op normalises the last axis"
        )
    return None


def _check_width(norm: RmsNorm) -> str | None:
    x = tensor_of(norm.x)
    width = x.shape[-1] if x is not None else None
    if not isinstance(width, int):
        return f"the width of the norm ({width}) is symbolic; it must be known when compiling"
    if width % BLOCK != 0:
        return f"the width {width} is not a multiple of {BLOCK}, the MXFP4 block"
    return None


def _check_eps(norm: RmsNorm) -> str | None:
    if isinstance(norm.eps, bool) or not isinstance(norm.eps, (int, float)):
        return (
            f"eps is {norm.eps}, a value of the graph; the fused op takes a Python number. If it is a float that "
            "Dynamo made dynamic, torch._dynamo.config.specialize_float = True keeps it constant"
        )
    return None


def _check_weight(norm: RmsNorm) -> str | None:
    if norm.weight is None:
        return None
    weight, x = tensor_of(norm.weight), tensor_of(norm.x)
    if weight is None or x is None:
        return (
            f"the norm is multiplied by {norm.weight}, which is not a tensor; the fused op takes a weight [N] or none"
        )
    if weight.dim() != 1 or not same_shape(weight.shape, x.shape[-1:]):
        return f"the norm is multiplied by a tensor of shape {list(weight.shape)}, not by a weight [{x.shape[-1]}]"
    if weight.dtype not in (x.dtype, torch.float32):
        return f"the weight is {weight.dtype} and the input {x.dtype}; the fused op takes the same dtype or float32"
    return None


def _check_casts(norm: RmsNorm) -> str | None:
    x = tensor_of(norm.x)
    if x is None:
        return None
    if norm.rounded_to is not None and norm.rounded_to != x.dtype:
        return (
            f"the norm is rounded to {norm.rounded_to} before the weight; the fused op rounds to its input's {x.dtype}"
        )
    if norm.norm_dtype not in (x.dtype, torch.float32):
        return f"the norm's result is {norm.norm_dtype}; the fused op gives {x.dtype} (that of its input) or float32"
    return None


#: What must hold of a recognised norm before it may be rewritten, in the order it is checked.
GUARDS = (
    Guard("plain calls", "no node of the norm has keyword arguments (alpha=, dtype=, ...)", _check_kwargs),
    Guard("input", "x is bfloat16, float16 or float32 and has the shape of the result", _check_x),
    Guard("statistics", "square, mean, eps and rsqrt are computed in float32", _check_statistics),
    Guard("axis", "the mean is over the last axis alone", _check_axis),
    Guard("width", f"the last axis is static and a multiple of {BLOCK}", _check_width),
    Guard("eps", "eps is a Python number", _check_eps),
    Guard("weight", "no weight, or a 1-D tensor [N] in x's dtype or float32", _check_weight),
    Guard("casts", "the cast before the weight is to x's dtype, the result is in x's dtype or float32", _check_casts),
)


def illegal(norm: RmsNorm) -> str | None:
    """Why this norm cannot be part of a fused op, or None."""
    return first_failure(GUARDS, norm)


# --- near misses ----------------------------------------------------------------------------------------------------

_ELEMENTWISE = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.add.Scalar, aten.mul.Scalar, _CAST}
_LOOK_BACK = 8  # elementwise steps between a norm's result and its root; the longest accepted spelling has three

#: Ops that a norm's scale may end in, and what the recogniser asks for instead.
NEAR_MISSES: dict[Any, str] = {
    aten.rsqrt.default: "an rsqrt-based norm in a spelling the recogniser does not have",
    aten.sqrt.default: "the norm divides by a square root (x / sqrt(v)); write x * torch.rsqrt(v)",
    aten.pow.Tensor_Scalar: "the norm's scale is a power (v ** -0.5); write torch.rsqrt(v)",
    aten.linalg_vector_norm.default: "the norm is taken with vector_norm; write x * torch.rsqrt(mean + eps)",
}


def near_miss(node: fx.Node) -> str | None:
    """Why ``node`` looks like the result of an RMSNorm and was not recognised; None when it is something else."""
    frontier, seen = [node], {node}
    for _ in range(_LOOK_BACK):
        following: list[fx.Node] = []
        for current in frontier:
            if current.target in NEAR_MISSES and current is not node and _is_row_statistic(current):
                if _subtracts_mean(current):
                    return None  # LayerNorm: another fusion, not a misspelt RMSNorm
                return NEAR_MISSES[current.target] + _detail(current)
            if current.op == "call_function" and (
                current.target in _ELEMENTWISE
                or current.target in (aten.reciprocal.default, aten.clone.default, aten.unsqueeze.default)
                or is_row_view(current)
            ):
                following += [n for n in current.all_input_nodes if n not in seen]
                seen.update(following)
        frontier = following
    return None


_REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.var_mean.correction}


def _is_row_statistic(node: fx.Node) -> bool:
    """Is this root taken of a reduction, and so one number per row?"""
    if node.target is aten.pow.Tensor_Scalar and node.args[1] not in (0.5, -0.5):
        return False
    return any(n.target in _REDUCTIONS for n in _ancestors(node, 4))


def _ancestors(node: fx.Node, depth: int) -> list[fx.Node]:
    found, frontier = [node], [node]
    for _ in range(depth):
        frontier = [n for f in frontier for n in f.all_input_nodes]
        found += frontier
    return found


def _subtracts_mean(node: fx.Node) -> bool:
    return any(
        n.target in (aten.var_mean.correction, aten.var.correction, aten.sub.Tensor) for n in _ancestors(node, 4)
    )


def _detail(node: fx.Node) -> str:
    """The step before the root that differs from the accepted spellings, when it can be named."""
    for ancestor in _ancestors(node, 3):
        if ancestor.target is aten.sum.dim_IntList:
            return " (it sums the squares; write mean)"
        if ancestor.target in (aten.add.Tensor, aten.mean.dim) and ancestor.kwargs:
            given = ", ".join(f"{k}={v}" for k, v in ancestor.kwargs.items())
            return f" ({ancestor.target} has {given})"
        if ancestor.target is aten.mean.dim and len(ancestor.args) < 3:
            return " (the mean does not keep its dim)"
    return ""
