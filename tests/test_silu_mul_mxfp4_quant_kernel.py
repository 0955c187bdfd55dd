"""The Triton kernel of silu_mul_mxfp4_quant: interpreted, and on a GPU (marker ``gpu``). As in test_kernels.py.

What is exact, and what is bounded: the activation is one float32 number that may differ in last bits. Two checks pin it
down: its bound, and that the bytes are those of the reference *given the kernel's own activation*, which the kernel
itself tells (up = 1, nothing rounded, act stored).
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from test_kernels import FORMS, differs, every_pattern, forms_of, needs_gpu, not_interpreted, run_both
from torch import Tensor

from fusionpasses.ops import OPS, _mxfp4
from fusionpasses.ops import silu_mul_mxfp4_quant as op
from fusionpasses.probes import probe_triton

pytestmark = pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)

PLAIN, STORED = NAMES = ("silu_mul_mxfp4_quant.default", "silu_mul_mxfp4_quant.with_act")

#: silu and x * sigmoid: ulps from the real number. A GPU's exp2 may be a ulp worse than numpy's.
ULPS = {"cpu": 4.0, "cuda": 5.0}
#: GELU: from torch's on a CPU, in abs(x) * 2**-24.
GELU_STEPS = {"cpu": 4.0, "cuda": 5.0}


def activation_of(gate: Tensor, activation: str) -> Tensor:
    """The kernel's float32 activation: up is 1, and nothing is rounded."""
    from fusionpasses.providers.triton import ADAPTERS

    kwargs = {"activation": activation, "cast_order": "mul_cast", "act_dtype": torch.float32}
    act: Tensor = ADAPTERS[STORED](gate, torch.ones_like(gate), **kwargs)[2]
    return act


def expected(gate: Tensor, up: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The op as its contract says, from the kernel's own activation."""
    activation, cast_order = kwargs["activation"], kwargs["cast_order"]
    if cast_order == "cast_each":
        # Told as x * sigmoid(x), which divided by x is exact for powers of two.
        sigmoid = sigmoid_of(gate).to(gate.dtype)
        activated = gate * sigmoid
    else:
        activated = activation_of(gate, activation)
    act = activated * up if cast_order == "mul_cast" else activated.to(gate.dtype) * up
    act = act.to(kwargs.get("act_dtype") or gate.dtype).contiguous()
    return *_mxfp4.quantize(act, kwargs.get("scale_mode", "even")), act


def sigmoid_of(gate: Tensor) -> Tensor:
    """The kernel's float32 sigmoid, of gates that are plus or minus a power of two (or zero, where it is a half)."""
    wide = gate.float()
    return torch.where(wide == 0, torch.full_like(wide, 0.5), activation_of(gate, "x_sigmoid") / wide)


def gates(dtype: torch.dtype, cast_order: str, rows: int, n: int, device: str) -> Tensor:
    gate = torch.randn(rows, n) * torch.exp2(torch.randint(-3, 4, (rows, 1)))
    if cast_order == "cast_each":
        gate = torch.where(gate < 0, -1.0, 1.0) * torch.exp2(torch.randint(-6, 5, (rows, n)))
    return gate.to(device, dtype)


def every_contract() -> Iterator[dict[str, Any]]:
    modes = itertools.cycle(_mxfp4.SCALE_ADDEND)
    for activation, cast_order in op.contracts():
        for act_dtype in (None, torch.float32):
            yield {
                "activation": activation,
                "cast_order": cast_order,
                "act_dtype": act_dtype,
                "scale_mode": next(modes),
            }


def layouts(gate: Tensor, up: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same numbers as two tensors, as halves of one, gate last, off alignment, elements apart, in more axes."""
    rows, n = gate.shape
    yield gate, up
    yield torch.cat([gate, up], -1).chunk(2, -1)
    yield torch.cat([up, gate], -1).split(n, -1)[::-1]
    yield gate, torch.cat([up, gate], -1)[:, :n]
    odd = torch.cat([gate, up, gate[:, :1]], -1)
    yield odd[:, :n], odd[:, n : 2 * n]
    even = torch.cat([gate, up, gate[:, :2]], -1)
    yield even[:, :n], even[:, n : 2 * n]
    woven = torch.stack([gate, up], -1).flatten(-2)
    yield woven[:, ::2], woven[:, 1::2]
    yield torch.cat([gate, up], -1).view(1, rows, 2, n).unbind(-2)


def check_contract(device: str, rows: int, n: int, kwargs: dict[str, Any], every: int = 1) -> None:
    """Of layouts and overloads, one of ``every``: interpreted, each call takes a tenth of a second."""
    from fusionpasses.providers.triton import ADAPTERS

    for number, dtype in enumerate(_mxfp4.INPUT_DTYPES):
        gate = gates(dtype, kwargs["cast_order"], rows, n, device)
        up = torch.randn(rows, n).to(device, dtype)
        want = expected(gate, up, kwargs)
        calls = itertools.product(NAMES, layouts(gate, up))
        for name, (g, u) in itertools.islice(calls, number % every, None, every):
            for got, w in zip(ADAPTERS[name](g, u, **kwargs), want, strict=False):
                bad = differs(got.view(w.shape), w)
                assert not bad.any(), f"{name} {dtype} {kwargs} {g.shape} {g.stride()}: {int(bad.sum())} differ"


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126))) - 23)
    return (got.double() - exact).abs() / step


def many_gates(dtype: torch.dtype, device: str) -> Tensor:
    if dtype != torch.float32:
        return every_pattern(dtype, device)[0]  # neighbours in a block
    count = 2**16 if device == "cuda" else 2**13
    parts = (torch.empty(count).uniform_(-88.7, 20), torch.randn(count) * 3, torch.randn(count) * 0.01)
    return torch.cat(parts).view(-1, 32).to(device)


def check_activation(device: str) -> None:
    for dtype in _mxfp4.INPUT_DTYPES:
        gate = many_gates(dtype, device)
        x = gate.double().cpu()
        for activation in op.ACTIVATIONS:
            got = activation_of(gate, activation).cpu()
            want = op._activated(gate.cpu(), activation, "mul_cast")
            within = x.isfinite() & (x > -88.72)
            # Infinities, NaN and the zeros where exp(-x) is infinite are torch's; so is x itself beyond 18.
            same = ~within | (x > 18) if activation != "gelu_tanh" else ~x.isfinite() | (x.abs() > 12)
            assert not differs(got, want)[same].any(), (dtype, activation)
            if activation == "gelu_tanh":
                off = ((got - want).abs() / x.abs().clamp(min=2.0**-100) * 2.0**24)[within]
                assert off.max() <= GELU_STEPS[device], (dtype, float(off.max()))
            else:
                off = ulps(got, x / (1 + torch.exp(-x)))[within]
                assert off.max() <= ULPS[device], (dtype, activation, float(off.max()))


def check_edges(device: str) -> None:
    """Gates whose activation is exact whoever computes it: every byte is the reference's."""
    exact = torch.tensor([0.0, -0.0, 18.5, 77.0, 3e38, torch.inf, -torch.inf, torch.nan, -100.0, -3e38, 40.0, 1000.0])
    ups = torch.tensor([0.0, -0.0, 1.0, -1.5, 3e38, torch.inf, -torch.inf, torch.nan, 1e-40, 2.0**-126, -7.0, 0.3])
    pairs = torch.cartesian_prod(exact, ups).repeat_interleave(32, 0)
    pairs[::32] = torch.tensor([20.0, 1.0])
    mixed = torch.cartesian_prod(exact[[0, 1, 2, 3, 8, 10]], ups[[0, 1, 2, 3, 8, 11]])[:32].repeat(3, 1)
    gate, up = torch.cat([pairs, mixed]).view(-1, 32, 2).unbind(-1)
    calls = itertools.product(_mxfp4.INPUT_DTYPES, every_contract())
    for dtype, kwargs in itertools.islice(calls, 0, None, 1 if device == "cuda" else 2):
        args = gate.to(device, dtype), up.to(device, dtype)
        for output, got, want in run_both(STORED, args, kwargs, reference_on="cpu"):
            bad = differs(got, want)
            assert not bad.any(), f"{output} {dtype} {kwargs}: {int(bad.sum())} of {bad.numel()} differ"


def check_samples(device: str) -> None:
    """Against the reference itself: a last bit of the activation rarely shows."""
    for name in NAMES:
        count = total = 0
        for args, kwargs in OPS[name].samples(torch.device(device)):
            for output, got, want in run_both(name, args, kwargs, reference_on="cpu"):
                if output == "act":
                    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(args[0].dtype).eps, atol=1e-6)
                else:
                    count, total = count + int(differs(got, want).sum()), total + got.numel()
        assert count <= 1e-3 * total, (name, count, total)


def check_contracts() -> None:
    for number, kwargs in enumerate(every_contract()):
        # Every layout and overload once, over the dtypes.
        check_contract("cpu", 3, 96, kwargs, every=3 if number == 0 else 16)


def check_forms() -> None:
    for kwargs in itertools.islice(every_contract(), 0, None, 3):
        with forms_of(FORMS["rounds bf16"]):
            check_contract("cpu", 2, 64, kwargs, every=16)


def in_one_program(check: Callable[[str], None]) -> None:
    """The tile that the heuristics choose is much smaller: the interpreter's time is by the program."""
    from fusionpasses.kernels import silu_mul_mxfp4_quant as kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "launch_options", lambda *args: {"TILE_BLOCKS": 1024, "num_warps": 1})
        check("cpu")


GROUPS = {
    "samples": lambda: check_samples("cpu"),
    "contracts": check_contracts,
    "activation": lambda: in_one_program(check_activation),
    "edges": lambda: in_one_program(check_edges),
    "forms": check_forms,
}


@pytest.mark.parametrize("group", GROUPS)
def test_interpreted(group: str) -> None:
    triton_interpreter.run(__file__, group)


# ---- on a GPU


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_activation_is_within_its_bound() -> None:
    check_activation("cuda")


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_edges() -> None:
    check_edges("cuda")


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_samples() -> None:
    check_samples("cuda")


@pytest.mark.gpu
@needs_gpu
@not_interpreted
@pytest.mark.parametrize("kwargs", every_contract(), ids=lambda kwargs: "-".join(map(str, kwargs.values())))
def test_gpu_bytes_given_the_activation(kwargs: dict[str, Any]) -> None:
    for rows, n in ((3, 96), (300, 2880), (1000, 18432)) if kwargs["activation"] == "silu" else ((33, 2880),):
        check_contract("cuda", rows, n, kwargs)


@pytest.mark.gpu
@needs_gpu
@not_interpreted
@pytest.mark.parametrize("form", FORMS)
def test_gpu_forms(form: str) -> None:
    with forms_of(FORMS[form]):
        check_edges("cuda")
        for kwargs in itertools.islice(every_contract(), 0, None, 3):
            check_contract("cuda", 40, 2048, kwargs)


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_offsets_past_32_bits() -> None:
    from fusionpasses.providers.triton import ADAPTERS

    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    n, kwargs = 4096, {"cast_order": "cast_mul"}
    wanted = torch.randn(3, 2 * n, device="cuda", dtype=torch.bfloat16)
    far_apart = torch.empty(2 * 2**31 + 2 * n, device="cuda", dtype=torch.bfloat16).as_strided((3, 2 * n), (2**31, 1))
    far_apart.copy_(wanted)
    want = ADAPTERS[STORED](*wanted.chunk(2, -1), **kwargs)
    for got, w in zip(ADAPTERS[STORED](*far_apart.chunk(2, -1), **kwargs), want, strict=True):
        assert torch.equal(got, w)
    del far_apart
    # Many rows that are one row in memory: act has more than 2**32 elements.
    rows = 2**20 + 3
    gate, up = (half[:1].expand(rows, n) for half in wanted.chunk(2, -1))
    for got, w in zip(ADAPTERS[STORED](gate, up, **kwargs), want, strict=True):
        for row in (0, rows // 2 - 1, rows // 2 + 1, -1):
            assert torch.equal(got[row], w[0])


@pytest.mark.gpu
@needs_gpu
@not_interpreted
def test_gpu_graph_capture() -> None:
    from fusionpasses.providers.triton import ADAPTERS

    gate_up = torch.randn(64, 2 * 2880, device="cuda", dtype=torch.bfloat16)
    run = lambda: ADAPTERS[STORED](*gate_up.chunk(2, -1), cast_order="cast_mul")  # noqa: E731
    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    gate_up.copy_(torch.randn_like(gate_up))
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1")
    torch.manual_seed(0)
    triton_interpreter.cast_bfloat16_as_gpus_do()
    triton_interpreter.fuse_multiply_add_as_gpus_do()
    with triton_interpreter.without_needless_work():
        GROUPS[sys.argv[1]]()
