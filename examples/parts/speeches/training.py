"""How the models of the speeches are trained: one recipe for `pynlp.training.Trainer`; its messages in flags' names.

Training that is interrupted goes on with --resume, to the bit; a run that is finished only tells its results again.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from parts.common.reports import History
from torch import Tensor, nn
from tqdm import tqdm

from pynlp.training import Batches, Interrupted, Trainer, TrainingConfig, WarmupCosine, best, load_weights


class Trained(NamedTuple):
    """The course of a training: values of each step they were asked for, earlier runs' included, and the kept step."""

    evaluations: dict[int, dict[str, float]]
    kept: int


class Recipe(NamedTuple):
    """What a user may choose of training.

    Attributes:
        steps: Updates.
        seed: Of the first weights, the order of the batches and dropout.
        resume: Whether to go on from the latest checkpoint.
        output: Folder of checkpoints, tables and figures.
    """

    steps: int
    seed: int
    resume: bool
    output: Path


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], tuple[Tensor, int]],
    batches: Batches,
    recipe: Recipe,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]],
    score: Callable[[dict[str, float]], float],
    score_name: str,
    description: dict[str, Any],
    learning_rate: float,
    every: int = 100,
    bf16: bool = False,
) -> Trained:
    """Trains the model, evaluates it as it goes, and gives it the weights of the step with the best score.

    Args:
        evaluate: Values of the model by name.
        score: Of these values, the more the better. Of a held-out part of training's own, so that no test chooses
            anything, nor what was trained on, which only gets better.
        description: What a checkpoint must have in common.
        every: Steps from one evaluation, and one checkpoint, to the next; the last step counts as well.

    Raises:
        SystemExit: the folder has other checkpoints than expected; the message says what to do.
        Interrupted: Ctrl-C; all is saved.
    """
    history = History(recipe.output / "evaluations.csv", resume=recipe.resume)

    def evaluate_and_keep(model: nn.Module) -> float:
        values = evaluate(model)
        history.add(trainer.progress.step, values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"step {trainer.progress.step}: {shown}")
        return score(values)

    warmup = max(1, recipe.steps // 10)
    config = TrainingConfig(
        recipe.steps,
        learning_rate,
        WarmupCosine(warmup, recipe.steps),
        bf16=bf16,
        seed=recipe.seed,
        validate_every=every,
        save_every=every,
        keep_last=1,
    )
    trainer = Trainer(model, loss, config, batches, recipe.output, score=evaluate_and_keep,
                      score_name=score_name, description=description)  # fmt: skip
    try:
        trainer.train(resume=recipe.resume)
    except FileExistsError:
        raise SystemExit(
            f"--output: expected a folder without checkpoints, got {recipe.output}; "
            "go on from them with --resume, or choose another folder"
        ) from None
    except FileNotFoundError:
        raise SystemExit(f"--resume: expected a checkpoint in {recipe.output}, got none") from None
    except ValueError as error:
        if not recipe.resume:
            raise
        raise SystemExit(f"--resume: {error}") from None
    except Interrupted:
        print("To go on: the same command with --resume", file=sys.stderr)
        raise
    kept = best(recipe.output)
    if kept is not None:  # none where no score is a number
        load_weights(kept, model)
    return Trained(history.rows, trainer.progress.best_step or trainer.progress.step)
