"""Models composed of pynlp's modules."""

from pynlp.models.config import TransformerConfig
from pynlp.models.encoder_decoder import EncoderDecoder
from pynlp.models.transformer import Decoder, Encoder

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "TransformerConfig"]
