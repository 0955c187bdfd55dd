"""``python -m fusionpasses doctor``: what it prints, and with what it exits."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from aiter_trees import NEW, WRONG, changes, state, write

import fusionpasses
from fusionpasses import _aiter_files, _aiter_numerics, doctor, probes, providers
from fusionpasses.__main__ import main
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.kernels import arch
from fusionpasses.ops import OPS
from fusionpasses.probes import Verdict

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _as_before():
    probes.reset()
    providers.select.cache_clear()
    yield
    probes.reset()
    providers.select.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(probes, "probe_gpu", lambda: Verdict(False, "torch 2.13.0+cpu is a CPU build"))


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H200, as far as doctor looks."""
    monkeypatch.setattr(probes, "probe_gpu", lambda: Verdict(True, "CUDA 13.0, 1 device(s)"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(arch, "of", lambda device: arch.Arch("sm_90", 32, 132))
    monkeypatch.setattr(providers, "probe_triton", lambda: Verdict(True, "triton 3.9.0"))


def run(capsys, *arguments):
    """Exit code and output."""
    code = main(["doctor", *arguments])
    return code, capsys.readouterr().out


def examined(capsys, *arguments):
    code, out = run(capsys, "--json", *arguments)
    return code, json.loads(out)


def test_the_command_runs():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fusionpasses", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    found = json.loads(result.stdout)
    assert result.returncode == (1 if found["problems"] else 0), result.stderr
    assert found["versions"]["fusionpasses"] == fusionpasses.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == {"fusionpasses", "torch", "triton", "amd-aiter", "python"}
    assert set(found["ops"]) == set(OPS)


def test_without_a_gpu(no_gpu, capsys):
    code, out = run(capsys)
    assert code == 0
    assert "device: cpu; no GPU is in use, so plain torch (the reference) runs every op" in out
    assert "no problems found" in out
    assert "problem:" not in out
    assert "triton cannot: triton serves GPU tensors (device type 'cuda'), not 'cpu' (all ops)" in out
    code, found = examined(capsys)
    assert (code, found["devices"], found["device_type"]) == (0, [], "cpu")
    assert {row["choice"] for row in found["ops"].values()} == {"reference"}


def test_every_probe_has_a_reason(no_gpu, capsys):
    _, found = examined(capsys)
    assert all(row["why"] and isinstance(row["ok"], bool) for row in found["probes"].values())
    names = {"torch", "triton", "gpu", "hip", "hip architecture", "aiter", "has_mxfp4_gemm()"}
    assert names | {"has_fused_rope_mla_kv_cache()", "aiter.gemm_afp4wfp4"} <= set(found["probes"])
    _, out = run(capsys)
    for name, row in found["probes"].items():
        line = next(line for line in out.splitlines() if line.split("  ")[1:2] == [name])
        assert line.endswith(row["why"])


def test_with_a_gpu(gpu, capsys):
    code, out = run(capsys)
    assert code == 0, out
    assert "device cuda:0: NVIDIA H200, sm_90, 132 multiprocessors" in out
    assert "sm_90 has no FP4 arithmetic" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("mxfp4_gemm.default")]
    assert rows == [["mxfp4_gemm.default", "-", "*", "yes", "-", "-"]]
    code, found = examined(capsys)
    assert {row["choice"] for row in found["ops"].values()} == {"triton"}
    assert found["devices"] == [{"index": 0, "name": "NVIDIA H200", "arch": "sm_90", "processors": 132}]


def test_a_gpu_and_no_kernel_is_a_problem(gpu, capsys, monkeypatch):
    monkeypatch.setattr(providers, "probe_triton", lambda: Verdict(False, "triton is not installed"))
    code, out = run(capsys)
    assert code == 1
    assert (
        "problem: a GPU is here and the reference (plain torch, slow) would run concat_and_cache_mla.default, " in out
    )
    assert ": triton is not installed\n" in f"{out}\n"
    assert "no problems found" not in out


def test_one_op_without_a_kernel_is_a_problem(gpu, capsys, monkeypatch):
    kept = providers._IMPLEMENTS["triton"] - {"mxfp4_gemm.default"}
    monkeypatch.setattr(providers, "_IMPLEMENTS", {**providers._IMPLEMENTS, "triton": kept})
    code, found = examined(capsys)
    assert code == 1
    assert found["problems"] == [
        "a GPU is here and the reference (plain torch, slow) would run mxfp4_gemm.default: triton has no kernel for "
        "mxfp4_gemm.default"
    ]
    assert found["ops"]["mxfp4_gemm.default"]["choice"] == "reference"


def test_a_gpu_that_cannot_be_asked_is_listed(gpu, capsys, monkeypatch):
    def broken(device):
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(arch, "of", broken)
    code, out = run(capsys)
    assert code == 0
    assert "device cuda:0: RuntimeError: the driver is too old" in out


@pytest.mark.parametrize(
    ("name", "code", "problem"),
    [
        ("reference", 0, None),
        (
            "triton",
            1,
            "provider 'triton' was asked for and can run nothing here: triton serves GPU tensors (device typ",
        ),
        ("tritton", 1, "provider 'tritton' is none that this release knows: allowed "),
    ],
)
def test_a_provider_that_is_asked_for(no_gpu, capsys, name, code, problem):
    got, found = examined(capsys, "--provider", name)
    assert got == code
    assert len(found["problems"]) == (problem is not None)
    assert problem is None or found["problems"][0].startswith(problem)
    choices = {row["choice"] for row in found["ops"].values()}
    assert choices == ({None} if code else {name})
    assert all((row["error"] is None) == (code == 0) for row in found["ops"].values())


def test_a_provider_that_is_asked_for_and_can(gpu, capsys):
    assert run(capsys, "--provider", "triton")[0] == 0
    code, found = examined(capsys, "--provider", "reference")
    assert (code, found["requested"]) == (0, "reference")
    # What is left to the reference by request is no problem.
    assert {row["choice"] for row in found["ops"].values()} == {"reference"}


def test_another_provider_needs_no_change_here(gpu, capsys, monkeypatch):
    op = "rmsnorm_mxfp4_quant.default"
    monkeypatch.setattr(providers, "PREFERENCE", ("other", "triton", "reference"))
    monkeypatch.setattr(providers, "_IMPLEMENTS", {**providers._IMPLEMENTS, "other": frozenset({op})})
    code, out = run(capsys)
    assert code == 0
    assert [line.split() for line in out.splitlines() if line.strip().startswith(op)] == [
        [op, "*", "yes", "yes", "-", "-"]
    ]
    _, found = examined(capsys, "--provider", "other")
    assert found["ops"][op]["choice"] == "other"
    assert found["ops"]["mxfp4_gemm.default"]["choice"] is None
    assert found["problems"] == []


@pytest.mark.parametrize(("files", "wrong"), [(WRONG, True), (NEW, False)], ids=["wrong", "AITER"])
def test_the_wrong_package_is_called_out(no_gpu, capsys, tmp_path, monkeypatch, files, wrong):
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    root = write(tmp_path, files)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    code, out = run(capsys)
    before = state()
    assert code == 0
    advice = f"advice: wrong package: `aiter` at {root} is not AMD's AITER: it has no folder ops/"
    assert (advice in out) == wrong
    assert ("`pip uninstall aiter`, then `pip install amd-aiter`" in out) == wrong
    assert (f"AITER at {root}, amd-aiter" in out) == (not wrong)
    assert run(capsys) == (code, out)
    assert changes(before) == []


def test_aiter_that_is_asked_for_and_missing_is_a_problem(no_gpu, capsys):
    for name in ("aiter", "aiter_finite", "aiter_fast"):
        code, found = examined(capsys, "--provider", name)
        assert code == 1
        (problem,) = found["problems"]
        assert problem.startswith(f"provider {name!r} was asked for and can run nothing here: ")
        assert all(reason in problem for reason in ("GPU tensors", probes.probe_hip_architecture().why))
        assert probes.probe_aiter() or probes.probe_aiter().why in problem
        # What no installation would help against is said of each kernel, not here.
        assert "admits it" not in problem


def test_what_numerics_rule_out_is_said_with_the_switch(no_gpu, capsys):
    """For every op: each function of AITER's that comes near it, in JSON and as text."""
    _, found = examined(capsys)
    _, out = run(capsys, "--provider", "aiter")
    for op, row in found["ops"].items():
        assert row["aiter"], op
        for each in row["aiter"]:
            assert set(each) == {"function", "release", "ruled_out", "by_call", "switch", "why"}
            assert each["function"] is None or each["function"] in _aiter_files.CAPABILITIES
            assert " admit" in each["switch"]
            for dimension in (*each["ruled_out"], *each["by_call"]):
                assert dimension in out
    quant = {each["release"]: each for each in found["ops"]["dynamic_mxfp4_quant.default"]["aiter"]}
    assert set(quant) == {"new", "old"}
    assert [text.partition(":")[0] for text in quant["new"]["ruled_out"]] == ["non finite"]
    assert quant["new"]["switch"].startswith("provider='aiter_finite' admits it, if nothing quantised")
    assert [text.partition(":")[0] for text in quant["old"]["ruled_out"]] == ["ties", "non finite"]
    assert quant["old"]["switch"].startswith("no setting admits it")
    absorbed = {each["function"]: each for each in found["ops"]["fused_rope_mla_kv_cache.absorbed"]["aiter"]}
    assert absorbed["fused_qk_rope_cat_and_cache_mla"]["ruled_out"] == []
    hip = absorbed["fused_qk_rope_concat_and_cache_mla"]
    assert [text.partition(":")[0] for text in hip["ruled_out"]] == ["rounding"]
    assert [text.partition(":")[0] for text in hip["by_call"]] == ["cache scaling"]
    assert hip["by_call"][0].endswith("(else no setting admits it)")
    assert hip["switch"].startswith("provider='aiter_fast' admits it, with other bytes for ordinary inputs, if nothing")
    assert hip["why"].startswith(
        "fused_qk_rope_concat_and_cache_mla is float32 where ours rounds: rounding: float32 with"
    )
    for op in ("rmsnorm_mxfp4_quant.default", "silu_mul_mxfp4_quant.default"):
        new = next(each for each in found["ops"][op]["aiter"] if each["release"] == "new")
        (by_call,) = new["by_call"]
        assert by_call.endswith("(where ours rounds, provider='aiter_fast' admits it)")
        # The text names both settings.
        assert "provider='aiter_finite' admits it" in new["why"]
        assert by_call in new["why"]
        old = next(each for each in found["ops"][op]["aiter"] if each["release"] == "old")
        assert "aiter_f" not in old["why"]  # no level admits what rounds ties away from zero
    assert "provider='aiter_fast' admits it" in out
    gemm = [each["function"] for each in found["ops"]["mxfp4_gemm.default"]["aiter"]]
    assert gemm == ["gemm_afp4wfp4", "gemm_afp4wfp4_preshuffle", "gemm_afp4wfp4_preshuffled_scales"]
    # The sentence that errors and the report have.
    why = quant["new"]["why"]
    assert found["ops"]["dynamic_mxfp4_quant.default"]["providers"]["aiter"]["why"] == why
    with pytest.raises(ProviderUnavailable) as raised:
        providers.select("dynamic_mxfp4_quant.default", "cpu", "aiter")
    assert why in str(raised.value)


def test_numerics_of_aiter_are_listed_where_somebody_has_use_for_them(gpu, capsys, monkeypatch):
    heading = "AITER's kernels beside our ops"
    _, out = run(capsys)
    assert heading not in out
    assert "--provider aiter lists what keeps AITER's kernels from calls" in out
    for arguments in (("--provider", "aiter"), ("--provider", "aiter_finite"), ("--provider", "aiter_fast")):
        assert heading in run(capsys, *arguments)[1]
    monkeypatch.setattr("fusionpasses.probes.probe_aiter", lambda: Verdict(True, "AITER at a place"))
    assert heading in run(capsys)[1]


def test_an_aiter_that_is_here_is_chosen_where_it_is_exact(gpu, capsys, monkeypatch):
    monkeypatch.setattr(providers, "probe_aiter_kernel", lambda function: Verdict(True, "AITER at a place"))
    monkeypatch.setattr(providers, "_imports", lambda provider, op: Verdict(True, ""))
    code, found = examined(capsys)
    assert code == 0
    chosen = {op for op, row in found["ops"].items() if row["choice"] == "aiter"}
    assert chosen == {"concat_and_cache_mla.default", "fused_rope_mla_kv_cache.absorbed"}
    code, found = examined(capsys, "--provider", "aiter_finite")
    assert (code, found["problems"]) == (0, [])
    assert found["ops"]["dynamic_mxfp4_quant.default"]["choice"] == "aiter_finite"
    assert "AITER writes the query" in found["ops"]["fused_rope_mla_kv_cache.default"]["error"]
    assert "; no setting admits it" in found["ops"]["fused_rope_mla_kv_cache.default"]["error"]
    code, found = examined(capsys, "--provider", "aiter_fast")
    assert (code, found["problems"]) == (0, [])
    chosen = {op for op, row in found["ops"].items() if row["choice"] == "aiter_fast"}
    assert chosen == set(_aiter_numerics.FUNCTIONS)


def test_help_says_what_the_exit_code_means(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "Exits with 1 if a GPU is here" in capsys.readouterr().out
    assert doctor.EXIT.startswith("Exits with 1")
