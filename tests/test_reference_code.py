"""RMSNorm as the published reference code of model families writes it, each with its dtype habits.

The classes below are written anew, operation by operation, after the code they are named for.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusionpasses.testing import assert_equivalent

quant = torch.ops.fusionpasses.dynamic_mxfp4_quant
N = 64


class Norm(nn.Module):
    def __init__(self, dtype=torch.bfloat16, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.rand(N).to(dtype))


class MetaLlama(Norm):
    """Normalises x.float(), casts like x, then scales."""

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


class DeepSeekFirst(Norm):
    """DeepSeek-V3's first inference code: F.rms_norm."""

    def forward(self, x):
        return F.rms_norm(x, (N,), self.weight, self.eps)


class DeepSeekLater(Norm):
    """Later DeepSeek code: float32 weight, scaled in float32, cast last, square() instead of pow."""

    def forward(self, x):
        dtype = x.dtype
        x = x.float()
        var = x.square().mean(-1, keepdim=True)
        x = x * torch.rsqrt(var + self.eps)
        return (self.weight * x).to(dtype)


class TransformersLlama(Norm):
    def forward(self, h):
        dtype = h.dtype
        h = h.to(torch.float32)
        variance = h.pow(2).mean(-1, keepdim=True)
        h = h * torch.rsqrt(variance + self.eps)
        return self.weight * h.to(dtype)


class GptOss(Norm):
    def forward(self, h):
        dtype = h.dtype
        h = h.to(torch.float32)
        variance = h.pow(2).mean(-1, keepdim=True)
        h = h * torch.rsqrt(variance + self.eps)
        return (self.weight * h).to(dtype)


class Gemma(Norm):
    """The weight is an offset from one."""

    def forward(self, x):
        out = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        out = out * (1.0 + self.weight.float())
        return out.type_as(x)


class TorchModule(Norm):
    def __init__(self, dtype=torch.bfloat16, eps=None):
        super().__init__(dtype, eps)
        self.norm = nn.RMSNorm(N, eps=eps, dtype=dtype)

    def forward(self, x):
        return self.norm(x)


FORMS = {
    "meta llama, bf16": (MetaLlama(), "cast_scale"),
    "meta llama, fp32 weight": (MetaLlama(torch.float32, 1e-5), "cast_scale"),
    "deepseek, first": (DeepSeekFirst(eps=1e-6), "scale_cast"),
    "deepseek, later": (DeepSeekLater(torch.float32), "scale_cast"),
    "transformers llama": (TransformersLlama(eps=3e-5), "cast_scale"),
    "gpt-oss": (GptOss(eps=1e-5), "scale_cast"),
    "gemma": (Gemma(), "scale_cast"),
    "nn.RMSNorm, default eps": (TorchModule(), "scale_cast"),
    "nn.RMSNorm": (TorchModule(eps=1e-5), "scale_cast"),
}


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_reference_code_fuses_with_its_cast_order(form, rank):
    norm, order = FORMS[form]

    def model(x, r):
        h = x + r
        y = norm(h)
        return *quant(y.reshape(-1, N)), *quant(y), h

    shape = [(6, N), (2, 3, N), (2, 1, 3, N)][rank - 2]
    inputs = torch.randn(shape, dtype=torch.bfloat16), torch.randn(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        result = assert_equivalent(model, inputs)
    assert [s.op for s in result.report.sites()] == ["rmsnorm_add_mxfp4_quant.default"], str(result.report)
    fused = next(n for n in result.graphs[0].after.graph.nodes if "rmsnorm" in str(n.target))
    assert fused.kwargs["cast_order"] == order
    weight = fused.args[2].meta["val"]
    assert weight.dtype == (
        torch.float32 if form in ("gemma", "deepseek, later", "meta llama, fp32 weight") else torch.bfloat16
    )


@pytest.mark.parametrize("form", [f for f in FORMS if "fp32" not in f and f != "deepseek, later"])
def test_reference_code_in_float32_has_no_casts_and_fuses(form):
    norm, _ = FORMS[form]
    norm = type(norm)(torch.float32, norm.eps)
    x = torch.randn(3, 5, N)
    with torch.no_grad():
        result = assert_equivalent(lambda x: quant(norm(x)), (x,))
    assert [s.op for s in result.report.sites()] == ["rmsnorm_mxfp4_quant.default"], str(result.report)


def test_a_float32_weight_kept_beside_bfloat16_quantises_the_float32_norm():
    """Meta's code with a float32 weight gives a float32 norm: that is what is quantised, not its rounding."""
    norm = MetaLlama(torch.float32)
    with torch.no_grad():
        result = assert_equivalent(lambda x: quant(norm(x)), (torch.randn(4, N, dtype=torch.bfloat16),))
    fused = next(n for n in result.graphs[0].after.graph.nodes if "rmsnorm" in str(n.target))
    assert fused.kwargs["norm_dtype"] == torch.float32
