"""What the Triton provider would launch on a GPU that need not be there.

The provider's own adapters are called, on tensors without data and with the device's properties made up, and their
launches are recorded instead of run. So tiles, masks, strides and roundings are those the adapters and heuristics
choose; nothing here repeats them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: Op of each chain.
CHAINS = {
    "quant": "dynamic_mxfp4_quant.default",
    "norm": "rmsnorm_mxfp4_quant.default",
    "norm, stored": "rmsnorm_mxfp4_quant.with_norm",
    "add+norm": "rmsnorm_add_mxfp4_quant.default",
    "add+norm, stored": "rmsnorm_add_mxfp4_quant.with_norm",
}

#: Elements between rows beyond their width. 2 of a 16-bit dtype: only 4 bytes of alignment are left.
LAYOUTS = {"contiguous": 0, "strided": 64, "off alignment": 2}

#: Constants that the op's arguments decide; the others are the heuristics'.
_OF_ARGUMENTS = ("ROW_BLOCKS", "SCALE_ADDEND", "ROUND_BEFORE_WEIGHT", "ROUND_RESULT", "PTX")


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
    """A call of an op on a target."""

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


@dataclasses.dataclass(frozen=True)
class Launch:
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # pointers and integers that are multiples of 16
    small: tuple[str, ...]  # pointers into less than 2 GiB: on AMD, Triton then uses buffer loads and stores
    options: dict[str, Any]

    @property
    def aligned(self) -> bool:
        """All rows of all tensors start at multiples of 16 bytes."""
        decide = [k for k, kind in self.signature.items() if kind[0] == "*" or ("stride" in k and kind != "constexpr")]
        return all(name in self.divisible for name in decide)

    @property
    def tile(self) -> tuple[Any, ...]:
        """What the heuristics chose."""
        chosen = {k: v for k, v in self.constants.items() if k.isupper() and k not in _OF_ARGUMENTS}
        return (self.kernel.__name__, *sorted((chosen | self.options).items()))

    @property
    def key(self) -> str:
        """Equal for launches of the same compiled code."""
        parts = (self.signature, self.constants, self.divisible, self.small, self.options)
        return f"{self.kernel.__name__} {parts}"


def launches(config: Config) -> list[Launch]:
    from fusionpasses.providers import triton as provider

    dtype = DTYPES[config.dtype]
    arguments: list[Any] = [_rows(config, dtype)]
    keywords: dict[str, Any] = {"scale_mode": config.scale_mode}
    if config.chain != "quant":
        if config.chain.startswith("add"):
            arguments.append(_rows(config, dtype))
        weights = {"same": dtype, "fp32": torch.float32}
        weight = weights.get(config.weight)
        arguments += [None if weight is None else torch.empty(config.n, dtype=weight, device="meta"), 1e-6]
        norm_dtypes = {"default": None, "same": dtype, "fp32": torch.float32}
        keywords |= {"cast_order": config.cast_order, "norm_dtype": norm_dtypes[config.norm_dtype]}
    with _pretended(provider, TARGETS[config.target]) as recorded:
        provider.ADAPTERS[CHAINS[config.chain]](*arguments, **keywords)
    return recorded


def _rows(config: Config, dtype: torch.dtype) -> torch.Tensor:
    whole = torch.empty(config.rows, config.n + LAYOUTS[config.layout], dtype=dtype, device="meta")
    return whole[:, : config.n]


@contextlib.contextmanager
def _pretended(provider: types.ModuleType, target: Target) -> Iterator[list[Launch]]:
    """The provider takes any device for this target, and its launches go into the list."""
    recorded: list[Launch] = []
    nvidia = target.backend == "cuda"
    properties = types.SimpleNamespace(
        multi_processor_count=target.processors,
        warp_size=target.warp_size,
        major=int(target.arch) // 10 if nvidia else 9,
        minor=int(target.arch) % 10 if nvidia else 0,
        gcnArchName=f"{target.arch}:sramecc+:xnack-" if str(target.arch).startswith("gfx9") else target.arch,
    )
    # What arch.of makes of them, without what it has kept of a device that is there.
    ask = inspect.unwrap(provider.arch.of)
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(torch.version, "hip", None if nvidia else "7.0")
        patch(torch.cuda, "get_device_properties", lambda *_: properties)
        patch(provider.arch, "of", lambda _: ask(torch.device("cuda", 0)))
        for module in (provider.quant_kernel, provider.norm_kernel):
            for name, value in list(vars(module).items()):
                if hasattr(value, "arg_names") and hasattr(value, "warmup"):
                    patch(module, name, _Recorder(value, recorded))
        yield recorded


class _Recorder:
    """Stands for a kernel and keeps its launches, specialised as Triton does: None, one, multiples of 16, 2 GiB."""

    def __init__(self, kernel: Any, recorded: list[Launch]) -> None:
        self.kernel = kernel
        self.recorded = recorded

    def __getitem__(self, grid: Any) -> Any:
        return self._record

    def _record(self, *args: Any, **kwargs: Any) -> None:
        params = {p.name: p for p in self.kernel.params}
        options = {key: kwargs.pop(key) for key in list(kwargs) if key not in params}
        given = inspect.signature(self.kernel.fn).bind(*args, **kwargs)
        given.apply_defaults()
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible, small = [], []
        for name, value in given.arguments.items():
            specialized = not params[name].do_not_specialize
            if params[name].is_constexpr or value is None or (type(value) is int and value == 1 and specialized):
                signature[name] = "constexpr"
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                kinds = {dtype: f"*{short}" for short, dtype in DTYPES.items()} | {torch.uint8: "*u8"}
                signature[name] = kinds[value.dtype]
                if value.data_ptr() % 16 == 0:
                    divisible.append(name)
                if value.untyped_storage().nbytes() < 2**31:
                    small.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if specialized and value % 16 == 0:
                    divisible.append(name)
        self.recorded.append(Launch(self.kernel, signature, constants, tuple(divisible), tuple(small), options))


def compile_launch(launch: Launch, target: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(launch.kernel.arg_names)
    there = TARGETS[target]
    attributes = {
        (i,): [["tt.divisibility", 16]] * (name in launch.divisible)
        + [["tt.pointer_range", 32]] * (name in launch.small and there.backend == "hip")
        for i, name in enumerate(names)
    }
    attributes = {where: what for where, what in attributes.items() if what}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    gpu = GPUTarget(there.backend, there.arch, there.warp_size)
    compiled = triton.compile(source, target=gpu, options=dict(launch.options))
    # A launch refuses an option that the backend does not have; triton.compile passes over it.
    unknown = sorted(launch.options.keys() - {*compiled.metadata._fields})
    if unknown:
        raise ValueError(f"Triton has no option {', '.join(unknown)} for {target}")
    return compiled
