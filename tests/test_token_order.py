"""Quants that leave tokens in the order of a product, and the overloads that use it: interpreted, and on a GPU.

The proof is by the kernels that put codes in order: what a quant writes is what they make of its codes and scales.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor

from fusionpasses.ops import _mxfp4
from fusionpasses.probes import probe_triton

pytestmark = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)

#: Of a bfloat16: a NaN that nothing computes.
_UNWRITTEN = 0x7FA1


def calls(
    tokens: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """A call of each quant that may go on to a product."""
    wide = torch.randn(tokens, 2 * width + 64, device=device).to(dtype)
    x, y = wide[:, :width], wide[:, width : 2 * width]
    x[0, :32] = 0
    if tokens > 1:
        x[1, 33] = torch.inf
    weight = torch.randn(width, device=device).to(dtype)
    yield "dynamic_mxfp4_quant.default", (x,), {"scale_mode": "rceil"}
    yield "dynamic_mxfp4_quant.default", (x.contiguous(),), {}
    heads = torch.randn(width // 64, tokens, 64, device=device).to(dtype)
    yield "dynamic_mxfp4_quant.default", (heads.transpose(0, 1),), {"axes": 2}
    yield "dynamic_mxfp4_quant.default", (heads.view(tokens, -1, 64),), {"axes": 2}
    yield "rmsnorm_mxfp4_quant.default", (x, weight, 1e-6), {"cast_order": "cast_scale"}
    yield "rmsnorm_add_mxfp4_quant.default", (x, y.contiguous(), None, 1e-6), {"cast_order": "scale_cast"}
    second = (x, weight, 1e-6, y[:, :64], None, 1e-6)
    yield "rmsnorm_mxfp4_quant.with_second", second, {"cast_order": "scale_cast", "cast_order2": "cast_scale"}
    yield "silu_mul_mxfp4_quant.default", (x, y), {"cast_order": "cast_mul"}
    yield "silu_mul_mxfp4_quant.default", (x.contiguous(), y.contiguous()), {"cast_order": "mul_cast"}


def by_the_kernels_in_front(codes: Tensor, scales: Tensor, token_tiles: int, columns: int, like: Tensor) -> Tensor:
    """Numbers in order, as ``mxfp4_gemm_arrange`` and ``mxfp4_gemm_interleave`` make them."""
    from fusionpasses.kernels import mxfp4_gemm, mxfp4_gemm_wgmma
    from fusionpasses.kernels._mxfp4_words import TILES
    from fusionpasses.kernels.arch import PLAIN

    out = torch.empty_like(like)
    tokens, width = codes.shape[0], codes.shape[1] * 2
    strides = codes.shape[1], scales.shape[1]
    if token_tiles:
        flags = torch.empty(4, dtype=torch.int32)
        mxfp4_gemm_wgmma.mxfp4_gemm_interleave[(columns, out.shape[0] * token_tiles)](
            *(codes, scales, out, flags, tokens, 4, *strides),
            K=width,
            COLUMNS=columns,
            TOKEN_TILES=token_tiles,
            WARPS=1,
            ISA=PLAIN,
        )
    else:
        mxfp4_gemm.mxfp4_gemm_arrange[(columns, out.shape[0])](
            *(codes, scales, out, tokens, *strides), K=width, LAYOUT=TILES.value, WARPS=1, ISA=PLAIN
        )
    return out


def check_order() -> None:
    triton_interpreter.cast_bfloat16_as_gpus_do()
    from fusionpasses.providers import triton
    from fusionpasses.providers._destination import Destination

    quants = {
        "dynamic_mxfp4_quant.default": triton._dynamic_mxfp4_quant,
        "rmsnorm_mxfp4_quant.default": triton._rmsnorm_mxfp4_quant,
        "rmsnorm_mxfp4_quant.with_second": triton._rmsnorm_mxfp4_quant_with_second,
        "rmsnorm_add_mxfp4_quant.default": triton._rmsnorm_add_mxfp4_quant,
        "silu_mul_mxfp4_quant.default": triton._silu_mul_mxfp4_quant,
    }
    rng = random.Random(0)
    cases = [(1, 0, 128), (11, 0, 384), (11, 1, 384), (32, 1, 128), (1, 3, 384), (33, 3, 128), (20, 2, 256)]
    cases += [(3, 0, 1152), (9, 2, 1152), (2, 1, 4096)]  # rows of several warps
    for (tokens, token_tiles, width), dtype in zip(cases, itertools.cycle(_mxfp4.INPUT_DTYPES), strict=False):
        torch.manual_seed(tokens)
        columns, at_once = width // 128, max(token_tiles, 1)
        groups = -(-tokens // (8 * at_once))
        for name, args, kwargs in calls(tokens, width, dtype):
            codes, scales, *others = quants[name](*args, **kwargs)
            numbers = torch.full((groups, columns, at_once * 1024), _UNWRITTEN, dtype=torch.int16)
            flags = torch.full((rng.choice((1, 130, 700)),), 7, dtype=torch.int32) if token_tiles else None
            into = Destination(numbers.view(torch.bfloat16), flags, token_tiles)
            _, _, *got_others = quants[name](*args, **kwargs, into=into)
            codes, scales = codes.flatten(1), scales.flatten(1)
            want = by_the_kernels_in_front(codes, scales, token_tiles, columns, into.codes)
            written = numbers != _UNWRITTEN
            what = f"{name} {tokens} x {width}, {token_tiles} tiles of tokens, {dtype}"
            assert int(written.sum()) == tokens * width, f"{what}: {int(written.sum())} numbers written"
            same = (into.codes == want) | (into.codes.isnan() & want.isnan())
            assert same[written].all(), f"{what}: {int((~same & written).sum())} numbers differ"
            assert flags is None or not flags.any(), f"{what}: flags left"
            for got, other in zip(got_others, others, strict=True):
                assert torch.equal(got.isnan(), other.isnan()), what
                assert torch.equal(got.nan_to_num(), other.nan_to_num()), what


GROUPS = {"order": check_order}


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    triton_interpreter.run(__file__, group)


if __name__ == "__main__":
    with triton_interpreter.without_needless_work():
        GROUPS[sys.argv[1]]()
