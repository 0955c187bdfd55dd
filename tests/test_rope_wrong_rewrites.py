"""The proof notices a wrong rewrite: the pass is broken on purpose, and the comparison before/after must fail.

Each case changes the call that the pass inserts, or what it is wired to, and is run on a model where that matters.
Without the change the same model is equivalent, so that it is the change that is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fused_rope_mla_kv_cache import EAGER_ROUNDINGS, LATENT, ROPE, deepseek
from torch import Tensor, fx

from fusionpasses import NotEquivalent
from fusionpasses.errors import UnsupportedInput
from fusionpasses.patterns import fused_rope_mla_kv_cache as rope_pass
from fusionpasses.patterns._rope_edit import Edit
from fusionpasses.testing import Capture, assert_equivalent

TOKENS, LAYERS, BLOCKS, BLOCK = 6, 2, 4, 4
WIDTH = LATENT + ROPE
#: Each slot once but for 3, whose later row must win; two below 0; -2 is the slot 14 when it wraps.
SLOTS = (3, -2, 0, 14, -1, 3)

Write = Callable[[Tensor, Tensor, Tensor, Tensor, int], None]


def by_index(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor, layer: int) -> None:
    cache[layer].view(-1, WIDTH)[slots] = torch.cat([kv_c, k], -1)


def by_block(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor, layer: int) -> None:
    """Layers lie inside of a block: a part with strides of its own."""
    cache.view(BLOCKS, LAYERS, BLOCK, WIDTH)[:, layer][slots // BLOCK, slots % BLOCK] = torch.cat([kv_c, k], -1)


def by_halves(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor, layer: int) -> None:
    cache[layer].view(-1, WIDTH)[slots, :LATENT] = kv_c
    cache[layer].view(-1, WIDTH)[slots, LATENT:] = k


def by_op(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor, layer: int) -> None:
    torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k, cache[layer], slots)


def always_layer_one(cache: Tensor, kv_c: Tensor, k: Tensor, slots: Tensor, layer: int) -> None:
    """Two writes to the same rows, of which the later must win."""
    torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k, cache[1], slots)


def prove(write: Write) -> Capture:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    def step(
        q: Tensor, k: Tensor, kv_c: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor
    ) -> list[Tensor]:
        outputs = []
        for layer in range(LAYERS):
            k1 = deepseek(k + layer, cos, sin)
            write(cache, kv_c + layer, k1[:, 0], slots, layer)
            outputs += [deepseek(q - layer, cos, sin), k1 * 2]
        return outputs

    angle = torch.rand(TOKENS, 1, ROPE // 2, generator=generator) * 6
    inputs = [random(TOKENS, 3, ROPE), random(TOKENS, 1, ROPE), random(TOKENS, LATENT)]
    inputs += [angle.cos().bfloat16(), angle.sin().bfloat16(), torch.tensor(SLOTS)]
    cache = random(LAYERS, BLOCKS, BLOCK, WIDTH)
    with torch.no_grad():
        result = assert_equivalent(step, [*inputs, cache], fullgraph=True, options=EAGER_ROUNDINGS)
    assert len(result.report.fused) == LAYERS, result.report
    return result


WRITES = (by_index, by_block, by_halves, by_op, always_layer_one)


@pytest.mark.parametrize("write", WRITES)
def test_unbroken_it_is_equivalent(write: Write) -> None:
    prove(write)


def without(*endings: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: {name: value for name, value in kwargs.items() if not name.endswith(endings)}


def as_if_whole(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The view of the first layer, whatever the layer is: what a traced pattern makes of it."""
    return {name: 0 if name.endswith("storage_offset") else value for name, value in kwargs.items()}


def strides_of_a_contiguous_part(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "_kv_cache_stride": [BLOCK * WIDTH, WIDTH, 1]}


def halved(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "_kv_cache_size": [kwargs["_kv_cache_size"][0] // 2, *kwargs["_kv_cache_size"][1:]]}


def swapped(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: {**kwargs, names[0]: kwargs[names[1]], names[1]: kwargs[names[0]]}


def changed(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda kwargs: {**kwargs, **values}


#: What is done to the arguments of the call, and the models in which it must be noticed.
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], tuple[Write, ...]]] = {
    "no offset of the view": (as_if_whole, (by_index, by_block, by_halves, by_op)),
    "other strides of the view": (strides_of_a_contiguous_part, (by_block,)),
    "another size of the view": (halved, (by_index, by_op)),
    "no view": (without("_size", "_stride", "_storage_offset"), (by_index, by_op)),
    "skip instead of wrap": (changed(negative_slots="skip"), (by_index, by_block, by_halves)),
    "wrap instead of skip": (changed(negative_slots="wrap"), (by_op,)),
    "error instead of skip": (changed(negative_slots="error"), (by_op,)),
    "another style": (changed(style="interleaved"), (by_index, by_op)),
    "cos and sin swapped": (swapped("cos", "sin"), (by_op,)),
    "the two caches swapped": (swapped("_kv_cache_storage_offset", "_pe_cache_storage_offset"), (by_halves,)),
}
CASES = [(name, write) for name, (_, writes) in BROKEN.items() for write in writes]


@pytest.mark.parametrize(("name", "write"), CASES, ids=[f"{name}, {write.__name__}" for name, write in CASES])
def test_a_broken_call_is_noticed(name: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    change, right = BROKEN[name][0], Edit.fused
    monkeypatch.setattr(
        Edit, "fused", lambda self, op, kwargs, after: right(self, op, change(kwargs), after), raising=True
    )
    with pytest.raises((NotEquivalent, UnsupportedInput, RuntimeError)) as error:
        prove(write)
    if not isinstance(error.value, NotEquivalent):  # such a call cannot even be run
        assert name in ("no view", "another size of the view", "error instead of skip", "the two caches swapped")


def fused_calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.args and str(n.args[0]).startswith("fusionpasses.fused_rope")]


def test_swapped_writes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rope_pass.RopeMlaKvCache.end

    def end(self: Any, graph: fx.Graph) -> None:
        right(self, graph)
        first, second = fused_calls(graph)
        (of_first,), (of_second,) = ([u for u in n.users if u.args[1] == 2] for n in (first, second))
        (base,) = first.kwargs["_all_bases"]
        final = list(of_second.users)
        for user in final:
            user.replace_input_with(of_second, of_first)
        second.kwargs = {**second.kwargs, "_all_bases": [base]}
        first.kwargs = {**first.kwargs, "_all_bases": [of_second]}
        from torch._inductor.pattern_matcher import stable_topological_sort

        stable_topological_sort(graph)

    monkeypatch.setattr(rope_pass.RopeMlaKvCache, "end", end)
    with pytest.raises(NotEquivalent):
        prove(always_layer_one)


def test_a_lost_write_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rope_pass.RopeMlaKvCache.end

    def end(self: Any, graph: fx.Graph) -> None:
        right(self, graph)
        first, second = fused_calls(graph)
        second.kwargs = {**second.kwargs, "_all_bases": first.kwargs["_all_bases"]}

    monkeypatch.setattr(rope_pass.RopeMlaKvCache, "end", end)
    with pytest.raises(NotEquivalent):
        prove(by_index)


def test_the_q_of_another_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rope_pass.RopeMlaKvCache.end

    def end(self: Any, graph: fx.Graph) -> None:
        right(self, graph)
        first, second = fused_calls(graph)
        first.kwargs, second.kwargs = (
            {**first.kwargs, "q_pe": second.kwargs["q_pe"]},
            {**second.kwargs, "q_pe": first.kwargs["q_pe"]},
        )
        from torch._inductor.pattern_matcher import stable_topological_sort

        stable_topological_sort(graph)

    monkeypatch.setattr(rope_pass.RopeMlaKvCache, "end", end)
    with pytest.raises(NotEquivalent):
        prove(by_op)
