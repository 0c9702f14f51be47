"""Attention, forward and backward, beside PyTorch's SDPA, eager attention and FlexAttention.

`python -m benchmarks.attention`.

The first table has whole sequences, the second one packed sequences, attention weights, and dropout. Each case is set
up once; the correctness gate (errors against fp64 at most 2x, of gradients 3x, those of PyTorch's path in the same
dtype) and the times use the same tensors. A red gate prints no speed. All implementations take turns; times are the
best of many calls, ratios of the second table medians. FLOP/s count the pairs that the mask leaves; the share is of the
peak that the machine shows in this run. Writes results/attention.json, attention.png and attention_growth.png.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cases import Case, Result, row, run_cases, sdpa
from benchmarks.measure import BF16, FP32, PRODUCT_DTYPES, bars, best_times, peak_memory, plain_logarithmic
from pynlp import functional, probes
from pynlp.functional import alibi_slopes, attention, attention_varlen, attention_weights, rotary_tables
from pynlp.reference.attention.attention import rotate

FP16 = torch.float16
PEERS = ("SDPA", "eager", "Flex")
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}  # matrix products that each needs
MODES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


@dataclass
class Setup:
    """The tensors of a case, and implementations that take (q, k, v, bias table) and give the output."""

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
        return sdpa(q, k, v, mask, is_causal=self.causal and mask is None)

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

    @functools.cached_property
    def distance(self) -> Tensor:
        position = torch.arange(self.q.shape[1])
        return position - position[:, None]  # key - query, (seqlen, seqlen)

    @functools.cached_property
    def hidden(self) -> Tensor:
        hidden = torch.zeros_like(self.distance, dtype=torch.bool)
        if self.window is not None:
            hidden |= (self.distance < -self.window) | (self.distance > 0)
        return hidden | (self.distance > 0) if self.causal else hidden

    @functools.cached_property
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
            buckets = functional.relative_position_buckets(32, 128, not self.causal).long()
            mask = mask + bias_table[buckets[self.distance.clamp(-128, 128) + 128]].permute(2, 0, 1)
        return mask.masked_fill(self.hidden, -math.inf).to(self.q.dtype)[None]

    def call(self, implementation: str) -> Callable[[], list[Tensor]]:
        """A call that gives the output or the gradients. PyTorch's paths get q and k rotated beforehand."""
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

    def flop(self) -> float:
        batch, seqlen, heads, head_dim = self.q.shape
        if self.window is not None:
            pairs = sum(min(i, self.window) + 1 for i in range(seqlen))
        else:
            pairs = seqlen * (seqlen + 1) // 2 if self.causal else seqlen**2
        return 2 * PRODUCTS[self.mode] * batch * heads * head_dim * pairs


def prepare(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],  # batch, heads, kv_heads, seqlen, head_dim
    mode: str = "forward",
    causal: bool = False,
    window: int | None = None,
    alibi: bool = False,
    rope: bool = False,
    t5: bool = False,
) -> Setup:
    torch.manual_seed(0)
    batch, heads, kv_heads, seqlen, head_dim = shape
    q, grad_out = (torch.randn(batch, seqlen, heads, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, seqlen, kv_heads, head_dim).to(dtype) for _ in range(2))
    return Setup(
        q, k, v, grad_out, mode, causal, window,
        slopes=alibi_slopes(heads) if alibi else None,
        bias_table=torch.randn(32, heads) if t5 else None,
        rotary=rotary_tables(seqlen, head_dim) if rope else None,
    )  # fmt: skip


def whole_case(name: str, setup: Setup, ratio: float, share: float, isa: str | None) -> Case:
    """Whole sequences, of which PyTorch's time / ours and the share of the machine's peak are asked."""
    part = setup.last_head()
    # Eager attention empties the caches and FlexAttention has its own threads: they are timed apart.
    apart = {"eager": lambda: setup.call("eager")} if setup.q.shape[1] <= 2048 else {}
    if name == "causal D64, forward" and compiled_flex() is not None:
        apart["Flex"] = lambda: lambda: compiled_flex()(setup.q, setup.k, setup.v)
    # Where PyTorch must give the table's gradient, its best path counts.
    peers = ("SDPA", "eager") if setup.bias_table is not None else ("SDPA",)
    return Case(
        name, setup.q.dtype, {"ours": setup.call("ours"), "SDPA": setup.call("sdpa")},
        lambda: part.in_fp64().call("ours")(),  # fp64 runs on the reference
        dict.fromkeys(peers, ratio), share=share, flop=setup.flop(), slack=2.0 if setup.mode == "forward" else 3.0,
        checked={"ours": part.call("ours"), "SDPA": part.call("sdpa")}, apart=apart, isa=isa,
    )  # fmt: skip


def whole_cases() -> dict[str, Callable[[], Case]]:
    made = {}

    def add(name, dtype, shape, mode="forward", ratio=0.0, share=0.0, isa=None, **features) -> None:
        if dtype in (*PRODUCT_DTYPES, FP16):
            full_name = f"{name}, {MODES[mode]}"
            made[f"{full_name}, {str(dtype).removeprefix('torch.')}"] = lambda: whole_case(
                full_name, prepare(dtype, shape, mode, **features), ratio, share, isa
            )

    def square(dim: int) -> tuple[int, int, int, int, int]:
        return 1, 8, 8, 2048, dim

    for mode, asked in (
        ("forward", {FP32: (2.7, 0.75), BF16: (5.0, 0.72)}),
        ("backward", {FP32: (2.7, 0.72), BF16: (3.2, 0.70)}),
    ):
        for dtype, (ratio, share) in asked.items():
            for head_dim in (64, 128):
                add(f"causal D{head_dim}", dtype, square(head_dim), mode, ratio, share, causal=True)
    for dtype, rope_alibi, t5, gqa in ((FP32, 2.5, 3.0, 2.5), (BF16, 4.5, 5.0, 4.5)):
        add("RoPE + ALiBi, causal", dtype, square(64), ratio=rope_alibi, causal=True, alibi=True, rope=True)
        add("T5 table", dtype, square(64), ratio=t5, t5=True)
        add("T5 table, causal", dtype, square(64), ratio=t5, t5=True, causal=True)
        add("T5 table, its gradient", dtype, square(64), "both", 5.0, t5=True)
        add("GQA 32/8 D128, causal", dtype, (1, 32, 8, 2048, 128), ratio=gqa, causal=True)
    for mode in ("forward", "both"):
        add("window (256, 0), S8192", FP32, (1, 8, 8, 8192, 64), mode, 10.0, window=256)
    for seqlen in (128, 512):
        add(f"causal S{seqlen} B4", FP32, (4, 8, 8, seqlen, 64), ratio=3.0, causal=True)
    add("causal D64", FP16, square(64), causal=True)
    add("causal D64, AVX2 only", FP32, square(64), ratio=1.3, causal=True, isa="avx2")
    return made


def whole_row(case: Case, result: Result) -> dict:
    """A line of the table of whole sequences; its times are the best of all rounds."""
    name, _, mode = case.name.rpartition(", ")
    ratio = case.asked["SDPA"]
    asked = [f"{ratio} x"] * bool(ratio) + [f"{case.share:.0%}"] * bool(case.share)
    line = {
        "case": name,
        "mode": mode,
        "dtype": str(case.dtype).removeprefix("torch."),
        "error": f"{result.error:.1e}",
        "SDPA's": f"{result.peer_error:.1e}",
    }
    if result.speed is None:
        nothing = dict.fromkeys(("GFLOP/s", "of peak", *(f"x {peer}" for peer in PEERS)), "-")
        return line | {"ms": "wrong", **nothing, "asked": ", ".join(asked), "met": "NO"}
    best = {peer: min(times) for peer, times in result.speed.times.items()}
    speedup = {peer: time / best["ours"] for peer, time in best.items()}
    rate = case.flop / best["ours"]
    share = rate / max(result.speed.peaks)
    met = share >= case.share and all(speedup[peer] >= bound for peer, bound in case.asked.items())
    return line | {
        "ms": f"{best['ours'] * 1e3:.2f}",
        "GFLOP/s": f"{rate / 1e9:.0f}",
        "of peak": f"{share:.0%}",
        **{f"x {peer}": f"{speedup[peer]:.1f}" if peer in speedup else "-" for peer in PEERS},
        "asked": ", ".join(asked),
        "met": "yes" if met else "NO",
    }


@functools.cache
def compiled_flex() -> Callable | None:
    """FlexAttention with a causal block mask, compiled, of (1, 2048, 8, 64); None where it does not run."""
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
    """A line of the table of figures; `limit` is like '>= 1.8'."""
    sign, bound = limit.split()
    met = value >= float(bound) if sign == ">=" else value <= float(bound)
    return {"figure": name, "measured": f"{value:.2f}", "asked": limit, "met": "yes" if met else "NO"}


def scaling_figures() -> list[dict]:
    """The growth of the time with the threads, the window and the dtype."""
    rows, threads = [], torch.get_num_threads()
    for mode in ("forward", "backward"):
        call = prepare(FP32, (1, 1, 1, 8192, 64), mode, causal=True).call("ours")

        def on(count: int, call: Callable = call) -> Callable:
            return lambda: (torch.set_num_threads(count), call())

        times = best_times({"one": on(1), "two": on(2)}, 3.0)
        torch.set_num_threads(threads)
        rows.append(figure(f"one head, S8192, {mode}: 2 threads against 1", times["one"] / times["two"], ">= 1.8"))
    for mode in ("forward", "both"):
        calls = {s: prepare(FP32, (1, 8, 8, s, 64), mode, window=256).call("ours") for s in (2048, 16384)}
        times = best_times(calls, 3.0)
        growth = times[16384] / times[2048] / 8
        rows.append(figure(f"window (256, 0), {mode}: time a token, S16384 against S2048", growth, "<= 1.2"))
    calls = {d: prepare(d, (1, 8, 8, 2048, 64), causal=True).call("ours") for d in (FP32, FP16)}
    times = best_times(calls)
    rows.append(figure("causal D64, forward: fp16's time against fp32's", times[FP16] / times[FP32], "<= 1.5"))
    return rows


MEMORY_SCRIPT = """
import torch
from benchmarks.attention import FP32, prepare
def call(seqlen):
    return prepare(FP32, (1, 8, 8, seqlen, 64), "both", {options}).call("{implementation}")
call(64)()
measured = call({seqlen})
"""


def peak_bytes(implementation: str, seqlen: int, options: str) -> int:
    """Bytes of memory that one forward + backward adds to its inputs, at the peak."""
    return peak_memory(MEMORY_SCRIPT.format(implementation=implementation, seqlen=seqlen, options=options))


def memory_figures() -> list[dict]:
    size = 7 * 4096 * 8 * 64 * 4  # q, k, v, out and three gradients
    name = "S4096, forward + backward: peak extra memory / (q, k, v, out, gradients)"
    return [
        figure(f"{bias}, {name}", peak_bytes("ours", 4096, options) / size, "<= 1.1")
        for bias, options in (("causal", "causal=True"), ("ALiBi", "causal=True, alibi=True"), ("T5 table", "t5=True"))
    ]


def growth() -> list[dict]:
    """Time and peak memory of forward + backward with the T5 table, as the sequence grows."""
    rows = []
    for seqlen in tqdm([1024, 2048, 4096, 8192, 16384], desc="growth", leave=False):
        line = {"seqlen": seqlen}
        for name in ("ours", "sdpa")[: 2 if seqlen <= 4096 else 1]:  # beyond, dense biases take many gigabytes
            call = prepare(FP32, (1, 8, 8, seqlen, 64), "both", t5=True).call(name)
            line[f"{name} ms"] = f"{best_times({name: call}, 0.5)[name] * 1e3:.2f}"
            line[f"{name} MB"] = f"{peak_bytes(name, seqlen, 't5=True') / 2**20:.1f}"
        rows.append({"sdpa ms": "-", "sdpa MB": "-"} | line)
    return rows


def varlen_case(dtype: torch.dtype, backward: bool) -> Case:
    """32 sequences of 10 to 1000 tokens, causal, 8 heads of 64."""
    torch.manual_seed(0)
    heads, head_dim = 8, 64
    lengths = torch.linspace(10, 1000, 32).long()[torch.randperm(32)].tolist()
    total, longest = sum(lengths), max(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    rows = [torch.randn(total, heads, head_dim) for _ in range(4)]  # q, k, v and the gradient of the output
    place = torch.cat([i * longest + torch.arange(n) for i, n in enumerate(lengths)])  # in the padded batch

    def implementations(dtype: torch.dtype) -> dict[str, Callable]:
        *leaves, grad = (x.to(dtype) for x in rows)
        leaves = [x.requires_grad_(backward) for x in leaves]
        padded = [x.new_zeros(32 * longest, heads, head_dim).index_copy_(0, place, x.detach()) for x in (*leaves, grad)]
        *padded_leaves, padded_grad = (x.view(32, longest, heads, head_dim) for x in padded)
        padded_leaves = [x.requires_grad_(backward) for x in padded_leaves]

        def loop() -> Tensor:
            parts = zip(*(x.split(lengths) for x in leaves), strict=True)
            return torch.cat([sdpa(*(x[None] for x in part), is_causal=True)[0] for part in parts])

        def call(function: Callable, inputs: list[Tensor], weight: Tensor, rows_of: Callable) -> Callable:
            if not backward:
                return lambda: [rows_of(function())]
            return lambda: [rows_of(x) for x in torch.autograd.grad(function(), inputs, weight)]

        packed = dict(inputs=leaves, weight=grad, rows_of=lambda x: x)
        return {
            "ours": call(lambda: attention_varlen(*leaves, cu_seqlens, cu_seqlens, causal=True), **packed),
            "loop": call(loop, **packed),
            # Causal: no query sees the padding behind it.
            "padded": call(
                lambda: sdpa(*padded_leaves, is_causal=True), padded_leaves, padded_grad,
                lambda x: x.flatten(0, 1)[place],
            ),
        }  # fmt: skip

    pairs = sum(n * (n + 1) // 2 for n in lengths)
    mode = "both" if backward else "forward"
    return Case(
        f"32 sequences of 10 to 1000, {'forward + backward' if backward else 'forward'}", dtype, implementations(dtype),
        lambda: implementations(torch.float64)["ours"](), {"loop": 2.5, "padded": 3.0},
        flop=2 * PRODUCTS[mode] * heads * head_dim * pairs, slack=3.0 if backward else 2.0,
    )  # fmt: skip


def weights_case(dtype: torch.dtype) -> Case:
    """Attention weights of 64 of 2048 queries, causal, 8 heads of 64."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2048, 8, 64).to(dtype) for _ in range(2))
    rows = torch.arange(1024, 2048, 16)
    hidden = torch.arange(2048) > rows[:, None]

    def eager(q: Tensor, k: Tensor) -> list[Tensor]:
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, rows], k) * 64**-0.5
        return [scores.masked_fill(hidden, float("-inf")).softmax(-1)]

    calls = {"ours": lambda: [attention_weights(q, k, rows=rows, causal=True)], "eager": lambda: eager(q, k)}
    pairs = (rows + 1).sum().item()
    return Case(
        "weights of 64 queries, causal", dtype, calls, lambda: eager(q.double(), k.double()), {},
        flop=2 * 8 * 64 * pairs,
    )  # fmt: skip


def dropout_case(dtype: torch.dtype, backward: bool) -> Case:
    """Dropout 0.1, against the same without; causal, 8 heads of 64, 2048 tokens."""
    torch.manual_seed(0)
    *leaves, grad = (torch.randn(1, 2048, 8, 64).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_(backward) for x in leaves]

    def call(rows: list[Tensor], weight: Tensor, **options) -> Callable:
        if not backward:
            return lambda: [attention(*rows, causal=True, **options)]
        return lambda: list(torch.autograd.grad(attention(*rows, causal=True, **options), rows, weight))

    def oracle() -> list[Tensor]:
        rows = [x.detach().double()[:, :512].requires_grad_(backward) for x in leaves]
        return call(rows, grad[:, :512].double(), dropout_p=0.1, seed=1)()

    def first_rows() -> list[Tensor]:
        rows = [x.detach()[:, :512].requires_grad_(backward) for x in leaves]
        return call(rows, grad[:, :512], dropout_p=0.1, seed=1)()

    def peer() -> list[Tensor]:
        if not backward:
            return [sdpa(*leaves, is_causal=True, dropout_p=0.1)]
        return list(torch.autograd.grad(sdpa(*leaves, is_causal=True, dropout_p=0.1), leaves, grad))

    calls = {
        "ours": call(leaves, grad, dropout_p=0.1, seed=1),
        "without": call(leaves, grad),
        "SDPA": peer,
    }
    pairs = 2048 * 2049 // 2
    return Case(
        f"dropout 0.1, causal, {'forward + backward' if backward else 'forward'}", dtype, calls, oracle,
        {"without": 1 / 1.35}, flop=2 * PRODUCTS["both" if backward else "forward"] * 8 * 64 * pairs,
        checked={"ours": first_rows},
    )  # fmt: skip


PACKED = {
    **{
        f"varlen {mode} {dtype}": lambda dtype=dtype, backward=backward: varlen_case(dtype, backward)
        for dtype in PRODUCT_DTYPES
        for mode, backward in (("forward", False), ("both", True))
    },
    "weights": lambda: weights_case(FP32),
    **{
        f"dropout {mode} {dtype}": lambda dtype=dtype, backward=backward: dropout_case(dtype, backward)
        for dtype in PRODUCT_DTYPES
        for mode, backward in (("forward", False), ("both", True))
    },
}


def peaks() -> list[dict]:
    """The machine's peaks, in 10^9 operations or bytes a second."""
    found = {"fp32 FMA": probes.peak_fma(), "bf16 dot": probes.peak_bf16_dot(), "read B/s": probes.read_bandwidth()}
    return [{"peak": name, "G": f"{value / 1e9:.0f}"} for name, value in found.items()]


def plot_cases(tables: dict[str, list[dict]]):
    rows = [row for row in tables["cases"] if row["ms"] != "wrong"]
    ratios = [float(row["x SDPA"]) for row in rows]
    return bars(
        [f"{row['case']}, {row['mode']}, {row['dtype']}" for row in rows],
        ratios,
        [f"{row['x SDPA']}x, {row['of peak']} of peak" for row in rows],
        "Attention: speed against PyTorch's",
        "times as fast as PyTorch's scaled_dot_product_attention",
        logarithmic=True,
    )


def plot_growth(tables: dict[str, list[dict]]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, unit, title in zip(
        figure.subplots(1, 2), ("ms", "MB"), ("time (ms)", "peak extra memory (MB)"), strict=True
    ):
        for name, label in (("ours", "pynlp"), ("sdpa", "SDPA, dense bias")):
            points = [(r["seqlen"], float(r[f"{name} {unit}"])) for r in tables["growth"] if r[f"{name} {unit}"] != "-"]
            axes.plot(*zip(*points, strict=True), marker="o", label=label if unit == "ms" else None)
        lengths = sorted({r["seqlen"] for r in tables["growth"]})
        axes.set(xscale="log", xlim=(lengths[0], lengths[-1]), xlabel="sequence length (tokens)", ylabel=title)
        axes.set_xticks(lengths, lengths, fontsize=8)
        axes.minorticks_off()
        plain_logarithmic(axes.yaxis, (1, 3))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Attention with T5's table of biases, forward + backward")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def main() -> None:
    tables = {"cases": (whole_cases(), whole_row), "packed, weights, dropout": (PACKED, row)}
    more = {"figures": lambda: scaling_figures() + memory_figures(), "growth": growth, "peaks": peaks}
    plots = {"attention": plot_cases, "attention_growth": plot_growth}
    run_cases("attention", __doc__, tables, more, plots)


if __name__ == "__main__":
    main()
