"""The pass of gated activations: generated variants that fire and change no byte, and twins that must not fire."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fusionpasses as fp
from benchmarks.tiny_models import MODELS
from fusionpasses.ops import silu_mul_mxfp4_quant as op
from fusionpasses.report import FUSED, NOTHING, REFUSED
from fusionpasses.testing import assert_equivalent, assert_fused, capture

quant = torch.ops.fusionpasses.dynamic_mxfp4_quant
ours = torch.ops.fusionpasses
SILU = "silu_mul_mxfp4_quant"

GENERATE = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def bf16(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def run(model, *inputs, **options):
    """The sites of a model that was proven equivalent."""
    with torch.no_grad():
        return assert_equivalent(model, inputs, **options)


def ops(result):
    return [(s.status, s.op) for s in result.report.sites()]


# --- spellings -------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "apart": lambda g, u: (g, u),
    "chunk": lambda g, u: torch.cat([g, u], -1).chunk(2, -1),
    "split": lambda g, u: torch.cat([g, u], -1).split(g.shape[-1], -1),
    "split sizes": lambda g, u: torch.cat([g, u], -1).split([g.shape[-1], u.shape[-1]], -1),
    "slices": lambda g, u: (torch.cat([g, u], -1)[..., : g.shape[-1]], torch.cat([g, u], -1)[..., g.shape[-1] :]),
    "up first": lambda g, u: torch.cat([u, g], -1).chunk(2, -1)[::-1],
    "unbind": lambda g, u: torch.stack([g, u], -2).unbind(-2),
}

ACTIVATIONS = {
    "silu": F.silu,
    "x_sigmoid": lambda x: x * torch.sigmoid(x),
    "sigmoid_x": lambda x: torch.sigmoid(x) * x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

#: Where it is rounded: activation and product of (f, gate, up).
ROUNDINGS = {
    "as eager": lambda f, g, u, mul: mul(f(g), u),
    "float32 activation": lambda f, g, u, mul: mul(f(g.float()).to(g.dtype), u),
    "float32": lambda f, g, u, mul: mul(f(g.float()), u.float()),
    "float32 by promotion": lambda f, g, u, mul: mul(f(g.float()), u),
    "float32, then cast": lambda f, g, u, mul: mul(f(g.float()), u.float()).to(g.dtype),
    "rounded, product in float32, then cast": lambda f, g, u, mul: mul(f(g), u.float()).to(g.dtype),
    "product widened": lambda f, g, u, mul: mul(f(g), u).float(),
}


@dataclasses.dataclass(frozen=True)
class Legal:
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    activation: str
    rounding: str
    up_first: bool
    views: str
    quants: int
    other_reader: str
    scale_mode: str
    dynamic: bool

    def inputs(self):
        generator = torch.Generator().manual_seed(len(str(self)))
        gate, up = (torch.randn(self.shape, generator=generator) * scale for scale in (4, 1))
        gate.view(-1)[:4] = torch.tensor([-100.0, 50.0, -0.0, -20.0])
        return gate.to(self.dtype), up.to(self.dtype)

    def __call__(self, gate, up):
        gate, up = LAYOUTS[self.layout](gate, up)
        mul = (lambda a, b: b * a) if self.up_first else (lambda a, b: a * b)
        y = ROUNDINGS[self.rounding](ACTIVATIONS[self.activation], gate, up, mul)
        out = []
        for i in range(self.quants):
            viewed = y if self.views == "none" or i else y.reshape(-1, y.shape[-1]).unsqueeze(0)
            out += quant(viewed, self.scale_mode)
        if self.other_reader == "returned":
            out.append(y)
        elif self.other_reader == "through a view":
            out.append(y.reshape(-1, y.shape[-1]).float().sum(0))
        return out


legal_variants = st.builds(
    Legal,
    dtype=st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
    shape=st.sampled_from([(6, 64), (1, 32), (2, 3, 96), (3, 1, 64), (2, 1, 3, 64)]),
    layout=st.sampled_from(list(LAYOUTS)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    rounding=st.sampled_from(list(ROUNDINGS)),
    up_first=st.booleans(),
    views=st.sampled_from(["none", "flatten"]),
    quants=st.integers(1, 3),
    other_reader=st.sampled_from(["none", "none", "returned", "through a view"]),
    scale_mode=st.sampled_from(list(op._mxfp4.SCALE_ADDEND)),
    dynamic=st.sampled_from([False, False, True]),
)


def judge_legal(variant):
    inputs = variant.inputs()
    if variant.dynamic:
        for tensor, (dim, size) in itertools.product(inputs, enumerate(variant.shape[:-1])):
            if size > 1:
                torch._dynamo.mark_dynamic(tensor, dim)
    with torch.no_grad():
        result = capture(variant.__call__, inputs)
    overload = "default" if variant.other_reader == "none" else "with_act"
    assert ops(result) == [(FUSED, f"{SILU}.{overload}")], f"{variant}\n{result.report}"
    (site,) = result.report.sites()
    assert len(site.anchors) == variant.quants
    assert site.notes == ()
    assert result.graphs[-1].report.ops_after.get("dynamic_mxfp4_quant", 0) == 0
    assert result.comparison.tensors > 0
    assert result.comparison.unequal == 0, f"{variant}\n{result.comparison}"


@GENERATE
@given(legal_variants)
def test_legal_variants_fuse_and_change_no_byte(variant):
    judge_legal(variant)


PLAIN = Legal(torch.bfloat16, (6, 64), "apart", "silu", "as eager", False, "none", 1, "none", "even", False)


@pytest.mark.parametrize(("rounding", "activation"), itertools.product(ROUNDINGS, ACTIVATIONS))
def test_every_rounding_of_every_activation(rounding, activation):
    judge_legal(dataclasses.replace(PLAIN, rounding=rounding, activation=activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_bit_of_a_float32_activation(activation):
    """More numbers, and nothing that rounding could hide."""

    def model(g, u):
        y = ACTIVATIONS[activation](g) * u
        return *quant(y), y

    assert ops(run(model, torch.randn(64, 256) * 4, torch.randn(64, 256))) == [(FUSED, f"{SILU}.with_act")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    judge_legal(dataclasses.replace(PLAIN, layout=layout, shape=(2, 3, 64)))


def test_halves_of_one_tensor_are_read_where_they_are():
    """Generated code copies neither half, and the op sees strides of the whole."""
    seen = []
    plain = op.reference

    def spy(gate, up, **kwargs):
        seen.append((gate.stride(), up.stride(), up.storage_offset() - gate.storage_offset()))
        return plain(gate, up, **kwargs)

    def model(x, w):
        gate, up = (x @ w).chunk(2, -1)
        return quant(F.silu(gate) * up)

    x, w = bf16(5, 64), bf16(64, 192)
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch._inductor.utils.fresh_cache():
        declared = op.OP
        patch.setitem(declared.__dict__, "reference", spy)
        got = torch.compile(model, backend=fp.fusion_backend())(x, w)
    assert seen == [((192, 1), (192, 1), 96)]
    assert all(map(torch.equal, got, model(x, w)))


# --- leaving the contract --------------------------------------------------------------------------------------------


def _half(x):
    return x.to(torch.float16 if x.dtype != torch.float16 else torch.bfloat16)


#: What must be said of a quant of each: the status, and words of the reason. Gate and up are [64, 64].
ILLEGAL = {
    "exact gelu": (lambda g, u: F.gelu(g) * u, REFUSED, "exact GELU"),
    "gelu by pow": (
        lambda g, u: 0.5 * g * (1 + torch.tanh(op.GELU_SCALE * (g + op.GELU_CUBIC * g.pow(3)))) * u,
        REFUSED,
        "no tanh-GELU",
    ),
    "another cubic": (
        lambda g, u: g * 0.5 * (torch.tanh((g + g * g * g * 0.0447) * op.GELU_SCALE) + 1) * u,
        REFUSED,
        "no tanh-GELU",
    ),
    "relu squared": (lambda g, u: F.relu(g) ** 2 * u, REFUSED, "made of a relu"),
    "quick gelu": (lambda g, u: g * torch.sigmoid(1.702 * g) * u, REFUSED, "multiplied by 1.702"),
    "sigmoid alone": (lambda g, u: torch.sigmoid(g) * u, REFUSED, "gated by a sigmoid"),
    "F.glu": (lambda g, u: F.glu(torch.cat([u, g], -1)), REFUSED, "F.glu gates by a sigmoid"),
    "gpt-oss": (
        lambda g, u: (u.clamp(-7, 7) + 1) * (g.clamp(max=7) * torch.sigmoid(g.clamp(max=7) * 1.702)),
        REFUSED,
        "values are clamped",
    ),
    "clamped gate": (lambda g, u: F.silu(g.clamp(max=7)) * u, REFUSED, "gate is clamped"),
    "clamped up": (lambda g, u: F.silu(g) * u.clamp(-7, 7), REFUSED, "up is clamped"),
    "another exp": (lambda g, u: g / (torch.exp(-g) + 2) * u, REFUSED, "not spelled as F.silu"),
    "tanh": (lambda g, u: torch.tanh(g) * u, REFUSED, "no tanh-GELU"),
    "broadcast up": (lambda g, u: F.silu(g) * u[:1], REFUSED, "up of shape [1, 64] is broadcast"),
    "broadcast gate": (lambda g, u: F.silu(g[:1]) * u, REFUSED, "gate of shape [1, 64] is broadcast"),
    "up per channel": (lambda g, u: F.silu(g) * u[0], REFUSED, "up of shape [64] is broadcast"),
    "a number": (lambda g, u: F.silu(g) * 2.0, REFUSED, "multiplied by 2.0, which is not a tensor"),
    "other half": (lambda g, u: F.silu(g).to(_half(g).dtype) * _half(u), REFUSED, "the fused op takes the same dtype"),
    "rounded to the other half": (
        lambda g, u: F.silu(g.float()).half() * u,
        REFUSED,
        "rounded to torch.float16 before",
    ),
    "result in the other half": (lambda g, u: _half(F.silu(g.float()) * u.float()), REFUSED, "the product is"),
    "float32 product of a rounded activation": (lambda g, u: F.silu(g) * u.float(), REFUSED, "up is torch.float32"),
    "float32 up": (lambda g, u: F.silu(_half(g)) * u.float().exp2(), REFUSED, "up is torch.float32"),
    "turns": (
        lambda g, u: (lambda w: F.silu(w[..., ::2]) * w[..., 1::2])(torch.stack([g, u], -1).flatten(-2)),
        REFUSED,
        "2 apart",
    ),
    "columns": (lambda g, u: F.silu(g.t()) * u.t(), REFUSED, "64 apart"),
    "narrow": (lambda g, u: F.pad(F.silu(g[:, :48]) * u[:, :48], (0, 16)), NOTHING, "not from a norm or a gated"),
    "alone": (lambda g, u: F.silu(g), NOTHING, "an activation alone"),
    "gelu alone": (lambda g, u: F.gelu(g, approximate="tanh"), NOTHING, "an activation alone"),
    "scaled": (lambda g, u: F.silu(g) * u * 0.5, NOTHING, "aten.mul.Tensor stands between the gated"),
    "routed": (lambda g, u: F.silu(g) * u * u[:, :1], NOTHING, "aten.mul.Tensor stands between the gated"),
    "bias": (lambda g, u: F.silu(g) * u + u[0], NOTHING, "aten.add.Tensor stands between the gated"),
    "product": (lambda g, u: g * u, NOTHING, "aten.mul.Tensor, not from a norm or a gated activation"),
    "relu": (lambda g, u: F.relu(g), NOTHING, "aten.relu.default, not from a norm or a gated activation"),
    "softmax": (lambda g, u: torch.softmax(g, -1) * u, NOTHING, "not from a norm or a gated activation"),
    "router": (lambda g, u: torch.sigmoid(g[:, :1]) * u, NOTHING, "not from a norm or a gated activation"),
    "norm": (lambda g, u: F.layer_norm(g, (64,)), NOTHING, "layer norm"),
    "misspelt norm": (lambda g, u: g / torch.sqrt(g.pow(2).mean(-1, keepdim=True)), REFUSED, "square root"),
}


def judge_illegal(case, dtype, quants):
    make, status, words = ILLEGAL[case]

    def model(g, u):
        y = make(g, u)
        return [t for _ in range(quants) for t in quant(y)]

    torch.manual_seed(1)
    with torch.no_grad():
        result = capture(model, (torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype)))
    sites = result.report.sites()
    assert [site.status for site in sites] == [status], f"{case}\n{result.report}"
    assert words in sites[0].reason, f"{case}\n{result.report}"
    assert len(sites[0].anchors) == quants
    assert result.graphs[-1].report.ops_after["dynamic_mxfp4_quant"] == quants
    assert result.comparison.unequal == 0


@pytest.mark.parametrize("case", ILLEGAL)
def test_every_way_out_of_the_contract_has_its_reason(case):
    judge_illegal(case, torch.bfloat16, 2)


def test_each_step_in_16_bits_is_refused_and_in_float32_is_not():
    by_hand = lambda g, u: quant(g / (torch.exp(-g) + 1) * u)  # noqa: E731
    result = run(by_hand, bf16(4, 64), bf16(4, 64))
    assert [s.status for s in result.report.sites()] == [REFUSED]
    assert "computed in torch.bfloat16 (aten.neg.default), rounding each step" in result.report.refused[0].reason
    assert ops(run(by_hand, torch.randn(4, 64), torch.randn(4, 64))) == [(FUSED, f"{SILU}.default")]


def test_a_width_that_is_no_multiple_of_a_block_cannot_be_quantised_anyway():
    with pytest.raises(fp.UnsupportedInput, match="multiple of 32"):
        ours.silu_mul_mxfp4_quant(bf16(4, 48), bf16(4, 48), cast_order="cast_mul")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"activation": "relu"}, "activation: got 'relu', allowed 'silu', 'x_sigmoid', 'gelu_tanh'"),
        ({"cast_order": "scale_cast"}, "cast_order: got 'scale_cast' with activation 'silu'"),
        ({"cast_order": "cast_each"}, "cast_order: got 'cast_each' with activation 'silu'"),
        ({"act_dtype": torch.float16}, "act_dtype: got torch.float16, allowed torch.bfloat16"),
        ({"scale_mode": "up"}, "scale_mode: got 'up'"),
        ({"up": bf16(1, 64)}, "up: got torch.bfloat16 (1, 64), allowed torch.bfloat16 (4, 64)"),
        ({"up": torch.randn(4, 64)}, "up: got torch.float32 (4, 64)"),
        ({"gate": torch.ones(4, 64, dtype=torch.int32)}, "gate.dtype: got torch.int32"),
        ({"up": torch.empty(4, 64, dtype=torch.bfloat16, device="meta")}, "up.device: got meta"),
    ],
)
def test_bad_input_is_refused(changed, words):
    arguments = {"gate": bf16(4, 64), "up": bf16(4, 64), "cast_order": "cast_mul", **changed}
    with pytest.raises(fp.UnsupportedInput) as error:
        op.check(**arguments)
    assert words in str(error.value)


# --- one verdict for each quant --------------------------------------------------------------------------------------


def norm(x, w, eps=1e-6):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def test_a_quant_has_one_verdict_whoever_looked_at_it():
    def model(x, g, u, w):
        return (
            *quant(norm(x, w)),
            *quant(F.silu(g) * u),
            *quant(torch.relu(x)),
            *quant(F.gelu(g) * u),
            *quant(norm(x, g)),
        )

    result = run(model, bf16(4, 64), bf16(4, 64), bf16(4, 64), bf16(64))
    assert sorted(ops(result)) == [
        (FUSED, "rmsnorm_mxfp4_quant.default"),
        (FUSED, f"{SILU}.default"),
        (NOTHING, "dynamic_mxfp4_quant.default"),
        (REFUSED, "dynamic_mxfp4_quant.default"),
        (REFUSED, "dynamic_mxfp4_quant.default"),
    ]
    assert sorted((s.pass_name, s.reason.partition(" of ")[0]) for s in result.report.refused) == [
        ("rmsnorm_mxfp4_quant", "the norm is multiplied by a tensor"),
        (SILU, "the activation is the exact GELU (erf); the fused op has approximate='tanh'"),
    ]
    assert str(result.report).startswith("fusionpasses: 1 graph, 2 sites fused (2 quants), 2 refused, 1 with nothing")


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        (None, "not from a norm or a gated activation or a copy of rows"),
        (("rmsnorm_mxfp4_quant",), "not from a norm"),
        ((SILU,), "not from a gated activation"),
    ],
)
def test_what_no_pass_looks_for_is_told_by_what_they_look_for(passes, reason):
    result = run(lambda x: quant(x @ x.T), bf16(64, 64), backend=fp.fusion_backend(passes=passes))
    assert [s.reason for s in result.report.sites()] == [f"the quantised tensor comes from aten.mm.default, {reason}"]


def test_two_scale_modes_on_one_product():
    def model(g, u):
        y = F.silu(g) * u
        return *quant(y, "even"), *quant(y, "rceil")

    result = run(model, bf16(4, 64), bf16(4, 64))
    assert sorted(ops(result)) == [(FUSED, f"{SILU}.with_act"), (REFUSED, "dynamic_mxfp4_quant.default")]
    assert "one scale mode" in result.report.refused[0].reason


def test_up_that_is_a_norm_is_read_by_the_fused_op():
    result = run(lambda x, g, w: quant(norm(x, w) * F.silu(g)), bf16(4, 64), bf16(4, 64), bf16(64))
    assert ops(result) == [(FUSED, f"{SILU}.default")]


def test_an_activation_that_is_read_elsewhere_is_kept_and_noted():
    def model(g, u):
        s = F.silu(g)
        return *quant(s * u), s

    (site,) = run(model, bf16(4, 64), bf16(4, 64)).report.fused
    assert site.notes[0].endswith("inside the activation has other readers and is still computed by Inductor")


def test_a_product_with_other_strides_is_refused_only_for_other_readers():
    def model(g, u):
        return quant(F.silu(g.transpose(0, 1)) * u.transpose(0, 1))

    def read(g, u):
        y = F.silu(g.transpose(0, 1)) * u.transpose(0, 1)
        return *quant(y), y

    inputs = bf16(3, 4, 64), bf16(3, 4, 64)
    assert ops(run(model, *inputs)) == [(FUSED, f"{SILU}.default")]
    result = run(read, *inputs)
    assert [s.status for s in result.report.sites()] == [REFUSED]
    assert "also reads the product, whose strides are" in result.report.refused[0].reason


def test_a_product_saved_for_backward_is_returned():
    layer = torch.nn.Linear(64, 32, dtype=torch.bfloat16)

    def model(g, u):
        y = F.silu(g) * u
        with torch.no_grad():
            codes, scales = quant(y.detach())
        return layer(y).float().sum(), codes, scales

    result = capture(model, (bf16(4, 64), bf16(4, 64)), backward=lambda out: out[0])
    assert ops(result) == [(FUSED, f"{SILU}.with_act")]
    assert result.comparison.unequal == 0
    assert layer.weight.grad.abs().sum() > 0


def test_a_rounding_forgotten_is_noticed(monkeypatch):
    """The proof must be able to fail: the product in float32 where the model rounds the activation."""
    from fusionpasses.patterns._gated_activation import Gated

    monkeypatch.setattr(Gated, "cast_order", property(lambda gated: "mul_cast"))
    torch.manual_seed(0)
    with pytest.raises(fp.NotEquivalent, match="integer ones"):
        run(lambda g, u: quant(F.silu(g) * u), bf16(64, 256), bf16(64, 256))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_every_mlp_fuses(name):
    tiny = MODELS[name]
    model = tiny.make(torch.bfloat16)
    with torch.no_grad():
        result = assert_fused(model, (torch.arange(12).view(2, 6),), {SILU: tiny.gated})
    assert result.comparison.unequal == 0
    sites = [site for site in result.report.fused if site.pass_name == SILU]
    expected = {"llama": ["model.layers.0.mlp", "model.layers.1.mlp"]}
    expected["deepseek_v3"] = ["model.layers.0.mlp", "model.layers.1.mlp.shared_experts"]
    assert [site.where.module for site in sites] == expected[name]
    assert all(anchor.module.endswith("down_proj") for site in sites for anchor in site.anchors)


# ---- found by a reviewer


def test_a_product_of_16_bit_factors_that_is_left_in_float32_is_not_rounded():
    g, u = torch.randn(64, 64).bfloat16() * 4, torch.randn(64, 64).bfloat16()
    wide = assert_equivalent(lambda g, u: quant(g * torch.sigmoid(g) * u.float()), (g, u))
    (site,) = wide.report.sites()
    assert (site.status, site.reason) == (
        "refused",
        "up is torch.float32 and gate torch.bfloat16; the fused op takes the same dtype",
    )
    rounded = assert_equivalent(lambda g, u: quant((g * torch.sigmoid(g) * u.float()).bfloat16()), (g, u))
    assert [site.status for site in rounded.report.sites()] == ["fused"]


@pytest.mark.parametrize("shape", [(1, 32), (3, 1, 32), (1, 1, 32)])
@pytest.mark.parametrize("axes", [(), (0,), (-1,), (-2,)], ids=str)
@pytest.mark.parametrize("op", ["silu_mul_mxfp4_quant", "rmsnorm_mxfp4_quant"])
def test_a_squeeze_removes_no_axis_of_the_scales(op, axes, shape):
    """With one block in a row, the last axis of the scales is of size 1, and that of the product is not."""

    def model(x, y):
        made = (
            torch.nn.functional.silu(x) * y if op.startswith("silu") else torch.rms_norm(x, (32,), y[0].view(-1)[:32])
        )
        return quant(made.squeeze(*axes))

    args = (torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16())
    result = assert_equivalent(model, args)
    assert [(site.status, site.op) for site in result.report.sites()] == [("fused", f"{op}.default")]
    assert result.output[1].shape[-1] == 1


def test_a_stride_that_is_not_known_is_a_refusal():
    def model(x, mask):
        gate = x[:, mask.nonzero().squeeze(1)].t()
        return quant(torch.nn.functional.silu(gate) * gate)

    args = (torch.randn(64, 7).bfloat16(), torch.tensor([1, 0, 1, 1, 0, 1, 0]))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (site,) = capture(model, args).report.sites()
    assert site.status == "refused"
    assert "the elements of a row of gate are Max(1, u0) apart" in site.reason


@pytest.mark.parametrize("step", [lambda g, u: g * torch.sigmoid(g), lambda g, u: g + 0.5 * torch.sigmoid(g) * u])
def test_long_chains_of_activations_take_no_longer_than_their_length(step):
    def model(g, u):
        for _ in range(26):
            g = step(g, u)
        return quant(g + u)

    graph = capture(model, (torch.randn(4, 64), torch.randn(4, 64))).graphs[0]
    assert graph.report.pass_ms < 500  # 2 to 6; it doubled with every second step


def test_notes_speak_of_what_is_there_after_all_rewrites():
    g, u = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()

    def two_products(g, u):
        s = torch.nn.functional.silu(g)
        return *quant(s * u), *quant(s * (u + 1))

    def activation_too(g, u):
        s = torch.nn.functional.silu(g)
        return *quant(s * u), s

    assert [site.notes for site in assert_equivalent(two_products, (g, u)).report.sites()] == [(), ()]
    ((note,),) = [site.notes for site in assert_equivalent(activation_too, (g, u)).report.sites()]
    assert note.endswith("inside the activation has other readers and is still computed by Inductor")


def test_reasons_name_what_stands_in_the_way():
    g, u = torch.randn(6, 64).bfloat16(), torch.randn(6, 64).bfloat16()
    viewed = capture(lambda g, u: quant(torch.nn.functional.silu(g).view(2, 3, 64) * u.view(2, 3, 64)), (g, u))
    assert "look through a view between the activation and the product" in viewed.report.sites()[0].reason
    other_order = capture(lambda g, u: quant(u * g * torch.sigmoid(g)), (g, u))
    assert "x * sigmoid(x) of one x" in other_order.report.sites()[0].reason
