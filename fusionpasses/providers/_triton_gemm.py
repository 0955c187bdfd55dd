"""The Triton provider's adapters of ``mxfp4_gemm`` and ``mxfp4_gemm_a16w4``.

Few tokens: a kernel of ours, from codes to sums. Many: the weight as bfloat16 in scratch, for this call only, and
torch's product (cuBLAS, hipBLASLt). Which one is a function of the number of tokens and the architecture, so of nothing
that is in device memory; the numbers multiplied are the same in both, exactly those that codes and scales mean.

No kernel here reads layouts "shuffled" and "shuffled_scales": bytes that are elsewhere than in "linear" are put back
in its order for the call, in scratch.

x that is not bfloat16 is taken apart into two (float16) or three (float32) tensors of bfloat16 whose sum it is, but for
what is below 2**-133. Their products are exact, too, and are added in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusionpasses.kernels import _mxfp4_words, arch, gemm_choice, mxfp4_dequantize, mxfp4_gemm
from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.providers import _destination, _launch, _triton_gemm_dot, _triton_gemm_wgmma
from fusionpasses.providers._destination import Destination
from fusionpasses.providers._product import Product

#: bfloat16 numbers that a number of x is the sum of, at most.
_PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def _mxfp4_gemm(
    x_codes: Tensor,
    x_scales: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    layout: str = "linear",
    rows: int | None = None,
    shift: int = 0,
) -> Tensor:
    n = w_codes.shape[0] if rows is None else rows
    out = x_codes.new_empty((*x_codes.shape[:-1], n), dtype=out_dtype)
    tokens, width = x_codes.shape[:-1].numel(), x_codes.shape[-1] * 2
    if out.numel() == 0:
        return out
    x_codes, x_scales = _whole_words(x_codes.contiguous()), x_scales.contiguous()
    w_codes, w_scales, layout = _whole_weight(w_codes, w_scales, layout)
    gpu = arch.of(x_codes.device)
    with _launch.on_device_of(x_codes):
        launch_chosen(Product(x_codes, x_scales, w_codes, w_scales, bias, out, tokens, n, width, layout, shift, gpu))
    return out


def _mxfp4_gemm_a16w4(
    x: Tensor,
    w_codes: Tensor,
    w_scales: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str = "linear",
    rows: int | None = None,
    shift: int = 0,
) -> Tensor:
    n = w_codes.shape[0] if rows is None else rows
    out = x.new_empty((*x.shape[:-1], n))
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    if out.numel() == 0:
        return out
    x = _whole_rows(x)
    w_codes, w_scales, layout = _whole_weight(w_codes, w_scales, layout)
    product = Product(x, None, w_codes, w_scales, bias, out, tokens, n, width, layout, shift, arch.of(x.device))
    pieces = _PIECES[x.dtype]
    with _launch.on_device_of(x):
        if pieces > 1:
            summands = _launch.scratch(x, (pieces, tokens, width), torch.bfloat16)
            _launch.torch_call(_take_apart, x, summands)
            sums = _launch.scratch(x, (pieces, tokens, n), torch.float32)
            launch_chosen(product._replace(x=summands, bias=None, out=sums, tokens=pieces * tokens))
            _launch.torch_call(_add_up, sums, out, *_given(bias))
        else:
            launch_chosen(product)
    return out


def then_gemm(quant: Callable[..., tuple[Any, ...]], *, any_axes: bool = False) -> Callable[..., Any]:
    """The adapter of a quant and the product of what it gives.

    ``quant`` is that of the quant, which takes ``into`` and, if ``any_axes``, ``axes``. A product that begins by
    putting codes in order gets numbers in that order from the quant: a launch less.
    """

    def run(
        x: Tensor,
        *args: Any,
        w_codes: Tensor,
        w_scales: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype,
        layout: str = "linear",
        rows: int | None = None,
        shift: int = 0,
        axes: int = 1,
        **kwargs: Any,
    ) -> Any:
        n = w_codes.shape[0] if rows is None else rows
        out = x.new_empty((*x.shape[:-axes], n), dtype=out_dtype)
        tokens, width = x.shape[:-axes].numel(), x.shape[-axes:].numel()
        gpu = arch.of(x.device)
        with _launch.on_device_of(x):
            # Before the quant: the product reads the weight while that still runs.
            w_codes, w_scales, layout = _whole_weight(w_codes, w_scales, layout)
            may = out.numel() and (axes == 1 or any_axes)
            into = _destination_of_quant(x, tokens, n, width, layout, gpu) if may else None
            if into is None or w_codes.data_ptr() % 16 or w_scales.data_ptr() % 16:
                into = _destination.in_scratch(x)
            if any_axes:
                kwargs["axes"] = axes
            _, _, *rest = quant(x, *args, **kwargs, into=into)
            if out.numel():
                ordered = None if into.token_tiles is None else into
                scales = into.scales if ordered is None else None
                product = Product(
                    into.codes, scales, w_codes, w_scales, bias, out, tokens, n, width, layout, shift, gpu, ordered
                )
                launch_chosen(product)
        return (out, *rest) if rest else out

    return run


def _destination_of_quant(
    x: Tensor, tokens: int, rows: int, width: int, layout: str, gpu: arch.Arch
) -> Destination | None:
    choice = gemm_choice.choose(tokens, rows, width, gpu, w4a4=True, layout=layout)
    if gemm_choice.token_order(choice, tokens, rows, width, layout) is None:
        return None
    return destination_of(choice, x, tokens, width)


def destination_of(choice: gemm_choice.Choice, x: Tensor, tokens: int, width: int) -> Destination:
    """Scratch for tokens as the product of this choice puts them in order."""
    if choice.kernel == "mxfp4_gemm":
        return destination(x, tokens, width)
    return _triton_gemm_wgmma.destination(x, tokens, width, choice.options)


#: The adapter of each op (``packet.overload``): the op's arguments without ``provider``, already checked.
ADAPTERS: dict[str, Callable[..., Any]] = {
    "mxfp4_gemm.default": _mxfp4_gemm,
    "mxfp4_gemm_a16w4.default": _mxfp4_gemm_a16w4,
}


def launch_chosen(product: Product) -> None:
    """Launch the product by the kernel that is chosen for it."""
    x, x_scales, w_codes, w_scales, bias, out, tokens, rows, width, layout, shift, gpu, ordered = product
    w4a4 = x_scales is not None or ordered is not None
    kernel, options, _ = gemm_choice.choose(tokens, rows, width, gpu, w4a4=w4a4, layout=layout)
    if kernel == "mxfp4_gemm":
        _multiply(product, options, in_order=w4a4 and not mxfp4_gemm.decodes_tokens(tokens, rows, width))
    elif kernel == "mxfp4_gemm_wgmma":
        _triton_gemm_wgmma.multiply(product, options)
    elif kernel == "mxfp4_gemm_dot":
        _triton_gemm_dot.multiply(product, options)
    else:
        if x_scales is not None:
            codes, x = x, _launch.scratch(x, (tokens, width), torch.bfloat16)
            _dequantize(codes, x_scales, x, "linear", 0, gpu)
        values = _launch.scratch(w_codes, (rows, width), torch.bfloat16)
        _dequantize(w_codes, w_scales, values, layout, shift, gpu)
        _by_torch(x, values, bias, out)


def _multiply(product: Product, options: dict[str, Any], *, in_order: bool) -> None:
    """By ``mxfp4_gemm``; ``in_order``: codes of x are made bfloat16 first, in the order in which threads load it."""
    x, x_scales, w_codes, w_scales, bias, out, tokens, rows, width, layout, shift, gpu, ordered = product
    stride: int | None = None
    if ordered is not None:
        x, x_scales = ordered.codes, None
    elif in_order:
        x, x_scales = _in_order(product), None
    else:
        stride = product.x_stride
    if w_codes.data_ptr() % 16 or w_scales.data_ptr() % 16:
        options = options | {"STAGES": 0}  # what is not aligned cannot be copied to shared memory
    split = options["SPLIT"]
    sums = out if split == 1 else _launch.scratch(x, (split, tokens, rows), torch.float32)
    token_tile, row_tile = 8 * options["TOKEN_TILES"], _mxfp4_weight.TILE_ROWS * options["ROW_TILES"]
    _launch.launch(
        mxfp4_gemm.mxfp4_gemm,
        (-(-tokens // token_tile), -(-rows // row_tile), split),
        x,
        x_scales,
        w_codes,
        w_scales,
        bias if split == 1 else None,
        sums,
        tokens,
        rows,
        stride,
        2.0**shift if split == 1 else 1.0,
        K=width,
        LAYOUT=_LAYOUT[layout],
        ISA=gpu.isa,
        **options,
    )
    if split > 1:
        _triton_gemm_dot.add_up(sums, bias, out, tokens, rows, shift, gpu)


def destination(x: Tensor, tokens: int, width: int) -> Destination:
    """Scratch for tokens in the order of ``mxfp4_gemm``."""
    shape = -(-tokens // 8), -(-width // _mxfp4_weight.TILE_WIDTH), 8 * _mxfp4_weight.TILE_WIDTH
    return Destination(_launch.scratch(x, shape, torch.bfloat16), None, 0)


def _in_order(product: Product) -> Tensor:
    """MXFP4 x as bfloat16, in the order in which the kernel's threads load it, in scratch."""
    tokens, width = product.tokens, product.width
    out, warps = destination(product.x, tokens, width).codes, 4
    _launch.launch(
        mxfp4_gemm.mxfp4_gemm_arrange,
        (-(-out.shape[1] // warps), out.shape[0]),
        product.x,
        product.x_scales,
        out,
        tokens,
        width // 2,
        width // _mxfp4.BLOCK,
        K=width,
        LAYOUT=_LAYOUT[product.layout],
        WARPS=warps,
        ISA=product.gpu.isa,
        num_warps=warps,
        enable_fp_fusion=False,
        launch_pdl=True,
    )
    return out


def _dequantize(codes: Tensor, scales: Tensor, out: Tensor, layout: str, shift: int, gpu: arch.Arch) -> None:
    words = codes.numel() // 4
    options: dict[str, Any] = {**mxfp4_dequantize.dequantize_options(gpu)}
    _launch.launch(
        mxfp4_dequantize.mxfp4_dequantize,
        (-(-words // (options["UNROLLED"] * options["LANES"])),),
        codes,
        scales,
        out,
        words,
        out.shape[0],
        shift,
        K=out.shape[1],
        LAYOUT=_LAYOUT[layout],
        ISA=gpu.isa,
        **options,
    )


def _by_torch(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    in_float32 = out.dtype != torch.bfloat16 or bias is not None
    _launch.torch_call(_multiply_in_float32 if in_float32 else _multiply_matrices, x, w, out, *_given(bias))


def _given(bias: Tensor | None) -> tuple[Tensor, ...]:
    return () if bias is None else (bias,)


def _multiply_matrices(x: Tensor, w: Tensor, out: Tensor) -> None:
    torch.mm(x.reshape(-1, x.shape[-1]), w.t(), out=out.view(-1, out.shape[-1]))


def _multiply_in_float32(x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Sums, then the bias, then one rounding."""
    sums = _float32_product(x.reshape(-1, x.shape[-1]), w)
    if bias is not None:
        sums += bias.float()
    out.view(sums.shape).copy_(sums)


def _float32_product(x: Tensor, w: Tensor) -> Tensor:
    if x.is_cuda and torch.version.hip is None:
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return torch.mm(x.float(), w.t().float())


def _take_apart(x: Tensor, summands: Tensor) -> None:
    """Summands of bfloat16 whose sum is x: each is what is left, cut after bfloat16's bits. Inf is the first, alone."""
    rest = x.reshape(-1, x.shape[-1]).float()
    for i, summand in enumerate(summands):
        cut = (rest.view(torch.int32) & -0x10000).view(torch.float32)
        # A NaN may have all its payload in the bits that are cut.
        cut = torch.where(rest.isfinite(), cut, rest)
        summand.copy_(cut)
        if i + 1 < len(summands):
            rest = torch.where(rest.isfinite(), rest - cut, 0.0)


def _add_up(sums: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    if bias is not None:
        total = total + bias.float()
    out.view(total.shape).copy_(total)


def _whole_words(bytes_: Tensor) -> Tensor:
    """Bytes, or a copy of them: the kernels load four at once, of which the first must be at a multiple of four."""
    return bytes_ if bytes_.data_ptr() % 4 == 0 else bytes_.clone()


def _whole_weight(codes: Tensor, scales: Tensor, layout: str) -> tuple[Tensor, Tensor, str]:
    """A weight in a layout that kernels read, from addresses from which they can, and which layout."""
    if layout in _mxfp4_weight.SHUFFLED:
        width = scales.shape[1]
        of_blocks = _launch.scratch(codes, (codes.numel() * 2 // width, width // _mxfp4.BLOCK), torch.uint8)
        _launch.torch_call(_unshuffle_scales, scales, of_blocks)
        if layout == "shuffled":
            in_order = _launch.scratch(codes, (len(of_blocks), width // 2), torch.uint8)
            _launch.torch_call(_unshuffle_codes, codes, in_order)
            codes = in_order
        return _whole_words(codes), of_blocks, "linear"
    # Scales as checkpoints have them are loaded one by one.
    return _whole_words(codes), scales if layout == "linear" else _whole_words(scales), layout


def _unshuffle_codes(codes: Tensor, out: Tensor) -> None:
    source = _mxfp4_weight.codes_in_order(codes, out.shape[1] * 2)
    out.view(source.shape).copy_(source)


def _unshuffle_scales(scales: Tensor, out: Tensor) -> None:
    source = _mxfp4_weight.scales_in_order(scales)
    out.view(source.shape).copy_(source)


def _whole_rows(x: Tensor) -> Tensor:
    """x, or a copy of it: contiguous, or two-dimensional with rows that start at words."""
    if x.is_contiguous() and x.data_ptr() % 4 == 0:
        return x
    if x.dim() == 2 and x.stride(1) == 1 and x.stride(0) % 2 == 0 and x.data_ptr() % 4 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


_LAYOUT = {"linear": _mxfp4_words.LINEAR.value, "tiles": _mxfp4_words.TILES.value}
