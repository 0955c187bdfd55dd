"""What the report says of a graph as a whole, beside its sites: lines for ``GraphReport.messages``.

A remark changes nothing. Each is a function from a graph to lines, listed in ``REMARKS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import fx

from fusionpasses.kernels import arch
from fusionpasses.patterns._graph import tensor_of
from fusionpasses.probes import probe_fp4_arithmetic, probe_gpu


def of_graph(graph: fx.Graph) -> list[str]:
    """Every remark on a graph after the passes."""
    return [line for remark in REMARKS for line in remark(graph)]


def w4a4_without_fp4_arithmetic(graph: fx.Graph) -> list[str]:
    """Where both operands of an MXFP4 product become bfloat16, quantising the activations only loses digits."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target.name() == "fusionpasses::mxfp4_gemm":
            value = tensor_of(node)
            name = None if value is None else architecture(value.device)
            if name is not None and not probe_fp4_arithmetic(name):
                counts[name] += 1
    return [
        f"{count} mxfp4_gemm (W4A4) on {name}, which has no FP4 arithmetic: unless the checkpoint was made for W4A4, "
        'weight-only (quantize_mxfp4(act="none")) is more exact, and its products are as fast'
        for name, count in counts.items()
    ]


REMARKS: tuple[Callable[[fx.Graph], list[str]], ...] = (w4a4_without_fp4_arithmetic,)


def architecture(device: torch.device) -> str | None:
    """Name of a GPU's architecture; None for any other device, and for a GPU that is not here.

    A graph may be compiled for a device that only its fake tensors have.
    """
    if device.type != "cuda" or not probe_gpu() or (device.index or 0) >= torch.cuda.device_count():
        return None
    return arch.of(device).name
