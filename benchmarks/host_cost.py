"""Host time of a call of each op beside a bare Triton launch of the same kernel, in microseconds.

``python -m benchmarks.host_cost [--rows R] [--width N] [--limit US] [--json FILE]``, on a GPU; half a minute.

- bare: ``kernel[grid](...)`` with the arguments that the op launches it with, outputs already allocated.
- eager: the op, called from Python, under torch.no_grad().
- compiled: the op, called from what torch.compile generates with ``fusion_backend()`` in its default mode. One call's
  share is the difference of two graphs, of which one has twice as many calls, so that guards and the call of the graph
  drop out.
- new rows: the op, called eagerly with a number of rows that it has not seen; the kernel is compiled.

A sample is the CPU time of some calls in a row, after the GPU was waited for and without waiting for it again: fewer
than fill the queue, of tensors so small that the GPU keeps up. Samples of bare, eager and compiled are taken in turn,
because a shared host can be half as fast for seconds. Shown is the median of samples, and in brackets the median of
what a sample is above that of the bare launch beside it. The exit status says whether eager and compiled are within
the limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import operator
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
from torch._inductor.utils import run_and_get_code

from benchmarks import rope_mla_kv_cache
from fusionpasses import fusion_backend
from fusionpasses.ops import OPS, _mxfp4_weight
from fusionpasses.providers import _launch
from fusionpasses.providers.triton import ADAPTERS

CALLS = 16
SAMPLES = 100

Call = Callable[[], Any]


def random_weight(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prepared."""
    codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(118, 126, (rows, width // 32), dtype=torch.uint8, device=device)
    return _mxfp4_weight.prepare(codes, scales)


def arguments(name: str, x: torch.Tensor, weight: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "mla" in name:
        # As many tokens as x has rows, of four heads.
        b = rope_mla_kv_cache.buffers(len(x), 4, x.device.type, by_bmm="bmm" in name)
        if name.startswith("concat"):
            return (b["kv_c"], b["k_pe"], b["kv_cache"], b["slots"]), {}
        nope = ("up", "w_uk") if "bmm" in name else ("q_nope",) if "absorbed" in name else ()
        names = (*nope, "q_pe", "k_pe", "kv_c", "kv_cache", "cos", "sin", "slots")
        return tuple(b[name] for name in names), rope_mla_kv_cache.KWARGS | {"positions": b["positions"]}
    if name.endswith("then_mlp"):
        args, kwargs = arguments(name.replace("then_mlp", "then_gemm"), x, weight)
        codes, scales, shift = random_weight(x.shape[-1], x.shape[-1] // 2, x.device)
        down = {"codes": codes, "scales": scales, "layout": "tiles", "rows": x.shape[-1], "shift": shift}
        down |= {"dtype": x.dtype}
        return args, kwargs | {f"down_{key}": value for key, value in down.items()} | {"act_cast_order": "cast_mul"}
    if name.endswith("then_gemm"):
        args, kwargs = arguments(name.removesuffix("then_gemm").rstrip("._"), x, weight)
        (_, _, w_codes, w_scales, _), of_gemm = arguments("mxfp4_gemm.default", x, weight)
        return args, kwargs | of_gemm | {"w_codes": w_codes, "w_scales": w_scales}
    if "gemm" in name:
        # As many rows as x has columns, prepared.
        n = x.shape[-1]
        codes, scales, shift = random_weight(n, n, x.device)
        kwargs = {"layout": "tiles", "rows": n, "shift": shift}
        if "a16w4" in name:
            return (x, codes, scales, None), kwargs
        return (*torch.ops.fusionpasses.dynamic_mxfp4_quant(x), codes, scales, None), kwargs | {"out_dtype": x.dtype}
    if "silu" in name:
        return (x, x.clone()), {"activation": "silu", "cast_order": "cast_mul"}
    if "norm" not in name:
        return (x,), {"scale_mode": "even"}
    tensors = (x, x.clone()) if "add" in name else (x,)
    args = (*tensors, weight, 1e-6)
    if name.endswith("with_second"):
        return (*args, x.clone(), weight, 1e-6), {"cast_order": "cast_scale", "cast_order2": "cast_scale"}
    return args, {"cast_order": "cast_scale"}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def samples_of(*calls: Call, device: str) -> list[tuple[float, ...]]:
    """Microseconds of each call, taken in turn, so that what slows the host for a while slows all of them."""
    samples = []
    for _ in range(SAMPLES):
        sample = []
        for call in calls:
            synchronize(device)
            start = time.perf_counter_ns()
            call()
            sample.append((time.perf_counter_ns() - start) / 1000)
        samples.append(tuple(sample))
    synchronize(device)
    return samples[SAMPLES // 10 :]  # the first ones warm up


def in_a_row(call: Call) -> Call:
    def row() -> None:
        for _ in range(CALLS):
            call()

    return row


def bare_launch(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What the adapter launches, by torch or Triton, and nothing else; keeps the outputs."""
    launches: list[Call] = []

    def record(kernel: Any, grid: tuple[int, ...], *values: Any, mutates: Any = (), **constants: Any) -> None:
        launches.append(lambda: kernel[grid](*values, **constants))

    def record_torch_call(call: Callable[..., None], *tensors: torch.Tensor) -> None:
        launches.append(lambda: call(*tensors))

    with mock.patch.object(_launch, "launch", record), mock.patch.object(_launch, "torch_call", record_torch_call):
        ADAPTERS[name](*args, **kwargs)

    def bare() -> None:
        for launch in launches:
            launch()

    return bare if len(launches) > 1 else launches[0]


def compiled_calls(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Call]:
    """Compiled graphs of CALLS calls, and of twice as many."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    torch._dynamo.reset()
    small, large = (_compiled(name, count, args, kwargs | {"provider": "triton"}) for count in (CALLS, 2 * CALLS))
    return lambda: small(*tensors), lambda: large(*tensors)


def _compiled(name: str, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    overload = OPS[name].overload
    tensors = {at: value for at, value in enumerate(args) if isinstance(value, torch.Tensor)}
    number = {at: i for i, at in enumerate(tensors)}
    rest = [None if at in number else value for at, value in enumerate(args)]

    def graph(*given: torch.Tensor) -> list[Any]:
        every = [given[number[at]] if at in number else value for at, value in enumerate(rest)]
        outputs = [overload(*every, **kwargs) for _ in range(count)]
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    compiled = torch.compile(graph, fullgraph=True, backend=fusion_backend(passes=()))
    _, sources = run_and_get_code(compiled, *tensors.values())
    # A site is called, whose name begins with the overload's.
    called = sum(
        len(re.findall(rf"= {str(overload).replace('.', '_')}_[0-9a-f]{{16}}\(", source)) for source in sources
    )
    if called != count:
        raise RuntimeError(f"{overload}: the compiled graph has {called} calls, not {count}")
    return compiled


def new_rows(name: str, width: int, weight: torch.Tensor, device: str) -> float:
    """Median microseconds of single calls, each with another number of rows."""
    overload = OPS[name].overload
    most = torch.zeros(256, width, device=device, dtype=torch.bfloat16)
    every = [arguments(name, most[:rows], weight) for rows in range(100, 256)]
    times = []
    for args, kwargs in every:
        synchronize(device)
        start = time.perf_counter_ns()
        overload(*args, **kwargs)
        times.append((time.perf_counter_ns() - start) / 1000)
    return statistics.median(times)


@torch.no_grad()
def measure(name: str, rows: int, width: int, device: str = "cuda") -> dict[str, Any]:
    x = torch.randn(rows, width, device=device).bfloat16()
    weight = torch.randn(width, device=device).bfloat16()
    args, kwargs = arguments(name, x, weight)
    overload = OPS[name].overload
    calls = (in_a_row(bare_launch(name, args, kwargs)), in_a_row(lambda: overload(*args, **kwargs)))
    samples = samples_of(*calls, *compiled_calls(name, args, kwargs), device=device)
    columns = {
        "bare": [bare for bare, _, _, _ in samples],
        "eager": [eager for _, eager, _, _ in samples],
        "compiled": [two - one for _, _, one, two in samples],
    }
    row: dict[str, Any] = {"op": name, "new rows": new_rows(name, width, weight, device)}
    for column, times in columns.items():
        row[column] = statistics.median(times) / CALLS
        row[f"{column} above bare"] = statistics.median(map(operator.sub, times, columns["bare"])) / CALLS
    row["new rows above bare"] = row["new rows"] - row["bare"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--limit", type=float, default=10.0, help="microseconds above a bare launch (default 10)")
    parser.add_argument("--json", help="write the numbers to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a GPU")
    gc.disable()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, bfloat16")
    columns = ("eager", "compiled", "new rows")
    print(f"{args.rows} x {args.width:<30} {'bare':>6}" + "".join(f"{column:>17}" for column in columns))
    results = []
    for name in ADAPTERS:
        row = measure(name, args.rows, args.width)
        results.append(row)
        shown = "".join(f"{row[column]:9.1f} ({row[f'{column} above bare']:+5.1f})" for column in columns)
        print(f"{name:41} {row['bare']:6.1f}{shown}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)
    return int(any(row[f"{column} above bare"] > args.limit for row in results for column in ("eager", "compiled")))


if __name__ == "__main__":
    sys.exit(main())
