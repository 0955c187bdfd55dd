"""The Triton provider's adapter of a quant and the gated MLP behind it.

Where its kernels can, the product of gate and up quantises what it gives, and hands it to the next; else it is what the
op says: two products, each with the quant in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionpasses.kernels import arch, gemm_choice
from fusionpasses.ops._then_mlp import apart
from fusionpasses.providers import _launch, _triton_gemm, _triton_gemm_wgmma
from fusionpasses.providers._product import Product


class _Weight(NamedTuple):
    codes: Tensor
    scales: Tensor
    rows: int
    layout: str
    shift: int


def then_mlp(quant: Callable[..., tuple[Any, ...]], gated_quant: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """``quant`` and ``gated_quant``: adapters that take ``into``."""
    first, second = _triton_gemm.then_gemm(quant), _triton_gemm.then_gemm(gated_quant)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        of_first, of_second = apart(kwargs)
        gpu = arch.of(x.device)
        w, w_down = _weight(of_first), _weight(of_second)
        tokens, width, inner = x.shape[:-1].numel(), x.shape[-1], w.rows // 2
        choices = gemm_choice.gated(
            tokens, w.rows, width, w_down.rows, gpu, layout=w.layout, layout_behind=w_down.layout
        )
        if choices is None or not _fits(of_first, of_second):
            result = first(x, *args, **of_first)
            gate_up, *rest = result if isinstance(result, tuple) else (result,)
            out = second(*gate_up.chunk(2, -1), **of_second)
            return (out, *rest) if rest else out
        of_quant = {name: value for name, value in of_first.items() if name not in _OF_PRODUCT}
        out = x.new_empty((*x.shape[:-1], w_down.rows), dtype=of_second["out_dtype"])
        with _launch.on_device_of(x):
            into = _triton_gemm.destination_of(choices[0], x, tokens, width)
            between = _triton_gemm.destination_of(choices[1], x, tokens, inner)
            _, _, *rest = quant(x, *args, **of_quant, into=into)
            gated = _triton_gemm_wgmma.Gated(
                between,
                of_second.get("activation", "silu"),
                of_second["cast_order"],
                of_second.get("scale_mode", "even"),
            )
            sizes = tokens, w.rows, width, w.layout, w.shift, gpu
            product = Product(into.codes, None, w.codes, w.scales, None, between.codes, *sizes, into)
            _triton_gemm_wgmma.multiply(product, dict(choices[0].options), gated)
            sizes = tokens, w_down.rows, inner, w_down.layout, w_down.shift, gpu
            bias = of_second.get("bias")
            _triton_gemm.launch_chosen(
                Product(between.codes, None, w_down.codes, w_down.scales, bias, out, *sizes, between)
            )
        return (out, *rest) if rest else out

    return run


#: Of a call of ``then_gemm``, what is no argument of its quant.
_OF_PRODUCT = ("w_codes", "w_scales", "bias", "out_dtype", "layout", "rows", "shift")


def _weight(of_product: dict[str, Any]) -> _Weight:
    codes, rows = of_product["w_codes"], of_product.get("rows")
    layout, shift = of_product.get("layout", "linear"), of_product.get("shift", 0)
    return _Weight(codes, of_product["w_scales"], codes.shape[0] if rows is None else rows, layout, shift)


def _fits(of_first: dict[str, Any], of_second: dict[str, Any]) -> bool:
    """Is it what the kernel does: bfloat16 between all steps, no bias before the activation, whole words?"""
    weights = (of["w_codes"] for of in (of_first, of_second)), (of["w_scales"] for of in (of_first, of_second))
    return (
        of_first.get("bias") is None
        and of_first["out_dtype"] == torch.bfloat16
        and of_second.get("act_dtype") in (None, torch.bfloat16)
        and all(tensor.data_ptr() % 16 == 0 for tensors in weights for tensor in tensors)
    )
