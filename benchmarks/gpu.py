"""Attention, decoding, norms, activations and the loss on a GPU beside PyTorch's own.

`python -m benchmarks.gpu [--minutes N]`.

The most telling comes first: a sample of the tests marked `gpu`, attention's forward and backward pass beside
FlashAttention and cuDNN, what calls cost above the driver, decoding; then the rest. After N minutes no case is begun
any more. What there is so far is in results/gpu.json and gpu.md after each part, so that a run that is cut short loses
nothing.

Peers are SDPA by its FlashAttention and cuDNN kernels, FlexAttention where there is a bias, and PyTorch's operations
alone ("eager") or compiled. Attention: 16,384 tokens, 2,048 channels in heads of 64 or 128, bf16, as in the papers of
FlashAttention; FLOP/s count the pairs that the mask leaves. All implementations take turns, and times are medians: of
calls from Python, which can take longer than their kernels, and of calls captured in a CUDA graph, which show the GPU's
time alone. Rates are of the latter; their shares are of what a large matrix product and a large copy reach in this run.
A result that is further from fp64 than PyTorch's by more than a factor of two (gradients: three) has no time. With
PYNLP_AUTOTUNE=1 tiles are measured first.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.calls import gpu_rows
from benchmarks.cases import Case, run, sdpa
from benchmarks.measure import BF16, RESULTS, machine, round_times, table, write_json
from pynlp.functional import alibi_slopes, attention, attention_decode, gelu, layer_norm, linear_cross_entropy, rms_norm

TOKENS, CHANNELS = 16384, 2048
ATTENTION = (  # tokens of a sequence, channels of a head, causal
    (4096, 128, True), (4096, 64, True), (16384, 128, True), (16384, 64, True), (1024, 128, True), (4096, 128, False),
)  # fmt: skip
COLUMNS = (
    "case", "error", "PyTorch's", "ms", "time / ours", "ms in a graph", "time / ours in it", "rate", "memory / ours",
)  # fmt: skip
# Of the tests marked gpu: each op against fp64, plans against calls without them, decoding.
SAMPLE = "test_functions or test_later_calls or test_decode"
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def with_gradients(function: Callable, tensors: dict[str, Tensor], backward_alone: bool = False) -> Callable:
    """A call that gives the function's results and the gradients of its tensors, or these alone."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}

    def outputs() -> list[Tensor]:
        result = function(**leaves)
        return list(result) if isinstance(result, tuple) else [result]

    first = outputs()
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, device="cuda").to(BF16).to(x.dtype) for x in first]
    if backward_alone:
        return lambda: torch.autograd.grad(first, list(leaves.values()), weights, retain_graph=True)

    def call() -> list[Tensor]:
        results = outputs()
        return [*results, *torch.autograd.grad(results, list(leaves.values()), weights)]

    return call


def timed(functions: dict[str, Callable], tensors: dict[str, Tensor], backward: bool) -> dict[str, Callable]:
    """Calls that run each function's forward pass alone, or its backward pass alone."""
    if backward:
        return {name: with_gradients(function, tensors, True) for name, function in functions.items()}
    return {name: lambda function=function: function(**tensors) for name, function in functions.items()}


def sdpa_on(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v, is_causal=causal)


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def attention_case(seqlen: int, head_dim: int, causal: bool, backward: bool) -> Case:
    heads, batch = CHANNELS // head_dim, TOKENS // seqlen
    tensors = {name: normal(batch, seqlen, heads, head_dim) for name in "qkv"}
    part = {name: x[:1, :1024, :2] for name, x in tensors.items()}
    functions = {"ours": lambda q, k, v: attention(q, k, v, causal=causal)}
    functions |= {name: partial(sdpa_on, backend, causal=causal) for name, backend in BACKENDS.items()}
    small = {name: with_gradients(function, part) for name, function in functions.items()}
    wide = {name: x.double() for name, x in part.items()}
    exact = with_gradients(partial(sdpa_on, SDPBackend.MATH, causal=causal), wide)
    calls = timed(functions, tensors, backward)
    pairs = seqlen * (seqlen + 1) // 2 if causal else seqlen**2
    return Case(
        f"{'causal' if causal else 'full'} S{seqlen} D{head_dim}, {'backward' if backward else 'forward'}",
        BF16, calls, exact, flop=4 * batch * heads * pairs * head_dim * (2.5 if backward else 1), slack=3.0,
        checked=small,
    )  # fmt: skip


def alibi_case(backward: bool) -> Case:
    """Causal attention with ALiBi beside FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seqlen, head_dim = 4096, 128
    heads, batch = CHANNELS // head_dim, TOKENS // seqlen
    tensors = {name: normal(batch, seqlen, heads, head_dim) for name in "qkv"}
    slopes = alibi_slopes(heads).cuda()
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seqlen, seqlen, device="cuda")
    torch._functorch.config.donated_buffer = False  # backward is timed again and again
    compiled = torch.compile(flex_attention)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = compiled(q, k, v, score_mod=lambda s, b, h, i, j: s - slopes[h] * (i - j), block_mask=mask)
        return out.transpose(1, 2)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(seqlen, device="cuda") - torch.arange(seqlen, device="cuda")[:, None]
        bias = (slopes[:1, None, None].double() * distance).masked_fill(distance > 0, -torch.inf)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2)

    functions = {"ours": lambda q, k, v: attention(q, k, v, causal=True, alibi_slopes=slopes), "Flex": flex}
    # Held against fp64: the first head of the first sequence.
    small = {name: lambda f=f: [x[:1, :, :1] for x in with_gradients(f, tensors)()] for name, f in functions.items()}

    def exact_head() -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(1)
        weight = torch.randn(tensors["q"].shape, generator=generator, device="cuda").to(BF16)[:1, :, :1].double()
        leaves = [x[:1, :, :1].double().requires_grad_() for x in tensors.values()]
        out = exact(*leaves)
        return [out, *torch.autograd.grad(out, leaves, weight)]

    calls = timed(functions, tensors, backward)
    pairs = seqlen * (seqlen + 1) // 2
    return Case(
        f"causal, ALiBi, S{seqlen} D{head_dim}, {'backward' if backward else 'forward'}", BF16, calls, exact_head,
        flop=4 * batch * heads * pairs * head_dim * (2.5 if backward else 1), slack=3.0, checked=small,
    )  # fmt: skip


def decode_case(batch: int, length: int) -> Case:
    """One new token: 32 query heads of 128 channels on 8 heads of keys and values."""
    q, k, v = normal(batch, 1, 32, 128), normal(batch, length, 8, 128), normal(batch, length, 8, 128)
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    functions = {
        "ours": lambda q, k, v: attention_decode(q, k, v, lengths[: q.shape[0]]),
        **{name: partial(sdpa_on, backend, causal=False) for name, backend in BACKENDS.items()},
    }
    small = {name: lambda f=f: [f(q[:1], k[:1], v[:1])] for name, f in functions.items()}
    calls = {name: lambda f=f: f(q, k, v) for name, f in functions.items()}
    return Case(
        f"decode, batch {batch}, cache {length}, heads 32/8", BF16, calls,
        lambda: [sdpa_on(SDPBackend.MATH, *(x[:1].double() for x in (q, k, v)), causal=False)],
        bytes=4 * k.numel(), checked=small,
    )  # fmt: skip


def layer_case(name: str, ours: Callable, eager: Callable, shapes: dict[str, tuple[int, ...]], passes: int) -> Case:
    """Forward and backward, which read or write tensors like x `passes` times at least."""
    tensors = {n: normal(*shape, dtype=torch.float32 if len(shape) == 1 else BF16) for n, shape in shapes.items()}
    part = {n: x if x.dim() == 1 else x[:64] for n, x in tensors.items()}
    functions = {"ours": ours, "eager": eager}
    small = {n: with_gradients(f, part) for n, f in functions.items()}
    exact = with_gradients(eager, {n: x.double() for n, x in part.items()})
    calls = {n: with_gradients(f, tensors) for n, f in (functions | {"compiled": torch.compile(eager)}).items()}
    return Case(name, BF16, calls, exact, bytes=passes * 2 * tensors["x"].numel(), slack=3.0, checked=small)


def loss_case(vocabulary: int) -> Case:
    """The loss of 8,192 tokens of 2,048 channels."""
    target = torch.randint(vocabulary, (8192,), device="cuda")

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target[: x.shape[0]])

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.T).to(torch.promote_types(torch.float32, x.dtype)), target[: x.shape[0]])

    tensors = {"x": normal(8192, 2048), "weight": normal(vocabulary, 2048) * 0.02}
    part = {"x": tensors["x"][:256], "weight": tensors["weight"]}
    functions = {"ours": ours, "eager": eager}
    small = {n: with_gradients(f, part) for n, f in functions.items()}
    exact = with_gradients(eager, {n: x.double() for n, x in part.items()})
    calls = {n: with_gradients(f, tensors) for n, f in (functions | {"compiled": torch.compile(eager)}).items()}
    return Case(
        f"linear + cross-entropy, vocabulary {vocabulary}", BF16, calls, exact, flop=6 * 8192 * 2048 * vocabulary,
        slack=3.0, checked=small, memory=True,
    )  # fmt: skip


def eager_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    new = residual + x
    return F.layer_norm(new, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype)), new


def attention_cases(sizes: tuple) -> dict[str, Callable[[], Case]]:
    made = {}
    for seqlen, head_dim, causal in sizes:
        for backward in (False, True):
            name = f"attention {seqlen} {head_dim} {causal} {backward}"
            made[name] = lambda s=seqlen, d=head_dim, c=causal, b=backward: attention_case(s, d, c, b)
    return made


def cases() -> dict[str, Callable[[], Case]]:
    """Makers of the cases by name, the most telling first."""
    decode = {}
    for batch, length in ((1, 16384), (16, 16384), (64, 4096)):
        decode[f"decode {batch}"] = lambda b=batch, n=length: decode_case(b, n)
    made = attention_cases(ATTENTION[:2]) | decode | attention_cases(ATTENTION[2:])
    for backward in (False, True):
        made[f"alibi {backward}"] = lambda b=backward: alibi_case(b)
    rows, vector = (TOKENS, 4096), (4096,)
    both = {"x": rows, "weight": vector, "bias": vector, "residual": rows}
    made["layer norm"] = lambda: layer_case(
        "residual + layer norm", lambda x, weight, bias, residual: layer_norm(x, weight, bias, residual=residual),
        eager_norm, both, 9,
    )  # fmt: skip
    made["rms norm"] = lambda: layer_case(
        "rms norm", lambda x, weight: rms_norm(x, weight),
        lambda x, weight: F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), 1e-6), {"x": rows, "weight": vector}, 5,
    )  # fmt: skip
    made["gelu"] = lambda: layer_case("gelu", gelu, F.gelu, {"x": rows}, 5)
    for vocabulary in (32000, 128000):
        made[f"loss {vocabulary}"] = lambda v=vocabulary: loss_case(v)
    return made


def time_of(call: Callable, rep: int = 80) -> float:
    """Seconds, the median of calls of `rep` milliseconds."""
    from triton.testing import do_bench

    return do_bench(call, warmup=20, rep=rep, return_mode="median") / 1e3


def median_times(calls: dict[str, Callable]) -> dict[str, float]:
    """Seconds of each call, the median of three rounds in which they take turns."""
    times = round_times(calls, 0.0, clock=partial(time_of, rep=30))
    return {name: statistics.median(rounds) for name, rounds in times.items()}


def graph_times(calls: dict[str, Callable], estimates: dict[str, float]) -> dict[str, float]:
    """Seconds of each call in a graph of many, captured on the stream that the tensors' own graphs were made on."""
    replays, counts = {}, {name: max(1, round(0.01 / estimate)) for name, estimate in estimates.items()}
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(counts[name]):
                call()
        replays[name] = graph.replay
    return {name: time / counts[name] for name, time in median_times(replays).items()}


def peaks() -> tuple[float, float]:
    """FLOP/s of a large bf16 matrix product, and bytes a second that a large copy reads and writes."""
    a, b = normal(8192, 8192), normal(8192, 8192)
    x, y = (torch.empty(2**30, dtype=torch.int32, device="cuda") for _ in range(2))
    return 2 * 8192**3 / time_of(lambda: a @ b), 2 * 4 * x.numel() / time_of(lambda: y.copy_(x))


def peak_memory(call: Callable) -> int:
    """Bytes that a call adds to the memory in use, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def speed(case: Case, flops: float, bandwidth: float) -> dict[str, str]:
    """The cells of a case whose errors pass."""
    times = median_times(case.calls)
    alone = graph_times(case.calls, times)
    cells = {"ms": f"{1e3 * times['ours']:.3f}", "time / ours": shares(times)}
    cells |= {"ms in a graph": f"{1e3 * alone['ours']:.3f}", "time / ours in it": shares(alone)}
    if case.flop:
        cells["rate"] = f"{case.flop / alone['ours'] / 1e12:.0f} TFLOP/s, {case.flop / alone['ours'] / flops:.0%}"
    else:
        cells["rate"] = f"{case.bytes / alone['ours'] / 1e9:.0f} GB/s, {case.bytes / alone['ours'] / bandwidth:.0%}"
    if case.memory:
        cells["memory / ours"] = shares({name: peak_memory(call) for name, call in case.calls.items()})
    return cells


def row(case: Case, flops: float, bandwidth: float) -> dict[str, str]:
    result = run(case, partial(speed, flops=flops, bandwidth=bandwidth))
    errors = {"case": case.name, "error": f"{result.error:.1e}", "PyTorch's": f"{result.peer_error:.1e}"}
    return dict.fromkeys(COLUMNS, "-") | errors | (result.speed or {"ms": "wrong"})


def shares(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value / values['ours']:.2f}" for name, value in values.items() if name != "ours")


def sample_of_tests(seconds: float) -> str:
    """The last line of pytest on a sample of the tests marked `gpu`, or that they took too long."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/package/test_gpu.py", "-k", SAMPLE]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds:.0f} s"
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr[-500:]


class Report:
    """What was measured so far: kept in files after each part, unless only some cases were asked for."""

    def __init__(self, is_kept: bool):
        self.is_kept, self.content, self.tables = is_kept, {}, []

    def add(self, name: str, content: object) -> None:
        """Keep a part: rows, which become a table, or a line."""
        before = name in self.content
        self.content[name] = content
        text = f"## {name}\n\n{table(content) if isinstance(content, list) and content else content}\n"
        self.tables = [*(self.tables[:-1] if before else self.tables), text]
        if self.is_kept:
            write_json("gpu", self.content)
            (RESULTS / "gpu.md").write_text("\n".join(self.tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and write nothing")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing more after so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a GPU, and there is none")
    made = {name: make for name, make in cases().items() if options.only in name}
    if not made:
        parser.error(f"--only: expected a part of one of {', '.join(cases())}, got {options.only!r}")
    end = time.monotonic() + 60 * options.minutes
    torch.manual_seed(0)
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    report = Report(is_kept=not options.only)
    report.add("machine", machine())
    if not options.only:
        report.add("tests", sample_of_tests(60 * options.minutes / 4))
        print(report.tables[-1])
    flops, bandwidth = peaks()
    torch.cuda.empty_cache()
    report.add("peaks", f"{flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for number, make in enumerate(tqdm(made.values(), desc="cases", leave=False)):
        if time.monotonic() > end:
            break
        if number == 2 and not options.only:
            report.add("launches, in multiples of torch.empty", gpu_rows(20, "cuda"))
            tqdm.write(report.tables[-1])
        rows.append(row(make(), flops, bandwidth))
        tqdm.write(", ".join(rows[-1].values()))
        report.add("cases", rows)
        torch.cuda.empty_cache()
    report.add("left out", ", ".join(list(made)[len(rows) :]) or "nothing")
    print("\n".join(report.tables))
    if report.is_kept:
        print(f"written: {RESULTS / 'gpu.json'}, {RESULTS / 'gpu.md'}")


if __name__ == "__main__":
    main()
