"""The kernel of two norms in one launch, and its adapter: interpreted on any machine, and on a GPU (marker ``gpu``).

The proof is by the kernel of one norm: each part gives the bytes that one gives. ``tests/test_kernels.py`` has that
kernel's own proof, the helpers, and says why interpreted checks are a process of their own.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import test_kernels
import torch
import triton_interpreter
from test_kernels import assert_same, forms_of, integer_rows, needs_gpu, not_interpreted
from torch import Tensor

from fusionpasses.ops import OPS
from fusionpasses.ops._mxfp4 import INPUT_DTYPES, SCALE_ADDEND
from fusionpasses.probes import probe_triton

pytestmark = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)

NAME = "rmsnorm_mxfp4_quant.with_second"


# ---- inputs


def pair_calls(
    x: Tensor, x2: Tensor, device: torch.device | str, eps: float = 1e-6
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for every dtype, and every cast order, weight and norm dtype of each part; the parts' take turns."""
    modes = itertools.cycle(SCALE_ADDEND)
    for dtype in INPUT_DTYPES:
        kinds = list(
            itertools.product(
                ("cast_scale", "scale_cast"),
                dict.fromkeys((dtype, torch.float32, None)),
                dict.fromkeys((None, dtype, torch.float32)),
            )
        )
        for i, (order, weight_dtype, norm_dtype) in enumerate(kinds):
            order2, weight_dtype2, norm_dtype2 = kinds[(7 * i + 3) % len(kinds)]
            whole = torch.cat([x, x2], -1).to(device, dtype)
            first, second = whole.split([x.shape[-1], x2.shape[-1]], -1)
            weights = [
                None if kind is None else torch.randn(part.shape[-1]).to(device, kind)
                for part, kind in ((x, weight_dtype), (x2, weight_dtype2))
            ]
            yield (
                (first, weights[0], eps, second, weights[1], eps + 3.0),
                {
                    "cast_order": order,
                    "norm_dtype": norm_dtype,
                    "cast_order2": order2,
                    "norm_dtype2": norm_dtype2,
                    "scale_mode": next(modes),
                },
            )


def by_one_norm_each(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the kernel of one norm, called twice."""
    from fusionpasses.providers.triton import ADAPTERS

    x, weight, eps, x2, weight2, eps2 = args
    first = {key: kwargs[key] for key in ("cast_order", "norm_dtype", "scale_mode") if key in kwargs}
    second = {key: kwargs[f"{key}2"] for key in ("cast_order", "norm_dtype") if f"{key}2" in kwargs}
    codes, scales = ADAPTERS["rmsnorm_mxfp4_quant.default"](x, weight, eps, **first)
    norm2 = ADAPTERS["rmsnorm_mxfp4_quant.with_norm"](x2, weight2, eps2, **second)[2]
    return codes, scales, norm2


def assert_as_one_norm_each(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from fusionpasses.providers.triton import ADAPTERS

    with test_kernels.poisoned_outputs():
        outputs = ADAPTERS[NAME](*args, **kwargs)
    for name, got, want in zip(("codes", "scales", "norm2"), outputs, by_one_norm_each(args, kwargs), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        bad = test_kernels.differs(got, want)
        assert not bad.any(), (
            f"{name}: {int(bad.sum())} of {bad.numel()} differ; {test_kernels._describe(args, kwargs)}"
        )


# ---- interpreted


def check_samples() -> None:
    samples = list(OPS[NAME].samples(torch.device("cpu")))
    for args, kwargs in samples[:-6:5] + samples[-6:]:  # the last ones differ in shape
        assert_as_one_norm_each(args, kwargs)


def check_bytes() -> None:
    # Where the sums are exact, so is all the rest: torch's rsqrt on a CPU is the kernel's.
    for args, kwargs in pair_calls(integer_rows(3, 96), integer_rows(3, 64), "cpu"):
        assert_same(NAME, args, kwargs)
    for args, kwargs in pair_calls(test_kernels.special_rows(), test_kernels.special_rows(), "cpu", 0.0):
        assert_same(NAME, args, kwargs)


def check_sizes() -> None:
    # The longer row first and last; a row of several blocks for a thread; rows that fill no program.
    for rows, n, n2 in ((5, 1536, 512), (3, 64, 2080), (1, 32, 32), (2, 8192, 96), (40, 32, 512)):
        args, kwargs = next(pair_calls(integer_rows(rows, n), integer_rows(rows, n2), "cpu"))
        assert_same(NAME, args, kwargs)
        assert_as_one_norm_each(args, kwargs)
    # Longer than a program holds.
    for n, n2 in ((8224, 64), (64, 8224)):
        for args, kwargs in itertools.islice(pair_calls(integer_rows(1, n), integer_rows(1, n2), "cpu"), 0, None, 19):
            assert_same(NAME, args, kwargs)


def check_forms() -> None:
    for form in test_kernels.FORMS.values():
        with forms_of(form):
            calls = pair_calls(integer_rows(2, 96), test_kernels.special_rows()[:2], "cpu")
            for args, kwargs in itertools.islice(calls, 0, None, 5):
                assert_same(NAME, args, kwargs)


GROUPS = {"samples": check_samples, "bytes": check_bytes, "sizes": check_sizes, "forms": check_forms}


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    triton_interpreter.run(__file__, group)


# ---- how it is launched


@pytest.mark.parametrize("name", ["sm_90", "sm_100", "sm_80", "gfx942", "gfx1100"])
@pytest.mark.parametrize("rows", [1, 3, 64, 4096])
@pytest.mark.parametrize(
    ("blocks", "blocks2"), [(48, 16), (16, 48), (1, 1), (1, 256), (256, 1), (90, 224), (129, 7), (256, 256)]
)
def test_tiles_are_those_of_one_norm_and_programs_cover_all_rows(
    name: str, rows: int, blocks: int, blocks2: int
) -> None:
    from fusionpasses.kernels import rmsnorm_mxfp4_quant, rmsnorm_mxfp4_quant_pair
    from fusionpasses.kernels.arch import Arch

    arch = Arch(name, 64 if name == "gfx942" else 32, 132)
    for dtype, weight in itertools.product((torch.bfloat16, torch.float32), (None, torch.float32)):
        first, second = (dtype, weight, "cast_scale"), (weight, dtype, "scale_cast")
        chosen = rmsnorm_mxfp4_quant_pair.launch_options(rows, blocks, *first, blocks2, *second, arch)
        assert chosen is not None
        options, *programs = chosen
        one, _ = rmsnorm_mxfp4_quant.launch_options(rows, blocks, dtype, weight, False, None, "cast_scale", arch)
        two, _ = rmsnorm_mxfp4_quant.launch_options(rows, blocks2, dtype, weight, False, dtype, "scale_cast", arch)
        threads = options["num_warps"] * arch.warp_size
        for alone, end, count in ((one, "", programs[0]), (two, "2", programs[1])):
            for key in ("TILE_BLOCKS", "CHUNKS"):
                assert options[f"{key}{end}"] == alone[key]
            each = options[f"ROWS{end}"]
            assert each * options[f"TILE_BLOCKS{end}"] == threads
            assert (count - 1) * each < rows <= count * each
        assert ("launch_pdl" in options) == (name in ("sm_90", "sm_100"))
    for wide in ((257, 16), (16, 257)):
        assert rmsnorm_mxfp4_quant_pair.launch_options(rows, wide[0], *first, wide[1], *second, arch) is None


# ---- on a GPU


def random_parts(rows: int, n: int, n2: int, rest: int = 64) -> tuple[Tensor, Tensor]:
    whole = torch.randn(rows, n + n2 + rest, device="cuda") * torch.exp2(torch.randint(-6, 7, (rows, 1), device="cuda"))
    return whole[:, :n], whole[:, n : n + n2]


@pytest.mark.gpu
@needs_gpu
@not_interpreted
@pytest.mark.parametrize("part", range(4))
def test_gpu_bytes_are_those_of_one_norm_each(part: int) -> None:
    """Of random numbers, whose sums are not exact: squares must be added in the same order."""
    sizes = [
        (1536, 512),
        (512, 1536),
        (32, 32),
        (2880, 96),
        (96, 2880),
        (64, 8192),
        (8192, 64),
        (7168, 4096),
        (544, 7168),
    ]
    for at, (n, n2) in enumerate(sizes[part::4]):
        # Half of the calls for the sizes of DeepSeek-V3, else two: every compilation counts, and rows need no other.
        first, step = (0, 2) if n == 1536 else ((11 * at + 5 * part) % 20, 20)
        for rows in (1, 2, 7, 33, 133, 1000, 5000):
            calls = pair_calls(*random_parts(rows, n, n2), "cuda")
            for args, kwargs in itertools.islice(calls, first, None, step):
                assert_as_one_norm_each(args, kwargs)


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_bytes_are_the_references() -> None:
    for args, kwargs in pair_calls(integer_rows(9, 96), integer_rows(9, 160), "cuda"):
        assert_same(NAME, args, kwargs, reference_on="cpu")
    for args, kwargs in pair_calls(test_kernels.special_rows(), test_kernels.special_rows(), "cuda", 0.0):
        assert_same(NAME, args, kwargs, reference_on="cpu")
    for args, kwargs in OPS[NAME].samples(torch.device("cuda")):
        assert_as_one_norm_each(args, kwargs)


@pytest.mark.gpu
@needs_gpu
@not_interpreted
@pytest.mark.parametrize("form", test_kernels.FORMS)
def test_gpu_forms(form: str) -> None:
    with forms_of(test_kernels.FORMS[form]):
        calls = pair_calls(integer_rows(5, 96), integer_rows(5, 64), "cuda")
        for args, kwargs in itertools.islice(calls, 0, None, 5):
            assert_same(NAME, args, kwargs, reference_on="cpu")


def graph_arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, x2 = (part.bfloat16() for part in random_parts(64, 1536, 512))
    weight, weight2 = (torch.randn(n, device="cuda").bfloat16() for n in (1536, 512))
    return (x, weight, 1e-6, x2, weight2, 1e-5), {"cast_order": "cast_scale", "cast_order2": "scale_cast"}


@pytest.mark.gpu
@needs_gpu
@not_interpreted
@pytest.mark.parametrize("wide", [False, True])
def test_gpu_graph_capture(wide: bool) -> None:
    """One launch, or one for each part: both are replayed on what the inputs hold then."""
    call = OPS[NAME].overload
    args, kwargs = graph_arguments()
    if wide:
        args = (*args[:3], torch.randn(64, 16384, device="cuda").bfloat16(), None, 1e-5)
    with torch.no_grad():
        call(*args, **kwargs)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(*args, **kwargs)
        args[0].normal_()
        args[3].normal_()
        graph.replay()
        for got, want in zip(captured, by_one_norm_each(args, kwargs), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_peak_memory_is_that_of_the_outputs() -> None:
    args, kwargs = graph_arguments()
    call = OPS[NAME].overload
    with torch.no_grad():
        call(*args, **kwargs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = call(*args, **kwargs)
    needed = sum(-(-t.numel() * t.element_size() // 512) * 512 for t in outputs)
    assert torch.cuda.max_memory_allocated() - before == needed


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_offsets_past_32_bits() -> None:
    from fusionpasses.providers.triton import ADAPTERS

    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    wanted = torch.randn(3, 2048, device="cuda", dtype=torch.bfloat16)
    apart = torch.empty(2 * 2**31 + 2048, device="cuda", dtype=torch.bfloat16).as_strided((3, 2048), (2**31, 1))
    apart.copy_(wanted)
    kwargs = {"cast_order": "cast_scale", "cast_order2": "cast_scale"}
    got, want = (ADAPTERS[NAME](t[:, :1536], None, 1e-6, t[:, 1536:], None, 1e-6, **kwargs) for t in (apart, wanted))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_compiled_attention_launches_both_norms_at_once() -> None:
    """What the pass makes of two norms is one kernel, with or without CUDA graphs, with the reference's bytes."""
    import fusionpasses as fp

    def model(rows: Tensor, w: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            h = x.float()
            return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        q_a, kv_c, _ = rows.split([1536, 512, 64], -1)
        return *torch.ops.fusionpasses.dynamic_mxfp4_quant(norm(q_a, w)), norm(kv_c, w2)

    rows = integer_rows(16, 2112).to("cuda", torch.bfloat16)
    weights = [torch.randn(n).to("cuda", torch.bfloat16) for n in (1536, 512)]
    with torch.no_grad():
        for mode in ("default", "reduce-overhead"):
            torch._dynamo.reset()
            backend = fp.fusion_backend()
            compiled = torch.compile(model, backend=backend, mode=mode)
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                got = [t.clone() for t in compiled(rows, *weights)]
            assert [(s.op, s.provider) for s in backend.report.fused] == [(NAME, "triton")]
            kwargs = {"cast_order": "cast_scale", "cast_order2": "cast_scale"}
            first = (rows[:, :1536].cpu(), weights[0].cpu(), 1e-6)
            want = OPS[NAME].reference(*first, rows[:, 1536:2048].cpu(), weights[1].cpu(), 1e-6, **kwargs)
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one.cpu(), other)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    triton_interpreter.cast_bfloat16_as_gpus_do()
    GROUPS[sys.argv[1]]()
