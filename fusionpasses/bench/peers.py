"""Kernels of other projects, measured on the same buffers when they are there; never a dependency.

AITER: its Triton kernels ``fused_rms_mxfp4_quant`` and ``fused_qk_rope_cat_and_cache_mla`` also run on NVIDIA GPUs.
``import aiter`` needs ROCm, so no ``__init__`` of it is executed: the few modules that hold the kernels are imported
from the files of a checkout, under packages that are empty but for their paths. They are taken out of ``sys.modules``
again afterwards.

What its results are worth here. The first keeps sum and norm in float32 down to the codes, where the op rounds to
bfloat16, so some codes differ. On NVIDIA it turns scale bytes below 127 into 127 (a negative float goes to uint8
through zero); the weights of the benchmark are 8 or more for that reason, which leaves no such byte.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator

import torch
from torch import Tensor

from fusionpasses.bench.chains import EPS, Chain, Contender, Outputs, Run, Settings
from fusionpasses.errors import FusionError
from fusionpasses.probes import Verdict

AITER_MODULE = "aiter.ops.triton.quant.fused_mxfp4_quant"
_AITER_FILE = "aiter/ops/triton/quant/fused_mxfp4_quant.py"
AITER_ROPE_MODULE = "aiter.ops.triton.fusions.fused_kv_cache"
_AITER_TRITON = ("aiter.ops.triton", "aiter.ops.triton.quant", "aiter.ops.triton.fusions", "aiter.ops.triton.rope")
_AITER_PACKAGES = ("aiter", "aiter.ops", *_AITER_TRITON, "aiter.utility", "aiter.jit", "aiter.jit.utils")
#: What AITER's modules ask of ``aiter.utility.dtypes``, which runs ``rocminfo`` when imported.
_AITER_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e8m0": torch.uint8, "fp4x2": torch.uint8}


class PeerUnavailable(FusionError):
    """A peer was asked for by path and cannot be loaded."""


def find_aiter() -> tuple[pathlib.Path | None, Verdict]:
    """The folder that holds an installed AITER, looked up, not imported."""
    try:
        spec = importlib.util.find_spec("aiter")
    except (ImportError, ValueError) as error:
        return None, Verdict(False, f"looking for aiter failed: {error}")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        root = pathlib.Path(place).parent
        if (root / _AITER_FILE).is_file():
            return root, Verdict(True, f"aiter in {root}")
    return None, Verdict(
        False, "aiter is not installed, or a release without this kernel; --peer-path names a checkout"
    )


def load_aiter(checkout: pathlib.Path) -> Run:
    """``fused_rms_mxfp4_quant`` of an AITER checkout.

    Raises:
        PeerUnavailable: the folder is not a checkout, or its modules cannot be imported here.
    """
    return _load(checkout, AITER_MODULE, "fused_rms_mxfp4_quant")


def load_aiter_rope(checkout: pathlib.Path) -> Run:
    """``fused_qk_rope_cat_and_cache_mla`` of an AITER checkout; raises as load_aiter does."""
    return _load(checkout, AITER_ROPE_MODULE, "fused_qk_rope_cat_and_cache_mla")


def _load(checkout: pathlib.Path, name: str, function: str) -> Run:
    file = f"{name.replace('.', '/')}.py"
    if not (checkout / file).is_file():
        raise PeerUnavailable(
            f"--peer-path: got {checkout}, which has no {file}; allowed: the top folder of a checkout of AITER; "
            "leave the option out to measure without it"
        )
    with _only_paths(checkout):
        try:
            found: Run = getattr(importlib.import_module(name), function)
        # Whatever a file of another project may raise when it is imported without its own package around it.
        except Exception as error:
            raise PeerUnavailable(
                f"--peer-path: got {checkout}, whose {name} fails to import: {type(error).__name__}: {error}; "
                "allowed: a checkout that fits the installed Triton, and a GPU that Triton sees; try another commit, "
                "or leave the option out"
            ) from error
    return found


def aiter(function: Run, chain: Chain, settings: Settings) -> Contender | None:
    """AITER's kernel on a chain, or None where it has none: quant alone, or another scale rule."""
    if not chain.norms or settings.scale_mode != "even":
        return None

    def run(*tensors: Tensor) -> Outputs:
        *inputs, weight = tensors
        residual = inputs[1] if chain.adds else None
        (codes, scales), norm, _, total = function(
            inputs[0], weight, EPS, res1=residual, output_unquantized_inp1=chain.stores_norm
        )
        return codes, scales, *([total] if chain.adds else []), *([norm] if chain.stores_norm else [])

    return Contender("aiter", run, exact=False)


@contextlib.contextmanager
def _only_paths(checkout: pathlib.Path) -> Iterator[None]:
    """AITER's packages as empty ones with a path, for the time of an import."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "aiter"}
    for name in before:
        del sys.modules[name]
    try:
        for name in _AITER_PACKAGES:
            package = types.ModuleType(name)
            package.__path__ = [str(checkout.joinpath(*name.split(".")))]
            sys.modules[name] = package
        dtypes = types.ModuleType("aiter.utility.dtypes")
        dtypes.__dict__.update(_AITER_DTYPES)
        sys.modules[dtypes.__name__] = sys.modules["aiter.utility"].__dict__["dtypes"] = dtypes
        # AITER's own makes a custom op of the function, which is more than a call needs.
        guard = types.ModuleType("aiter.jit.utils.torch_guard")
        guard.__dict__["torch_compile_guard"] = lambda **_: lambda function: function
        sys.modules[guard.__name__] = guard
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "aiter"]:
            del sys.modules[name]
        sys.modules.update(before)
