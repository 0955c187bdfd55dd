"""The pass of RoPE + MLA cache write: what fires, what must not, and that no byte changes either way.

Every graph is interpreted before and after the pass, on the CPU; outputs and caches are compared byte by byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.decomposition as inductor_decomposition
from torch import Tensor, fx
from torch._guards import detect_fake_mode

import fusionpasses as fp
from fusionpasses.config import FusionConfig
from fusionpasses.dump import tables
from fusionpasses.patterns import fused_rope_mla_kv_cache as rope_pass
from fusionpasses.patterns import pass_class
from fusionpasses.report import Site
from fusionpasses.testing import Capture, assert_equivalent, capture

BATCH, LENGTH, HEADS, LATENT, ROPE = 2, 3, 4, 16, 8
TOKENS = BATCH * LENGTH
BLOCK = 4
OP = "fused_rope_mla_kv_cache"
EAGER_ROUNDINGS = {"emulate_precision_casts": True}

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- rotations


def neox(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def split_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    a, b = torch.chunk(x, 2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def deepseek(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def float32(rotate: Rotate) -> Rotate:
    return lambda x, cos, sin: rotate(x.float(), cos.float(), sin.float()).to(x.dtype)


ROTATIONS: dict[str, Rotate] = {
    "neox": neox,
    "split halves": split_halves,
    "deepseek": deepseek,
    "interleaved": interleaved,
    "neox in float32": float32(neox),
    "deepseek in float32": float32(deepseek),
}


# ---- writes: cache [..., L + R], kv_c [T, L], k [T, R], slots [T]

Put = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def by_index(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    cache.view(-1, LATENT + ROPE)[slots] = torch.cat([kv_c, k], -1)


def by_index_copy(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    cache.view(-1, LATENT + ROPE).index_copy_(0, slots, torch.cat([kv_c, k], -1))


def by_block(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    cache[slots // BLOCK, slots % BLOCK] = torch.cat([kv_c, k], -1)


def by_halves(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    block, offset = slots // BLOCK, slots % BLOCK
    cache[block, offset, :LATENT] = kv_c
    cache[block, offset, LATENT:] = k


def by_halves_k_first(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    rows = cache.view(-1, LATENT + ROPE)
    rows[slots, LATENT:] = k
    rows[slots, :LATENT] = kv_c


def by_slice(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    cache.view(-1, LATENT + ROPE)[2 : 2 + TOKENS] = torch.cat([kv_c, k], -1)


def by_op(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k, cache, slots)


WRITES: dict[str, Put] = {
    "index": by_index,
    "index_copy_": by_index_copy,
    "block and offset": by_block,
    "kv_c, then k": by_halves,
    "slice": by_slice,
    "op": by_op,
}
CACHES = ("its own", "stacked", "stacked last", "every other block")


@dataclasses.dataclass(frozen=True)
class Model:
    rotation: str = "neox"
    write: str = "index"
    cache: str = "its own"
    dtype: torch.dtype = torch.bfloat16
    tables: torch.dtype = torch.bfloat16
    slots: torch.dtype = torch.int64
    heads_first: bool = True
    layers: int = 2
    reads_k: bool = False
    skips_q: int = -1  # the layer whose q is not rotated
    numbers: tuple[int, ...] = (7, 3, 0, 11, 5, 3)

    def part(self, cache: Tensor, layer: int) -> Tensor:
        if self.cache == "stacked":
            return cache[layer]
        if self.cache == "stacked last":
            return cache[:, layer]
        return cache[::2] if self.cache == "every other block" else cache

    def make_cache(self) -> Tensor:
        shape = (4, BLOCK, LATENT + ROPE)
        sizes = {"stacked": (self.layers, *shape), "stacked last": (4, self.layers, *shape[1:])}
        if self.cache == "every other block":
            return torch.randn(8, *shape[1:]).to(self.dtype)
        return torch.randn(sizes.get(self.cache, shape)).to(self.dtype)

    def inputs(self) -> list[Tensor]:
        torch.manual_seed(0)
        q = torch.randn(BATCH, LENGTH, HEADS, ROPE).to(self.dtype)
        k = torch.randn(BATCH, LENGTH, 1, ROPE).to(self.dtype)
        if self.heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        kv_c = torch.randn(BATCH, LENGTH, LATENT).to(self.dtype)
        angle = torch.rand(BATCH, LENGTH, ROPE // 2) * 6
        angle = torch.cat([angle, angle], -1)
        slots = torch.tensor(self.numbers).to(self.slots)
        return [q, k, kv_c, angle.cos().to(self.tables), angle.sin().to(self.tables), slots, self.make_cache()]

    def __call__(
        self, q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor
    ) -> list[Tensor]:
        axis = 1 if self.heads_first else 2
        rotate, put = ROTATIONS[self.rotation], WRITES[self.write]
        outputs = []
        for layer in range(self.layers):
            cos1, sin1 = cos.unsqueeze(axis), sin.unsqueeze(axis)
            k1 = rotate(k + layer, cos1, sin1)
            q1 = q + layer if layer == self.skips_q else rotate(q + layer, cos1, sin1)
            part = self.part(cache, layer)
            put(part, (kv_c + layer).reshape(-1, LATENT), k1.reshape(-1, ROPE), slots)
            outputs.append(q1)
            if self.reads_k:
                outputs.append(k1 * 2)
            # The next layer computes from this one's attention, which reads the cache.
            attended = ((q1.float().mean() + part.float().mean()) / 8).to(q.dtype)
            q, k, kv_c = q + attended, k + attended, kv_c + attended
        return outputs

    def run(self) -> Capture:
        return assert_equivalent(self, self.inputs(), fullgraph=True, options=EAGER_ROUNDINGS)


def sites(result: Capture) -> list[tuple[str, str, str]]:
    return [(site.status, site.op, site.reason) for graph in result.graphs for site in graph.report.sites]


def count(result: Capture) -> int:
    return sum(graph.report.ops_after.get(OP, 0) for graph in result.graphs)


# ---- what fires


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("cache", CACHES)
def test_every_write_into_every_cache_fuses(write: str, cache: str) -> None:
    if write == "slice" and cache in ("every other block", "stacked last"):
        return  # such a cache has no view of rows to slice
    if write in ("index", "index_copy_") and cache in ("every other block", "stacked last"):
        return
    result = Model(write=write, cache=cache).run()
    assert count(result) == 2, result.report
    left = {name for graph in result.graphs for name in graph.report.ops_after}
    assert not left & {
        "aten.index_put",
        "aten.slice_scatter",
        "aten.select_scatter",
        "concat_and_cache_mla",
        "aten.neg",
    }


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("heads_first", [True, False])
def test_every_rotation_fuses(rotation: str, heads_first: bool) -> None:
    tables = torch.float32 if "float32" in rotation else torch.bfloat16
    result = Model(rotation=rotation, heads_first=heads_first, tables=tables).run()
    assert count(result) == 2, result.report


def test_tokens_may_be_dynamic() -> None:
    for write in ("index", "block and offset", "op"):
        inputs = [t.flatten(0, 1) if i < 5 else t for i, t in enumerate(Model(heads_first=False).inputs())]
        for tensor in inputs[:6]:
            torch._dynamo.mark_dynamic(tensor, 0)

        def step(*args: Tensor, put: Put = WRITES[write]) -> Tensor:
            q, k, kv_c, cos, sin, slots, cache = args
            torch._check(slots.shape[0] == q.shape[0])  # index_put_ would broadcast a single row
            rotated = neox(k, cos[:, None], sin[:, None])
            put(cache, kv_c, rotated[:, 0], slots)
            return neox(q, cos[:, None], sin[:, None])

        result = assert_equivalent(step, inputs, fullgraph=True, options=EAGER_ROUNDINGS)
        assert count(result) == 1, result.report


@pytest.mark.parametrize("skips_q", [0, 1, 2])
def test_no_layer_takes_the_q_of_another(skips_q: int) -> None:
    """All layers share cos and sin; the layer without a rotated q is left, the others fuse."""
    result = Model(write="op", layers=3, skips_q=skips_q).run()
    found = [(status, reason.partition(" (")[0]) for status, _, reason in sites(result)]
    expected = [("fused", "")] * 3
    expected[skips_q] = ("refused", "no rotation of q by the same angles")
    assert found == expected


def test_negative_slots_keep_the_meaning_of_their_spelling() -> None:
    numbers = (-1, 3, 0, 11, -2, 5)
    for write, meaning in (("index", "wrap"), ("block and offset", "wrap"), ("op", "skip")):
        result = Model(write=write, numbers=numbers).run()
        (graph,) = result.graphs
        calls = [n for n in graph.after.graph.nodes if n.args and str(n.args[0]).startswith(f"fusionpasses.{OP}")]
        assert [n.kwargs["negative_slots"] for n in calls] == [meaning] * 2


def test_two_caches_as_in_deepseeks_own_code() -> None:
    def step(
        q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, pe_cache: Tensor
    ) -> Tensor:
        k1 = deepseek(k, cos[:, :, None], sin[:, :, None])
        kv_cache[:BATCH, 1 : 1 + LENGTH] = kv_c
        pe_cache[:BATCH, 1 : 1 + LENGTH] = k1.squeeze(2)
        return deepseek(q, cos[:, :, None], sin[:, :, None]) + pe_cache.sum()

    q, k, kv_c, cos, sin, *_ = Model(heads_first=False).inputs()
    caches = [torch.randn(4, 8, LATENT).bfloat16(), torch.randn(4, 8, ROPE).bfloat16()]
    result = assert_equivalent(step, [q, k, kv_c, cos, sin, *caches], fullgraph=True, options=EAGER_ROUNDINGS)
    assert count(result) == 1, result.report


def test_float8_cache_by_the_op() -> None:
    def step(q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        k1 = neox(k, cos[:, None], sin[:, None]).flatten(0, 2)
        scale = torch.full((), 0.5)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c.flatten(0, 1), k1, cache, slots, cache_scale=scale)
        return neox(q, cos[:, None], sin[:, None])

    *inputs, cache = Model().inputs()
    result = assert_equivalent(
        step, [*inputs, cache.to(torch.float8_e4m3fn).view(torch.uint8)], options=EAGER_ROUNDINGS
    )
    assert count(result) == 1, result.report


# ---- what must not fire


def refusal(step: Callable[..., Any], inputs: list[Tensor]) -> str:
    result = assert_equivalent(step, inputs, options=EAGER_ROUNDINGS)
    assert count(result) == 0, result.report
    (reason,) = {reason for _, _, reason in sites(result)} or {"no site"}
    return reason


def changed(**parts: Any) -> Callable[..., Tensor]:
    """A step of which one part is another."""

    def step(q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        cos1, sin1 = cos.unsqueeze(1), sin.unsqueeze(1)
        read = parts.get("read", lambda cache, q: 0.0)
        k1 = parts.get("rotate_k", neox)(k, cos1, sin1).reshape(-1, ROPE)
        q1 = parts.get("rotate_q", neox)(q, cos1, sin1)
        seen = read(cache, q1)
        rows = cache.view(-1, LATENT + ROPE)
        fed = kv_c.reshape(-1, LATENT) + (seen if "feeds" in parts else 0)
        parts.get("put", by_index)(rows, fed, k1, slots)
        return q1 + seen

    return step


def accumulate(rows: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    rows.index_put_((slots,), torch.cat([kv_c, k], -1), accumulate=True)


def masked(rows: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    rows[slots] = torch.where((slots > 3)[:, None], torch.cat([kv_c, k], -1), rows[slots])


def scaled(rows: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    rows[slots] = torch.cat([kv_c, k], -1) * 2


def k_first(rows: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    rows[slots] = torch.cat([k, kv_c], -1)


def draw(cache: Tensor, q: Tensor) -> Tensor:
    return torch.multinomial(q.float().flatten(0, -2).softmax(-1), 1).bfloat16().mean()


def attend(cache: Tensor, q: Tensor) -> Tensor:
    return (cache.float() * q.float().mean()).sum().bfloat16()


def look(cache: Tensor, q: Tensor) -> Tensor:
    """Needs no rotated q for what it reads of the cache, and so may come before the op."""
    return (cache.float().mean() * q.float().mean()).bfloat16()


def wrong_block(rows: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
    rows.view(4, BLOCK, -1)[slots // 2, slots % BLOCK] = torch.cat([kv_c, k], -1)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"put": accumulate}, "accumulate=True"),
        ({"put": wrong_block}, "are not slot // 4 and slot % that"),
        ({"put": masked}, "the rows that aten.index_put.default writes are computed from it by aten.where.self"),
        ({"put": scaled}, "the rows that aten.index_put.default writes are computed from it by aten.mul.Tensor"),
        ({"put": k_first}, "the rows that aten.index_put.default writes are not [kv_c | k_pe]"),
        ({"rotate_k": lambda x, cos, sin: x}, "no site"),
        ({"rotate_q": lambda x, cos, sin: x}, "no rotation of q by the same angles"),
        ({"rotate_q": lambda x, cos, sin: neox(x, cos * 2, sin)}, "no rotation of q by the same angles"),
        ({"rotate_q": deepseek}, "no rotation of q by the same angles"),
        ({"read": attend}, "reads the cache between the rotation and the write"),
        ({"read": draw}, "aten.multinomial.default draws random numbers between the rotation and the write"),
        ({"read": lambda cache, q: q.mean(), "feeds": True}, "are computed from what the op would give"),
    ],
)
def test_what_must_not_fire_says_why(parts: dict[str, Any], reason: str) -> None:
    assert reason in refusal(changed(**parts), Model(numbers=(7, 3, 0, 6, 5, 2)).inputs())


def test_a_k_without_an_axis_of_heads_is_not_passed_over_in_silence() -> None:
    def step(q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        cache[slots] = torch.cat([kv_c, neox(k, cos, sin)], -1) * 2
        return neox(q, cos[:, None], sin[:, None])

    given = [(3, HEADS, ROPE), (3, ROPE), (3, LATENT), (3, ROPE), (3, ROPE)]
    tensors = [torch.randn(shape).bfloat16() for shape in given]
    cache = torch.randn(16, LATENT + ROPE).bfloat16()
    reason = refusal(step, [*tensors, torch.tensor([7, 0, 3]), cache])
    assert "the rows that aten.index_put.default writes are computed from it by aten.mul.Tensor" in reason


@pytest.mark.parametrize(
    ("part", "shape", "reason"),
    [
        (lambda t: t[..., ::2], (16, 2 * (LATENT + ROPE)), "the cache has strides [48, 2]; the fused op needs a last"),
        (
            lambda t: t.view(2, 2, 4, -1)[1].unsqueeze(1),
            (16, LATENT + ROPE),
            "3 axes of a part of shape [2, 1, 4, 24] are indexed",
        ),
    ],
)
def test_caches_that_the_op_does_not_take(
    part: Callable[[Tensor], Tensor], shape: tuple[int, ...], reason: str
) -> None:
    def put(rows: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor) -> None:
        cache = part(rows)
        index = (slots,) if cache.dim() == 2 else (slots // 4, slots * 0, slots % 4)
        cache.index_put_(index, torch.cat([kv_c, k], -1))

    def step(q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        put(cache, kv_c.flatten(0, 1), neox(k, cos[:, None], sin[:, None]).reshape(-1, ROPE), slots)
        return neox(q, cos[:, None], sin[:, None])

    *inputs, _ = Model(numbers=(7, 3, 0, 6, 5, 2)).inputs()
    assert reason in refusal(step, [*inputs, torch.randn(shape).bfloat16()])


def test_a_layer_of_a_stacked_cache_of_dynamic_size_is_refused() -> None:
    """Inductor loses the offset of such a view, pytorch/pytorch#198068."""
    *inputs, cache = Model(cache="stacked", layers=1).inputs()
    torch._dynamo.mark_dynamic(cache, 1)
    cache = cache.repeat(2, 1, 1, 1)
    torch._dynamo.mark_dynamic(cache, 1)

    def step(q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        k1 = neox(k, cos[:, None], sin[:, None]).reshape(-1, ROPE)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c.flatten(0, 1), k1, cache[1], slots)
        return neox(q, cos[:, None], sin[:, None])

    assert "its own size is symbolic; mark only the tokens as dynamic" in refusal(step, [*inputs, cache])


def test_a_cache_of_dynamic_size_without_an_offset_fuses() -> None:
    """By the op, that is: index_put has no nodes for the sizes of its view."""
    for put in (by_op, by_index):
        *inputs, cache = Model().inputs()
        torch._dynamo.mark_dynamic(cache, 0)
        result = assert_equivalent(changed(put=put), [*inputs, cache], options=EAGER_ROUNDINGS)
        assert count(result) == (put is by_op), result.report


def test_what_was_matched_and_the_tables_are_kept_for_the_debug_dump() -> None:
    rope = pass_class(OP)(FusionConfig(), (), keep_subgraphs=True)
    rope.run(captured(changed(), Model().inputs()).graph)
    (site,) = rope.sites
    assert "aten.index_put.default" in site.matched
    assert OP in site.replacement
    text = tables(rope)
    assert "fusionpasses::concat_and_cache_mla(Tensor kv_c" in text
    assert "  reads: nothing reads the cache between the rotation and the write\n" in text


def test_angles_of_other_tokens_are_refused() -> None:
    """As many batches as tokens in each: k takes the angles of its batch, q those of its place."""

    def step(q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
        k1 = neox(k, cos[:, None, None], sin[:, None, None]).reshape(-1, ROPE)
        by_index(cache, kv_c, k1, slots)
        return neox(q, cos[None, :, None], sin[None, :, None])

    q, k = torch.randn(3, 3, HEADS, ROPE).bfloat16(), torch.randn(3, 3, 1, ROPE).bfloat16()
    cos, sin, kv_c = (torch.randn(n, w).bfloat16() for n, w in ((3, ROPE), (3, ROPE), (9, LATENT)))
    inputs = [q, k, kv_c, cos, sin, torch.arange(9), torch.randn(4, BLOCK, LATENT + ROPE).bfloat16()]
    assert "q and k of one token are rotated by different rows" in refusal(step, inputs)


def test_heads_may_be_dynamic() -> None:
    inputs = Model().inputs()
    torch._dynamo.mark_dynamic(inputs[0], 1)
    assert count(assert_equivalent(changed(), inputs, fullgraph=True, options=EAGER_ROUNDINGS)) == 1


def test_the_op_without_a_rotation_says_so() -> None:
    def step(k: Tensor, kv_c: Tensor, slots: Tensor, cache: Tensor) -> None:
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c.flatten(0, 1), k.flatten(0, 2), cache, slots)

    _, k, kv_c, _, _, slots, cache = Model().inputs()
    assert "k_pe is no rotation" in refusal(step, [k, kv_c, slots, cache])


def test_a_read_that_may_come_before_the_op_is_none_between() -> None:
    inputs = Model(numbers=(7, 3, 0, 6, 5, 2)).inputs()
    assert count(assert_equivalent(changed(read=look), inputs, options=EAGER_ROUNDINGS)) == 1


def pass_on(graph: fx.GraphModule, **settings: Any) -> list[Site]:
    rope = pass_class(OP)(FusionConfig(**settings), ())
    rope.run(graph.graph)
    graph.graph.lint()
    return rope.sites


def captured(step: Callable[..., Any], inputs: list[Tensor]) -> fx.GraphModule:
    """The graph before the pass, in a copy that may be rewritten."""
    (graph,) = capture(step, inputs, options=EAGER_ROUNDINGS).graphs
    return fx.GraphModule(graph.before, graph.before.graph)


def test_without_a_kernel_nothing_is_rewritten_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU: the reference would be several kernels where Inductor makes few."""

    def moved() -> fx.GraphModule:
        graph = captured(changed(), Model().inputs())
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                with detect_fake_mode(value):
                    node.meta["val"] = torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device="cuda"
                    )
        return graph

    monkeypatch.setattr(rope_pass.providers, "select", lambda op, device, provider="auto": "reference")
    (left,) = pass_on(moved())
    assert (left.status, left.reason) == (
        "refused",
        "no kernel for fused_rope_mla_kv_cache.default on cuda yet; provider='reference' fuses nevertheless",
    )
    (fused,) = pass_on(moved(), provider="reference")
    assert (fused.status, fused.provider) == ("fused", "reference")


def test_a_tensor_on_another_device_is_refused() -> None:
    graph = captured(changed(), Model().inputs())
    slots = next(n for n in graph.graph.nodes if n.op == "placeholder" and n.meta["val"].dtype == torch.int64)
    with detect_fake_mode(slots.meta["val"]):
        slots.meta["val"] = torch.empty(TOKENS, dtype=torch.int64, device="cuda")
    (left,) = pass_on(graph)
    assert left.reason.endswith("is on cuda:0 and k_pe on cpu; the fused op takes one device")


def test_a_graph_that_is_not_functional_is_refused() -> None:
    graph = captured(changed(), Model().inputs())
    write = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.index_put.default)
    with graph.graph.inserting_before(write):
        graph.graph.call_function(torch.ops.aten.mul_.Tensor, (write.args[0], 2))
    (left,) = pass_on(graph)
    assert "aten.mul_.Tensor writes to a tensor between the rotation and the write" in left.reason


def test_index_copy_that_survives_refuses_negative_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor makes index_put of index_copy, which wraps. Where that rule is gone, the op must refuse them, too."""
    aten = torch.ops.aten
    for op in (aten.index_copy.default, aten.index_copy_.default):
        monkeypatch.delitem(inductor_decomposition.decompositions, op)
    for cached in (inductor_decomposition.fast_random_decomps, inductor_decomposition.select_decomp_table):
        getattr(cached, "cache_clear", lambda: None)()
    graph = captured(changed(put=by_index_copy), Model().inputs())
    inductor_decomposition.fast_random_decomps.cache_clear()
    (site,) = pass_on(graph)
    assert site.status == "fused", site
    (call,) = (n for n in graph.graph.nodes if n.args and str(n.args[0]).startswith(f"fusionpasses.{OP}"))
    assert call.kwargs["negative_slots"] == "error"


@pytest.mark.parametrize("write", ["index", "block and offset", "op"])
@pytest.mark.parametrize("number", [16, -17])
def test_slots_out_of_range_stay_an_error(write: str, number: int) -> None:
    """But for what the op of serving engines skips."""
    (graph,) = Model(write=write, layers=1).run().graphs
    slots = torch.tensor((7, 3, 0, 11, 5, number))
    for module in (graph.before, graph.after):
        values = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
        given = [slots if v.dtype == torch.int64 else torch.ones(v.shape, dtype=v.dtype) for v in values]
        if write == "op" and number < 0:
            fx.Interpreter(module).run(*given)
        else:
            with pytest.raises((IndexError, fp.UnsupportedInput)):
                fx.Interpreter(module).run(*given)


def test_other_writes_are_left_alone_without_a_word() -> None:
    def step(table: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        table[index] = rows * 2
        return table.sum(0)

    result = capture(step, [torch.randn(8, 4), torch.randn(3, 4), torch.tensor([1, 2, 5])])
    assert sites(result) == []
