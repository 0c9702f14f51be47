"""What a call from Python costs before any kernel runs: on a CPU beside PyTorch's, for GPUs over no driver.

`python -m benchmarks.launch`.

On the CPU: small calls, with and without gradients, beside PyTorch's, with one thread and with two. For GPUs: the
Triton launchers over a stand-in for NVIDIA's driver (standin.py), in multiples of `torch.empty`: without gradients,
with them, and forward and backward in a chain of eleven calls, for each of these. Times are the calling thread's, the
least of many rounds in which all calls take turns. Writes results/launch.json.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import standin
from benchmarks.measure import BF16, machine, table, write_json
from pynlp.functional import (
    attention,
    attention_decode,
    gelu,
    layer_norm,
    linear_cross_entropy,
    rotary_tables,
)
from pynlp.ops.common import plans

CHAIN = 11


def least_times(calls: dict[str, Callable], rounds: int, repeats: int, threads: Sequence[int] = (1,)) -> list[dict]:
    """For each number of threads, the microseconds that each call takes of the calling thread.

    The least of the rounds counts, in which calls and numbers of threads take turns.
    """
    least = [dict.fromkeys(calls, float("inf")) for _ in threads]
    before = torch.get_num_threads()
    for call in calls.values():
        for _ in range(4):  # a plan is made at the second and used from the third on
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            for count, times in zip(threads, least, strict=True):
                torch.set_num_threads(count)
                call()
                start = time.thread_time_ns()
                for _ in range(repeats):
                    call()
                times[name] = min(times[name], (time.thread_time_ns() - start) / repeats / 1e3)
    torch.set_num_threads(before)
    return least


def both_ways(function: Callable, *leaves: Tensor) -> Callable:
    """A call that gives the gradients of a function's tensors."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    weight = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, weight)


def chain(function: Callable, x: Tensor) -> Callable:
    """Forward and backward of eleven calls, each of the result of the one before."""
    x = x.detach().requires_grad_()
    weight = torch.randn_like(x)

    def call() -> None:
        y = x
        for _ in range(CHAIN):
            y = function(y)
        torch.autograd.grad(y, x, weight)

    return call


def without_gradients(function: Callable) -> Callable:
    def call() -> None:
        with torch.no_grad():
            function()

    return call


def cpu_calls() -> dict[str, tuple[Callable, Callable]]:
    """By name, a small call of ours and PyTorch's."""
    x, weight, bias = torch.randn(8, 256), torch.ones(256), torch.zeros(256)
    q, k, v = torch.randn(3, 1, 8, 4, 64).unbind()
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    return {
        "layer_norm 8 x 256": (
            without_gradients(lambda: layer_norm(x, weight, bias)),
            without_gradients(lambda: F.layer_norm(x, (256,), weight, bias)),
        ),
        "gelu 8 x 256": (without_gradients(lambda: gelu(x)), without_gradients(lambda: F.gelu(x))),
        "attention of 8 tokens": (
            without_gradients(lambda: attention(q, k, v, causal=True)),
            without_gradients(lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True)),
        ),
        "layer_norm 8 x 256, both ways": (
            both_ways(layer_norm, x, weight, bias),
            both_ways(lambda x, weight, bias: F.layer_norm(x, (256,), weight, bias), x, weight, bias),
        ),
        "gelu 8 x 256, both ways": (both_ways(gelu, x), both_ways(F.gelu, x)),
        "attention of 8 tokens, both ways": (
            both_ways(lambda q, k, v: attention(q, k, v, causal=True), q, k, v),
            both_ways(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *heads_first),
        ),
    }


def cpu_rows(rounds: int) -> list[dict]:
    calls = {f"{name}: {who}": call for name, pair in cpu_calls().items() for who, call in zip("op", pair, strict=True)}
    one, two = least_times(calls, rounds, 50, threads=(1, 2))
    return [
        {
            "call": name,
            "us": round(one[f"{name}: o"], 1),
            "PyTorch's": round(one[f"{name}: p"], 1),
            "ours / PyTorch's": round(one[f"{name}: o"] / one[f"{name}: p"], 2),
            "two threads / one": round(two[f"{name}: o"] / one[f"{name}: o"], 2),
        }
        for name in cpu_calls()
    ]


def gpu_calls() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """By name, a function of a tensor, and that tensor: bf16, as models are trained and run."""
    x, residual = torch.randn(2, 64, 1024).to(BF16)
    weight, bias = torch.ones(1024), torch.zeros(1024)
    q, k, v = torch.randn(3, 2, 128, 8, 64).to(BF16)
    rotary, table = rotary_tables(128, 64), torch.randn(32, 8)
    tokens, vocabulary, target = torch.randn(4, 64), torch.randn(64, 64), torch.randint(64, (4,))  # products are real
    return {
        "gelu": (gelu, x),
        "layer_norm": (lambda x: layer_norm(x, weight, bias), x),
        "residual, dropout, layer_norm": (
            lambda x: layer_norm(x, weight, bias, residual=residual, dropout_p=0.1)[0],
            x,
        ),
        "attention": (lambda q: attention(q, k, v, causal=True), q),
        "attention, RoPE, T5's table": (
            lambda q: attention(q, k, v, causal=True, rotary=rotary, relative_bias=table),
            q,
        ),
        "loss": (lambda x: linear_cross_entropy(x, vocabulary, target), tokens),
    }


def decode_calls() -> dict[str, Callable]:
    """Steps of one token, 4 entries, over a cache."""
    q, k, v = torch.randn(4, 1, 8, 64).to(BF16), *torch.randn(2, 4, 1, 2, 64).to(BF16)
    k_cache, v_cache = torch.zeros(2, 4, 1024, 2, 64).to(BF16)
    k_pages, v_pages = torch.zeros(2, 64, 64, 2, 64).to(BF16)
    lengths, pages = torch.full((4,), 100, dtype=torch.int32), torch.arange(64, dtype=torch.int32).view(4, 16)
    rotary = rotary_tables(1024, 64)
    return {
        "decode": lambda: attention_decode(q, k_cache, v_cache, lengths, k=k, v=v, rotary=rotary),
        "decode, pages": lambda: attention_decode(
            q, k_pages, v_pages, lengths, k=k, v=v, block_table=pages, rotary=rotary
        ),
    }


def gpu_rows(rounds: int) -> list[dict]:
    """Costs over the stand-in, in multiples of `torch.empty`; in brackets those without plans."""
    calls = {"empty": lambda: torch.empty((64, 1024), dtype=BF16, device="cpu")}
    for name, (function, x) in gpu_calls().items():
        leaf = x.detach().requires_grad_()
        calls[f"{name}: without gradients"] = without_gradients(lambda f=function, x=x: f(x))
        calls[f"{name}: with"] = lambda f=function, x=leaf: f(x)
        if name != "loss":
            calls[f"{name}: both ways"] = chain(function, x)
    for name, function in decode_calls().items():
        calls[f"{name}: without gradients"] = without_gradients(function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is meant
        with standin.gpu():
            (planned,) = least_times(calls, rounds, 10)
            with plans.off():
                (whole,) = least_times(calls, max(1, rounds // 5), 10)
    rows = []
    for name in [*gpu_calls(), *decode_calls()]:
        row = {"call": name}
        for column, share in (("without gradients", 1), ("with", 1), ("both ways", CHAIN)):
            key = f"{name}: {column}"
            row[column] = "-"
            if key in planned:
                cost, before = (times[key] / share / times["empty"] for times in (planned, whole))
                row[column] = f"{cost:.1f} ({before:.0f})"
        rows.append(row)
    return [
        *rows,
        {"call": "torch.empty, us", "without gradients": f"{planned['empty']:.1f}", "with": "-", "both ways": "-"},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="the least of so many rounds counts")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    on_cpu = cpu_rows(rounds)
    print(table(on_cpu))
    on_gpu = gpu_rows(rounds)
    print("\nTriton launchers over a stand-in for the driver, in multiples of torch.empty; in brackets without plans\n")
    print(table(on_gpu))
    where = machine()
    print(f"\n{where}\nwritten: {write_json('launch', {'machine': where, 'cpu': on_cpu, 'gpu': on_gpu})}")


if __name__ == "__main__":
    main()
