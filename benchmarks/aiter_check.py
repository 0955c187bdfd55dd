"""Our AITER adapters on AITER's real Triton kernels, beside our references; no AMD GPU is needed.

``python -m benchmarks.aiter_check --aiter-path DIR [--interpret | --no-contraction] [--only GROUP ...] [--json FILE]``.
DIR is a checkout of ROCm/aiter. The kernels are compiled for the NVIDIA GPU that is here (with --no-contraction each
product is rounded by itself, none becomes part of an FMA), or with --interpret run by Triton's interpreter. Each group
of calls has a process of its own, so that one that fails, or hangs, does not take the others along.

=======  ===============================================================================================================
cases    calls of our ops
equal    all bytes are those of the reference
within   the contract allows other bytes, and these are among them: one float32 number (the reciprocal root mean square,
         the activation, a sum) is not the same bits, and every byte that it does not decide is equal. On NVIDIA also a
         rotation of which a product was not rounded by itself, but for --no-contraction
decided  of such a call, the least share of the bytes that had to be equal
refused  calls that our rules refuse, and whose bytes are other ones by AITER
failed   anything else
other    of calls for "aiter_fast", which are compared with a reference that keeps float32 as AITER does: the share of
         bytes that are not those of our exact reference
=======  ===============================================================================================================
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: What AITER calls what a group runs.
KERNELS = {
    "quant": "dynamic_mxfp4_quant",
    "rms": "fused_rms_mxfp4_quant",
    "act": "act_mul_and_mxfp4_quant",
    "rope": "fused_qk_rope_cat_and_cache_mla",
    "concat": "the same, rows alone",
    "gemm": "gemm_afp4wfp4",
    "shuffled": "gemm_afp4wfp4_preshuffle",
    "shuffled_scales": "gemm_afp4wfp4_preshuffled_scales",
    "fast_rms": "fused_rms_mxfp4_quant, fast",
    "fast_act": "act_mul_and_mxfp4_quant, fast",
    "fast_rope": "..rope_cat_and_cache_mla, fast",
    "golden": "golden vectors",
    "refused": "refused calls",
}


def run(checkout: pathlib.Path, group: str, options: Sequence[str], seconds: float) -> dict[str, Any]:
    """What came of a group, as a dict of ``aiter_cases.Tally``; of one that did not end, its failure alone."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.aiter_kernels", str(checkout.resolve()), group]
    try:
        done = subprocess.run(
            command + list(options),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        tally: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"failures": [f"did not end in {seconds:.0f} s"]}
    except (IndexError, ValueError):
        return {"failures": [f"exit code {done.returncode}: {(done.stderr or done.stdout)[-500:].strip()}"]}
    return tally


def line(group: str, tally: dict[str, Any], seconds: float) -> str:
    counts = "".join(f"{tally.get(name, 0):8d}" for name in ("cases", "equal", "within", "refused"))
    decided = f"{tally['decided']:9.2%}" if tally.get("within") and tally.get("decided") else f"{'':9}"
    other = f"{tally['other']:8.2%}" if tally.get("other") else f"{'':8}"
    return f"{KERNELS[group]:34}{counts}{len(tally['failures']):8d}{decided}{other}{seconds:6.0f}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--aiter-path", type=pathlib.Path, required=True, metavar="DIR", help="checkout of ROCm/aiter")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--interpret", action="store_true", help="in Triton's interpreter, on the CPU")
    how.add_argument("--no-contraction", action="store_true", help="no product becomes part of an FMA")
    parser.add_argument("--only", nargs="+", choices=list(KERNELS), metavar="GROUP")
    parser.add_argument("--seconds", type=float, default=120.0, help="for each group (default 120)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if not (args.aiter_path / "aiter" / "ops" / "triton").is_dir():
        print(f"--aiter-path: got {args.aiter_path}, allowed a checkout of ROCm/aiter; clone it", file=sys.stderr)
        return 2
    if not args.interpret and not torch.cuda.is_available():
        print("aiter_check: got no GPU; allowed one, or --interpret for the CPU", file=sys.stderr)
        return 2
    where = "Triton's interpreter" if args.interpret else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}")
    counted = "".join(f"{name:>8}" for name in ("cases", "equal", "within", "refused", "failed"))
    print(f"{'kernel':34}{counted}{'decided':>9}{'other':>8}{'s':>6}", flush=True)
    options = ["--interpret"] * args.interpret + ["--no-contraction"] * args.no_contraction
    found: dict[str, dict[str, Any]] = {}
    for group in args.only or KERNELS:
        start = time.perf_counter()
        found[group] = run(args.aiter_path, group, options, args.seconds)
        print(line(group, found[group], time.perf_counter() - start), flush=True)
    for group, tally in found.items():
        for failure in tally["failures"][:2]:
            print(f"{group}: {failure[:500]}")
    if args.json is not None:
        rows = {"device": where, "torch": torch.__version__, "groups": found}
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(tally["failures"] for tally in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
