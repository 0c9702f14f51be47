"""Training of any torch module: batches by tokens, schedules, checkpoints, resuming to the bit, many processes."""

from pynlp.training.batches import IGNORED, Batches, pad, teacher_forcing
from pynlp.training.checkpoints import average_weights, best, latest, load_weights
from pynlp.training.processes import process_group
from pynlp.training.schedules import WarmupCosine, WarmupInverseSquareRoot
from pynlp.training.trainer import Interrupted, Trainer, TrainingConfig

__all__ = [
    "IGNORED",
    "Batches",
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
