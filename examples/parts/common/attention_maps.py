"""What the tokens of a sentence look at in a model's layers: its true weights, checks of them, and figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from parts.common.reports import write
from torch import Tensor, nn
from tqdm import tqdm

from pynlp.nn import MultiHeadAttention


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list of the weights `(B, H, S, S)` of each self-attention layer that runs, in that order."""
    weights: list[Tensor] = []

    def record(layer, arguments, options, out):
        weights.append(layer.weights(arguments[0], key_lengths=options["key_lengths"]))

    layers = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def check_weights(weights: Tensor, *, causal: bool, lengths: Tensor | None = None) -> None:
    """Check weights `(B, H, S, S)`: each row is a distribution over no padding and, if causal, over no later token.

    Raises:
        ValueError: a row is not; the message says where.
    """
    seqlen = weights.shape[-1]
    lengths = torch.full((len(weights),), seqlen) if lengths is None else lengths
    tokens = torch.arange(seqlen) < lengths[:, None]  # (B, S)
    off = (weights.sum(-1) - 1).abs() * tokens[:, None]  # rows of padding mean nothing
    if not off.max() <= 1e-5:  # also if it is NaN
        raise ValueError(f"weights: expected rows that add up to 1, got one that is off by {off.max():.1e}")
    hidden = ~tokens[:, None, None, :]
    if causal:
        hidden = hidden | torch.ones(seqlen, seqlen, dtype=torch.bool).triu(1)
    there = (weights * hidden * tokens[:, None, :, None]).nonzero()
    if len(there):
        row, head, query, key = there[0].tolist()
        what = "a later token" if causal and key > query else "padding"
        raise ValueError(f"weights: expected none on {what}, got token {query} on {key} in head {head} of row {row}")


def heat_map(axes: Axes, weights: Tensor, queries: list[str], keys: list[str]) -> AxesImage:
    """A picture of weights `(queries, keys)`, a row for each query."""
    image = axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(keys)), keys, rotation=90, fontsize=7)
    axes.set_yticks(range(len(queries)), queries, fontsize=7)
    return image


def plot_attention(weights: Tensor, tokens: list[str], title: str, path: Path) -> None:
    """A figure of one layer's weights `(H, S, S)`, a map a head."""
    side = 1.5 + 0.16 * len(tokens)
    figure = Figure(figsize=(side * len(weights), side + 0.4), layout="constrained")
    for head, axes in enumerate(figure.subplots(1, len(weights), squeeze=False)[0]):
        image = heat_map(axes, weights[head], tokens, tokens)
        axes.set(title=f"head {head + 1}", xlabel="key", ylabel="query")
    figure.colorbar(image, ax=figure.axes, shrink=0.7, label="attention weight")
    figure.suptitle(title)
    write(path, lambda part: figure.savefig(part, dpi=130))


@torch.no_grad()
def save_attention_maps(model: nn.Module, tokenizer, sentence: str, length: int, folder: Path, *, causal: bool) -> int:
    """Checks the weights of a sentence's first tokens and writes `attention_map_1.png` and so on, a file a layer.

    Returns:
        The number of layers.
    """
    encoding = tokenizer.encode(sentence)
    training = model.training
    model.eval()
    with recorded_weights(model) as weights:
        model.features(torch.tensor([encoding.ids[:length]]))
    model.train(training)
    for layer, layer_weights in enumerate(tqdm(weights, "Drawing the attention", leave=False, delay=2), start=1):
        check_weights(layer_weights, causal=causal)
        title = f"Self-attention weights, layer {layer} of {len(weights)}"
        plot_attention(layer_weights[0], encoding.tokens[:length], title, folder / f"attention_map_{layer}.png")
    return len(weights)
