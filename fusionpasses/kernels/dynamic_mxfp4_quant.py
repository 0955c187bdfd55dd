"""MXFP4 quantisation alone. Blocks do not depend on each other, so programs cut the tensor anywhere.

Bytes: exactly those of the reference, for every input, on every target.
"""

# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment"
# (Triton needs the else of a constexpr if, and does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _mxfp4, _pieces, _token_order
from fusionpasses.kernels._mxfp4 import BLOCK, PTX
from fusionpasses.kernels.arch import Arch


def launch_options(arch: Arch) -> dict[str, int | bool]:
    """Tile and compile options. On an H200, 2 to 8 warps are within 3 % of each other, whatever the number of rows."""
    options: dict[str, int | bool] = {
        "TILE_BLOCKS": 4 * arch.warp_size,
        "num_warps": 4,
        # Whether it is on otherwise depends on the Triton version.
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options["launch_pdl"] = True
    return options


@triton.jit(do_not_specialize=["group_rows"])
def dynamic_mxfp4_quant(
    x_ptr,
    codes_ptr,  # or numbers, in a product's order
    scales_ptr,  # or a product's flags
    x_row_stride,  # None: one row, cut along the first axis of the grid; else the axes are (rows, cuts of a row)
    row_blocks,  # with TOKEN_TILES the number of tokens
    group_rows,  # None, or x_row_stride is between the rows of groups of so many, and the next one between groups:
    group_stride,  # then rows are cut as one row of row_blocks, which has ROW_BLOCKS of each
    ROW_BLOCKS: tl.constexpr,  # also with TOKEN_TILES
    TILE_BLOCKS: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE_ADDEND: tl.constexpr,
    K_BLOCKS: tl.constexpr,  # of a token, which is one row of x or several
    TOKEN_TILES: tl.constexpr,  # None: codes and scales; else of _token_order
    FLAGS: tl.constexpr,
    ISA: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = ISA == PTX and dtype != tl.float32
    if ISA == PTX:
        # Launched before the kernel in front has ended (``launch_pdl``): wait for its writes, let the next one come.
        gdc_wait()
        gdc_launch_dependents()
    block = tl.arange(0, TILE_BLOCKS)[None, :]
    column = block * BLOCK
    # 64 bits before the first product: rows times stride passes 2**31 in tensors that fit a GPU.
    if TOKEN_TILES is None:
        if x_row_stride is None or group_rows is not None:
            # Rows of a head are a few blocks long: a program for each would leave most of its threads without one.
            start = tl.program_id(0).to(tl.int64) * TILE_BLOCKS
            source = x_ptr + start * BLOCK
            first = start
        else:
            row = tl.program_id(0).to(tl.int64)
            start = tl.program_id(1).to(tl.int64) * TILE_BLOCKS
            source = x_ptr + row * x_row_stride + start * BLOCK
            first = row * row_blocks + start
        mask = start + block < row_blocks
    else:
        token, of_token = _token_order.place_of(tl.program_id(0) * TILE_BLOCKS + block, K_BLOCKS)
        mask = token < row_blocks
    if TOKEN_TILES is not None or group_rows is not None:
        # Dividing 32 bits takes a fraction of what dividing 64 does. Unsigned, the last tile cannot pass the end.
        if TOKEN_TILES is not None:
            at = (token * K_BLOCKS + of_token).to(tl.uint32)
        elif row_blocks.dtype == tl.int32:
            at = tl.program_id(0).to(tl.uint32) * TILE_BLOCKS + block.to(tl.uint32)
        else:
            at = start + block
        row = at // ROW_BLOCKS
        column = (at - row * ROW_BLOCKS).to(tl.int32) * BLOCK
        if group_rows is None:
            source = x_ptr + row.to(tl.int64) * x_row_stride
        else:
            group = row // group_rows.to(at.dtype)
            in_group = row - group * group_rows.to(at.dtype)
            source = x_ptr + (group.to(tl.int64) * group_stride + in_group.to(tl.int64) * x_row_stride)
    pieces = ()
    for p in tl.static_range(4):
        pieces = pieces + (_pieces.load_piece(source, column + p * 8, mask, MASKED, ""),)
    values = ()
    for p in tl.static_range(4):
        if WORDS:
            values = values + (pieces[p],)
        else:
            values = values + (_pieces.floats_of(pieces[p], dtype),)
    codes, scale = _mxfp4.quantize(values, dtype, SCALE_ADDEND, WORDS, ISA)
    if TOKEN_TILES is None:
        _mxfp4.store_quantized(codes_ptr + first * (BLOCK // 2), scales_ptr + first, block, codes, scale, mask, MASKED)
    else:
        _token_order.lower_flags(scales_ptr, FLAGS)
        _token_order.store(codes_ptr, token, of_token, codes, scale, mask, K_BLOCKS, TOKEN_TILES, MASKED, ISA)
