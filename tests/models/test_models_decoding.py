"""Decoding with models: over caches the same as computing everything anew, and through `pynlp.decoding`."""

import pytest
import torch

from pynlp.decoding import beam_search, greedy, sample
from pynlp.models import Decoder, EncoderDecoder, TransformerConfig
from pynlp.nn import KVCache, PagedKVCache

SIZES = dict(vocab_size=50, embed_dim=32, layers=3, heads=4)
POSITIONS = ["rope", "relative", "alibi", "sinusoidal", "learned", "none"]
VARIANTS = [
    *(dict(positions=positions) for positions in POSITIONS),
    dict(positions="alibi", kv_heads=2, window=3),
    dict(positions="sinusoidal", pre_norm=False, norm="layer", activation="relu", tied_embeddings=False),
]
START, END = 0, 1


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for a second one."""
    torch.set_num_threads(1)


def randomized(kind, **options):
    """In evaluation mode, where its dropout is nothing, with weights so large that a wrong part shows."""
    model = kind(TransformerConfig(**SIZES, **options, dropout=0.1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(1 if parameter.dim() == 1 else 0)
    return model


def tokens(rows, seqlen):
    return torch.randint(2, 50, (rows, seqlen))


def sources():
    return tokens(3, 8), torch.tensor([8, 3, 5], dtype=torch.int32)


class Recomputed:
    """A decoding state without caches: every step computes all of every row's history, with its own source."""

    def __init__(self, model, source=None, lengths=None):
        self.model, self.source, self.lengths = model, source, lengths
        self.history = None

    @torch.no_grad()
    def step(self, new):
        self.history = new if self.history is None else torch.cat((self.history, new), dim=1)
        if self.source is None:
            return self.model(self.history)[:, -1]
        return self.model(self.source, self.lengths, self.history)[:, -1]

    def select(self, rows):
        self.history = self.history[rows]
        if self.source is not None:
            self.source, self.lengths = self.source[rows], self.lengths[rows]

    @property
    def attention(self):
        """What the last layer's cross-attention sees is caught in a whole pass; its softmax is written out."""
        module, seen = self.model.decoder.blocks[-1].cross_attention, {}
        handle = module.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0], memory=inputs[1]))
        with torch.no_grad():
            self.model(self.source, self.lengths, self.history)
            handle.remove()
            q = module.q_proj(seen["x"][:, -1]).unflatten(-1, (4, 8))  # (R, H, D)
            k = module.k_proj(seen["memory"]).unflatten(-1, (-1, 8)).repeat_interleave(4 // module.kv_heads, dim=2)
            scores = torch.einsum("rhd,rshd->rhs", q, k) / 8**0.5
            padding = torch.arange(self.source.shape[1]) >= self.lengths[:, None]
            weights = scores.masked_fill(padding[:, None], -torch.inf).softmax(-1).mean(1)
            return weights.masked_fill(padding, 1.0)


def steps_of(state):
    """Logits of a prefix of three tokens and four steps, between which rows change places, double and leave."""
    generator = torch.Generator().manual_seed(3)
    logits = [state.step(torch.randint(2, 50, (3, 3), generator=generator))]
    for rows in ([0, 1, 2], [2, 0, 0, 1, 2], [4, 1, 2], [1]):
        state.select(torch.tensor(rows))
        logits.append(state.step(torch.randint(2, 50, (len(rows), 1), generator=generator)))
    return logits


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cached_decoding_equals_uncached(options):
    model = randomized(Decoder, **options)
    for cached, plain in zip(steps_of(model.decoding_state(3, 7)), steps_of(Recomputed(model)), strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cached_decoding_of_sources_equals_uncached(options):
    """The keys and values of the sources stay where they were computed."""
    model = randomized(EncoderDecoder, encoder_layers=2, **options)
    source, lengths = sources()
    state, plain = model.decoding_state(source, lengths, 7), Recomputed(model, source, lengths)
    there = [x.data_ptr() for pair in state.keys_values for x in pair]
    for ours, expected in zip(steps_of(state), steps_of(plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.attention, plain.attention, rtol=1e-4, atol=1e-5)
    assert [x.data_ptr() for pair in state.keys_values for x in pair] == there


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_decoding_leaves_nothing_that_training_cannot_use(options):
    """Its logits may be written to, and what it left in caches of any kind takes part in a gradient."""
    model = randomized(EncoderDecoder, **options)
    source, lengths = sources()
    state = model.decoding_state(source, lengths, 3)
    state.step(tokens(3, 2)).masked_fill_(torch.tensor(True), 0.0)
    model.train()(source, lengths, tokens(3, 2)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("options", [VARIANTS[0], *VARIANTS[-2:]], ids=str)
def test_attention_to_the_source(options):
    model = randomized(EncoderDecoder, **options)
    source, lengths = sources()
    state, plain = model.decoding_state(source, lengths, 5), Recomputed(model, source, lengths)
    new = tokens(3, 2)
    for rows in ([2, 0, 0], [1, 2]):
        state.step(new), plain.step(new)
        torch.testing.assert_close(state.attention, plain.attention, rtol=1e-4, atol=1e-5)
        for one in (state, plain):
            one.select(torch.tensor(rows))
        torch.testing.assert_close(state.attention, plain.attention, rtol=1e-4, atol=1e-5)
        new = tokens(len(rows), 1)


def assert_same(found, expected):
    assert [(h.tokens, h.ended) for h in found] == [(h.tokens, h.ended) for h in expected]
    for name in ("log_probability", "score"):
        ours, theirs = (torch.tensor([getattr(h, name) for h in hypotheses]) for hypotheses in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def greedy_loop(model, source, max_length):
    """One sentence without an end, everything anew for each token."""
    history = [START]
    for _ in range(max_length):
        history.append(model(source[None], None, torch.tensor([history]))[0, -1].argmax().item())
    return history[1:]


@pytest.mark.parametrize("options", [VARIANTS[1], *VARIANTS[-2:]], ids=str)
def test_greedy_and_beam_search_equal_a_search_that_recomputes(options):
    model = randomized(EncoderDecoder, **options)
    source, lengths = sources()
    written = [greedy_loop(model, row[:length], 9) for row, length in zip(source, lengths.tolist(), strict=True)]
    end = written[0][2]  # so that some end early
    prefix, search = torch.full((3, 1), START), dict(end=end, max_length=9)
    found = greedy(model.decoding_state(source, lengths, 10), prefix, **search)
    for hypothesis, expected in zip(found, written, strict=True):
        assert hypothesis.ended == (end in expected)
        assert hypothesis.tokens == (expected[: expected.index(end)] if end in expected else expected)
    for extra in (dict(), dict(coverage_penalty=0.3)):
        beams = dict(search, beam_size=4, n_best=3, **extra)
        ours = beam_search(model.decoding_state(source, lengths, 10), prefix, **beams)
        expected = beam_search(Recomputed(model, source, lengths), prefix, **beams)
        for sentence, expected_sentence in zip(ours, expected, strict=True):
            assert_same(sentence, expected_sentence)
    assert any(h.ended for sentence in ours for h in sentence)
    assert len({tuple(h.tokens) for sentence in ours for h in sentence}) > 3


def test_language_model_through_all_searches():
    """From prefixes of several tokens."""
    model = randomized(Decoder, positions="relative", kv_heads=2)
    prefix, search = tokens(3, 4), dict(end=END, max_length=6)
    for decode, options in (
        (greedy, dict()),
        (sample, dict(num_samples=3, seed=5)),
        (beam_search, dict(beam_size=3, n_best=2)),
    ):
        ours = decode(model.decoding_state(3, 10), prefix, **search, **options)
        expected = decode(Recomputed(model), prefix, **search, **options)
        for found, other in zip(ours, expected, strict=True):
            assert_same(*(x if isinstance(x, list) else [x] for x in (found, other)))


def test_sources_without_lengths_are_whole():
    model = randomized(EncoderDecoder)
    source, new = tokens(2, 6), tokens(2, 3)
    given = model.decoding_state(source, torch.tensor([6, 6]), 3).step(new)
    assert torch.equal(model.decoding_state(source, None, 3).step(new), given)
    with torch.no_grad():
        torch.testing.assert_close(given, model(source, None, new)[:, -1], rtol=1e-4, atol=1e-4)


def test_states_refuse_what_they_cannot_do():
    model = randomized(EncoderDecoder, positions="learned", max_positions=5)
    source, lengths = sources()
    with pytest.raises(ValueError, match="tokens: expected at most max_positions = 5 in a row, .*, got 8"):
        model.decoding_state(source, lengths, 9)
    state = model.decoding_state(source[:, :5], lengths.clamp(max=5), 9)
    with pytest.raises(ValueError, match="attention: expected a step before it, got none"):
        _ = state.attention
    state.step(tokens(3, 4))
    state.step(tokens(3, 1))
    with pytest.raises(ValueError, match="tokens: expected at most max_positions = 5 in a row, .*, got 6"):
        state.step(tokens(3, 1))
    short = model.decoding_state(source[:, :5], None, 2)
    with pytest.raises(ValueError, match="tokens: expected at most 2, the room behind the longest entry, got 3"):
        short.step(tokens(3, 3))
    with pytest.raises(ValueError, match="cache: expected evaluation mode, as decoding drops nothing, got dropout=0.1"):
        randomized(Decoder).train().decoding_state(3, 4).step(tokens(3, 2))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_greedy_decoding_with_a_cache_gives_the_same_tokens(positions, window):
    """The prompts of both sequences begin alike, which a fork in pages computes once."""
    model = randomized(Decoder, positions=positions, window=window, kv_heads=2)
    start, ends = tokens(1, 7), tokens(2, 3)
    whole = torch.cat((start.expand(2, -1), ends), dim=1)
    for _ in range(12):
        whole = torch.cat((whole, model(whole)[:, -1:].argmax(-1)), dim=1)
    assert len(set(whole[:, 10:].flatten().tolist())) > 4  # not one token again and again

    cache = KVCache(2, 21, **model.cache_shape)
    new = whole[:, :10]
    contiguous = [new]
    for _ in range(12):
        new = model(new, cache.append(new.shape[1]))[:, -1:].argmax(-1)
        contiguous.append(new)
    assert torch.equal(torch.cat(contiguous, dim=1), whole)

    pages = PagedKVCache(12, 4, **model.cache_shape)
    first = pages.allocate()
    model(start, pages.append([first], 7))
    both, new = [first, pages.fork(first)], ends
    paged = [start.expand(2, -1), ends]
    for _ in range(12):
        new = model(new, pages.append(both, new.shape[1]))[:, -1:].argmax(-1)
        paged.append(new)
    assert torch.equal(torch.cat(paged, dim=1), whole)
    assert pages.free_pages == 12 - (2 * 6 - 1)  # 21 tokens each; the first page is common
