"""Launches that are replayed: what the host does for a call it has seen before.

A call of an op checks its arguments, chooses tiles and lets Triton look up a kernel: 70 us of Python, several times
what the launch itself takes. All of it depends on the arguments' metadata only, so a call is done in full once and
leaves a plan: which compiled kernel, which grid, which argument goes where, which outputs. An equal call allocates
the outputs and launches.

Two calls are equal if their tensors agree in dtype, device, shape, strides and address modulo 16, and all other
arguments agree in value. Triton specialises a kernel by nothing else on NVIDIA GPUs, and the providers look at nothing
else. For AMD's, Triton also looks at the size of the storage; there every call is done in full.

Several launches, what an adapter has torch do among them, such as a matrix product, and memory that it needs in between
are part of the plan.

A plan is per number of rows. Rows that vary from step to step cost one full call for each new number and op, not one
for each layer, because layers make equal calls. In generated code with sizes that are numbers, where a call is always
the same but for addresses, a plan needs no key: ``at_site``.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionpasses.providers import _plan

#: Plans kept for an op; when there are more, all are dropped. One takes about 2 KB on the host and nothing on the GPU.
MAX_PLANS = 1024


class _Plans(dict[Any, "_plan.Plan | None"]):
    """Plans of an op by key, or of a site."""


#: All of them, by their id.
_every_plans: weakref.WeakValueDictionary[int, _Plans] = weakref.WeakValueDictionary()


class _Recording(threading.local):
    current: _plan.Steps | None = None


_recording = _Recording()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, mutates: tuple[Tensor, ...] = (), **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, and a promise: an equal call of the op may be replayed as this launch.

    That is, the adapter has allocated its outputs and does nothing else but launches, torch calls and scratch of this
    module, except to copy an input that it launches the copy of; such a call is not replayed. ``mutates`` are the
    inputs that the kernel writes to: autograd is told.
    """
    compiled = kernel[grid](*args, **constants)
    if mutates:
        torch.autograd.graph.increment_version(mutates)
    if _recording.current is not None:
        _recording.current.steps.append(_plan.Launch(kernel, compiled, grid, args, mutates, constants))


def torch_call(call: Callable[..., None], *tensors: Tensor) -> None:
    """``call(*tensors)``, and the promise that launch makes. It writes to outputs and scratch alone."""
    call(*tensors)
    if _recording.current is not None:
        _recording.current.steps.append(_plan.TorchCall(call, tensors))


def scratch(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory on the device of ``like`` that launches and torch calls of this call use, and nothing else."""
    tensor = like.new_empty(shape, dtype=dtype)
    if _recording.current is not None:
        _recording.current.scratch.append(tensor)
    return tensor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def replayed(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, which launches kernels through ``launch``, replayed where it can be."""
    plans = _new_plans()

    def run(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values()) if kwargs else args
        key = call_key(values, kwargs)
        plan = plans.get(key)
        if plan is not None:
            outputs = plan(values)
            if outputs is not _plan.UNUSABLE:
                return outputs
        outputs, plan = _recorded(call, args, kwargs)
        if plan is not None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            plans[key] = plan
        return outputs

    return run


class Expected(NamedTuple):
    """A tensor of a site: what is the same in every call."""

    dtype: torch.dtype
    device: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def at_site(
    call: Callable[..., Any],
    expected: Sequence[Expected],
    *,
    otherwise: Callable[..., Any],
    watched: Callable[..., Any],
) -> Callable[..., Any]:
    """``call`` for one place in generated code, where tensors are as ``expected`` and other arguments always the same.

    Its plan needs no key, which takes as long as all the rest. Shapes, strides and devices are compared with
    ``expected`` in the first call only: later, generated code and the guards in front of it answer for them. Dtypes and
    alignment are looked at in every call, and one that the plan is not for goes to ``otherwise``; if a mode or a
    profiler is there, to ``watched``.
    """
    plans = _new_plans()  # None: the site's plan, or None if it cannot have one
    modes, profiled = torch._C._len_torch_dispatch_stack, torch._C._autograd._profiler_enabled

    def run(*args: Any, **kwargs: Any) -> Any:
        if modes() or profiled():
            return watched(*args, **kwargs)
        if None not in plans:
            outputs, plan = _recorded(call, args, kwargs)
            plans[None] = plan if _are(expected, (*args, *kwargs.values())) else None
            return outputs
        plan = plans.get(None)
        if plan is not None:
            outputs = plan((*args, *kwargs.values()) if kwargs else args)
            if outputs is not _plan.UNUSABLE:
                return outputs
        return otherwise(*args, **kwargs)

    return run


def _are(expected: Sequence[Expected], values: tuple[Any, ...]) -> bool:
    got = [Expected(v.dtype, str(v.device), tuple(v.shape), v.stride()) for v in values if isinstance(v, Tensor)]
    return got == list(expected)


def _new_plans() -> _Plans:
    plans = _Plans()
    _every_plans[id(plans)] = plans
    return plans


def _recorded(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, _plan.Plan | None]:
    """What ``call`` returns, and the plan of it, or None."""
    recorded = _plan.Steps([], [])
    outer, _recording.current = _recording.current, recorded
    try:
        outputs = call(*args, **kwargs)
    finally:
        _recording.current = outer
    return outputs, _plan.make(recorded, (*args, *kwargs.values()), outputs)


def forget() -> None:
    """Drop all plans, after something that decides launches has changed: for tests and measurements."""
    for plans in list(_every_plans.values()):
        plans.clear()


def call_key(values: tuple[Any, ...], names: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for calls that are the same but for their data; ``names`` are those of the last values.

    Holds no tensor. An argument left out is not equal to its default given, which costs a plan and no more.
    """
    # One expression, because this is what a replayed call mostly does.
    return (
        *[
            (value.dtype, value.device, value.shape, value.stride(), value.data_ptr() % _plan.ALIGNMENT)
            if isinstance(value, Tensor)
            else value or (type(value), repr(value))  # 0.0 == -0.0
            for value in values
        ],
        *names,
    )
