"""Training of any torch module: batches by tokens, schedules, checkpoints, resuming to the bit, many processes.

Example:
    >>> from torch.nn.functional import cross_entropy
    >>> from pynlp.models import Decoder, TransformerConfig
    >>> from pynlp.training import IGNORED, Batches, Trainer, TrainingConfig, WarmupCosine, teacher_forcing
    >>> texts = [[first, first + 1, first + 2] for first in range(3, 9)]
    >>> def collate(items):
    ...     return teacher_forcing([texts[item] for item in items], start=1, end=2, padding=0)
    >>> def loss(model, batch):
    ...     inputs, targets, lengths = batch
    ...     logits = model(inputs).flatten(0, 1)
    ...     return cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum"), lengths.sum()
    >>> model = Decoder(TransformerConfig(vocab_size=12, embed_dim=16, layers=1, heads=2))
    >>> batches = Batches([len(text) + 1 for text in texts], 32, collate)
    >>> config = TrainingConfig(steps=3, learning_rate=1e-2, schedule=WarmupCosine(warmup=1, steps=3))
    >>> Trainer(model, loss, config, batches, "results").train().step
    3,280 parameters to train on 6 items, 100% of whose batches' tokens are no padding; step 0 of 3
    3
"""

import sys

try:
    import matplotlib  # noqa: F401
    import safetensors  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "safetensors", "tqdm"):
        raise
    raise ImportError(
        f"pynlp.training needs {error.name}: {sys.executable} -m pip install matplotlib safetensors tqdm"
    ) from error

from pynlp.training.batches import IGNORED, Batches, pad, teacher_forcing
from pynlp.training.checkpoints import average_weights, best, latest, load_weights
from pynlp.training.expert_load import ExpertLoad
from pynlp.training.processes import process_group
from pynlp.training.schedules import WarmupCosine, WarmupInverseSquareRoot
from pynlp.training.trainer import Interrupted, Trainer, TrainingConfig

__all__ = [
    "IGNORED",
    "Batches",
    "ExpertLoad",
    "Interrupted",
    "Trainer",
    "TrainingConfig",
    "WarmupCosine",
    "WarmupInverseSquareRoot",
    "average_weights",
    "best",
    "latest",
    "load_weights",
    "pad",
    "process_group",
    "teacher_forcing",
]
