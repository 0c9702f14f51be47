"""Small calls and their cost: the time of the calling thread, the least of many rounds in which calls take turns."""

import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from benchmarks.measure import BF16
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


def least_times(
    calls: dict[Hashable, Callable], rounds: int, repeats: int, threads: Sequence[int] = (1,)
) -> list[dict]:
    """For each number of threads, the microseconds that each call takes of the calling thread.

    The least of the rounds counts, in which calls and numbers of threads take turns.
    """
    least = [dict.fromkeys(calls, float("inf")) for _ in threads]
    before = torch.get_num_threads()
    for call in calls.values():
        for _ in range(4):  # a plan is made at the second and used from the third on
            call()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                for count, times in zip(threads, least, strict=True):
                    torch.set_num_threads(count)
                    call()
                    if torch.cuda.is_available():  # a full queue would be waited for
                        torch.cuda.synchronize()
                    start = time.thread_time_ns()
                    for _ in range(repeats):
                        call()
                    times[name] = min(times[name], (time.thread_time_ns() - start) / repeats / 1e3)
    finally:
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


def gpu_calls(device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """By name, a function of a tensor, and that tensor: bf16, as models are trained and run."""
    x, residual = torch.randn(2, 64, 1024).to(device, BF16)
    weight, bias = torch.ones(1024, device=device), torch.zeros(1024, device=device)
    q, k, v = torch.randn(3, 2, 128, 8, 64).to(device, BF16)
    rotary, table = rotary_tables(128, 64, device=device), torch.randn(32, 8, device=device)
    tokens, vocabulary = torch.randn(4, 64, device=device), torch.randn(64, 64, device=device)  # products are real
    target = torch.randint(64, (4,), device=device)
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


def decode_calls(device: str) -> dict[str, Callable]:
    """Steps of one token, 4 entries, over a cache."""
    q, k, v = torch.randn(4, 1, 8, 64).to(device, BF16), *torch.randn(2, 4, 1, 2, 64).to(device, BF16)
    k_cache, v_cache = torch.zeros(2, 4, 1024, 2, 64).to(device, BF16)
    k_pages, v_pages = torch.zeros(2, 64, 64, 2, 64).to(device, BF16)
    lengths = torch.full((4,), 100, dtype=torch.int32, device=device)
    pages = torch.arange(64, dtype=torch.int32, device=device).view(4, 16)
    rotary = rotary_tables(1024, 64, device=device)
    return {
        "decode": lambda: attention_decode(q, k_cache, v_cache, lengths, k=k, v=v, rotary=rotary),
        "decode, pages": lambda: attention_decode(
            q, k_pages, v_pages, lengths, k=k, v=v, block_table=pages, rotary=rotary
        ),
    }


def gpu_rows(rounds: int, device: str) -> list[dict]:
    """Costs in multiples of `torch.empty`; in brackets those without plans."""
    calls = {"empty": lambda: torch.empty((64, 1024), dtype=BF16, device=device)}
    gpu, decode = gpu_calls(device), decode_calls(device)
    for name, (function, x) in gpu.items():
        leaf = x.detach().requires_grad_()
        calls[f"{name}: without gradients"] = without_gradients(lambda f=function, x=x: f(x))
        calls[f"{name}: with"] = lambda f=function, x=leaf: f(x)
        if name != "loss":
            calls[f"{name}: both ways"] = chain(function, x)
    for name, function in decode.items():
        calls[f"{name}: without gradients"] = without_gradients(function)
    (planned,) = least_times(calls, rounds, 10)
    with plans.off():
        (whole,) = least_times(calls, max(1, rounds // 5), 10)
    rows = []
    for name in [*gpu, *decode]:
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
