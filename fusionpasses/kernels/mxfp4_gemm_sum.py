"""Sum of what programs that cut K among them have: the second kernel of a product with split K.

Each of S programs has written float32 sums over its part of K. They are added in the order of the parts, whatever
program ended first, so a result has the same bytes in every call; then the bias, then one rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusionpasses.kernels._pieces import PTX
from fusionpasses.kernels.arch import Arch


def sum_options(tokens: int, rows: int, arch: Arch) -> dict[str, int | bool]:
    """Four columns, 16 bytes of each partial sum, for a thread; programs of one warp until all processors have four.

    Not measured: a sum of so little is as long as a launch and one access to memory.
    """
    warps = 1 if tokens * rows < 16 * arch.warp_size * arch.processors else 4
    options: dict[str, int | bool] = {
        "COLUMNS": 4 * arch.warp_size * warps,
        "num_warps": warps,
        "enable_fp_fusion": False,
    }
    if arch.hopper_ptx:
        options["launch_pdl"] = True
    return options


@triton.jit(do_not_specialize=["tokens"])
def mxfp4_gemm_sum(
    partial_ptr,  # float32 [SPLIT_K, tokens, rows]
    bias_ptr,  # [rows], or None
    out_ptr,  # [tokens, rows]
    tokens,
    rows,
    factor,  # float32, a power of two that all sums take
    SPLIT_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ISA: tl.constexpr,
):
    """``out = round((partial[0] + partial[1] + ..) * factor + bias)``; grid ``(tokens, cdiv(rows, COLUMNS))``."""
    if ISA == PTX:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.load(partial_ptr + token * rows + row, mask=row < rows, other=0)
    # Unrolled, so that all loads are under way at once.
    for part in tl.static_range(1, SPLIT_K):
        total += tl.load(partial_ptr + (token + part * tokens.to(tl.int64)) * rows + row, mask=row < rows, other=0)
    total *= factor
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(out_ptr + token * rows + row, total.to(out_ptr.dtype.element_ty), mask=row < rows)
