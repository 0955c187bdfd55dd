"""``quantize_mxfp4(model)``: replaces ``nn.Linear`` by :class:`Mxfp4Linear`, in place, and says what it left."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from torch import nn

from fusionpasses.errors import UnsupportedInput
from fusionpasses.nn.mxfp4_linear import Mxfp4Linear, check_act
from fusionpasses.ops import _mxfp4

log = logging.getLogger(__name__)

#: Last parts of module names that MXFP4 checkpoints leave in high precision, and what they are.
_KEPT_NAMES = {
    "lm_head": "the output projection",
    "embed_out": "the output projection",
    "router": "a router",
    "gate": "a router",
    "shared_expert_gate": "a router",
}
#: Parts of names that the released checkpoint of a model type leaves in high precision.
_KEPT_BY_MODEL = {"gpt_oss": ("self_attn",)}


@dataclasses.dataclass
class QuantizeSummary:
    """What :func:`quantize_mxfp4` did: names of quantised modules, and the reason for each that was left."""

    quantized: list[str] = dataclasses.field(default_factory=list)
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"quantize_mxfp4: {len(self.quantized)} modules quantised, {len(self.left)} left"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"  left, {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
        return "\n".join(lines)


_last = QuantizeSummary()


def last_quantization() -> QuantizeSummary:
    """Summary of the last :func:`quantize_mxfp4` of this process."""
    return _last


def quantize_mxfp4(
    model: nn.Module,
    filter: Callable[[str, nn.Module], bool] | None = None,
    *,
    act: str = "mxfp4",
    scale_mode: str = "even",
) -> nn.Module:
    """Replace the ``nn.Linear`` modules of ``model`` by :class:`Mxfp4Linear`, in place.

    Args:
        model: any module that holds linears.
        filter: ``filter(name, module)`` says whether a linear is quantised; given one, it alone decides. Without one,
            what released MXFP4 checkpoints keep in high precision is left: the output projection, routers, and the
            attention of GPT-OSS.
        act: "mxfp4" quantises the inputs of these linears, too (W4A4); "none" does not (weight-only).
        scale_mode: "even", "floor", "rceil" or "ceil".

    Returns:
        ``model``. ``fusionpasses.last_quantization()`` has the list of what was quantised and what was left, and why.

    Raises:
        UnsupportedInput: a weight that cannot be quantised, or ``model`` is itself a linear. Nothing was changed.
    """
    global _last
    check_act(act)
    _mxfp4.check_scale_mode(scale_mode)
    if not isinstance(model, nn.Module):
        raise UnsupportedInput(f"model: got {type(model).__name__}, allowed a torch.nn.Module")
    if filter is not None and not callable(filter):
        raise UnsupportedInput(f"filter: got {filter!r}, allowed a function of (name, module) that returns a bool")
    if isinstance(model, nn.Linear):
        raise UnsupportedInput(
            "model: got an nn.Linear, which cannot be replaced in place; allowed: a module that holds linears. Use "
            "Mxfp4Linear.from_linear(linear)"
        )
    summary = QuantizeSummary()
    keep = _kept_by_default(model) if filter is None else None
    replacements: dict[nn.Module, Mxfp4Linear] = {}
    for name, module in model.named_modules():
        reason = _not_quantizable(module)
        if reason is None and keep is not None:
            reason = keep(name, module)
        elif reason is None and filter is not None and not filter(name, module):
            reason = "the filter said no"
        if reason is not None:
            if reason:
                summary.left[name] = reason
            continue
        try:
            replacements[module] = Mxfp4Linear.from_linear(module, act=act, scale_mode=scale_mode)
        except UnsupportedInput as error:
            raise UnsupportedInput(f"module {name!r}: {error}") from None
        summary.quantized.append(name)
    # Only now is the model touched: every weight has been quantised. A linear used under two names stays shared.
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():  # named_children() would skip the second name
            if child in replacements:
                setattr(parent, child_name, replacements[child])
    if not replacements:
        log.warning("quantize_mxfp4 quantised nothing. %s", summary)
    else:
        log.info("%s", summary)
    _last = summary
    return model


def _not_quantizable(module: nn.Module) -> str | None:
    """None for a plain linear that fits, "" for a module without weights of its own, else the reason."""
    if type(module) is nn.Linear:
        if module.in_features % _mxfp4.BLOCK != 0 or module.in_features == 0:
            return f"in_features is not a multiple of {_mxfp4.BLOCK}"
        if module.weight.dtype not in _mxfp4.INPUT_DTYPES:
            return f"the weight is {module.weight.dtype}"
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has forward hooks, which a new module would lose"
        return None
    matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
    if not matrices or isinstance(module, nn.Embedding):
        return ""
    return "not nn.Linear"


def _kept_by_default(model: nn.Module) -> Callable[[str, nn.Module], str | None]:
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    parts_kept = _KEPT_BY_MODEL.get(getattr(getattr(model, "config", None), "model_type", ""), ())

    def keep(name: str, module: nn.Module) -> str | None:
        parts = name.split(".")
        what = "the output projection" if module is outputs else _KEPT_NAMES.get(parts[-1])
        if what is None and any(p in parts for p in parts_kept):
            what = "attention of GPT-OSS"
        return None if what is None else f"{what}, which MXFP4 checkpoints keep in high precision"

    return keep
