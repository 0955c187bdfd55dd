"""Modules users put into models: they use the ops only."""

from fusionpasses.nn.checkpoint_loader import LoadSummary, linear_from_checkpoint, load_checkpoint
from fusionpasses.nn.checkpoint_reader import Checkpoint, Mxfp4Weight, open_checkpoint
from fusionpasses.nn.checkpoint_writer import save_checkpoint
from fusionpasses.nn.mxfp4_linear import Mxfp4Linear
from fusionpasses.nn.quantize import QuantizeSummary, last_quantization, quantize_mxfp4

__all__ = [
    "Checkpoint",
    "LoadSummary",
    "Mxfp4Linear",
    "Mxfp4Weight",
    "QuantizeSummary",
    "last_quantization",
    "linear_from_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "quantize_mxfp4",
    "save_checkpoint",
]
