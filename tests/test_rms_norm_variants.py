"""Generated norms: every legal spelling fuses into the right op and changes no byte, every illegal one is left alone.

A variant is a combination of choices a model author may make. ``Legal`` knows what must come out of it; ``ILLEGAL``
maps each way to leave the contract to the verdict and the words of its reason.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fusionpasses.report import FUSED, NOTHING, REFUSED
from fusionpasses.testing import capture

quant = torch.ops.fusionpasses.dynamic_mxfp4_quant

GENERATE = settings(
    max_examples=125,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # a variant is small already; shrinking would compile for minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _square(h, how):
    return {"pow": lambda: h.pow(2), "x*x": lambda: h * h, "square": lambda: h.square(), "**": lambda: h**2}[how]()


@dataclasses.dataclass(frozen=True)
class Legal:
    dtype: torch.dtype
    shape: tuple[int, ...]
    library: str  # "by hand", "F.rms_norm", "nn.RMSNorm"
    square: str
    upcast: str  # of x in the product: "same" node, "again", or left to "promotion"
    positive_dim: bool
    eps: float
    eps_first: bool
    rsqrt_first: bool
    order: str  # "cast_scale", "cast_scale_cast", "scale_cast", "no cast"
    weight: str  # "same", "fp32", "none", "1+w"
    weight_first: bool
    residual: str  # "none", "x+r", "r+x", "used later"
    views: str
    quants: int
    other_reader: str  # "none", "matmul", "returned", "through a view"
    scale_mode: str
    dynamic: bool

    def inputs(self):
        generator = torch.Generator().manual_seed(hash((self.shape, self.eps)) % 2**31)
        make = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
        n = self.shape[-1]
        weight_dtype = torch.float32 if self.weight == "fp32" else self.dtype
        return (
            make(*self.shape).to(self.dtype),
            make(*self.shape).to(self.dtype),
            make(n).to(weight_dtype),
            make(n, 8).to(self.norm_dtype),
        )

    @property
    def norm_dtype(self):
        if self.library != "by hand" or self.order in ("scale_cast", "cast_scale_cast"):
            return self.dtype
        if self.order == "no cast":
            return torch.float32
        return torch.float32 if self.weight in ("fp32", "1+w") else self.dtype

    def norm(self, x, w):
        if self.weight == "1+w":
            w = 1.0 + w.float()
        if self.library == "F.rms_norm":
            return F.rms_norm(x, x.shape[-1:], None if self.weight == "none" else w.to(self.dtype), self.eps)
        if self.library == "nn.RMSNorm":
            return torch.nn.RMSNorm(x.shape[-1], eps=self.eps, elementwise_affine=False)(x)
        h = x.float()
        mean = _square(h, self.square).mean(x.dim() - 1 if self.positive_dim else -1, keepdim=True)
        r = torch.rsqrt(self.eps + mean if self.eps_first else mean + self.eps)
        h = {"same": h, "again": x.float(), "promotion": x}[self.upcast]
        y = r * h if self.rsqrt_first else h * r
        if self.order in ("cast_scale", "cast_scale_cast"):
            y = y.to(self.dtype)
        if self.weight != "none":
            y = w * y if self.weight_first else y * w
        return y.to(self.dtype) if self.order in ("scale_cast", "cast_scale_cast") else y

    def viewed(self, y, i):
        n = y.shape[-1]
        kind = self.views if i == 0 or self.views == "none" else "flatten"
        if kind == "flatten":
            return y.reshape(-1, n)
        if kind == "flatten twice":
            return y.reshape(-1, n).reshape(1, -1, n)
        if kind == "unsqueeze":
            return y.unsqueeze(0)
        if kind == "unsqueeze, squeeze":
            return y.unsqueeze(1).squeeze(1)
        if kind == "by numbers":
            return y.view(y.numel() // n, n)
        return y

    def __call__(self, x, r, w, m):
        out = []
        if self.residual != "none":
            x = r + x if self.residual == "r+x" else x + r
        y = self.norm(x, w)
        for i in range(self.quants):
            out += quant(self.viewed(y, i), self.scale_mode)
        if self.residual == "used later":
            out.append(x * 2)
        if self.other_reader == "matmul":
            out.append(y @ m)
        elif self.other_reader == "returned":
            out.append(y)
        elif self.other_reader == "through a view":
            out.append(y.reshape(-1, y.shape[-1]) @ m)
        return out

    @property
    def expected_op(self):
        packet = "rmsnorm_mxfp4_quant" if self.residual == "none" else "rmsnorm_add_mxfp4_quant"
        return packet + (".default" if self.other_reader == "none" else ".with_norm")


legal_variants = st.builds(
    Legal,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    shape=st.sampled_from([(6, 64), (1, 32), (2, 3, 96), (3, 1, 64), (2, 1, 3, 64)]),
    library=st.sampled_from(["by hand", "by hand", "by hand", "F.rms_norm", "nn.RMSNorm"]),
    square=st.sampled_from(["pow", "x*x", "square", "**"]),
    upcast=st.sampled_from(["same", "same", "again", "promotion"]),
    positive_dim=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-6, 3e-5, 1e-12, 0.1]),
    eps_first=st.booleans(),
    rsqrt_first=st.booleans(),
    order=st.sampled_from(["cast_scale", "cast_scale_cast", "scale_cast", "no cast"]),
    weight=st.sampled_from(["same", "fp32", "none", "1+w"]),
    weight_first=st.booleans(),
    residual=st.sampled_from(["none", "x+r", "r+x", "used later"]),
    views=st.sampled_from(["none", "flatten", "flatten twice", "unsqueeze", "unsqueeze, squeeze", "by numbers"]),
    quants=st.integers(1, 3),
    other_reader=st.sampled_from(["none", "none", "matmul", "returned", "through a view"]),
    scale_mode=st.sampled_from(["even", "floor", "rceil", "ceil"]),
    dynamic=st.sampled_from([False, False, False, True]),
)

_judged = {"legal": 0, "illegal": 0}


@GENERATE
@given(legal_variants)
def test_legal_variants_fuse_and_change_no_byte(variant):
    inputs = variant.inputs()
    if variant.dynamic:
        for tensor in inputs[:2]:
            for dim, size in enumerate(tensor.shape[:-1]):
                if size > 1:
                    torch._dynamo.mark_dynamic(tensor, dim)
    with torch.no_grad():
        result = capture(variant.__call__, inputs)
    sites = result.report.sites()
    assert [(s.status, s.op) for s in sites] == [(FUSED, variant.expected_op)], f"{variant}\n{result.report}"
    assert len(sites[0].anchors) == variant.quants
    assert result.graphs[-1].report.ops_after.get("dynamic_mxfp4_quant", 0) == 0
    assert result.comparison.tensors > 0
    assert result.comparison.unequal == 0, f"{variant}\n{result.comparison}"
    assert not sites[0].notes
    _judged["legal"] += 1


# --- leaving the contract --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    dtype: torch.dtype
    shape: tuple[int, ...]
    residual: bool
    weight_first: bool
    eps: float
    quants: int


settings_of_illegal = st.builds(
    Setting,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    shape=st.sampled_from([(32, 32), (64, 64), (2, 64, 64), (2, 1, 32, 32)]),
    residual=st.booleans(),
    weight_first=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-6]),
    quants=st.integers(1, 2),
)


def _scaled(s, y, w):
    return w * y if s.weight_first else y * w


def _finish(s, h, r, w):
    return _scaled(s, (h * r).to(s.dtype), w)


def _mean(h):
    return h.pow(2).mean(-1, keepdim=True)


def _wrong_axis(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + s.eps), w)


def _two_axes(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(h.pow(2).mean((-2, -1), keepdim=True) + s.eps), w)


def _mean_in_float64(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(h.pow(2).mean(-1, keepdim=True, dtype=torch.float64) + s.eps).float(), w)


def _statistics_in_half(s, x, w):
    x = x.to(torch.bfloat16)
    return _scaled(s, x * torch.rsqrt(_mean(x) + s.eps), w.to(torch.bfloat16))


def _norm_in_float64(s, x, w):
    h = x.double()
    return _scaled(s, (h * torch.rsqrt(_mean(h) + s.eps)).to(s.dtype), w)


def _eps_is_a_tensor(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(_mean(h) + w.float().abs().max()), w)


def _eps_with_alpha(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(torch.add(_mean(h), s.eps, alpha=1000)), w)


def _sqrt_div(s, x, w):
    h = x.float()
    return _scaled(s, (h / torch.sqrt(_mean(h) + s.eps)).to(s.dtype), w)


def _one_over_sqrt(s, x, w):
    h = x.float()
    return _finish(s, h, 1.0 / torch.sqrt(_mean(h) + s.eps), w)


def _power(s, x, w):
    h = x.float()
    return _finish(s, h, (_mean(h) + s.eps) ** -0.5, w)


def _sum_of_squares(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / x.shape[-1] + s.eps), w)


def _l2_norm(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + s.eps), w)


def _no_keepdim(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(h.pow(2).mean(-1) + s.eps).unsqueeze(-1), w)


def _clamped(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(_mean(h).clamp_min(s.eps)), w)


def _cubed(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(h.pow(4).mean(-1, keepdim=True) + s.eps), w)


def _other_tensors_statistics(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(_mean(h * 2.0) + s.eps), w)


def _weight_per_row(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(_mean(h) + s.eps), x.abs().amax(-1, keepdim=True))


def _weight_of_full_shape(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(_mean(h) + s.eps), x)


def _weight_two_dimensional(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(_mean(h) + s.eps), w.unsqueeze(0))


def _weight_is_a_number(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(_mean(h) + s.eps), 0.5)


def _weight_of_other_half(s, x, w):
    h = x.float()
    other = torch.float16 if s.dtype != torch.float16 else torch.bfloat16
    y = h * torch.rsqrt(_mean(h) + s.eps)
    return _scaled(s, y, w.to(other)).to(s.dtype)


def _rounded_to_other_half(s, x, w):
    h = x.float()
    other = torch.float16 if s.dtype != torch.float16 else torch.bfloat16
    return _scaled(s, (h * torch.rsqrt(_mean(h) + s.eps)).to(other), w.float()).to(s.dtype)


def _result_in_other_half(s, x, w):
    h = x.float()
    other = torch.float16 if s.dtype != torch.float16 else torch.bfloat16
    return _scaled(s, h * torch.rsqrt(_mean(h) + s.eps), w.float()).to(other)


def _norm(s, x, w):
    h = x.float()
    return _finish(s, h, torch.rsqrt(_mean(h) + s.eps), w)


def _scaled_twice(s, x, w):
    return _norm(s, x, w) * 0.5


def _bias(s, x, w):
    return _norm(s, x, w) + w


def _activation(s, x, w):
    return F.relu(_norm(s, x, w))


def _sliced(s, x, w):
    return _norm(s, x, w)[..., 1:, :]


def _transposed(s, x, w):
    return _norm(s, x, w).transpose(-1, -2)


def _regrouped_rows(s, x, w):
    return (
        _norm(s, x, w).reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1] // 32, 32)
        if x.shape[-1] != 32
        else (_norm(s, x, w).reshape(*x.shape[:-2], x.shape[-2] // 2, 64))
    )


def _layer_norm(s, x, w):
    return F.layer_norm(x, x.shape[-1:], w, None, s.eps)


def _no_norm(s, x, w):
    return x * w


def _softmax(s, x, w):
    return torch.softmax(x.float(), -1).to(s.dtype)


#: What must be said: the status, and words of the reason.
ILLEGAL = {
    _wrong_axis: (REFUSED, "last axis"),
    _two_axes: (REFUSED, "last axis"),
    _mean_in_float64: (REFUSED, ""),
    _statistics_in_half: (REFUSED, "float32"),
    _norm_in_float64: (REFUSED, "float64"),
    _eps_is_a_tensor: (REFUSED, "Python number"),
    _eps_with_alpha: (REFUSED, "alpha=1000"),
    _sqrt_div: (REFUSED, "square root"),
    _one_over_sqrt: (REFUSED, "square root"),
    _power: (REFUSED, "rsqrt"),
    _sum_of_squares: (REFUSED, "sums the squares"),
    _l2_norm: (REFUSED, "sums the squares"),
    _no_keepdim: (REFUSED, "spelling"),
    _clamped: (REFUSED, "spelling"),
    _cubed: (REFUSED, "spelling"),
    _other_tensors_statistics: (REFUSED, "spelling"),
    _weight_per_row: (REFUSED, "not by a weight"),
    _weight_of_full_shape: (REFUSED, "not by a weight"),
    _weight_two_dimensional: (REFUSED, "not by a weight"),
    _weight_is_a_number: (REFUSED, "not a tensor"),
    _weight_of_other_half: (REFUSED, "the weight is"),
    _rounded_to_other_half: (REFUSED, "rounded to"),
    _result_in_other_half: (REFUSED, "result is"),
    _scaled_twice: (NOTHING, "aten.mul.Tensor stands between the norm"),
    _bias: (NOTHING, "aten.add.Tensor stands between the norm"),
    _activation: (NOTHING, "aten.relu.default stands between the norm"),
    _sliced: (NOTHING, "aten.slice.Tensor stands between the norm"),
    _transposed: (NOTHING, "aten.permute.default stands between the norm"),
    _regrouped_rows: (NOTHING, "aten.reshape.default stands between the norm"),
    _layer_norm: (NOTHING, "layer norm"),
    _no_norm: (NOTHING, "not from a norm"),
    _softmax: (NOTHING, "not from a norm"),
}


def judge_illegal(make, s):
    def model(x, r, w):
        if s.residual:
            x = x + r
        y = make(s, x, w)
        out = [x]
        for _ in range(s.quants):
            out += quant(y)
        return out

    torch.manual_seed(1)
    n = s.shape[-1]
    inputs = torch.randn(s.shape).to(s.dtype), torch.randn(s.shape).to(s.dtype), torch.randn(n).to(s.dtype)
    with torch.no_grad():
        result = capture(model, inputs)
    status, words = ILLEGAL[make]
    sites = result.report.sites()
    assert [site.status for site in sites] == [status], f"{make.__name__} {s}\n{result.report}"
    assert words in sites[0].reason, f"{make.__name__} {s}\n{result.report}"
    assert sites[0].reason
    assert len(sites[0].anchors) == s.quants
    assert result.graphs[-1].report.ops_after["dynamic_mxfp4_quant"] == s.quants
    assert result.comparison.unequal == 0


@pytest.mark.parametrize("make", ILLEGAL, ids=lambda f: f.__name__.strip("_"))
def test_every_way_out_of_the_contract_has_its_reason(make):
    judge_illegal(make, Setting(torch.bfloat16, (64, 64), True, True, 1e-6, 2))


@GENERATE
@given(st.sampled_from(list(ILLEGAL)), settings_of_illegal)
def test_illegal_variants_are_left_alone_with_a_reason(make, s):
    judge_illegal(make, s)
    _judged["illegal"] += 1


def test_at_least_two_hundred_variants_were_judged():
    """Runs after the two above, in file order."""
    assert _judged["legal"] >= 110, _judged
    assert _judged["illegal"] >= 110, _judged
