"""From a model's next-token logits to sequences: greedy, beam search and sampling, for any `DecodingState`."""

from pynlp.decoding.beam import beam_search
from pynlp.decoding.hypotheses import Hypothesis
from pynlp.decoding.sampling import greedy, sample
from pynlp.decoding.state import AttentiveState, DecodingState

__all__ = ["AttentiveState", "DecodingState", "Hypothesis", "beam_search", "greedy", "sample"]
