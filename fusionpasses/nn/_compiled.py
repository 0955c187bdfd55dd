"""Modules that ``torch.compile`` returned: what they wrap, and the names that it has without them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

#: The submodule that is the module itself.
_WRAPPED = "_orig_mod"


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that was compiled, or ``model``."""
    inner = model._modules.get(_WRAPPED)  # which may be empty, and then false
    return model if inner is None else inner


def plain(name: str) -> str:
    """A submodule's name without wrappers."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules(remove_duplicate=False)``, with plain names; of equal ones the last is no wrapper."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield plain(name), module


def wrapped_by_themselves(model: nn.Module) -> set[nn.Module]:
    """Submodules that wrappers call. A wrapper goes on to call the one that it was made for, whatever replaces it."""
    return {module._modules[_WRAPPED] for module in model.modules() if module._modules.get(_WRAPPED) is not None}  # type: ignore[misc]
