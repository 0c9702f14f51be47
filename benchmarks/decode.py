"""A step of decoding over a cache, beside PyTorch's SDPA.

`python -m benchmarks.decode`.

A case is set up once, its errors against fp64 decide whether its speed is printed, and all implementations take turns.
Rates count the bytes of the keys and values, and their peak is the read bandwidth that the machine shows in the same
round. A shared machine's bandwidth changes from one second to the next, so ratios are medians of all rounds. Latents,
whose products take longer than reading them, count FLOP/s. Writes results/decode.json and decode.png.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, plot_shares, row, run_cases, sdpa
from benchmarks.measure import FP32, PRODUCT_DTYPES, best_times
from pynlp.functional import attention_decode
from pynlp.nn import KVCache, LatentAttention, MultiHeadAttention


def decode_case(dtype: torch.dtype, batch: int, heads: tuple[int, int] = (8, 8), head_dim: int = 64) -> Case:
    """One new token over a cache of 16384, contiguous and in pages of 16 and 256 in random order."""
    torch.manual_seed(0)
    length, (heads, kv_heads) = 16384, heads
    q = torch.randn(batch, 1, heads, head_dim).to(dtype)
    k, v = (torch.randn(batch, length, kv_heads, head_dim, dtype=FP32).to(dtype) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32)
    calls = {
        "ours": lambda: [attention_decode(q, k, v, lengths)],
        "SDPA": lambda: [sdpa(q, k, v)],
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
        return [torch.cat([sdpa(*(x[i : i + 1].double() for x in (q, k, v))) for i in range(batch)])]

    return Case(
        f"decode, batch {batch}, {heads}/{kv_heads} heads of {head_dim}, cache 16384", dtype, calls, oracle,
        {"SDPA": 2.0}, {"pages of 16": 1.1, "pages of 256": 1.1}, share=0.8,
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
        "SDPA": lambda: [sdpa(q, k, k[..., :512])],
    }
    return Case(
        "decode, batch 4, 16 heads on latents, cache 4096", dtype, calls,
        lambda: [sdpa(q.double(), k.double(), k[..., :512].double())], {"SDPA": 2.0},
        flop=2 * batch * heads * length * (576 + 512),
    )  # fmt: skip


def cached_modules() -> list[dict]:
    """A decoding step of one layer with each kind of heads: 2048 channels, batch 4, 4096 tokens cached."""
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
        f"decode {batch} {dtype}": lambda dtype=dtype, batch=batch: decode_case(dtype, batch)
        for dtype in PRODUCT_DTYPES
        for batch in (1, 16)
    },
    "decode grouped": lambda: decode_case(PRODUCT_DTYPES[-1], 1, (32, 8), 128),
    "latent": lambda: latent_case(PRODUCT_DTYPES[-1]),
}


def main() -> None:
    label = "% of the machine's peak: read bandwidth, FLOP/s for latents"
    plots = {
        "decode": lambda tables: plot_shares(tables["cases"], "Decoding a token: how near the machine's peak", label)
    }
    run_cases("decode", __doc__, {"cases": (CASES, row)}, {"layers": cached_modules}, plots)


if __name__ == "__main__":
    main()
