"""Why a linear has to stay: what a new module in its place would lose, or does not have."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from typing import Any

from torch import nn

from fusionpasses.nn.mxfp4_linear import Mxfp4Linear


def what_is_lost(linear: nn.Linear | Mxfp4Linear) -> str | None:
    """Of an nn.Linear or Mxfp4Linear."""
    if "forward" in vars(linear):
        return "its forward was replaced, which a new module would lose"
    packed = isinstance(linear, Mxfp4Linear)
    own = {"weight_packed", "weight_scale", "bias"} if packed else {"weight", "bias"}
    buffers = set(linear._buffers) - own if packed else set(linear._buffers)
    if set(linear._parameters) - own or buffers or linear._modules:
        return "it has more than a weight and a bias"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it has forward hooks, which a new module would lose"
    return None


def read_by(holder: nn.Module, child: str) -> str | None:
    """Does the module that holds this one read its weight itself, which an Mxfp4Linear does not have?"""
    kind: Any = type(holder)  # mypy knows no class as Hashable
    return f"{kind.__name__} reads its weight" if child in _weights_read_by(kind) else None


@functools.cache
def _weights_read_by(module: Any) -> frozenset[str]:
    """Names of children whose weight the code of a module reads when it runs, as far as its source is there."""
    names: set[str] = set()
    bases = [base for base in module.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    for method in (value for base in bases for value in vars(base).values()):
        if inspect.isfunction(method) and not re.search("init|reset", method.__name__):
            with contextlib.suppress(OSError, TypeError):  # no source
                names |= set(re.findall(r"\bself\.(\w+)\.weight\b", inspect.getsource(method)))
    return frozenset(names)
