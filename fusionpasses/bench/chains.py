"""The chains that are measured, and who runs them.

Every contender is a function of the chain's tensors and the weight, and returns codes, scales, the sum where the chain
adds, the norm where the chain stores it: the outputs of the op. Products are measured by ``benchmarks/linear.py``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fusionpasses import providers
from fusionpasses.ops import OPS, _mxfp4, _rms_norm

EPS = 1e-6

Outputs = tuple[Tensor, ...]
Run = Callable[..., Outputs]
Quant = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The part of an op's contract that decides bytes."""

    cast_order: str = "cast_scale"
    scale_mode: str = "even"


@dataclasses.dataclass(frozen=True)
class Chain:
    """[residual add,] [RMSNorm or silu(gate) * up,] MXFP4 quant of bfloat16."""

    name: str
    op: str
    norms: bool
    adds: bool = False
    stores_norm: bool = False
    gates: bool = False

    @property
    def rounds_elsewhere(self) -> bool:
        """May a last bit of an rsqrt or an exp show in the bytes?"""
        return self.norms or self.gates

    def bytes_moved(self, rows: int, n: int) -> int:
        """Inputs and outputs once, without the weight."""
        full_width = 1 + 2 * self.adds + self.stores_norm + self.gates  # x; residual and sum; norm; up
        return rows * (2 * n * full_width + n // 2 + n // _mxfp4.BLOCK)

    def inputs(self, rows: int, n: int, device: str) -> tuple[Tensor, ...]:
        if self.gates:  # halves of one tensor, as a model that joins both products has them
            return torch.randn(rows, 2 * n, device=device).bfloat16().chunk(2, -1)
        return tuple(torch.randn(rows, n, device=device).bfloat16() for _ in range(1 + self.adds))

    def reference(self, settings: Settings) -> Run:
        return self._of_op(OPS[self.op].reference, settings)

    def fused(self, settings: Settings, provider: str) -> Run:
        """The op, run by one provider."""
        return self._of_op(functools.partial(OPS[self.op].overload, provider=provider), settings)

    def composed(self, settings: Settings, quant: Quant) -> Run:
        """The chain as a model writes it, step by step, in torch."""

        def run(*tensors: Tensor) -> Outputs:
            *inputs, weight = tensors
            if self.gates:
                return quant(torch.nn.functional.silu(inputs[0]) * inputs[1])
            total = inputs[0] + inputs[1] if self.adds else inputs[0]
            norm = _rms_norm.reference(total, weight, EPS, settings.cast_order, None) if self.norms else total
            codes, scales = quant(norm)
            return codes, scales, *([total] if self.adds else []), *([norm] if self.stores_norm else [])

        return run

    def _of_op(self, op: Callable[..., Outputs], settings: Settings) -> Run:
        def run(*tensors: Tensor) -> Outputs:
            *inputs, weight = tensors
            if self.gates:
                return tuple(op(*inputs, cast_order="cast_mul", scale_mode=settings.scale_mode))
            if not self.norms:
                return tuple(op(*inputs, settings.scale_mode))
            return tuple(
                op(*inputs, weight, EPS, cast_order=settings.cast_order, scale_mode=settings.scale_mode),
            )

        return run


CHAINS = (
    Chain("quant", "dynamic_mxfp4_quant.default", norms=False),
    Chain("norm+quant", "rmsnorm_mxfp4_quant.default", norms=True),
    Chain("norm+quant,norm", "rmsnorm_mxfp4_quant.with_norm", norms=True, stores_norm=True),
    Chain("add+norm+quant", "rmsnorm_add_mxfp4_quant.default", norms=True, adds=True),
    Chain("add+norm+quant,norm", "rmsnorm_add_mxfp4_quant.with_norm", norms=True, adds=True, stores_norm=True),
    Chain("silu*mul+quant", "silu_mul_mxfp4_quant.default", norms=False, gates=True),
)


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who runs a chain. ``exact`` contenders owe the reference's bytes; others may round elsewhere."""

    name: str
    run: Run
    exact: bool = True


def aten_quant(x: Tensor, scale_mode: str = "even") -> tuple[Tensor, Tensor]:
    """MXFP4 of finite values in aten ops that Inductor can fuse: what a model's own code would be."""
    blocks = x.float().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = (((amax.view(torch.int32) + _mxfp4.SCALE_ADDEND[scale_mode]) >> 23) - 2).clamp(min=0)
    scaled = blocks * ((254 - scale) << 23).view(torch.float32)
    m = scaled.abs()
    if scale_mode == "floor":  # the other modes leave no value that would round to 8
        m = m.clamp(max=_mxfp4.MAX_NORMAL)
    step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0))
    rounded = torch.round(m / step) * step
    # 0, .5, 1, 1.5, 2, 3, 4, 6 to 0..7
    code = torch.where(rounded < 2, rounded * 2, torch.where(rounded < 4, rounded + 2, rounded * 0.5 + 4)).to(
        torch.uint8
    )
    code = torch.where(torch.signbit(scaled), code | 8, code)
    low, high = code.unflatten(-1, (16, 2)).unbind(-1)
    return (low | (high << 4)).flatten(-2), scale.squeeze(-1).to(torch.uint8)


OURS = "our-"
INDUCTOR_CASTS = "inductor"
INDUCTOR_DEFAULT = "inductor-default-casts"
INDUCTOR_NORM = "inductor-norm,our-quant"
INDUCTOR_GATED = "inductor-silu*mul,our-quant"


def contenders(chain: Chain, settings: Settings, device: str, skip: frozenset[str]) -> list[Contender]:
    """Everyone of this package and of torch who runs a chain; nothing is compiled before the first call."""
    traced = chain.composed(settings, functools.partial(aten_quant, scale_mode=settings.scale_mode))
    found = [
        Contender(OURS + provider, chain.fused(settings, provider))
        for provider in providers.PREFERENCE
        if providers.verdict(provider, chain.op, device)
    ]
    found.append(Contender("eager", traced))
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    # Without this Inductor keeps the norm in float32 where the model rounds it, and 0.6% of the bytes differ.
    as_eager = {"emulate_precision_casts": True}
    found.append(Contender(INDUCTOR_CASTS, compiled(traced, options=as_eager)))
    if chain.rounds_elsewhere:
        opaque = chain.composed(settings, functools.partial(_opaque_quant, scale_mode=settings.scale_mode))
        found.append(Contender(INDUCTOR_DEFAULT, compiled(traced), exact=False))
        found.append(Contender(INDUCTOR_NORM if chain.norms else INDUCTOR_GATED, compiled(opaque, options=as_eager)))
    return [contender for contender in found if contender.name not in skip]


def _opaque_quant(x: Tensor, scale_mode: str) -> tuple[Tensor, Tensor]:
    codes, scales = torch.ops.fusionpasses.dynamic_mxfp4_quant(x, scale_mode)
    return codes, scales
