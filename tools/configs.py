"""What is compiled: calls of ops on GPUs, chosen so that every choice of the launch heuristics is among them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from fusionpasses.kernels import gemm_choice, mxfp4_gemm
from fusionpasses.kernels.arch import Arch
from tools.dot_configs import DotConfig, every_dot, some_dots
from tools.mlp_configs import MlpConfig, every_mlp, some_mlps
from tools.order_configs import OrderConfig, every_order, some_orders
from tools.pair_configs import PairConfig, every_pair, some_pairs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8 = torch.float8_e4m3fn

#: Op of each chain that ends in a quant.
CHAINS = {
    "quant": "dynamic_mxfp4_quant.default",
    "norm": "rmsnorm_mxfp4_quant.default",
    "norm, stored": "rmsnorm_mxfp4_quant.with_norm",
    "add+norm": "rmsnorm_add_mxfp4_quant.default",
    "add+norm, stored": "rmsnorm_add_mxfp4_quant.with_norm",
}
#: Op of each chain of a gated MLP that ends in a quant.
GATED_CHAINS = {
    "silu*mul": "silu_mul_mxfp4_quant.default",
    "silu*mul, stored": "silu_mul_mxfp4_quant.with_act",
}
#: Op of each kernel of a product, and the kernel.
GEMM_CHAINS = {
    "few tokens": ("mxfp4_gemm_a16w4.default", "mxfp4_gemm"),
    "tokens in order": ("mxfp4_gemm.default", "mxfp4_gemm_arrange"),
    "few tokens, in order": ("dynamic_mxfp4_quant.then_gemm", "mxfp4_gemm"),
    "some tokens": ("mxfp4_gemm_a16w4.default", "mxfp4_gemm_wgmma"),
    "tokens interleaved": ("mxfp4_gemm.default", "mxfp4_gemm_interleave"),
    "many tokens": ("mxfp4_gemm_a16w4.default", "mxfp4_dequantize"),
}
#: Op of each chain that ends in the MLA cache.
CACHE_CHAINS = {
    "rope+cache": "fused_rope_mla_kv_cache.default",
    "rope+cache, k": "fused_rope_mla_kv_cache.with_k",
    "absorbed": "fused_rope_mla_kv_cache.absorbed",
    "absorbed, k": "fused_rope_mla_kv_cache.absorbed_with_k",
    "bmm, absorbed": "fused_rope_mla_kv_cache.absorbed_bmm",
    "bmm, absorbed, k": "fused_rope_mla_kv_cache.absorbed_bmm_with_k",
    "cache write": "concat_and_cache_mla.default",
}

#: Elements between rows beyond their width. 2 of a 16-bit dtype: only 4 bytes of alignment are left.
LAYOUTS = {"contiguous": 0, "strided": 64, "off alignment": 2}

#: A layout of quants alone: as a bmm over heads gives them, with tokens brought first by a view.
HEADS_FIRST, HEADS = "heads first", 16


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU, in torch's and Triton's words."""

    backend: str
    arch: int | str
    warp_size: int
    processors: int


#: Multiprocessors: those of H200, B200, RTX PRO 6000, MI300X, MI355X, RX 7900 XTX, Ryzen AI Max+ 395, RX 9070 XT; those
#: of gfx1250 are not known.
TARGETS: dict[str, Target] = {
    "sm_90": Target("cuda", 90, 32, 132),
    "sm_100": Target("cuda", 100, 32, 148),
    "sm_120": Target("cuda", 120, 32, 188),
    "gfx942": Target("hip", "gfx942", 64, 304),
    "gfx950": Target("hip", "gfx950", 64, 256),
    "gfx1100": Target("hip", "gfx1100", 32, 48),
    "gfx1151": Target("hip", "gfx1151", 32, 20),
    "gfx1201": Target("hip", "gfx1201", 32, 32),
    "gfx1250": Target("hip", "gfx1250", 32, 256),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A call of a quant on a target, with or without a norm in front."""

    target: str
    chain: str
    dtype: str
    n: int
    rows: int
    layout: str = "contiguous"
    scale_mode: str = "even"
    weight: str = "same"  # its dtype: "same" as x's, "fp32" or "none"
    cast_order: str = "cast_scale"
    norm_dtype: str = "default"  # "default", "same" as x's, or "fp32"

    def __str__(self) -> str:
        rest = [self.layout, self.scale_mode]
        if self.chain != "quant":
            rest += [f"weight {self.weight}", self.cast_order, f"norm dtype {self.norm_dtype}"]
        return f"{self.target} {self.chain} {self.dtype} {self.rows} x {self.n} ({', '.join(rest)})"

    @property
    def sums(self) -> bool:
        """Do threads of a row exchange anything?"""
        return self.chain != "quant"

    def call(self) -> Call:
        dtype = DTYPES[self.dtype]
        arguments: list[Any] = [self._rows(dtype)]
        keywords: dict[str, Any] = {"scale_mode": self.scale_mode}
        if self.chain != "quant":
            if self.chain.startswith("add"):
                arguments.append(self._rows(dtype))
            weight = {"same": dtype, "fp32": torch.float32}.get(self.weight)
            arguments += [None if weight is None else torch.empty(self.n, dtype=weight, device="meta"), 1e-6]
            norm_dtypes = {"default": None, "same": dtype, "fp32": torch.float32}
            keywords |= {"cast_order": self.cast_order, "norm_dtype": norm_dtypes[self.norm_dtype]}
        return CHAINS[self.chain], arguments, keywords

    def _rows(self, dtype: torch.dtype) -> torch.Tensor:
        if self.layout == HEADS_FIRST:
            return torch.empty(HEADS, self.rows // HEADS, self.n, dtype=dtype, device="meta").transpose(0, 1)
        return _slice(self.rows, self.n, 0, LAYOUTS[self.layout], dtype)


def _slice(rows: int, n: int, before: int, after: int, dtype: torch.dtype) -> torch.Tensor:
    whole = torch.empty(rows, before + n + after, dtype=dtype, device="meta")
    return whole[:, before : before + n]


@dataclasses.dataclass(frozen=True)
class GatedConfig:
    """A call of an activation, a product and a quant on a target."""

    target: str
    chain: str
    dtype: str
    n: int
    rows: int
    halves: bool = True  # gate and up are slices of one tensor
    layout: str = "contiguous"
    scale_mode: str = "even"
    activation: str = "silu"
    cast_order: str = "cast_mul"
    act_dtype: str = "same"  # as gate's, or "fp32"

    sums = False

    def __str__(self) -> str:
        rest = ["halves" if self.halves else "apart", self.layout, self.scale_mode]
        rest += [self.activation, self.cast_order, f"act dtype {self.act_dtype}"]
        return f"{self.target} {self.chain} {self.dtype} {self.rows} x {self.n} ({', '.join(rest)})"

    def call(self) -> Call:
        dtype, apart = DTYPES[self.dtype], LAYOUTS[self.layout]
        after = self.n + apart if self.halves else apart
        gate = _slice(self.rows, self.n, 0, after, dtype)
        up = _slice(self.rows, self.n, self.n, apart, dtype) if self.halves else torch.empty_like(gate)
        keywords = {
            "activation": self.activation,
            # The sigmoid alone has a third one.
            "cast_order": self.cast_order if self.activation == "x_sigmoid" else self.cast_order.replace("each", "mul"),
            "act_dtype": dtype if self.act_dtype == "same" else torch.float32,
            "scale_mode": self.scale_mode,
        }
        return GATED_CHAINS[self.chain], [gate, up], keywords


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """A product, of whose launches one is compiled."""

    target: str
    chain: str
    tokens: int
    rows: int
    n: int  # elements in a row
    layout: str = "linear"
    codes: bool = False  # x is MXFP4
    bias: bool = False

    sums = False

    def __str__(self) -> str:
        rest = [self.layout, "codes" if self.codes else "bf16", "bias" if self.bias else "no bias"]
        return f"{self.target} {self.chain} {self.tokens}, {self.rows} x {self.n} ({', '.join(rest)})"

    def call(self) -> Call:
        codes: tuple[int, ...] = (self.rows, self.n // 2)
        scales: tuple[int, ...] = (self.rows, self.n // 32)
        keywords: dict[str, Any] = {}
        if self.layout == "tiles":
            tiles = (-(-self.rows // 16), -(-self.n // 128))
            codes, scales = (*tiles, 1024), (*tiles, 64)
            keywords = {"layout": "tiles", "rows": self.rows}
        empty = functools.partial(torch.empty, dtype=torch.uint8, device="meta")
        bias = torch.empty(self.rows, dtype=torch.bfloat16, device="meta") if self.bias else None
        weight = (empty(codes), empty(scales), bias)
        values = torch.empty(self.tokens, self.n, dtype=torch.bfloat16, device="meta")
        op, _ = GEMM_CHAINS[self.chain]
        if op.endswith("then_gemm"):
            named = dict(zip(("w_codes", "w_scales", "bias"), weight, strict=True))
            return op, [values], keywords | named | {"out_dtype": torch.bfloat16}
        if self.codes:
            x = (empty(self.tokens, self.n // 2), empty(self.tokens, self.n // 32))
            return "mxfp4_gemm.default", [*x, *weight], keywords | {"out_dtype": torch.bfloat16}
        return "mxfp4_gemm_a16w4.default", [values, *weight], keywords


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """A call of an op that writes to the MLA cache."""

    target: str
    chain: str
    dtype: str
    tokens: int
    heads: int
    sizes: str = "DeepSeek"  # of SIZES
    layout: str = "contiguous"
    style: str = "interleaved"
    angles: str = "same"  # their dtype: "same" as the rest, or "fp32"
    full: bool = False  # as many angles as elements
    table: bool = True  # and positions, or gathered angles
    cache: str = "flat"  # "flat", "paged", "paged apart" (blocks further apart than their slots), "two"
    cache_dtype: str = "same"  # or "fp8"
    scaling: str = "none"  # of float8: "none", "divide", "reciprocal"
    negative_slots: str = "skip"

    sums = False

    def __str__(self) -> str:
        cache = f"{self.cache} cache {self.cache_dtype}"
        rest = [self.sizes, self.layout, self.style, f"angles {self.angles}", "full" if self.full else "half"]
        rest += ["table" if self.table else "gathered", cache, self.scaling, self.negative_slots]
        return f"{self.target} {self.chain} {self.dtype} {self.tokens} x {self.heads} ({', '.join(rest)})"

    @property
    def n(self) -> int:
        """How long it takes to compile, beside a norm of that width."""
        return 4096

    def call(self) -> Call:
        dtype, tokens = DTYPES[self.dtype], self.tokens
        nope, latent, rope = SIZES[self.sizes]
        apart = LAYOUTS[self.layout]
        # Of odd widths rows are not aligned; indices are of 64 bits there, so that other loads of 8 bytes show here.
        index = torch.int32 if self.sizes == "DeepSeek" else torch.int64
        kv_c = _slice(tokens, latent, 1536, rope + apart, dtype)
        k_pe = _slice(tokens, rope, 1536 + latent, apart, dtype)
        cache_dtype = FP8 if self.cache_dtype == "fp8" else dtype
        width = latent + (0 if self.cache == "two" else rope)
        slots = torch.empty(tokens, dtype=index, device="meta")
        keywords: dict[str, Any] = {}
        if self.cache_dtype == "fp8" and self.scaling != "none":
            keywords |= {"cache_scale": torch.empty(1, device="meta"), "scaling": self.scaling}
        if self.cache == "two":
            keywords["pe_cache"] = torch.empty(4096, 64, rope, dtype=cache_dtype, device="meta")
        shape = (262144, width) if self.cache == "flat" else (4096, 64, width)
        cache = torch.empty(shape, dtype=cache_dtype, device="meta")
        if self.cache == "paged apart":
            cache = torch.empty(4096, 2, 64, width, dtype=cache_dtype, device="meta")[:, 1]
        if self.chain == "cache write":
            return CACHE_CHAINS[self.chain], [kv_c, k_pe, cache, slots], keywords
        angle_dtype = torch.float32 if self.angles == "fp32" else dtype
        angles = torch.empty(
            8192 if self.table else tokens, rope if self.full else rope // 2, dtype=angle_dtype, device="meta"
        )
        positions = torch.empty(tokens, dtype=index, device="meta") if self.table else None
        keywords |= {"style": self.style, "negative_slots": self.negative_slots, "positions": positions}
        q_pe = _slice(tokens * self.heads, rope, 128, apart, dtype).unflatten(0, (tokens, self.heads))
        arguments = [q_pe, k_pe, kv_c, cache, angles, angles, slots]
        if self.chain.startswith("bmm"):
            # Heads first, in rows that also hold q_pe.
            up = _slice(tokens * self.heads, 128, 0, rope + apart, dtype).unflatten(0, (tokens, self.heads))
            w_uk = torch.empty(self.heads, 128, nope, dtype=dtype, device="meta")
            arguments = [up.transpose(0, 1), w_uk, *arguments]
        elif self.chain.startswith("absorbed"):
            # As the absorbing bmm gives it: heads first.
            q_nope = _slice(self.heads * tokens, nope, 0, apart, dtype).unflatten(0, (self.heads, tokens))
            arguments.insert(0, q_nope.transpose(0, 1))
        return CACHE_CHAINS[self.chain], arguments, keywords


#: Widths of q_nope, kv_c and rope.
SIZES = {"DeepSeek": (512, 512, 64), "odd": (36, 33, 6)}

#: The op's name, and arguments without data.
Call = tuple[str, list[Any], dict[str, Any]]
AnyConfig = Config | GatedConfig | GemmConfig | CacheConfig | DotConfig | PairConfig | OrderConfig | MlpConfig


#: The grid on which the heuristics are asked: four widths from each power of two to the next, those of models between.
WIDTHS = sorted(
    {n for p in range(5, 16) for n in (q << p >> 2 for q in (4, 5, 6, 7)) if n % 32 == 0 and n <= 32768}
    | {2880, 5376, 18432}
)
#: Where one tile is chosen for several of these, it is compiled for the last.
ROWS = (1, 16384, 4096, 16, 64, 256, 1024)

_CAST_ORDERS = ("cast_scale", "scale_cast")

#: Factors of the subset of quants: every two values of two of them meet.
FACTORS: dict[str, tuple[Any, ...]] = {
    "target": tuple(TARGETS),
    "chain": tuple(CHAINS),
    "dtype": tuple(DTYPES),
    "n": (32, 128, 256, 512, 1024, 2048, 2880, 4096, 7168, 16384, 32768),
    "rows": (1, 64, 1024, 16384, 1 << 20),  # the last also for tensors over 2 GiB
    "layout": tuple(LAYOUTS),
    "scale_mode": ("even", "floor", "rceil", "ceil"),
    "weight": ("same", "fp32", "none"),
    "cast_order": _CAST_ORDERS,
    "norm_dtype": ("default", "same", "fp32"),
}

GATED_FACTORS: dict[str, tuple[Any, ...]] = {
    "target": tuple(TARGETS),
    "chain": tuple(GATED_CHAINS),
    "dtype": tuple(DTYPES),
    "n": (32, 2048, 2880, 18432),
    "rows": (1, 1024, 1 << 20),  # the last also for tensors over 2 GiB
    "halves": (True, False),
    "layout": tuple(LAYOUTS),
    "scale_mode": ("even", "floor", "rceil", "ceil"),
    "activation": ("silu", "gelu_tanh", "x_sigmoid"),
    "cast_order": ("cast_mul", "mul_cast", "cast_each"),
    "act_dtype": ("same", "fp32"),
}

CACHE_FACTORS: dict[str, tuple[Any, ...]] = {
    "target": tuple(TARGETS),
    "chain": tuple(CACHE_CHAINS),
    "sizes": tuple(SIZES),
    # Tokens and heads: one copy for each thread, two, four, and as many as make rows of q whole.
    "amount": ((1, 128), (16, 128), (64, 128), (8192, 16), (8192, 128)),
    "dtype": tuple(DTYPES),
    "layout": tuple(LAYOUTS),
    "style": ("neox", "interleaved", "interleaved_to_neox"),
    "angles": ("same", "fp32"),
    "full": (False, True),
    "table": (True, False),
    "cache": ("flat", "paged", "paged apart", "two"),
    "cache_dtype": ("same", "fp8"),
    "scaling": ("none", "divide", "reciprocal"),
    "negative_slots": ("skip", "wrap", "error"),
}

_OF_A_NORM = ("weight", "cast_order", "norm_dtype")
_REST = ("layout", "scale_mode", *_OF_A_NORM)


def _pairs(row: dict[str, Any]) -> set[tuple[Any, Any]]:
    """Pairs of values that meet in a row; a quant has no weight that anything could meet."""
    items = [item for item in row.items() if row.get("chain") != "quant" or item[0] not in _OF_A_NORM]
    return set(itertools.combinations(items, 2))


def covering(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows in which every two values of two factors meet: each row starts from a pair that has not yet."""
    every_pair = (
        {first: a, second: b}
        for first, second in itertools.combinations(factors, 2)
        for a, b in itertools.product(factors[first], factors[second])
    )
    missing = dict.fromkeys(pair for row in every_pair for pair in sorted(_pairs(row), key=str))
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for factor in factors:
            if factor not in row:
                row[factor] = max(
                    factors[factor],
                    key=lambda value: sum(pair in missing for pair in _pairs(_ordered(row | {factor: value}, factors))),
                )
        row = _ordered(row, factors)
        for pair in _pairs(row):
            missing.pop(pair, None)
        rows.append(row)
    return rows


#: Says what the provider launches for a configuration: ``tools.launches.launches``.
Launches = Callable[[AnyConfig], list[Any]]


def _ordered(row: dict[str, Any], factors: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {factor: row[factor] for factor in factors if factor in row}


def heads_first() -> list[Config]:
    """On each target: tiles that are filled and not, rows of one block, and more blocks than 31 bits count."""
    sizes = ((128, 4096, "even"), (32, 1024, "floor"), (2880, 48, "rceil"), (32768, 1 << 21, "ceil"))
    turns = itertools.cycle(DTYPES)
    return [
        Config(target, "quant", next(turns), n, rows, HEADS_FIRST, mode)
        for target, (n, rows, mode) in itertools.product(TARGETS, sizes)
    ]


def pairwise() -> list[AnyConfig]:
    quants: list[AnyConfig] = [*(Config(**row) for row in covering(FACTORS)), *heads_first()[::5]]
    gated = [GatedConfig(**row) for row in covering(GATED_FACTORS)]
    every = every_gemm()
    some = [c for c in every if c.chain == "some tokens" and c.tokens in (17, 64, 128) and c.n == 1056]
    gemms = [c for c in every if c.target in ("sm_90", "gfx942") and c.rows == 1000 and c.n == 2880]
    gemms = [*some, *gemms]
    gemms = [c for c in gemms if (c.layout, c.tokens) not in (("linear", 1), ("linear", 64), ("tiles", 16))]
    writes = map(_cache_config, covering(CACHE_FACTORS))
    return [
        *quants,
        *gated,
        *gemms,
        *writes,
        *some_dots(TARGETS),
        *some_pairs(TARGETS),
        *some_orders(TARGETS),
        *some_mlps(TARGETS),
    ]


def every_gemm() -> list[GemmConfig]:
    """Each choice of the heuristics with each layout, on the targets that have it; and rows that fill no tile."""
    weights = ((18432, 7168), (2112, 7168), (7168, 2048), (1000, 2880))
    configs = []
    for target, layout in itertools.product(TARGETS, ("linear", "tiles")):
        if target.startswith("sm_"):
            for i, (tokens, (rows, n)) in enumerate(itertools.product((1, 16, 32, 64), weights)):
                tails = rows == 1000
                # What is "some tokens", below.
                other = layout == "tiles" and rows == 18432 and tokens > 8
                if tails or (target == "sm_90" and not other):
                    codes, bias = i % 2 == (layout == "tiles"), tails != (tokens == 16)
                    configs.append(GemmConfig(target, "few tokens", tokens, rows, n, layout, codes, bias))
            for n in (7168, 2880):
                configs.append(GemmConfig(target, "tokens in order", 32, 1000, n, layout, codes=True))
        for rows, n in weights[::3]:
            configs.append(GemmConfig(target, "many tokens", 700, rows, n, layout))
    configs += _other_tiles(configs)
    configs += _in_order()
    # 32, 64 and 128 tokens fill tiles; 33 and 257 blocks of K, 63560 and 8200 rows do not. Few tokens: of few and long
    # rows.
    sizes = list(itertools.product((17, 32, 64, 128, 130), ((18432, 7168), (63560, 1056))))
    sizes += itertools.product((1, 16), ((7168, 16384), (8200, 8224)))
    # Not so large: 64 rows of a program.
    sizes += itertools.product((24, 32), ((4608, 7168),))
    for i, (tokens, (rows, n)) in enumerate(sizes):
        configs.append(GemmConfig("sm_90", "some tokens", tokens, rows, n, "tiles", codes=i % 4 == 3, bias=i % 3 == 0))
        configs.append(GemmConfig("sm_90", "tokens interleaved", tokens, rows, n, "tiles", codes=i % 4 != 1))
    return configs


def _other_tiles(configs: list[GemmConfig]) -> list[GemmConfig]:
    """Of few tokens on sm_90, a configuration for each tile that none of these has."""
    weights = ((36864, 7168), (24576, 1536), (14336, 4096), (7168, 18432), (7168, 16384), (2112, 7168), (1536, 7168))
    others = [
        GemmConfig("sm_90", "few tokens", tokens, *weight, layout, codes)
        for tokens, weight, layout, codes in itertools.product((1, 16, 32), weights, ("tiles", "linear"), (False, True))
    ]
    have = {_tile(c): c for c in configs if (c.target, c.chain) == ("sm_90", "few tokens")}
    found = {_tile(c): c for c in reversed(others)}
    return [c for tile, c in found.items() if tile not in have and tile[0] == "mxfp4_gemm"]


def _in_order() -> list[GemmConfig]:
    """Each tile of few tokens with tokens that their quant has left in order."""
    weights = ((36864, 7168), (24576, 1536), (14336, 4096), (2112, 7168), (1536, 7168), (7168, 2048), (1024, 4096))
    every = [
        GemmConfig("sm_90", "few tokens, in order", tokens, *weight, "tiles", True)
        for tokens, weight in itertools.product((1, 12, 32), weights)
    ]
    found = {_tile(c): c for c in every}
    others = [dataclasses.replace(every[3], target=target) for target in ("sm_100", "sm_120")]
    return [c for tile, c in found.items() if tile[0] == "mxfp4_gemm"] + others


def _tile(c: GemmConfig) -> tuple[Any, ...]:
    h200 = Arch("sm_90", 32, 132)
    choice = gemm_choice.choose(c.tokens, c.rows, c.n, h200, w4a4=c.codes, layout=c.layout)
    decoded = c.codes and mxfp4_gemm.decodes_tokens(c.tokens, c.rows, c.n)
    sizes = [choice.options.get(name) for name in ("ROW_TILES", "TOKEN_TILES", "K_WARPS", "STAGES")]
    return (choice.kernel, c.layout, decoded, *sizes)


def _cache_config(row: dict[str, Any]) -> CacheConfig:
    tokens, heads = row.pop("amount")
    return CacheConfig(tokens=tokens, heads=heads, **row)


def every_cache_write() -> list[CacheConfig]:
    """On each target, all that is free meets, and each choice of the heuristics is among it; and the subset of CI."""
    rows = covering({factor: values for factor, values in CACHE_FACTORS.items() if factor != "target"})
    configs = [_cache_config({"target": target, **row}) for target in TARGETS for row in rows]
    # Copies of q_nope and of kv_c for a thread, where the amounts above have no tile of pieces with both.
    amounts = ((500, 1), (300, 4), (500, 10), (1024, 16), (250, 128))
    configs += [CacheConfig(target, "absorbed", "bf16", *amount) for target in TARGETS for amount in amounts]
    return [*dict.fromkeys(configs + [c for c in pairwise() if isinstance(c, CacheConfig)])]


def every(launches: Launches) -> list[AnyConfig]:
    """Each choice of the heuristics, which ``launches`` tells, once; what is free takes turns over a covering set.

    Thinned, or it would take over half an hour on two cores; over the tiles of a target these take turns:

    * bf16 and fp16, but on sm_90 which measurements are made on: the same steps, two elements at a time or one;
    * norm and add + norm where a program has several rows: a thread has one block of them, whatever their width;
    * the widest row that fills its tile, and the widest that does not.
    """
    turns = covering({factor: FACTORS[factor] for factor in _REST})
    configs: list[AnyConfig] = [*every_cache_write()]
    for target in TARGETS:
        widest: dict[Any, dict[Any, Config]] = {}
        for n, rows, chain, dtype in itertools.product(WIDTHS, ROWS, CHAINS, DTYPES):
            # The heuristics look at the weight's dtype and the order of casts as well.
            weights, orders = (("same",), ("cast_scale",)) if chain == "quant" else (("same", "fp32"), _CAST_ORDERS)
            for weight, cast_order in itertools.product(weights, orders):
                config = Config(target, chain, dtype, n, rows, weight=weight, cast_order=cast_order)
                fills = n & (n - 1) == 0
                for launch in launches(config):
                    kept = widest.setdefault(_kind(config, launch), {})
                    kept[chain, dtype, weight, cast_order, fills] = config
        for (tile, *_), choices in widest.items():
            at = len(configs)
            plain = [*choices.values()][(at + at // len(turns)) % len(choices)]
            # Other arguments may lead to another tile; the plain ones lead to this one.
            others = (dataclasses.replace(plain, **turns[(at + i) % len(turns)]) for i in range(len(turns)))
            configs.append(next((c for c in others if any(x.tile == tile for x in launches(c))), plain))
    # A gated quant's tile depends on the number of blocks alone, and the subset has both.
    gated = [config for config in pairwise() if isinstance(config, GatedConfig)]
    others = [
        *every_gemm(),
        *every_dot(TARGETS),
        *every_pair(TARGETS, covering),
        *every_order(TARGETS),
        *every_mlp(TARGETS),
    ]
    return [*configs, *heads_first(), *gated, *others]


def _kind(config: Config, launch: Any) -> tuple[Any, ...]:
    """What ``every`` has one configuration of."""
    dtype = config.dtype if config.dtype == "fp32" or config.target == "sm_90" else "16 bits"
    fusion = config.chain.partition(",")[0] if launch.constants.get("ROWS", 1) == 1 else ""
    return launch.tile, dtype, fusion
