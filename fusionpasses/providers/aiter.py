"""The AITER provider: AMD's kernels, for the calls of which they give what our ops mean, or as nearly as was asked for.

Three names in a graph mean this module. "aiter" runs a call by AITER where ``_aiter_rules.choose`` proves from metadata
that its bytes are ours; "aiter_finite" also where they are ours unless something is Inf or NaN, or as large as
1.75 * 2**127, which a user promises by asking for it; "aiter_fast" also where AITER keeps float32 and our contract
rounds, so that ordinary inputs give other bytes. Any other call is run by the Triton provider, here, at run time:
AITER's answer to it would be wrong, or memory corrupted, so the rule is part of what the names mean.

Where it stands on the numerics contract of the ops, beside ``_aiter_numerics.NUMERICS``:

- The norm ops: given the same ``rsqrt(mean(x**2) + eps)``, the same bytes. That number is the GPU's own rsqrt of a sum
  in AITER's order.
- ``silu_mul_mxfp4_quant``: given the same activation, which is ``x / (1 + exp2(-(x * 1.44269504)))``: the rounding of
  the exponent costs up to ``2 * abs(x)`` half ulp for negative x, on top of those of exp2, sum and quotient.
- ``mxfp4_gemm``: sums in float32 in an order that depends on the number of tokens.
- Asked for "aiter_fast", the norm ops quantise the float32 norm of the unrounded sum and ``silu_mul_mxfp4_quant`` the
  float32 product, of which the activation is that of AITER's own float32 steps; rotations are in float32, too.

AITER allocates its outputs. Its torch ops declare every argument as mutated, which is lost on a graph that holds ours
alone, and tell autograd of none of them; it is told of the cache here.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusionpasses._aiter_numerics import LEVELS, Level
from fusionpasses.kernels import arch
from fusionpasses.ops import _mxfp4, _mxfp4_weight
from fusionpasses.probes import Verdict
from fusionpasses.providers import _aiter_conditions, _aiter_import, _aiter_rules, _aiter_source, triton
from fusionpasses.providers._aiter_conditions import Target, row_stride, slot_stride

log = logging.getLogger(__name__)

#: ``run(function, release, arguments)``: one call of AITER, its results as our contract has them.
_Run = Callable[[Callable[..., Any], str, dict[str, Any]], Any]


def _dynamic_mxfp4_quant(
    function: Callable[..., Any], release: str, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    x = arguments["x"]
    return _conformed(x, *function(_matrix(x)))


def _fused_rms(
    function: Callable[..., Any], release: str, arguments: dict[str, Any], with_norm: bool = False
) -> dict[str, Tensor]:
    """What the ops return, by the names of their schemas; all that was asked for."""
    x, residual, x2 = arguments["x"], arguments.get("residual"), arguments.get("x2")
    options: dict[str, Any] = {}
    if residual is not None:
        options["res1"] = _matrix(residual)
    if x2 is not None:
        options |= {"x2": _matrix(x2), "x2_weight": arguments["weight2"], "x2_epsilon": arguments["eps2"]}
    if with_norm:
        options["output_unquantized_inp1"] = True
    (codes, scales), *rest = function(_matrix(x), arguments["weight"], arguments["eps"], **options)
    # old: out2, out_res1. new: out1, out2, out_res1.
    norm, norm2, total = rest if release == "new" else (None, *rest)
    returned = dict(zip(("codes", "scales"), _conformed(x, codes, scales), strict=True))
    for name, given in (("sum", total), ("norm", norm), ("norm2", norm2)):
        if given is not None:
            returned[name] = given.view(*x.shape[:-1], given.shape[-1])
    return returned


def _rmsnorm(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    returned = _fused_rms(function, release, arguments)
    return returned["codes"], returned["scales"]


def _rmsnorm_with_norm(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    returned = _fused_rms(function, release, arguments, with_norm=True)
    return returned["codes"], returned["scales"], returned["norm"]


def _rmsnorm_with_second(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    returned = _fused_rms(function, release, arguments)
    return returned["codes"], returned["scales"], returned["norm2"]


def _rmsnorm_add(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    returned = _fused_rms(function, release, arguments)
    return returned["codes"], returned["scales"], returned["sum"]


def _rmsnorm_add_with_norm(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    returned = _fused_rms(function, release, arguments, with_norm=True)
    return returned["codes"], returned["scales"], returned["sum"], returned["norm"]


def _silu_mul(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    gate = arguments["gate"]
    n, rows = gate.shape[-1], gate.shape[:-1].numel()
    both = gate.as_strided((rows, 2 * n), (_stride(gate), gate.stride(-1)))
    return _conformed(gate, *function(both, _aiter_conditions.ACTIVATIONS[arguments["activation"]]))


def _rope_absorbed(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Tensor:
    q: Tensor = _write_cache(
        function,
        arguments,
        q_nope=arguments["q_nope"],
        q_pe=arguments["q_pe"],
        k_pe=arguments["k_pe"],
        positions=_positions(arguments),
        cos=arguments["cos"],
        sin=arguments["sin"],
        neox=arguments["style"] == "neox",
    )
    return q


def _rope_absorbed_hip(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Tensor:
    q_nope, q_pe, k_pe = arguments["q_nope"], arguments["q_pe"], arguments["k_pe"]
    kv_c, cache = arguments["kv_c"], arguments["kv_cache"]
    q: Tensor = q_nope.new_empty((*q_pe.shape[:2], q_nope.shape[2] + q_pe.shape[2]))
    one = kv_c.new_ones(1, dtype=torch.float32)  # the scales: read, and of no effect on a cache of the model's dtype
    function(
        q_nope,
        q_pe,
        kv_c,
        k_pe if k_pe.dim() == 2 else k_pe.squeeze(1),
        cache if cache.dim() == 3 else cache.unsqueeze(1),
        q,
        _slots_inside(arguments).long().contiguous(),
        one,
        one,
        _positions(arguments).contiguous(),
        arguments["cos"],
        arguments["sin"],
        arguments["style"] == "neox",
        True,  # q_nope, and kv_c, come first
        # Else AITER does not write the query of a token without a slot.
        compute_all_q_rope=True,
    )
    torch.autograd.graph.increment_version((cache,))
    return q


def _positions(arguments: dict[str, Any]) -> Tensor:
    """Rows of cos and sin as int64, within the table: AITER would read before it, or somewhere, or take the nearest."""
    positions, cos = arguments["positions"], arguments["cos"]
    if positions is None:
        return torch.arange(cos.shape[0], device=cos.device)
    return torch.remainder(positions.long(), cos.shape[0])


def _slots_inside(arguments: dict[str, Any]) -> Tensor:
    """-1 for slots beyond the cache: AITER writes wherever a slot out of range points."""
    cache, slots = arguments["kv_cache"], arguments["slots"]
    return torch.where(slots < cache.shape[:-1].numel(), slots, -1)


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
    cache, kv_c = arguments["kv_cache"], arguments["kv_c"]
    capacity, width = cache.shape[:-1].numel(), cache.shape[-1]
    flat = cache.as_strided((capacity, 1, width), (_slots(cache), width, 1))
    q, *_ = function(
        q_nope,
        q_pe,
        kv_c.unsqueeze(1),
        k_pe if k_pe.dim() == 3 else k_pe.unsqueeze(1),
        flat,
        _slots_inside(arguments),
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
    x_codes, w_codes = arguments["x_codes"], arguments["w_codes"]
    x, x_scales = _matrix(x_codes), _matrix(arguments["x_scales"])
    out = function(x, w_codes, x_scales, arguments["w_scales"], arguments["out_dtype"])
    return out.view(*x_codes.shape[:-1], w_codes.shape[0])


def _gemm_shuffled(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    return _multiply_shuffled(function, arguments, _tile_of_shuffled(function, arguments))


def _gemm_shuffled_scales(function: Callable[..., Any], release: str, arguments: dict[str, Any]) -> Any:
    return _multiply_shuffled(function, arguments, _tile_of_shuffled_scales(function, arguments))


def _multiply_shuffled(function: Callable[..., Any], arguments: dict[str, Any], tile: dict[str, Any]) -> Any:
    """Tokens' scales are shuffled, too, where AITER's kernel reads them so: in tiles of 32 tokens and more."""
    x_codes, scales = arguments["x_codes"], _matrix(arguments["x_scales"])
    if tile["BLOCK_SIZE_M"] >= _aiter_conditions.MANY_TOKENS:
        scales = torch.nn.functional.pad(scales, (0, 0, 0, -len(scales) % _aiter_conditions.SCALE_ROWS), value=127)
        scales = _mxfp4_weight.shuffled_scales(scales)
    weight = arguments["w_codes"], arguments["w_scales"]
    out = function(_matrix(x_codes), weight[0], scales, weight[1], arguments["out_dtype"], None, tile)
    return out.view(*x_codes.shape[:-1], arguments["rows"])


class _Tiles(NamedTuple):
    """What a product takes its tile from AITER's table by, and what must hold of the tile."""

    of: Callable[[Callable[..., Any], dict[str, Any]], dict[str, Any]]
    refused: Callable[[dict[str, Any], int, int, int], str | None]


def _tile_of_shuffled(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The tile of AITER's table for a product of a shuffled weight, all of K in one program.

    Where it has parts of K, AITER takes K for twice as long and reads beyond the rows of both operands: sums were NaN
    with 2 and 4 parts, in the interpreter.
    """
    tile, _ = sys.modules[function.__module__]._get_config(*_sizes_in_table(arguments), True)
    return {**tile, "NUM_KSPLIT": 1}


def _tile_of_shuffled_scales(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The tile of AITER's table for a product of linear codes, as AITER will cut K.

    This function counts K right. Of a K that one step takes it would start programs that do nothing.
    """
    module = sys.modules[function.__module__]
    rows, n, half = _sizes_in_table(arguments)
    tile, _ = module._get_config(rows, n, half, False)
    parts = tile["NUM_KSPLIT"] if tile["BLOCK_SIZE_K"] < half * 2 else 1
    return {**tile, "NUM_KSPLIT": parts}


def _sizes_in_table(arguments: dict[str, Any]) -> tuple[int, int, int]:
    """Tokens, rows of the weight and bytes of a row of codes."""
    x = arguments["x_codes"]
    return x.shape[:-1].numel(), arguments["rows"], x.shape[-1]


#: By function of AITER's; "gemm_afp4wfp4" chooses by itself, and checks.
_TILES = {
    "gemm_afp4wfp4_preshuffle": _Tiles(_tile_of_shuffled, _aiter_conditions.tile_of_shuffled),
    "gemm_afp4wfp4_preshuffled_scales": _Tiles(_tile_of_shuffled_scales, _aiter_conditions.tile_of_shuffled_scales),
}

#: By op (``packet.overload``) and function of AITER, as ``_aiter_rules.RULES``.
_RUN: dict[tuple[str, str], _Run] = {
    ("dynamic_mxfp4_quant.default", "dynamic_mxfp4_quant"): _dynamic_mxfp4_quant,
    ("rmsnorm_mxfp4_quant.default", "fused_rms_mxfp4_quant"): _rmsnorm,
    ("rmsnorm_mxfp4_quant.with_norm", "fused_rms_mxfp4_quant"): _rmsnorm_with_norm,
    ("rmsnorm_mxfp4_quant.with_second", "fused_rms_mxfp4_quant"): _rmsnorm_with_second,
    ("rmsnorm_add_mxfp4_quant.default", "fused_rms_mxfp4_quant"): _rmsnorm_add,
    ("rmsnorm_add_mxfp4_quant.with_norm", "fused_rms_mxfp4_quant"): _rmsnorm_add_with_norm,
    ("silu_mul_mxfp4_quant.default", "act_mul_and_mxfp4_quant"): _silu_mul,
    ("fused_rope_mla_kv_cache.absorbed", "fused_qk_rope_cat_and_cache_mla"): _rope_absorbed,
    ("fused_rope_mla_kv_cache.absorbed", "fused_qk_rope_concat_and_cache_mla"): _rope_absorbed_hip,
    ("concat_and_cache_mla.default", "fused_qk_rope_cat_and_cache_mla"): _concat,
    ("mxfp4_gemm.default", "gemm_afp4wfp4"): _gemm,
    ("mxfp4_gemm.default", "gemm_afp4wfp4_preshuffle"): _gemm_shuffled,
    ("mxfp4_gemm.default", "gemm_afp4wfp4_preshuffled_scales"): _gemm_shuffled_scales,
}


def choose(op: str, arguments: dict[str, Any], level: Level) -> _aiter_rules.Choice:
    """Which function of AITER's would run this call, at what was asked for, and why. Imports those that might.

    Raises:
        ProviderUnavailable: AITER cannot be imported, or what it has is of no known release.
    """

    def look(name: str) -> tuple[str, str]:
        function, release = _aiter_import.load(name)
        refused = _aiter_source.refused(op, name, function, arguments)
        return release, refused or _refused_by_its_state(name, function, arguments)

    return _aiter_rules.choose(op, arguments, target(arguments), level=level, look=look)


def target(arguments: dict[str, Any]) -> Target:
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    return Target(arch.of(device).name, _keeps_zeros(), _rocm())


def judge(op: str, arguments: dict[str, Any], level: Level) -> Verdict:
    """Would this call be run by AITER? As ``choose``."""
    return choose(op, arguments, level).verdict


def _refused_by_its_state(name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Why a function must not run a call, by switches and tables of AITER's own; "" if it may."""
    if getattr(sys.modules.get(function.__module__), "_USE_GEMM_SPLITK_BF16", False):
        return "set_use_gemm_splitk_bf16(True) was called: AITER rounds partial sums to bfloat16"
    if name not in _TILES:
        return ""
    rows, n, half = _sizes_in_table(arguments)
    try:
        tile = _TILES[name].of(function, arguments)
        if tile["NUM_KSPLIT"] > 1:
            # The width of a step that AITER itself will take.
            _, depth, _ = sys.modules[function.__module__].get_splitk(half, tile["BLOCK_SIZE_K"], tile["NUM_KSPLIT"])
            tile = {**tile, "BLOCK_SIZE_K": depth}
        return _TILES[name].refused(tile, rows, n, half * 2) or ""
    except Exception as error:  # no file of tiles for this GPU, or the table has changed
        got = arguments["layout"]
        return f"layout: got {got!r}, and AITER's table of tiles failed with {type(error).__name__}: {error}"


@functools.cache
def _keeps_zeros() -> bool:
    from triton._C.libtriton import ir

    # Triton negates by this since it has it.
    return hasattr(ir.builder, "create_fneg")


def _rocm() -> int:
    """The first number of the version of ROCm that this torch is for, 0 if it is for none."""
    return int((torch.version.hip or "0").partition(".")[0])


def _adapter(op: str, level: Level) -> Callable[..., Any]:
    def adapter(*args: Any, **kwargs: Any) -> Any:
        arguments = bound(op, args, kwargs)
        name, answer = choose(op, arguments, level)
        if not answer:
            log.debug("%s by Triton: %s", op, answer.why)
            return triton.ADAPTERS[op](*args, **kwargs)
        function, release = _aiter_import.load(name)
        return _RUN[op, name](function, release, arguments)

    return adapter


#: By provider, the adapter of each op (``packet.overload``): the op's arguments without ``provider``, already checked.
ADAPTERS = {provider: {op: _adapter(op, level) for op, _ in _RUN} for provider, level in LEVELS.items()}


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
    # Through one dimension: a tensor that has an axis of size 1 is contiguous with any stride there.
    codes, scales = codes.contiguous().view(-1), scales.contiguous().view(-1)
    return codes.view(code_shape), scales.view(scale_shape)
