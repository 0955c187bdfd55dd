"""What the kernels' sources say of the code that compilers make of them, to be looked for in SASS and GCN assembly.

Counts, not presence: packed instructions turn up for other reasons too, and one fast path may hide that another is
gone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from fusionpasses.kernels import arch
from tools.configs import GEMM_CHAINS
from tools.dot_configs import DOT_CHAINS
from tools.launches import Launch

#: ``kernels/mxfp4_gemm_dot.DOT_SCALED``.
_DOT_SCALED = 1


@dataclasses.dataclass(frozen=True)
class Claim:
    """Instructions that a fast path is there for, and how many of them it takes at least; none if it is not taken."""

    what: str
    code: str
    least: Callable[[dict[str, Any]], int]


def facts(launch: Launch, warp_size: int) -> dict[str, Any]:
    """What one thread does: ``dtype``, whether it has PTX, and how many instructions it has of each kind.

    ``pairs``: arithmetic on two elements of 16 bits; ``codes``: of words, minima of pairs, and bytes picked from them;
    ``maxima``: of float32, for the scale; ``rounded``: two float32 to 16 bits.
    """
    f = launch.constants
    if launch.kernel.__name__ in [*DOT_CHAINS.values(), *(kernel for _, kernel in GEMM_CHAINS.values())]:
        return _of_a_product(launch)
    dtype = next(launch.signature[name][1:] for name in ("x_ptr", "gate_ptr", "k_pe_ptr") if name in launch.signature)
    counts = dict.fromkeys(("pairs", "codes", "maxima", "rounded"), 0)
    if "cos_ptr" in f | launch.signature:
        counts |= _of_a_rotation(launch, dtype)
    elif "gate_ptr" in launch.signature:
        counts |= _of_a_gated_quant(launch, dtype, warp_size)
    else:
        counts |= _of_a_quant(launch, warp_size)
    ptx = f["ISA"] == arch.PTX
    if not ptx:
        # Arithmetic of pairs is float32, rounded. Only to bfloat16 is that an instruction of its own.
        has_rounding = f["ISA"] >= arch.ROUNDS_BF16 and dtype == "bf16"
        counts["rounded"] = (counts["rounded"] + counts["pairs"]) * has_rounding
        counts["maxima"] *= f["ISA"] >= arch.NAN_MAXIMUM
        counts["pairs"] = counts["codes"] = 0
    return {"PTX": ptx, "dtype": dtype, "products": 0, **counts}


def _of_a_product(launch: Launch) -> dict[str, Any]:
    """Each word of codes has two products with each eight tokens, and a tile eight words of a thread."""
    f = launch.constants
    counts = dict.fromkeys(("pairs", "codes", "maxima", "rounded"), 0)
    products = 8 * f["ROW_TILES"] * f["TOKEN_TILES"] if "ROW_TILES" in f else 0
    dots, codes = "BLOCK_M" in f, f.get("x_scales_ptr", 0) is not None and f.get("MODE") == _DOT_SCALED
    of_dots = {"dots": dots and not codes, "dots of codes": dots and codes}
    # Behind mxfp4_gemm_arrange, which has waited.
    by_warpgroups = launch.kernel.__name__ == "mxfp4_gemm_wgmma"
    first = by_warpgroups or (launch.kernel.__name__ == "mxfp4_gemm" and f.get("x_stride", 0) is None)
    ptx = f["ISA"] == arch.PTX
    columns = f["UNROLLED"] if by_warpgroups else 0
    of_dots |= {"weight first": ptx and first, "copies": 6 * columns or (ptx and 3 * f.get("STAGES", 0))}
    of_dots |= {"columns": columns}
    if f.get("GATE_TILES") is not None:
        counts["codes"] = 4  # words of a quarter of a block
    return {"PTX": ptx and not first, "dtype": "", "products": products, **of_dots, **counts}


def _of_a_rotation(launch: Launch, dtype: str) -> dict[str, int]:
    """A unit of q and one of k: of each word of pairs four products and two sums; or all in float32, then rounded."""
    f = launch.constants
    if f["VECTOR"] == 1 or dtype == "fp32" or "cos_ptr" in f:
        return {}
    same = launch.signature["cos_ptr"] == launch.signature["k_pe_ptr"]
    return {"pairs": 2 * 4 * 6} if same else {"rounded": 2 * 8}


def _of_a_quant(launch: Launch, warp_size: int) -> dict[str, int]:
    """A block has 16 pairs, and for codes two products and sums of each; ptxas multiplies and adds by FMA.

    It has 15 maxima and 16 minima of pairs, 31 and 32 of floats; an instruction of three operands does two of them.
    """
    kinds = {key: kind[1:] for key, kind in launch.signature.items() if kind[0] == "*"}
    f, dtype, weight = launch.constants, kinds["x_ptr"], kinds.get("weight_ptr")
    short = dtype != "fp32"
    norms = "ROUND_RESULT" in f
    rounds_first, rounds_last = norms and f["ROUND_BEFORE_WEIGHT"], norms and f["ROUND_RESULT"]
    in_words = rounds_first and rounds_last and weight in (None, dtype)
    words = short and (rounds_last or not norms) and f["ISA"] == arch.PTX
    threads = launch.options["num_warps"] * warp_size
    # Chunks that are read again are a loop in the code, too.
    blocks = 1 if f.get("REREAD") else f.get("CHUNKS", 1)
    sixteen = 16 * blocks * max(f["TILE_BLOCKS"] * f.get("ROWS", 1) // threads, 1)
    lifted, multiplied = words and dtype == "fp16", short and in_words and weight is not None
    return {
        "pairs": sixteen * (2 * words + lifted + multiplied + (short and "residual_ptr" in kinds)),
        "codes": sixteen * words,
        "maxima": sixteen * (not words),
        "rounded": sixteen * short * (rounds_first + (rounds_last and not in_words)),
    }


def _of_a_gated_quant(launch: Launch, dtype: str, warp_size: int) -> dict[str, int]:
    """As a quant of the product; a sigmoid that is rounded has one product more."""
    f = launch.constants
    short, multiplies_words = dtype != "fp32", f["CAST_ORDER"] != "mul_cast"
    rounds = short and (multiplies_words or f["ROUND_RESULT"])
    words = rounds and f["ISA"] == arch.PTX
    sixteen = 16 * max(f["TILE_BLOCKS"] // (launch.options["num_warps"] * warp_size), 1)
    products = multiplies_words + (f["CAST_ORDER"] == "cast_each")
    return {
        "pairs": sixteen * (2 * words + (words and dtype == "fp16") + short * products),
        "codes": sixteen * words,
        "maxima": sixteen * (not words),
        "rounded": sixteen * rounds,
    }


def _pairs_of(dtype: str) -> Callable[[dict[str, Any]], int]:
    return lambda f: f["pairs"] if f["dtype"] == dtype else 0


def _waits_before(accesses: str) -> str:
    return rf"\A(?:(?![^\n]*\b(?:{accesses})\.)[^\n]*\n)*[^\n]*\bACQBULK\b"


#: What kernels/_mxfp4.py and kernels/_pieces.py say of the forms that arch.isa chooses. The plain form claims nothing,
#: and float32 has its codes in every one.
CLAIMS = (
    Claim("bf16 in pairs", r"\bH(?:FMA|MUL|ADD)2\S*BF16_V2", _pairs_of("bf16")),
    # Not conversions to float32, nor constants, which ptxas makes by HFMA2.
    Claim("fp16 in pairs", r"\bH(?:FMA|MUL|ADD)2(?!\S*(?:BF16|F32))(?!\S* R\d+, -RZ, RZ)", _pairs_of("fp16")),
    Claim("minima and maxima in pairs", r"\bVIMNMX3?\.U16x2", lambda f: f["codes"]),
    Claim("nibbles picked by byte", r"\bPRMT\b", lambda f: f["codes"]),
    Claim("maximum that keeps NaN", r"\b(?:FMNMX3?\.NAN|v_maximum3?_f32)", lambda f: f["maxima"]),
    # On gfx1250 a product and its rounding may be one instruction, of one element.
    Claim(
        "rounded in pairs",
        r"\b(?:F2FP\.B?F16\.F32\.PACK_AB|v_cvt_pk_bf16_f32|v_fma_mixlo_bf16)",
        lambda f: f["rounded"],
    ),
    Claim("matrix instructions", r"\b(?:HG?MMA|UTCHMMA|v_mfma_|v_wmma_)", lambda f: f.get("dots", 0)),
    Claim("products of codes", r"\b(?:OMMA|UTCOMMA|v_mfma_scale_|v_wmma_scale_)", lambda f: f.get("dots of codes", 0)),
    Claim("tensor cores", r"\bHMMA\.16816\.F32\.BF16", lambda f: f["products"]),
    Claim("asynchronous tensor cores", r"\bHGMMA\.64x", lambda f: 8 * f.get("columns", 0)),
    # Where ptxas cannot tell what is under way, it waits for all after each product.
    Claim("products under way", r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x1", lambda f: 4 * f.get("columns", 0)),
    Claim("x copied in bulk", r"\bUBLKCP\b", lambda f: max(0, 2 * f.get("columns", 0) - 1)),
    # A kernel launched early that reads or writes before it has waited races with the one in front.
    Claim("waits before any access", _waits_before(r"LDG?|LDGSTS|STG?|REDG?|ATOMG?"), lambda f: f["PTX"]),
    Claim(
        "waits, if not to copy the weight",
        _waits_before(r"LDG?|STG?|REDG?|ATOMG?"),
        lambda f: f.get("weight first", 0),
    ),
    Claim("lets the next kernel come", r"\bPREEXIT\b", lambda f: f["PTX"] or f.get("weight first", 0)),
    Claim("tiles on their way", r"\bLDGSTS\.E\S*(?:128|64)\b", lambda f: f.get("copies", 0)),
)


def broken(of: dict[str, Any], code: str) -> tuple[str, ...]:
    """Claims that a launch with these facts makes and its code does not bear out."""
    return tuple(claim.what for claim in CLAIMS if len(re.findall(claim.code, code)) < claim.least(of))
