"""What the Triton provider would launch on a GPU that need not be there.

The provider's own adapters are called, on tensors without data and with the device's properties made up, and their
launches are recorded instead of run. So tiles, masks, strides and roundings are those the adapters and heuristics
choose; nothing here repeats them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from fusionpasses import kernels
from tools.configs import DTYPES, FP8, GEMM_CHAINS, TARGETS, AnyConfig, Target
from tools.dot_configs import DOT_CHAINS, DotConfig, shared_memory
from tools.mlp_configs import MlpConfig
from tools.order_configs import OrderConfig

#: Constants that the op's arguments decide; the others are the heuristics'.
_OF_A_ROTATION = ("HEADS", "NOPE", "ROPE", "FULL", "READ_WOVEN", "WRITE_WOVEN")
_OF_A_CACHE = ("LATENT", "NEGATIVE_SLOTS", "PAGE", "SCALING")
_OF_A_NORM = ("ROW_BLOCKS", "ROUND_BEFORE_WEIGHT", "ROUND_RESULT")
_OF_A_SECOND_NORM = ("ROW_BLOCKS2", "ROUND_BEFORE_WEIGHT2", "ROUND_RESULT2")
_OF_AN_ACTIVATION = ("ACTIVATION", "CAST_ORDER")
_OF_A_PRODUCT = ("K", "LAYOUT", "K_BLOCKS", "FLAGS", "GATE_TILES", "NEXT_FLAGS")
_OF_NORMS = (*_OF_A_NORM, *_OF_A_SECOND_NORM)
_OF_ARGUMENTS = ("SCALE_ADDEND", "ISA", *_OF_A_PRODUCT, *_OF_AN_ACTIVATION, *_OF_NORMS, *_OF_A_ROTATION, *_OF_A_CACHE)


_OTHER_KINDS = {torch.uint8: "*u8", FP8: "*fp8e4nv", torch.int32: "*i32", torch.int64: "*i64"}


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
    def wanted_load(self) -> int:
        """Least bytes a thread should load at once; where rows are not aligned, words."""
        if self.constants.get("VECTOR") == 1:
            return 1
        if self.kernel.__name__ == "mxfp4_dequantize":
            return 4
        return 16 if self.aligned else 4

    @property
    def wanted_store(self) -> int:
        if self.constants.get("VECTOR") == 1:
            return 1
        if self.kernel.__name__ in ("mxfp4_gemm", "mxfp4_gemm_dot", "mxfp4_gemm_wgmma"):
            return 2  # a thread may have single sums
        if self.kernel.__name__ == "mxfp4_gemm_interleave":
            return 4  # threads of a token next to each other have its words
        if self.constants.get("FLAGS"):
            return 4  # a thread has one
        if self.kernel.__name__ == "mxfp4_gemm_sum":
            return 8 if self.aligned and "rows" in self.divisible else 2
        if "cache_ptr" not in self.signature:
            return 16
        # Eight elements at once, in words where the cache is not aligned.
        fp8 = self.constants["SCALING"] is not None
        return (8 if fp8 else 16) if self.aligned else 4

    @property
    def index_load(self) -> int:
        """Bytes of a slot, a position, or the cache's scale: single numbers by nature."""
        return 4 if "slots_ptr" in self.signature else 0

    @property
    def other_loads(self) -> tuple[int, ...]:
        """Bytes of what a product loads beside words of codes: scales, biases, eight codes of a token."""
        return {
            "mxfp4_gemm": (1, 2, 8) if self.signature.get("x_scales_ptr", "constexpr") == "constexpr" else (1, 2, 4, 8),
            "mxfp4_gemm_arrange": (1, 4),
            "mxfp4_gemm_interleave": (1, 4),
            "mxfp4_gemm_wgmma": (2, 4, 8),
            "mxfp4_dequantize": (1,),
            # What few tokens or blocks are, divided by many threads.
            "mxfp4_gemm_dot": (1, 2, 4, 8),
            "mxfp4_gemm_sum": (2, 8) if "rows" in self.divisible else (2, 4),
        }.get(self.kernel.__name__, ())

    @property
    def widest_load(self) -> int:
        """Bytes that codes of a weight are loaded by, where others are too few to tell by the least."""
        return 16 if self.kernel.__name__ == "mxfp4_gemm_dot" else 0

    def shared_memory(self, target: str) -> int:
        """Bytes of it that a program may have: operands of a dot, or where warps that cut K add up what each has."""
        if self.kernel.__name__ == "mxfp4_gemm_dot":
            return shared_memory(target)
        if self.kernel.__name__ == "mxfp4_gemm_wgmma":
            return 4  # a flag that one thread has read; all else is static, and Triton does not know of it
        f = self.constants
        if self.kernel.__name__ == "mxfp4_gemm_sum":
            # Threads load several biases at once, and single sums if rows of these are not aligned.
            return 0 if "rows" in self.divisible else 4 * int(f["COLUMNS"])
        return 0

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


def launches(config: AnyConfig) -> list[Launch]:
    from fusionpasses.providers import triton as provider

    name, arguments, keywords = config.call()
    with _pretended(provider, TARGETS[config.target]) as recorded:
        if isinstance(config, DotConfig):
            from fusionpasses.kernels import mxfp4_gemm_dot
            from fusionpasses.providers import _triton_gemm_dot
            from fusionpasses.providers._product import Product

            gpu = provider.arch.of(torch.device("meta"))
            sizes = config.tokens, config.rows, config.n
            options = mxfp4_gemm_dot.launch_options(*sizes, gpu, config.codes)
            _triton_gemm_dot.multiply(Product(*arguments, "linear", 0, gpu), options)
        else:
            provider.ADAPTERS[name](*arguments, **keywords)
    if isinstance(config, OrderConfig):
        return recorded[:1]  # the product is another family
    if isinstance(config, MlpConfig):
        return recorded[1:2]
    wanted = DOT_CHAINS.get(config.chain) or GEMM_CHAINS.get(config.chain, ("", ""))[1]
    return [launch for launch in recorded if wanted in ("", launch.kernel.__name__)][: 1 if wanted else None]


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
        for module in _kernel_modules():
            for name, value in list(vars(module).items()):
                if hasattr(value, "arg_names") and hasattr(value, "warmup"):
                    patch(module, name, _Recorder(value, recorded))
        yield recorded


def _kernel_modules() -> Iterator[types.ModuleType]:
    for found in pkgutil.iter_modules(kernels.__path__):
        if not found.name.startswith("_"):
            yield importlib.import_module(f"{kernels.__name__}.{found.name}")


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
                kinds = {dtype: f"*{short}" for short, dtype in DTYPES.items()} | _OTHER_KINDS
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
