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
for each layer, because layers make equal calls.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Plans kept for an op; when there are more, all are dropped. One takes about 2 KB on the host and nothing on the GPU.
MAX_PLANS = 1024

#: Kernels are specialised for pointers that are multiples of this.
_ALIGNMENT = 16


class _Launch(NamedTuple):
    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    mutates: tuple[Tensor, ...]
    constants: dict[str, Any]


#: One thing that a replayed call does: with its arguments and what it has made, their addresses, and the stream.
_Step = Callable[[tuple[Any, ...], tuple[Any, ...], int], None]

#: Launches for the arguments given, and returns what the op does; _UNUSABLE if it must not be used now.
_Plan = Callable[[tuple[Any, ...]], Any]
_UNUSABLE = object()

_every_plans: list[dict[tuple[Any, ...], _Plan]] = []


class _TorchCall(NamedTuple):
    call: Callable[..., None]
    tensors: tuple[Tensor, ...]


class _Steps(NamedTuple):
    """What a call of an op did, in order, and the memory it took for itself."""

    steps: list[_TorchCall | _Launch]
    scratch: list[Tensor]


class _Recording(threading.local):
    current: _Steps | None = None


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
        _recording.current.steps.append(_Launch(kernel, compiled, grid, args, mutates, constants))


def torch_call(call: Callable[..., None], *tensors: Tensor) -> None:
    """``call(*tensors)``, and the promise that launch makes. It writes to outputs and scratch alone."""
    call(*tensors)
    if _recording.current is not None:
        _recording.current.steps.append(_TorchCall(call, tensors))


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
    plans: dict[tuple[Any, ...], _Plan] = {}
    _every_plans.append(plans)

    def run(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values()) if kwargs else args
        key = call_key(values, kwargs)
        plan = plans.get(key)
        if plan is not None:
            outputs = plan(values)
            if outputs is not _UNUSABLE:
                return outputs
        recorded = _Steps([], [])
        outer, _recording.current = _recording.current, recorded
        try:
            outputs = call(*args, **kwargs)
        finally:
            _recording.current = outer
        if any(isinstance(step, _Launch) for step in recorded.steps):
            plan = _plan(recorded, values, outputs)
            if plan is not None:
                if len(plans) >= MAX_PLANS:
                    plans.clear()
                plans[key] = plan
        return outputs

    return run


def forget() -> None:
    """Drop all plans, after something that decides launches has changed: for tests and measurements."""
    for plans in _every_plans:
        plans.clear()


def call_key(values: tuple[Any, ...], names: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for calls that are the same but for their data; ``names`` are those of the last values.

    Holds no tensor. An argument left out is not equal to its default given, which costs a plan and no more.
    """
    # One expression, because this is what a replayed call mostly does.
    return (
        *[
            (value.dtype, value.device, value.shape, value.stride(), value.data_ptr() % _ALIGNMENT)
            if isinstance(value, Tensor)
            else value or (type(value), repr(value))  # 0.0 == -0.0
            for value in values
        ],
        *names,
    )


def _plan(recorded: _Steps, values: tuple[Any, ...], outputs: Any) -> _Plan | None:
    """The plan of a call that did these steps, or None if replaying them would not be the same."""
    inputs = [value for value in values if isinstance(value, Tensor)]
    returned = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
    made = (*returned, *recorded.scratch)
    device = inputs[0].device
    if (
        torch.version.hip is not None
        # Which of the two would a later call mean?
        or len(set(map(id, inputs))) < len(inputs)
        or not all(_is_fresh(tensor, device, inputs) for tensor in made)
    ):
        return None
    pool: list[Any] = [*values, *made]
    places = {id(tensor): place for place, tensor in enumerate(pool) if isinstance(tensor, Tensor)}
    others: list[Any] = []
    steps = []
    for step in recorded.steps:
        tensors = step.tensors if isinstance(step, _TorchCall) else step.mutates
        if not all(id(tensor) in places for tensor in tensors):
            return None
        if isinstance(step, _TorchCall):
            steps.append(_call_again(step.call, tuple(places[id(tensor)] for tensor in tensors)))
        else:
            again = _launch_again(step, places, len(pool), others)
            if again is None:
                return None
            steps.append(again)
    return _replay(
        tuple(steps),
        tuple(step.kernel for step in recorded.steps if isinstance(step, _Launch)),
        tuple(others),
        device,
        tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in made),
        tuple(places[id(tensor)] for step in recorded.steps if isinstance(step, _Launch) for tensor in step.mutates),
        _as_returned(outputs),
    )


def _as_returned(outputs: Any) -> Callable[[tuple[Tensor, ...]], Any]:
    """From all that a replayed call has made, what the op returns."""
    if outputs is None:
        return lambda made: None
    if isinstance(outputs, tuple):
        count = len(outputs)
        return lambda made: made[:count]
    return lambda made: made[0]


def _call_again(call: Callable[..., None], tensors: tuple[int, ...]) -> _Step:
    return lambda pool, pointers, stream: call(*[pool[place] for place in tensors])


def _launch_again(launched: _Launch, places: dict[int, int], pooled: int, others: list[Any]) -> _Step | None:
    """A launch with arguments from the pointers; what is no tensor is added to ``others``, which follow them."""
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction

    kernel, compiled, grid, args, _, constants = launched
    if not isinstance(kernel, JITFunction) or not isinstance(compiled, CompiledKernel):  # interpreted, or compiling
        return None
    bound = dict(zip(kernel.arg_names, args, strict=False)) | constants
    if not all(name in bound for name in kernel.arg_names):  # a default of the kernel
        return None
    order = []
    for name in kernel.arg_names:
        value = bound[name]
        if not isinstance(value, Tensor):
            order.append(pooled + len(others))
            others.append(value)
        elif id(value) in places:
            order.append(places[id(value)])
        else:
            return None
    in_order = operator.itemgetter(*order)
    x, y, z = (*grid, 1, 1)[:3]
    compiled[x, y, z]  # loads it, if it was not
    # As Triton's own launch does, but for hooks, of which there are none, and pointers, which it would look up.
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    return lambda pool, pointers, stream: run(
        x, y, z, stream, function, metadata, None, None, None, *in_order(pointers)
    )


def _is_fresh(output: Any, device: torch.device, inputs: list[Tensor]) -> bool:
    """A contiguous tensor with a storage of its own, so that one made anew is the same."""
    return (
        isinstance(output, Tensor)
        and output.device == device
        and output.is_contiguous()
        and output.untyped_storage().nbytes() == output.numel() * output.element_size()
        and output.data_ptr() % _ALIGNMENT == 0
        and all(output is not tensor for tensor in inputs)
    )


def _replay(
    steps: tuple[_Step, ...],
    kernels: tuple[Any, ...],
    others: tuple[Any, ...],
    device: torch.device,
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...],
    mutated: tuple[int, ...],
    returned: Callable[[tuple[Tensor, ...]], Any],
) -> _Plan:
    from triton import knobs
    from triton.runtime import driver

    runtime, compilation = knobs.runtime, knobs.compilation
    debug, instrumentation = runtime.debug, compilation.instrumentation_mode
    empty = _allocator(device)
    index = device.index
    current_device = torch.cuda.current_device

    def replay(values: tuple[Any, ...]) -> Any:
        if index is not None and current_device() != index:
            # Both the allocator and Triton mean the current device.
            with torch.cuda.device(index):
                return replay(values)
        if (
            runtime.debug != debug
            or compilation.instrumentation_mode != instrumentation
            # of a profiler or a test; they want Triton's own launch
            or any(kernel.pre_run_hooks for kernel in kernels)
            or _calls(runtime.launch_enter_hook)
            or _calls(runtime.launch_exit_hook)
        ):
            return _UNUSABLE
        made = tuple([empty(*output) for output in outputs])
        pool = (*values, *made)
        pointers = (*_addresses(pool), *others)
        stream = driver.active.get_current_stream(driver.active.get_current_device() if index is None else index)
        for step in steps:
            step(pool, pointers, stream)
        if mutated:
            torch.autograd.graph.increment_version([values[place] for place in mutated])
        return returned(made)

    return replay


def _addresses(pool: tuple[Any, ...]) -> list[Any]:
    """What a launch is given of tensors. Triton would ask the driver about each one's memory."""
    return [each.data_ptr() if isinstance(each, Tensor) else each for each in pool]


def _calls(hook: Any) -> bool:
    """Does Triton's launch hook, None or a chain or a function, depending on the version, call anything?"""
    return hook is not None and bool(getattr(hook, "calls", True))


@functools.cache
def _allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """``empty(shape, strides, dtype)`` on the current device of this type."""
    # The one that code generated by Inductor calls, a third of the time of torch.empty_strided.
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if fast is not None:
        return fast  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
