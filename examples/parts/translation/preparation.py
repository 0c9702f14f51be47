"""Pairs of sentences to train on and others to measure by, without leaks between them, and subwords of both languages.

train, validation, test, dropped = split(documents)
tokenizer = train_tokenizer(train)
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from parts.common.reports import write
from parts.translation.corpora import SENTENCE_END, Document, Pair, normalise
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
PAD, BEGIN, END = range(3)  # their ids
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
FEWEST_SUBWORDS = len(SPECIAL_TOKENS) + len(ALPHABET)


class Split(NamedTuple):
    """Pairs to train on and held-out ones.

    Attributes:
        dropped: Of each part the number of "duplicates" and of "near_copies" of another part's pairs.
    """

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    dropped: dict[str, dict[str, int]]


def split(documents: list[Document], *, validation: int = 1000, test: int = 1000, seed: int = 0) -> Split:
    """Holds out whole documents; no pair is there twice, and nothing that is trained on is nearly a held-out sentence.

    A pair to train on is dropped if its source or its target, or a sentence in one, is a near-copy of one in the test
    or validation set: equal but for letter case, numbers and punctuation, or with four fifths of the trigrams that are
    then in either in both. A pair for validation is dropped if that is so for the test set.

    Args:
        validation, test: Documents are held out until they have so many different pairs, in an order that depends on
            their names and the seed alone. A corpus with a validation or test set of its own keeps that.

    Raises:
        ValueError: there are too few pairs; the message says of what.
    """
    free = [document for document in documents if document.part is None]
    free.sort(key=lambda document: sha256(f"{seed} {document.name}".encode()).digest())
    parts = {
        "test": hold_out("test", test, documents, free),
        "validation": hold_out("validation", validation, documents, free),
        "train": [document for document in documents if document.part == "train"] + free,
    }
    held_out, result, dropped = [], {}, {}
    for part, chosen in parts.items():
        pairs = [pair for document in chosen for pair in document.pairs]
        unique = list(dict.fromkeys(pairs))
        result[part] = without_near_copies(unique, held_out)
        held_out = held_out + result[part]
        if not result[part]:
            raise ValueError(f"documents: expected pairs for each part, got none for {part}")
        duplicates, near_copies = len(pairs) - len(unique), len(unique) - len(result[part])
        dropped[part] = {"duplicates": duplicates, "near_copies": near_copies}
        print(
            f"{part}: {len(result[part]):,} pairs; dropped {duplicates:,} duplicates, "
            f"{near_copies:,} near-copies of held-out ones"
        )
    return Split(**result, dropped=dropped)


def hold_out(part: str, wanted: int, documents: list[Document], free: list[Document]) -> list[Document]:
    """The corpus's own documents of this part, or else some of the free ones, which are not free any more then."""
    if wanted < 1:
        raise ValueError(f"{part}: expected at least 1 pair, got {wanted}")
    chosen = [document for document in documents if document.part == part]
    if not chosen:
        unique: set[Pair] = set()
        while len(unique) < wanted:
            if not free:
                raise ValueError(f"{part}: expected at most the {len(unique)} pairs that there are, got {wanted}")
            chosen.append(free.pop())
            unique.update(chosen[-1].pairs)
    return chosen


def without_near_copies(pairs: list[Pair], held_out: list[Pair]) -> list[Pair]:
    if not held_out:
        return pairs
    sources, targets = (NearCopies(texts) for texts in zip(*held_out, strict=True))
    progress = tqdm(pairs, "Looking for near-copies", unit="pair", leave=False)
    return [
        (source, target) for source, target in progress if not sources.any_in(source) and not targets.any_in(target)
    ]


class NearCopies:
    """Finds what is nearly one of `texts` or a sentence in one, as `split` says, without comparing it with all of them.

    Of two sets with four fifths of their union in common, each lacks at most a fifth of the other. So of any n // 5 + 1
    of the n trigrams of a set at least one is in the other, and if both sets choose by one order of all trigrams, at
    least one that both have chosen. The rarest ones lead to the fewest texts.

    Source: Chaudhuri et al., A Primitive Operator for Similarity Joins in Data Cleaning, 2006 (prefix filtering).
    """

    def __init__(self, texts: Iterable[str]):
        self.texts = {normalise(piece) for text in texts for piece in pieces(text)}
        self.trigrams = [trigrams(text) for text in self.texts]
        self.counts = Counter(chain.from_iterable(self.trigrams))
        self.index: dict[str, list[int]] = defaultdict(list)
        for place, there in enumerate(self.trigrams):
            for trigram in self.rarest(there):
                self.index[trigram].append(place)

    def any_in(self, text: str) -> bool:
        """Whether the text or a sentence in it is such a near-copy."""
        return any(piece in self for piece in pieces(text))

    def __contains__(self, text: str) -> bool:
        text = normalise(text)
        if text in self.texts:
            return True
        here = trigrams(text)
        candidates = {place for trigram in self.rarest(here) for place in self.index.get(trigram, ())}
        return any(near(here, self.trigrams[place]) for place in candidates)

    def rarest(self, there: set[str]) -> list[str]:
        return sorted(there, key=lambda trigram: (self.counts[trigram], trigram))[: len(there) // 5 + 1]


def pieces(text: str) -> set[str]:
    """A text and the sentences in it."""
    return {text, *SENTENCE_END.split(text)}


def near(a: set[str], b: set[str]) -> bool:
    """Whether four fifths of the union are in both. It has len(a) + len(b) - common elements."""
    enough = 4 * (len(a) + len(b))
    return 9 * min(len(a), len(b)) >= enough and 9 * len(a & b) >= enough


def trigrams(text: str) -> set[str]:
    text = f" {text} "
    return {text[start : start + 3] for start in range(len(text) - 2)}


def train_tokenizer(pairs: list[Pair], vocabulary: int = 8000) -> Tokenizer:
    """One byte-level BPE for both languages: `encode(text).ids` without special tokens, and `decode(ids)`, its inverse.

    Every text comes back exactly. A word is the same token at the beginning of a text and within it, and the names of
    the special tokens are text like any other.

    Args:
        vocabulary: Tokens at most: <pad>, <s> and </s>, which are 0, 1 and 2, the 256 bytes, and merges of them.

    Raises:
        ValueError: the vocabulary has no room for these.
    """
    if vocabulary < FEWEST_SUBWORDS:
        raise ValueError(f"vocabulary: expected at least {FEWEST_SUBWORDS}, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(pairs), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """All of the file or nothing of it."""
    write(path, lambda part: tokenizer.save(str(part)))


def load_tokenizer(path: Path) -> Tokenizer:
    """What `save_tokenizer` saved.

    Raises:
        ValueError: the file is not there, or not such a tokenizer.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: expected a tokenizer, got: {error}") from None
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    if ids != [PAD, BEGIN, END]:
        raise ValueError(f"{path}: expected {', '.join(SPECIAL_TOKENS)} to be 0, 1 and 2, got {ids}")
    tokenizer.encode_special_tokens = True  # the file does not say so
    return tokenizer
