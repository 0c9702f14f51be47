"""Greedy decoding, beam search and sampling, from the next-token logits of any `DecodingState`."""

from pynlp.decoding.beam import beam_search
from pynlp.decoding.hypotheses import Hypothesis
from pynlp.decoding.sampling import greedy, sample
from pynlp.decoding.state import AttentiveState, DecodingState

__all__ = ["AttentiveState", "DecodingState", "Hypothesis", "beam_search", "greedy", "sample"]
