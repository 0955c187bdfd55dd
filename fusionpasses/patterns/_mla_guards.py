"""What must hold of two rotations and a write to the MLA cache before one op may do all three."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses.ops import _kv_cache
from fusionpasses.patterns import _cache_write, _rope
from fusionpasses.patterns._absorbed import Absorbed
from fusionpasses.patterns._graph import (
    effect_of,
    is_contiguous,
    ordered_nodes,
    same_shape,
    storage_of,
    tensor_of,
    writes,
)
from fusionpasses.patterns._mla_write import Write
from fusionpasses.patterns._pass import Guard
from fusionpasses.patterns._rope import Rope
from fusionpasses.patterns._rope_edit import angle_axes, head_axis_of, tokens_first
from fusionpasses.patterns._rope_parts import CAST

aten = torch.ops.aten


@dataclasses.dataclass(eq=False)
class Candidate:
    """A write of rotated rows, and both rotations.

    Attributes:
        write, k: the write, and the rotation of its k.
        q: the rotation by the same angles, or None when there is none.
        absorbed: what makes the query of absorbed attention of the rotated q, or None.
        in_circle: something that the fused op reads is computed from what it gives.
        reader: a node that reads the cache as it was before the write, and is computed from the rotations.
        between: a node between the rotations and the write that writes to a tensor in place or draws random numbers.
    """

    write: Write
    k: Rope
    q: Rope | None
    absorbed: Absorbed | None = None
    in_circle: bool = False
    reader: fx.Node | None = None
    between: fx.Node | None = None

    @property
    def inputs(self) -> list[fx.Node]:
        """What the fused op reads, the caches as they were before it included."""
        nodes = [self.k.x, self.write.kv_c, self.k.cos.base, self.k.sin.base]
        if self.q is not None:
            nodes += [self.q.x, self.q.cos.base, self.q.sin.base]
        if self.absorbed is not None:
            nodes += self.absorbed.inputs
        nodes += [value for value in (self.write.slots, *self.write.options.values()) if isinstance(value, fx.Node)]
        return [*nodes, *self.bases]

    @property
    def bases(self) -> list[fx.Node]:
        """The versions of the caches that are written to, but for those that the write itself makes on the way."""
        made = [part.after for part in self.write.parts]
        return [part.before for part in self.write.parts if all(part.before is not node for node in made)]

    @property
    def read_elsewhere(self) -> bool:
        """Does anything but the write read the rotated k?"""
        inside = {*self.write.path, *self.write.nodes}
        return any(user not in inside for node in (self.k.root, *self.write.path) for user in node.users)


def look_around(graph: fx.Graph, candidates: Sequence[Candidate]) -> None:
    """Finds ops that would need what they give, perhaps by way of others, and readers between rotation and write.

    Asked once for all sites, before the graph is changed: which sites' results each node is computed from, as bits.
    """
    gives: dict[fx.Node, int] = {}
    for i, c in enumerate(candidates):
        for node in (c.k.root, *(part.after for part in c.write.parts), *([c.q.root] if c.q else [])):
            gives[node] = gives.get(node, 0) | 1 << i
    computed_from: dict[fx.Node, int] = {}
    for node in graph.nodes:
        bits = gives.get(node, 0)
        for source in node.all_input_nodes:
            bits |= computed_from[source]
        computed_from[node] = bits
    for i, c in enumerate(candidates):
        if c.absorbed is not None and computed_from[c.absorbed.q_nope] & 1 << i:
            c.absorbed = None  # q_nope is computed from what the op gives
    waiting = _in_circles(candidates, computed_from)
    if any(candidates[i].absorbed for i in waiting):  # by way of another site: perhaps it is q_nope that closes it
        for i in waiting:
            candidates[i].absorbed = None
        waiting = _in_circles(candidates, computed_from)
    ordered = ordered_nodes(graph)
    for i, c in enumerate(candidates):
        matched = [*c.k.nodes, *c.write.nodes, *(c.q.nodes if c.q else []), *(c.absorbed.nodes if c.absorbed else [])]
        first, last = min(matched), max(matched)
        c.between = next((node for node in ordered if first < node < last), None)
        if c.absorbed is not None and c.absorbed.product:
            # The product is of what its factors were before.
            changed = any(c.absorbed.product[-1] < node < last for node in ordered if writes(node))
            if changed or {_storage(node) for node in c.absorbed.inputs} & {_storage(node) for node in c.bases}:
                c.absorbed.product = []
        c.in_circle = i in waiting
        c.reader = _reader(c, computed_from, 1 << i)


def _in_circles(candidates: Sequence[Candidate], computed_from: dict[fx.Node, int]) -> set[int]:
    needs = []
    for c in candidates:
        bits = 0
        for node in c.inputs:
            bits |= computed_from[node]
        needs.append(bits)
    done = 0
    waiting = set(range(len(candidates)))
    while ready := {i for i in waiting if not needs[i] & ~done}:
        waiting -= ready
        for i in ready:
            done |= 1 << i
    return waiting


def _reader(c: Candidate, computed_from: dict[fx.Node, int], bit: int) -> fx.Node | None:
    chain = set(c.write.nodes)
    stack = [user for part in c.write.parts for user in part.before.users]
    seen = set(stack)
    while stack:
        user = stack.pop()
        is_view = user.target in _cache_write.VIEWS
        inside = user in chain or is_view or user.target is aten.copy_.default  # the epilogue's copy_
        if not inside and computed_from[user] & bit:
            return user
        if is_view or _is_lazy(user):
            new = [u for u in user.users if u not in seen]
            seen.update(new)
            stack += new
    return None


def _is_lazy(node: fx.Node) -> bool:
    """Does Inductor compute this where it is read, so that it is the reader who reads the cache?"""
    if node.target is CAST:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


# --- guards ----------------------------------------------------------------------------------------------------------


def _check_call(c: Candidate) -> str | None:
    return c.write.refused or None


def _check_pair(c: Candidate) -> str | None:
    if c.q is None:
        return f"no rotation of q by the same angles ({c.k.cos.base}, {c.k.sin.base})"
    return None


def _check_circle(c: Candidate) -> str | None:
    if c.in_circle:
        return "q, k, kv_c, slots or angles are computed from what the op would give, perhaps by way of another layer"
    return None


def _check_rotations(c: Candidate) -> str | None:
    for name, rope in (("k", c.k), ("q", c.q)):
        reason = None if rope is None else _rope.illegal(rope)
        if reason is not None:
            return f"rotation of {name}: {reason}"
    return None


def _check_rows(c: Candidate) -> str | None:
    kv_c, k, q = (tensor_of(node) for node in (c.write.kv_c, c.k.x, c.q.x if c.q else None))
    if kv_c is None or k is None or q is None:
        return "a tensor has no fake value"
    caches = [part.part for part in c.write.parts]
    dtypes = {cache.dtype for cache in caches}
    if kv_c.dtype != k.dtype or not dtypes <= {k.dtype, *(_kv_cache.FP8_DTYPES if c.write.by_op else ())}:
        return f"kv_c is {kv_c.dtype}, k_pe {k.dtype} and the cache {', '.join(map(str, dtypes))}; the write converts"
    written = [kv_c.shape[-1], k.shape[-1]]
    widths = [sum(written)] if len(caches) == 1 else written
    if not same_shape(widths, [cache.shape[-1] for cache in caches]):
        return f"kv_c and k_pe are {written} wide and the rows of the cache {[cache.shape[-1] for cache in caches]}"
    if c.write.counts_tokens:
        return None
    tokens = math.prod(k.shape[:-1])  # numel() would make numbers of symbols
    for part in c.write.parts:
        index = None if part.indices is None else tensor_of(part.indices[0])
        rows_of = {"kv_c": math.prod(kv_c.shape[:-1]), "slots": tokens if index is None else math.prod(index.shape)}
        if part.indices is None:
            rows_of["the part that is assigned to"] = math.prod(part.part.shape[:-1])
        for name, count in rows_of.items():
            if not statically_known_true(count == tokens):
                symbolic = not isinstance(count, int) or not isinstance(tokens, int)
                advice = "; if they are equal, say so to the compiler: torch._check(a.shape[0] == b.shape[0])"
                return f"{name} has {count} rows and k_pe {tokens}{advice if symbolic else ''}"
    return None


def _check_devices(c: Candidate) -> str | None:
    k = tensor_of(c.k.x)
    for node in c.inputs:
        value = tensor_of(node)
        if k is not None and value is not None and value.device != k.device:
            return f"{node} is on {value.device} and k_pe on {k.device}; the fused op takes one device"
    return None


def _check_heads(c: Candidate) -> str | None:
    q, k = tensor_of(c.q.x) if c.q else None, tensor_of(c.k.x)
    if q is None or k is None:
        return None
    axis = head_axis_of(q, k)
    if axis is None:
        return f"q_pe has shape {list(q.shape)} and k_pe {list(k.shape)}: not the same tokens, or k has heads"
    tokens_of_q: list[int | None] | None = None
    for rope, x, head in ((c.q, q, axis), (c.k, k, axis if k.dim() == q.dim() else None)):
        for table in (rope.cos, rope.sin) if rope else ():
            tokens = angle_axes(table, x, head)
            if tokens is None:
                return f"the angles ({table.base}) differ between heads"
            tokens_of_q = tokens_of_q or tokens
            if tokens != tokens_of_q:
                return f"q and k of one token are rotated by different rows of {table.base}"
    return None


def _check_strides(c: Candidate) -> str | None:
    """After _check_heads."""
    q, k = tensor_of(c.q.root) if c.q else None, tensor_of(c.k.root)
    if q is None or k is None:
        return None
    if not is_contiguous(k):
        return f"the rotated k has strides {list(k.stride())}"
    if is_contiguous(q) or c.absorbed is not None:
        return None
    if not is_contiguous(q.permute(tokens_first(q.dim(), head_axis_of(q, k) or 0))):
        return f"the rotated q has strides {list(q.stride())}; the fused op gives it tokens first, or contiguous"
    return None


def _check_versions(c: Candidate) -> str | None:
    if c.write.by_op or len(c.write.parts) == 1:
        return None
    first, second = sorted(c.write.parts, key=lambda part: part.after)
    if first.before is second.before:
        return f"kv_c and k_pe are written to two versions of one tensor ({first.before})"
    return None


def _check_read(c: Candidate) -> str | None:
    if c.reader is not None:
        return f"{c.reader.name} reads the cache between the rotation and the write; the fused op would need a copy"
    return None


def _check_between(c: Candidate) -> str | None:
    if c.between is None:
        return None
    return f"{effect_of(c.between)} between the rotation and the write; what is moved would pass it"


def _check_overlap(c: Candidate) -> str | None:
    """The op may write before it has read everything, and either part first."""
    caches = {_storage(node) for node in c.bases}
    for node in c.inputs:
        if node not in c.bases and _storage(node) in caches:
            return f"{node} is a part of the cache that is written; the fused op may write it before it is read"
    if c.write.by_op or len(c.write.parts) == 1 or len(c.bases) > 1:
        return None
    kv_c, k = (part.part for part in c.write.parts)
    if _apart(kv_c, k) or _apart(k, kv_c):
        return None
    return "the parts for kv_c and k_pe may overlap in the cache; the fused op may write either first"


def _storage(node: fx.Node) -> Any:
    value = tensor_of(node)
    return None if value is None else storage_of(value)


def _apart(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Is every row of ``b`` known to lie right of the same row of ``a``, and before all others of ``a``?"""
    sizes = [*a.shape, *a.stride(), *b.stride(), b.shape[-1], a.storage_offset(), b.storage_offset()]
    if not same_shape(a.stride(), b.stride()) or not all(isinstance(size, int) for size in sizes):
        return False
    between = int(b.storage_offset() - a.storage_offset())
    extent = between + b.shape[-1]  # of both rows; from the smallest step up, each must clear everything inside it
    for stride, size in sorted(zip(a.stride()[:-1], a.shape[:-1], strict=True)):
        if size != 1 and stride < extent:
            return False
        extent += (size - 1) * stride
    return between >= a.shape[-1]


def _check_base(c: Candidate) -> str | None:
    caches = {_storage(node) for node in c.bases}
    if len(caches) < len({*c.bases}):
        return "the caches are two tensors that share memory"
    return None


GUARDS = (
    Guard("call", "an op that writes rows is called in a way that the fused op has", _check_call),
    Guard("rotations", "both are rotations that the op does", _check_rotations),
    Guard("q", "q is rotated by the same angles", _check_pair),
    Guard("order", "nothing that the op reads is computed from what it gives", _check_circle),
    Guard("rows", "kv_c, k_pe and the cache have one dtype and the same tokens", _check_rows),
    Guard("devices", "all tensors are on one device", _check_devices),
    Guard("heads", "q has heads, k has one, and the angles are the same for all", _check_heads),
    Guard("strides", "the rotated q is contiguous, or would be with tokens first; k is contiguous", _check_strides),
    Guard("versions", "kv_c and k_pe are written one after the other, or to two tensors", _check_versions),
    Guard("memory", "two caches share no memory", _check_base),
    Guard("overlap", "no input is a part of the cache; kv_c and k_pe go to other elements of a row", _check_overlap),
    Guard(
        "order", "nothing writes to a tensor or draws random numbers between the rotation and the write", _check_between
    ),
    Guard("reads", "nothing reads the cache between the rotation and the write", _check_read),
)
