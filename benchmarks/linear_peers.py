"""Other projects' kernels for weight-only MXFP4 products, as ``benchmarks.linear`` calls them; never a dependency.

Each is loaded when first called, from where an option of the benchmark says, and only by calls that it offers. So
whatever is wrong with it becomes a row that failed, and the rest is measured.

Marlin: ``_C_stable_libtorch.abi3.so`` of vLLM 0.33's wheel.

triton_kernels, of the Triton repository, in the generation that has ``matmul_ogs`` and layouts as classes (up to
Triton 3.6's); the wheel of vLLM 0.33 has one as ``vllm/third_party/triton_kernels``. K is cut among programs by its own
rule, which vLLM turns off for the sake of MoE.

Humming 0.1.19. It compiles its kernels by NVRTC, for all numbers of tokens when a weight's shape is first multiplied.
That needs libnvrtc-builtins on LD_LIBRARY_PATH, and the headers of nvidia-cuda-crt and nvidia-cuda-cccl 13.0 beside
those of the CUDA runtime, or in ``humming/include``.
"""

from __future__ import annotations

import importlib
import pathlib
import sys
from typing import Any, Protocol

import torch
from torch import Tensor


class Peer(Protocol):
    def prepare(self, codes: Tensor, scales: Tensor) -> Any:
        """A weight of [N, K / 2] bytes and [N, K / 32] scale bytes, as the peer wants it."""

    def multiply(self, x: Tensor, weight: Any) -> Tensor:
        """x of [M, K] times such a weight: [M, N]."""


class Marlin:
    E2M1 = 2 | 1 << 8 | 1 << 16 | 1 << 49  # vLLM's number of the type: bits of exponent, mantissa, sign, finite

    def __init__(self, library: pathlib.Path) -> None:
        self.library = library

    def prepare(self, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes in the order of its kernel, by its own op; scales as vLLM arranges them; locks."""
        torch.ops.load_library(str(self.library))
        rows, width = codes.shape[0], codes.shape[1] * 2
        words = codes.view(torch.int32).T.contiguous()
        packed = torch.ops._C.gptq_marlin_repack(words, width, rows, 4, False)
        moved = scales.T.reshape(-1, 8, 8).transpose(1, 2).reshape(-1, 4)[:, [0, 2, 1, 3]]
        moved = moved.reshape(width // 32, rows).contiguous().view(torch.float8_e8m0fnu)
        return packed, moved, torch.zeros(1024, dtype=torch.int32, device=codes.device)

    def multiply(self, x: Tensor, weight: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        packed, scales, locks = weight
        sizes = (len(x), scales.shape[1], x.shape[1])
        result: Tensor = torch.ops._C.marlin_gemm(
            x, None, packed, None, scales, None, None, None, locks, self.E2M1, *sizes, False, True, False
        )
        return result


class TritonKernels:
    def __init__(self, folder: pathlib.Path) -> None:
        _put_in_front(folder)

    def prepare(self, codes: Tensor, scales: Tensor) -> Any:
        """[1, K, N], K contiguous, then in the layouts it has for this GPU; the scales as part of its settings.

        As one expert: of a weight of two dimensions it takes the first, K, for their number, and tiles for few tokens.
        """
        tensor = importlib.import_module("triton_kernels.tensor")
        layout = importlib.import_module("triton_kernels.tensor_details.layout")
        of_values, for_values = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        of_scales, for_scales = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        values = tensor.wrap_torch_tensor(codes[None].mT, dtype=tensor.FP4)
        wrapped = tensor.convert_layout(tensor.wrap_torch_tensor(scales[None].mT), of_scales, **for_scales)
        product = importlib.import_module("triton_kernels.matmul_ogs")
        settings = product.PrecisionConfig(weight_scale=wrapped, out_dtype=torch.bfloat16)
        return tensor.convert_layout(values, of_values, **for_values), settings

    def multiply(self, x: Tensor, weight: Any) -> Tensor:
        values, settings = weight
        product = importlib.import_module("triton_kernels.matmul_ogs")
        result: Tensor = product.matmul_ogs(x, values, None, precision_config=settings)
        return result


class Humming:
    def __init__(self, folder: pathlib.Path) -> None:
        _put_in_front(folder)

    def prepare(self, codes: Tensor, scales: Tensor) -> Any:
        """Its layer, padded as vLLM 0.33 pads."""
        package = importlib.import_module("humming.layer")
        layer = package.HummingLayer(
            shape_n=codes.shape[0],
            shape_k=codes.shape[1] * 2,
            weight_config={"quant_method": "mxfp4"},
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            torch_dtype=torch.bfloat16,
        )
        layer.to(codes.device)
        layer.load_from_tensors({"weight": codes, "weight_scale": scales})
        layer.transform()
        return layer

    def multiply(self, x: Tensor, weight: Any) -> Tensor:
        result: Tensor = weight(x)
        return result


def _put_in_front(folder: pathlib.Path) -> None:
    sys.path.insert(0, str(folder.resolve()))
