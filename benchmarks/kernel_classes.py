"""Which kernels of a profiled step are GEMMs, which attention, and which the rest; and what bytes a graph moves.

Measured: a trace of ``torch.profiler`` has each kernel, the call that launched it, and the operators that were running
then. A kernel belongs to the GEMMs if ``mxfp4_gemm`` or a matrix product of torch was running (all that the reference
of ``mxfp4_gemm`` launches, dequantisation included), to attention if scaled dot product attention or ``bmm`` was, else
to the rest. What Inductor makes of attention itself (the softmax of the math variant) is Triton code and counts as
rest, on both sides alike.

A CUDA graph replays without operators. Its kernels get the class that their name had in default mode; where a name had
several, the k-th launch of that name gets the class of the k-th launch, provided there are as many; else it is unclear.

Computed: after Inductor has fused, every node of its schedule is a kernel or an operator it calls. Inductor's own count
is taken (each buffer that is read or written, once, and no more of it than is accessed); inputs and outputs for our
ops. Weight and product of a bmm that an op of ours makes count as attention's, as those of any bmm.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

GEMM, ATTENTION, REST, UNCLEAR = CLASSES = ("gemm", "attention", "rest", "unclear")

_GEMM_OPS = ("fusionpasses::mxfp4_gemm", "aten::mm", "aten::addmm", "aten::linear")
_ATTENTION_OPS = ("aten::_scaled_dot_product", "aten::scaled_dot_product", "aten::bmm", "aten::baddbmm")
_GEMM_NODES = ("mxfp4_gemm", ".mm", ".addmm")
_ATTENTION_NODES = ("scaled_dot_product", ".bmm", ".baddbmm")


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    microseconds: float
    kind: str  # one of CLASSES


def kernels_by_step(trace: Mapping[str, Any], label: str) -> list[list[Kernel]]:
    """Kernels of each step in the order of their launch; a step is a ``record_function(label)`` that waits at its end.

    Args:
        trace: what ``prof.export_chrome_trace`` wrote.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] == label
    )
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    regions = [
        (event, kind) for event in events if event.get("cat") == "cpu_op" and (kind := _class_of_op(event["name"]))
    ]
    found: list[list[tuple[float, Kernel]]] = [[] for _ in steps]
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch = launches.get(event.get("args", {}).get("correlation"), event)
        kinds = {kind for region, kind in regions if _within(launch, region)}
        kind = GEMM if GEMM in kinds else ATTENTION if ATTENTION in kinds else REST
        for step, (start, end) in enumerate(steps):
            if start <= launch["ts"] < end:
                # Kernels of a graph share their launch, so that their own start decides.
                found[step].append((event["ts"], Kernel(event["name"], event["dur"], kind)))
    return [[kernel for _, kernel in sorted(step, key=lambda pair: pair[0])] for step in found]


def as_learned(replayed: Sequence[Kernel], learned: Sequence[Kernel]) -> list[Kernel]:
    """Kernels of a replayed CUDA graph with the classes that default mode showed."""
    classes: dict[str, list[str]] = collections.defaultdict(list)
    for kernel in learned:
        classes[kernel.name].append(kernel.kind)
    launches = collections.Counter(kernel.name for kernel in replayed)
    seen: collections.Counter[str] = collections.Counter()
    result = []
    for kernel in replayed:
        known = classes.get(kernel.name, [REST])
        kind = known[0]
        if len(set(known)) > 1:
            kind = known[seen[kernel.name]] if launches[kernel.name] == len(known) else UNCLEAR
        seen[kernel.name] += 1
        result.append(dataclasses.replace(kernel, kind=kind))
    return result


def summary(kernels: Iterable[Kernel]) -> dict[str, Any]:
    """Kernels and milliseconds by class."""
    counts: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        counts[kernel.kind] += 1
        times[kernel.kind] += kernel.microseconds / 1000  # type: ignore[assignment]
    return {
        "kernels": {kind: counts[kind] for kind in CLASSES},
        "ms": {kind: float(times[kind]) for kind in CLASSES},
    }


class BytesMoved:
    """Hook for ``torch._inductor.config._post_fusion_custom_pass``: adds up bytes by class, changes nothing."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = dict.fromkeys(CLASSES, 0)

    def __call__(self, nodes: list[Any]) -> list[Any]:
        for node in nodes:
            moved, of_bmm = int(node.get_read_write_buffers_sizes()), _bytes_of_bmm(node)
            self.bytes[_class_of_node(node)] += moved - of_bmm
            self.bytes[ATTENTION] += of_bmm
        return nodes


def _class_of_op(name: str) -> str | None:
    if name in _GEMM_OPS:
        return GEMM
    return ATTENTION if name.startswith(_ATTENTION_OPS) else None


def _names_of_node(node: Any) -> str:
    inner = getattr(node, "node", None)
    return f"{getattr(inner, 'op_overload', '')} {getattr(inner, 'python_kernel_name', '')}".removesuffix(".default")


def _bytes_of_bmm(node: Any) -> int:
    """The weight and the product of a bmm that is part of an op of ours; its other factor is read for the rest, too."""
    if ".absorbed_bmm" not in _names_of_node(node):
        return 0
    q_nope, w_uk = (tensor.get_size() for tensor in node.node.inputs[:2])
    heads, tokens, _ = (int(size) for size in q_nope)
    numbers = math.prod(int(size) for size in w_uk) + heads * tokens * int(w_uk[2])
    return numbers * int(node.node.inputs[1].get_dtype().itemsize)


def _class_of_node(node: Any) -> str:
    names = _names_of_node(node)
    for kind, parts in ((GEMM, _GEMM_NODES), (ATTENTION, _ATTENTION_NODES)):
        if any(part in names for part in parts):
            return kind
    return REST


def _within(event: Mapping[str, Any], region: Mapping[str, Any]) -> bool:
    inside: bool = region["ts"] <= event["ts"] < region["ts"] + region["dur"]
    return inside and event.get("tid") == region.get("tid")
