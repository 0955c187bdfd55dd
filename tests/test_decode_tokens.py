"""``benchmarks/decode_tokens.py``: its toy sizes on the CPU, and what it makes of times and of sides that are wrong."""

import json
import subprocess

import pytest
import torch

import fusionpasses as fp
from benchmarks import decode_step, decode_tokens
from benchmarks.decode_models import TINY
from benchmarks.decode_tokens import SIDES, Batch, Compiled, line, models_of, verdicts
from examples.mla_decode import MlaDecoder
from fusionpasses.report import CACHE_UNKNOWN
from fusionpasses.testing import capture

ALL = list(SIDES)


@pytest.fixture(scope="module")
def models():
    with torch.no_grad():
        return models_of(ALL, TINY, "cpu")


@pytest.fixture(scope="module")
def batch(models):
    return Batch(models, 2, 24, "cpu")


@pytest.fixture(scope="module")
def reports(models, batch):
    """Of each side with our backend."""
    with torch.no_grad():
        return {
            side: capture(batch.decoding.step_of(models[SIDES[side].model]), ()).report
            for side in ALL
            if SIDES[side].fused
        }


@pytest.fixture
def eager(monkeypatch, reports):
    """Nothing is compiled: a side is its eager step, and the report of its graph where it would have one."""

    def compiled(step, side, mode):
        return Compiled(step, reports.get(side), 0.5, False, 0)

    monkeypatch.setattr(decode_tokens, "compiled", compiled)
    return compiled


@pytest.fixture
def clock(monkeypatch):
    """Times of steps in the order they are taken, each one as long as its side says; which sides were timed."""
    taken = []
    ms = {"bf16": 4.0, "none": 2.0, "mxfp4": 2.5}

    def milliseconds(step, decoding, steps):
        model = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, MlaDecoder))
        taken.append(model)
        return ms[next(name for name, known in decoding.models.items() if known is model)] + len(taken) / 1000

    monkeypatch.setattr(decode_tokens, "milliseconds", milliseconds)
    return taken


def measured(batch, sides=ALL, mode="default"):
    batch.decoding.models = batch.models  # for the clock
    return {row["side"]: row for row in batch.measure(sides, mode, steps=3, rounds=2, device="cuda")}


# --- the models -------------------------------------------------------------------------------------------------------


def test_every_side_is_made_of_the_same_weights(models):
    assert list(models) == ["bf16", "none", "mxfp4"]
    assert not [m for m in models["bf16"].modules() if isinstance(m, fp.Mxfp4Linear)]
    for act in ("none", "mxfp4"):
        linears = {name: m for name, m in models[act].named_modules() if isinstance(m, fp.Mxfp4Linear)}
        assert len(linears) == 5
        for name, linear in linears.items():
            assert (linear.act, linear.layout) == (act, "tiles")
            original = models["bf16"].get_submodule(name)
            codes, scales = torch.ops.fusionpasses.dynamic_mxfp4_quant(original.weight.detach())
            assert [torch.equal(a, b) for a, b in zip(linear.checkpoint_weight(), (codes, scales))] == [True, True]
        assert models[act].lm_head.weight is models["bf16"].lm_head.weight


def test_only_models_that_the_sides_need_are_made():
    with torch.no_grad():
        assert list(models_of(["weight-only"], TINY, "cpu")) == ["bf16", "none"]


# --- the checks -------------------------------------------------------------------------------------------------------


def test_times_become_tokens_and_ratios(batch, eager, clock, capsys):
    rows = measured(batch)
    assert [row["failed"] for row in rows.values()] == [""] * 4
    # Two rounds of four: in turn, and the second one starts one side later.
    by_name = {id(model): name for name, model in batch.models.items()}
    names = ["bf16", "none", "mxfp4", "mxfp4"]
    assert [by_name[id(model)] for model in clock] == [*names, *names[1:], names[0]]
    assert rows["bf16"]["all_ms"] == [4.001, 4.008]
    assert rows["bf16"]["ms"] == pytest.approx(4.0045)
    assert rows["bf16"]["spread"] == pytest.approx(0.007 / 4.0045)
    assert rows["bf16"]["tokens_per_s"] == pytest.approx(2 / 4.0045e-3)
    assert rows["weight-only"]["by_bf16"] == pytest.approx(4.0045 / 2.0035)
    (said,) = verdicts(list(rows.values()))
    assert said == "batch 2, default: tokens/s by bf16: weight-only 2.00, w4a4-unfused 1.60, w4a4-fused 1.60; " + (
        "fused by unfused: 1.000"
    )
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    noise = f"{batch.noise['bf16']:.4f}"
    assert printed[0].split() == [
        "2",
        "default",
        "bf16",
        "4.005",
        "0.2%",
        "499",
        "1.00",
        "0.0000",
        noise,
        "0.000",
        "0.5",
    ]
    assert rows["weight-only"]["report"][0].startswith("fusionpasses: 1 graph, 1 site fused (1 cache write), 0 refused")
    assert rows["w4a4-fused"]["report"][0].startswith("fusionpasses: 1 graph, 6 sites fused (5 quants, 1 cache write)")


def test_one_side_alone_has_no_ratio(batch, eager, clock):
    rows = measured(batch, ["weight-only"])
    assert "by_bf16" not in rows["weight-only"]
    assert verdicts(list(rows.values())) == []


def test_wrong_logits_are_not_timed(batch, eager, clock, monkeypatch, capsys):
    def wrong(step, side, mode):
        made = eager(step, side, mode)
        if side == "weight-only":
            made.step = lambda: step() * 1.5
        return made

    monkeypatch.setattr(decode_tokens, "compiled", wrong)
    rows = measured(batch)
    assert rows["weight-only"]["failed"] == "wrong: further from eager than allowed"
    assert [side for side, row in rows.items() if "ms" in row] == ["bf16", "w4a4-unfused", "w4a4-fused"]
    assert batch.models["none"] not in clock
    (said,) = [said for said in capsys.readouterr().out.splitlines() if "weight-only" in said]
    assert said.split()[2:7] == ["weight-only", "-", "-", "-", "-"]
    assert rows["weight-only"]["error"] == pytest.approx(0.5, abs=0.01)
    assert said.endswith("0.5  wrong: further from eager than allowed")


def test_fused_that_is_further_off_than_unfused_is_not_timed(batch, eager, clock, monkeypatch):
    def off_a_little(step, side, mode):
        made = eager(step, side, mode)
        if side == "w4a4-fused":
            made.step = lambda: step() * 1.04
        return made

    monkeypatch.setattr(decode_tokens, "compiled", off_a_little)
    rows = measured(batch)
    assert decode_step.near_eager(0.04, rows["w4a4-fused"]["noise"])
    assert rows["w4a4-fused"]["failed"] == "wrong: further from eager than w4a4-unfused"
    assert "ms" not in rows["w4a4-fused"]
    assert "ms" in rows["w4a4-unfused"]


def test_sites_that_did_not_fuse_are_not_timed(batch, eager, clock, monkeypatch):
    def unfused(step, side, mode):
        made = eager(step, side, mode)
        if side == "w4a4-fused":
            with torch.no_grad():
                made.report = capture(step, (), backend=fp.fusion_backend(passes=["rmsnorm_mxfp4_quant"])).report
        return made

    monkeypatch.setattr(decode_tokens, "compiled", unfused)
    failed = measured(batch)["w4a4-fused"]["failed"]
    for part in (
        "0 fused_rope_mla_kv_cache, expected 1",
        "1 concat_and_cache_mla, expected 0",
        "0 silu_mul_mxfp4_quant, expected 1",
        "2 dynamic_mxfp4_quant, expected 1",
    ):
        assert part in failed
    assert "rmsnorm" not in failed


def test_a_report_that_is_not_available_accuses_nobody(batch, models):
    report = fp.Report([fp.report.GraphReport("0/0", "cached", CACHE_UNKNOWN)])
    assert decode_tokens.wrong_ops("w4a4-fused", report, models["mxfp4"]) == {}


def test_skipped_cuda_graphs_are_not_timed(batch, eager, clock, monkeypatch):
    def skipping(step, side, mode):
        made = eager(step, side, mode)
        made.skipped = 1 if side == "bf16" else 0
        return made

    monkeypatch.setattr(decode_tokens, "compiled", skipping)
    rows = measured(batch, mode="reduce-overhead")
    assert [row["failed"] for row in rows.values()] == ["wrong: 1 CUDA graphs skipped", "", "", ""]
    assert "by_bf16" not in rows["weight-only"]


def test_a_side_that_fails_leaves_the_others(batch, eager, clock, monkeypatch):
    def failing(step, side, mode):
        if side == "w4a4-unfused":
            raise RuntimeError("out of something")
        return eager(step, side, mode)

    monkeypatch.setattr(decode_tokens, "compiled", failing)
    rows = measured(batch)
    assert line(rows["w4a4-unfused"]).endswith("w4a4-unfused failed: RuntimeError: out of something")
    assert [side for side, row in rows.items() if "ms" in row] == ["bf16", "weight-only", "w4a4-fused"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode_tokens.main([]) == 2
    assert capsys.readouterr().err.startswith("decode_tokens: got no GPU; allowed: ")


def test_processes_that_fill_the_caches_may_fail(monkeypatch, capsys):
    calls = []

    def run(command, *, env, timeout, **_):
        calls.append((command, env["TORCHINDUCTOR_COMPILE_THREADS"], timeout))
        if command[command.index("--batch") + 1] == "1":
            return subprocess.CompletedProcess(command, 0, stderr="a warning")
        if command[command.index("--batch") + 1] == "8":
            return subprocess.CompletedProcess(command, 1, stderr="Traceback\nValueError: got 3\n")
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(decode_tokens.subprocess, "run", run)
    monkeypatch.setattr(decode_tokens, "Batch", None)
    common = ["--mode", "default", "--sides", "bf16", "w4a4-fused"]
    assert decode_tokens.main(["--tiny", "--batch", "1", "8", "16", *common, "--warm", "3", "--budget", "0"]) == 0
    said = capsys.readouterr().out
    assert "filling the caches for batch 8 ended with 1: ValueError: got 3\n" in said
    assert "filling the caches for batch 16 stopped after 0 s\n" in said
    assert "filling the caches for batch 1 " not in said
    assert "batch 1, 8, 16" in said
    rest = ["--only-fill-caches", *common, "--context", "128", "--tiny"]
    assert sorted(command[3:] for command, *_ in calls) == sorted(["--batch", n, *rest] for n in ("1", "8", "16"))
    assert {threads for _, threads, _ in calls} <= set("1234")
    assert all(0 < timeout <= 240 for *_, timeout in calls)


def test_filling_the_caches_compiles_everything_and_keeps_no_timing_of_kernels(monkeypatch):
    seen = []

    def compiled(step, side, mode):
        seen.append((mode, side, torch._inductor.config.autotune_local_cache))

    monkeypatch.setattr(decode_tokens, "compiled", compiled)
    assert decode_tokens.main(["--tiny", "--batch", "2", "3", "--only-fill-caches"]) == 0
    assert seen == [(mode, side, False) for mode in decode_step.MODES for side in ALL] * 2
    assert torch._inductor.config.autotune_local_cache is True


@pytest.mark.slow
def test_toy_sizes_compile_and_agree(tmp_path, capsys):
    file = tmp_path / "rows.json"
    torch._dynamo.reset()
    assert decode_tokens.main(["--tiny", "--batch", "2", "--mode", "default", "--json", str(file), "--warm", "0"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["side"] for row in rows] == ALL
    for row in rows:
        assert not row["failed"]
        assert row["error"] <= 2 * row["noise"] + 0.05
    said = capsys.readouterr().out
    assert "w4a4-fused: fusionpasses: 1 graph, 6 sites fused (5 quants, 1 cache write), 0 refused" in said
    assert "weight-only: fusionpasses: 1 graph, 1 site fused (1 cache write), 0 refused" in said
    if not torch.cuda.is_available():
        assert not [row for row in rows if "ms" in row]
