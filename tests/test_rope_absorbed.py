"""The query of absorbed attention, ``cat([q_nope, rope(q_pe)], -1)``, made by the op; and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import calls_in
from test_fused_rope_mla_kv_cache import EAGER_ROUNDINGS, HEADS, LATENT, ROPE, deepseek, neox
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fusionpasses import fusion_backend
from fusionpasses.patterns import _absorbed
from fusionpasses.testing import assert_equivalent

aten = torch.ops.aten

BATCH, LENGTH, NOPE, ABSORBED = 2, 3, 12, 16
TOKENS = BATCH * LENGTH

#: q_pe and q_nope tokens first ``[T, H, .]``, k ``[T, 1, R]``, cos and sin ``[T, 1, R]``, the weight ``[H, NOPE, 16]``
#: that absorbs; gives k rotated, and what is read.
Case = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, list[Tensor]]]


def absorbed(q_nope: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(q_nope.transpose(0, 1), weight).transpose(0, 1)


def grouped(x: Tensor) -> Tensor:
    """[B, S, ...] of [T, ...]"""
    return x.unflatten(0, (-1, LENGTH))


def heads_first(x: Tensor) -> Tensor:
    return grouped(x).transpose(1, 2)


def plain(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([q_nope, neox(q, cos, sin)], -1)]


def by_bmm(q, q_nope, k, cos, sin, weight):
    return deepseek(k, cos, sin), [torch.cat((absorbed(q_nope, weight), deepseek(q, cos, sin)), -1)]


def in_batches(q, q_nope, k, cos, sin, weight):
    q, k, cos, sin = grouped(q), grouped(k), grouped(cos), grouped(sin)
    return neox(k, cos, sin), [torch.cat([grouped(absorbed(q_nope, weight)), neox(q, cos, sin)], dim=3)]


def turned_back(q, q_nope, k, cos, sin, weight):
    """Rotated heads first, as in transformers, then brought to tokens first."""
    q, k, cos, sin = heads_first(q), heads_first(k), heads_first(cos), heads_first(sin)
    q = neox(q, cos, sin).transpose(1, 2)
    return neox(k, cos, sin), [torch.cat([absorbed(q_nope, weight), q.reshape(-1, HEADS, ROPE)], -1) * 2]


def turned_in_batches(q, q_nope, k, cos, sin, weight):
    q, k, cos, sin = heads_first(q), heads_first(k), heads_first(cos), heads_first(sin)
    return neox(k, cos, sin), [torch.cat([grouped(q_nope), neox(q, cos, sin).transpose(1, 2)], -1)]


def of_one_token(q, q_nope, k, cos, sin, weight):
    """Decode: [T, H, 1, R], where heads first is tokens first."""
    q, k, cos, sin = q.unsqueeze(2), k.unsqueeze(2), cos.unsqueeze(2), sin.unsqueeze(2)
    return neox(k, cos, sin), [torch.cat([q_nope.unsqueeze(2), neox(q, cos, sin)], -1)]


def of_one_token_squeezed(q, q_nope, k, cos, sin, weight):
    q, k, cos, sin = q.unsqueeze(2), k.unsqueeze(2), cos.unsqueeze(2), sin.unsqueeze(2)
    return neox(k, cos, sin), [torch.cat([absorbed(q_nope, weight), neox(q, cos, sin).squeeze(2)], -1)]


def k_is_read(q, q_nope, k, cos, sin, weight):
    k1, query = plain(q, q_nope, k, cos, sin, weight)
    return k1, [*query, k1 * 2]


def bmm_and_k_is_read(q, q_nope, k, cos, sin, weight):
    k1, query = by_bmm(q, q_nope, k, cos, sin, weight)
    return k1, [*query, k1 * 2]


def by_einsum(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([torch.einsum("thp,hpn->thn", q_nope, weight), neox(q, cos, sin)], -1)]


def by_einsum_in_batches(q, q_nope, k, cos, sin, weight):
    q, q_nope, k, cos, sin = grouped(q), grouped(q_nope), grouped(k), grouped(cos), grouped(sin)
    return neox(k, cos, sin), [torch.cat([torch.einsum("bshp,hpn->bshn", q_nope, weight), neox(q, cos, sin)], -1)]


def by_transposed_weight(q, q_nope, k, cos, sin, weight):
    """As from the rows of kv_b_proj: ``[H, N, P]``, transposed."""
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    return neox(k, cos, sin), [torch.cat([absorbed(q_nope, weight), neox(q, cos, sin)], -1)]


def product_is_read(q, q_nope, k, cos, sin, weight):
    product = absorbed(q_nope, weight)
    return neox(k, cos, sin), [torch.cat([product, neox(q, cos, sin)], -1), product + 1]


def product_is_read_heads_first(q, q_nope, k, cos, sin, weight):
    product = torch.bmm(q_nope.transpose(0, 1), weight)
    return neox(k, cos, sin), [torch.cat([product.transpose(0, 1), neox(q, cos, sin)], -1), product + 1]


def product_is_scaled(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([absorbed(q_nope, weight) * 2, neox(q, cos, sin)], -1)]


def product_of_tokens(q, q_nope, k, cos, sin, weight):
    """A bmm over tokens, whose result has tokens first without being transposed."""
    product = torch.bmm(q_nope, weight[:1].expand(q_nope.shape[0], -1, -1))
    return neox(k, cos, sin), [torch.cat([product, neox(q, cos, sin)], -1)]


def product_of_one_batch(q, q_nope, k, cos, sin, weight):
    """All heads share a weight."""
    product = torch.bmm(q_nope.reshape(1, -1, NOPE), weight[:1]).view(-1, HEADS, ABSORBED)
    return neox(k, cos, sin), [torch.cat([product, neox(q, cos, sin)], -1)]


def product_in_other_order_of_tokens(q, q_nope, k, cos, sin, weight):
    q, k = (grouped(x).transpose(0, 1).contiguous() for x in (q, k))
    cos, sin = grouped(cos).transpose(0, 1), grouped(sin).transpose(0, 1)
    return neox(k, cos, sin), [torch.cat([grouped(absorbed(q_nope, weight)).transpose(0, 1), neox(q, cos, sin)], -1)]


def product_regrouped(q, q_nope, k, cos, sin, weight):
    """Tokens and heads of the product swapped by a view, not by a transposition: other rows."""
    product = torch.bmm(q_nope.transpose(0, 1), weight).view(-1, HEADS, ABSORBED)
    return neox(k, cos, sin), [torch.cat([product, neox(q, cos, sin)], -1)]


def product_of_the_rotated_k(q, q_nope, k, cos, sin, weight):
    """The product needs what the op gives: only the rotated q is left to fuse."""
    k1 = neox(k, cos, sin)
    return k1, [torch.cat([absorbed(q_nope * k1.mean(), weight), neox(q, cos, sin)], -1)]


def other_order(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([neox(q, cos, sin), q_nope], -1)]


def three(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([q_nope, neox(q, cos, sin), q_nope], -1)]


def twice(q, q_nope, k, cos, sin, weight):
    q = neox(q, cos, sin)
    return neox(k, cos, sin), [torch.cat([q, q], -1)]


def two_cats(q, q_nope, k, cos, sin, weight):
    q = neox(q, cos, sin)
    return neox(k, cos, sin), [torch.cat([q_nope, q], -1), torch.cat([q_nope + 1, q], -1)]


def another_reader(q, q_nope, k, cos, sin, weight):
    q, k1 = neox(q, cos, sin), neox(k, cos, sin)
    return k1, [torch.cat([q_nope, q], -1), q + 1, k1 + 1]


def along_tokens(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([q_nope[..., :ROPE], neox(q, cos, sin)], 0)]


def along_heads(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([q_nope[..., :ROPE], neox(q, cos, sin)], 1)]


def a_part(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([q_nope, neox(q, cos, sin)[..., : ROPE // 2]], -1)]


def scaled(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([q_nope, neox(q, cos, sin) * 2], -1)]


def promoted(q, q_nope, k, cos, sin, weight):
    return neox(k, cos, sin), [torch.cat([q_nope.float(), neox(q, cos, sin)], -1)]


def heads_of_tokens_mixed(q, q_nope, k, cos, sin, weight):
    """Regrouped while heads are first: other rows."""
    q, k, cos, sin = heads_first(q), heads_first(k), heads_first(cos), heads_first(sin)
    return neox(k, cos, sin), [torch.cat([q_nope, neox(q, cos, sin).reshape(-1, HEADS, ROPE)], -1)]


def other_tokens_first(q, q_nope, k, cos, sin, weight):
    q, k, cos, sin = grouped(q), grouped(k), grouped(cos), grouped(sin)
    nope = grouped(q_nope).transpose(0, 1).contiguous()
    return neox(k, cos, sin), [torch.cat([nope, neox(q, cos, sin).transpose(0, 1)], -1)]


def query_heads_first(q, q_nope, k, cos, sin, weight):
    """The op gives tokens first: a copy would be left where the cat was."""
    q, k, cos, sin = heads_first(q), heads_first(k), heads_first(cos), heads_first(sin)
    return neox(k, cos, sin), [torch.cat([heads_first(q_nope).contiguous(), neox(q, cos, sin)], -1)]


def nope_of_the_rotated_k(q, q_nope, k, cos, sin, weight):
    k1 = neox(k, cos, sin)
    return k1, [torch.cat([q_nope * k1.mean(), neox(q, cos, sin)], -1)]


ABSORBED_CASES: dict[Case, str] = {
    plain: "absorbed",
    by_bmm: "absorbed_bmm",
    in_batches: "absorbed_bmm",
    turned_back: "absorbed_bmm",
    turned_in_batches: "absorbed",
    of_one_token: "absorbed",
    of_one_token_squeezed: "absorbed_bmm",
    k_is_read: "absorbed_with_k",
    bmm_and_k_is_read: "absorbed_bmm_with_k",
    by_einsum: "absorbed_bmm",
    by_einsum_in_batches: "absorbed_bmm",
    by_transposed_weight: "absorbed_bmm",
    product_is_read: "absorbed",
    product_is_read_heads_first: "absorbed",
    product_is_scaled: "absorbed",
    product_of_tokens: "absorbed",
    product_of_one_batch: "absorbed",
    product_in_other_order_of_tokens: "absorbed",
    product_regrouped: "absorbed",
}
TWINS: dict[Case, str] = {
    other_order: "default",
    three: "default",
    twice: "default",
    two_cats: "default",
    another_reader: "with_k",
    along_tokens: "default",
    along_heads: "default",
    a_part: "default",
    scaled: "default",
    promoted: "default",
    heads_of_tokens_mixed: "default",
    other_tokens_first: "default",
    query_heads_first: "default",
    nope_of_the_rotated_k: "with_k",
    product_of_the_rotated_k: "with_k",
}


def inputs_of(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    angle = torch.rand(TOKENS, 1, ROPE // 2, generator=generator) * 6
    angle = torch.cat([angle, angle], -1)
    q = random(TOKENS, HEADS, NOPE + ROPE)
    tensors = [q[..., NOPE:], q[..., :NOPE], random(TOKENS, 1, ROPE), angle.cos().bfloat16(), angle.sin().bfloat16()]
    slots = torch.randperm(16, generator=generator)[:TOKENS]
    return [*tensors, random(HEADS, NOPE, ABSORBED), random(TOKENS, LATENT), slots, random(4, 4, LATENT + ROPE)]


def run(cases: dict[Case, str], dynamic: bool):
    """All cases as one graph: each takes a second to trace. Reported sites are in graph order."""
    inputs = [inputs_of(number) for number in range(len(cases))]
    for tensors in inputs if dynamic else ():
        for i in (0, 1, 2, 3, 4, 6, 7):
            torch._dynamo.mark_dynamic(tensors[i], 0)

    def model(*inputs: list[Tensor]) -> list[list[Tensor]]:
        read = []
        for case, (*tensors, kv_c, slots, cache) in zip(cases, inputs, strict=True):
            for tensor in (*tensors[:5], kv_c, slots):
                torch._check(tensor.shape[0] == inputs[0][0].shape[0])
            k, outputs = case(*tensors)
            torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k.reshape(-1, ROPE), cache, slots)
            read.append(outputs)
        return read

    with torch.no_grad():
        result = assert_equivalent(model, inputs, fullgraph=True, options=EAGER_ROUNDINGS)
    (graph,) = result.graphs
    assert [s.reason for s in graph.report.sites] == [""] * len(cases), graph.report
    got = {case: site.op.partition(".")[2] for case, site in zip(cases, graph.report.sites, strict=True)}
    assert got == cases
    return graph


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_query_is_made_by_the_op_and_the_cat_is_gone(dynamic: bool) -> None:
    # With dynamic tokens, those that regroup them take seconds to trace.
    some = [plain, by_bmm, of_one_token, k_is_read, bmm_and_k_is_read, product_is_scaled, product_of_tokens]
    cases = some if dynamic else ABSORBED_CASES
    graph = run({case: ABSORBED_CASES[case] for case in cases}, dynamic)
    before, after = graph.report.ops_before, graph.report.ops_after
    assert "aten.cat" not in after
    assert after.get("aten.clone") == before.get("aten.clone")
    # Products that are taken into the op are computed there alone.
    taken = sum("bmm" in ABSORBED_CASES[case] for case in cases)
    assert after.get("aten.bmm", 0) == before["aten.bmm"] - taken


def test_sizes_of_a_product_that_goes_are_asked_of_what_stays() -> None:
    """Two of them are symbols, in a view of the product."""

    def model(q, k, kv_c, cos, sin, weight, slots, cache):
        q_nope, q = q[..., :NOPE], q[..., NOPE:]
        query = torch.cat([torch.einsum("bshp,hpn->bshn", q_nope, weight), neox(q, cos, sin)], -1)
        k = neox(k, cos, sin)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c.flatten(0, 1), k.flatten(0, 2), cache, slots)
        return query

    tensors = inputs_of(0)
    q, k, cos, sin, kv_c = (grouped(x) for x in (torch.cat([tensors[1], tensors[0]], -1), *tensors[2:5], tensors[6]))
    inputs = [q, k, kv_c, cos, sin, tensors[5], tensors[7], tensors[8]]
    for tensor in inputs[:5]:
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    torch._dynamo.mark_dynamic(tensors[7], 0)
    with torch.no_grad():
        result = assert_equivalent(model, inputs, fullgraph=True, options=EAGER_ROUNDINGS)
    (graph,) = result.graphs
    assert [s.op for s in result.report.fused] == ["fused_rope_mla_kv_cache.absorbed_bmm"], graph.report
    assert "aten.bmm" not in graph.report.ops_after, graph.report


@pytest.mark.parametrize("case", [by_bmm, by_einsum, by_einsum_in_batches, in_batches])
def test_generated_code_leaves_the_product_to_the_op(case: Case) -> None:
    def model(*inputs: Tensor) -> list[Tensor]:
        *tensors, kv_c, slots, cache = inputs
        k, outputs = case(*tensors)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k.reshape(-1, ROPE), cache, slots)
        return outputs

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=fusion_backend(), fullgraph=True, options=EAGER_ROUNDINGS)
    inputs, expected = inputs_of(0), inputs_of(0)
    with torch.no_grad():
        got, (code,) = run_and_get_code(compiled, *inputs)
        want = model(*expected)
    assert calls_in(code, "fused_rope_mla_kv_cache.absorbed_bmm") == 1, code
    assert "extern_kernels.bmm(" not in code
    assert torch.equal(got[0], want[0])
    assert torch.equal(inputs[-1], expected[-1])


@pytest.mark.parametrize("copies", [False, True])
def test_a_reshape_that_copies_is_no_view(copies: bool) -> None:
    """One head: the copy has the strides of the product, and other tokens at each place.

    Traced graphs have a clone there; Inductor makes reshapes of views, for layouts it may change.
    """
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    product = graph.call_function(aten.bmm.default, (a, b))
    grouped = graph.call_function(aten.reshape.default, (product, [1, BATCH, LENGTH, ABSORBED]))
    swapped = graph.call_function(aten.permute.default, (grouped, [0, 2, 1, 3] if copies else [0, 1, 2, 3]))
    regrouped = graph.call_function(aten.reshape.default, (swapped, [1, TOKENS, ABSORBED]))
    q_nope = graph.call_function(aten.permute.default, (regrouped, [1, 0, 2]))
    graph.output(graph.call_function(aten.neg.default, (q_nope,)))
    with FakeTensorMode() as mode:
        factors = torch.empty(1, TOKENS, NOPE), torch.empty(1, NOPE, ABSORBED)
        FakeTensorProp(fx.GraphModule(torch.nn.Module(), graph), mode).propagate_dont_convert_inputs(*factors)
    nodes = [] if copies else [q_nope, regrouped, swapped, grouped, product]
    assert _absorbed._product(q_nope, [0, 1, 2]) == nodes


def test_a_factor_that_is_a_part_of_the_cache() -> None:
    """The op may write before it has read everything, so the bmm is left in front of it."""

    def model(q, k, kv_c, cos, sin, slots, cache):
        weight = cache.view(-1)[: HEADS * NOPE * ABSORBED].view(HEADS, NOPE, ABSORBED)
        query = torch.cat([absorbed(q[..., :NOPE], weight), neox(q[..., NOPE:], cos, sin)], -1)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, neox(k, cos, sin).flatten(0, 1), cache, slots)
        return query

    q_pe, q_nope, k, cos, sin, _, kv_c, slots, _ = inputs_of(0)
    cache = torch.randn(64, 4, LATENT + ROPE).bfloat16()
    inputs = [torch.cat([q_nope, q_pe], -1), k, kv_c, cos, sin, slots, cache]
    with torch.no_grad():
        report = assert_equivalent(model, inputs, fullgraph=True, options=EAGER_ROUNDINGS).report
    assert [site.op for site in report.fused] == ["fused_rope_mla_kv_cache.absorbed"], report


def test_other_readers_of_the_rotated_q_keep_it() -> None:
    run(TWINS, dynamic=False)


def test_q_nope_that_comes_from_the_op_of_a_later_site_is_left_outside() -> None:
    """Two sites whose queries would need each other: one cat stays, both fuse."""

    def model(q, k, kv_c, cos, sin, slots, cache, other):
        q1, k1, q2, k2 = (neox(x, cos, sin) for x in (q, k, q * 2, k * 2))
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k1[:, 0], cache, slots)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k2[:, 0], other, slots)
        return torch.cat([other[0, :ROPE] * torch.ones_like(q), q1], -1), torch.cat([q2.clone(), q2 * 1], -1)

    q, _, k, cos, sin, _, kv_c, slots, cache = inputs_of(0)
    inputs = [q, k, kv_c, cos, sin, slots, cache.flatten(0, 1), cache.flatten(0, 1) + 1]
    result = assert_equivalent(model, inputs, fullgraph=True, options=EAGER_ROUNDINGS)
    assert [s.status for s in result.report.sites()] == ["fused", "fused"], result.report


def test_sites_that_would_need_each_others_queries() -> None:
    def model(q, k, kv_c, cos, sin, slots, cache, other):
        q1, k1, q2, k2 = (neox(x, cos, sin) for x in (q, k, q * 2, k * 2))
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k1[:, 0], cache, slots)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k2[:, 0], other, slots)
        return torch.cat([k2.expand(-1, HEADS, -1), q1], -1), torch.cat([k1.expand(-1, HEADS, -1), q2], -1)

    q, _, k, cos, sin, _, kv_c, slots, cache = inputs_of(0)
    inputs = [q, k, kv_c, cos, sin, slots, cache.flatten(0, 1), cache.flatten(0, 1) + 1]
    result = assert_equivalent(model, inputs, fullgraph=True, options=EAGER_ROUNDINGS)
    assert [s.op for s in result.report.fused] == ["fused_rope_mla_kv_cache.with_k"] * 2, result.report
