"""Overloads ``then_mlp``: a quant and the gated MLP behind it, two products and what is between them, as one call.

``(out, *others) = <quant>.then_mlp(*arguments, w_codes=, activation=, down_codes=, ...)`` means, to the byte::

    gate_up, *others = <quant>.then_gemm(*arguments, w_codes=, w_scales=, bias=, out_dtype=, layout=, rows=, shift=)
    gate, up = gate_up.chunk(2, -1)
    out = silu_mul_mxfp4_quant.then_gemm(gate, up, activation=, cast_order=act_cast_order, act_dtype=,
        scale_mode=act_scale_mode, w_codes=down_codes, w_scales=down_scales, bias=down_bias, out_dtype=down_dtype,
        layout=down_layout, rows=down_rows, shift=down_shift)

A provider may leave out gate and up, and hand the quantised tokens over in whatever form suits the products.

Raises:
    UnsupportedInput: what either op refuses, or a first weight whose halves are no whole blocks of 32 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import (
    _mxfp4,
    dynamic_mxfp4_quant,
    rmsnorm_add_mxfp4_quant,
    rmsnorm_mxfp4_quant,
    silu_mul_mxfp4_quant,
)
from fusionpasses.ops._op import Op, Sample, declare

#: Arguments of what is behind the first product, and their names there.
BEHIND = {
    "activation": "activation",
    "act_cast_order": "cast_order",
    "act_dtype": "act_dtype",
    "act_scale_mode": "scale_mode",
    "down_codes": "w_codes",
    "down_scales": "w_scales",
    "down_bias": "bias",
    "down_dtype": "out_dtype",
    "down_layout": "layout",
    "down_rows": "rows",
    "down_shift": "shift",
}
_SCHEMA = (
    'Tensor w_codes, Tensor w_scales, Tensor? bias=None, ScalarType out_dtype, str layout="linear", int? rows=None, '
    'int shift=0, str activation="silu", str act_cast_order, ScalarType? act_dtype=None, str act_scale_mode="even", '
    "Tensor down_codes, Tensor down_scales, Tensor? down_bias=None, ScalarType down_dtype, "
    'str down_layout="linear", int? down_rows=None, int down_shift=0, str provider="auto")'
)
_PROVIDER = 'str provider="auto")'


def apart(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the quant and the first product, and of what is behind it, by their names there."""
    behind = {name: kwargs[given] for given, name in BEHIND.items() if given in kwargs}
    return {name: value for name, value in kwargs.items() if name not in BEHIND}, behind


def _renamed(message: str) -> str:
    """What the second op says of its arguments, of ours."""
    given = {name: ours for ours, name in BEHIND.items()}
    head, *rest = message.partition(": got ")
    names = (name.partition(".") for name in head.split(", "))
    return "".join([", ".join(f"{given.get(name, name)}{dot}{what}" for name, dot, what in names), *rest])


def _declare(first: Op, arguments: str, others: str = "") -> Op:
    """Declare what goes on from ``first``, a quant and its product, of which ``arguments`` is the quant's schema."""
    second = silu_mul_mxfp4_quant.OP_THEN_GEMM

    def check(*args: Any, **kwargs: Any) -> None:
        of_first, of_second = apart(kwargs)
        first.check(*args, **of_first)
        gate_up = _first_of(first.fake(*args, **of_first))
        rows = gate_up.shape[-1]
        if rows == 0 or rows % (2 * _mxfp4.BLOCK):
            raise UnsupportedInput(
                f"w_codes: got {rows} rows, allowed multiples of {2 * _mxfp4.BLOCK}: those of gate, then as many of up"
            )
        try:
            second.check(*gate_up.chunk(2, -1), **of_second)
        except UnsupportedInput as error:
            raise UnsupportedInput(_renamed(str(error))) from None

    def reference(*args: Any, **kwargs: Any) -> Any:
        return _both(first.reference, second.reference, args, kwargs)

    def fake(*args: Any, **kwargs: Any) -> Any:
        return _both(first.fake, second.fake, args, kwargs)

    def samples(device: torch.device) -> Iterator[Sample]:
        contracts = list(silu_mul_mxfp4_quant.contracts())
        downs = {rows: _mxfp4.quantize(torch.randn(40, rows, device=device), "even") for rows in (32, 64)}
        ups: dict[Any, Any] = {}
        for number, (args, kwargs) in enumerate(first.samples(device)):
            if kwargs.pop("axes", 1) > 1:
                continue
            rows, width = 32 * (1 + number % 2), args[0].shape[-1]
            if (rows, width) not in ups:
                ups[rows, width] = _mxfp4.quantize(torch.randn(2 * rows, width, device=device), "even")
            activation, cast_order = contracts[number % len(contracts)]
            of_first = dict(zip(("w_codes", "w_scales"), ups[rows, width], strict=True))
            of_second: dict[str, Any] = dict(zip(("down_codes", "down_scales"), downs[rows], strict=True))
            of_second |= {"activation": activation, "act_cast_order": cast_order}
            of_second["down_dtype"] = _mxfp4.INPUT_DTYPES[number % 3]
            if number % 2:
                of_second["down_bias"] = torch.randn(40, device=device)
            yield args, {**kwargs, "bias": None, **of_first, **of_second}

    name = f"{first.packet_name}.then_mlp"
    signature = f"{arguments.removesuffix(_PROVIDER)}{_SCHEMA} -> "
    signature += f"(Tensor out{others})" if others else "Tensor"
    return declare(name, signature, check=check, reference=reference, fake=fake, samples=samples)


def _first_of(result: Any) -> torch.Tensor:
    tensor: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return tensor


def _both(first: Any, second: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    of_first, of_second = apart(kwargs)
    result = first(*args, **of_first)
    out = second(*_first_of(result).chunk(2, -1), **of_second)
    return (out, *result[1:]) if isinstance(result, tuple) else out


OPS_THEN_MLP = (
    _declare(dynamic_mxfp4_quant.OP_THEN_GEMM, dynamic_mxfp4_quant.ARGUMENTS),
    _declare(rmsnorm_mxfp4_quant.OP_THEN_GEMM, rmsnorm_mxfp4_quant.ARGUMENTS),
    _declare(rmsnorm_add_mxfp4_quant.OP_THEN_GEMM, rmsnorm_add_mxfp4_quant.ARGUMENTS, ", Tensor sum"),
)
