"""Quantization of whole models: the linear layers, one by one, and what that cost; and low-rank adapters beside them.

Example:
    >>> import torch
    >>> from pynlp.quantize import quantize_
    >>> model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 10))
    >>> report = quantize_(model, "nf4", skip=["2"])
    >>> model[0]
    Linear4bit(256, 512, bias=True, quant_type='nf4', blocksize=64)
    >>> report.skipped
    {'2': 'in skip'}
"""

from pynlp.quantize.adapter_files import load_adapters, save_adapters
from pynlp.quantize.adapters import Adapters, add_adapters, remove_adapters
from pynlp.quantize.calibrate import calibrate
from pynlp.quantize.model import QUANTIZATIONS, quantize_
from pynlp.quantize.report import QuantizedLayer, Report

__all__ = [
    "Adapters",
    "QUANTIZATIONS",
    "QuantizedLayer",
    "Report",
    "add_adapters",
    "calibrate",
    "load_adapters",
    "quantize_",
    "remove_adapters",
    "save_adapters",
]
