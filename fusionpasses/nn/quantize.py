"""``quantize_mxfp4(model)``: replaces ``nn.Linear`` by :class:`Mxfp4Linear`, in place, and says what it left."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from fusionpasses.errors import UnsupportedInput
from fusionpasses.nn import _compiled, _replaceable
from fusionpasses.nn.mxfp4_linear import Mxfp4Linear, check_act
from fusionpasses.ops import _mxfp4

log = logging.getLogger(__name__)

#: Last parts of names of modules that MXFP4 checkpoints leave in high precision.
_OUTPUTS = ("lm_head", "embed_out")
#: Any part of the name of a router.
_ROUTERS = ("router", "gate", "shared_expert_gate")
#: The halves of an adapter in peft's modules.
_ADAPTERS = ("lora_A", "lora_B")
#: Model types whose released checkpoint leaves attention in high precision.
_ATTENTION_KEPT = ("gpt_oss",)


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
        model: any module that holds linears, compiled or not.
        filter: ``filter(name, module)`` says whether a linear is quantised; given one, it alone decides, of a linear
            with several names for each of them. Without one, what released MXFP4 checkpoints keep in high precision is
            left: the output projection, routers, and the attention of GPT-OSS; and LoRA adapters. What cannot be
            quantised without harm is left in any case: a linear whose weight the code of a module that holds it reads,
            that has forward hooks or a forward of its own, that was compiled by itself, or that holds more than a
            weight and a bias. Other hooks (backward, of state_dict) go with the linear.
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
    returned, model = model, _compiled.unwrapped(model)
    if isinstance(model, nn.Linear):
        raise UnsupportedInput(
            "model: got an nn.Linear, which cannot be replaced in place; allowed: a module that holds linears. Use "
            "Mxfp4Linear.from_linear(linear)"
        )
    summary = QuantizeSummary()
    keep = _kept_by_default(model) if filter is None else None
    called_by_wrappers = _compiled.wrapped_by_themselves(model)
    modules = dict(_compiled.named_modules(model))
    replacements: dict[nn.Module, Mxfp4Linear] = {}
    names: dict[Any, list[str]] = {}  # linears are not told from other modules by their type
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)

    def reason_of(name: str, module: nn.Module) -> str | None:
        reason = _not_quantizable(module)
        if reason is None:
            reason = _replaceable.read_by(modules, _compiled.plain(name))
        if reason is None and module in called_by_wrappers:
            return "torch.compile was given it by itself, and what it returned goes on to call it"
        if reason is None and keep is not None:
            return keep(_compiled.plain(name), module)
        if reason is None and filter is not None and not filter(_compiled.plain(name), module):
            return "the filter said no"
        return reason

    for module, known_as in names.items():
        name = _compiled.plain(known_as[0])
        # Under all its names: a projection that is the output, too, is the output.
        reason = next((reason for each in known_as if (reason := reason_of(each, module)) is not None), None)
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
    return returned


def _not_quantizable(module: nn.Module) -> str | None:
    """None for a plain linear that fits, "" for a module without weights of its own, else the reason."""
    if type(module) is nn.Linear:
        lost = _replaceable.what_is_lost(module)
        if lost is not None:
            return lost
        if module.in_features % _mxfp4.BLOCK != 0 or module.in_features == 0:
            return f"in_features is not a multiple of {_mxfp4.BLOCK}"
        if module.weight.dtype not in _mxfp4.INPUT_DTYPES:
            return f"the weight is {module.weight.dtype}"
        if module.bias is not None and module.bias.dtype not in _mxfp4.INPUT_DTYPES:
            return f"the bias is {module.bias.dtype}"
        return None
    parameters = list(module.parameters(recurse=False))
    if any(nn.parameter.is_lazy(p) for p in parameters):
        return "it is not initialised yet"
    matrices = [p for p in parameters if p.dim() >= 2]
    if not matrices or isinstance(module, nn.Embedding):
        return ""
    return "not nn.Linear"


def _kept_by_default(model: nn.Module) -> Callable[[str, nn.Module], str | None]:
    outputs, embeddings = set(), set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            embeddings.add(module.weight)
        with contextlib.suppress(NotImplementedError):  # a part of a model that has none
            outputs.add(getattr(module, "get_output_embeddings", lambda: None)())

    def keep(name: str, module: nn.Module) -> str | None:
        parts = name.split(".")
        if any(part in _ADAPTERS for part in parts):
            return "a LoRA adapter, which is there to be trained"
        what = None
        if module in outputs or parts[-1] in _OUTPUTS or module.weight in embeddings:
            what = "the output projection"
        elif any(part in _ROUTERS for part in parts):
            what = "a router"
        elif _is_kept_attention(model, parts):
            what = "attention of GPT-OSS"
        return None if what is None else f"{what}, which MXFP4 checkpoints keep in high precision"

    return keep


def _is_kept_attention(model: nn.Module, parts: list[str]) -> bool:
    """Of a module that is, or is in, or holds such a model, however it is wrapped: its configuration is on the way."""
    holders = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    kinds = [getattr(getattr(holder, "config", None), "model_type", None) for holder in holders]
    return any(kind in _ATTENTION_KEPT for kind in kinds) and (
        "self_attn" in parts or any(type(holder).__name__.endswith("Attention") for holder in holders)
    )
