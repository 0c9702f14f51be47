"""What a call from Python costs before any kernel runs: on a CPU beside PyTorch's, for GPUs over no driver.

`python -m benchmarks.launch`.

On the CPU: small calls, with and without gradients, beside PyTorch's, with one thread and with two. For GPUs: the
Triton launchers over a stand-in for NVIDIA's driver (standin.py), in multiples of `torch.empty`: without gradients,
with them, and forward and backward in a chain of eleven calls, for each of these. Times are the calling thread's, the
least of many rounds in which all calls take turns. Writes results/launch.json.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import standin
from benchmarks.calls import both_ways, gpu_rows, least_times, without_gradients
from benchmarks.measure import machine, table, write_json
from pynlp.functional import attention, gelu, layer_norm

WHOSE = "ours", "PyTorch's"


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
    pairs = cpu_calls()
    calls = {(name, whose): call for name, pair in pairs.items() for whose, call in zip(WHOSE, pair, strict=True)}
    one, two = least_times(calls, rounds, 50, threads=(1, 2))
    rows = []
    for name in pairs:
        ours, peers = (one[name, whose] for whose in WHOSE)
        rows.append(
            {
                "call": name,
                "us": round(ours, 1),
                "PyTorch's": round(peers, 1),
                "ours / PyTorch's": round(ours / peers, 2),
                "two threads / one": round(two[name, "ours"] / ours, 2),
            }
        )
    return rows


def standin_rows(rounds: int) -> list[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are overridden is meant
        with standin.gpu():
            return gpu_rows(rounds, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="the least of so many rounds counts")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    on_cpu = cpu_rows(rounds)
    print(table(on_cpu))
    on_gpu = standin_rows(rounds)
    print("\nTriton launchers over a stand-in for the driver, in multiples of torch.empty; in brackets without plans\n")
    print(table(on_gpu))
    where = machine()
    print(f"\n{where}\nwritten: {write_json('launch', {'machine': where, 'cpu': on_cpu, 'gpu': on_gpu})}")


if __name__ == "__main__":
    main()
