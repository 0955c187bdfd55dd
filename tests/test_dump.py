"""FUSION_DEBUG_DUMP writes what the passes saw and did, overwrites nothing, and changes nothing else."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Projection, Residual, Trainable, Unnormed, calls_in, compile_and_run, tokens
from torch import Tensor, nn
from torch._inductor.pattern_matcher import PatternPrettyPrinter
from torch._inductor.utils import fresh_cache, run_and_get_code

import fusionpasses as fp
from fusionpasses import anchors, dump
from fusionpasses.patterns import PASS_NAMES, pass_class
from fusionpasses.patterns._pass import Guard

PASS = "rmsnorm_mxfp4_quant"
VARIABLE = "FUSION_DEBUG_DUMP"


@pytest.fixture(scope="module", autouse=True)
def _own_cache() -> Iterator[None]:
    with fresh_cache():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder that the variable names, and that does not exist yet."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "dumps"))
    return tmp_path / "dumps"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def process_folder(folder: pathlib.Path) -> pathlib.Path:
    (only,) = folder.iterdir()
    return only


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_files_of_one_graph(folder):
    compile_and_run(Projection(), tokens())
    assert process_folder(folder).name == f"rank0-pid{os.getpid()}"
    assert sorted(contents(process_folder(folder))) == [
        "environment.txt",
        f"graph-000/0-{PASS}/after.py",
        f"graph-000/0-{PASS}/before.py",
        f"graph-000/0-{PASS}/site-00-fused.txt",
        f"graph-000/0-{PASS}/spellings.txt",
        "graph-000/1-silu_mul_mxfp4_quant/after.py",
        "graph-000/1-silu_mul_mxfp4_quant/before.py",
        "graph-000/1-silu_mul_mxfp4_quant/spellings.txt",
        "graph-000/2-fused_rope_mla_kv_cache/after.py",
        "graph-000/2-fused_rope_mla_kv_cache/before.py",
        "graph-000/2-fused_rope_mla_kv_cache/spellings.txt",
        "graph-000/3-dynamic_mxfp4_quant/after.py",
        "graph-000/3-dynamic_mxfp4_quant/before.py",
        "graph-000/3-dynamic_mxfp4_quant/spellings.txt",
        "graph-000/report.json",
        "graph-000/report.txt",
    ]


def test_nothing_is_written_with_the_variable_unset_or_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, value)
        assert dump.DumpFolder.from_environment() is None
        compile_and_run(Projection(), tokens())
    assert list(tmp_path.iterdir()) == []


def test_graphs_before_and_after_are_python_that_shows_ops_shapes_and_providers(folder):
    compile_and_run(Projection(), tokens())
    site = process_folder(folder) / "graph-000" / f"0-{PASS}"
    before, after = (site / "before.py").read_text(), (site / "after.py").read_text()
    for text in (before, after):
        (module,) = ast.parse(text).body
        assert isinstance(module, ast.ClassDef)
        assert "torch.ops.fusionpasses.mxfp4_gemm.default(" in text
        assert '"bf16[4, 64][64, 1]cpu"' in text
        assert "# File: " in text
    calls = r"fusionpasses\.(\w+)\.default\(.*provider = 'reference'\)"
    assert re.findall(calls, before) == ["dynamic_mxfp4_quant", "mxfp4_gemm"]
    assert re.findall(calls, after) == ["rmsnorm_mxfp4_quant", "mxfp4_gemm"]


def test_a_fused_site_shows_the_subgraph_and_its_replacement(folder):
    compile_and_run(Projection(), tokens())
    text = (process_folder(folder) / "graph-000" / f"0-{PASS}" / "site-00-fused.txt").read_text()
    head, rest = text.split("\nmatched:\n")
    matched, replacement = rest.split("\nreplaced by:\n")
    assert head.startswith("rmsnorm_mxfp4_quant.default [reference]  norm\n    at ")
    for op in ("aten.pow", "aten.mean", "aten.rsqrt", "fusionpasses.dynamic_mxfp4_quant"):
        assert f"target=torch.ops.{op}." in matched
        assert op not in replacement
    assert "target=torch.ops.fusionpasses.rmsnorm_mxfp4_quant.default" in replacement


def test_a_site_that_was_left_shows_the_reason(folder):
    compile_and_run(Unnormed(), tokens())
    text = (process_folder(folder) / "graph-000" / f"0-{PASS}" / "site-00-nothing-to-fuse.txt").read_text()
    assert "because the quantised tensor comes from aten.relu.default, not from a norm" in text
    assert "matched:" not in text


def test_the_report_file_is_the_report(folder):
    report = compile_and_run(Residual(), tokens(), tokens(seed=5)).report
    graph = process_folder(folder) / "graph-000"
    assert json.loads((graph / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()["graphs"][0]))
    assert (graph / "report.txt").read_text() == f"{report.graphs[0]}\n"
    assert report.fused[0].matched.count("\n") > 5


def test_forward_and_backward_are_two_graphs(folder):
    compile_and_run(Trainable(), tokens().requires_grad_(), backward=True)
    reports = [json.loads(f.read_text()) for f in sorted(process_folder(folder).glob("graph-*/report.json"))]
    assert [r["kind"] for r in reports] == ["forward", "backward"]


class Commented(nn.Module):
    """Source text reaches the dumps: ε must not depend on the locale."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Projection()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + 0  # ε


def test_dumps_are_utf8(folder, monkeypatch):
    written: list[str | None] = []
    plain = pathlib.Path.write_text

    def spy(path: pathlib.Path, data: str, encoding: str | None = None, **rest: Any) -> int:
        written.append(encoding)
        return plain(path, data, encoding, **rest)

    monkeypatch.setattr(pathlib.Path, "write_text", spy)
    compile_and_run(Commented(), tokens())
    assert set(written) == {"utf-8"}
    assert "# ε" in (process_folder(folder) / "graph-000" / f"0-{PASS}" / "before.py").read_text("utf-8")


# --- the tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name"), [*enumerate(PASS_NAMES)])
def test_every_spelling_and_guard_is_printed_from_the_tables_that_execute(number, name, folder):
    compile_and_run(Projection(), tokens())
    text = (process_folder(folder) / "graph-000" / f"{number}-{name}" / "spellings.txt").read_text()
    # Without indentation, which is layout.
    lines = [line.strip() for line in text.splitlines()]
    table = pass_class(name)
    for title, spellings in table.spellings.items():
        start = lines.index(f"{title}:") + 1
        expected: list[str] = []
        for spelling in spellings:
            expected.append(f"[{spelling.name}]")
            if spelling.pattern is not None:
                expected += [line.strip() for line in PatternPrettyPrinter.run(spelling.pattern).splitlines()]
        assert lines[start : start + len(expected)] == expected
    for title, guards in table.guards.items():
        start = lines.index(f"guards, {title}:") + 1
        assert lines[start : start + len(guards)] == [f"{g.name}: {g.requires}" for g in guards]
    targets = [str(target) for target in table.targets]
    start = lines.index("nodes where a site may begin:") + 1 if targets else 0
    assert lines[start : start + len(targets)] == targets


@pytest.mark.parametrize(
    ("name", "op", "meaning"),
    [
        (PASS, "dynamic_mxfp4_quant(Tensor x", "scale_mode_argument='scale_mode', layout='row_major'"),
        (
            "fused_rope_mla_kv_cache",
            "concat_and_cache_mla(Tensor kv_c",
            "layout='rows [kv_c | k_pe]', ignored=('provider',), rows=('kv_c', 'k_pe', 'kv_cache', 'slots'), "
            "pe_cache='pe_cache', cache_scale='cache_scale', scaling_argument='scaling'",
        ),
    ],
)
def test_anchors_are_printed_with_what_was_registered(name, op, meaning):
    fusion_pass = pass_class(name)(fp.FusionConfig(), anchors.registered_anchors())
    lines = dump.tables(fusion_pass).splitlines()
    at = lines.index("anchors:") + 1
    assert lines[at].startswith(f"  fusionpasses::{op}")
    assert lines[at + 1].startswith(f"      {meaning}")
    # No value, and none that an argument carries.
    assert "None" not in lines[at + 1]
    assert " scaling=" not in lines[at + 1]


def test_a_table_that_grows_is_printed_and_executes(folder, monkeypatch):
    """No second list is kept for printing: a guard added to the pass refuses, and is in the dump."""
    guard = Guard("never", "nothing at all", lambda norm: "a test said no")
    module = sys.modules[pass_class(PASS).__module__]
    recogniser = module._rms_norm
    monkeypatch.setattr(recogniser, "GUARDS", (*recogniser.GUARDS, guard))
    monkeypatch.setattr(pass_class(PASS), "guards", {**pass_class(PASS).guards, "norm": recogniser.GUARDS})
    report = compile_and_run(Projection(), tokens()).report
    assert [s.reason for s in report.refused] == ["a test said no"]
    text = (process_folder(folder) / "graph-000" / f"0-{PASS}" / "spellings.txt").read_text()
    assert "  never: nothing at all\n" in text


def test_the_printed_tables_are_the_objects_of_the_recogniser():
    table = pass_class(PASS)
    recogniser = sys.modules[table.__module__]._rms_norm
    printed = [*table.spellings.values(), *table.guards.values()]
    for executed in (recogniser.TAILS, recogniser.NORMALISE, recogniser.GUARDS):
        assert any(p is executed for p in printed)


def test_the_environment_file_has_versions_and_verdicts(folder):
    compile_and_run(Projection(), tokens())
    lines = (process_folder(folder) / "environment.txt").read_text().splitlines()
    assert lines[0] == f"torch {torch.__version__}"
    assert [line.partition(":")[0] for line in lines[1:3]] == ["triton", "gpu"]
    assert "cpu rmsnorm_mxfp4_quant.default reference: True: plain torch, any device" in lines


# --- nothing is overwritten -------------------------------------------------------------------------------------------


def test_a_second_compilation_adds_a_graph(folder):
    compile_and_run(Projection(), tokens())
    before = contents(folder)
    compile_and_run(Projection(), tokens())
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    added = {re.search(r"graph-\d+", name)[0] for name in after.keys() - before.keys()}  # type: ignore[index]
    assert added == {"graph-001"}


def test_a_folder_of_another_process_with_the_same_pid_is_left_alone(folder):
    """Two containers that share a disk both have a process 1."""
    taken = folder / f"rank0-pid{os.getpid()}"
    taken.mkdir(parents=True)
    (taken / "environment.txt").write_text("theirs")
    compile_and_run(Projection(), tokens())
    assert contents(taken) == {"environment.txt": b"theirs"}
    assert (folder / f"{taken.name}-1" / "graph-000" / "report.json").exists()


@pytest.mark.parametrize(("value", "rank"), [("3", 3), ("", 0), ("node-a", 0)])
def test_the_rank_of_a_launcher_is_in_the_name(value, rank, folder, monkeypatch):
    monkeypatch.setenv("RANK", value)
    assert dump.DumpFolder.from_environment().path.name == f"rank{rank}-pid{os.getpid()}"


CHILD = """
import sys
from helpers import Projection, compile_and_run, tokens
for _ in range(2):
    compile_and_run(Projection(), tokens())
"""


def test_processes_that_run_at_once_write_side_by_side(folder, tmp_path):
    here = pathlib.Path(__file__).parent
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]),
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
                "RANK": str(rank),
            },
        )
        for rank in (0, 0, 1)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    expected = sorted(f"rank{rank}-pid{child.pid}" for rank, child in zip((0, 0, 1), children, strict=True))
    assert sorted(f.name for f in folder.iterdir()) == expected
    for process in folder.iterdir():
        assert sorted(f.name for f in process.iterdir()) == ["environment.txt", "graph-000", "graph-001"]
        assert all(json.loads(f.read_text())["sites"] for f in process.glob("graph-*/report.json"))


# --- nothing else changes ---------------------------------------------------------------------------------------------


def test_the_caches_are_bypassed(folder, monkeypatch):
    """A hit would run no pass, and there would be nothing to write."""
    model, x = Projection(), tokens()
    monkeypatch.delenv(VARIABLE)
    compile_and_run(model, x)
    monkeypatch.setenv(VARIABLE, str(folder))
    result = compile_and_run(model, x)
    assert (result.fx, result.aot, result.sources) == ({"bypass": 1}, {"bypass": 1}, ["compiled"])
    assert (process_folder(folder) / "graph-000").exists()
    monkeypatch.delenv(VARIABLE)
    assert compile_and_run(model, x).sources == ["from cache"]


def test_result_graph_and_generated_code_are_the_same(folder, monkeypatch):
    model, inputs = Residual(), (tokens(), tokens(seed=5))
    outputs, codes, reports = [], [], []
    for value in (None, str(folder)):
        if value is None:
            monkeypatch.delenv(VARIABLE)
        else:
            monkeypatch.setenv(VARIABLE, value)
        torch._dynamo.reset()
        fusing = fp.fusion_backend()
        with fresh_cache(), torch.no_grad():
            output, (code,) = run_and_get_code(torch.compile(model, backend=fusing), *inputs)
        outputs.append(output)
        # The numbers that Inductor gives to graphs and frames of a process, and the folder of its cache.
        codes.append(re.sub(r"AOT ID: .*|'/[^']*'|\"/[^\"]*\"|# Topologically Sorted.*", "", code))
        reports.append((fusing.report.graphs[0].ops_after, [s.lines() for s in fusing.report.sites()]))
    assert torch.equal(*outputs)
    assert codes[0] == codes[1]
    assert calls_in(codes[0], "rmsnorm_add_mxfp4_quant.default") == 1
    assert reports[0] == reports[1]


def test_depyf_gets_the_graphs_too(folder, tmp_path):
    import depyf

    with pytest.warns(UserWarning, match="debug"), depyf.prepare_debug(str(tmp_path / "depyf")):
        compile_and_run(Projection(), tokens())
    names = [f.name for f in (tmp_path / "depyf").iterdir()]
    for stage, op in (("before", "dynamic_mxfp4_quant"), ("after", "rmsnorm_mxfp4_quant")):
        (name,) = [n for n in names if f"fusionpasses_{stage}_{PASS}" in n]
        assert f"torch.ops.fusionpasses.{op}.default(" in (tmp_path / "depyf" / name).read_text()
        assert (process_folder(folder) / "graph-000" / f"0-{PASS}" / f"{stage}.py").exists()
    assert any("AFTER_POST_GRAD" in n for n in names)  # depyf's own


def test_depyf_alone_gets_nothing_of_ours(tmp_path, monkeypatch):
    import depyf

    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.warns(UserWarning, match="debug"), depyf.prepare_debug(str(tmp_path / "depyf")):
        compile_and_run(Projection(), tokens())
    assert not any("fusionpasses" in f.name for f in (tmp_path / "depyf").iterdir())


# --- a directory that cannot be written -------------------------------------------------------------------------------


def not_writable(tmp_path: pathlib.Path, kind: str) -> pathlib.Path:
    """Root may write everywhere, so permissions prove nothing here."""
    if kind == "below a file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file" / "dumps"
    if kind == "a file":
        (tmp_path / "file").write_text("")
        return tmp_path / "file"
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "scratch")
    return tmp_path / "link"


@pytest.mark.parametrize("kind", ["below a file", "a file", "a dangling link"])
def test_a_directory_that_cannot_be_written_is_refused(kind, tmp_path, monkeypatch):
    path = not_writable(tmp_path, kind)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(fp.BadConfig) as error:
        dump.DumpFolder.from_environment()
    text = str(error.value)
    assert text.startswith(f"FUSION_DEBUG_DUMP: got {str(path)!r}, which cannot be written (")
    assert text.endswith(
        "); allowed a directory that exists or can be made. Unset the variable to compile without dumps"
    )


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(not_writable(tmp_path, "a file")))
    fusing = fp.fusion_backend()
    with pytest.raises(fp.BadConfig, match="which cannot be written"):
        compile_and_run(Projection(), tokens(), backend=fusing)
    assert fusing.report.graphs == []
    monkeypatch.delenv(VARIABLE)
    assert compile_and_run(Projection(), tokens(), backend=fusing).report.counts == {PASS: 1}


def test_a_disk_that_fills_up_at_first_is_tried_again(folder, monkeypatch):
    def full(path: pathlib.Path, *args: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as filled:
        filled.setattr(pathlib.Path, "write_text", full)
        with pytest.raises(fp.BadConfig, match="No space left on device"):
            dump.DumpFolder.from_environment()
    found = dump.DumpFolder.from_environment()
    assert found is not None
    assert (found.path / "environment.txt").exists()
