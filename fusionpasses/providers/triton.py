"""The Triton provider: ops through the kernels of ``fusionpasses.kernels``.

Where it stands on the numerics contract of the ops:

- ``dynamic_mxfp4_quant`` gives the reference's bytes for every input, on every GPU.
- The norm ops do so given the same ``rsqrt(mean(x**2) + eps)``. Here that is a correctly rounded square root and a
  correctly rounded reciprocal, within 1.5 ulp for its argument and the very number torch computes on a CPU; torch on
  a GPU uses an approximation and so may differ in the last bits. The mean also depends on the order of the
  sum; the kernel's docstring has the bound. A different last bit moves a code only where a value lies at a rounding
  boundary.
- ``sum`` of the residual ops is exactly the reference's. Payload and sign of a NaN in ``sum`` and ``norm`` are not
  part of the contract.
- ``silu_mul_mxfp4_quant`` gives the reference's bytes given the same activation, which for silu is within 4
  ulp of the real number; the kernel's docstring has what that rests on, and the bounds of the other activations.
- RoPE and the write to the MLA cache: ``providers/_triton_rope.py``. The GEMMs: ``providers/_triton_gemm.py``.

Outputs are allocated and the kernel is launched on the current stream; nothing waits for the GPU, so calls can be
captured in a CUDA graph once the kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusionpasses.kernels import arch
from fusionpasses.kernels import dynamic_mxfp4_quant as quant_kernel
from fusionpasses.kernels import rmsnorm_mxfp4_quant as norm_kernel
from fusionpasses.kernels import rmsnorm_mxfp4_quant_pair as pair_kernel
from fusionpasses.kernels import silu_mul_mxfp4_quant as gated_kernel
from fusionpasses.ops import _mxfp4, _rms_norm
from fusionpasses.providers import _destination, _launch, _triton_gemm, _triton_mlp, _triton_rope
from fusionpasses.providers._destination import Destination


def _dynamic_mxfp4_quant(
    x: Tensor, scale_mode: str = "even", *, into: Destination | None = None, axes: int = 1
) -> tuple[Tensor, Tensor | None]:
    """``axes``: how many of the last ones are a token of the product that ``into`` is for."""
    into = into or _destination.outputs(x)
    blocks, row_blocks = x.numel() // _mxfp4.BLOCK, x.shape[-1] // _mxfp4.BLOCK
    if blocks == 0:
        return into[:2]
    gpu = arch.of(x.device)
    options: dict[str, Any] = quant_kernel.launch_options(gpu)
    tile = options["TILE_BLOCKS"]
    in_order, in_row = into.token_tiles is not None, row_blocks
    groups = _groups_of_rows(x)
    row_stride: int | None
    if groups is None:
        x, row_stride = _aligned_rows(x)
        group_rows = group_stride = None
    else:
        group_rows, group_stride, row_stride = groups
    k_blocks = None
    if in_order:
        k_blocks = x.shape[-axes:].numel() // _mxfp4.BLOCK
        row_blocks = blocks // k_blocks
        grid, masked = into.programs(row_blocks, k_blocks, tile)
    elif groups is not None or row_stride == x.shape[-1] or blocks == row_blocks:
        row_stride = None if groups is None else row_stride
        row_blocks = blocks
        grid, masked = (-(-blocks // tile), 1), blocks % tile != 0
    else:
        grid, masked = (blocks // row_blocks, -(-row_blocks // tile)), row_blocks % tile != 0
    with _launch.on_device_of(x):
        _launch.launch(
            quant_kernel.dynamic_mxfp4_quant,
            grid,
            x,
            into.codes,
            into.scales,
            row_stride,
            row_blocks,
            group_rows,
            group_stride,
            ROW_BLOCKS=in_row if in_order or groups is not None else None,
            MASKED=masked,
            SCALE_ADDEND=_mxfp4.SCALE_ADDEND[scale_mode],
            K_BLOCKS=k_blocks,
            ISA=gpu.isa,
            **into.constants,
            **options,
        )
    return into[:2]


def _rmsnorm_mxfp4_quant(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
    into: Destination | None = None,
) -> tuple[Tensor, Tensor | None]:
    into = into or _destination.outputs(x)
    _launch_norm(x, None, weight, eps, cast_order, norm_dtype, scale_mode, into, None, None)
    return into[:2]


def _rmsnorm_mxfp4_quant_with_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor | None, Tensor]:
    into = _destination.outputs(x)
    norm = _rms_norm.fake(x, weight, cast_order, norm_dtype)
    _launch_norm(x, None, weight, eps, cast_order, norm_dtype, scale_mode, into, None, norm)
    return *into[:2], norm


def _rmsnorm_mxfp4_quant_with_second(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    x2: Tensor,
    weight2: Tensor | None,
    eps2: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    cast_order2: str,
    norm_dtype2: torch.dtype | None = None,
    scale_mode: str = "even",
    into: Destination | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    into = into or _destination.outputs(x)
    norm2 = _rms_norm.fake(x2, weight2, cast_order2, norm_dtype2)
    row_blocks, row_blocks2 = x.shape[-1] // _mxfp4.BLOCK, x2.shape[-1] // _mxfp4.BLOCK
    rows = x.shape[:-1].numel()
    if rows == 0:
        return *into[:2], norm2
    gpu = arch.of(x.device)
    dtypes = [None if w is None else w.dtype for w in (weight, weight2)]
    first = rows, row_blocks, x.dtype, dtypes[0], cast_order
    chosen = pair_kernel.launch_options(*first, row_blocks2, dtypes[1], norm2.dtype, cast_order2, gpu)
    if chosen is None:
        # The second by the kernel that quantises as well, which no model's width needs.
        into2 = _destination.in_scratch(x2)
        _launch_norm(x, None, weight, eps, cast_order, norm_dtype, scale_mode, into, None, None)
        _launch_norm(x2, None, weight2, eps2, cast_order2, norm_dtype2, "even", into2, None, norm2)
        return *into[:2], norm2
    rounding = _roundings(x, weight, cast_order, norm_dtype)
    rounding2 = _roundings(x2, weight2, cast_order2, norm_dtype2)
    (x, stride), (x2, stride2) = _aligned_rows(x), _aligned_rows(x2)
    weight, weight2 = (None if w is None else _aligned_rows(w)[0] for w in (weight, weight2))
    options: dict[str, Any] = {**chosen[0]}
    with _launch.on_device_of(x):
        _launch.launch(
            pair_kernel.rmsnorm_mxfp4_quant_pair,
            (chosen[1] + chosen[2],),
            x,
            weight,
            x2,
            weight2,
            into.codes,
            into.scales,
            norm2,
            stride,
            stride2,
            rows,
            chosen[1],
            eps,
            eps2,
            ROW_BLOCKS=row_blocks,
            ROW_BLOCKS2=row_blocks2,
            SCALE_ADDEND=_mxfp4.SCALE_ADDEND[scale_mode],
            ROUND_BEFORE_WEIGHT=rounding[0],
            ROUND_RESULT=rounding[1],
            ROUND_BEFORE_WEIGHT2=rounding2[0],
            ROUND_RESULT2=rounding2[1],
            ISA=gpu.isa,
            **into.constants,
            **options,
        )
    return *into[:2], norm2


def _rmsnorm_add_mxfp4_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
    into: Destination | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    into = into or _destination.outputs(x)
    total = x.new_empty(x.shape)
    _launch_norm(x, residual, weight, eps, cast_order, norm_dtype, scale_mode, into, total, None)
    return *into[:2], total


def _rmsnorm_add_mxfp4_quant_with_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    cast_order: str,
    norm_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    into = _destination.outputs(x)
    total = x.new_empty(x.shape)
    norm = _rms_norm.fake(x, weight, cast_order, norm_dtype)
    _launch_norm(x, residual, weight, eps, cast_order, norm_dtype, scale_mode, into, total, norm)
    return *into[:2], total, norm


def _silu_mul_mxfp4_quant(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    cast_order: str,
    act_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
    into: Destination | None = None,
) -> tuple[Tensor, Tensor | None]:
    into = into or _destination.outputs(gate)
    _launch_gated(gate, up, activation, cast_order, act_dtype, scale_mode, into, None)
    return into[:2]


def _silu_mul_mxfp4_quant_with_act(
    gate: Tensor,
    up: Tensor,
    *,
    activation: str = "silu",
    cast_order: str,
    act_dtype: torch.dtype | None = None,
    scale_mode: str = "even",
) -> tuple[Tensor, Tensor | None, Tensor]:
    into = _destination.outputs(gate)
    act = gate.new_empty(gate.shape, dtype=act_dtype or gate.dtype)
    _launch_gated(gate, up, activation, cast_order, act_dtype, scale_mode, into, act)
    return *into[:2], act


#: The adapter of each op (``packet.overload``): the op's arguments without ``provider``, already checked.
ADAPTERS: dict[str, Callable[..., Any]] = {
    "dynamic_mxfp4_quant.default": _dynamic_mxfp4_quant,
    "rmsnorm_mxfp4_quant.default": _rmsnorm_mxfp4_quant,
    "rmsnorm_mxfp4_quant.with_norm": _rmsnorm_mxfp4_quant_with_norm,
    "rmsnorm_mxfp4_quant.with_second": _rmsnorm_mxfp4_quant_with_second,
    "rmsnorm_add_mxfp4_quant.default": _rmsnorm_add_mxfp4_quant,
    "rmsnorm_add_mxfp4_quant.with_norm": _rmsnorm_add_mxfp4_quant_with_norm,
    "silu_mul_mxfp4_quant.default": _silu_mul_mxfp4_quant,
    "silu_mul_mxfp4_quant.with_act": _silu_mul_mxfp4_quant_with_act,
    "dynamic_mxfp4_quant.then_gemm": _triton_gemm.then_gemm(_dynamic_mxfp4_quant, any_axes=True),
    "rmsnorm_mxfp4_quant.then_gemm": _triton_gemm.then_gemm(_rmsnorm_mxfp4_quant),
    "rmsnorm_mxfp4_quant.with_second_then_gemm": _triton_gemm.then_gemm(_rmsnorm_mxfp4_quant_with_second),
    "rmsnorm_add_mxfp4_quant.then_gemm": _triton_gemm.then_gemm(_rmsnorm_add_mxfp4_quant),
    "silu_mul_mxfp4_quant.then_gemm": _triton_gemm.then_gemm(_silu_mul_mxfp4_quant),
    "dynamic_mxfp4_quant.then_mlp": _triton_mlp.then_mlp(_dynamic_mxfp4_quant, _silu_mul_mxfp4_quant),
    "rmsnorm_mxfp4_quant.then_mlp": _triton_mlp.then_mlp(_rmsnorm_mxfp4_quant, _silu_mul_mxfp4_quant),
    "rmsnorm_add_mxfp4_quant.then_mlp": _triton_mlp.then_mlp(_rmsnorm_add_mxfp4_quant, _silu_mul_mxfp4_quant),
    **_triton_rope.ADAPTERS,
    **_triton_gemm.ADAPTERS,
}


def _roundings(x: Tensor, weight: Tensor | None, cast_order: str, norm_dtype: torch.dtype | None) -> tuple[bool, bool]:
    """Does a norm round to x's dtype before the weight, and does it round the result to that?"""
    round_before_weight = cast_order == "cast_scale"
    # A product of two tensors of x's dtype is rounded to it, whatever it is converted to afterwards.
    round_product = round_before_weight and weight is not None and weight.dtype == x.dtype
    return round_before_weight, round_product or _rms_norm.result_dtype(x, weight, cast_order, norm_dtype) == x.dtype


def _launch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    cast_order: str,
    norm_dtype: torch.dtype | None,
    scale_mode: str,
    into: Destination,
    total: Tensor | None,
    norm: Tensor | None,
) -> None:
    if x.numel() == 0:
        return
    rows, row_blocks = x.shape[:-1].numel(), x.shape[-1] // _mxfp4.BLOCK
    round_before_weight, round_result = _roundings(x, weight, cast_order, norm_dtype)
    x, x_stride = _aligned_rows(x)
    residual_stride = None
    if residual is not None:
        residual, residual_stride = _aligned_rows(residual)
    if weight is not None:
        weight, _ = _aligned_rows(weight)
    gpu = arch.of(x.device)
    chosen, programs = norm_kernel.launch_options(
        rows,
        row_blocks,
        x.dtype,
        None if weight is None else weight.dtype,
        residual is not None,
        None if norm is None else norm.dtype,
        cast_order,
        gpu,
    )
    options: dict[str, Any] = {**chosen}
    with _launch.on_device_of(x):
        _launch.launch(
            norm_kernel.rmsnorm_mxfp4_quant,
            (programs,),
            x,
            residual,
            weight,
            into.codes,
            into.scales,
            total,
            norm,
            x_stride,
            residual_stride,
            rows,
            eps,
            ROW_BLOCKS=row_blocks,
            SCALE_ADDEND=_mxfp4.SCALE_ADDEND[scale_mode],
            ROUND_BEFORE_WEIGHT=round_before_weight,
            ROUND_RESULT=round_result,
            ISA=gpu.isa,
            **into.constants,
            **options,
        )


def _launch_gated(
    gate: Tensor,
    up: Tensor,
    activation: str,
    cast_order: str,
    act_dtype: torch.dtype | None,
    scale_mode: str,
    into: Destination,
    act: Tensor | None,
) -> None:
    n = gate.shape[-1]
    blocks, row_blocks = gate.numel() // _mxfp4.BLOCK, n // _mxfp4.BLOCK
    if blocks == 0:
        return
    dtype = gate.dtype
    gate, gate_stride = _aligned_rows(gate)
    up, up_stride = _aligned_rows(up)
    in_order = into.token_tiles is not None
    flat = not in_order and (blocks == row_blocks or (gate_stride, up_stride) == (n, n))
    gpu = arch.of(gate.device)
    options: dict[str, Any] = gated_kernel.launch_options(blocks // row_blocks, row_blocks, gpu)
    tile = options["TILE_BLOCKS"]
    grid, masked = (-(-blocks // tile), 1), blocks % tile != 0
    if in_order:
        grid, masked = into.programs(blocks // row_blocks, row_blocks, tile)
    with _launch.on_device_of(gate):
        _launch.launch(
            gated_kernel.silu_mul_mxfp4_quant,
            grid,
            gate,
            up,
            into.codes,
            into.scales,
            act,
            None if flat else gate_stride,
            None if flat else up_stride,
            None if flat else row_blocks,
            blocks,
            MASKED=masked,
            ACTIVATION=activation,
            # In float32 there is nothing to round.
            CAST_ORDER="mul_cast" if dtype == torch.float32 else cast_order,
            ROUND_RESULT=act_dtype in (None, dtype),
            SCALE_ADDEND=_mxfp4.SCALE_ADDEND[scale_mode],
            K_BLOCKS=row_blocks if in_order else None,
            ISA=gpu.isa,
            **into.constants,
            **options,
        )


def _aligned_rows(x: Tensor) -> tuple[Tensor, int]:
    """_single_row_stride, and every row starts at a multiple of 4 bytes: the kernels load 32-bit words.

    From 16 bytes on loads are as wide as they get. Triton sees that for itself.
    """
    rows, stride = _single_row_stride(x)
    if rows.element_size() == 2 and (stride % 2 or rows.data_ptr() % 4):
        rows = x.clone(memory_format=torch.contiguous_format)
        stride = x.shape[-1]
    return rows, stride


def _single_row_stride(x: Tensor) -> tuple[Tensor, int]:
    """``x [..., N]``, or a contiguous copy of it, and the one distance between its consecutive rows."""
    n = x.shape[-1]
    distances = _row_distances(x)
    if x.stride(-1) == 1 and len(distances) <= 1:
        return x, distances[0][1] if distances else n
    return x.contiguous(), n


def _groups_of_rows(x: Tensor) -> tuple[int, int, int] | None:
    """Rows in a group, the distance of groups, and that of rows in one; None if rows lie at one distance, or at three.

    So lies ``x.transpose(0, 1)`` of heads first: tokens are the groups. Rows start at multiples of 4 bytes, as above.
    """
    distances = _row_distances(x)
    if len(distances) != 2 or x.stride(-1) != 1:
        return None
    (_, group_stride), (group_rows, row_stride) = distances
    if x.element_size() == 2 and (group_stride % 2 or row_stride % 2 or x.data_ptr() % 4):
        return None
    return group_rows, group_stride, row_stride


def _row_distances(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the leading axes, those that are one in memory taken together."""
    distances: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        # A dimension of size 1 is never stepped along, so its stride means nothing.
        if size != 1:
            if distances and distances[-1][1] == size * stride:
                distances[-1] = (distances[-1][0] * size, stride)
            else:
                distances.append((size, stride))
    return distances
