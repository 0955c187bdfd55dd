"""What the kernels' sources say of the code that NVIDIA's compiler makes of them, to be looked for in the SASS.

Counts, not presence: packed instructions turn up for other reasons too, and one fast path may hide that another is
gone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from tools.launches import Launch


@dataclasses.dataclass(frozen=True)
class Claim:
    """Instructions that a fast path is there for, and how many of them it takes at least; none if it is not taken."""

    what: str
    sass: str
    least: Callable[[dict[str, Any]], int]


def facts(launch: Launch, warp_size: int) -> dict[str, Any]:
    """Constants of a launch, the path that follows from them, and how much one thread does.

    ``rounded``, ``multiplied``, ``added``, ``lifted``: how often a block is rounded from float32 to 16 bits, multiplied
    or added in 16 bits, by PTX. ``words``: how often codes are made from 16 bits.
    """
    kinds = {key: kind[1:] for key, kind in launch.signature.items() if kind[0] == "*"}
    f, dtype, weight = launch.constants, kinds["x_ptr"], kinds.get("weight_ptr")
    short = f["PTX"] and dtype != "fp32"
    norms = "ROUND_RESULT" in f
    rounds_first, rounds_last = norms and f["ROUND_BEFORE_WEIGHT"], norms and f["ROUND_RESULT"]
    in_words = rounds_first and rounds_last and weight in (None, dtype)
    threads = launch.options["num_warps"] * warp_size
    words = short and (rounds_last or not norms)
    return f | {
        "dtype": dtype,
        # Chunks that are read again are a loop in the code, too.
        "blocks": (1 if f.get("REREAD") else f.get("CHUNKS", 1))
        * max(f["TILE_BLOCKS"] * f.get("ROWS", 1) // threads, 1),
        "words": words,
        "lifted": words and dtype == "fp16",
        "rounded": short * (rounds_first + (rounds_last and not in_words)),
        "multiplied": short and in_words and weight is not None,
        "added": short and "residual_ptr" in kinds,
    }


def _packed(f: dict[str, Any], dtype: str) -> int:
    """Of each block: 16 pairs, and for codes two products and sums of each pair. ptxas multiplies and adds by FMA."""
    pairs = 2 * f["words"] + f["lifted"] + f["multiplied"] + f["added"]
    return f["blocks"] * 16 * pairs if f["dtype"] == dtype else 0


#: What kernels/_mxfp4.py says of PTX. A block has 15 maxima and 16 minima of pairs, 31 and 32 of floats; an
#: instruction of three operands does two of them. Without PTX nothing is claimed, and float32 has the portable codes.
CLAIMS = (
    Claim("bf16 in pairs", r"\bH(?:FMA|MUL|ADD)2\S*BF16_V2", lambda f: _packed(f, "bf16")),
    # Not conversions to float32, nor constants, which ptxas makes by HFMA2.
    Claim(
        "fp16 in pairs",
        r"\bH(?:FMA|MUL|ADD)2(?!\S*(?:BF16|F32))(?!\S* R\d+, -RZ, RZ)",
        lambda f: _packed(f, "fp16"),
    ),
    Claim("minima and maxima in pairs", r"\bVIMNMX3?\.U16x2", lambda f: f["blocks"] * 16 * f["words"]),
    Claim("nibbles picked by byte", r"\bPRMT\b", lambda f: f["blocks"] * 16 * f["words"]),
    Claim(
        "maximum that keeps NaN",
        r"\bFMNMX3?\.NAN",
        lambda f: f["blocks"] * 16 * (f["PTX"] and not f["words"]),
    ),
    Claim("rounded in pairs", r"\bF2FP\.B?F16\.F32\.PACK_AB", lambda f: f["blocks"] * 16 * f["rounded"]),
    # A kernel launched early that reads or writes before it has waited races with the one in front.
    Claim(
        "waits before any access",
        r"\A(?:(?![^\n]*\b(?:LDG?|LDGSTS|STG?|REDG?|ATOMG?)\.)[^\n]*\n)*[^\n]*\bACQBULK\b",
        lambda f: f["PTX"],
    ),
    Claim("lets the next kernel come", r"\bPREEXIT\b", lambda f: f["PTX"]),
)


def broken(of: dict[str, Any], code: str) -> tuple[str, ...]:
    """Claims that a launch with these facts makes and its code does not bear out."""
    return tuple(claim.what for claim in CLAIMS if len(re.findall(claim.sass, code)) < claim.least(of))
