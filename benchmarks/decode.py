"""`python -m benchmarks.decode`: packed sequences, decoding over a cache, and dropout beside PyTorch's SDPA.

As in benchmarks.attention a case is set up once, its errors against fp64 decide whether its speed is printed, and all
implementations are timed in turn. Packed sequences count the FLOP/s of the pairs that exist; decoding counts the bytes
of the keys and values, against the read bandwidth that the machine shows in the same round: a shared machine's changes
from one second to the next, so a ratio is the median of those of the rounds. Writes results/serving.json and
serving.png.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import PRODUCTS
from benchmarks.cases import Case, run_cases
from benchmarks.measure import FP32, PRODUCT_DTYPES, best_times
from pynlp.functional import attention, attention_decode, attention_varlen, attention_weights
from pynlp.nn import KVCache, LatentAttention, MultiHeadAttention


def scaled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """SDPA of (batch, seqlen, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1], **options).transpose(1, 2)


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
            return torch.cat([scaled(*(x[None] for x in part), is_causal=True)[0] for part in parts])

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
                lambda: scaled(*padded_leaves, is_causal=True), padded_leaves, padded_grad,
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


def decode_case(dtype: torch.dtype, batch: int, heads: tuple[int, int] = (8, 8), head_dim: int = 64) -> Case:
    """One new token over a cache of 16384; also out of pages of 16 and 256, in random order."""
    torch.manual_seed(0)
    length, (heads, kv_heads) = 16384, heads
    q = torch.randn(batch, 1, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, length, kv_heads, head_dim, dtype=FP32).to(dtype) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32)
    calls = {
        "ours": lambda: [attention_decode(q, k, v, lengths)],
        "SDPA": lambda: [scaled(q, k, v)],
    }
    for page_size in (16, 256):
        pages = length // page_size
        block_table = torch.randperm(batch * pages, dtype=torch.int32).view(batch, pages)
        shape = (batch * pages, page_size, kv_heads, head_dim)
        k_pages, v_pages = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        k_pages[block_table.flatten().long()], v_pages[block_table.flatten().long()] = k.view(shape), v.view(shape)
        calls[f"pages of {page_size}"] = lambda k_pages=k_pages, v_pages=v_pages, block_table=block_table: [
            attention_decode(q, k_pages, v_pages, lengths, block_table=block_table)
        ]

    def oracle() -> list[Tensor]:
        return [torch.cat([scaled(*(x[i : i + 1].double() for x in (q, k, v))) for i in range(batch)])]

    return Case(
        f"decode, batch {batch}, {heads}/{kv_heads} heads of {head_dim}, cache 16384", dtype, calls, oracle,
        {"SDPA": 2.0, "bandwidth": 0.8}, {"pages of 16": 1.1, "pages of 256": 1.1},
        flop=4 * batch * heads * head_dim * length, bytes=2 * k.numel() * k.element_size(),
    )  # fmt: skip


def latent_case(dtype: torch.dtype) -> Case:
    """One new token over latents: 16 heads on one of 512 + 64 channels, whose values are the first 512 of its keys."""
    torch.manual_seed(0)
    batch, length, heads = 4, 4096, 16
    q, k = torch.randn(batch, 1, heads, 576).to(dtype), torch.randn(batch, length, 1, 576).to(dtype)
    lengths = torch.full((batch,), length, dtype=torch.int32)
    calls = {
        "ours": lambda: [attention_decode(q, k, k[..., :512], lengths)],
        "SDPA": lambda: [scaled(q, k, k[..., :512])],
    }
    return Case(
        "decode, batch 4, 16 heads on latents, cache 4096", dtype, calls,
        lambda: [scaled(q.double(), k.double(), k[..., :512].double())], {"SDPA": 2.0},
        flop=2 * batch * heads * length * (576 + 512),
    )  # fmt: skip


def weights_case(dtype: torch.dtype) -> Case:
    """The weights of 64 of 2048 queries, causal, 8 heads of 64."""
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

    def sdpa() -> list[Tensor]:
        if not backward:
            return [scaled(*leaves, is_causal=True, dropout_p=0.1)]
        return list(torch.autograd.grad(scaled(*leaves, is_causal=True, dropout_p=0.1), leaves, grad))

    calls = {
        "ours": call(leaves, grad, dropout_p=0.1, seed=1),
        "without": call(leaves, grad),
        "SDPA": sdpa,
        "checked": first_rows,
    }
    pairs = 2048 * 2049 // 2
    return Case(
        f"dropout 0.1, causal, {'forward + backward' if backward else 'forward'}", dtype, calls, oracle,
        {"without": 1 / 1.35}, flop=2 * PRODUCTS["both" if backward else "forward"] * 8 * 64 * pairs,
    )  # fmt: skip


def cached_modules() -> list[dict]:
    """A decoding step of one layer by the kind of its heads: 2048 channels, batch 4, 4096 tokens cached."""
    torch.manual_seed(0)
    dtype = PRODUCT_DTYPES[-1]
    batch, cached, options = 4, 4096, dict(dtype=dtype, max_positions=4097, causal=True)
    layers = {
        "multi-head, 16 x 128": MultiHeadAttention(2048, 16, positions="rope", **options),
        "grouped, 16 / 4 x 128": MultiHeadAttention(2048, 16, kv_heads=4, positions="rope", **options),
        "latent, 16 on 512 + 64": LatentAttention(2048, 16, kv_rank=512, nope_dim=128, rope_dim=64, **options),
    }
    x = torch.randn(batch, 1, 2048, dtype=dtype)

    def step_of(layer: torch.nn.Module) -> Callable[[], Tensor]:
        cache = KVCache(batch, cached + 1, **layer.cache_shape, dtype=dtype)
        layer.eval()(torch.randn(batch, cached, 2048, dtype=dtype), cache=cache.append(cached)[0])

        def step() -> Tensor:
            cache.truncate([cached] * batch)
            return layer(x, cache=cache.append(1)[0])

        return step

    with torch.no_grad():
        times = best_times({name: step_of(layer) for name, layer in layers.items()})
    return [
        {"layer": name, "cached bytes a token": layer.cache_bytes_per_token(), "ms a step": f"{times[name] * 1e3:.2f}"}
        for name, layer in layers.items()
    ]


CASES = {
    **{
        f"varlen {mode} {dtype}": lambda dtype=dtype, backward=backward: varlen_case(dtype, backward)
        for dtype in PRODUCT_DTYPES
        for mode, backward in (("forward", False), ("both", True))
    },
    **{
        f"decode {batch} {dtype}": lambda dtype=dtype, batch=batch: decode_case(dtype, batch)
        for dtype in PRODUCT_DTYPES
        for batch in (1, 16)
    },
    "decode grouped": lambda: decode_case(PRODUCT_DTYPES[-1], 1, (32, 8), 128),
    "latent": lambda: latent_case(PRODUCT_DTYPES[-1]),
    "weights": lambda: weights_case(FP32),
    **{
        f"dropout {mode} {dtype}": lambda dtype=dtype, backward=backward: dropout_case(dtype, backward)
        for dtype in PRODUCT_DTYPES
        for mode, backward in (("forward", False), ("both", True))
    },
}


def main() -> None:
    label = "% of the machine's peak: read bandwidth for decoding, FLOP/s otherwise"
    run_cases("serving", __doc__, CASES, label, {"layers": cached_modules})


if __name__ == "__main__":
    main()
