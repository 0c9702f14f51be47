"""Kinds of numbers that a trained classifier is compared in: ours, calibrated or not, and those of bitsandbytes."""

import contextlib
import copy
import importlib.util
import io
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from parts.topics.classifier import TopicClassifier
from torch import nn

from pynlp.quantize import Report, calibrate, quantize_

SKIP = ["head"]  # stays dense, as is usual
OUTLIERS = 6.0  # LLM.int8's
# How pynlp quantizes each: `how`, a method of calibration or None, and options.
OURS: dict[str, tuple[str, str | None, dict]] = {
    "int8-tensor": ("int8", None, dict(granularity="tensor")),
    "int8-channel": ("int8", None, dict(granularity="channel")),
    "int8-group": ("int8", None, dict(granularity="group")),
    "int8-tensor-affine": ("int8", None, dict(granularity="tensor", scheme="affine")),
    "int8-channel-affine": ("int8", None, dict(granularity="channel", scheme="affine")),
    "int8-group-affine": ("int8", None, dict(granularity="group", scheme="affine")),
    "w8a8": ("int8_dynamic", None, {}),
    "w8a8-outliers": ("int8_dynamic", None, dict(outlier_threshold=OUTLIERS)),
    "w8a8-smoothquant": ("int8_dynamic", "smoothquant", {}),
    "int4": ("int4", None, {}),
    "int4-gptq": ("int4", "gptq", {}),
    "int4-awq": ("int4", "awq", {}),
    "nf4": ("nf4", None, {}),
    "nf4-double": ("nf4", None, dict(double_quant=True)),
    "nf4-gptq": ("nf4", "gptq", {}),
}
THEIRS = ("bnb-int8", "bnb-nf4")
NAMES = ("fp32", "bf16", *OURS, *THEIRS)


class Variant(NamedTuple):
    """A model, and what pynlp says of its weights where it quantized them."""

    model: nn.Module
    report: Report | None = None


def make(name: str, dense: TopicClassifier, calibration: Sequence[dict], dtype: torch.dtype) -> Variant:
    """A variant of a classifier in fp32, which stays as it is.

    Args:
        calibration: What the model takes, without padding.
        dtype: Of a quantized model's activations, and of all of its weights that are not quantized.
    """
    if name == "fp32":
        return Variant(dense)
    embedding = dense.base.get_input_embeddings().weight  # often the largest tensor; no quantization changes it
    shared = nn.Parameter(embedding.detach(), requires_grad=False)
    model = copy.deepcopy(dense, {id(embedding): shared})
    if name == "bf16":
        return Variant(model.to(torch.bfloat16))
    if name in THEIRS:
        use_bitsandbytes(model, name)
        return Variant(model.to(dtype))
    how, method, options = OURS[name]
    if method is None:
        report = quantize_(model, how, skip=SKIP, **options)
    else:
        report = calibrate(model, calibration, how, method=method, skip=SKIP, **options)
    return Variant(model.to(dtype), report)


def has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def use_bitsandbytes(model: TopicClassifier, name: str) -> None:
    """Puts layers of bitsandbytes, on its own kernels, where `quantize_` puts ours."""
    from transformers.pytorch_utils import Conv1D

    from pynlp.integrations.bitsandbytes import unregister

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # of a hub it looks for
        import bitsandbytes as bnb
    unregister()
    chosen = quantize_(copy.deepcopy(model).to("meta"), "int8", skip=SKIP).layers
    for line in chosen:
        dense = model.get_submodule(line.name)
        weight = dense.weight.detach().T.contiguous() if isinstance(dense, Conv1D) else dense.weight.detach()
        outputs, inputs = weight.shape
        if name == "bnb-int8":
            layer = bnb.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
            layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(inputs, outputs, quant_type="nf4", compress_statistics=False, device="meta")
            layer.weight = bnb.nn.Params4bit(
                weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False, module=layer
            )
        layer.bias = dense.bias
        model.set_submodule(line.name, layer.to(dense.weight.device).train(dense.training))
