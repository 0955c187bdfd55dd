"""The main job on a tiny DeepSeek-V3 of transformers, with random weights: quantise, compile, see what fused, check it.

Runs on the GPU if there is one, else on the CPU. ``python examples/quickstart.py``
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import fusionpasses as fp
from fusionpasses.testing import assert_equivalent


def tiny_deepseek_v3(device: str) -> Any:
    """DeepSeek-V3's architecture at toy size: one dense layer, two mixture-of-experts layers."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(config).to(device, torch.bfloat16).eval()


@contextlib.contextmanager
def same_rounding_as_eager() -> Iterator[None]:
    """Keep the casts to bfloat16 that Inductor drops by default, so that its result can be compared with eager."""
    import torch._inductor.config

    with torch._inductor.config.patch(emulate_precision_casts=True):
        yield


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    worst = (a.float() - b.float()).abs().max().item()
    return "0 (byte-equal)" if torch.equal(a, b) else f"{worst:.3g} (values up to {b.float().abs().max().item():.3g})"


def main() -> None:
    # transformers caches version checks with functools; Dynamo says on every compile that it traces through them.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_deepseek_v3(device)
    tokens = torch.randint(0, 256, (1, 16), device=device)

    fp.quantize_mxfp4(model)
    print(fp.last_quantization(), "\n")

    with torch.inference_mode(), same_rounding_as_eager():
        print("compiling; about a minute on a CPU ...", flush=True)
        compiled = torch.compile(model, backend=fp.fusion_backend())
        fused = compiled(tokens).logits
        print(fp.last_report(), "\n")

        eager = model(tokens).logits
        torch._dynamo.reset()
        plain = torch.compile(model)(tokens).logits

    with torch.no_grad():
        bound = {} if device == "cpu" else {"max_abs": 0.1, "max_bytes_differ": 0.01}
        proof = assert_equivalent(model, (tokens,), **bound)
    c = proof.comparison
    print(f"{proof.report.counts} fused ops; each graph interpreted before and after the passes:")
    print(f"  {c.tensors} tensors compared, {c.unequal} differ, largest difference {c.max_abs:g}")
    print("largest difference of the logits, with Inductor's casts emulated:")
    print(f"  fused against eager                {difference(fused, eager)}")
    print(f"  plain Inductor against eager       {difference(plain, eager)}")
    print(f"  fused against plain Inductor       {difference(fused, plain)}")


if __name__ == "__main__":
    main()
