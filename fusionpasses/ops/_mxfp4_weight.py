"""Layouts of an MXFP4 weight ``[N, K]``, and what both GEMMs check of their operands.

=================  ================================================  =========================================
layout             w_codes                                           w_scales
=================  ================================================  =========================================
"linear"           uint8 ``[N, K/2]``, as checkpoints have it        uint8 ``[N, K/32]``
"tiles"            uint8 ``[ceil(N/16), ceil(K/128), 1024]``         uint8 ``[ceil(N/16), ceil(K/128), 64]``
"shuffled"         uint8 ``[N/16, 8 K]``, K % 256 == 0, N % 32 == 0  uint8 ``[N/32, K]``
"shuffled_scales"  uint8 ``[N, K/2]``, K % 256 == 0, N % 32 == 0     uint8 ``[N/32, K]``
=================  ================================================  =========================================

"tiles" is what ``prepare`` makes and ``unprepare`` undoes, byte by byte. A tile holds the codes of 16 rows by 128
elements in the order in which the threads of a warp give them to a tensor core (``kernels/mxfp4_gemm.py``), the bits of
eight codes in the order in which they are taken out of their word. A scale byte b becomes the exponent of the bfloat16
that makes up for the codes' small exponents, too: ``b - shift + 126``; all sums take 2**shift. ``shift`` is 0 as long
as no scale is above 2. All of that is exact, or ``prepare`` refuses.

"shuffled" is what AITER's preshuffled products read; ``shuffle`` makes it and ``unshuffle`` undoes it. Bytes change
places only: codes in pieces of 16 bytes, first those of 16 rows, then the second halves of 32 bytes of each; scales in
pieces of 32 rows by 8 blocks, in each the 4 scales of two rows by two blocks together. "shuffled_scales" is what
another product of AITER's reads: the same scales, and codes as checkpoints have them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4

LAYOUTS = ("linear", "tiles", "shuffled", "shuffled_scales")
#: Those in which scales are shuffled.
SHUFFLED = ("shuffled", "shuffled_scales")
TILE_ROWS, TILE_WIDTH = 16, 128
#: What N and K of a shuffled weight are multiples of: a piece of its scales. Nothing is padded.
SHUFFLED_ROWS, SHUFFLED_WIDTH = 32, 256

#: What is added to a scale byte: bfloat16's bias is 127, codes are 2**-126 times their value, bytes mean 2**(b - 127).
_BIAS = 126
#: Largest scale byte that can be folded: 2**(128 + 126 - 127) is the largest power of two in bfloat16.
_LARGEST = 128
#: Least byte, after the shift, of a block whose values are all numbers in bfloat16: 0.5 * 2**(b - 127) >= 2**-133.
_LEAST = -5


def _moves() -> list[tuple[int, int, int]]:
    """Where bits of a word of eight codes go: from, to, how many next to each other.

    So that pairs of codes become pairs of bfloat16 by few shifts (``kernels/_mxfp4_words._pairs``): in place, up by 4,
    down by 6 around the word, and the last pair up by 6 but for a bit that comes down by 2.
    """
    # Of each pair: where its sign is, and its magnitude's bits from the least one on. Codes 2 * j + 1 are 16 bits up.
    places = ((15, ((0, 6, 3),)), (11, ((0, 2, 3),)), (21, ((0, 12, 3),)), (9, ((0, 0, 2), (2, 10, 1))))
    moves = []
    for code in range(8):
        half, (sign, magnitudes) = code % 2 * 16, places[code // 2]
        moves.append((4 * code + 3, (half + sign) % 32, 1))
        moves += [(4 * code + start, half + to, width) for start, to, width in magnitudes]
    return moves


_MOVES = _moves()


def check_weight(w_codes: Tensor, w_scales: Tensor, layout: str, rows: int | None, shift: int, width: int) -> int:
    """Refuse what is no weight of ``width`` elements in that layout; N."""
    for name, tensor in (("w_codes", w_codes), ("w_scales", w_scales)):
        if tensor.dtype != torch.uint8:
            raise UnsupportedInput(f"{name}.dtype: got {tensor.dtype}, allowed torch.uint8; use .view(torch.uint8)")
    if layout not in LAYOUTS:
        raise UnsupportedInput(
            f"layout: got {layout!r}, allowed {', '.join(map(repr, LAYOUTS))}; 'linear' is that of checkpoints"
        )
    if width == 0 or width % _mxfp4.BLOCK != 0:
        raise UnsupportedInput(
            f"x: got {width} elements in a row, allowed positive multiples of {_mxfp4.BLOCK}; pad x and the weight"
        )
    if layout == "linear":
        if rows is not None or shift != 0:
            raise UnsupportedInput(
                f"rows, shift: got {rows} and {shift} with layout 'linear', allowed None and 0: they belong to layouts "
                "whose shapes do not tell"
            )
        if w_codes.dim() != 2 or w_codes.shape[1] * 2 != width:
            raise UnsupportedInput(
                f"w_codes: got shape {tuple(w_codes.shape)} with x {width} wide, allowed [N, {width // 2}]: two codes "
                "in a byte"
            )
        allowed: tuple[int, ...] = (w_codes.shape[0], width // _mxfp4.BLOCK)
        n = w_codes.shape[0]
    elif layout in SHUFFLED:
        if rows is None or rows < 1 or shift != 0:
            raise UnsupportedInput(
                f"rows, shift: got {rows} and {shift} with layout {layout!r}, allowed N >= 1 and 0; pass the rows that "
                "were shuffled"
            )
        _check_shuffled(rows, width, layout)
        codes = (rows // 16, width * 8) if layout == "shuffled" else (rows, width // 2)
        if tuple(w_codes.shape) != codes:
            raise UnsupportedInput(
                f"w_codes: got shape {tuple(w_codes.shape)} for {rows} rows of {width}, allowed {codes} with layout "
                f"{layout!r}"
            )
        allowed, n = (rows // SHUFFLED_ROWS, width), rows
    else:
        if rows is None or rows < 1 or not 0 <= shift <= _BIAS:
            raise UnsupportedInput(
                f"rows, shift: got {rows} and {shift} with layout 'tiles', allowed N >= 1 and 0 to {_BIAS}; pass what "
                "prepare returned"
            )
        tiles = (-(-rows // TILE_ROWS), -(-width // TILE_WIDTH))
        if tuple(w_codes.shape) != (*tiles, 1024):
            raise UnsupportedInput(
                f"w_codes: got shape {tuple(w_codes.shape)} for {rows} rows of {width}, allowed {(*tiles, 1024)} with "
                "layout 'tiles'"
            )
        allowed, n = (*tiles, 64), rows
    if tuple(w_scales.shape) != allowed:
        raise UnsupportedInput(
            f"w_scales: got shape {tuple(w_scales.shape)} for codes {tuple(w_codes.shape)}, allowed {allowed}: one "
            f"scale per {_mxfp4.BLOCK} codes"
        )
    if not w_codes.is_contiguous() or not w_scales.is_contiguous():
        raise UnsupportedInput(
            f"w_codes, w_scales: got strides {w_codes.stride()} and {w_scales.stride()}, allowed contiguous tensors; "
            "call .contiguous() once, not for every product"
        )
    return n


def check_bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and (tuple(bias.shape) != (rows,) or bias.dtype not in _mxfp4.INPUT_DTYPES):
        raise UnsupportedInput(
            f"bias: got {bias.dtype} {tuple(bias.shape)}, allowed [{rows}] of "
            f"{', '.join(map(str, _mxfp4.INPUT_DTYPES))}: one number for each row of the weight"
        )


def prepare(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, int]:
    """A weight in layout "linear" as codes, scales and shift of layout "tiles".

    Waits for the device once: the shift depends on the largest scale.

    Raises:
        UnsupportedInput: the weight is on the meta device; or folding the scales would not be exact, because one is NaN
            or they span more than bfloat16 has room for. Such a weight stays "linear".
    """
    rows, width = codes.shape[0], codes.shape[1] * 2
    check_weight(codes, scales, "linear", None, 0, width)
    if codes.is_meta:
        raise UnsupportedInput("weight: got one on the meta device, allowed one with data; load it first")
    shift = foldable(codes, scales)
    padded_rows, columns = -(-rows // TILE_ROWS) * TILE_ROWS, -(-width // TILE_WIDTH)
    pad = (0, columns * 64 - codes.shape[1], 0, padded_rows - rows)
    words = _moved(torch.nn.functional.pad(codes, pad).contiguous().view(torch.int32), inverse=False)
    # [tile, half of its rows, row g, column, block q, quarter c] to [tile, column, half, g, c, q]
    tiles = words.view(-1, 2, 8, columns, 4, 4).permute(0, 3, 1, 2, 5, 4).contiguous()
    exponents = (scales.to(torch.int16) + (_BIAS - shift)).to(torch.uint8)
    pad = (0, columns * 4 - scales.shape[1], 0, padded_rows - rows)
    exponents = torch.nn.functional.pad(exponents, pad, value=_BIAS).view(-1, 2, 8, columns, 4)
    prepared = exponents.permute(0, 3, 2, 1, 4).contiguous()
    return tiles.view(torch.uint8).view(-1, columns, 1024), prepared.view(-1, columns, 64), shift


def unprepare(codes: Tensor, scales: Tensor, rows: int, width: int, shift: int) -> tuple[Tensor, Tensor]:
    """The weight in layout "linear", of which ``prepare`` made this."""
    columns = codes.shape[1]
    tiles = codes.contiguous().view(torch.int32).view(-1, columns, 2, 8, 4, 4)
    words = _moved(tiles.permute(0, 2, 3, 1, 5, 4).reshape(-1, columns * 16), inverse=True)
    bytes_ = scales.view(-1, columns, 8, 2, 4).permute(0, 3, 2, 1, 4).reshape(-1, columns * 4)
    linear = (bytes_.to(torch.int16) - (_BIAS - shift)).to(torch.uint8)
    return words.view(torch.uint8)[:rows, : width // 2].contiguous(), linear[
        :rows, : width // _mxfp4.BLOCK
    ].contiguous()


def shuffle(codes: Tensor, scales: Tensor, layout: str = "shuffled") -> tuple[Tensor, Tensor]:
    """A weight in layout "linear" as codes and scales of one of ``SHUFFLED``. Waits for nothing.

    Codes of "shuffled_scales" are those given, not a copy.

    Raises:
        UnsupportedInput: N or K is none that the layout has.
    """
    rows, width = codes.shape[0], codes.shape[1] * 2
    check_weight(codes, scales, "linear", None, 0, width)
    _check_shuffled(rows, width, layout)
    if layout == "shuffled":
        pieces = codes.view(rows // 16, 16, width // 64, 2, 16).permute(0, 2, 3, 1, 4)
        codes = pieces.reshape(rows // 16, width * 8)
    return codes, shuffled_scales(scales)


def shuffled_scales(scales: Tensor) -> Tensor:
    """Scales ``[rows, K/32]``, 32 rows and 8 scales or multiples of them, as ``[rows/32, K]`` of a shuffled weight."""
    rows, blocks = scales.shape
    pieces = scales.view(rows // 32, 2, 16, blocks // 8, 2, 4).permute(0, 3, 5, 2, 4, 1)
    return pieces.reshape(rows // SHUFFLED_ROWS, blocks * _mxfp4.BLOCK)


def unshuffle(codes: Tensor, scales: Tensor, layout: str = "shuffled") -> tuple[Tensor, Tensor]:
    """The weight in layout "linear", of which ``shuffle`` made this."""
    width = scales.shape[1]
    if layout == "shuffled":
        codes = codes_in_order(codes, width).reshape(-1, width // 2)
    return codes, scales_in_order(scales).reshape(-1, width // _mxfp4.BLOCK)


def codes_in_order(codes: Tensor, width: int) -> Tensor:
    """A view of shuffled codes whose elements are in the order of layout "linear"."""
    return codes.view(-1, width // 64, 2, 16, 16).permute(0, 3, 1, 2, 4)


def scales_in_order(scales: Tensor) -> Tensor:
    """A view of shuffled scales whose elements are in the order of layout "linear"."""
    return scales.view(-1, scales.shape[1] // 256, 4, 16, 2, 2).permute(0, 5, 3, 1, 4, 2)


def _check_shuffled(rows: int, width: int, layout: str) -> None:
    if rows < 1 or rows % SHUFFLED_ROWS != 0 or width % SHUFFLED_WIDTH != 0:
        raise UnsupportedInput(
            f"weight: got {rows} rows of {width}, allowed positive multiples of {SHUFFLED_ROWS} rows of multiples of "
            f"{SHUFFLED_WIDTH} with layout {layout!r}: it has no padding; it stays 'linear'"
        )


def foldable(codes: Tensor, scales: Tensor) -> int:
    """The shift with which scales can be folded exactly.

    Raises:
        UnsupportedInput: there is none.
    """
    if scales.numel() == 0:
        raise UnsupportedInput(f"weight: got {tuple(codes.shape)} codes, allowed at least one row; it stays 'linear'")
    # A block of zeros has any scale.
    zero = (codes.view(*scales.shape, 16) & 0x77).amax(-1) == 0
    least = torch.where(zero, _LARGEST, scales.to(torch.int16)).amin()
    lowest, largest, least_used = (int(n) for n in torch.stack((scales.amin().to(torch.int16), scales.amax(), least)))
    shift = max(0, largest - _LARGEST)
    if largest == _mxfp4.NAN_SCALE:
        raise UnsupportedInput("weight: got a block whose scale is NaN, allowed numbers; it stays 'linear'")
    if least_used < shift + _LEAST or lowest < shift - _BIAS + 1:
        raise UnsupportedInput(
            f"weight: got scale bytes from {lowest} to {largest}, allowed a span that bfloat16 has room for when the "
            f"largest is {_LARGEST}; it stays 'linear', which takes a multiplication more for each code"
        )
    return shift


def _moved(words: Tensor, *, inverse: bool) -> Tensor:
    result = torch.zeros_like(words)
    for source, target, width in _MOVES:
        start, end = (target, source) if inverse else (source, target)
        bits = ((words >> start) & ((1 << width) - 1)) << end
        result |= bits
    return result


def linear(w_codes: Tensor, w_scales: Tensor, layout: str, rows: int | None, shift: int, width: int) -> Tensor:
    """float32 values ``[N, K]`` of a weight in any layout."""
    if layout == "tiles":
        w_codes, w_scales = unprepare(w_codes, w_scales, int(rows or 0), width, shift)
    elif layout in SHUFFLED:
        w_codes, w_scales = unshuffle(w_codes, w_scales, layout)
    return _mxfp4.dequantize(w_codes, w_scales)
