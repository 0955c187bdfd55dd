"""The command ``python -m fusionpasses bench``: every norm + quant op, by everyone who can run it, on the same buffers.

A row is timed only if its result was checked first, against the op's reference:

==============  ====================================================================================================
result          meaning
==============  ====================================================================================================
right           byte-equal; behind a norm one byte in 10000 may differ, which the last bit of a row's rsqrt accounts
                for (a GPU's rsqrt is approximate, the kernel's is not)
other rounding  only for contenders that round elsewhere than the model does (Inductor with its default casts, AITER):
                at most 5% of the bytes of codes and scales differ, and the error of what they mean is at most 10%, that
                of sum and norm 1%. The time is shown, with a ``~``: it is a time of another computation
wrong           anything else; no time is taken
failed          it raised an error, which is printed
==============  ====================================================================================================

``error`` is the largest, over the outputs, of ``|got - reference| / |reference|`` (2-norms; codes and scales as the
values they stand for). Weights are drawn from 8 to 16, inputs from the normal distribution; see ``peers`` for why.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusionpasses.bench import peers, plot
from fusionpasses.bench.chains import CHAINS, Chain, Contender, Outputs, Run, Settings, contenders
from fusionpasses.bench.timing import copy_time, replay_time, sets_for
from fusionpasses.ops import _mxfp4, _rms_norm
from fusionpasses.probes import probe_gpu, probe_triton

ROWS = (1, 64, 1024, 4096, 16384)
WIDTHS = (4096, 7168)
RIGHT, OTHER_ROUNDING, WRONG, FAILED = RESULTS = ("right", "other rounding", "wrong", "failed")


@dataclasses.dataclass(frozen=True)
class Deviation:
    """How far outputs are from the reference's."""

    bytes_differing: int  # of all outputs
    quant_bytes_differing: int  # of codes and scales
    total_bytes: int
    quant_bytes: int
    quant_error: float
    other_error: float  # of the sum and the norm

    @property
    def error(self) -> float:
        return max(self.quant_error, self.other_error)


def deviation(got: Outputs, want: Outputs) -> Deviation:
    differing = [_bytes_differing(g, w) for g, w in zip(got, want, strict=True)]
    sizes = [w.numel() * w.element_size() for w in want]
    quant_error = _relative(_mxfp4.dequantize(*got[:2]), _mxfp4.dequantize(*want[:2])) if sum(differing[:2]) else 0.0
    others = [_relative(g.float(), w.float()) for g, w, d in zip(got[2:], want[2:], differing[2:], strict=True) if d]
    return Deviation(
        sum(differing), sum(differing[:2]), sum(sizes), sum(sizes[:2]), quant_error, max(others, default=0.0)
    )


def judge(found: Deviation, exact: bool, norms: bool) -> str:
    if found.bytes_differing <= (found.total_bytes // 10_000 if norms else 0):
        return RIGHT
    near = found.quant_bytes_differing <= 0.05 * found.quant_bytes
    if not exact and near and found.quant_error <= 0.1 and found.other_error <= 0.01:
        return OTHER_ROUNDING
    return WRONG


@torch.inference_mode()
def measure(
    chain: Chain, rows: int, n: int, settings: Settings, device: str, skip: frozenset[str], aiter: Run | None
) -> list[dict[str, Any]]:
    """Rows of one chain at one size, printed as they come."""
    torch._dynamo.reset()
    moved = chain.bytes_moved(rows, n)
    on_gpu = device == "cuda"
    weight = (8 + 8 * torch.rand(n, device=device)).bfloat16()
    inputs = [(*chain.inputs(rows, n, device), weight) for _ in range(sets_for(moved) if on_gpu else 1)]
    want = chain.reference(settings)(*inputs[0])
    everyone = contenders(chain, settings, device, skip)
    peer = peers.aiter(aiter, chain, settings) if aiter and "aiter" not in skip else None
    yardstick = copy_time(moved) if on_gpu else None
    results = []
    for contender in [*everyone, peer] if peer else everyone:
        row: dict[str, Any] = {"chain": chain.name, "op": chain.op, "rows": rows, "n": n, "who": contender.name}
        row |= {"bytes": moved, "copy_us": yardstick, "us": None, "of_copy": None}
        try:
            row |= _check_and_time(contender, inputs, want, yardstick, chain)
        # One contender's failure, whatever it is, must not cost the rows of the others; it is printed and counted.
        except Exception as error:
            row |= {"result": FAILED, "why": f"{type(error).__name__}: {error}"}
        results.append(row)
        print(_line(row), flush=True)
    return results


def _check_and_time(
    contender: Contender, inputs: Sequence[Outputs], want: Outputs, yardstick: float | None, chain: Chain
) -> dict[str, Any]:
    found = deviation(contender.run(*inputs[0]), want)
    result = judge(found, contender.exact, chain.rounds_elsewhere)
    row = {"result": result, **dataclasses.asdict(found), "error": found.error}
    if yardstick and result != WRONG:
        row["us"] = replay_time([functools.partial(contender.run, *tensors) for tensors in inputs])
        row["of_copy"] = yardstick / row["us"]
    return row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [chain.name for chain in CHAINS]
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="R")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="N")
    parser.add_argument("--chains", nargs="+", default=names, choices=names, metavar="CHAIN", help=", ".join(names))
    parser.add_argument("--skip", nargs="+", default=(), metavar="WHO", help="contenders, by the names printed")
    parser.add_argument("--cast-order", default="cast_scale", choices=_rms_norm.CAST_ORDERS)
    parser.add_argument("--scale-mode", default="even", choices=list(_mxfp4.SCALE_ADDEND))
    parser.add_argument("--peer-path", type=pathlib.Path, metavar="DIR", help="checkout of AITER")
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="DIR", help="write norm_quant.json and roofline.png here"
    )
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: results are checked, nothing is timed"
    )


def main(args: argparse.Namespace) -> int:
    """0 if everything is right, 1 if a result is wrong, 2 if the machine lacks something."""
    gpu = probe_gpu()
    if args.device == "cuda":
        missing = [verdict.why for verdict in (gpu, probe_triton()) if not verdict]
        if missing:
            print(
                f"fusionpasses bench: got {'; '.join(missing)}; allowed: a GPU that torch sees, and Triton, "
                "because only a time on a GPU counts. Run it there, or check the results alone with --device cpu",
                file=sys.stderr,
            )
            return 2
    settings = Settings(args.cast_order, args.scale_mode)
    aiter, why = _load_aiter(args.peer_path, args.device)
    environment = _environment(args.device, settings) | {"aiter": why}
    print("\n".join(f"{key}: {value}" for key, value in environment.items()))
    print("products with MXFP4 weights: python -m benchmarks.linear\n")
    print(_HEAD, flush=True)
    torch.manual_seed(0)
    chains = [chain for chain in CHAINS if chain.name in args.chains]
    cells = [(chain, rows, n) for n in args.widths for rows in args.rows for chain in chains]
    results: list[dict[str, Any]] = []
    start = time.perf_counter()
    with torch._dynamo.config.patch(recompile_limit=64):
        for done, (chain, rows, n) in enumerate(cells):
            results += measure(chain, rows, n, settings, args.device, frozenset(args.skip), aiter)
            if args.output:
                _write(args.output, environment, results)
            spent = time.perf_counter() - start
            left = spent / (done + 1) * (len(cells) - done - 1)
            print(f"-- {done + 1} of {len(cells)}, {spent:.0f} s, about {left:.0f} s left", flush=True)
    _conclude(args, environment, results)
    return int(any(row["result"] in (WRONG, FAILED) for row in results))


_HEAD = (
    f"{'chain':19} {'rows':>6} {'N':>6} {'who':24} {'us':>9}  {'of copy':>7} {'copy us':>9} "
    f"{'bytes differ':>12} {'error':>8}  result"
)


def _line(row: dict[str, Any]) -> str:
    if row["result"] == FAILED:
        return f"{row['chain']:19} {row['rows']:6d} {row['n']:6d} {row['who']:24} failed: {row['why']}"
    mark = "~" if row["result"] == OTHER_ROUNDING else " "
    timed = f"{row['us']:9.2f}{mark} {row['of_copy']:7.2f}" if row["us"] else f"{'-':>9}  {'-':>7}"
    copy = f"{row['copy_us']:9.2f}" if row["copy_us"] else f"{'-':>9}"
    return (
        f"{row['chain']:19} {row['rows']:6d} {row['n']:6d} {row['who']:24} {timed} {copy} "
        f"{row['bytes_differing']:12d} {row['error']:8.1e}  {row['result']}"
    )


def _conclude(args: argparse.Namespace, environment: dict[str, str], results: list[dict[str, Any]]) -> None:
    counts = {kind: sum(row["result"] == kind for row in results) for kind in RESULTS}
    print("\n" + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if counts[OTHER_ROUNDING]:
        print("~ a time of a computation that rounds elsewhere than the model: its bytes are not the reference's")
    if args.device == "cpu":
        print("not timed: only a time on a GPU counts")
    if not args.output:
        return
    print(f"wrote {args.output / 'norm_quant.json'}")
    drawable = plot.probe_matplotlib()
    if not drawable:
        print(f"no picture: {drawable.why}")
    elif any(row["us"] for row in results):
        title = f"{environment['device']}, torch {torch.__version__}, bfloat16, {environment['contract']}"
        plot.roofline(results, title, args.output / "roofline.png")
        print(f"wrote {args.output / 'roofline.png'}")
    else:
        print("no picture: nothing was timed")


def _load_aiter(path: pathlib.Path | None, device: str) -> tuple[Run | None, str]:
    if device == "cpu":
        return None, "left out: its kernels need a GPU"
    if path is not None:
        return peers.load_aiter(path), "from --peer-path"
    installed, verdict = peers.find_aiter()
    if installed is None:
        return None, f"left out: {verdict.why}"
    try:
        return peers.load_aiter(installed), "installed"
    except peers.PeerUnavailable as error:
        return None, f"left out: {error}"


def _environment(device: str, settings: Settings) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU (results checked, nothing timed)",
        "torch": torch.__version__,
        "triton": probe_triton().why,
        "dtype": "bfloat16",
        "contract": f"cast_order={settings.cast_order}, scale_mode={settings.scale_mode}",
    }


def _write(folder: pathlib.Path, environment: dict[str, str], results: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment, "rows": results}, indent=1)
    (folder / "norm_quant.json").write_text(text + "\n")


def _bytes_differing(got: Tensor, want: Tensor) -> int:
    return int((got.contiguous().view(torch.uint8) != want.contiguous().view(torch.uint8)).sum())


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())
