"""Two norms of one row in one launch, beside a launch for each: ``rmsnorm_mxfp4_quant.with_second``.

``python -m benchmarks.second_norm [--rows R ...] [--json FILE]``, on a GPU.

DeepSeek-V3's sizes: q_a, 1536 columns, is normed and quantised, kv_c, 512 columns of the same rows, only normed.

========  ==============================================================================================================
together  the op with both norms
first     the op without the second norm
apart     the op without the second norm, then that norm as plain Inductor compiles it
========  ==============================================================================================================

Nothing is timed before all bytes of *together* were compared with those of the ops of one norm. Microseconds, of a CUDA
graph over sets of inputs larger than the L2 cache, as far as 64 sets go (``fusionpasses/bench/timing.py``).
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import _command
from fusionpasses.bench.timing import replay_time, sets_for
from fusionpasses.ops import OPS

ROWS = (1, 8, 64, 256, 1024, 4096, 16384)
FIRST, SECOND, REST = 1536, 512, 64
EPS = 1e-6


def op(overload: str, **orders: str) -> functools.partial[tuple[Tensor, ...]]:
    return functools.partial(OPS[f"rmsnorm_mxfp4_quant.{overload}"].overload, provider="triton", **orders)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


@torch.no_grad()
def measure(rows: int) -> _command.Row:
    torch._dynamo.reset()
    both = op("with_second", cast_order="cast_scale", cast_order2="cast_scale")
    one, normed = op("default", cast_order="cast_scale"), op("with_norm", cast_order="cast_scale")
    compiled = torch.compile(plain_norm, dynamic=False)
    weights = [torch.randn(n, device="cuda").bfloat16() for n in (FIRST, SECOND)]
    sets: list[tuple[Tensor, Tensor]] = []
    for _ in range(min(64, sets_for(rows * (FIRST + SECOND + REST) * 2))):
        q_a, kv_c, _ = (
            torch.randn(rows, FIRST + SECOND + REST, device="cuda").bfloat16().split((FIRST, SECOND, REST), -1)
        )
        sets.append((q_a, kv_c))

    def apart(q_a: Tensor, kv_c: Tensor) -> tuple[object, ...]:
        return one(q_a, weights[0], EPS), compiled(kv_c, weights[1])

    q_a, kv_c = sets[0]
    got = both(q_a, weights[0], EPS, kv_c, weights[1], EPS)
    want = (*one(q_a, weights[0], EPS), normed(kv_c, weights[1], EPS)[2])
    row: _command.Row = {"rows": rows, "differ": sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))}
    if row["differ"] == 0:
        row["us"] = replay_time([functools.partial(both, q, weights[0], EPS, kv, weights[1], EPS) for q, kv in sets])
        row["first_us"] = replay_time([functools.partial(one, q, weights[0], EPS) for q, _ in sets])
        row["apart_us"] = replay_time([functools.partial(apart, q, kv) for q, kv in sets])
    return row


def line(row: _command.Row) -> str:
    if "us" not in row:
        return f"{row['rows']:6d} {row['differ']} bytes or numbers differ"
    return f"{row['rows']:6d} {row['us']:9.2f} {row['first_us']:9.2f} {row['apart_us']:9.2f}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="R")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if not _command.has_gpu("second_norm"):
        return 2
    _command.start(f"{'rows':>6} {'together':>9} {'first':>9} {'apart':>9}")
    rows = []
    for count in args.rows:
        rows.append(measure(count))
        print(line(rows[-1]), flush=True)
    _command.save(args.json, rows)
    return _command.status(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
