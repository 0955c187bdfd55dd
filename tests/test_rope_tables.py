"""cos and sin taken from a table by position: by the op, if the rows are of one site alone; else they are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_fused_rope_mla_kv_cache import EAGER_ROUNDINGS, HEADS, LATENT, ROPE, neox
from torch import Tensor

from fusionpasses.testing import assert_equivalent

BATCH, LENGTH, POSITIONS = 2, 3, 10
TOKENS = BATCH * LENGTH

Gather = Callable[[Tensor, Tensor], Tensor]

GATHERS: dict[str, Gather] = {
    "index": lambda table, positions: table[positions],
    "index_select": lambda table, positions: table.index_select(0, positions),
}


def run(step: Callable[..., object], tables: list[Tensor], positions: Tensor, lead: tuple[int, ...] = (TOKENS,)):
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    rows = [random(*lead, HEADS, ROPE), random(*lead, 1, ROPE), random(TOKENS, LATENT)]
    cache = random(2, 16, LATENT + ROPE)
    slots = torch.tensor([3, -1, 15, 0, 9, 1])
    with torch.no_grad():
        result = assert_equivalent(
            step, [*rows, slots, cache, positions, *tables], fullgraph=True, options=EAGER_ROUNDINGS
        )
    (graph,) = result.graphs
    calls = [n for n in graph.after.graph.nodes if n.args and str(n.args[0]).startswith("fusionpasses.fused_rope")]
    return graph, [call.kwargs["positions"] is not None for call in calls]


def tables(dtype: torch.dtype = torch.bfloat16, width: int = ROPE) -> list[Tensor]:
    angle = torch.rand(POSITIONS, width, generator=torch.Generator().manual_seed(4)) * 6
    return [angle.cos().to(dtype), angle.sin().to(dtype)]


def write(kv_c: Tensor, k: Tensor, cache: Tensor, slots: Tensor) -> None:
    torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k.reshape(-1, ROPE), cache, slots)


@pytest.mark.parametrize("gather", GATHERS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rows_of_one_site_are_taken_by_the_op(gather: str, dtype: torch.dtype) -> None:
    if gather == "index_select" and dtype is torch.int32:
        dtype = torch.int64

    def step(q, k, kv_c, slots, cache, positions, cos, sin):
        cos, sin = (GATHERS[gather](t, positions)[:, None] for t in (cos, sin))
        write(kv_c, neox(k, cos, sin), cache[1], slots)
        return neox(q, cos, sin)

    low = -1 if gather == "index" else 0  # a negative one counts from the end
    graph, positions = run(step, tables(), torch.tensor([4, low, 9, 4, 0, 7], dtype=dtype))
    assert positions == [True], graph.report
    assert "aten.index" not in graph.report.ops_after


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32])
def test_columns_of_one_table(table_dtype: torch.dtype) -> None:
    def step(q, k, kv_c, slots, cache, positions, table):
        outputs = []
        for layer in range(2):
            cos, sin = (t[:, None] for t in table[positions].chunk(2, -1))
            rotate = halves if table.dtype == q.dtype else (lambda x, c, s: halves(x, c, s).to(x.dtype))
            write(kv_c, rotate(k + layer, cos, sin), cache[layer], slots)
            outputs.append(rotate(q + layer, cos, sin))
        return outputs

    table = torch.cat(tables(table_dtype, ROPE // 2), -1)
    graph, positions = run(step, [table], torch.tensor([4, 1, 9, 4, 0, 7]))
    assert positions == [True, True], graph.report
    assert "aten.index" not in graph.report.ops_after


def test_positions_of_a_sequence_are_those_of_every_batch() -> None:
    def step(q, k, kv_c, slots, cache, positions, cos, sin):
        cos, sin = (t[positions][None, :, None] for t in (cos, sin))
        write(kv_c, neox(k, cos, sin), cache[1], slots)
        return neox(q, cos, sin)

    graph, positions = run(step, tables(), torch.tensor([4, 1, 9]), (BATCH, LENGTH))
    assert positions == [True], graph.report


def test_rows_that_several_sites_read_are_gathered_once() -> None:
    def step(q, k, kv_c, slots, cache, positions, cos, sin):
        cos, sin = cos[positions][:, None], sin[positions][:, None]
        outputs = []
        for layer in range(2):
            write(kv_c, neox(k + layer, cos, sin), cache[layer], slots)
            outputs.append(neox(q + layer, cos, sin))
        return outputs

    graph, positions = run(step, tables(), torch.tensor([4, 1, 9, 4, 0, 7]))
    assert positions == [False, False], graph.report
    assert graph.report.ops_after["aten.index"] == 2


@pytest.mark.parametrize("kept", ["rounded rows", "another reader", "other positions", "embedding"])
def test_rows_that_the_op_could_not_take_are_kept(kept: str) -> None:
    def step(q, k, kv_c, slots, cache, positions, cos, sin):
        of_sin = positions.flip(0) if kept == "other positions" else positions
        c, s = cos[positions][:, None], sin[of_sin][:, None]
        if kept == "embedding":  # refuses negative positions, which count from the end for the op
            c, s = (torch.nn.functional.embedding(positions, t)[:, None] for t in (cos, sin))
        if kept == "rounded rows":
            c, s = c.bfloat16(), s.bfloat16()
        write(kv_c, neox(k, c, s), cache[1], slots)
        return neox(q, c, s), (c * 2 if kept == "another reader" else 0)

    dtype = torch.float32 if kept == "rounded rows" else torch.bfloat16
    graph, positions = run(step, tables(dtype), torch.tensor([4, 1, 9, 4, 0, 7]))
    assert positions == [False], graph.report
