"""What is compiled of products by ``mxfp4_gemm_dot``: each choice of its heuristics, on each target."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch

#: Kernel of each chain.
DOT_CHAINS = {"dots": "mxfp4_gemm_dot", "sum of parts": "mxfp4_gemm_sum"}

#: Bytes of shared memory that a program may have: no compiler looks at that. CUDA's programming guide, 2 KB or less are
#: the system's; AMD's ISA manuals.
SHARED_MEMORY = {"sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx950": 163840, "gfx1250": 327680}
_SHARED_MEMORY_OF_OTHERS = 65536


def shared_memory(target: str) -> int:
    return SHARED_MEMORY.get(target, _SHARED_MEMORY_OF_OTHERS)


@dataclasses.dataclass(frozen=True)
class DotConfig:
    """A product with a weight of layout "linear", of whose launches one is compiled."""

    target: str
    chain: str
    tokens: int
    rows: int
    n: int  # elements in a row
    codes: bool = False  # x is MXFP4
    bias: bool = False

    sums = False

    def __str__(self) -> str:
        rest = ["codes" if self.codes else "bf16", "bias" if self.bias else "no bias"]
        return f"{self.target} {self.chain} {self.tokens}, {self.rows} x {self.n} ({', '.join(rest)})"

    def call(self) -> tuple[str, list[Any], dict[str, Any]]:
        """Arguments of the provider's ``multiply``, which no op calls on every target."""
        codes = functools.partial(torch.empty, dtype=torch.uint8, device="meta")
        values = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
        x_scales = codes(self.tokens, self.n // 32) if self.codes else None
        x = codes(self.tokens, self.n // 2) if self.codes else values(self.tokens, self.n)
        bias = values(self.rows) if self.bias else None
        w = codes(self.rows, self.n // 2), codes(self.rows, self.n // 32)
        return "", [x, x_scales, *w, bias, values(self.tokens, self.rows), self.tokens, self.rows, self.n], {}


#: A weight that fills its tiles, and one that is cut in K and fills none.
_WHOLE, _TAILS = (18432, 7168), (1000, 2880)
#: Targets on which the product of codes is one of codes.
_CODES = ("sm_100", "sm_120", "gfx950", "gfx1250")


def every_dot(targets: Iterable[str]) -> list[DotConfig]:
    configs = []
    for target in targets:
        tokens = {False: (16, 64), True: (16, 64, 128) if target in _CODES else (16, 64)}
        if target == "sm_100":
            tokens[True] = (128,)
        for codes in (False, True):
            for i, count in enumerate(tokens[codes]):
                whole = i % 2 == codes
                configs.append(DotConfig(target, "dots", count, *(_WHOLE if whole else _TAILS), codes, bias=not whole))
    for target in ("sm_90", "gfx942"):
        configs.append(DotConfig(target, "sum of parts", 16, *_TAILS, bias=True))
    return configs


def some_dots(targets: Iterable[str]) -> list[DotConfig]:
    """The subset of CI: of each target the largest tile with tails, of codes where they are multiplied; and sums."""
    with_tails = [config for config in every_dot(targets) if config.rows == _TAILS[0]]
    wanted = [c for c in with_tails if c.chain != "dots" or c.codes == (c.target in _CODES)]
    return [*{(c.target, c.chain): c for c in wanted}.values()]
