"""A copy that only puts rows in order for a quant: the quant reads the tensor that is copied, and there is no copy.

Absorbed attention gives ``[heads, tokens, width]`` by a bmm, and the projection after it wants rows of all heads,
``[tokens, heads * width]``. Inductor makes a kernel of its own of that copy, because the quant is an op. Blocks of 32
are the same in both if ``width`` is a multiple of 32, so codes and scales are those of ``[tokens, heads, width]`` in
another shape, and the op takes any strides.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses import providers
from fusionpasses.anchors import Anchor
from fusionpasses.patterns._graph import call, erase_dead, is_contiguous, storage_of, tensor_of
from fusionpasses.patterns._pass import Guard, Judgement, Spelling, first_failure
from fusionpasses.patterns._quant import (
    ANCHOR_GUARDS,
    VIEWS,
    Quant,
    QuantPass,
    op_name,
    replace_quants,
    scale_mode_of,
    text_of,
)
from fusionpasses.report import FUSED, NOTHING, Site, Where

aten = torch.ops.aten
ours = torch.ops.fusionpasses

_BLOCK = 32

#: What a copy may be, and the views of it.
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_COPIES = (aten.clone.default, *_RESHAPES)

#: Ops of aten that write their result themselves: no kernel that Inductor generates writes it in another order.
_KERNELS = (
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
)
#: Namespaces of ops that Inductor generates code for.
_GENERATED = ("aten", "prims", "inductor", "inductor_prims")


@dataclasses.dataclass(eq=False)
class Candidate:
    """A copy for quants.

    Attributes:
        source, value: what is copied.
        path: the copy, and the views from it to the tensor whose rows are quantised.
        quants, other_readers: who reads that; any other reader of the path.
    """

    source: fx.Node
    value: torch.Tensor
    path: list[fx.Node]
    quants: list[Quant]
    other_readers: list[fx.Node]

    @property
    def provider(self) -> str:
        return str(self.quants[0].node.kwargs.get("provider", "auto"))


def _check_readers(c: Candidate) -> str | None:
    if c.other_readers:
        return f"{c.other_readers[0].name} also reads the copy, which is made for it anyway"
    return None


def _check_width(c: Candidate) -> str | None:
    width, copied = c.value.shape[-1], c.path[-1].meta["val"].shape[-1]
    if not isinstance(width, int) or width % _BLOCK:
        return f"the last axis of what is copied is {width}, no static multiple of {_BLOCK}: blocks may cross its ends"
    if not isinstance(copied, int):
        return f"the last axis of the copy is dynamic ({copied})"
    return None


def _check_elements(c: Candidate) -> str | None:
    apart = c.value.stride(-1)
    if not statically_known_true(apart == 1):
        return f"neighbours along the last axis of what is copied are {apart} apart in memory"
    return None


def _check_distances(c: Candidate) -> str | None:
    distances = _distances(c.value)
    if len(distances) != 2:
        return (
            f"the kernel reads rows that lie at two distances, and what is copied has strides {list(c.value.stride())} "
            f"of {list(c.value.shape)}, {len(distances)}"
        )
    return None


def _check_words(c: Candidate) -> str | None:
    bytes_ = [c.value.element_size() * n for n in (c.value.storage_offset(), *(s for _, s in _distances(c.value)))]
    if not all(statically_known_true(n % 4 == 0) for n in bytes_):
        return (
            f"rows may start off a multiple of 4 bytes (strides {list(c.value.stride())}): the kernel would copy them"
        )
    return None


def _check_provider(c: Candidate) -> str | None:
    for quant in c.quants:
        provider = str(quant.node.kwargs.get("provider", "auto"))
        if provider != c.provider:
            return f"its quants are run by {c.provider} and by {provider}"
        if providers.is_rule(provider):
            return f"{provider} runs the quant, and AITER takes rows at one distance"
    return None


GUARDS = (
    Guard("readers", "nothing but quants of one meaning reads the copy", _check_readers),
    Guard("width", f"the last axis, before and after the copy, is static and a multiple of {_BLOCK}", _check_width),
    Guard("elements", "neighbours along that axis are neighbours in memory", _check_elements),
    Guard("distances", "its rows lie at two distances, as rows of heads in tokens do", _check_distances),
    Guard("words", "its rows start at multiples of 4 bytes", _check_words),
    Guard("provider", "one provider runs the quants, and it is not AITER", _check_provider),
)


class DynamicMxfp4Quant(QuantPass):
    name = "dynamic_mxfp4_quant"
    looks_for = "a copy of rows"
    spellings = {
        "the copy, and views of it": tuple(Spelling(str(target), None) for target in _COPIES),
        "views between these and the quant, which keep the last axis": VIEWS,
        "what gives the tensor that is copied, beside inputs and ops that are not torch's": tuple(
            Spelling(str(packet), None) for packet in _KERNELS
        ),
    }
    guards = {"quant": ANCHOR_GUARDS, "copy": GUARDS}

    def judge_quant(self, node: fx.Node, anchor: Anchor, base: fx.Node, left: Site) -> Judgement:
        path = _copy_of(base)
        source = path[0].args[0] if path else None
        value = tensor_of(source)
        if not isinstance(source, fx.Node) or value is None:
            return self.not_mine(left, base)
        origin = _origin(source, storage_of(value))
        left.status = NOTHING  # what was asked for is a quant, and it stays one
        if anchor.target is not ours.dynamic_mxfp4_quant.default:
            left.reason = f"rows are copied for it, and it is not known in which strides {anchor.op} would read them"
            return Judgement(left, base, None)
        if not _is_written_whole(origin):
            left.reason = f"rows are copied for it after {origin.target}, which Inductor may do in the same kernel"
            return Judgement(left, base, None)
        quants, others = self.readers(base, anchor, scale_mode_of(node, anchor))
        others += [q.node for q in quants if q.anchor is not anchor]
        others += [user for below, above in itertools.pairwise(path) for user in below.users if user is not above]
        c = Candidate(source, value, path, quants, others)
        reason = first_failure(GUARDS, c)
        if reason is not None:
            left.reason = f"rows are copied for it: {reason}"
            return Judgement(left, base, None)
        given = "a graph input" if origin.op in ("placeholder", "get_attr") else f"{origin.target}"
        site = Site(
            self.name,
            FUSED,
            op_name(node.target),
            Where.of(path[0].meta),
            anchors=tuple(Where.of(q.node.meta) for q in quants),
            provider=c.provider,
            spelling="a copy of rows",
            notes=(f"reads the rows of {given} where they lie, without the copy that put them in order",),
        )
        return Judgement(site, base, lambda: self._rewrite(c, site), covers=tuple(q.node for q in quants))

    def _rewrite(self, c: Candidate, site: Site) -> None:
        quant, base, graph = c.quants[0].node, c.path[-1], c.source.graph
        matched = [*c.path, *(v for q in c.quants for v in q.views), *(q.node for q in c.quants)]
        if self.keep_subgraphs:
            site.matched = text_of(matched)
        # Where the copy was, so that whatever writes to the tensor later goes on doing so later.
        with graph.inserting_before(c.path[0]):
            new = [call(graph, quant.target, (c.source, *quant.args[1:]), {**quant.kwargs}, provenance=quant)]
            new += [
                call(graph, operator.getitem, (new[0], i), {}, provenance=quant, value=new[0].meta["val"][i])
                for i in range(2)
            ]
        out = dict(zip(("codes", "scales"), new[1:], strict=True))
        if base.target in _RESHAPES:
            sizes: Any = base.args[1]
            width = base.meta["val"].shape[-1]
            with graph.inserting_before(base):
                for (name, result), per_byte in zip(out.items(), (2, _BLOCK), strict=True):
                    shape = [*sizes[:-1], width // per_byte]
                    out[name] = call(graph, aten.reshape.default, (result, shape), {}, provenance=quant)
            new += out.values()
        new += replace_quants(c.quants, out)
        if self.keep_subgraphs:
            site.replacement = text_of(new)
        erase_dead(matched)


def _copy_of(base: fx.Node) -> list[fx.Node]:
    """The copy of a tensor that is not contiguous, and the views from it to ``base``, last; or nothing."""
    path = [base]
    while path[0].target in _COPIES:
        below, value = path[0].args[0], tensor_of(path[0])
        source = tensor_of(below)
        if not isinstance(below, fx.Node) or source is None or value is None or not source.dim():
            return []
        if storage_of(source) != storage_of(value):
            return path if is_contiguous(value) and not is_contiguous(source) else []
        path.insert(0, below)
    return []


def _origin(node: fx.Node, memory: object) -> fx.Node:
    """What wrote the memory that a node is a view of."""
    while node.args and isinstance(node.args[0], fx.Node):
        below = tensor_of(node.args[0])
        if node.target is not operator.getitem and (below is None or storage_of(below) != memory):
            break
        node = node.args[0]
    return node


def _is_written_whole(node: fx.Node) -> bool:
    """Is it there, in its own strides, whoever reads it?"""
    if node.op in ("placeholder", "get_attr"):
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.overloadpacket in _KERNELS or target.namespace not in _GENERATED


def _distances(x: torch.Tensor) -> list[tuple[Any, Any]]:
    """Sizes and strides of the leading axes, those that are known to be one in memory taken together."""
    distances: list[tuple[Any, Any]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if not statically_known_true(size == 1):
            if distances and statically_known_true(distances[-1][1] == size * stride):
                distances[-1] = distances[-1][0] * size, stride
            else:
                distances.append((size, stride))
    return distances


PASS = DynamicMxfp4Quant
