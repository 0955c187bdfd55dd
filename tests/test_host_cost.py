"""Replayed calls: the same launch as a call made in full, and only where it is the same.

Without a GPU, Triton compiles for one that is not there and a driver of this file records what would be launched.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import test_rope_mla_kv_cache_kernel as rope_calls
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusionpasses import providers
from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import DIRECT, OPS, _mxfp4, _mxfp4_weight
from fusionpasses.probes import probe_triton
from fusionpasses.providers import _launch, _plan

pytestmark = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)

ours = torch.ops.fusionpasses
GIVEN = _plan._given
QUANT = "dynamic_mxfp4_quant.default"
EVERY_NAME = [name for name in OPS if providers.verdict("triton", name, "cuda")]
#: What they do depends on sizes: below those of a large weight they are other ops, one after the other.
MLPS = [name for name in EVERY_NAME if name.endswith("then_mlp")]
REPLAYED = [name for name in EVERY_NAME if name not in MLPS]
THEN_GEMMS = [name for name in EVERY_NAME if "then_" in name]
NAMES = [name for name in EVERY_NAME if "mxfp4_quant" in name and name not in THEN_GEMMS]
CACHE_WRITES = [name for name in EVERY_NAME if "mla" in name]
GEMMS = [name for name in EVERY_NAME if name.startswith("mxfp4_gemm")]


# ---- a GPU that is not there


@dataclasses.dataclass(frozen=True)
class Launched:
    kernel: str  # Triton's key of the compiled kernel: name, types, specialisation, constants, options
    grid: tuple[int, ...]
    args: tuple[Any, ...]


class Recorder:
    """As much of a Triton driver as a launch needs."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def compiled(self, kernel: Any, key: str, *rest: Any) -> Any:
        """In place of compiling a kernel."""
        from triton.compiler import CompiledKernel

        def run(x: int, y: int, z: int, stream: Any, function: str, metadata: Any, launched: Any, *rest: Any) -> None:
            enter, leave, *args = rest
            self.launches.append(Launched(function, (x, y, z), tuple(args)))
            for hook in (enter, leave):
                if hook is not None:
                    hook(launched)

        class NotLoaded(CompiledKernel):  # type: ignore[misc, unused-ignore]
            def __init__(self) -> None:
                pass

            def __del__(self) -> None:
                pass

        compiled = NotLoaded()
        compiled.src, compiled.module, compiled.name = None, self, kernel.__name__
        compiled.function, compiled.packed_metadata, compiled._run = f"{kernel.__name__} {key}", None, run
        return compiled


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    import triton
    from triton import knobs
    from triton.runtime import JITFunction

    if knobs.runtime.interpret:
        pytest.skip("needs compiled kernels")

    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", recorder)
        patch.setattr(JITFunction, "_do_compile", lambda kernel, key, *rest: recorder.compiled(kernel, key))
        for kernel in _kernels():
            patch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
        # A replayed launch is given addresses; these tests ask which tensors.
        patch.setattr(_plan, "_given", lambda place: f"t{place}")
        patch.setattr(providers, "select", lambda op, device, asked="auto": "triton" if asked == "auto" else asked)
        _launch.forget()
        yield recorder
    _launch.forget()


def _kernels() -> list[Any]:
    from fusionpasses.kernels import (
        dynamic_mxfp4_quant,
        mxfp4_dequantize,
        mxfp4_gemm,
        mxfp4_gemm_dot,
        mxfp4_gemm_sum,
        rmsnorm_mxfp4_quant,
        rmsnorm_mxfp4_quant_pair,
        rope_mla_kv_cache,
        silu_mul_mxfp4_quant,
    )

    return [
        dynamic_mxfp4_quant.dynamic_mxfp4_quant,
        rmsnorm_mxfp4_quant.rmsnorm_mxfp4_quant,
        rmsnorm_mxfp4_quant_pair.rmsnorm_mxfp4_quant_pair,
        mxfp4_gemm.mxfp4_gemm,
        mxfp4_gemm.mxfp4_gemm_arrange,
        mxfp4_dequantize.mxfp4_dequantize,
        mxfp4_gemm_dot.mxfp4_gemm_dot,
        mxfp4_gemm_sum.mxfp4_gemm_sum,
        rope_mla_kv_cache.rope_mla_kv_cache,
        silu_mul_mxfp4_quant.silu_mul_mxfp4_quant,
    ]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op, by all that a launch may depend on."""

    name: str = "rmsnorm_add_mxfp4_quant.with_norm"
    dtype: torch.dtype = torch.bfloat16
    leading: tuple[int, ...] = (3,)
    blocks: int = 2
    offset: int = 0  # elements that x starts behind a multiple of 64 bytes
    padding: int = 0  # elements between its rows
    transposed: bool = False
    residual_offset: int = 0
    residual_padding: int = 0
    weight: torch.dtype | None = torch.bfloat16
    weight_offset: int = 0
    eps: float = 1e-6
    cast_order: str = "cast_scale"
    wide_norm: bool = False
    scale_mode: str = "even"

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        n = 32 * self.blocks
        x = _rows(self.leading, n, self.dtype, self.offset, self.padding)
        if self.transposed and x.dim() > 2:
            x = x.transpose(0, 1)
        if self.name == QUANT:
            return [x], {"scale_mode": self.scale_mode}
        tensors = [x]
        if "add" in self.name:
            tensors.append(_rows(tuple(x.shape[:-1]), n, self.dtype, self.residual_offset, self.residual_padding))
        if "silu" in self.name:
            up = _rows(tuple(x.shape[:-1]), n, self.dtype, self.residual_offset, self.residual_padding)
            return [x, up], {
                "activation": "silu" if self.eps else "gelu_tanh",
                "cast_order": self.cast_order.replace("scale", "mul"),
                "act_dtype": torch.float32 if self.wide_norm else None,
                "scale_mode": self.scale_mode,
            }
        weight = None
        if self.weight is not None:
            weight = _rows((), n, self.dtype if self.weight != torch.float32 else self.weight, self.weight_offset, 0)
        norm_dtype = torch.float32 if self.wide_norm else None
        if self.name.endswith(".with_second"):
            x2 = _rows(tuple(x.shape[:-1]), n + 32, self.dtype, self.residual_offset, self.residual_padding)
            weight2 = None if weight is None else _rows((), n + 32, weight.dtype, self.weight_offset, 0)
            return [x, weight, self.eps, x2, weight2, 2 * self.eps], {
                "cast_order": self.cast_order,
                "norm_dtype": norm_dtype,
                "cast_order2": self.cast_order,
                "norm_dtype2": norm_dtype,
                "scale_mode": self.scale_mode,
            }
        return [*tensors, weight, self.eps], {
            "cast_order": self.cast_order,
            "norm_dtype": norm_dtype,
            "scale_mode": self.scale_mode,
        }

    def run(self, recorder: Recorder) -> list[Any]:
        return told(recorder, self.name, *self.arguments())


def told(recorder: Recorder, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Launches and outputs of a call, without addresses."""
    recorder.launches.clear()
    with torch.no_grad():
        outputs = as_tuple(OPS[name].overload(*args, **kwargs))
    result: list[Any] = [(output.shape, output.stride(), output.dtype) for output in outputs]
    for launched in recorder.launches:
        result += [launched.kernel, launched.grid]
        for value in launched.args:
            same = [place for place, tensor in enumerate([*args, *kwargs.values(), *outputs]) if value is tensor]
            if isinstance(value, Tensor):
                result.append(same or (value.shape, value.stride(), value.dtype, value.data_ptr() % 16))
            else:
                result.append((type(value), repr(value)))
    return result


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)


def _rows(leading: tuple[int, ...], n: int, dtype: torch.dtype, offset: int, padding: int) -> Tensor:
    strides = [n + padding]
    for size in leading[:0:-1]:
        strides.insert(0, strides[0] * size)
    count = strides[0] * (leading[0] if leading else 1)
    storage = torch.ones(max(count, n) + offset, dtype=dtype)  # NaNs would be equal to nothing
    return storage[offset:].as_strided((*leading, n), (*strides[: len(leading)], 1))


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from(NAMES),
    "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    "leading": st.sampled_from([(), (1,), (3,), (16,), (48,), (1, 3), (3, 1), (3, 16), (16, 3), (2, 24), (0,)]),
    "blocks": st.sampled_from([1, 2, 16, 90]),
    "offset": st.sampled_from([0, 1, 2, 8, 16]),
    "padding": st.sampled_from([0, 1, 2, 16, 32]),
    "transposed": st.booleans(),
    "residual_offset": st.sampled_from([0, 1, 2, 8]),
    "residual_padding": st.sampled_from([0, 2, 16]),
    "weight": st.sampled_from([None, torch.bfloat16, torch.float32]),
    "weight_offset": st.sampled_from([0, 1, 2, 8]),
    "eps": st.sampled_from([1e-6, 1e-5, 0.0, -0.0, 1.0]),
    "cast_order": st.sampled_from(["cast_scale", "scale_cast"]),
    "wide_norm": st.booleans(),
    "scale_mode": st.sampled_from(["even", "floor", "rceil", "ceil"]),
}


@st.composite
def pairs(draw: Any) -> tuple[Call, Call]:
    """Calls that differ in one respect, or two, or none."""
    first = Call(**{name: draw(values) for name, values in FIELDS.items()})
    changed = draw(st.lists(st.sampled_from(list(FIELDS)), max_size=2))
    return first, dataclasses.replace(first, **{name: draw(FIELDS[name]) for name in changed})


# ---- tests


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls=pairs())
def test_a_call_launches_the_same_whatever_was_called_before(recorder: Recorder, calls: tuple[Call, Call]) -> None:
    first, second = calls
    _launch.forget()
    alone = second.run(recorder)
    assert second.run(recorder) == alone
    _launch.forget()
    first.run(recorder)
    assert second.run(recorder) == alone


@pytest.mark.parametrize("field", FIELDS)
def test_every_respect_is_seen(recorder: Recorder, field: str) -> None:
    """Of all values of a respect: each launch after the others is that of the call alone."""
    start = Call(leading=(3, 16))
    calls = [dataclasses.replace(start, **{field: value}) for value in _values(field)]
    alone = []
    for call in calls:
        _launch.forget()
        alone.append(call.run(recorder))
    _launch.forget()
    for _ in range(2):
        assert [call.run(recorder) for call in calls] == alone


@pytest.mark.parametrize("name", CACHE_WRITES)
def test_every_cache_write_launches_the_same_whatever_was_called_before(recorder: Recorder, name: str) -> None:
    calls = [rope_calls.Draw(seed, "cpu").call(name) for seed in range(40)]
    alone = []
    for args, kwargs in calls:
        _launch.forget()
        alone.append(told(recorder, name, args, kwargs))
    _launch.forget()
    for _ in range(2):
        assert [told(recorder, name, args, kwargs) for args, kwargs in calls] == alone


@pytest.mark.parametrize("way", ["few tokens", "in order", "dots", "many tokens"])
@pytest.mark.parametrize("name", GEMMS)
def test_every_product_launches_the_same_whatever_was_called_before(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    """Of a few tokens, by dots and of many: with launches, torch's product and scratch of its own."""
    from fusionpasses.kernels import mxfp4_gemm, mxfp4_gemm_dot

    monkeypatch.setattr(mxfp4_gemm, "for_few_tokens", lambda *_: way in ("few tokens", "in order"))
    monkeypatch.setattr(mxfp4_gemm, "decodes_tokens", lambda *_: way != "in order")
    monkeypatch.setattr(mxfp4_gemm_dot, "for_dot", lambda *_, **__: way == "dots")
    calls = list(OPS[name].samples(torch.device("cpu")))
    alone = []
    for args, kwargs in calls:
        _launch.forget()
        alone.append(told(recorder, name, args, kwargs))
    kernels = {str(entry).partition(" ")[0] for told_ in alone for entry in told_ if isinstance(entry, str)}
    few = {"mxfp4_gemm"} | ({"mxfp4_gemm_arrange"} if way == "in order" and name.startswith("mxfp4_gemm.") else set())
    by_dots = {"mxfp4_gemm_dot"} if way == "dots" else set()  # of weights in layout "linear"
    assert kernels == (few if way in ("few tokens", "in order") else {"mxfp4_dequantize"} | by_dots)
    _launch.forget()
    for _ in range(2):
        assert [told(recorder, name, args, kwargs) for args, kwargs in calls] == alone


def test_a_replayed_product_allocates_scratch_anew(
    full_calls: list[str], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusionpasses.kernels import mxfp4_gemm_dot

    monkeypatch.setattr(mxfp4_gemm_dot, "for_dot", lambda *_, **__: False)
    args, kwargs = next(iter(OPS["mxfp4_gemm.default"].samples(torch.device("cpu"))))
    scratch = []
    with torch.no_grad():
        for _ in range(3):
            recorder.launches.clear()
            kept = OPS["mxfp4_gemm.default"].overload(*args, **kwargs)
            scratch.append(
                [
                    v
                    for launched in recorder.launches
                    for v in launched.args
                    if getattr(v, "dtype", None) == torch.bfloat16
                ]
            )
            assert all(kept is not tensor for tensor in scratch[-1])
    assert full_calls == ["mxfp4_gemm.default"]
    assert len({tensor.data_ptr() for tensors in scratch for tensor in tensors}) == sum(map(len, scratch)) == 6


def _values(field: str) -> list[Any]:
    return [False, True] if field in ("transposed", "wide_norm") else list(FIELDS[field].elements)  # type: ignore[attr-defined]


@pytest.fixture
def full_calls(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> list[str]:
    """Names of the ops whose adapters ran."""
    from fusionpasses.providers.triton import ADAPTERS

    ran: list[str] = []

    def noted(provider: str, name: str) -> Any:
        ran.append(name)
        return ADAPTERS[name]

    monkeypatch.setattr(providers, "implementation", noted)
    _launch.forget()
    return ran


@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_second_call_is_replayed(full_calls: list[str], name: str, guard: Any) -> None:
    args, kwargs = Call(name).arguments() if name in NAMES else next(iter(OPS[name].samples(torch.device("cpu"))))
    caches = [value for value in args if name in CACHE_WRITES and value.shape == (12, 24)]
    versions = [value._version for value in caches]
    with guard():
        first, again = [], []
        for outputs in (first, again):
            outputs += as_tuple(OPS[name].overload(*args, **kwargs))
            versions += [value._version for value in caches]
    assert full_calls == [name]
    # Autograd is told of the write, replayed or not.
    assert versions == sorted(set(versions))
    for one, two in zip(first, again, strict=True):
        assert (one.shape, one.stride(), one.dtype, one.device) == (two.shape, two.stride(), two.dtype, two.device)
        assert one.data_ptr() != two.data_ptr()


@pytest.mark.parametrize("name", MLPS)
def test_an_mlp_of_three_launches_is_replayed(
    full_calls: list[str], recorder: Recorder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from fusionpasses.kernels import gemm_choice, mxfp4_gemm_wgmma

    def choose(tokens: int, rows: int, width: int, arch: Any, **_: Any) -> gemm_choice.Choice:
        return gemm_choice.Choice("mxfp4_gemm_wgmma", mxfp4_gemm_wgmma.launch_options(tokens, rows, width, arch), "")

    monkeypatch.setattr(gemm_choice, "choose", choose)
    x, norm = torch.randn(12, 256).bfloat16(), torch.ones(256).bfloat16()
    args: tuple[Any, ...] = {"dynamic": (x,), "rmsnorm": (x, norm, 1e-6)}.get(name.split("_")[0], ())
    args = (x, x.clone(), norm, 1e-6) if "_add_" in name else args
    kwargs: dict[str, Any] = {"activation": "silu", "act_cast_order": "cast_mul"}
    kwargs |= {} if "dynamic" in name else {"cast_order": "cast_scale"}
    for prefix, of_tensors, rows in (("", "w_", 512), ("down_", "down_", 256)):
        codes, scales, shift = _mxfp4_weight.prepare(*_mxfp4.quantize(torch.randn(rows, 256), "even"))
        kwargs |= {f"{of_tensors}codes": codes, f"{of_tensors}scales": scales, f"{prefix}layout": "tiles"}
        kwargs |= {f"{prefix}rows": rows, f"{prefix}shift": shift}
    kwargs |= {"out_dtype": torch.bfloat16, "down_dtype": torch.bfloat16}
    told_ = [told(recorder, name, args, kwargs) for _ in range(3)]
    assert full_calls == [name]
    assert len(recorder.launches) == 3
    assert told_[0] == told_[1] == told_[2]


@pytest.mark.parametrize("name", [name for name in CACHE_WRITES if "bmm" in name])
def test_a_replayed_call_multiplies_what_it_is_given(full_calls: list[str], recorder: Recorder, name: str) -> None:
    args, kwargs = next(iter(OPS[name].samples(torch.device("cpu"))))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for factor in args[:2]:
            factor.copy_(torch.randn(factor.shape, generator=generator))
        recorder.launches.clear()
        with torch.no_grad():
            q, *_ = as_tuple(OPS[name].overload(*args, **kwargs))
        product = torch.bmm(*args[:2]).transpose(0, 1)
        assert torch.equal(q[..., : product.shape[-1]], product)
        (launched,) = recorder.launches
        assert any(value is q for value in launched.args)
    assert full_calls == [name]


@pytest.mark.parametrize(
    "call",
    [
        Call(QUANT, padding=1),  # copied, row by row
        Call(QUANT, offset=1),
        Call(residual_offset=1),
        Call(weight_offset=1),
        Call(leading=(0,)),  # nothing is launched
    ],
)
def test_calls_that_are_done_in_full(full_calls: list[str], recorder: Recorder, call: Call) -> None:
    assert call.run(recorder) == call.run(recorder)
    assert full_calls == [call.name] * 2


def test_one_tensor_in_two_places(full_calls: list[str], recorder: Recorder) -> None:
    (x, residual, weight, eps), kwargs = Call().arguments()
    name = Call().name
    for second in (x, residual, x, residual):
        recorder.launches.clear()
        OPS[name].overload(x, second, weight, eps, **kwargs)
        (launched,) = recorder.launches
        assert launched.args[0] is x
        assert launched.args[1] is second


@pytest.mark.parametrize("name", EVERY_NAME)
def test_the_benchmark_has_arguments_for_every_op(name: str) -> None:
    from benchmarks import host_cost

    with torch.no_grad():
        args, kwargs = host_cost.arguments(name, torch.randn(4, 128).bfloat16(), torch.randn(128).bfloat16())
    OPS[name].check(*args, **kwargs)


@pytest.mark.parametrize("name", ["rmsnorm_mxfp4_quant.with_second", "mxfp4_gemm_a16w4.default"])
def test_the_benchmark_compiles_calls_whose_tensors_are_in_any_place(name: str) -> None:
    from benchmarks import host_cost

    with torch.no_grad():
        args, kwargs = host_cost.arguments(name, torch.randn(4, 128).bfloat16(), torch.randn(128).bfloat16())
        compiled = host_cost._compiled(name, 2, args, kwargs | {"provider": "reference"})
        got = compiled(*[value for value in args if isinstance(value, torch.Tensor)])
        want = OPS[name].reference(*args, **kwargs)
    first = want[0] if isinstance(want, tuple) else want
    assert [torch.equal(one, first) for one in got] == [True, True]


def test_bad_input_is_refused_after_good_input_of_the_same_shape(recorder: Recorder) -> None:
    (x, residual, weight, eps), kwargs = Call().arguments()
    op = ours.rmsnorm_add_mxfp4_quant
    for _ in range(2):
        op(x, residual, weight, eps, **kwargs)
    for args, changed, text in (
        ((x.short(), residual, weight, eps), {}, "x.dtype: got torch.int16"),
        ((x, residual.half(), weight, eps), {}, "residual: got torch.float16"),
        ((x, residual, weight.half(), eps), {}, "weight.dtype: got torch.float16"),
        ((x, residual, weight[:32], eps), {}, r"weight: got shape \(32,\)"),
        ((x, residual, weight, eps), {"scale_mode": "nearest"}, "scale_mode: got 'nearest'"),
        ((x, residual, weight, eps), {"norm_dtype": torch.float16}, "norm_dtype: got torch.float16"),
        ((x.clone().requires_grad_(), residual, weight, eps), {}, "argument 0 requires grad"),
    ):
        with pytest.raises(UnsupportedInput, match=text):
            op(*args, **{**kwargs, **changed})


def test_launch_hooks_see_every_call(full_calls: list[str], recorder: Recorder) -> None:
    from triton import knobs

    seen: list[str] = []

    def hook(launched: Any) -> None:
        seen.append(launched.get()["name"])

    Call(QUANT).run(recorder)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        Call(QUANT).run(recorder)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    Call(QUANT).run(recorder)
    assert full_calls == [QUANT] * 2  # Triton launches where it has hooks to call
    assert seen == ["dynamic_mxfp4_quant"]


def test_hooks_that_replay_would_pass_by_see_every_call(
    full_calls: list[str], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at the end, in the second of two kernels, or in place of the hook that was there when the plan was made."""
    from triton import knobs

    from fusionpasses.kernels import mxfp4_gemm

    monkeypatch.setattr(mxfp4_gemm, "for_few_tokens", lambda *_: True)
    monkeypatch.setattr(mxfp4_gemm, "decodes_tokens", lambda *_: False)
    name = "mxfp4_gemm.default"
    args, kwargs = next(iter(OPS[name].samples(torch.device("cpu"))))
    seen: list[Any] = []

    def run() -> int:
        before = len(full_calls)
        with torch.no_grad():
            OPS[name].overload(*args, **kwargs)
        return len(full_calls) - before

    recorder.launches.clear()
    assert [run(), run()] == [1, 0]
    kernels = {launched.kernel.partition(" ")[0] for launched in recorder.launches}
    assert kernels == {"mxfp4_gemm_arrange", "mxfp4_gemm"}
    knobs.runtime.launch_exit_hook.add(seen.append)
    try:
        assert run() == 1
    finally:
        knobs.runtime.launch_exit_hook.remove(seen.append)
    assert seen
    assert run() == 0
    for kernel in _kernels():
        if kernel.__name__ in kernels:
            with monkeypatch.context() as patch:
                patch.setattr(kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(1)])
                assert run() == 1
            assert run() == 0
    for owner, setting, value in (
        (knobs.runtime, "launch_enter_hook", seen.append),
        (knobs.compilation, "instrumentation_mode", "other"),
        (knobs.compilation, "fpsan_homomorphic_casts", "other"),
        (knobs.runtime, "add_stages_inspection_hook", lambda *_: ("", "")),
    ):
        if hasattr(owner, setting):
            with monkeypatch.context() as patch:
                patch.setattr(owner, setting, value)
                plans = [plan for plans in _launch._every_plans.values() for plan in plans.values() if plan]
                assert plans
                assert all(plan(_values_of(args, kwargs)) is _plan.UNUSABLE for plan in plans)
    assert run() == 0
    _launch.forget()
    with monkeypatch.context() as patch:
        # A function, in place of Triton's chain of hooks, is there when the plan is made.
        patch.setattr(knobs.runtime, "launch_enter_hook", seen.append)
        assert [run(), run()] == [1, 1]


def _values_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return (*args, *kwargs.values())


def test_what_changes_kernels_is_obeyed(
    full_calls: list[str], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    plain = Call(QUANT).run(recorder)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        assert "'debug': True" in str(Call(QUANT).run(recorder))
        assert "'debug': True" not in str(plain)
    assert Call(QUANT).run(recorder) == plain
    called: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(_kernels()[0], "pre_run_hooks", [lambda *args, **kwargs: called.append(1)])
        assert Call(QUANT).run(recorder) == plain
    assert called == [1]


def test_plans_hold_no_tensors_and_are_bounded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "MAX_PLANS", 5)
    _launch.forget()
    kept = []
    for rows in range(1, 20):
        args, kwargs = Call(leading=(rows,)).arguments()
        outputs = OPS[Call().name].overload(*args, **kwargs)
        kept += [weakref.ref(value) for value in (*args, *outputs) if isinstance(value, Tensor)]
        assert sum(map(len, _launch._every_plans.values())) <= 5
    recorder.launches.clear()
    del args, outputs
    gc.collect()
    assert not [tensor for tensor in kept if tensor() is not None]


def _expected(values: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(v.dtype, str(v.device), tuple(v.shape), v.stride()) for v in values if isinstance(v, Tensor)]


@pytest.mark.parametrize("name", REPLAYED)
def test_a_site_launches_as_the_op_does(full_calls: list[str], recorder: Recorder, name: str) -> None:
    args, kwargs = Call(name).arguments() if name in NAMES else next(iter(OPS[name].samples(torch.device("cpu"))))
    with torch.no_grad():
        first = as_tuple(OPS[name].overload(*args, **kwargs))
        (alone,) = recorder.launches[-1:]
        site = DIRECT.site(name, *_expected((*args, *kwargs.values())))
        keys: list[Any] = []
        for count in range(1, 4):
            recorder.launches.clear()
            outputs = as_tuple(site(*args, **kwargs))
            assert recorder.launches[-1].kernel == alone.kernel
            assert recorder.launches[-1].grid == alone.grid
            for one, two in zip(first, outputs, strict=True):
                assert (one.shape, one.stride(), one.dtype, one.device) == (
                    two.shape,
                    two.stride(),
                    two.dtype,
                    two.device,
                )
                assert any(two is value for launched in recorder.launches for value in launched.args)
            assert full_calls == [name] * 2, count
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_launch, "call_key", lambda *given: keys.append(given))
                site(*args, **kwargs)
    assert not keys
    _launch.forget()
    with torch.no_grad():
        site(*args, **kwargs)
        site(*args, **kwargs)
    assert full_calls == [name] * 3


def test_a_site_is_not_for_what_it_was_not_made_for(full_calls: list[str], recorder: Recorder) -> None:
    name = Call().name
    args, kwargs = Call().arguments()
    (x, *rest) = args
    expected = _expected(args)
    site = DIRECT.site(name, *expected)
    site(*args, **kwargs)
    plain = recorder.launches[-1]
    site(*args, **kwargs)
    assert full_calls == [name]
    # Its weight off the alignment that kernels are specialised for: the op launches with a copy.
    weight = torch.empty(rest[1].numel() + 1, dtype=rest[1].dtype)[1:].copy_(rest[1])
    site(x, rest[0], weight, *rest[2:], **kwargs)
    assert recorder.launches[-1].args[2] is not weight
    assert torch.equal(recorder.launches[-1].args[2], weight)
    assert full_calls == [name] * 2
    # Tensors that are not as generated code said: never a plan of the site's own, and each call is what it should be.
    wrong = DIRECT.site(name, *[(dtype, device, (9, *shape[1:]), stride) for dtype, device, shape, stride in expected])
    for _ in range(3):
        wrong(*args, **kwargs)
        assert recorder.launches[-1].kernel == plain.kernel
    half = [value.half() if isinstance(value, Tensor) else value for value in args]
    for made in (site, wrong):  # guards that torch was told to skip would have noticed; nothing else looks at a dtype
        made(*half, **kwargs)
        assert recorder.launches[-1].kernel != plain.kernel
    for place, other in enumerate(
        ((torch.float16,), (None, "cuda:7"), (None, None, (1, 1)), (None, None, None, (1, 1)))
    ):
        first = list(expected[0])
        first[place] = other[place]
        _launch.forget()
        full_calls.clear()
        keyed = DIRECT.site(name, tuple(first), *expected[1:])
        keyed(*args, **kwargs)
        with pytest.MonkeyPatch.context() as patch:
            keys: list[Any] = []
            key = _launch.call_key
            patch.setattr(_launch, "call_key", lambda *given, key=key, keys=keys: keys.append(1) or key(*given))
            keyed(*args, **kwargs)
        assert keys == [1], other


def test_a_site_has_tensors_by_name(full_calls: list[str], recorder: Recorder) -> None:
    name = "concat_and_cache_mla.default"
    every = [
        call for call in OPS[name].samples(torch.device("cpu")) if any(torch.is_tensor(v) for v in call[1].values())
    ]
    assert every
    for args, kwargs in every:
        values = _values_of(args, kwargs)
        site = DIRECT.site(name, *_expected(values))
        versions = []
        for _ in range(3):
            recorder.launches.clear()
            with torch.no_grad():
                site(*args, **kwargs)
            (launched,) = recorder.launches
            given = [value for value in launched.args if torch.is_tensor(value)]
            assert all(any(one is value for value in values) for one in given)
            versions.append([value._version for value in values if torch.is_tensor(value)])
        changes = [[b - a for a, b in zip(one, two, strict=True)] for one, two in itertools.pairwise(versions)]
        assert changes[0] == changes[1]
        assert sum(changes[0]) >= 1


def test_what_is_not_fresh_is_not_made_anew(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusionpasses.kernels import dynamic_mxfp4_quant

    kernel = dynamic_mxfp4_quant.dynamic_mxfp4_quant
    x = torch.ones(4, 64).bfloat16()

    def planned(outputs: Any, scratch: Sequence[Tensor] = (), given: Tensor = x, *called: Tensor) -> bool:
        rest = dict.fromkeys(kernel.arg_names, 1)
        compiled = recorder.compiled(kernel, "key")
        launched = _plan.Launch(kernel, compiled, (1,), (), (), rest)
        steps: list[Any] = [launched, *(_plan.TorchCall(torch.Tensor.zero_, (tensor,)) for tensor in called)]
        return _plan.make(_plan.Steps(steps, list(scratch)), (given,), outputs) is not None

    made = torch.ones(4, 64)
    assert planned(made)
    assert planned((made, torch.ones(3)), [torch.ones(2)])
    for outputs in (x, x.view(-1), (made, made.view(-1)), (made, made), made.t(), made[1:], made[:2], (made, 3)):
        assert not planned(outputs), outputs
    assert not planned(made, [made.view(-1)])
    assert not planned(torch.ones(4, 64, device="meta"))
    buffer = bytearray(64 + 16)
    start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() % 16
    assert not planned(
        torch.frombuffer(buffer, dtype=torch.uint8, count=64, offset=8 - start if start <= 8 else 24 - start)
    )
    # Tensors without elements share what is not there.
    assert planned((torch.ones(0), torch.ones(0)), [], torch.ones(0, 64))
    # What torch is called with is given or made, too.
    assert planned(made, [], x, made)
    assert not planned(made, [], x, torch.ones(3))
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")  # Triton looks at more there
        assert not planned(made)
    launched = _plan.Launch(kernel, recorder.compiled(kernel, "key"), (1,), (), (), {})
    assert _plan.make(_plan.Steps([launched], []), (x,), made) is None  # a default of the kernel, which nobody gave


def test_a_call_records_its_own_launches_alone(recorder: Recorder) -> None:
    """Not those of a call in it, of another thread, or of a call before it that failed."""
    from fusionpasses.kernels import dynamic_mxfp4_quant

    def launch() -> None:
        kernel = dynamic_mxfp4_quant.dynamic_mxfp4_quant
        _launch._recording.current and _launch._recording.current.steps.append(
            _plan.Launch(kernel, None, (1,), (), (), {})
        )

    def fail() -> None:
        launch()
        raise ValueError("no memory")

    def steps(call: Any) -> int:
        made: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_plan, "make", lambda recorded, *_: made.append(len(recorded.steps)))
            _launch._recorded(call, (), {})
        return made[-1]

    def nested() -> None:
        launch()
        _launch._recorded(launch, (), {})
        with pytest.raises(ValueError, match="no memory"):
            _launch._recorded(fail, (), {})
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()
        launch()

    assert steps(nested) == 2
    with pytest.raises(ValueError, match="no memory"):
        steps(fail)
    assert _launch._recording.current is None


def test_a_plan_keeps_its_kernel(recorder: Recorder) -> None:
    from fusionpasses.kernels import dynamic_mxfp4_quant

    kernel = dynamic_mxfp4_quant.dynamic_mxfp4_quant
    compiled = recorder.compiled(kernel, "key")
    launched = _plan.Launch(kernel, compiled, (1,), (), (), dict.fromkeys(kernel.arg_names, 1))
    plan = _plan.make(_plan.Steps([launched], []), (torch.ones(4, 64),), None)
    kept = weakref.ref(compiled)
    del compiled, launched
    gc.collect()
    assert plan is not None
    assert kept() is not None


def test_addresses_are_of_the_tensors() -> None:
    assert GIVEN(3) == "a3"
    names: dict[str, Any] = {}
    x, y = torch.ones(4), torch.ones(5)
    lines = _plan._tensors((x, 3, y), (torch.ones(2),), names)
    space = names | {"values": (x, 3, y), "unusable": None}
    exec("def addresses(values):\n    " + "\n    ".join(lines) + "\n    return a0, a2, t3, a3", space)
    first, second, made, third = space["addresses"]((x, 3, y))
    assert (first, second, third) == (x.data_ptr(), y.data_ptr(), made.data_ptr())
    assert space["addresses"]((x.half(), 3, y)) is None
    assert space["addresses"]((torch.ones(5)[1:], 3, y)) is None


def test_a_site_is_watched(recorder: Recorder) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    args, kwargs = Call(QUANT).arguments()
    site = DIRECT.site(QUANT, *_expected(args))
    for _ in range(2):
        site(*args, **kwargs)
        with Watch():
            site(*args, **kwargs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            site(*args, **kwargs)
        assert "fusionpasses::dynamic_mxfp4_quant" in {event.name for event in profiler.events()}
    assert seen == [ours.dynamic_mxfp4_quant.default] * 2


def test_kernels_that_are_interpreted_are_not_replayed() -> None:
    class Interpreted(dict):
        def __missing__(self, grid: tuple[int, ...]) -> Any:
            return lambda x, y: y.copy_(x)

    def double(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.empty_like(x)
        _launch.launch(Interpreted(), (1,), x, y)
        return (y,)

    run = _launch.replayed(double)
    for x in (torch.zeros(2), torch.ones(2)):
        assert torch.equal(run(x)[0], x)


def test_modes_and_lazy_negation_still_come_first(full_calls: list[str]) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    x = torch.randn(2, 64)
    with torch.no_grad():
        for _ in range(2):
            ours.dynamic_mxfp4_quant(x)
        with Watch():
            ours.dynamic_mxfp4_quant(x)
        assert ours.dynamic_mxfp4_quant.default in seen
        with FakeTensorMode() as mode:
            codes, _ = ours.dynamic_mxfp4_quant(mode.from_tensor(x))
        assert type(codes) is not Tensor


def test_lazy_negation_is_resolved() -> None:
    x = torch.randn(2, 64)
    with torch.no_grad():
        got = ours.dynamic_mxfp4_quant(torch._neg_view(x), provider="reference")
        want = ours.dynamic_mxfp4_quant(-x, provider="reference")
    assert all(map(torch.equal, got, want))
