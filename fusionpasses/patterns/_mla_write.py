"""Writes of MLA rows ``[kv_c | k_pe]``: into one latent cache, or into one for kv_c and one for k_pe.

Spelled as ``concat_and_cache_mla``, or an op that was registered as one, under ``auto_functionalized`` of either
version; or as writes of :mod:`_cache_write`: of ``cat([kv_c, k_pe], -1)``, or of kv_c and of k_pe to the same slots,
one right after the other.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses.anchors import CACHE_DTYPES, CONCAT_AND_CACHE_MLA, CacheWriteAnchor
from fusionpasses.ops import _kv_cache
from fusionpasses.ops._indices import INDEX_DTYPES
from fusionpasses.patterns import _cache_write
from fusionpasses.patterns._cache_write import CacheWrite
from fusionpasses.patterns._graph import same_shape, tensor_of
from fusionpasses.patterns._pass import Guard
from fusionpasses.patterns._rope_parts import same_value
from fusionpasses.patterns._views import is_row_view

aten = torch.ops.aten

#: What mutating ops are wrapped by in a functional graph. The first is made when Inductor's
#: enable_auto_functionalized_v2 is off.
WRAPPERS: tuple[Any, ...] = (auto_functionalized, auto_functionalized_v2)
#: Nodes that may be the anchor of a write.
TARGETS: tuple[Any, ...] = (*_cache_write.TARGETS, *WRAPPERS)


@dataclasses.dataclass(eq=False)
class Write:
    """A write of ``[kv_c | k]``: one, or one of kv_c and one of k.

    Attributes:
        parts: what is written to: one cache, or that for kv_c and that for k.
        slots: the slot of each token, or None when row i of the tokens goes to row i of the part.
        negative_slots: what a slot below 0 means, as the fused op says it.
        path: the nodes between k and the write.
        options: arguments of the fused op that the write decides.
        by_op: by an op that converts to the cache's dtype.
        counts_tokens: by an op that refuses, as the fused one does, other numbers of rows than of slots.
        refused: why a call of that op is none of the fused op's, or "".
    """

    parts: tuple[CacheWrite, ...]
    kv_c: fx.Node
    k: fx.Node
    slots: fx.Node | None
    path: list[fx.Node]
    negative_slots: str = "wrap"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    by_op: bool = False
    counts_tokens: bool = False
    refused: str = ""

    @property
    def nodes(self) -> list[fx.Node]:
        return list(dict.fromkeys(node for part in self.parts for node in part.nodes))


def recognise(graph: fx.Graph, ops: Mapping[Any, CacheWriteAnchor]) -> dict[fx.Node, list[Write]]:
    """Every write of a graph that may be one of MLA rows, by its anchor: each way to read it, likeliest first.

    ``ops`` are those that write whole rows, by overload.
    Nothing is said yet of what k is: rows joined of two may be ``[kv_c | k]``, or k itself.
    """
    anchors = [node for node in graph.nodes if node.target in _cache_write.TARGETS]
    found = [(node, write) for node in anchors if (write := _cache_write.recognise(node))]
    writes: dict[fx.Node, list[Write]] = {}
    for at, (node, write) in enumerate(found):
        beside = [found[i][1] for i in (at - 1, at + 1) if 0 <= i < len(found)]
        readings = [_of_both(write), *(_of_two(other, write) for other in beside)]
        writes[node] = [reading for reading in readings if reading is not None]
    for node in graph.nodes:
        if node.target in WRAPPERS and node.args[0] in ops:
            called = _by_op(node, ops[node.args[0]])
            writes[node] = [] if called is None else [called]
    return writes


def rows_below(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node below views that keep rows and their order, and those views."""
    views = []
    while is_row_view(node) or _moves_ones(node) or _takes_the_only(node):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        views.append(node)
        node = source
    return node, views


def _moves_ones(node: fx.Node) -> bool:
    """A permutation that leaves the order of the elements as it is, because it moves axes of size 1 only."""
    value = tensor_of(node.args[0]) if node.target is aten.permute.default else None
    if value is None:
        return False
    dims: Any = node.args[1]
    long = [d % len(dims) for d in dims if not statically_known_true(value.shape[d] == 1)]
    return long == sorted(long)


def _takes_the_only(node: fx.Node) -> bool:
    """``x[:, 0]`` of an axis of size 1."""
    value = tensor_of(node.args[0]) if node.target is aten.select.int else None
    return value is not None and statically_known_true(value.shape[node.args[1]] == 1)  # type: ignore[index]


def _of_both(write: CacheWrite) -> Write | None:
    """A write of ``cat([kv_c, k], -1)``."""
    rows, path = rows_below(write.rows)
    value = tensor_of(rows)
    if rows.target is not aten.cat.default or value is None or rows.kwargs:
        return None
    parts, dim = rows.args[0], rows.args[1] if len(rows.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (-1, value.dim() - 1):
        return None
    kv_c, k = parts
    if not isinstance(kv_c, fx.Node) or not isinstance(k, fx.Node):
        return None
    k, views = rows_below(k)
    return Write((write,), kv_c, k, slots_of(write), [*path, rows, *views], write.negative)


def _of_two(of_kv_c: CacheWrite, of_k: CacheWrite) -> Write | None:
    same_rows = same_shape(of_kv_c.part.shape[:-1], of_k.part.shape[:-1])
    if not same_value(of_kv_c.indices, of_k.indices) or not same_rows or of_kv_c.negative != of_k.negative:
        return None
    k, path = rows_below(of_k.rows)
    return Write((of_kv_c, of_k), of_kv_c.rows, k, slots_of(of_k), path, of_k.negative)


def _by_op(node: fx.Node, anchor: CacheWriteAnchor) -> Write | None:
    """A call of an op that writes rows: where its caches are is told by the call, or by the views around it."""
    kwargs = node.kwargs
    of_kv_c, of_k_pe, of_cache, of_slots = anchor.rows
    kv_c, k, slots = kwargs[of_kv_c], kwargs[of_k_pe], kwargs[of_slots]
    if not (isinstance(kv_c, fx.Node) and isinstance(k, fx.Node) and isinstance(slots, fx.Node)):
        return None
    part_of = _part_by_place if node.target is auto_functionalized_v2 else _part_by_views
    parts = [part_of(node, of_cache, 0, kv_c, slots)]
    if anchor.pe_cache is not None and _is_given(node, anchor.pe_cache):
        parts.append(part_of(node, anchor.pe_cache, 1, k, slots))
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    rotated, path = rows_below(k)
    options, refused = _options(kwargs, anchor, found[0].part)
    ours = anchor is CONCAT_AND_CACHE_MLA
    return Write(tuple(found), kv_c, rotated, slots, path, "skip", options, True, counts_tokens=ours, refused=refused)


def _is_given(node: fx.Node, name: str) -> bool:
    return any(node.kwargs.get(key) is not None for key in (name, f"_{name}_base_index"))


def _options(kwargs: Mapping[str, Any], anchor: CacheWriteAnchor, cache: torch.Tensor) -> tuple[dict[str, Any], str]:
    """The fused op's arguments for float8 caches, and why there are none for this call, or ""."""
    schema = anchor.target._schema
    for argument in schema.arguments:
        name = argument.name
        known = name in anchor.arguments or name in anchor.ignored
        if not known and name in kwargs and kwargs[name] != argument.default_value:
            return {}, f"{schema.name} is called with {name}={kwargs[name]}; only its default is known to the pass"
    scaling = kwargs[anchor.scaling_argument] if anchor.scaling_argument is not None else anchor.scaling
    scale = kwargs[anchor.cache_scale] if anchor.cache_scale is not None else None
    float8 = cache.dtype in _kv_cache.FP8_DTYPES
    if anchor.cache_dtype is not None:
        said = kwargs[anchor.cache_dtype]
        if said not in CACHE_DTYPES:
            allowed = ", ".join(map(repr, CACHE_DTYPES))
            return {}, f"{schema.name} is called with {anchor.cache_dtype}={said!r}; the fused op has {allowed}"
        if CACHE_DTYPES[str(said)] != float8:
            return {}, f"{schema.name} is called with {anchor.cache_dtype}={said!r} and a cache of {cache.dtype}"
        scale = scale if float8 else None  # rows as they are: such an op takes a scale, and does not look at it
    value = tensor_of(scale)
    if scale is not None and (value is None or value.dtype != torch.float32 or math.prod(value.shape) != 1):
        return {}, f"the scale of {schema.name} is {scale}; the fused op takes one float32 in a tensor"
    if value is not None and value.dim() > 1:
        return {}, f"the scale of {schema.name} has shape {list(value.shape)}; the fused op takes [] or [1]"
    return {"cache_scale": scale, "scaling": scaling}, ""


def _part_by_views(node: fx.Node, name: str, number: int, rows: fx.Node, slots: fx.Node) -> CacheWrite | None:
    """The cache of a call of the first wrapper, whose results are a None and the written caches."""
    cache = node.kwargs[name]
    after = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 1 + number), None)
    if not isinstance(cache, fx.Node) or after is None:
        return None
    return _cache_write.put_back(cache, after, rows, (slots,), [node, after])


def _part_by_place(node: fx.Node, name: str, number: int, rows: fx.Node, slots: fx.Node) -> CacheWrite | None:
    """The cache of a call of the second wrapper, whose results are a None and the bases of the written caches."""
    bases: Any = node.kwargs["_all_bases"]
    at: Any = node.kwargs[f"_{name}_base_index"]
    place = {key: value for key, value in node.kwargs.items() if key.startswith(f"_{name}_")}
    part = _part(bases[at], name, place)
    after = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 1 + at), None)
    if part is None or after is None:
        return None
    return CacheWrite(bases[at], after, part, rows, (slots,), False, [node, after], place=place)


def part_of(node: fx.Node, name: str) -> torch.Tensor | None:
    """What a wrapper hands to its op as the argument ``name``, which the op writes to; None if nothing is known."""
    if node.target is not auto_functionalized_v2:
        return tensor_of(node.kwargs.get(name))
    bases: Any = node.kwargs["_all_bases"]
    at: Any = node.kwargs.get(f"_{name}_base_index")
    place = {key: value for key, value in node.kwargs.items() if key.startswith(f"_{name}_")}
    return None if at is None else _part(bases[at], name, place)


def _part(base: fx.Node, name: str, place: dict[str, Any]) -> torch.Tensor | None:
    whole = tensor_of(base)
    mode = detect_fake_mode(whole)
    if whole is None or mode is None:
        return None
    values = fx.map_arg(place, lambda n: n.meta["val"])
    prefix = f"_{name}_"
    with mode:
        if f"{prefix}storage_offset" in values:
            return torch.as_strided(
                whole, values[f"{prefix}size"], values[f"{prefix}stride"], values[f"{prefix}storage_offset"]
            )
        if f"{prefix}slice_dim" in values:
            start, end = values[f"{prefix}slice_start"], values[f"{prefix}slice_end"]
            sliced: torch.Tensor = aten.slice.Tensor(whole, values[f"{prefix}slice_dim"], start, end)
            return sliced
    return whole


def slots_of(write: CacheWrite) -> fx.Node | None:
    """The slots of an indexed write, if they are one tensor."""
    indices = write.indices or ()
    if len(indices) == 1:
        return indices[0]
    if len(indices) != 2:
        return None
    block, offset = indices
    split = block.target is aten.div.Tensor_mode and block.kwargs == {"rounding_mode": "floor"}
    same = offset.target is aten.remainder.Scalar and not offset.kwargs and same_value(block.args, offset.args)
    if split and same and isinstance(block.args[0], fx.Node) and block.args[1] == write.part.shape[1]:
        return block.args[0]
    return None


def _check_accumulate(write: CacheWrite) -> str | None:
    return "the write adds to the cache (accumulate=True)" if write.accumulate else None


def _check_indices(write: CacheWrite) -> str | None:
    if write.indices is None:
        return None
    count = len(write.indices)
    by_op = write.nodes[0].target in WRAPPERS  # which finds block and offset by itself
    if count > 2 or (write.part.dim() != count + 1 and not by_op):
        shape = list(write.part.shape)
        return f"{count} axes of a part of shape {shape} are indexed; allowed slots, or blocks and offsets"
    for index in write.indices:
        value = tensor_of(index)
        if value is None or value.dim() != 1 or value.dtype not in INDEX_DTYPES:
            got = "unknown" if value is None else f"{value.dtype} {list(value.shape)}"
            return f"the slots ({index.name}) are {got}; the fused op takes int32 or int64 of one axis"
    if slots_of(write) is None:
        names = ", ".join(index.name for index in write.indices)
        return f"block and offset ({names}) are not slot // {write.part.shape[1]} and slot % that of one tensor"
    return None


def _check_place(write: CacheWrite) -> str | None:
    part, base = write.part, tensor_of(write.before)
    if part.dim() not in (2, 3):
        return f"the part written to has shape {list(part.shape)}; allowed [slots, D] or [blocks, block, D]"
    if not statically_known_true(part.stride(-1) == 1):
        return f"the cache has strides {list(part.stride())}; the fused op needs a last stride of 1"
    if same_place(part, base):
        return None
    # A call that tells the place has nodes for its sizes; an offset that is a symbol is lost by Inductor.
    told = () if write.place is not None else (*part.shape, *part.stride())
    if any(isinstance(s, torch.SymInt) for s in (*told, part.storage_offset())):
        return "the cache is a part of another tensor, and its own size is symbolic; mark only the tokens as dynamic"
    if base is None or not statically_known_true(base.storage_offset() == 0):
        return "the cache is a part of a tensor that does not begin where its storage does"
    return None


def same_place(part: torch.Tensor, base: torch.Tensor | None) -> bool:
    return (
        base is not None
        and same_shape(part.shape, base.shape)
        and same_shape(part.stride(), base.stride())
        and statically_known_true(part.storage_offset() == base.storage_offset())
    )


WRITE_GUARDS = (
    Guard("no accumulation", "the rows replace what was there", _check_accumulate),
    Guard("slots", "one tensor of slots, or slot // block and slot % block of one", _check_indices),
    Guard("place", "rows of contiguous elements, at a place in the base that is known", _check_place),
)
