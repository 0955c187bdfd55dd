"""Who runs what where AITER is asked for, or here: in the graph, in the report, in errors."""

import dataclasses
import sys
import time

import aiter_fakes
import pytest
import torch
from aiter_trees import BROKEN, NEW, OLD, ROPE, ROUNDINGS, WRONG, changes, function, state, write
from helpers import compile_and_run, mxfp4_linear, tokens
from torch import fx
from torch._inductor.utils import fresh_cache

import fusionpasses as fp
from fusionpasses import _aiter_files, doctor, probes, providers, remarks, who_runs
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.ops._op import OPS
from fusionpasses.patterns._graph import SITE
from fusionpasses.probes import Verdict
from fusionpasses.providers import _aiter_import, aiter, triton
from fusionpasses.report import FUSED, Site, Where
from fusionpasses.testing import capture

QUANT, ABSORBED, CONCAT = (
    "dynamic_mxfp4_quant.default",
    "fused_rope_mla_kv_cache.absorbed",
    "concat_and_cache_mla.default",
)
ours = torch.ops.fusionpasses


@pytest.fixture
def for_the_cpu(monkeypatch):
    """Tensors of the CPU pass for those of an MI350; Triton's kernels are the references."""
    verdict = providers.verdict
    monkeypatch.setattr(providers, "verdict", lambda provider, op, device: verdict(provider, op, "cuda"))
    monkeypatch.setattr(remarks, "architecture", lambda device: "gfx950")

    for op in triton.ADAPTERS:
        monkeypatch.setitem(triton.ADAPTERS, op, OPS[op].reference)
    return


@pytest.fixture(params=["new", "old"])
def installed(request, monkeypatch, for_the_cpu):
    ruled_out = providers.ruled_out
    monkeypatch.setattr(providers, "ruled_out", lambda op, device, arguments: ruled_out(op, "cuda", arguments))
    with aiter_fakes.installed(request.param, monkeypatch):
        yield request.param


# --- in the graph and the report --------------------------------------------------------------------------------------


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def step(q_nope, q_pe, k_pe, kv_c, cos, sin, slots, cache):
    q, k = rotate(q_pe, cos[:, None], sin[:, None]), rotate(k_pe, cos, sin)
    ours.concat_and_cache_mla(kv_c, k, cache, slots)
    return torch.cat([q_nope, q], -1)


def inputs(latent=32, width=16, dtype=torch.bfloat16, count=5):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    angle = torch.rand(count, width // 2, generator=generator) * 6
    slots = torch.randperm(12, generator=generator)[:count]
    given = [random(count, 3, latent), random(count, 3, width), random(count, width), random(count, latent)]
    return [*given, angle.cos().to(dtype), angle.sin().to(dtype), slots, random(3, 4, latent + width)]


def graphs(model, given, **settings):
    """The graphs, with their reports; each is run as it was before the passes and as it is after them."""
    with torch.no_grad():
        return capture(model, given, backend=fp.fusion_backend(**settings)).graphs


def given_to(graph):
    """Who runs each of our ops."""
    return {
        str((n.args[0] if n.target in who_runs.WRAPPERS else n.target)._opname): n.kwargs.get("provider")
        for n in graph.nodes
        if n.op == "call_function"
        and getattr(n.args[0] if n.target in who_runs.WRAPPERS else n.target, "namespace", "") == "fusionpasses"
    }


def test_a_call_that_aiter_takes_names_it_and_is_said_to_be_settled(installed):
    (graph,) = graphs(step, inputs())
    assert given_to(graph.after.graph) == {"fused_rope_mla_kv_cache": "aiter"}
    assert [s.provider for s in graph.report.sites] == ["aiter"]
    assert graph.report.messages == [
        f"1 {ABSORBED} run by AITER, which is settled: fused_qk_rope_cat_and_cache_mla is exact, for the calls that "
        "its rules accept"
    ]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"latent": 48}, "kv_c, k_pe: got widths 48 and 16; AITER's kernel needs powers of two, unchecked"),
        ({"dtype": torch.float32}, "kv_c.dtype: got torch.float32; where AITER rounds as ours do is known of bfloat16"),
    ],
)
def test_a_call_that_aiter_must_not_run_names_triton_and_says_why(installed, changed, reason):
    (graph,) = graphs(step, inputs(**changed))
    assert given_to(graph.after.graph) == {"fused_rope_mla_kv_cache": "triton"}
    (site,) = graph.report.sites
    assert site.provider == "triton"
    assert site.notes[-1].startswith(f"run by triton, not aiter: {reason}")
    assert graph.report.messages[0].startswith(f"1 {ABSORBED} run by Triton, not by AITER: {reason}")
    assert len(graph.report.messages) == 1


def test_what_the_metadata_leave_open_keeps_the_rule(installed):
    given = inputs()
    for tensor in given[:7]:
        torch._dynamo.mark_dynamic(tensor, 0)
    (graph,) = graphs(step, given)
    assert given_to(graph.after.graph) == {"fused_rope_mla_kv_cache": "aiter"}
    (line,) = graph.report.messages
    assert line.startswith(f"each call of {ABSORBED} is run by AITER if its metadata agree (")
    assert line.endswith("), else by Triton")


def test_a_part_of_a_bigger_cache_is_looked_at_as_the_part(installed):
    """Blocks that are apart are refused; the base, which is what the node holds, would not be."""

    def blocks_apart(*tensors):
        return step(*tensors[:-1], tensors[-1][:, 1])

    given = inputs()
    given[-1] = torch.zeros(3, 2, 4, 48).bfloat16()
    (graph,) = graphs(blocks_apart, given)
    assert given_to(graph.after.graph) == {"fused_rope_mla_kv_cache": "triton"}
    assert "kv_cache: got strides (384, 48, 1); AITER takes slots that are evenly apart" in graph.report.messages[0]


def test_a_models_own_write_is_pinned_and_settled(installed):
    def write(kv_c, k_pe, cache, slots):
        ours.concat_and_cache_mla(kv_c, k_pe, cache, slots)
        return kv_c + 1

    def settled(given):
        (graph,) = graphs(write, [given[3], given[2], given[7], given[6]])
        return given_to(graph.after.graph), graph.report.messages

    assert settled(inputs()) == (
        {"concat_and_cache_mla": "aiter"},
        [
            f"1 {CONCAT} run by AITER, which is settled: fused_qk_rope_cat_and_cache_mla is exact, for the calls that "
            "its rules accept"
        ],
    )
    given_names, messages = settled(inputs(latent=48))
    assert given_names == {"concat_and_cache_mla": "triton"}
    assert messages[0].startswith(f"1 {CONCAT} run by Triton, not by AITER: kv_c, k_pe: got widths 48 and 16")


def test_what_is_compiled_runs_aiter_and_gives_the_same(installed, monkeypatch):
    seen = []
    adapter = aiter.ADAPTERS["aiter"][ABSORBED]
    monkeypatch.setitem(aiter.ADAPTERS["aiter"], ABSORBED, lambda *a, **k: seen.append(1) or adapter(*a, **k))
    given, expected = inputs(), inputs()
    q = step(*expected)
    with fresh_cache():
        result = compile_and_run(step, *given, options={"emulate_precision_casts": True})
    assert seen
    assert torch.equal(result.output, q)
    assert torch.equal(given[-1], expected[-1])
    assert f"    {ABSORBED} [aiter]" in str(result.report)


@pytest.mark.rocm
@pytest.mark.skipif(torch.version.hip is None or not torch.cuda.is_available(), reason="no AMD GPU")
def test_what_is_compiled_runs_aiter_on_an_amd_gpu():
    if not aiter._keeps_zeros():
        pytest.skip("this Triton compiles -x as 0 - x: there AITER's rotations are refused")
    backend = fp.fusion_backend(provider="aiter")
    expected, given = inputs(), [tensor.cuda() for tensor in inputs()]
    q = step(*expected)
    with fresh_cache():
        result = compile_and_run(step, *given, backend=backend, options={"emulate_precision_casts": True})
    assert [s.provider for s in result.report.fused] == ["aiter"]
    assert torch.equal(result.output.cpu(), q)
    assert torch.equal(given[-1].cpu(), expected[-1])


def test_what_is_ruled_out_is_reported_with_the_switch(installed):
    switch = "provider='aiter_finite' admits it, if nothing quantised"
    (graph,) = graphs(mxfp4_linear(), [tokens()])
    lines = [line for line in graph.report.messages if "W4A4" not in line]
    assert [line.partition(":")[0] for line in lines] == [
        f"1 {op} not given to AITER, which is here" for op in (QUANT, "mxfp4_gemm.default")
    ]
    assert lines[0].endswith(
        f"ours are 255 with codes 0, and 253; {switch}, and no scale, is Inf, NaN or as large as 1.75 * 2**127"
    )
    # What is said is of these sizes.
    assert lines[1].endswith(
        "AITER's products of K % 256 != 0 are known to go wrong (aiter#4176); no setting admits it"
    )
    # Who asked for another provider does not ask.
    (graph,) = graphs(mxfp4_linear(), [tokens()], provider="triton")
    assert not any("AITER" in line for line in graph.report.messages)


class Block(torch.nn.Module):
    """A norm of the residual sum, and a gated activation, each before a W4A4 product: what a model in bfloat16 has."""

    def __init__(self, width=64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width).bfloat16())
        self.up = fp.Mxfp4Linear.from_linear(torch.nn.Linear(width, 4 * width, bias=False).bfloat16())
        self.down = fp.Mxfp4Linear.from_linear(torch.nn.Linear(2 * width, width, bias=False).bfloat16())

    def forward(self, x, residual):
        total = x + residual
        wide = total.float()
        normed = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
        gate, up = self.up(normed).chunk(2, -1)
        return self.down(torch.nn.functional.silu(gate) * up), total


ADD, ACT = "rmsnorm_add_mxfp4_quant.default", "silu_mul_mxfp4_quant.default"


def block():
    torch.manual_seed(0)
    return Block(), [torch.randn(8, 64).bfloat16() for _ in range(2)]


@pytest.mark.parametrize("provider", ["aiter_finite", "aiter_fast"])
def test_a_model_that_rounds_is_given_to_aiter_where_it_was_asked_for(installed, provider):
    model, given = block()
    if installed == "old":
        with pytest.raises(ProviderUnavailable, match=r"ties: away from zero.*no setting admits it"):
            graphs(model, given, provider=provider)
        return
    (graph,) = graphs(model, given, provider=provider)
    fast = provider == "aiter_fast"
    runs = provider if fast else "triton"
    names = given_to(graph.after.graph)
    assert {name: names[name] for name in ("rmsnorm_add_mxfp4_quant", "silu_mul_mxfp4_quant")} == {
        "rmsnorm_add_mxfp4_quant": runs,
        "silu_mul_mxfp4_quant": runs,
    }
    assert [site.provider for site in graph.report.sites if site.status == FUSED] == [runs, runs]
    for op, name in ((ADD, "fused_rms_mxfp4_quant"), (ACT, "act_mul_and_mxfp4_quant")):
        (line,) = (line for line in graph.report.messages if op in line)
        if fast:
            assert line == (
                f"1 {op} run by AITER, which is settled: {name} keeps float32 where ours rounds, as was asked for: "
                "other bytes, also given that nothing quantised, and no scale, is Inf, NaN or as large as 1.75 * 2**127"
            )
        else:
            assert line.startswith(f"1 {op} run by Triton, not by AITER: ")
            assert "; provider='aiter_fast' admits it, with other bytes for ordinary inputs, if nothing quan" in line
            assert line.count("admit") == 1


@pytest.mark.parametrize("installed", ["new"], indirect=True)  # old releases are given nothing of it
def test_what_is_compiled_for_aiter_fast_keeps_float32(installed):
    model, given = block()
    with torch.no_grad(), fresh_cache():
        result = compile_and_run(
            model,
            *given,
            backend=fp.fusion_backend(provider="aiter_fast"),
            options={"emulate_precision_casts": True},
        )
        wide = [tensor.float() for tensor in given]
        exact = {"cast_order": "scale_cast", "norm_dtype": torch.float32}
        codes, scales, total = OPS[ADD].reference(*wide, model.weight, 1e-6, **exact)
        weight = model.up.weight_packed, model.up.weight_scale
        both = OPS["mxfp4_gemm.default"].reference(codes, scales, *weight, out_dtype=torch.bfloat16)
        codes, scales = OPS[ACT].reference(*both.float().chunk(2, -1), cast_order="mul_cast")
        weight = model.down.weight_packed, model.down.weight_scale
        y = OPS["mxfp4_gemm.default"].reference(codes, scales, *weight, out_dtype=torch.bfloat16)
    assert torch.equal(result.output[0], y)
    assert torch.equal(result.output[1], total.bfloat16())


def test_what_is_ruled_out_of_a_call_names_the_setting_that_admits_that_call(installed):
    """Not the one that admits other calls of the op."""
    model, given = block()
    (graph,) = graphs(model, given)
    for op in (ADD, ACT):
        (line,) = (line for line in graph.report.messages if op in line)
        assert line.startswith(f"1 {op} not given to AITER, which is here: ")
        assert "provider='aiter_fast' admits it" in line
        assert "aiter_finite" not in line


def test_what_is_ruled_out_of_an_op_is_said_where_sizes_are_not_known(installed):
    model, given = block()
    for tensor in given:
        torch._dynamo.mark_dynamic(tensor, 0)
    (graph,) = graphs(model, given)
    (line,) = (line for line in graph.report.messages if ADD in line)
    assert "fused_rms_mxfp4_quant is exact for finite inputs only" in line
    assert "provider='aiter_finite' admits it" in line
    assert "(where ours rounds, provider='aiter_fast' admits it)" in line


def test_nothing_is_said_of_an_aiter_that_is_not_here():
    (graph,) = graphs(mxfp4_linear(), [tokens()])
    assert not any("AITER" in line for line in graph.report.messages)


def site(provider, status=FUSED):
    return Site("rmsnorm_mxfp4_quant", status, QUANT, Where(), provider=provider)


def graph_of(*calls):
    """dynamic_mxfp4_quant of rows, each given to a provider."""
    graph = fx.Graph()
    for i, (rows, provider) in enumerate(calls):
        x = graph.placeholder(f"x{i}")
        x.meta["val"] = torch.empty(rows, 64)
        node = graph.call_function(ours.dynamic_mxfp4_quant.default, (x,), {"provider": provider})
        node.meta[SITE] = site(provider)
    return graph


ONLY_NEW = pytest.mark.parametrize("installed", ["new"], indirect=True)


@ONLY_NEW
def test_calls_are_settled_one_by_one_and_counted(installed):
    graph = graph_of((4, "aiter_finite"), (0, "aiter_finite"), (0, "aiter_finite"), (0, "triton"))
    sites = [n.meta[SITE] for n in graph.nodes if SITE in n.meta]
    lines = who_runs.settle(graph, sites, "aiter_finite")
    given = [n.kwargs["provider"] for n in graph.nodes if n.op == "call_function"]
    assert [s.provider for s in sites] == given
    assert not any(SITE in n.meta for n in graph.nodes)
    assert given == ["aiter_finite", "triton", "triton", "triton"]
    assert lines == [
        f"1 {QUANT} run by AITER, which is settled: dynamic_mxfp4_quant is exact, given that nothing quantised, and no "
        "scale, is Inf, NaN or as large as 1.75 * 2**127",
        f"2 {QUANT} run by Triton, not by AITER: x: got no rows (0, 64); AITER divides by their number; no "
        "setting admits it",
    ]


@ONLY_NEW
def test_only_a_fused_site_of_this_graph_is_told(installed):
    graph = graph_of((0, "aiter_finite"), (0, "aiter_finite"))
    first, second = (n.meta[SITE] for n in graph.nodes if SITE in n.meta)
    first.status = "refused"
    who_runs.settle(graph, [first], "aiter_finite")
    assert (first.provider, second.provider) == ("aiter_finite", "aiter_finite")


@ONLY_NEW
def test_a_gpu_that_is_not_here_leaves_the_rule(installed, monkeypatch):
    monkeypatch.setattr(remarks, "architecture", lambda device: None)
    graph = graph_of((0, "aiter_finite"))
    (line,) = who_runs.settle(graph, [], "aiter_finite")
    assert line.startswith(f"each call of {QUANT} is run by AITER if")
    assert [n.kwargs["provider"] for n in graph.nodes if n.op == "call_function"] == ["aiter_finite"]


def test_a_model_that_names_aiter_for_what_it_cannot_be_had_for_is_told(installed):
    def by_name(x):
        return ours.silu_mul_mxfp4_quant.with_act(x, x, cast_order="mul_cast", provider="aiter")

    graph = graph_of()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 64)
    graph.call_function(ours.silu_mul_mxfp4_quant.with_act, (x, x), {"cast_order": "mul_cast", "provider": "aiter"})
    with pytest.raises(ProviderUnavailable, match="act_mul_and_mxfp4_quant does not return the product"):
        who_runs.settle(graph, [], "auto")
    with pytest.raises(ProviderUnavailable, match="act_mul_and_mxfp4_quant does not return the product"):
        compile_and_run(by_name, torch.randn(4, 64))


# --- an explicit request that cannot be had ---------------------------------------------------------------------------

FUSED_KV, CACHE = "ops/triton/fusions/fused_kv_cache.py", "fused_qk_rope_cat_and_cache_mla"
TREES = {
    "none": ({}, "AITER is not installed; `pip install amd-aiter`"),
    "wrong": (WRONG, r"`aiter` at .* is not AMD's AITER: it has no folder ops/; PyPI's aiter is a library for async"),
    "without the file": (
        {name: text for name, text in NEW.items() if name != FUSED_KV},
        f"has no {FUSED_KV} nor ops/triton/fused_kv_cache.py, where {CACHE} would be",
    ),
    "raises": (BROKEN, "importing aiter failed with RuntimeError: ROCm version file not found; AITER needs ROCm"),
    "prints, sleeps, raises": (
        {
            **NEW,
            "__init__.py": "import time\nprint('No ROCm runtime is found')\ntime.sleep(0.2)\nraise OSError('gone')\n",
        },
        "importing aiter failed with OSError: gone",
    ),
    "changed": (
        {**NEW, FUSED_KV: function(CACHE, ROPE.replace("cos, sin", "sin, cos"))},
        f"AITER's {CACHE} has a signature that no known release had: got",
    ),
}


@pytest.fixture
def tree(tmp_path, monkeypatch, for_the_cpu):
    """``tree(files)``: an aiter on the path, on a machine with an MI350 and ROCm."""
    modules, path = dict(sys.modules), list(sys.path)
    if probes.probe_aiter():
        pytest.skip("an aiter is installed here; these tests bring their own")
    caches = (aiter_fakes.forget, probes.reset, _aiter_import.reset)

    def put(files):
        monkeypatch.setattr(_aiter_files, "ROUNDINGS", ROUNDINGS)
        monkeypatch.setattr(torch.version, "hip", "7.0.1")
        monkeypatch.setattr(probes, "hip_architecture", lambda: "gfx950")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(aiter.arch, "of", lambda device: aiter.arch.Arch("gfx950", 64, 2))
        monkeypatch.setattr(providers, "probe_triton", lambda: Verdict(True, "triton 3.9.0"))
        if files:
            write(tmp_path, files)
            monkeypatch.syspath_prepend(str(tmp_path))
        for clear in caches:
            clear()

    yield put
    monkeypatch.undo()
    for clear in caches:
        clear()
    for name in set(sys.modules) - set(modules):
        if name.partition(".")[0] == "aiter":
            del sys.modules[name]
    sys.path[:] = path


@pytest.mark.parametrize("name", TREES)
def test_a_request_raises_with_the_reason_and_changes_nothing(tree, name):
    files, reason = TREES[name]
    tree(files)
    # What a compilation itself changes, it has changed before.
    graphs(step, inputs(), provider="reference")
    before, backends = state(), []

    def ask():
        backends.append(fp.fusion_backend(provider="aiter"))
        compile_and_run(step, *inputs(), backend=backends[-1])

    # Where AITER is not there at all, when it is asked for; else when it is to run the op.
    asked = rf"(and can run no op here|{ABSORBED} and cannot serve): .*use provider='auto'"
    with pytest.raises(ProviderUnavailable, match=f"(?s)provider 'aiter' was asked for {asked}"):
        ask()
    with pytest.raises(ProviderUnavailable, match=reason):
        ask()
    assert [each for each in changes(before) if each not in ("modules", "dynamo", "loggers")] == []
    now = state()
    assert {name: now["loggers"][name] for name in before["loggers"]} == before["loggers"]
    new = {each.partition(".")[0] for kind in ("loggers", "modules") for each in set(now[kind]) - set(before[kind])}
    # With a signature that is not known, AITER itself was imported, and stays.
    debris = new & {"aiter", "AITER_TRITON", "build_targets", "made_by_hand"}
    assert debris <= ({"aiter"} if name == "changed" else set())
    assert [backend.report.graphs for backend in backends] == [[]] * len(backends)


@pytest.mark.parametrize("name", ["wrong", "raises", "changed"])
def test_auto_does_without(tree, name, caplog):
    tree(TREES[name][0])
    (graph,) = graphs(step, inputs())
    assert [s.provider for s in graph.report.sites] == ["triton"]
    # It was found, and chosen for that: that it cannot be had is no secret.
    assert (f"aiter cannot run {ABSORBED}: " in caplog.text) == (name != "wrong")


def test_doctor_says_that_the_import_failed(tree, monkeypatch):
    tree(BROKEN)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "MI350")
    found = doctor.examine()["ops"][ABSORBED]
    assert found["choice"] == "triton"
    assert found["providers"]["aiter"]["why"].startswith("importing aiter failed with RuntimeError: ROCm version file")


def test_an_import_that_sleeps_costs_a_probe_nothing(tree):
    tree({name: f"import time\nprint('here')\ntime.sleep(30)\n{text}" for name, text in NEW.items()})
    start = time.perf_counter()
    assert providers.verdict("aiter", ABSORBED, "cuda")
    assert providers.summary("cuda")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(("files", "release"), [(NEW, "new"), (OLD, "old")], ids=["new", "old"])
def test_releases_are_told_by_their_signature_and_chosen(tree, files, release):
    tree(files)
    assert providers.select(ABSORBED, "cpu", "aiter") == providers.select(ABSORBED, "cpu") == "aiter"
    assert _aiter_import.load(CACHE)[1] == release
    if release == "new":
        assert providers.select(QUANT, "cpu", "aiter_finite") == "aiter_finite"
    else:
        with pytest.raises(ProviderUnavailable, match=r"ties: away from zero.*no setting admits it"):
            providers.select(QUANT, "cpu", "aiter_finite")


def test_all_that_is_missing_is_said_at_once():
    """Of a quantising op on a CPU without AITER: numerics, torch, package."""
    if probes.probe_aiter() or probes.probe_hip():
        pytest.skip("AITER, or ROCm, is here")
    with pytest.raises(ProviderUnavailable) as raised:
        providers.select(QUANT, "cpu", "aiter")
    for reason in ("'aiter_finite' admits it", "is not built for ROCm", "AITER is not installed; `pip install"):
        assert str(raised.value).count(reason) == 1
    with pytest.raises(ProviderUnavailable, match=r"GPU tensors.*not built for ROCm.*not installed"):
        providers.select(ABSORBED, "cpu", "aiter")


def test_sites_are_plain_data():
    """Where a site is left in a node, it is not copied into what the report stores."""
    assert SITE not in {field.name for field in dataclasses.fields(Site)}
