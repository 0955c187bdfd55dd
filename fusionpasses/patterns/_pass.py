"""What every fusion pass shares: an anchor-only PatternMatcherPass that keeps a record of each site it saw.

The registered pattern is the anchor op alone. Everything else is recognised by walking back from it, because a traced
pattern matches one spelling each, and on torch up to 2.14 ignores keyword arguments it does not declare.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._inductor.pattern_matcher import (
    CallFunctionVarArgs,
    Match,
    PatternExpr,
    PatternMatcherPass,
    PatternPrettyPrinter,
    register_graph_pattern,
)

from fusionpasses.anchors import Anchor
from fusionpasses.config import FusionConfig
from fusionpasses.report import REFUSED, Site


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One accepted way to write a part of a fusion: a pattern that executes, and its name in reports."""

    name: str
    pattern: PatternExpr | None

    def text(self) -> str:
        if self.pattern is None:
            return "the node itself"
        return PatternPrettyPrinter.run(self.pattern)


@dataclasses.dataclass(frozen=True)
class Guard:
    """A condition of a rewrite. ``check`` gives None when it holds, else the reason a user reads."""

    name: str
    requires: str
    check: Callable[..., str | None]


def first_failure(guards: tuple[Guard, ...], *facts: Any) -> str | None:
    """The reason of the first guard that does not hold, or None."""
    for guard in guards:
        reason = guard.check(*facts)
        if reason is not None:
            return reason
    return None


@dataclasses.dataclass
class Judgement:
    """What a pass decided about one site, before anything is changed.

    ``at`` is the node that is quantised, the norm's result: it gives the site its place in the report, and anchors
    that are left for the same reason at the same node are one site. ``rewrite`` is None when it is refused.
    ``covers`` are the anchors it speaks of, when they are more than the one that is judged. ``not_mine`` is what the
    anchor reads, if that is nothing the pass looks for: another pass may know better.
    """

    site: Site
    at: fx.Node
    rewrite: Callable[[], None] | None
    covers: tuple[fx.Node, ...] = ()
    not_mine: str = ""


class FusionPass(PatternMatcherPass, abc.ABC):
    """Base of the passes: visits the anchors, asks :meth:`judge`, applies the rewrite, records the sites."""

    name: str
    #: What it looks for before an anchor, for reasons; of passes that share their anchors.
    looks_for: str = ""
    #: The tables the recogniser executes, by title; printed into the debug dump as they are.
    spellings: dict[str, tuple[Spelling, ...]]
    guards: dict[str, tuple[Guard, ...]]
    #: The kind of registered ops it starts from.
    anchor_class: type[Anchor] = Anchor
    #: What it visits, if that is not the calls of these ops themselves.
    targets: tuple[Any, ...] = ()

    def __init__(self, config: FusionConfig, anchors: tuple[Anchor, ...], *, keep_subgraphs: bool = False) -> None:
        super().__init__(pass_name=self.name)
        self.config = config
        self.anchors: dict[Any, Anchor] = {a.target: a for a in anchors if type(a) is self.anchor_class}
        self.keep_subgraphs = keep_subgraphs
        self.sites: list[Site] = []
        self.judgements: list[Judgement] = []
        self._judgement: Judgement | None = None
        for target in self.targets or self.anchors:
            register_graph_pattern(CallFunctionVarArgs(target), extra_check=self._check, pass_dict=self)(self._handle)

    @abc.abstractmethod
    def judge(self, anchor: fx.Node) -> Judgement | None:
        """Decide about an anchor; None when it was covered by a site that is on record already."""

    def run(self, graph: fx.Graph) -> int:
        """Rewrite the graph; returns the number of rewrites. ``sites`` then holds them in graph order."""
        # Anchors are visited last to first, and a fused norm's nodes are gone afterwards: places are taken now.
        places = {node: i for i, node in enumerate(graph.nodes)}
        self._judged: list[Judgement] = []
        self.begin(graph)
        count = self.apply(graph)
        self._judged.sort(key=lambda j: places.get(j.at, len(places)))
        self.judgements = self._judged
        self.sites = _merged(self._judged)
        self.end(graph)
        return count

    def begin(self, graph: fx.Graph) -> None:
        """Called before the anchors of a graph are visited."""

    def end(self, graph: fx.Graph) -> None:
        """Called after the anchors of a graph were visited."""

    def _check(self, match: Match) -> bool:
        # All refusals belong here: the matcher counts a match once this says yes.
        anchor = match.output_node()
        self._judgement = self.judge(anchor)
        if self._judgement is None:
            return False
        self._judgement.covers = self._judgement.covers or (anchor,)
        self._judged.append(self._judgement)
        return self._judgement.rewrite is not None

    def _handle(self, match: Match, *args: Any, **kwargs: Any) -> None:
        if self._judgement is None or self._judgement.rewrite is None:
            raise RuntimeError(f"{self.name}: the matcher called the handler for a site that was refused")
        self._judgement.rewrite()


def verdicts(passes: Sequence[FusionPass]) -> list[Site]:
    """The sites of a graph that these passes have run on: one verdict for each anchor, whoever looked at it.

    Fused by one pass, it is nothing else to the others. Left by all, it has the verdict of the first that knows
    something of it, a refusal before "nothing to fuse"; or else it is what none of them looks for.
    """
    best: dict[fx.Node, tuple[int, FusionPass, Judgement]] = {}
    looked: dict[fx.Node, list[FusionPass]] = {}
    for fusion_pass in passes:
        for judgement in fusion_pass.judgements:
            rank = 0 if judgement.rewrite else 1 if judgement.site.status == REFUSED else 3 if judgement.not_mine else 2
            for anchor in judgement.covers:
                looked.setdefault(anchor, []).append(fusion_pass)
                if anchor not in best or rank < best[anchor][0]:
                    best[anchor] = rank, fusion_pass, judgement
    sites: list[Site] = []
    for fusion_pass in passes:
        kept = []
        for judgement in fusion_pass.judgements:
            # Not of an anchor: a rotation that is written to no cache.
            mine = [anchor for anchor in judgement.covers if best[anchor][2] is judgement]
            if not mine and judgement.covers:
                continue
            if judgement.not_mine:
                judgement.site.reason = not_from(judgement.not_mine, looked[mine[0]])
            kept.append(judgement)
        sites += _merged(kept)
    return sites


def not_from(found: str, passes: Sequence[FusionPass]) -> str:
    return f"the quantised tensor comes from {found}, not from {' or '.join(p.looks_for for p in passes)}"


def _merged(judgements: list[Judgement]) -> list[Site]:
    sites: dict[object, Site] = {}
    for judgement in judgements:
        site = judgement.site
        key = id(site) if judgement.rewrite else (judgement.at, site.status, site.op, site.reason)
        if key in sites:
            first = sites[key]
            # Anchors were visited last to first. A copy: this is asked of each pass, and once more of all.
            sites[key] = dataclasses.replace(first, anchors=(*site.anchors, *first.anchors))
        else:
            sites[key] = site
    return list(sites.values())
