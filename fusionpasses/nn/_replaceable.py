"""Why a linear has to stay: what a new module in its place would lose, or does not have."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn


def what_is_lost(linear: nn.Module, tensors: Collection[str] = ("weight", "bias")) -> str | None:
    """Of a linear whose own tensors have these names."""
    if "forward" in vars(linear):
        return "its forward was replaced, which a new module would lose"
    parts = {*linear._parameters, *linear._buffers, *linear._modules} - {"parametrizations"}
    if not parts <= {*tensors}:
        return "it has more than a weight and a bias"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it has forward hooks, which a new module would lose"
    return None


def read_by(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Does a module that holds the one of this name read its weight itself, which an Mxfp4Linear does not have?

    ``modules`` by name, all that hold it among them. Told by their code: ``self.blocks[0].mlp.fc2.weight``.
    """
    parts = name.split(".")
    for i in range(len(parts)):
        holder: Any = type(modules[".".join(parts[:i])])  # mypy knows no class as Hashable
        for path in _weights_read_by(holder):
            if len(path) == len(parts) - i and all(map(_may_be, path, parts[i:])):
                return f"{holder.__name__} reads its weight"
    return None


#: In a path, a part that is known when the code runs.
_ANY = ""


def _may_be(part: str, name: str) -> bool:
    return part in (_ANY, name)


@functools.cache
def _weights_read_by(module: Any) -> frozenset[tuple[str, ...]]:
    """Paths to the modules whose weight the code of one reads when it runs, as far as its source is there."""
    paths: set[tuple[str, ...]] = set()
    bases = [base for base in module.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    for method in (value for base in bases for value in vars(base).values()):
        method = method.fget if isinstance(method, property) else method
        if inspect.isfunction(method) and not re.search("init|reset", method.__name__):
            with contextlib.suppress(OSError, TypeError):  # no source
                for path in re.findall(r"\bself((?:\.\w+|\[[^][]+\])+)\.weight\b", inspect.getsource(method)):
                    paths.add(tuple(map(_part, re.findall(r"\w+|\[[^][]+\]", path.replace("[", ".[")))))
    return frozenset(paths)


def _part(text: str) -> str:
    """Of a path as it is written: a name, or what is in brackets if that says which module."""
    if not text.startswith("["):
        return text
    literal = re.fullmatch(r"""\[(?:["'](\w+)["']|(\d+))\]""", text)
    return _ANY if literal is None else literal[1] or literal[2]
