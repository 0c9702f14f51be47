"""Training of any torch module, which can be stopped anywhere and goes on to the bit."""

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from pynlp.nn.moe import moe_layers, update_router_biases
from pynlp.training import checkpoints
from pynlp.training.batches import Batches
from pynlp.training.config import Progress, TrainingConfig, check_same, describe
from pynlp.training.log import Log
from pynlp.training.processes import gather, rank_and_world, sum_over_processes
from pynlp.training.randomness import generator_states, restore_generators, seed_generators


class Interrupted(SystemExit):
    """Training was stopped by Ctrl-C, and `checkpoint` has all of it. Uncaught, it ends a script with exit code 130.

    Example:
        >>> from pathlib import Path
        >>> from pynlp.training import Interrupted
        >>> try:
        ...     raise Interrupted(Path("results/step-00000100"))  # as Trainer.train does
        ... except Interrupted as interrupted:
        ...     print(interrupted.checkpoint.name)
        step-00000100
    """

    def __init__(self, checkpoint: Path):
        super().__init__(130)
        self.checkpoint = checkpoint


class Trainer:
    """AdamW with a schedule, clipping, gradient accumulation, validation, checkpoints and a log of every step.

    Under torchrun, within `process_group()`, the updates are those of one process with the same batches. All processes
    must see `folder`; the first one writes.

    Args:
        model: On its device.
        loss: `loss(model, batch)` -> (sum of the loss over tokens or examples, their number). It calls `model(...)`,
            for with several processes the model is wrapped.
        training, validation: Batches to train on, and batches whose loss is only measured.
        folder: Where `step-*/`, `log.csv`, `loss.png` and `tensorboard/` are written.
        score: Gives the model in evaluation mode a number, the more the better; called in the first process.
        score_name: The score's name in what is printed and in the plot, "BLEU" say.
        description: Facts, as JSON, that a checkpoint must share besides `config`, e.g. the model's configuration.
        tensorboard: Whether TensorBoard's files are written.

    Raises:
        ValueError: the batches of a step are no multiple of the processes, no parameter is to be trained, or
            patience has nothing to count by.

    Example:
        >>> import torch
        >>> from pynlp.training import Batches, Trainer, TrainingConfig, WarmupCosine, latest, load_weights
        >>> x = torch.randn(64, 8)
        >>> y = x.sum(1, keepdim=True)
        >>> def loss(model, items):  # the sum over a batch, and the number of its items
        ...     return torch.nn.functional.mse_loss(model(x[items]), y[items], reduction="sum"), len(items)
        >>> model = torch.nn.Linear(8, 1)
        >>> batches = Batches([1] * 64, 16, torch.tensor)
        >>> config = TrainingConfig(steps=20, learning_rate=0.1, schedule=WarmupCosine(warmup=5, steps=20))
        >>> trainer = Trainer(model, loss, config, batches, "results")
        >>> progress = trainer.train()
        9 parameters to train on 64 items, 100% of whose batches' tokens are no padding; step 0 of 20
        >>> progress.step, progress.epoch
        (20, 5)
        >>> load_weights(latest(trainer.folder), model)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], tuple[Tensor, int | Tensor]],
        config: TrainingConfig,
        training: Batches,
        folder: Path,
        *,
        validation: Batches | None = None,
        score: Callable[[nn.Module], float] | None = None,
        score_name: str = "score",
        description: dict[str, Any] | None = None,
        tensorboard: bool = False,
    ):
        self.model, self.loss, self.config, self.training = model, loss, config, training
        self.folder, self.validation, self.score, self.tensorboard = Path(folder), validation, score, tensorboard
        self.score_name = score_name
        self.description = describe(config, training.summary, description or {})
        self.rank, self.world = rank_and_world()
        if config.batches_per_step % self.world:
            raise ValueError(
                f"batches_per_step: expected a multiple of the {self.world} processes, got {config.batches_per_step}"
            )
        if config.patience is not None and validation is None and score is None:
            raise ValueError("patience: expected validation batches or a score to count by, got neither")
        if self.world > 1 and any(layer.group is not None for layer in moe_layers(model).values()):
            raise ValueError(
                "model: expected all experts in each process, got layers that share them: see shard_experts_"
            )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("model: expected parameters that require gradients, got none")
        self.device = self.parameters[0].device
        biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}  # those of experts are (E, n)
        decays = [p.dim() >= 2 and id(p) not in biases for p in self.parameters]
        matrices = [p for p, decayed in zip(self.parameters, decays, strict=True) if decayed]
        others = [p for p, decayed in zip(self.parameters, decays, strict=True) if not decayed]
        matrices = {"params": matrices, "weight_decay": config.weight_decay}
        others = {"params": others, "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW([matrices, others], config.learning_rate, config.betas, fused=True)
        self.parallel = model if self.world == 1 else DistributedDataParallel(model)  # which copies rank 0's weights
        self.ema = None
        if config.ema_decay is not None:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.progress = Progress()
        self.stop_asked = False

    def train(self, *, resume: bool = False) -> Progress:
        """Train for `config.steps`, or until patience is over; with `resume` from the latest checkpoint on.

        Raises:
            FileExistsError, FileNotFoundError: there are checkpoints and none is to be resumed, or the reverse.
            ValueError: the checkpoint is of another configuration or model; the message names what differs.
            FloatingPointError: the loss or its gradient is not finite.
            OSError: a file could not be written; earlier checkpoints are intact.
            Interrupted: Ctrl-C; the step was finished and saved. A second Ctrl-C interrupts at once.
        """
        self._begin(resume)
        speeds: deque[tuple[int, float]] = deque(maxlen=20)
        bar = tqdm(total=self.config.steps, initial=self.progress.step, unit="step", disable=self.rank > 0)
        with self._ctrl_c_asks_to_stop(), bar, self._log() as log:
            for group in self._groups():
                row = self._step(group)
                validates = self.progress.step % self.config.validate_every == 0 or self._finished()
                values = self._validate() if validates else {}
                better = self._compare(values)
                if log is not None:
                    log.write({**row, **values})
                    if values:
                        bar.write(f"step {self.progress.step}: {self._shown(values)}{' (best)' if better else ''}")
                speeds.append((row["tokens"], row["seconds"]))
                tokens, seconds = map(sum, zip(*speeds, strict=True))
                bar.set_postfix({"loss": f"{row['loss']:.3f}", "tokens/s": f"{tokens / seconds:.0f}"}, refresh=False)
                bar.update()

                stops = sum_over_processes([self.stop_asked], self.device)[0] > 0
                if stops or better or self.progress.step % self.config.save_every == 0 or self._finished():
                    self._save(log)
                if stops:
                    self._interrupt()
        return self.progress

    def _shown(self, values: dict[str, float]) -> str:
        names = {"score": self.score_name}
        return ", ".join(f"{names.get(name, name)} {value:.4g}" for name, value in values.items())

    def _begin(self, resume: bool) -> None:
        there = checkpoints.all_checkpoints(self.folder)
        if there and not resume:
            raise FileExistsError(f"folder: expected one without checkpoints, or resume=True, got {there[-1]}")
        if resume:
            self._resume()
        else:
            seed_generators(self.config.seed, 0, self.rank)
        self.model.train()
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            print(
                f"{sum(p.numel() for p in self.parameters):,} parameters to train on {len(self.training.lengths):,} "
                f"items, {self.training.efficiency():.0%} of whose batches' tokens are no padding; "
                f"step {self.progress.step} of {self.config.steps}"
            )

    def _resume(self) -> None:
        path = checkpoints.latest(self.folder)
        if path is None:
            raise FileNotFoundError(f"resume: expected a checkpoint in {self.folder}, got none")
        state = checkpoints.read_state(path)
        check_same(state["description"], self.description, str(path))
        checkpoints.load(path, self.model, self.optimizer, None if self.ema is None else self.ema.module)
        self.progress = Progress(**state["progress"])
        if self.ema is not None:
            self.ema.n_averaged.fill_(self.progress.step)
        if len(state["generators"]) == self.world:
            restore_generators(state["generators"][self.rank], self.device)
        else:  # another number of processes: no state is theirs
            seed_generators(self.config.seed, self.progress.step, self.rank)

    def _groups(self) -> Iterator[list[list[int]]]:
        """Batches of each following step, epoch after epoch; the last step of an epoch may have fewer."""
        progress = self.progress
        while True:
            batches = self.training.epoch(progress.epoch)
            while progress.position < len(batches):
                if self._finished():
                    return
                yield batches[progress.position : progress.position + self.config.batches_per_step]
            progress.epoch, progress.position = progress.epoch + 1, 0

    def _step(self, group: list[list[int]]) -> dict[str, float]:
        """Update the weights by a group of batches, of which this process takes its share; returns the log's row."""
        start = time.perf_counter()
        learning_rate = self.config.learning_rate * self.config.schedule(self.progress.step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss, tokens = self._backward(group)
        if not (math.isfinite(loss) and tokens > 0):
            raise FloatingPointError(
                f"loss: expected a finite sum over at least 1 token, got {loss} over {tokens} in step "
                f"{self.progress.step + 1}"
            )
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(self.world / tokens)  # DistributedDataParallel gives the mean of the processes
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"loss: expected a finite gradient, got {norm} in step {self.progress.step + 1}")
        self.optimizer.step()
        update_router_biases(self.model)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.progress.step += 1
        self.progress.position += len(group)
        return {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "loss": loss / tokens,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "tokens": int(tokens),
            "seconds": time.perf_counter() - start,
        }

    def _backward(self, group: list[list[int]]) -> tuple[float, float]:
        """Compute gradients of the summed loss, averaged over processes; returns sum and tokens of all processes."""
        share = group[self.rank :: self.world]
        loss, tokens = 0.0, 0.0
        # A process without a batch takes part in the exchange of gradients with zeros.
        for number, items in enumerate(share or group[:1], start=1):
            exchanges = self.world == 1 or number >= len(share)
            with nullcontext() if exchanges else self.parallel.no_sync():
                total, count = self._loss(self.parallel, self.training, items)
                (total if share else 0 * total).backward()
            if share:
                loss, tokens = loss + total.item(), tokens + int(count)
        loss, tokens = sum_over_processes([loss, tokens], self.device)
        return loss, tokens

    def _loss(self, model: nn.Module, batches: Batches, items: list[int]) -> tuple[Tensor, int | Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            result = self.loss(model, batches.collate(items))
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"loss: expected to return a sum and a number, got {type(result).__name__}")
        return result

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss and score; to compute them leaves no trace in training, not even in the random generators."""
        model = self.model if self.ema is None else self.ema.module
        generators = generator_states(self.device)
        model.eval()
        values = {}
        if self.validation is not None:
            sums = [0.0, 0.0]
            share = self.validation.epoch(0)[self.rank :: self.world]
            # A bar below the steps', if it takes longer than an eye's wait.
            for items in tqdm(share, "Validating", unit="batch", leave=False, delay=2, disable=self.rank > 0):
                total, count = self._loss(model, self.validation, items)
                sums = [sums[0] + total.item(), sums[1] + int(count)]
            loss, tokens = sum_over_processes(sums, self.device)
            values["validation_loss"] = loss / tokens
        if self.score is not None:
            values["score"] = gather(self.score(model) if self.rank == 0 else None)[0]
        model.train()
        restore_generators(generators, self.device)
        return values

    def _compare(self, values: dict[str, float]) -> bool:
        """Whether these are the best values so far."""
        if not values:
            return False
        progress = self.progress
        value = values.get("score", values.get("validation_loss"))
        if progress.best is None:
            better = not math.isnan(value)
        else:
            better = value > progress.best if self.score is not None else value < progress.best
        if better:
            progress.best, progress.best_step, progress.validations_since_best = value, progress.step, 0
        else:
            progress.validations_since_best += 1
        return better

    def _finished(self) -> bool:
        patience = self.config.patience
        impatient = patience is not None and self.progress.validations_since_best >= patience
        return impatient or self.progress.step >= self.config.steps

    def _save(self, log: Log | None) -> None:
        generators = gather(generator_states(self.device))
        if log is not None:
            step = self.progress.step
            state = {"progress": asdict(self.progress), "description": self.description, "generators": generators}
            ema = None if self.ema is None else self.ema.module
            checkpoints.save(self.folder, step, state, self.model, self.optimizer, ema)
            checkpoints.keep_only(self.folder, step, self.config.keep_last, self.progress.best_step)
            log.plot(self.progress.best_step)
        gather(None)  # torchrun ends all processes with the first one that ends: none may while another writes

    def _log(self) -> AbstractContextManager[Log | None]:
        if self.rank > 0:
            return nullcontext()
        return closing(Log(self.folder, self.progress.step, self.tensorboard, self.score_name))

    @contextmanager
    def _ctrl_c_asks_to_stop(self) -> Iterator[None]:
        """Take Ctrl-C as a wish to stop after the step, unless the program handles or ignores it in its own way."""
        self.stop_asked = False
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def ask(number, frame):
            self.stop_asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # for the second one

        signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _interrupt(self) -> None:
        path = checkpoints.path_of(self.folder, self.progress.step)
        if self.rank == 0:
            print(f"Interrupted: all of it is saved in {path}, from where training can be resumed", file=sys.stderr)
        raise Interrupted(path)
