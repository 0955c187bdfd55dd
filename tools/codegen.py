"""Compiles the kernels for GPUs that need not be there, and says what came out.

``python -m tools.codegen [--pairwise] [--target T ...] [--output FILE]``: every configuration that the launch
heuristics can choose, for every target that the installed Triton knows, as a table of register spills, shared memory
and the widest global load and store. Fails if anything spills, needs more shared memory than any of these devices
gives a program by default, or loads or stores 16-byte aligned rows in less than 16 bytes (codes: what a thread makes
at once). ``--pairwise`` compiles a subset in which every two values of (chain, dtype, width, target) still meet.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent

#: Backend, architecture, threads of a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
    "gfx1151": ("hip", "gfx1151", 32),
    "gfx1201": ("hip", "gfx1201", 32),
    "gfx1250": ("hip", "gfx1250", 32),
}

CHAINS = ("quant", "norm", "add+norm", "add+norm, norm stored")
DTYPES = ("bf16", "fp16", "fp32")
#: One width for each tile that the heuristics choose, and the widest supported.
WIDTHS = (128, 512, 1024, 2048, 2880, 4096, 7168, 16384, 32768)

_SHARED_LIMIT = 48 * 1024


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile. ``n`` is the width of a row; for "quant", that of a row among 1024."""

    chain: str
    dtype: str
    n: int
    weight: str | None = None  # its dtype
    norm: str | None = None  # dtype of the stored norm
    round_before: bool = True
    round_result: bool = True
    scale_mode: str = "even"

    @property
    def name(self) -> str:
        return f"{self.chain} {self.dtype} {self.n}"


@dataclasses.dataclass(frozen=True)
class Result:
    config: Config
    target: str
    warps: int = 0
    spilled: int = 0  # bytes (NVIDIA: of local memory) or registers (AMD)
    shared: int = 0
    load: int = 0  # bytes, the widest
    store: int = 0
    error: str = ""

    @property
    def verdict(self) -> str:
        if self.error:
            return self.error
        wrong = []
        if self.spilled:
            wrong.append("spills")
        if self.shared > _SHARED_LIMIT:
            wrong.append("shared memory")
        if self.load < 16:
            wrong.append("narrow loads")
        if self.store < 4:
            wrong.append("narrow stores")
        return ", ".join(wrong) or "ok"


def standard(chain: str, dtype: str, n: int) -> Config:
    weight = None if chain == "quant" else dtype
    return Config(chain, dtype, n, weight, dtype if "stored" in chain else None)


def compile_config(config: Config, target: str) -> Any:
    """The kernel as the adapters launch it on aligned rows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusionpasses.kernels import dynamic_mxfp4_quant as quant
    from fusionpasses.kernels import rmsnorm_mxfp4_quant as norm
    from fusionpasses.ops._mxfp4 import BLOCK, SCALE_ADDEND

    backend, arch, warp_size = TARGETS[target]
    row_blocks = config.n // BLOCK
    adds = config.chain.startswith("add")
    constants: dict[str, Any] = {
        "SCALE_ADDEND": SCALE_ADDEND[config.scale_mode],
        "PTX": backend == "cuda" and int(arch) >= 90,
    }
    pointer = f"*{config.dtype}"
    kinds: dict[str, str | None] = {"x_ptr": pointer, "codes_ptr": "*u8", "scales_ptr": "*u8"}
    if config.chain == "quant":
        kernel = quant.dynamic_mxfp4_quant
        options = quant.launch_options(1024 * row_blocks, warp_size)
        kinds |= {"x_row_stride": None, "row_blocks": "i32"}
        constants["MASKED"] = True
    else:
        kernel = norm.rmsnorm_mxfp4_quant
        options, _ = norm.launch_options(row_blocks, 4 if config.dtype == "fp32" else 2, adds, warp_size)
        kinds |= {
            "residual_ptr": pointer if adds else None,
            "weight_ptr": f"*{config.weight}" if config.weight else None,
            "sum_ptr": pointer if adds else None,
            "norm_ptr": f"*{config.norm}" if config.norm else None,
            "x_row_stride": "i32",
            "residual_row_stride": "i32" if adds else None,
            "rows": "i32",
            "eps": "fp32",
        }
        constants |= {
            "ROW_BLOCKS": row_blocks,
            "ROUND_BEFORE_WEIGHT": config.round_before,
            "ROUND_RESULT": config.round_result,
        }
    constants |= {key: options.pop(key) for key in list(options) if key.isupper()}
    constants |= {key: None for key, kind in kinds.items() if kind is None}
    signature = dict.fromkeys(constants, "constexpr") | {key: kind for key, kind in kinds.items() if kind}
    names = list(kernel.arg_names)
    signature = {key: signature[key] for key in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, key in enumerate(names) if signature[key][0] == "*" or "stride" in key
    }
    aligned = {key: value for key, value in aligned.items() if signature[names[key[0]]] != "constexpr"}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=options)


def nvidia_stack_bytes(cubin: bytes) -> int:
    """Bytes a thread keeps in local memory: what does not fit its registers."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    if not sizes:
        raise RuntimeError(f"cuobjdump gave no resource usage: {usage}")
    return max(map(int, sizes))


_PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)")
_GCN_ACCESS = re.compile(
    r"\b(?:global|buffer|flat)_(load|store)_(?:d16_hi_|d16_)?(dwordx\d|dword|[bui]\d+|[su](?:byte|short)|byte|short)"
)
_GCN_BYTES = {"dword": 4, "byte": 1, "short": 2, "ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2}


def accesses(compiled: Any) -> tuple[int, int]:
    """Bytes of the widest global load and store of a thread."""
    widest = {"load": 0, "store": 0}
    if "ptx" in compiled.asm:
        for what, count, bits in _PTX_ACCESS.findall(compiled.asm["ptx"]):
            key = "load" if what == "ld" else "store"
            widest[key] = max(widest[key], int(count or 1) * int(bits) // 8)
    else:
        for what, kind in _GCN_ACCESS.findall(compiled.asm["amdgcn"]):
            if kind.startswith("dwordx"):
                size = 4 * int(kind[6:])
            elif kind in _GCN_BYTES:
                size = _GCN_BYTES[kind]
            else:
                size = int(kind[1:]) // 8
            widest[what] = max(widest[what], size)
    return widest["load"], widest["store"]


def spilled(compiled: Any) -> int:
    if "cubin" in compiled.asm:
        return nvidia_stack_bytes(compiled.asm["cubin"])
    found = re.findall(r"\.([sv]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"])
    return sum(int(count) for _, count in found)


def examine(config: Config, target: str) -> Result:
    try:
        compiled = compile_config(config, target)
    except Exception as error:
        return Result(config, target, error=f"{type(error).__name__}: {str(error).splitlines()[-1][:80]}")
    load, store = accesses(compiled)
    metadata = compiled.metadata
    return Result(config, target, metadata.num_warps, spilled(compiled), metadata.shared, load, store)


def every() -> list[tuple[Config, str]]:
    return [
        (standard(chain, dtype, n), target)
        for chain, dtype, n, target in itertools.product(CHAINS, DTYPES, WIDTHS, TARGETS)
    ]


def pairwise() -> list[tuple[Config, str]]:
    """A subset of every() in which each two values of chain, dtype, width and target occur together."""
    factors = (CHAINS, DTYPES, WIDTHS, tuple(TARGETS))
    rows = list(itertools.product(*factors))
    pairs_of = lambda row: set(itertools.combinations(enumerate(row), 2))  # noqa: E731
    missing = set().union(*map(pairs_of, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append((standard(*best[:3]), best[3]))
    return chosen


def source_hash() -> str:
    """Of everything that decides the generated code."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "fusionpasses" / "kernels").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def table(results: list[Result]) -> str:
    import triton

    lines = [
        f"Kernels `{source_hash()}`, Triton {triton.__version__}. Compiled without a GPU, not run. Widths in bytes of",
        "one thread's access; spills in bytes of local memory (NVIDIA) or registers (AMD).",
        "",
        "| target | chain | dtype | N | warps | spills | shared | widest load | widest store | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {target: i for i, target in enumerate(TARGETS)}
    for r in sorted(results, key=lambda r: (order[r.target], CHAINS.index(r.config.chain), r.config.dtype, r.config.n)):
        c = r.config
        numbers = "| | | | | " if r.error else f"| {r.warps} | {r.spilled} | {r.shared} | {r.load} | {r.store} "
        lines.append(f"| {r.target} | {c.chain} | {c.dtype} | {c.n} {numbers}| {r.verdict} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairwise", action="store_true", help="a subset that still has every pair of values")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only these")
    parser.add_argument("--output", type=pathlib.Path, help="replace the part after the table's mark in this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    work = [(c, t) for c, t in (pairwise() if args.pairwise else every()) if not args.target or t in args.target]
    start = time.perf_counter()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what is looked at is what this Triton makes now
        with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(examine, config, target) for config, target in work]
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                result = future.result()
                results.append(result)
                if result.verdict != "ok" or done % 20 == 0:
                    print(f"[{done}/{len(work)}] {result.target} {result.config.name}: {result.verdict}", flush=True)
    text = table(results)
    if args.output:
        mark = "<!-- codegen -->\n"
        before = args.output.read_text().partition(mark)[0]
        args.output.write_text(before + mark + text)
    else:
        print(text)
    bad = [r for r in results if r.verdict != "ok"]
    print(f"{len(results)} compiled, {len(bad)} not ok, {time.perf_counter() - start:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
