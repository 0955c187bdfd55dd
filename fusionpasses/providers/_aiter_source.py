"""What AITER's code says of defects that some releases had, where neither a signature nor a result tells.

Releases with the same functions differ in these; so the text is looked at, once for each function.
"""

from __future__ import annotations

import functools
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

#: A tile of AITER's kernels divides every multiple of this.
_ANY_TILE = 1024


def refused(op: str, name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Why a function of AITER's, as it is here, must not run a call of ``op``; "" if it may."""
    if op.startswith("concat_and_cache_mla") and _says(function, r"\bb == b2 == bk\b"):
        return (
            "rows without queries: this release takes as many queries as rows of the cache, and raises else (until "
            "ROCm/aiter 2dd2cb6)"
        )
    if name in ("gemm_afp4wfp4", "gemm_afp4wfp4_preshuffled_scales"):
        width = arguments["x_codes"].shape[-1] * 2
        if width % _ANY_TILE != 0 and not _masks_scales(function):
            return (
                f"K: got {width}, and this release reads scales behind the end where a tile does not divide K (until "
                f"ROCm/aiter 7b57073); allowed multiples of {_ANY_TILE}"
            )
    return ""


@functools.cache
def _masks_scales(function: Callable[..., Any]) -> bool:
    """Does the file with the kernels mask scales? Where none is found, as with something in AITER's place, yes."""
    module = sys.modules.get(function.__module__)
    kernels = [value for name, value in vars(module).items() if name.startswith("_gemm_afp4wfp4")] if module else []
    codes = [getattr(_inner(kernel), "__code__", None) for kernel in kernels]
    files = {code.co_filename for code in codes if code is not None}
    return not files or any("scale_mask" in _text(pathlib.Path(file)) for file in files)


def _inner(kernel: Any) -> Any:
    """The function in Triton's wrappers: heuristics, tuning, compilation."""
    return _inner(kernel.fn) if hasattr(kernel, "fn") else kernel


@functools.cache
def _says(function: Callable[..., Any], pattern: str) -> bool:
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    return file is not None and re.search(pattern, _text(pathlib.Path(file))) is not None


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
