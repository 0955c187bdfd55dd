"""An AITER of one generation on a machine with an MI350: functions in torch that give what its releases give."""

from __future__ import annotations

import contextlib

import shuffled_layout
import torch

from fusionpasses import providers
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.ops import _mxfp4, _rope
from fusionpasses.ops._op import OPS
from fusionpasses.probes import Verdict
from fusionpasses.providers import _aiter_import, aiter

FP32 = torch.float32
NORM_AND = "rmsnorm_mxfp4_quant.with_norm"
ACT, GEMM = "silu_mul_mxfp4_quant.default", "mxfp4_gemm.default"


def fake_dynamic(x):
    codes, scales = _mxfp4.quantize(x, "even")
    return codes, scales.T.contiguous().T


def fake_rms(release):
    def fused_rms_mxfp4_quant(
        x1, x1_weight, x1_epsilon, x2=None, x2_weight=None, x2_epsilon=0.0, res1=None, output_unquantized_inp1=False,
        **unexpected,
    ):  # fmt: skip
        assert not unexpected
        wide = {"cast_order": "scale_cast", "norm_dtype": FP32}
        # The sum that is normed was not rounded.
        total = x1.float() if res1 is None else x1.float() + res1.float()
        codes, scales, normed = OPS[NORM_AND].reference(total, x1_weight, x1_epsilon, **wide)
        out_res = None if res1 is None else total.to(x1.dtype)
        out2 = None
        if x2 is not None:
            assert x2.dim() == 2 and x2.stride(1) == 1 and x2_weight.is_contiguous()  # noqa: PT018
            *_, out2 = OPS[NORM_AND].reference(x2.float(), x2_weight, x2_epsilon, **wide)
            out2 = out2.to(x1.dtype)
        if release == "old":
            return (codes, scales), out2, out_res
        return (codes, scales), normed.to(x1.dtype) if output_unquantized_inp1 else None, out2, out_res

    if release == "old":
        return lambda *args, **kwargs: fused_rms_mxfp4_quant(*args, **kwargs)
    return fused_rms_mxfp4_quant


def fake_act(x, activation):
    assert activation in ("silu", "gelu", "gelu_tanh")  # what it does not know, AITER leaves out
    gate, up = x.chunk(2, -1)
    return OPS[ACT].reference(gate, up, activation=activation, cast_order="mul_cast", act_dtype=FP32)


def fake_rope(release):
    def fused_qk_rope_cat_and_cache_mla(
        q_nope, q_pe, k_nope, k_pe, kv_cache, slot_mapping, pos, cos, sin, k_scale, is_neox,
        num_decode_toks_for_zeros=0, apply_scale=True, q_out=None, decode_q_pe_out=None, k_pe_out=None,
    ):  # fmt: skip
        assert num_decode_toks_for_zeros == 0
        assert not apply_scale
        assert isinstance(k_scale, torch.Tensor)  # the schema of old releases takes nothing else
        assert kv_cache.dim() == 3
        assert bool((slot_mapping < len(kv_cache)).all())
        kv_cache = kv_cache.data  # autograd hears nothing of what a kernel writes
        tokens, style = q_nope.shape[0], "neox" if is_neox else "interleaved"
        k = k_pe.clone()
        if tokens:
            assert bool(((pos >= 0) & (pos < len(cos))).all())
            k[:tokens] = _rope.rotate(k_pe[:tokens], cos[pos[:tokens]], sin[pos[:tokens]], style)
            q_pe = _rope.rotate(q_pe, cos[pos[:tokens]], sin[pos[:tokens]], style)
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                kv_cache[slot] = torch.cat((k_nope[token], k[token]), -1)
        q = torch.cat((q_nope, q_pe), -1)
        return (q, q_pe[:0], k, kv_cache) if release == "old" else (q, q_pe[:0], k, q_nope[:0])

    return fused_qk_rope_cat_and_cache_mla


def fake_hip_rope(
    q_nope, q_pe, kv_c, k_pe, kv_cache, q_out, slot_mapping, k_scale, q_scale, positions, cos_cache, sin_cache,
    is_neox, is_nope_first, compute_all_q_rope=False,
):  # fmt: skip
    """What its C++ checks, reads without a check, and gives."""
    tokens, heads, latent = q_nope.shape
    assert is_nope_first
    assert compute_all_q_rope  # else rows of tokens without a slot are left as they were
    assert (kv_c.dim(), k_pe.dim(), kv_cache.dim(), q_pe.dim(), q_out.dim()) == (2, 2, 3, 3, 3)
    assert (kv_c.shape[1], k_pe.shape[1], cos_cache.shape[1], sin_cache.shape[1]) == (latent, 64, 32, 32)
    assert q_out.shape == (tokens, heads, latent + 64)
    assert q_out.is_contiguous()
    block = kv_cache.shape[1]
    per_head = block == 1 and tokens < 256
    assert latent <= 512 if per_head else latent == 512 and latent * heads >= 2048
    if per_head:
        piece = 4 if kv_c.dtype == FP32 or 64 <= latent <= 128 else 8
        assert latent % piece == 0
        assert latent // piece >= 32  # threads, of which 32 turn pairs
    # All are read as if of the first one's dtype, and angles as if in rows of 32.
    assert {t.dtype for t in (q_nope, q_pe, kv_c, k_pe, kv_cache, q_out, cos_cache, sin_cache)} == {kv_c.dtype}
    assert kv_c.dtype in (torch.bfloat16, torch.float16, FP32)
    assert cos_cache.is_contiguous()
    assert sin_cache.is_contiguous()
    assert all(t.stride(-1) == 1 for t in (q_nope, q_pe, kv_c, k_pe, kv_cache))
    for t in (q_nope, kv_c, kv_cache):
        starts = (t.storage_offset(), *t.stride()[:-1])
        assert all(start * t.element_size() % 16 == 0 for start in starts)
    for t in (slot_mapping, positions):
        assert (t.shape, t.dtype, t.is_contiguous()) == ((tokens,), torch.int64, True)
    for t in (k_scale, q_scale):
        assert (t.dtype, t.tolist()) == (FP32, [1.0])
    assert bool((slot_mapping < len(kv_cache) * block).all())
    assert bool(((positions >= 0) & (positions < len(cos_cache))).all())
    style = "neox" if is_neox else "interleaved"
    cos, sin = cos_cache[positions].float(), sin_cache[positions].float()
    q_out[..., :latent], q_out[..., latent:] = q_nope, _rope.rotate(q_pe, cos, sin, style)
    k, kv_cache = _rope.rotate(k_pe, cos, sin, style), kv_cache.data
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            kv_cache[slot // block, slot % block] = torch.cat((kv_c[token], k[token]), -1)


def fake_gemm(x, w, x_scales, w_scales, dtype):
    return OPS[GEMM].reference(x, x_scales, w, w_scales, out_dtype=dtype)


def fake_preshuffle(x, w, x_scales, w_scales, dtype, y, config):
    assert y is None
    assert config["NUM_KSPLIT"] == 1  # with more, AITER reads beyond the operands
    rows, width, n = len(x), x.shape[1] * 2, len(w) * 16
    assert all(t.is_contiguous() for t in (x, w, x_scales, w_scales))
    assert (w.shape, w_scales.shape) == ((n // 16, width * 8), (n // 32, width))
    if config["BLOCK_SIZE_M"] >= 32:
        assert rows >= 32
        # Whole tiles of scales are read.
        assert x_scales.shape == (-(-rows // 256) * 8, width)
        x_scales = x_scales.flatten()[shuffled_layout.of_scales(rows, width)]
    weight = shuffled_layout.put_back(w, w_scales, n, width)
    return OPS[GEMM].reference(x, x_scales, *weight, out_dtype=dtype)


def fake_preshuffled_scales(x, w, x_scales, w_scales, dtype, y, config):
    assert y is None
    rows, width, n = len(x), x.shape[1] * 2, len(w)
    assert rows >= 32
    assert all(t.is_contiguous() for t in (x, w, x_scales, w_scales))
    assert (w.shape, w_scales.shape) == ((n, width // 2), (n // 32, width))
    assert n % max(config["BLOCK_SIZE_N"], 32) == 0  # else scales beyond the weight's are read
    assert config["BLOCK_SIZE_K"] < width or config["NUM_KSPLIT"] == 1
    if config["BLOCK_SIZE_M"] >= 32:
        assert x_scales.shape == (-(-rows // 256) * 8, width)
        x_scales = x_scales.flatten()[shuffled_layout.of_scales(rows, width)]
    w_scales = w_scales.flatten()[shuffled_layout.of_scales(n, width)]
    return OPS[GEMM].reference(x, x_scales, w, w_scales, out_dtype=dtype)


def get_splitk(half, depth, parts):
    """How AITER cuts K: the width of a part, of a step, and how many parts."""
    return half * 2 // parts, depth, parts


def _get_config(rows, n, half, shuffled):
    """AITER's table of tiles."""
    if not shuffled:
        m = 16 if rows == 32 else 64
        return {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 256, "NUM_KSPLIT": 4}, False
    return {"BLOCK_SIZE_M": 16 if rows < 32 else 64, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 256, "NUM_KSPLIT": 4}, False


def fakes(release):
    only_new = {
        "gemm_afp4wfp4_preshuffle": fake_preshuffle,
        "gemm_afp4wfp4_preshuffled_scales": fake_preshuffled_scales,
        "fused_qk_rope_concat_and_cache_mla": fake_hip_rope,
    }
    return {
        **(only_new if release == "new" else {}),
        "dynamic_mxfp4_quant": fake_dynamic,
        "fused_rms_mxfp4_quant": fake_rms(release),
        "act_mul_and_mxfp4_quant": fake_act,
        "fused_qk_rope_cat_and_cache_mla": fake_rope(release),
        "gemm_afp4wfp4": fake_gemm,
    }


_CACHES = (providers.select, providers._imports, providers.implementation)


def forget():
    """Who was chosen."""
    for cache in _CACHES:
        cache.cache_clear()


@contextlib.contextmanager
def installed(release, monkeypatch):
    """The functions of one generation are what the import gives, and every probe of AITER says yes."""
    functions = fakes(release)

    def load(capability):
        if capability not in functions:
            raise ProviderUnavailable(f"AITER's {capability} is not here")
        return functions[capability], release

    monkeypatch.setattr(providers, "probe_aiter_kernel", lambda function: Verdict(True, "amd-aiter 0.1.24"))
    monkeypatch.setattr(providers, "probe_triton", lambda: Verdict(True, "triton 3.9.0"))
    monkeypatch.setattr(_aiter_import, "load", load)
    monkeypatch.setattr(aiter.arch, "of", lambda device: aiter.arch.Arch("gfx950", 64, 2))
    monkeypatch.setattr(aiter, "_keeps_zeros", lambda: True)
    monkeypatch.setattr(aiter, "_rocm", lambda: 7)
    forget()
    yield
    monkeypatch.undo()
    forget()
