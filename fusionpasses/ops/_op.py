"""Declares a custom op once: schema, reference, fake, samples; dispatches calls to a provider.

``torch.library.Library`` is used rather than the ``custom_op`` decorator, which costs several microseconds more on
every call. A call that equals an earlier one skips the check, the choice of a provider and its heuristics:
``providers/_launch.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from fusionpasses import providers
from fusionpasses.errors import UnsupportedInput
from fusionpasses.providers import _launch

NAMESPACE = "fusionpasses"

_library = torch.library.Library(NAMESPACE, "DEF")

Sample = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Op:
    """One overload of one of our ops.

    Attributes:
        name: ``packet.overload``.
        check: raises UnsupportedInput for arguments outside the contract; takes the schema's arguments without
            ``provider``, as ``reference`` and ``fake`` do. Runs before either.
        reference: what the op means, in plain torch.
        fake: shapes, dtypes and strides of the outputs.
        samples: ``samples(device)`` yields ``(args, kwargs)`` for the contract tests.
    """

    name: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[torch.device], Iterable[Sample]]

    @property
    def packet_name(self) -> str:
        return self.name.partition(".")[0]

    @property
    def overload(self) -> torch._ops.OpOverload:
        packet, _, overload = self.name.partition(".")
        target: torch._ops.OpOverload = getattr(getattr(torch.ops.fusionpasses, packet), overload)
        return target


#: Every op overload by name; the contract tests walk this.
OPS: dict[str, Op] = {}

#: ``DIRECT.<packet>.<overload>(...)``: the call of an op without torch's dispatcher. For code that Inductor generates
#: (``direct_calls.py``): plain tensors, no gradient.
DIRECT = types.SimpleNamespace()

#: ``DIRECT.site(name, *tensors)``: such a call of ``packet.overload`` for one place in generated code, where its
#: arguments never change but for addresses and data; ``tensors`` are their ``(dtype, device, shape, stride)``.
DIRECT.site = lambda name, *tensors: _SITES[name](*tensors)
_SITES: dict[str, Callable[..., Callable[..., Any]]] = {}


def declare(
    name: str,
    signature: str,
    *,
    check: Callable[..., None],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Callable[[torch.device], Iterable[Sample]],
) -> Op:
    """Register ``torch.ops.fusionpasses.<name>`` and return its :class:`Op`.

    ``signature`` is the schema after the name; every op takes a keyword-only ``str provider="auto"``.
    """
    op = Op(name, check, reference, fake, samples)
    qualified = name.removesuffix(".default")
    _library.define(
        f"{qualified}{signature}",
        # A node inserted by a pass gets no stride guarantee under the default tag: Inductor may hand over a
        # transposed buffer. needs_fixed_stride_order holds for inserted and for traced nodes alike.
        tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag),
    )

    def run(*args: Any, provider: str = "auto", **kwargs: Any) -> Any:
        op.check(*args, **kwargs)
        device = _one_device(op, args, kwargs)
        chosen = providers.select(name, device.type, provider)
        if chosen == "reference":
            return op.reference(*args, **kwargs)
        return providers.implementation(chosen, name)(*args, **kwargs)

    def run_fake(*args: Any, provider: str = "auto", **kwargs: Any) -> Any:
        op.check(*args, **kwargs)
        _one_device(op, args, kwargs)  # one on the meta device is enough to come here
        return op.fake(*args, **kwargs)

    replayed = _launch.replayed(run)

    def refuse_gradients(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for position, value in enumerate((*args, *kwargs.values())):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    raise UnsupportedInput(
                        f"fusionpasses::{qualified} has no gradient: argument {position} requires grad and grad mode "
                        "is on; allowed: inputs that do not require grad. Call it under torch.no_grad() or "
                        "torch.inference_mode(), or pass x.detach()"
                    )
        if forward_ad._current_level >= 0:
            _refuse_tangents(qualified, (*args, *kwargs.values()))
        if _nothing_else_handles(keyset.raw_repr()):
            return replayed(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload(*args, **kwargs)

    def direct(*args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled():
            # A mode or a profiler sees what the dispatcher sees.
            return op.overload(*args, **kwargs)
        return replayed(*args, **kwargs)

    def site(*expected: tuple[Any, ...]) -> Callable[..., Any]:
        tensors = [_launch.Expected(*each) for each in expected]
        return _launch.at_site(run, tensors, otherwise=replayed, watched=op.overload)

    _SITES[name] = site
    packet = DIRECT.__dict__.setdefault(op.packet_name, types.SimpleNamespace())
    setattr(packet, name.rpartition(".")[2], direct)
    _library.impl(qualified, replayed, "CompositeExplicitAutograd")
    _library.impl(qualified, refuse_gradients, "Autograd", with_keyset=True)
    torch.library.register_fake(f"{NAMESPACE}::{qualified}", run_fake, lib=_library)
    OPS[name] = op
    return op


def _refuse_tangents(name: str, values: tuple[Any, ...]) -> None:
    for position, value in enumerate(values):
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise UnsupportedInput(
                f"fusionpasses::{name} has no derivative: argument {position} has a tangent of forward-mode AD; "
                "allowed: inputs without one. Pass x.detach(), or differentiate the model that is not quantised"
            )


def _one_device(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device of all tensors of a call."""
    names = (argument.name for argument in op.overload._schema.arguments)
    given = [*zip(names, args, strict=False), *kwargs.items()]
    (first, x), *others = ((name, value) for name, value in given if isinstance(value, torch.Tensor))
    for name, tensor in others:
        if tensor.device != x.device:
            raise UnsupportedInput(
                f"{name}.device: got {tensor.device}, allowed {x.device}, that of {first}; move one of them"
            )
    device: torch.device = x.device
    return device


@functools.cache
def _nothing_else_handles(keyset: int) -> bool:
    """After autograd, does a call with these dispatch keys go straight to the kernel of a CPU or a GPU?

    Then it need not go through the dispatcher a second time, which takes 7 us. Modes, tensor subclasses,
    functionalisation and lazy negation have keys in between.
    """
    rest = torch._C.DispatchKeySet.from_raw_repr(keyset) & torch._C._after_autograd_keyset
    return rest.highestPriorityTypeId() in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
