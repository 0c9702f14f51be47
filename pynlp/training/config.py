"""The configuration and the progress of training: what checkpoints hold besides tensors."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from pynlp.training.schedules import WarmupCosine, WarmupInverseSquareRoot

# A resumed training may change these: no update of the weights depends on them.
MAY_CHANGE = ("steps", "validate_every", "save_every", "keep_last", "patience")


@dataclass(frozen=True)
class TrainingConfig:
    """The configuration of a training.

    Attributes:
        steps: Updates of the weights.
        learning_rate: The highest one.
        schedule: Each step's share of the learning rate: `WarmupCosine`, `WarmupInverseSquareRoot`.
        batches_per_step: Batches whose gradients make one update, those of all processes together.
        weight_decay: Decay of matrices; biases and norms have none. Loshchilov and Hutter, arXiv 1711.05101.
        betas: Decay of AdamW's averages of the gradient and of its square. Kingma and Ba, arXiv 1412.6980.
        clip_norm: Largest norm of all gradients together.
        bf16: Whether the loss is computed under autocast; `pynlp.has_bf16` tells where that is faster.
        ema_decay: Decay of the weights' moving average, which is then validated in their place; None = no average.
        seed: Seed of dropout; the order of the batches has its own.
        validate_every, save_every: Steps; the last one counts as well, and each best one is saved.
        keep_last: Checkpoints; the best one is kept besides.
        patience: Validations without a better result after which training stops; None = all steps are done.

    Raises:
        ValueError: a field is out of range; the message names it.

    Example:
        >>> from pynlp.training import TrainingConfig, WarmupCosine
        >>> config = TrainingConfig(steps=1000, learning_rate=1e-3, schedule=WarmupCosine(warmup=100, steps=1000))
        >>> config.betas, config.clip_norm
        ((0.9, 0.98), 1.0)
    """

    steps: int
    learning_rate: float
    schedule: WarmupCosine | WarmupInverseSquareRoot
    batches_per_step: int = 1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    bf16: bool = False
    ema_decay: float | None = None
    seed: int = 0
    validate_every: int = 500
    save_every: int = 500
    keep_last: int = 3
    patience: int | None = None

    def __post_init__(self):
        for name in ("steps", "batches_per_step", "validate_every", "save_every", "keep_last", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected more than 0 and less than 1, or None, got {self.ema_decay}")


@dataclass
class Progress:
    """The progress of a training.

    Attributes:
        step: Updates done.
        epoch, position: The epoch, and how many of its batches are done.
        best, best_step: The best score so far (without scores, validation loss) and its step; None before the first.
        validations_since_best: What patience limits.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    best: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0


def describe(config: TrainingConfig, data: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """All facts that decide what a step does, as they come back from JSON."""
    schedule = {"name": type(config.schedule).__name__, **asdict(config.schedule)}
    training = {**asdict(config), "schedule": schedule}
    return json.loads(json.dumps({"training": training, "data": data, "description": description}))


def check_same(saved: dict[str, Any], now: dict[str, Any], checkpoint: str) -> None:
    """Raise ValueError, which names all fields that differ, unless two descriptions are of one training."""
    before, after = dict(_flat(saved)), dict(_flat(now))
    differences = [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in [f"training.{field}" for field in MAY_CHANGE]
    ]
    if differences:
        raise ValueError(f"config: expected the configuration of {checkpoint}, got another: " + "; ".join(differences))


def _flat(description: dict[str, Any], prefix: str = ""):
    """Pairs of dotted names and values."""
    for name, value in description.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
