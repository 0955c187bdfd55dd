"""The custom ops: importing this registers ``torch.ops.fusionpasses.*``.

Each module declares one op packet: contract (docstring), check, reference, fake, samples.
"""

from fusionpasses.ops import (
    _then_mlp,  # noqa: F401
    concat_and_cache_mla,
    dynamic_mxfp4_quant,
    fused_rope_mla_kv_cache,
    mxfp4_gemm,
    mxfp4_gemm_a16w4,
    rmsnorm_add_mxfp4_quant,
    rmsnorm_mxfp4_quant,
    silu_mul_mxfp4_quant,
)
from fusionpasses.ops._op import DIRECT, OPS, Op

__all__ = [
    "DIRECT",
    "OPS",
    "Op",
    "concat_and_cache_mla",
    "dynamic_mxfp4_quant",
    "fused_rope_mla_kv_cache",
    "mxfp4_gemm",
    "mxfp4_gemm_a16w4",
    "rmsnorm_add_mxfp4_quant",
    "rmsnorm_mxfp4_quant",
    "silu_mul_mxfp4_quant",
]
