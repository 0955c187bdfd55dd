"""Launches of ``mxfp4_gemm_wgmma``: x put in order, then the product; or the product and a gated activation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionpasses.kernels import mxfp4_gemm_wgmma
from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.providers import _launch
from fusionpasses.providers._destination import Destination
from fusionpasses.providers._product import Product


class Gated(NamedTuple):
    """What is done with sums of gate and up, before any is stored."""

    into: Destination  #: of their product, in the order of the next one
    activation: str
    cast_order: str
    scale_mode: str

    def constants(self, rows: int) -> dict[str, Any]:
        return {
            "GATE_TILES": rows // 2 // _mxfp4_weight.TILE_ROWS,
            "NEXT_TILES": self.into.token_tiles,
            "next_flags_ptr": self.into.scales,
            "NEXT_FLAGS": self.into.constants["FLAGS"],
            "ACTIVATION": self.activation,
            "CAST_ORDER": self.cast_order,
            "SCALE_ADDEND": _mxfp4.SCALE_ADDEND[self.scale_mode],
        }


#: What the kernel is given where a product is stored as it is.
NOT_GATED: dict[str, Any] = {
    "GATE_TILES": None,
    "NEXT_TILES": None,
    "next_flags_ptr": None,
    "NEXT_FLAGS": None,
    "ACTIVATION": None,
    "CAST_ORDER": None,
    "SCALE_ADDEND": None,
}


def multiply(product: Product, options: dict[str, Any], gated: Gated | None = None) -> None:
    """Of a weight in layout "tiles"; ``options`` of ``launch_options``. With ``gated``, ``product.out`` has its."""
    x, _, w_codes, w_scales, bias, out, tokens, rows, width, _, shift, gpu, ordered = product
    w_codes, w_scales = _aligned(w_codes), _aligned(w_scales)
    if ordered is None:
        ordered = destination(x, tokens, width, options)
        _interleave(product, ordered)
    options = dict(options)
    programs, token_tiles = options.pop("PROGRAMS"), options["TOKEN_TILES"]
    groups, columns, _ = ordered.codes.shape
    units = columns // options["UNROLLED"]
    threads = 128 * options["WARPGROUPS"]
    partial = _launch.scratch(x, (programs, 4 * token_tiles, threads), torch.float32)
    _launch.launch(
        mxfp4_gemm_wgmma.mxfp4_gemm_wgmma,
        (programs,),
        ordered.codes,
        w_codes,
        w_scales,
        bias,
        out,
        partial,
        ordered.scales,
        tokens,
        rows,
        groups,
        *divmod(-(-rows // (threads // 2)) * groups * units, programs),
        programs,
        2.0**shift,
        K=width,
        ISA=gpu.isa,
        **(NOT_GATED if gated is None else gated.constants(rows)),
        **options,
    )


def destination(x: Tensor, tokens: int, width: int, options: dict[str, Any]) -> Destination:
    """Scratch for tokens in the order of the kernel, and for its flags."""
    token_tiles, unrolled = options["TOKEN_TILES"], options["UNROLLED"]
    groups = -(-tokens // (8 * token_tiles))
    columns = -(-width // (_mxfp4_weight.TILE_WIDTH * unrolled)) * unrolled
    numbers = _launch.scratch(x, (groups, columns, token_tiles * 1024), torch.bfloat16)
    return Destination(numbers, _launch.scratch(x, (options["PROGRAMS"],), torch.int32), token_tiles)


def _interleave(product: Product, ordered: Destination) -> None:
    numbers, flags, token_tiles = ordered
    groups, columns, _ = numbers.shape
    warps = 4
    _launch.launch(
        mxfp4_gemm_wgmma.mxfp4_gemm_interleave,
        (-(-columns // warps), groups * (token_tiles or 0)),
        product.x,
        product.x_scales,
        numbers,
        flags,
        product.tokens,
        0 if flags is None else flags.numel(),
        product.x_stride,
        None if product.x_scales is None else product.width // _mxfp4.BLOCK,
        K=product.width,
        COLUMNS=columns,
        TOKEN_TILES=token_tiles,
        WARPS=warps,
        ISA=product.gpu.isa,
        num_warps=warps,
        enable_fp_fusion=False,
        launch_pdl=True,
    )


def _aligned(bytes_: Tensor) -> Tensor:
    """Bytes, or a copy of them from which words can be copied to shared memory, 16 bytes at once."""
    return bytes_ if bytes_.data_ptr() % 16 == 0 else bytes_.clone()
