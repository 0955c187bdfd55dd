"""Generated sites of the pass of RoPE + MLA cache write, legal and illegal: each judged, and no byte changes.

A bundle of variants is one graph, because most of the time is that of tracing. Sites are reported in graph order, so
the list of statuses says which is which; and a pairing or a write taken from the wrong variant would show.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_fused_rope_mla_kv_cache import BLOCK, EAGER_ROUNDINGS, HEADS, LATENT, ROPE, ROTATIONS
from torch import Tensor

from fusionpasses.report import FUSED
from fusionpasses.testing import assert_equivalent

BATCH, LENGTH = 2, 3
TOKENS = BATCH * LENGTH
WIDTH = LATENT + ROPE
BLOCKS = 4
CAPACITY = BLOCKS * BLOCK
NOPE = 12
LEGAL, ILLEGAL = 6, 3  # of a bundle
EXAMPLES = 12

#: How a cache [blocks, block, L + R] is a part of a tensor: the tensor's shape, and the part.
CACHES: dict[str, tuple[tuple[int, ...], Any]] = {
    "its own": ((BLOCKS, BLOCK, WIDTH), lambda t: t),
    "stacked": ((3, BLOCKS, BLOCK, WIDTH), lambda t: t[1]),
    "stacked inside": ((BLOCKS, 3, BLOCK, WIDTH), lambda t: t[:, 1]),
    "every other block": ((2 * BLOCKS, BLOCK, WIDTH), lambda t: t[::2]),
    "a range": ((2 * BLOCKS, BLOCK, WIDTH), lambda t: t[2 : 2 + BLOCKS]),
    "wider rows": ((BLOCKS, BLOCK, WIDTH + 8), lambda t: t[..., 4 : 4 + WIDTH]),
    "flat": ((CAPACITY, WIDTH), lambda t: t.view(BLOCKS, BLOCK, WIDTH)),
}
#: Writes that need the rows of the cache as one axis.
FLAT_WRITES = ("index", "index_copy_", "slice", "kv_c, then k, flat")
WRITES = (*FLAT_WRITES, "block and offset", "kv_c, then k", "k, then kv_c", "two caches", "op", "op, two caches")
#: What reads the rotated q.
QUERIES = ("itself", "its product", "absorbed", "absorbed bmm", "rope first", "absorbed, and itself")


@dataclasses.dataclass(frozen=True)
class Variant:
    rotation: str
    layout: str  # of q
    write: str
    cache: str
    dtype: torch.dtype
    tables: str
    slots: torch.dtype
    numbers: tuple[int, ...]
    query: str
    reads_k: bool
    dynamic: bool
    float8: bool
    wrong: str

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(hash(self.numbers) % 1000)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        lead = (TOKENS,) if self.layout == "THR" else (BATCH, LENGTH)
        heads = {"BHSR": 1}.get(self.layout, len(lead))
        q, q_nope = random(*lead, HEADS, ROPE), random(*lead, HEADS, NOPE)
        k, kv_c = random(*lead, 1, ROPE), random(*lead, LATENT)
        if self.layout == "BHSR":
            q, q_nope, k = (x.transpose(1, 2) for x in (q, q_nope, k))
        angle = torch.rand(*lead, ROPE // 2, generator=generator) * 6
        angle = torch.cat([angle, angle], -1).unsqueeze(heads)
        table = torch.float32 if self.tables == "float32" else self.dtype
        shape = CACHES[self.cache][0]
        cache, second = random(*shape), random(*shape)
        if self.float8:
            cache, second = (x.to(torch.float8_e4m3fn).view(torch.uint8) for x in (cache, second))
        slots = torch.tensor(self.numbers).to(self.slots).view(lead)
        w_uk = random(HEADS, NOPE, NOPE)
        return [q, q_nope, k, kv_c, angle.cos().to(table), angle.sin().to(table), slots, cache, second, w_uk]

    def run(
        self,
        q: Tensor,
        q_nope: Tensor,
        k: Tensor,
        kv_c: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        cache: Tensor,
        second: Tensor,
        w_uk: Tensor,
    ) -> list[Tensor]:
        rotate = ROTATIONS[self.rotation]
        torch._check(slots.shape[0] == k.shape[0])  # index_put_ would broadcast a single row
        slots, kv_c = slots.reshape(-1), kv_c.reshape(-1, LATENT)
        part, second = CACHES[self.cache][1](cache), CACHES[self.cache][1](second)
        cos_of_q = cos + 1 if self.wrong == "other angles" else cos
        other = ROTATIONS["deepseek" if "neox" in self.rotation else "neox"]
        q1 = (other if self.wrong == "other style" else rotate)(q, cos_of_q, sin)
        k1 = rotate(k, cos, -sin) if self.wrong == "backwards" else rotate(k, cos, sin)
        outputs = [q1 * 2 if self.query == "its product" else q1]
        if self.query == "absorbed bmm":
            tokens = {"THR": "t", "BSHR": "bs", "BHSR": "b"}[self.layout]
            heads = "hs" if self.layout == "BHSR" else "h"
            product = torch.einsum(f"{tokens}{heads}p,hpn->{tokens}{heads}n", q_nope, w_uk)
            outputs = [torch.cat([product, q1], -1)]
        elif self.query == "absorbed":
            outputs = [torch.cat([q_nope, q1], -1)]
        elif self.query == "rope first":
            outputs = [torch.cat([q1, q_nope], -1)]
        elif self.query == "absorbed, and itself":
            outputs.append(torch.cat([q_nope, q1], -1))
        if self.wrong == "read between":
            outputs.append((part.float() * q1.float().mean()).sum())
        if self.wrong == "circle":
            kv_c = kv_c + q1.mean()
        if self.wrong == "a part of the cache":
            kv_c = part[0, 0, :LATENT].expand(slots.shape[0], -1)
        self.put(part, second, kv_c, k1.reshape(-1, ROPE), slots)
        if self.reads_k:
            outputs.append(k1.float().sum(-1))
        return outputs

    def put(self, cache: Tensor, second: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
        rows = torch.cat([k, kv_c] if self.wrong == "k first" else [kv_c, k], -1)
        block, offset = slots // BLOCK, slots % BLOCK
        if self.wrong == "scaled":
            rows = rows * 2
        elif self.wrong == "another block":
            block = slots // 8
        elif self.wrong == "truncated":
            block = torch.div(slots, BLOCK, rounding_mode="trunc")
        if self.wrong == "masked":
            rows = torch.where((slots > 3)[:, None], rows, cache[block, offset])
        if self.wrong == "accumulate":
            cache.index_put_((block, offset), rows, accumulate=True)
        elif self.wrong == "overlapping":
            cache[block, offset, :LATENT] = kv_c
            cache[block, offset, LATENT - 4 : WIDTH - 4] = k
        elif self.wrong == "one row for all":
            cache[block, offset, :LATENT] = kv_c[:1]
            cache[block, offset, LATENT:] = k
        elif self.write == "index":
            cache.view(-1, WIDTH)[slots] = rows
        elif self.write == "index_copy_":
            cache.view(-1, WIDTH).index_copy_(0, slots, rows)
        elif self.write == "slice":
            cache.view(-1, WIDTH)[2 : 2 + TOKENS] = rows
        elif self.write == "kv_c, then k, flat":
            cache.view(-1, WIDTH)[slots, :LATENT] = kv_c
            cache.view(-1, WIDTH)[slots, LATENT:] = k
        elif self.write == "block and offset":
            cache[block, offset] = rows
        elif self.write == "kv_c, then k":
            cache[block, offset, :LATENT] = kv_c
            cache[block, offset, LATENT:] = k
        elif self.write == "k, then kv_c":
            cache[block, offset, LATENT:] = k
            cache[block, offset, :LATENT] = kv_c
        elif self.write == "two caches":
            cache[..., :LATENT][block, offset] = kv_c
            second[..., LATENT:][block, offset] = k
        elif self.write == "op":
            torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k, cache, slots)
        else:
            pe_cache = second[..., LATENT:]
            torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k, cache[..., :LATENT], slots, pe_cache=pe_cache)


#: What is done wrong, and words of the reason.
WRONG = {
    "other angles": "no rotation of q by the same angles",
    "other style": "no rotation of q by the same angles",
    "backwards": "no rotation of q by the same angles",
    "read between": "reads the cache between the rotation and the write",
    "circle": "are computed from what the op would give",
    "a part of the cache": "is a part of the cache that is written",
    "k first": "writes are not [kv_c | k_pe]",
    "scaled": "writes are computed from it by aten.mul.Tensor",
    "masked": "writes are computed from it by aten.where.self",
    "another block": "are not slot // 4 and slot % that",
    "truncated": "are not slot // 4 and slot % that",
    "accumulate": "accumulate=True",
    "overlapping": "may overlap",
    "one row for all": "kv_c has 1 rows",
}
#: Those that are made with one spelling of the write.
BY_BLOCK = ("k first", "scaled", "masked", "another block", "truncated", "accumulate", "overlapping", "one row for all")


@st.composite
def variants(draw: Any, wrong: bool = False) -> Variant:
    fault = draw(st.sampled_from(sorted(WRONG))) if wrong else ""
    write = "block and offset" if fault in BY_BLOCK else draw(st.sampled_from(WRITES))
    if fault in ("read between", "a part of the cache"):
        write = "op"
    caches = ["its own", "stacked", "a range", "flat"] if write in FLAT_WRITES else sorted(CACHES)
    if write.startswith("op"):
        low = -20  # anything below 0 is nothing
    elif write == "slice":
        low = 0
    else:
        low = -CAPACITY
    rotation = draw(st.sampled_from(sorted(ROTATIONS)))
    return Variant(
        rotation=rotation,
        layout=draw(st.sampled_from(["THR", "BSHR", "BHSR"])),
        write=write,
        cache=draw(st.sampled_from(caches)),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])),
        tables="float32" if "float32" in rotation else draw(st.sampled_from(["same", "same"])),
        slots=torch.int64 if write == "index_copy_" else draw(st.sampled_from([torch.int64, torch.int32])),
        numbers=tuple(draw(st.lists(st.integers(low, CAPACITY - 1), min_size=TOKENS, max_size=TOKENS))),
        query=draw(st.sampled_from(QUERIES)),
        reads_k=draw(st.booleans()),
        dynamic=write != "slice" and draw(st.sampled_from([False] * 4 + [True])),
        float8=write.startswith("op") and not fault and draw(st.booleans()),
        wrong=fault,
    )


_judged: collections.Counter[str] = collections.Counter()


def check(bundle: list[Variant]) -> None:
    inputs = []
    for v in bundle:
        tensors = v.inputs()
        for tensor in tensors[:7] if v.dynamic else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        inputs.append(tensors)

    def run(*inputs: list[Tensor]) -> list[Tensor]:
        for flat in (True, False):  # one symbol for all that are dynamic, because each costs time
            pairs = zip(bundle, inputs, strict=True)
            sizes = [t[0].shape[0] for v, t in pairs if v.dynamic and (v.layout == "THR") is flat]
            for size in sizes[1:]:
                torch._check(size == sizes[0])
        return [out for v, tensors in zip(bundle, inputs, strict=True) for out in v.run(*tensors)]

    with torch.no_grad():
        result = assert_equivalent(run, inputs, fullgraph=True, options=EAGER_ROUNDINGS)
    (graph,) = result.graphs
    sites = graph.report.sites
    assert len(sites) == len(bundle), "\n".join(map(str, (*bundle, graph.report)))
    for v, site in zip(bundle, sites, strict=True):
        if v.wrong:
            assert (site.status != FUSED, WRONG[v.wrong] in site.reason) == (True, True), f"{v}\n{site}"
        else:
            assert (site.status, site.reason) == (FUSED, ""), f"{v}\n{site}"
            # With heads first the query has other strides than the op's.
            absorbed = v.query in ("absorbed", "absorbed bmm") and v.layout != "BHSR"
            name = f"{v.query.replace(' ', '_')}_" * absorbed + ("with_k" if v.reads_k else "")
            assert site.op == f"fused_rope_mla_kv_cache.{name.strip('_') or 'default'}", v
        _judged["illegal" if v.wrong else "legal"] += 1


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # shrinking would trace for minutes
    suppress_health_check=list(HealthCheck),
)
@given(
    legal=st.lists(variants(), min_size=LEGAL, max_size=LEGAL),
    illegal=st.lists(variants(wrong=True), min_size=ILLEGAL, max_size=ILLEGAL),
    illegal_first=st.booleans(),
)
def test_generated_sites_are_judged_right_and_no_byte_changes(
    legal: list[Variant], illegal: list[Variant], illegal_first: bool
) -> None:
    check([*illegal, *legal] if illegal_first else [*legal, *illegal])


def test_at_least_a_hundred_were_judged() -> None:
    """Runs after the one above, in file order."""
    assert _judged.total() >= 100, _judged
    assert _judged["illegal"] >= 30, _judged
