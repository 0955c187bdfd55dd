"""The part of the Triton provider's products with MXFP4 weights that multiplies by ``mxfp4_gemm_dot``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusionpasses.kernels import arch, mxfp4_gemm_dot, mxfp4_gemm_sum
from fusionpasses.providers import _launch


def multiply(
    x: Tensor,
    x_scales: Tensor | None,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tokens: int,
    n: int,
    width: int,
    options: dict[str, Any],
    gpu: arch.Arch,
) -> None:
    """``out = x @ w.T + bias`` with a weight in layout "linear".

    Args:
        x: bfloat16, contiguous or of two dimensions; or codes, contiguous, and ``x_scales`` with them.
        out: contiguous, ``tokens * n`` elements.
        tokens, n, width: of at least one token and one row.
        options: of ``mxfp4_gemm_dot.launch_options``.
    """
    parts = options["SPLIT_K"]
    sums = out if parts == 1 else _launch.scratch(x, (parts, tokens, n), torch.float32)
    _launch.launch(
        mxfp4_gemm_dot.mxfp4_gemm_dot,
        (-(-tokens // options["BLOCK_M"]), -(-n // options["BLOCK_N"]), parts),
        x,
        x_scales,
        w_codes,
        w_scales,
        bias if parts == 1 else None,
        sums,
        tokens,
        n,
        x.stride(-2) if x.dim() == 2 else x.shape[-1],
        K=width,
        ISA=gpu.isa,
        **options,
    )
    if parts > 1:
        add_up(sums, bias, out, tokens, n, 0, gpu)


def add_up(sums: Tensor, bias: Tensor | None, out: Tensor, tokens: int, n: int, shift: int, gpu: arch.Arch) -> None:
    """What each of the programs that cut K has, float32 ``[parts, tokens, n]``: their sum times ``2**shift``."""
    options: dict[str, Any] = mxfp4_gemm_sum.sum_options(tokens, n, gpu)
    _launch.launch(
        mxfp4_gemm_sum.mxfp4_gemm_sum,
        (tokens, -(-n // options["COLUMNS"])),
        sums,
        bias,
        out,
        tokens,
        n,
        2.0**shift,
        SPLIT_K=sums.shape[0],
        ISA=gpu.isa,
        **options,
    )
