"""Greedy decoding, beam search and sampling, from the next-token logits of any `DecodingState`.

Example:
    >>> import torch
    >>> from pynlp.decoding import beam_search
    >>> from pynlp.models import Decoder, TransformerConfig
    >>> model = Decoder(TransformerConfig(vocab_size=100, embed_dim=32, layers=1)).eval()
    >>> state = model.decoding_state(batch=2, max_length=12)
    >>> prompts = torch.tensor([[1, 5], [1, 8]])
    >>> [first, second] = beam_search(state, prompts, end=2, max_length=10, beam_size=4, n_best=4)
    >>> first[0].score >= first[1].score
    True
"""

from pynlp.decoding.beam import beam_search
from pynlp.decoding.hypotheses import Hypothesis
from pynlp.decoding.sampling import greedy, sample
from pynlp.decoding.state import AttentiveState, DecodingState

__all__ = ["AttentiveState", "DecodingState", "Hypothesis", "beam_search", "greedy", "sample"]
