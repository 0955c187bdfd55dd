"""The quantisation ops the passes start from: ours, and any the user registers with :func:`register_anchor`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fusionpasses.config import did_you_mean
from fusionpasses.errors import BadConfig, UnsupportedInput
from fusionpasses.ops import _mxfp4
from fusionpasses.ops.dynamic_mxfp4_quant import OP as _QUANT

LAYOUTS = ("row_major",)


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A quantisation op and what it means.

    Attributes:
        op: name of the overload, ``namespace::packet.overload``.
        schema: the op's schema when it was registered; part of the cache identity.
        scale_mode: the mode the op always uses, or None when an argument carries it.
        scale_mode_argument: name of the argument that carries the mode per call, or None.
        layout: layout of the scales.
        ignored: names of arguments that do not change the result and may have any value.
    """

    op: str
    schema: str
    scale_mode: str | None
    scale_mode_argument: str | None
    layout: str
    ignored: tuple[str, ...] = ()

    @property
    def target(self) -> torch._ops.OpOverload:
        namespace, _, name = self.op.partition("::")
        packet, _, overload = name.partition(".")
        found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        return found


_registered: dict[str, Anchor] = {}


def registered_anchors() -> tuple[Anchor, ...]:
    """All anchors, in order of registration."""
    return tuple(_registered.values())


def register_anchor(
    op: Any,
    *,
    scale_mode: str | None = None,
    layout: str = "row_major",
    scale_mode_argument: str | None = None,
) -> None:
    """Let the passes fuse norms into ``op``, a quantisation op of your own.

    ``op`` must compute what ``torch.ops.fusionpasses.dynamic_mxfp4_quant`` computes: its first argument is the
    tensor ``[..., N]``, its two results are the packed codes uint8 ``[..., N/2]`` (element 2i in the low nibble) and
    the E8M0 scales uint8 ``[..., N/32]``. Every other argument of a call must have its default, or the call is left
    alone and reported. Backends made before the registration do not see it.

    Args:
        op: an overload (``torch.ops.mylib.quant.default``), or a packet with a single overload.
        scale_mode: "even", "floor", "rceil" or "ceil", when the op always uses the same.
        layout: "row_major", the only layout the fused ops write.
        scale_mode_argument: name of the op's argument that carries the mode, instead of ``scale_mode``.

    Raises:
        BadConfig: the op cannot be an anchor, or is registered with another meaning already.
    """
    overload = _single_overload(op)
    schema = overload._schema
    if schema.is_mutable:
        raise BadConfig(
            f"register_anchor: got {overload}, which mutates its arguments ({schema}); allowed: ops that return fresh "
            "tensors. Register the functional overload"
        )
    returns = [str(r.type) for r in schema.returns]
    if returns != ["Tensor", "Tensor"] or not schema.arguments or str(schema.arguments[0].type) != "Tensor":
        raise BadConfig(
            f"register_anchor: got {schema}, allowed (Tensor x, ...) -> (Tensor codes, Tensor scales); wrap the op in "
            "one of that form"
        )
    if layout not in LAYOUTS:
        raise BadConfig(
            f"register_anchor: layout: got {layout!r}, allowed {', '.join(map(repr, LAYOUTS))}: scales [..., N/32] "
            "contiguous; return row-major scales and permute them in an op of their own"
        )
    if (scale_mode is None) == (scale_mode_argument is None):
        raise BadConfig(
            f"register_anchor: got scale_mode={scale_mode!r} and scale_mode_argument={scale_mode_argument!r}, allowed "
            "exactly one of them: the mode the op always uses, or the name of the argument that carries it"
        )
    if scale_mode is not None:
        try:
            _mxfp4.check_scale_mode(scale_mode)
        except UnsupportedInput as error:
            raise BadConfig(f"register_anchor: {error}") from None
    names = [argument.name for argument in schema.arguments]
    if scale_mode_argument is not None and scale_mode_argument not in names[1:]:
        raise BadConfig(
            f"register_anchor: scale_mode_argument: got {scale_mode_argument!r}, allowed one of {names[1:]}"
            f"{did_you_mean(scale_mode_argument, names[1:])}"
        )
    ignored = ("provider",) if overload is _QUANT.overload else ()
    anchor = Anchor(_qualified(overload), str(schema), scale_mode, scale_mode_argument, layout, ignored)
    known = _registered.get(anchor.op)
    if known is not None and known != anchor:
        raise BadConfig(
            f"register_anchor: {anchor.op} is registered already as {known}, got {anchor}; allowed: one meaning per op"
        )
    _registered[anchor.op] = anchor


def _single_overload(op: Any) -> torch._ops.OpOverload:
    if isinstance(op, torch._ops.OpOverload):
        return op
    if isinstance(op, torch._ops.OpOverloadPacket):
        if len(op.overloads()) == 1:
            only: torch._ops.OpOverload = getattr(op, op.overloads()[0])
            return only
        raise BadConfig(
            f"register_anchor: got the packet {op} with overloads {op.overloads()}, allowed an overload; name one: "
            f"{op}.{op.overloads()[0]}"
        )
    raise BadConfig(
        f"register_anchor: got {op!r} of type {type(op).__name__}, allowed a torch.ops overload such as "
        "torch.ops.mylib.quant.default; register the function as a custom op first (torch.library)"
    )


def _qualified(overload: torch._ops.OpOverload) -> str:
    return f"{overload.namespace}::{overload._opname}.{overload._overloadname}"


register_anchor(_QUANT.overload, scale_mode_argument="scale_mode")
