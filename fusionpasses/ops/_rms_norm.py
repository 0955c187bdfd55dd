"""RMSNorm with its roundings spelled out, shared by the norm + quant ops.

``norm = x * rsqrt(mean(x**2) + eps) * weight``, statistics in float32. Where the float32 value is rounded to the
model's dtype is part of the contract, because it decides packed bytes:

=============  ==================================================================================================
cast_order     meaning
=============  ==================================================================================================
"cast_scale"   round ``x * rsqrt(...)`` to x's dtype, then multiply by the weight in the promoted dtype
               (transformers' Llama, Qwen, DeepSeek-V3)
"scale_cast"   multiply by the weight in float32, then round (GPT-OSS, Gemma, torch.nn.functional.rms_norm)
=============  ==================================================================================================

``norm_dtype`` is the dtype of the result and so of what is quantised. None means what the model's code gives without
a further cast: the promoted dtype of x and weight for "cast_scale", x's dtype for "scale_cast".
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4

CAST_ORDERS = ("cast_scale", "scale_cast")


def result_dtype(x: Tensor, weight: Tensor | None, cast_order: str, norm_dtype: torch.dtype | None) -> torch.dtype:
    if norm_dtype is not None:
        return norm_dtype
    if cast_order == "cast_scale" and weight is not None:
        return torch.promote_types(x.dtype, weight.dtype)
    return x.dtype


def check(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_order: str,
    scale_mode: str,
    norm_dtype: torch.dtype | None,
    number: str = "",
) -> None:
    """Raises UnsupportedInput for what is no norm of ours; ``number`` is what the names of its arguments end in."""
    _mxfp4.check_input(f"x{number}", x)
    _mxfp4.check_scale_mode(scale_mode)
    if cast_order not in CAST_ORDERS:
        raise UnsupportedInput(
            f"cast_order{number}: got {cast_order!r}, allowed 'cast_scale' (round, then multiply by the weight) or "
            "'scale_cast' (multiply, then round)"
        )
    if norm_dtype is not None and norm_dtype not in (x.dtype, torch.float32):
        raise UnsupportedInput(
            f"norm_dtype{number}: got {norm_dtype}, allowed {x.dtype} (that of x{number}) or torch.float32; leave it "
            "None for what the cast order gives"
        )
    if weight is None:
        return
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise UnsupportedInput(
            f"weight{number}: got shape {tuple(weight.shape)}, allowed [{x.shape[-1]}], the width of x{number} "
            f"{tuple(x.shape)}"
        )
    if weight.dtype not in (x.dtype, torch.float32):
        raise UnsupportedInput(
            f"weight{number}.dtype: got {weight.dtype} with x{number} {x.dtype}, allowed {x.dtype} or torch.float32; "
            "convert one"
        )
    if weight.device != x.device:
        raise UnsupportedInput(
            f"weight{number}.device: got {weight.device}, allowed {x.device}, that of x{number}; move one of them"
        )


def reference(x: Tensor, weight: Tensor | None, eps: float, cast_order: str, norm_dtype: torch.dtype | None) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast_order == "cast_scale":
        normed = normed.to(x.dtype)
    if weight is not None:
        normed = normed * weight
    return normed.to(result_dtype(x, weight, cast_order, norm_dtype)).contiguous()


def fake(x: Tensor, weight: Tensor | None, cast_order: str, norm_dtype: torch.dtype | None) -> Tensor:
    return x.new_empty(x.shape, dtype=result_dtype(x, weight, cast_order, norm_dtype))
