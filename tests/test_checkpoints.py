"""MXFP4 checkpoints: exact names of each format, round trips, and that a file that does not fit changes nothing."""

import collections
import copy
import json
import math
import os
import pathlib
import subprocess
import sys
import time
import weakref

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import given
from safetensors.torch import load_file, save_file
from torch import nn

import fusionpasses as fp
from fusionpasses.nn import Mxfp4Weight, _checkpoint_files, linear_from_checkpoint
from fusionpasses.nn._checkpoint_formats import FORMATS
from fusionpasses.nn.checkpoint_reader import scale_bytes

ours = torch.ops.fusionpasses
QUARK = pathlib.Path(__file__).parent / "golden" / "checkpoints" / "quark"

#: quantization_config as released checkpoints and the formats' own libraries spell it.
CONFIGS = {
    "quark": json.loads((QUARK / "config.json").read_text())["quantization_config"] | {"exclude": ["*head*"]},
    "gpt_oss": {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head", "head"], "quant_method": "mxfp4"},
    "compressed_tensors": {
        "config_groups": {
            "group_0": {
                "format": "mxfp4-pack-quantized",
                "input_activations": {
                    "dynamic": True,
                    "group_size": 32,
                    "num_bits": 4,
                    "scale_dtype": "torch.uint8",
                    "strategy": "group",
                    "symmetric": True,
                    "type": "float",
                },
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "dynamic": False,
                    "group_size": 32,
                    "num_bits": 4,
                    "scale_dtype": "torch.uint8",
                    "strategy": "group",
                    "symmetric": True,
                    "type": "float",
                },
            }
        },
        "format": "mxfp4-pack-quantized",
        "ignore": ["head", "re:.*self_attn.*"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "transform_config": {},
        "version": "0.20.0",
    },
}
#: Names of the codes and scales of ``up.weight``, and of expert parameters.
NAMES = {
    "quark": ("up.weight", "up.weight_scale"),
    "compressed_tensors": ("up.weight_packed", "up.weight_scale"),
    "gpt_oss": ("experts.down_proj_blocks", "experts.down_proj_scales"),
}


def codes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scales(*shape):
    return torch.randint(100, 140, shape, dtype=torch.uint8)


def raw(spelling):
    """The tensors of a small checkpoint, by the names in the file."""
    torch.manual_seed(0)
    tensors = {"embed.weight": torch.randn(8, 64).bfloat16(), "norm.weight": torch.randn(64)}
    tensors |= {"head.weight": torch.randn(8, 64).bfloat16(), "down.bias": torch.randn(64).bfloat16()}
    end = "_packed" if spelling == "compressed_tensors" else ""
    if spelling == "gpt_oss":
        tensors |= {"experts.down_proj_blocks": codes(2, 96, 2, 16), "experts.down_proj_scales": scales(2, 96, 2)}
    else:
        tensors |= {f"up.weight{end}": codes(96, 32), "up.weight_scale": scales(96, 2)}
        tensors |= {f"down.weight{end}": codes(64, 48), "down.weight_scale": scales(64, 3)}
    return tensors


def write(folder, tensors, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


class Small(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(8, 64)
        self.up = nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64)
        self.norm = nn.RMSNorm(64)
        self.head = nn.Linear(64, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.down(self.up(self.embed(x)).relu())))


class GptExperts(nn.Module):
    is_transposed = True

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(2, 64, 96))


def small(spelling):
    """The model whose checkpoint ``raw`` is."""
    model = Small()
    if spelling == "gpt_oss":
        del model.up
        model.down = nn.Module()
        model.down.bias = nn.Parameter(torch.zeros(64))
        model.experts = GptExperts()
    return model


def on_meta(make, *arguments):
    with torch.device("meta"):
        return make(*arguments)


def same(a, b):
    if isinstance(a, Mxfp4Weight) or isinstance(b, Mxfp4Weight):
        return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def snapshot(model):
    return {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]


def unchanged(model, before):
    tensors, types = before
    now = model.state_dict()
    return (
        [type(m) for m in model.modules()] == types
        and now.keys() == tensors.keys()
        and all(now[k].data_ptr() == p and torch.equal(now[k], v) for k, (p, v) in tensors.items())
    )


MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def decoded(packed, exponents):
    """Values by the table of the specification, element 2i in the low nibble."""
    table = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float64)
    values = torch.stack((table[(packed & 15).int()], table[(packed >> 4).int()]), -1).flatten(-2)
    return values * (2.0 ** (exponents.double() - 127)).repeat_interleave(32, -1)


# Names of the formats


@pytest.mark.parametrize("config", [True, False], ids=["config", "names"])
@pytest.mark.parametrize("spelling", FORMATS)
def test_names_of_each_format(spelling, config, tmp_path):
    tensors = raw(spelling)
    path = write(tmp_path / "c", tensors, CONFIGS[spelling] if config else None)
    for opened in (fp.open_checkpoint(path), fp.open_checkpoint(path / "model.safetensors")):
        assert opened.format == spelling
        assert opened.scale_mode == "even"
        assert opened.act == ("none" if spelling == "gpt_oss" else "mxfp4")
        stored = NAMES[spelling]
        name = {"gpt_oss": "experts.down_proj"}.get(spelling, "up.weight")
        weight = opened.read(name)
        assert torch.equal(weight.codes, tensors[stored[0]].reshape(weight.codes.shape))
        assert torch.equal(weight.scales, tensors[stored[1]])
        assert weight.shape == opened.entries[name].shape == ((2, 96, 64) if spelling == "gpt_oss" else (96, 64))
        assert torch.equal(weight.dequantize().double(), decoded(weight.codes, weight.scales))
        quantized = {"experts.down_proj"} if spelling == "gpt_oss" else {"up.weight", "down.weight"}
        assert {n for n, e in opened.entries.items() if e.quantized} == quantized
        assert all(same(opened.read(n), tensors[n]) for n in opened if n not in quantized)
        assert (opened.excluding("head.weight") is not None) == config
        assert opened.excluding("up.weight") is None


@pytest.mark.parametrize(
    ("spelling", "pattern", "yes", "no"),
    [
        ("quark", "*self_attn*", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("quark", "*mlp.gate.*", "model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate_proj.weight"),
        ("quark", "lm_head", "lm_head.weight", "x.lm_head.weight"),
        ("quark", "lm_head.weight", "lm_head.weight", "lm_head2.weight"),
        ("gpt_oss", "model.layers.*.self_attn", "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.weight"),
        ("gpt_oss", "lm_head", "lm_head.weight", "lm_head2.weight"),
        ("gpt_oss", "mlp.router", "model.layers.0.mlp.router.weight", "model.layers.0.mlp.router2.weight"),
        ("compressed_tensors", "re:.*self_attn.*", "model.self_attn.q_proj.weight", "model.mlp.weight"),
        ("compressed_tensors", "lm_head", "lm_head.weight", "model.lm_head.weight"),
        ("compressed_tensors", "re:.*[.]gate$", "mlp.gate.weight", "mlp.gate_proj.weight"),
    ],
)
def test_excluded_patterns_are_read_as_their_format_means_them(spelling, pattern, yes, no):
    from fusionpasses.nn._checkpoint_settings import Settings

    assert FORMATS[spelling].excluding(Settings("none", "even", ("nothing", pattern)), yes) == pattern
    assert FORMATS[spelling].excluding(Settings("none", "even", ("nothing", pattern)), no) is None


@pytest.mark.parametrize("how", ["uint8", "e8m0", "float32", "bfloat16", "int8 codes", "fp4 codes"])
@pytest.mark.parametrize("spelling", FORMATS)
def test_the_same_bytes_under_other_dtypes(spelling, how, tmp_path):
    tensors = raw(spelling)
    packed, scale = NAMES[spelling]
    expected = tensors[packed].clone(), tensors[scale].clone()
    if how == "e8m0":
        tensors[scale] = tensors[scale].view(torch.float8_e8m0fnu)
    elif how in ("float32", "bfloat16"):
        tensors[scale] = (2.0 ** (tensors[scale].double() - 127)).to(getattr(torch, how))
    elif how != "uint8":
        tensors[packed] = tensors[packed].view(torch.int8 if how == "int8 codes" else torch.float4_e2m1fn_x2)
    opened = fp.open_checkpoint(write(tmp_path / "c", tensors, CONFIGS[spelling]))
    weight = opened.read("experts.down_proj" if spelling == "gpt_oss" else "up.weight")
    assert weight.codes.dtype == weight.scales.dtype == torch.uint8
    assert weight.codes.is_contiguous()
    assert torch.equal(weight.codes.flatten(), expected[0].flatten())
    assert torch.equal(weight.scales, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_power_of_two_is_its_byte(dtype):
    every = torch.arange(255, dtype=torch.uint8)
    values = (2.0 ** (every.double() - 127)).to(dtype)
    assert torch.equal(scale_bytes("s", values), every)
    assert torch.equal(scale_bytes("s", every.view(torch.float8_e8m0fnu)), every)
    half = (2.0 ** torch.arange(-24.0, 16)).half()
    assert torch.equal(scale_bytes("s", half), torch.arange(103, 143, dtype=torch.uint8))


@pytest.mark.parametrize(
    "bad", [0.0, -1.0, 3.0, math.inf, math.nan, 1.5 * 2.0**-126, 2.0**-128, 1.0000001, -(2.0**-127), -0.0]
)
def test_other_scales_are_refused(bad):
    with pytest.raises(fp.BadCheckpoint, match=r"got the scale .* at \[1, 0\], 1 of 4 like it, allowed powers of two"):
        scale_bytes("s", torch.tensor([[1.0, 2.0], [bad, 0.5]]))


# The formats' own libraries


def test_a_file_that_quark_wrote():
    opened = fp.open_checkpoint(QUARK)
    assert (opened.format, opened.act, opened.scale_mode) == ("quark", "mxfp4", "even")
    theirs = load_file(QUARK / "decoded.safetensors")
    assert {n for n, e in opened.entries.items() if e.quantized} == set(theirs)
    for name, values in theirs.items():
        assert torch.equal(opened.read(name).dequantize(torch.bfloat16), values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(QUARK))
    summary = fp.load_checkpoint(model, QUARK)
    assert {f"{n}.weight" for n in summary.quantized} == set(theirs)
    assert set(summary.left) == {*(f"model.layers.0.self_attn.{c}_proj" for c in "qkvo"), "lm_head"}
    assert set(summary.left.values()) == {"the checkpoint excludes it"}
    with torch.no_grad():
        assert model(torch.arange(5)[None]).logits.isfinite().all()


def llama(**settings):
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_file_that_compressed_tensors_wrote(tmp_path):
    """Its own scales, quantisation, packing and configuration, and its own values."""
    library = pytest.importorskip("compressed_tensors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    groups = {"group_0": quantization.preset_name_to_scheme("MXFP4", ["Linear"])}
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head", "re:.*self_attn.*"])
    )
    modules = {n: m for n, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    for module in modules.values():
        blocks = module.weight.detach().unflatten(-1, (-1, 32))
        arguments = module.quantization_scheme.weights
        module.weight_scale.data = quantization.utils.calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)[0]
    weights = {n: m.weight.detach().clone() for n, m in modules.items()}
    compressor = library.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.to_json_file(tmp_path / "config.json")
    compressor.update_config(str(tmp_path))

    opened = fp.open_checkpoint(tmp_path)
    assert (opened.format, opened.act) == ("compressed_tensors", "mxfp4")
    assert {n for n, e in opened.entries.items() if e.quantized} == {f"{n}.weight" for n in weights}
    for name, module in modules.items():
        weight = opened.read(f"{name}.weight")
        library.decompress_module(module)
        assert torch.equal(weight.dequantize(torch.bfloat16), module.weight)
        # It rounds as we do, so the bytes are those of our own quantisation.
        quantized = ours.dynamic_mxfp4_quant(weights[name])
        assert torch.equal(weight.codes, quantized[0])
        assert torch.equal(weight.scales, quantized[1])
    loaded = on_meta(llama)
    summary = fp.load_checkpoint(loaded, tmp_path)
    assert summary.quantized == list(weights)
    assert summary.left["lm_head"] == "the checkpoint excludes it"


def test_compressed_tensors_reads_what_we_wrote(tmp_path):
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    model = fp.quantize_mxfp4(llama().to(torch.bfloat16))
    fp.save_checkpoint(model, tmp_path / "c", format="compressed_tensors")
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "c", quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)
    )
    for name, module in model.named_modules():
        if isinstance(module, fp.Mxfp4Linear):
            values = Mxfp4Weight(module.weight_packed, module.weight_scale).dequantize(torch.bfloat16)
            assert torch.equal(theirs.get_submodule(name).weight, values), name
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)


def gpt_oss(intermediate_size):
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        head_dim=32,
    )
    return transformers.GptOssForCausalLM(config).eval()


@pytest.mark.parametrize("width", [64, 96], ids=["square", "not square"])
def test_gpt_oss_experts_are_unpacked_as_transformers_does(width, tmp_path):
    torch.manual_seed(0)
    model = gpt_oss(width).to(torch.bfloat16)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensor = Mxfp4Weight(*ours.dynamic_mxfp4_quant(tensor.transpose(1, 2).contiguous()))
        tensors[name] = tensor
    path = tmp_path / "c"
    fp.save_checkpoint(tensors, path, format="gpt_oss", config=model.config.to_dict(), max_shard_bytes=20_000)
    stored = {k: s for file in path.glob("*.safetensors") for k, s in load_file(file).items()}
    prefix = "model.layers.0.mlp.experts."
    assert stored[f"{prefix}gate_up_proj_blocks"].shape == (2, 2 * width, 2, 16)
    assert stored[f"{prefix}gate_up_proj_scales"].shape == (2, 2 * width, 2)
    assert stored[f"{prefix}down_proj_blocks"].shape == (2, 64, width // 32, 16)

    loaded = on_meta(gpt_oss, width)
    before = [type(m) for m in loaded.modules()]
    with pytest.raises(fp.BadCheckpoint, match=r"down_proj_blocks'.*dequantize_experts=True unpacks them"):
        fp.load_checkpoint(loaded, path)
    assert [type(m) for m in loaded.modules()] == before
    assert all(p.is_meta for p in loaded.parameters())
    summary = fp.load_checkpoint(loaded, path, dequantize_experts=True)
    assert summary.quantized == []
    assert sorted(summary.dequantized) == [f"{prefix}down_proj", f"{prefix}gate_up_proj"]
    assert set(summary.left) == {*(f"model.layers.0.self_attn.{c}_proj" for c in "qkvo"), "lm_head"}
    assert set(summary.left.values()) == {"the checkpoint excludes it"}
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        path, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    got, expected = loaded.state_dict(), theirs.state_dict()
    assert got.keys() == expected.keys()
    assert all(same(got[k], expected[k]) for k in expected)
    x = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, theirs(x).logits)


# Models of transformers, built on the meta device


def deepseek(**settings):
    config = transformers.DeepseekV3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        first_k_dense_replace=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        **settings,
    )
    return transformers.DeepseekV3ForCausalLM(config).eval()


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("spelling", ["quark", "compressed_tensors"])
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (llama, {}),
        (llama, {"tie_word_embeddings": True}),
        (deepseek, {}),
        (deepseek, {"rope_parameters": YARN, "max_position_embeddings": 128}),
    ],
    ids=["llama", "llama-tied", "deepseek_v3", "deepseek_v3-yarn"],
)
def test_a_model_on_the_meta_device_computes_as_the_saved_one(make, arguments, spelling, tmp_path):
    torch.manual_seed(0)
    model = fp.quantize_mxfp4(make(**arguments).to(torch.bfloat16))
    # A cast of the whole model casts inv_freq too, which from_pretrained never does.
    model.model.rotary_emb = make(**arguments).model.rotary_emb
    fp.save_checkpoint(model, tmp_path / "c", format=spelling, max_shard_bytes=10_000)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 3
    with torch.device("meta"):
        loaded = make(**arguments)
    summary = fp.load_checkpoint(loaded, tmp_path / "c", progress=False)
    assert not [n for n, t in [*loaded.named_parameters(), *loaded.named_buffers()] if t.is_meta]
    assert summary.quantized == fp.last_quantization().quantized
    assert summary.computed == ["model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"]
    assert summary.dtypes.keys() == {torch.bfloat16}
    assert summary.left == {"lm_head": "the checkpoint excludes it"}
    x = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)
    tied = "tie_word_embeddings" in arguments
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert summary.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


@pytest.mark.parametrize("prepared", [False, True], ids=["linear", "tiles"])
@pytest.mark.parametrize(("make", "norms"), [(llama, 1), (deepseek, 5)], ids=["llama", "deepseek_v3"])
def test_every_norm_and_activation_of_a_loaded_model_fuses(make, norms, prepared, tmp_path):
    """From a checkpoint to one op per quant, byte by byte the same."""
    from fusionpasses.testing import assert_equivalent

    fp.save_checkpoint(fp.quantize_mxfp4(make().to(torch.bfloat16)), tmp_path / "c", format="quark")
    model = on_meta(make)
    fp.load_checkpoint(model, tmp_path / "c", progress=False)
    if prepared:
        for module in model.modules():
            if isinstance(module, fp.Mxfp4Linear):
                module.prepare()
    with torch.no_grad():
        result = assert_equivalent(model, (torch.arange(6)[None],))
    (graph,) = result.report.graphs
    counts = {"rmsnorm_mxfp4_quant": norms, "rmsnorm_add_mxfp4_quant": 3, "silu_mul_mxfp4_quant": 2}
    assert {op: graph.ops_after.get(op, 0) for op in counts} == counts, str(result.report)
    assert not result.report.refused


def test_a_checkpoint_whose_inputs_are_left_has_nothing_to_fuse(tmp_path):
    from fusionpasses.testing import assert_equivalent

    fp.save_checkpoint(fp.quantize_mxfp4(llama().to(torch.bfloat16), act="none"), tmp_path / "c", format="quark")
    model = on_meta(llama)
    assert fp.load_checkpoint(model, tmp_path / "c", progress=False).act == "none"
    with torch.no_grad():
        result = assert_equivalent(model, (torch.arange(6)[None],))
    (graph,) = result.report.graphs
    assert graph.ops_after["mxfp4_gemm_a16w4"] == 14
    assert not [op for op in graph.ops_after if op.endswith("quant")]


class Volatile(nn.Module):
    """A buffer that no checkpoint has."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.up = nn.Linear(64, 96, bias=False)
        if how == "attribute":
            self.angles = torch.zeros(4)
        else:
            self.register_buffer("angles", torch.zeros(4), persistent=False)
        if how not in ("nothing", "attribute"):
            self._init_weights = lambda module: self.initialize(module)

    def initialize(self, module):
        if self.how == "set":
            module.angles.copy_(torch.arange(4.0))
        elif self.how == "partly":
            module.angles[:2] = 1.0
        elif self.how == "random":
            module.angles.normal_()


@pytest.mark.parametrize("how", ["set", "nothing", "attribute", "left", "partly", "random"])
def test_buffers_without_data_are_computed_or_refused(how, tmp_path):
    path = write(tmp_path / "c", {"up.weight": codes(96, 32), "up.weight_scale": scales(96, 2)}, None)
    model = on_meta(Volatile, how)
    if how == "set":
        assert fp.load_checkpoint(model, path).computed == ["angles"]
        assert torch.equal(model.angles, torch.arange(4.0))
        return
    with pytest.raises(fp.BadCheckpoint, match=r"'angles' \(torch.float32 \[4\]\): got no data for it"):
        fp.load_checkpoint(model, path)
    assert model.angles.is_meta
    assert type(model.up) is nn.Linear
    # The same model with data is no problem.
    fp.load_checkpoint(Volatile(how), path)


# Loading


@pytest.mark.parametrize("meta", [True, False], ids=["meta", "data"])
@pytest.mark.parametrize("spelling", ["quark", "compressed_tensors"])
def test_what_is_loaded_left_and_said(spelling, meta, tmp_path):
    tensors = raw(spelling)
    path = write(tmp_path / "c", tensors, CONFIGS[spelling])
    model = on_meta(Small) if meta else Small()
    model.up.eval()
    summary = fp.load_checkpoint(model, path)
    assert summary.quantized == ["up", "down"]
    assert summary.left == {"head": "the checkpoint excludes it"}
    assert isinstance(model.up, fp.Mxfp4Linear)
    assert not model.up.training
    assert model.down.training
    assert torch.equal(model.up.weight_packed, tensors[NAMES[spelling][0]])
    assert torch.equal(model.up.weight_scale, tensors["up.weight_scale"])
    assert type(model.head) is nn.Linear
    # Dtypes are those of the file, one by one, not those of the model (float32).
    assert same(model.down.bias, tensors["down.bias"])
    assert same(model.norm.weight.detach(), tensors["norm.weight"])
    assert same(model.head.weight.detach(), tensors["head.weight"])
    assert summary.dtypes == {torch.bfloat16: 3, torch.float32: 1}
    assert str(summary).startswith(
        f"load_checkpoint: {spelling}, 2 linears in MXFP4 (act 'mxfp4', scale mode 'even'), 1 left; other tensors: "
    )
    assert "left, the checkpoint excludes it: head" in str(summary)
    # A model that is loaded can be loaded again.
    again = fp.load_checkpoint(model, path, dtype=torch.float32)
    assert again.quantized == ["up", "down"]
    assert again.dtypes == {torch.float32: 4}
    with torch.no_grad():
        y = model(torch.arange(8))
    assert y.dtype == torch.float32
    other = on_meta(Small)
    fp.load_checkpoint(other, path, device="cpu")
    assert {t.device.type for t in [*other.parameters(), *other.buffers()]} == {"cpu"}
    layer = linear_from_checkpoint(fp.open_checkpoint(path), "down", scale_mode="floor")
    assert layer.scale_mode == "floor"
    assert torch.equal(layer.weight_packed, model.down.weight_packed)
    assert same(layer.bias, tensors["down.bias"])


def test_a_layer_that_is_not_excluded_but_not_quantised_is_said(tmp_path):
    tensors = raw("quark")
    del tensors["up.weight_scale"]
    tensors["up.weight"] = torch.randn(96, 64).half()
    model = on_meta(Small)
    summary = fp.load_checkpoint(model, write(tmp_path / "c", tensors, CONFIGS["quark"]))
    assert summary.left["up"] == "the checkpoint has it in torch.float16"


@torch.no_grad()
@pytest.mark.parametrize("part", [None, "up", "inner"])
def test_a_compiled_model_is_written_and_filled_as_the_model_in_it(part, tmp_path):
    """Its names have no ``_orig_mod``, and what was compiled computes with the new weights."""
    torch.manual_seed(0)
    model = nn.Sequential(collections.OrderedDict(inner=Small(), outer=nn.Linear(8, 8)))
    tokens = torch.arange(8)
    fp.quantize_mxfp4(model, lambda name, _: name in ("inner.up", "inner.down"))
    fp.save_checkpoint(model, tmp_path / "plain", format="quark")

    def compiled(of):
        if part == "inner":
            of.inner = torch.compile(of.inner, backend="eager")
        elif part == "up":
            of.inner.up = torch.compile(of.inner.up, backend="eager")
        return of if part else torch.compile(of, backend="eager")

    fp.save_checkpoint(compiled(copy.deepcopy(model)), tmp_path / "compiled", format="quark")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()

    empty = compiled(nn.Sequential(collections.OrderedDict(inner=Small(), outer=nn.Linear(8, 8))))
    before = empty(tokens)
    if part == "up":  # it would go on to call the linear that it was made for
        with pytest.raises(fp.BadCheckpoint, match=r"'inner\.up\.weight'.*given it by itself, and what"):
            fp.load_checkpoint(empty, tmp_path / "plain", progress=False)
        assert torch.equal(empty(tokens), before)
        return
    summary = fp.load_checkpoint(empty, tmp_path / "plain", progress=False)
    assert summary.quantized == ["inner.up", "inner.down"]
    assert torch.equal(empty(tokens), model(tokens))


def test_tied_weights(tmp_path):
    tensors = raw("quark")
    path = write(tmp_path / "both", tensors, CONFIGS["quark"])
    model = Small(tied=True)
    before = snapshot(model)
    with pytest.raises(fp.BadCheckpoint, match=r"'(head|embed)\.weight' .*: got other values than in a tensor"):
        fp.load_checkpoint(model, path)
    assert unchanged(model, before)
    tensors["head.weight"] = tensors["embed.weight"].clone()
    for name in ("both the same", "one"):
        model = on_meta(Small, True)
        summary = fp.load_checkpoint(model, write(tmp_path / name, tensors, CONFIGS["quark"]))
        assert model.head.weight is model.embed.weight
        assert same(model.head.weight.detach(), tensors["embed.weight"])
        if name == "one":
            assert summary.tied == {"head.weight": "embed.weight"}
        tensors.pop("head.weight", None)


def test_tied_weights_that_the_checkpoint_quantised_are_refused(tmp_path):
    tensors = raw("quark") | {"head.weight": codes(8, 32), "head.weight_scale": scales(8, 2)}
    path = write(tmp_path / "c", tensors, CONFIGS["quark"] | {"exclude": []})
    with pytest.raises(fp.BadCheckpoint, match=r"got MXFP4 for tied weights \('embed.weight', 'head.weight'\)"):
        fp.load_checkpoint(on_meta(Small, True), path)
    fp.load_checkpoint(on_meta(Small, False), path)


def test_a_linear_under_two_names_stays_one(tmp_path):
    model = on_meta(Small)
    model.up2 = model.up
    tensors = raw("quark")
    fp.load_checkpoint(model, write(tmp_path / "c", tensors, CONFIGS["quark"]))
    assert isinstance(model.up2, fp.Mxfp4Linear)
    assert model.up2 is model.up


def test_unexpected_names_can_be_ignored(tmp_path):
    tensors = raw("quark") | {"mtp.0.weight": torch.ones(4), "mtp.1.weight": codes(4, 16)}
    tensors["mtp.1.weight_scale"] = scales(4, 1)
    path = write(tmp_path / "c", tensors, CONFIGS["quark"])
    model = on_meta(Small)
    with pytest.raises(fp.BadCheckpoint, match=r"'mtp.0.weight', 'mtp.1.weight': got tensors that the model does not"):
        fp.load_checkpoint(model, path)
    assert fp.load_checkpoint(model, path, ignore=["mtp.*"]).ignored == ["mtp.0.weight", "mtp.1.weight"]
    model = on_meta(Small)
    model._keys_to_ignore_on_load_unexpected = [r"^mtp\.\d"]
    assert len(fp.load_checkpoint(model, path).ignored) == 2


def test_experts_one_by_one_are_refused_with_a_reason(tmp_path):
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    path = write(tmp_path / "c", raw("quark") | {name: codes(4, 16), f"{name}_scale": scales(4, 1)}, CONFIGS["quark"])
    with pytest.raises(fp.BadCheckpoint, match=r"experts\.0\.up_proj.*cannot be loaded into a module that holds them"):
        fp.load_checkpoint(on_meta(Small), path)


# Tensors and files that do not fit: each error names the tensor, and the model is what it was


def without(name):
    return lambda tensors, config: tensors.pop(name)


def put(name, tensor):
    return lambda tensors, config: tensors.update({name: tensor() if callable(tensor) else tensor})


def setting(*path):
    """Set an entry of the configuration: keys, then the value."""

    def edit(tensors, config):
        for key in path[:-2]:
            config = config[key]
        config[path[-2]] = path[-1]

    return edit


Q, C, G = "quark", "compressed_tensors", "gpt_oss"
WEIGHT = ("global_quant_config", "weight")
INPUTS = ("global_quant_config", "input_tensors")
GROUP = ("config_groups", "group_0")

BAD_FILES = [
    # Packing and scales
    (Q, without("up.weight_scale"), r"'up.weight' \(U8 .*got codes without scales 'up.weight_scale'"),
    (C, without("up.weight_scale"), r"'up.weight_packed' \(U8 .*got codes without scales 'up.weight_scale'"),
    (G, without("experts.down_proj_scales"), r"down_proj_blocks' .*without scales 'experts.down_proj_scales'"),
    (Q, without("up.weight"), r"'up.weight_scale' .*got scales without codes 'up.weight'.*codes are missing"),
    (C, without("up.weight_packed"), r"'up.weight_scale' .*got scales without codes 'up.weight_packed'"),
    (G, without("experts.down_proj_blocks"), r"down_proj_scales' .*without codes 'experts.down_proj_blocks'"),
    (
        Q,
        put("up.weight_scale", scales(2, 96)),
        r"'up.weight' .*got scales of shape \[2, 96\].*allowed shapes \[\.\., N",
    ),
    (Q, put("up.weight_scale", scales(96, 4)), r"'up.weight' .*got scales of shape \[96, 4\]"),
    (Q, put("up.weight", codes(96, 64)), r"'up.weight' \(U8 \[96, 64\] .*got scales of shape \[96, 2\]"),
    (C, put("up.weight_packed", codes(96, 20)), r"'up.weight_packed' .*got scales of shape"),
    (C, put("up.weight_packed", torch.ones(96, 8, dtype=torch.int32)), r"weight_packed' .*got I32 where packed codes"),
    (
        C,
        put("up.weight_scale", lambda: torch.ones(96, 2).to(torch.float8_e4m3fn)),
        r"'up.weight_scale' .*F8_E4M3.*NVFP4",
    ),
    (C, put("up.weight_global_scale", torch.ones(1)), r"'up.weight_global_scale' .*got a part of NVFP4"),
    (C, put("up.weight_zero_point", codes(96, 2)), r"'up.weight_zero_point' .*asymmetric"),
    (C, put("up.weight", torch.ones(96, 64)), r"got 'up.weight' both packed and as it is"),
    (Q, put("up.weight", torch.ones(96, 32)), r"'up.weight' .*got F32 where packed codes are, allowed U8"),
    (Q, put("head.weight", lambda: torch.ones(8, 64).to(torch.float8_e4m3fn)), r"'head.weight' .*got F8_E4M3, allowed"),
    (Q, put("up.weight_scale_inv", torch.ones(3, 2)), r"'up.weight_scale_inv' .*fp8 in blocks"),
    (Q, put("up.input_scale", torch.ones(1)), r"'up.input_scale' .*static scales"),
    (Q, put("table", codes(4)), r"'table' .*got U8, allowed MXFP4"),
    (G, put("experts.down_proj_blocks", codes(2, 96, 2, 32)), r"down_proj_blocks' .*got scales of shape \[2, 96, 2\]"),
    (G, put("experts.down_proj_blocks", codes(2, 96, 32)), r"down_proj_blocks' .*\[E, N, K/32, 16\]"),
    (G, put("experts.down_proj_scales", scales(2, 2, 96)), r"down_proj_blocks' .*got scales of shape \[2, 2, 96\]"),
    (
        C,
        lambda t, c: (t.pop("up.weight_packed"), t.update({"up.weight": torch.ones(96, 64)})),
        r"'up.weight_scale' .*got scales without codes .*'up.weight' \(F32 .* is not MXFP4",
    ),
    # Configurations
    (Q, setting("quant_method", "awq"), r"quant_method: got 'awq', allowed 'quark', 'mxfp4', 'compressed-tensors'"),
    (Q, setting(*WEIGHT, "group_size", 16), r"weight.group_size: got 16, allowed 32"),
    (Q, setting(*WEIGHT, "dtype", "mx"), r"weight.dtype: got 'mx', allowed 'fp4'"),
    (Q, setting(*WEIGHT, "dtype", "fp8_e4m3"), r"got a Quark configuration without an fp4 weight"),
    (Q, setting(*WEIGHT, "scale_format", "e4m3"), r"weight.scale_format: got 'e4m3', allowed 'e8m0'"),
    (Q, setting(*INPUTS, "scale_calculation_mode", "up"), r"input_tensors.scale_calculation_mode: got 'up'"),
    (Q, setting(*INPUTS, "is_dynamic", False), r"input_tensors.is_dynamic: got False, allowed True"),
    (Q, setting("algo_config", [{"name": "rotation", "r4": True}]), r"algo_config: got r4=True"),
    (Q, setting("exclude", "lm_head"), r"exclude: got 'lm_head', allowed a list of strings"),
    (Q, setting("exclude", ["u*"]), r"'up.weight' .*got an MXFP4 tensor, allowed none where .* excludes 'u\*'"),
    (Q, setting("layer_quant_config", 3), r"layer_quant_config: got 3, allowed a JSON object"),
    (C, setting("ignore", ["re:.*p$"]), r"'up.weight_packed' .*excludes 're:\.\*p\$'"),
    (C, setting("transform_config", {"r": 1}), r"transform_config: got transforms, allowed none"),
    (C, setting(*GROUP, "format", "nvfp4-pack-quantized"), r"got nvfp4-pack-quantized, allowed 'mxfp4-pack-quantized'"),
    (C, setting(*GROUP, "weights", "group_size", 16), r"group_0.weights.group_size: got 16, allowed 32"),
    (C, setting(*GROUP, "weights", "num_bits", 8), r"group_0.weights.num_bits: got 8, allowed 4"),
    (C, setting(*GROUP, "input_activations", "dynamic", False), r"input_activations.dynamic: got False, allowed True"),
    (G, setting("modules_to_not_convert", ["experts"]), r"'experts.down_proj_blocks' .*excludes 'experts'"),
    # The model
    (Q, without("norm.weight"), r"'norm.weight': got no such tensors in the checkpoint, allowed all of the model's"),
    (Q, put("other.weight", torch.ones(3)), r"'other.weight': got tensors that the model does not have"),
    (Q, put("norm.weight", torch.ones(65)), r"'norm.weight' .*got shape \[65\], allowed \[64\]"),
    (Q, put("norm.weight", torch.ones(64, dtype=torch.int64)), r"'norm.weight' .*got I64, allowed what is of the kind"),
    (Q, put("down.bias", torch.ones(63)), r"'down.bias' .*got shape \[63\], allowed \[64\]"),
    (Q, without("down.bias"), r"'down.bias': got no such tensors"),
    (Q, put("up.bias", torch.ones(96)), r"'up.bias': got tensors that the model does not have"),
    (
        Q,
        lambda t, c: t.update({"up.weight": codes(64, 32), "up.weight_scale": scales(64, 2)}),
        r"'up.weight' .*got values of shape \[64, 64\], allowed \[96, 64\]",
    ),
    (
        Q,
        lambda t, c: t.update({"embed.weight": codes(8, 32), "embed.weight_scale": scales(8, 2)}),
        r"'embed.weight' .*got MXFP4 for a parameter of Embedding, allowed nn.Linear",
    ),
    (
        G,
        lambda t, c: t.update({NAMES[G][0]: codes(2, 64, 2, 16), NAMES[G][1]: scales(2, 64, 2)}),
        r"'experts.down_proj_blocks' .*got experts that unpack to \[2, 64, 64\], allowed \[2, 64, 96\]",
    ),
    # Values
    (
        Q,
        put("down.weight_scale", torch.full((64, 3), 3.0)),
        r"'down.weight_scale' .*got the scale 3.0 at \[0, 0\], 192 of",
    ),
    (C, put("down.weight_scale", torch.full((64, 3), 0.0)), r"'down.weight_scale' .*got the scale 0.0"),
    (C, put("down.weight_scale", torch.full((64, 3), 255).byte()), r"'down.weight_scale' .*got the scale byte 255"),
    (G, put("experts.down_proj_scales", torch.full((2, 96, 2), 255).byte()), r"'experts.down_proj_scales' .*byte 255"),
]


@pytest.mark.parametrize(("spelling", "edit", "words"), BAD_FILES)
def test_what_does_not_fit_is_refused_and_changes_nothing(spelling, edit, words, tmp_path):
    tensors, config = raw(spelling), json.loads(json.dumps(CONFIGS[spelling]))
    model = small(spelling)
    before = snapshot(model)
    edit(tensors, config)
    path = write(tmp_path / "c", tensors, config)
    with pytest.raises(fp.BadCheckpoint, match=words) as error:
        fp.load_checkpoint(model, path, dequantize_experts=True)
    assert "allowed" in str(error.value)
    assert unchanged(model, before)


@pytest.mark.parametrize("spelling", FORMATS)
def test_the_same_file_without_the_fault_is_loaded(spelling, tmp_path):
    model = small(spelling)
    before = snapshot(model)
    fp.load_checkpoint(model, write(tmp_path / "c", raw(spelling), CONFIGS[spelling]), dequantize_experts=True)
    assert not unchanged(model, before)


def test_all_problems_that_headers_show_are_in_one_message(tmp_path):
    tensors = raw("quark") | {"norm.weight": torch.ones(3), "extra": torch.ones(1)}
    del tensors["down.bias"]
    with pytest.raises(fp.BadCheckpoint) as error:
        fp.load_checkpoint(Small(), write(tmp_path / "c", tensors, CONFIGS["quark"]))
    assert all(name in str(error.value) for name in ("'norm.weight'", "'extra'", "'down.bias'"))
    assert "which was not changed" in str(error.value)
    many = raw("quark") | {f"down{i}.bias": torch.ones(1) for i in range(30)}
    with pytest.raises(fp.BadCheckpoint, match=r"'down19.bias' and 18 more: got tensors that the model does not have"):
        fp.load_checkpoint(Small(), write(tmp_path / "d", many, CONFIGS["quark"]))


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    path = write(tmp_path / "c", raw("quark"), None)
    (path / "config.json").write_text('{"quantization_config": "quark"}')
    with pytest.raises(fp.BadCheckpoint, match=r"quantization_config: got 'quark', allowed a JSON object"):
        fp.open_checkpoint(path)


def test_hooks_and_subclasses_are_not_lost(tmp_path):
    path = write(tmp_path / "c", raw("quark"), CONFIGS["quark"])
    model = Small()
    hook = model.up.register_forward_hook(lambda *_: None)
    with pytest.raises(fp.BadCheckpoint, match=r"'up.weight' .*linear that has to stay: it has forward hooks"):
        fp.load_checkpoint(model, path)
    hook.remove()
    model.up = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 96, bias=False)
    with pytest.raises(fp.BadCheckpoint, match=r"'up.weight' .*parameter of NonDynamicallyQuantizableLinear"):
        fp.load_checkpoint(model, path)


def _doubled(linear):
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)


class ReadsItsWeight(Small):
    def forward(self, x):
        return super().forward(x.to(self.up.weight.dtype))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_doubled, "its forward was replaced"),
        (
            lambda linear: linear.register_buffer("extra", torch.ones(1), persistent=False),
            "it has more than a weight and a bias",
        ),
        (lambda linear: linear.add_module("lora", nn.Identity()), "it has more than a weight and a bias"),
        (lambda linear: linear.register_forward_pre_hook(lambda *_: None), "it has forward hooks"),
    ],
)
def test_what_a_new_linear_would_lose_is_not_lost(tmp_path, change, why, packed):
    path = write(tmp_path / "c", raw("quark"), CONFIGS["quark"])
    model = Small()
    if packed:
        fp.quantize_mxfp4(model, lambda name, module: name == "up")
    change(model.up)
    before = snapshot(model)
    with pytest.raises(fp.BadCheckpoint, match=rf"'up.weight' .*got MXFP4 for a linear that has to stay: {why}"):
        fp.load_checkpoint(model, path)
    assert unchanged(model, before)


def test_a_weight_that_the_model_reads_itself_is_not_taken_from_it(tmp_path):
    path = write(tmp_path / "c", raw("quark"), CONFIGS["quark"])
    with pytest.raises(fp.BadCheckpoint, match=r"'up.weight' .*has to stay: ReadsItsWeight reads its weight"):
        fp.load_checkpoint(ReadsItsWeight(), path)
    fp.load_checkpoint(Small(), path)


def test_a_prepared_model_is_prepared_after_a_load(tmp_path):
    path = write(tmp_path / "c", raw("quark"), CONFIGS["quark"])
    model, other = Small(), Small()
    fp.quantize_mxfp4(model, lambda name, module: name == "up")
    model.up.prepare()
    fp.load_checkpoint(model, path)
    fp.load_checkpoint(other, path)
    assert (model.up.layout, other.up.layout) == ("tiles", "linear")
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_what_a_dtype_does_not_hold_is_refused(tmp_path):
    model = Small()
    model.head.weight.data[0, 0] = 1e5
    fp.quantize_mxfp4(model, lambda name, module: name != "head")
    fp.save_checkpoint(model, tmp_path / "c", format="quark")
    other = Small()
    before = snapshot(other)
    with pytest.raises(fp.BadCheckpoint, match=r"got values up to 1e\+05, allowed up to 6.55e\+04 in torch.float16"):
        fp.load_checkpoint(other, tmp_path / "c", dtype=torch.float16)
    assert unchanged(other, before)
    fp.load_checkpoint(other, tmp_path / "c", dtype=torch.bfloat16)


def test_a_bias_that_the_layer_cannot_add_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(64, 32))
    fp.quantize_mxfp4(model)
    fp.save_checkpoint(model, tmp_path / "c", format="quark")
    (weights,) = (tmp_path / "c").glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors | {"0.bias": tensors["0.bias"].double()}, weights, metadata={"format": "pt"})
    with pytest.raises(fp.BadCheckpoint, match=r"'0.weight' .*bias: got torch.float64, allowed torch.bfloat16"):
        fp.load_checkpoint(nn.Sequential(nn.Linear(64, 32)), tmp_path / "c")


def test_a_module_without_a_shape_is_named(tmp_path):
    fp.save_checkpoint(Small(), tmp_path / "c", format="quark")
    model = Small()
    model.head = nn.LazyLinear(model.head.out_features, bias=False)
    with pytest.raises(fp.BadCheckpoint, match=r"'head.weight' .*got a LazyLinear that has no shape yet"):
        fp.load_checkpoint(model, tmp_path / "c")


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_files_that_changed_since_they_were_opened_are_refused(tmp_path, changed):
    path = write(tmp_path / "c", raw("quark"), CONFIGS["quark"])
    opened = fp.open_checkpoint(path)
    list(opened.items())
    os.utime(path / changed, ns=(1, 1))
    model = Small()
    before = snapshot(model)
    with pytest.raises(fp.BadCheckpoint, match=rf"{changed}: got a file that was changed after .*open it again"):
        fp.load_checkpoint(model, opened)
    assert unchanged(model, before)
    fp.load_checkpoint(model, fp.open_checkpoint(path))


def test_static_scales_of_a_cache_are_left_with_what_they_are_for(tmp_path):
    tensors = raw("quark") | {"up.output_scale": torch.ones(()), "attn.k_scale": torch.ones(())}
    config = copy.deepcopy(CONFIGS["quark"])
    path = write(tmp_path / "without", tensors, config)
    with pytest.raises(
        fp.BadCheckpoint, match=r"'attn.k_scale', 'up.output_scale': got tensors that the model does not"
    ):
        fp.load_checkpoint(Small(), path)
    config["kv_cache_quant_config"] = {"*up": {"output_tensors": {"dtype": "fp8_e4m3"}}}
    summary = fp.load_checkpoint(Small(), write(tmp_path / "with", tensors, config))
    assert summary.ignored == ["attn.k_scale", "up.output_scale"]
    assert summary.outputs


def test_a_configuration_of_a_part_is_written_for_all(tmp_path):
    fp.save_checkpoint(fp.quantize_mxfp4(Small()), tmp_path / "c", format="quark", config={"model_type": "x"})
    config = config_of(tmp_path / "c")
    config["text_config"] = {"layers": 1, "quantization_config": config.pop("quantization_config")}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    for form in ("quark", "compressed_tensors"):
        fp.save_checkpoint(fp.open_checkpoint(tmp_path / "c"), tmp_path / form, format=form)
        assert config_of(tmp_path / form)["text_config"] == {"layers": 1}
        assert fp.open_checkpoint(tmp_path / form).format == form


class HasExtraState(Small):
    def get_extra_state(self):
        return {"step": 3}

    def set_extra_state(self, state):
        pass


def test_extra_state_that_is_not_written_is_said(tmp_path, caplog):
    fp.save_checkpoint(HasExtraState(), tmp_path / "c", format="quark")
    assert "extra state is not written, because checkpoints hold tensors only: HasExtraState" in caplog.text
    caplog.clear()
    fp.save_checkpoint(Small(), tmp_path / "d", format="quark")
    assert "extra state" not in caplog.text


def test_a_buffer_that_is_another_one_too_is_filled_with_it(tmp_path):
    def model():
        made = nn.Module()
        made.register_buffer("kept", torch.randn(3))
        made.register_buffer("also", made.kept, persistent=False)
        made.linear = nn.Linear(64, 32)
        return fp.quantize_mxfp4(made)

    source, other = model(), model()
    fp.save_checkpoint(source, tmp_path / "c", format="quark")
    fp.load_checkpoint(other, tmp_path / "c")
    assert torch.equal(other.also, source.kept)


def test_a_configuration_without_groups_is_said_to_have_none(tmp_path):
    fp.save_checkpoint(fp.quantize_mxfp4(Small()), tmp_path, format="compressed_tensors")
    config = config_of(tmp_path)
    group = config["quantization_config"]["config_groups"]["group_0"]
    outputs = {"weights": None, "output_activations": {"type": "float", "num_bits": 8}, "targets": ["re:.*k_proj"]}
    config["quantization_config"]["config_groups"] = {"group_0": group, "group_1": outputs}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = fp.open_checkpoint(tmp_path)
    assert opened.act == "mxfp4"
    assert opened.outputs
    for groups in ({}, [], {"group_1": outputs}):
        config["quantization_config"]["config_groups"] = groups
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(fp.BadCheckpoint, match="config_groups: got no group that quantises weights, allowed one"):
            fp.open_checkpoint(tmp_path)


def test_names_of_any_script_and_length_are_written(tmp_path):
    path = tmp_path / ("模" * 80)
    fp.save_checkpoint(Small(), path, format="quark", config={"name": "été"})
    (path / "config.json").write_text(json.dumps(config_of(path), ensure_ascii=False), "utf-8")
    code = "import sys, fusionpasses as fp; print(ascii(fp.open_checkpoint(sys.argv[1]).config['name']))"
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code, "."], cwd=path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == ascii("été"), done.stderr


def test_an_index_of_nothing_is_damaged(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(fp.BadCheckpoint, match="got a weight_map without a tensor"):
        fp.open_checkpoint(tmp_path)


def test_a_weight_that_is_not_packed_does_not_fit_an_mxfp4_linear(tmp_path):
    model = Small()
    fp.quantize_mxfp4(model, lambda name, module: name == "head")
    before = snapshot(model)
    with pytest.raises(fp.BadCheckpoint, match=r"'head.weight' .*got a weight that is not MXFP4"):
        fp.load_checkpoint(model, write(tmp_path / "c", raw("quark"), CONFIGS["quark"]))
    assert unchanged(model, before)


# Activations


@pytest.mark.parametrize("spelling", ["quark", "compressed_tensors"])
def test_activations_are_those_of_the_configuration(spelling, tmp_path):
    def opened(*change):
        tensors, config = raw(spelling), json.loads(json.dumps(CONFIGS[spelling]))
        setting(*change)(tensors, config)
        return fp.open_checkpoint(write(tmp_path / str(change), tensors, config))

    where = INPUTS if spelling == "quark" else (*GROUP, "input_activations")
    eight = {"dtype": "fp8_e4m3"} if spelling == "quark" else {"num_bits": 8, "type": "float"}
    assert opened(*where, None).act == "none"
    assert opened(*where[:-1], "output_tensors", None).act == "mxfp4"
    wider = opened(*where, eight)
    assert wider.act == ("fp8_e4m3" if spelling == "quark" else "float8")
    with pytest.raises(fp.BadCheckpoint, match=r"got act '(fp8_e4m3|float8)' from its configuration.*with act="):
        fp.load_checkpoint(on_meta(Small), wider)
    assert fp.load_checkpoint(on_meta(Small), wider, act="mxfp4").act == "mxfp4"


FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
EIGHT = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    ("spelling", "change", "said"),
    [
        (
            "quark",
            {"layer_quant_config": {"*k_proj": {"weight": None, "output_tensors": FP8}}},
            "layer_quant_config['*k_proj'].output_tensors (fp8_e4m3)",
        ),
        (
            "quark",
            {"kv_cache_quant_config": {"*v_proj": {"output_tensors": FP8}}},
            "kv_cache_quant_config['*v_proj'].output_tensors (fp8_e4m3)",
        ),
        ("quark", {"kv_cache_quant_config": {"*v_proj": {"output_tensors": None}}}, None),
        ("quark", {"kv_cache_quant_config": None}, None),
        ("quark", {"softmax_quant_spec": FP8}, "softmax_quant_spec (fp8_e4m3)"),
        ("compressed_tensors", {"kv_cache_scheme": EIGHT}, "kv_cache_scheme (float8)"),
        ("compressed_tensors", {"kv_cache_scheme": None}, None),
        (
            "compressed_tensors",
            {
                "config_groups": {
                    "g": CONFIGS["compressed_tensors"]["config_groups"]["group_0"] | {"output_activations": EIGHT}
                }
            },
            "config_groups.g.output_activations (float8)",
        ),
    ],
)
def test_outputs_that_the_configuration_wants_quantised_are_said(spelling, change, said, tmp_path, caplog):
    """So a cache in fp8 is spelled; the weights are good without."""
    folder = write(tmp_path, raw(spelling), CONFIGS[spelling] | change)
    summary = fp.load_checkpoint(on_meta(Small), folder, progress=False)
    assert summary.outputs == ([said] if said else [])
    assert (f"not quantised, though the configuration wants it: {said}" in str(summary)) == bool(said)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [w.endswith(f"outputs are left as they are, though its configuration has {said}") for w in warnings] == [
        True
    ] * bool(said)
    caplog.clear()
    fp.save_checkpoint(fp.open_checkpoint(folder), tmp_path / "other", format=spelling)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [w.endswith(f"its entries for outputs are not written: {said}") for w in warnings] == [True] * bool(said)


def test_the_scale_mode_is_that_of_the_configuration(tmp_path):
    config = json.loads(json.dumps(CONFIGS["quark"]))
    config["global_quant_config"]["input_tensors"]["scale_calculation_mode"] = "floor"
    model = on_meta(Small)
    assert fp.load_checkpoint(model, write(tmp_path / "c", raw("quark"), config)).scale_mode == "floor"
    assert model.up.scale_mode == model.down.scale_mode == "floor"
    config["layer_quant_config"] = {"*up*": json.loads(json.dumps(CONFIGS["quark"]["global_quant_config"]))}
    path = write(tmp_path / "d", raw("quark"), config)
    with pytest.raises(fp.BadCheckpoint, match=r"different scale modes for different layers: even, floor"):
        fp.load_checkpoint(on_meta(Small), path)
    fp.load_checkpoint(on_meta(Small), path, scale_mode="rceil")


# Files


def sharded(tmp_path, **arguments):
    path = tmp_path / "sharded"
    opened = fp.open_checkpoint(write(tmp_path / "whole", raw("quark"), CONFIGS["quark"]))
    fp.save_checkpoint(opened, path, format="quark", **{"max_shard_bytes": 1, **arguments})
    return path, json.loads((path / "model.safetensors.index.json").read_text())


def test_codes_and_scales_in_different_files(tmp_path):
    path, index = sharded(tmp_path)
    assert index["weight_map"]["up.weight"] != index["weight_map"]["up.weight_scale"]
    tensors = raw("quark")
    opened = fp.open_checkpoint(path)
    assert torch.equal(opened.read("up.weight").scales, tensors["up.weight_scale"])
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1, "who can read one file can read all"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert sum(e.nbytes for e in opened.entries.values()) == index["metadata"]["total_size"]


def test_files_that_are_missing_damaged_or_mixed(tmp_path):
    path, index = sharded(tmp_path)
    file = path / index["weight_map"]["up.weight_scale"]
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(fp.BadCheckpoint, match=rf"{file.name}: got no such file.*'up.weight_scale' should be in it"):
        fp.open_checkpoint(path)
    for damaged in (content[:-1], content[:4], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(fp.BadCheckpoint, match=rf"{file.name}: got .* allowed a safetensors file; is it damaged"):
            fp.open_checkpoint(path)
    other = path / index["weight_map"]["norm.weight"]
    file.write_bytes(other.read_bytes())
    with pytest.raises(fp.BadCheckpoint, match=r"'norm.weight': got it in .*, allowed 'model-.*different checkpoints"):
        fp.open_checkpoint(path)
    save_file({}, file)
    with pytest.raises(fp.BadCheckpoint, match=r"'up.weight_scale': got no such tensor in model-"):
        fp.open_checkpoint(path)
    file.write_bytes(content)
    fp.open_checkpoint(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(fp.BadCheckpoint, match=r"got no weight_map"):
        fp.open_checkpoint(path)
    for text in ("{", "3"):
        (path / "config.json").write_text(text)
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(fp.BadCheckpoint, match=r"config.json: got .* is it damaged"):
            fp.open_checkpoint(path)


def test_what_is_no_mxfp4_checkpoint(tmp_path):
    with pytest.raises(fp.BadCheckpoint, match=r"got neither model.safetensors nor model.safetensors.index.json there"):
        fp.open_checkpoint(tmp_path)
    with pytest.raises(fp.BadCheckpoint, match=r"x.safetensors: got no such file"):
        fp.open_checkpoint(tmp_path / "x.safetensors")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(fp.BadCheckpoint, match=r"got no quantization_config and no MXFP4 tensor.*quantize_mxfp4"):
        fp.open_checkpoint(tmp_path)
    save_file(raw("quark") | raw("gpt_oss"), tmp_path / "model.safetensors")
    with pytest.raises(fp.BadCheckpoint, match=r"got those of 'gpt_oss' and of 'quark', allowed one format"):
        fp.open_checkpoint(tmp_path)
    opened = fp.open_checkpoint(write(tmp_path / "c", raw("quark"), None))
    with pytest.raises(fp.BadCheckpoint, match=r"'up': got no such tensor"):
        opened.read("up")
    with pytest.raises(fp.BadCheckpoint, match=r"'head.weight': got 'head.weight' \(BF16 .*allowed a weight \[N, K\]"):
        linear_from_checkpoint(opened, "head")


class Recorder:
    """Stands before safetensors' handle: what was read, and what of it is alive."""

    def __init__(self):
        self.read, self.alive, self.most = [], [], 0

    def wrap(self, handle):
        recorder = self

        class Handle:
            def __getattr__(self, name):
                return getattr(handle, name)

            def get_tensor(self, name):
                # What the reader hands out is a copy of this one: stand in for it.
                tensor = handle.get_tensor(name)
                recorder.read.append(name)
                recorder.alive.append(weakref.ref(tensor))
                recorder.most = max(recorder.most, sum(r() is not None for r in recorder.alive))
                return tensor

        return Handle()


@pytest.fixture
def recorder(monkeypatch):
    import contextlib

    recorder, real = Recorder(), _checkpoint_files.open_file

    @contextlib.contextmanager
    def open_file(*arguments):
        with real(*arguments) as handle:
            yield recorder.wrap(handle)

    monkeypatch.setattr(_checkpoint_files, "open_file", open_file)
    return recorder


def test_one_tensor_is_in_memory_at_a_time(recorder, tmp_path):
    path, _ = sharded(tmp_path)
    opened = fp.open_checkpoint(path)
    recorder.read.clear()
    assert len(opened) == 6
    yielded, items = [], opened.items()
    for i in range(len(opened)):
        assert len(recorder.read) == sum(1 + e.quantized for e in list(opened.entries.values())[:i])
        name, tensor = next(items)
        assert name == list(opened)[i]
        yielded.append(weakref.ref(tensor))
        del tensor
        assert yielded[-1]() is None, f"the reader keeps {name}"
    assert recorder.most <= 2, "codes and scales"
    recorder.most = 0
    fp.load_checkpoint(on_meta(Small), path)
    assert recorder.most <= 2


def test_what_is_loaded_does_not_depend_on_the_file(tmp_path):
    tensors = raw("quark")
    path = write(tmp_path / "c", tensors, CONFIGS["quark"])
    model = on_meta(Small)
    fp.load_checkpoint(model, path)
    with (path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (path / "model.safetensors").stat().st_size)
    assert torch.equal(model.up.weight_packed, tensors["up.weight"])
    assert torch.equal(model.head.weight, tensors["head.weight"])


def test_progress(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "c", raw("quark"), CONFIGS["quark"])
    fp.load_checkpoint(on_meta(Small), path)
    assert capsys.readouterr().err == "", "stderr is no terminal"
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fp.load_checkpoint(on_meta(Small), path, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fp.load_checkpoint(on_meta(Small), path)
    assert "checkpoint: 100%" in capsys.readouterr().err


def test_packages_that_are_missing_are_named():
    from test_structure import BLOCKER, run_python

    code = BLOCKER.format(blocked=("safetensors", "tqdm", "transformers")) + (
        "import fusionpasses as fp\n"
        "try: fp.open_checkpoint('x.safetensors')\n"
        "except fp.BadCheckpoint as error: print(error)\n"
        f"try: fp.open_checkpoint({str(QUARK)!r})\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    result = run_python(code)
    lines = result.stdout.splitlines()
    assert "got no such file" in lines[0], result.stderr
    assert "safetensors: got no such package" in lines[1]
    assert "pip install 'fusionpasses[checkpoints]'" in lines[1]


# Round trips

rows = st.integers(1, 4)
blocks = st.integers(1, 3)
plain_dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int64])


@st.composite
def checkpoints(draw):
    spelling = draw(st.sampled_from(sorted(FORMATS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    tensors = {}
    for i in range(draw(st.integers(1, 4))):
        lead = [draw(rows)] if spelling == "gpt_oss" or draw(st.booleans()) else []
        shape, k = [*lead, draw(rows)], draw(blocks)
        end = "" if spelling == "gpt_oss" else ".weight"
        packed = integers(0, 256, [*shape, k * 16]).byte(), integers(0, 255, [*shape, k]).byte()
        tensors[f"layers.{i}.proj{end}"] = Mxfp4Weight(*packed)
    for i in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = draw(st.sampled_from(["norm.weight", "bias", "table"]))
        tensors[f"plain.{i}.{end}"] = integers(-9, 9, shape).to(draw(plain_dtypes))
    order = draw(st.permutations(list(tensors)))
    return spelling, {name: tensors[name] for name in order}


@hypothesis.settings(max_examples=60, deadline=None)
@given(checkpoints(), st.integers(1, 300), st.booleans())
def test_what_is_written_is_read(tmp_path_factory, checkpoint, max_shard_bytes, as_pairs):
    spelling, tensors = checkpoint
    path = tmp_path_factory.mktemp("c") / "new" / "checkpoint"
    source = iter(tensors.items()) if as_pairs else tensors
    act = "none" if spelling == "gpt_oss" else "mxfp4"
    fp.save_checkpoint(
        source, path, format=spelling, act=act, max_shard_bytes=max_shard_bytes, config={"model_type": "x"}
    )
    opened = fp.open_checkpoint(path)
    assert opened.format == spelling
    assert opened.config["model_type"] == "x"
    assert set(opened) == set(tensors)
    assert all(same(tensor, tensors[name]) for name, tensor in opened.items())
    for file in path.glob("*.safetensors"):
        held = load_file(file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= max_shard_bytes
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint"], "nothing else is left there"
    excluded = {n.removesuffix(".weight") for n, t in tensors.items() if n.endswith("norm.weight") and len(t.shape) > 1}
    assert set(opened.excluded) == excluded
    # Through the two others, where they have these shapes, and back.
    if spelling != "gpt_oss":
        other = {"quark": "compressed_tensors", "compressed_tensors": "quark"}[spelling]
        fp.save_checkpoint(opened, path.parent / "other", format=other)
        fp.save_checkpoint(fp.open_checkpoint(path.parent / "other"), path.parent / "back", format=spelling)
        back = fp.open_checkpoint(path.parent / "back")
        assert (back.act, back.scale_mode, set(back.excluded)) == (opened.act, opened.scale_mode, excluded)
        assert all(same(tensor, tensors[name]) for name, tensor in back.items())


@pytest.mark.parametrize("spelling", ["quark", "compressed_tensors"])
@pytest.mark.parametrize("act", ["mxfp4", "none"])
def test_the_configuration_written_is_that_of_the_library(spelling, act, tmp_path):
    fp.save_checkpoint({"a.weight": Mxfp4Weight(codes(4, 16), scales(4, 1))}, tmp_path / "c", format=spelling, act=act)
    written = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    theirs = json.loads(json.dumps(CONFIGS[spelling]))

    def agree(ours, theirs, where=""):
        for key, value in ours.items():
            if where + key not in ("exclude", "ignore"):
                assert key in theirs, where + key
                if isinstance(value, dict):
                    agree(value, theirs[key], f"{where}{key}.")
                elif key in ("input_tensors", "input_activations") and act == "none":
                    assert value is None
                else:
                    assert value == theirs[key], where + key

    theirs |= {"global_compression_ratio": None, "kv_cache_scheme": None, "sparsity_config": {}}
    agree(written, theirs)
    assert fp.open_checkpoint(tmp_path / "c").act == act


TENSORS = {"a.weight": Mxfp4Weight(codes(4, 16), scales(4, 1))}


def test_existing_checkpoints_are_kept_unless_told_otherwise(tmp_path):
    path, _ = sharded(tmp_path)
    (path / "tokenizer.json").write_text("{}")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    tensors = {"a.weight": Mxfp4Weight(codes(4, 16), scales(4, 1))}
    with pytest.raises(fp.BadCheckpoint, match=r"got model.safetensors.index.json in it.*overwrite=True replaces it"):
        fp.save_checkpoint(tensors, path, format="quark", act="mxfp4")

    def fails():
        yield "a.weight", tensors["a.weight"]
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        fp.save_checkpoint(fails(), path, format="quark", act="mxfp4", overwrite=True)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert not list(tmp_path.glob(".*"))
    fp.save_checkpoint(tensors, path, format="quark", act="mxfp4", overwrite=True)
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert not list(tmp_path.glob(".*"))
    assert list(fp.open_checkpoint(path)) == ["a.weight"]


@pytest.mark.parametrize("sharded", [False, True])
def test_an_error_while_files_are_replaced_brings_the_old_ones_back(tmp_path, monkeypatch, sharded):
    path = tmp_path / "model"
    old = {f"{name}.weight": Mxfp4Weight(codes(4, 16), scales(4, 1)) for name in "ab"}
    fp.save_checkpoint(old, path, format="quark", act="mxfp4", max_shard_bytes=40 if sharded else 10**9)
    (path / "tokenizer.json").write_text("{}")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    assert ("model.safetensors" in before) is not sharded
    rename, left = pathlib.Path.rename, [0]

    def fails(self, target):
        if pathlib.Path(target).parent == path or pathlib.Path(target).parent.suffix == ".old":
            left[0] -= 1
            if left[0] == 0:
                raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails)
    # Each rename in turn is the one that fails: first those of the old files, then those of the new.
    for stop in range(1, 2 * len(before)):
        left[0] = stop
        try:
            fp.save_checkpoint(TENSORS, path, format="quark", act="mxfp4", overwrite=True)
        except OSError:
            assert {p.name: p.read_bytes() for p in path.iterdir()} == before
            assert [p.name for p in tmp_path.iterdir()] == ["model"]
        else:
            break
    assert stop == len(before) - 1 + 2 + 1  # old files but the tokenizer's, the new model and config; then none fails
    assert list(fp.open_checkpoint(path)) == ["a.weight"]


def test_an_interrupt_after_a_file_was_placed_brings_the_old_ones_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    fp.save_checkpoint(
        {f"{name}.weight": TENSORS["a.weight"] for name in "ab"}, path, format="quark", act="none", max_shard_bytes=40
    )
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    rename = pathlib.Path.rename

    def interrupted(self, target):
        rename(self, target)
        if pathlib.Path(target) == path / "model.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fp.save_checkpoint(TENSORS, path, format="quark", act="mxfp4", overwrite=True)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00004.safetensors"])
def test_files_are_replaced_only_if_told_so(tmp_path, name):
    (tmp_path / name).write_text("{}")
    big = {f"{n}.weight": TENSORS["a.weight"] for n in "ab"}
    with pytest.raises(fp.BadCheckpoint, match=f"got {name} in it.*overwrite=True"):
        fp.save_checkpoint(big, tmp_path, format="quark", act="mxfp4", max_shard_bytes=40)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"
    fp.save_checkpoint(big, tmp_path, format="quark", act="mxfp4", max_shard_bytes=40, overwrite=True)
    assert len(fp.open_checkpoint(tmp_path)) == 2


def test_a_checkpoint_that_came_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "model"

    def meanwhile():
        yield "a.weight", TENSORS["a.weight"]
        fp.save_checkpoint({"theirs.weight": TENSORS["a.weight"]}, path, format="quark", act="mxfp4")

    with pytest.raises(fp.BadCheckpoint, match=r"got model.safetensors in it"):
        fp.save_checkpoint(meanwhile(), path, format="quark", act="mxfp4")
    assert list(fp.open_checkpoint(path)) == ["theirs.weight"]
    assert not list(tmp_path.glob(".*"))
    fp.save_checkpoint(meanwhile_too(path), path, format="quark", act="mxfp4", overwrite=True)
    assert list(fp.open_checkpoint(path)) == ["a.weight"]


def meanwhile_too(path):
    yield "a.weight", TENSORS["a.weight"]
    theirs = {"theirs.weight": TENSORS["a.weight"]}
    fp.save_checkpoint(theirs, path, format="compressed_tensors", act="none", overwrite=True)


WRITER = """
import sys, pathlib, torch, fusionpasses as fp
from fusionpasses.nn.checkpoint_reader import Mxfp4Weight
path, tag, format, shard = sys.argv[1:]
weight = Mxfp4Weight(torch.zeros(4, 16, dtype=torch.uint8), torch.full((4, 1), 127, dtype=torch.uint8))
folder = pathlib.Path(path).parent
(folder / f"{tag} is ready").touch()
while not (folder / "go").exists():
    pass
for _ in range(40):
    fp.save_checkpoint(
        {f"{tag}{i}.weight": weight for i in range(3)}, path, format=format, act="none", max_shard_bytes=int(shard),
        overwrite=True,
    )
"""


def test_two_processes_that_write_at_once_leave_one_whole_checkpoint(tmp_path):
    path = tmp_path / "model"
    fp.save_checkpoint(TENSORS, path, format="quark", act="mxfp4")
    arguments = (("a", "quark", "1000000"), ("b", "compressed_tensors", "80"))
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), *given], stderr=subprocess.PIPE, text=True)
        for given in arguments
    ]
    while len(list(tmp_path.glob("* is ready"))) < 2 and all(writer.poll() is None for writer in writers):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for writer in writers:
        assert writer.wait(120) == 0, writer.stderr.read()
    left = fp.open_checkpoint(path)
    assert sorted(left) in (["a0.weight", "a1.weight", "a2.weight"], ["b0.weight", "b1.weight", "b2.weight"])
    dict(left.items())
    assert not list(path.glob(".*"))


def test_a_folder_behind_a_link_and_a_damaged_index_can_be_written_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "model").symlink_to(elsewhere)
    (elsewhere / "sub").mkdir()
    (elsewhere / "tokenizer.json").write_text("{}")
    for index in (
        "no json",
        "[]",
        '{"weight_map": null}',
        '{"weight_map": {"a": "tokenizer.json", "b": "..", "c": 3}}',
    ):
        (elsewhere / "model.safetensors.index.json").write_text(index)
        fp.save_checkpoint(TENSORS, tmp_path / "model", format="quark", act="mxfp4", overwrite=True)
        names = {p.name for p in elsewhere.iterdir()}
        assert names == {"model.safetensors", "config.json", "tokenizer.json", "sub"}
    assert (tmp_path / "model").is_symlink()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(fp.UnsupportedInput, match="allowed a folder"):
        fp.save_checkpoint(TENSORS, tmp_path / "nowhere", format="quark", act="mxfp4")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/outside.safetensors", "tokenizer.json", ""])
def test_an_index_names_files_of_its_folder_only(tmp_path, file):
    fp.save_checkpoint(TENSORS, tmp_path / "model", format="quark", act="mxfp4")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"a.weight": file, "a.weight_scale": file}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(fp.BadCheckpoint, match=r"'a.weight': got .*allowed a .safetensors file of the same folder"):
        fp.open_checkpoint(tmp_path / "model")


def config_of(path: pathlib.Path) -> dict:
    return json.loads((path / "config.json").read_text())


def test_the_configuration_of_a_part_of_the_model_is_read(tmp_path):
    fp.save_checkpoint(TENSORS, tmp_path, format="compressed_tensors", act="none")
    quantization = config_of(tmp_path)["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": quantization}}))
    assert fp.open_checkpoint(tmp_path).act == "none"
    other = {**quantization, "ignore": ["lm_head"]}
    both = {"quantization_config": other, "text_config": {"quantization_config": quantization}}
    (tmp_path / "config.json").write_text(json.dumps(both))
    with pytest.raises(fp.BadCheckpoint, match="got several that differ"):
        fp.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("compressed_tensors", {"config_groups": {"group_0": ["Linear"]}}),
        ("compressed_tensors", {"ignore": ["re:(*"]}),
        ("quark", {"algo_config": {"r4": True}}),
    ],
)
def test_a_configuration_that_cannot_be_read_is_damaged(tmp_path, form, change):
    fp.save_checkpoint(TENSORS, tmp_path, format=form, act="mxfp4")
    config = config_of(tmp_path)
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(fp.BadCheckpoint, match="quantization_config"):
        fp.open_checkpoint(tmp_path)


def test_arguments_of_another_kind_are_refused(tmp_path):
    fp.save_checkpoint(TENSORS, tmp_path, format="quark", act="mxfp4")
    with pytest.raises(fp.BadCheckpoint, match="'x': got no such tensor"):
        list(fp.open_checkpoint(tmp_path).items(["x"]))
    with pytest.raises(fp.UnsupportedInput, match=r"checkpoint: got str, allowed a Checkpoint; open_checkpoint"):
        fp.Mxfp4Linear.from_checkpoint(str(tmp_path), "a")
    with pytest.raises(fp.UnsupportedInput, match="source: got 'hello'"):
        fp.save_checkpoint("hello", tmp_path / "b", format="quark", act="mxfp4")
    with pytest.raises(fp.UnsupportedInput, match="device: got meta"):
        fp.load_checkpoint(torch.nn.Sequential(), tmp_path, device="meta")


def test_buffers_of_no_dimension_are_computed(tmp_path):
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=64,
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    fp.quantize_mxfp4(model)
    fp.save_checkpoint(model, tmp_path, format="quark")
    with torch.device("meta"):
        loaded = transformers.Gemma3ForCausalLM(config).eval()
    fp.load_checkpoint(loaded, tmp_path, progress=False)
    tokens = torch.arange(4)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        (TENSORS, {"format": "gguf"}, r"format: got 'gguf', allowed 'quark', 'gpt_oss', 'compressed_tensors'"),
        (TENSORS, {"format": "gpt_oss"}, r"'a.weight': got an MXFP4 weight of shape \[4, 32\], allowed experts"),
        (TENSORS, {"max_shard_bytes": 0}, r"max_shard_bytes: got 0"),
        (TENSORS, {"act": "fp8"}, r"act: got 'fp8', allowed 'mxfp4', 'none'"),
        (TENSORS, {"act": "mxfp4", "format": "gpt_oss"}, r"act: got 'mxfp4', allowed 'none': 'gpt_oss' cannot say"),
        (TENSORS, {"scale_mode": "rceil"}, r"scale_mode: got 'rceil', allowed 'even', 'floor', 'ceil'"),
        (TENSORS, {"scale_mode": "floor", "format": "compressed_tensors"}, r"scale_mode: got 'floor', allowed 'even'"),
        (TENSORS, {"act": None}, r"act: got None with names and tensors, allowed 'mxfp4' or 'none': are the inputs of"),
        (iter(TENSORS.items()), {"act": None, "format": "compressed_tensors"}, r"act: got None with names and tensors"),
        (TENSORS, {"config": "abc"}, r"config: got str, allowed a mapping"),
        ({"a": TENSORS["a.weight"]}, {}, r"'a': got an MXFP4 weight of this name, allowed names that end in '.weight'"),
        ({"a.weight": 3}, {}, r"'a.weight': got int, allowed an Mxfp4Weight"),
        ({"a.weight": torch.ones(2, device="meta")}, {}, r"'a.weight': got torch.float32 on meta"),
        ({"a.weight": torch.ones(2, 2).to_sparse()}, {}, r"'a.weight': got torch.sparse_coo, allowed an Mxfp4Weight"),
        (
            {"a.weight": Mxfp4Weight(codes(4, 16).to("meta"), scales(4, 1))},
            {},
            r"'a.weight': got Mxfp4Weight on meta, allowed",
        ),
        ([("a.weight", codes(4, 16), 3)], {}, r"source: got \(str, Tensor, int\), allowed pairs of"),
        ({3: codes(4, 16)}, {}, r"source: got \(int, Tensor\), allowed pairs of a name and a tensor"),
        ({"a.weight": torch.ones(2).to(torch.float8_e5m2)}, {}, r"'a.weight': got torch.float8_e5m2 on cpu"),
        ([*TENSORS.items(), *TENSORS.items()], {}, r"'a.weight': got it twice"),
        ({}, {}, r"got no tensors"),
        (3, {}, r"source: got int, allowed a module, a Checkpoint"),
        ({**TENSORS, "b.weight_scale": torch.ones(2)}, {}, r"'b.weight_scale' .*got scales without codes"),
        ({"a.weight": Mxfp4Weight(codes(4, 16), scales(4, 1) | 255)}, {}, r"'a.weight': got the scale byte 255"),
    ],
)
def test_what_cannot_be_written_is_refused(source, arguments, words, tmp_path):
    with pytest.raises((fp.UnsupportedInput, fp.BadCheckpoint), match=words):
        fp.save_checkpoint(
            source,
            tmp_path / "c",
            **{"format": "quark", "act": None if "format" in arguments else "mxfp4", **arguments},
        )
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_two_scale_modes_is_refused(tmp_path):
    model = Small()
    model.up = fp.Mxfp4Linear.from_linear(model.up, scale_mode="floor")
    model.down = fp.Mxfp4Linear.from_linear(model.down)
    with pytest.raises(fp.UnsupportedInput, match=r"scale modes \['even', 'floor'\], allowed one of each"):
        fp.save_checkpoint(model, tmp_path / "c", format="quark")
    model.down = fp.Mxfp4Linear.from_linear(nn.Linear(96, 64), scale_mode="floor")
    fp.save_checkpoint(model, tmp_path / "c", format="quark")
    assert fp.open_checkpoint(tmp_path / "c").scale_mode == "floor"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": 3}, "model: got int"),
        ({"model": nn.Linear(64, 64)}, "cannot be replaced in place"),
        ({"dtype": torch.int8}, "dtype: got torch.int8"),
        ({"ignore": "mtp.*"}, "ignore: got 'mtp.*', allowed a list of patterns"),
        ({"act": "fp8"}, "act: got 'fp8', allowed 'mxfp4', 'none', or None"),
        ({"scale_mode": "up"}, "scale_mode: got 'up'"),
    ],
)
def test_bad_arguments_are_refused(arguments, words, tmp_path):
    path = write(tmp_path / "c", raw("quark"), CONFIGS["quark"])
    with pytest.raises(fp.UnsupportedInput) as error:
        fp.load_checkpoint(**{"model": Small(), "checkpoint": path, **arguments})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("packed", "exponents", "words"),
    [
        (torch.zeros(4, 16), scales(4, 1), "codes: got torch.float32"),
        (codes(16), scales(1), "codes: got torch.uint8 (16,)"),
        (codes(4, 16), torch.ones(4, 1), "scales: got torch.float32"),
        (codes(4, 16), scales(4, 2), "scales: got shape (4, 2) for codes (4, 16)"),
        (codes(4, 8), scales(4, 0), "scales: got shape (4, 0)"),
        (codes(4, 0), scales(4, 0), "K a positive multiple of 32"),
        (3, scales(4, 1), "codes: got int"),
    ],
)
def test_bad_weights_are_refused(packed, exponents, words):
    with pytest.raises(fp.UnsupportedInput) as error:
        Mxfp4Weight(packed, exponents)
    assert words in str(error.value)
