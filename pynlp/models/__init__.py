"""Models composed of pynlp's modules."""

from pynlp.models.transformer import Decoder, TransformerConfig

__all__ = ["Decoder", "TransformerConfig"]
