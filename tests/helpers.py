"""Small models and a way to compile them, shared by the tests.

Hand-written, because they compile in a fraction of a second: ``Projection`` leaves no C++ kernel to build once it is
fused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fusionpasses as fp

HIDDEN = 64


class Norm(nn.Module):
    """RMSNorm as transformers' Llama spells it; eps is a module attribute, as there."""

    def __init__(self, width: int = HIDDEN, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=torch.bfloat16), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def random(*shape: int, seed: int = 0) -> Tensor:
    """bfloat16, the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tokens(*leading: int, seed: int = 1) -> Tensor:
    return random(*(leading or (4,)), HIDDEN, seed=seed)


def linear(seed: int = 2) -> nn.Linear:
    layer = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(random(HIDDEN, HIDDEN, seed=seed) / HIDDEN**0.5)
    return layer


def mxfp4_linear(seed: int = 3) -> fp.Mxfp4Linear:
    return fp.Mxfp4Linear.from_linear(linear(seed))


class Projection(nn.Module):
    """``proj(norm(x))``: one site, nothing around it."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm, self.proj = Norm(eps=eps), mxfp4_linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(x))


class Unnormed(nn.Module):
    """``proj(relu(x))``: a quant that no norm feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = mxfp4_linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(x))


class Residual(nn.Module):
    """``h + proj(norm(h))`` with ``h = x + y``: the residual add goes into the fused op."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = Norm(), mxfp4_linear()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        return h + self.proj(self.norm(h))


class Trainable(nn.Module):
    """A bfloat16 branch that trains, and an MXFP4 branch that only looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.trained, self.watching = Norm(), linear(), mxfp4_linear()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        with torch.no_grad():
            seen = self.watching(normed.detach())
        return self.trained(normed) + seen


@dataclasses.dataclass
class Compiled:
    """One compilation from scratch: what the backend reported, and what the caches of torch did."""

    output: Any
    report: fp.Report
    fx: dict[str, int]
    aot: dict[str, int]
    frames: int

    @property
    def sources(self) -> list[str]:
        return [g.source for g in self.report.graphs]


def compile_and_run(
    model: Callable[..., Any],
    *inputs: Any,
    backend: fp.FusionBackend | None = None,
    grad: bool = False,
    backward: bool = False,
    **settings: Any,
) -> Compiled:
    """Forget what Dynamo knows, compile ``model`` with a new backend, call it; ``settings`` go to torch.compile.

    Args:
        grad: call with grad mode on; off by default.
        backward: also differentiate the sum of squares of the output.
    """
    torch._dynamo.reset()
    counters.clear()
    backend = backend or fp.fusion_backend()
    compiled = torch.compile(model, backend=backend, **settings)
    with torch.set_grad_enabled(grad or backward):
        output = compiled(*inputs)
        if backward:
            output.float().square().sum().backward()
    return Compiled(
        output,
        backend.report,
        _events("inductor", "fxgraph_cache_"),
        _events("aot_autograd", "autograd_cache_"),
        counters["stats"]["unique_graphs"],
    )


def _events(group: str, prefix: str) -> dict[str, int]:
    events: Mapping[str, int] = counters[group]
    return {k.removeprefix(prefix): v for k, v in events.items() if k.startswith(prefix)}


def calls_in(code: str, op: str) -> int:
    """How often code that Inductor generated calls ``packet.overload``, or any overload of ``packet``, without torch's
    dispatcher: by name, or at a site that is made at its top."""
    packet, _, overload = op.partition(".")
    body = code[code.index("def call(") :]
    direct = rf"\bfusionpasses\.{packet}\.{overload or '[a-z_]+'}\("
    site = rf"\bfusionpasses_{packet}_{overload or '[a-z_]+'}_[0-9a-f]{{16}}\("
    return len(re.findall(f"{direct}|{site}", body))
