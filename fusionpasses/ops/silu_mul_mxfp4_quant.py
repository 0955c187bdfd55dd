"""``silu_mul_mxfp4_quant(gate, up, ...)``: ``activation(gate) * up`` of a gated MLP, then dynamic MXFP4 quantisation.

Overloads:
    default -> (codes, scales)
    with_act -> (codes, scales, act): also the product, for readers that are not quantised

Args:
    gate: ``[..., N]`` bfloat16, float16 or float32, N a positive multiple of 32, any strides, zero rows allowed.
    up: gate's shape and dtype, any strides. The halves of one tensor ``[..., 2N]`` are passed as its two slices.
    activation: computed in float32, by these very steps:

        =============  ========================================================================================
        "silu"         ``x / (exp(-x) + 1)`` (what torch.compile makes of ``F.silu``)
        "x_sigmoid"    ``x * sigmoid(x)``, the same function with one more rounding
        "gelu_tanh"    ``x * 0.5 * (tanh((x + x * x * x * 0.044715) * 0.7978845608028654) + 1)``
                       (``F.gelu(x, approximate="tanh")``)
        =============  ========================================================================================

    cast_order: where the float32 value is rounded to gate's dtype. In float32 all are the same.

        =============  ========================================================================================
        "cast_mul"     round the activation, then multiply by up in gate's dtype, which rounds again
                       (transformers' Llama, Qwen, DeepSeek-V3: ``F.silu(gate) * up``)
        "mul_cast"     multiply by up in float32, then round to ``act_dtype``
        "cast_each"    as "cast_mul", and the sigmoid is rounded, too; only of "x_sigmoid"
                       (``gate * torch.sigmoid(gate) * up`` in 16 bits)
        =============  ========================================================================================

    act_dtype: dtype of the product and so of what is quantised: gate's (also what None means) or float32.
    scale_mode: see ``fusionpasses/ops/_mxfp4.py``.

Returns:
    codes uint8 ``[..., N/2]``, scales uint8 ``[..., N/32]``, act ``[..., N]`` in ``act_dtype``; all contiguous.
    Given the same float32 activation (with "cast_each", sigmoid), every provider gives the same bytes; that one number
    may differ by the bound its provider states.

Raises:
    UnsupportedInput: an argument outside the above, or an input that requires grad in grad mode.

Source of the formulas: torch's decompositions of ``aten.silu`` and ``aten.gelu``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4
from fusionpasses.ops._op import Sample, declare
from fusionpasses.ops._then_gemm import declare_then_gemm

ACTIVATIONS = ("silu", "x_sigmoid", "gelu_tanh")
CAST_ORDERS = ("cast_mul", "mul_cast", "cast_each")

#: What the tanh form of GELU is made of.
GELU_CUBIC = 0.044715
GELU_SCALE = 0.7978845608028654  # sqrt(2 / pi)

_ARGUMENTS = (
    '(Tensor gate, Tensor up, *, str activation="silu", str cast_order, ScalarType? act_dtype=None, '
    'str scale_mode="even", str provider="auto")'
)


def check(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    cast_order: str,
    act_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> None:
    _mxfp4.check_input("gate", gate)
    _mxfp4.check_scale_mode(scale_mode)
    if activation not in ACTIVATIONS:
        raise UnsupportedInput(
            f"activation: got {activation!r}, allowed {', '.join(map(repr, ACTIVATIONS))}; apply another one in torch "
            "and call dynamic_mxfp4_quant"
        )
    if cast_order not in CAST_ORDERS or (cast_order == "cast_each" and activation != "x_sigmoid"):
        raise UnsupportedInput(
            f"cast_order: got {cast_order!r} with activation {activation!r}, allowed 'cast_mul' (round, then multiply "
            "by up), 'mul_cast' (multiply, then round), or with 'x_sigmoid' 'cast_each' (round the sigmoid, too)"
        )
    if act_dtype is not None and act_dtype not in (gate.dtype, torch.float32):
        raise UnsupportedInput(
            f"act_dtype: got {act_dtype}, allowed {gate.dtype} (that of gate) or torch.float32; or leave it out"
        )
    if up.dtype != gate.dtype or up.shape != gate.shape:
        raise UnsupportedInput(
            f"up: got {up.dtype} {tuple(up.shape)}, allowed {gate.dtype} {tuple(gate.shape)}, dtype and shape of gate; "
            "convert or expand it first"
        )
    if up.device != gate.device:
        raise UnsupportedInput(f"up.device: got {up.device}, allowed {gate.device}, that of gate; move one of them")


def _activated(gate: Tensor, activation: str, cast_order: str) -> Tensor:
    """The activation in float32; with "cast_each" in gate's dtype."""
    if cast_order == "cast_each":
        return gate * torch.sigmoid(gate)
    x = gate.float()
    if activation == "silu":
        return x / (torch.exp(-x) + 1)
    if activation == "x_sigmoid":
        return x * torch.sigmoid(x)
    return x * 0.5 * (torch.tanh((x + x * x * x * GELU_CUBIC) * GELU_SCALE) + 1)


def reference_with_act(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    cast_order: str,
    act_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor, Tensor]:
    activated = _activated(gate, activation, cast_order)
    act = activated * up if cast_order == "mul_cast" else activated.to(gate.dtype) * up
    act = act.to(act_dtype or gate.dtype).contiguous()
    return *_mxfp4.quantize(act, scale_mode), act


def reference(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    codes, scales, _ = reference_with_act(*args, **kwargs)  # type: ignore[arg-type]
    return codes, scales


def fake_with_act(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    cast_order: str,
    act_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor, Tensor]:
    return *_mxfp4.fake_quantized(gate), gate.new_empty(gate.shape, dtype=act_dtype or gate.dtype)


def fake(gate: Tensor, up: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    return _mxfp4.fake_quantized(gate)


def contracts() -> Iterator[tuple[str, str]]:
    """Each activation with each of its cast orders."""
    for activation in ACTIVATIONS:
        for cast_order in CAST_ORDERS if activation == "x_sigmoid" else CAST_ORDERS[:2]:
            yield activation, cast_order


def samples(device: torch.device) -> Iterator[Sample]:
    for dtype in _mxfp4.INPUT_DTYPES:
        for activation, cast_order in contracts():
            gate_up = torch.randn(3, 192, device=device).to(dtype)
            kwargs = {"activation": activation, "cast_order": cast_order}
            yield gate_up.chunk(2, -1), kwargs
            yield (gate_up[:, :96] * 4, gate_up[:, 96:]), {**kwargs, "act_dtype": torch.float32, "scale_mode": "rceil"}
    wide = torch.randn(2, 3, 5, 128, device=device)
    for gate, up in (
        wide.chunk(2, -1),
        wide.contiguous().split(64, -1)[::-1],
        (wide[..., :64].contiguous(), wide[..., 64:]),
        (wide[..., ::2], wide[..., 1::2]),
        (wide[..., :64].transpose(0, 1), wide[..., 64:].transpose(0, 1)),
        (wide.new_empty(0, 64), wide.new_empty(0, 64)),
        (wide[0, 0, 0, :64], wide[0, 0, 0, 64:]),
    ):
        yield (gate, up), {"cast_order": "cast_mul", "scale_mode": "floor"}
    ends = torch.tensor([[1.0, -100.0] * 16, [200.0, -87.5] * 16, [-0.0, 0.0] * 16], device=device)
    yield (ends, torch.ones_like(ends)), {"cast_order": "mul_cast", "scale_mode": "ceil"}


OP = declare(
    "silu_mul_mxfp4_quant.default",
    _ARGUMENTS + " -> (Tensor codes, Tensor scales)",
    check=check,
    reference=reference,
    fake=fake,
    samples=samples,
)
OP_WITH_ACT = declare(
    "silu_mul_mxfp4_quant.with_act",
    _ARGUMENTS + " -> (Tensor codes, Tensor scales, Tensor act)",
    check=check,
    reference=reference_with_act,
    fake=fake_with_act,
    samples=samples,
)
OP_THEN_GEMM = declare_then_gemm(OP, _ARGUMENTS)
