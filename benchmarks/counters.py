"""What binds a kernel: hardware counters of single calls, by Nsight Compute, for the cases that miss a copy's speed.

``python -m benchmarks.counters [--case CHAIN:ROWSxN ...] [--json FILE]``, on an NVIDIA GPU whose counters the user may
read, with ``ncu`` on the path or in /usr/local/cuda/bin; half a minute.

Each case is called once in a process of its own under ncu, which runs the kernel several times with its clocks fixed
and the caches emptied: the times are not those of the bench, and are no figures; the shares are what counts.

- dram %: of the peak bytes per second. MB: read and written, beside what the chain has to move.
- issue %: share of cycles in which a scheduler issued an instruction, while it had warps.
- warps %: resident warps of those the multiprocessor could hold; regs: registers of a thread; waves: the grid over what
  fits at once.
- stalls: why warps did not issue, in cycles for each instruction issued: memory (long scoreboard), barrier, the
  reduction's exchange (short scoreboard), pipes that were full (math), memory queue full (lg throttle).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from fusionpasses.bench.chains import CHAINS, Settings

DEFAULT_CASES = (
    "norm+quant:4096x2880",
    "norm+quant:4096x7168",
    "norm+quant:4096x16384",
    "norm+quant:16384x2880",
    "norm+quant:16384x7168",
    "add+norm+quant:4096x16384",
    "add+norm+quant:65536x16384",
    "norm+quant,norm:4096x7168",
)
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "us": "gpu__time_duration.sum",
    "dram %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "read MB": "dram__bytes_read.sum",
    "written MB": "dram__bytes_write.sum",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "regs": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
    "memory": STALL.format("long_scoreboard"),
    "barrier": STALL.format("barrier"),
    "short": STALL.format("short_scoreboard"),
    "math": STALL.format("math_pipe_throttle"),
    "lg": STALL.format("lg_throttle"),
    "wait": STALL.format("wait"),
    "not selected": STALL.format("not_selected"),
}
#: ncu's --print-units base gives bytes and nanoseconds.
SCALES = {"us": 1e-3, "read MB": 1e-6, "written MB": 1e-6}


def call(case: str) -> None:
    """One call of a case, in the process that ncu watches."""
    name, _, shape = case.rpartition(":")
    rows, n = map(int, shape.split("x"))
    chain = next(chain for chain in CHAINS if chain.name == name)
    tensors = (*chain.inputs(rows, n, "cuda"), torch.ones(n, device="cuda", dtype=torch.bfloat16))
    chain.fused(Settings(), "triton")(*tensors)
    torch.cuda.synchronize()


def counters(case: str, ncu: str) -> dict[str, float]:
    """Counters of the chain's kernel."""
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--kernel-name", "regex:mxfp4"]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, "-m", __spec__.name, "--call", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    text = done.stdout
    if done.returncode or '"ID"' not in text:
        raise RuntimeError(f"ncu gave no counters for {case}: {(text + done.stderr)[-2000:]}")
    _units, row = list(csv.DictReader(io.StringIO(text[text.index('"ID"') :])))[:2]
    return {
        name: float(row[metric].replace(",", "")) * SCALES.get(name, 1)
        for name, metric in METRICS.items()
        if row.get(metric)
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--case", nargs="+", default=DEFAULT_CASES, metavar="CHAIN:ROWSxN")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--call", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.call:
        call(args.call)
        return 0
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    ncu = shutil.which("ncu", path=path)
    if ncu is None or not torch.cuda.is_available():
        print(
            "counters: need an NVIDIA GPU and ncu, Nsight Compute's command line (in the CUDA toolkit)", file=sys.stderr
        )
        return 2
    print(" | ".join(("case", *METRICS)))
    found = {}
    for case in args.case:
        found[case] = counters(case, ncu)
        print(" | ".join((case, *(f"{found[case].get(name, float('nan')):.4g}" for name in METRICS))), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
