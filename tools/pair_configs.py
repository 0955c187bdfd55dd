"""What is compiled of two norms in one launch: calls whose tiles, strides, dtypes and roundings take turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

#: Op of the chain.
PAIR_CHAINS = {"norm, and another norm": "rmsnorm_mxfp4_quant.with_second"}

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Elements between rows beyond both widths. 2 of a 16-bit dtype: only 4 bytes of alignment are left.
_LAYOUTS = {"neighbours": 0, "with more": 64, "off alignment": 2}


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """A call of a norm with its quant, and of another norm, on a target."""

    target: str
    chain: str
    dtype: str
    n: int
    n2: int
    rows: int
    layout: str = "with more"
    scale_mode: str = "even"
    weight: str = "same"  # its dtype: "same" as x's, "fp32" or "none"
    cast_order: str = "cast_scale"
    norm_dtype: str = "default"  # "default", "same" as x's, or "fp32"
    weight2: str = "same"
    cast_order2: str = "cast_scale"
    norm_dtype2: str = "default"

    sums = True

    def __str__(self) -> str:
        parts = [
            f"weight {weight}, {cast_order}, norm dtype {norm_dtype}"
            for weight, cast_order, norm_dtype in (
                (self.weight, self.cast_order, self.norm_dtype),
                (self.weight2, self.cast_order2, self.norm_dtype2),
            )
        ]
        sizes = f"{self.rows} x {self.n} and {self.n2}"
        return f"{self.target} {self.chain} {self.dtype} {sizes} ({self.layout}, {self.scale_mode}, {'; '.join(parts)})"

    def call(self) -> tuple[str, list[Any], dict[str, Any]]:
        dtype = _DTYPES[self.dtype]
        whole = torch.empty(self.rows, self.n + self.n2 + _LAYOUTS[self.layout], dtype=dtype, device="meta")
        norm_dtypes = {"default": None, "same": dtype, "fp32": torch.float32}
        arguments: list[Any] = []
        for x, weight in (
            (whole[:, : self.n], self.weight),
            (whole[:, self.n : self.n + self.n2], self.weight2),
        ):
            weight_dtype = {"same": dtype, "fp32": torch.float32}.get(weight)
            of_weight = None if weight_dtype is None else torch.empty(x.shape[-1], dtype=weight_dtype, device="meta")
            arguments += [x, of_weight, 1e-6]
        keywords = {
            "cast_order": self.cast_order,
            "norm_dtype": norm_dtypes[self.norm_dtype],
            "cast_order2": self.cast_order2,
            "norm_dtype2": norm_dtypes[self.norm_dtype2],
            "scale_mode": self.scale_mode,
        }
        return PAIR_CHAINS[self.chain], arguments, keywords


_CAST_ORDERS = ("cast_scale", "scale_cast")
_WEIGHTS = ("same", "fp32", "none")
_NORM_DTYPES = ("default", "same", "fp32")

#: Widths of one block to as many as a program holds, either part the longer one; DeepSeek-V3's are 1536 and 512.
PAIR_FACTORS: dict[str, tuple[Any, ...]] = {
    "chain": tuple(PAIR_CHAINS),
    "dtype": tuple(_DTYPES),
    "n": (32, 512, 1536, 2880, 7168),
    "n2": (32, 512, 1536, 8192),
    "rows": (1, 64, 16384),
    "layout": tuple(_LAYOUTS),
    "scale_mode": ("even", "floor", "rceil", "ceil"),
    "weight": _WEIGHTS,
    "cast_order": _CAST_ORDERS,
    "norm_dtype": _NORM_DTYPES,
    "weight2": _WEIGHTS,
    "cast_order2": _CAST_ORDERS,
    "norm_dtype2": _NORM_DTYPES,
}


#: Rows in which every two values of two factors meet: ``tools.configs.covering``.
Covering = Callable[[dict[str, tuple[Any, ...]]], list[dict[str, Any]]]


def every_pair(targets: Iterable[str], covering: Covering) -> list[PairConfig]:
    """Every two values of two factors meet, targets among them; and the subset of CI."""
    targets = tuple(targets)
    rows = [PairConfig(**row) for row in covering({"target": targets, **PAIR_FACTORS})]
    return [*dict.fromkeys(rows + some_pairs(targets))]


def some_pairs(targets: Iterable[str]) -> list[PairConfig]:
    """The subset of CI: of each target DeepSeek-V3's sizes, and on three of them a second part that is longer."""
    (chain,) = PAIR_CHAINS
    small = [PairConfig(target, chain, "bf16", 1536, 512, 64) for target in targets]
    longer = [
        PairConfig(target, chain, dtype, 512, 2880, 64, scale_mode="floor", weight2="fp32", cast_order2="scale_cast")
        for target, dtype in (("sm_90", "fp32"), ("sm_120", "fp16"), ("gfx942", "bf16"))
    ]
    return small + longer
