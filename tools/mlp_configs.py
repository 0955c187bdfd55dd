"""What is compiled of products that quantise gate times up themselves: each tile of tokens, each activation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import torch

#: Op of the chain, of whose launches the first product is compiled.
MLP_CHAINS = {"product and silu*mul": "dynamic_mxfp4_quant.then_mlp"}
#: Where wgmma is.
_TARGET = "sm_90"
_CONTRACTS = tuple(itertools.product(("silu", "gelu_tanh", "x_sigmoid"), ("cast_mul", "mul_cast")))


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """A call of a gated MLP in one, of which the product of gate and up is compiled."""

    target: str
    chain: str
    tokens: int
    inner: int  # rows of gate
    n: int
    activation: str
    cast_order: str
    scale_mode: str = "even"

    sums = False

    def __str__(self) -> str:
        rest = f"{self.activation}, {self.cast_order}, {self.scale_mode}"
        return f"{self.target} {self.chain} {self.tokens}, 2 x {self.inner} x {self.n} ({rest})"

    def call(self) -> tuple[str, list[Any], dict[str, Any]]:
        x = torch.empty(self.tokens, self.n, dtype=torch.bfloat16, device="meta")
        keywords: dict[str, Any] = {
            "activation": self.activation,
            "act_cast_order": self.cast_order,
            "act_scale_mode": self.scale_mode,
            "out_dtype": torch.bfloat16,
            "down_dtype": torch.bfloat16,
        }
        weights = ("", "w_", 2 * self.inner, self.n), ("down_", "down_", self.n, self.inner)
        for prefix, of_tensors, rows, width in weights:
            tiles = -(-rows // 16), -(-width // 128)
            keywords |= {f"{prefix}layout": "tiles", f"{prefix}rows": rows}
            keywords |= {
                f"{of_tensors}{name}": torch.empty(*tiles, size, dtype=torch.uint8, device="meta")
                for name, size in (("codes", 1024), ("scales", 64))
            }
        return MLP_CHAINS[self.chain], [x], keywords


def every_mlp(targets: Iterable[str]) -> list[MlpConfig]:
    """Each tile of tokens for three models' sizes; activations and roundings in turn, and each once more."""
    sizes = (18432, 7168), (14336, 4096), (28672, 8192)
    turns = itertools.cycle(_CONTRACTS)
    tokens = (9, 16, 24, 32)
    configs = [(*each, *next(turns), "even") for each in itertools.product(tokens, sizes)]
    configs += [(32, sizes[0], *contract, ("floor", "ceil")[i % 2]) for i, contract in enumerate(_CONTRACTS)]
    configs += [(32, sizes[0], "x_sigmoid", "cast_each", "rceil")]
    (chain,) = MLP_CHAINS
    return [
        MlpConfig(_TARGET, chain, count, inner, n, activation, cast_order, mode)
        for count, (inner, n), activation, cast_order, mode in configs
        if _TARGET in targets
    ]


def some_mlps(targets: Iterable[str]) -> list[MlpConfig]:
    """The subset of CI: one."""
    return [c for c in every_mlp(targets) if c.cast_order == "cast_each"]
