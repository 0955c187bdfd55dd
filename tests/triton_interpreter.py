"""Kernels run by Triton's interpreter, in a process of its own: Triton decides at import whether it interprets."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import torch


def run(file: str, group: str) -> None:
    """``python FILE GROUP`` with the interpreter on; fails as it does."""
    root = pathlib.Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, file, group],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def cast_bfloat16_as_gpus_do() -> None:
    """The interpreter's own casts drop the low bits instead of rounding, and lose some subnormals."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def patched(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(src.data.copy()).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view("uint16"), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype("uint32") << 16).view("float32"), tl.float32)
        return cast(self, src, dst_type)

    InterpreterBuilder.cast_impl = patched


def fuse_multiply_add_as_gpus_do() -> None:
    """The interpreter's own rounds the product, too."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_fma

    def patched(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.data.dtype != np.float32:
            return plain(self, x, y, z)
        with np.errstate(all="ignore"):
            product = x.data.astype(np.float64) * y.data  # exact
            addend = z.data.astype(np.float64)
            total = product + addend
            kept = total - product
            lost = (product - (total - kept)) + (addend - kept)
            # To odd, if anything was lost: then rounding once more is rounding once.
            bits = total.view(np.int64)
            inexact = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
            bits = bits + np.where(inexact, np.where((lost > 0) == (total > 0), 1, -1), 0)
            return TensorHandle(bits.view(np.float64).astype(np.float32), x.dtype.scalar)

    InterpreterBuilder.create_fma = patched


def multiply_bfloat16_as_gpus_do() -> None:
    """The interpreter's own dot takes the bits of bfloat16 for integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def patched(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, float32(a), float32(b), *rest)

    InterpreterBuilder.create_dot = patched
