"""RoPE + write to the MLA cache: both rotations and the write of ``[kv_c | rope(k_pe)]`` become one op.

The anchor is the write, in any spelling that leaves the graph in functional form: ``concat_and_cache_mla`` or an op
registered as one, ``index_put`` (which ``index_copy_`` becomes, too) with one index or with block and offset,
assignments to slices, into one cache or two. From its rows the pass walks back to the rotation of k, and looks for the
rotation of q by the same angles.

=====================================  =============================================================
fused_rope_mla_kv_cache                rotated k is only written, as in absorbed decode
fused_rope_mla_kv_cache.with_k         something else reads it, as in prefill with expanded keys
fused_rope_mla_kv_cache.absorbed       rotated q is only read by ``cat([q_nope, rope(q_pe)], -1)``
...absorbed_with_k                     both
...absorbed_bmm, absorbed_bmm_with_k   and q_nope is a bmm that nothing else reads: the product is written in place
=====================================  =============================================================

The op mutates its cache. In the functional graph that is ``auto_functionalized_v2(op, ..., _all_bases=[before])``,
whose last results are the next versions of the bases; where in its base a cache lies is told by size, stride and
offset, which is what keeps a layer's rows in that layer's part of a stacked cache.

Angles. ``cos_table[positions]`` that this site alone reads is taken into the op (``positions=``): a kernel less per
layer. Models gather once, though, and hand the rows to all layers; those are kept. Each layer's op reads as many bytes
either way, and to look the position up first would make every layer wait for one more load to save a single kernel
in the whole graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusionpasses import providers
from fusionpasses.anchors import CONCAT_AND_CACHE_MLA, Anchor, CacheWriteAnchor
from fusionpasses.config import FusionConfig
from fusionpasses.patterns import _absorbed, _mla_write, _rope
from fusionpasses.patterns._cache_write import VIEWS, CacheWrite
from fusionpasses.patterns._graph import SITE, erase_dead, tensor_of
from fusionpasses.patterns._mla_guards import GUARDS, Candidate, look_around
from fusionpasses.patterns._mla_write import WRAPPERS, WRITE_GUARDS, Write, same_place
from fusionpasses.patterns._pass import FusionPass, Judgement, first_failure
from fusionpasses.patterns._rope import Rope
from fusionpasses.patterns._rope_edit import Edit, gathered, head_axis_of, tokens_first
from fusionpasses.report import FUSED, NOTHING, REFUSED, Site, Where

aten = torch.ops.aten
fused_ops = torch.ops.fusionpasses.fused_rope_mla_kv_cache
#: By what is read: the rotated q, or the query of absorbed attention, whose q_nope may be a bmm; and the rotated k.
OVERLOADS = {
    ("q", False): fused_ops.default,
    ("q", True): fused_ops.with_k,
    ("absorbed", False): fused_ops.absorbed,
    ("absorbed", True): fused_ops.absorbed_with_k,
    ("absorbed bmm", False): fused_ops.absorbed_bmm,
    ("absorbed bmm", True): fused_ops.absorbed_bmm_with_k,
}

#: What may be done to rows on the way to a cache that the fused op does not do.
_CHANGES = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.where.self,
    aten.clamp.default,
    torch.ops.prims.convert_element_type.default,
)


class RopeMlaKvCache(FusionPass):
    name = "fused_rope_mla_kv_cache"
    spellings = {
        "how results of a rotation are joined": _rope.JOINS,
        "how its products are summed": _rope.SUMS,
        "complex rotations, which are refused": _rope.COMPLEX,
    }
    guards = {"rotation": _rope.GUARDS, "write": WRITE_GUARDS, "site": GUARDS}
    anchor_class = CacheWriteAnchor
    targets = _mla_write.TARGETS

    def __init__(self, config: FusionConfig, anchors: tuple[Anchor, ...], *, keep_subgraphs: bool = False) -> None:
        super().__init__(config, (CONCAT_AND_CACHE_MLA, *anchors), keep_subgraphs=keep_subgraphs)
        self._writers = {op: anchor for op, anchor in self.anchors.items() if isinstance(anchor, CacheWriteAnchor)}

    def begin(self, graph: fx.Graph) -> None:
        # All of them now: writes are visited last to first, and a rewrite moves what is behind it.
        self._candidates: dict[fx.Node, Candidate] = {}
        self._left: dict[fx.Node, str] = {}
        self._changed = False
        self._shared: dict[Any, fx.Node] = {}
        rotated = self._rotated_writes(graph)
        written = {k.root for _, k in rotated.values()}
        alone = [] if rotated else [rope for node in graph.nodes if (rope := _one_head(node)) is not None]
        if not rotated and not alone:
            return
        ropes = [rope for node in graph.nodes if node not in written and (rope := _rope.recognise(node))]
        legal = [rope for rope in ropes if _rope.illegal(rope) is None]
        illegal = [rope for rope in ropes if rope not in legal]
        for anchor, (write, k) in rotated.items():
            c = Candidate(write, k, _rope.pair(k, legal) or _rope.pair(k, illegal))  # an illegal one for its reason
            legal = [rope for rope in legal if rope is not c.q]  # each q belongs to one k
            self._candidates[anchor] = c
            q, of_k = tensor_of(c.q.x) if c.q else None, tensor_of(k.x)
            head = head_axis_of(q, of_k) if q is not None and of_k is not None else None
            if c.q is not None and head is not None:
                c.absorbed = _absorbed.recognise(c.q, head)
        look_around(graph, list(self._candidates.values()))
        self._judged += self._left_alone([rope for rope in legal if _one_head(rope.root)], legal)

    def _rotated_writes(self, graph: fx.Graph) -> dict[fx.Node, tuple[Write, Rope]]:
        """The writes of rotated rows, and the rotation of each, by anchor. No write of a tensor is part of two."""
        found: dict[fx.Node, tuple[Write, Rope]] = {}
        writes = _mla_write.recognise(graph, self._writers)
        taken: set[CacheWrite] = set()
        for parts in (1, 2):  # a write of whole rows needs no other beside it
            for anchor, readings in writes.items():
                for write in readings:
                    if anchor in found or len(write.parts) > parts or not taken.isdisjoint(write.parts):
                        continue
                    rope = _rope.recognise(write.k)
                    if rope is not None:
                        found[anchor] = write, rope
                        taken.update(write.parts)
        for anchor, readings in writes.items():
            if anchor not in found and readings and readings[0].by_op:
                k = readings[0].k
                made_by = "an input of the graph" if k.op == "placeholder" else k.target
                self._left[anchor] = f"k_pe is no rotation: {_rope.explain(k) or made_by}"
            elif anchor not in found and anchor.target in WRAPPERS:
                self._left[anchor] = "what the call writes is not put back into a tensor that is read"
        return {anchor: found[anchor] for anchor in sorted(found)}

    def end(self, graph: fx.Graph) -> None:
        if self._changed:
            from torch._inductor.pattern_matcher import stable_topological_sort

            stable_topological_sort(graph)

    def judge(self, node: fx.Node) -> Judgement | None:
        name = str(node.args[0] if node.target in WRAPPERS else node.target)
        here = Where.of(node.meta)
        site = Site(self.name, REFUSED, name.removeprefix("fusionpasses."), here, (here,))
        c = self._candidates.get(node)
        if c is None:
            site.reason = self._left.get(node, "")
            return Judgement(site, node, None) if site.reason else None
        site.spelling = c.k.spelling
        for part in c.write.parts:
            site.reason = site.reason or first_failure(WRITE_GUARDS, part) or ""
        site.reason = site.reason or first_failure(GUARDS, c) or ""
        x = tensor_of(c.k.x)
        if not site.reason and any(n._erased for n in (*c.inputs, c.k.root, *([c.q.root] if c.q else []))):
            site.reason = "it reads what another site was that is rewritten"
        if site.reason or c.q is None or x is None:
            return Judgement(site, node, None)
        read = "q" if c.absorbed is None else "absorbed bmm" if c.absorbed.product else "absorbed"
        op = OVERLOADS[read, c.read_elsewhere]
        op_name = f"{op._opname}.{op._overloadname}"
        provider = providers.select(op_name, x.device.type, self.config.provider)
        if provider == "reference" and x.device.type != "cpu" and self.config.provider != provider:
            # Several kernels where Inductor makes few: correct, and slower.
            site.reason = f"no kernel for {op_name} on {x.device.type} yet; provider='reference' fuses nevertheless"
            return Judgement(site, node, None)
        site.status, site.op, site.provider, site.where = FUSED, op_name, provider, Where.of(c.k.root.meta)
        return Judgement(site, node, lambda: self._rewrite(c, op, site))

    def _rewrite(self, c: Candidate, op: Any, site: Site) -> None:
        q_rope, k_rope = c.q, c.k
        q, k = tensor_of(q_rope.x) if q_rope else None, tensor_of(k_rope.x)
        head = head_axis_of(q, k) if q is not None and k is not None else None
        if q_rope is None or q is None or k is None or head is None:
            raise RuntimeError(f"{self.name}: a site that was refused was to be rewritten")
        graph = q_rope.root.graph
        matched = [*q_rope.nodes, *k_rope.nodes, *c.write.path, *c.write.nodes]
        matched += [*c.absorbed.nodes, *c.absorbed.product] if c.absorbed else []
        tables = gathered(q_rope, k_rope, head)
        if self.keep_subgraphs:
            site.matched = _text(matched)
        edit = Edit(graph, c.write.parts[0].nodes[0], self._shared)
        with graph.inserting_before(c.write.parts[0].nodes[0]):
            order = tokens_first(q.dim(), head)
            rows = [-1, edit.size(q_rope.x, head)]
            kv_c = edit.reshape(c.write.kv_c, [-1, edit.size(c.write.kv_c, -1)])
            kwargs: dict[str, Any] = {
                "q_pe": edit.reshape(edit.permute(q_rope.x, order), [*rows, q.shape[-1]]),
                "k_pe": edit.reshape(k_rope.x, [-1, k.shape[-1]]),
                "kv_c": kv_c,
                "slots": edit.slots(c.write, kv_c),
                "style": q_rope.style,
                "negative_slots": c.write.negative_slots,
                "cache_scale": None,
                "scaling": "divide",
                "provider": site.provider,
                **c.write.options,
            }
            if tables is None:
                kwargs["cos"], kwargs["sin"] = (edit.angles(q_rope, t, head) for t in (q_rope.cos, q_rope.sin))
                kwargs["positions"] = None
            else:
                kwargs["cos"], kwargs["sin"] = (
                    edit.columns(q_rope.cos, tables.cos),
                    edit.columns(q_rope.sin, tables.sin),
                )
                kwargs["positions"] = edit.per_token(tables.positions, tables.axes, q_rope.x, head)
                matched += tables.nodes
            if c.absorbed is not None and c.absorbed.product:
                kwargs["q_nope"], kwargs["w_uk"] = c.absorbed.product[-1].args
            elif c.absorbed is not None:
                width = edit.size(c.absorbed.q_nope, -1)
                kwargs["q_nope"] = edit.reshape(edit.permute(c.absorbed.q_nope, c.absorbed.order), [*rows, width])
            bases, after = _versions(c.write)
            for name, part in zip(("kv_cache", "pe_cache"), c.write.parts, strict=False):
                kwargs |= _place(name, after.index(part.after) if part.after in after else 0, part)
            if len(c.write.parts) == 1:
                kwargs["_pe_cache_base_index"] = None
            kwargs["_all_bases"] = bases
            fused = edit.fused(op, kwargs, after)
            fused.meta[SITE] = site
            returned = len(op._schema.returns)
            if c.absorbed is None:
                new_q = edit.unordered(edit.getitem(fused, 0), q_rope.x, order)
                replaced = {q_rope.root: edit.strided_as(new_q, q_rope.root)}
            else:
                known = c.absorbed.know_sizes(q_rope) if c.absorbed.product else None
                new_q = edit.unordered(edit.getitem(fused, 0), c.absorbed.q_nope, c.absorbed.order, known)
                replaced = {c.absorbed.cat: new_q}
            if c.read_elsewhere:
                new_k = edit.unordered(edit.getitem(fused, 1), k_rope.x, list(range(k.dim())))
                replaced[k_rope.root] = edit.strided_as(new_k, k_rope.root)
            for i, old in enumerate(after):
                replaced[old] = edit.getitem(fused, returned + i)
        for old, new in replaced.items():
            old.replace_all_uses_with(new)
        if self.keep_subgraphs:
            site.replacement = _text([fused, *fused.users])
        self._changed = True
        erase_dead(matched)

    def _left_alone(self, ks: list[Rope], qs: list[Rope]) -> list[Judgement]:
        """Rotations of MLA (many heads of q, one of k) whose k is written to no cache as it is."""
        judged = []
        for k in ks:
            q = _rope.pair(k, [rope for rope in qs if rope is not k])
            of_q, of_k = tensor_of(q.x) if q else None, tensor_of(k.x)
            head = head_axis_of(of_q, of_k) if of_q is not None and of_k is not None else None
            if of_q is None or head is None or statically_known_true(of_q.shape[head] == 1):
                continue
            status, fate = self._fate(k.root)
            if not fate:
                continue
            reason = f"k has one head and q {of_q.shape[head]}, as in MLA, but {fate}"
            site = Site(self.name, status, "rope", Where.of(k.root.meta), spelling=k.spelling, reason=reason)
            judged.append(Judgement(site, k.root, None))
        return judged

    def _fate(self, k: fx.Node) -> tuple[str, str]:
        """Status and reason of a rotated k that no recognised write takes; no reason if its write has one."""
        stack: list[tuple[fx.Node, str]] = [(k, "")]
        seen = {k}
        while stack:
            node, changed_by = stack.pop()
            for user in node.users:
                if user in seen:
                    continue
                seen.add(user)
                if user.target is aten.expand.default:
                    return (
                        NOTHING,
                        "k is expanded to all heads; what is cached then, if anything is, are no rows [kv_c | k_pe]",
                    )
                if user.target in WRAPPERS:
                    if user.args[0] in self._writers:
                        return REFUSED, ""
                    return NOTHING, (
                        f"k is handed to {user.args[0]}; if that writes rows [kv_c | k_pe] to a cache, register it: "
                        "fusionpasses.register_cache_write_anchor"
                    )
                if user.target in _mla_write.TARGETS:
                    how = f"are computed from it by {changed_by}" if changed_by else "are not [kv_c | k_pe]"
                    return REFUSED, f"the rows that {user.target} writes {how}"
                if user.target in _CHANGES:
                    stack.append((user, changed_by or str(user.target)))
                elif user.target in (*VIEWS, aten.cat.default):
                    stack.append((user, changed_by))
        return NOTHING, "k is written to no cache"


def _one_head(node: fx.Node) -> Rope | None:
    """The rotation whose result is ``node``, if it has one head or no axis of heads: perhaps the k of MLA."""
    value = tensor_of(node) if node.target in _rope.ROOTS else None
    if value is None or value.dim() < 2:
        return None
    if value.dim() > 2 and not any(statically_known_true(size == 1) for size in value.shape[:-1]):
        return None
    return _rope.recognise(node)


def _versions(write: Write) -> tuple[list[fx.Node], list[fx.Node]]:
    """The tensors that are written to, and the last version of each."""
    bases: list[fx.Node] = []
    after: list[fx.Node] = []
    for part in sorted(write.parts, key=lambda part: part.after):
        if after and part.before is after[-1]:
            after[-1] = part.after  # the next version of the same base
        elif part.before in bases:
            after[bases.index(part.before)] = part.after  # two arguments of one op
        else:
            bases.append(part.before)
            after.append(part.after)
    return bases, after


def _place(name: str, base_index: int, part: CacheWrite) -> dict[str, Any]:
    """How ``auto_functionalized_v2`` is told which part of a base an argument is."""
    kwargs: dict[str, Any] = {**(part.place or {}), f"_{name}_base_index": base_index}
    if part.place is not None:
        return kwargs
    if not same_place(part.part, tensor_of(part.before)):
        kwargs[f"_{name}_size"] = list(part.part.shape)
        kwargs[f"_{name}_stride"] = list(part.part.stride())
        kwargs[f"_{name}_storage_offset"] = part.part.storage_offset()
    return kwargs


def _text(nodes: Any) -> str:
    return "\n".join(str(n.format_node()) for n in sorted(set(nodes)))


PASS = RopeMlaKvCache
