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
NORM_AND, ADD_AND = "rmsnorm_mxfp4_quant.with_norm", "rmsnorm_add_mxfp4_quant.with_norm"
ACT, GEMM = "silu_mul_mxfp4_quant.default", "mxfp4_gemm.default"


def fake_dynamic(x):
    codes, scales = _mxfp4.quantize(x, "even")
    return codes, scales.T.contiguous().T


def fake_rms(release):
    def fused_rms_mxfp4_quant(
        x1, x1_weight, x1_epsilon, x2=None, res1=None, output_unquantized_inp1=False, **unexpected
    ):
        assert not unexpected
        op = OPS[NORM_AND if res1 is None else ADD_AND]
        wide = {"cast_order": "scale_cast", "norm_dtype": FP32}
        residual = () if res1 is None else (res1,)
        codes, scales, *total, normed = op.reference(x1, *residual, x1_weight, x1_epsilon, **wide)
        out_res = total[0] if total else None
        if release == "old":
            return (codes, scales), None, out_res
        return (codes, scales), normed.to(x1.dtype) if output_unquantized_inp1 else None, None, out_res

    if release == "old":
        return lambda *args, **kwargs: fused_rms_mxfp4_quant(*args, **kwargs)
    return fused_rms_mxfp4_quant


def fake_act(x, activation):
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


def _get_config(rows, n, half, shuffled):
    """AITER's table of tiles."""
    assert shuffled
    return {"BLOCK_SIZE_M": 16 if rows < 32 else 64, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 256, "NUM_KSPLIT": 4}, False


def fakes(release):
    return {
        **({"gemm_afp4wfp4_preshuffle": fake_preshuffle} if release == "new" else {}),
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
    forget()
    yield
    monkeypatch.undo()
    forget()
