"""The Triton kernel of RoPE and the MLA cache against the reference: interpreted anywhere, compiled on a GPU."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor

from fusionpasses.ops import OPS
from fusionpasses.probes import probe_triton

pytestmark = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels")

NAMES = [name for name in OPS if name.startswith(("fused_rope_mla_kv_cache.", "concat_and_cache_mla."))]
STYLES = ("neox", "interleaved", "interleaved_to_neox")
FP8 = torch.float8_e4m3fn
SPECIAL = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40, -3e-39, 448.0, 464.0, 1e-3, -0.0078, 3e38])


class Draw:
    """A call of an op, drawn at random: shapes, strides, dtypes, layouts, values."""

    def __init__(self, seed: int, device: str, *, large: bool = False) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        # Widths that are pieces, more often than not.
        odd = self.rng.random() < 0.3
        self.tokens = self.rng.choice((1, 2, 5, 70, 333) if large else (1, 2, 5))
        self.heads = self.rng.choice((1, 3, 16, 128) if large else (1, 3, 4))
        self.rope = self.rng.choice((2, 6, 20) if odd else (16, 32, 64))
        self.latent = self.rng.choice((1, 7, 33) if odd else (8, 40, 512 if large else 64))
        self.nope = self.rng.choice((3, 9) if odd else (8, 24, 512 if large else 32))
        self.dtype = self.rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * 10.0 ** self.rng.choice((-3, 0, 1))
        if self.rng.random() < 0.3:
            where = torch.randint(0, max(x.numel(), 1), (x.numel() // 8,), generator=self.generator)
            x.view(-1)[where] = SPECIAL[torch.randint(0, len(SPECIAL), where.shape, generator=self.generator)]
        return x.to(dtype or self.dtype)

    def strided(self, x: Tensor) -> Tensor:
        """The same values in other memory, on the device."""
        kind = self.rng.choice(("as is", "slice", "off", "apart", "reversed"))
        x = x.to(self.device)
        if kind == "slice":  # of wider rows, aligned
            return torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]]
        if kind == "off":  # rows that start between words
            return torch.cat((x[..., :1], x), -1)[..., 1:]
        if kind == "apart":
            return x.repeat_interleave(2, -1)[..., ::2]
        if kind == "reversed":
            axes = range(x.dim())
            return x.permute(*reversed(axes)).contiguous().permute(*reversed(axes))
        return x

    def cache(self, slots: int, width: int, block: int | None, dtype: torch.dtype) -> Tensor:
        kind = self.rng.choice(("whole", "layer", "stacked behind", "wide", "blocks apart"))
        shape = (slots, width) if block is None else (slots // block, block, width)
        if kind == "layer":
            return self._cache(3, *shape, dtype=dtype)[1]
        if kind == "stacked behind":
            return self._cache(*shape[:-1], 2, width, dtype=dtype)[..., 1, :]
        if kind == "blocks apart":
            return self._cache(*shape[:-2], 2, *shape[-2:], dtype=dtype)[..., 1, :, :]
        if kind == "wide":
            return self._cache(*shape[:-1], width + 8, dtype=dtype)[..., 8:]
        return self._cache(*shape, dtype=dtype)

    def _cache(self, *shape: int, dtype: torch.dtype) -> Tensor:
        held = torch.float16 if dtype in (FP8, torch.uint8) else dtype
        x = torch.randn(shape, generator=self.generator).to(held)
        x = x.to(FP8) if held is not dtype else x
        return (x.view(torch.uint8) if dtype is torch.uint8 else x).to(self.device)

    def call(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rng, tokens = self.rng, self.tokens
        k_pe = self.strided(self.values(tokens, self.rope))
        k_pe = k_pe.unsqueeze(1) if rng.random() < 0.3 else k_pe
        kv_c = self.strided(self.values(tokens, self.latent))
        block = rng.choice((None, 1, 4, 7))
        capacity = (tokens + 3) * (block or 1)
        cache_dtype = rng.choice((self.dtype, self.dtype, FP8, torch.uint8))
        two = rng.random() < 0.3
        kv_cache = self.cache(capacity, self.latent + (0 if two else self.rope), block, cache_dtype)
        negative = rng.choice(("skip", "wrap", "error")) if name.startswith("fused") else "skip"
        slots = torch.randperm(capacity, generator=self.generator)[:tokens]
        if negative == "wrap":
            slots = torch.where(torch.rand(tokens, generator=self.generator) < 0.3, slots - capacity, slots)
        if negative == "skip":
            slots[torch.rand(tokens, generator=self.generator) < 0.3] = rng.choice((-1, -7, -(2**31)))
        slots = slots.to(self.device, rng.choice((torch.int32, torch.int64)))
        kwargs: dict[str, Any] = {}
        if two:
            kwargs["pe_cache"] = self.cache(capacity, self.rope, block, cache_dtype)
        if cache_dtype is not self.dtype and rng.random() < 0.7:
            kwargs["cache_scale"] = torch.tensor([rng.choice((0.75, 0.013, 1e-39, 300.0))], device=self.device)
            kwargs["scaling"] = rng.choice(("divide", "reciprocal"))
        if name.startswith("concat"):
            return (kv_c, k_pe, kv_cache, slots), kwargs
        q_pe = self.strided(self.values(tokens, self.heads, self.rope))
        rows = tokens
        if rng.random() < 0.5:
            rows = tokens + 4
            positions = torch.randint(-rows, rows, (tokens,), generator=self.generator)
            kwargs["positions"] = positions.to(self.device, rng.choice((torch.int32, torch.int64)))
        angle = torch.rand(rows, rng.choice((self.rope // 2, self.rope)), generator=self.generator) * 7
        angle_dtype = rng.choice((self.dtype, torch.float32))
        cos, sin = (self.strided(x.to(angle_dtype)) for x in (angle.cos(), angle.sin()))
        kwargs |= {"style": rng.choice(STYLES), "negative_slots": negative}
        args = (q_pe, k_pe, kv_c, kv_cache, cos, sin, slots)
        if "bmm" in name:
            # Small numbers, whose products are exact in any order, whoever's bmm it is; no zero, whose sign is not.
            inner = rng.choice((1, 12, 20))
            factors = (self.heads, tokens, inner), (self.heads, inner, self.nope)
            whole = [torch.randint(-3, 3, shape, generator=self.generator).to(self.dtype) + 0.5 for shape in factors]
            args = (*map(self.strided, whole), *args)
        elif "absorbed" in name:
            args = (self.strided(self.values(tokens, self.heads, self.nope)), *args)
        return args, kwargs


def storage_of(x: Tensor) -> Tensor:
    """All memory that x is a part of."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


def copied(value: Any, device: str) -> Any:
    """The same view of a copy of its memory."""
    if not isinstance(value, Tensor):
        return value
    memory = storage_of(value).to(device, copy=True)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def differing(got: Tensor, want: Tensor) -> int:
    """Elements with other bytes, NaN of any payload being equal."""
    want = want.to(got.device)
    if got.dtype in (FP8, torch.uint8):
        got, want = (x.contiguous().view(FP8).float() for x in (got, want))
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    same = got.contiguous().view(bits) == want.contiguous().view(bits)
    return int((~same & ~(got.isnan() & want.isnan())).sum())


def check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], about: str) -> None:
    """The kernel's outputs and all memory of its arguments are the reference's, on a CPU."""
    from fusionpasses.providers.triton import ADAPTERS

    theirs = [copied(value, "cpu") for value in (*args, *kwargs.values())]
    want = OPS[name].reference(*theirs[: len(args)], **dict(zip(kwargs, theirs[len(args) :], strict=True)))
    got = ADAPTERS[name](*args, **kwargs)
    results = [x if isinstance(x, tuple) else () if x is None else (x,) for x in (got, want)]
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), about
        assert not differing(a, b), f"{name}, {about}: output {i}: {differing(a, b)} elements"
    for i, (mine, theirs_) in enumerate(zip((*args, *kwargs.values()), theirs, strict=True)):
        if isinstance(mine, Tensor) and mine.is_floating_point() | (mine.dtype == torch.uint8):
            bad = differing(storage_of(mine), storage_of(theirs_))
            assert not bad, f"{name}, {about}: memory of argument {i}: {bad} elements"


def calls(count: int, device: str, *, large: bool = False) -> Iterator[tuple[str, Any, Any, str]]:
    for seed in range(count):
        draw = Draw(seed, device, large=large)
        name = NAMES[seed % len(NAMES)]
        yield (name, *draw.call(name), f"seed {seed}")


def check_random() -> None:
    for name, args, kwargs, about in calls(150, "cpu"):
        check(name, args, kwargs, about)


def check_joined(device: str = "cpu") -> None:
    """As with many tokens: q's programs copy q_nope, with as many copies as it takes for each unit, or more.

    Heads of one to three tokens are taken in turn, of which the last may not exist.
    """
    from fusionpasses.kernels import rope_mla_kv_cache as kernel
    from fusionpasses.providers import _launch

    choose = kernel.launch_options
    with pytest.MonkeyPatch.context() as patch:
        for seed in range(40):
            _launch.forget()
            draw = Draw(seed, device, large=device != "cpu")
            copies = -(-2 * draw.nope // draw.rope) + seed % 2
            joined = {"JOINED": True, "COPIES": copies, "TOGETHER": 1 + seed % 3}
            patch.setattr(kernel, "launch_options", lambda *args, joined=joined: choose(*args) | joined)
            name = f"fused_rope_mla_kv_cache.absorbed{'_with_k' * (seed % 4 == 0)}"
            check(name, *draw.call(name), f"seed {seed}")


def check_samples() -> None:
    for name in NAMES:
        for i, (args, kwargs) in enumerate(OPS[name].samples(torch.device("cpu"))):
            check(name, args, kwargs, f"sample {i}")


def check_fp8(device: str = "cpu") -> None:
    """Every bfloat16 number, and the neighbours of every boundary between two float8 numbers."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    near = torch.cat((middles, torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)))
    for values in (torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16), near):
        rows = torch.nn.functional.pad(values, (0, -len(values) % 512)).view(-1, 512)
        cache = torch.zeros(len(rows), 528).to(FP8)
        args = (rows, torch.zeros(len(rows), 16, dtype=rows.dtype), cache, torch.arange(len(rows)))
        check("concat_and_cache_mla.default", tuple(x.to(device) for x in args), {}, f"every {values.dtype}")


GROUPS = {"random": check_random, "joined": check_joined, "samples": check_samples, "fp8": check_fp8}


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    triton_interpreter.run(__file__, group)


def test_the_version_counter_of_a_cache_counts_writes_of_every_provider() -> None:
    """Autograd refuses tensors that were changed after they were saved, if it is told."""
    cache = torch.zeros(4, 24)
    before = cache._version
    torch.ops.fusionpasses.concat_and_cache_mla(torch.ones(1, 16), torch.ones(1, 8), cache, torch.tensor([2]))
    assert cache._version > before


# ---- on a GPU

gpu = [pytest.mark.gpu, compiled, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("part", [pytest.param(part, marks=gpu) for part in range(4)])
def test_gpu_bytes(part: int) -> None:
    for i, (name, args, kwargs, about) in enumerate(calls(240, "cuda", large=True)):
        if i % 4 == part:
            check(name, args, kwargs, about)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=gpu)])
def test_gpu_joined(device: str) -> None:
    check_joined(device)


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in NAMES])
def test_gpu_samples_and_fp8(name: str) -> None:
    for i, (args, kwargs) in enumerate(OPS[name].samples(torch.device("cuda"))):
        check(name, args, kwargs, f"sample {i}")
    if name.startswith("concat"):
        check_fp8("cuda")


@pytest.mark.parametrize("replays", [pytest.param(3, marks=gpu)])
def test_gpu_a_replayed_call_writes_again_and_counts(replays: int) -> None:
    """Equal calls skip the adapter; they must write, return fresh outputs and move the version on."""
    draw = Draw(3, "cuda")
    for name in NAMES:
        args, kwargs = draw.call(name)
        cache = args[2 if name.startswith("concat") else 3 + ("absorbed" in name) + ("bmm" in name)]
        check(name, args, kwargs, "first")
        for _ in range(replays):
            version = cache._version
            storage_of(cache).zero_()
            args[0].neg_()
            op = OPS[name].overload
            theirs = [copied(value, "cpu") for value in (*args, *kwargs.values())]
            named = dict(zip(kwargs, theirs[len(args) :], strict=True))
            want = OPS[name].reference(*theirs[: len(args)], **named)
            got = op(*args, **kwargs, provider="triton")
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
                assert a is b is None or not differing(a, b), name
            place = next(i for i, value in enumerate(args) if value is cache)
            assert not differing(storage_of(cache), storage_of(theirs[place]))
            assert cache._version > version


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=gpu)])
def test_gpu_offsets_past_32_bits(dtype: torch.dtype) -> None:
    """A cache and a q of more than 2**31 elements: last slots, last tokens."""
    tokens, heads, nope, rope = 30_000, 128, 512, 64
    q_nope = torch.randn(heads, tokens, nope, device="cuda", dtype=dtype).transpose(0, 1)
    q_pe = torch.randn(tokens, heads, rope, device="cuda", dtype=dtype)
    joint = torch.randn(tokens, 576, device="cuda", dtype=dtype)
    cache = torch.zeros(4_000_000, 576, device="cuda", dtype=dtype)
    slots = torch.arange(tokens, device="cuda") + (len(cache) - tokens)
    angle = torch.rand(tokens, rope // 2, device="cuda")
    arguments = (joint[:, 512:], joint[:, :512], cache, angle.cos().to(dtype), angle.sin().to(dtype), slots)
    q = torch.ops.fusionpasses.fused_rope_mla_kv_cache.absorbed(
        q_nope, q_pe, *arguments, style="neox", negative_slots="skip", provider="triton"
    )
    assert q.numel() > 2**31
    assert cache.numel() > 2**31
    assert torch.equal(q[-64:, :, :nope], q_nope[-64:])
    assert torch.equal(cache[slots, :512], joint[:, :512])
    assert not cache[: len(cache) - tokens].any()


if __name__ == "__main__":
    triton_interpreter.cast_bfloat16_as_gpus_do()
    with triton_interpreter.without_needless_work():
        GROUPS[sys.argv[1]]()
