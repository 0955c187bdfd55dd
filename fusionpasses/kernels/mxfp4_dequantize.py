"""An MXFP4 weight as bfloat16, for products of many tokens."""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc,var-annotated"
# (Triton does not know (*a, b); tuples grow.)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels import _mxfp4_words
from fusionpasses.kernels._mxfp4_words import LINEAR, TILES
from fusionpasses.kernels._pieces import PTX
from fusionpasses.kernels.arch import Arch


def dequantize_options(arch: Arch) -> dict[str, int | bool]:
    """Two words a thread: one takes up to 1.8 times as long on an H200, four and eight take as long."""
    options: dict[str, int | bool] = {
        "UNROLLED": 2,
        "LANES": 8 * arch.warp_size,
        "num_warps": 8,
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options["launch_pdl"] = True
    return options


@triton.jit(do_not_specialize=["words"])
def mxfp4_dequantize(
    w_ptr,
    scales_ptr,
    out_ptr,  # bfloat16 [rows, K]
    words,
    rows,
    shift,  # 2**shift is what all values take, in TILES
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
    UNROLLED: tl.constexpr,
    LANES: tl.constexpr,
    ISA: tl.constexpr,
):
    """The weight in bfloat16, exact but where that has no such number. A thread makes eight of a word."""
    BLOCKS: tl.constexpr = K // 32
    COLUMNS: tl.constexpr = (BLOCKS + 3) // 4
    if ISA == PTX:
        gdc_wait()
        gdc_launch_dependents()
    # All loads come before the first store, which might write to what a later one reads, for all that a compiler knows.
    loaded = ()
    for i in tl.static_range(UNROLLED):
        at = (tl.program_id(0).to(tl.int64) * UNROLLED + i) * LANES + tl.arange(0, LANES)
        word = tl.load(w_ptr.to(tl.pointer_type(tl.uint32)) + at, mask=at < words, other=0)
        if LAYOUT == TILES:
            part = (at % 256).to(tl.int32)
            row = at // (COLUMNS * 256) * 16 + part // 128 * 8 + part % 128 // 16
            column = (at // 256 % COLUMNS).to(tl.int32)
            block = column * 4 + part % 4
            element = block * 32 + part % 16 // 4 * 8
            exists = (row < rows) & (block < BLOCKS)
            byte = at // 256 * 64 + part % 128 // 16 * 8 + part // 128 * 4 + part % 4
        else:
            row = at // (BLOCKS * 4)
            element = (at % (BLOCKS * 4)).to(tl.int32) * 8
            exists = at < words
            byte = at // 4
        scale = tl.load(scales_ptr + byte, mask=exists, other=127).to(tl.uint32)
        loaded = loaded + ((word, scale, row * K + element, exists),)
    for i in tl.static_range(UNROLLED):
        word, scale, place, exists = loaded[i]
        scale = scale * 0x00800080 if LAYOUT == TILES else _mxfp4_words.power(scale)
        v = _mxfp4_words.scaled(word, scale, LAYOUT, ISA)
        if LAYOUT == LINEAR:
            v = _mxfp4_words.together(v, ISA)
        else:
            v = _mxfp4_words.times(v, tl.full(word.shape, (shift + 127) * 0x00800080, tl.uint32), ISA)
        eight = tl.reshape(tl.join(tl.join(v[0], v[2]), tl.join(v[1], v[3])), [LANES, 4])
        out = out_ptr.to(tl.pointer_type(tl.uint32)) + place // 2
        tl.store(out[:, None] + tl.arange(0, 4)[None, :], eight, mask=exists[:, None])
