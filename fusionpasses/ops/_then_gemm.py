"""Overloads ``then_gemm``: a quant and the ``mxfp4_gemm`` of what it gives, as one call.

``(out, *others) = <quant>.then_gemm(*arguments, w_codes=, w_scales=, bias=None, out_dtype=, layout="linear", rows=None,
shift=0)`` means ``codes, scales, *others = <quant>(*arguments)`` and ``out = mxfp4_gemm(codes, scales, w_codes, ...)``,
to the byte. A provider may hand the quantised tokens over in whatever form suits the product; nobody else sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from fusionpasses.ops import _mxfp4, mxfp4_gemm
from fusionpasses.ops._op import Op, Sample, declare

#: Arguments of the product, all by name.
_OF_GEMM = tuple(inspect.signature(mxfp4_gemm.reference).parameters)[2:]
_SCHEMA = (
    'Tensor w_codes, Tensor w_scales, Tensor? bias=None, ScalarType out_dtype, str layout="linear", int? rows=None, '
    'int shift=0, str provider="auto")'
)
_PROVIDER = 'str provider="auto")'


def _apart(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the quant, and of the product."""
    of_gemm = {name: kwargs[name] for name in _OF_GEMM if name in kwargs}
    return {name: value for name, value in kwargs.items() if name not in of_gemm}, of_gemm


def declare_then_gemm(quant: Op, arguments: str, others: str = "") -> Op:
    """Declare the overload of ``quant`` that goes on to the product.

    Args:
        arguments: the schema of the quant's arguments.
        others: of what it returns behind codes and scales, for example ``", Tensor sum"``.
    """

    def check(*args: Any, **kwargs: Any) -> None:
        of_quant, of_gemm = _apart(kwargs)
        quant.check(*args, **of_quant)
        mxfp4_gemm.check(*_mxfp4.fake_quantized(args[0]), **of_gemm)

    def reference(*args: Any, **kwargs: Any) -> Any:
        of_quant, of_gemm = _apart(kwargs)
        codes, scales, *rest = quant.reference(*args, **of_quant)
        out = mxfp4_gemm.reference(codes, scales, **of_gemm)
        return (out, *rest) if rest else out

    def fake(*args: Any, **kwargs: Any) -> Any:
        of_quant, of_gemm = _apart(kwargs)
        codes, scales, *rest = quant.fake(*args, **of_quant)
        out = mxfp4_gemm.fake(codes, scales, **of_gemm)
        return (out, *rest) if rest else out

    def samples(device: torch.device) -> Iterator[Sample]:
        weights: dict[int, tuple[Any, ...]] = {}
        for number, (args, kwargs) in enumerate(quant.samples(device)):
            width = args[0].shape[-1]
            if width not in weights:
                weights[width] = _mxfp4.quantize(torch.randn(40, width, device=device), "even")
            codes, scales = weights[width]
            of_gemm = {"w_codes": codes, "w_scales": scales, "out_dtype": _mxfp4.INPUT_DTYPES[number % 3]}
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
