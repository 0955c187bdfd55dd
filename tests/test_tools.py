"""The two commands name what is missing before anything is set up; code for GPUs that are not here is looked at."""

import dataclasses
import itertools
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch

from fusionpasses.kernels.arch import PLAIN, PTX, ROUNDS_BF16, Arch
from fusionpasses.probes import probe_triton
from tools import claims, codegen, configs, launches

ROOT = pathlib.Path(__file__).parent.parent


def check_tools(tmp_path, *programs, **environment):
    """Run the check with only these programs on the PATH."""
    for program in ("sh", "command", *programs):
        found = shutil.which(program)
        if found and not (tmp_path / program).exists():
            (tmp_path / program).symlink_to(found)
    return subprocess.run(
        [shutil.which("sh"), str(ROOT / "tools" / "check_tools.sh")],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path), "PYTHON": sys.executable, **environment},
        check=False,
    )


def test_nothing_is_missing_here(tmp_path):
    compiler = "g++" if shutil.which("g++") else "clang++"
    result = check_tools(tmp_path, "git", compiler)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_each_missing_tool_is_named_with_what_to_do(tmp_path):
    result = check_tools(tmp_path)
    assert result.returncode == 1
    assert "missing: git\n   what to do: install git" in result.stderr
    assert "missing: a C++ compiler (g++ or clang++)" in result.stderr


def test_a_missing_or_old_python_is_named(tmp_path):
    result = check_tools(tmp_path, "git", PYTHON="python-of-nowhere")
    assert result.returncode == 1
    assert "missing: python-of-nowhere" in result.stderr
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    result = check_tools(tmp_path, PYTHON=str(old))
    assert "missing: Python 3.10 or newer" in result.stderr
    assert "Python 3.9.1" in result.stderr


def test_a_compiler_that_cxx_names_must_exist(tmp_path):
    result = check_tools(tmp_path, "git", CXX="no-such-compiler")
    assert "the C++ compiler that CXX names (no-such-compiler)" in result.stderr


# ---- codegen

needs_triton = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)

CONFIG = configs.Config("sm_100", "add+norm", "bf16", 7168, 1024)
QUANTS, GATED, PRODUCTS, CACHE, PAIRS, ORDERS, MLPS, DOTS = codegen.FAMILIES
GOOD = codegen.Result(CONFIG, warps=8, shared=32, sums=32, loads=(16,), stores=(1, 16))


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "ok"),
        ({"spilled": 8}, "spills 8"),
        ({"shared": 36}, "shared memory 36 > 32"),
        ({"sums": 0}, "shared memory 32 > 0"),
        ({"loads": (4, 16)}, "loads of (4, 16) bytes"),
        ({"loads": ()}, "loads of () bytes"),
        ({"loads": (4,), "wanted_load": 4}, "ok"),
        ({"stores": (1, 8)}, "stores of (1, 8) bytes"),
        ({"stores": (1, 8, 16)}, "stores of (1, 8, 16) bytes"),
        ({"stores": (1,)}, "stores of (1,) bytes"),
        ({"contracted": 3}, "3 contractions"),
        ({"too_early": True}, "lets the next kernel start before it has waited"),
        ({"missing": ("bf16 added in pairs",)}, "no instruction for: bf16 added in pairs"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
    ],
)
def test_a_result_that_is_not_what_the_kernels_promise_is_refused(change, verdict):
    result = dataclasses.replace(GOOD, **change)
    assert result.verdict == verdict
    written = codegen.table(QUANTS, [result], "0123456789ab", "3.9.0")
    assert ("1 refused" in written) == (verdict != "ok")
    assert (f"{CONFIG}: {verdict}" in written) == (verdict != "ok")


def test_the_table_is_stale_once_the_code_changes():
    document = codegen.replaced(
        "before\n<!-- codegen: quants -->\nold\n<!-- end of codegen: quants -->\nafter\n",
        QUANTS,
        codegen.table(QUANTS, [GOOD], "0123456789ab", "3.9.0"),
    )
    assert document.startswith("before\n<!-- codegen: quants -->\nSources `0123456789ab`, Triton 3.9.0")
    assert document.endswith("<!-- end of codegen: quants -->\nafter\n")
    assert codegen.stale(document, QUANTS, "0123456789ab") == ""
    assert "of sources 0123456789ab, the sources are aaaaaaaaaaaa; run `make codegen`" in codegen.stale(
        document, QUANTS, "aaaaaaaaaaaa"
    )
    assert "(cache) is missing" in codegen.stale(document, CACHE, "0123456789ab")
    with pytest.raises(ValueError, match="no place for the table"):
        codegen.replaced(document, CACHE, "")


def test_every_file_of_the_kernels_decides_the_hash_of_a_family():
    files = {path.stem for path in (ROOT / "fusionpasses" / "kernels").glob("*.py")} - {"__init__"}
    assert set().union(*(family.files for family in codegen.FAMILIES)) == files


@needs_triton
@pytest.mark.parametrize(
    ("family", "files", "change"),
    [
        (QUANTS, ("_pieces", "dynamic_mxfp4_quant", "rmsnorm_mxfp4_quant", "_mxfp4"), {"scale_mode": "ceil"}),
        (GATED, ("_pieces", "silu_mul_mxfp4_quant", "_mxfp4"), {"scale_mode": "ceil"}),
        (PRODUCTS, ("_mxfp4_words", "_shared_memory", "mxfp4_gemm", "mxfp4_dequantize", "gemm_choice"), {"n": 2048}),
        (CACHE, ("_pieces", "rope_mla_kv_cache"), {"negative_slots": "wrap"}),
        (PAIRS, ("_pieces", "rmsnorm_mxfp4_quant", "rmsnorm_mxfp4_quant_pair", "_mxfp4"), {"scale_mode": "ceil"}),
        (DOTS, ("mxfp4_gemm_dot", "mxfp4_gemm_sum"), {"bias": False}),
    ],
    ids=("quants", "gated", "products", "cache", "pairs", "dots"),
)
def test_the_hash_is_of_code_not_of_comments(tmp_path, monkeypatch, family, files, change):
    kernels = pathlib.Path("fusionpasses", "kernels")
    shutil.copytree(ROOT / kernels, tmp_path / kernels, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(codegen, "ROOT", tmp_path)
    before = codegen.source_hash(family)
    for name in files:
        file = tmp_path / "fusionpasses" / "kernels" / f"{name}.py"
        source = file.read_text()
        file.write_text(source.replace('"""', '"""Another word. ', 1) + "\n# a comment\n")
        assert codegen.source_hash(family) == before
        file.write_text(source + "\nx = 1\n")
        assert codegen.source_hash(family) != before
        file.write_text(source)
    assert codegen.source_hash(family) == before
    # What the adapters launch decides as well.
    real = codegen.launches
    monkeypatch.setattr(codegen, "launches", lambda config: real(dataclasses.replace(config, **change)))
    assert codegen.source_hash(family) != before


@needs_triton
def test_a_check_of_a_stale_table_fails_before_anything_is_compiled(tmp_path, monkeypatch, capsys):
    document = tmp_path / "compatibility.md"
    document.write_text("<!-- codegen: quants -->\nSources `0123456789ab`\n<!-- end of codegen: quants -->\n")
    monkeypatch.setattr(codegen, "DOCUMENT", document)
    monkeypatch.setattr(codegen, "compile_all", lambda *_: pytest.fail("compiles"))
    monkeypatch.setattr(sys, "argv", ["codegen", "--check"])
    assert codegen.main() == 1
    said = capsys.readouterr().err
    assert "(quants) is of sources 0123456789ab" in said
    assert "(cache) is missing" in said


SASS = """
        /*0090*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*00a0*/               @P0 LDG.E.U8.CONSTANT R8, desc[UR6][R2.64+0x10] ;
        /*00b0*/                   LDGSTS.E.BYPASS.64 [R9], desc[UR6][R2.64] ;
        /*00c0*/                   STG.E desc[UR6][R2.64], R4 ;
        /*00d0*/                   STG.E.U16 desc[UR6][R2.64], R4 ;
"""
GCN = """
\tglobal_load_dwordx4 v[2:5], v[2:3], off
\tglobal_load_dword v25, v[20:21], off offset:16
\tbuffer_load_ushort v1, v2, s[0:3], 0 offen
\tglobal_load_d16_hi_u8 v1, v[2:3], off
\tglobal_prefetch_b8 v[2:3], off
\tds_load_b32 v1, v2
\tglobal_store_b128 v[0:1], v[2:5], off
\tbuffer_store_byte v1, v2, s[0:3], 0 offen
\tglobal_store_d16_hi_b8 v[0:1], v2, off
"""


def test_every_access_of_a_thread_is_seen():
    assert codegen.accesses(SASS, sass=True) == ((1, 8, 16), (2, 4))
    assert codegen.accesses(GCN, sass=False) == ((1, 2, 4, 16), (1, 16))
    with pytest.raises(RuntimeError, match="unknown access load_octet"):
        codegen.accesses("\tglobal_load_octet v1\n", sass=False)


def test_a_kernel_waits_before_it_lets_the_next_one_start():
    wait, let = "        /*0090*/  ACQBULK ;\n", "        /*00a0*/  @P0 PREEXIT ;\n"
    assert not codegen.starts_too_early(SASS)
    assert not codegen.starts_too_early(wait + SASS)
    assert not codegen.starts_too_early(wait + SASS + let)
    assert codegen.starts_too_early(let + wait)
    assert codegen.starts_too_early(let)


def test_a_descriptor_of_two_registers_starts_at_an_even_one():
    odd = "LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR13][R2.64], !PT ;"
    assert codegen.odd_descriptor(SASS + f"        /*00e0*/  {odd}  /* 0x0 */\n").endswith(odd.removesuffix(" ;"))
    assert "gdesc[UR9]" in codegen.odd_descriptor("        HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR9], R24 ;\n")
    # Twins: even ones, and the one register that says what tcgen05.mma does.
    mma = "UTCOMMA gdesc[UR8], gdesc[UR10], tmem[UR19], tmem[UR6], idesc[UR7], tmem[UR22], UP0 ;"
    assert not codegen.odd_descriptor(SASS + f"        /*1a40*/  {mma}\n")


def test_spills_are_read_from_the_code_object():
    counts = ".sgpr_spill_count: 2\n.vgpr_spill_count: 3\n.private_segment_fixed_size: 20\n"
    assert codegen.gcn_spilled(counts) == 28
    assert codegen.gcn_spilled(counts.replace("20", "0")) == 20
    with pytest.raises(RuntimeError, match="names 1 of 3"):
        codegen.gcn_spilled(".sgpr_spill_count: 2\n")


def test_pairwise_configurations_cover_every_pair():
    chosen = configs.pairwise()
    assert len(chosen) < 265
    quants = [c for c in chosen if isinstance(c, configs.Config) and c.layout != configs.HEADS_FIRST]
    for left, right in itertools.combinations(configs.FACTORS, 2):
        norms_only = {left, right} & {"weight", "cast_order", "norm_dtype"}
        met = {(getattr(c, left), getattr(c, right)) for c in quants if c.chain != "quant" or not norms_only}
        wanted = set(itertools.product(configs.FACTORS[left], configs.FACTORS[right]))
        if norms_only:
            wanted = {pair for pair in wanted if "quant" not in pair}
        assert met == wanted, (left, right)
    gated = [c for c in chosen if isinstance(c, configs.GatedConfig)]
    for left, right in itertools.combinations(configs.GATED_FACTORS, 2):
        met = {(getattr(c, left), getattr(c, right)) for c in gated}
        assert met == set(itertools.product(configs.GATED_FACTORS[left], configs.GATED_FACTORS[right])), (left, right)
    writes = [
        dataclasses.asdict(c) | {"amount": (c.tokens, c.heads)} for c in chosen if isinstance(c, configs.CacheConfig)
    ]
    for left, right in itertools.combinations(configs.CACHE_FACTORS, 2):
        met = {(c[left], c[right]) for c in writes}
        assert met == set(itertools.product(configs.CACHE_FACTORS[left], configs.CACHE_FACTORS[right])), (left, right)


@needs_triton
def test_what_is_compiled_is_what_the_provider_launches():
    (launch,) = launches.launches(dataclasses.replace(CONFIG, layout="off alignment", norm_dtype="fp32"))
    assert launch.signature["x_ptr"] == "*bf16"
    assert launch.constants["ROW_BLOCKS"] == 7168 // 32
    assert launch.constants["norm_ptr"] is None
    assert launch.constants["ISA"] == PTX
    assert not launch.aligned
    (aligned,) = launches.launches(CONFIG)
    assert aligned.aligned
    assert aligned.key != launch.key
    assert aligned.options["launch_pdl"]
    (other,) = launches.launches(dataclasses.replace(CONFIG, target="gfx950"))
    assert other.constants["ISA"] == ROUNDS_BF16
    assert other.tile != aligned.tile
    assert not {"launch_pdl", "maxnreg"} & {*other.options}
    assert "x_ptr" in other.small
    (large,) = launches.launches(dataclasses.replace(CONFIG, target="gfx950", rows=1 << 20))
    assert "x_ptr" not in large.small


@needs_triton
def test_the_architecture_comes_out_of_the_kernels_own_code():
    from fusionpasses.providers import triton as provider

    real = provider.arch.of
    kept = real.cache_info()
    seen = {}
    for name, target in configs.TARGETS.items():
        with launches._pretended(provider, target):
            seen[name] = provider.arch.of(torch.device("meta"))
    assert seen == {name: Arch(name, t.warp_size, t.processors) for name, t in configs.TARGETS.items()}
    assert {name for name, arch in seen.items() if arch.hopper_ptx} == {"sm_90", "sm_100", "sm_120"}
    # Nothing of it stays.
    assert provider.arch.of is real
    assert real.cache_info() == kept


def launched(config, **changes):
    """What the provider launches, constants and options changed."""
    (launch,) = launches.launches(config)
    constants = {k: changes.get(k, v) for k, v in launch.constants.items()}
    options = launch.options | {k: v for k, v in changes.items() if k not in constants}
    return dataclasses.replace(launch, constants=constants, options=options)


@pytest.fixture
def examined(monkeypatch, tmp_path):
    """The verdict on code that was compiled with other constants and options than its launch says."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def examined(config, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(
                codegen,
                "compile_launch",
                lambda _, target: launches.compile_launch(launched(config, **changes), target),
            )
            return codegen.examine(config).verdict

    return examined


SMALL = [
    configs.Config("sm_100", "quant", "bf16", 1024, 64),
    configs.Config("sm_120", "add+norm", "fp16", 1024, 64, layout="off alignment"),
    configs.Config("sm_90", "norm", "fp32", 1024, 64),
    configs.Config("gfx1100", "norm, stored", "bf16", 1024, 64),
    configs.CacheConfig("sm_90", "absorbed", "bf16", 64, 16, cache="paged apart"),
    configs.Config("gfx950", "add+norm", "bf16", 1024, 64),
    configs.DotConfig("gfx950", "dots", 16, 1000, 2880, codes=True),
    configs.PairConfig("sm_90", "norm, and another norm", "bf16", 512, 1536, 64),
]


@needs_triton
@pytest.mark.parametrize("config", SMALL, ids=str)
def test_what_the_kernels_promise_is_found_in_their_code(config, examined):
    assert examined(config) == "ok"


@needs_triton
def test_code_that_breaks_a_promise_is_refused(examined):
    quant, add, norm, amd, rope, mi350, dots, pair = SMALL
    pdl = "no instruction for: waits before any access, no instruction for: lets the next kernel come"
    pairs = "minima and maxima in pairs, no instruction for: nibbles picked by byte"
    # Without the PTX.
    assert examined(quant, ISA=PLAIN) == f"no instruction for: bf16 in pairs, no instruction for: {pairs}, {pdl}"
    assert examined(add, ISA=PLAIN).startswith("no instruction for: fp16 in pairs, no instruction for: minima")
    assert examined(norm, ISA=PLAIN) == f"no instruction for: maximum that keeps NaN, {pdl}"
    # Too few registers.
    assert examined(norm, maxnreg=32).startswith("spills ")
    # Contracted.
    assert "contractions" in examined(norm, enable_fp_fusion=True)
    # Half a block for a thread: threads then exchange what they have.
    assert "loads of (8,) bytes" in examined(quant, TILE_BLOCKS=32, num_warps=2)
    assert examined(rope, ISA=PLAIN) == f"no instruction for: bf16 in pairs, {pdl}"
    maxima = "no instruction for: maximum that keeps NaN"
    assert examined(mi350, ISA=PLAIN) == f"{maxima}, no instruction for: rounded in pairs"
    # Decoded, though codes could be multiplied; in tiles that are too large.
    assert examined(dots, MODE=0) == "no instruction for: products of codes"
    assert examined(dots, BLOCK_M=256, BLOCK_N=256, num_warps=8).startswith("spills ")
    of_pair = f"no instruction for: bf16 in pairs, no instruction for: {pairs}, no instruction for: rounded in pairs"
    assert examined(pair, ISA=PLAIN) == f"{of_pair}, {pdl}"
    # Pieces by element.
    assert "loads of" in examined(rope, VECTOR=1)
    # Triton itself would raise at the launch.
    assert "no option launch_pdl for gfx1100" in examined(amd, launch_pdl=True)


@needs_triton
def test_each_path_claims_its_own_instructions():
    def claimed(chain, dtype, **changes):
        config = configs.Config("sm_90", chain, dtype, 1024, 64, **changes)
        (launch,) = launches.launches(config)
        facts = claims.facts(launch, 32)
        return {claim.what: int(claim.least(facts)) for claim in claims.CLAIMS if claim.least(facts)}

    always = {"waits before any access": 1, "lets the next kernel come": 1}
    words = always | {"minima and maxima in pairs": 16, "nibbles picked by byte": 16}
    floats = always | {"maximum that keeps NaN": 16}
    assert claimed("quant", "bf16") == words | {"bf16 in pairs": 32}
    assert claimed("quant", "fp16") == words | {"fp16 in pairs": 48}
    assert claimed("quant", "fp32") == floats
    assert claimed("add+norm", "bf16") == words | {"bf16 in pairs": 64, "rounded in pairs": 16}
    assert claimed("norm", "bf16", weight="none") == words | {"bf16 in pairs": 32, "rounded in pairs": 16}
    assert claimed("norm", "bf16", weight="fp32", norm_dtype="same") == words | {
        "bf16 in pairs": 32,
        "rounded in pairs": 32,
    }
    # Rounded before a float32 weight, and the result is not rounded.
    assert claimed("add+norm", "bf16", weight="fp32", norm_dtype="fp32") == floats | {
        "bf16 in pairs": 16,
        "rounded in pairs": 16,
    }
    assert claimed("add+norm", "fp32") == floats
    rope = configs.CacheConfig("sm_90", "absorbed", "bf16", 64, 16)
    for change, wanted in (
        ({}, {"bf16 in pairs": 48}),
        ({"dtype": "fp16"}, {"fp16 in pairs": 48}),
        ({"angles": "fp32"}, {"rounded in pairs": 16}),
        ({"sizes": "odd"}, {}),
        ({"chain": "cache write"}, {}),
    ):
        (launch,) = launches.launches(dataclasses.replace(rope, **change))
        facts = claims.facts(launch, 32)
        assert {claim.what: int(claim.least(facts)) for claim in claims.CLAIMS if claim.least(facts)} == always | wanted
    maxima, rounded = "maximum that keeps NaN", "rounded in pairs"
    for target, chain, dtype, wanted in (
        ("gfx942", "norm", "bf16", {}),
        ("gfx1201", "norm", "bf16", {maxima: 16}),
        ("gfx950", "quant", "bf16", {maxima: 16}),
        ("gfx950", "norm", "bf16", {maxima: 16, rounded: 32}),
        ("gfx1250", "add+norm", "bf16", {maxima: 16, rounded: 48}),
        ("gfx950", "add+norm", "fp16", {maxima: 16}),
        ("gfx950", "norm", "fp32", {maxima: 16}),
    ):
        (amd,) = launches.launches(configs.Config(target, chain, dtype, 1024, 64))
        facts = claims.facts(amd, configs.TARGETS[target].warp_size)
        assert {claim.what: claim.least(facts) for claim in claims.CLAIMS if claim.least(facts)} == wanted


@pytest.mark.parametrize(
    ("what", "code", "count"),
    [
        ("bf16 in pairs", "HFMA2.MMA.BF16_V2 R1, R2, R3, R4 ;\nHMUL2.BF16_V2 R1, R2, R3 ;\nHFMA2 R1, R2, R3, R4", 2),
        ("fp16 in pairs", "HFMA2.MMA R1, R2, R3, R4 ;\nHADD2 R1, R2, R3 ;\nHFMA2 R1, R2, R3, -RZ ;", 3),
        ("fp16 in pairs", "HFMA2 R1, -RZ, RZ, 0, 1 ;\nHADD2.F32 R1, -RZ, R2.H0_H0 ;\nHFMA2.BF16_V2 R1, R2, R3, R4", 0),
        ("minima and maxima in pairs", "VIMNMX.U16x2 R1, R2\nVIMNMX3.U16x2 R1, R2\nVIMNMX.U32 R1, R2", 2),
        ("maximum that keeps NaN", "FMNMX.NAN R1, R2\nFMNMX3.NAN R1, R2\nFMNMX R1, R2", 2),
        ("maximum that keeps NaN", "v_maximum3_f32 v1, v2\nv_maximum_f32 v1\nv_max_f32 v1\nv_max3_f32 v1", 2),
        ("rounded in pairs", "F2FP.BF16.F32.PACK_AB R1\nF2FP.F16.F32.PACK_AB R1\nF2F.BF16.F32 R1", 2),
        ("rounded in pairs", "v_cvt_pk_bf16_f32 v1\nv_fma_mixlo_bf16 v1\nv_cvt_f16_f32 v1\nv_fma_mix_f32 v1", 2),
        ("waits before any access", "LDC R1, c[0]\nACQBULK ;\nLDG.E.128 R4", 1),
        ("waits before any access", "LDC R1, c[0]\nLDG.E.128 R4\nACQBULK ;\n", 0),
        ("waits before any access", "STG.E.U8 [R2], R4\nACQBULK ;\n", 0),
    ],
)
def test_instructions_are_told_apart(what, code, count):
    (claim,) = (claim for claim in claims.CLAIMS if claim.what == what)
    assert len(re.findall(claim.code, code)) == count


def test_only_contractions_that_were_not_asked_for_count():
    def contracted(ptx, fusion=False):
        llir = "call float @llvm.fma.f32(\ncall <16 x float> @llvm.fma.v16f32("
        metadata = types.SimpleNamespace(enable_fp_fusion=fusion)
        return codegen.contractions(types.SimpleNamespace(metadata=metadata, asm={"llir": llir, "ptx": ptx}))

    asked = "fma.rn.f32 %r1\n" + 8 * "fma.rn.f32x2 %r2\n"
    assert contracted(asked) == 0
    # Inline PTX is what it says.
    assert contracted(asked + "fma.rn.bf16x2 h0\nfma.rn.f16x2 h0\n") == 0
    assert contracted(asked + "fma.rn.f32 %r1\n") == 1
    assert contracted(asked + "fma.rn.f32x2 %r1\n") == 2
    assert contracted(asked, fusion=True) == -1


@needs_triton
def test_every_tile_on_the_grid_is_compiled(monkeypatch):
    monkeypatch.setattr(configs, "TARGETS", {t: configs.TARGETS[t] for t in ("sm_90", "gfx942")})
    monkeypatch.setattr(configs, "WIDTHS", (64, 2880, 7168, 32768))
    monkeypatch.setattr(configs, "ROWS", (1, 16384))
    every = [c for c in configs.every(launches.launches) if isinstance(c, configs.Config)]
    chosen = [c for c in every if c.layout != configs.HEADS_FIRST]
    assert [c for c in every if c.layout == configs.HEADS_FIRST] == configs.heads_first()

    def kinds(config):
        return {(config.target, *configs._kind(config, launch)) for launch in launches.launches(config)}

    grid = [configs.TARGETS, configs.CHAINS, configs.DTYPES, configs.WIDTHS, configs.ROWS]
    grid += [("contiguous",), ("even",), ("same", "fp32", "none"), ("cast_scale", "scale_cast")]
    asked = set().union(*(kinds(configs.Config(*row)) for row in itertools.product(*grid)))
    assert set().union(*map(kinds, chosen)) == asked
    assert len(chosen) == len(asked)
    # What takes turns does so.
    for target in configs.TARGETS:
        mine = [c for c in chosen if c.target == target]
        assert {c.dtype for c in mine} == {*configs.DTYPES}
        assert {c.chain for c in mine} == {*configs.CHAINS}
        assert {c.n & (c.n - 1) == 0 for c in mine} == {True, False}


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_tile_of_the_cache_write_is_compiled(target):
    compiled = configs.every_cache_write()
    assert {c.target for c in compiled} == {*configs.TARGETS}
    chosen = {launch.tile for c in compiled if c.target == target for launch in launches.launches(c)}
    for tokens, heads in itertools.product((1, 7, 64, 500, 4096, 65536), (1, 8, 16, 64, 128)):
        for chain in configs.CACHE_CHAINS:
            (launch,) = launches.launches(configs.CacheConfig(target, chain, "bf16", tokens, heads))
            assert launch.tile in chosen, (tokens, heads, chain)


@needs_triton
def test_what_takes_turns_is_said():
    def kind(target, chain, dtype, n):
        config = configs.Config(target, chain, dtype, n, 1 << 14)
        (launch,) = launches.launches(config)
        return configs._kind(config, launch)[1:]

    assert kind("sm_90", "norm, stored", "fp16", 4096) == ("fp16", "norm")
    assert kind("sm_100", "add+norm", "fp16", 4096) == ("16 bits", "add+norm")
    assert kind("gfx942", "add+norm", "fp32", 256) == ("fp32", "")
    assert kind("gfx942", "quant", "bf16", 256) == ("16 bits", "quant")
