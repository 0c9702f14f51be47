"""Measures of classifiers that take turns, batch by batch: accuracy, bytes, milliseconds, errors by layer."""

import gc
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NamedTuple

import torch
from parts.topics.classifier import TopicClassifier
from torch import Tensor, nn
from tqdm import tqdm

WARM_UP = 2  # batches

Batch = tuple[Tensor, Tensor, Tensor]  # token ids, lengths, topics


class Measured(NamedTuple):
    """The topics that a model says, and the seconds that each full batch takes."""

    said: Tensor
    seconds: list[float]


@torch.inference_mode()
def take_turns(models: Mapping[str, nn.Module], batches: Sequence[Batch], device: torch.device) -> dict[str, Measured]:
    """Runs all batches through all models, which take each batch in turn, every time another one first."""
    names, said, seconds = list(models), {name: [] for name in models}, {name: [] for name in models}
    for tokens, lengths, _ in tqdm(batches[:WARM_UP], "Warming up", unit="batch", leave=False):
        for model in models.values():
            model(tokens.to(device), lengths.to(device))
    for number, (tokens, lengths, _) in enumerate(tqdm(batches, "Taking turns", unit="batch")):
        tokens, lengths = tokens.to(device), lengths.to(device)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wait(device)
            start = time.perf_counter()
            logits = models[name](tokens, lengths)
            wait(device)
            if len(tokens) == len(batches[0][0]):
                seconds[name].append(time.perf_counter() - start)
            said[name].append(logits.argmax(1).cpu())
    return {name: Measured(torch.cat(said[name]), seconds[name]) for name in names}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def row_of(measured: Measured, exact: Measured, truth: Tensor, topics: int, tokens: int) -> dict[str, float]:
    """What a table says of a model.

    Args:
        exact: Of the model in fp32.
        truth: The topics that the texts have.
        tokens: Of a batch, padding included.
    """
    low, middle, high = statistics.quantiles(measured.seconds, n=4) if len(measured.seconds) > 1 else (
        3 * measured.seconds
    )  # fmt: skip
    return {
        "accuracy": (measured.said == truth).float().mean().item(),
        "F1": macro_f1(confusion(truth, measured.said, topics)),
        "agrees": (measured.said == exact.said).float().mean().item(),
        "ms": 1e3 * middle,
        "ms quartiles": [1e3 * low, 1e3 * high],
        "time / fp32": statistics.median(a / b for a, b in zip(measured.seconds, exact.seconds, strict=True)),
        "tokens/s": tokens / middle,
    }


def confusion(truth: Tensor, said: Tensor, topics: int) -> Tensor:
    """How many texts of each topic are said to be of each, `(true, said)`."""
    return torch.zeros(topics, topics).index_put_((truth, said), torch.tensor(1.0), accumulate=True)


def macro_f1(counts: Tensor) -> float:
    """The mean of the topics' F1 of `counts` `(true, said)`; of a topic that is neither true nor said 0."""
    return (2 * counts.diag() / (counts.sum(0) + counts.sum(1)).clamp_min(1)).mean().item()


def bytes_of(model: nn.Module) -> int:
    """Bytes of all tensors that a model holds, parameters, buffers and others, each memory counted once."""
    seen, sizes, left = set(), {}, [model]
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, type | ModuleType | FunctionType):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor) and x.device.type != "meta":
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        left += gc.get_referents(x)
    return sum(sizes.values())


@torch.inference_mode()
def hidden_states(model: TopicClassifier, tokens: Tensor) -> list[Tensor]:
    """Features (B, S, E) behind each block of a model, the first one's first, in fp32."""
    states = model.base(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    return [x.float() for x in states[1:]]


def relative_errors(states: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Root mean square of the error over that of the exact features, block by block."""
    return [
        (torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y)).item()
        for x, y in zip(states, exact, strict=True)
    ]


def machine(device: torch.device) -> str:
    """What figures were measured on."""
    name, information = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = f"{torch.cuda.get_device_name()}, " if device.type == "cuda" else ""
    return f"{gpu}{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
