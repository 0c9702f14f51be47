"""Part three of the study: the language model with ALiBi, beside other positions, and at lengths beyond training.

Compare the lengths of one row rather than rows: the sinusoidal model's embeddings are scaled by the root of their width
(arXiv 1706.03762), with which it learns faster in so few steps.

Source: Press et al., Train Short, Test Long, arXiv 2108.12409.
"""

from itertools import chain
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from parts.common.reports import table, write, write_text
from parts.speeches.language_model import BLOCK, Corpus, Sampling, encode_prompt, make_model, report_model, train_model
from parts.speeches.perplexity import perplexity
from parts.speeches.training import Recipe

from pynlp.models import Decoder
from pynlp.training import latest

POSITIONS = ("alibi", "sinusoidal", "learned", "rope", "relative")
SEEDS = 3
FACTORS = (1, 2, 4, 8)  # of the length that is trained with
HOLDS = 1.05  # perplexity at the longest, as a multiple of that at the length that is trained with

Result = dict[str, float | None]  # perplexity by what it is of; None where a model cannot read so much


def run(corpus: Corpus, recipe: Recipe, sampling: Sampling) -> None:
    encode_prompt(corpus.tokenizer, sampling.prompt, 4 * BLOCK - 1)
    folders = {
        (positions, seed): recipe.output / f"{positions}-{seed}"
        for seed in range(recipe.seed, recipe.seed + SEEDS)
        for positions in POSITIONS
    }
    check_folders(list(folders.values()), recipe)
    results: dict[str, list[Result]] = {positions: [] for positions in POSITIONS}
    paragraphs = []
    for (positions, seed), folder in folders.items():
        print(f"\n{positions}, seed {seed}")
        model = make_model(corpus.tokenizer.get_vocab_size(), positions, seed)
        begun = recipe.resume and latest(folder) is not None
        main = (positions, seed) == ("alibi", recipe.seed)
        own = Recipe(recipe.steps, seed, begun, folder)
        trained = train_model(model, corpus, own, brief=not main)
        results[positions].append(measure(model, corpus))
        if main:
            paragraphs = [
                f"A causal language model with ALiBi, from {corpus.source}; {model.parameter_count():,} parameters, "
                f"{recipe.steps} steps, seed {seed}.",
                *report_model(model, corpus, trained, sampling, 4 * BLOCK, recipe.output),
            ]
    plot_lengths(results, recipe.output / "lengths.png")
    report = "\n\n".join((
        *paragraphs,
        f"Perplexity, mean and standard deviation of {SEEDS} seeds, in windows of {BLOCK} words.",
        compare(results, ["training", *corpus.tests]),
        f"That of all tests together, in windows of {BLOCK} words, as in training, and of more.",
        compare(results, [times(factor) for factor in FACTORS]),
        verdict(results),
    ))  # fmt: skip
    write_text(recipe.output / "results.md", report)
    print(f"\n{report}\n\nTables, figures and checkpoints: {recipe.output}")


def check_folders(folders: list[Path], recipe: Recipe) -> None:
    """Refuses, before any training, to resume without a checkpoint or to begin where one lies."""
    begun = [folder for folder in folders if any(folder.glob("step-*"))]
    if recipe.resume and not begun:
        raise SystemExit(f"--resume: expected a checkpoint in a folder of {recipe.output}, got none")
    if begun and not recipe.resume:
        raise SystemExit(
            f"--output: expected folders without checkpoints, got {begun[0]}; "
            "go on from them with --resume, or choose another folder"
        )


def measure(model: Decoder, corpus: Corpus) -> Result:
    everything = list(chain.from_iterable(corpus.tests.values()))
    parts = {"training": corpus.known, **corpus.tests}
    result: Result = {name: perplexity(model, documents, BLOCK) for name, documents in parts.items()}
    for factor in FACTORS:
        readable = factor * BLOCK <= model.config.max_positions
        result[times(factor)] = perplexity(model, everything, factor * BLOCK) if readable else None
    return result


def times(factor: int) -> str:
    return f"{factor}x ({factor * BLOCK})"


def compare(results: dict[str, list[Result]], columns: list[str]) -> str:
    rows = (
        [positions, *(mean_and_spread([result[column] for result in found]) for column in columns)]
        for positions, found in results.items()
    )
    return table(["positions", *columns], rows)


def mean_and_spread(values: list[float | None]) -> str:
    return "n/a" if None in values else f"{mean(values):.1f} ± {stdev(values):.1f}"


def verdict(results: dict[str, list[Result]]) -> str:
    """A sentence on the perplexity of each kind of positions at the longest windows."""
    first, last = times(FACTORS[0]), times(FACTORS[-1])
    ratios = {
        positions: mean(result[last] for result in found) / mean(result[first] for result in found)
        for positions, found in results.items()
        if found[0][last] is not None
    }
    alibi = ratios.pop("alibi")
    others = ", ".join(f"{positions} {ratio:.2f}" for positions, ratio in ratios.items())
    holds = "holds" if alibi <= HOLDS else "does not hold"
    return (
        f"ALiBi {holds}: at {FACTORS[-1]} times the length its perplexity is {alibi:.3f} times that at the length of "
        f"training. The others: {others}; learned positions end with their table."
    )


def plot_lengths(results: dict[str, list[Result]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for positions, found in results.items():
        lengths = [factor * BLOCK for factor in FACTORS if found[0][times(factor)] is not None]
        values = [[result[times(length // BLOCK)] for result in found] for length in lengths]
        axes.plot(lengths, [mean(row) for row in values], "o-", ms=4, label=positions, clip_on=False)
        axes.fill_between(lengths, [min(row) for row in values], [max(row) for row in values], alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=f"words of a window (trained with {BLOCK})", ylabel="perplexity, lowest to highest seed")
    axes.set(title="Perplexity of all tests by the length of the windows", xlim=(BLOCK, FACTORS[-1] * BLOCK))
    axes.set_xticks([factor * BLOCK for factor in FACTORS], [str(factor * BLOCK) for factor in FACTORS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(POSITIONS), frameon=False)
    write(path, lambda part: figure.savefig(part, dpi=150))
