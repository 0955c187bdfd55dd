"""How long the passes take on a DeepSeek-V3-shaped graph, and that the time grows linearly with the layers.

``python -m benchmarks.pass_time [LAYERS ...]``; with 61 layers, tracing alone takes minutes. The graph is captured
once; then the passes run on fresh copies of it, and the best of five is printed.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import fx

import fusionpasses as fp
from fusionpasses.anchors import registered_anchors
from fusionpasses.config import FusionConfig
from fusionpasses.pipeline import Pipeline
from fusionpasses.report import GraphReport
from fusionpasses.testing import capture


def deepseek_v3(layers: int) -> Any:
    """transformers' DeepSeek-V3 at toy width: three dense layers, the rest mixture of experts."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
    )
    model = transformers.DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    return fp.quantize_mxfp4(model)


def copy_of(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def measure(layers: int, repeats: int = 5) -> tuple[GraphReport, float]:
    """The report of the passes on a model of that many layers, and their best time in milliseconds."""
    with torch.no_grad():
        before = capture(deepseek_v3(layers), (torch.arange(8).view(1, 8),)).graphs[-1].before
    reports: list[GraphReport] = []
    for _ in range(repeats):
        Pipeline(FusionConfig(), registered_anchors(), record=reports.append)(copy_of(before).graph)
    return reports[-1], min(r.pass_ms for r in reports)


def main(layer_counts: list[int]) -> None:
    print(f"{'layers':>6} {'nodes':>6} {'fused':>6} {'refused':>8} {'passes ms':>10} {'ms/layer':>9}")
    for layers in layer_counts:
        start = time.perf_counter()
        report, ms = measure(layers)
        fused = sum(s.status == "fused" for s in report.sites)
        refused = sum(s.status == "refused" for s in report.sites)
        print(
            f"{layers:6d} {report.nodes_before:6d} {fused:6d} {refused:8d} {ms:10.1f} {ms / layers:9.2f}"
            f"   (captured in {time.perf_counter() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [4, 16, 61])
