"""Launches that are replayed: what the host does for a call it has seen before.

A call of an op checks its arguments, chooses tiles and lets Triton look up a kernel: 70 us of Python, several times
what the launch itself takes. All of it depends on the arguments' metadata only, so a call is done in full once and
leaves a plan: which compiled kernel, which grid, which argument goes where, which outputs. An equal call allocates
the outputs and launches.

Two calls are equal if their tensors agree in dtype, device, shape, strides and address modulo 16, and all other
arguments agree in value. Triton specialises a kernel by nothing else on NVIDIA GPUs, and the providers look at nothing
else. For AMD's, Triton also looks at the size of the storage; there every call is done in full.

What an adapter has torch do before its launch, such as a matrix product, is part of the plan.

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


#: Launches for the arguments given, and returns what the op does; _UNUSABLE if it must not be used now.
_Plan = Callable[[tuple[Any, ...]], Any]
_UNUSABLE = object()

_every_plans: list[dict[tuple[Any, ...], _Plan]] = []


class _First(NamedTuple):
    call: Callable[..., None]
    tensors: tuple[Tensor, ...]


class _Recording(threading.local):
    steps: list[_First | _Launch] | None = None


_recording = _Recording()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, mutates: tuple[Tensor, ...] = (), **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``, and a promise: an equal call of the op may be replayed as this launch.

    That is, the adapter has allocated its outputs and does nothing else, except to copy an input that it launches the
    copy of; such a call is not replayed. ``mutates`` are the inputs that the kernel writes to: autograd is told.
    """
    compiled = kernel[grid](*args, **constants)
    if mutates:
        torch.autograd.graph.increment_version(mutates)
    if _recording.steps is not None:
        _recording.steps.append(_Launch(kernel, compiled, grid, args, mutates, constants))


def first(call: Callable[..., None], *tensors: Tensor) -> None:
    """``call(*tensors)`` before the launch, and the promise that launch makes. It writes to outputs alone."""
    call(*tensors)
    if _recording.steps is not None:
        _recording.steps.append(_First(call, tensors))


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
        steps: list[_First | _Launch] = []
        outer, _recording.steps = _recording.steps, steps
        try:
            outputs = call(*args, **kwargs)
        finally:
            _recording.steps = outer
        before = [step for step in steps[:-1] if isinstance(step, _First)]
        if steps and isinstance(steps[-1], _Launch) and len(before) == len(steps) - 1:
            plan = _plan(before, steps[-1], values, outputs)
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


def _plan(before: list[_First], launched: _Launch, values: tuple[Any, ...], outputs: Any) -> _Plan | None:
    """The plan of a call that made this launch, or None if replaying that would not be the same."""
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction

    kernel, compiled, grid, args, mutates, constants = launched
    inputs = [value for value in values if isinstance(value, Tensor)]
    made = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
    device = inputs[0].device
    if (
        torch.version.hip is not None
        or not isinstance(kernel, JITFunction)
        or not isinstance(compiled, CompiledKernel)  # interpreted, or still compiling
        # Which of the two would a later call mean?
        or len(set(map(id, inputs))) < len(inputs)
        or not all(_is_fresh(output, device, inputs) for output in made)
    ):
        return None
    bound = dict(zip(kernel.arg_names, args, strict=False)) | constants
    if not all(name in bound for name in kernel.arg_names):  # a default of the kernel
        return None
    pool: list[Any] = [*values, *made]
    places = {id(tensor): place for place, tensor in enumerate(pool) if isinstance(tensor, Tensor)}
    others: list[Any] = []
    order = []
    for name in kernel.arg_names:
        value = bound[name]
        if not isinstance(value, Tensor):
            order.append(len(pool) + len(others))
            others.append(value)
        elif id(value) in places:
            order.append(places[id(value)])
        else:
            return None
    if not all(id(tensor) in places for tensor in (*mutates, *(t for step in before for t in step.tensors))):
        return None
    return _replay(
        tuple((step.call, tuple(places[id(tensor)] for tensor in step.tensors)) for step in before),
        kernel,
        compiled,
        (*grid, 1, 1)[:3],
        operator.itemgetter(*order),
        tuple(others),
        device,
        tuple((tuple(output.shape), output.stride(), output.dtype) for output in made),
        tuple(places[id(tensor)] for tensor in mutates),
        (lambda made: made) if isinstance(outputs, tuple) else (lambda made: made[0] if made else None),
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
    before: tuple[tuple[Callable[..., None], tuple[int, ...]], ...],
    kernel: Any,
    compiled: Any,
    grid: tuple[int, ...],
    in_order: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    others: tuple[Any, ...],
    device: torch.device,
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...],
    mutated: tuple[int, ...],
    returned: Callable[[tuple[Tensor, ...]], Any],
) -> _Plan:
    from triton import knobs

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
            or kernel.pre_run_hooks  # of a profiler or a test; they want Triton's own launch
        ):
            return _UNUSABLE
        made = tuple([empty(*output) for output in outputs])
        pool = (*values, *made, *others)
        for call, tensors in before:
            call(*[pool[place] for place in tensors])
        # Indexing a compiled kernel launches on the current stream and calls Triton's launch hooks.
        compiled[grid](*in_order(pool))
        if mutated:
            torch.autograd.graph.increment_version([values[place] for place in mutated])
        return returned(made)

    return replay


@functools.cache
def _allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """``empty(shape, strides, dtype)`` on the current device of this type."""
    # The one that code generated by Inductor calls, a third of the time of torch.empty_strided.
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if fast is not None:
        return fast  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
