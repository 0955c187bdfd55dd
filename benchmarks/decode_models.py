"""The models of ``decode_step.py`` and ``decode_tokens.py``: a batch in its context, and the step to be measured."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fusionpasses as fp
from examples import mla_decode
from fusionpasses.bench.chains import aten_quant

_Model = TypeVar("_Model", bound=nn.Module)

REAL: dict[str, int] = {
    "vocab_size": 4096,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 4,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
TINY = REAL | {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}


class AtenMxfp4Linear(fp.Mxfp4Linear):
    """The same layer with its quant in aten ops."""

    def forward(self, x: Tensor) -> Tensor:
        codes, scales = aten_quant(x)
        y: Tensor = torch.ops.fusionpasses.mxfp4_gemm(
            codes, scales, self.weight_packed, self.weight_scale, self.bias, out_dtype=x.dtype
        )
        return y


class AtenMlaAttention(mla_decode.MlaAttention):
    """The same layer with its cache write in aten ops."""

    def rotate_and_write(
        self, q_pe: Tensor, k_pe: Tensor, kv_c: Tensor, cache: Tensor, step: mla_decode.Step
    ) -> Tensor:
        k_pe = mla_decode.rotate(k_pe, step.cos, step.sin)
        cache.view(-1, cache.shape[-1])[step.slots] = torch.cat((kv_c, k_pe), -1)
        return mla_decode.rotate(q_pe, step.cos[:, None], step.sin[:, None])


IN_ATEN: dict[type, type] = {fp.Mxfp4Linear: AtenMxfp4Linear, mla_decode.MlaAttention: AtenMlaAttention}


def twin_of(model: _Model) -> _Model:
    """A copy with modules of its own that shares every weight."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy that shares every weight, without an op of ours but ``mxfp4_gemm``."""
    twin = twin_of(model)
    for module in twin.modules():
        module.__class__ = IN_ATEN.get(type(module), type(module))
    return twin


class Decoding(abc.ABC):
    """A batch in the middle of its context."""

    @staticmethod
    @abc.abstractmethod
    def build(sizes: dict[str, int], device: str) -> nn.Module:
        """The quantised model; weights are made on the device, in bfloat16."""

    @abc.abstractmethod
    def __init__(self, model: Any, batch: int, context: int, device: str) -> None: ...

    @abc.abstractmethod
    def step_of(self, model: Any) -> Callable[[], Tensor]:
        """The step, to logits; it writes to the cache."""

    @abc.abstractmethod
    def rewind(self) -> None:
        """Back to the first step, if a step moves on by a token."""

    @staticmethod
    @abc.abstractmethod
    def embedding(model: Any) -> Tensor:
        """Of the tokens."""

    tokens: Tensor


class AbsorbedDecoding(Decoding):
    """``examples/mla_decode.py``: absorbed MLA over a paged latent cache."""

    @staticmethod
    def build(sizes: dict[str, int], device: str) -> nn.Module:
        return fp.quantize_mxfp4(AbsorbedDecoding.unquantised(sizes, device))

    @staticmethod
    def unquantised(sizes: dict[str, int], device: str) -> mla_decode.MlaDecoder:
        """The model before it is quantised."""
        block = 64 if sizes["hidden_size"] > 1000 else 8
        return mla_decode.unquantised(dataclasses.replace(mla_decode.REAL, **sizes, block=block), device)

    def __init__(self, model: Any, batch: int, context: int, device: str) -> None:
        sequences = mla_decode.Sequences(model.config, batch, context, device)
        sequences.lengths.fill_(context // 2)
        torch.manual_seed(1)
        for cache in sequences.caches:
            cache.normal_()
        tokens, counts = mla_decode.random_prompts(model.config, [1] * batch, device)
        self.tokens = tokens
        self.arguments = sequences.arguments(tokens, counts)

    def rewind(self) -> None:
        """Positions are arguments: a step is always the same one."""

    def step_of(self, model: Any) -> Callable[[], Tensor]:
        def step() -> Tensor:
            logits: Tensor = model(*self.arguments)
            return logits

        return step

    @staticmethod
    def embedding(model: Any) -> Tensor:
        weight: Tensor = model.embed_tokens.weight
        return weight


class ExpandedDecoding(Decoding):
    """transformers' DeepSeek-V3 with a static cache, of which it expands all in every step."""

    @staticmethod
    def build(sizes: dict[str, int], device: str) -> nn.Module:
        import transformers

        config = transformers.DeepseekV3Config(
            **sizes,
            num_key_value_heads=sizes["num_attention_heads"],
            first_k_dense_replace=sizes["num_hidden_layers"],
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                model: nn.Module = transformers.DeepseekV3ForCausalLM(config).eval()
                # As large a residual stream as trained models have, or each layer's output would replace it.
                nn.init.normal_(model.model.embed_tokens.weight)  # type: ignore[union-attr, arg-type]
        finally:
            torch.set_default_dtype(before)
        return fp.quantize_mxfp4(model)

    def __init__(self, model: Any, batch: int, context: int, device: str) -> None:
        import transformers

        generator = torch.Generator().manual_seed(batch)
        self.tokens = torch.randint(0, model.config.vocab_size, (batch, 1), generator=generator).to(device)
        self.start = context // 2
        self.positions = torch.full((batch, 1), self.start, device=device)
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=context)
        model(self.tokens, past_key_values=self.cache)  # eager: allocates the cache at addresses that stay
        torch.manual_seed(1)
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.rewind()

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)

    def step_of(self, model: Any) -> Callable[[], Tensor]:
        def step() -> Tensor:
            logits: Tensor = model(self.tokens, past_key_values=self.cache, position_ids=self.positions).logits
            return logits

        return step

    @staticmethod
    def embedding(model: Any) -> Tensor:
        weight: Tensor = model.model.embed_tokens.weight
        return weight


MODELS: dict[str, type[Decoding]] = {"absorbed": AbsorbedDecoding, "transformers": ExpandedDecoding}
