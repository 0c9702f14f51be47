"""Texts as numbers: by words, as the study of the speeches has them, or by byte pairs, which leave nothing unknown."""

from collections.abc import Iterable
from hashlib import sha256

import torch
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

PAD, UNKNOWN = range(2)  # ids of a vocabulary of words
END = "<|endoftext|>"  # of byte pairs
WORD = r"\w+(?:['’]\w+)*|[^\w\s]"  # a word with its apostrophes, or one mark


def train_words(texts: Iterable[str]) -> Tokenizer:
    """A vocabulary of all words and marks of the texts, the most frequent first, behind <pad> and <unk>."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    trainer = trainers.WordLevelTrainer(vocab_size=2**31, special_tokens=["<pad>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # in a text, "<pad>" is text
    return tokenizer


def train_byte_pairs(texts: Iterable[str], vocabulary: int = 4096) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return tokenizer


def encode_documents(tokenizer: Tokenizer | ByteLevelBPETokenizer, texts: list[str]) -> list[Tensor]:
    """Token ids of each text; of byte pairs with an end."""
    end = [] if tokenizer.token_to_id(END) is None else [tokenizer.token_to_id(END)]
    return [torch.tensor(encoding.ids + end) for encoding in tokenizer.encode_batch(texts)]


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text that the vocabulary lacks."""
    encoding = tokenizer.encode(text)
    return [
        text[slice(*place)] for place, token in zip(encoding.offsets, encoding.ids, strict=True) if token == UNKNOWN
    ]


def digest(tokenizer: Tokenizer | ByteLevelBPETokenizer) -> str:
    """What tells one vocabulary from another."""
    return sha256(tokenizer.to_str().encode()).hexdigest()[:16]
