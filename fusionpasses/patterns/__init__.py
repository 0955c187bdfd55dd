"""HOW fusions are recognised. Importing this is cheap; the passes import Inductor's matcher when they are built."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusionpasses.patterns._pass import FusionPass

#: Names of the passes, in the order they run: most specific first. A name is the module's in this package, and no
#: name contains another, because TORCHINDUCTOR_DISABLED_PASSES is compared by substring.
PASS_NAMES = ("rmsnorm_mxfp4_quant", "silu_mul_mxfp4_quant", "fused_rope_mla_kv_cache", "dynamic_mxfp4_quant")


def pass_class(name: str) -> type[FusionPass]:
    """The pass of this name; imports torch._inductor's pattern matcher."""
    import importlib

    module = importlib.import_module(f"fusionpasses.patterns.{name}")
    found: type[FusionPass] = module.PASS
    return found
