"""One decode step of DeepSeek-V3 layers at their real sizes, with the fusion passes and with plain Inductor.

``python -m benchmarks.decode_step [--batch B ...] [--mode M ...] [--json FILE]``, on a GPU.

Four layers, all dense, random weights, linears in MXFP4, one new token for each of ``--batch`` sequences, room for
``--context`` tokens. ``--model absorbed`` is that of ``examples/mla_decode.py``, as serving engines write it: absorbed
attention over a paged latent cache. ``--model transformers`` is transformers' DeepSeek-V3 with a static cache, of which
it expands all in every step, so that attention and what feeds it grow with batch * context and hide the rest.

======  ==============================================================================================================
fused   ``torch.compile(backend=fusion_backend())``
plain   ``torch.compile(backend="inductor")`` on the same weights; quants and cache writes in aten ops that Inductor
        traces and may fuse, feeding the same ``mxfp4_gemm`` op
======  ==============================================================================================================

``mxfp4_gemm`` is the same on both sides, and the larger part of the step; so the time outside GEMMs says what the
fusion does. (It was a reference of several eager kernels, which dwarfed the step, when docs/kernels.md's figures were
taken.) Time by kernel is from ``torch.profiler`` (the median of three steps), the step's time from CUDA events without
it. How kernels are told apart, and how bytes are counted: ``benchmarks/kernel_classes.py``.

Nothing is timed before the logits are checked against eager's. Inductor rounds elsewhere than eager, on both sides, and
MXFP4 enlarges every difference: a code that flips moves its value by a quarter, and changes what the next quant sees.
How much that alone makes is measured: *noise* is how far eager's logits move (relative 2-norm; unrelated logits would
be at 1.4) when random embeddings of the new tokens are moved by their last bit. Both sides, which round elsewhere in
every layer, may be off by twice that plus 0.05, and fused by 1.1 times what plain is off plus 0.02. That a compiled
model has eager's very bytes where it rounds as eager does is for the tests to show: ``tests/test_models.py``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

import fusionpasses as fp
from benchmarks.decode_models import MODELS, REAL, TINY, Decoding, plain_twin
from benchmarks.kernel_classes import ATTENTION, GEMM, REST, UNCLEAR, BytesMoved, Kernel, as_learned, kernels_by_step
from benchmarks.kernel_classes import summary as summary_of

BATCHES = (1, 16, 64, 256)
MODES = ("default", "reduce-overhead")
SIDES = ("fused", "plain")
STEP = "decode_step"


def compiled_step(
    step: Callable[[], Tensor], side: str, mode: str
) -> tuple[Callable[[], Tensor], dict[str, int], float]:
    """The step, compiled and run once; bytes it moves by class; seconds that took."""
    moved = BytesMoved()
    backend = fp.fusion_backend() if side == "fused" else "inductor"
    started = time.perf_counter()
    compiled = torch.compile(step, backend=backend, dynamic=False, mode=mode)
    with torch._inductor.config.patch(_post_fusion_custom_pass=moved, force_disable_caches=True):
        compiled()
    return compiled, moved.bytes, time.perf_counter() - started


def milliseconds(step: Callable[[], Tensor], decoding: Decoding, steps: int) -> float:
    """Of one step, over ``steps`` in a row."""
    for _ in range(2):
        torch.compiler.cudagraph_mark_step_begin()
        step()
    decoding.rewind()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        step()
    end.record()
    end.synchronize()
    decoding.rewind()
    return float(start.elapsed_time(end) / steps)


def profiled(step: Callable[[], Tensor], decoding: Decoding, steps: int = 3) -> list[Kernel]:
    """Kernels of the step whose kernels took the median time."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                torch.compiler.cudagraph_mark_step_begin()
                step()
                torch.cuda.synchronize()
    decoding.rewind()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        by_step = kernels_by_step(json.loads(file.read_text()), STEP)
    totals = [sum(kernel.microseconds for kernel in kernels) for kernels in by_step]
    return by_step[totals.index(statistics.median_low(totals))] if totals else []


def noisy_logits(model: Any, decoding: Decoding) -> Tensor:
    """Eager's logits with random embeddings of the new tokens moved by their last bit."""
    weight = decoding.embedding(model)
    rows = decoding.tokens.unique()
    before = weight[rows].clone()
    bits = before.view(torch.int16)
    weight[rows] = (bits ^ torch.randint_like(bits, 2)).view(weight.dtype)
    try:
        return decoding.step_of(model)().float()
    finally:
        weight[rows] = before
        decoding.rewind()


def off(logits: Tensor, eager: Tensor) -> float:
    """How far logits are from eager's: relative 2-norm."""
    return float((logits - eager).norm() / eager.norm())


def near_eager(error: float, noise: float) -> bool:
    """Is a compiled side no further from eager than roundings elsewhere explain?"""
    return error <= 2 * noise + 0.05


def no_further(fused_error: float, plain_error: float) -> bool:
    """Is the fused side about as near to eager as the plain one?"""
    return fused_error <= 1.1 * plain_error + 0.02


@torch.no_grad()
def measure(
    kind: type[Decoding],
    models: dict[str, nn.Module],
    batch: int,
    modes: Sequence[str],
    context: int,
    steps: int,
    device: str,
) -> list[dict[str, Any]]:
    """Rows of one batch size, printed as they come."""
    decoding = kind(models["fused"], batch, context, device)
    eager = decoding.step_of(models["fused"])().float()
    decoding.rewind()
    noise = off(noisy_logits(models["fused"], decoding), eager)
    learned: dict[str, list[Kernel]] = {}
    rows = []
    for mode in modes:
        torch._dynamo.reset()
        compiled: dict[str, Callable[[], Tensor]] = {}
        case: dict[str, dict[str, Any]] = {}
        for side in SIDES:
            compiled[side], moved, took = compiled_step(decoding.step_of(models[side]), side, mode)
            decoding.rewind()
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled[side]().float()
            decoding.rewind()
            case[side] = {"batch": batch, "mode": mode, "side": side, "compile_s": took, "bytes": moved}
            case[side] |= {"error": off(logits, eager), "noise": noise}
        fused_error, plain_error = (case[side]["error"] for side in SIDES)
        agree = near_eager(max(fused_error, plain_error), noise) and no_further(fused_error, plain_error)
        for side in SIDES:
            row = case[side] | {"right": agree}
            if agree and device == "cuda":
                row["step_ms"] = milliseconds(compiled[side], decoding, steps)
                kernels = profiled(compiled[side], decoding)
                if mode == "default":
                    learned[side] = kernels
                elif side in learned:
                    kernels = as_learned(kernels, learned[side])
                # Without default mode there is nothing to tell a graph's kernels apart by.
                row |= summary_of(kernels) if mode == "default" or side in learned else {"kernels": None, "ms": None}
                row["all_kernels"] = len(kernels)
            rows.append(row)
            print(line(row), flush=True)
    torch._dynamo.reset()
    return rows


HEAD = (
    f"{'batch':>5} {'mode':15} {'side':5} {'step ms':>8} {'kernels':>7} {'in GEMMs':>8} {'ms: GEMM':>9} "
    f"{'attention':>9} {'rest':>8} {'unclear':>7} {'rest MB':>8} {'attn MB':>8} "
    f"{'error':>7} {'noise':>7} {'compile s':>9}"
)


def line(row: dict[str, Any]) -> str:
    start = f"{row['batch']:5d} {row['mode']:15} {row['side']:5}"
    end = (
        f"{row['bytes'][REST] / 1e6:8.1f} {row['bytes'][ATTENTION] / 1e6:8.1f} {row['error']:7.4f} {row['noise']:7.4f} "
        f"{row['compile_s']:9.1f}{'' if row['right'] else '  wrong: further from eager than allowed'}"
    )
    if "step_ms" not in row:
        return f"{start} {'-':>8} {'-':>7} {'-':>8} {'-':>9} {'-':>9} {'-':>8} {'-':>7} {end}"
    times = row["ms"] or dict.fromkeys((GEMM, ATTENTION, REST, UNCLEAR), float("nan"))
    in_gemms = row["kernels"][GEMM] if row["kernels"] else "-"
    return (
        f"{start} {row['step_ms']:8.2f} {row['all_kernels']:7d} {in_gemms:>8} {times[GEMM]:9.2f} "
        f"{times[ATTENTION]:9.3f} {times[REST]:8.3f} {times[UNCLEAR]:7.3f} {end}"
    )


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Fused against plain, outside GEMMs and attention, for each case that was timed."""
    by_side = {(row["batch"], row["mode"], row["side"]): row for row in rows if row.get("ms")}
    lines = []
    for (batch, mode, side), plain in by_side.items():
        fused = by_side.get((batch, mode, "fused"))
        if side == "plain" and fused:
            lines.append(
                f"batch {batch}, {mode}: outside GEMMs and attention "
                f"{plain['ms'][REST]:.3f} -> {fused['ms'][REST]:.3f} ms, "
                f"{plain['kernels'][REST]} -> {fused['kernels'][REST]} kernels, "
                f"{plain['bytes'][REST] / 1e6:.1f} -> {fused['bytes'][REST] / 1e6:.1f} MB; "
                f"step {plain['step_ms']:.2f} -> {fused['step_ms']:.2f} ms"
            )
    return lines


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, metavar="B")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--model", default="absorbed", choices=list(MODELS))
    parser.add_argument("--context", type=int, default=128, help="tokens that the cache holds for each sequence")
    parser.add_argument("--steps", type=int, default=8, help="steps in a row for the step's time")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no batch after this"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; on a CPU nothing is timed")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        print(
            "decode_step: got no GPU; allowed: one with about 60 GB, because only a time on a GPU counts. "
            "Run it there, or check that fused and plain agree with --tiny",
            file=sys.stderr,
        )
        return 2
    started = time.perf_counter()
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU (nothing is timed)"
    sizes = TINY if args.tiny else REAL
    layers = sizes["num_hidden_layers"]
    print(f"{where}, torch {torch.__version__}, {args.model}, {layers} layers, context {args.context}", flush=True)
    with torch.no_grad():
        fused = MODELS[args.model].build(sizes, device)
        models = {"fused": fused, "plain": plain_twin(fused)}
    print(f"{len(fp.last_quantization().quantized)} linears in MXFP4, made in {time.perf_counter() - started:.0f} s")
    print(HEAD, flush=True)
    rows: list[dict[str, Any]] = []
    # Default mode comes first, whatever the order asked for: graphs are told apart by what it shows.
    modes = [mode for mode in MODES if mode in args.mode]
    for done, batch in enumerate(args.batch):
        spent = time.perf_counter() - started
        if spent > args.budget:
            print(f"left out after {spent:.0f} s: batch {', '.join(map(str, args.batch[done:]))}")
            break
        rows += measure(MODELS[args.model], models, batch, modes, args.context, args.steps, device)
        print(f"-- batch {done + 1} of {len(args.batch)}, {time.perf_counter() - started:.0f} s", flush=True)
        if args.json:
            environment = {"device": where, "torch": torch.__version__, "model": args.model}
            environment |= {"context": args.context, "sizes": sizes}
            args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print("\n".join(["", *verdicts(rows)]))
    return int(not all(row["right"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
