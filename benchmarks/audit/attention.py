"""Attention: its forward and backward kernels.

A kernel fails on spills, on shared or tensor memory beyond the chip's, on a product that misses the chip's tensor
cores, on narrow loads or masks in the loop over unmasked blocks, and on more instructions a score than the bars allow.

n/s = non-tensor instructions of the loop a score and thread. The bounds are the tensor cores' share of the loop's
cycles if nothing overlaps and if everything does: they rank variants, they are not measurements.
"""

import re
from collections.abc import Iterator

import torch
import triton
from pynlp.kernels.attention import launch as attention
from pynlp.kernels.common.launch import Launch

from benchmarks.audit.chips import (
    AMPERE,
    CDNA,
    CHIPS,
    HOPPER,
    Chip,
    compiled_launches,
    missed_products,
    multiplying_chip,
)
from benchmarks.audit.machine_code import Loop
from benchmarks.audit.report import Markers, Row, kind_of, row_of, source_of

FIGURES = ("n/s unmasked / near", "tensor share, none - full overlap")
FEATURES = {
    "full": dict(window=(-1, -1)),
    "causal": dict(),
    "causal, ALiBi": dict(slopes=True),
    "causal, T5": dict(table=True),
    "causal, RoPE": dict(rotary=1.0),
    "window, lengths": dict(window=(512, 64), lengths=True),
    "ALiBi": dict(window=(-1, -1), slopes=True),
    "T5": dict(window=(-1, -1), table=True),
    "causal, sinks": dict(sinks=True),
    "causal, dropout": dict(dropout=0.1),
    "causal, varlen": dict(packed=True),
    "causal, softcap": dict(softcap=30.0),
    "causal, GPT-NeoX RoPE 1/4": dict(rotary=0.25),
    "causal, interleaved RoPE, ids": dict(rotary=1.0, interleaved=True, ids=True),
    "causal, lengths, unaligned": dict(lengths=True, unaligned=True),
    "window, ALiBi, T5": dict(window=(512, 64), slopes=True, table=True),
    "causal, values of half": dict(values=0.5),
    "window, all": dict(
        window=(512, 64), lengths=True, slopes=True, table=True, rotary=1.0, softcap=30.0, interleaved=True, ids=True
    ),
    "varlen, all": dict(
        window=(512, 64), packed=True, sinks=True, slopes=True, table=True, rotary=1.0, softcap=30.0, dropout=0.1
    ),
}
# n/s of the loop without mask, bf16, forward: (chips, features, head size) -> bar. Sinks and packed sequences are free.
FREE = {
    (HOPPER, 64): 7.2,
    (HOPPER, 128): 7.8,
    (AMPERE, 64): 8.2,
    (AMPERE, 128): 12.0,
    (CDNA, 64): 12.5,
    (CDNA, 128): 15.0,
}
BARS = {
    (HOPPER, "causal, ALiBi", 64): 8.2,
    (HOPPER, "causal, ALiBi", 128): 8.8,
    (HOPPER, "causal, T5", 64): 10.5,
    (HOPPER, "causal, T5", 128): 11.0,
    (HOPPER, "causal, dropout", 64): 19.5,
    (HOPPER, "causal, dropout", 128): 19.5,
    (AMPERE, "causal, dropout", 64): 23.0,
    (AMPERE, "causal, dropout", 128): 26.0,
    (CDNA, "causal, dropout", 64): 26.0,
    (CDNA, "causal, dropout", 128): 29.0,
}
for _name in ("causal", "causal, sinks", "causal, varlen"):
    BARS |= {(chips, _name, head_dim): bar for (chips, head_dim), bar in FREE.items()}
# Products over the channels of q and k, and over those of v and out.
PRODUCTS = {
    "attention_forward_kernel": (1, 1),
    "attention_backward_queries_kernel": (2, 1),
    "attention_backward_keys_kernel": (2, 2),
}
HEADS, SCORES, FORWARD = "attention/heads.py", "attention/scores.py", "attention/forward.py"
KEYS, QUERIES = "attention/backward_keys.py", "attention/backward_queries.py"
# Loops: over blocks with NaN or infinities, over masked blocks, and over blocks near enough for a bias that varies.
KINDS = {
    "careful": Markers({HEADS: ("* 0.0 == 0.0", 'float("nan")')}),
    "masked": Markers({FORWARD: ("m_pair",), KEYS: ("m_pair",), QUERIES: ("m_pair",)}),
    "near": Markers({SCORES: ("tl.abs(b_key", "tl.load(p_line + base")}),
}
# What the hot loops may read in pieces: T5's line, position ids, slopes, a row's statistics.
NARROW_LOADS = Markers(
    {
        HEADS: ("tl.load(rotary.p_positions",),
        SCORES: ("tl.load(p_line + base", "tl.load(p_slopes"),
        KEYS: ("tl.load(p_line + side", "tl.load(group.p_slopes", "tl.load(group.p_pivot", "tl.load(group.p_delta"),
        QUERIES: ("tl.load(p_pivot", "tl.load(p_delta"),
    }
)
# Lines that select or compare without being a mask: splitting fp32 into TF32, dividing, summing diagonals, heads that
# fill no power of two, and dropout, in all lines of its file.
SELECTING = Markers(
    {
        HEADS: ("tl.dot(", "tl.load(p_block"),
        SCORES: ("2.0 / (",),
        FORWARD: ("kept_weights(",),
        KEYS: ("kept_weights_on_end(",),
        QUERIES: ("kept_weights(", "tl.gather(", "m_upper"),
        "attention/dropout.py": ("",),
    }
)


def launches(chip: str, head_dim: int, dtype: torch.dtype, backward: bool, **features) -> list[Launch]:
    """The launches of attention's forward or backward pass with these features."""
    batch, seqlen, heads = 4, 4096, 16
    packed = features.get("packed", False)
    sequences = 64 if packed else batch
    if packed:
        batch, seqlen = 1, batch * seqlen

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def optional(name: str, *shape, dtype=torch.float32):
        return tensor(*shape, dtype=dtype) if features.get(name) else None

    padding = 1 if features.get("unaligned") else 0
    head_dim_v = int(head_dim * features.get("values", 1.0))
    q, k, v, out = (
        tensor(batch, seqlen, h, size + padding, dtype=dtype)[..., :size]
        for h, size in ((heads, head_dim), (heads // 2, head_dim), (heads // 2, head_dim_v), (heads, head_dim_v))
    )
    cos = optional("rotary", 2 * seqlen, max(1, int(head_dim * features.get("rotary", 0)) // 2))
    left, right = features.get("window", (-1, 0))
    options = attention.Options(
        softmax_scale=head_dim**-0.5,
        window_left=left,
        window_right=right,
        softcap=features.get("softcap", 0.0),
        key_lengths=optional("lengths", sequences, dtype=torch.int32),
        cu_seqlens_q=optional("packed", sequences + 1, dtype=torch.int32),
        cu_seqlens_k=optional("packed", sequences + 1, dtype=torch.int32),
        sinks=optional("sinks", heads),
        alibi_slopes=optional("slopes", heads),
        relative_bias=optional("table", 32, heads),
        relative_buckets=optional("table", 257, dtype=torch.int32),
        rotary_cos=cos,
        rotary_sin=cos,
        rotary_positions=optional("ids", batch, seqlen, dtype=torch.int32),
        rotary_offset=0,
        rotary_interleaved=features.get("interleaved", False),
        dropout_p=features.get("dropout", 0.0),
        dropout_seed=optional("dropout", 1, dtype=torch.int64),
    )
    with compiled_launches(chip) as started:
        if backward:
            needs = [x is not None for x in (options.alibi_slopes, options.relative_bias, options.sinks)]
            lse = tensor(batch, heads, seqlen)
            attention.attention_backward(out, lse, q, k, v, out, lse, *options, *needs)
        else:
            attention.attention_forward(q, k, v, *options)
    return started


def judge(chip: str, start: Launch, head_dim: int, dtype: torch.dtype, features: str) -> Row:
    limits, arguments = CHIPS[chip], start.arguments
    tile = arguments["TILE"][:2] if "TILE" in arguments else (arguments.get("BLOCK_M", "-"), "-")
    row = row_of(chip, start, tile, head_dim, dtype, features)
    if start.kernel not in PRODUCTS:
        return row
    if arguments["F"].PRECISION == "ieee" and chip != "gfx942":
        return row  # multiply-adds, by choice: these chips have no tensor-core product of fp32
    rows = tile[1] if start.kernel == "attention_backward_keys_kernel" else tile[0]
    row.failures += missed_products(chip, start.compiled, rows)
    tensor_core, warps = CHIPS[multiplying_chip(chip, rows)].tensor_core, arguments["num_warps"]
    scores = tile[0] * tile[1] / (warps * limits.target.warp_size)
    head_dim_v, block = arguments["F"].HEAD_DIM_V, arguments["F"].BLOCK_D
    channels = sum(
        count * triton.cdiv(size, block) * block
        for count, size in zip(PRODUCTS[start.kernel], (head_dim, head_dim_v), strict=True)
    )
    flop = 2 * tile[0] * tile[1] * channels * (1 if dtype.itemsize == 2 else 6)
    # Programs of packed sequences may end early; what jumps back from behind the last end waits for a barrier.
    end = max(i.address for i in row.code.instructions if i.opcode in ("EXIT", "s_endpgm"))
    density, share = {}, {}
    for loop in row.code.loops(tensor_core):
        kind = kind_of(loop, KINDS)
        if loop.instructions[-1].address > end or kind not in ("unmasked", "near"):
            continue
        density[kind] = (loop.total() - loop.count(tensor_core)) / scores
        share[kind] = bounds(limits, loop, flop, warps)
        unaligned = FEATURES[features].get("unaligned", False)
        narrow = [] if unaligned else narrow_loads(loop, arguments, limits.target.warp_size, dtype.itemsize)
        row.failures += [f"{kind} loop: {problem}" for problem in narrow + masks(chip, loop, scores)]
    if "unmasked" not in density:
        row.failures.append("no loop without masks")
    shown = [kind for kind in ("unmasked", "near") if kind in density]
    if shown:
        low, high = share[shown[0]]
        row.figures = (" / ".join(f"{density[kind]:.1f}" for kind in shown), f"{low:.0%} - {high:.0%}")
    if dtype == torch.bfloat16 and start.kernel == "attention_forward_kernel":
        for (chips, which, size), bar in BARS.items():
            worst = max(density.values(), default=0.0)
            if chip in chips and which == features and size == head_dim and worst > bar:
                row.failures.append(f"{worst:.2f} n/s, bar {bar}")
    return row


def bounds(limits: Chip, loop: Loop, flop: float, warps: int) -> tuple[float, float]:
    """The tensor cores' share of an iteration's cycles, if nothing overlaps and if everything does."""
    lanes = limits.target.warp_size * warps
    cycles = [
        flop / limits.tensor_flop,
        loop.total() * warps / limits.issue,
        loop.count(r"MUFU|v_(exp|rcp|log)") * lanes / limits.special,
        shared_memory_bytes(loop) * lanes / 128,
    ]
    return cycles[0] / sum(cycles), cycles[0] / max(cycles)


def shared_memory_bytes(loop: Loop) -> int:
    """Bytes a thread moves between registers and shared memory in an iteration."""
    total = 0
    for instruction in loop.instructions:
        if re.match(r"LDS|STS|ds_read|ds_write", instruction.opcode) and not instruction.opcode.startswith("LDSM"):
            width = re.search(r"\.(64|128)|_b(32|64|128)", instruction.opcode)
            total += int(next(group for group in width.groups() if group)) // 8 if width else 4
        elif instruction.opcode.startswith(("LDSM", "STSM")):
            total += 16 if instruction.opcode.endswith((".4", "x4")) or ".4" in instruction.opcode else 8
    return total


def narrow_loads(loop: Loop, arguments: dict, warp: int, item_size: int) -> list[str]:
    """A complaint about global loads of less than 16 bytes a thread, where head sizes and the tile's size allow 16."""
    aligned, features, tile = 16 // item_size, arguments["F"], arguments["TILE"]
    piece = min(features.BLOCK_HALF, features.BLOCK_D) if features.HALF else features.BLOCK_D
    piece = min(piece, features.HEAD_DIM_V)  # the rest of a block is not read
    smallest = min(tile.BLOCK_M, tile.BLOCK_N) * piece * item_size // (arguments["num_warps"] * warp)
    if any(x % aligned for x in (features.HEAD_DIM, features.HEAD_DIM_V, features.HALF)) or smallest < 16:
        return []
    narrow = [
        f"{i.opcode} of {source_of(i)[1][:40]}" for i in loop.instructions
        if re.match(r"LDG(?!DEPBAR)|(buffer|global|flat)_load", i.opcode)
        and not re.search("128|x4", i.opcode) and not NARROW_LOADS.match(i)
    ]  # fmt: skip
    return [f"{len(narrow)} narrow loads ({narrow[0]})"] if narrow else []


def masks(chip: str, loop: Loop, scores: float) -> list[str]:
    """A complaint about selections and comparisons: a mask would take one of each a score."""
    if chip == "gfx942":
        return []  # exp2 itself compares and selects there
    count = sum(bool(re.match(r"FSEL|SEL|ISETP", i.opcode)) and not SELECTING.match(i) for i in loop.instructions)
    return [f"{count} selections and comparisons"] if count > scores / 2 + 16 else []


def cases(chip: str, full: bool) -> Iterator[tuple[int, torch.dtype, bool, str]]:
    """(head size, dtype, backward, name of the features); without `full` forward where it has a bar, and some
    backward."""
    for head_dim in (16, 64, 80, 128, 256) if full else (64, 128):
        for dtype in (torch.bfloat16, torch.float32) if full else (torch.bfloat16,):
            for name in FEATURES:
                if full or any(chip in c and n == name and d == head_dim for c, n, d in BARS):
                    yield head_dim, dtype, False, name
                usual = ("causal", "causal, sinks", "causal, dropout", "causal, varlen")
                chosen = name in usual[: 4 if chip == "sm_90" else 1]
                if full or (chosen and head_dim == (128 if chip in HOPPER else 64)):
                    yield head_dim, dtype, True, name


def audit(chip: str, head_dim: int, dtype: torch.dtype, backward: bool, features: str) -> list[Row]:
    started = launches(chip, head_dim, dtype, backward, **FEATURES[features])
    return [judge(chip, start, head_dim, dtype, features) for start in started]
