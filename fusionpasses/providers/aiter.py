"""The AITER provider: AMD's kernels, for the calls of which they give exactly what our ops mean.

Two names in a graph mean this module. "aiter" runs a call by AITER where ``_aiter_rules.accepts`` proves from metadata
that its bytes are ours; "aiter_finite" also where they are ours unless something is Inf or NaN, or as large as
1.75 * 2**127, which a user promises by asking for it. Any other call is run by the Triton provider, here, at run time:
AITER's answer to it would be wrong, or memory corrupted, so the rule is part of what the two names mean.

Where it stands on the numerics contract of the ops, beside ``_aiter_numerics.NUMERICS``:

- The norm ops: given the same ``rsqrt(mean(x**2) + eps)``, the same bytes. That number is the GPU's own rsqrt of a sum
  in AITER's order.
- ``silu_mul_mxfp4_quant``: given the same activation, which is ``x / (1 + exp2(-(x * 1.44269504)))``: the rounding of
  the exponent costs up to ``2 * abs(x)`` half ulp for negative x, on top of those of exp2, sum and quotient.
- ``mxfp4_gemm``: sums in float32 in an order that depends on the number of tokens.

AITER allocates its outputs. Its torch ops declare every argument as mutated, which is lost on a graph that holds ours
alone, and tell autograd of none of them; it is told of the cache here.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusionpasses._aiter_numerics import CAPABILITY, function_for
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.kernels import arch
from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.probes import Verdict
from fusionpasses.providers import _aiter_import, _aiter_rules, triton
from fusionpasses.providers._aiter_rules import row_stride, slot_stride

log = logging.getLogger(__name__)

#: ``run(function, release, arguments)``: one call of AITER, its results as our contract has them.
_Run = Callable[[Callable[..., Any], str, dict[str, Any]], Any]


def _dynamic_mxfp4_quant(
    function: Callable[..., Any], release: str, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    x = arguments["x"]
    return _conformed(x, *function(_matrix(x)))


def _fused_rms(
    function: Callable[..., Any], release: str, arguments: dict[str, Any], with_norm: bool
) -> tuple[Tensor | None, ...]:
    """codes, scales, sum and norm; the last two are None where there are none."""
    x, residual = arguments["x"], arguments.get("residual")
    options: dict[str, Any] = {}
    if residual is not None:
        options["res1"] = _matrix(residual)
    if with_norm:
        options["output_unquantized_inp1"] = True
    returned = function(_matrix(x), arguments["weight"], arguments["eps"], **options)
    (codes, scales), *rest = returned
    # old: out2, out_res1. new: out1, out2, out_res1.
    norm = rest[0] if release == "new" else None
    total = rest[-1]
    return (
        *_conformed(x, codes, scales),
        None if residual is None else total.view(x.shape),
        None if norm is None else norm.view(x.shape),
    )


def _rmsnorm(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    return _fused_rms(function, release, arguments, False)[:2]


def _rmsnorm_with_norm(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    codes, scales, _, norm = _fused_rms(function, release, arguments, True)
    return codes, scales, norm


def _rmsnorm_add(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    return _fused_rms(function, release, arguments, False)[:3]


def _rmsnorm_add_with_norm(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    return _fused_rms(function, release, arguments, True)


def _silu_mul(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    gate = arguments["gate"]
    n, rows = gate.shape[-1], gate.shape[:-1].numel()
    both = gate.as_strided((rows, 2 * n), (_stride(gate), gate.stride(-1)))
    return _conformed(gate, *function(both, arguments["activation"]))


def _rope_absorbed(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Tensor:
    positions, cos, k_pe = arguments["positions"], arguments["cos"], arguments["k_pe"]
    if positions is None:
        positions = torch.arange(cos.shape[0], device=cos.device)
    else:
        # AITER would read before the table for those that count from the end, and anywhere for those out of range.
        positions = torch.remainder(positions.long(), cos.shape[0])
    q: Tensor = _write_cache(
        function,
        arguments,
        q_nope=arguments["q_nope"],
        q_pe=arguments["q_pe"],
        k_pe=k_pe,
        positions=positions,
        cos=cos,
        sin=arguments["sin"],
        neox=arguments["style"] == "neox",
    )
    return q


def _concat(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> None:
    """By the rope function: tokens that have no query are written as they are."""
    kv_c, k_pe = arguments["kv_c"], arguments["k_pe"]
    nothing = kv_c.new_empty((1, k_pe.shape[-1]))
    _write_cache(
        function,
        arguments,
        q_nope=kv_c.new_empty((0, 1, kv_c.shape[-1])),
        q_pe=kv_c.new_empty((0, 1, k_pe.shape[-1])),
        k_pe=k_pe,
        positions=arguments["slots"],  # never read
        cos=nothing,
        sin=nothing,
        neox=True,
    )


def _write_cache(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    q_nope: Tensor,
    q_pe: Tensor,
    k_pe: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    neox: bool,
) -> Tensor:
    cache, kv_c, slots = arguments["kv_cache"], arguments["kv_c"], arguments["slots"]
    capacity, width = cache.shape[:-1].numel(), cache.shape[-1]
    flat = cache.as_strided((capacity, 1, width), (_slots(cache), width, 1))
    # AITER writes wherever a slot out of range points.
    slots = torch.where(slots < capacity, slots, -1)
    q, *_ = function(
        q_nope,
        q_pe,
        kv_c.unsqueeze(1),
        k_pe if k_pe.dim() == 3 else k_pe.unsqueeze(1),
        flat,
        slots,
        positions,
        cos,
        sin,
        kv_c.new_empty(1, dtype=torch.float32),  # the scale, never read; old releases cannot be given None
        neox,
        # Only 0 and all of the tokens are safe: in between, AITER writes out of bounds.
        num_decode_toks_for_zeros=0,
        apply_scale=False,
    )
    torch.autograd.graph.increment_version((cache,))
    return q  # type: ignore[no-any-return]


def _gemm(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    x_codes, x_scales, out_dtype = arguments["x_codes"], arguments["x_scales"], arguments["out_dtype"]
    w_codes, w_scales = arguments["w_codes"], arguments["w_scales"]
    if arguments["layout"] == "linear":
        out = function(_matrix(x_codes), w_codes, _matrix(x_scales), w_scales, out_dtype)
        return out.view(*x_codes.shape[:-1], w_codes.shape[0])
    codes, scales = _matrix(x_codes), _matrix(x_scales)
    tile = _tile(function, arguments)
    if len(scales) >= _aiter_rules.MANY_TOKENS:
        scales = torch.nn.functional.pad(scales, (0, 0, 0, -len(scales) % _aiter_rules.SCALE_ROWS), value=127)
        scales = _mxfp4_weight.shuffled_scales(scales)
    out = function(codes, w_codes, scales, w_scales, out_dtype, None, tile)
    return out.view(*x_codes.shape[:-1], arguments["rows"])


def _tile(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The tile of AITER's table for a product of a shuffled weight, all of K in one program.

    Where it has parts of K, AITER takes K for twice as long and reads beyond the rows of both operands: sums were NaN
    with 2 and 4 parts, in the interpreter.
    """
    x = arguments["x_codes"]
    sizes = x.shape[:-1].numel(), arguments["rows"], x.shape[-1]
    tile, _ = sys.modules[function.__module__]._get_config(*sizes, True)
    return {**tile, "NUM_KSPLIT": 1}


_RUN: dict[str, _Run] = {
    "dynamic_mxfp4_quant.default": _dynamic_mxfp4_quant,
    "rmsnorm_mxfp4_quant.default": _rmsnorm,
    "rmsnorm_mxfp4_quant.with_norm": _rmsnorm_with_norm,
    "rmsnorm_add_mxfp4_quant.default": _rmsnorm_add,
    "rmsnorm_add_mxfp4_quant.with_norm": _rmsnorm_add_with_norm,
    "silu_mul_mxfp4_quant.default": _silu_mul,
    "fused_rope_mla_kv_cache.absorbed": _rope_absorbed,
    "concat_and_cache_mla.default": _concat,
    "mxfp4_gemm.default": _gemm,
}


def judge(op: str, arguments: dict[str, Any], *, finite: bool) -> Verdict:
    """Would this call be run by AITER? Imports it.

    Raises:
        ProviderUnavailable: AITER cannot be imported, or what it has is of no known release.
    """
    name = function_for(op, arguments)
    try:
        function, release = _aiter_import.load(name)
    except ProviderUnavailable as error:
        if name == CAPABILITY[op]:
            raise
        return Verdict(False, str(error))  # other calls of the op are AITER's
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    target = _aiter_rules.Target(arch.of(device).name, _keeps_zeros())
    answer = _aiter_rules.accepts(op, arguments, release, target, finite=finite)
    if answer and getattr(sys.modules.get(function.__module__), "_USE_GEMM_SPLITK_BF16", False):
        return Verdict(False, "set_use_gemm_splitk_bf16(True) was called: AITER rounds partial sums to bfloat16")
    if answer and arguments.get("layout") == "shuffled":
        reason = _tile_refused(function, arguments)
        return answer if reason is None else Verdict(False, reason)
    return answer


def _tile_refused(function: Callable[..., Any], arguments: dict[str, Any]) -> str | None:
    x = arguments["x_codes"]
    sizes = x.shape[:-1].numel(), arguments["rows"], x.shape[-1] * 2
    try:
        return _aiter_rules.tile_of_shuffled(_tile(function, arguments), *sizes)
    except Exception as error:  # no file of tiles for this GPU, or the table has changed
        return f"layout: got 'shuffled', and AITER's table of tiles failed with {type(error).__name__}: {error}"


@functools.cache
def _keeps_zeros() -> bool:
    from triton._C.libtriton import ir

    # Triton negates by this since it has it.
    return hasattr(ir.builder, "create_fneg")


def _adapter(op: str, finite: bool) -> Callable[..., Any]:
    run = _RUN[op]

    def adapter(*args: Any, **kwargs: Any) -> Any:
        arguments = bound(op, args, kwargs)
        answer = judge(op, arguments, finite=finite)
        if not answer:
            log.debug("%s by Triton: %s", op, answer.why)
            return triton.ADAPTERS[op](*args, **kwargs)
        function, release = _aiter_import.load(function_for(op, arguments))
        return run(function, release, arguments)

    return adapter


#: The adapter of each op (``packet.overload``): the op's arguments without ``provider``, already checked.
ADAPTERS = {op: _adapter(op, False) for op in _RUN}
FINITE_ADAPTERS = {op: _adapter(op, True) for op in _RUN}


@functools.cache
def _parameters(op: str) -> tuple[tuple[str, Any], ...]:
    packet, _, overload = op.partition(".")
    schema = getattr(getattr(torch.ops.fusionpasses, packet), overload)._schema
    return tuple((a.name, a.default_value) for a in schema.arguments if a.name != "provider")


def bound(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the schema's defaults."""
    names = _parameters(op)
    given = {name: value for (name, _), value in zip(names, args, strict=False)}
    return {**dict(names), **given, **kwargs}


def _stride(x: Tensor) -> int:
    stride = row_stride(x)
    if stride is None:
        raise RuntimeError("rows that are not evenly apart were accepted")
    return stride


def _slots(cache: Tensor) -> int:
    stride = slot_stride(cache)
    if stride is None:
        raise RuntimeError("slots that are not evenly apart were accepted")
    return stride


def _matrix(x: Tensor) -> Tensor:
    """``x [..., N]`` as ``[rows, N]``, without a copy."""
    return x.as_strided((x.shape[:-1].numel(), x.shape[-1]), (_stride(x), x.stride(-1)))


def _conformed(x: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """AITER's codes and scales of ``x [..., N]`` in our shapes, contiguous: its scales may be transposed."""
    code_shape, scale_shape = _mxfp4.packed_shapes(x)
    return codes.contiguous().view(code_shape), scales.contiguous().view(scale_shape)
