"""A linear layer with MXFP4 weights that quantises its activations on the fly (W4A4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusionpasses.errors import UnsupportedInput
from fusionpasses.ops import _mxfp4


class Mxfp4Linear(nn.Module):
    """``y = quantise(x) @ weight.T + bias``, both operands in MXFP4.

    The activation quant and the GEMM are two nodes of the graph, so that a pass can fuse the quant into the norm
    before it.

    Buffers (in ``state_dict``):
        weight_packed: uint8 ``[out_features, in_features / 2]``, two E2M1 codes per byte, the even element low.
        weight_scale: uint8 (E8M0) ``[out_features, in_features / 32]``.
        bias: ``[out_features]`` or absent.

    Inference only: a call with an input that requires grad, in grad mode, raises UnsupportedInput.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, scale_mode: str = "even"
    ) -> None:
        super().__init__()
        _mxfp4.check_scale_mode(scale_mode)
        for name, tensor in (("weight_packed", weight_packed), ("weight_scale", weight_scale)):
            if tensor.dtype != torch.uint8 or tensor.dim() != 2:
                raise UnsupportedInput(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, allowed 2-D torch.uint8")
        rows, half = weight_packed.shape
        if half % (_mxfp4.BLOCK // 2) != 0 or tuple(weight_scale.shape) != (rows, half * 2 // _mxfp4.BLOCK):
            raise UnsupportedInput(
                f"weight_scale: got {tuple(weight_scale.shape)} for weight_packed {tuple(weight_packed.shape)}, "
                "allowed [N, K/32] for [N, K/2], K a multiple of 32"
            )
        if bias is not None and tuple(bias.shape) != (rows,):
            raise UnsupportedInput(f"bias: got shape {tuple(bias.shape)}, allowed ({rows},), the rows of weight_packed")
        self.in_features, self.out_features, self.scale_mode = half * 2, rows, scale_mode
        self.register_buffer("weight_packed", weight_packed)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, scale_mode: str = "even") -> Mxfp4Linear:
        """Quantise the weight of ``linear``; ``scale_mode`` serves weight and activations.

        Raises:
            UnsupportedInput: in_features is not a multiple of 32, or a weight is not finite.
        """
        _mxfp4.check_scale_mode(scale_mode)
        if not isinstance(linear, nn.Linear):
            raise UnsupportedInput(f"linear: got {type(linear).__name__}, allowed torch.nn.Linear")
        weight = linear.weight.detach()
        _mxfp4.check_input("linear.weight", weight)
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise UnsupportedInput(
                f"linear.weight: got Inf or NaN in a weight of shape {tuple(weight.shape)}, allowed finite values; a "
                "block that holds one would become NaN as a whole"
            )
        packed, scale = torch.ops.fusionpasses.dynamic_mxfp4_quant(weight, scale_mode)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(packed, scale, bias, scale_mode=scale_mode)
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` bfloat16, float16 or float32 to ``[..., out_features]`` of the same dtype."""
        codes, scales = torch.ops.fusionpasses.dynamic_mxfp4_quant(x, self.scale_mode)
        y: Tensor = torch.ops.fusionpasses.mxfp4_gemm(
            codes, scales, self.weight_packed, self.weight_scale, self.bias, out_dtype=x.dtype
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scale_mode={self.scale_mode!r}"
        )
