"""The ops the passes start from: ours, and those of the user.

Quantisation ops are registered with :func:`register_anchor`, ops that write to an MLA cache with
:func:`register_cache_write_anchor`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fusionpasses.config import did_you_mean
from fusionpasses.errors import BadConfig, UnsupportedInput
from fusionpasses.ops import _kv_cache, _mxfp4
from fusionpasses.ops.concat_and_cache_mla import OP as _CACHE_WRITE
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


@dataclasses.dataclass(frozen=True)
class CacheWriteAnchor(Anchor):
    """An op that writes rows ``[kv_c | k_pe]`` to an MLA cache, and nothing for slots below 0; no quantisation.

    Attributes:
        rows: names of the arguments that are kv_c, k_pe, kv_cache and slots, in this order.
        pe_cache: name of the argument that is the second of two caches, or None.
        cache_dtype: name of the string argument that says what the cache holds, or None when the cache's dtype does.
        cache_scale: name of the argument that is the scale of float8 caches, or None.
        scaling: "divide" or "reciprocal".
        scaling_argument: name of the argument that carries that instead, or None.
    """

    rows: tuple[str, str, str, str] = ("kv_c", "k_pe", "kv_cache", "slots")
    pe_cache: str | None = None
    cache_dtype: str | None = None
    cache_scale: str | None = None
    scaling: str = "divide"
    scaling_argument: str | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of all arguments whose values mean something here. The others must have their defaults."""
        optional = (self.pe_cache, self.cache_dtype, self.cache_scale, self.scaling_argument)
        return (*self.rows, *(name for name in optional if name is not None))


#: What a ``cache_dtype`` argument may say: rows as they are, or float8_e4m3fn with a scale. As in vLLM.
CACHE_DTYPES = {"auto": False, "fp8": True, "fp8_e4m3": True}

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
    overload = _single_overload(op, "register_anchor", "quant")
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
    _register(anchor, "register_anchor")


def register_cache_write_anchor(
    op: Any,
    *,
    cache_dtype: str | None = None,
    cache_scale: str | None = None,
    scaling: str = "divide",
) -> None:
    """Let the passes fuse RoPE into ``op``, a write to the MLA cache of your own or of a serving engine.

    ``op`` must do what ``torch.ops.fusionpasses.concat_and_cache_mla`` does: its first four arguments are kv_c
    ``[T, L]``, k_pe ``[T, R]`` or ``[T, 1, R]``, the cache ``[slots, L + R]`` or ``[blocks, block, L + R]``, the only
    one it mutates, and the slots ``[T]``. It writes the row ``[kv_c | k_pe]`` of each token to its slot, nothing for a
    slot below 0, and returns nothing. Every other argument of a call must have its default, or the call is left alone
    and reported. Backends made before the registration do not see it. vLLM's::

        fp.register_cache_write_anchor(
            torch.ops._C_cache_ops.concat_and_cache_mla.default, cache_dtype="kv_cache_dtype", cache_scale="scale"
        )

    Args:
        op: an overload, or a packet with a single overload.
        cache_dtype: name of the op's string argument that says what the cache holds. Calls with "auto" (rows as they
            are; the scale is not used), "fp8" and "fp8_e4m3" are fused. None: the dtype of the cache says it.
        cache_scale: name of the op's tensor argument that is the scale of float8 caches: float32 ``[]`` or ``[1]``.
        scaling: "divide" or "reciprocal": how the op applies the scale, see ``fusionpasses/ops/_kv_cache.py``.

    Raises:
        BadConfig: the op cannot be an anchor, or is registered with another meaning already.
    """
    name = "register_cache_write_anchor"
    overload = _single_overload(op, name, "concat_and_cache_mla")
    schema = overload._schema
    types = {argument.name: str(argument.type) for argument in schema.arguments}
    rows = tuple(types)[:4]
    mutated = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if schema.returns or list(types.values())[:4] != ["Tensor"] * 4 or mutated != [*rows[2:3]]:
        raise BadConfig(
            f"{name}: got {schema}, allowed (Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slots, ...) -> (), "
            "which mutates the third argument alone; wrap the op in one of that form"
        )
    for setting, given, kinds in (
        ("cache_dtype", cache_dtype, ("str",)),
        ("cache_scale", cache_scale, ("Tensor", "Optional[Tensor]")),
    ):
        names = [argument for argument, kind in types.items() if kind in kinds and argument not in rows]
        if given is not None and given not in names:
            raise BadConfig(
                f"{name}: {setting}: got {given!r}, allowed None or one of {names}, the op's arguments of type "
                f"{kinds[0]}{did_you_mean(given, names)}"
            )
    if scaling not in _kv_cache.SCALINGS:
        raise BadConfig(
            f"{name}: scaling: got {scaling!r}, allowed {', '.join(map(repr, _kv_cache.SCALINGS))}: row / scale, or "
            f"row * (1 / scale); bytes differ{did_you_mean(scaling, _kv_cache.SCALINGS)}"
        )
    _register(
        CacheWriteAnchor(
            _qualified(overload),
            str(schema),
            None,
            None,
            "rows [kv_c | k_pe]",
            rows=(rows[0], rows[1], rows[2], rows[3]),
            cache_dtype=cache_dtype,
            cache_scale=cache_scale,
            scaling=scaling,
        ),
        name,
    )


def _register(anchor: Anchor, function: str) -> None:
    known = _registered.get(anchor.op)
    if known is not None and known != anchor:
        raise BadConfig(
            f"{function}: {anchor.op} is registered already as {known}, got {anchor}; allowed: one meaning per op"
        )
    _registered[anchor.op] = anchor


def _single_overload(op: Any, function: str, example: str) -> torch._ops.OpOverload:
    if isinstance(op, torch._ops.OpOverload):
        return op
    if isinstance(op, torch._ops.OpOverloadPacket):
        if len(op.overloads()) == 1:
            only: torch._ops.OpOverload = getattr(op, op.overloads()[0])
            return only
        raise BadConfig(
            f"{function}: got the packet {op} with overloads {op.overloads()}, allowed an overload; name one: "
            f"{op}.{op.overloads()[0]}"
        )
    raise BadConfig(
        f"{function}: got {op!r} of type {type(op).__name__}, allowed a torch.ops overload such as "
        f"torch.ops.mylib.{example}.default; register the function as a custom op first (torch.library)"
    )


def _qualified(overload: torch._ops.OpOverload) -> str:
    return f"{overload.namespace}::{overload._opname}.{overload._overloadname}"


register_anchor(_QUANT.overload, scale_mode_argument="scale_mode")

#: Ours has what no registered op needs: a second cache, and the scaling as an argument. Every backend has it.
CONCAT_AND_CACHE_MLA = CacheWriteAnchor(
    _qualified(_CACHE_WRITE.overload),
    str(_CACHE_WRITE.overload._schema),
    None,
    None,
    "rows [kv_c | k_pe]",
    ignored=("provider",),
    pe_cache="pe_cache",
    cache_scale="cache_scale",
    scaling_argument="scaling",
)
