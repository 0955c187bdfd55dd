"""The part of the Triton provider's products with MXFP4 weights that multiplies by ``mxfp4_gemm_dot``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusionpasses.kernels import arch, mxfp4_gemm_dot, mxfp4_gemm_sum
from fusionpasses.providers import _launch
from fusionpasses.providers._product import Product


def multiply(product: Product, options: dict[str, Any]) -> None:
    """Of a weight in layout "linear"; ``options`` of ``mxfp4_gemm_dot.launch_options``."""
    x, x_scales, w_codes, w_scales, bias, out, tokens, rows, width, _, _, gpu, _ = product
    parts = options["SPLIT_K"]
    sums = out if parts == 1 else _launch.scratch(x, (parts, tokens, rows), torch.float32)
    _launch.launch(
        mxfp4_gemm_dot.mxfp4_gemm_dot,
        (-(-tokens // options["BLOCK_M"]), -(-rows // options["BLOCK_N"]), parts),
        x,
        x_scales,
        w_codes,
        w_scales,
        bias if parts == 1 else None,
        sums,
        tokens,
        rows,
        product.x_stride,
        K=width,
        ISA=gpu.isa,
        **options,
    )
    if parts > 1:
        add_up(sums, bias, out, tokens, rows, 0, gpu)


def add_up(sums: Tensor, bias: Tensor | None, out: Tensor, tokens: int, rows: int, shift: int, gpu: arch.Arch) -> None:
    """What each of the programs that cut K has, float32 ``[parts, tokens, n]``: their sum times ``2**shift``."""
    options: dict[str, Any] = mxfp4_gemm_sum.sum_options(tokens, rows, gpu)
    _launch.launch(
        mxfp4_gemm_sum.mxfp4_gemm_sum,
        (tokens, -(-rows // options["COLUMNS"])),
        sums,
        bias,
        out,
        tokens,
        rows,
        2.0**shift,
        SPLIT_K=sums.shape[0],
        ISA=gpu.isa,
        **options,
    )
