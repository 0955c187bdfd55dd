"""Tokens per second of decoding DeepSeek-V3 layers at their real sizes: bfloat16, weight-only and W4A4.

``python -m benchmarks.decode_tokens [--batch B ...] [--mode M ...] [--sides S ...] [--json FILE]``, on a GPU.

The step is that of ``benchmarks/decode_step.py --model absorbed``: four dense layers, one new token for each of
``--batch`` sequences, room for ``--context`` tokens. All sides are made of the same random weights.

============  ========================================================================================================
bf16          the model before it is quantised, plain Inductor
weight-only   ``quantize_mxfp4(model, act="none")``, prepared, ``fusion_backend()``
w4a4-unfused  ``quantize_mxfp4(model)``, prepared, plain Inductor; each quant is the kernel of ``dynamic_mxfp4_quant``
w4a4-fused    the same model with ``fusion_backend()``
============  ========================================================================================================

The cache write is our op on every side, ``concat_and_cache_mla``; what has ``fusion_backend()`` fuses RoPE into it.

A step's time is taken with CUDA events over ``--steps`` steps in a row, the sides in turn, so that they share what
clocks and host do; ``ms`` is the median of ``--rounds`` such times, ``spread`` how far apart the least and the largest
are, relative to it. Tokens per second are the batch by that time: of these layers, not of a whole model. ``x bf16`` is
how many times as many tokens as bf16.

No side is timed before its logits were checked against those of its own model in eager mode, by the rules of
``decode_step.py``, and before the report of w4a4-fused showed every site fused. ``off bf16`` is how far eager's logits
are from those of the bf16 model: what quantising random weights, and activations, does.

Compiling is most of the work. So ``--warm`` processes, one for each batch, first fill the compile caches on disk at the
same time; each stops before anything is timed, and what Inductor's autotuning finds on a GPU that is so shared is not
kept.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

import fusionpasses as fp
from benchmarks.decode_models import REAL, TINY, AbsorbedDecoding, twin_of
from benchmarks.decode_step import MODES, milliseconds, near_eager, no_further, noisy_logits, off
from examples.mla_decode import expected_ops
from fusionpasses.report import CACHE_UNKNOWN

BATCHES = (1, 8, 16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Side:
    model: str  # of models_of
    fused: bool


SIDES = {
    "bf16": Side("bf16", fused=False),
    "weight-only": Side("none", fused=True),
    "w4a4-unfused": Side("mxfp4", fused=False),
    "w4a4-fused": Side("mxfp4", fused=True),
}


def models_of(sides: Sequence[str], sizes: dict[str, int], device: str) -> dict[str, nn.Module]:
    """The bf16 model, and those made of it that the sides need: by "bf16", and by ``act``. They share what they can."""
    original = AbsorbedDecoding.unquantised(sizes, device)
    models: dict[str, nn.Module] = {"bf16": original}
    for act in dict.fromkeys(SIDES[side].model for side in sides):
        if act not in models:
            models[act] = fp.quantize_mxfp4(twin_of(original), act=act)
            for module in models[act].modules():
                if isinstance(module, fp.Mxfp4Linear):
                    module.prepare()
    return models


@dataclasses.dataclass
class Compiled:
    step: Callable[[], Tensor]
    report: fp.Report | None
    seconds: float
    cached: bool  # Inductor's code came from its cache on disk
    skipped: int  # CUDA graphs


def compiled(step: Callable[[], Tensor], side: str, mode: str) -> Compiled:
    """The step, compiled and run once."""
    backend = fp.fusion_backend() if SIDES[side].fused else None
    call = torch.compile(step, backend=backend or "inductor", dynamic=False, fullgraph=True, mode=mode)
    before, started = dict(counters["inductor"]), time.perf_counter()
    torch.compiler.cudagraph_mark_step_begin()
    call()
    seconds = time.perf_counter() - started
    cached, skipped = (
        counters["inductor"][name] - before.get(name, 0) for name in ("fxgraph_cache_hit", "cudagraph_skips")
    )
    return Compiled(call, backend.report if backend else None, seconds, cached > 0, skipped)


def wrong_ops(side: str, report: fp.Report | None, model: Any) -> dict[str, tuple[int, int]]:
    """Ops of which the graph has another number than the architecture says: (got, expected).

    A report that a cache hit left unavailable says nothing, here as elsewhere.
    """
    if report is None or any(graph.source == CACHE_UNKNOWN for graph in report.graphs):
        return {}
    expected = expected_ops(model.config)
    if SIDES[side].model == "none":
        fused = "fused_rope_mla_kv_cache"
        expected = dict.fromkeys(expected, 0) | {fused: expected[fused], "mxfp4_gemm_a16w4": expected["mxfp4_gemm"]}
    got = {op: sum(graph.ops_after.get(op, 0) for graph in report.graphs) for op in expected}
    return {op: (got[op], count) for op, count in expected.items() if got[op] != count}


def times(
    steps: dict[str, Callable[[], Tensor]], decoding: AbsorbedDecoding, count: int, rounds: int
) -> dict[str, Any]:
    """Milliseconds of a step of each side, in each round."""
    taken: dict[str, list[float]] = {side: [] for side in steps}
    sides = list(steps)
    for number in range(rounds):
        first = number % len(sides)
        for side in (*sides[first:], *sides[:first]):
            taken[side].append(milliseconds(steps[side], decoding, count))
    return taken


class Batch:
    """A batch, eager's logits of each model for it, and how far a last bit moves them."""

    @torch.no_grad()
    def __init__(self, models: dict[str, nn.Module], batch: int, context: int, device: str) -> None:
        self.models, self.size = models, batch
        self.decoding = AbsorbedDecoding(models["bf16"], batch, context, device)
        self.eager = {name: self.decoding.step_of(model)().float() for name, model in models.items()}
        self.noise = {name: off(noisy_logits(model, self.decoding), self.eager[name]) for name, model in models.items()}

    @torch.no_grad()
    def measure(self, sides: Sequence[str], mode: str, steps: int, rounds: int, device: str) -> list[dict[str, Any]]:
        """Rows of a mode, printed as they come."""
        torch._dynamo.reset()
        rows: dict[str, dict[str, Any]] = {}
        ready: dict[str, Callable[[], Tensor]] = {}
        for side in sides:
            row: dict[str, Any] = {"batch": self.size, "mode": mode, "side": side, "failed": ""}
            rows[side] = row
            try:
                row |= self._checked(side, mode, device, ready)
            except Exception as error:  # the other sides are still worth their time on the machine
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        fused, plain = (rows.get(side, {}).get("error") for side in ("w4a4-fused", "w4a4-unfused"))
        if fused is not None and plain is not None and not no_further(fused, plain):
            rows["w4a4-fused"]["failed"] = "wrong: further from eager than w4a4-unfused"
        ready = {side: step for side, step in ready.items() if not rows[side]["failed"]}
        if device == "cuda" and ready:
            for side, taken in times(ready, self.decoding, steps, rounds).items():
                ms = statistics.median(taken)
                rows[side] |= {"ms": ms, "all_ms": taken, "spread": (max(taken) - min(taken)) / ms}
                rows[side]["tokens_per_s"] = self.size / ms * 1000
        for row in rows.values():
            if "ms" in row and "ms" in rows.get("bf16", {}):
                row["by_bf16"] = rows["bf16"]["ms"] / row["ms"]
            print(line(row), flush=True)
        ready.clear()
        torch._dynamo.reset()
        return list(rows.values())

    def _checked(self, side: str, mode: str, device: str, ready: dict[str, Callable[[], Tensor]]) -> dict[str, Any]:
        """What is known of a side before it is timed; its step is put into ``ready``."""
        name = SIDES[side].model
        model = self.models[name]
        made = compiled(self.decoding.step_of(model), side, mode)
        torch.compiler.cudagraph_mark_step_begin()
        error, noise = off(made.step().float(), self.eager[name]), self.noise[name]
        ready[side] = made.step
        wrong = wrong_ops(side, made.report, model)
        failed = ""
        if not near_eager(error, noise):
            failed = "wrong: further from eager than allowed"
        elif wrong:
            failed = "wrong: " + ", ".join(f"{got} {op}, expected {want}" for op, (got, want) in wrong.items())
        elif mode == "reduce-overhead" and device == "cuda" and made.skipped:
            failed = f"wrong: {made.skipped} CUDA graphs skipped"
        return {
            "error": error,
            "noise": noise,
            "off_bf16": off(self.eager[name], self.eager["bf16"]),
            "compile_s": made.seconds,
            "cached": made.cached,
            "report": None if made.report is None else summary_of(made.report),
            "failed": failed,
        }


def summary_of(report: fp.Report) -> list[str]:
    """The report's first line, and what it says of the graphs as a whole."""
    return [str(report).partition("\n")[0], *(message for graph in report.graphs for message in graph.messages)]


HEAD = (
    f"{'batch':>5} {'mode':15} {'side':12} {'ms':>8} {'spread':>6} {'tokens/s':>9} {'x bf16':>6} "
    f"{'error':>7} {'noise':>7} {'off bf16':>8} {'compile s':>9}"
)


def line(row: dict[str, Any]) -> str:
    start = f"{row['batch']:5d} {row['mode']:15} {row['side']:12}"
    if "error" not in row:
        return f"{start} failed: {row['failed']}"
    timed = f"{'-':>8} {'-':>6} {'-':>9}"
    if "ms" in row:
        timed = f"{row['ms']:8.3f} {row['spread']:6.1%} {row['tokens_per_s']:9.0f}"
    ratio = f"{row['by_bf16']:6.2f}" if "by_bf16" in row else f"{'-':>6}"
    checks = f"{row['error']:7.4f} {row['noise']:7.4f} {row['off_bf16']:8.3f} {row['compile_s']:9.1f}"
    checks += " cached" if row["cached"] else ""
    return f"{start} {timed} {ratio} {checks}" + (f"  {row['failed']}" if row["failed"] else "")


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many times as many tokens: each side as bf16, and w4a4-fused as w4a4-unfused."""
    by_case: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        if "ms" in row:
            by_case.setdefault((row["batch"], row["mode"]), {})[row["side"]] = row["ms"]
    lines = []
    for (batch, mode), ms in by_case.items():
        said = [f"{side} {ms['bf16'] / ms[side]:.2f}" for side in ms if side != "bf16" and "bf16" in ms]
        parts = [f"tokens/s by bf16: {', '.join(said)}"] if said else []
        if "w4a4-fused" in ms and "w4a4-unfused" in ms:
            parts.append(f"fused by unfused: {ms['w4a4-unfused'] / ms['w4a4-fused']:.3f}")
        if parts:
            lines.append(f"batch {batch}, {mode}: {'; '.join(parts)}")
    return lines


# --- filling the caches -----------------------------------------------------------------------------------------------


def cores() -> int:
    return len(os.sched_getaffinity(0))


@torch.no_grad()
def fill_caches(models: dict[str, nn.Module], args: argparse.Namespace, device: str) -> None:
    """Compile and run once what would be measured; leaves it in the compile caches on disk."""
    # The fastest of a kernel's configs is found by timing, which means nothing beside other processes: it is not kept.
    with torch._inductor.config.patch(autotune_local_cache=False):
        for batch in args.batch:
            decoding = AbsorbedDecoding(models["bf16"], batch, args.context, device)
            for model in models.values():
                decoding.step_of(model)()
            for mode in args.mode:
                torch._dynamo.reset()
                for side in args.sides:
                    compiled(decoding.step_of(models[SIDES[side].model]), side, mode)


def fill_caches_in_processes(args: argparse.Namespace, jobs: int) -> None:
    """One process for each batch, ``jobs`` at a time. One that fails costs time only: its rest is compiled later."""
    started = time.perf_counter()
    common = ["--only-fill-caches", "--mode", *args.mode, "--sides", *args.sides, "--context", str(args.context)]
    common += ["--tiny"] if args.tiny else []
    threads = max(1, min(4, cores() // jobs))

    def fill(batch: int) -> str:
        left = args.warm_limit - (time.perf_counter() - started)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.decode_tokens", "--batch", str(batch), *common],
                env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=max(left, 1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {time.perf_counter() - started:.0f} s"
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return f"ended with {done.returncode}: {last[:300]}" if done.returncode else ""

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for batch, failure in zip(args.batch, pool.map(fill, args.batch), strict=True):
            if failure:
                print(f"filling the caches for batch {batch} {failure}", flush=True)
    print(f"caches filled by {jobs} processes at a time: {time.perf_counter() - started:.0f} s", flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, metavar="B")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--context", type=int, default=128, help="tokens that the cache holds for each sequence")
    parser.add_argument("--steps", type=int, default=20, help="steps in a row for one time")
    parser.add_argument("--rounds", type=int, default=9, help="times taken of each side")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no batch after this"
    )
    parser.add_argument(
        "--warm", type=int, metavar="N", help="processes at a time that fill the compile caches first; 0: none"
    )
    parser.add_argument("--warm-limit", type=float, default=240, metavar="SECONDS", help="stop them after this")
    parser.add_argument("--only-fill-caches", action="store_true", help="what those processes do")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="written again after each mode of a batch")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; on a CPU nothing is timed")
    args = parser.parse_args(arguments)
    for name in ("batch", "context", "steps", "rounds"):
        given = getattr(args, name)
        if min(given if name == "batch" else [given]) < 1:
            parser.error(f"got --{name} {given}, allowed 1 and more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        print(
            "decode_tokens: got no GPU; allowed: one with about 30 GB (100 with --warm 7), because only a time on a "
            "GPU counts. Run it there, or check that all sides are right with --tiny",
            file=sys.stderr,
        )
        return 2
    started = time.perf_counter()
    if device == "cuda":
        # Inductor sets this when it first compiles. One folder from the start, or our kernels would be in two.
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(cache_dir(), "triton"))
    sizes = TINY if args.tiny else REAL
    if args.only_fill_caches:
        with torch.no_grad():
            models = models_of(args.sides, sizes, device)
        fill_caches(models, args, device)
        return 0
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU (nothing is timed)"
    layers = sizes["num_hidden_layers"]
    print(f"{where}, torch {torch.__version__}, {layers} layers, context {args.context}", flush=True)
    jobs = args.warm
    if jobs is None:
        jobs = min(len(args.batch), max(1, cores() // 2)) if device == "cuda" else 0
    if jobs > 0:
        fill_caches_in_processes(args, jobs)
    with torch.no_grad():
        models = models_of(args.sides, sizes, device)
    print(f"models made after {time.perf_counter() - started:.0f} s", flush=True)
    print(HEAD, flush=True)
    environment = {"device": where, "torch": torch.__version__, "context": args.context, "sizes": sizes}
    environment |= {"steps": args.steps, "rounds": args.rounds}
    rows: list[dict[str, Any]] = []
    shown: set[str] = set()
    for done, size in enumerate(args.batch):
        spent = time.perf_counter() - started
        if spent > args.budget:
            print(f"left out after {spent:.0f} s: batch {', '.join(map(str, args.batch[done:]))}")
            break
        batch = Batch(models, size, args.context, device)
        for mode in args.mode:
            new = batch.measure(args.sides, mode, args.steps, args.rounds, device)
            rows += new
            for row in new:
                if row.get("report") and row["side"] not in shown:
                    shown.add(row["side"])
                    print("\n".join(f"   {row['side']}: {said}" for said in row["report"]), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
        print(f"-- batch {done + 1} of {len(args.batch)}, {time.perf_counter() - started:.0f} s", flush=True)
    print("\n".join(["", *verdicts(rows)]))
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
