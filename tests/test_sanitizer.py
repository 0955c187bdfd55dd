"""A small call of each kernel's op under compute-sanitizer, on a GPU: ``python test_sanitizer.py`` makes the calls.

Outputs are made by ``cudaMalloc`` one by one then, without torch's cache of memory, so that an access just past the end
of one is an access to nothing.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from fusionpasses.ops import OPS
from fusionpasses.probes import probe_triton

#: Less than a row's tile; a tile and a masked rest; more rows than programs that stay; rows in several chunks.
SHAPES = ((3, 32), (3, 96), (2, 2880), (1700, 512), (2, 20000))

_SANITIZER = shutil.which(
    "compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
)


def make_calls() -> None:
    from fusionpasses.providers.triton import ADAPTERS

    for name, adapter in ADAPTERS.items():
        if "mla" in name or name.endswith(".with_second"):
            for args, kwargs in OPS[name].samples(torch.device("cuda")):
                adapter(*args, **kwargs)
            continue
        for rows, n in SHAPES:
            tensors = [torch.randn(rows, n, device="cuda").bfloat16() for _ in range(1 + ("add" in name))]
            if OPS[name].overload._schema.arguments[1].name == "scale_mode":
                adapter(*tensors)
            else:
                adapter(*tensors, torch.randn(n, device="cuda").bfloat16(), 1e-6, cast_order="cast_scale")
    torch.cuda.synchronize()


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
