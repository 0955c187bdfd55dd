"""What ``mxfp4_gemm_wgmma`` does with sums that are gate and up of a gated MLP: quantises their product at once.

Half of a tile's rows are of gate, half are the same rows of up. They meet in shared memory, where each becomes the
bfloat16 that the product would have stored; then four threads have a block of 32 of one token, and do what
``silu_mul_mxfp4_quant`` does. The next product finds its tokens in its order (``_token_order.py``).
"""

# ruff: noqa: SIM108
# (Triton needs the else of a constexpr if.)

from __future__ import annotations

import triton
import triton.language as tl

from fusionpasses.kernels import _mxfp4, _pieces, _token_order, _warpgroup
from fusionpasses.kernels import silu_mul_mxfp4_quant as gated
from fusionpasses.kernels._pieces import PTX


@triton.constexpr_function
def _pitch(warpgroups):
    """From a token to the next, in numbers: as many as it has rows, and so many more that no bank is met twice."""
    return warpgroups * 32 + 8


@triton.constexpr_function
def space(token_tiles, warpgroups):
    """Bytes of shared memory."""
    return 2 * token_tiles * 8 * _pitch(warpgroups) * 2


@triton.jit
def row_tile(tiles, warp, HALF: tl.constexpr, WARPGROUPS: tl.constexpr):
    """The 16 rows of a warp in the ``tiles``-th tile of rows: of gate's first, then of up's, HALF tiles of 16 later."""
    return tiles * (WARPGROUPS * 2) + warp % (WARPGROUPS * 2) + warp // (WARPGROUPS * 2) * HALF


@triton.jit
def store(
    sums,  # as the product has them
    thread,
    tiles,  # which tile of rows, and where its tokens begin
    first_token,
    tokens,
    factor,
    out_ptr,
    AT: tl.constexpr,  # of shared memory
    TOKEN_TILES: tl.constexpr,
    WARPGROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a token, and the tiles of its order
    NEXT_TILES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CAST_ORDER: tl.constexpr,
    SCALE_ADDEND: tl.constexpr,
    ISA: tl.constexpr,
):
    PITCH: tl.constexpr = _pitch(WARPGROUPS)
    HALF: tl.constexpr = TOKEN_TILES * 8 * PITCH
    WORDS: tl.constexpr = ISA == PTX
    tl.static_assert(TOKEN_TILES <= 4, "a thread has one quarter of a block")
    warp = thread // 32
    lane = thread % 32
    row = warp % (WARPGROUPS * 2) * 16 + lane // 4
    of_up = warp // (WARPGROUPS * 2)
    for n in tl.static_range(TOKEN_TILES):
        for i in tl.static_range(4):
            bits = (sums[4 * n + i] * factor).to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
            token = n * 8 + lane % 4 * 2 + i % 2
            _warpgroup.put((of_up * HALF + token * PITCH + row + 8 * (i // 2)) * 2, bits, AT)
    _warpgroup.barrier(thread)
    # A warp has eight tokens and one block of each.
    token = warp % TOKEN_TILES * 8 + lane // 4
    block = warp // TOKEN_TILES
    there = block < WARPGROUPS
    place = (token * PITCH + tl.where(there, block, 0) * 32 + lane % 4 * 8) * 2
    gate, up = _warpgroup.take(place, AT), _warpgroup.take(place, AT + HALF * 2)
    piece = gated.gated_product(gate, up, tl.bfloat16, ACTIVATION, CAST_ORDER, True, ISA)
    if WORDS:
        values = piece
    else:
        values = _pieces.to_floats(piece, tl.bfloat16)
    codes, scale = _mxfp4.quantize_quarter(values, SCALE_ADDEND, WORDS, ISA)
    token += first_token
    block += tiles * WARPGROUPS
    mask = there & (token < tokens)
    _token_order.store_quarter(out_ptr, token, block, lane % 4, codes, scale, mask, BLOCKS, NEXT_TILES, ISA)
