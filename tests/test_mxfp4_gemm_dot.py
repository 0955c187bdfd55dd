"""Products with MXFP4 weights by ``tl.dot`` and ``tl.dot_scaled``: interpreted anywhere, compiled on a GPU."""

from __future__ import annotations

import itertools
import os
import random
import sys
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor

from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.probes import probe_triton

needs_triton = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels")


def weight(rows: int, width: int, low: int, high: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random codes, scale bytes from low to high - 1."""
    codes = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8, device=device)
    return codes, torch.randint(low, high, (rows, width // 32), dtype=torch.uint8, device=device)


def multiply(
    x: Tensor,
    x_scales: Tensor | None,
    w: tuple[Tensor, Tensor],
    bias: Tensor | None,
    out_dtype: torch.dtype,
    **chosen: int,
) -> Tensor:
    """One call of ``multiply`` with these tiles, mode and parts."""
    from fusionpasses.kernels import arch, mxfp4_gemm_dot
    from fusionpasses.providers._product import Product
    from fusionpasses.providers._triton_gemm_dot import multiply

    tokens, (n, half) = len(x), w[0].shape
    out = torch.full((tokens, n), torch.nan, device=x.device).to(out_dtype)
    gpu = arch.of(x.device)
    options = mxfp4_gemm_dot.launch_options(tokens, n, 2 * half, gpu, x_scales is not None) | chosen
    multiply(Product(x, x_scales, *w, bias, out, tokens, n, 2 * half, "linear", 0, gpu), options)
    return out


# ---- what is chosen


@needs_triton
def test_every_choice_fits_the_call() -> None:
    from fusionpasses.kernels import mxfp4_gemm_dot as kernels
    from fusionpasses.kernels.arch import Arch
    from tools.configs import TARGETS

    grid = itertools.product(TARGETS, (1, 9, 17, 33, 64, 65, 5000), (1, 576, 18432), (32, 2880, 7168), (False, True))
    for name, tokens, rows, width, codes in grid:
        gpu = Arch(name, TARGETS[name].warp_size, TARGETS[name].processors)
        chosen = kernels.launch_options(tokens, rows, width, gpu, codes)
        parts, programs = chosen["SPLIT_K"], -(-tokens // chosen["BLOCK_M"]) * -(-rows // chosen["BLOCK_N"])
        assert chosen["MODE"] == kernels.mode_for(gpu)
        assert parts == 1 or programs * parts < 2 * gpu.processors
        # Each part has something to add up.
        assert (parts - 1) * -(-width // (chosen["BLOCK_K"] * parts)) * chosen["BLOCK_K"] < width
        assert parts == 1 or parts * tokens * 4 <= width / 2
        assert kernels.for_dot(64, gpu, codes) or gpu.hopper_ptx
    assert [name for name in TARGETS if kernels.for_dot(5000, Arch(name, 32, 99), True)] == [
        "sm_100",
        "sm_120",
        "gfx950",
        "gfx1250",
    ]


@needs_triton
def test_every_tile_is_compiled() -> None:
    from tools.configs import TARGETS
    from tools.dot_configs import DotConfig, every_dot
    from tools.launches import launches

    def tile(config: DotConfig) -> tuple[Any, ...]:
        (launch,) = launches(config)
        return config.target, config.codes, [item for item in launch.tile[1:] if item[0] != "SPLIT_K"]

    compiled_tiles = [tile(config) for config in every_dot(TARGETS) if config.chain == "dots"]
    for target, tokens, codes in itertools.product(TARGETS, (1, 16, 17, 65, 300), (False, True)):
        assert tile(DotConfig(target, "dots", tokens, 4096, 4096, codes)) in compiled_tiles


# ---- interpreted


def _case(seed: int) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], Tensor | None, torch.dtype, Tensor]:
    """Random operands, whose sums are exact in float32 in any order; and the result."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, width = rng.choice((1, 16, 33, 70)), 32 * rng.choice((1, 3, 4, 8, 13))
    tokens = rng.choice((1, 5, 16, 35))
    w = weight(rows, width, 124, 131)
    # Beyond a row there may be anything.
    values = torch.full((tokens, width + rng.choice((0, 2, 64))), torch.nan).bfloat16()[:, :width]
    values.copy_(torch.randint(-3, 4, (tokens, width)))
    x, x_scales = values, None
    if seed % 3 == 0:
        x, x_scales = _mxfp4.quantize(values.float(), "even")
        values = _mxfp4.dequantize(x, x_scales)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    bias = torch.randint(-9, 9, (rows,)).to(rng.choice(dtypes)) if seed % 4 else None
    want = values.float() @ _mxfp4.dequantize(*w).T
    if bias is not None:
        want = want + bias.float()
    out_dtype = rng.choice(dtypes)
    return x, x_scales, w, bias, out_dtype, want.to(out_dtype)


def check_products() -> None:
    """Tails of tokens, rows and K, strides, bias, MXFP4 x, parts: the bytes of an exact sum, in both modes."""
    triton_interpreter.cast_bfloat16_as_gpus_do()
    triton_interpreter.multiply_bfloat16_as_gpus_do()
    from fusionpasses.kernels import mxfp4_gemm_dot as kernels

    for seed in range(36):
        rng = random.Random(seed)
        x, x_scales, w, bias, out_dtype, want = _case(seed)
        tile = {"BLOCK_M": rng.choice((16, 32)), "BLOCK_N": rng.choice((16, 32)), "BLOCK_K": rng.choice((32, 64, 128))}
        for mode in (kernels.DECODED.value, kernels.DOT_SCALED.value):
            parts = rng.choice((1, 1, 2, 3))
            got = multiply(x, x_scales, w, bias, out_dtype, MODE=mode, SPLIT_K=parts, **tile)
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (
                f"seed {seed}, mode {mode}: {int((got != want).sum())} of {got.numel()} differ"
            )


def compare_values(mode: int, factor: float, first: int, device: str) -> None:
    """Every code with every scale byte from the first, of the weight and of x: NaN, and 2**-127 for a byte of 0."""
    byte = torch.arange(256, dtype=torch.uint8)
    # Row 16 * b + i has all codes, each in a byte with i, at scale b.
    codes, scales = byte.view(16, 16).repeat(256, 1)[16 * first :], byte.repeat_interleave(16).view(-1, 1)[16 * first :]
    one = factor * torch.eye(32).bfloat16()
    one_codes, one_scales = _mxfp4.quantize(one.float(), "even")
    # Another element of a block may be infinite or NaN: then its product with 0 is NaN.
    want = one.float() @ _mxfp4.dequantize(codes, scales).T
    assert want[:, :16].ne(0).any()
    assert want[:, -16:].isnan().all()
    chosen = {"MODE": mode, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT_K": 1}
    codes, scales, one_codes, one_scales = (t.to(device) for t in (codes, scales, one_codes, one_scales))
    for x, x_scales in ((one.to(device), None), (one_codes, one_scales)):
        got = multiply(x, x_scales, (codes, scales), None, torch.float32, **chosen)
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)
    got = multiply(codes, scales, (one_codes, one_scales), None, torch.float32, **chosen)
    torch.testing.assert_close(got.cpu(), want.T, rtol=0, atol=0, equal_nan=True)
    # NaN though no zero is in the sum, which would make it of an infinite scale, too.
    ones, nan = torch.full((16, 16), 0x22, dtype=torch.uint8, device=device), torch.full_like(scales[:16], 255)
    same = torch.full_like(nan, 127)
    assert multiply(ones, same, (ones, nan), None, torch.float32, **chosen).isnan().all()
    assert multiply(ones, nan, (ones, same), None, torch.float32, **chosen).isnan().all()
    assert (
        multiply(torch.ones(16, 32, device=device).bfloat16(), None, (ones, nan), None, torch.float32, **chosen)
        .isnan()
        .all()
    )


def check_values() -> None:
    triton_interpreter.cast_bfloat16_as_gpus_do()
    triton_interpreter.multiply_bfloat16_as_gpus_do()
    for mode in (0, 1):
        compare_values(mode, 1, 0, "cpu")


def check_sums() -> None:
    """Parts are added in their order, then a factor, a bias and one rounding."""
    triton_interpreter.cast_bfloat16_as_gpus_do()
    from fusionpasses.kernels import mxfp4_gemm_sum as kernels
    from fusionpasses.kernels.arch import PLAIN

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for seed in range(30):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        parts, tokens, rows = rng.choice((1, 2, 3, 8)), rng.choice((1, 3, 17)), rng.choice((1, 40, 127, 128, 300))
        partial, factor = torch.randn(parts, tokens, rows), rng.choice((1.0, 8.0, 0.25))
        bias = torch.randn(rows).to(rng.choice(dtypes)) if seed % 3 else None
        out = torch.full((tokens, rows), torch.nan).to(rng.choice(dtypes))
        kernels.mxfp4_gemm_sum[(tokens, -(-rows // 128))](
            partial, bias, out, tokens, rows, factor, SPLIT_K=parts, COLUMNS=128, ISA=PLAIN
        )
        want = partial[0]
        for part in partial[1:]:
            want = want + part
        want = want * factor
        if bias is not None:
            want = want + bias.float()
        assert torch.equal(out, want.to(out.dtype)), f"seed {seed}"


def check_shuffled() -> None:
    """Both ops' adapters with a shuffled weight, whose bytes they put back: exact sums."""
    triton_interpreter.cast_bfloat16_as_gpus_do()
    triton_interpreter.multiply_bfloat16_as_gpus_do()
    from fusionpasses.providers import _triton_gemm

    for tokens, rows, width in ((1, 32, 256), (20, 64, 768)):
        torch.manual_seed(tokens)
        w, x = weight(rows, width, 124, 131), torch.randint(-3, 4, (tokens, width)).bfloat16()
        bias = torch.randint(-9, 9, (rows,)).float()
        want = (x.float() @ _mxfp4.dequantize(*w).T + bias).bfloat16()
        codes = _mxfp4.quantize(x, "even")
        want_of_codes = (_mxfp4.dequantize(*codes) @ _mxfp4.dequantize(*w).T + bias).bfloat16()
        for layout in _mxfp4_weight.SHUFFLED:
            shuffled, keywords = _mxfp4_weight.shuffle(*w, layout), {"layout": layout, "rows": rows}
            assert torch.equal(_triton_gemm._mxfp4_gemm_a16w4(x, *shuffled, bias, **keywords), want)
            got = _triton_gemm._mxfp4_gemm(*codes, *shuffled, bias, out_dtype=torch.bfloat16, **keywords)
            assert torch.equal(got, want_of_codes)


GROUPS = {"products": check_products, "values": check_values, "sums": check_sums, "shuffled": check_shuffled}


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    triton_interpreter.run(__file__, group)


# ---- on a GPU

gpu = [pytest.mark.gpu, compiled, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def _tile(rng: random.Random, mode: int) -> dict[str, int]:
    """One that ``launch_options`` has for some target."""
    m, n, k, warps = rng.choice(
        ((16, 64, 64, 4), (32, 128, 64, 4), (64, 64, 64, 4))
        if mode == 0
        else ((16, 128, 128, 4), (64, 128, 128, 8), (16, 64, 256, 4), (128, 128, 256, 8))
    )
    return {"MODE": mode, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "SPLIT_K": rng.choice((1, 4))}


@pytest.mark.parametrize("part", [pytest.param(part, marks=gpu) for part in range(4)])
def test_gpu_sums_are_within_the_bound_and_the_same_every_time(part: int) -> None:
    for seed in range(part, 40, 4):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        rows, width = rng.choice((1, 40, 576, 2112)), 32 * rng.choice((1, 5, 64, 90))
        tokens = rng.choice((1, 3, 16, 17, 64, 65, 200))
        w = weight(rows, width, *rng.choice(((118, 126), (125, 132))), "cuda")
        values = _mxfp4.dequantize(*w).double()
        out_dtype = (torch.bfloat16, torch.float16, torch.float32)[seed % 3]
        bias = torch.randn(rows, device="cuda").to(out_dtype) if seed % 4 else None
        x: Tensor = torch.randn(tokens, width + 64 * (seed % 5 == 0), device="cuda").bfloat16()[:, :width]
        x_scales = None
        x_values = x.double()
        if seed % 8 >= 4:
            x, x_scales = _mxfp4.quantize(x, "even")
            x_values = _mxfp4.dequantize(x, x_scales).double()
        exact, magnitude = x_values @ values.T, x_values.abs() @ values.abs().T
        if bias is not None:
            exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
        for mode in (0, 1):
            tile = _tile(rng, mode)
            got = multiply(x, x_scales, w, bias, out_dtype, **tile)
            assert torch.equal(got, multiply(x, x_scales, w, bias, out_dtype, **tile)), f"seed {seed}: other bytes"
            bound = width * 2.0**-24 * magnitude + torch.finfo(out_dtype).eps / 2 * exact.abs() * 1.01 + 1e-30
            if out_dtype == torch.float16:
                bound = bound + 2.0**-25  # its subnormal numbers
            off = float(((got.double() - exact).abs() / bound).max())
            assert off <= 1, f"seed {seed}, {tile}: {tokens} tokens, {rows} x {width}: {off} of the bound"


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=gpu) for mode in (0, 1)])
def test_gpu_bytes_of_exact_sums(mode: int) -> None:
    for seed in range(18):
        x, x_scales, w, bias, out_dtype, want = _case(seed)
        tile = _tile(random.Random(seed), mode)
        on_gpu: list[Any] = [None if t is None else t.cuda() for t in (x, x_scales, *w, bias)]
        got = multiply(on_gpu[0], on_gpu[1], (on_gpu[2], on_gpu[3]), on_gpu[4], out_dtype, **tile)
        assert torch.equal(got.cpu(), want), f"seed {seed}, {tile}"


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=gpu) for mode in (0, 1)])
def test_gpu_values(mode: int) -> None:
    # Times 2**64, so that sums are no subnormal numbers. tl.dot_scaled of Triton 3.6 reads a scale byte of 0 as 0.
    compare_values(mode, 2.0**64, mode, "cuda")


if __name__ == "__main__":
    with triton_interpreter.without_needless_work():
        GROUPS[sys.argv[1]]()
