"""A training step of a translation model beside torch.nn.Transformer's.

`python -m benchmarks.models.translation_training`.

Both have 256 channels, 3 + 3 layers, 4 heads, 1024 channels between, pre-norm, GELU, dropout 0.2 and one embedding of
8,000 tokens for source, target and logits; both train in bf16 autocast (in fp32 where there are no instructions for
bf16) with label smoothing and the fused AdamW, on the same batches of 64 sentences of 8 to 48 tokens, a step of each in
turn. PyTorch's model runs as fast as it can here: batch_first, padding and causal masks made once a batch, no logits of
the padding. Writes results/translation_training.json.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measure import machine, table, write_json
from pynlp import has_bf16
from pynlp.functional import linear_cross_entropy
from pynlp.models import EncoderDecoder, TransformerConfig

VOCABULARY, CHANNELS, LAYERS, HEADS, INNER, DROPOUT = 8000, 256, 3, 4, 1024, 0.2
BATCH, SHORTEST, LONGEST, PAD, SMOOTHING = 64, 8, 48, 0, 0.1


class Stock(nn.Module):
    """The model made of torch.nn.Transformer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, CHANNELS)
        self.positions = nn.Embedding(LONGEST, CHANNELS)
        self.dropout = nn.Dropout(DROPOUT)
        self.transformer = nn.Transformer(
            CHANNELS, HEADS, LAYERS, LAYERS, INNER, DROPOUT, "gelu", batch_first=True, norm_first=True, bias=False
        )
        for module in (self.embedding, self.positions):
            nn.init.normal_(module.weight, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens) + self.positions.weight[: tokens.shape[1]])

    def loss(self, source: Tensor, lengths: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        padding = torch.arange(source.shape[1], device=source.device) >= lengths[:, None]
        future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=source.device).triu(1)
        features = self.transformer(
            self.embed(source), self.embed(target), tgt_mask=future, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        real = labels != PAD
        logits = F.linear(features[real], self.embedding.weight)
        return F.cross_entropy(logits.float(), labels[real], label_smoothing=SMOOTHING)


class Ours(nn.Module):
    """The model made of our encoder-decoder and fused loss."""

    def __init__(self):
        super().__init__()
        self.model = EncoderDecoder(
            TransformerConfig(
                VOCABULARY,
                CHANNELS,
                LAYERS,
                HEADS,
                ffn_dim=INNER,
                positions="learned",
                max_positions=LONGEST,
                norm="layer",
                activation="gelu",
                dropout=DROPOUT,
            )  # fmt: skip
        )

    def loss(self, source: Tensor, lengths: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        features = self.model.features(source, lengths, target)
        real = labels != PAD
        weight = self.model.output_weight
        return linear_cross_entropy(features[real], weight, labels[real], label_smoothing=SMOOTHING)


def batches(count: int) -> list[tuple[Tensor, ...]]:
    """Batches whose targets are their sources plus one, which can be learnt."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        lengths = torch.randint(SHORTEST, LONGEST, (BATCH,), generator=generator)
        longest = int(lengths.max())
        source = torch.randint(3, 200, (BATCH, longest), generator=generator)
        source = source.masked_fill(torch.arange(longest) >= lengths[:, None], PAD)
        labels = torch.where(source == PAD, PAD, source + 1)
        target = F.pad(labels, (1, 0), value=1)[:, :-1]
        result.append((source, lengths.int(), target, labels))
    return result


def train(models: dict[str, nn.Module], steps: int) -> tuple[dict[str, list[float]], dict[str, list[float]], list[int]]:
    """Losses and seconds of each step of each model, in turns, and the tokens of each step."""
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True, betas=(0.9, 0.98))
        for name, model in models.items()
    }
    losses, seconds, tokens = {n: [] for n in models}, {n: [] for n in models}, []
    device = next(iter(models["ours"].parameters())).device
    for batch in tqdm(batches(steps), desc="steps", leave=False):
        tokens.append(int(batch[1].sum()) * 2)
        batch = [x.to(device) for x in batch]
        for name, model in models.items():
            start = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16(device)):
                loss = model.loss(*batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses[name].append(loss.item())  # waits for the GPU, where there is one
            seconds[name].append(time.perf_counter() - start)
    return losses, seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"ours": Ours().to(device), "torch.nn.Transformer": Stock().to(device)}
    losses, seconds, tokens = train(models, steps)
    warm = slice(min(5, steps - 1), None)
    rows = [
        {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens/s": f"{sum(tokens[warm]) / sum(seconds[name][warm]):.0f}",
            "first loss": f"{losses[name][0]:.3f}",
            "last losses": f"{statistics.mean(losses[name][-10:]):.3f}",
        }
        for name, model in models.items()
    ]
    print(table(rows))
    ratios = [b / a for a, b in zip(seconds["ours"][warm], seconds["torch.nn.Transformer"][warm], strict=True)]
    ratio = statistics.median(ratios)
    print(f"\nThe same step takes torch.nn.Transformer {ratio:.2f} times as long (asked: >= 1.8).")
    path = write_json("translation_training", {"machine": machine(), "models": rows, "ratio": ratio, "losses": losses})
    print(f"{machine()}\nwritten: {path}")


if __name__ == "__main__":
    main()
