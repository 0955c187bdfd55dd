"""What of a checkpoint goes where in a model, decided from headers alone, so that a bad checkpoint changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusionpasses.errors import BadCheckpoint
from fusionpasses.nn import _compiled, _replaceable
from fusionpasses.nn._checkpoint_files import Entry
from fusionpasses.nn.checkpoint_reader import Checkpoint
from fusionpasses.nn.mxfp4_linear import Mxfp4Linear

#: At most so many names or problems are listed in one message.
_LISTED = 12
#: Last parts of the names of static scales of outputs, and of a cache.
_OUTPUT_SCALES = ("output_scale", "k_scale", "v_scale", "kv_scale")
_FLOATING = ("BF16", "F16", "F32", "F64")


@dataclasses.dataclass(eq=False)
class Slot:
    """A parameter or persistent buffer; tied ones are one slot with several names and holders."""

    tensor: Tensor
    names: list[str] = dataclasses.field(default_factory=list)
    holders: list[tuple[nn.Module, str]] = dataclasses.field(default_factory=list)

    def fill(self, value: Tensor) -> None:
        parameter = nn.Parameter(value, requires_grad=self.tensor.requires_grad and value.is_floating_point())
        for module, attribute in self.holders:
            if attribute in module._parameters:
                module._parameters[attribute] = parameter
            else:
                module._buffers[attribute] = value


@dataclasses.dataclass
class Plan:
    """Names of the checkpoint by what is done with them, and buffers that no checkpoint has."""

    plain: dict[str, Slot] = dataclasses.field(default_factory=dict)
    linears: dict[str, nn.Linear | Mxfp4Linear] = dataclasses.field(default_factory=dict)
    experts: dict[str, tuple[Slot, bool]] = dataclasses.field(default_factory=dict)  # and whether it is [E, K, N]
    ignored: list[str] = dataclasses.field(default_factory=list)
    computed: dict[str, tuple[nn.Module, str, Tensor]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.plain, *self.linears, *self.experts]


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Every name of a parameter or persistent buffer. The packed codes of an Mxfp4Linear go by the name ``weight``."""
    by_tensor: dict[int, Slot] = {}
    slots: dict[str, Slot] = {}
    volatile: list[tuple[nn.Module, str, Tensor]] = []
    for prefix, module in _compiled.named_modules(model):
        tensors = {**module._parameters, **module._buffers}
        if isinstance(module, Mxfp4Linear):
            tensors["weight"] = tensors.pop("weight_packed")
            del tensors["weight_scale"]
        for attribute, tensor in tensors.items():
            if tensor is None:
                continue
            if attribute in module._non_persistent_buffers_set:
                volatile.append((module, attribute, tensor))
                continue
            slot = by_tensor.setdefault(id(tensor), Slot(tensor))
            name = f"{prefix}.{attribute}" if prefix else attribute
            slot.names.append(name)
            if not any(m is module and a == attribute for m, a in slot.holders):
                slot.holders.append((module, attribute))
            slots[name] = slot
    for module, attribute, tensor in volatile:  # a second name of what has one, without being in a state_dict itself
        if id(tensor) in by_tensor and (module, attribute) not in by_tensor[id(tensor)].holders:
            by_tensor[id(tensor)].holders.append((module, attribute))
    return slots


def make_plan(model: nn.Module, checkpoint: Checkpoint, ignore: Sequence[str], dequantize_experts: bool) -> Plan:
    """Match a checkpoint with a model.

    Raises:
        BadCheckpoint: naming every tensor that does not fit, up to a dozen.
    """
    plan, slots = Plan(), slots_of(model)
    modules: dict[str, Any] = dict(_compiled.named_modules(model))
    called_by_wrappers = _compiled.wrapped_by_themselves(model)
    problems: list[str] = []
    unexpected: list[str] = []
    may_be_extra = _extra(model, ignore, checkpoint)
    for name, entry in checkpoint.entries.items():
        slot = slots.get(name)
        if slot is None:
            (plan.ignored if may_be_extra(name) else unexpected).append(name)
            continue
        module = modules[name.rpartition(".")[0]]
        if not entry.quantized:
            problem = _misfit(entry, slot, module)
            plan.plain[name] = slot
        elif type(module) in (nn.Linear, Mxfp4Linear) and name.endswith("weight"):
            if isinstance(module, Mxfp4Linear):
                stays = _replaceable.what_is_lost(module, ("weight_packed", "weight_scale", "bias"))
            else:
                stays = _replaceable.what_is_lost(module)
                stays = stays or _replaceable.read_by(modules, name.removesuffix(".weight"))
            if module in called_by_wrappers:
                stays = "torch.compile was given it by itself, and what it returned goes on to call it"
            problem = _linear_misfit(entry, slot, module, stays)
            plan.linears[name] = module
        elif getattr(module, "is_transposed", None) is not None and len(entry.shape) == 3:
            problem = _experts_misfit(entry, slot, module, dequantize_experts)
            plan.experts[name] = slot, bool(module.is_transposed)
        else:
            problem = (
                f"{entry.tensor}: got MXFP4 for a parameter of {type(module).__name__}, allowed nn.Linear; this module "
                "has no MXFP4 form"
            )
        problems += [problem] if problem else []
    if unexpected:
        experts = any(".experts." in name for name in unexpected)
        problems.append(
            f"{_some(unexpected)}: got tensors that the model does not have, allowed its names; "
            + (
                "experts that are stored one by one cannot be loaded into a module that holds them together"
                if experts
                else "is it the model of this checkpoint? ignore=['pattern'] leaves them"
            )
        )
    filled = {id(slots[name]) for name in plan.names}
    missing = [s.names[0] for s in dict.fromkeys(slots.values()) if id(s) not in filled]
    if missing:
        problems.append(
            f"{_some(missing)}: got no such tensors in the checkpoint, allowed all of the model's; is it the model of "
            "this checkpoint?"
        )
    for name, module, attribute, value in _tensors_without_data(model):
        if attribute in module._buffers:
            computed = _computed(model, name, module, attribute)
            if computed is not None:
                plan.computed[name] = (module, attribute, computed)
                continue
        problems.append(
            f"{name!r} ({value.dtype} {list(value.shape)}): got no data for it, which checkpoints do not have; allowed "
            "buffers that the model's _init_weights computes. Build that module on a real device"
        )
    if problems:
        more = f"\n... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise BadCheckpoint(
            f"{checkpoint.path} does not fit the model, which was not changed:\n" + "\n".join(problems[:_LISTED]) + more
        )
    return plan


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def _extra(model: nn.Module, ignore: Sequence[str], checkpoint: Checkpoint) -> Any:
    """Which tensors a model may lack: what the caller says, what the class of a transformers model does, and static
    scales of outputs, which nothing here quantises."""
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()

    def may_be_extra(name: str) -> bool:
        of_outputs = bool(checkpoint.outputs) and name.rpartition(".")[2] in _OUTPUT_SCALES
        return of_outputs or any(fnmatch.fnmatchcase(name, p) for p in ignore) or any(re.search(p, name) for p in own)

    return may_be_extra


def _misfit(entry: Entry, slot: Slot, module: nn.Module) -> str | None:
    if isinstance(module, Mxfp4Linear) and entry.name.endswith("weight"):
        return f"{entry.tensor}: got a weight that is not MXFP4, allowed MXFP4: the model has an Mxfp4Linear there"
    if nn.parameter.is_lazy(slot.tensor):
        return (
            f"{entry.tensor}: got a {type(module).__name__} that has no shape yet, allowed one that has; call it once"
        )
    if tuple(slot.tensor.shape) != entry.shape:
        return f"{entry.tensor}: got shape {list(entry.shape)}, allowed {list(slot.tensor.shape)}, the model's"
    if slot.tensor.is_floating_point() != (entry.tensor.dtype in _FLOATING):
        return (
            f"{entry.tensor}: got {entry.tensor.dtype}, allowed what is of the kind of {slot.tensor.dtype}, the model's"
        )
    return None


def _linear_misfit(entry: Entry, slot: Slot, module: Any, stays: str | None) -> str | None:
    wanted = (module.out_features, module.in_features)
    if entry.shape != wanted:
        return f"{entry.tensor}: got values of shape {list(entry.shape)}, allowed {list(wanted)}, those of the linear"
    if any(holder is not module for holder, _ in slot.holders):
        return f"{entry.tensor}: got MXFP4 for tied weights ({_some(slot.names)}), allowed MXFP4 for one linear's own"
    if stays is not None:
        return (
            f"{entry.tensor}: got MXFP4 for a linear that has to stay: {stays}; allowed one that can be replaced. "
            "Load into the model as it was built, and change it afterwards"
        )
    return None


def _experts_misfit(entry: Entry, slot: Slot, module: Any, dequantize_experts: bool) -> str | None:
    if not dequantize_experts:
        return (
            f"{entry.tensor}: got experts in MXFP4, allowed linears; {type(module).__name__} computes with unpacked "
            "ones. dequantize_experts=True unpacks them, at four times the memory"
        )
    experts, rows, columns = entry.shape
    wanted = (experts, columns, rows) if module.is_transposed else entry.shape
    if tuple(slot.tensor.shape) != wanted:
        return f"{entry.tensor}: got experts that unpack to {list(wanted)}, allowed {list(slot.tensor.shape)}"
    return None


def _tensors_without_data(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Meta tensors that no state_dict has: non-persistent buffers, and plain attributes of modules."""
    for prefix, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        volatile = {k: v for k, v in module._buffers.items() if k in module._non_persistent_buffers_set}
        for attribute, tensor in {**plain, **volatile}.items():
            if tensor is not None and tensor.is_meta:
                yield (f"{prefix}.{attribute}" if prefix else attribute), module, attribute, tensor


def _computed(model: nn.Module, name: str, module: nn.Module, attribute: str) -> Tensor | None:
    """A non-persistent buffer, such as rotary inv_freq, by the ``_init_weights`` of the transformers model it is in.

    Done twice, on copies whose buffer holds other bytes before: if the results differ, something was left unset, or is
    random, and nobody knows its value.
    """
    parts = name.split(".")[:-1]
    owners = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts), -1, -1)]
    initialize: Any = next((owner._init_weights for owner in owners if hasattr(owner, "_init_weights")), None)
    if initialize is None:
        return None
    results: list[Tensor] = []
    for byte in (0x55, 0x2A):
        twin = copy.deepcopy(module)
        for key, buffer in twin._buffers.items():
            if buffer is not None and buffer.is_meta:
                real = torch.empty_like(buffer, device="cpu")
                real.view(-1).view(torch.uint8).fill_(byte)
                twin._buffers[key] = real
        with torch.no_grad(), torch.device("cpu"):
            initialize(twin)
        results.append(getattr(twin, attribute))
    first, second = results
    return first if not first.is_meta and torch.equal(first, second) else None
