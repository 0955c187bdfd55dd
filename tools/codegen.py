"""Compiles the kernels for GPUs that need not be there, and looks at what came out.

``python -m tools.codegen`` compiles every configuration that the launch heuristics can choose, for every target, and
writes the table in docs/compatibility.md. ``--check`` fails if that table is not of these sources, then compiles a
subset in which every two values of (target, chain, dtype, width, rows, layout, weight, roundings, scale mode) meet.

"Every configuration": the heuristics are asked, through the provider's adapters, over a grid of widths and rows; each
(target, fusion, dtype, tile) they answer is compiled once, at the widest row it is chosen for. Whether the norm is
stored and the remaining arguments take turns, so that every two of their values meet (``tools/configs.py``).

A configuration is refused if a register spills, shared memory is used for more than a row's sum, an aligned row is
loaded or anything but scales stored in less than 16 bytes a thread, a product and a sum were contracted where the
source does not ask for it, or instructions that a fast path is there for are missing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import tokenize
from typing import Any

from tools import claims
from tools.configs import (
    CACHE_CHAINS,
    CHAINS,
    GATED_CHAINS,
    GEMM_CHAINS,
    ROWS,
    TARGETS,
    WIDTHS,
    AnyConfig,
    CacheConfig,
    Config,
    GatedConfig,
    GemmConfig,
    every,
    pairwise,
)
from tools.dot_configs import DOT_CHAINS, DotConfig
from tools.launches import compile_launch, launches
from tools.mlp_configs import MLP_CHAINS, MlpConfig
from tools.order_configs import ORDER_CHAINS, OrderConfig
from tools.pair_configs import PAIR_CHAINS, PairConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "compatibility.md"


@dataclasses.dataclass(frozen=True)
class Family:
    """Configurations with a table of their own, and the files of ``fusionpasses/kernels`` that decide their code."""

    name: str
    kind: type
    chains: tuple[str, ...]
    files: tuple[str, ...]
    grid: str


_OF_QUANTS = ("_pieces", "arch", "_mxfp4", "_mxfp4_words", "_token_order")

FAMILIES = (
    Family(
        "quants",
        Config,
        tuple(CHAINS),
        (*_OF_QUANTS, "dynamic_mxfp4_quant", "rmsnorm_mxfp4_quant"),
        f"the heuristics asked at\n{len(WIDTHS)} widths from 32 to 32768 with {len(ROWS)} numbers of rows.",
    ),
    Family(
        "gated",
        GatedConfig,
        tuple(GATED_CHAINS),
        (*_OF_QUANTS, "silu_mul_mxfp4_quant"),
        "all pairs of\nwidths, rows, strides, dtypes, activations, roundings and scale modes, on each target.",
    ),
    Family(
        "products",
        GemmConfig,
        tuple(GEMM_CHAINS),
        (
            *("_pieces", "arch", "_mxfp4_words", "_shared_memory", "_warpgroup"),
            *("mxfp4_gemm", "mxfp4_gemm_wgmma", "mxfp4_dequantize", "gemm_choice"),
        ),
        "each choice\nof the heuristics with each layout of the weight. "
        "The first three kernels are for sm_90 and later, the next\ntwo for sm_90.",
    ),
    Family(
        "cache",
        CacheConfig,
        tuple(CACHE_CHAINS),
        ("_pieces", "arch", "rope_mla_kv_cache"),
        "all pairs of\nsizes, strides, dtypes, styles, angles, caches and slots, and each choice of the heuristics.",
    ),
    Family(
        "pairs",
        PairConfig,
        tuple(PAIR_CHAINS),
        (*_OF_QUANTS, "rmsnorm_mxfp4_quant", "rmsnorm_mxfp4_quant_pair"),
        "every two\ntargets, widths, rows, strides, dtypes, roundings and scale modes meet.",
    ),
    Family(
        "orders",
        OrderConfig,
        tuple(ORDER_CHAINS),
        (
            *_OF_QUANTS,
            *("dynamic_mxfp4_quant", "rmsnorm_mxfp4_quant", "rmsnorm_mxfp4_quant_pair", "silu_mul_mxfp4_quant"),
        ),
        "for products\nthat put their tokens in order, dtypes, strides and scale modes in turn.",
    ),
    Family(
        "mlps",
        MlpConfig,
        tuple(MLP_CHAINS),
        (*_OF_QUANTS, "_gated_tile", "_warpgroup", "mxfp4_gemm_wgmma", "silu_mul_mxfp4_quant", "gemm_choice"),
        "three models'\nsizes, each tile of tokens; activations, roundings and scale modes in turn.",
    ),
    Family(
        "dots",
        DotConfig,
        tuple(DOT_CHAINS),
        ("_pieces", "arch", "mxfp4_gemm_dot", "mxfp4_gemm_sum"),
        "each choice\nof the heuristics, whether rows fill their tiles or not; on NVIDIA targets more than ops call.",
    ),
)

#: By target and family: with which sources (`python -m tools.codegen --hash`) `pytest -m gpu` passed last, and where.
RUNS = {
    ("sm_90", "quants"): ("5ff40e03c35c", "H200 2026-11-21"),
    ("sm_90", "products"): ("788e9c2aadbf", "H200 2026-11-23"),
    ("sm_90", "orders"): ("3ec719221a8f", "H200 2026-11-23"),
    ("sm_90", "mlps"): ("03d418eaa84e", "H200 2026-11-23"),
    ("sm_90", "pairs"): ("369a8c3fc2ac", "H200 2026-11-22"),
    ("sm_90", "dots"): ("74ee5afeec2a", "H200 2026-11-21"),
    ("sm_90", "cache"): ("35f131222723", "H200 2026-11-21"),
}


# ---- what came out


@dataclasses.dataclass(frozen=True)
class Result:
    config: AnyConfig
    warps: int = 0
    spilled: int = 0  # bytes
    shared: int = 0
    sums: int = 0  # bytes of shared memory in which warps exchange the sum of their row
    loads: tuple[int, ...] = ()  # bytes of one thread's accesses to global memory, each size once
    stores: tuple[int, ...] = ()
    wanted_load: int = 16
    wanted_store: int = 16
    index_load: int = 0  # bytes of an index, or of the cache's scale
    other_loads: tuple[int, ...] = ()
    widest_load: int = 0  # the least that the widest load is
    contracted: int = 0
    too_early: bool = False  # it lets the next kernel start before it has waited for the one in front
    missing: tuple[str, ...] = ()
    error: str = ""

    @property
    def verdict(self) -> str:
        if self.error:
            return self.error
        wrong = [f"no instruction for: {what}" for what in self.missing]
        if self.spilled:
            wrong.append(f"spills {self.spilled}")
        if self.shared > self.sums:
            wrong.append(f"shared memory {self.shared} > {self.sums}")
        if not self.loads or any(
            size < self.wanted_load and size not in (self.index_load, *self.other_loads) for size in self.loads
        ):
            wrong.append(f"loads of {self.loads} bytes")
        elif max(self.loads) < self.widest_load:
            wrong.append(f"no load of {self.widest_load} bytes: {self.loads}")
        # Scales are single bytes.
        if min((size for size in self.stores if size > 1 or self.wanted_store == 1), default=0) < self.wanted_store:
            wrong.append(f"stores of {self.stores} bytes")
        if self.too_early:
            wrong.append("lets the next kernel start before it has waited")
        if self.contracted:
            wrong.append(f"{self.contracted} contractions")
        return ", ".join(wrong) or "ok"


def disassembled(cubin: bytes) -> tuple[str, int]:
    """SASS, and the bytes a thread keeps in local memory: what does not fit its registers."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", text)
    if not sizes:
        raise RuntimeError(f"cuobjdump gave no resource usage: {text[:1000]}")
    if odd := odd_descriptor(text):
        raise RuntimeError(f"a descriptor is two registers, from an even one on; the GPU refuses {odd}")
    return text, max(map(int, sizes))


def odd_descriptor(sass: str) -> str:
    """The first instruction whose descriptor of memory or a matrix starts at an odd uniform register, or nothing.

    ptxas 12.8 writes such where a copy to shared memory has a cache policy and an offset in a uniform register. The
    descriptor of an instruction (`idesc`, of tcgen05.mma) is one register, odd or even.
    """
    found = re.search(r"\S.*\bg?desc\[UR\d*[13579]\].*?(?=\s*;|$)", sass, re.M)
    return found[0] if found else ""


def starts_too_early(sass: str) -> bool:
    """Does a kernel let the next one start before it has itself waited for the one in front?

    The next one may read at once what kernels before this one wrote, weights for example, and write what they read.
    """
    lets, waits = sass.find("PREEXIT"), sass.find("ACQBULK")
    return lets >= 0 and not 0 <= waits < lets


def gcn_spilled(code: str) -> int:
    """Bytes a thread keeps in scratch, or a wave in lanes of its vector registers, for want of registers."""
    found = re.findall(r"\.(sgpr_spill_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", code)
    if len(found) != 3:
        raise RuntimeError(f"the code object names {len(found)} of 3 counts of spills")
    count = {name: int(number) for name, number in found}
    return 4 * count["sgpr_spill_count"] + max(4 * count["vgpr_spill_count"], count["private_segment_fixed_size"])


_SASS_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)\.(\S+)")
_GCN_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(\S+)", re.M)
_GCN_SIZE = re.compile(r"(?:dwordx(\d)|(dword)|b(\d+)|[iu](8|16)|[us]?(byte|short))(?:_d16)?(?:_hi)?$")


def accesses(code: str, *, sass: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of a thread's global loads and stores, each size once."""
    sizes: dict[str, set[int]] = {"load": set(), "store": set()}
    if sass:
        for what, suffixes in _SASS_ACCESS.findall(code):
            words = [w.rstrip(";") for w in suffixes.split(".")]
            size = 1 if {"U8", "S8"} & {*words} else 2 if {"U16", "S16"} & {*words} else 4
            size = next((int(w) // 8 for w in words if w in ("64", "128", "256")), size)
            sizes["store" if what == "STG" else "load"].add(size)
    else:
        for what, kind in _GCN_ACCESS.findall(code):
            found = _GCN_SIZE.search(kind)
            if not found:
                raise RuntimeError(f"unknown access {what}_{kind}")
            words4, one, bits, bits_signed, name = found.groups()
            named = {"byte": 1, "short": 2, None: 0}[name]
            sizes[what].add(int(words4 or bool(one)) * 4 + int(bits or bits_signed or 0) // 8 + named)
    return tuple(sorted(sizes["load"])), tuple(sorted(sizes["store"]))


def contractions(compiled: Any) -> int:
    """FMAs of the PTX that LLVM was not asked for. (ptxas is told not to contract by the same option.)"""
    if compiled.metadata.enable_fp_fusion:
        return -1
    if "ptx" not in compiled.asm:
        return 0
    asked = sum(int(lanes or 1) for lanes in re.findall(r"call \S+ .*@llvm\.fma\.(?:v(\d+))?f32", compiled.asm["llir"]))
    pairs = len(re.findall(r"\bfma\.rn\.f32x2", compiled.asm["ptx"]))
    return max(len(re.findall(r"\bfma\.rn\.f32\b", compiled.asm["ptx"])) + 2 * pairs - asked, 0)


def examine(config: AnyConfig) -> Result:
    try:
        return _examine(config)
    except Exception as error:
        return Result(config, error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:80]}")


def _examine(config: AnyConfig) -> Result:
    (launch,) = launches(config)
    compiled = compile_launch(launch, config.target)
    if "cubin" in compiled.asm:
        code, spilled = disassembled(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        spilled = gcn_spilled(code)
    loads, stores = accesses(code, sass="cubin" in compiled.asm)
    warps = compiled.metadata.num_warps
    return Result(
        config,
        warps=warps,
        spilled=spilled,
        shared=compiled.metadata.shared,
        # One float of each warp. A quant has no sum, and no two of its threads need anything of each other.
        sums=4 * warps if config.sums and warps > 1 else launch.shared_memory(config.target),
        loads=loads,
        stores=stores,
        wanted_load=launch.wanted_load,
        wanted_store=launch.wanted_store,
        index_load=launch.index_load,
        other_loads=launch.other_loads,
        widest_load=launch.widest_load,
        contracted=contractions(compiled),
        too_early=starts_too_early(code),
        missing=claims.broken(claims.facts(launch, TARGETS[config.target].warp_size), code),
    )


# ---- the table


def source_hash(family: Family) -> str:
    """Of what decides the generated code: kernels and heuristics, no comments and docstrings; what adapters launch."""
    digest = hashlib.sha256()
    for config in pairwise():
        if isinstance(config, family.kind):
            for launch in launches(config):
                digest.update(launch.key.encode())
    for name in family.files:
        path = ROOT / "fusionpasses" / "kernels" / f"{name}.py"
        statement = True  # a string that begins a statement says something, but does nothing
        for token in tokenize.tokenize(io.BytesIO(path.read_bytes()).readline):
            if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
                continue
            if not (statement and token.type == tokenize.STRING):
                layout = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
                digest.update((tokenize.tok_name[token.type] if layout else token.string).encode() + b"\0")
            statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return digest.hexdigest()[:12]


def _marks(family: Family) -> tuple[str, str]:
    return f"<!-- codegen: {family.name} -->\n", f"<!-- end of codegen: {family.name} -->\n"


def stale(document: str, family: Family, now: str) -> str:
    """Why the family's table in the document is not of these sources, or nothing."""
    start, end = _marks(family)
    found = re.search(r"Sources `(\w+)`", document.partition(start)[2].partition(end)[0])
    if found and found[1] == now:
        return ""
    was = f"of sources {found[1]}" if found else "missing"
    return (
        f"docs/compatibility.md: the table of compiled code ({family.name}) is {was}, the sources are {now}; run "
        "`make codegen` (compiles everything, no GPU needed), look at what changed, and commit the file"
    )


def table(family: Family, results: list[Result], now: str, triton_version: str) -> str:
    lines = [
        f"Sources `{now}`, Triton {triton_version}: {len(results)} configurations, {family.grid}",
        "",
        "| target | " + " | ".join(family.chains) + " | how checked |",
        "|---" * (len(family.chains) + 2) + "|",
    ]
    for target in TARGETS:
        cells = []
        for chain in family.chains:
            here = [r for r in results if (r.config.target, r.config.chain) == (target, chain)]
            bad = sum(r.verdict != "ok" for r in here)
            cells.append((f"{len(here)} compiled" + (f", {bad} refused" if bad else "")) if here else "not checked")
        run_with, where = RUNS.get((target, family.name), ("", ""))
        changed = "" if run_with == now else ", before the sources changed"
        how = f"compiled; run on {where}{changed}" if where else "compiled, not run"
        lines.append(f"| {target} | {' | '.join(cells)} | {how} |")
    bad = [r for r in results if r.verdict != "ok"]
    if bad:
        lines += ["", "Refused:", ""]
        lines += [f"* {r.config}: {r.verdict}" for r in sorted(bad, key=lambda r: str(r.config))[:12]]
        lines += [f"* and {len(bad) - 12} more"] if len(bad) > 12 else []
    return "\n".join(lines) + "\n"


def replaced(document: str, family: Family, text: str) -> str:
    start, stop = _marks(family)
    before, _, after = document.partition(start)
    _, end, after = after.partition(stop)
    if not end:
        raise ValueError(f"docs/compatibility.md has no place for the table: want a line {start!r} and {stop!r}")
    return before + start + text + end + after


def compile_all(configs: list[AnyConfig], jobs: int) -> list[Result]:
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what is looked at is what this Triton makes now
        with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
            # Wide rows take longest: first.
            work = sorted(configs, key=lambda config: -config.n)
            for done, future in enumerate(concurrent.futures.as_completed(pool.submit(examine, c) for c in work), 1):
                result = future.result()
                results.append(result)
                if result.verdict != "ok" or done % 50 == 0:
                    print(f"[{done}/{len(configs)}] {result.config}: {result.verdict}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="table up to date? then only a pairwise subset")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only these; the table is not written")
    names = [family.name for family in FAMILIES]
    parser.add_argument("--family", action="append", choices=names, help="only these, and their tables")
    parser.add_argument("--json", type=pathlib.Path, help="write every result here")
    parser.add_argument("--hash", action="store_true", help="print the hash of the sources and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    families = [family for family in FAMILIES if not args.family or family.name in args.family]
    now = {family.name: source_hash(family) for family in families}
    if args.hash:
        print("\n".join(f"{name}: {value}" for name, value in now.items()))
        return 0
    whys = [why for family in families if (why := stale(DOCUMENT.read_text(), family, now[family.name]))]
    if args.check and whys:
        print("\n".join(whys), file=sys.stderr)
        return 1
    import triton

    start = time.perf_counter()
    wanted = tuple(family.kind for family in families)
    configs = [c for c in (pairwise() if args.check else every(launches)) if isinstance(c, wanted)]
    results = compile_all([c for c in configs if not args.target or c.target in args.target], args.jobs)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(r) | {"verdict": r.verdict} for r in results], indent=1))
    for family in families if not args.check and not args.target else ():
        mine = [result for result in results if isinstance(result.config, family.kind)]
        text = table(family, mine, now[family.name], triton.__version__)
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), family, text))
    bad = [r for r in results if r.verdict != "ok"]
    print(f"{len(results)} compiled, {len(bad)} refused, {time.perf_counter() - start:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
