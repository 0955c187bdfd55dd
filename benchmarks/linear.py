"""Products with an MXFP4 weight beside bfloat16 ones, dequantise + BLAS, and Marlin.

``python -m benchmarks.linear [--tokens M ...] [--weights NxK ...] [--vllm-library FILE] [--json FILE]``, on a GPU.

=============  =========================================================================================================
bf16           ``torch.mm`` of bfloat16 tensors
dequantise     the weight dequantised by our kernel to a temporary, then ``torch.mm``
a16w4          ``mxfp4_gemm_a16w4`` with a prepared weight
a16w4 linear   the same with the weight as checkpoints have it
w4a4           ``mxfp4_gemm`` of x in MXFP4, as a fused norm or activation gives it, with a prepared weight
marlin         ``marlin_gemm`` of vLLM 0.33, with --vllm-library: ``_C_stable_libtorch.abi3.so`` of its wheel
=============  =========================================================================================================

bfloat16, random codes, scales near 1. Times are those of a CUDA graph over weights that are together larger than the L2
cache (``fusionpasses/bench/timing.py``). Before anything is timed it is compared with the product in float64; printed
is the relative error (2-norm), of which rounding to bfloat16 makes 1.7e-3.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusionpasses.bench.timing import replay_time
from fusionpasses.kernels import arch
from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.providers import _triton_gemm

ours = torch.ops.fusionpasses
TOKENS = (1, 8, 16, 32, 64, 256, 1024, 4096)
WEIGHTS = ("18432x7168", "2112x7168", "7168x2048")
TOGETHER = 260_000_000  # bytes of codes
MOST_ERROR = 3e-3


@dataclasses.dataclass
class Weight:
    codes: Tensor
    scales: Tensor
    rows: int
    values: Tensor | None  # bfloat16; of some weights only, because they are four times as large

    @functools.cached_property
    def prepared(self) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        codes, scales, shift = _mxfp4_weight.prepare(self.codes, self.scales)
        return (codes, scales), {"layout": "tiles", "rows": self.rows, "shift": shift}

    @functools.cached_property
    def of_marlin(self) -> tuple[Tensor, Tensor]:
        """In the order of its kernel, by its own op; scales as vLLM 0.33 arranges them."""
        width = self.codes.shape[1] * 2
        words = self.codes.view(torch.int32).T.contiguous()
        packed = torch.ops._C.gptq_marlin_repack(words, width, self.rows, 4, False)
        scales = self.scales.T.reshape(-1, 8, 8).transpose(1, 2).reshape(-1, 4)[:, [0, 2, 1, 3]]
        return packed, scales.reshape(width // 32, self.rows).contiguous().view(torch.float8_e8m0fnu)


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


def contenders(x: Tensor, *, with_marlin: bool) -> dict[str, Callable[[Weight], Tensor]]:
    x_codes, x_scales = _mxfp4.quantize(x, "even")

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
        result: Tensor = ours.mxfp4_gemm(x_codes, x_scales, *w.prepared[0], **keywords)
        return result

    found: dict[str, Callable[[Weight], Tensor]] = {
        "bf16": lambda w: torch.mm(x, w.values.T),  # type: ignore[union-attr]
        "dequantise": by_blas,
        "a16w4": tiles,
        "a16w4 linear": lambda w: ours.mxfp4_gemm_a16w4(x, w.codes, w.scales, provider="triton"),
        "w4a4": w4a4,
    }
    if with_marlin:
        locks = torch.zeros(1024, dtype=torch.int32, device=x.device)
        e2m1 = 2 | 1 << 8 | 1 << 16 | 1 << 49  # vLLM's number of the type: bits of exponent, mantissa, sign, finite

        def marlin(w: Weight) -> Tensor:
            packed, scales = w.of_marlin
            sizes = (len(x), w.rows, x.shape[1])
            result: Tensor = torch.ops._C.marlin_gemm(
                x, None, packed, None, scales, None, None, None, locks, e2m1, *sizes, False, True, False
            )
            return result

        found["marlin"] = marlin
    return found


@torch.inference_mode()
def measure(tokens: int, every: list[Weight], *, with_marlin: bool, device: str = "cuda") -> list[dict[str, Any]]:
    width = every[0].codes.shape[1] * 2
    x = torch.randn(tokens, width, device=device).bfloat16()
    of_codes = _mxfp4.dequantize(*_mxfp4.quantize(x, "even"))
    w = _mxfp4.dequantize(every[0].codes, every[0].scales).double()
    rows = []
    for who, run in contenders(x, with_marlin=with_marlin).items():
        row: dict[str, Any] = {"tokens": tokens, "weight": f"{every[0].rows}x{width}", "who": who}
        exact = (of_codes if who == "w4a4" else x).double() @ w.T
        try:
            row["error"] = float((run(every[0]).double() - exact).norm() / exact.norm())
            if row["error"] < MOST_ERROR:
                used = [weight for weight in every if weight.values is not None or who != "bf16"]
                for weight in used:
                    run(weight)  # what is prepared once, and cannot be while a graph is captured
                row["us"] = replay_time([functools.partial(run, weight) for weight in used])
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    start = f"{row['weight']:>12} {row['tokens']:6d} {row['who']:13}"
    if "failed" in row:
        return f"{start} failed: {row['failed']}"
    timed = f"{row['us']:9.2f}" if "us" in row else f"{'wrong':>9}"
    return f"{start} {timed} {row['error']:9.1e}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="M")
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, metavar="NxK")
    parser.add_argument("--vllm-library", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("linear: got no GPU; only a time on a GPU counts. Run it there", file=sys.stderr)
        return 2
    if args.vllm_library is not None:
        torch.ops.load_library(str(args.vllm_library))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    print(f"{'weight':>12} {'tokens':>6} {'who':13} {'us':>9} {'error':>9}")
    torch.manual_seed(0)
    rows = []
    for shape in args.weights:
        n, k = map(int, shape.split("x"))
        every = weights(n, k, "cuda")
        for tokens in args.tokens:
            rows += measure(tokens, every, with_marlin=args.vllm_library is not None)
    if args.json:
        environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    return int(any("us" not in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
