"""``load_checkpoint(model, path)``: fills a model from an MXFP4 checkpoint, and says what is quantised and what is not.

What the checkpoint holds in MXFP4 becomes :class:`Mxfp4Linear`; what it left in high precision stays as it is. Nothing
is quantised here, and nothing is unpacked unless asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusionpasses.errors import BadCheckpoint, UnsupportedInput
from fusionpasses.nn import _compiled
from fusionpasses.nn._checkpoint_files import Entry
from fusionpasses.nn._checkpoint_plan import Plan, Slot, make_plan
from fusionpasses.nn._checkpoint_settings import ACTS
from fusionpasses.nn.checkpoint_reader import Checkpoint, Mxfp4Weight, open_checkpoint
from fusionpasses.nn.mxfp4_linear import Mxfp4Linear
from fusionpasses.ops import _mxfp4

log = logging.getLogger(__name__)


@dataclasses.dataclass
class LoadSummary:
    """What :func:`load_checkpoint` did.

    Attributes:
        format, act, scale_mode: of the checkpoint, or as the caller said.
        quantized: names of the linears that are Mxfp4Linear now.
        left: names of the linears that are not, and why.
        dequantized: parameters that were unpacked.
        tied: names that share the tensor of another name, and that name.
        computed: buffers that no checkpoint has, computed by the model.
        ignored: tensors of the checkpoint that the model does not have.
        dtypes: how many tensors that are not MXFP4 have each dtype.
        outputs: entries of the configuration that want outputs quantised, for a cache in fp8 for example. They are not.
    """

    format: str
    act: str
    scale_mode: str
    quantized: list[str] = dataclasses.field(default_factory=list)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    dequantized: list[str] = dataclasses.field(default_factory=list)
    tied: dict[str, str] = dataclasses.field(default_factory=dict)
    computed: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)
    dtypes: dict[torch.dtype, int] = dataclasses.field(default_factory=dict)
    outputs: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        others = ", ".join(f"{count} of {dtype}" for dtype, count in self.dtypes.items())
        lines = [
            f"load_checkpoint: {self.format}, {len(self.quantized)} linears in MXFP4 (act {self.act!r}, scale mode "
            f"{self.scale_mode!r}), {len(self.left)} left; other tensors: {others or 'none'}"
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"  left, {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
        lines += [f"  {name} is {other}" for name, other in self.tied.items()]
        for what, names in (
            ("unpacked", self.dequantized),
            ("computed by the model", self.computed),
            ("in the checkpoint but not in the model", self.ignored),
            ("not quantised, though the configuration wants it", self.outputs),
        ):
            lines += [f"  {what}: {', '.join(names)}"] if names else []
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    checkpoint: Checkpoint | str | pathlib.Path,
    *,
    act: str | None = None,
    scale_mode: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    ignore: Sequence[str] = (),
    dequantize_experts: bool = False,
    progress: bool = True,
) -> LoadSummary:
    """Fill ``model`` from an MXFP4 checkpoint, in place.

    Args:
        model: built on the meta device (``with torch.device("meta"):``), or with data, which then stays in memory until
            the checkpoint has been read; compiled or not. Its names are the checkpoint's. Tied weights need to be there
            once.
        checkpoint: a path (see :func:`open_checkpoint`), or an opened checkpoint.
        act: "mxfp4" quantises the inputs of quantised linears, "none" does not; None: as the checkpoint says.
        scale_mode: for the inputs; None: as the checkpoint says.
        dtype: of everything that is not MXFP4 and has a floating dtype. None: the checkpoint's dtypes, tensor by
            tensor, whatever the model's are: no value changes.
        device: where the model goes; None: where it is, or the CPU for the meta device.
        ignore: patterns (``model.layers.61.*``) of tensors that the model need not have. What a transformers model
            itself ignores (``_keys_to_ignore_on_load_unexpected``) is ignored.
        dequantize_experts: unpack experts into modules of transformers that hold them as one parameter (GPT-OSS), in
            ``dtype`` or bfloat16, which holds every value below 2**128 exactly.
        progress: a bar on stderr, if that is a terminal.

    Returns:
        A :class:`LoadSummary`; ``print`` it. Buffers that are in no checkpoint (rotary ``inv_freq``) and on the meta
        device are computed by the ``_init_weights`` of the transformers model they are in, and listed there.

    Raises:
        BadCheckpoint: tensors that are missing, that the model does not have, or that do not fit; all that is known
            from the headers is in one message. Or a damaged tensor, or values that ``dtype`` does not hold.
        UnsupportedInput: an argument. In both cases the model was not changed.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedInput(f"model: got {type(model).__name__}, allowed a torch.nn.Module")
    model = _compiled.unwrapped(model)
    if dtype is not None and dtype not in _mxfp4.INPUT_DTYPES:
        raise UnsupportedInput(f"dtype: got {dtype}, allowed {', '.join(map(str, _mxfp4.INPUT_DTYPES))}, or None")
    if device is not None:
        _check_device(device)
    if isinstance(ignore, str):
        raise UnsupportedInput(f"ignore: got {ignore!r}, allowed a list of patterns; write [{ignore!r}]")
    if isinstance(model, nn.Linear):
        raise UnsupportedInput(
            "model: got an nn.Linear, which cannot be replaced in place; allowed: a module that holds linears. Use "
            "linear_from_checkpoint(checkpoint, name)"
        )
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    plan = make_plan(model, checkpoint, ignore, dequantize_experts)
    if plan.linears:
        act, scale_mode = _check_activation(checkpoint, act, scale_mode)
    where = torch.device(device) if device is not None else _device_of(model)
    summary = LoadSummary(checkpoint.format, act or checkpoint.act, scale_mode or checkpoint.scale_mode)

    # Everything is read before the model is touched. A model on the meta device costs no memory meanwhile.
    values: dict[Slot, Tensor] = {}
    weights: dict[nn.Module, Mxfp4Weight] = {}
    for name, tensor in checkpoint.items(plan.names, device=where, progress=progress):
        if not isinstance(tensor, Mxfp4Weight):
            if dtype is not None and tensor.is_floating_point():
                tensor = _held(tensor, dtype, checkpoint.entries[name])
            same = _equal(values.setdefault(plan.plain[name], tensor), tensor)
        elif name in plan.experts:
            slot, is_transposed = plan.experts[name]
            values[slot] = _unpacked(tensor, dtype or torch.bfloat16, is_transposed, checkpoint.entries[name])
            same = True
        else:
            first = weights.setdefault(plan.linears[name], tensor)
            same = _equal(first.codes, tensor.codes) and _equal(first.scales, tensor.scales)
        if not same:
            raise BadCheckpoint(
                f"{checkpoint.entries[name].tensor}: got other values than in a tensor that the model ties to it, "
                "allowed equal ones; untie them in the model. It was not changed"
            )
    biases = {module: value for slot, value in values.items() for module, name in slot.holders if name == "bias"}
    linears: dict[nn.Module, Mxfp4Linear] = {}
    names: dict[nn.Module, str] = {module: name for name, module in plan.linears.items()}
    for old, weight in weights.items():
        try:
            linears[old] = mxfp4_linear(weight, biases.get(old), act=summary.act, scale_mode=summary.scale_mode)
        except UnsupportedInput as error:
            raise BadCheckpoint(
                f"{checkpoint.entries[names[old]].tensor}: {error}. The model was not changed"
            ) from None
        linears[old].train(old.training)
        if isinstance(old, Mxfp4Linear) and old.layout != "linear":
            with contextlib.suppress(UnsupportedInput):  # as load_state_dict does; ``layout`` says which it is
                linears[old].prepare(old.layout)

    for slot, value in values.items():
        slot.fill(value)
    for module, attribute, value in plan.computed.values():
        module._buffers[attribute] = value.to(where)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in linears:
                setattr(parent, name, linears[child])
    if device is not None:
        model.to(where)  # buffers that were computed elsewhere
    _describe(summary, model, checkpoint, plan)
    if summary.outputs:
        log.warning(
            "%s: outputs are left as they are, though its configuration has %s",
            checkpoint.path,
            ", ".join(summary.outputs),
        )
    log.info("%s", summary)
    return summary


def linear_from_checkpoint(
    checkpoint: Checkpoint,
    name: str,
    *,
    act: str | None = None,
    scale_mode: str | None = None,
    device: torch.device | str = "cpu",
) -> Mxfp4Linear:
    """The linear ``name`` (``model.layers.0.mlp.up_proj``) of a checkpoint, with its bias if it has one.

    ``act`` and ``scale_mode`` as in :func:`load_checkpoint`.

    Raises:
        BadCheckpoint: the checkpoint has no such linear in MXFP4.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise UnsupportedInput(
            f"checkpoint: got {type(checkpoint).__name__}, allowed a Checkpoint; open_checkpoint(path) gives one"
        )
    _check_device(device)
    entry = checkpoint.entries.get(f"{name}.weight")
    if entry is None or not entry.quantized or len(entry.shape) != 2:
        got = "no such tensor" if entry is None else str(entry.tensor)
        raise BadCheckpoint(
            f"{name + '.weight'!r}: got {got}, allowed a weight [N, K] in MXFP4; list(checkpoint) has the names"
        )
    act, scale_mode = _check_activation(checkpoint, act, scale_mode)
    weight: Any = checkpoint.read(f"{name}.weight", device=device)  # its entry says it is quantised
    bias: Any = checkpoint.read(f"{name}.bias", device=device) if f"{name}.bias" in checkpoint else None
    return mxfp4_linear(weight, bias, act=act, scale_mode=scale_mode)


def mxfp4_linear(weight: Mxfp4Weight, bias: Tensor | None, *, act: str, scale_mode: str) -> Mxfp4Linear:
    """The one place where linears of checkpoints are made."""
    return Mxfp4Linear(weight.codes, weight.scales, bias, act=act, scale_mode=scale_mode)


def _check_device(device: torch.device | str) -> None:
    if torch.device(device).type == "meta":
        raise UnsupportedInput(f"device: got {device}, allowed one that has memory")


def _check_activation(checkpoint: Checkpoint, act: str | None, scale_mode: str | None) -> tuple[str, str]:
    if act is not None and act not in ACTS:
        raise UnsupportedInput(f"act: got {act!r}, allowed {', '.join(map(repr, ACTS))}, or None")
    if scale_mode is not None:
        _mxfp4.check_scale_mode(scale_mode)
    for what, chosen, found, allowed in (
        ("act", act, checkpoint.act, ACTS),
        ("scale_mode", scale_mode, checkpoint.scale_mode, tuple(_mxfp4.SCALE_ADDEND)),
    ):
        if chosen is None and found not in allowed:
            raise BadCheckpoint(
                f"{checkpoint.path}: got {what} {found!r} from its configuration, allowed "
                f"{', '.join(map(repr, allowed))}; choose one with {what}="
            )
    return act or checkpoint.act, scale_mode or checkpoint.scale_mode


def _device_of(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


def _held(tensor: Tensor, dtype: torch.dtype, entry: Entry) -> Tensor:
    """The tensor in ``dtype``, which must be able to hold it."""
    converted = tensor.to(dtype)
    if dtype != tensor.dtype and not torch.equal(converted.isfinite(), tensor.isfinite()):
        raise BadCheckpoint(
            f"{entry.tensor}: got values up to {float(tensor[tensor.isfinite()].abs().max()):.3g}, allowed up to "
            f"{torch.finfo(dtype).max:.3g} in {dtype}; leave dtype out, or choose another. The model was not changed"
        )
    return converted


def _unpacked(weight: Mxfp4Weight, dtype: torch.dtype, transposed: bool, entry: Entry) -> Tensor:
    """``[E, N, K]`` values, or ``[E, K, N]``; one expert at a time, because float32 is eight times the packed size."""
    experts, rows, columns = weight.shape
    shape = (experts, columns, rows) if transposed else (experts, rows, columns)
    out = torch.empty(shape, dtype=dtype, device=weight.codes.device)
    for i in range(experts):
        values = _held(Mxfp4Weight(weight.codes[i], weight.scales[i]).dequantize(), dtype, entry)
        out[i] = values.T if transposed else values
    return out


def _describe(summary: LoadSummary, model: nn.Module, checkpoint: Checkpoint, plan: Plan) -> None:
    summary.outputs = list(checkpoint.outputs)
    summary.dequantized, summary.ignored, summary.computed = list(plan.experts), plan.ignored, list(plan.computed)
    for slot in dict.fromkeys(plan.plain.values()):
        dtype = getattr(*slot.holders[0]).dtype
        summary.dtypes[dtype] = summary.dtypes.get(dtype, 0) + 1
        first = next(name for name in slot.names if name in plan.plain)
        summary.tied.update({name: first for name in slot.names if name != first})
    for name, module in ((_compiled.plain(raw), module) for raw, module in model.named_modules()):
        if isinstance(module, Mxfp4Linear):
            summary.quantized.append(name)
        elif isinstance(module, nn.Linear):
            names = (f"{name}.weight", summary.tied.get(f"{name}.weight", name))
            excluded = any(checkpoint.excluding(n) is not None for n in names)
            summary.left[name] = (
                "the checkpoint excludes it" if excluded else f"the checkpoint has it in {module.weight.dtype}"
            )
