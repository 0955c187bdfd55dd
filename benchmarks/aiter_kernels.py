"""AITER's real Triton kernels under our adapters where there is no AMD GPU: bytes against our references.

``python -m benchmarks.aiter_kernels CHECKOUT GROUP [--interpret | --no-contraction]``, in a process of its own, because
what it takes to import AITER without ROCm is not for another one: stand-ins for the modules of AITER that ask for a
compiler and for ROCm, and for the architecture. CHECKOUT is a checkout of ROCm/aiter, of which nothing but the kernels
is imported.

--interpret runs them in Triton's interpreter, on the CPU, corrected where it computes otherwise than a compiled kernel.
Without it they are compiled for the NVIDIA GPU that is here. Launch options of AMD's compiler are dropped then.
--no-contraction has every product rounded by itself there, as AMD's code for these kernels does, and compares rotations
byte by byte.

Prints a line of JSON: ``aiter_cases.Tally``.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import dataclasses
import importlib
import json
import logging
import os
import pathlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

#: Launch options that Triton knows on AMD GPUs alone.
AMD_OPTIONS = ("waves_per_eu", "matrix_instr_nonkdim", "kpack", "schedule_hint")


def stand_in_for_a_gpu() -> None:
    """AITER asks Triton's driver for the architecture when it is imported."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("hip", "gfx950", 64)

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: 0

    triton.runtime.driver.set_active(Driver())


def stand_in_for_the_package(checkout: pathlib.Path) -> None:
    """``aiter`` and ``aiter.utility.dtypes`` without what they import and run (a compiler, rocminfo)."""
    sys.path.insert(0, str(checkout))
    dtypes = types.ModuleType("aiter.utility.dtypes")
    dtypes.__dict__.update(
        fp8=torch.float8_e4m3fn,
        bf16=torch.bfloat16,
        fp16=torch.float16,
        fp32=torch.float32,
        i8=torch.int8,
        u8=torch.uint8,
        i32=torch.int32,
        fp4x2=torch.uint8,
        fp8_e8m0=torch.uint8,
    )
    # What the packages of its Triton ops import beside the kernels may need more of Triton than there is.
    ops = ("triton", "triton.quant", "triton.fusions", "triton.gemm", "triton.gemm.basic")
    names = ("aiter", "aiter.ops", "aiter.utility", "aiter.jit", "aiter.jit.utils", *(f"aiter.ops.{op}" for op in ops))
    for name in names:
        if not checkout.joinpath(*name.split(".")).is_dir():
            continue  # quant is a module in old releases
        module = types.ModuleType(name)
        module.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = module
    sys.modules["aiter"].__dict__.update(logger=logging.getLogger("aiter"), dtypes=dtypes)
    sys.modules["aiter.utility"].__dict__["dtypes"] = dtypes
    sys.modules["aiter.utility.dtypes"] = dtypes


def stand_in_for_an_amd_gpu(*, contract: bool) -> None:
    """On an NVIDIA GPU: AITER believes in gfx950, its functions are no torch ops, and AMD's options are dropped.

    Without ``contract`` no product becomes part of an FMA.
    """
    from triton.runtime import JITFunction

    arch_info = importlib.import_module("aiter.ops.triton.utils._triton.arch_info")
    arch_info.__dict__["get_arch"] = lambda: "gfx950"
    guard = types.ModuleType("aiter.jit.utils.torch_guard")
    guard.__dict__["torch_compile_guard"] = lambda **_: lambda function: function
    sys.modules[guard.__name__] = guard
    plain = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = {name: value for name, value in kwargs.items() if name not in AMD_OPTIONS or name in self.arg_names}
        if not contract:
            known["enable_fp_fusion"] = False
        return plain(self, *args, **known)

    JITFunction.run = run


def make_the_interpreter_exact() -> None:
    """What it computes in another way than a compiled kernel, of what these kernels use."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
    importlib.import_module("triton_interpreter").cast_bfloat16_as_gpus_do()
    bfloat16_arithmetic_as_compiled()

    class Transformer(interpreter.ASTTransformer):
        def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
            # ``not tensor`` is elementwise when compiled; Python's is the boolean False.
            self.generic_visit(node)
            if not isinstance(node.op, ast.Not):
                return node
            call = ast.Call(ast.Name("_elementwise_not", ast.Load()), [node.operand], [])
            return ast.copy_location(ast.fix_missing_locations(ast.copy_location(call, node)), node)

    interpreter.ASTTransformer = Transformer
    if hasattr(interpreter.FunctionRewriter, "ast_transformer"):
        interpreter.FunctionRewriter.ast_transformer = Transformer()
    builtins.__dict__["_elementwise_not"] = lambda x: x == 0 if isinstance(x, tl.tensor) else not x
    tl.tensor.floor = lambda self: tl.math.floor(self)

    def exp2(self: Any, x: Any) -> Any:
        # numpy's exp2(127) is one bit high in float32.
        with np.errstate(all="ignore"):
            return interpreter.TensorHandle(np.exp2(x.data.astype(np.float64)).astype(np.float32), x.dtype.scalar)

    interpreter.InterpreterBuilder.create_exp2 = exp2


def bfloat16_arithmetic_as_compiled() -> None:
    """Each operation in float32 and rounded, as the code for gfx950 was read to do; the interpreter takes bits for
    integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain_binary, plain_unary = interpreter.InterpreterBuilder.binary_op, interpreter.InterpreterBuilder.unary_op

    def wide(handle: Any) -> Any:
        return (handle.data.astype("uint32") << 16).view("float32")

    def rounded(data: Any) -> Any:
        bits = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(bits, tl.bfloat16)

    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return plain_binary(self, lhs, rhs, op)
        return rounded(op(wide(lhs), wide(rhs)))

    def unary(self: Any, arg: Any, op: Any) -> Any:
        return plain_unary(self, arg, op) if arg.dtype.scalar != tl.bfloat16 else rounded(op(wide(arg)))

    interpreter.InterpreterBuilder.binary_op = binary
    interpreter.InterpreterBuilder.unary_op = unary


def loader(checkout: pathlib.Path) -> Any:
    """``providers/_aiter_import.load`` for the modules of a checkout: the same look at files and signatures."""
    from fusionpasses import _aiter_files
    from fusionpasses.errors import ProviderUnavailable
    from fusionpasses.providers import _aiter_import

    root = checkout / "aiter"

    def load(capability: str) -> tuple[Any, str]:
        place = _aiter_files.locate(root, _aiter_files.CAPABILITIES[capability])
        if place is None:
            raise ProviderUnavailable(f"{root} has no {capability}")
        module = importlib.import_module(_aiter_files.module_name(root, place[0]))
        return _aiter_import._checked(module, root, *place, capability)

    return load


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("group")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--interpret", action="store_true")
    where.add_argument("--no-contraction", action="store_true")
    args = parser.parse_args(arguments)
    # Both Triton and AITER look at these when they are imported.
    os.environ.update(AITER_TRITON_ONLY="1", AITER_LOG_LEVEL="ERROR")
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        stand_in_for_a_gpu()
    stand_in_for_the_package(args.checkout)
    if args.interpret:
        make_the_interpreter_exact()
    else:
        stand_in_for_an_amd_gpu(contract=not args.no_contraction)

    from benchmarks import aiter_cases
    from fusionpasses.kernels import arch
    from fusionpasses.providers import _aiter_import, aiter

    machine = aiter_cases.Machine("cpu")
    if not args.interpret:
        machine = aiter_cases.Machine("cuda", lift=256.0, zeros=aiter._keeps_zeros(), rounds=args.no_contraction)
        aiter._keeps_zeros = lambda: True  # type: ignore[assignment]
    _aiter_import.load = loader(args.checkout.resolve())
    # Nothing in this process launches kernels of ours, so all may think that this is the GPU.
    arch.of = lambda device: arch.Arch("gfx950", warp_size=64, processors=2)  # type: ignore[assignment]
    print(json.dumps(dataclasses.asdict(aiter_cases.run(args.group, machine))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
