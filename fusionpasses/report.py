"""What happened to every site: the report a user prints, and its plain-data form."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fusionpasses.errors import BadConfig

FUSED = "fused"
REFUSED = "refused"
NOTHING = "nothing to fuse"

COMPILED = "compiled"
FROM_CACHE = "from cache"
CACHE_UNKNOWN = "from cache, report unavailable"

#: What each pass starts from, for readers.
ANCHORS = {
    "rmsnorm_mxfp4_quant": "quant",
    "silu_mul_mxfp4_quant": "quant",
    "fused_rope_mla_kv_cache": "cache write",
    "dynamic_mxfp4_quant": "quant",
}

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n(?P<code>[^\n]*)')
_ROOT = re.compile(r"^L\['(?:self|fn)'\](?:\.|$)")  # fn: how Dynamo calls a module of torch's own, like nn.Sequential
_LOCAL = re.compile(r"^L\['(?P<name>[^']+)'\]")


@functools.cache
def _library_folders() -> tuple[str, str]:
    """The folders of this package and of torch."""
    import torch

    package, torch_folder = (os.path.dirname(os.path.abspath(f)) + os.sep for f in (__file__, str(torch.__file__)))
    return package, torch_folder


def _short_path(file: str) -> str:
    """Without the folder of installed packages, or relative to the current folder when it lies below."""
    _, found, inside = file.rpartition("site-packages" + os.sep)
    if found:
        return inside
    here = os.getcwd() + os.sep
    return file.removeprefix(here)


@dataclasses.dataclass(frozen=True)
class Where:
    """Place of a node in the user's model: module path, and the stack trace Dynamo recorded."""

    module: str = ""
    stack_trace: str = ""

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Where:
        """From the ``meta`` of an FX node."""
        path = ""
        for entry in (meta.get("nn_module_stack") or {}).values():
            path = entry[0]
        path = _LOCAL.sub(lambda m: m["name"], _ROOT.sub("", path))
        return cls(path, meta.get("stack_trace") or "")

    @property
    def line(self) -> str:
        """``file:line in function: code`` of the innermost frame outside torch and this package.

        When all frames are theirs, as in an nn.Sequential, torch's is taken before ours.
        """
        package, torch_folder = _library_folders()
        places = [(os.path.abspath(frame["file"]), frame) for frame in _FRAME.finditer(self.stack_trace)]
        users = [frame for file, frame in places if not file.startswith((package, torch_folder))]
        torchs = [frame for file, frame in places if file.startswith(torch_folder)]
        frames = users or torchs or [frame for _, frame in places]
        if not frames:
            return "source line unknown"
        last = frames[-1]
        code = last["code"].strip()
        return f"{_short_path(last['file'])}:{last['line']} in {last['function']}" + (f": {code}" if code else "")


@dataclasses.dataclass
class Site:
    """One place where a pass could act.

    Attributes:
        pass_name: the pass that judged it.
        status: "fused", "refused" or "nothing to fuse".
        op: the op inserted (``packet.overload``), or the anchor op that was left; "rope" for a rotation without one.
        provider: who runs the inserted op; empty unless fused.
        where: the module and line of the producer (the norm, the rotation of k), or of the anchor when there is none.
        anchors: the modules and lines of what the pass starts from (the quants, the cache write).
        spelling: how the producer was written, in the recogniser's terms.
        reason: why it was refused or what was found instead; empty when fused.
        notes: what a better variant would have needed, and other remarks.
        matched, replacement: text of the subgraphs, kept only for the debug dump.
    """

    pass_name: str
    status: str
    op: str
    where: Where
    anchors: tuple[Where, ...] = ()
    provider: str = ""
    spelling: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()
    matched: str = ""
    replacement: str = ""

    @property
    def anchor_kind(self) -> str:
        """What its anchors are: "quant", "cache write"."""
        return ANCHORS.get(self.pass_name, "anchor")

    def lines(self) -> list[str]:
        head = f"{self.op}" + (f" [{self.provider}]" if self.provider else "")
        out = [f"{head}  {self.where.module or '(no module)'}", f"    at {self.where.line}"]
        places: dict[str, list[str]] = {}
        for anchor in self.anchors:
            if anchor != self.where:
                places.setdefault(anchor.line, []).extend([anchor.module] if anchor.module else [])
        for line, modules in places.items():
            owners = f" for {', '.join(modules)}" if modules else ""
            out.append(f"    {self.anchor_kind}{owners} at {line}")
        if self.reason:
            out.append(f"    because {self.reason}")
        out += [f"    note: {note}" for note in self.notes]
        return out


@dataclasses.dataclass
class GraphReport:
    """What the passes did to one post-grad graph (a subgraph or a backward graph counts as its own)."""

    compile_id: str
    kind: str
    source: str
    nodes_before: int = 0
    nodes_after: int = 0
    ops_before: dict[str, int] = dataclasses.field(default_factory=dict)
    ops_after: dict[str, int] = dataclasses.field(default_factory=dict)
    sites: list[Site] = dataclasses.field(default_factory=list)
    pass_ms: float = 0.0
    messages: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        title = f"graph {self.compile_id} ({self.kind}), {self.source}"
        if self.source == CACHE_UNKNOWN:
            yield title
        else:
            yield f"{title}: {self.nodes_before} -> {self.nodes_after} nodes, passes took {self.pass_ms:.1f} ms"
        for message in self.messages:
            yield f"  {message}"
        names = [n for n in {**self.ops_before, **self.ops_after} if _is_shown(n)]
        if names:
            width = max(map(len, names))
            yield f"  {'op':<{width}}  before  after"
            for name in sorted(names):
                yield f"  {name:<{width}}  {self.ops_before.get(name, 0):6d}  {self.ops_after.get(name, 0):5d}"
        for status in (FUSED, REFUSED, NOTHING):
            sites = [s for s in self.sites if s.status == status]
            if sites:
                yield f"  {status} ({len(sites)}):"
                for site in sites:
                    yield from (f"    {line}" for line in site.lines())


@dataclasses.dataclass
class Report:
    """Everything a backend compiled, graph by graph, in order: ``print(report)``, or :meth:`to_dict` for tools."""

    graphs: list[GraphReport] = dataclasses.field(default_factory=list)

    def sites(self, status: str | None = None) -> list[Site]:
        """Sites of all graphs, or those with one status: "fused", "refused", "nothing to fuse"."""
        if status not in (None, FUSED, REFUSED, NOTHING):
            raise BadConfig(f"status: got {status!r}, allowed {FUSED!r}, {REFUSED!r}, {NOTHING!r} or None for all")
        return [s for g in self.graphs for s in g.sites if status is None or s.status == status]

    @property
    def fused(self) -> list[Site]:
        return self.sites(FUSED)

    @property
    def refused(self) -> list[Site]:
        return self.sites(REFUSED)

    @property
    def counts(self) -> dict[str, int]:
        """Fused sites per op packet, e.g. ``{"rmsnorm_mxfp4_quant": 5}``."""
        return dict(Counter(s.op.partition(".")[0] for s in self.fused))

    def to_dict(self) -> dict[str, Any]:
        return {"graphs": [dataclasses.asdict(g) for g in self.graphs]}

    def __str__(self) -> str:
        if not self.graphs:
            return "fusionpasses: nothing was compiled yet; call the compiled model once"
        fused = _plural(len(self.fused), "site") + " fused"
        anchors = Counter(s.anchor_kind for s in self.fused for _ in s.anchors)
        if anchors:
            fused += f" ({', '.join(_plural(count, kind) for kind, count in anchors.items())})"
        head = (
            f"fusionpasses: {_plural(len(self.graphs), 'graph')}, {fused}, {len(self.refused)} refused, "
            f"{len(self.sites(NOTHING))} with nothing to fuse"
        )
        return "\n".join([head, *map(str, self.graphs)])


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _is_shown(op: str) -> bool:
    """Our ops, and those of others that are named alike."""
    return "mxfp4" in op or "_mla" in op
