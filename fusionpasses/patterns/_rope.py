"""Recognises rotary position embedding (RoPE) in a post-grad graph, and says why when it is only almost one.

Every spelling is read as the same four products. With (a, b) the pairs of x, the rotated tensor holds

    first  = a * cos - b * sin
    second = b * cos + a * sin

so a spelling comes down to three questions: which elements of x each product reads, which entries of which table it
multiplies them by, and where the two results are written. Tables of small patterns take the arithmetic apart; the
places of elements are computed, because slices, splits, unbinds and selects say the same in many ways. Negation is
exact and a sum commutes, so signs and operand orders need no spelling of their own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.pattern_matcher import MULTIPLE, CallFunction, KeywordArg, Match, PatternExpr

from fusionpasses.patterns._graph import tensor_of
from fusionpasses.patterns._pass import Spelling
from fusionpasses.patterns._rope_guards import GUARDS, Join, Product, Rope, check_parts, illegal
from fusionpasses.patterns._rope_parts import (
    CAST,
    VIEWS,
    Table,
    columns_taken,
    deinterleaved,
    layout_of,
    pair_columns,
    part_of,
    same_value,
    table_of,
    whole_of,
)

__all__ = [
    "COMPLEX",
    "GUARDS",
    "JOINS",
    "ROOTS",
    "STYLES",
    "SUMS",
    "Rope",
    "Table",
    "computed_from",
    "explain",
    "illegal",
    "mismatch",
    "pair",
    "recognise",
]

aten = torch.ops.aten

#: Style of the op by where pairs are read and written.
STYLES = {
    ("halves", "halves"): "neox",
    ("pairs", "pairs"): "interleaved",
    ("pairs", "halves"): "interleaved_to_neox",
}


def _call(target: Any, *args: Any) -> CallFunction:
    # Readers are looked at by hand, so an inner node may have any number of users.
    return CallFunction(target, *args, _users=MULTIPLE)


def _product(i: int) -> PatternExpr:
    return _call(aten.mul.Tensor, KeywordArg(f"left{i}"), KeywordArg(f"right{i}"))


def _joins() -> tuple[Spelling, ...]:
    first, second, dim = KeywordArg("first"), KeywordArg("second"), KeywordArg("dim")
    stacked = _call(
        aten.cat.default,
        [
            _call(aten.unsqueeze.default, first, KeywordArg("first_axis")),
            _call(aten.unsqueeze.default, second, KeywordArg("second_axis")),
        ],
        dim,
    )
    return (
        Spelling("pairs", _call(VIEWS, stacked, KeywordArg("sizes"))),
        Spelling("halves", _call(aten.cat.default, [first, second], dim)),
    )


def _complex() -> tuple[Spelling, ...]:
    x = _call(aten.view_as_complex.default, _call(VIEWS, KeywordArg("x"), KeywordArg("pairs")))
    freqs = KeywordArg("freqs")
    return tuple(
        Spelling(
            "complex", _call(VIEWS, _call(aten.view_as_real.default, _call(aten.mul.Tensor, *order)), KeywordArg("out"))
        )
        for order in ((x, freqs), (freqs, x))
    )


JOINS = _joins()
SUMS = (
    Spelling("difference", _call(aten.sub.Tensor, _product(0), _product(1))),
    Spelling("sum", _call(aten.add.Tensor, _product(0), _product(1))),
)
COMPLEX = _complex()
#: What a rotation may end in.
ROOTS = frozenset([aten.cat.default, aten.add.Tensor, aten.sub.Tensor, CAST, *VIEWS])


# --- reading ---------------------------------------------------------------------------------------------------------


def recognise(root: fx.Node) -> Rope | None:
    """The rotation whose result is ``root``, in any accepted spelling.

    Both factors of a product can often be read as the rotated tensor: a reading that holds the guards goes first.
    """
    first = None
    for rope in _readings(root):
        if illegal(rope) is None:
            return rope
        first = first or rope
    return first


def _readings(root: fx.Node) -> Iterator[Rope]:
    if root.target not in ROOTS:
        return
    inner, casts = _uncast(root)
    for rope in itertools.chain(*(read(root, inner, casts) for read in (_split, _rotated, _complex_readings))):
        # Looked through only where the halves are those of a whole tensor: the columns are mapped as such.
        source = deinterleaved(rope.x) if rope.read == "halves" and check_parts(rope) is None else None
        if source is not None:
            yield _from_pairs(rope, *source)
        yield rope


def _uncast(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    if node.target is CAST and isinstance(node.args[0], fx.Node):
        return node.args[0], [node]
    return node, []


def _join(node: fx.Node) -> Join | None:
    for spelling in JOINS:
        match = spelling.pattern.match(node) if spelling.pattern is not None else None
        if isinstance(match, Match):
            found = match.kwargs
            if not isinstance(found["first"], fx.Node) or not isinstance(found["second"], fx.Node):
                return None
            axes = tuple(found[name] for name in ("dim", "first_axis", "second_axis") if name in found)
            return Join(spelling.name, found["first"], found["second"], axes, tuple(match.nodes))
    return None


def _sum(node: fx.Node) -> tuple[list[tuple[int, fx.Node, fx.Node]], list[fx.Node]] | None:
    """The two products that ``node`` adds or subtracts, each with its sign, and the nodes that do."""
    for spelling in SUMS:
        match = spelling.pattern.match(node) if spelling.pattern is not None else None
        if isinstance(match, Match):
            factors = [match.kwargs[name] for name in ("left0", "right0", "left1", "right1")]
            if not all(isinstance(f, fx.Node) for f in factors):
                return None
            sign = -1 if spelling.name == "difference" else 1
            return [(1, factors[0], factors[1]), (sign, factors[2], factors[3])], list(match.nodes)
    return None


def _split(root: fx.Node, inner: fx.Node, casts: list[fx.Node]) -> Iterator[Rope]:
    """Both results written out, then joined: GPT-OSS, transformers' DeepSeek-V3."""
    join = _join(inner)
    if join is None:
        return
    (first, first_casts), (second, second_casts) = _uncast(join.first), _uncast(join.second)
    sums = [_sum(first), _sum(second)]
    if sums[0] is None or sums[1] is None:
        return
    terms = [sums[0][0], sums[1][0]]
    for source in (part_of(f).source for f in terms[0][0][1:]):
        products = [[_with_source(term, source) for term in half] for half in terms]
        if any(p is None for half in products for p in half):
            continue
        yield _rope(
            root,
            source,
            [[p for p in half if p is not None] for half in products],
            join.layout,
            joins=[join],
            arithmetic=[*sums[0][1], *sums[1][1]],
            casts=[*casts, *first_casts, *second_casts],
            spelling=f"{join.layout} written out",
        )


def _with_source(term: tuple[int, fx.Node, fx.Node], source: fx.Node) -> Product | None:
    sign, left, right = term
    for factor, other in ((left, right), (right, left)):
        part = part_of(factor)
        if same_value(part.source, source):
            return Product(-sign if part.negated else sign, part, table_of(other))
    return None


def _rotated(root: fx.Node, inner: fx.Node, casts: list[fx.Node]) -> Iterator[Rope]:
    """``x * cos + rotate_half(x) * sin``, rotate_half being a join: Llama, Qwen; of neighbours in GPT-J."""
    found = _sum(inner)
    if found is None:
        return
    terms, arithmetic = found
    for (sin_sign, *sin_factors), (cos_sign, *cos_factors) in (terms, terms[::-1]):
        for turned, sin in (sin_factors, sin_factors[::-1]):
            whole = whole_of(turned)
            join = _join(whole.source)
            if join is None:
                continue
            parts = part_of(join.first), part_of(join.second)
            if not same_value(parts[0].source, parts[1].source):
                continue
            for straight, cos in (cos_factors, cos_factors[::-1]):
                x = whole_of(straight)
                if not same_value(x.source, parts[0].source):
                    continue
                in_place = pair_columns(join.layout, x.columns)
                halves = [
                    [
                        Product(cos_sign, dataclasses.replace(x, columns=columns), table_of(cos)),
                        Product(-sin_sign if part.negated else sin_sign, part, table_of(sin)),
                    ]
                    for part, columns in zip(parts, in_place, strict=True)
                ]
                yield _rope(
                    root,
                    x.source,
                    halves,
                    join.layout,
                    joins=[dataclasses.replace(join, nodes=(*whole.nodes, *join.nodes))],
                    arithmetic=arithmetic,
                    casts=casts,
                    spelling=f"x * cos + rotate_half(x) * sin{', of neighbours' if join.layout == 'pairs' else ''}",
                )


def _complex_readings(root: fx.Node, inner: fx.Node, casts: list[fx.Node]) -> Iterator[Rope]:
    """Pairs as complex numbers, multiplied by exp(i * angle): Meta's and DeepSeek's own code."""
    for spelling in COMPLEX:
        match = spelling.pattern.match(inner) if spelling.pattern is not None else None
        if not isinstance(match, Match) or not isinstance(match.kwargs["freqs"], fx.Node):
            continue
        whole = whole_of(match.kwargs["x"])
        a, b = (dataclasses.replace(whole, columns=c) for c in pair_columns("pairs", whole.columns))
        table = table_of(match.kwargs["freqs"])
        cos, sin = (dataclasses.replace(table, component=c) for c in ("real", "imag"))
        yield _rope(
            root,
            whole.source,
            [[Product(1, a, cos), Product(-1, b, sin)], [Product(1, b, cos), Product(1, a, sin)]],
            "pairs",
            joins=[],
            arithmetic=list(match.nodes),
            casts=casts,
            spelling=spelling.name,
        )


def _rope(
    root: fx.Node,
    x: fx.Node,
    products: Sequence[Sequence[Product]],
    written: str,
    *,
    joins: list[Join],
    arithmetic: list[fx.Node],
    casts: list[fx.Node],
    spelling: str,
) -> Rope:
    (p, q), (r, s) = products
    read = layout_of(p.part, q.part)
    if read is not None:
        # The product with cos is the one whose element stays in its place: a in the first result, b in the second.
        a, b = pair_columns(read, range(2 * len(p.part.columns or ())))
        p, q = (q, p) if p.part.columns == b else (p, q)
        r, s = (s, r) if r.part.columns == a else (r, s)
    tables = [t for product in (p, q, r, s) for t in product.table.nodes]
    parts = [n for product in (p, q, r, s) for n in product.part.nodes]
    return Rope(
        root=root,
        x=x,
        cos=p.table.joined_with(r.table, written),
        sin=q.table.joined_with(s.table, written),
        read=read or "",
        written=written,
        style=STYLES.get((read or "", written), ""),
        products=((p, q), (r, s)),
        joins=joins,
        arithmetic=arithmetic,
        casts=casts,
        nodes=list(dict.fromkeys([*casts, *(n for join in joins for n in join.nodes), *arithmetic, *parts, *tables])),
        spelling=spelling,
    )


def _from_pairs(rope: Rope, source: fx.Node, nodes: list[fx.Node]) -> Rope:
    """The same rotation, said of the tensor that was deinterleaved."""
    halves, pairs = (pair_columns(layout, whole_of(source).columns) for layout in ("halves", "pairs"))

    def moved(product: Product) -> Product:
        places = pairs[halves.index(product.part.columns)]
        return dataclasses.replace(product, part=dataclasses.replace(product.part, source=source, columns=places))

    (p, q), (r, s) = rope.products
    return dataclasses.replace(
        rope,
        x=source,
        products=((moved(p), moved(q)), (moved(r), moved(s))),
        read="pairs",
        style=STYLES.get(("pairs", rope.written), ""),
        nodes=list(dict.fromkeys([*rope.nodes, *nodes])),
        spelling=f"{rope.spelling}, x deinterleaved before",
    )


# --- pairing ---------------------------------------------------------------------------------------------------------


def mismatch(k: Rope, q: Rope) -> str | None:
    """Why q and k cannot be rotated by one call, or None."""
    for name, of_k, of_q in (("cos", k.cos, q.cos), ("sin", k.sin, q.sin)):
        if not of_k.same_angles(of_q):
            return f"q is rotated by another {name} ({of_q.base}) than k ({of_k.base})"
    if q.style != k.style:
        return f"q is rotated in the style {q.style!r} and k in the style {k.style!r}"
    x_of_q, x_of_k = tensor_of(q.x), tensor_of(k.x)
    if x_of_q is None or x_of_k is None or x_of_q.dtype != x_of_k.dtype or q.compute_dtype != k.compute_dtype:
        return "q and k have other dtypes, or are rotated in other dtypes"
    return None


def pair(k: Rope, candidates: Iterable[Rope]) -> Rope | None:
    """The q rotation that belongs to the k rotation: by the same angles, not computed from k nor k from it, nearest.

    All layers of a model share one cos and sin, so equal tables say nothing about the layer: the last or first reader
    of cos is some other layer's q as soon as one layer is not rewritten. What tells layers apart is that each computes
    from the one before. Pair all ropes of a graph before the first is rewritten: places in the graph are compared.
    """
    fitting: dict[fx.Node, Rope] = {q.root: q for q in candidates if q.root is not k.root and mismatch(k, q) is None}
    before, after = k.root.prev, k.root.next
    while fitting and (before.op != "root" or after.op != "root"):
        for node in (before, after):
            q = fitting.pop(node, None)
            if q is not None and not computed_from(*sorted((q.root, k.root))):
                return q
        before = before.prev if before.op != "root" else before
        after = after.next if after.op != "root" else after
    return None


def computed_from(first: fx.Node, second: fx.Node) -> bool:
    """Is ``second`` computed from ``first``, which stands before it? Looks at the nodes between them alone."""
    seen, stack = {second}, [second]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node is first:
                return True
            if node not in seen and first < node:
                seen.add(node)
                stack.append(node)
    return False


# --- near misses -----------------------------------------------------------------------------------------------------

_LOOK_BACK = 8  # steps from a rotated tensor to the columns of x; the longest accepted spelling has seven with casts


def explain(node: fx.Node) -> str | None:
    """Why ``node``, which :func:`recognise` did not take, is no accepted rotation, if it looks like one."""
    walked, frontier = [node], [node]
    for _ in range(_LOOK_BACK):
        frontier = [n for f in frontier for n in f.all_input_nodes if n not in walked]
        walked += dict.fromkeys(frontier)
    targets = {n.target for n in walked}
    turns = aten.neg.default in targets or aten.sub.Tensor in targets or aten.addcmul.default in targets
    if not turns or not any(columns_taken(n) for n in walked):
        return None
    if aten.addcmul.default in targets:
        return (
            "the rotation uses addcmul, which rounds its product and sum as one; write x * cos + rotate_half(x) * sin"
        )
    if aten.slice_scatter.default in targets:
        return "the rotation fills its result slice by slice; join the halves with torch.cat or torch.stack"
    for n in walked:
        source = n.args[0] if n.target is CAST else None
        if isinstance(source, fx.Node) and source.target is aten.mul.Tensor:
            return f"a product of the rotation is rounded to {n.args[1]} before it is added"
    if not {aten.cat.default, aten.mul.Tensor} <= targets:
        return None
    return "this looks like a rotation (RoPE), but in a spelling the recogniser does not have"
