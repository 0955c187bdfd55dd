"""Speed of the norm + quant ops beside a copy of as many bytes, eager torch, plain Inductor and our quant alone.

``python -m benchmarks.norm_quant [--rows R ...] [--widths N ...] [--skip NAME ...] [--json FILE]``, on a GPU.

A time is one call's share of a CUDA graph that makes the same call on many sets of buffers, together larger than the
L2 cache, the median of several replays; the cache is overwritten before each replay. The yardstick is a Triton copy
kernel, the fastest of five tilings, that reads and writes half of the op's bytes each; the op's bytes are its inputs
and outputs once, without the weight. Nothing is timed that is wrong: codes and scales are compared byte by byte with
the reference, and where a norm is in front, at most one in 10000 bytes may differ, which the last bit of a row's rsqrt
accounts for (a GPU's rsqrt is approximate, the kernel's is not).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusionpasses.ops import OPS

WIDTHS = (2880, 4096, 7168, 16384)
ROWS = (1, 64, 1024, 4096, 16384)
EPS = 1e-6

Outputs = tuple[Tensor, ...]


@triton.jit  # type: ignore[untyped-decorator]
def copy_kernel(source: Any, target: Any, n: int, TILE: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)


def aten_quant(x: Tensor) -> Outputs:
    """MXFP4, scale mode "even", in aten ops that Inductor can fuse: what a model's own code would be."""
    blocks = x.float().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = (((amax.view(torch.int32) + 0x200000) >> 23) - 2).clamp(min=0)
    scaled = blocks * ((254 - scale) << 23).view(torch.float32)
    m = scaled.abs()
    step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0))
    rounded = torch.round(m / step) * step
    # 0, .5, 1, 1.5, 2, 3, 4, 6 to 0..7
    code = torch.where(rounded < 2, rounded * 2, torch.where(rounded < 4, rounded + 2, rounded * 0.5 + 4)).to(
        torch.uint8
    )
    code = torch.where(torch.signbit(scaled), code | 8, code)
    low, high = code.unflatten(-1, (16, 2)).unbind(-1)
    return (low | (high << 4)).flatten(-2), scale.squeeze(-1).to(torch.uint8)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


@dataclasses.dataclass(frozen=True)
class Chain:
    name: str
    op: str
    tensors: int  # read, and one written where there are two
    ours: Callable[..., Outputs]
    aten: Callable[..., Outputs]
    norm_then_ours: Callable[..., Outputs] | None

    def bytes_moved(self, rows: int, n: int) -> int:
        full_width = 1 if self.tensors == 1 else 3
        return rows * (2 * n * full_width + n // 2 + n // 32)


_ops = torch.ops.fusionpasses


def _add_then(quant: Callable[[Tensor], Outputs]) -> Callable[..., Outputs]:
    def run(x: Tensor, residual: Tensor, weight: Tensor) -> Outputs:
        total = x + residual
        return (*quant(norm(total, weight)), total)

    return run


def _norm_then(quant: Callable[[Tensor], Outputs]) -> Callable[..., Outputs]:
    return lambda x, weight: quant(norm(x, weight))


def _opaque(x: Tensor) -> Outputs:
    codes, scales = _ops.dynamic_mxfp4_quant(x)
    return codes, scales


CHAINS = (
    Chain("quant", "dynamic_mxfp4_quant.default", 1, lambda x, w: _opaque(x), lambda x, w: aten_quant(x), None),
    Chain(
        "norm+quant",
        "rmsnorm_mxfp4_quant.default",
        1,
        lambda x, w: _ops.rmsnorm_mxfp4_quant(x, w, EPS, cast_order="cast_scale"),
        _norm_then(aten_quant),
        _norm_then(_opaque),
    ),
    Chain(
        "add+norm+quant",
        "rmsnorm_add_mxfp4_quant.default",
        2,
        lambda x, r, w: _ops.rmsnorm_add_mxfp4_quant(x, r, w, EPS, cast_order="cast_scale"),
        _add_then(aten_quant),
        _add_then(_opaque),
    ),
)


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")


def sets_for(moved: int) -> int:
    return max(4, min(128, 200_000_000 // moved + 1))


def replay_time(calls: Sequence[Callable[[], Any]], replays: int = 5) -> float:
    """Microseconds of one call."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # or the next call would get its outputs' memory
    times = []
    for replay in range(replays + 1):
        _flush_buffer().zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay:  # the first one uploads the graph
            times.append(start.elapsed_time(end) * 1000 / len(calls))
    del kept
    return float(statistics.median(times))


@functools.cache
def copy_time(moved: int) -> float:
    words = max(moved // 8, 1)
    make = functools.partial(torch.empty, words, dtype=torch.int32, device="cuda")
    pairs = [(make().random_(), make()) for _ in range(sets_for(moved))]

    def call(source: Tensor, target: Tensor, tile: int, warps: int) -> Callable[[], Any]:
        return lambda: copy_kernel[(triton.cdiv(words, tile),)](source, target, words, TILE=tile, num_warps=warps)

    tilings = ((512, 4), (1024, 4), (1024, 8), (2048, 4), (4096, 8))
    return min(replay_time([call(s, t, *tiling) for s, t in pairs]) for tiling in tilings)


def bytes_differing(got: Outputs, want: Outputs) -> int:
    pairs = [
        (g.contiguous().view(torch.uint8), w.contiguous().view(torch.uint8)) for g, w in zip(got, want, strict=True)
    ]
    return sum(int((g != w).sum()) for g, w in pairs)


@torch.inference_mode()
def measure(chain: Chain, rows: int, n: int, skip: Sequence[str] = ()) -> list[dict[str, Any]]:
    moved = chain.bytes_moved(rows, n)
    weight = torch.randn(n, device="cuda").bfloat16()
    inputs = [
        tuple(torch.randn(rows, n, device="cuda").bfloat16() for _ in range(chain.tensors))
        for _ in range(sets_for(moved))
    ]
    options: tuple[tuple[Any, ...], dict[str, Any]] = ((weight, EPS), {"cast_order": "cast_scale"})
    args, kwargs = options if chain.tensors == 2 or "norm" in chain.name else ((), {})
    want = OPS[chain.op].reference(*inputs[0], *args, **kwargs)
    allowed = 0 if chain.name == "quant" else sum(t.numel() * t.element_size() for t in want) // 10_000
    contenders: dict[str, Callable[..., Outputs]] = {"ours": chain.ours, "eager": chain.aten}
    torch._dynamo.reset()
    # Without this Inductor keeps the norm in float32 where the model rounds it, and 0.6% of the bytes differ.
    compiled = functools.partial(torch.compile, fullgraph=True, options={"emulate_precision_casts": True})
    contenders["inductor"] = compiled(chain.aten)
    if chain.norm_then_ours:
        contenders["inductor norm, our quant"] = compiled(chain.norm_then_ours)
    yardstick = copy_time(moved)
    results = []
    for name, function in contenders.items():
        if name in skip:
            continue
        row: dict[str, Any] = {"chain": chain.name, "rows": rows, "n": n, "what": name, "copy_us": yardstick}
        row["bytes_differing"] = bytes_differing(function(*inputs[0], weight), want)
        row["right"] = row["bytes_differing"] <= allowed
        if row["right"]:
            row["us"] = replay_time([functools.partial(function, *tensors, weight) for tensors in inputs])
            row["of_copy"] = yardstick / row["us"]
        results.append(row)
        shown = f"{row['us']:9.2f} {row['of_copy']:7.2f}" if row["right"] else f"{'wrong':>9} {'':7}"
        print(
            f"{chain.name:15} {rows:6d} {n:6d} {name:25} {shown} {yardstick:9.2f} {row['bytes_differing']:6d}",
            flush=True,
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--skip", nargs="+", default=(), help="contenders, by the names printed")
    parser.add_argument("--json", help="write all numbers to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a GPU")
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16")
    print(f"{'chain':15} {'rows':>6} {'N':>6} {'':25} {'us':>9} {'of copy':>7} {'copy us':>9} {'differ':>6}")
    results = []
    for n in args.widths:
        for rows in args.rows:
            for chain in CHAINS:
                results += measure(chain, rows, n, args.skip)
                if args.json:
                    with open(args.json, "w") as file:
                        json.dump(results, file, indent=1)
    return int(not all(row["right"] for row in results))


if __name__ == "__main__":
    sys.exit(main())
