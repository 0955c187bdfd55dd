"""Indices that come as data (slots, positions): refused on a CPU before anything is done, asserted on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fusionpasses.errors import UnsupportedInput

INDEX_DTYPES = (torch.int32, torch.int64)


def check(name: str, index: Tensor, tokens: int, device: torch.device) -> None:
    """Refuse what is not one int32 or int64 per token, on the device of the rest."""
    if index.dtype not in INDEX_DTYPES:
        raise UnsupportedInput(
            f"{name}.dtype: got {index.dtype}, allowed {', '.join(map(str, INDEX_DTYPES))}; convert it first"
        )
    if index.dim() != 1 or index.shape[0] != tokens:
        raise UnsupportedInput(
            f"{name}: got shape {tuple(index.shape)}, allowed [{tokens}], one per token; flatten it, or pad it with "
            "the tokens"
        )
    check_device(name, index, device)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise UnsupportedInput(f"{name}.device: got {tensor.device}, allowed {device}, that of k_pe; move one of them")


def require(inside: Tensor, index: Tensor, name: str, allowed: str, advice: str) -> None:
    """Refuse an index for which ``inside`` is False: at once on a CPU, by a device assert elsewhere.

    An assert on the device is seen only when something waits for the GPU, and builds for AMD GPUs leave it out, so the
    caller must not read or write through such an index either.

    Args:
        inside: bool ``[T]``.
        index: integers ``[T]``, as the caller of the op gave them.
        name, allowed, advice: for the message.
    """
    if index.device.type != "cpu":
        torch._assert_async(inside.all(), f"{name}: out of range, allowed {allowed}; {advice}")
        return
    if bool(inside.all()):
        return
    token = int((~inside).nonzero()[0])
    raise UnsupportedInput(f"{name}: got {int(index[token])} for token {token}, allowed {allowed}; {advice}")
