"""Recognises RMSNorm in a post-grad graph, in any of its spellings, and says why when it is only almost one.

Two tables of small patterns are tried on a node. TAILS go from the node that is quantised back to the normalised
tensor, through weight and casts; NORMALISE goes from there to the norm's input. Both are printed into debug dumps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternExpr

from fusionpasses.ops._mxfp4 import BLOCK, INPUT_DTYPES
from fusionpasses.patterns._graph import same_shape, tensor_of
from fusionpasses.patterns._pass import Guard, Spelling, first_failure

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
                if upcast:  # T5 leaves the product to type promotion, which widens x to the same float32
                    for product in _either_order(x, rsqrt):
                        result.append(Spelling(f"{square}, upcast in the statistics", product))
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
    """The RMSNorm whose result is ``root``, in any accepted spelling.

    A product can be read in two ways (which factor is the norm?): one that holds the guards goes first.
    """
    first = None
    for norm in _readings(root):
        if illegal(norm) is None:
            return norm
        first = first or norm
    return first


def _readings(root: fx.Node) -> Iterator[RmsNorm]:
    if root.op != "call_function" or root.target not in (aten.mul.Tensor, _CAST):
        return
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
            yield RmsNorm(
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
            break


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
    dims = range(rank) if norm.dims is None else norm.dims
    if [d % rank for d in dims] != [rank - 1]:
        return f"the mean is taken over dims {list(dims)} of a {rank}-D tensor; the fused op normalises the last axis"
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
            f"eps is {norm.eps}, not a number; the fused op takes a Python number. If it is a float that "
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
