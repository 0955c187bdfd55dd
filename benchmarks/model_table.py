"""What fuses in each model, proven, and how far compiled code is from eager, beside plain Inductor.

``python -m benchmarks.model_table [--compiled] [--models llama ...] [--device cuda]``. The first table interprets every
graph before and after the passes. ``--compiled`` adds generated code, with and without Inductor's emulation of eager's
casts; a deviation of the fused code that plain Inductor does not have would be ours. On a GPU the fused kernels sum in
another order than eager, so bytes may differ there; the fraction is printed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import torch._inductor.config

import fusionpasses as fp
from benchmarks.tiny_models import MODELS
from fusionpasses.testing import capture

BATCHES = 16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def proof(name: str, dtype: str, dynamic: bool, device: str) -> bool:
    """Print one row; True if every expected site fused and nothing else was touched."""
    tiny = MODELS[name]
    model = tiny.make(DTYPES[dtype], device)
    tokens = torch.arange(12, device=device).view(2, 6)
    with torch.no_grad():
        result = capture(model, (tokens,), dynamic=dynamic)
    counts = result.report.counts
    got = tuple(counts.get(f"{op}_mxfp4_quant", 0) for op in ("rmsnorm", "rmsnorm_add", "silu_mul"))
    quants = sum(len(s.anchors) for s in result.report.fused if s.pass_name == "rmsnorm_mxfp4_quant")
    c = result.comparison
    right = got == (tiny.fused, tiny.fused_add, tiny.gated) and quants == tiny.quants and not result.report.refused
    providers = ",".join(sorted({s.provider for s in result.report.fused}))
    difference = "equal" if not c.unequal else f"{c.max_abs:.2g} / {c.bytes_differ:.2%} of bytes"
    print(
        f"{name:12} {dtype:5} {'dynamic' if dynamic else 'static':8} "
        f"{tiny.fused:>2} + {tiny.fused_add} + {tiny.gated:<2} "
        f"{got[0]:>2} + {got[1]} + {got[2]:<2} {quants:>6} {len(result.report.refused):>8}  {providers:10} "
        f"{c.tensors:>3} tensors: {difference}",
        flush=True,
    )
    return right


def deviation(name: str, device: str, emulate: bool) -> None:
    """Print how far compiled logits are from eager's over several inputs: a mixture of experts may route one token
    elsewhere for a difference in the last bit, so one input says little."""
    model = MODELS[name].make(torch.bfloat16, device)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 128, (2, 6), generator=generator).to(device) for _ in range(BATCHES)]
    text = []
    with torch.no_grad(), torch._inductor.config.patch(emulate_precision_casts=emulate):
        eager = [model(tokens).logits.float() for tokens in batches]
        backends: dict[str, Any] = {"fused": fp.fusion_backend(), "plain": "inductor"}
        for label, backend in backends.items():
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=backend)
            errors = [(compiled(t).logits.float() - e).abs() for t, e in zip(batches, eager, strict=True)]
            worst = max(float(e.max()) for e in errors)
            mean = sum(float(e.mean()) for e in errors) / len(errors)
            text.append(f"{label} byte-equal           " if worst == 0 else f"{label} mean {mean:.2g}, max {worst:.2g}")
    scale = max(float(e.abs().max()) for e in eager)
    print(
        f"{name:12} casts {'emulated' if emulate else 'default '}  {'   '.join(text)}   (up to {scale:.2g})", flush=True
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--only-compiled", action="store_true", help="leave the first table out")
    options = parser.parse_args(arguments)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}; sites: rmsnorm + rmsnorm_add + silu_mul _mxfp4_quant")
    print(
        f"{'model':12} {'dtype':5} {'sizes':8} {'expect':11} {'fused':11} {'quants':>6} {'refused':>8}  provider   "
        "values"
    )
    right = True
    for name in options.models:
        for dtype in DTYPES:
            for dynamic in (False, True) if not options.only_compiled else ():
                right &= proof(name, dtype, dynamic, options.device)
    if options.compiled or options.only_compiled:
        print(f"\ncompiled bfloat16 logits against eager, {BATCHES} inputs")
        for name in options.models:
            for emulate in (True, False):
                deviation(name, options.device, emulate)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
