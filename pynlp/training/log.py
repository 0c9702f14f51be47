"""The log of a training: a CSV file, a plot of it, and TensorBoard's files on request."""

import csv
import os
import sys
from pathlib import Path

from matplotlib.figure import Figure

COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens", "seconds", "validation_loss", "score",
)  # fmt: skip


class Log:
    """A CSV file with one row for each step, to which a resumed training appends; no step is in it twice.

    Args:
        folder: Where `log.csv`, `loss.png` and `tensorboard/` are written.
        step: The last step so far: later rows are dropped.
        tensorboard: Whether TensorBoard's files are written, too.
        score_name: The score's name in the plot.

    Raises:
        ImportError: `tensorboard` is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, score_name: str = "score"):
        self.path, self.image, self.score_name = folder / "log.csv", folder / "loss.png", score_name
        self.tensorboard = _summary_writer(folder / "tensorboard", step) if tensorboard else None
        rows = read_log(self.path, step)
        temporary = self.path.with_name("log.part.csv")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)
        self.file = open(self.path, "a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)

    def write(self, row: dict[str, float]) -> None:
        """Append one step's values by column; columns without a value stay empty."""
        self.writer.writerow(row)
        self.file.flush()
        if self.tensorboard is not None:
            for name, value in row.items():
                if name != "step":
                    self.tensorboard.add_scalar(name, value, row["step"])

    def plot(self, best_step: int | None = None) -> None:
        """Draw training and validation loss of all steps so far, the score if there is one, and the best step."""
        rows = read_log(self.path)
        steps = [row["step"] for row in rows]
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, [row["loss"] for row in rows], lw=0.8, alpha=0.7, label="training loss")
        validated = [row for row in rows if "validation_loss" in row]
        if validated:
            losses = [row["validation_loss"] for row in validated]
            axes.plot([row["step"] for row in validated], losses, "o-", ms=3, label="validation loss")
        axes.set(xlabel="step", ylabel="loss (nats per token or example)", title="Training")
        if len(steps) > 1:
            axes.set_xlim(steps[0], steps[-1])
        axes.grid(alpha=0.3)
        scored = [row for row in rows if "score" in row]
        if scored:
            right = axes.twinx()
            values = [row["score"] for row in scored]
            right.plot([row["step"] for row in scored], values, "s--", color="black", ms=3, label=self.score_name)
            right.set_ylabel(self.score_name)
        if best_step is not None:
            axes.axvline(best_step, color="green", ls=":", label=f"best, step {best_step}")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)  # outside it covers no line
        temporary = self.image.with_name("loss.part.png")
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, self.image)

    def close(self) -> None:
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def read_log(path: Path, last_step: int | None = None) -> list[dict[str, float]]:
    """The rows of a log up to a step, without their empty columns; none where there is no file.

    A last line that was not finished is left out.
    """
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1].splitlines()
    rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(whole)]
    for row in rows:
        row["step"], row["epoch"], row["tokens"] = int(row["step"]), int(row["epoch"]), int(row["tokens"])
    return [row for row in rows if last_step is None or row["step"] <= last_step]


def _summary_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"tensorboard: expected it to be installed: {sys.executable} -m pip install tensorboard"
        ) from error
    return SummaryWriter(folder, purge_step=step + 1)
