"""Every op keeps its contract, on every sample; the format is the one other projects write."""

import json
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from fusionpasses import ProviderUnavailable, UnsupportedInput
from fusionpasses.ops import OPS, _mxfp4

GOLDEN = pathlib.Path(__file__).parent / "golden"
ours = torch.ops.fusionpasses
CPU = torch.device("cpu")

SAMPLES = [(op, i, sample) for op in OPS.values() for i, sample in enumerate(op.samples(CPU))]


@pytest.mark.parametrize(("op", "i", "sample"), SAMPLES, ids=[f"{op.name}-{i}" for op, i, _ in SAMPLES])
def test_opcheck(op, i, sample):
    args, kwargs = sample
    torch.library.opcheck(op.overload, args, kwargs)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_fake_gives_the_shapes_dtypes_and_strides_of_the_real_op(op):
    for args, kwargs in op.samples(CPU):
        real, fake = op.overload(*args, **kwargs), op.fake(*args, **kwargs)
        real, fake = ((t,) if isinstance(t, torch.Tensor) else t or () for t in (real, fake))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
            assert r.is_contiguous()


def test_two_norms_in_one_op_are_each_what_it_is_alone():
    for (x, weight, eps, x2, weight2, eps2), kwargs in OPS["rmsnorm_mxfp4_quant.with_second"].samples(CPU):
        both = ours.rmsnorm_mxfp4_quant.with_second(x, weight, eps, x2, weight2, eps2, **kwargs)
        first, second = (
            {key: kwargs[f"{key}{end}"] for key in ("cast_order", "norm_dtype") if f"{key}{end}" in kwargs}
            for end in ("", "2")
        )
        scale_mode = kwargs.get("scale_mode", "even")
        alone = ours.rmsnorm_mxfp4_quant(x, weight, eps, **first, scale_mode=scale_mode)
        *_, norm2 = ours.rmsnorm_mxfp4_quant.with_norm(x2, weight2, eps2, **second)
        for got, want in zip(both, (*alone, norm2), strict=True):
            assert torch.equal(got, want)


def load(case):
    return np.load(GOLDEN / "mxfp4" / f"{case}.npz")


BLOCK_CASES = sorted(p.stem for p in (GOLDEN / "mxfp4").glob("*.npz") if "tier" in np.load(p))


def test_the_golden_block_cases_are_there():
    assert len(BLOCK_CASES) == 10


@pytest.mark.parametrize("mode", _mxfp4.SCALE_ADDEND)
@pytest.mark.parametrize("case", BLOCK_CASES)
def test_golden_blocks(case, mode):
    """Tiers 0 to 2: every byte of the exact formula, which in tier 0 is also torchao's. Tier 3: the NaN scale."""
    data = load(case)
    tier = data["tier"]
    inputs = [torch.from_numpy(data["x_f32_bits"].view(np.int32)).view(torch.float32)]
    if "x_bf16_bits" in data:
        inputs.append(torch.from_numpy(data["x_bf16_bits"].view(np.int16)).view(torch.bfloat16))
    for x in inputs:
        codes, scales = ours.dynamic_mxfp4_quant(x, mode)
        codes = codes.unflatten(-1, (-1, 16)).numpy()
        scales = scales.numpy()
        for source, held in (("exact", tier <= 2), ("torchao", tier == 0)):
            prefix = f"{mode}_exact" if source == "exact" else mode
            expected = data[f"{prefix}_codes"].reshape(codes.shape)
            np.testing.assert_array_equal(scales[held], data[f"{prefix}_scales"][held])
            np.testing.assert_array_equal(codes[held], expected[held])
        assert (scales[tier == 3] == 255).all()
        assert (codes[tier == 3] == 0).all()


@pytest.mark.parametrize("mode", _mxfp4.SCALE_ADDEND)
def test_scale_of_every_finite_bf16_amax(mode):
    data = load("e8m0_exhaustive_bf16")
    x = torch.zeros(len(data["amax_bf16_bits"]), 32, dtype=torch.bfloat16)
    x[:, 0] = torch.from_numpy(data["amax_bf16_bits"].view(np.int16)).view(torch.bfloat16)
    codes, scales = ours.dynamic_mxfp4_quant(x, mode)
    np.testing.assert_array_equal(scales[:, 0].numpy(), data[f"{mode}_exact_scales"])
    np.testing.assert_array_equal((codes[:, 0] & 15).numpy(), data[f"{mode}_exact_code_of_amax"])


def test_elements_of_every_bf16_pattern():
    """At scale 1: a block whose amax is 4 has that scale in every mode, if nothing in it is larger."""
    data = load("e2m1_elements")
    bits = data["bf16_bits"]
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
    fits = (values.abs() <= 4).numpy()
    x = torch.zeros(int(fits.sum()), 32)
    x[:, 0], x[:, 1] = values[fits], 4.0
    codes, scales = ours.dynamic_mxfp4_quant(x)
    assert (scales == 127).all()
    np.testing.assert_array_equal((codes[:, 0] & 15).numpy(), data["exact_even_bf16"][fits])


def test_dequantise_every_scale_and_code():
    data = load("dequant_table")
    values = _mxfp4.dequantize(torch.from_numpy(data["codes"]), torch.from_numpy(data["scales"])).numpy()
    with np.errstate(over="ignore"):
        expected = data["exact_f64"].astype(np.float32)
    np.testing.assert_array_equal(values[:255], expected[:255])
    assert np.isnan(values[255]).all()


def bf16(bits):
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def test_aiter_quant_vectors():
    plain = np.load(GOLDEN / "aiter" / "golden_aiter_dynq_plain.npz")
    codes, scales = ours.dynamic_mxfp4_quant(bf16(plain["x_bf16"]))
    np.testing.assert_array_equal(codes.numpy(), plain["q"])
    np.testing.assert_array_equal(scales.numpy(), plain["scale"])
    edges = np.load(GOLDEN / "aiter" / "golden_aiter_dynq_edges.npz")
    exact = edges["hw_exact"]
    assert exact.sum() == 19
    codes, scales = ours.dynamic_mxfp4_quant(bf16(edges["x_bf16"]))
    np.testing.assert_array_equal(codes.numpy()[exact], edges["q"][exact])
    np.testing.assert_array_equal(scales.numpy()[exact], edges["scale"][exact])


def test_aiter_norm_vectors():
    """AITER keeps float32 from the norm to the quant: cast order "scale_cast" with a float32 result."""
    data = np.load(GOLDEN / "aiter" / "golden_aiter_rms_plain.npz")
    assert json.loads(str(data["meta"]))["what"]
    codes, scales, norm = ours.rmsnorm_mxfp4_quant.with_norm(
        bf16(data["x1_bf16"]),
        bf16(data["w1_bf16"]),
        float(data["eps1"]),
        cast_order="scale_cast",
        norm_dtype=torch.float32,
    )
    np.testing.assert_allclose(norm.numpy(), data["norm_fp32"], rtol=3e-6)
    np.testing.assert_array_equal(codes.numpy()[data["safe_q_bytes"]], data["q"][data["safe_q_bytes"]])
    np.testing.assert_array_equal(scales.numpy()[data["safe_scale"]], data["scale"][data["safe_scale"]])


@pytest.mark.parametrize("mode", _mxfp4.SCALE_ADDEND)
@pytest.mark.parametrize("variant", ["plain", "add_bf16sum"])
@pytest.mark.parametrize("case", ["rmsnorm_2x7168", "rmsnorm_8x2880"])
def test_golden_norms(case, variant, mode):
    """Where a byte does not hang on the last bits of the norm, it is the one of the exact norm, rounded to bf16."""
    data = load(case)
    x, res, w = (bf16(data[f"{k}_bf16_bits"]) for k in ("x", "res", "w"))
    eps = float(data["eps"])
    kwargs = {"cast_order": "scale_cast", "scale_mode": mode}
    if variant == "plain":
        codes, scales = ours.rmsnorm_mxfp4_quant(x, w, eps, **kwargs)
    else:
        codes, scales, total = ours.rmsnorm_add_mxfp4_quant(x, res, w, eps, **kwargs)
        np.testing.assert_array_equal(total.float().numpy(), bf16(data["res_out_bf16_bf16_bits"]).float().numpy())
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).numpy()
    packed = data[f"{variant}/bf16/{mode}/codes"]
    expected = np.stack((packed & 15, packed >> 4), -1).reshape(nibbles.shape)
    stable = data[f"{variant}/bf16/{mode}/stable_elem"]
    assert stable.mean() > 0.999
    np.testing.assert_array_equal(nibbles[stable], expected[stable])
    stable = data[f"{variant}/bf16/{mode}/stable_scale"]
    np.testing.assert_array_equal(scales.numpy()[stable], data[f"{variant}/bf16/{mode}/scales"][stable])


def model_norm(x, w, eps, order):
    """RMSNorm as models write it."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if w is None:
        return h.to(x.dtype)
    return w * h.to(x.dtype) if order == "cast_scale" else (w * h).to(x.dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(_mxfp4.INPUT_DTYPES),
    weight=st.sampled_from(["same", "fp32", "none"]),
    order=st.sampled_from(["cast_scale", "scale_cast"]),
    mode=st.sampled_from(list(_mxfp4.SCALE_ADDEND)),
    add=st.booleans(),
    leading=st.lists(st.integers(0, 4), max_size=3),
    blocks=st.integers(1, 5),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fused_ops_are_the_unfused_chain(dtype, weight, order, mode, add, leading, blocks, strided, seed):
    torch.manual_seed(seed)
    n = 32 * blocks
    x = torch.randn(*leading, n * (2 if strided else 1)).to(dtype)[..., :n]
    res = torch.randn(*leading, n).to(dtype)
    w = None if weight == "none" else torch.randn(n).to(torch.float32 if weight == "fp32" else dtype)
    total = x + res if add else x
    norm = model_norm(total, w, 1e-6, order)
    expected = ours.dynamic_mxfp4_quant(norm, mode)
    kwargs = {"cast_order": order, "scale_mode": mode}
    if add:
        *got, s, y = ours.rmsnorm_add_mxfp4_quant.with_norm(x, res, w, 1e-6, **kwargs)
        assert torch.equal(s, total)
        assert all(map(torch.equal, ours.rmsnorm_add_mxfp4_quant(x, res, w, 1e-6, **kwargs), (*got, s)))
    else:
        *got, y = ours.rmsnorm_mxfp4_quant.with_norm(x, w, 1e-6, **kwargs)
        assert all(map(torch.equal, ours.rmsnorm_mxfp4_quant(x, w, 1e-6, **kwargs), got))
    assert torch.equal(y, norm)
    assert y.dtype == norm.dtype
    assert all(map(torch.equal, got, expected))


def test_gemm_is_the_product_of_the_dequantised_operands():
    torch.manual_seed(0)
    x, w, bias = torch.randn(2, 3, 96), torch.randn(40, 96), torch.randn(40)
    qx, qw = ours.dynamic_mxfp4_quant(x), ours.dynamic_mxfp4_quant(w)
    exact = _mxfp4.dequantize(*qx).double() @ _mxfp4.dequantize(*qw).double().T + bias.double()
    got = ours.mxfp4_gemm(*qx, *qw, bias, out_dtype=torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.mxfp4_gemm(*qx, *qw, bias, out_dtype=torch.bfloat16), got.to(torch.bfloat16))
    # A NaN block makes its row NaN and no other.
    qx[1][0, 0, 0] = 255
    got = ours.mxfp4_gemm(*qx, *qw, out_dtype=torch.float32)
    assert got[0, 0].isnan().all()
    assert got[0, 1:].isfinite().all()


X = torch.randn(4, 64)
W = torch.randn(64)
Q, S = ours.dynamic_mxfp4_quant(X)


def with_second(x2=X, weight2=W, **changed):
    kwargs = {"cast_order": "cast_scale", "cast_order2": "cast_scale", **changed}
    return ours.rmsnorm_mxfp4_quant.with_second(X, W, 1e-6, x2, weight2, 1e-6, **kwargs)


REFUSED = {
    "integer input": (lambda: ours.dynamic_mxfp4_quant(X.int()), "x.dtype: got torch.int32, allowed torch.bfloat16"),
    "float64 input": (lambda: ours.dynamic_mxfp4_quant(X.double()), "x.dtype: got torch.float64"),
    "width": (
        lambda: ours.dynamic_mxfp4_quant(X[:, :40]),
        "got shape (4, 40), allowed [..., N] with N a positive multiple",
    ),
    "no width": (lambda: ours.dynamic_mxfp4_quant(X[:, :0]), "got shape (4, 0)"),
    "0-D": (lambda: ours.dynamic_mxfp4_quant(X[0, 0]), "got shape ()"),
    "scale mode": (
        lambda: ours.dynamic_mxfp4_quant(X, "nearest"),
        "scale_mode: got 'nearest', allowed 'even', 'floor'",
    ),
    "provider": (
        lambda: ours.dynamic_mxfp4_quant(X, provider="cuda"),
        "provider: got 'cuda', allowed 'auto', 'aiter', 'aiter_finite', 'aiter_fast', 'triton'",
    ),
    "provider that cannot": (lambda: ours.dynamic_mxfp4_quant(X, provider="triton"), "serves GPU tensors"),
    "gradient": (lambda: ours.dynamic_mxfp4_quant(X.clone().requires_grad_()), "has no gradient"),
    "gradient of a weight": (
        lambda: ours.rmsnorm_mxfp4_quant(X, W.clone().requires_grad_(), 1e-6, cast_order="cast_scale"),
        "argument 1 requires grad",
    ),
    "cast order": (lambda: ours.rmsnorm_mxfp4_quant(X, W, 1e-6, cast_order="none"), "cast_order: got 'none'"),
    "norm dtype": (
        lambda: ours.rmsnorm_mxfp4_quant(X, W, 1e-6, cast_order="cast_scale", norm_dtype=torch.float16),
        "norm_dtype: got torch.float16, allowed torch.float32 (that of x)",
    ),
    "weight shape": (
        lambda: ours.rmsnorm_mxfp4_quant(X, W[:32], 1e-6, cast_order="cast_scale"),
        "weight: got shape (32,), allowed [64]",
    ),
    "weight dtype": (
        lambda: ours.rmsnorm_mxfp4_quant(X, W.half(), 1e-6, cast_order="cast_scale"),
        "weight.dtype: got torch.float16 with x torch.float32",
    ),
    "second of other rows": (
        lambda: with_second(X[:2]),
        "x2: got torch.float32 (2, 64) on cpu, allowed torch.float32 (4, 'N2') on cpu, as x but for the width",
    ),
    "second of another rank": (lambda: with_second(X[None]), "x2: got torch.float32 (1, 4, 64)"),
    "second dtype": (lambda: with_second(X.half()), "x2: got torch.float16 (4, 64)"),
    "second width": (
        lambda: with_second(X[:, :40]),
        "x2: got shape (4, 40), allowed [..., N2] with N2 a positive multiple of 32; norm it by itself",
    ),
    "no second width": (lambda: with_second(X[:, :0]), "x2: got shape (4, 0)"),
    "second weight shape": (
        lambda: with_second(weight2=W[:32]),
        "weight2: got shape (32,), allowed [64], the width of x2",
    ),
    "second weight dtype": (
        lambda: with_second(weight2=W.half()),
        "weight2.dtype: got torch.float16 with x2 torch.float32",
    ),
    "second cast order": (lambda: with_second(cast_order2="none"), "cast_order2: got 'none'"),
    "second norm dtype": (
        lambda: with_second(norm_dtype2=torch.float16),
        "norm_dtype2: got torch.float16, allowed torch.float32 (that of x2)",
    ),
    "first cast order": (lambda: with_second(cast_order="none"), "cast_order: got 'none'"),
    "scale mode beside a second": (lambda: with_second(scale_mode="up"), "scale_mode: got 'up'"),
    "residual shape": (
        lambda: ours.rmsnorm_add_mxfp4_quant(X, X[:1], W, 1e-6, cast_order="cast_scale"),
        "residual: got torch.float32 (1, 64)",
    ),
    "residual dtype": (
        lambda: ours.rmsnorm_add_mxfp4_quant(X, X.half(), W, 1e-6, cast_order="cast_scale"),
        "residual: got torch.float16",
    ),
    "gemm codes": (lambda: ours.mxfp4_gemm(X, S, Q, S, out_dtype=torch.float32), "x_codes.dtype: got torch.float32"),
    "gemm K": (
        lambda: ours.mxfp4_gemm(Q, S, Q[:, :16], S[:, :1], out_dtype=torch.float32),
        "w_codes: got shape (4, 16)",
    ),
    "gemm scales": (lambda: ours.mxfp4_gemm(Q, S[:, :1], Q, S, out_dtype=torch.float32), "x_scales: got shape (4, 1)"),
    "gemm bias": (
        lambda: ours.mxfp4_gemm(Q, S, Q, S, W, out_dtype=torch.float32),
        "(64,), allowed [4] of",
    ),
    "gemm out": (lambda: ours.mxfp4_gemm(Q, S, Q, S, out_dtype=torch.int8), "out_dtype: got torch.int8"),
}


@pytest.mark.parametrize("name", OPS)
def test_tensors_on_two_devices_are_refused(name):
    """One on the meta device is enough for the dispatcher to ask for shapes only: of the rest it would make garbage."""
    args, kwargs = next(iter(OPS[name].samples(CPU)))
    named = {**dict(enumerate(args)), **kwargs}
    tensors = [key for key, value in named.items() if isinstance(value, torch.Tensor)]
    for moved in tensors if len(tensors) > 1 else ():
        given = named | {moved: named[moved].to("meta")}
        with pytest.raises(UnsupportedInput, match=r"device: got|got torch.* on (cpu|meta), allowed"):
            OPS[name].overload(*(given[i] for i in range(len(args))), **{key: given[key] for key in kwargs})


@pytest.mark.parametrize("name", OPS)
def test_a_tangent_is_refused_and_not_lost(name):
    op = OPS[name]
    args, kwargs = next(iter(op.samples(CPU)))
    at = next(
        (i for i, value in enumerate(args) if isinstance(value, torch.Tensor) and value.is_floating_point()), None
    )
    if at is None:
        assert name == "mxfp4_gemm.default"  # codes have no tangents
        return

    def call(x):
        return op.overload(*args[:at], x, *args[at + 1 :], **kwargs)

    words = f"{op.packet_name}.* has no derivative: argument {at} has a tangent"
    with torch.no_grad(), pytest.raises(UnsupportedInput, match=words):
        torch.func.jvp(call, (args[at],), (torch.ones_like(args[at]),))
    with forward_ad.dual_level():
        with pytest.raises(UnsupportedInput, match=words):
            call(forward_ad.make_dual(args[at], torch.ones_like(args[at])))
        call(args[at].clone())  # inputs without one are taken as ever


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_what_got_and_allowed(case):
    call, text = REFUSED[case]
    with pytest.raises(ProviderUnavailable if case.startswith("provider") else UnsupportedInput) as error:
        call()
    assert text in str(error.value)


def test_an_input_that_requires_grad_is_fine_when_no_gradient_is_asked_for():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        codes, _ = ours.dynamic_mxfp4_quant(x)
    assert not codes.requires_grad
    with pytest.raises(UnsupportedInput):
        ours.dynamic_mxfp4_quant(x)
