"""A small call of each kernel's op under compute-sanitizer, on a GPU: ``python test_sanitizer.py`` makes the calls.

Outputs are made by ``cudaMalloc`` one by one then, without torch's cache of memory, so that an access just past the end
of one is an access to nothing.
"""

from __future__ import annotations

import inspect
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusionpasses.kernels import gemm_choice
from fusionpasses.kernels.arch import Arch
from fusionpasses.ops import OPS, _mxfp4, _mxfp4_weight
from fusionpasses.probes import probe_triton
from fusionpasses.providers.triton import ADAPTERS

#: Less than a row's tile; a tile and a masked rest; more rows than programs that stay; rows in several chunks.
SHAPES = ((3, 32), (3, 96), (2, 2880), (1700, 512), (2, 20000))
#: Of quants that go on to a product: tokens that are put in order for each of its kernels.
SHAPES_THEN_GEMM = ((12, 1024), (20, 8192))
#: Tokens; rows, width and layout of a weight, none of which is a whole number of tiles, for each kernel of Hopper's.
TOKENS = (3, 20, 100)
WEIGHTS = ((40, 160, "linear"), (40, 160, "tiles"), (4100, 8224, "tiles"))

_SANITIZER = shutil.which(
    "compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
)


def calls(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Calls of all ops that Triton runs."""
    for name in ADAPTERS:
        arguments = [argument.name for argument in OPS[name].overload._schema.arguments]
        if "mla" in name or "x2" in arguments:
            for args, kwargs in OPS[name].samples(device):
                yield name, args, kwargs
        elif name.startswith("mxfp4_gemm"):
            yield from _products(name, device)
        else:
            then = "then_" in name
            for rows, n in SHAPES_THEN_GEMM if then else SHAPES:
                given: dict[str, Any] = {
                    **{x: torch.randn(rows, n, device=device).bfloat16() for x in ("x", "residual", "gate", "up")},
                    "weight": torch.randn(n, device=device).bfloat16(),
                    "eps": 1e-6,
                    "cast_order": "cast_mul" if "gate" in arguments else "cast_scale",
                }
                if then:
                    mlp = name.endswith("then_mlp")
                    up = 2**27 // n if mlp else 2**25 // n + 4
                    given |= _weight(up, n, device) | {"out_dtype": torch.bfloat16}
                    down = _weight(n, up // 2, device) if mlp else {}
                    given |= {f"down_{key.removeprefix('w_')}": value for key, value in down.items()}
                    given |= {"down_dtype": torch.bfloat16, "act_cast_order": "cast_mul"}
                schema = [a for a in OPS[name].overload._schema.arguments if a.name in given]
                by_name = {a.name: given[a.name] for a in schema if a.kwarg_only}
                yield name, tuple(given[a.name] for a in schema if not a.kwarg_only), by_name


def _weight(rows: int, width: int, device: torch.device) -> dict[str, Any]:
    codes, scales, shift = _mxfp4_weight.prepare(*_mxfp4.quantize(torch.randn(rows, width, device=device), "even"))
    return {"w_codes": codes, "w_scales": scales, "layout": "tiles", "rows": rows, "shift": shift}


def _products(name: str, device: torch.device) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    for rows, width, layout in WEIGHTS:
        weight: tuple[Any, ...] = _mxfp4.quantize(torch.randn(rows, width, device=device), "even")
        keywords: dict[str, Any] = {}
        if layout == "tiles":
            *weight, shift = _mxfp4_weight.prepare(*weight)
            keywords = {"layout": layout, "rows": rows, "shift": shift}
        for tokens in TOKENS:
            x = torch.randn(tokens, width, device=device).bfloat16()
            if name.startswith("mxfp4_gemm."):
                yield name, (*_mxfp4.quantize(x, "even"), *weight), {"out_dtype": torch.bfloat16, **keywords}
            else:
                yield name, (x, *weight), keywords


def make_calls() -> None:
    for name, args, kwargs in calls(torch.device("cuda")):
        ADAPTERS[name](*args, **kwargs)
    torch.cuda.synchronize()


def test_the_calls_are_calls_of_the_ops() -> None:
    made = set()
    for name, args, kwargs in calls(torch.device("cpu")):
        OPS[name].check(*args, **kwargs)
        inspect.signature(ADAPTERS[name]).bind(*args, **kwargs)
        made.add(name)
    assert made == set(ADAPTERS)


def test_products_are_by_each_kernel_of_hopper() -> None:
    chosen = {
        gemm_choice.choose(tokens, rows, width, Arch("sm_90", 32, 132), layout=layout).kernel
        for rows, width, layout in WEIGHTS
        for tokens in TOKENS
    }
    assert chosen == {"mxfp4_gemm", "mxfp4_gemm_wgmma", "mxfp4_dequantize"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(not probe_triton(), reason=probe_triton().why)
@pytest.mark.skipif(_SANITIZER is None, reason="no compute-sanitizer on the path or in /usr/local/cuda/bin")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool: str) -> None:
    root = pathlib.Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [str(_SANITIZER), "--tool", tool, "--error-exitcode", "9", sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " 0 errors" in done.stdout or "0 hazards" in done.stdout


if __name__ == "__main__":
    make_calls()
