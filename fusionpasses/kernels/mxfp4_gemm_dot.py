"""Product with an MXFP4 weight as checkpoints have it, in nothing but Triton's own terms: for AMD's and other GPUs.

==========  ========================================================  =================================================
mode        what a program does with codes and scales                 where (``mode_for``)
==========  ========================================================  =================================================
DECODED     makes bfloat16 of them by moving bits and two             everywhere
            multiplications, all exact, and multiplies bfloat16
DOT_SCALED  leaves them to ``tl.dot_scaled``: to instructions that    gfx950, gfx125x, sm_100, sm_120
            decode, and for MXFP4 x those that multiply codes
==========  ========================================================  =================================================

Both multiply the same numbers and add them up in float32. But where ``tl.dot_scaled`` multiplies codes by their scales
as bfloat16, as it does on NVIDIA's GPUs if x is bfloat16, Triton 3.6 reads a scale byte of 0 as 0, where 2**-127 is
meant (3.9 does not); and 3.6 compiles no product of codes for gfx942. DECODED depends on neither.

Where there are too few rows to give all processors a program, several cut K among them (``SPLIT_K``); then each writes
sums of its own, and ``mxfp4_gemm_sum`` adds them in a fixed order: a result has the same bytes in every call.
"""

# ruff: noqa: RET505
# (Triton needs the else of a constexpr if.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels._pieces import PTX
from fusionpasses.kernels.arch import Arch

DECODED = tl.constexpr(0)
DOT_SCALED = tl.constexpr(1)


def mode_for(arch: Arch) -> int:
    """DOT_SCALED where an instruction decodes four-bit floats, or multiplies them as they are; else DECODED.

    Instructions of a step of four warps over 16 tokens x 64 rows x 128, Triton 3.9, DECODED and DOT_SCALED: gfx942 210
    and 275, gfx1100 669 and 922, gfx1201 661 and 493, gfx950 225 and 172, sm_120 550 and 170. Of MXFP4 x: gfx942 287
    and 529, gfx1100 820 and 1799, gfx1201 751 and 939, gfx950 268 and 44.
    """
    return int((DOT_SCALED if _knows_codes(arch) else DECODED).value)


def _knows_codes(arch: Arch) -> bool:
    return arch.name.startswith(("gfx950", "gfx125", "sm_10", "sm_12"))


def for_dot(tokens: int, arch: Arch, w4a4: bool) -> bool:
    """Is it ``mxfp4_gemm_dot`` that runs? Else the weight is made bfloat16, and torch multiplies.

    A guess: it has run on none of the GPUs that it is for. Where codes themselves are multiplied, always: torch has no
    such product. Else for one tile of tokens: a copy in bfloat16 is eight times the memory traffic of the codes, but
    for each further tile all of the weight would be decoded again. From sm_90 on, ``mxfp4_gemm`` takes few tokens.
    """
    if w4a4 and _knows_codes(arch):
        return True
    return not arch.hopper_ptx and tokens <= 64


def launch_options(tokens: int, rows: int, width: int, arch: Arch, w4a4: bool) -> dict[str, int | bool]:
    """Tile and compile options. Chosen by compiled code alone: no register spills, few instructions for a code.

    ==========  ========  ==============================================================================================
    mode        x         tiles, tokens x rows x K
    ==========  ========  ==============================================================================================
    DECODED     any       16, 64 x 64 x 64; of 128 rows with wavefronts of 64: a fifth fewer instructions. RDNA spills
                          with K of 128 from 32 tokens on
    DOT_SCALED  bfloat16  16, 64 x 128 x 128; NVIDIA's with eight warps for 64 tokens, or sm_120 spills
    DOT_SCALED  MXFP4     16 x 64 x 256, 64 x 128 x 128, 128 x 128 x 256: about what AITER's tables have for gfx950
    ==========  ========  ==============================================================================================
    """
    scaled = mode_for(arch) == DOT_SCALED.value
    block_m = 16 if tokens <= 16 else 64
    block_n, block_k, warps = 64, 64, 4
    if scaled and w4a4:
        # Of fewer tokens, sm_100 has no product of codes, and Triton would make it one of bfloat16.
        block_m = 128 if tokens > 64 or arch.name.startswith("sm_10") else block_m
        block_n, block_k, warps = {16: (64, 256, 4), 64: (128, 128, 4), 128: (128, 256, 8)}[block_m]
    elif scaled:
        block_n, block_k, warps = 128, 128, 8 if arch.hopper_ptx and block_m == 64 else 4
    elif arch.warp_size == 64:
        block_n = 128
    options: dict[str, int | bool] = {
        "MODE": mode_for(arch),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLIT_K": _parts(tokens, -(-tokens // block_m) * -(-rows // block_n), width, block_k, arch),
        "num_warps": warps,
        # With three, bfloat16 x spills on sm_120.
        "num_stages": 3 if arch.hopper_ptx and w4a4 else 2,
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options["launch_pdl"] = True
    return options


def _parts(tokens: int, programs: int, width: int, block_k: int, arch: Arch) -> int:
    """Programs that cut K among them: enough for all processors, if each has four steps and few sums."""
    parts = 1
    while (
        programs * parts < arch.processors
        and width >= block_k * 4 * (2 * parts)
        # Sums, written and read, are at most half as many bytes as the codes.
        and 2 * parts * tokens * 8 <= width // 4
    ):
        parts *= 2
    return parts


@triton.jit
def _power(byte):
    """A scale byte as float32: 2**(byte - 127), NaN for 255."""
    bits = tl.where(byte == 0, 0x00400000, byte.to(tl.uint32) << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _value(word, factor):
    """bfloat16 of the code in the upper four bits of each word, times its factor."""
    # Sign to sign and the other three to the lowest bits of the exponent and the highest of the mantissa.
    bits = (word.to(tl.int32, bitcast=True) >> 6).to(tl.uint32, bitcast=True) & 0x81C00000
    # That is the value times 2**-126, which is made up for first: then the product is exact for every scale.
    value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor
    # No bit of it is in the lower half.
    return (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _decoded(codes, scales):
    """bfloat16 ``[N, K]`` of codes ``[N, K/2]`` and scales ``[N, K/32]``."""
    N: tl.constexpr = codes.shape[0]
    BYTES: tl.constexpr = codes.shape[1]
    factor = tl.broadcast_to(_power(scales)[:, :, None], [N, BYTES // 16, 16])
    factor = tl.reshape(factor, [N, BYTES])
    word = codes.to(tl.uint32)
    return tl.reshape(tl.join(_value(word << 28, factor), _value(word << 24, factor)), [N, BYTES * 2])


@triton.jit
def _load(ptr, at, inside, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + at, mask=inside, other=other)
    else:
        return tl.load(ptr + at)


@triton.jit(do_not_specialize=["tokens"])
def mxfp4_gemm_dot(
    x_ptr,  # bfloat16 [tokens, K], or codes [tokens, K/2]
    x_scales_ptr,  # [tokens, K/32], or None: x is bfloat16
    w_ptr,  # [rows, K/2]
    w_scales_ptr,  # [rows, K/32]
    bias_ptr,  # [rows], or None
    out_ptr,  # [tokens, rows]; with SPLIT_K > 1 float32 [SPLIT_K, tokens, rows]
    tokens,
    rows,
    x_stride,
    K: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens
    BLOCK_N: tl.constexpr,  # rows of the weight
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ISA: tl.constexpr,
):
    """Grid ``(cdiv(tokens, BLOCK_M), cdiv(rows, BLOCK_N), SPLIT_K)``."""
    STEPS: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    MASKED: tl.constexpr = K % (BLOCK_K * SPLIT_K) != 0
    if ISA == PTX:
        gdc_wait()
        gdc_launch_dependents()
    first_token = tl.program_id(0) * BLOCK_M
    first_row = tl.program_id(1) * BLOCK_N
    part = tl.program_id(2)
    # On AMD's GPUs Triton makes 32 bits of the 64 where a tensor is small enough.
    x_ptr += first_token.to(tl.int64) * x_stride
    w_ptr += first_row.to(tl.int64) * (K // 2)
    w_scales_ptr += first_row.to(tl.int64) * (K // 32)
    if x_scales_ptr is not None:
        x_scales_ptr += first_token.to(tl.int64) * (K // 32)
    # Of a token or row that is not there, the last one is loaded; its product is not stored.
    token = tl.minimum(tl.arange(0, BLOCK_M), tokens - 1 - first_token)[:, None].to(tl.int64)
    row = tl.minimum(tl.arange(0, BLOCK_N), rows - 1 - first_row)[:, None].to(tl.int64)
    element = tl.arange(0, BLOCK_K)[None, :]
    byte = tl.arange(0, BLOCK_K // 2)[None, :]
    block = tl.arange(0, BLOCK_K // 32)[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(STEPS):
        k = (part * STEPS + step) * BLOCK_K
        left = K - k
        codes = _load(w_ptr + k // 2, row * (K // 2) + byte, byte < left // 2, 0, MASKED)
        # Where there is none, 1: a scale of 255 is NaN, whatever it scales.
        scales = _load(w_scales_ptr + k // 32, row * (K // 32) + block, block < left // 32, 127, MASKED)
        if x_scales_ptr is None:
            x = _load(x_ptr + k, token * x_stride + element, element < left, 0, MASKED)
            if MODE == DOT_SCALED:
                acc = tl.dot_scaled(x, None, "bf16", tl.trans(codes), scales, "e2m1", acc)
            else:
                acc = tl.dot(x, tl.trans(_decoded(codes, scales)), acc)
        else:
            x = _load(x_ptr + k // 2, token * x_stride + byte, byte < left // 2, 0, MASKED)
            x_scales = _load(x_scales_ptr + k // 32, token * (K // 32) + block, block < left // 32, 127, MASKED)
            if MODE == DOT_SCALED:
                acc = tl.dot_scaled(x, x_scales, "e2m1", tl.trans(codes), scales, "e2m1", acc)
            else:
                acc = tl.dot(_decoded(x, x_scales), tl.trans(_decoded(codes, scales)), acc)

    token = tl.arange(0, BLOCK_M)
    row = tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first_row + row, mask=row < rows - first_row, other=0).to(tl.float32)[None, :]
    exists = (token < tokens - first_token)[:, None] & (row < rows - first_row)[None, :]
    out_ptr += (part.to(tl.int64) * tokens + first_token) * rows + first_row
    tl.store(
        out_ptr + (token[:, None].to(tl.int64) * rows + row[None, :]), acc.to(out_ptr.dtype.element_ty), mask=exists
    )
