"""The Triton kernel and its adapters, two ways. (How it compiles for GPUs that are not here: ``make codegen-check``.)

- Interpreted, on any machine: values. Triton decides at import whether it interprets, and other tests of the same
  process need the real Triton, so each group of checks is a process of its own: ``python test_kernels.py GROUP``.
- On a GPU (marker ``gpu``): values, with what the interpreter cannot show: casts, offsets past 2**31, CUDA graphs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionpasses.ops import OPS
from fusionpasses.ops._mxfp4 import BLOCK, INPUT_DTYPES, SCALE_ADDEND
from fusionpasses.probes import probe_triton

pytestmark = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)
not_interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels")

QUANT = "dynamic_mxfp4_quant.default"
NORMS = (
    "rmsnorm_mxfp4_quant.default",
    "rmsnorm_mxfp4_quant.with_norm",
    "rmsnorm_add_mxfp4_quant.default",
    "rmsnorm_add_mxfp4_quant.with_norm",
)


# ---- inputs


def edge_values(device: torch.device | str = "cpu") -> Tensor:
    """float32 ``[blocks, 32]``: midpoints and their neighbours, thresholds of the scale modes, ends of the range."""
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    infinity = torch.tensor(torch.inf)
    near = torch.cat((midpoints, torch.nextafter(midpoints, -infinity), torch.nextafter(midpoints, infinity)))
    blocks = []
    for amax in (4.0, 6.0, 7.0, 7.5, 8.0):
        for exponent in (-120, -1, 0, 100):
            for sign in (1.0, -1.0):
                block = torch.zeros(BLOCK)
                block[: len(near)] = near.clamp(max=amax) * sign
                block[-1] = amax
                blocks.append(block * 2.0**exponent)
    thresholds = torch.tensor([1.0, 1.5, 1.75, 2.0])
    thresholds = torch.cat((thresholds, torch.nextafter(thresholds, -infinity), torch.nextafter(thresholds, infinity)))
    spread = torch.linspace(-1, 1, BLOCK)
    # From below the smallest subnormal to above the largest finite number.
    for exponent in (-150, -149, -148, -140, -127, -126, -125, -124, -10, 0, 126, 127):
        for threshold in thresholds.tolist():
            amax = torch.tensor(threshold * 2.0**exponent, dtype=torch.float64).float()
            block = spread * amax
            block[3] = -amax
            blocks.append(block)
    largest = torch.finfo(torch.float32).max
    blocks += [torch.zeros(BLOCK), -torch.zeros(BLOCK), torch.full((BLOCK,), largest)]
    for special in (torch.inf, -torch.inf, torch.nan):
        for rest in (0.0, -1.0, largest, torch.inf):
            block = torch.full((BLOCK,), rest)
            block[7] = special
            blocks += [block, spread]
    return torch.stack(blocks).to(device)


def every_pattern(dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Every bit pattern of a 16-bit dtype, ``[2, 2048, 32]``: blocks of neighbours, then blocks of a random choice."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    shuffled = patterns[torch.randperm(len(patterns))]
    return torch.stack((patterns, shuffled)).view(dtype).view(2, -1, BLOCK).to(device)


def quant_calls(device: torch.device | str) -> Iterator[tuple[Tensor, str]]:
    for scale_mode in SCALE_ADDEND:
        yield edge_values(device), scale_mode
        for dtype in (torch.bfloat16, torch.float16):
            yield every_pattern(dtype, device), scale_mode
    modes = itertools.cycle(SCALE_ADDEND)
    for dtype in INPUT_DTYPES:
        wide = torch.randn(3, 5, 2880, device=device).to(dtype)
        for x in (
            wide,
            wide[:, :, 32:128],  # one row stride
            wide[:, 1:4, :96],  # two row strides
            wide[:, :1, ::2],  # elements apart
            wide[2:3, 4:5],  # one row
            wide[:1, :1, :BLOCK].expand(3, 4, BLOCK),
            wide.view(-1)[1 : 1 + 3 * 97].view(3, 97)[:, :96],  # off any alignment
        ):
            yield x, next(modes)


def integer_rows(rows: int, n: int) -> Tensor:
    """float32 ``[rows, n]`` whose squares sum exactly in any order, up to a width of 40000."""
    return torch.randint(-20, 21, (rows, n)).float()


#: Eight integers whose squares sum to 128.
_MEAN_SQUARE_16 = torch.tensor(
    [
        [4, 4, 4, 4, 4, 4, 4, 4],
        [8, 8, 0, 0, 0, 0, 0, 0],
        [7, 7, 5, 2, 1, 0, 0, 0],
        [10, 4, 2, 2, 2, 0, 0, 0],
        [9, 6, 3, 1, 1, 0, 0, 0],
    ]
)


def rows_of_mean_square_16(rows: int, n: int) -> Tensor:
    """float32 integers ``[rows, n]`` whose ``rsqrt(mean(x**2))`` is 0.25, whoever computes it."""
    groups = _MEAN_SQUARE_16[torch.randint(len(_MEAN_SQUARE_16), (rows, n // 8))].flatten(1)
    shuffled = torch.stack([row[torch.randperm(n)] for row in groups])
    return (shuffled * (torch.randint(2, shuffled.shape) * 2 - 1)).float()


def norm_calls(
    name: str, make_rows: Callable[[], Tensor], eps: float, device: torch.device | str
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of a norm op for every dtype, cast order, norm dtype and weight.

    Where the op adds, x and residual sum to the rows made (exactly, if these are small integers).
    """
    modes = itertools.cycle(SCALE_ADDEND)
    for dtype in INPUT_DTYPES:
        for cast_order in ("cast_scale", "scale_cast"):
            for weight_dtype in dict.fromkeys((dtype, torch.float32, None)):
                for norm_dtype in dict.fromkeys((None, dtype, torch.float32)):
                    wanted = make_rows()
                    n = wanted.shape[-1]
                    tensors = [wanted]
                    if "add" in name:
                        residual = torch.randint(-3, 4, wanted.shape).float()
                        tensors = [wanted - residual, residual]
                    weight = None if weight_dtype is None else torch.randn(n).to(device, weight_dtype)
                    args = (*(t.to(device, dtype) for t in tensors), weight, eps)
                    yield args, {"cast_order": cast_order, "norm_dtype": norm_dtype, "scale_mode": next(modes)}


# ---- checks


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Every new_empty comes filled with 0xAB bytes, so that an element that is not written shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = new_empty(self, *args, **kwargs)
        out.view(-1).view(torch.uint8).fill_(0xAB)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield


def run_both(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, reference_on: str | None = None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(output's name, kernel's, reference's) for each output; ``reference_on`` is the reference's device."""
    from fusionpasses.providers.triton import ADAPTERS

    op = OPS[name]
    with poisoned_outputs():
        outputs = ADAPTERS[name](*args, **kwargs)
    moved = [a.to(reference_on) if isinstance(a, Tensor) and reference_on else a for a in args]
    expected = op.reference(*moved, **kwargs)
    fakes = op.fake(*args, **kwargs)
    names = [returned.name for returned in op.overload._schema.returns]
    for output_name, got, want, fake in zip(names, outputs, expected, fakes, strict=True):
        for tensor in (want, fake):
            assert (got.shape, got.dtype, got.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert got.device == fake.device
        yield output_name, got, want.to(got.device)


def differs(got: Tensor, want: Tensor) -> Tensor:
    """Per element: another value, another sign of zero, or NaN on one side only."""
    if not got.is_floating_point():
        return got != want
    sign = (got == 0) & (torch.signbit(got) != torch.signbit(want))
    return ((got != want) & ~(got.isnan() & want.isnan())) | sign


def assert_same(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, reference_on: str | None = None) -> None:
    for output, got, want in run_both(name, args, kwargs, reference_on=reference_on):
        bad = differs(got, want)
        assert not bad.any(), f"{name} {output}: {int(bad.sum())} of {bad.numel()} differ; {_describe(args, kwargs)}"


class Mismatches:
    """Counts of elements that differ, where a last bit of rsqrt may."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}
        self.total: dict[str, int] = {}

    def add(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for output, got, want in run_both(name, args, kwargs):
            bad = differs(got, want)
            if output == "sum":
                assert not bad.any(), f"{name}: the residual sum differs; {_describe(args, kwargs)}"
            if output == "norm":
                # Rounded to x's dtype, once or twice, a last bit of rsqrt rarely shows; never rounded, everywhere.
                x_dtype = args[0].dtype
                rounded = got.dtype != torch.float32 or kwargs["cast_order"] == "cast_scale"
                step = torch.finfo(x_dtype if rounded else torch.float32)
                # Steps of the value, and steps of the smallest numbers.
                close = torch.isclose(got, want, rtol=4 * step.eps, atol=4 * step.eps * step.tiny, equal_nan=True)
                assert close.all(), f"{name}: norm is off by more than last bits; {_describe(args, kwargs)}"
                if x_dtype == torch.float32 or not rounded:
                    continue
            self.count[output] = self.count.get(output, 0) + int(bad.sum())
            self.total[output] = self.total.get(output, 0) + bad.numel()

    def check(self, fraction: float) -> None:
        for output, count in self.count.items():
            assert count <= fraction * self.total[output], f"{output}: {count} of {self.total[output]} differ"


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    shown = [f"{a.dtype}{tuple(a.shape)}" if isinstance(a, Tensor) else repr(a) for a in args]
    return ", ".join(shown + [f"{key}={value}" for key, value in kwargs.items()])


#: An architecture for every form of the kernels that does not need PTX. (A GPU that cannot do in one instruction what a
#: form takes one for does it in several: the bytes are the same.)
FORMS = {"plain": "gfx942", "NaN maximum": "gfx1201", "rounds bf16": "gfx950"}


@contextlib.contextmanager
def forms_of(name: str) -> Iterator[None]:
    """Kernels take the forms they have for this architecture, with the launches for few threads in a warp."""
    from fusionpasses.kernels.arch import Arch
    from fusionpasses.providers import _launch, triton

    processors = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.arch, "of", lambda device: Arch(name, 32, processors))
        _launch.forget()
        yield
    _launch.forget()


def check_form(name: str, device: str, every: int) -> None:
    """Bytes of a form, where forms differ: NaN, infinities, ties, subnormals. Norms: one of ``every`` calls."""
    with forms_of(name):
        for x in (edge_values(device), edge_values(device).bfloat16(), every_pattern(torch.bfloat16, device)):
            assert_same(QUANT, (x, "even"), {})
        for op in ("rmsnorm_mxfp4_quant.with_norm", "rmsnorm_add_mxfp4_quant.with_norm"):
            for make_rows in (lambda: integer_rows(2, 96), special_rows):
                for args, kwargs in itertools.islice(norm_calls(op, make_rows, 1e-6, device), 0, None, every):
                    assert_same(op, args, kwargs, reference_on="cpu")


def special_rows() -> Tensor:
    """Zero, infinite and NaN rows: rsqrt is Inf, 0 or NaN."""
    special = torch.zeros(5, 64)
    special[1, 5], special[2, 5], special[3, :], special[4, 40] = torch.inf, torch.nan, 3e38, -torch.inf
    return special


def check_weights_that_are_nan(device: str) -> None:
    """A payload of all ones (what NVIDIA's arithmetic gives), rounded up like a number, would become a zero."""
    weight = torch.randn(64)
    weight.view(torch.int32)[[3, 40]] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32)
    x = integer_rows(3, 64).to(device, torch.bfloat16)
    for cast_order in ("cast_scale", "scale_cast"):
        kwargs = {"cast_order": cast_order, "norm_dtype": torch.bfloat16, "scale_mode": "even"}
        assert_same(NORMS[1], (x, weight.to(device), 1e-6), kwargs, reference_on="cpu")


def check_rounding(name: str, device: str) -> None:
    from rounding_kernel import round_to_bfloat16

    from fusionpasses.kernels.arch import Arch

    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xC000], dtype=torch.int32)
    x = (upper | lower).view(torch.float32).to(device)
    x = x[~x.isnan() | (x.view(torch.int32) & 0x400000 != 0)]  # quiet, as arithmetic gives them
    word = torch.empty(x.shape, dtype=torch.int32, device=device)
    round_to_bfloat16[(-(-x.numel() // 1024),)](x, word, x.numel(), ISA=Arch(name, 32, 2).isa)
    low, high = word.view(torch.bfloat16).view(-1, 2).unbind(1)
    for got, want in ((low, x.bfloat16()), (high, (-x).bfloat16())):
        bad = differs(got, want)
        assert not bad.any(), f"{name}: {x[bad][:4].view(torch.int32)} to {got[bad][:4]}"


# ---- interpreted


def check_samples() -> None:
    mismatches = Mismatches()
    for name, op in OPS.items():
        if name not in (QUANT, *NORMS):
            continue
        for args, kwargs in op.samples(torch.device("cpu")):
            if name == QUANT:
                assert_same(name, args, kwargs)
            else:
                mismatches.add(name, args, kwargs)
    mismatches.check(1e-3)


def check_quant() -> None:
    from fusionpasses.kernels import dynamic_mxfp4_quant as kernel

    # The tile that the heuristics choose is much smaller: the interpreter's time is by the program.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "launch_options", lambda *args: {"TILE_BLOCKS": 512, "num_warps": 1})
        for x, scale_mode in quant_calls("cpu"):
            assert_same(QUANT, (x, scale_mode), {})
    assert_same(QUANT, (torch.randn(3, 96),), {})


@st.composite
def row_layouts(draw: st.DrawFn) -> Tensor:
    """Rows of one to three leading axes in any order in memory, some repeated, padded, and off alignment."""
    axes = draw(st.integers(1, 3))
    sizes = [draw(st.integers(1, 5)) for _ in range(axes)]
    n = BLOCK * draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(INPUT_DTYPES))
    strides = [0] * axes
    apart = n + draw(st.sampled_from((0, 0, 0, 1, 2, 8, 32)))
    for axis in draw(st.permutations(range(axes))):
        strides[axis] = draw(st.sampled_from((apart, apart, apart, apart, 0)))
        apart = apart * sizes[axis] + draw(st.sampled_from((0, 0, 2, 7)))
    offset = draw(st.sampled_from((0, 0, 1, 2, 8)))
    memory = torch.randn(offset + apart, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    memory = memory.mul(draw(st.sampled_from((1.0, 1e-30, 1e30)))).to(dtype)
    return memory.as_strided((*sizes, n), (*strides, 1), offset)


def check_quant_of_groups() -> None:
    from fusionpasses.kernels import dynamic_mxfp4_quant as kernel
    from fusionpasses.providers.triton import ADAPTERS, _groups_of_rows

    forms: set[bool] = set()

    @settings(max_examples=250, deadline=None, derandomize=True, database=None)
    @given(row_layouts(), st.sampled_from(sorted(SCALE_ADDEND)), st.sampled_from((8, 16, 128)))
    def check(x: Tensor, scale_mode: str, tile: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "launch_options", lambda *args: {"TILE_BLOCKS": tile, "num_warps": 1})
            grouped = _groups_of_rows(x) is not None
            if grouped:
                # It is read where it lies.
                patch.setattr(torch.Tensor, "contiguous", None)
                patch.setattr(torch.Tensor, "clone", None)
            got = ADAPTERS[QUANT](x, scale_mode)
        for tensor, want in zip(got, OPS[QUANT].reference(x, scale_mode), strict=True):
            assert torch.equal(tensor, want), (x.dtype, x.shape, x.stride(), x.storage_offset(), scale_mode, tile)
        forms.add(grouped)

    check()
    assert forms == {True, False}


def check_norm() -> None:
    for name in NORMS:
        # Where the sum is exact, so is all the rest: torch's rsqrt on a CPU is the kernel's.
        for args, kwargs in norm_calls(name, lambda: integer_rows(2, 96), 1e-6, "cpu"):
            assert_same(name, args, kwargs)


def check_norm_edges() -> None:
    for name in ("rmsnorm_mxfp4_quant.with_norm", "rmsnorm_add_mxfp4_quant.with_norm"):
        for args, kwargs in norm_calls(name, special_rows, 0.0, "cpu"):
            assert_same(name, args, kwargs)
    # A model's width that is no power of two; more rows than programs.
    name = "rmsnorm_add_mxfp4_quant.with_norm"
    for args, kwargs in norm_calls(name, lambda: integer_rows(1, 2880), 1e-6, "cpu"):
        assert_same(name, args, kwargs)
    for name in ("rmsnorm_mxfp4_quant.with_norm", "rmsnorm_add_mxfp4_quant.default"):
        args, kwargs = next(norm_calls(name, lambda: integer_rows(19, 2080), 1e-6, "cpu"))
        assert_same(name, args, kwargs)
    # Longer than registers hold, and not whole chunks.
    for name in NORMS:
        for args, kwargs in itertools.islice(norm_calls(name, lambda: integer_rows(2, 16416), 1e-6, "cpu"), 0, None, 5):
            assert_same(name, args, kwargs)


def check_forms() -> None:
    from fusionpasses.kernels import dynamic_mxfp4_quant as kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "launch_options", lambda *args: {"TILE_BLOCKS": 512, "num_warps": 1})
        # Interpreted, kernels are plain; the last form has all the others' instructions.
        check_form(FORMS["rounds bf16"], "cpu", every=7)
    for name in FORMS.values():
        check_rounding(name, "cpu")
        with forms_of(name):
            check_weights_that_are_nan("cpu")


GROUPS = {
    "samples": check_samples,
    "quant": check_quant,
    "quant-groups": check_quant_of_groups,
    "norm": check_norm,
    "norm-edges": check_norm_edges,
    "forms": check_forms,
}


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    triton_interpreter.run(__file__, group)


# ---- the adapters' view of strides


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        pytest.param(lambda x: x, False, id="contiguous"),
        pytest.param(lambda x: x[0, 0], False, id="one-dimension"),
        pytest.param(lambda x: x[..., 32:64], False, id="slice-of-columns"),
        pytest.param(lambda x: x[:, 1:2, :64], False, id="size-one-in-the-middle"),
        pytest.param(lambda x: x[1:2, :, :32], False, id="size-one-in-front"),
        pytest.param(lambda x: x[0, 0, :32].expand(4, 2, 32), False, id="expanded"),
        pytest.param(lambda x: x[0, 0].unfold(0, 64, 1), False, id="overlapping"),
        pytest.param(lambda x: x[:, 1:3], True, id="two-strides"),
        pytest.param(lambda x: x.transpose(0, 1), True, id="transposed-rows"),
        pytest.param(lambda x: x.transpose(1, 2), True, id="transposed-columns"),
        pytest.param(lambda x: x[..., ::2], True, id="elements-apart"),
    ],
)
def test_single_row_stride(make: Callable[[Tensor], Tensor], copied: bool) -> None:
    from fusionpasses.providers.triton import _single_row_stride

    x = make(torch.arange(3 * 4 * 96).float().view(3, 4, 96))
    rows, stride = _single_row_stride(x)
    assert (rows.data_ptr() != x.data_ptr()) == copied
    n = x.shape[-1]
    seen = rows.as_strided((x.numel() // n, n), (stride, 1))
    assert torch.equal(seen, x.reshape(-1, n))


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        pytest.param(lambda x: x.transpose(0, 1), (3, 96, 384), id="heads-first"),
        pytest.param(lambda x: x.transpose(0, 1)[..., 32:64], (3, 96, 384), id="some-columns"),
        pytest.param(lambda x: x[:, 1:3], (2, 384, 96), id="some-tokens"),
        pytest.param(lambda x: x[:, None, 1:3, None], (2, 384, 96), id="axes-of-one"),
        pytest.param(lambda x: x.transpose(0, 1).unflatten(0, (2, 2)), (3, 96, 384), id="tokens-in-two-axes"),
        pytest.param(lambda x: x[:, :1].expand(3, 4, 96), (4, 384, 0), id="expanded"),
        pytest.param(lambda x: x, None, id="one-distance"),
        pytest.param(lambda x: x[0, 0], None, id="one-dimension"),
        pytest.param(lambda x: x.view(3, 2, 2, 96).permute(2, 1, 0, 3), None, id="three-distances"),
        pytest.param(lambda x: x.transpose(1, 2)[..., :3], None, id="columns"),
        pytest.param(lambda x: x[:, 1:3, ::2], None, id="elements-apart"),
        pytest.param(lambda x: x.bfloat16().flatten()[1:385].view(2, 2, 96).transpose(0, 1), None, id="off-words"),
        pytest.param(lambda x: x.bfloat16().view(3, -1)[:, :383].unfold(1, 32, 65), None, id="rows-off-words"),
        pytest.param(
            lambda x: x.bfloat16().flatten()[:1149].view(3, 383)[:, :192].view(3, 2, 96), None, id="groups-off-words"
        ),
    ],
)
def test_groups_of_rows(make: Callable[[Tensor], Tensor], groups: tuple[int, int, int] | None) -> None:
    from fusionpasses.providers.triton import _groups_of_rows

    x = make(torch.arange(3 * 4 * 96).float().view(3, 4, 96))
    assert _groups_of_rows(x) == groups
    if groups is not None:
        rows, group_stride, stride = groups
        n = x.shape[-1]
        seen = x.as_strided((x.numel() // (n * rows), rows, n), (group_stride, stride, 1))
        assert torch.equal(seen.reshape(-1, n), x.reshape(-1, n))


def test_rows_off_their_words_are_copied() -> None:
    from fusionpasses.providers.triton import _aligned_rows

    memory = torch.arange(4 * 97).to(torch.bfloat16)
    aligned = memory[: 4 * 96].view(4, 96)
    assert _aligned_rows(aligned)[0].data_ptr() == aligned.data_ptr()
    for x in (memory.view(4, 97)[:, :96], memory[1 : 1 + 4 * 96].view(4, 96)):
        rows, stride = _aligned_rows(x)
        assert rows.data_ptr() % 4 == 0
        assert stride == 96
        assert torch.equal(rows, x)


# ---- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def random_rows(rows: int, n: int) -> Tensor:
    return torch.randn(rows, n) * torch.exp2(torch.randint(-6, 7, (rows, 1)))


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_quant_bytes() -> None:
    for x, scale_mode in quant_calls("cuda"):
        assert_same(QUANT, (x, scale_mode), {})
    for rows, n in ((0, 64), (1, 32), (1000, 7168), (100_000, 128), (3, 65536)):
        assert_same(QUANT, (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16),), {})
    # Every tiling of the heuristics, from a handful of blocks up.
    for rows, n in ((64, 7168), (1024, 7168), (2048, 7168), (1171, 7200)):
        assert_same(QUANT, (torch.randn(rows, n, device="cuda", dtype=torch.bfloat16),), {})
        assert_same(QUANT, (torch.randn(rows, n + 8, device="cuda", dtype=torch.bfloat16)[:, :n],), {})
    for heads, tokens, n in ((128, 32, 128), (16, 1000, 128), (3, 5, 96), (7, 64, 7168), (2, 3, BLOCK)):
        for dtype in INPUT_DTYPES:
            x = torch.randn(heads, tokens, n + 64, device="cuda").to(dtype)
            assert_same(QUANT, (x[..., :n].transpose(0, 1),), {})
            assert_same(QUANT, (x[..., 64:].transpose(0, 1),), {})
    wider_than_a_tile = torch.randn(5, 2 * 53248, device="cuda", dtype=torch.bfloat16)[:, 53248:]
    assert_same(QUANT, (wider_than_a_tile,), {})


@pytest.mark.gpu
@needs_gpu
@not_interpreted
@pytest.mark.parametrize("form", FORMS)
def test_gpu_forms(form: str) -> None:
    check_form(FORMS[form], "cuda", every=5)
    check_rounding(FORMS[form], "cuda")
    with forms_of(FORMS[form]):
        check_weights_that_are_nan("cuda")


@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
@not_interpreted
@pytest.mark.parametrize("name", NORMS)
def test_gpu_norm_bytes(name: str) -> None:
    # At a power of two, the mean is exact however torch divides.
    for args, kwargs in norm_calls(name, lambda: rows_of_mean_square_16(40, 4096), 0.0, "cuda"):
        assert_same(name, args, kwargs)
    # At any width and eps, torch's rsqrt on a CPU is the kernel's. Widths take turns: every compilation counts.
    widths = itertools.cycle((32, 128, 2880, 7168, 96))
    for args, kwargs in norm_calls(name, lambda: integer_rows(9, next(widths)), 1e-6, "cuda"):
        assert_same(name, args, kwargs, reference_on="cpu")
    for args, kwargs in OPS[name].samples(torch.device("cuda")):
        if args[0].numel() == 0:
            assert_same(name, args, kwargs)


@pytest.mark.gpu
@needs_gpu
@not_interpreted
@pytest.mark.parametrize("name", NORMS)
def test_gpu_norm_random(name: str) -> None:
    mismatches = Mismatches()
    for args, kwargs in OPS[name].samples(torch.device("cuda")):
        mismatches.add(name, args, kwargs)
    shapes = itertools.cycle(((0, 7168), (1, 7168), (1000, 2880), (33, 32768), (1000, 4096)))
    # Every third call, every second of those also of strided rows: every compilation counts.
    calls = itertools.islice(norm_calls(name, lambda: random_rows(*next(shapes)), 1e-6, "cuda"), 0, None, 3)
    for strided, (args, kwargs) in zip(itertools.cycle((True, False)), calls):
        mismatches.add(name, args, kwargs)
        if strided:
            *tensors, weight, eps = args
            mismatches.add(name, (*(t[1::2] for t in tensors), weight, eps), kwargs)
    # Every tile of the heuristics, from few rows to many.
    bfloat16 = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    for n in (512, 2880, 4096, 7168, 16384, 20000):
        for rows in (3, 300, 2500, 20000):
            tensors = [bfloat16(rows, n) for _ in range(1 + ("add" in name))]
            mismatches.add(name, (*tensors, bfloat16(n), 1e-6), {"cast_order": "cast_scale"})
    mismatches.check(1e-3)


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_offsets_past_32_bits() -> None:
    from fusionpasses.providers.triton import ADAPTERS

    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    n = 4096
    wanted = torch.randn(3, n, device="cuda", dtype=torch.bfloat16)
    kwargs = {"cast_order": "scale_cast"}
    norm_name = "rmsnorm_mxfp4_quant.with_norm"

    far_apart = torch.empty(2 * 2**31 + n, device="cuda", dtype=torch.bfloat16).as_strided((3, n), (2**31, 1))
    far_apart.copy_(wanted)
    for name, args, options in ((QUANT, (), {}), (norm_name, (None, 1e-6), kwargs)):
        for got, want in zip(
            ADAPTERS[name](far_apart, *args, **options), ADAPTERS[name](wanted, *args, **options), strict=True
        ):
            assert torch.equal(got, want)
    del far_apart

    # Groups as far apart, and rows of one.
    memory = torch.empty(2 * 2**31 + 2**30 + n, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(3, 2, n, device="cuda", dtype=torch.bfloat16)
    for strides in ((2**31, 2**30), (2**30, 2**31)):
        x = memory.as_strided((3, 2, n) if strides[0] == 2**31 else (2, 3, n), (*strides, 1))
        x.copy_(rows.view(x.shape))
        for got, want in zip(ADAPTERS[QUANT](x), ADAPTERS[QUANT](rows.view(x.shape)), strict=True):
            assert torch.equal(got, want)
    del memory, x

    # Many rows that are one row in memory: outputs of more than 2**32 elements, x next to nothing.
    rows = 2**20 + 3
    for name, args, options in ((QUANT, (), {}), (norm_name, (None, 1e-6), kwargs)):
        outputs = ADAPTERS[name](wanted[:1].expand(rows, n), *args, **options)
        for got, want in zip(outputs, ADAPTERS[name](wanted[:1], *args, **options), strict=True):
            for row in (0, rows // 2 - 1, rows // 2 + 1, -1):
                assert torch.equal(got[row], want[0])
        del outputs, got


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_graph_capture() -> None:
    from fusionpasses.providers.triton import ADAPTERS

    name = "rmsnorm_add_mxfp4_quant.with_norm"
    make = lambda: torch.randn(64, 2880, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, residual, weight = make(), make(), make()[0]
    kwargs = {"cast_order": "cast_scale"}
    ADAPTERS[name](x, residual, weight, 1e-6, **kwargs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ADAPTERS[name](x, residual, weight, 1e-6, **kwargs)
    x.copy_(make())
    graph.replay()
    for got, want in zip(captured, ADAPTERS[name](x, residual, weight, 1e-6, **kwargs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@not_interpreted
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpu_that_is_not_current() -> None:
    assert_same(QUANT, (torch.randn(3, 64, device="cuda:1"),), {})


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    triton_interpreter.cast_bfloat16_as_gpus_do()
    with triton_interpreter.without_needless_work():
        GROUPS[sys.argv[1]]()
