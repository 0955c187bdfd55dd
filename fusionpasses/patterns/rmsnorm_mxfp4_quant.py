"""[residual add +] RMSNorm + MXFP4 quant: every quant of one norm becomes one fused op.

Variants, chosen by what is read: the residual add is taken in when the norm's input is one, and the norm is returned as
well when something other than the quants reads it. With neither, a second norm of the same rows is taken in, if there
is one that is not quantised (``_second_norm.py``).

==================================  ==============================================
rmsnorm_mxfp4_quant                 the norm feeds quants only
rmsnorm_mxfp4_quant.with_norm       something else reads the norm too
rmsnorm_mxfp4_quant.with_second     other columns of the same rows are normed, too
rmsnorm_add_mxfp4_quant             the norm's input is a residual add
rmsnorm_add_mxfp4_quant.with_norm   both
==================================  ==============================================
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from fusionpasses import providers
from fusionpasses.anchors import Anchor
from fusionpasses.patterns import _rms_norm, _second_norm
from fusionpasses.patterns._graph import (
    SITE,
    call,
    depends_on,
    effect_of,
    erase_dead,
    is_contiguous,
    same_shape,
    tensor_of,
    writes,
)
from fusionpasses.patterns._near_miss import explain
from fusionpasses.patterns._pass import Guard, Judgement, first_failure
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
from fusionpasses.patterns._rms_norm import RmsNorm
from fusionpasses.patterns._views import through_row_views
from fusionpasses.report import FUSED, Site, Where

aten = torch.ops.aten
ours = torch.ops.fusionpasses


@dataclasses.dataclass(eq=False)
class Candidate:
    """A norm and its readers."""

    norm: RmsNorm
    quants: list[Quant]
    other_readers: list[fx.Node]
    ordered: list[fx.Node]


# --- guards ---------------------------------------------------------------------------------------------------------


def _check_order(c: Candidate) -> str | None:
    first = min(c.norm.nodes)
    last = max(q.node for q in c.quants)
    for node in c.ordered:
        if first < node < last and writes(node):
            return f"{effect_of(node)} between the norm and the quant"
    return None


def _check_norm_output(c: Candidate) -> str | None:
    value = tensor_of(c.norm.root)
    if c.other_readers and value is not None and not is_contiguous(value):
        return (
            f"{c.other_readers[0].name} also reads the norm, whose strides are {list(value.stride())}; the fused op "
            "returns it contiguous"
        )
    return None


GUARDS = (
    Guard("order", "nothing writes to a tensor between the norm and its quants", _check_order),
    Guard("norm output", "the norm is contiguous, if something other than the quants reads it", _check_norm_output),
)


def _check_add_kwargs(add: fx.Node, c: Candidate) -> str | None:
    if add.kwargs:
        given = ", ".join(f"{k}={v}" for k, v in add.kwargs.items())
        return f"the add has {given}"
    return None


def _check_add_operands(add: fx.Node, c: Candidate) -> str | None:
    total = tensor_of(add)
    if total is None:
        return "its result is not a tensor"
    for operand in add.args:
        value = tensor_of(operand)
        if value is None:
            return f"one operand is {operand}, not a tensor"
        if value.dtype != total.dtype:
            return f"an operand is {value.dtype} and the sum {total.dtype}"
        if not same_shape(value.shape, total.shape):
            return f"an operand of shape {list(value.shape)} is broadcast to {list(total.shape)}"
    return None


def _check_add_strides(add: fx.Node, c: Candidate) -> str | None:
    total = tensor_of(add)
    if total is not None and not is_contiguous(total):
        return f"the sum has strides {list(total.stride())}; the fused op returns it contiguous"
    return None


def _check_add_order(add: fx.Node, c: Candidate) -> str | None:
    if depends_on(c.norm.weight, add):
        return "the weight is computed from the sum"
    for node in c.ordered:
        if add < node < c.norm.root:
            return f"{effect_of(node)} between the add and the norm"
    return None


#: What must hold of the add before the norm's input to be taken into the fused op; else it is left outside.
RESIDUAL_GUARDS = (
    Guard("plain add", "the add has no keyword arguments (alpha=)", _check_add_kwargs),
    Guard("operands", "both operands are tensors of the sum's shape and dtype", _check_add_operands),
    Guard("strides", "the sum is contiguous", _check_add_strides),
    Guard(
        "order",
        "the weight does not depend on the sum, and nothing writes to a tensor or draws random numbers in between",
        _check_add_order,
    ),
)


# --- the pass -------------------------------------------------------------------------------------------------------


class RmsNormMxfp4Quant(QuantPass):
    name = "rmsnorm_mxfp4_quant"
    looks_for = "a norm"
    spellings = {
        "from the quantised node to the normalised tensor": _rms_norm.TAILS,
        "from the normalised tensor to the norm's input": _rms_norm.NORMALISE,
        "views between the norm and the quant, which keep the last axis": VIEWS,
    }
    guards = {
        "quant": ANCHOR_GUARDS,
        "norm": _rms_norm.GUARDS,
        "site": GUARDS,
        "residual add (else it is left outside, with a note)": RESIDUAL_GUARDS,
        "second norm (else it is left outside, with a note)": _second_norm.GUARDS,
    }

    def begin(self, graph: fx.Graph) -> None:
        super().begin(graph)
        self._needs_sort = False

    def end(self, graph: fx.Graph) -> None:
        super().end(graph)
        if self._needs_sort:
            from torch._inductor.pattern_matcher import stable_topological_sort

            stable_topological_sort(graph)

    def judge_quant(self, node: fx.Node, anchor: Anchor, base: fx.Node, left: Site) -> Judgement:
        norm = _rms_norm.recognise(base)
        if norm is None:
            left.status, left.reason = explain(base)
            if left.reason:
                return Judgement(left, base, None)
            return self.not_mine(left, base)
        left.where, left.spelling = Where.of(norm.root.meta), norm.spelling
        candidate = Candidate(norm, *self.readers(norm.root, anchor, scale_mode_of(node, anchor)), self._ordered)
        left.reason = _rms_norm.illegal(norm) or first_failure(GUARDS, candidate) or ""
        if left.reason:
            return Judgement(left, base, None)
        return self._fuse(candidate)

    def _fuse(self, c: Candidate) -> Judgement:
        norm = c.norm
        add, notes = _residual_add(c)
        packet = ours.rmsnorm_mxfp4_quant if add is None else ours.rmsnorm_add_mxfp4_quant
        op = packet.with_norm if c.other_readers else packet.default
        x = tensor_of(norm.x)
        device = x.device.type if x is not None else "cpu"
        second = None
        if add is None:
            second, more = self._second(c, device)
            notes += more
            op = op if second is None else packet.with_second
        name = op_name(op)
        provider = providers.select(name, device, self.config.provider)
        site = Site(
            self.name,
            FUSED,
            name,
            Where.of(norm.root.meta),
            anchors=tuple(Where.of(q.node.meta) for q in c.quants),
            provider=provider,
            spelling=norm.spelling,
            notes=tuple(notes),
        )
        return Judgement(
            site,
            norm.root,
            lambda: self._rewrite(c, add, second, op, provider, site),
            covers=tuple(q.node for q in c.quants),
        )

    def _second(self, c: Candidate, device: str) -> tuple[RmsNorm | None, list[str]]:
        if _second_norm.base_of(c.norm.x) is None:
            return None, []
        alone = providers.select(op_name(ours.rmsnorm_mxfp4_quant.default), device, self.config.provider)
        both = providers.usable(alone, op_name(ours.rmsnorm_mxfp4_quant.with_second), device)
        no_provider = "" if both else f"{alone} would run the op without it, and cannot with it: {both.why}"
        quants = [q.node for q in c.quants]
        return _second_norm.find(c.norm, quants, c.other_readers, c.ordered, self.anchors, no_provider)

    def _rewrite(
        self, c: Candidate, add: fx.Node | None, second: RmsNorm | None, op: Any, provider: str, site: Site
    ) -> None:
        norm, graph = c.norm, c.norm.root.graph
        matched = [*norm.nodes, *(v for q in c.quants for v in q.views), *(q.node for q in c.quants)]
        if add is not None:
            matched.append(add)
        if second is not None:
            matched += second.nodes
        if self.keep_subgraphs:
            site.matched = text_of(matched)
        inputs = (*((norm.x,) if add is None else add.args), norm.weight, float(norm.eps))
        kwargs = {
            "cast_order": norm.cast_order,
            "norm_dtype": norm.norm_dtype,
            "scale_mode": c.quants[0].scale_mode,
            "provider": provider,
        }
        if second is not None:
            inputs += (second.x, second.weight, float(second.eps))
            kwargs |= {"cast_order2": second.cast_order, "norm_dtype2": second.norm_dtype}
        # The nodes that are replaced hold the fake values of the results, but for codes and scales behind views.
        direct = next((q.node.meta["val"] for q in c.quants if not q.views), None)
        values = {"codes": direct and direct[0], "scales": direct and direct[1]}
        if add is not None:
            values["sum"] = add.meta["val"]
        if c.other_readers:
            values["norm"] = norm.root.meta["val"]
        if second is not None:
            values["norm2"] = second.root.meta["val"]
        with graph.inserting_before(norm.root):
            fused = call(
                graph,
                op,
                inputs,
                kwargs,
                provenance=norm.root,
                value=tuple(values.values()) if direct else None,
            )
            fused.meta[SITE] = site
            out = {
                result: call(graph, operator.getitem, (fused, i), {}, provenance=norm.root, value=fused.meta["val"][i])
                for i, result in enumerate(values)
            }
        new = [fused, *out.values(), *replace_quants(c.quants, out)]
        if add is not None:
            # Readers of the sum may stand before the fused op, which is where the norm was: the pass ends with a sort.
            add.replace_all_uses_with(out["sum"])
            self._needs_sort = True
        if c.other_readers:
            norm.root.replace_all_uses_with(out["norm"])
        if second is not None:
            # Its input may stand behind the fused op, and its readers before it.
            second.root.replace_all_uses_with(out["norm2"])
            self._needs_sort = True
        self._inside.append((site, "the norm", [n for n in norm.nodes if n is not norm.root]))
        if self.keep_subgraphs:
            site.replacement = text_of(new)
        erase_dead(matched)


def _residual_add(c: Candidate) -> tuple[fx.Node | None, list[str]]:
    """The residual add in front of a norm, if it can be taken in; else notes that say why it was left outside."""
    x = c.norm.x
    if not _adds_tensors(x):
        base = through_row_views(x)[0]
        if base is x and x.target in _BEFORE_NORM and x.all_input_nodes:
            base = x.all_input_nodes[0]
        if base is not x and _adds_tensors(base):
            return None, [f"the residual add was left outside: {x.target} stands between it and the norm"]
        return None, []
    reason = first_failure(RESIDUAL_GUARDS, x, c)
    if reason is not None:
        return None, [f"the residual add was left outside: {reason}"]
    return x, []


#: Steps between an add and a norm that are looked through for the note only.
_BEFORE_NORM = (torch.ops.prims.convert_element_type.default, aten.permute.default, aten.slice.Tensor)


def _adds_tensors(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and all(isinstance(a, fx.Node) for a in node.args)


PASS = RmsNormMxfp4Quant
