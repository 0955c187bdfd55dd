"""The passes fire on models nobody here wrote, as often as the architecture says, and change no byte."""

import pytest
import torch

import fusionpasses as fp
from benchmarks.tiny_models import MODELS
from fusionpasses.testing import assert_equivalent, assert_fused

TOKENS = torch.arange(12).view(2, 6)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

#: On a GPU the fused kernel sums a row in another order than the unfused norm: a norm may differ in its last bit, and a
#: code on a rounding boundary with it.
BOUNDS = {"cpu": {}, "cuda": {"max_abs": 0.01, "max_bytes_differ": 0.002}}


def expected_counts(name):
    tiny = MODELS[name]
    return {
        "rmsnorm_mxfp4_quant": tiny.fused,
        "rmsnorm_add_mxfp4_quant": tiny.fused_add,
        "silu_mul_mxfp4_quant": tiny.gated,
        "dynamic_mxfp4_quant": tiny.left,
        "mxfp4_gemm": tiny.quants + tiny.gated + tiny.left,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_every_site_fuses_and_no_byte_changes(name, dtype, dynamic, device):
    tiny = MODELS[name]
    model = tiny.make(dtype, device)
    tokens = TOKENS.to(device)
    with torch.no_grad():
        eager = model(tokens).logits
        result = assert_equivalent(model, (tokens,), dynamic=dynamic, **BOUNDS[device])
    assert result.comparison.tensors > 0
    counts = {}
    for graph in result.report.graphs:
        for op, count in graph.ops_after.items():
            counts[op] = counts.get(op, 0) + count
    assert {op: counts.get(op, 0) for op in expected_counts(name)} == expected_counts(name), str(result.report)
    assert sum(len(site.anchors) for site in result.report.fused) == tiny.quants + tiny.gated
    assert not result.report.refused, str(result.report)
    # None wrongly fused: every site is a norm or an MLP of the model, named, and found in transformers' source.
    for site in result.report.fused:
        assert site.provider == ("reference" if device == "cpu" else "triton")
        assert site.where.module.endswith("norm" if "norm" in site.op else ("mlp", "shared_experts", "act_fn")), site
        assert "modeling_" in site.where.line, site
        assert all(anchor.module.endswith("proj") or "proj" in anchor.module for anchor in site.anchors), site
    # The interpreted graph is eager's computation. In float32, AOTAutograd's decompositions of SiLU and softmax differ
    # from eager's in the last bit, with or without our passes.
    atol = 1e-5 if dtype is torch.float32 else 0 if device == "cpu" else 0.05
    torch.testing.assert_close(result.output.logits, eager, rtol=0, atol=atol)


def test_models_that_are_not_quantised_have_nothing_to_fuse():
    model = MODELS["llama"].build().to(torch.bfloat16).eval()
    with torch.no_grad():
        result = assert_fused(model, (TOKENS,), {"rmsnorm_mxfp4_quant": 0, "rmsnorm_add_mxfp4_quant": 0})
    assert result.report.sites() == []


def test_router_reads_the_norm_of_a_moe_layer():
    model = MODELS["deepseek_v3"].make(torch.bfloat16)
    with torch.no_grad():
        result = assert_equivalent(model, (TOKENS,))
    moe = [s for s in result.report.fused if s.where.module == "model.layers.1.post_attention_layernorm"]
    assert [s.op for s in moe] == ["rmsnorm_add_mxfp4_quant.with_norm"]
    dense = [s for s in result.report.fused if s.where.module == "model.layers.0.post_attention_layernorm"]
    assert [s.op for s in dense] == ["rmsnorm_add_mxfp4_quant.default"]


def test_gpt_oss_is_left_by_default_and_its_experts_are_listed():
    model = MODELS["gpt_oss"].build().eval()
    fp.quantize_mxfp4(model)
    summary = fp.last_quantization()
    assert summary.quantized == []
    assert summary.left["model.layers.0.mlp.experts"] == "not nn.Linear"
    assert "GPT-OSS" in summary.left["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused_backend", [True, False], ids=["fused", "plain"])
def test_compiled_llama_is_eager_byte_for_byte_when_casts_are_emulated(fused_backend, device):
    """The weaker check: generated code, as a user runs it. Without the emulation Inductor itself drops casts."""
    model = MODELS["llama"].make(torch.bfloat16, device)
    tokens = TOKENS.to(device)
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        torch._inductor.utils.fresh_cache(),
        torch._inductor.config.patch(emulate_precision_casts=True),
    ):
        backend = fp.fusion_backend() if fused_backend else "inductor"
        compiled = torch.compile(model, backend=backend)(tokens).logits
        assert torch.equal(compiled, model(tokens).logits)
    if fused_backend:
        assert backend.report.counts == {
            "rmsnorm_mxfp4_quant": 1,
            "rmsnorm_add_mxfp4_quant": 3,
            "silu_mul_mxfp4_quant": 2,
        }


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_the_gpu_with_and_without_cuda_graphs(mode, capfd):
    """The fused op in generated code, replayed: the same bytes on every call, and no skipped CUDA graphs."""
    model = MODELS["llama"].make(torch.bfloat16, "cuda")
    backend = fp.fusion_backend()
    torch._dynamo.reset()
    with (
        torch.no_grad(),
        torch._inductor.utils.fresh_cache(),
        torch._inductor.config.patch(emulate_precision_casts=True),
    ):
        compiled = torch.compile(model, backend=backend, mode=mode)
        for step in range(4):
            tokens = TOKENS.to("cuda") + step
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(tokens, use_cache=False).logits.clone()
            assert torch.equal(got, model(tokens, use_cache=False).logits)
    assert backend.report.counts == {"rmsnorm_mxfp4_quant": 1, "rmsnorm_add_mxfp4_quant": 3, "silu_mul_mxfp4_quant": 2}
    assert {s.provider for s in backend.report.fused} == {"triton"}
    assert "skipping cudagraphs" not in capfd.readouterr().err
