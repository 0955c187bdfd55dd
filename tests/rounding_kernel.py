"""A kernel that only rounds, to try ``_pieces.pack`` on numbers that no quant sees."""

from __future__ import annotations

import triton
import triton.language as tl

from fusionpasses.kernels import _pieces


@triton.jit
def round_to_bfloat16(x_ptr, out_ptr, size, ISA: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    # Triton's -x is 0 - x.
    negative = (x.to(tl.uint32, bitcast=True) ^ 0x80000000).to(tl.float32, bitcast=True)
    word = _pieces.pack(x, negative, tl.bfloat16, ISA)
    tl.store(out_ptr + at, word, mask=at < size)
