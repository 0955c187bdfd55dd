"""Who runs each call of our ops in a graph: settled while compiling, written into the graph, said in the report.

A provider is chosen by op and device before and while the passes run. "aiter" and its siblings are rules about a
call's metadata. ``settle`` asks them once the passes are done. Where sizes and strides are numbers, the answer is
known, and a call that AITER must not run names Triton; else the rule stays in the graph and is asked at each call.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fusionpasses import providers, remarks
from fusionpasses.patterns._graph import SITE, bound_arguments, tensor_of
from fusionpasses.patterns._mla_write import WRAPPERS, part_of
from fusionpasses.report import FUSED, Site


def pin_providers(graph: fx.Graph) -> None:
    """Write into every call of one of our ops who runs it, so that dumps and cache keys show it.

    For the ops of the model, that is; those that a pass inserts are told when they are made.
    """
    for node in graph.nodes:
        if _is_ours(node.target):
            _pin(node, node.target)


def settle(graph: fx.Graph, sites: Sequence[Site], requested: str) -> list[str]:
    """Settles the calls that a graph gives to AITER; lines for the report.

    Args:
        graph: after the passes. Calls that a wrapper holds, because they write to an argument, get their provider now.
        sites: those of the passes; the provider of one is put right with its node's.
        requested: the provider that was asked for.

    Raises:
        ProviderUnavailable: a call names AITER, which cannot be had for its op.
    """
    rules: dict[str, str] = {}
    counts: dict[str, Counter[tuple[str, str]]] = {"taken": Counter(), "refused": Counter(), "ruled out": Counter()}
    by_node = {id(node): node.meta.pop(SITE, None) for node in graph.nodes}
    for node in graph.nodes:
        op = node.args[0] if node.target in WRAPPERS and node.args else node.target
        if not _is_ours(op):
            continue
        if op is not node.target:
            _pin(node, op)
        name = f"{op._opname}.{op._overloadname}"
        provider = str(node.kwargs.get("provider", ""))
        if not providers.is_rule(provider):
            if requested == "auto":
                why = providers.ruled_out(name, _device_type(node), functools.partial(_static_arguments, node, op))
                if why:
                    counts["ruled out"][name, why] += 1
            continue
        # A model may name it for an op that it cannot be had for.
        providers.select(name, _device_type(node), provider)
        arguments = _static_arguments(node, op)
        if arguments is None:
            rules[name] = providers.rule(name, provider)
            continue
        answer = providers.foreseen(provider, name, arguments)
        counts["taken" if answer else "refused"][name, answer.why] += 1
        if not answer:
            node.update_kwarg("provider", "triton")
            _tell(by_node[id(node)], sites, f"run by triton, not {provider}: {answer.why}")
    return [
        *rules.values(),
        *(f"{n} {op} run by AITER, which is settled: {why}" for (op, why), n in counts["taken"].items()),
        *(f"{n} {op} run by Triton, not by AITER: {why}" for (op, why), n in counts["refused"].items()),
        *(f"{n} {op} not given to AITER, which is here: {why}" for (op, why), n in counts["ruled out"].items()),
    ]


def _is_ours(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "fusionpasses"


def _pin(node: fx.Node, op: Any) -> None:
    if node.kwargs.get("provider", "auto") == "auto":
        device_type = _device_type(node)
        if device_type:
            name = f"{op._opname}.{op._overloadname}"
            node.update_kwarg("provider", providers.select(name, device_type))


def _device_type(node: fx.Node) -> str:
    value = tensor_of(node.all_input_nodes[0]) if node.all_input_nodes else None
    return "" if value is None else value.device.type


def _tell(site: Site | None, sites: Sequence[Site], why: str) -> None:
    if site is not None and site.status == FUSED and any(site is each for each in sites):
        site.provider = "triton"
        site.notes = (*site.notes, why)


def _static_arguments(node: fx.Node, op: Any) -> dict[str, Any] | None:
    """Arguments of a call of one of our ops, with fake tensors for nodes; None where one is not known in full.

    That is, where a size, a stride or an offset is a symbol, and where the GPU is not of this machine.
    """
    first = next((t for t in map(tensor_of, node.all_input_nodes) if t is not None), None)
    if first is None or remarks.architecture(first.device) is None:
        return None
    if op is node.target:
        arguments = bound_arguments(node)
    else:
        # The wrapper holds bases, and which part of one each written argument is.
        arguments = {a.name: node.kwargs.get(a.name, a.default_value) for a in op._schema.arguments}
        for argument in op._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                arguments[argument.name] = part_of(node, argument.name)
                if arguments[argument.name] is None and not isinstance(argument.type, torch.OptionalType):
                    return None
    arguments.pop("provider", None)
    for name, value in arguments.items():
        tensor = tensor_of(value) if isinstance(value, fx.Node) else value
        if isinstance(value, fx.Node) and tensor is None:
            return None
        if isinstance(tensor, torch.Tensor):
            numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
            if not all(isinstance(n, int) for n in numbers):
                return None
        arguments[name] = tensor
    return arguments
