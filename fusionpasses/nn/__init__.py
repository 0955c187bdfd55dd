"""Modules users put into models: they use the ops only."""

from fusionpasses.nn.mxfp4_linear import Mxfp4Linear
from fusionpasses.nn.quantize import QuantizeSummary, last_quantization, quantize_mxfp4

__all__ = ["Mxfp4Linear", "QuantizeSummary", "last_quantization", "quantize_mxfp4"]
