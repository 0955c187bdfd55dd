"""torch.compile fusion passes: RMSNorm and MXFP4 quantisation as one op, proven and reported site by site.

::

    import torch, fusionpasses as fp
    fp.quantize_mxfp4(model)
    compiled = torch.compile(model, backend=fp.fusion_backend())
    compiled(x)
    print(fp.last_report())
"""

from fusionpasses import ops as ops
from fusionpasses.anchors import register_anchor as register_anchor
from fusionpasses.anchors import register_cache_write_anchor as register_cache_write_anchor
from fusionpasses.backend import FusionBackend as FusionBackend
from fusionpasses.backend import fusion_backend as fusion_backend
from fusionpasses.backend import last_report as last_report
from fusionpasses.config import FusionConfig as FusionConfig
from fusionpasses.errors import BadCheckpoint as BadCheckpoint
from fusionpasses.errors import BadConfig as BadConfig
from fusionpasses.errors import FusionError as FusionError
from fusionpasses.errors import NotEquivalent as NotEquivalent
from fusionpasses.errors import OpCountMismatch as OpCountMismatch
from fusionpasses.errors import ProviderUnavailable as ProviderUnavailable
from fusionpasses.errors import UnsupportedInput as UnsupportedInput
from fusionpasses.nn import Mxfp4Linear as Mxfp4Linear
from fusionpasses.nn import last_quantization as last_quantization
from fusionpasses.nn import load_checkpoint as load_checkpoint
from fusionpasses.nn import open_checkpoint as open_checkpoint
from fusionpasses.nn import quantize_mxfp4 as quantize_mxfp4
from fusionpasses.nn import save_checkpoint as save_checkpoint
from fusionpasses.probes import Verdict as Verdict
from fusionpasses.probes import has_dynamic_mxfp4_quant as has_dynamic_mxfp4_quant
from fusionpasses.probes import has_fused_rmsnorm_mxfp4_quant as has_fused_rmsnorm_mxfp4_quant
from fusionpasses.probes import has_fused_rope_mla_kv_cache as has_fused_rope_mla_kv_cache
from fusionpasses.probes import has_mxfp4_gemm as has_mxfp4_gemm
from fusionpasses.report import GraphReport as GraphReport
from fusionpasses.report import Report as Report
from fusionpasses.report import Site as Site

__version__ = "0.1.0"
