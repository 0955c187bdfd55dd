"""Products with an MXFP4 weight beside bfloat16 ones, dequantise + BLAS, and other projects' kernels.

``python -m benchmarks.linear [--tokens M ...] [--weights NxK ...] [--who NAME ...] [--vllm-library FILE]
[--triton-kernels-path DIR] [--humming-path DIR] [--json FILE]``, on a GPU.

==============  ========================================================================================================
bf16            ``torch.mm`` of bfloat16 tensors
dequantise      the weight dequantised by our kernel to a temporary, then ``torch.mm``
a16w4           ``mxfp4_gemm_a16w4`` with a prepared weight
a16w4 linear    the same with the weight as checkpoints have it
w4a4            ``mxfp4_gemm`` of x in MXFP4, as a fused norm or activation gives it, with a prepared weight
marlin          vLLM 0.33's, with --vllm-library: ``_C_stable_libtorch.abi3.so`` of its wheel
triton_kernels  OpenAI's ``matmul_ogs``, with --triton-kernels-path: the folder that holds the package
humming         vLLM's Humming, with --humming-path, likewise
==============  ========================================================================================================

The last three are weight-only, as a16w4 is; what they need: ``benchmarks/linear_peers.py``.

bfloat16, random codes, scales near 1. Times are those of a CUDA graph over weights that are together larger than the L2
cache (``fusionpasses/bench/timing.py``), the median of 15 replays, one of each in turn: many tokens keep an H200 at its
power limit. In two runs that took several replays of one at a time, cuBLAS took 1307 and 1492 us for 18432 x 7168 with
4096 tokens, and the same product behind a weight that is dequantised 1590 and 1559. Before anything is timed it is
compared with the product in float64; printed is the relative error (2-norm), of which rounding to bfloat16 makes
1.7e-3. At the end: all times, and those of a16w4 relative to the fastest peer's.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import _command
from benchmarks.linear_peers import Humming, Marlin, Peer, TritonKernels
from fusionpasses.bench.timing import Replays, in_turn
from fusionpasses.kernels import arch
from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.providers import _triton_gemm

ours = torch.ops.fusionpasses
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
WEIGHTS = ("18432x7168", "2112x7168", "7168x2048")
TOGETHER = 260_000_000  # bytes of codes
MOST_ERROR = 3e-3
REPLAYS = 15
OURS = ("bf16", "dequantise", "a16w4", "a16w4 linear", "w4a4")
#: Each peer, and the option that says where it is.
PEERS: dict[str, tuple[str, Callable[[pathlib.Path], Peer]]] = {
    "marlin": ("--vllm-library", Marlin),
    "triton_kernels": ("--triton-kernels-path", TritonKernels),
    "humming": ("--humming-path", Humming),
}


@dataclasses.dataclass
class Weight:
    codes: Tensor
    scales: Tensor
    rows: int
    values: Tensor | None  # bfloat16; of some weights only, because they are four times as large
    of_peers: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def prepared(self) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        codes, scales, shift = _mxfp4_weight.prepare(self.codes, self.scales)
        return (codes, scales), {"layout": "tiles", "rows": self.rows, "shift": shift}

    def prepared_for(self, name: str, peer: Peer) -> Any:
        if name not in self.of_peers:
            self.of_peers[name] = peer.prepare(self.codes, self.scales)
        return self.of_peers[name]


def weights(rows: int, width: int, device: str) -> list[Weight]:
    count = max(2, min(24, TOGETHER // (rows * width // 2) + 1))
    with_values = max(2, min(count, TOGETHER // (rows * width * 2) + 1))
    made = []
    for i in range(count):
        codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device=device)
        scales = torch.randint(118, 126, (rows, width // 32), dtype=torch.uint8, device=device)
        values = _mxfp4.dequantize(codes, scales).bfloat16() if i < with_values else None
        made.append(Weight(codes, scales, rows, values))
    return made


def contenders(
    x: Tensor, quantized: tuple[Tensor, Tensor], peers: Mapping[str, Peer]
) -> dict[str, Callable[[Weight], Tensor]]:
    def by_blas(w: Weight) -> Tensor:
        out = x.new_empty(len(x), w.rows)
        values = x.new_empty(w.rows, x.shape[1])
        _triton_gemm._dequantize(w.codes, w.scales, values, "linear", 0, arch.of(x.device))
        _triton_gemm._by_torch(x, values, None, out)
        return out

    def tiles(w: Weight) -> Tensor:
        result: Tensor = ours.mxfp4_gemm_a16w4(x, *w.prepared[0], **w.prepared[1], provider="triton")
        return result

    def w4a4(w: Weight) -> Tensor:
        keywords = w.prepared[1] | {"out_dtype": x.dtype, "provider": "triton"}
        result: Tensor = ours.mxfp4_gemm(*quantized, *w.prepared[0], **keywords)
        return result

    def by_peer(name: str, w: Weight) -> Tensor:
        return peers[name].multiply(x, w.prepared_for(name, peers[name]))

    found: dict[str, Callable[[Weight], Tensor]] = {
        "bf16": lambda w: torch.mm(x, w.values.T),  # type: ignore[union-attr]
        "dequantise": by_blas,
        "a16w4": tiles,
        "a16w4 linear": lambda w: ours.mxfp4_gemm_a16w4(x, w.codes, w.scales, provider="triton"),
        "w4a4": w4a4,
    }
    return found | {name: functools.partial(by_peer, name) for name in peers}


@torch.inference_mode()
def measure(
    tokens: int, every: list[Weight], peers: Mapping[str, Peer], who: Collection[str], device: str = "cuda"
) -> list[_command.Row]:
    width = every[0].codes.shape[1] * 2
    x = torch.randn(tokens, width, device=device).bfloat16()
    quantized = _mxfp4.quantize(x, "even")
    w = _mxfp4.dequantize(every[0].codes, every[0].scales).double()
    exact_of = {name: of_x.double() @ w.T for name, of_x in (("w4a4", _mxfp4.dequantize(*quantized)), ("x", x))}
    rows = []
    ready: list[tuple[_command.Row, Replays]] = []
    for name, run in contenders(x, quantized, peers).items():
        if name not in who:
            continue
        row: _command.Row = {"tokens": tokens, "weight": f"{every[0].rows}x{width}", "who": name}
        exact = exact_of["w4a4" if name == "w4a4" else "x"]
        try:
            got = run(every[0])
            if got.shape != exact.shape:
                raise ValueError(f"got {tuple(got.shape)}, expected {tuple(exact.shape)}")
            row["error"] = float((got.double() - exact).norm() / exact.norm())
            if row["error"] < MOST_ERROR:
                used = [weight for weight in every if weight.values is not None or name != "bf16"]
                for weight in used:
                    run(weight)  # what is prepared once, and cannot be while a graph is captured
                ready.append((row, Replays([functools.partial(run, weight) for weight in used])))
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
    for (row, _), us in zip(ready, in_turn([replays for _, replays in ready], REPLAYS), strict=True):
        row["us"] = us
    for row in rows:
        print(line(row), flush=True)
    return rows


def line(row: _command.Row) -> str:
    start = f"{row['weight']:>12} {row['tokens']:6d} {row['who']:14}"
    if "failed" in row:
        return f"{start} failed: {row['failed']}"
    timed = f"{row['us']:9.2f}" if "us" in row else f"{'wrong':>9}"
    return f"{start} {timed} {row['error']:9.1e}"


def together(rows: Sequence[_command.Row]) -> list[_command.Row]:
    """For each weight and number of tokens: all times, the fastest peer, and a16w4's time relative to that peer's."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        times = found.setdefault((row["weight"], row["tokens"]), {})
        if "us" in row:
            times[row["who"]] = row["us"]
    result = []
    for (weight, tokens), times in found.items():
        best = min(times.keys() & PEERS.keys(), key=times.__getitem__, default=None)
        of_best = times["a16w4"] / times[best] if best is not None and "a16w4" in times else None
        result.append({"weight": weight, "tokens": tokens, "us": times, "best_peer": best, "of_best_peer": of_best})
    return result


def table(of_all: Sequence[_command.Row]) -> list[str]:
    names = [name for name in (*OURS, *PEERS) if any(name in entry["us"] for entry in of_all)]
    last = ("best peer", "a16w4 / best")
    lines = [" ".join((f"{'weight':>12} {'tokens':>6}", *(f"{name:>{_width(name)}}" for name in (*names, *last))))]
    for entry in of_all:
        times = (f"{entry['us'][name]:.2f}" if name in entry["us"] else "-" for name in names)
        compared = "-" if entry["of_best_peer"] is None else f"{entry['of_best_peer']:.2f}"
        cells = zip((*names, *last), (*times, entry["best_peer"] or "-", compared))
        shown = (f"{cell:>{_width(name)}}" for name, cell in cells)
        lines.append(" ".join((f"{entry['weight']:>12} {entry['tokens']:6d}", *shown)))
    return lines


def _width(name: str) -> int:
    return max(len(name), 14 if name == "best peer" else 8)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="M")
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, metavar="NxK")
    parser.add_argument("--who", nargs="+", choices=(*OURS, *PEERS), metavar="NAME", help="only these (default: all)")
    for name, (option, _) in PEERS.items():
        metavar, what = ("FILE", "vLLM's library") if name == "marlin" else ("DIR", f"folder that holds {name}/")
        parser.add_argument(option, type=pathlib.Path, dest=name, metavar=metavar, help=what)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="written anew after each number of tokens")
    args = parser.parse_args(arguments)
    places = {name: getattr(args, name) for name in PEERS if getattr(args, name) is not None}
    for name, place in places.items():
        if not (place.is_file() if name == "marlin" else (place / name).is_dir()):
            parser.error(f"{PEERS[name][0]}: got {place}, which is not, or does not hold, {name}")
    who = args.who or (*OURS, *places)
    for name in PEERS.keys() & set(who) - places.keys():
        parser.error(f"--who {name} needs {PEERS[name][0]}")
    if not _command.has_gpu("linear"):
        return 2
    peers = {name: PEERS[name][1](place) for name, place in places.items() if name in who}
    _command.start(f"{'weight':>12} {'tokens':>6} {'who':14} {'us':>9} {'error':>9}")
    rows: list[_command.Row] = []
    for shape in args.weights:
        n, k = map(int, shape.split("x"))
        every = weights(n, k, "cuda")
        for tokens in args.tokens:
            rows += measure(tokens, every, peers, who)
            _command.save(args.json, rows, together=together(rows))
    print("", *table(together(rows)), sep="\n")
    return _command.status(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
