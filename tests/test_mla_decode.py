"""The decoder of ``examples/mla_decode.py``: it is DeepSeek-V3's, and all of its sites fuse, or say why not."""

import dataclasses
import re

import pytest
import torch
from torch._dynamo.utils import counters

import fusionpasses as fp
from examples import mla_decode
from examples.mla_decode import TINY, MlaAttention, MlaDecoder, Sequences, build, expected_ops, generate, random_prompts
from fusionpasses.report import NOTHING
from fusionpasses.testing import assert_equivalent

LENGTHS = (3, 7, 4, 0)
ROPE = "fused_rope_mla_kv_cache"


def at_work(config, device="cpu", context=24):
    return Sequences(config, len(LENGTHS), context, device), *random_prompts(config, LENGTHS, device)


def prefill(model):
    sequences, prompts, counts = at_work(model.config)
    return sequences.arguments(prompts, counts)


def decode(model):
    """The first decode step, after an eager prefill."""
    sequences, prompts, counts = at_work(model.config)
    done = generate(model, sequences, prompts, counts, 0)
    return sequences.arguments(done.tokens[0][:, None], (counts > 0).long())


# ---- the model


def test_it_is_deepseek_v3():
    """Absorbed attention over pages gives the logits of transformers' model, which expands keys and values."""
    import transformers

    sizes = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY) if f.name not in ("block", "rope_theta")}
    sizes["max_position_embeddings"] = sizes.pop("max_positions")
    sizes |= {"num_key_value_heads": TINY.num_attention_heads, "first_k_dense_replace": TINY.num_hidden_layers}
    torch.manual_seed(0)
    theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).eval()
    weights = theirs.state_dict()
    ours = MlaDecoder(TINY).eval()
    state = {name: weights[f"model.{name}"] for name in ("embed_tokens.weight", "norm.weight")}
    state["lm_head.weight"] = weights["lm_head.weight"]
    for i in range(TINY.num_hidden_layers):
        layer = {name.removeprefix(f"model.layers.{i}."): w for name, w in weights.items()}
        heads = layer["self_attn.kv_b_proj.weight"].unflatten(0, (TINY.num_attention_heads, -1))
        w_uk, w_uv = heads.split([TINY.qk_nope_head_dim, TINY.v_head_dim], 1)
        down = [layer[f"self_attn.{name}.weight"] for name in ("q_a_proj", "kv_a_proj_with_mqa")]
        gate_up = [layer[f"mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
        state |= {
            f"layers.{i}.{name}": tensor
            for name, tensor in {
                "input_norm.weight": layer["input_layernorm.weight"],
                "attention.q_a_kv_a_proj.weight": torch.cat(down),
                "attention.q_a_norm.weight": layer["self_attn.q_a_layernorm.weight"],
                "attention.q_b_proj.weight": layer["self_attn.q_b_proj.weight"],
                "attention.kv_a_norm.weight": layer["self_attn.kv_a_layernorm.weight"],
                "attention.w_uk": w_uk,
                "attention.w_uv": w_uv.transpose(1, 2),
                "attention.o_proj.weight": layer["self_attn.o_proj.weight"],
                "post_attention_norm.weight": layer["post_attention_layernorm.weight"],
                "mlp.gate_up_proj.weight": torch.cat(gate_up),
                "mlp.down_proj.weight": layer["mlp.down_proj.weight"],
            }.items()
        }
    ours.load_state_dict(state)
    sequences, prompts, counts = at_work(TINY)
    sequences.caches = [cache.float() for cache in sequences.caches]
    with torch.no_grad():
        got = ours(*sequences.arguments(prompts, counts)).view(*prompts.shape, -1)
        for row, length in enumerate(LENGTHS[:3]):
            want = theirs(prompts[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(got[row, :length], want, rtol=1e-4, atol=1e-5)


def test_decoding_continues_the_prefill_and_padding_writes_nothing():
    model = build(TINY, "cpu")
    sequences, prompts, counts = at_work(TINY)
    generated = generate(model, sequences, prompts, counts, 6)
    whole = torch.cat([prompts[1], generated.tokens[:6, 1]])[None]
    again = generate(model, Sequences(TINY, 1, 24, "cpu"), whole, torch.tensor([LENGTHS[1] + 6]), 0)
    assert again.tokens[0, 0] == generated.tokens[6, 1]
    assert sequences.lengths.tolist() == [9, 13, 10, 0]
    for cache in sequences.caches:
        rows = cache[sequences.block_tables].flatten(1, 2).any(-1)
        assert rows.tolist() == [[i < length for i in range(24)] for length in sequences.lengths]


# ---- what fuses


@pytest.mark.parametrize("step", [prefill, decode])
def test_every_site_of_every_layer_fuses(step):
    layers = 3
    model = build(dataclasses.replace(TINY, num_hidden_layers=layers), "cpu")
    with torch.no_grad():
        result = assert_equivalent(model, step(model), dynamic=False, fullgraph=True)
    report = result.report
    (graph,) = report.graphs
    expected = expected_ops(model.config)
    assert {op: graph.ops_after.get(op, 0) for op in expected} == expected
    assert not report.refused
    ropes = [site for site in report.fused if site.pass_name == ROPE]
    assert sorted(site.where.module for site in ropes) == [f"layers.{i}.attention" for i in range(layers)]
    assert {site.op for site in ropes} == {f"{ROPE}.absorbed_bmm"}
    mlps = sorted(site.where.module for site in report.fused if site.pass_name == "silu_mul_mxfp4_quant")
    assert mlps == [f"layers.{i}.mlp" for i in range(layers)]
    projections = [site for site in report.fused if site.pass_name == "dynamic_mxfp4_quant"]
    assert sorted(site.anchors[0].module for site in projections) == [
        f"layers.{i}.attention.o_proj" for i in range(layers)
    ]
    assert {note.partition(" where")[0] for site in projections for note in site.notes} == {
        "reads the rows of aten.bmm.default"
    }
    assert report.sites(NOTHING) == []
    norms = sorted(site.where.module for site in report.fused if site.op.startswith("rmsnorm"))
    names = ("attention.q_a_norm", "input_norm", "post_attention_norm")
    assert norms == [f"layers.{i}.{name}" for i in range(layers) for name in names]
    pairs = sorted((site.where.module, site.notes) for site in report.fused if site.op.endswith(".with_second"))
    assert pairs == [
        (
            f"layers.{i}.attention.q_a_norm",
            (f"the second norm of the same rows, layers.{i}.attention.kv_a_norm, was taken in",),
        )
        for i in range(layers)
    ]
    (after,) = (captured.after for captured in result.graphs)
    # The very last norm: what it gives is not quantised.
    assert [str(node.target) for node in after.graph.nodes].count("aten.rsqrt.default") == 1


@pytest.mark.slow
def test_the_script_compiles_compares_and_says_so(capsys):
    torch._dynamo.reset()
    assert mla_decode.main(["--steps", "5"]) == 0
    said = capsys.readouterr().out
    for line in (
        f"2 fused into {ROPE}.absorbed_bmm",
        "1 fused into rmsnorm_mxfp4_quant.default",
        "2 fused into rmsnorm_mxfp4_quant.with_second",
        "3 fused into rmsnorm_add_mxfp4_quant.default",
        "2 fused into silu_mul_mxfp4_quant.default",
        "2 fused into dynamic_mxfp4_quant.default",
        ", 0 differ",
    ):
        assert said.count(line) == 2, said
    assert "tokens, 6 for each of 4 rows: equal" in said
    assert "caches: 2 of 2 byte-equal" in said
    assert not re.search("refused|wrong", said, re.IGNORECASE)


def test_the_script_fails_when_something_did_not_fuse(monkeypatch, capsys):
    """Without compiling: only the verdict is looked at."""
    model = build(dataclasses.replace(TINY, num_hidden_layers=1), "cpu")
    with torch.no_grad():
        (graph,) = assert_equivalent(model, prefill(model), backend=fp.fusion_backend(passes=[])).report.graphs
    assert not mla_decode.fused_as_expected("prefill", graph, expected_ops(model.config))
    assert f"WRONG: 0 {ROPE} in the graph, expected 1" in capsys.readouterr().out


# ---- twins that must not fuse


class ReadsBetween(MlaAttention):
    """Looks at pages that the rotated q chooses, as sparse attention does, before the write."""

    def rotate_and_write(self, q_pe, k_pe, kv_c, cache, step):
        q_pe = mla_decode.rotate(q_pe, step.cos[:, None], step.sin[:, None])
        k_pe = mla_decode.rotate(k_pe, step.cos, step.sin)
        pages = q_pe[:, 0].argmax(-1) % cache.shape[0]
        seen = cache[pages].amax((1, 2))[:, None, None]
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k_pe, cache, step.slots)
        return q_pe + seen


class OtherAngles(MlaAttention):
    """Turns q and k by different tables."""

    def rotate_and_write(self, q_pe, k_pe, kv_c, cache, step):
        q_pe = mla_decode.rotate(q_pe, step.cos[:, None] * 2, step.sin[:, None])
        k_pe = mla_decode.rotate(k_pe, step.cos, step.sin)
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k_pe, cache, step.slots)
        return q_pe


class NotRotated(MlaAttention):
    """Writes k_pe as it is."""

    def rotate_and_write(self, q_pe, k_pe, kv_c, cache, step):
        torch.ops.fusionpasses.concat_and_cache_mla(kv_c, k_pe, cache, step.slots)
        return mla_decode.rotate(q_pe, step.cos[:, None], step.sin[:, None])


@pytest.mark.parametrize(
    ("twin", "reason"),
    [
        (ReadsBetween, "reads the cache between the rotation and the write"),
        (OtherAngles, "no rotation of q by the same angles"),
        (NotRotated, "k_pe is no rotation"),
    ],
)
def test_a_layer_that_must_not_fuse_is_left_alone_with_its_reason(twin, reason):
    model = build(dataclasses.replace(TINY, num_hidden_layers=3), "cpu")
    model.layers[1].attention.__class__ = twin
    with torch.no_grad():
        report = assert_equivalent(model, decode(model)).report
    (refused,) = report.refused
    assert reason in refused.reason
    assert refused.where.module == "layers.1.attention"
    ropes = sorted(site.where.module for site in report.fused if site.pass_name == ROPE)
    assert ropes == ["layers.0.attention", "layers.2.attention"]
    norms = {op: n for op, n in expected_ops(model.config).items() if op.startswith("rmsnorm")}
    assert {op: report.counts[op] for op in norms} == norms


# ---- on a GPU


@pytest.mark.gpu
def test_cuda_graphs_are_not_skipped_and_generate_the_same(capfd):
    model = build(TINY, "cuda")
    generated = {}
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        counters.clear()
        backend = fp.fusion_backend()
        with torch._inductor.utils.fresh_cache(), mla_decode.same_rounding_as_eager():
            compiled = torch.compile(model, backend=backend, mode=mode, dynamic=False, fullgraph=True)
            generated[mode] = generate(compiled, *at_work(TINY, "cuda", context=48), 32)
        assert len(backend.report.graphs) == 2
        for graph in backend.report.graphs:
            assert mla_decode.fused_as_expected(mode, graph, expected_ops(TINY))
        assert {site.provider for site in backend.report.fused} == {"triton"}
        assert counters["inductor"]["cudagraph_skips"] == 0
    default, replayed = generated.values()
    assert torch.equal(default.tokens, replayed.tokens)
    assert len(replayed.tokens.unique()) > 8
    for a, b in zip(default.caches, replayed.caches, strict=True):
        assert torch.equal(a, b)
    assert "skipping cudagraphs" not in capfd.readouterr().err


@pytest.mark.gpu
def test_caches_that_may_move_would_skip_them():
    """What the count above rests on: it does count."""
    model = build(dataclasses.replace(TINY, num_hidden_layers=1), "cuda")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=fp.fusion_backend(), mode="reduce-overhead", dynamic=False)
    sequences, prompts, counts = at_work(model.config, "cuda")
    sequences.caches = [cache.clone() for cache in sequences.caches]  # not marked
    generate(compiled, sequences, prompts, counts, 2)
    assert counters["inductor"]["cudagraph_skips"] > 0
