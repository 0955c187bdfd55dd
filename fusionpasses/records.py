"""Reports kept beside Inductor's compile cache, because a cache hit runs no pass.

A record is found by the identity of the passes and a hash of the Dynamo graph, its input metadata, the GPU and the
settings in force, all known before compilation. Source lines are not in the hash: a site is stored with the index of
the graph node it came from, and its place is read from the current graph when the record is used.

Records also travel with ``torch.compiler.save_cache_artifacts()``. A process that loads such a bundle must have
imported fusionpasses before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fusionpasses.report import CACHE_UNKNOWN, FROM_CACHE, GraphReport, Site, Where

log = logging.getLogger(__name__)

_FORMAT = 1


def graph_key(identity: object, patches: Mapping[str, object], gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Name of the record of a Dynamo graph. Graphs that share a key compile to the same post-grad graphs.

    The same in every process, and for every graph that differs in names only, because Inductor's cache does not see
    those either: node and symbol names are numbered, addresses left out, sets and dicts sorted.

    Args:
        identity: the uuid of all passes at our hook, ours and the user's.
        patches: Inductor's config patches of this compilation.
        gm, inputs: as Dynamo hands them to the backend.
    """
    from torch._inductor import config

    # With grad mode off, or on and nothing that requires grad, AOTAutograd traces the same inference graph; freezing
    # asks for grad mode itself.
    grad = torch.is_grad_enabled()
    needs = [v.requires_grad for v in (*inputs, *gm.parameters()) if isinstance(v, torch.Tensor)]
    autograd = (needs if grad and any(needs) else [], grad and patches.get("freezing", config.freezing))
    text = [_text((_FORMAT, identity, patches, _ambient(), autograd), {})]
    # The fake values of the inputs, not the inputs: there a dynamic size is a symbol, and its first value is not known.
    given = iter(inputs)
    for name, module in gm.named_modules():
        if isinstance(module, fx.GraphModule):
            numbers = {node: i for i, node in enumerate(module.graph.nodes)}
            text.append(f"graph {name}")
            for node in numbers:
                target, value = node.target, None
                if node.op == "placeholder":
                    target = ""
                    value = node.meta.get("example_value", next(given, None) if module is gm else None)
                elif node.op == "get_attr":
                    value = node.meta.get("example_value")
                text.append(_text((node.op, target, node.args, node.kwargs, value), numbers))
        else:
            text.append(f"module {name} {type(module).__qualname__}")
    symbols: dict[str, str] = {}
    numbered = _SYMBOL.sub(lambda m: symbols.setdefault(m[0], f"symbol{len(symbols)}"), "\n".join(text))
    return hashlib.sha256(numbered.encode()).hexdigest()


def _ambient() -> tuple[object, ...]:
    """Settings of this process that decide what AOTAutograd and Inductor make of a graph."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.codecache import CacheBase

    return (
        CacheBase.get_system()["hash"],  # in Inductor's key, too: a report may speak of the GPU
        [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)],
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch._inductor.config.save_config_portable(),
        {k: v for k, v in torch._functorch.config.save_config_portable().items() if k not in _CHECKS_ONLY},
    )


#: Settings that raise or warn and change no graph; torch sets this one by the variable CI.
_CHECKS_ONLY = ("error_on_custom_op_aliasing",)


_SIMPLE = (str, int, float, bool, type(None))
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_SYMBOL = re.compile(r"\b(?:s|u|zf|zuf)\d+\b")  # sizes and floats, backed and unbacked, as ShapeEnv names them


def _text(value: object, numbers: Mapping[fx.Node, int]) -> str:
    """``repr(value)`` as every process would give it; tensors by metadata, nodes by number."""
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if type(value) in _SIMPLE:
        return repr(value)
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(map(str, (*value.shape, *value.stride())))
        return f"{value.dtype} [{sizes}] {value.device}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_text(k, numbers)}: {_text(v, numbers)}' for k, v in value.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_text(v, numbers) for v in value))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v, numbers) for v in value)}]"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), numbers)}"
    plain = _ADDRESS.sub("", repr(value))
    # Functions of the same name in two modules are two functions.
    return f"{getattr(value, '__module__', '')} {plain}" if callable(value) else plain


class SourceIndex:
    """Places of a Dynamo graph's nodes, in an order that moving and renaming does not change.

    Taken before compile_fx, which takes the graph over.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._places = [
            Where.of(node.meta)
            for module in gm.modules()
            if isinstance(module, fx.GraphModule)
            for node in module.graph.nodes
        ]
        self._index: dict[Where, int] = {}
        for i, place in enumerate(self._places):
            self._index.setdefault(place, i)

    def shorten(self, where: Where) -> int | str:
        """The node's number, or the module when its place is that of no node."""
        return self._index.get(where, where.module)

    def lengthen(self, short: int | str) -> Where:
        return self._places[short] if isinstance(short, int) else Where(short)


def encode(reports: Iterable[GraphReport], index: SourceIndex) -> bytes:
    """Reports as JSON, their places replaced by numbers of nodes in the Dynamo graph."""
    graphs = []
    for report in reports:
        plain = {f.name: getattr(report, f.name) for f in dataclasses.fields(report) if f.name != "sites"}
        plain["sites"] = [
            {
                **{f.name: getattr(s, f.name) for f in dataclasses.fields(s)},
                "where": index.shorten(s.where),
                "anchors": [index.shorten(a) for a in s.anchors],
                "matched": "",
                "replacement": "",
            }
            for s in report.sites
        ]
        graphs.append(plain)
    return json.dumps({"format": _FORMAT, "graphs": graphs}).encode()


def decode(content: bytes, index: SourceIndex, compile_id: str) -> list[GraphReport]:
    """Reports of a record, marked "from cache", with the places of this graph's nodes."""
    reports = []
    for plain in json.loads(content)["graphs"]:
        sites = [
            Site(
                **{
                    **s,
                    "where": index.lengthen(s["where"]),
                    "anchors": tuple(index.lengthen(a) for a in s["anchors"]),
                    "notes": tuple(s["notes"]),
                }
            )
            for s in plain.pop("sites")
        ]
        source = CACHE_UNKNOWN if plain["source"] == CACHE_UNKNOWN else FROM_CACHE
        reports.append(GraphReport(**{**plain, "source": source, "compile_id": compile_id}, sites=sites))
    return reports


def _path(key: str) -> pathlib.Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return pathlib.Path(cache_dir()) / "fusionpasses" / f"{key}.json"


def _write(key: str, content: bytes) -> None:
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed, so that another process never reads half a record.
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def store(key: str, reports: Iterable[GraphReport], index: SourceIndex) -> None:
    """Keep the reports of a compilation. A cache that cannot be written costs the record, not the compilation."""
    content = encode(reports, index)
    try:
        _write(key, content)
    except OSError as error:
        log.warning("the report could not be stored beside the compile cache: %s", error)
        return
    _announce(key, content)


def load(key: str, index: SourceIndex, compile_id: str) -> list[GraphReport] | None:
    """The stored reports, or None when there is no record or it cannot be read."""
    try:
        content = _path(key).read_bytes()
        reports = decode(content, index, compile_id)
        for report in reports:
            str(report)  # a record that cannot be printed is as bad as one that cannot be parsed
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        log.warning("a stored report could not be read, and is ignored: %s: %s", _path(key), error)
        return None
    _announce(key, content)
    return reports


# --- torch.compiler.save_cache_artifacts / load_cache_artifacts ------------------------------------------------------

_ARTIFACT = "fusionpasses_report"


@contextlib.contextmanager
def _optional() -> Iterator[None]:
    """Guards use of torch's private cache artifacts: without them reports do not travel, and all else works."""
    try:
        yield
    except (ImportError, AttributeError, TypeError, AssertionError) as error:
        log.debug("reports will not be in torch.compiler.save_cache_artifacts(): %s: %s", type(error).__name__, error)


def _announce(key: str, content: bytes) -> None:
    """Add the record to what ``torch.compiler.save_cache_artifacts()`` saves."""
    with _optional():
        from torch.compiler._cache import CacheArtifactManager

        CacheArtifactManager.record_artifact(_ARTIFACT, key, content)


def register_artifact() -> None:
    """Teach torch's cache artifacts our records.

    Runs when fusionpasses is imported, because ``load_cache_artifacts`` drops a whole bundle that holds a kind of
    artifact it does not know.
    """
    with _optional():
        from torch.compiler._cache import CacheArtifact, CacheArtifactFactory

        if _ARTIFACT in CacheArtifactFactory._artifact_types:
            return

        @CacheArtifactFactory.register
        class ReportArtifact(CacheArtifact):
            def populate_cache(self) -> None:
                try:
                    _write(self.key, self.content)
                except OSError as error:
                    log.warning("a report could not be stored beside the compile cache: %s", error)

            @staticmethod
            def type() -> str:
                return _ARTIFACT
