"""Mixtures of experts: dispatch, grouped products, the layers of experts, forward and backward.

A kernel fails on spills, on shared or tensor memory beyond the chip's, on a product that misses the chip's tensor
cores, and where its hot loop has more instructions beside the products than bars allow, held against a plain product
of the same tile and chip: `dense_kernel` here.

beside products = instructions of the hot loop that are no products, and those of the plain product's.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from pynlp.kernels.common.launch import Launch, launch
from pynlp.kernels.moe import dispatch, grouped, mlp

from benchmarks.audit.chips import CDNA, CHIPS, compiled_launches, missed_products, multiplying_chip
from benchmarks.audit.report import Row, row_of

FIGURES = ("beside products", "of a plain one")
TOKENS = 8192
CASES = {
    "swiglu": dict(),
    "gpt-oss": dict(activation=3, by_lines=False, interleaved=True, bias=True),
    # With --full:
    "gelu, bias": dict(activation=0, bias=True),
    "swiglu, lines of outputs": dict(by_lines=False),
    "swiglu, interleaved": dict(interleaved=True),
    "relu, ragged": dict(activation=1, hidden=1000, inner=1111),
    "swiglu, 128 experts": dict(experts=128, top_k=8, inner=768, hidden=2048),
    "swiglu, few tokens": dict(tokens=16, experts=64, top_k=6),
}
USUAL = list(CASES)[:2]
# Instructions beside the products, over those of a plain product, in bf16 and fp16 and whole tiles: kernel -> bar. The
# gradients of matrices read rows of tokens by the experts' order, which a plain product does not.
BARS = {"grouped_kernel": 1.15, "gate_up_kernel": 1.15, "down_backward_kernel": 1.15}
PRODUCTS = {*BARS, "weight_gradient_kernel"}


@triton.jit
def dense_kernel(
    p_x, p_w, p_out, stride_x, stride_w, inputs, outputs,
    BY_LINES: tl.constexpr, PAIR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x W^T, or with PAIR of two tiles of W, the products of which are multiplied."""
    i_m = tl.program_id(0) * BLOCK_M
    i_n = tl.program_id(1) * BLOCK_N
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_x += tl.cast(i_m, tl.int64) * stride_x
    o_x = (o_m * stride_x)[:, None] + o_k[None, :]
    if BY_LINES:
        p_w += tl.cast(i_n, tl.int64) * stride_w
        o_w = (o_n * stride_w)[:, None] + o_k[None, :]
    else:
        p_w += i_n
        o_w = (o_k * stride_w)[:, None] + o_n[None, :]
    p_second = p_w + tl.cast(outputs, tl.int64) * stride_w
    b_sum = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    b_second = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for _ in tl.range(0, inputs, BLOCK_K, num_stages=STAGES):
        b_x = tl.load(p_x + o_x)
        b_w = tl.load(p_w + o_w)
        b_sum = tl.dot(b_x, tl.trans(b_w) if BY_LINES else b_w, b_sum, input_precision=PRECISION)
        if PAIR:
            b_w = tl.load(p_second + o_w)
            b_second = tl.dot(b_x, tl.trans(b_w) if BY_LINES else b_w, b_second, input_precision=PRECISION)
        p_x += BLOCK_K
        p_w += BLOCK_K if BY_LINES else stride_w.to(tl.int64) * BLOCK_K
        p_second += BLOCK_K if BY_LINES else stride_w.to(tl.int64) * BLOCK_K
    if PAIR:
        b_sum *= b_second
    p_out += (i_m + o_m).to(tl.int64)[:, None] * outputs + (i_n + o_n)[None, :]
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty))


@triton.jit
def dense_gradient_kernel(
    p_a, p_b, p_out, stride_a, stride_b, rows, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = a^T b."""
    i_m = tl.program_id(0) * BLOCK_M
    i_n = tl.program_id(1) * BLOCK_N
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    o_a = (o_k * stride_a)[:, None] + i_m + o_m[None, :]
    o_b = (o_k * stride_b)[:, None] + i_n + o_n[None, :]
    b_sum = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for _ in tl.range(0, rows, BLOCK_K, num_stages=STAGES):
        b_sum = tl.dot(tl.trans(tl.load(p_a + o_a)), tl.load(p_b + o_b), b_sum, input_precision=PRECISION)
        p_a += stride_a.to(tl.int64) * BLOCK_K
        p_b += stride_b.to(tl.int64) * BLOCK_K
    p_out += (i_m + o_m).to(tl.int64)[:, None] * columns + (i_n + o_n)[None, :]
    tl.store(p_out, b_sum.to(p_out.dtype.element_ty))


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(chip: str, dtype: torch.dtype, case: dict) -> list[Launch]:
    """The launches of a layer of experts, both ways, with its dispatch; and of grouped_mm with its gradients."""
    tokens, experts, top_k = case.get("tokens", TOKENS), case.get("experts", 8), case.get("top_k", 2)
    hidden, inner, kind = case.get("hidden", 2048), case.get("inner", 2048), case.get("activation", 2)
    by_lines, outputs = case.get("by_lines", True), inner * (2 if kind >= 2 else 1)
    exact, slots = torch.float32, tokens * top_k

    def projection(outputs: int, inputs: int) -> torch.Tensor:
        if by_lines:
            return empty(experts, outputs, inputs, dtype=dtype)
        return empty(experts, inputs, outputs, dtype=dtype).mT

    gate_up, down = projection(outputs, hidden), projection(hidden, inner)
    biases = [None, None]
    if case.get("bias"):
        biases = [empty(experts, outputs, dtype=exact), empty(experts, hidden, dtype=exact)]
    x, grad = empty(tokens, hidden, dtype=dtype), empty(tokens, hidden, dtype=dtype)
    weights = empty(tokens, top_k, dtype=exact)
    routing = [empty(slots, dtype=torch.int32), empty(tokens, top_k, dtype=torch.int32)]
    offsets = empty(experts, dtype=torch.int32)
    layer = (x, weights, gate_up, biases[0], down, biases[1], *routing, offsets)
    options = kind, case.get("interleaved", False)
    with compiled_launches(chip) as started:
        dispatch.moe_dispatch(empty(tokens, top_k, dtype=torch.int64), experts)
        mlp.moe_mlp_forward(*layer, *options, True)
        mlp.moe_mlp_backward(grad, *layer, empty(slots, outputs, dtype=dtype), *options, True, True, True)
        grouped.grouped_mm(x, down.mT[:, :hidden], offsets, biases[1])
        grouped.grouped_mm_weight_backward(grad, x, offsets, by_lines, biases[1] is not None)
    return started


def plain(chip: str, start: Launch, dtype: torch.dtype) -> Launch:
    """A plain product with the tile of a launch."""
    arguments = start.arguments
    features = arguments["F"]
    x, out, size = (empty(4096, 4096, dtype=dtype) for _ in range(2)), empty(4096, 4096, dtype=dtype), (4096,) * 4
    tile = dict(
        BLOCK_M=features.BLOCK_M, BLOCK_N=features.BLOCK_N, BLOCK_K=features.BLOCK_K, STAGES=features.STAGES,
        PRECISION=features.PRECISION, num_warps=arguments["num_warps"], num_stages=features.STAGES,
    )  # fmt: skip
    with compiled_launches(chip) as started:
        if start.kernel == "weight_gradient_kernel":
            launch(dense_gradient_kernel, (1, 1), *x, out, *size, **tile)
        else:
            gated = start.kernel == "gate_up_kernel" and features.ACTIVATION.startswith("swiglu")
            if gated and features.INTERLEAVED:
                tile["BLOCK_N"] *= 2
            is_pair = gated and not features.INTERLEAVED
            launch(dense_kernel, (1, 1), *x, out, *size, BY_LINES=features.BY_LINES, PAIR=is_pair, **tile)
    return started[-1]


def judge(chip: str, start: Launch, dtype: torch.dtype, case: str) -> Row:
    arguments = start.arguments
    features = arguments.get("F")
    if start.kernel not in PRODUCTS:
        tile = tuple(arguments[name] for name in ("BLOCK_M", "BLOCK_N", "TILE", "ROWS", "BINS") if name in arguments)
        return row_of(chip, start, (*tile, "-", "-")[:2], TOKENS, dtype, case)
    row = row_of(chip, start, (features.BLOCK_M, features.BLOCK_N), features.BLOCK_K, dtype, case)
    multiplying = multiplying_chip(chip, features.BLOCK_M)
    if features.PRECISION != "ieee" or chip == "gfx942":
        row.failures += missed_products(chip, start.compiled, features.BLOCK_M)
    pattern = CHIPS[multiplying].tensor_core
    loops = row.code.loops(pattern)
    if not loops:
        row.failures.append(f"no loop with {pattern}")
        return row
    beside = min(loop.total() - loop.count(pattern) for loop in loops)
    dense = row_of(chip, plain(chip, start, dtype), (0, 0), 0, dtype, case).code.loops(pattern)
    if not dense:
        row.failures.append("the plain product has no loop")
        return row
    own = min(loop.total() - loop.count(pattern) for loop in dense)
    row.figures = (f"{beside} ({own})", f"{beside / own:.2f}")
    is_whole = getattr(features, "EVEN_K", True) and getattr(features, "EVEN_N", True)
    bar = BARS.get(start.kernel)
    if bar and dtype.itemsize == 2 and is_whole and chip not in CDNA and beside / own > bar:
        row.failures.append(f"{beside / own:.2f} of a plain product's, bar {bar}")
    return row


def cases(_: str, full: bool) -> Iterator[tuple[torch.dtype, str]]:
    """(dtype, name of the case), alike on every chip."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if full else (torch.bfloat16,):
        for case in CASES if full else USUAL:
            yield dtype, case
    if not full:
        yield torch.float32, USUAL[0]


def audit(chip: str, dtype: torch.dtype, case: str) -> list[Row]:
    return [judge(chip, start, dtype, case) for start in launches(chip, dtype, CASES[case])]
