"""Rotary position embedding (RoPE) with its roundings spelled out.

A rotation takes pairs (a, b) of one head's elements to ``(a * cos - b * sin, b * cos + a * sin)``, one angle per pair.
The style says where a pair is read and where it is written; R is the width of a head, ``i < R/2`` numbers the pair:

======================  ================  ================  =======================================================
style                   read from         written to        used by
======================  ================  ================  =======================================================
"neox"                  i, i + R/2        i, i + R/2        transformers' rotate_half (Llama, Qwen), GPT-OSS
"interleaved"           2i, 2i + 1        2i, 2i + 1        Meta's and DeepSeek's own code (complex numbers), GPT-J
"interleaved_to_neox"   2i, 2i + 1        i, i + R/2        transformers' DeepSeek-V3
======================  ================  ================  =======================================================

The angles come as cos and sin, both of one shape and dtype, with any strides. ``R/2`` wide, entry i belongs to pair i.
``R`` wide, entry j belongs to the element *written* at j, so the two elements of a pair may have different angles:
rotate_half multiplies element by element and so can this.

Roundings. If cos and sin have the dtype of x, each product, and the sum or difference of two, is rounded to that dtype,
as eager torch does. If they are float32 and x is not, everything is computed in float32 and the result is rounded once.
No product is contracted into an FMA. ``a * cos - b * sin`` and ``a * cos + (-b) * sin`` are the same number, and so are
sums in another order; payload and sign of a NaN are not part of the contract.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _indices

STYLES = ("neox", "interleaved", "interleaved_to_neox")


def check_style(style: str) -> None:
    if not isinstance(style, str) or style not in STYLES:
        raise UnsupportedInput(
            f"style: got {style!r}, allowed 'neox' (pairs half a head apart), 'interleaved' (neighbours) or "
            "'interleaved_to_neox' (read as neighbours, written half a head apart); take the one the checkpoint was "
            "trained with"
        )


def check_tables(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    """Refuse angles that do not fit ``x [T, ..., R]``: gathered ``[T, W]``, or tables ``[P, W]`` with positions."""
    tokens, width = x.shape[0], x.shape[-1]
    if cos.dtype not in (x.dtype, torch.float32):
        allowed = dict.fromkeys((f"{x.dtype} (that of q_pe)", "torch.float32"))
        raise UnsupportedInput(f"cos.dtype: got {cos.dtype}, allowed {' or '.join(allowed)}; convert cos and sin")
    if cos.dim() != 2 or cos.shape[1] not in (width // 2, width):
        raise UnsupportedInput(
            f"cos: got shape {tuple(cos.shape)}, allowed [tokens or table rows, {width // 2} or {width}] for heads of "
            f"{width}; drop the axes of size 1 (batch, heads)"
        )
    if positions is None:
        if cos.shape[0] != tokens:
            raise UnsupportedInput(
                f"cos: got shape {tuple(cos.shape)}, allowed {tokens} rows, one per token, when there are no "
                "positions; pass positions if cos is a table"
            )
    else:
        _indices.check("positions", positions, tokens, x.device)
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise UnsupportedInput(
            f"sin: got {sin.dtype} {tuple(sin.shape)}, allowed {cos.dtype} {tuple(cos.shape)}, as cos; pass both from "
            "one table"
        )
    _indices.check_device("cos", cos, x.device)
    _indices.check_device("sin", sin, x.device)


def gather(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """``cos[positions]`` and ``sin[positions]``, each ``[T, W]``; a negative position counts from the end.

    Raises:
        UnsupportedInput: on a CPU, for a position outside the table; a device assert on a GPU.
    """
    if positions is None:
        return cos, sin
    rows = cos.shape[0]
    index = positions.long()
    inside = (index >= -rows) & (index < rows)
    _indices.require(
        inside, positions, "positions", f"{-rows} <= position < {rows}, the rows of cos", "make the table longer"
    )
    index = torch.where(inside, index, 0)
    return cos[index], sin[index]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """``x [T, ..., R]`` rotated by the angles ``[T, R/2]`` or ``[T, R]``; same shape and dtype, contiguous."""
    shape = (x.shape[0], *(1,) * (x.dim() - 2), cos.shape[-1])
    # A copy, if cos is float32 and x is not, and then the only rounding is that of the result.
    wide = x.to(cos.dtype)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if style.startswith("interleaved") else wide.chunk(2, -1)
    cos_a, cos_b = _per_output(cos.reshape(shape), x.shape[-1], style)
    sin_a, sin_b = _per_output(sin.reshape(shape), x.shape[-1], style)
    first = a * cos_a - b * sin_a
    second = b * cos_b + a * sin_b
    turned = torch.stack((first, second), -1).flatten(-2) if style == "interleaved" else torch.cat((first, second), -1)
    return turned.to(x.dtype).contiguous()


def _per_output(angles: Tensor, width: int, style: str) -> tuple[Tensor, Tensor]:
    """The entries that belong to the first and to the second element of each pair written."""
    if angles.shape[-1] != width:
        return angles, angles
    if style == "interleaved":
        return angles[..., 0::2], angles[..., 1::2]
    first, second = angles.chunk(2, -1)
    return first, second
