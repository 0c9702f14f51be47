"""Finnish to English: trains a small translation model, measures it on held-out documents, and translates.

    python examples/translation.py train --minutes 10
    python examples/translation.py evaluate --method beam
    python examples/translation.py translate "Napsauta hiiren oikealla painikkeella taulukkoa."
    python examples/translation.py compare --minutes 10
    python examples/translation.py train --help          the options of a command and their defaults

`train` fetches the corpus, sets documents aside, trains subwords and the model, and writes what it found to --output:
BLEU and chrF as scores.json, translations.txt, the cross-attention of a sentence as cross_attention.png, and loss.png.
With --baseline it trains torch.nn.Transformer in the same time. Ctrl-C saves; --resume goes on to the bit. `translate`
takes a text, a file, or lines from the standard input, each translated as it comes. `compare` trains with each kind of
positions and decodes in each way. Under `torchrun --nproc-per-node N` a training step takes a batch in each process.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from parts.common import flags
from parts.common.reports import table, write_text
from parts.translation.corpora import Pair, load_documents
from parts.translation.figures import attention_map, bars
from parts.translation.preparation import FEWEST_SUBWORDS, load_tokenizer, save_tokenizer, split, train_tokenizer
from parts.translation.subword_sampling import load_segmentations, sample_segmentations
from parts.translation.translator import (
    LONGEST,
    METHODS,
    OPTIONS,
    TOKENIZER,
    Options,
    TranslationLoss,
    Translator,
    collate,
    load_options,
    read_pairs,
    save_options,
    write_pairs,
)
from sacrebleu.metrics import BLEU, CHRF
from tqdm import tqdm

from pynlp import has_bf16
from pynlp.models import EncoderDecoder
from pynlp.models.config import POSITIONS
from pynlp.training import IGNORED, Batches, Interrupted, Trainer, TrainingConfig, WarmupCosine, latest, process_group

OUTPUT = Path("results/translation")
DEFAULT = Options()
LARGEST_HEAD = 256  # dimensions
COMPARED = ("rope", "relative", "alibi", "sinusoidal")
SIDES = ("source.safetensors", "target.safetensors")  # segmentations of the texts to train on
FEW_EPOCHS = 20  # that segmentations other than the plain one would only slow down
HELD_OUT = 1000  # pairs to validate with, and to test with, or a tenth of few
SAMPLES, SCORED, VALIDATIONS = 5, 200, 6  # texts shown; texts and times of a BLEU score in training


def main(words: Sequence[str] | None = None) -> None:
    arguments = vars(parser().parse_args(words))
    command = arguments.pop("command")
    folder = Path(arguments.pop("output", OUTPUT))
    try:
        {"train": train, "evaluate": evaluate, "translate": translate, "compare": compare}[command](folder, **arguments)
    except (ValueError, FileExistsError, FileNotFoundError) as error:
        raise SystemExit(f"translation.py {command}: {error}") from None
    except FloatingPointError as error:
        raise SystemExit(f"translation.py {command}: --learning-rate: expected a lower one: {error}") from None
    except Interrupted:
        print(f"To go on: {sys.executable} {sys.argv[0]} train --resume --output {folder}", file=sys.stderr)
        raise


def parser() -> argparse.ArgumentParser:
    """The parser. Options that are not on the command line are not in its result: the functions have the defaults."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True)
    names = ("train", "evaluate", "translate", "compare")
    helps = ("train a model", "measure it on the test set", "translate", "positions and ways to decode in one table")
    parsers = {
        name: commands.add_parser(
            name, help=text, description=f"{text.capitalize()}.", argument_default=argparse.SUPPRESS
        )
        for name, text in zip(names, helps, strict=True)
    }
    for command in parsers.values():
        command.add_argument("--output", type=Path, help=f"folder of the model and the figures (default: {OUTPUT})")
    for name in ("train", "compare"):
        add_training_options(parsers[name])
    add = parsers["train"].add_argument
    add("--positions", choices=POSITIONS, help=f"how tokens know their places (default: {DEFAULT.positions})")
    add("--baseline", action="store_true", help="torch.nn.Transformer instead of pynlp's model")
    add("--overfit", type=flags.integer(1), metavar="N", help="train and test on the same N pairs (default: do not)")
    add("--resume", action="store_true", help="go on from the last checkpoint, with the options it was begun with")
    add("--tensorboard", action="store_true", help="write TensorBoard's files as well, to tensorboard/ in --output")
    for name in ("evaluate", "translate"):
        add = parsers[name].add_argument
        add("--method", choices=METHODS, help="how to decode (default: beam)")
        add("--beam-size", type=flags.integer(1), metavar="N", help="hypotheses that a beam keeps (default: 5)")
    add = parsers["translate"].add_argument
    add("text", nargs="?", help="what to translate (default: the standard input, a line at a time)")
    add("--file", type=Path, help="a UTF-8 file, a text a line, in place of `text` (default: none)")
    return result


def add_training_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--corpus", nargs="+", metavar="NAME", help="libreoffice, homeassistant, opus-100; a file of yours with the "
        "columns source TAB target, in this order; or two files with a sentence a line, the source's first "
        f"(default: {' '.join(DEFAULT.corpus)})",
    )  # fmt: skip
    time_or_steps = command.add_mutually_exclusive_group()
    time_or_steps.add_argument(
        "--minutes", type=flags.minutes, metavar="M", help="time to train and validate, from which the number of steps "
        f"follows (default: {DEFAULT.minutes:g})",
    )  # fmt: skip
    time_or_steps.add_argument(
        "--steps", type=flags.integer(1), metavar="N", help="updates, instead of a time (default: as --minutes says)"
    )
    for name, kind, text in (
        ("dim", flags.integer(1), "width of the model, a multiple of --heads"),
        ("layers", flags.integer(1), "blocks of the encoder, and of the decoder"),
        ("heads", flags.integer(1), "attention heads of a layer"),
        ("vocabulary", flags.integer(FEWEST_SUBWORDS), "subwords of both languages at most"),
        ("max-tokens", flags.integer(4), "tokens of a batch at most, source and target with their padding"),
        ("seed", flags.seed, "of the first weights, the batches and dropout"),
        ("dropout", flags.share, "share of the features set to 0 in training"),
        ("learning-rate", flags.positive, "the highest one, after the warm-up"),
    ):
        value = getattr(DEFAULT, name.replace("-", "_"))
        add(f"--{name}", type=kind, metavar="X" if isinstance(value, float) else "N", help=f"{text} (default: {value})")


def train(folder: Path, *, resume: bool = False, tensorboard: bool = False, **given) -> None:
    """Trains, or goes on, measures, and writes the figures."""
    with process_group() as device:
        first = not dist.is_initialized() or dist.get_rank() == 0
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard: expected its package to be installed, got none: pip install tensorboard")
        if first and not resume:
            prepare(folder, Options(**given), device)
        if dist.is_initialized():
            dist.barrier()
        options = resumed_options(folder, given) if resume else load_options(folder)
        training = trainer(folder, options, load_tokenizer(folder / TOKENIZER), device, tensorboard)
        training.train(resume=resume and latest(folder) is not None)
        if first:
            report(folder, Translator.load(folder, device), read_pairs(folder / "test.tsv"))


def resumed_options(folder: Path, given: dict) -> Options:
    """The options that a training was begun with; any that is given again must be the same."""
    options = load_options(folder)
    for name, value in given.items():
        there = getattr(options, name)
        if value != (list(there) if isinstance(there, tuple) else there):
            raise ValueError(f"--{name.replace('_', '-')}: expected {there}, as {folder / OPTIONS} has it, got {value}")
    return options


def prepare(folder: Path, options: Options, device: torch.device) -> None:
    """Sets documents aside, trains the subwords, plans the steps, and writes all of that down.

    Raises:
        FileExistsError, ValueError: something is not as expected, and nothing was written; the message names the flag.
    """
    if (folder / OPTIONS).exists():
        raise FileExistsError(f"--output: expected a folder without a model, or --resume, got {folder}")
    flags.check_output(folder)
    check_sizes(options)
    if options.overfit:
        options = replace(options, dropout=0.0, label_smoothing=0.0)
    options = replace(options, corpus=tuple(options.corpus))
    if options.bf16 is None:
        options = replace(options, bf16=has_bf16(device))
        print(f"training in {'bf16' if options.bf16 else 'fp32: no instructions for bf16 here'}")
    try:
        documents = load_documents(*options.corpus)
    except ValueError as error:
        raise ValueError(f"--corpus: {str(error).removeprefix('corpus: ')}") from None
    held_out = min(HELD_OUT, max(1, sum(len(document.pairs) for document in documents) // 10))
    pairs = split(documents, validation=held_out, test=held_out)
    parts = {name: getattr(pairs, name) for name in ("train", "validation", "test")}
    if options.overfit:
        parts = dict.fromkeys(parts, pairs.train[: options.overfit])
    print(f"Learning {options.vocabulary:,} subwords at most", flush=True)
    tokenizer = train_tokenizer(parts["train"], options.vocabulary)
    for part in ("train", "validation"):
        check_lengths(tokenizer, parts[part], options, part)
    if options.steps is None:
        options = replace(options, steps=planned_steps(options, tokenizer, parts, device))
    plain = plain_batches(tokenizer, parts["train"], options)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_pairs(folder / f"{name}.tsv", part)
    save_tokenizer(tokenizer, folder / TOKENIZER)
    if options.steps > FEW_EPOCHS * len(plain.epoch(0)) and not options.overfit:
        for side, texts in zip(SIDES, zip(*parts["train"], strict=True), strict=True):
            sample_segmentations(tokenizer, list(texts), folder / side)
    save_options(folder, options)


def check_sizes(options: Options) -> None:
    """Refuses sizes of which no model can be made.

    Raises:
        ValueError: the message names the flag.
    """
    dim, heads, head_dim = options.dim, options.heads, options.dim // options.heads
    if dim % heads:
        raise ValueError(f"--heads: expected a divisor of --dim {dim}, got {heads}")
    if options.baseline:
        return
    if head_dim > LARGEST_HEAD:
        raise ValueError(f"--heads: expected at least {-(-dim // LARGEST_HEAD)} with --dim {dim}, got {heads}")
    if options.positions == "rope" and head_dim % 2:
        raise ValueError(
            f"--dim: expected an even number a head with --positions rope, got {dim} / {heads} = {head_dim}"
        )
    if options.positions == "sinusoidal" and dim % 2:
        raise ValueError(f"--dim: expected an even number with --positions sinusoidal, got {dim}")


def check_lengths(tokenizer, pairs: list[Pair], options: Options, part: str) -> None:
    """Refuses pairs of which none fits into a batch.

    Raises:
        ValueError: the message names the flag.
    """
    both = (encode(tokenizer, texts) for texts in zip(*pairs, strict=True))
    shortest = min(max(map(len, ids)) for ids in zip(*both, strict=True)) + 1
    if shortest > longest_side(options) + 1:
        raise ValueError(
            f"--max-tokens: expected at least {2 * shortest}, for the shortest pair of the {part} set, got "
            f"{options.max_tokens}"
        )


def planned_steps(options: Options, tokenizer, parts: dict[str, list[Pair]], device: torch.device) -> int:
    """Steps that take `minutes` on this machine together with the validations between them; 20 at least."""
    step = seconds_per_step(options, tokenizer, plain_batches(tokenizer, parts["train"], options), device)
    validation = seconds_per_validation(options, tokenizer, parts["validation"], device)
    steps = max(20, round((60 * options.minutes - VALIDATIONS * validation) / step))
    print(
        f"{step:.2f} s a step and {validation:.1f} s a validation: {steps} steps and {VALIDATIONS} validations in "
        f"{options.minutes:g} minutes"
    )
    return steps


def trainer(folder: Path, options: Options, tokenizer, device: torch.device, tensorboard: bool) -> Trainer:
    pairs = {part: read_pairs(folder / f"{part}.tsv") for part in ("train", "validation")}
    data = training_batches(folder, options, tokenizer, pairs["train"])
    validation = plain_batches(tokenizer, pairs["validation"], options)
    for part, kept in (("train", data), ("validation", validation)):
        if left_out := len(pairs[part]) - len(kept.lengths):
            print(f"{part}.tsv: {left_out:,} pairs of more than {longest_side(options)} tokens are left out")
    torch.manual_seed(options.seed)
    model = TranslationLoss(options.make_model(tokenizer.get_vocab_size()), options.label_smoothing).to(device)
    config = TrainingConfig(
        options.steps,
        options.learning_rate,
        WarmupCosine(warmup=max(1, min(400, options.steps // 8)), steps=max(2, options.steps), floor=0.02),
        batches_per_step=dist.get_world_size() if dist.is_initialized() else 1,
        bf16=options.bf16,
        ema_decay=0.998 if options.steps > 2000 else 0.98,
        seed=options.seed,
        validate_every=max(1, -(-options.steps // VALIDATIONS)),
        save_every=max(1, min(200, options.steps // 4)),
    )

    def loss(model: TranslationLoss, batch: tuple) -> tuple:
        batch = [x.to(device) for x in batch]
        return model(*batch), (batch[-1] != IGNORED).sum()

    def score(model: TranslationLoss) -> float:
        sources, references = zip(*pairs["validation"][:SCORED], strict=True)
        outputs = Translator(model.model, tokenizer).translate(sources, method="greedy", progress=True)
        return BLEU().corpus_score(outputs, [references]).score

    same = {name: value for name, value in asdict(options).items() if name not in ("corpus", "minutes", "steps")}
    return Trainer(
        model, loss, config, data, folder, validation=validation, score=score, description={"options": same},
        tensorboard=tensorboard, score_name=f"BLEU of {min(SCORED, len(pairs['validation']))} texts, greedy",
    )  # fmt: skip


def training_batches(folder: Path, options: Options, tokenizer, pairs: list[Pair]) -> Batches:
    """Batches of all segmentations that were drawn, or of the plain ones where none were."""
    if all((folder / side).exists() for side in SIDES):
        return batches(*(load_segmentations(folder / side) for side in SIDES), options)
    return plain_batches(tokenizer, pairs, options)


def plain_batches(tokenizer, pairs: list[Pair], options: Options) -> Batches:
    return batches(*([encode(tokenizer, texts)] for texts in zip(*pairs, strict=True)), options)


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def batches(sources: list[list[list[int]]], targets: list[list[list[int]]], options: Options) -> Batches:
    """Batches of all pairs that fit the model; one of a text's segmentations `[variant][text]` is drawn each time."""
    longest = [[max(map(len, variants)) + 1 for variants in zip(*side, strict=True)] for side in (sources, targets)]
    limit = longest_side(options) + 1
    pairs = list(zip(*longest, strict=True))
    fit = [i for i, lengths in enumerate(pairs) if max(lengths) <= limit]

    def collate_items(items: list[int]) -> tuple:
        places = [fit[item] for item in items]
        drawn = torch.randint(len(sources), (2, len(items))).tolist()  # of the generator that checkpoints keep
        return collate(
            [sources[variant][place] for variant, place in zip(drawn[0], places, strict=True)],
            [targets[variant][place] for variant, place in zip(drawn[1], places, strict=True)],
        )

    return Batches([pairs[place] for place in fit], options.max_tokens, collate_items, seed=options.seed)


def longest_side(options: Options) -> int:
    """Tokens of the longest sentence to train on, without the one that begins or ends it."""
    return min(LONGEST, options.max_tokens // 2) - 1


def seconds_per_step(options: Options, tokenizer, data: Batches, device: torch.device) -> float:
    """Seconds that a step takes in a training like the one to come, on batches from all over the corpus."""
    model = TranslationLoss(options.make_model(tokenizer.get_vocab_size()), options.label_smoothing).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, fused=True)
    seconds = []
    for items in tqdm(data.epoch(0)[:25], "Timing steps", leave=False):
        start = time.perf_counter()
        source, lengths, target, labels = (x.to(device) for x in data.collate(items))
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            total = model(source, lengths, target, labels)
        (total / (labels != IGNORED).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    warm = seconds[min(5, len(seconds) - 1) :]
    return sum(warm) / len(warm)


@torch.no_grad()
def seconds_per_validation(options: Options, tokenizer, pairs: list[Pair], device: torch.device) -> float:
    """Seconds of a validation: the loss of all pairs, and as many greedy steps as the references have tokens."""
    model = TranslationLoss(options.make_model(tokenizer.get_vocab_size()), 0.0).to(device).eval()
    data = plain_batches(tokenizer, pairs, options)
    begin = time.perf_counter()
    for items in tqdm(data.epoch(0), "Timing the validation loss", unit="batch", leave=False, delay=2):
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            model(*(x.to(device) for x in data.collate(items))).item()
    scored = [
        [ids[: LONGEST // 2 - 1] for ids in encode(tokenizer, texts)] for texts in zip(*pairs[:SCORED], strict=True)
    ]
    scored = sorted(zip(*scored, strict=True), key=lambda both: len(both[0]))
    translator = Translator(model.model, tokenizer)
    for start in tqdm(range(0, len(scored), 32), "Timing translations", unit="batch", leave=False, delay=2):
        sources, targets = zip(*scored[start : start + 32], strict=True)
        translator.generate(list(sources), "greedy", limits=torch.tensor([len(target) + 1 for target in targets]))
    return time.perf_counter() - begin


def report(folder: Path, translator: Translator, pairs: list[Pair]) -> None:
    """Prints the scores, and translations beside their references; writes them and the cross-attention."""
    outputs, scores = measure(translator, pairs, "beam")
    show(scores)
    step = max(1, len(pairs) // SAMPLES)
    for (source, reference), output in list(zip(pairs, outputs, strict=True))[::step][:SAMPLES]:
        print(f"\n  source:      {source}\n  translation: {output}\n  reference:   {reference}")
    write_text(folder / "translations.txt", "\n".join(outputs))
    write_text(folder / "scores.json", json.dumps(scores, indent=1))
    if isinstance(translator.model, EncoderDecoder):
        draw_attention(folder, translator, pairs, outputs)


def draw_attention(folder: Path, translator: Translator, pairs: list[Pair], outputs: list[str]) -> None:
    """Draws the cross-attention of the first held-out sentence that is short enough to be read in a figure."""
    readable = [i for i, (source, _) in enumerate(pairs) if 8 <= len(translator.tokenizer.encode(source).ids) <= 25]
    chosen = readable[0] if readable else 0
    path = folder / "cross_attention.png"
    attention_map(*translator.cross_attention(pairs[chosen][0], outputs[chosen]), path)
    print(f"written: {path}, {folder / 'loss.png'}")


def measure(translator: Translator, pairs: list[Pair], method: str, beam_size: int = 5) -> tuple[list[str], dict]:
    """Translations of all sources, and their BLEU and chrF with sacreBLEU's signatures, and the speed."""
    sources, references = (list(texts) for texts in zip(*pairs, strict=True))
    start = time.perf_counter()
    outputs = translator.translate(sources, method=method, beam_size=beam_size, progress=True)
    seconds = time.perf_counter() - start
    tokens = sum(len(ids) + 1 for ids in encode(translator.tokenizer, outputs))
    scores = {"method": f"beam {beam_size}" if method == "beam" else method, "sentences": len(pairs)}
    for name, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        scores[name] = round(metric.corpus_score(outputs, [references]).score, 2)
        scores[f"{name} signature"] = str(metric.get_signature())
    return outputs, scores | {"tokens/s": round(tokens / seconds)}


def show(scores: dict) -> None:
    print(
        f"\n{scores['method']}, {scores['sentences']} held-out sentences, {scores['tokens/s']} tokens/s\n"
        f"BLEU {scores['BLEU']:.2f}  {scores['BLEU signature']}\nchrF {scores['chrF']:.2f}  {scores['chrF signature']}"
    )


def evaluate(folder: Path, *, method: str = "beam", beam_size: int = 5) -> None:
    show(measure(Translator.load(folder, device()), read_pairs(folder / "test.tsv"), method, beam_size)[1])


def translate(folder: Path, *, text: str | None = None, file: Path | None = None, **decoding) -> None:
    if text is not None and file is not None:
        raise ValueError(f"text: expected a text or --file, got both ({file})")
    if file is not None:
        try:
            with open(file, "rb") as stream:
                texts = list(lines_of(stream, str(file)))
        except OSError as error:
            raise ValueError(f"--file: expected a file to read, got {file}: {error.strerror}") from None
    translator = Translator.load(folder, device())
    if text is not None:
        print(translator.translate([text], **decoding)[0])
    elif file is not None:
        for output in translator.translate(texts, progress=True, **decoding):
            print(output)
    else:
        for line in lines_of(sys.stdin.buffer, "standard input"):
            print(translator.translate([line], **decoding)[0], flush=True)


def lines_of(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of UTF-8 text as they come, without the byte order mark that it may begin with."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: expected UTF-8, got byte 0x{line[error.start]:02x} at place {error.start + 1}"
            ) from None
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text:  # a mark alone is no line
            yield text.rstrip("\r\n")


def compare(folder: Path, **given) -> None:
    """Trains with each kind of positions, where that was not done yet, and decodes in each way."""
    rows = []
    for positions in COMPARED:
        check_sizes(Options(**given, positions=positions))
    for positions in COMPARED:
        own = folder / positions
        train(own, **given, positions=positions, resume=(own / OPTIONS).exists())
        translator, pairs = Translator.load(own, device()), read_pairs(own / "test.tsv")
        for method in METHODS:
            scores = measure(translator, pairs, method)[1]
            shown = {name: scores[name] for name in ("BLEU", "chrF", "tokens/s")}
            rows.append({"positions": positions, "decoding": scores["method"], **shown})
    compared = table(list(rows[0]), [list(row.values()) for row in rows])
    print(f"\n{compared}")
    write_text(folder / "comparison.md", compared)
    bars(rows, folder / "comparison.png")
    print(f"written: {folder / 'comparison.md'}, {folder / 'comparison.png'}")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
