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
        timeout=300,
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
