"""Fused NLP kernels: one call, on a GPU through Triton, on a CPU through native SIMD code, anywhere in PyTorch.

`import pynlp` brings all of these; what is below the line is loaded when it is first used.

    pynlp.functional     attention (padded, packed, over a cache), norms, activations, linear, linear_cross_entropy
    pynlp.info()         the back end and instruction set that each op runs on, and why; `python -m pynlp` prints it
    pynlp.get_isa(), pynlp.set_isa(level), pynlp.has_bf16(device)      the CPU's instruction sets
    pynlp.probes         this machine's peaks, measured
    ---
    pynlp.nn             MultiHeadAttention, LatentAttention, FeedForward, norms, Linear, caches
    pynlp.models         Encoder, Decoder, EncoderDecoder, by a TransformerConfig
    pynlp.decoding       greedy, sample, beam_search
    pynlp.training       Trainer, Batches, schedules, checkpoints (needs matplotlib, safetensors and tqdm)
    pynlp.quantize       quantize_: the linear layers of a model in 4 or 8 bits; calibrate: the same by GPTQ, AWQ or
                         SmoothQuant; add_adapters: low-rank adapters
    pynlp.integrations   the names of flash-attn, and transformers' models (needs transformers)

Example:
    >>> import torch
    >>> import pynlp
    >>> q, k, v = torch.randn(3, 2, 100, 8, 64)  # (batch, seqlen, heads, head_dim)
    >>> pynlp.functional.attention(q, k, v, causal=True).shape
    torch.Size([2, 100, 8, 64])
    >>> pynlp.nn.RMSNorm(64)
    RMSNorm(64, eps=1e-06, dropout=0.0)
"""

import importlib
import sys
from typing import TYPE_CHECKING

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        f"pynlp needs torch, which {sys.executable} has not: {sys.executable} -m pip install torch; "
        "in a checkout where `make` has set up .venv: . .venv/bin/activate"
    ) from error

from pynlp import functional, probes
from pynlp.backends import get_isa, has_bf16, set_isa
from pynlp.info import info
from pynlp.ops.common.library import load_native_kernels
from pynlp.version import __version__

if TYPE_CHECKING:
    from pynlp import decoding, integrations, models, nn, quantize, training  # noqa: F401 (for editors and type checkers)

__all__ = ["__version__", "functional", "get_isa", "has_bf16", "info", "probes", "set_isa"]
_ON_FIRST_USE = ("decoding", "integrations", "models", "nn", "quantize", "training")

load_native_kernels()  # after the ops are declared
del load_native_kernels


def __getattr__(name: str):
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module 'pynlp' has no attribute {name!r}")
    try:
        return importlib.import_module(f"pynlp.{name}")
    except ImportError as error:  # where dir() and hasattr() look, a missing package is no accident
        raise AttributeError(str(error)) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
