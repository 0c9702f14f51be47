"""Models composed of pynlp's modules.

Example:
    >>> import torch
    >>> from pynlp.models import Decoder, TransformerConfig
    >>> model = Decoder(TransformerConfig(vocab_size=1000, embed_dim=64, layers=2))
    >>> model(torch.randint(1000, (2, 10))).shape
    torch.Size([2, 10, 1000])
"""

from pynlp.models.config import TransformerConfig
from pynlp.models.encoder_decoder import EncoderDecoder
from pynlp.models.transformer import Decoder, Encoder

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "TransformerConfig"]
