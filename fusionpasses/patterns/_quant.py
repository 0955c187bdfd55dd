"""What the passes that start from a quant share: which quants of a tensor mean the same, and how they are replaced."""

from __future__ import annotations

import abc
import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from fusionpasses.anchors import Anchor
from fusionpasses.patterns._graph import bound_arguments, is_contiguous, ordered_nodes, same_shape, tensor_of
from fusionpasses.patterns._pass import FusionPass, Guard, Judgement, Spelling, first_failure, not_from
from fusionpasses.patterns._views import ROW_VIEWS, is_row_view, replay, through_row_views
from fusionpasses.report import NOTHING, REFUSED, Site, Where

ours = torch.ops.fusionpasses

#: Ops of ours that return what they quantise.
_RETURN_WHAT_THEY_QUANTISE: dict[Any, str] = {
    ours.rmsnorm_mxfp4_quant.with_norm: "norm",
    ours.rmsnorm_add_mxfp4_quant.with_norm: "norm",
    ours.silu_mul_mxfp4_quant.with_act: "product",
}

VIEWS = tuple(Spelling(str(target), None) for target in ROW_VIEWS)


@dataclasses.dataclass(eq=False)
class Quant:
    """A quant of a tensor: the anchor node, what it means, and the row views between the tensor and it."""

    node: fx.Node
    anchor: Anchor
    scale_mode: str
    views: list[fx.Node]


def _check_anchor_arguments(node: fx.Node, anchor: Anchor) -> str | None:
    schema = node.target._schema  # type: ignore[union-attr]
    bound = bound_arguments(node)
    if anchor.scale_mode_argument is not None and not isinstance(bound[anchor.scale_mode_argument], str):
        return f"{anchor.op} is called with a scale mode that is not a constant"
    for argument in schema.arguments[1:]:
        value = bound[argument.name]
        if argument.name == anchor.scale_mode_argument or argument.name in anchor.ignored:
            continue
        if not argument.has_default_value() or value != argument.default_value:
            return f"{anchor.op} is called with {argument.name}={value}, which its registration does not cover"
    return None


def _check_anchor_results(node: fx.Node, anchor: Anchor) -> str | None:
    x, results = tensor_of(node.args[0] if node.args else None), node.meta.get("val")
    if x is None or not x.dim() or not isinstance(results, (tuple, list)) or len(results) != 2:
        return f"{anchor.op} is not called with a tensor of rows, or has no fake kernel that gives two results"
    for name, result, per_byte in (("codes", results[0], 2), ("scales", results[1], 32)):
        expected = (*x.shape[:-1], x.shape[-1] // per_byte)
        if result.dtype != torch.uint8 or not same_shape(result.shape, expected) or not is_contiguous(result):
            return (
                f"the {name} of {anchor.op} are {result.dtype} {list(result.shape)} with strides "
                f"{list(result.stride())}; the fused op gives contiguous uint8 {list(expected)}"
            )
    return None


ANCHOR_GUARDS = (
    Guard("arguments", "beyond x and the scale mode, every argument has its default", _check_anchor_arguments),
    Guard("results", "codes uint8 [..., N/2] and scales uint8 [..., N/32], contiguous", _check_anchor_results),
)


class QuantPass(FusionPass):
    """Base of the passes that start from a quant: the quant itself, and who else reads what it reads."""

    def begin(self, graph: fx.Graph) -> None:
        self._ordered = ordered_nodes(graph)
        self._inside: list[tuple[Site, str, list[fx.Node]]] = []

    def end(self, graph: fx.Graph) -> None:
        # Only now: what another site of the same run has read may be gone as well.
        for site, what, nodes in self._inside:
            kept = sorted(n.name for n in nodes if not n._erased and not set(n.users) <= set(nodes))
            if kept:
                site.notes += (f"{', '.join(kept)} inside {what} has other readers and is still computed by Inductor",)

    @abc.abstractmethod
    def judge_quant(self, node: fx.Node, anchor: Anchor, base: fx.Node, left: Site) -> Judgement:
        """Decide about a quant that can be fused with what makes ``base``, the tensor below its views.

        ``left`` is the site to return if it is not: a refusal that lacks its reason.
        """

    def judge(self, node: fx.Node) -> Judgement | None:
        anchor = self.anchors[node.target]
        here = Where.of(node.meta)
        left = Site(self.name, REFUSED, op_name(node.target), here, (here,))
        left.reason = first_failure(ANCHOR_GUARDS, node, anchor) or ""
        if left.reason:
            return Judgement(left, node, None)
        base, _ = through_row_views(node.args[0])  # type: ignore[arg-type]
        if base.target is operator.getitem and isinstance(base.args[0], fx.Node):
            quantised = _RETURN_WHAT_THEY_QUANTISE.get(base.args[0].target)
            if quantised:
                left.reason = (
                    f"the {quantised} is fused with another quantisation already (another op or scale mode); one fused "
                    "op has one scale mode"
                )
                return Judgement(left, base, None)
        return self.judge_quant(node, anchor, base, left)

    def not_mine(self, left: Site, base: fx.Node) -> Judgement:
        found = base.op if base.op != "call_function" else str(base.target)
        left.status, left.reason = NOTHING, not_from(found, [self])
        return Judgement(left, base, None, not_mine=found)

    def readers(self, root: fx.Node, anchor: Anchor, scale_mode: str) -> tuple[list[Quant], list[fx.Node]]:
        """All readers of a tensor: quants with the same meaning as this one, in graph order, and everything else."""
        quants: list[Quant] = []
        others: list[fx.Node] = []

        def visit(node: fx.Node, views: list[fx.Node]) -> None:
            for user in node.users:
                other = self.anchors.get(user.target)
                if (
                    other is not None
                    and user.args[:1] == (node,)
                    and user.all_input_nodes == [node]
                    and first_failure(ANCHOR_GUARDS, user, other) is None
                    and scale_mode_of(user, other) == scale_mode
                    and other.layout == anchor.layout
                ):
                    quants.append(Quant(user, other, scale_mode, views))
                elif is_row_view(user):
                    visit(user, [*views, user])
                else:
                    others.append(user)

        visit(root, [])
        quants.sort(key=lambda q: q.node)
        return quants, others


def replace_quants(quants: list[Quant], out: dict[str, fx.Node]) -> list[fx.Node]:
    """Let the readers of the quants read ``out["codes"]`` and ``out["scales"]`` through the same views."""
    new = []
    for quant in quants:
        graph = quant.node.graph
        with graph.inserting_before(quant.node):
            for index, result in enumerate(("codes", "scales")):
                readers = [u for u in quant.node.users if u.target is operator.getitem and u.args[1] == index]
                if readers:
                    replacement = replay(graph, out[result], quant.views, quant.node)
                    new.append(replacement)
                    for reader in readers:
                        reader.replace_all_uses_with(replacement)
                        graph.erase_node(reader)
    return new


def scale_mode_of(node: fx.Node, anchor: Anchor) -> str:
    if anchor.scale_mode is not None:
        return anchor.scale_mode
    return str(bound_arguments(node)[str(anchor.scale_mode_argument)])


def op_name(target: Any) -> str:
    """``packet.overload`` of one of our ops, ``namespace::packet.overload`` of a foreign one."""
    name = f"{target._opname}.{target._overloadname}"
    return name if target.namespace == "fusionpasses" else f"{target.namespace}::{name}"


def text_of(nodes: Any) -> str:
    return "\n".join(str(n.format_node()) for n in sorted(set(nodes)))
