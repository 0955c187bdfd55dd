"""Layout "shuffled" by the offset of each byte, as AITER's preshuffled products read it."""

from __future__ import annotations

import torch
from torch import Tensor


def of_codes(rows: int, width: int) -> Tensor:
    """Where each byte of codes ``[rows, width / 2]`` lies."""
    n, k = torch.arange(rows)[:, None], torch.arange(width // 2)
    return n // 16 * 8 * width + k // 32 * 512 + k % 32 // 16 * 256 + n % 16 * 16 + k % 16


def of_scales(rows: int, width: int) -> Tensor:
    """Where each of the scales ``[rows, width / 32]`` lies."""
    n, b = torch.arange(rows)[:, None], torch.arange(width // 32)
    return n // 32 * width + b // 8 * 256 + b % 4 * 64 + n % 16 * 4 + b % 8 // 4 * 2 + n % 32 // 16


def put_back(codes: Tensor, scales: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Codes ``[rows, width / 2]`` and scales ``[rows, width / 32]`` of a shuffled operand."""
    return codes.flatten()[of_codes(rows, width)], scales.flatten()[of_scales(rows, width)]
