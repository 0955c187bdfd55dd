"""The two commands name what is missing before anything is set up; code for GPUs that are not here is looked at."""

import dataclasses
import itertools
import pathlib
import shutil
import subprocess
import sys

import pytest

from fusionpasses.probes import probe_triton
from tools import codegen, launches

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

CONFIG = launches.Config("sm_100", "add+norm", "bf16", 7168, 1024)
GOOD = codegen.Result(CONFIG, warps=4, shared=64, loads=(16,), stores=(1, 16))


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "ok"),
        ({"spilled": 8}, "spills 8"),
        ({"shared": 227 * 1024 + 1}, "shared memory 232449 > 232448"),
        ({"loads": (4, 16)}, "loads of (4, 16) bytes"),
        ({"loads": ()}, "loads of () bytes"),
        ({"loads": (4,), "wanted_load": 4}, "ok"),
        ({"stores": (1, 8)}, "stores of (1, 8) bytes"),
        ({"stores": (1, 8, 16)}, "stores of (1, 8, 16) bytes"),
        ({"stores": (1,)}, "stores of (1,) bytes"),
        ({"stores": (1, 8), "wanted_store": 8}, "ok"),
        ({"contracted": 3}, "3 contractions"),
        ({"missing": ("bf16 added in pairs",)}, "no instruction for: bf16 added in pairs"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
    ],
)
def test_a_result_that_is_not_what_the_kernels_promise_is_refused(change, verdict):
    result = dataclasses.replace(GOOD, **change)
    assert result.verdict == verdict
    written = codegen.table([result], "0123456789ab", "3.9.0")
    assert ("1 refused" in written) == (verdict != "ok")
    assert (f"{CONFIG}: {verdict}" in written) == (verdict != "ok")


def test_shared_memory_is_that_of_the_device():
    on = lambda target: dataclasses.replace(GOOD, config=dataclasses.replace(CONFIG, target=target), shared=100 * 1024)  # noqa: E731
    assert {t for t in launches.TARGETS if on(t).verdict == "ok"} == {"sm_90", "sm_100", "gfx950", "gfx1250"}


def test_the_table_is_stale_once_the_code_changes():
    document = codegen.replaced(
        "before\n<!-- codegen -->\nold\n<!-- end of codegen -->\nafter\n",
        codegen.table([GOOD], "0123456789ab", "3.9.0"),
    )
    assert document.startswith("before\n<!-- codegen -->\nSources `0123456789ab`, Triton 3.9.0")
    assert document.endswith("<!-- end of codegen -->\nafter\n")
    assert codegen.stale(document, "0123456789ab") == ""
    assert "of sources 0123456789ab, the sources are aaaaaaaaaaaa; run `make codegen`" in codegen.stale(
        document, "aaaaaaaaaaaa"
    )
    assert "is missing" in codegen.stale("no table", "aaaaaaaaaaaa")
    with pytest.raises(ValueError, match="no place for the table"):
        codegen.replaced("no marks", "")


@needs_triton
def test_the_hash_is_of_code_not_of_comments(tmp_path, monkeypatch):
    kernels = pathlib.Path("fusionpasses", "kernels")
    shutil.copytree(ROOT / kernels, tmp_path / kernels, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(codegen, "ROOT", tmp_path)
    before = codegen.source_hash()
    for name in ("dynamic_mxfp4_quant.py", "rmsnorm_mxfp4_quant.py", "_mxfp4.py"):
        file = tmp_path / "fusionpasses" / "kernels" / name
        source = file.read_text()
        file.write_text(source.replace('"""', '"""Another word. ', 1) + "\n# a comment\n")
        assert codegen.source_hash() == before
        file.write_text(source + "\nx = 1\n")
        assert codegen.source_hash() != before
        file.write_text(source)
    assert codegen.source_hash() == before
    # What the adapters launch decides as well.
    real = codegen.launches
    monkeypatch.setattr(codegen, "launches", lambda config: real(dataclasses.replace(config, scale_mode="ceil")))
    assert codegen.source_hash() != before


@needs_triton
def test_a_check_of_a_stale_table_fails_before_anything_is_compiled(tmp_path, monkeypatch, capsys):
    document = tmp_path / "compatibility.md"
    document.write_text("<!-- codegen -->\nSources `0123456789ab`\n<!-- end of codegen -->\n")
    monkeypatch.setattr(codegen, "DOCUMENT", document)
    monkeypatch.setattr(codegen, "compile_all", lambda *_: pytest.fail("compiles"))
    monkeypatch.setattr(sys, "argv", ["codegen", "--check"])
    assert codegen.main() == 1
    assert "run `make codegen`" in capsys.readouterr().err


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


def test_spills_are_read_from_the_code_object():
    counts = ".sgpr_spill_count: 2\n.vgpr_spill_count: 3\n.private_segment_fixed_size: 20\n"
    assert codegen.gcn_spilled(counts) == 28
    assert codegen.gcn_spilled(counts.replace("20", "0")) == 20
    with pytest.raises(RuntimeError, match="names 1 of 3"):
        codegen.gcn_spilled(".sgpr_spill_count: 2\n")


def test_pairwise_configurations_cover_every_pair():
    chosen = codegen.pairwise()
    assert len(chosen) < 120
    for left, right in itertools.combinations(codegen.FACTORS, 2):
        norms_only = {left, right} & {"weight", "cast_order", "norm_dtype"}
        met = {(getattr(c, left), getattr(c, right)) for c in chosen if c.chain != "quant" or not norms_only}
        wanted = set(itertools.product(codegen.FACTORS[left], codegen.FACTORS[right]))
        if norms_only:
            wanted = {pair for pair in wanted if "quant" not in pair}
        assert met == wanted, (left, right)


@needs_triton
def test_what_is_compiled_is_what_the_provider_launches():
    (launch,) = launches.launches(dataclasses.replace(CONFIG, layout="off alignment", norm_dtype="fp32"))
    assert launch.signature["x_ptr"] == "*bf16"
    assert launch.constants["ROW_BLOCKS"] == 7168 // 32
    assert launch.constants["norm_ptr"] is None
    assert launch.constants["PTX"]
    assert not launch.aligned
    (aligned,) = launches.launches(CONFIG)
    assert aligned.aligned
    assert aligned.key != launch.key
    (other,) = launches.launches(dataclasses.replace(CONFIG, target="gfx950"))
    assert not other.constants["PTX"]
    assert other.tile != aligned.tile
    assert "x_ptr" in other.small
    (large,) = launches.launches(dataclasses.replace(CONFIG, target="gfx950", rows=1 << 20))
    assert "x_ptr" not in large.small


@needs_triton
def test_every_tile_on_the_grid_is_compiled(monkeypatch):
    monkeypatch.setattr(codegen, "TARGETS", {t: launches.TARGETS[t] for t in ("sm_90", "gfx942")})
    monkeypatch.setattr(codegen, "WIDTHS", (64, 2880, 7168, 32768))
    monkeypatch.setattr(codegen, "ROWS", (1, 16384))
    chosen = codegen.every()
    tiles = lambda c: {(c.target, c.chain.split(",")[0], c.dtype, launch.tile) for launch in launches.launches(c)}  # noqa: E731
    grid = (codegen.TARGETS, launches.CHAINS, launches.DTYPES, codegen.WIDTHS, codegen.ROWS)
    asked = set().union(*(tiles(launches.Config(*row)) for row in itertools.product(*grid)))
    assert set().union(*map(tiles, chosen)) == asked
    assert len(chosen) == len(asked)
