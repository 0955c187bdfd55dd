"""Plans: what a call of an op launched, as straight-line Python that does it again.

A plan is text made for one call: it allocates the outputs and scratch, and launches with addresses, all of them local
variables. Beside loops over launches and tuples of arguments, that takes a fifth off a call of a product: 5.7 us
instead of 7.0 on a CPU with a driver that launches nothing, and 3.3 where no key is needed (``_launch.at_site``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Kernels are specialised for pointers that are multiples of this.
ALIGNMENT = 16

#: What a plan returns that must not be used now: for a hook, a setting, or a tensor of another dtype or alignment.
UNUSABLE = object()


class Launch(NamedTuple):
    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    mutates: tuple[Tensor, ...]
    constants: dict[str, Any]


class TorchCall(NamedTuple):
    call: Callable[..., None]
    tensors: tuple[Tensor, ...]


class Steps(NamedTuple):
    """What a call of an op did, in order, and the memory it took for itself."""

    steps: list[TorchCall | Launch]
    scratch: list[Tensor]


#: Launches for the values given; what the op returns, or UNUSABLE.
Plan = Callable[[tuple[Any, ...]], Any]


def make(recorded: Steps, values: tuple[Any, ...], outputs: Any) -> Plan | None:
    """The plan of a call that did these steps, or None if doing them again would not be the same."""
    launches = [step for step in recorded.steps if isinstance(step, Launch)]
    inputs = [value for value in values if isinstance(value, Tensor)]
    returned = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
    made = (*returned, *recorded.scratch)
    if (
        not launches
        or torch.version.hip is not None
        # Which of the two would a later call mean?
        or len(set(map(id, inputs))) < len(inputs)
        or not all(_is_fresh(tensor, inputs[0].device) for tensor in made)
        or not _are_apart(inputs, made)
    ):
        return None
    places = {id(tensor): place for place, tensor in enumerate((*values, *made)) if isinstance(tensor, Tensor)}
    names: dict[str, Any] = {}
    body = []
    for step in recorded.steps:
        tensors = step.tensors if isinstance(step, TorchCall) else step.mutates
        if not all(id(tensor) in places for tensor in tensors):
            return None
        if isinstance(step, TorchCall):
            given = ", ".join(f"t{places[id(tensor)]}" for tensor in tensors)
            body.append(f"{_named(step.call, names)}({given})")
        else:
            text = _launch_text(step, places, names)
            if text is None:
                return None
            body.append(text)
    mutated = [places[id(tensor)] for step in launches for tensor in step.mutates]
    if mutated:
        names["increment_version"] = torch.autograd.graph.increment_version
        body.append(f"increment_version([{', '.join(f't{place}' for place in mutated)}])")
    ends = [f"t{places[id(tensor)]}" for tensor in returned]
    body.append(f"return ({', '.join(ends)},)" if isinstance(outputs, tuple) else f"return {ends[0] if ends else None}")

    lines = [*_usable(launches, inputs[0].device, names), *_tensors(values, made, names), *body]
    text = "\n    ".join(["def replay(values):", *lines])
    exec(compile(text, f"<plan of {launches[-1].kernel.__name__}>", "exec"), names)
    replay: Plan = names["replay"]
    return replay


def _named(value: Any, names: dict[str, Any]) -> str:
    name = f"c{len(names)}"
    names[name] = value
    return name


def _usable(launches: Sequence[Launch], device: torch.device, names: dict[str, Any]) -> list[str]:
    """Lines that look whether the plan may be used, and get the stream."""
    from triton import knobs
    from triton.runtime import driver

    runtime, compilation = knobs.runtime, knobs.compilation
    index = device.index
    names |= {
        "runtime": runtime,
        "compilation": compilation,
        "unusable": UNUSABLE,
        "stream_of": driver.active.get_current_stream,
        # torch.cuda.current_device() looks first whether CUDA has been initialised. It has: there are tensors.
        "current": driver.active.get_current_device if index is None else torch._C._cuda_getDevice,
        "device": torch.cuda.device,
    }
    lines = []
    if index is not None:
        # Both the allocator and Triton mean the current device.
        lines = [f"if current() != {index}:", f"    with device({index}):", "        return replay(values)"]
    changed = [f"runtime.debug != {_named(runtime.debug, names)}"]
    for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):
        if hasattr(compilation, name):  # in this version of Triton
            changed.append(f"compilation.{name} != {_named(getattr(compilation, name), names)}")
    # Hooks are of a profiler or a test; they want Triton's own launch.
    changed += [f"{_named(step.kernel, names)}.pre_run_hooks" for step in launches]
    for name in ("launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook"):
        if not hasattr(runtime, name):
            continue
        hook = getattr(runtime, name)
        there = _named(hook, names)
        changed.append(f"runtime.{name} is not {there}")
        if hook is not None:
            changed.append(f"{there}.calls" if hasattr(hook, "calls") else "True")  # a chain of others; or a function
    lines += [f"if {' or '.join(changed)}:", "    return unusable"]
    return [*lines, f"stream = stream_of({'current()' if index is None else index})"]


def _tensors(values: tuple[Any, ...], made: Sequence[Tensor], names: dict[str, Any]) -> list[str]:
    """Lines that name tensors and their addresses, look at dtypes and alignment, and allocate what is not given."""
    lines, addresses, dtypes = [], [], []
    for place, value in enumerate(values):
        if isinstance(value, Tensor):
            lines += [f"t{place} = values[{place}]", f"a{place} = t{place}.data_ptr()"]
            rest = value.data_ptr() % ALIGNMENT
            addresses.append(f"a{place} - {rest}" if rest else f"a{place}")
            # Nothing else that a site goes by looks at it, where torch has been told to skip guards.
            dtypes.append(f"t{place}.dtype is not {_named(value.dtype, names)}")
    lines += [f"if ({' | '.join(addresses)}) % {ALIGNMENT} or {' or '.join(dtypes)}:", "    return unusable"]
    for place, tensor in enumerate(made, len(values)):
        empty, dtype = _named(_allocator(tensor.device), names), _named(tensor.dtype, names)
        lines.append(f"t{place} = {empty}({tuple(tensor.shape)}, {tensor.stride()}, {dtype})")
        lines.append(f"a{place} = t{place}.data_ptr()")
    return lines


def _launch_text(launched: Launch, places: dict[int, int], names: dict[str, Any]) -> str | None:
    """The launch; None if it is one that Triton's launcher cannot be given."""
    from triton.compiler import CompiledKernel
    from triton.runtime import JITFunction

    kernel, compiled, grid, args, _, constants = launched
    if not isinstance(kernel, JITFunction) or not isinstance(compiled, CompiledKernel):  # interpreted, or compiling
        return None
    bound = dict(zip(kernel.arg_names, args, strict=False)) | constants
    if not all(name in bound for name in kernel.arg_names):  # a default of the kernel
        return None
    given = []
    for name in kernel.arg_names:
        value = bound[name]
        if not isinstance(value, Tensor):
            given.append(_named(value, names))
        elif id(value) in places:
            given.append(_given(places[id(value)]))
        else:
            return None
    x, y, z = (*grid, 1, 1)[:3]
    compiled[x, y, z]  # loads it, if it was not
    _named(compiled, names)  # which would unload it at its end
    run, function, metadata = (_named(v, names) for v in (compiled.run, compiled.function, compiled.packed_metadata))
    # As Triton's own launch does, but for hooks, of which there are none.
    return f"{run}({x}, {y}, {z}, stream, {function}, {metadata}, None, None, None, {', '.join(given)})"


def _given(place: int) -> str:
    """What a launch is given of a tensor: its address. Triton would ask the driver about each one's memory."""
    return f"a{place}"


def _is_fresh(output: Any, device: torch.device) -> bool:
    """A contiguous tensor with a storage of its own, so that one made anew is the same."""
    return (
        isinstance(output, Tensor)
        and output.device == device
        and output.is_contiguous()
        and output.untyped_storage().nbytes() == output.numel() * output.element_size()
        and output.data_ptr() % ALIGNMENT == 0
    )


def _are_apart(inputs: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    """Has each tensor that was made memory of its own? One without elements has none."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in made if tensor.numel()]
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return len(set(storages)) == len(storages) and not given.intersection(storages)


@functools.cache
def _allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """``empty(shape, strides, dtype)`` on the current device of this type."""
    # The one that code generated by Inductor calls, a third of the time of torch.empty_strided.
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if fast is not None:
        return fast  # type: ignore[no-any-return]
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
