"""Overloads ``then_gemm``: a quant and the ``mxfp4_gemm`` of what it gives, as one call.

``(out, *others) = <quant>.then_gemm(*arguments, w_codes=, w_scales=, bias=None, out_dtype=, layout="linear", rows=None,
shift=0, axes=1)`` means ``codes, scales, *others = <quant>(*arguments)`` and ``out = mxfp4_gemm(codes.flatten(-axes),
scales.flatten(-axes), w_codes, ...)``, to the byte: ``axes`` is how many of the last axes are a token. A provider may
hand the quantised tokens over in whatever form suits the product; nobody else sees them.

Raises:
    UnsupportedInput: what either op refuses, or ``axes`` that the input has not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4, mxfp4_gemm
from fusionpasses.ops._op import Op, Sample, declare

#: Arguments of the product, all by name.
_OF_GEMM = tuple(inspect.signature(mxfp4_gemm.reference).parameters)[2:]
_SCHEMA = (
    'Tensor w_codes, Tensor w_scales, Tensor? bias=None, ScalarType out_dtype, str layout="linear", int? rows=None, '
    'int shift=0, int axes=1, str provider="auto")'
)
_PROVIDER = 'str provider="auto")'


def _apart(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the quant, and of the product."""
    of_gemm = {name: kwargs[name] for name in _OF_GEMM if name in kwargs}
    return {name: value for name, value in kwargs.items() if name not in (*of_gemm, "axes")}, of_gemm


def _product(function: Callable[..., Any], codes: Tensor, scales: Tensor, kwargs: dict[str, Any]) -> Any:
    axes = kwargs.get("axes", 1)
    return function(codes.flatten(-axes), scales.flatten(-axes), **_apart(kwargs)[1])


def declare_then_gemm(quant: Op, arguments: str, others: str = "") -> Op:
    """Declare the overload of ``quant`` that goes on to the product.

    Args:
        arguments: the schema of the quant's arguments.
        others: of what it returns behind codes and scales, for example ``", Tensor sum"``.
    """

    def check(*args: Any, **kwargs: Any) -> None:
        quant.check(*args, **_apart(kwargs)[0])
        if not 1 <= kwargs.get("axes", 1) <= args[0].dim():
            raise UnsupportedInput(f"axes: got {kwargs['axes']}, allowed 1 to {args[0].dim()}, the axes of the input")
        _product(mxfp4_gemm.check, *_mxfp4.fake_quantized(args[0]), kwargs)

    def reference(*args: Any, **kwargs: Any) -> Any:
        codes, scales, *rest = quant.reference(*args, **_apart(kwargs)[0])
        out = _product(mxfp4_gemm.reference, codes, scales, kwargs)
        return (out, *rest) if rest else out

    def fake(*args: Any, **kwargs: Any) -> Any:
        codes, scales, *rest = quant.fake(*args, **_apart(kwargs)[0])
        out = _product(mxfp4_gemm.fake, codes, scales, kwargs)
        return (out, *rest) if rest else out

    def samples(device: torch.device) -> Iterator[Sample]:
        weights: dict[int, tuple[Any, ...]] = {}
        for number, (args, kwargs) in enumerate(quant.samples(device)):
            if not args[0].isfinite().all():
                continue  # products are NaN then, which is equal to nothing
            axes = min(2 - number % 2, args[0].dim())
            width = args[0].shape[-axes:].numel()
            if not width:
                axes, width = 1, args[0].shape[-1]
            if width not in weights:
                weights[width] = _mxfp4.quantize(torch.randn(40, width, device=device), "even")
            codes, scales = weights[width]
            of_gemm = {"w_codes": codes, "w_scales": scales, "out_dtype": _mxfp4.INPUT_DTYPES[number % 3]}
            if axes > 1:
                of_gemm["axes"] = axes
            if number % 2:
                of_gemm["bias"] = torch.randn(40, device=device)
            yield args, {**kwargs, **of_gemm}

    packet, _, overload = quant.name.partition(".")
    name = f"{packet}.{'then_gemm' if overload == 'default' else f'{overload}_then_gemm'}"
    if not arguments.endswith(_PROVIDER):
        raise ValueError(f"arguments: got {arguments!r}, allowed a schema that ends in {_PROVIDER!r}")
    signature = f"{arguments.removesuffix(_PROVIDER)}{_SCHEMA} -> "
    signature += f"(Tensor out{others})" if others else "Tensor"
    return declare(name, signature, check=check, reference=reference, fake=fake, samples=samples)
