"""``FUSION_DEBUG_DUMP=dir``: writes what the passes saw and did, and changes nothing else.

::

    dir/rank0-pid1234/                    one per process; -1, -2 ... when the name is taken
      environment.txt                     versions and probe verdicts
      graph-000/                          one per post-grad graph, numbered as compiled
        0-rmsnorm_mxfp4_quant/
          spellings.txt                   every spelling and guard of the recogniser, printed from its tables
          before.py, after.py             the whole graph
          site-00-fused.txt               matched subgraph and its replacement; site-01-refused.txt: the reason
        1-fused_rope_mla_kv_cache/        the same of the next pass
        report.json, report.txt

Nothing is overwritten: folders are created exclusively, by process and by graph. Compile caches are bypassed while
the variable is set, because a cache hit runs no pass and there would be nothing to write.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from fusionpasses.errors import BadConfig

if TYPE_CHECKING:
    from torch import fx

    from fusionpasses.patterns._pass import FusionPass
    from fusionpasses.report import GraphReport

VARIABLE = "FUSION_DEBUG_DUMP"

_folders: dict[tuple[int, str], pathlib.Path] = {}


def _new_folder(parent: pathlib.Path, names: Iterable[str]) -> pathlib.Path:
    """Create the first folder of ``names`` (without end) that does not exist; safe against other processes."""
    parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = parent / name
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise RuntimeError("the names of a new folder ran out")


class DumpFolder:
    """The folder of this process under the directory that FUSION_DEBUG_DUMP names."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    @classmethod
    def from_environment(cls) -> DumpFolder | None:
        """The dump folder, made on first use in this process; None when the variable is unset or empty.

        Raises:
            BadConfig: the directory cannot be written.
        """
        directory = os.environ.get(VARIABLE)
        if not directory:
            return None
        directory = os.path.abspath(directory)
        key = (os.getpid(), directory)  # a forked child makes its own
        if key not in _folders:
            name = f"rank{_rank()}-pid{os.getpid()}"
            try:
                folder = _new_folder(
                    pathlib.Path(directory), itertools.chain([name], (f"{name}-{i}" for i in itertools.count(1)))
                )
                (folder / "environment.txt").write_text(_environment(), "utf-8")
            except OSError as error:
                raise BadConfig(
                    f"{VARIABLE}: got {directory!r}, which cannot be written ({error}); allowed a directory that "
                    "exists or can be made. Unset the variable to compile without dumps"
                ) from error
            _folders[key] = folder
        return cls(_folders[key])

    def graph(self) -> GraphDump:
        return GraphDump(_new_folder(self.path, (f"graph-{i:03d}" for i in itertools.count())))


class GraphDump:
    """The folder of one post-grad graph."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def _folder(self, number: int, fusion_pass: FusionPass) -> pathlib.Path:
        folder = self.path / f"{number}-{fusion_pass.name}"
        folder.mkdir(exist_ok=True)
        return folder

    def before(self, number: int, fusion_pass: FusionPass, module: fx.GraphModule) -> None:
        folder = self._folder(number, fusion_pass)
        (folder / "spellings.txt").write_text(tables(fusion_pass), "utf-8")
        (folder / "before.py").write_text(_readable(module, "before", fusion_pass.name), "utf-8")

    def after(self, number: int, fusion_pass: FusionPass, module: fx.GraphModule) -> None:
        folder = self._folder(number, fusion_pass)
        (folder / "after.py").write_text(_readable(module, "after", fusion_pass.name), "utf-8")
        for i, site in enumerate(fusion_pass.sites):
            text = "\n".join(site.lines()) + "\n"
            if site.matched:
                text += f"\nmatched:\n{site.matched}\n\nreplaced by:\n{site.replacement}\n"
            (folder / f"site-{i:02d}-{site.status.replace(' ', '-')}.txt").write_text(text, "utf-8")

    def joined(self, number: int, lines: list[str], module: fx.GraphModule) -> None:
        """The graph once quants and products were joined (``then_gemm.py``), if some were."""
        folder = self.path / f"{number}-then_gemm"
        folder.mkdir(exist_ok=True)
        (folder / "after.py").write_text(_readable(module, "after", "then_gemm"), "utf-8")
        (folder / "joined.txt").write_text("\n".join(lines) + "\n", "utf-8")

    def finish(self, report: GraphReport) -> None:
        (self.path / "report.json").write_text(json.dumps(asdict(report), indent=1), "utf-8")
        (self.path / "report.txt").write_text(f"{report}\n", "utf-8")


def tables(fusion_pass: FusionPass) -> str:
    """The tables a pass executes, as text."""
    lines = [f"pass {fusion_pass.name}", "", "anchors:"]
    lines += [f"  {anchor.schema}\n      {_meaning(asdict(anchor))}" for anchor in fusion_pass.anchors.values()]
    if fusion_pass.targets:
        lines += ["", "nodes where a site may begin:"]
        lines += [f"  {target}" for target in fusion_pass.targets]
    for title, spellings in fusion_pass.spellings.items():
        lines += ["", f"{title}:"]
        for spelling in spellings:
            lines.append(f"  [{spelling.name}]")
            if spelling.pattern is not None:
                lines += [f"      {line}" for line in spelling.text().splitlines()]
    for title, guards in fusion_pass.guards.items():
        lines += ["", f"guards, {title}:"]
        lines += [f"  {guard.name}: {guard.requires}" for guard in guards]
    return "\n".join(lines) + "\n"


def _meaning(values: dict[str, object]) -> str:
    """What was registered of an op, from the fields of its anchor. An argument that carries a value stands for it."""
    told = {name: value for name, value in values.items() if name not in ("op", "schema") and value not in (None, ())}
    return ", ".join(f"{name}={value!r}" for name, value in told.items() if values.get(f"{name}_argument") is None)


def _readable(module: fx.GraphModule, stage: str, name: str) -> str:
    from torch._dynamo.utils import lazy_format_graph_code  # type: ignore[attr-defined]

    from fusionpasses.pipeline import readable

    # depyf.prepare_debug wraps this function of Dynamo's and writes what passes through it into its own folder.
    str(lazy_format_graph_code(f"fusionpasses {stage} {name}", module))
    return readable(module)


def _rank() -> int:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")  # set by launchers before the process group exists
    return int(rank) if rank.isdecimal() else 0


def _environment() -> str:
    import torch

    from fusionpasses import probes, providers

    lines = [f"torch {torch.__version__}"]
    lines += [f"{name}: {probe().why}" for name, probe in (("triton", probes.probe_triton), ("gpu", probes.probe_gpu))]
    for kind in ("cpu", "cuda"):
        for op, verdicts in providers.summary(kind).items():
            lines += [f"{kind} {op} {provider}: {text}" for provider, text in verdicts.items()]
    return "\n".join(lines) + "\n"
