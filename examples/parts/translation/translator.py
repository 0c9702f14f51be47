"""A translation model with its tokenizer, in a folder: how it is trained, loaded, and how texts become translations.

The folder holds tokenizer.json, options.json (what the model is and how it was trained), the held-out pairs as
validation.tsv and test.tsv, and the checkpoints and the log of `pynlp.training`.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from parts.common.reports import write_text
from parts.translation.corpora import Pair, read_tsv
from parts.translation.preparation import BEGIN, END, PAD, load_tokenizer
from parts.translation.stock_transformer import StockTransformer
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from pynlp.decoding import beam_search, greedy, sample
from pynlp.functional import linear_cross_entropy
from pynlp.models import EncoderDecoder, TransformerConfig
from pynlp.training import IGNORED, best, latest, load_weights, pad, teacher_forcing

LONGEST = 512  # tokens that a model is made for
METHODS = ("greedy", "beam", "top-k")
OPTIONS, TOKENIZER = "options.json", "tokenizer.json"


@dataclass(frozen=True)
class Options:
    """What a model is made of and trained with.

    Attributes:
        corpus: What `corpora.load_documents` takes.
        steps: Updates; if None, as many as take `minutes` on this machine.
        baseline: Whether it is torch.nn.Transformer in place of ours.
        overfit: Train, validate and test on the same few pairs, without regularisation; 0 = no.
        max_tokens: Of a batch, source and target with their padding.
        bf16: Whether it trains in bf16; if None, where this machine has instructions for it.
    """

    corpus: tuple[str, ...] = ("libreoffice",)
    minutes: float = 10.0
    steps: int | None = None
    baseline: bool = False
    overfit: int = 0
    positions: str = "rope"
    dim: int = 256
    layers: int = 3
    heads: int = 4
    dropout: float = 0.2
    label_smoothing: float = 0.1
    vocabulary: int = 8000
    max_tokens: int = 1024
    learning_rate: float = 1e-3
    seed: int = 0
    bf16: bool | None = None

    def make_model(self, vocabulary: int) -> nn.Module:
        """Ours or PyTorch's, for tokens 0 to vocabulary - 1, with the usual weights of translation models at first."""
        if self.baseline:
            return StockTransformer(vocabulary, self.dim, self.layers, self.heads, self.dropout, LONGEST)
        model = EncoderDecoder(
            TransformerConfig(
                vocabulary, self.dim, self.layers, self.heads, positions=self.positions, dropout=self.dropout,
                max_positions=LONGEST, scale_embeddings=True,
            )
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            if name.startswith("embedding"):
                nn.init.normal_(parameter, std=self.dim**-0.5)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
        return model


class TranslationLoss(nn.Module):
    """A model under its loss, so that a call is all that training needs, also of several processes."""

    def __init__(self, model: nn.Module, label_smoothing: float):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """The sum of the cross-entropy of all labels `(B, T)` but those that are `IGNORED`."""
        features, real = self.model.features(source, lengths, target), labels != IGNORED
        if isinstance(self.model, StockTransformer):
            logits = F.linear(features[real], self.model.output_weight).float()
            return F.cross_entropy(logits, labels[real], label_smoothing=self.label_smoothing, reduction="sum")
        weight = self.model.output_weight
        return linear_cross_entropy(
            features[real], weight, labels[real], label_smoothing=self.label_smoothing, reduction="sum"
        )


def collate(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """A batch of token ids as `TranslationLoss` takes it; a source ends with END."""
    source, lengths = pad([[*ids, END] for ids in sources], PAD)
    target, labels, _ = teacher_forcing(targets, BEGIN, END, PAD)
    return source, lengths.int(), target, labels


class Translator:
    """Texts in, texts out.

    Args:
        model: On its device, in evaluation mode.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, folder: Path, device: str | torch.device) -> "Translator":
        """The best model that was trained in a folder.

        Raises:
            ValueError: there is none, or its files are not of one model; the message names the file.
        """
        options, tokenizer = load_options(folder), load_tokenizer(folder / TOKENIZER)
        checkpoint = best(folder) or latest(folder)
        if checkpoint is None:
            raise ValueError(f"{folder}: expected a checkpoint of a trained model, got none")
        model = TranslationLoss(options.make_model(tokenizer.get_vocab_size()), 0.0)
        load_weights(checkpoint, model)
        return cls(model.model.to(device), tokenizer)

    def translate(
        self,
        texts: Sequence[str],
        *,
        method: str = "beam",
        beam_size: int = 5,
        length_penalty: float = 1.0,
        top_k: int = 10,
        seed: int = 0,
        batch: int = 32,
        progress: bool = False,
    ) -> list[str]:
        """A translation of each text; of an empty one "". Longer ones than the model is made for are cut in pieces.

        Args:
            method: "greedy", "beam" or "top-k" (which draws, by `seed`).
            batch: Texts translated together.
        """
        places, pieces = [], []
        for place, text in enumerate(texts):
            parts = list(self.pieces(text))
            if len(parts) > 1:
                tokens = sum(map(len, parts))
                print(f"text {place + 1} has {tokens} tokens: translated in {len(parts)} pieces", file=sys.stderr)
            places += [place] * len(parts)
            pieces += parts
        found = [""] * len(texts)
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        written: dict[int, str] = {}
        options = dict(beam_size=beam_size, length_penalty=length_penalty, top_k=top_k, seed=seed)
        for start in tqdm(range(0, len(order), batch), "Translating", unit="batch", disable=not progress, leave=False):
            rows = order[start : start + batch]
            outputs = self.generate([pieces[i] for i in rows], method, **options)
            written |= zip(rows, self.tokenizer.decode_batch(outputs), strict=True)
        for i, place in enumerate(places):  # in the order of the text
            found[place] = f"{found[place]} {written[i]}".strip()
        return found

    @torch.no_grad()
    def generate(
        self,
        sources: Sequence[list[int]],
        method: str,
        *,
        beam_size: int = 5,
        length_penalty: float = 1.0,
        top_k: int = 10,
        seed: int = 0,
        limits: Tensor | None = None,
    ) -> list[list[int]]:
        """Target ids of source ids, without begin and end.

        Args:
            limits: Most tokens of each target, int64 `(sources,)`; by default twice the source's and 10.
        """
        source, lengths = pad([[*ids, END] for ids in sources], PAD)
        limits = 2 * lengths + 10 if limits is None else limits
        limits = limits.clamp_max(LONGEST - 1).to(self.device)
        state = self.model.decoding_state(source.to(self.device), lengths.int().to(self.device), int(limits.max()) + 1)
        prefix = torch.full((len(sources), 1), BEGIN, device=self.device)
        rules = dict(end=END, max_length=limits)
        if method == "greedy":
            return [h.tokens for h in greedy(state, prefix, **rules)]
        if method == "top-k":
            return [h[0].tokens for h in sample(state, prefix, **rules, top_k=top_k, seed=seed)]
        if method != "beam":
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        found = beam_search(state, prefix, **rules, beam_size=beam_size, length_penalty=length_penalty)
        return [h[0].tokens for h in found]

    def pieces(self, text: str) -> Iterator[list[int]]:
        """Token ids of a text, in pieces that the model is made for, cut between words where that is possible."""
        ids = self.tokenizer.encode(text.strip()).ids if text.strip() else []
        most = LONGEST // 2 - 1
        while len(ids) > most:
            starts = [i for i in range(1, most + 1) if self.tokenizer.id_to_token(ids[i]).startswith("Ġ")]
            cut = starts[-1] if starts else most
            yield ids[:cut]
            ids = ids[cut:]
        if ids:
            yield ids

    @torch.no_grad()
    def cross_attention(self, source: str, target: str) -> tuple[list[str], list[str], Tensor]:
        """Tokens of the source and of the target, each with its end, and the weights `(target tokens, source tokens)`.

        They are the last layer's, the mean over its heads, at the step that gives each target token.
        """
        source_ids, target_ids = (self.tokenizer.encode(text).ids for text in (source, target))
        rows = torch.tensor([[*source_ids, END]], device=self.device)
        state = self.model.decoding_state(rows, None, len(target_ids) + 1)
        weights = []
        for token in (BEGIN, *target_ids):
            state.step(torch.tensor([[token]], device=self.device))
            weights.append(state.attention[0].float().cpu())
        names = [[self.tokenizer.decode([i]) for i in ids] + ["</s>"] for ids in (source_ids, target_ids)]
        return names[0], names[1], torch.stack(weights)


def save_options(folder: Path, options: Options) -> None:
    write_text(folder / OPTIONS, json.dumps(asdict(options), indent=1))


def load_options(folder: Path) -> Options:
    """What `save_options` saved.

    Raises:
        ValueError: the file is not there, or not such options.
    """
    path = folder / OPTIONS
    try:
        values = json.loads(path.read_text())
        return Options(**{**values, "corpus": tuple(values["corpus"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the options of a trained model, got: {error}") from None


def read_pairs(path: Path) -> list[Pair]:
    return [pair for document in read_tsv(path) for pair in document.pairs]


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    """Writes `source TAB target` lines, which `read_pairs` reads."""
    path.write_text("".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
