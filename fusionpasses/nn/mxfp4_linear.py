"""A linear layer with MXFP4 weights, and activations that it quantises on the fly (W4A4) or leaves (weight-only)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusionpasses.errors import UnsupportedInput
from fusionpasses.nn import _replaceable
from fusionpasses.ops import _mxfp4, _mxfp4_weight

if TYPE_CHECKING:
    from fusionpasses.nn.checkpoint_reader import Checkpoint

ACTS = ("mxfp4", "none")


def check_act(act: str) -> None:
    if act not in ACTS:
        raise UnsupportedInput(
            f"act: got {act!r}, allowed 'mxfp4', which quantises the inputs too (W4A4), and 'none' (weight-only)"
        )


class Mxfp4Linear(nn.Module):
    """``y = quantise(x) @ weight.T + bias`` with both operands in MXFP4; with ``act="none"``, x is as it is.

    The activation quant and the GEMM are two nodes of the graph, so that a pass can fuse the quant into what is before
    it. Which of the two is faster depends on the GPU: see docs/linear.md.

    Buffers (in ``state_dict``, always in this layout):
        weight_packed: uint8 ``[out_features, in_features / 2]``, two E2M1 codes per byte, the even element low.
        weight_scale: uint8 (E8M0) ``[out_features, in_features / 32]``.
        bias: ``[out_features]`` or absent.

    After ``prepare()`` the first two hold the same weight in the order in which a kernel reads it. A weight that is
    loaded into a prepared layer is prepared, too; or stays as it is, if it cannot be: ``layout`` says which. It is then
    in other memory than before, and a CUDA graph that was captured by hand has to be captured again. What is not uint8
    is an error of ``load_state_dict``: it would convert values, where bytes are meant. What wants an unprepared layer:
    ``torch.func.functional_call`` with a state_dict, writing into a state_dict (of a prepared layer it is a copy), and
    copying ``buffers()`` from layer to layer, which says nothing of their layout and shift.

    Attributes:
        in_features, out_features: as of nn.Linear.
        act: "mxfp4" or "none".
        scale_mode: of the activations' quant.
        layout: "linear", or that of ``prepare()``.

    Inference only: a call with an input that requires grad, in grad mode, raises UnsupportedInput.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight_packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        act: str = "mxfp4",
        scale_mode: str = "even",
    ) -> None:
        super().__init__()
        check_act(act)
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
        if bias is not None and bias.dtype not in _mxfp4.INPUT_DTYPES:
            raise UnsupportedInput(f"bias: got {bias.dtype}, allowed {', '.join(map(str, _mxfp4.INPUT_DTYPES))}")
        self.in_features, self.out_features = half * 2, rows
        self.act, self.scale_mode = act, scale_mode
        self.layout, self._shift = "linear", 0
        self.register_buffer("weight_packed", weight_packed.contiguous())
        self.register_buffer("weight_scale", weight_scale.contiguous())
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, act: str = "mxfp4", scale_mode: str = "even") -> Mxfp4Linear:
        """Quantise the weight of ``linear``; ``scale_mode`` serves weight and activations.

        Raises:
            UnsupportedInput: in_features is not a multiple of 32, a weight is not finite, or ``linear`` has a forward,
                forward hooks or tensors of its own. (A parametrised weight is computed.)
        """
        check_act(act)
        _mxfp4.check_scale_mode(scale_mode)
        if not isinstance(linear, nn.Linear):
            raise UnsupportedInput(f"linear: got {type(linear).__name__}, allowed torch.nn.Linear")
        if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
            raise UnsupportedInput(
                f"linear: got {type(linear).__name__} with a forward of its own, which would be lost, allowed "
                "torch.nn.Linear's; keep this one as it is"
            )
        lost = _replaceable.what_is_lost(linear)
        if lost is not None:
            raise UnsupportedInput(
                f"linear: got one of which {lost}; allowed a weight and a bias. Remove what it has, such as "
                "weight_norm, first"
            )
        weight = linear.weight.detach()
        _mxfp4.check_input("linear.weight", weight)
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise UnsupportedInput(
                f"linear.weight: got Inf or NaN in a weight of shape {tuple(weight.shape)}, allowed finite values; a "
                "block that holds one would become NaN as a whole"
            )
        packed, scale = torch.ops.fusionpasses.dynamic_mxfp4_quant(weight, scale_mode)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(packed, scale, bias, act=act, scale_mode=scale_mode)
        layer.train(linear.training)
        return layer

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        name: str,
        *,
        act: str | None = None,
        scale_mode: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Mxfp4Linear:
        """The linear ``name`` of an opened checkpoint: :func:`fusionpasses.nn.linear_from_checkpoint`."""
        from fusionpasses.nn.checkpoint_loader import linear_from_checkpoint  # which imports this module

        return linear_from_checkpoint(checkpoint, name, act=act, scale_mode=scale_mode, device=device)

    def prepare(self, layout: str = "tiles") -> Mxfp4Linear:
        """Put the weight in the order in which one kernel reads it.

        "tiles" is that of the kernel for few tokens on NVIDIA GPUs from Hopper on. "shuffled" is that of AITER's
        preshuffled product on gfx950, which ``fusion_backend(provider="aiter_finite")`` calls with ``act="mxfp4"``;
        "shuffled_scales", whose codes stay as they are, that of another one, for 32 tokens and more. For others, do
        not: they read the checkpoint's order only, so a weight in tiles is dequantised, and a shuffled one put back, in
        every call. The values are the same, and ``state_dict`` does not change. Does nothing to a weight that has that
        layout already. "tiles" waits for the device.

        Raises:
            UnsupportedInput: the layout is none of these; the weight cannot have it ("tiles": it is on the meta device,
                or folding its scales into the codes' would not be exact, because of NaN or too wide a span; "shuffled"
                and "shuffled_scales": out_features % 32 or in_features % 256). It stays as it is, and works.
        """
        if layout not in ("tiles", *_mxfp4_weight.SHUFFLED):
            raise UnsupportedInput(
                f"layout: got {layout!r}, allowed 'tiles', 'shuffled' and 'shuffled_scales'; unprepare() gives "
                "'linear' back"
            )
        if self.layout != layout:
            codes, scales = self.checkpoint_weight()
            shift = 0
            if layout == "tiles":
                codes, scales, shift = _mxfp4_weight.prepare(codes, scales)
            else:
                codes, scales = _mxfp4_weight.shuffle(codes, scales, layout)
            self.weight_packed, self.weight_scale, self.layout, self._shift = codes, scales, layout, shift
        return self

    def unprepare(self) -> Mxfp4Linear:
        """Undo ``prepare()``: every byte is as it was."""
        self.weight_packed, self.weight_scale = self.checkpoint_weight()
        self.layout, self._shift = "linear", 0
        return self

    def checkpoint_weight(self) -> tuple[Tensor, Tensor]:
        """Codes ``[out_features, in_features / 2]`` and scales ``[out_features, in_features / 32]``."""
        if self.layout == "linear":
            return self.weight_packed, self.weight_scale
        if self.layout in _mxfp4_weight.SHUFFLED:
            return _mxfp4_weight.unshuffle(self.weight_packed, self.weight_scale, self.layout)
        return _mxfp4_weight.unprepare(
            self.weight_packed, self.weight_scale, self.out_features, self.in_features, self._shift
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` bfloat16, float16 or float32 to ``[..., out_features]`` of the same dtype."""
        layout: dict[str, Any] = {}
        if self.layout != "linear":
            layout = {"layout": self.layout, "rows": self.out_features, "shift": self._shift}
        weight = (self.weight_packed, self.weight_scale, self.bias)
        y: Tensor
        if self.act == "none":
            y = torch.ops.fusionpasses.mxfp4_gemm_a16w4(x, *weight, **layout)
        else:
            codes, scales = torch.ops.fusionpasses.dynamic_mxfp4_quant(x, self.scale_mode)
            y = torch.ops.fusionpasses.mxfp4_gemm(codes, scales, *weight, out_dtype=x.dtype, **layout)
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"act={self.act!r}, scale_mode={self.scale_mode!r}, layout={self.layout!r}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_packed"], destination[f"{prefix}weight_scale"] = self.checkpoint_weight()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {f"{prefix}{name}": state_dict.get(f"{prefix}{name}") for name in ("weight_packed", "weight_scale")}
        wrong = {
            name: value.dtype
            for name, value in given.items()
            if isinstance(value, Tensor) and value.dtype != torch.uint8
        }
        if wrong:
            # copy_ would convert the values: of most scales it would make zeros.
            error_msgs += [
                f"{name}: got {dtype}, allowed torch.uint8, bytes of codes or of E8M0 scales; float8_e8m0fnu is that "
                "after .view(torch.uint8). Nothing of this layer was loaded"
                for name, dtype in wrong.items()
            ]
            return
        layout = self.layout
        self.unprepare()
        mine = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        for name in (f"{prefix}{own}" for own in self._buffers):
            if isinstance(mine.get(name), Tensor):
                # With assign=True it is what the buffer becomes: no Parameter, and as the kernels read it.
                mine[name] = mine[name].detach().contiguous()
        super()._load_from_state_dict(mine, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if layout != "linear":
            # What cannot be prepared works as it is; to raise here would leave the modules after this one unloaded.
            with contextlib.suppress(UnsupportedInput):
                self.prepare(layout)
