"""Graphs of ``fusion_backend()`` call our ops without torch's dispatcher.

Generated code calls a custom op as ``torch.ops...``. The dispatcher hands every argument from Python to C++ and back,
and what it then calls looks for gradients: with both, a replayed call (``providers/_launch.py``) of
``mxfp4_gemm_a16w4`` took 19 us of a host, and 14 us without. Generated code has plain tensors and no gradients, so
nothing is lost by going straight to what would be called in the end: ``ops.DIRECT``. A profiler or a dispatch mode that
is there at run time still sees the op.

Where no size is symbolic, a call in generated code is the same in every step but for addresses: it is a *site*, made at
the top of the code, whose plan is found without a key. Equal calls, of equal layers, share one. What a site relies on,
dtypes and sizes, is in its text, so code that Inductor shares because its text is the same relies on the same.

A lowering is registered for each op. It makes the very node that Inductor makes of a custom op by itself, constraints
on strides and all, but for the name that is written into the code. That is for our graphs alone: the key of a compiled
graph in Inductor's cache has a hash of this package's sources only there, and what was written for one version of it
must not be found by another.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from fusionpasses.ops import OPS
from fusionpasses.pipeline import is_ours


class _Site(NamedTuple):
    text: str
    arguments: str  #: all of them, tensors by number; the site's plan has the others as they are


def _is_symbolic(value: Any) -> bool:
    """Is it a size that may be another in the next call? Inductor has sympy's numbers and expressions of symbols."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) or bool(getattr(value, "free_symbols", ()))


@functools.cache
def register() -> None:
    """Register the lowerings, once for a process."""
    from torch._inductor import config, ir, lowering
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    class DirectKernel(ir.FallbackKernel):
        """A call of one of our ops in generated code."""

        def codegen(self, wrapper: Any) -> None:
            # With cpp_wrapper the name is that of an op for the dispatcher.
            if is_ours(config.post_grad_custom_pre_pass) and not V.graph.cpp_wrapper:
                wrapper.add_import_once("from fusionpasses.ops import DIRECT as fusionpasses")
                self.python_kernel_name = str(self.op_overload)
                made = site(self)
                if made is not None:
                    overload = str(self.op_overload).replace(".", "_")
                    self.python_kernel_name = f"{overload}_{hashlib.sha256(repr(made).encode()).hexdigest()[:16]}"
                    wrapper.add_import_once(f"{self.python_kernel_name} = {made.text}")
            super().codegen(wrapper)

    def site(node: Any) -> _Site | None:
        """The site of a call all of whose sizes are numbers."""
        if not config.size_asserts:  # it is they who look at sizes, once a site has its plan
            return None
        # All arguments by their places and names, whatever of them this version of torch keeps where.
        arguments = node.unflatten_args([f"tensor {i}" for i in range(len(node.inputs))], node.constant_args)
        if any(map(_is_symbolic, pytree.tree_leaves(arguments))):
            return None
        tensors = []
        for tensor in node.inputs:
            shape, stride = tensor.get_size(), tensor.get_stride()
            if any(map(_is_symbolic, (*shape, *stride))):
                return None
            shape, stride = (tuple(map(int, values)) for values in (shape, stride))
            tensors.append((tensor.get_dtype(), str(tensor.get_device()), shape, stride))
        name = str(node.op_overload).partition(".")[2]
        return _Site(f"fusionpasses.site({', '.join(map(repr, (name, *tensors)))})", repr(arguments))

    def boxed(made: Any) -> Any:
        if not isinstance(made, ir.IRNode):
            return made
        wrap = getattr(made, "wrap_for_lowering", None)  # since torch 2.13
        return ir.TensorBox.create(made) if wrap is None else wrap()

    def lower(overload: torch._ops.OpOverload) -> Any:
        def lowered(*args: Any, **kwargs: Any) -> Any:
            return pytree.tree_map(boxed, DirectKernel.create(overload, *args, **kwargs))

        lowered._is_fallback_handler = True  # type: ignore[attr-defined]  # so does Inductor's own
        return lowered

    for op in OPS.values():
        constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op.overload, with_default=True))
        lowering.make_fallback(op.overload, layout_constraint=constraint, warn=False)
        lowering.register_lowering(op.overload, type_promotion_kind=None)(lower(op.overload))
