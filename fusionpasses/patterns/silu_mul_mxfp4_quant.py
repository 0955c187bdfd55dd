"""activation(gate) * up + MXFP4 quant: the activation of a gated MLP and every quant of it become one fused op.

==============================  ==============================================
silu_mul_mxfp4_quant            the product feeds quants only
silu_mul_mxfp4_quant.with_act   something else reads the product too
==============================  ==============================================

Gate and up are two tensors, wherever they come from: two matrix products, or two halves of one, which the op reads
where they are.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from fusionpasses import providers
from fusionpasses.anchors import Anchor
from fusionpasses.patterns import _gated_activation
from fusionpasses.patterns._gated_activation import Gated
from fusionpasses.patterns._gated_near_miss import explain
from fusionpasses.patterns._graph import SITE, call, effect_of, erase_dead, is_contiguous, tensor_of, writes
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
from fusionpasses.report import FUSED, Site, Where

ours = torch.ops.fusionpasses


@dataclasses.dataclass(eq=False)
class Candidate:
    """A product and its readers."""

    gated: Gated
    quants: list[Quant]
    other_readers: list[fx.Node]
    ordered: list[fx.Node]


def _check_order(c: Candidate) -> str | None:
    first, last = min(c.gated.nodes), max(q.node for q in c.quants)
    for node in c.ordered:
        if first < node < last and writes(node):
            return f"{effect_of(node)} between the activation and the quant"
    return None


def _check_output(c: Candidate) -> str | None:
    value = tensor_of(c.gated.root)
    if c.other_readers and value is not None and not is_contiguous(value):
        return (
            f"{c.other_readers[0].name} also reads the product, whose strides are {list(value.stride())}; the fused op "
            "returns it contiguous"
        )
    return None


GUARDS = (
    Guard("order", "nothing writes to a tensor between the activation and its quants", _check_order),
    Guard("output", "the product is contiguous, if something other than the quants reads it", _check_output),
)


class SiluMulMxfp4Quant(QuantPass):
    name = "silu_mul_mxfp4_quant"
    looks_for = "a gated activation"
    spellings = {
        "from the quantised node to the activation": _gated_activation.PRODUCTS,
        "from the activation to gate": _gated_activation.ACTIVATIONS,
        "views between the product and the quant, which keep the last axis": VIEWS,
    }
    guards = {"quant": ANCHOR_GUARDS, "product": _gated_activation.GUARDS, "site": GUARDS}

    def judge_quant(self, node: fx.Node, anchor: Anchor, base: fx.Node, left: Site) -> Judgement:
        gated = _gated_activation.recognise(base)
        if gated is None:
            left.status, left.reason = explain(base)
            return Judgement(left, base, None) if left.reason else self.not_mine(left, base)
        left.where, left.spelling = Where.of(gated.root.meta), gated.spelling
        c = Candidate(gated, *self.readers(gated.root, anchor, scale_mode_of(node, anchor)), self._ordered)
        left.reason = _gated_activation.illegal(gated) or first_failure(GUARDS, c) or ""
        gate = tensor_of(gated.gate)
        if left.reason or gate is None:
            return Judgement(left, base, None)
        op = ours.silu_mul_mxfp4_quant.with_act if c.other_readers else ours.silu_mul_mxfp4_quant.default
        name = op_name(op)
        site = Site(
            self.name,
            FUSED,
            name,
            left.where,
            anchors=tuple(Where.of(q.node.meta) for q in c.quants),
            provider=providers.select(name, gate.device.type, self.config.provider),
            spelling=gated.spelling,
        )
        covers = tuple(q.node for q in c.quants)
        return Judgement(site, gated.root, lambda: self._rewrite(c, op, site), covers=covers)

    def _rewrite(self, c: Candidate, op: Any, site: Site) -> None:
        gated, graph = c.gated, c.gated.root.graph
        matched = [*gated.nodes, *(v for q in c.quants for v in q.views), *(q.node for q in c.quants)]
        if self.keep_subgraphs:
            site.matched = text_of(matched)
        kwargs = {
            "activation": gated.activation,
            "cast_order": gated.cast_order,
            "act_dtype": gated.act_dtype,
            "scale_mode": c.quants[0].scale_mode,
            "provider": site.provider,
        }
        results = ("codes", "scales", *(["act"] if c.other_readers else []))
        with graph.inserting_before(gated.root):
            fused = call(graph, op, (gated.gate, gated.up), kwargs, provenance=gated.root)
            fused.meta[SITE] = site
            out = {
                result: call(graph, operator.getitem, (fused, i), {}, provenance=gated.root, value=fused.meta["val"][i])
                for i, result in enumerate(results)
            }
        new = [fused, *out.values(), *replace_quants(c.quants, out)]
        if c.other_readers:
            gated.root.replace_all_uses_with(out["act"])
        self._inside.append((site, "the activation", [n for n in gated.nodes if n is not gated.root]))
        if self.keep_subgraphs:
            site.replacement = text_of(new)
        erase_dead(matched)


PASS = SiluMulMxfp4Quant
