"""Real architectures at toy size with random weights, and how many sites each must fuse.

The expected numbers are derived from the architectures, per layer:

==============  =====================================================================  ==================
model           norms that feed a quantised linear, in order                           quants they feed
==============  =====================================================================  ==================
Llama, Qwen3    input (q, k, v), post-attention (gate, up)                             5
DeepSeek-V3     input (q_a, kv_a), q_a norm (q_b), kv_a norm (kv_b), post-attention    6
                (gate, up of the dense or the shared expert)
Gemma 3         input (q, k, v), pre-feedforward (gate, up)                            5
GPT-OSS         input (q, k, v); its experts are no nn.Linear                          3
==============  =====================================================================  ==================

A norm at the start of a block follows a residual add, except the very first, which reads the embedding. The down
projection of an MLP follows its gated activation. The attention output has a quant that nothing can be fused with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import fusionpasses as fp

LAYERS = 2


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """How to build a model, and what must fuse in it."""

    build: Callable[[], Any]
    fused: int  # rmsnorm_mxfp4_quant
    fused_add: int  # rmsnorm_add_mxfp4_quant
    quants: int  # quants that disappear into those two
    left: int  # quants that follow neither
    gated: int = 0  # silu_mul_mxfp4_quant, one quant each
    filter: Callable[[str, torch.nn.Module], bool] | None = None

    def make(self, dtype: torch.dtype, device: str = "cpu") -> Any:
        """The quantised model, in eval mode."""
        torch.manual_seed(0)
        model = self.build().to(device, dtype).eval()
        return fp.quantize_mxfp4(model, self.filter)


def _llama() -> Any:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_COMMON, num_key_value_heads=2))


def _qwen3() -> Any:
    import transformers

    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_COMMON, num_key_value_heads=2, head_dim=16))


def _deepseek_v3() -> Any:
    import transformers

    config = transformers.DeepseekV3Config(
        **_COMMON,
        num_key_value_heads=4,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def _gemma3() -> Any:
    import transformers

    config = transformers.Gemma3TextConfig(**_COMMON, num_key_value_heads=2, head_dim=16, sliding_window=8)
    return transformers.Gemma3ForCausalLM(config)


def _gpt_oss() -> Any:
    import transformers

    config = transformers.GptOssConfig(
        **_COMMON, num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    )
    return transformers.GptOssForCausalLM(config)


_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}

MODELS: dict[str, TinyModel] = {
    "llama": TinyModel(_llama, fused=1, fused_add=2 * LAYERS - 1, quants=5 * LAYERS, left=LAYERS, gated=LAYERS),
    "qwen3": TinyModel(_qwen3, fused=1, fused_add=2 * LAYERS - 1, quants=5 * LAYERS, left=LAYERS, gated=LAYERS),
    "deepseek_v3": TinyModel(
        _deepseek_v3, fused=2 * LAYERS + 1, fused_add=2 * LAYERS - 1, quants=6 * LAYERS, left=LAYERS, gated=LAYERS
    ),
    "gemma3": TinyModel(_gemma3, fused=1, fused_add=2 * LAYERS - 1, quants=5 * LAYERS, left=LAYERS, gated=LAYERS),
    "gpt_oss": TinyModel(
        _gpt_oss,
        fused=1,
        fused_add=LAYERS - 1,
        quants=3 * LAYERS,
        left=LAYERS,
        filter=lambda name, module: "self_attn" in name,
    ),
}
