"""`python -m benchmarks.attention`: forward and backward beside PyTorch's SDPA, eager attention and FlexAttention.

Each case is set up once; the correctness gate (errors against fp64 at most 2x, of gradients 3x, those of PyTorch's path
in the same dtype) and the times use the same tensors. A red gate prints no speed. Times are the best of many calls, all
implementations in turn. FLOP/s count the pairs that the mask leaves; the share is of the peak that the machine shows in
this run. Writes results/attention.json, attention.png and attention_growth.png.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import pynlp
from benchmarks.measure import (
    BF16,
    FP32,
    PRODUCT_DTYPES,
    RESULTS,
    best_times,
    largest_error,
    machine,
    peak_memory,
    table,
    write_json,
)
from pynlp import probes
from pynlp.functional import alibi_slopes, attention, relative_position_buckets, rotary_tables
from pynlp.reference.attention.attention import rotate

FP16 = torch.float16
PEERS = {"SDPA": "sdpa", "eager": "eager", "Flex": "flex"}
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}  # matrix products that each needs


@dataclass
class Setup:
    """Tensors, and implementations that take (q, k, v, bias table) and give the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    mode: str  # what is timed: "forward", "backward", or "both"
    causal: bool = False
    window: int | None = None  # keys to the left
    slopes: Tensor | None = None
    bias_table: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None

    def ours(self, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None) -> Tensor:
        window = None if self.window is None else (self.window, 0)
        return attention(
            q, k, v, causal=self.causal, window=window, alibi_slopes=self.slopes, relative_bias=bias_table,
            rotary=self.rotary,
        )  # fmt: skip

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None) -> Tensor:
        mask = self.mask_for(bias_table)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = self.causal and mask is None
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    def eager(self, q: Tensor, k: Tensor, v: Tensor, bias_table: Tensor | None) -> Tensor:
        mask = self.mask_for(bias_table)
        group = q.shape[2] // k.shape[2]
        q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        elif self.causal:
            scores = scores.masked_fill(self.hidden, -math.inf)
        return (scores.softmax(-1, dtype=torch.promote_types(FP32, q.dtype)).to(q.dtype) @ v).transpose(1, 2)

    @cached_property
    def distance(self) -> Tensor:
        position = torch.arange(self.q.shape[1])
        return position - position[:, None]  # key - query

    @cached_property
    def hidden(self) -> Tensor:
        hidden = torch.zeros_like(self.distance, dtype=torch.bool)
        if self.window is not None:
            hidden |= (self.distance < -self.window) | (self.distance > 0)
        return hidden | (self.distance > 0) if self.causal else hidden

    @cached_property
    def ready_mask(self) -> Tensor | None:
        return self.dense_mask(self.bias_table)

    def mask_for(self, bias_table: Tensor | None) -> Tensor | None:
        """The dense mask: ready-made, unless a gradient must flow through it to the table."""
        trains = bias_table is not None and bias_table.requires_grad
        return self.dense_mask(bias_table) if trains else self.ready_mask

    def dense_mask(self, bias_table: Tensor | None) -> Tensor | None:
        """(1, heads or 1, seqlen, seqlen) of biases and -inf; None where SDPA's is_causal says it all."""
        if bias_table is None and self.slopes is None and self.window is None:
            return None
        mask = torch.zeros(1, *self.distance.shape, dtype=torch.promote_types(FP32, self.q.dtype))
        if self.slopes is not None:
            mask = mask - self.slopes[:, None, None] * self.distance.abs()
        if bias_table is not None:
            buckets = relative_position_buckets(32, 128, not self.causal).long()
            mask = mask + bias_table[buckets[self.distance.clamp(-128, 128) + 128]].permute(2, 0, 1)
        return mask.masked_fill(self.hidden, -math.inf).to(self.q.dtype)[None]

    def call(self, implementation: str) -> Callable[[], list[Tensor]]:
        """What is timed. PyTorch's paths get q and k rotated beforehand."""
        tensors = [self.q, self.k, self.v, self.bias_table]
        if self.rotary is not None and implementation != "ours":
            cos, sin = (x[None].to(torch.promote_types(FP32, self.q.dtype)) for x in self.rotary)
            wide = (x.to(cos.dtype) for x in tensors[:2])
            tensors[:2] = (rotate(x, cos, sin, False).to(self.q.dtype) for x in wide)
        if self.mode != "forward":
            tensors = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
        trained = [x for x in tensors if x is not None]
        function = getattr(self, implementation)
        if self.mode == "forward":
            return lambda: [function(*tensors)]
        if self.mode == "both":
            return lambda: list(torch.autograd.grad(function(*tensors), trained, self.grad_out))
        out = function(*tensors)
        return lambda: list(torch.autograd.grad(out, trained, self.grad_out, retain_graph=True))

    def last_head(self) -> "Setup":
        """The last key/value head of the first sequence, with its query heads."""
        group = self.q.shape[2] // self.k.shape[2]
        return replace(
            self, q=self.q[:1, :, -group:], k=self.k[:1, :, -1:], v=self.v[:1, :, -1:],
            grad_out=self.grad_out[:1, :, -group:],
            slopes=None if self.slopes is None else self.slopes[-group:],
            bias_table=None if self.bias_table is None else self.bias_table[:, -group:],
        )  # fmt: skip

    def in_fp64(self) -> "Setup":
        wide = {name: getattr(self, name) for name in ("q", "k", "v", "grad_out", "slopes", "bias_table")}
        return replace(self, **{name: None if x is None else x.double() for name, x in wide.items()})

    def errors(self) -> tuple[float, float, bool]:
        """Largest error of ours and of SDPA against fp64, and whether every tensor of ours passes the gate."""
        part = self.last_head()
        oracle = part.in_fp64().call("ours")()  # fp64 runs on the reference
        ours, sdpa = (largest_error(part.call(name)(), oracle) for name in ("ours", "sdpa"))
        allowed = 2 if self.mode == "forward" else 3
        correct = all(a <= allowed * b + 1e-6 for a, b in zip(ours, sdpa, strict=True))
        return max(ours), max(sdpa), correct


@dataclass
class Case:
    """One row: the set-up and what is asked of our time, against PyTorch's and against the machine."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, int, int, int, int]  # batch, heads, kv_heads, seqlen, head_dim
    mode: str = "forward"
    ratio: float = 0.0  # PyTorch's time / ours, at least
    share: float = 0.0  # of the machine's peak, at least
    causal: bool = False
    window: int | None = None
    alibi: bool = False
    rope: bool = False
    t5: bool = False
    isa: str | None = None

    def setup(self) -> Setup:
        torch.manual_seed(0)
        batch, heads, kv_heads, seqlen, head_dim = self.shape
        q, grad_out = (torch.randn(batch, seqlen, heads, head_dim).to(self.dtype) for _ in range(2))
        k, v = (torch.randn(batch, seqlen, kv_heads, head_dim).to(self.dtype) for _ in range(2))
        return Setup(
            q, k, v, grad_out, self.mode, self.causal, self.window,
            slopes=alibi_slopes(heads) if self.alibi else None,
            bias_table=torch.randn(32, heads) if self.t5 else None,
            rotary=rotary_tables(seqlen, head_dim) if self.rope else None,
        )  # fmt: skip

    def flop(self) -> float:
        batch, heads, _, seqlen, head_dim = self.shape
        if self.window is not None:
            pairs = sum(min(i, self.window) + 1 for i in range(seqlen))
        else:
            pairs = seqlen * (seqlen + 1) // 2 if self.causal else seqlen**2
        return 2 * PRODUCTS[self.mode] * batch * heads * head_dim * pairs


def cases() -> list[Case]:
    def square(dim: int) -> tuple[int, int, int, int, int]:
        return 1, 8, 8, 2048, dim

    rows = []
    for mode, asked in (
        ("forward", {FP32: (2.7, 0.75), BF16: (5.0, 0.72)}),
        ("backward", {FP32: (2.7, 0.72), BF16: (3.2, 0.70)}),
    ):
        for dtype, (ratio, share) in asked.items():
            rows += [Case(f"causal D{d}", dtype, square(d), mode, ratio, share, causal=True) for d in (64, 128)]
    for dtype, rope_alibi, t5, gqa in ((FP32, 2.5, 3.0, 2.5), (BF16, 4.5, 5.0, 4.5)):
        rows += [
            Case("RoPE + ALiBi, causal", dtype, square(64), "forward", rope_alibi, causal=True, alibi=True, rope=True),
            Case("T5 table", dtype, square(64), "forward", t5, t5=True),
            Case("T5 table, causal", dtype, square(64), "forward", t5, t5=True, causal=True),
            Case("T5 table, its gradient", dtype, square(64), "both", 5.0, t5=True),
            Case("GQA 32/8 D128, causal", dtype, (1, 32, 8, 2048, 128), "forward", gqa, causal=True),
        ]
    rows += [
        Case("window (256, 0), S8192", FP32, (1, 8, 8, 8192, 64), m, 10.0, window=256) for m in ("forward", "both")
    ]
    rows += [Case(f"causal S{s} B4", FP32, (4, 8, 8, s, 64), "forward", 3.0, causal=True) for s in (128, 512)]
    rows.append(Case("causal D64", FP16, square(64), causal=True))
    rows.append(Case("causal D64, AVX2 only", FP32, square(64), "forward", 1.3, causal=True, isa="avx2"))
    return [case for case in rows if case.dtype in (*PRODUCT_DTYPES, FP16)]


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of the machine in the dtype's instructions; fp16 is computed in fp32."""
    return (dtype == BF16 and probes.peak_bf16_dot(seconds=0.02)) or probes.peak_fma(seconds=0.02)


def run_case(case: Case, flex: Callable | None) -> dict:
    setup = case.setup()
    in_use = pynlp.get_isa()
    if case.isa:
        pynlp.set_isa(case.isa)
    peaks = [peak(case.dtype)]
    try:
        error, error_sdpa, correct = setup.errors()
        calls = {name: setup.call(name) for name in ("ours", "sdpa")}
        # The peak drifts with the machine's clock and other load: it is taken in turns with what is held against it.
        calls["peak"] = lambda: peaks.append(peak(case.dtype))
        times = best_times(calls, 3.0) if correct else {}
        # Eager attention empties the caches and FlexAttention has its own threads: they are timed apart.
        if correct and case.shape[3] <= 2048:
            times |= best_times({"eager": setup.call("eager")}, 0.3)
        if correct and flex is not None and case.name == "causal D64" and case.mode == "forward":
            times |= best_times({"flex": lambda: flex(setup.q, setup.k, setup.v)}, 0.3)
        rate = case.flop() / times["ours"] if correct else 0.0
        share = rate / max(peaks)
    finally:
        pynlp.set_isa(in_use)
    speedup = {name: times[name] / times["ours"] for name in times if name != "peak"}
    # Where PyTorch must give the table's gradient, its best path counts.
    ratio = min(speedup[n] for n in ("sdpa", "eager") if n in speedup) if case.t5 and times else speedup.get("sdpa", 0)
    asked = [f"{case.ratio} x"] * bool(case.ratio) + [f"{case.share:.0%}"] * bool(case.share)
    return {
        "case": case.name,
        "mode": {"both": "forward + backward"}.get(case.mode, case.mode),
        "dtype": str(case.dtype).removeprefix("torch."),
        "error": f"{error:.1e}",
        "SDPA's": f"{error_sdpa:.1e}",
        "ms": f"{times['ours'] * 1e3:.2f}" if times else "wrong",
        "GFLOP/s": f"{rate / 1e9:.0f}" if times else "-",
        "of peak": f"{share:.0%}" if times else "-",
        **{f"x {label}": f"{speedup[n]:.1f}" if n in speedup else "-" for label, n in PEERS.items()},
        "asked": ", ".join(asked),
        "met": "yes" if times and ratio >= case.ratio and share >= case.share else "NO",
    }  # fmt: skip


def compiled_flex() -> Callable | None:
    """FlexAttention with a causal block mask, compiled; None where it does not run."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 2048, 2048, device="cpu")
    function = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)

    try:
        run(*(torch.randn(1, 2048, 8, 64) for _ in range(3)))
    except Exception as error:  # whatever its compiler raises: the row says that there is no peer
        print(f"FlexAttention does not run here: {str(error).splitlines()[0]}")
        return None
    return run


def figure(name: str, value: float, limit: str) -> dict:
    """A row of the second table; `limit` is like '>= 1.8'."""
    sign, bound = limit.split()
    met = value >= float(bound) if sign == ">=" else value <= float(bound)
    return {"figure": name, "measured": f"{value:.2f}", "asked": limit, "met": "yes" if met else "NO"}


def scaling_figures() -> list[dict]:
    """How the time follows the threads, the window and the dtype."""
    rows, threads = [], torch.get_num_threads()
    for mode in ("forward", "backward"):
        call = Case("", FP32, (1, 1, 1, 8192, 64), mode, causal=True).setup().call("ours")

        def on(count: int, call: Callable = call) -> Callable:
            return lambda: (torch.set_num_threads(count), call())

        times = best_times({"one": on(1), "two": on(2)}, 3.0)
        torch.set_num_threads(threads)
        rows.append(figure(f"one head, S8192, {mode}: 2 threads against 1", times["one"] / times["two"], ">= 1.8"))
    for mode in ("forward", "both"):
        calls = {s: Case("", FP32, (1, 8, 8, s, 64), mode, window=256).setup().call("ours") for s in (2048, 16384)}
        times = best_times(calls, 3.0)
        growth = times[16384] / times[2048] / 8
        rows.append(figure(f"window (256, 0), {mode}: time a token, S16384 against S2048", growth, "<= 1.2"))
    calls = {d: Case("", d, (1, 8, 8, 2048, 64), causal=True).setup().call("ours") for d in (FP32, FP16)}
    times = best_times(calls)
    rows.append(figure("causal D64, forward: fp16's time against fp32's", times[FP16] / times[FP32], "<= 1.5"))
    return rows


MEMORY_SCRIPT = """
import torch
from benchmarks.attention import FP32, Case
def call(seqlen):
    return Case("", FP32, (1, 8, 8, seqlen, 64), "both", {options}).setup().call("{implementation}")
call(64)()
measured = call({seqlen})
"""


def peak_bytes(implementation: str, seqlen: int, options: str) -> int:
    """Peak of one forward + backward beyond its inputs."""
    return peak_memory(MEMORY_SCRIPT.format(implementation=implementation, seqlen=seqlen, options=options))


def memory_figures() -> list[dict]:
    size = 7 * 4096 * 8 * 64 * 4  # q, k, v, out and three gradients
    name = "S4096, forward + backward: peak extra memory / (q, k, v, out, gradients)"
    return [
        figure(f"{bias}, {name}", peak_bytes("ours", 4096, options) / size, "<= 1.1")
        for bias, options in (("causal", "causal=True"), ("ALiBi", "causal=True, alibi=True"), ("T5 table", "t5=True"))
    ]


def growth(lengths: list[int]) -> dict:
    """Time (ms) and peak memory (MB) of forward + backward with the T5 table, as the sequence grows."""
    result: dict = {"seqlen": lengths, "ms": {}, "MB": {}}
    for name, longest in (("ours", lengths[-1]), ("sdpa", 4096)):  # beyond, dense biases take many gigabytes
        result["ms"][name], result["MB"][name] = [], []
        for seqlen in tqdm([s for s in lengths if s <= longest], desc=f"growth, {name}", leave=False):
            call = Case("", FP32, (1, 8, 8, seqlen, 64), "both", t5=True).setup().call(name)
            result["ms"][name].append(best_times({name: call}, 0.5)[name] * 1e3)
            result["MB"][name].append(peak_bytes(name, seqlen, "t5=True") / 2**20)
    return result


def plot_cases(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["met"] and row["ms"] != "wrong"]
    labels = [f"{row['case']}, {row['mode']}, {row['dtype']}" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.2))
    bars = axes.barh(labels, [float(row["x SDPA"]) for row in rows], color="#3b6fb6")
    axes.bar_label(bars, [f"{row['x SDPA']}x, {row['of peak']} of peak" for row in rows], padding=4, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlim=(0.8, 4 * max(float(row["x SDPA"]) for row in rows)))
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("PyTorch SDPA's time / ours")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "attention.png", dpi=150)
    plt.close(figure)


def plot_growth(result: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, unit, title in zip(axes, ("ms", "MB"), ("time", "peak extra memory"), strict=True):
        for name, label in (("ours", "pynlp"), ("sdpa", "SDPA, dense bias")):
            values = result[unit][name]
            axis.plot(result["seqlen"][: len(values)], values, marker="o", label=label)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="sequence length",
            ylabel=unit,
            title=f"forward + backward, T5 table: {title}",
        )
        axis.title.set_fontsize(9)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "attention_growth.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and nothing else")
    only = parser.parse_args().only
    chosen = [case for case in cases() if only in case.name]
    if not chosen:
        parser.error(f"--only: expected a part of one of {sorted({c.name for c in cases()})}, got {only!r}")
    flex = None if only else compiled_flex()
    rows = [run_case(case, flex) for case in tqdm(chosen, desc="cases", leave=False)]
    print(table(rows))
    if only:
        return
    figures = scaling_figures() + memory_figures()
    print("\n" + table(figures))
    grown = growth([1024, 2048, 4096, 8192, 16384])
    peaks = {"fp32 FMA": probes.peak_fma(), "bf16 dot": probes.peak_bf16_dot(), "read B/s": probes.read_bandwidth()}
    content = {"machine": machine(), "peaks": peaks, "cases": rows, "figures": figures, "growth": grown}
    path = write_json("attention", content)
    plot_cases(rows)
    plot_growth(grown)
    print(f"\n{machine()}\npeaks: " + ", ".join(f"{name} {value / 1e9:.0f} G" for name, value in peaks.items()))
    print(f"written: {path}, {RESULTS / 'attention.png'}, {RESULTS / 'attention_growth.png'}")


if __name__ == "__main__":
    main()
