"""Learning rates over time as factors of the highest one; `torch.optim.lr_scheduler.LambdaLR` takes them, too."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Rises linearly to 1 in `warmup` steps, then falls along a cosine to `floor` at step number `steps` and stays.

    Attributes:
        warmup: Steps of the rise, at least 1.
        steps: The step from which on the factor is `floor`; more than `warmup`.
        floor: The last factor, 0 to 1.

    Source: Loshchilov and Hutter, arXiv 1608.03983, equation 5.

    Example:
        >>> from pynlp.training import WarmupCosine
        >>> schedule = WarmupCosine(warmup=10, steps=100)
        >>> schedule(0), schedule(9), round(schedule(99), 6)
        (0.1, 1.0, 0.1)
    """

    warmup: int
    steps: int
    floor: float = 0.1

    def __post_init__(self):
        _check_warmup(self.warmup)
        if self.steps <= self.warmup:
            raise ValueError(f"steps: expected more than warmup={self.warmup}, got {self.steps}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: expected 0 to 1, got {self.floor}")

    def __call__(self, step: int) -> float:
        """The factor of the step after `step` others."""
        number = step + 1
        if number <= self.warmup:
            return number / self.warmup
        progress = min(1.0, (number - self.warmup) / (self.steps - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class WarmupInverseSquareRoot:
    """Rises linearly to 1 in `warmup` steps, then falls with the square root of the step's number.

    Attributes:
        warmup: Steps of the rise, at least 1.

    Source: Vaswani et al., arXiv 1706.03762, equation 3.

    Example:
        >>> from pynlp.training import WarmupInverseSquareRoot
        >>> schedule = WarmupInverseSquareRoot(warmup=10)
        >>> schedule(0), schedule(9), schedule(39)
        (0.1, 1.0, 0.5)
    """

    warmup: int

    def __post_init__(self):
        _check_warmup(self.warmup)

    def __call__(self, step: int) -> float:
        """The factor of the step after `step` others."""
        number = step + 1
        return min(number / self.warmup, math.sqrt(self.warmup / number))


def _check_warmup(warmup: int) -> None:
    if warmup < 1:
        raise ValueError(f"warmup: expected at least 1 step, got {warmup}")
