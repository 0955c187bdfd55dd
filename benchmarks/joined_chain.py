"""What a decoder layer does with MXFP4 weights, joined as ``fusion_backend()`` joins it: microseconds of a layer.

``python -m benchmarks.joined_chain [--tokens M ...] [--layers L] [--groups N] [--json FILE]``, on a GPU.

The products of DeepSeek-V3's sizes, W4A4, prepared, and what quantises in front of each: add + norm, q_a; norm, q_b;
quant, o_proj; add + norm, gate and up; silu * up, down. Attention is left out: o_proj reads columns of what q_b gave.

========  ==============================================================================================================
joined    each quant and its product one call, ``<quant>.then_gemm``; add + norm, the gated MLP behind it one,
          ``<quant>.then_mlp``, which is the pairs where its kernels cannot do it at once
pairs     each quant and its product one call
apart     two calls
========  ==============================================================================================================

All give the same bytes, and nothing is timed before they were compared. Each side is a CUDA graph of ``--layers``
layers, whose weights are larger than the L2 cache, replayed 20 times in a row for one time; ``--groups`` of them follow
each other without a pause. *first* is the median of the first three, *last* that of the last three: many tokens take a
GPU to its power limit in a fraction of a second, and it is slower from then on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import _command
from fusionpasses.ops import _mxfp4_weight

ours = torch.ops.fusionpasses
TOKENS = (1, 8, 16, 32, 64)
SIDES = ("joined", "pairs", "apart")
SIZES = {"hidden": 7168, "rank": 1536, "rest": 576, "q": 24576, "o": 16384, "inner": 18432}
TINY = {"hidden": 256, "rank": 64, "rest": 32, "q": 128, "o": 96, "inner": 128}
EPS = 1e-6
REPLAYS = 20
State = tuple[Tensor, Tensor]


class Weight(NamedTuple):
    """In layout "tiles"."""

    codes: Tensor
    scales: Tensor
    shift: int
    rows: int

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "w_codes": self.codes,
            "w_scales": self.scales,
            "shift": self.shift,
            "rows": self.rows,
            "layout": "tiles",
            "out_dtype": torch.bfloat16,
        }


def random_weight(rows: int, width: int, device: str) -> Weight:
    """Small numbers, so that nothing overflows on the way through the layers."""
    codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(116, 121, (rows, width // 32), dtype=torch.uint8, device=device)
    return Weight(*_mxfp4_weight.prepare(codes, scales), rows)


class Chain:
    """Random weights for some layers, and three ways to go through them."""

    def __init__(self, sizes: dict[str, int], layers: int, device: str) -> None:
        self.sizes = sizes
        hidden, rank, inner = sizes["hidden"], sizes["rank"], sizes["inner"]
        shapes = {
            "q_a": (rank + sizes["rest"], hidden),
            "q_b": (sizes["q"], rank),
            "o": (hidden, sizes["o"]),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        self.layers = [{name: random_weight(*shape, device) for name, shape in shapes.items()} for _ in range(layers)]
        self.norm = torch.rand(hidden, device=device).bfloat16() + 0.5
        self.q_norm = torch.rand(rank, device=device).bfloat16() + 0.5

    def inputs(self, tokens: int) -> State:
        made = torch.randn(2, tokens, self.sizes["hidden"], device=self.norm.device).bfloat16()
        return made[0], made[1]

    def joined(self, x: Tensor, residual: Tensor) -> State:
        return self._through(_joined, self._mlp_at_once, x, residual)

    def pairs(self, x: Tensor, residual: Tensor) -> State:
        return self._through(_joined, functools.partial(self._mlp, _joined), x, residual)

    def apart(self, x: Tensor, residual: Tensor) -> State:
        return self._through(_apart, functools.partial(self._mlp, _apart), x, residual)

    def _through(
        self, call: Callable[..., tuple[Tensor, ...]], mlp: Callable[..., State], x: Tensor, residual: Tensor
    ) -> State:
        rank, o = self.sizes["rank"], self.sizes["o"]
        order = {"cast_order": "cast_scale"}
        for w in self.layers:
            q_a, residual = call(ours.rmsnorm_add_mxfp4_quant, w["q_a"], x, residual, self.norm, EPS, **order)
            (q,) = call(ours.rmsnorm_mxfp4_quant, w["q_b"], q_a[:, :rank], self.q_norm, EPS, **order)
            (x,) = call(ours.dynamic_mxfp4_quant, w["o"], q[:, :o])
            x, residual = mlp(w, x, residual)
        return x, residual

    def _mlp(self, call: Callable[..., tuple[Tensor, ...]], w: dict[str, Weight], x: Tensor, residual: Tensor) -> State:
        norm, inner = ours.rmsnorm_add_mxfp4_quant, self.sizes["inner"]
        both, residual = call(norm, w["gate_up"], x, residual, self.norm, EPS, cast_order="cast_scale")
        (x,) = call(ours.silu_mul_mxfp4_quant, w["down"], both[:, :inner], both[:, inner:], cast_order="cast_mul")
        return x, residual

    def _mlp_at_once(self, w: dict[str, Weight], x: Tensor, residual: Tensor) -> State:
        names = {"w_codes": "codes", "w_scales": "scales", "out_dtype": "dtype"}
        down = {f"down_{names.get(name, name)}": value for name, value in w["down"].arguments.items()}
        both: State = ours.rmsnorm_add_mxfp4_quant.then_mlp(
            *(x, residual, self.norm, EPS),
            cast_order="cast_scale",
            activation="silu",
            act_cast_order="cast_mul",
            **w["gate_up"].arguments,
            **down,
        )
        return both


def _joined(quant: Any, weight: Weight, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    result = quant.then_gemm(*args, **kwargs, **weight.arguments)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _apart(quant: Any, weight: Weight, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    codes, scales, *others = quant(*args, **kwargs)
    return ours.mxfp4_gemm(codes, scales, **weight.arguments), *others


def differing(chain: Chain, state: State) -> int:
    """Numbers that are not the same bytes in all ways, or no finite ones."""
    want = chain.apart(*state)
    got = [tensor for side in SIDES[:2] for tensor in getattr(chain, side)(*state)]
    pairs = zip(got, want * 2, strict=True)
    return sum(int(((a.view(torch.int16) != b.view(torch.int16)) | ~a.isfinite()).sum()) for a, b in pairs)


def times(step: Callable[..., State], state: State, groups: int, layers: int) -> list[float]:
    """Microseconds of a layer, of each group."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step(*state)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(groups + 1)]
    graph.replay()
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        for _ in range(REPLAYS):
            graph.replay()
        event.record()
    torch.cuda.synchronize()
    del kept
    return [a.elapsed_time(b) * 1000 / (REPLAYS * layers) for a, b in itertools.pairwise(events)]


@torch.no_grad()
def measure(chain: Chain, tokens: int, groups: int) -> list[_command.Row]:
    state = chain.inputs(tokens)
    wrong = differing(chain, state)
    rows = []
    for side in SIDES:
        row: _command.Row = {"tokens": tokens, "side": side, "differ": wrong}
        if not wrong:
            taken = times(getattr(chain, side), state, groups, len(chain.layers))
            row |= {"us": statistics.median(taken), "first": statistics.median(taken[:3]), "all_us": taken}
            row["last"] = statistics.median(taken[-3:])
        rows.append(row)
    return rows


def line(row: _command.Row) -> str:
    start = f"{row['tokens']:6d} {row['side']:8}"
    if "us" not in row:
        return f"{start} {row['differ']} numbers differ"
    return f"{start} {row['first']:9.2f} {row['us']:9.2f} {row['last']:9.2f}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="M")
    parser.add_argument("--layers", type=int, default=4, metavar="L")
    parser.add_argument("--groups", type=int, default=24, metavar="N", help="times, one after the other")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if min(*args.tokens, args.layers, args.groups) < 1:
        parser.error("got a number below 1, allowed 1 and more")
    if not _command.has_gpu("joined_chain"):
        return 2
    _command.start(f"{'tokens':>6} {'side':8} {'first':>9} {'median':>9} {'last':>9}")
    chain = Chain(SIZES, args.layers, "cuda")
    rows: list[_command.Row] = []
    for tokens in args.tokens:
        new = measure(chain, tokens, args.groups)
        rows += new
        print(*map(line, new), sep="\n", flush=True)
        _command.save(args.json, rows)
    return _command.status(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
