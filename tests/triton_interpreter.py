"""Kernels run by Triton's interpreter, in a process of its own: Triton decides at import whether it interprets."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pytest


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


@contextlib.contextmanager
def without_needless_work() -> Iterator[None]:
    """What kernels compute is the same; two thirds of the interpreter's time went into what is left out here."""
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        _patch_the_language_once_a_launch(patch)
        _leave_out_checks_that_nobody_reads(patch)
        _remember_types(patch)
        yield


def _patch_the_language_once_a_launch(patch: pytest.MonkeyPatch) -> None:
    """Not at every call of a jitted function: that was more than a third of the time.

    Within a launch, once for each module of the functions called is enough: what a launch patched stays so until it
    ends, and patching it again changes nothing.
    """
    from triton.runtime import interpreter

    plain = interpreter._patch_lang
    launch = interpreter._LangPatchScope()  # empty, as a launch's is after it: none is under way
    patched: set[int] = set()

    def once(fn: Any) -> Any:
        nonlocal launch
        module = id(fn.__globals__)
        if not launch._changes:
            patched.clear()
            launch = plain(fn)
        elif module not in patched:
            plain(fn)
        patched.add(module)
        return launch

    patch.setattr(interpreter, "_patch_lang", once)


def _leave_out_checks_that_nobody_reads(patch: pytest.MonkeyPatch) -> None:
    """Sums of integers are computed in 64 bits, too, for an assertion of the device that is left out after that."""
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    assert not options.debug
    patch.setattr(interpreter_builder, "options", dataclasses.replace(options, sanitize_overflow=False))


def _remember_types(patch: pytest.MonkeyPatch) -> None:
    """What a type of a block, a tensor's shape and a dtype of numpy's are made of: few, made for every operation."""
    import triton.language as tl
    from triton.runtime import interpreter

    new_block_type, new_tensor, plain_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *shape)
        if key not in blocks:
            new_block_type(self, element_ty, shape)
            blocks[key] = (element_ty, dict(vars(self)))  # with the element's type: its id stays its own
        else:
            vars(self).update(blocks[key][1])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            new_tensor(self, handle, type)
            shapes[key] = (self.numel, self.shape)
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = shapes[key]

    def np_dtype(tt_dtype: Any) -> Any:
        name = tt_dtype.name
        if name not in dtypes:
            dtypes[name] = plain_dtype(tt_dtype)
        return dtypes[name]

    patch.setattr(tl.block_type, "__init__", block_type)
    patch.setattr(tl.tensor, "__init__", tensor)
    patch.setattr(interpreter, "_get_np_dtype", np_dtype)


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
