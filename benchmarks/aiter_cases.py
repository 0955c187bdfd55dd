"""Calls of our ops that AITER serves, run by our adapters and compared with the references, byte by byte.

The same calls in the interpreter and on an NVIDIA GPU (``aiter_check.py``), and on AMD GPUs (``pytest -m rocm``).
A group yields the calls of one kernel.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusionpasses import _aiter_numerics
from fusionpasses._aiter_numerics import FUNCTIONS, Level
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.kernels import arch
from fusionpasses.ops import _mxfp4, _mxfp4_weight, silu_mul_mxfp4_quant
from fusionpasses.ops._op import OPS
from fusionpasses.providers import _aiter_conditions, _aiter_import, _aiter_rules, aiter

#: Relative error of a norm's or an activation's float32 value that providers are allowed here.
TOLERANCE = 3e-6

#: Error of tanh + 1, of which GELU is a product, however small that sum is.
GELU_SLACK = 2.0**-22

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "aiter"

Case = tuple[str, tuple[Any, ...], dict[str, Any]]


class Machine(NamedTuple):
    """What runs AITER's kernels, as far as it decides which calls can be compared.

    Attributes:
        device: of the tensors.
        lift: a power of two that what is quantised is multiplied by. Compiled for NVIDIA, AITER's kernels turn scale
            bytes below 127 into 127 (a negative float goes to uint8 through zero); lifted, no block has one.
        zeros: does this Triton compile ``-x`` as a negation? Else pairs of zeros are left out of rotations.
        rounds: is every product of a rotation rounded, as code for AMD's GPUs does? Else an FMA may take one in, and
            rotations are compared within a bound.
    """

    device: str
    lift: float = 1.0
    zeros: bool = True
    rounds: bool = True


def quant(machine: Machine) -> Iterator[Case]:
    device, low, high = machine.device, *((-9, 9) if machine.lift == 1 else (4, 12))
    for dtype in _mxfp4.INPUT_DTYPES:
        for shape in ((1, 32), (5, 64), (33, 96), (40, 1184), (2, 3, 64), (64,)):
            x = torch.randn(shape, device=device).to(dtype)
            scales = torch.logspace(low, high, shape[-1], 2.0, device=device).to(dtype)
            yield "dynamic_mxfp4_quant.default", (x * scales,), {}
    yield "dynamic_mxfp4_quant.default", ((torch.randn(64, 7, device=device) * machine.lift).T,), {}
    yield "dynamic_mxfp4_quant.default", ((torch.randn(9, 128, device=device) * machine.lift)[::2, 32:96],), {}


def rms(machine: Machine) -> Iterator[Case]:
    device = machine.device
    for dtype in _mxfp4.INPUT_DTYPES:
        for n in (32, 96, 512):
            wide = torch.randn(7, 2 * n, device=device).to(dtype)
            x = wide[:, :n]
            weights = torch.randn(2, n, device=device) * machine.lift
            for weight in (weights[0], weights[1].to(dtype)):
                exact = {"cast_order": "scale_cast", "norm_dtype": torch.float32}
                yield "rmsnorm_mxfp4_quant.default", (x, weight, 1e-5), exact
    for n in (64, 224):
        x, weight = torch.randn(2, 3, n, device=device), torch.randn(n, device=device) * machine.lift
        for cast_order in ("cast_scale", "scale_cast"):
            order = {"cast_order": cast_order}
            yield "rmsnorm_mxfp4_quant.default", (x, weight, 1e-6), order
            yield "rmsnorm_mxfp4_quant.with_norm", (x, weight, 1e-6), order
            yield "rmsnorm_add_mxfp4_quant.default", (x, torch.randn_like(x), weight, 1e-6), order
            yield "rmsnorm_add_mxfp4_quant.with_norm", (x, torch.randn_like(x), weight, 1e-6), order
    yield from _second_norms(machine, "scale_cast")


def _second_norms(machine: Machine, cast_order2: str) -> Iterator[Case]:
    """The first norm rounded nowhere; the second, of other columns, rounded as ``cast_order2`` says."""
    device = machine.device
    for dtype in _mxfp4.INPUT_DTYPES:
        for n, n2 in ((96, 32), (64, 224)):
            x, x2, _ = torch.randn(5, n + n2 + 16, device=device).to(dtype).split([n, n2, 16], -1)
            weights = torch.randn(n, device=device) * machine.lift, torch.randn(n2, device=device)
            for weight, weight2 in (weights, (weights[0].to(dtype), weights[1].to(dtype))):
                yield (
                    "rmsnorm_mxfp4_quant.with_second",
                    (x, weight, 1e-5, x2, weight2, 1e-6),
                    {
                        "cast_order": "scale_cast",
                        "norm_dtype": torch.float32,
                        "cast_order2": cast_order2,
                        "norm_dtype2": dtype,
                    },
                )


def act(machine: Machine) -> Iterator[Case]:
    device = machine.device

    def halves(*shape: int) -> Tensor:
        both = torch.randn(shape, device=device) * 3
        both[..., shape[-1] // 2 :] *= machine.lift
        return both

    for dtype in _mxfp4.INPUT_DTYPES:
        for rows, n in ((1, 32), (5, 96), (40, 288)):
            gate, up = halves(rows, 2 * n).to(dtype).chunk(2, -1)
            exact = {"cast_order": "mul_cast", "act_dtype": torch.float32}
            yield "silu_mul_mxfp4_quant.default", (gate, up), exact
    gate, up = halves(2, 3, 128).chunk(2, -1)
    yield "silu_mul_mxfp4_quant.default", (gate, up), {"cast_order": "cast_mul"}


def rope(machine: Machine) -> Iterator[Case]:
    device, heads, latent, width, tokens = machine.device, 3, 32, 16, 5
    bf16 = torch.bfloat16
    slots = torch.tensor([7, -1, 0, 11, 3], device=device)
    for style in ("neox", "interleaved"):
        for positions in (None, torch.tensor([4, 0, -8, 8, -1], device=device).int()):
            for entries in (width // 2, width):
                for paged in (False, True):
                    q = torch.randn(tokens, heads, latent + width, device=device, dtype=bf16)
                    joint = torch.randn(tokens, latent + width, device=device, dtype=bf16)
                    if machine.zeros:
                        joint[1] = 0  # what padding looks like; the sign of a turned zero is part of the contract
                        joint[3], q[3] = 0, 0
                    angle = torch.rand(tokens if positions is None else 9, entries, device=device) * 6
                    stacked = torch.randn(2, 3, 4, latent + width, device=device).to(bf16)
                    cache = stacked[1] if paged else torch.randn(12, 3, latent + width, device=device).to(bf16)[:, 1]
                    k_pe = joint[:, latent:].unsqueeze(1) if paged else joint[:, latent:]
                    yield (
                        "fused_rope_mla_kv_cache.absorbed",
                        (
                            q[..., :latent],
                            q[..., latent:],
                            k_pe,
                            joint[:, :latent],
                            cache,
                            angle.cos().to(bf16),
                            angle.sin().to(bf16),
                            slots.int() if paged else slots,
                        ),
                        {"style": style, "negative_slots": "skip", "positions": positions},
                    )


def concat(machine: Machine) -> Iterator[Case]:
    device = machine.device
    slots = torch.tensor([7, -1, 0, 11, 3], device=device)
    joint = torch.randn(5, 48, device=device, dtype=torch.bfloat16)
    joint[0, :4] = torch.tensor([0.0, -0.0, float("inf"), 1e-40])
    for cache in (torch.randn(12, 48, device=device), torch.randn(2, 3, 4, 48, device=device)[1]):
        yield "concat_and_cache_mla.default", (joint[:, :32], joint[:, 32:], cache.bfloat16(), slots), {}


def gemm(machine: Machine) -> Iterator[Case]:
    device = machine.device
    for tokens, n, k in ((1, 32, 256), (5, 40, 512), (40, 64, 768)):
        x = _mxfp4.quantize(torch.randn(tokens, k, device=device), "even")
        w = _mxfp4.quantize(torch.randn(n, k, device=device), "even")
        for out_dtype in (torch.bfloat16, torch.float16):
            yield "mxfp4_gemm.default", (*x, *w), {"out_dtype": out_dtype}


def shuffled(machine: Machine) -> Iterator[Case]:
    """Few tokens and many, whose scales are shuffled, too; tiles of a table, one with parts of K."""
    device = machine.device
    for tokens, n, k in ((1, 64, 256), (31, 128, 512), (32, 64, 768), (300, 128, 256), (3, 1280, 8192)):
        x = _mxfp4.quantize(torch.randn(tokens, k, device=device), "even")
        w = _mxfp4.quantize(torch.randn(n, k, device=device), "even")
        for out_dtype in (torch.bfloat16, torch.float16)[: 1 if n > 128 else 2]:
            keywords = {"out_dtype": out_dtype, "layout": "shuffled", "rows": n}
            yield "mxfp4_gemm.default", (*x, *_mxfp4_weight.shuffle(*w)), keywords


def shuffled_scales(machine: Machine) -> Iterator[Case]:
    """32 tokens and more. The last two have parts of K in the table of AITER, the last tiles of 16 tokens, too."""
    device = machine.device
    for tokens, n, k in (
        (32, 64, 256),
        (32, 96, 768),
        (40, 96, 768),
        (300, 128, 512),
        (130, 512, 7168),
        (32, 1280, 8192),
    ):
        x = _mxfp4.quantize(torch.randn(tokens, k, device=device), "even")
        w = _mxfp4.quantize(torch.randn(n, k, device=device), "even")
        for out_dtype in (torch.bfloat16, torch.float16)[: 1 if n > 128 else 2]:
            keywords = {"out_dtype": out_dtype, "layout": "shuffled_scales", "rows": n}
            yield "mxfp4_gemm.default", (*x, *_mxfp4_weight.shuffle(*w, "shuffled_scales")), keywords


GROUPS: dict[str, Callable[[Machine], Iterator[Case]]] = {
    "quant": quant,
    "rms": rms,
    "act": act,
    "rope": rope,
    "concat": concat,
    "gemm": gemm,
    "shuffled": shuffled,
    "shuffled_scales": shuffled_scales,
}


def fast_rms(machine: Machine) -> Iterator[Case]:
    """As the two that follow, calls that go to AITER only where "aiter_fast" was asked for: our contract rounds."""
    device = machine.device
    for dtype in (torch.bfloat16, torch.float16):
        x, residual = torch.randn(2, 64, 512, device=device).to(dtype)
        weight = (torch.randn(512, device=device) * machine.lift).to(dtype)
        for order in ({"cast_order": "cast_scale"}, {"cast_order": "scale_cast"}):
            for overload in ("default", "with_norm"):
                yield f"rmsnorm_mxfp4_quant.{overload}", (x, weight, 1e-6), order
                yield f"rmsnorm_add_mxfp4_quant.{overload}", (x, residual, weight, 1e-6), order
        exact = {"cast_order": "scale_cast", "norm_dtype": torch.float32}
        yield "rmsnorm_add_mxfp4_quant.default", (x, residual, weight.float(), 1e-6), exact
    yield from (case for case in _second_norms(machine, "cast_scale") if case[1][0].dtype != torch.float32)


def fast_act(machine: Machine) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        both = torch.randn(64, 1024, device=machine.device) * 2
        both[:, 512:] *= machine.lift
        gate, up = both.to(dtype).chunk(2, -1)
        for activation, cast_order in silu_mul_mxfp4_quant.contracts():
            if dtype != torch.float32 or activation != "silu":
                yield "silu_mul_mxfp4_quant.default", (gate, up), {"activation": activation, "cast_order": cast_order}


def fast_rope(machine: Machine) -> Iterator[Case]:
    for op, args, kwargs in rope(machine):
        yield op, (*args[:5], args[5].float(), args[6].float(), *args[7:]), kwargs


def hip(machine: Machine) -> Iterator[Case]:
    """Calls of AITER's HIP op, for "aiter_fast": what its Triton kernel cannot do. Nothing but an AMD GPU runs them."""
    device, width = machine.device, 64
    for dtype, heads, latent, tokens, blocks in (
        (torch.bfloat16, 16, 512, 5, "apart"),
        (torch.float16, 4, 512, 5, "paged"),
        (torch.float16, 16, 512, 300, "flat"),
        (torch.float32, 4, 512, 5, "paged"),
        (torch.bfloat16, 3, 384, 5, "flat"),
        (torch.float32, 3, 128, 5, "flat"),
    ):
        if (
            dtype == torch.bfloat16
            and blocks == "apart"
            and arch.of(torch.empty(0, device=device).device).name != "gfx950"
        ):
            continue  # k is not rounded there
        for style, positions in (("neox", None), ("interleaved", torch.arange(tokens, device=device) % 9 - 4)):
            q = torch.randn(tokens, heads, latent + width, device=device).to(dtype)
            joint = torch.randn(tokens, latent + width, device=device).to(dtype)
            joint[1], joint[3], q[3] = 0, 0, 0
            slots = torch.randperm(400, device=device)[:tokens].int()
            slots[1] = -1
            if blocks == "flat":
                cache = torch.randn(400, latent + width, device=device).to(dtype)
            else:
                stacked = torch.randn(50, 2, 8, latent + width, device=device).to(dtype)
                cache = stacked[:, 1] if blocks == "apart" else stacked[:, 1].contiguous()
            angle = torch.rand(tokens if positions is None else 9, width // 2, device=device) * 6
            k_pe = joint[:, latent:] if style == "neox" else joint[:, latent:].unsqueeze(1)
            tensors = (q[..., :latent], q[..., latent:], k_pe, joint[:, :latent], cache)
            angles = (angle.cos().to(dtype), angle.sin().to(dtype))
            keywords = {"style": style, "negative_slots": "skip", "positions": positions}
            yield "fused_rope_mla_kv_cache.absorbed", (*tensors, *angles, slots), keywords


def refused(machine: Machine) -> Iterator[Case]:
    """Calls that are refused because AITER gives other bytes, which it does."""
    device = machine.device
    x = torch.randn(64, 512, device=device)
    weight = torch.randn(512, device=device) * machine.lift
    for cast_order in ("cast_scale", "scale_cast"):
        yield "rmsnorm_mxfp4_quant.default", (x.bfloat16(), weight.bfloat16(), 1e-6), {"cast_order": cast_order}
    exact = {"cast_order": "scale_cast", "norm_dtype": torch.float32}
    yield "rmsnorm_add_mxfp4_quant.default", (x.bfloat16(), x.flip(0).bfloat16(), weight, 1e-6), exact
    both = torch.randn(64, 1024, device=device)
    both[:, 512:] *= machine.lift
    gate, up = both.bfloat16().chunk(2, -1)
    for cast_order in ("cast_mul", "mul_cast"):
        yield "silu_mul_mxfp4_quant.default", (gate, up), {"cast_order": cast_order}
    for value in (float("inf"), float("nan"), 3.3e38):
        odd = torch.ones(1, 32, device=device) * machine.lift
        odd[0, 3] = value
        yield "dynamic_mxfp4_quant.default", (odd,), {}


#: For "aiter_fast". "hip" is for AMD GPUs alone.
FAST: dict[str, Callable[[Machine], Iterator[Case]]] = {
    "fast_rms": fast_rms,
    "fast_act": fast_act,
    "fast_rope": fast_rope,
    "hip": hip,
}


@dataclasses.dataclass
class Tally:
    """What came of the calls of a group.

    Attributes:
        cases: how many calls.
        equal: calls all of whose bytes are the reference's.
        within: other calls, within what the contract allows: every byte that one float32 number does not decide is
            equal (or the sum, or the rotation, is within its bound).
        refused: calls that the rules refuse, and for which AITER's bytes are other ones; of an old release, also those
            of ops that are not exact there at all.
        decided: least share of the bytes of a call that had to be equal, and were.
        other: of calls for "aiter_fast", the share of the bytes of codes and scales, or of the query, that are not
            those of our exact reference.
        failures: what went wrong, as text.
    """

    cases: int = 0
    equal: int = 0
    within: int = 0
    refused: int = 0
    decided: float = 1.0
    other: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)


def run(group: str, machine: Machine) -> Tally:
    """Every call of a group of GROUPS or FAST, or "refused" or "golden"; one that fails keeps no other from it."""
    torch.manual_seed(0)
    tally = Tally()
    one = {"refused": _refused, "golden": _golden}.get(group, _unrounded if group in FAST else _accepted)
    cases = {**GROUPS, **FAST, "refused": refused, "golden": golden}[group]
    for case in cases(machine):
        tally.cases += 1
        try:
            one(case, machine, tally)
        except Exception as error:
            what = f"{case[0]} {tuple(case[1][0].shape)} {case[1][0].dtype} {case[2]}"
            tally.failures.append(f"{what}: {type(error).__name__}: {str(error)[:600]}")
    return tally


def _accepted(case: Case, machine: Machine, tally: Tally) -> None:
    op, args, kwargs = case
    OPS[op].check(*args, **kwargs)
    arguments = aiter.bound(op, args, kwargs)
    answer = aiter.judge(op, arguments, Level.FINITE)
    if not answer and not _served(op, arguments, Level.FINITE):
        tally.refused += 1  # the whole op or layout, of an old release
        return
    _must(bool(answer), f"refused: {answer.why}")
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    got = aiter.ADAPTERS["aiter_finite"][op](*args, **kwargs)
    equal, decided = compare(op, got, args, before, kwargs, rounds=machine.rounds)
    tally.equal += equal
    tally.within += not equal
    tally.decided = min(tally.decided, decided)


def _served(op: str, arguments: dict[str, Any], level: Level) -> bool:
    """Does the release that is here run any call of an op, or of that layout of it?"""
    target = aiter.target(arguments)
    meant = [name for name in FUNCTIONS[op] if _aiter_rules.ruling(op, name, arguments, target).meant]
    return any(_is_served(op, name, level) for name in meant)


def _is_served(op: str, function: str, level: Level) -> bool:
    try:
        release = _aiter_import.load(function)[1]
    except ProviderUnavailable:
        return False
    return bool(_aiter_numerics.serves(op, release, level=level, function=function))


def _unrounded(case: Case, machine: Machine, tally: Tally) -> None:
    """A call for "aiter_fast": refused without it, and in float32 by AITER."""
    op, args, kwargs = case
    OPS[op].check(*args, **kwargs)
    arguments = aiter.bound(op, args, kwargs)
    refused = aiter.judge(op, arguments, Level.FINITE)
    _must(not refused, "accepted for less")
    target = aiter.target(arguments)
    names = [name for name in FUNCTIONS[op] if _aiter_rules.ruling(op, name, arguments, target).level is Level.FAST]
    _must(len(names) == 1, f"admitted by {len(names)} functions")
    if not _is_served(op, names[0], Level.FAST):
        _must(names[0] != FUNCTIONS[op][0] or "no setting admits it" in refused.why, "an old release is said to help")
        tally.refused += 1
        return
    _must("provider='aiter_fast' admits it" in refused.why, f"the reason is {refused.why}")
    answer = aiter.judge(op, arguments, Level.FAST)
    _must(bool(answer), f"refused: {answer.why}")
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    wide, wide_kwargs = in_float32(op, before, kwargs)
    exact = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    got = aiter.ADAPTERS["aiter_fast"][op](*args, **kwargs)
    if "rope" in op:
        _layout(op, got, before, kwargs)
        equal, decided = _rotated(got, args, OPS[op].reference(*wide, **wide_kwargs), wide, machine.rounds)
    else:
        _layout(op, got, before, kwargs)
        equal, decided = _quantised(op, got, wide, wide_kwargs, value_of(op, wide, wide_kwargs))
    tally.equal += equal
    tally.within += not equal
    tally.decided = min(tally.decided, decided)
    contract = OPS[op].reference(*exact, **kwargs)
    pairs = [(got, contract)] if isinstance(got, Tensor) else list(zip(got[:2], contract[:2], strict=True))
    changed = sum(int((_bytes(a) != _bytes(b)).sum()) for a, b in pairs)
    # A mean over calls, as far as they came.
    done = tally.equal + tally.within
    tally.other += (changed / sum(_bytes(a).numel() for a, _ in pairs) - tally.other) / done


def in_float32(op: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The call that rounds nothing before the codes, by our contract: AITER's answer to this one."""
    packet = op.partition(".")[0]
    if packet == "fused_rope_mla_kv_cache":
        return [*args[:5], args[5].float(), args[6].float(), *args[7:]], kwargs
    wide = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
    if packet == "silu_mul_mxfp4_quant":
        return wide, {**kwargs, "cast_order": "mul_cast", "act_dtype": torch.float32}
    rounded_nowhere = {"cast_order": "scale_cast", "norm_dtype": torch.float32}
    if op.endswith(".with_second"):
        rounded_nowhere |= {"cast_order2": "scale_cast", "norm_dtype2": torch.float32}
    return wide, kwargs | rounded_nowhere


def _refused(case: Case, machine: Machine, tally: Tally) -> None:
    op, args, kwargs = case
    arguments = aiter.bound(op, args, kwargs)
    if aiter.judge(op, arguments, Level.EXACT if op.startswith("dynamic") else Level.FINITE):
        raise AssertionError("accepted")
    name = FUNCTIONS[op][0]
    function, release = _aiter_import.load(name)
    got, expected = aiter._RUN[op, name](function, release, arguments), OPS[op].reference(*args, **kwargs)
    if all(map(same_bytes, got[:2], expected[:2])):
        raise AssertionError("refused for nothing: AITER gives the same bytes")
    tally.refused += 1


def golden(machine: Machine) -> Iterator[Case]:
    """The vectors of tests/golden/aiter that adapters can be asked for, each with the bytes expected of it."""
    shift = int(np.log2(machine.lift))

    def of(name: str) -> Any:
        return np.load(GOLDEN / f"golden_aiter_{name}.npz")

    def on(array: np.ndarray) -> Tensor:
        return numbers(array).to(machine.device)

    plain, edges, rms_plain = of("dynq_plain"), of("dynq_edges"), of("rms_plain")
    always = torch.ones(1, dtype=torch.bool, device=machine.device)
    x = on(plain["x_bf16"]) * machine.lift
    expected = (on(plain["q"]), on(plain["scale"]) + shift, always, always)
    yield "dynamic_mxfp4_quant.default", (x,), {"golden": expected}
    # Lifted, the largest would overflow: those with scale bytes that need no lift.
    exact = on(edges["hw_exact"]) & ((on(edges["scale"])[:, 0] >= 127) | (machine.lift == 1))
    expected = (on(edges["q"])[exact], on(edges["scale"])[exact], always, always)
    yield "dynamic_mxfp4_quant.default", (on(edges["x_bf16"])[exact],), {"golden": expected}
    weight = on(rms_plain["w1_bf16"]) * machine.lift
    masks = (on(rms_plain["safe_q_bytes"]), on(rms_plain["safe_scale"]))
    expected = (on(rms_plain["q"]), on(rms_plain["scale"]) + shift, *masks)
    exactly = {"cast_order": "scale_cast", "norm_dtype": torch.float32}
    args = (on(rms_plain["x1_bf16"]), weight, float(rms_plain["eps1"]))
    yield "rmsnorm_mxfp4_quant.default", args, {**exactly, "golden": expected}


def _golden(case: Case, machine: Machine, tally: Tally) -> None:
    op, args, kwargs = case
    *expected, codes_count, scales_count = kwargs.pop("golden")
    arguments = aiter.bound(op, args, kwargs)
    if not _served(op, arguments, Level.FINITE):
        tally.refused += 1
        return
    answer = aiter.judge(op, arguments, Level.FINITE)
    _must(bool(answer), f"refused: {answer.why}")
    got = aiter.ADAPTERS["aiter_finite"][op](*args, **kwargs)
    for result, meant, counts in zip(got, expected, (codes_count, scales_count), strict=True):
        if not same_bytes(torch.where(counts, result, 0), torch.where(counts, meant, 0)):
            raise AssertionError(f"{int((torch.where(counts, result, 0) != meant).sum())} bytes differ")
    tally.equal += 1


def compare(op: str, got: Any, args: Any, before: Any, kwargs: Any, *, rounds: bool = True) -> tuple[bool, float]:
    """Are all bytes the reference's, and which share of them must be? Raises where one that must be is not."""
    _layout(op, got, before, kwargs)
    packet = op.partition(".")[0]
    if packet == "mxfp4_gemm":
        expected = OPS[op].reference(*before, **kwargs)
        x = _mxfp4.dequantize(*before[:2]).double()
        layout, rows = kwargs.get("layout", "linear"), kwargs.get("rows")
        w = _mxfp4_weight.linear(before[2], before[3], layout, rows, 0, x.shape[-1]).double()
        bound = (x.abs() @ w.T.abs()) * x.shape[-1] * 2.0**-24
        error = (got.double() - x @ w.T).abs()
        _must(bool((error <= bound + (x @ w.T).abs() * torch.finfo(got.dtype).eps).all()), "sum out of bounds")
        return same_bytes(got, expected), 0.0
    if packet in ("fused_rope_mla_kv_cache", "concat_and_cache_mla"):
        # The reference writes to the cache of ``before``.
        return _rotated(got, args, OPS[op].reference(*before, **kwargs), before, rounds)
    if packet == "dynamic_mxfp4_quant":
        expected = OPS[op].reference(*before, **kwargs)
        equal = all(map(same_bytes, got, expected))
        _must(equal, f"{int((got[0] != expected[0]).sum())} codes, {int((got[1] != expected[1]).sum())} scales differ")
        return True, 1.0
    return _quantised(op, got, before, kwargs, value_of(op, before, kwargs))


def _layout(op: str, got: Any, before: Any, kwargs: Any) -> None:
    """Shapes, dtypes and strides are those of the contract."""
    fake = OPS[op].fake(*before, **kwargs)
    many = (got,) if isinstance(got, Tensor) else got or ()
    for result, meant in zip(many, (fake,) if isinstance(fake, Tensor) else fake or (), strict=True):
        _must((result.shape, result.dtype, result.stride()) == (meant.shape, meant.dtype, meant.stride()), "layout")


def _rotated(got: Any, args: Any, expected: Any, before: Any, rounds: bool) -> tuple[bool, float]:
    """The query, and the arguments after the call, beside ``expected`` and those that the reference wrote to."""
    pairs = [
        (after, meant.to(after.dtype))
        for after, meant in zip((*args, got), (*before, expected), strict=True)
        if isinstance(after, Tensor)
    ]
    equal = all(same_bytes(after, meant) for after, meant in pairs)
    if rounds:
        _must(equal, "bytes of the query or the cache differ")
    for after, meant in pairs if not equal else ():
        # One rounding of bfloat16 less, of terms of at most twice the largest number here.
        largest = float(meant.abs().max()) if meant.is_floating_point() else 0.0
        _must(float((after.double() - meant.double()).abs().max()) <= 2 * largest * 2.0**-8, "too far off")
    return equal, 1.0 if rounds else 0.0


def value_of(op: str, args: Any, kwargs: Any) -> Tensor:
    """What a call quantises."""
    packet, _, overload = op.partition(".")
    if overload == "with_second":  # the other norm is not quantised
        args, kwargs = args[:3], {name: value for name, value in kwargs.items() if not name.endswith("2")}
    with_value = OPS[packet + (".with_act" if packet.startswith("silu") else ".with_norm")]
    value: Tensor = with_value.reference(*args, **kwargs)[-1]
    return value


def _quantised(op: str, got: Any, args: Any, kwargs: Any, value: Tensor) -> tuple[bool, float]:
    """Beside the reference of a call, in which one float32 number may differ in its last bits.

    That is the reciprocal root mean square, or the activation. Bytes that it does not decide must be equal. Results of
    16 bits are those of the reference, rounded.
    """
    packet = op.partition(".")[0]
    expected = OPS[op].reference(*args, **kwargs)
    equal = all(same_bytes(result, meant.to(result.dtype)) for result, meant in zip(got, expected, strict=True))
    # GELU's tanh is within a few roundings of 1, however small the sum of both is.
    slack = args[1].abs() * args[0].abs() * GELU_SLACK if kwargs.get("activation") == "gelu_tanh" else 0.0
    lower, upper = (
        _mxfp4.quantize(value * (1 + step * TOLERANCE) + step * value.sign() * slack, "even") for step in (-1, 1)
    )
    decided: list[Tensor] = []
    blocks = torch.ones_like(expected[1], dtype=torch.bool)
    for which in (1, 0):
        safe = (lower[which] == expected[which]) & (upper[which] == expected[which])
        if which == 1:
            blocks = safe
        else:
            safe &= blocks.repeat_interleave(16, -1)
        wrong = int((got[which] != expected[which])[safe].sum())
        _must(wrong == 0, f"{wrong} of {int(safe.sum())} {('codes', 'scales')[which]} differ")
        decided.append(safe.flatten())
    for place, (result, meant) in enumerate(zip(got[2:], expected[2:], strict=True)):
        if place == 0 and "add" in packet:
            _must(same_bytes(result, meant.to(result.dtype)), "the sum differs")
        else:
            limits, narrow = torch.finfo(result.dtype), result.dtype != torch.float32
            step, least = (limits.eps, limits.smallest_normal * limits.eps) if narrow else (0.0, 0.0)
            torch.testing.assert_close(result.float(), meant.float(), rtol=TOLERANCE + step, atol=least)
    return equal, float(torch.cat(decided).float().mean())


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def numbers(array: np.ndarray) -> Tensor:
    """A tensor of a golden array; bfloat16 is stored as uint16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


TARGET = _aiter_conditions.Target("gfx950", keeps_zeros=True, rocm=7)
