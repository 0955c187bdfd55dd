"""What is compiled of quants that leave tokens in the order of a product: calls whose tiles and sizes take turns."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import torch

#: Op of each chain.
ORDER_CHAINS = {
    "quant, in order": "dynamic_mxfp4_quant.then_gemm",
    "norm, in order": "rmsnorm_mxfp4_quant.then_gemm",
    "add+norm, in order": "rmsnorm_add_mxfp4_quant.then_gemm",
    "norm, in order, and another norm": "rmsnorm_mxfp4_quant.with_second_then_gemm",
    "silu*mul, in order": "silu_mul_mxfp4_quant.then_gemm",
}
#: Where products put tokens in order, and wgmma where that is.
_TARGETS = ("sm_90", "sm_100", "sm_120")
_WGMMA = "sm_90"

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Elements between rows beyond their width.
_LAYOUTS = {"contiguous": 0, "strided": 64, "off alignment": 2}


@dataclasses.dataclass(frozen=True)
class OrderConfig:
    """A call of a quant and a product on a target, of which the quant is compiled."""

    target: str
    chain: str
    dtype: str
    tokens: int
    rows: int  # of the weight
    n: int
    layout: str = "contiguous"
    scale_mode: str = "even"

    @property
    def sums(self) -> bool:
        """Do threads of a row exchange anything?"""
        return "norm" in self.chain

    def __str__(self) -> str:
        rest = f"{self.layout}, {self.scale_mode}"
        return f"{self.target} {self.chain} {self.dtype} {self.tokens} x {self.n}, for {self.rows} rows ({rest})"

    def call(self) -> tuple[str, list[Any], dict[str, Any]]:
        dtype = _DTYPES[self.dtype]
        x, y = (
            torch.empty(self.tokens, self.n + _LAYOUTS[self.layout], dtype=dtype, device="meta")[:, : self.n]
            for _ in range(2)
        )
        weight = torch.empty(self.n, dtype=dtype, device="meta")
        tiles = -(-self.rows // 16), -(-self.n // 128)
        keywords: dict[str, Any] = {
            "scale_mode": self.scale_mode,
            "w_codes": torch.empty(*tiles, 1024, dtype=torch.uint8, device="meta"),
            "w_scales": torch.empty(*tiles, 64, dtype=torch.uint8, device="meta"),
            "layout": "tiles",
            "rows": self.rows,
            "out_dtype": dtype,
        }
        name = ORDER_CHAINS[self.chain]
        if name.startswith("dynamic"):
            return name, [x], keywords
        if name.startswith("silu"):
            return name, [x, y], keywords | {"cast_order": "mul_cast" if self.dtype == "fp32" else "cast_mul"}
        arguments = [x, y, weight, 1e-6] if "add" in name else [x, weight, 1e-6]
        keywords["cast_order"] = "cast_scale"
        if "second" in name:
            return name, [*arguments, y[:, :512], weight[:512], 1e-6], keywords | {"cast_order2": "scale_cast"}
        return name, arguments, keywords


def every_order(targets: Iterable[str]) -> list[OrderConfig]:
    """Each chain for each product of DeepSeek-V3's sizes that puts its tokens in order, dtypes and layouts in turn."""
    turns = itertools.cycle(itertools.product(_DTYPES, _LAYOUTS, ("even", "floor")))
    sizes = {"mma": ((32, 2112, 7168), (12, 24576, 1536)), "wgmma": ((32, 36864, 7168), (20, 24576, 1536))}
    sizes["wgmma"] += ((200, 18432, 7168), (3, 7168, 16384))
    configs = []
    for target, chain in itertools.product([t for t in _TARGETS if t in targets], ORDER_CHAINS):
        for tokens, rows, n in sizes["mma"] + (sizes["wgmma"] if target == _WGMMA else ()):
            configs.append(OrderConfig(target, chain, "bf16", tokens, rows, n))
        dtype, layout, scale_mode = next(turns)
        configs.append(OrderConfig(target, chain, dtype, 30, 4096, 4096, layout, scale_mode))
    return configs


def some_orders(targets: Iterable[str]) -> list[OrderConfig]:
    """The subset of CI: each chain, for either product."""
    every = every_order(targets)
    return [c for c in every if (c.target, c.tokens, c.dtype) in (("sm_90", 20, "bf16"), ("sm_120", 30, c.dtype))]
