"""Launches of ``mxfp4_gemm_wgmma``: x put in order, then the product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusionpasses.kernels import mxfp4_gemm_wgmma
from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.providers import _launch
from fusionpasses.providers._product import Product


def multiply(product: Product, options: dict[str, Any]) -> None:
    """Of a weight in layout "tiles"; ``options`` of ``launch_options``."""
    x, x_scales, w_codes, w_scales, bias, out, tokens, rows, width, _, shift, gpu = product
    w_codes, w_scales = _aligned(w_codes), _aligned(w_scales)
    options = dict(options)
    programs, token_tiles, unrolled = options.pop("PROGRAMS"), options["TOKEN_TILES"], options["UNROLLED"]
    groups = -(-tokens // (8 * token_tiles))
    units = -(-width // (_mxfp4_weight.TILE_WIDTH * unrolled))
    columns, warps = units * unrolled, 4
    threads = 128 * options["WARPGROUPS"]
    in_order = _launch.scratch(x, (groups, columns, token_tiles * 1024), torch.bfloat16)
    flags = _launch.scratch(x, (programs,), torch.int32)
    partial = _launch.scratch(x, (programs, 4 * token_tiles, threads), torch.float32)
    _launch.launch(
        mxfp4_gemm_wgmma.mxfp4_gemm_interleave,
        (-(-columns // warps), groups * token_tiles),
        x,
        x_scales,
        in_order,
        flags,
        tokens,
        programs,
        product.x_stride,
        None if x_scales is None else width // _mxfp4.BLOCK,
        K=width,
        COLUMNS=columns,
        TOKEN_TILES=token_tiles,
        WARPS=warps,
        ISA=gpu.isa,
        num_warps=warps,
        enable_fp_fusion=False,
        launch_pdl=True,
    )
    _launch.launch(
        mxfp4_gemm_wgmma.mxfp4_gemm_wgmma,
        (programs,),
        in_order,
        w_codes,
        w_scales,
        bias,
        out,
        partial,
        flags,
        tokens,
        rows,
        groups,
        *divmod(-(-rows // (threads // 2)) * groups * units, programs),
        programs,
        2.0**shift,
        K=width,
        ISA=gpu.isa,
        **options,
    )


def _aligned(bytes_: Tensor) -> Tensor:
    """Bytes, or a copy of them from which words can be copied to shared memory, 16 bytes at once."""
    return bytes_ if bytes_.data_ptr() % 16 == 0 else bytes_.clone()
