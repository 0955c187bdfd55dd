"""Mxfp4Linear and quantize_mxfp4: what they compute, what they leave, and that nothing is lost on an error."""

import copy

import pytest
import torch
import transformers
from torch import nn

import fusionpasses as fp
from fusionpasses.nn import _compiled
from fusionpasses.ops import _mxfp4

ours = torch.ops.fusionpasses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", _mxfp4.SCALE_ADDEND)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_quant_then_gemm(dtype, mode, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias, dtype=dtype)
    layer = fp.Mxfp4Linear.from_linear(linear, scale_mode=mode)
    x = torch.randn(2, 3, 96, dtype=dtype)
    with torch.no_grad():
        got = layer(x)
        w = _mxfp4.dequantize(*ours.dynamic_mxfp4_quant(linear.weight, mode))
        a = _mxfp4.dequantize(*ours.dynamic_mxfp4_quant(x, mode))
        exact = a @ w.T + (linear.bias.float() if bias else 0)
        assert got.dtype == dtype
        assert torch.equal(got, exact.to(dtype))
        # Four bits are coarse, but the layer must still be that layer.
        error = (got - linear(x)).float().norm() / linear(x).float().norm()
    assert error < 0.3


def test_state_dict_deepcopy_and_device_moves_keep_the_bytes():
    layer = fp.Mxfp4Linear.from_linear(nn.Linear(64, 32))
    x = torch.randn(4, 64)
    other = fp.Mxfp4Linear.from_linear(nn.Linear(64, 32))
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), layer.to("cpu")):
        assert torch.equal(same(x), layer(x))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in layer.state_dict().items()} == {
        "weight_packed": (torch.uint8, (32, 32)),
        "weight_scale": (torch.uint8, (32, 2)),
        "bias": (torch.float32, (32,)),
    }
    # A cast of the model must not touch packed bytes.
    assert layer.to(torch.bfloat16).weight_packed.dtype == torch.uint8
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.empty(4, 64, device="meta", dtype=torch.bfloat16)).shape == (4, 32)


def test_export():
    model = fp.quantize_mxfp4(nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 32)))
    x = torch.randn(4, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        assert torch.equal(exported.module()(x), model(x))
    names = [str(n.target) for n in exported.graph.nodes]
    assert "fusionpasses.dynamic_mxfp4_quant.default" in names


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = self.a
        self.gate = nn.Linear(64, 4)
        self.narrow = nn.Linear(40, 8)
        self.hooked = nn.Linear(64, 64)
        self.hooked.register_forward_hook(lambda *_: None)
        self.special = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 64)
        self.embed = nn.Embedding(8, 64)
        self.norm = nn.LayerNorm(64)
        self.conv = nn.Conv1d(4, 4, 3)
        self.lm_head = nn.Linear(64, 8)

    def forward(self, x):
        return self.b(self.a(x))


def test_what_is_left_and_why():
    model = Tied()
    assert fp.quantize_mxfp4(model) is model
    summary = fp.last_quantization()
    assert summary.quantized == ["a"]
    assert isinstance(model.a, fp.Mxfp4Linear)
    assert model.a is model.b, "a linear under two names stays one"
    assert summary.left == {
        "gate": "a router, which MXFP4 checkpoints keep in high precision",
        "narrow": "in_features is not a multiple of 32",
        "hooked": "it has forward hooks, which a new module would lose",
        "special": "not nn.Linear",
        "conv": "not nn.Linear",
        "lm_head": "the output projection, which MXFP4 checkpoints keep in high precision",
    }
    text = str(summary)
    assert text.startswith("quantize_mxfp4: 1 modules quantised, 6 left")
    assert "not nn.Linear: special, conv" in text


class Holder(nn.Module):
    """With modules under the names given; they may be the same one twice."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def left_of(model: nn.Module) -> dict[str, str]:
    fp.quantize_mxfp4(model)
    return {name: reason.split(",")[0] for name, reason in fp.last_quantization().left.items()}


def test_a_router_below_its_name_is_a_router():
    model = Holder(
        router=Holder(classifier=nn.Linear(64, 4)), gate=Holder(wg=nn.Linear(64, 4)), gated=nn.Linear(64, 64)
    )
    assert left_of(model) == {"router.classifier": "a router", "gate.wg": "a router"}
    assert isinstance(model.gated, fp.Mxfp4Linear)


def test_adapters_are_left() -> None:
    """As peft names them; what they adapt is quantised."""
    adapted = Holder(
        base_layer=nn.Linear(64, 64),
        lora_A=nn.ModuleDict({"default": nn.Linear(64, 32, bias=False)}),
        lora_B=nn.ModuleDict({"default": nn.Linear(32, 64, bias=False)}),
    )
    model = Holder(q_proj=adapted, lora_Alpha=nn.Linear(64, 64))
    assert left_of(model) == {f"q_proj.lora_{half}.default": "a LoRA adapter" for half in "AB"}
    assert fp.last_quantization().quantized == ["q_proj.base_layer", "lora_Alpha"]


def test_an_output_is_one_under_any_of_its_names_and_where_it_is_the_embedding():
    embedding, tied, proj = nn.Embedding(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
    tied.weight = embedding.weight
    model = Holder(embedding=embedding, output=tied, proj=proj, lm_head=proj, up=nn.Linear(64, 64))
    assert left_of(model) == {"output": "the output projection", "proj": "the output projection"}
    assert model.proj is model.lm_head
    assert model.output.weight is model.embedding.weight
    model = Holder(proj=proj, second=proj)
    fp.quantize_mxfp4(model, lambda name, _: name != "second")
    assert fp.last_quantization().left == {"proj": "the filter said no"}


@pytest.mark.parametrize("part", ["wrapped", "layers", "attention"])
def test_attention_of_gpt_oss_is_known_in_a_part_of_the_model(part):
    config = transformers.GptOssConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_local_experts=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=64,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    layers = model.model.layers
    model = {"wrapped": Holder(model=model), "layers": layers, "attention": layers[0].self_attn}[part]
    left = left_of(model)
    assert sum(reason == "attention of GPT-OSS" for reason in left.values()) == 4
    assert not fp.last_quantization().quantized


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)
        nn.init.zeros_(self.up.weight)  # who only sets it up does not read it

    def forward(self, x):
        return self.down(self.up(x).to(self.down.weight.dtype))


def test_a_linear_whose_weight_another_module_reads_is_left():
    model = ReadsWeight()
    assert left_of(model) == {"down": "ReadsWeight reads its weight"}
    assert isinstance(model.up, fp.Mxfp4Linear)
    with torch.no_grad():
        model(torch.randn(2, 64))
        torch_layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
        assert left_of(torch_layer)["linear1"] == "TransformerEncoderLayer reads its weight"
        torch_layer(torch.randn(1, 4, 64))
    # A filter decides what is to be quantised, not what can be.
    fp.quantize_mxfp4(model, lambda *_: True)
    assert type(model.down) is nn.Linear


class ReadsWeightsFarBelow(nn.Module):
    """As transformers' Qwen2-VL asks for its own dtype."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Holder(mlp=Holder(fc1=nn.Linear(64, 64), fc2=nn.Linear(64, 64))) for _ in range(2))
        self.heads = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
        self.many = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    @property
    def dtype(self):
        return self.blocks[0].mlp.fc2.weight.dtype

    def forward(self, x, i):
        return x.to(self.dtype) @ self.heads["b"].weight + self.many[i].weight


@torch.no_grad()
def test_a_weight_that_is_read_far_below_or_by_its_place_is_left():
    model = Holder(visual=ReadsWeightsFarBelow())
    why = "ReadsWeightsFarBelow reads its weight"
    names = "blocks.0.mlp.fc2", "heads.b", "many.0", "many.1"
    assert left_of(model) == {f"visual.{name}": why for name in names}
    assert fp.last_quantization().quantized == [
        f"visual.{name}" for name in ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "heads.a")
    ]
    model.visual(torch.randn(64, 64), 1)
    compiled = Holder(visual=torch.compile(ReadsWeightsFarBelow(), backend="eager"))
    assert left_of(compiled) == {f"visual.{name}": why for name in names}


@torch.no_grad()
def test_compiled_modules() -> None:
    """By the names that they have without torch.compile; a linear that was compiled by itself would go on to run."""
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    model = torch.compile(nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))), backend="eager")
    seen = []
    before = model(x)
    assert fp.quantize_mxfp4(model, lambda name, _: not seen.append(name)) is model
    assert fp.last_quantization().quantized == seen == ["0", "1.0"]
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), model._orig_mod(x))

    alone = nn.Sequential(torch.compile(nn.Linear(64, 64), backend="eager"), nn.Linear(64, 64))
    assert left_of(alone) == {"0": "torch.compile was given it by itself"}
    assert torch.equal(alone(x), alone[1](alone[0]._orig_mod(x)))
    with pytest.raises(fp.UnsupportedInput, match=r"got an nn\.Linear"):
        fp.quantize_mxfp4(torch.compile(nn.Linear(64, 64), backend="eager"))
    assert _compiled.unwrapped(torch.compile(empty := nn.Sequential(), backend="eager")) is empty


def test_what_a_new_module_would_lose_is_left():
    replaced, buffered, nested, lazy = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.LazyLinear(64)
    replaced.forward = lambda x: x
    buffered.register_buffer("smooth", torch.ones(64))
    nested.adapter = nn.Linear(64, 8)
    model = Holder(replaced=replaced, buffered=buffered, nested=nested, lazy=lazy, plain=nn.Linear(64, 64))
    assert left_of(model) == {
        "replaced": "its forward was replaced",
        "buffered": "it has more than a weight and a bias",
        "nested": "it has more than a weight and a bias",
        "lazy": "it is not initialised yet",
    }
    assert fp.last_quantization().quantized == ["nested.adapter", "plain"]

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for linear in (replaced, Doubled(64, 64)):
        with pytest.raises(fp.UnsupportedInput, match="with a forward of its own, which would be lost"):
            fp.Mxfp4Linear.from_linear(linear)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_linear_is_refused_for_what_quantize_leaves_it():
    hooked, normed = nn.Linear(64, 64), nn.utils.weight_norm(nn.Linear(64, 64))
    hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 100,))
    for linear, why in ((hooked, "it has forward hooks"), (normed, "it has more than a weight and a bias")):
        with pytest.raises(fp.UnsupportedInput, match=f"linear: got one of which {why}"):
            fp.Mxfp4Linear.from_linear(linear)
    # Twin: a parametrised weight is a weight.
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    with torch.no_grad():
        parametrised.parametrizations.weight.original0.mul_(10)
    plain = nn.Linear(64, 64)
    plain.weight, plain.bias = nn.Parameter(parametrised.weight.detach()), parametrised.bias
    x = torch.randn(2, 64)
    assert torch.equal(fp.Mxfp4Linear.from_linear(parametrised)(x), fp.Mxfp4Linear.from_linear(plain)(x))


def test_a_bias_that_no_call_takes_is_not_quantised():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].bias = nn.Parameter(model[0].bias.detach().double())
    assert left_of(model) == {"0": "the bias is torch.float64"}
    with pytest.raises(fp.UnsupportedInput, match=r"bias: got torch\.float64, allowed torch\.bfloat16"):
        fp.Mxfp4Linear.from_linear(model[0])


def test_a_filter_alone_decides():
    model = Tied()
    fp.quantize_mxfp4(model, lambda name, module: name in ("gate", "lm_head", "narrow"))
    assert fp.last_quantization().quantized == ["gate", "lm_head"]
    assert fp.last_quantization().left["a"] == "the filter said no"
    assert fp.last_quantization().left["narrow"] == "in_features is not a multiple of 32"


def test_a_bad_weight_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[3, 5] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fp.UnsupportedInput, match=r"module '1': linear.weight: got Inf or NaN"):
        fp.quantize_mxfp4(model)
    assert all(type(m) is nn.Linear for m in model)
    assert all(torch.equal(v, before[k]) or k == "1.weight" for k, v in model.state_dict().items())


def test_nothing_quantised_is_said(caplog):
    fp.quantize_mxfp4(nn.Sequential(nn.Linear(40, 8)))
    assert "quantised nothing" in caplog.text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fp.quantize_mxfp4(nn.Linear(64, 64)), "cannot be replaced in place"),
        (lambda: fp.quantize_mxfp4(nn.Sequential(nn.Linear(64, 64)), scale_mode="up"), "scale_mode: got 'up'"),
        (lambda: fp.quantize_mxfp4(3), "model: got int"),
        (lambda: fp.quantize_mxfp4(nn.Sequential(nn.Linear(64, 64)), "l"), "filter: got 'l'"),
        (lambda: fp.quantize_mxfp4(nn.Sequential(nn.Linear(64, 64)), scale_mode=["even"]), "scale_mode: got ['even']"),
        (lambda: fp.Mxfp4Linear.from_linear(nn.ReLU()), "linear: got ReLU"),
        (lambda: fp.Mxfp4Linear.from_linear(nn.Linear(64, 8))(torch.randn(4, 32)), "with x 32 wide, allowed [N, 16]"),
        (lambda: fp.Mxfp4Linear.from_linear(nn.Linear(40, 8)), "linear.weight: got shape (8, 40)"),
        (lambda: fp.Mxfp4Linear(torch.zeros(4, 32), torch.zeros(4, 2)), "weight_packed: got torch.float32"),
        (
            lambda: fp.Mxfp4Linear(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8)),
            "weight_scale: got (4, 1) for weight_packed (4, 32)",
        ),
        (
            lambda: fp.Mxfp4Linear(
                torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8), torch.zeros(3)
            ),
            "bias: got shape (3,), allowed (4,)",
        ),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises(fp.UnsupportedInput) as error:
        make()
    assert words in str(error.value)


def test_an_input_that_requires_grad_is_refused_not_cut_off():
    layer = fp.Mxfp4Linear.from_linear(nn.Linear(64, 32))
    with pytest.raises(fp.UnsupportedInput, match=r"has no gradient.*torch.no_grad"):
        layer(torch.randn(4, 64, requires_grad=True))
    with torch.no_grad():
        assert not layer(torch.randn(4, 64, requires_grad=True)).requires_grad


# ---- the kernel's layout


@pytest.mark.parametrize(("layout", "n", "k"), [("tiles", 40, 96), ("shuffled", 32, 256), ("shuffled_scales", 32, 256)])
@pytest.mark.parametrize("act", ["mxfp4", "none"])
def test_a_prepared_layer_is_the_same_layer(act, layout, n, k):
    torch.manual_seed(0)
    linear = fp.Mxfp4Linear.from_linear(nn.Linear(k, n).bfloat16(), act=act)
    x = torch.randn(5, k).bfloat16()
    before, want = copy.deepcopy(linear.state_dict()), linear(x)
    packed = linear.weight_packed
    assert linear.prepare(layout) is linear
    assert linear.layout == layout
    prepared = linear.weight_packed
    assert linear.prepare(layout).weight_packed is prepared  # idempotent
    for layer in (linear, copy.deepcopy(linear)):
        assert torch.equal(layer(x), want)
        assert layer.state_dict().keys() == before.keys()
        assert all(torch.equal(layer.state_dict()[name], before[name]) for name in before)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), want)
    fresh = fp.Mxfp4Linear.from_linear(nn.Linear(k, n).bfloat16(), act=act).prepare(layout)
    fresh.load_state_dict(before)
    assert fresh.layout == layout
    assert torch.equal(fresh(x), want)
    linear.unprepare()
    assert linear.layout == "linear"
    assert torch.equal(linear.weight_packed, packed)
    assert torch.equal(linear.weight_scale, before["weight_scale"])
    # A prepared layer's scales are not those of the checkpoint, in any layout.
    assert not torch.equal(fresh.weight_scale.flatten(), before["weight_scale"].flatten())


def test_a_layer_is_prepared_anew_for_another_kernel():
    linear = fp.Mxfp4Linear.from_linear(nn.Linear(256, 32), act="none")
    before, x = copy.deepcopy(linear.state_dict()), torch.randn(3, 256)
    want = linear(x)
    for layout in ("tiles", "shuffled", "shuffled_scales", "tiles", "shuffled_scales", "shuffled", "tiles"):
        assert linear.prepare(layout).layout == layout
        assert torch.equal(linear(x), want)
        assert all(torch.equal(linear.state_dict()[name], before[name]) for name in before)
    assert linear.prepare() is linear
    assert linear.layout == "tiles"
    with pytest.raises(
        fp.UnsupportedInput, match="got 'linear', allowed 'tiles', 'shuffled' and 'shuffled_scales'; unp"
    ):
        linear.prepare("linear")
    small = fp.Mxfp4Linear.from_linear(nn.Linear(64, 32), act="none").prepare()
    for layout in ("shuffled", "shuffled_scales"):
        with pytest.raises(fp.UnsupportedInput, match="got 32 rows of 64, allowed positive multiples of 32 rows"):
            small.prepare(layout)
        assert small.layout == "tiles"


def test_a_weight_that_cannot_be_prepared_stays_and_works():
    codes, scales = torch.full((16, 32), 0x22, dtype=torch.uint8), torch.full((16, 2), 120, dtype=torch.uint8)
    scales[3, 1] = 255
    linear = fp.Mxfp4Linear(codes, scales, act="none")
    with pytest.raises(fp.UnsupportedInput, match="got a block whose scale is NaN, allowed numbers; it stays 'linear'"):
        linear.prepare()
    assert linear.layout == "linear"
    y = linear(torch.ones(1, 64))
    assert y.isnan().sum() == 1
    assert y[0, 3].isnan()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("weight_scale", lambda t: t.view(torch.float8_e8m0fnu)),
        ("weight_scale", lambda t: torch.exp2(t.float() - 127)),
        ("weight_packed", lambda t: torch.randn(t.shape)),
    ],
)
def test_what_is_not_bytes_is_not_loaded(name, convert, prepared, assign):
    model = nn.Sequential(*[fp.Mxfp4Linear.from_linear(nn.Linear(64, 32)) for _ in range(2)])
    if prepared:
        model[0].prepare()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = nn.Sequential(*[fp.Mxfp4Linear.from_linear(nn.Linear(64, 32)) for _ in range(2)]).state_dict()
    other[f"0.{name}"] = convert(other[f"0.{name}"])
    with pytest.raises(RuntimeError, match=rf"0\.{name}: got torch\.float.*allowed torch\.uint8"):
        model.load_state_dict(other, assign=assign)
    after = model.state_dict()
    for key in ("0.weight_packed", "0.weight_scale", "0.bias"):
        assert torch.equal(after[key], before[key])
    assert model[0].layout == ("tiles" if prepared else "linear")


def test_loading_a_weight_that_cannot_be_prepared_loads_all_of_a_model():
    def model():
        return nn.Sequential(*(fp.Mxfp4Linear.from_linear(nn.Linear(64, 64), act="none") for _ in range(2)))

    torch.manual_seed(0)
    source, target = model(), model()
    source[0].weight_scale[3, 1] = 255
    for layer in target:
        layer.prepare()
    target.load_state_dict(source.state_dict())
    assert [layer.layout for layer in target] == ["linear", "tiles"]
    x = torch.randn(2, 64)
    assert torch.equal(target[1](x), source[1](x))
    torch.testing.assert_close(target[0](x), source[0](x), rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("prepared", [False, True])
def test_parameters_and_any_strides_are_assigned_as_buffers(prepared):
    torch.manual_seed(0)
    source, target = (
        nn.Sequential(*(fp.Mxfp4Linear.from_linear(nn.Linear(64, 64)) for _ in range(2))) for _ in range(2)
    )
    for layer in target if prepared else ():
        layer.prepare()
    given = {
        name: nn.Parameter(value, requires_grad=False) if name.startswith("0") else value.t().contiguous().t()
        for name, value in source.state_dict().items()
    }
    x = torch.randn(2, 64)
    target.load_state_dict(given, assign=True)
    assert [layer.layout for layer in target] == ["tiles" if prepared else "linear"] * 2
    assert torch.equal(target(x), source(x))
    assert not list(target.parameters())
    target[0].prepare().unprepare()
    assert torch.equal(target(x), source(x))


@torch.no_grad()
@pytest.mark.parametrize("act", ["mxfp4", "none"])
def test_a_weight_without_data_is_an_error(act):
    """Not garbage: torch only warns when assign=True is forgotten."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
    fp.quantize_mxfp4(model, act=act)
    x = torch.randn(2, 64)
    for call in (model, torch.compile(model, backend=fp.fusion_backend())):
        with pytest.raises(Exception, match=r"w_codes\.device: got meta, allowed cpu, that of x"):
            call(x)


def test_weight_only_layers_leave_their_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    fp.quantize_mxfp4(model, act="none")
    assert [layer.act for layer in (model[0], model[2])] == ["none", "none"]
    x = torch.randn(3, 64)
    weight = torch.ops.fusionpasses.mxfp4_gemm_a16w4
    want = weight(x, *model[0].checkpoint_weight(), model[0].bias).relu()
    assert torch.equal(model(x), weight(want, *model[2].checkpoint_weight(), model[2].bias))
    with pytest.raises(fp.UnsupportedInput, match=r"act: got 'fp8', allowed 'mxfp4'.* and 'none'"):
        fp.quantize_mxfp4(nn.Sequential(nn.Linear(64, 64)), act="fp8")
