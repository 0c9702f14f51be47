"""Attention over a cache: a step of decoding, appending to the cache, and attention weights.

Reading the cache bounds them. So beside what the audit of attention asks of a kernel, the loop over keys must load keys
and values 16 bytes a thread and, in the usual cases in bf16, its instructions must be issued in half of the time in
which memory delivers what they work on. In flight are the blocks of keys and values that are on their way to a
multiprocessor, or in use there.
"""

import re
from collections.abc import Iterator

import torch
from pynlp.kernels.attention import decode_launch as attention_decode
from pynlp.kernels.attention import weights as attention_weights
from pynlp.kernels.common import checks
from pynlp.kernels.common.launch import Launch

from benchmarks.audit.chips import CHIPS, compiled_launches, missed_products, multiplying_chip
from benchmarks.audit.machine_code import Instruction
from benchmarks.audit.report import Markers, Row, kind_of, row_of, source_of

FIGURES = ("KB in flight", "B/clock by issue (memory)")
DECODE = "attention_decode_kernel"
ALL = dict(window=(512, 1), slopes=True, table=True, rotary=True, sinks=True, softcap=30.0)
# Shapes: heads, key heads, head sizes of keys and values; 64 heads on one are 64 rows of a tile.
GROUPED = dict(heads=32, kv_heads=8)
LATENT = dict(heads=128, kv_heads=1, values=512, inside=True)
CASES = {
    "decode": GROUPED,
    "decode, pages of 16": GROUPED | dict(page=16),
    "latent, pages of 64": LATENT | dict(page=64),
    "append, pages of 16": GROUPED | dict(page=16, rotary=True, append=True),
    "weights, causal": dict(heads=16, kv_heads=8, weights=True, window=(-1, 0), tokens=1024),
    # With --full:
    "decode, pages of 256": GROUPED | dict(page=256),
    "decode, no splits": GROUPED | dict(splits=1),
    "decode, unaligned": GROUPED | dict(unaligned=True),
    "decode, all": GROUPED | ALL,
    "decode, all, pages of 16": GROUPED | ALL | dict(page=16),
    "decode, 32 heads on one": dict(heads=32, kv_heads=1, page=16),
    "decode, 64 heads on one": dict(heads=64, kv_heads=1, page=16),
    "4 tokens": GROUPED | dict(tokens=4, window=(-1, 0), page=16),
    "4 tokens, all": GROUPED | ALL | dict(tokens=4, page=16),
    "chunk of 512": GROUPED | dict(tokens=512, window=(-1, 0), page=16),
    "chunk of 512, all": GROUPED | ALL | dict(tokens=512, page=16),
    "latent": LATENT,
    "latent, 4 tokens": LATENT | dict(tokens=4, window=(-1, 0), page=64),
    "latent, separate": LATENT | dict(inside=False, page=64),
    "latent, 16 heads": LATENT | dict(heads=16, page=64),
    "append, interleaved": GROUPED | dict(rotary=True, interleaved=True, append=True, tokens=512),
    "assertions": GROUPED | dict(checks=True, page=16, rotary=True),
    "weights, all": dict(heads=16, kv_heads=8, weights=True, ids=True, lengths=True, tokens=1024) | ALL,
}
USUAL = list(CASES)[: list(CASES).index("decode, pages of 256")]
# Loops: over blocks with NaN or infinities, and over masked blocks.
KINDS = {
    "careful": Markers({"attention/heads.py": ("* 0.0 == 0.0", 'float("nan")')}),
    "masked": Markers({"attention/decode.py": ("m_pair",), "attention/rows.py": ("m_pair",)}),
}
# Accesses that must be wide: stores of results, and the loop's loads of keys and values.
STORES = Markers({"attention/rows.py": ("tl.store(p_tile",), "attention/weights.py": ("tl.store(p_weights",)})
LOADS = Markers({"attention/rows.py": ("tl.load(p_x + i_c",)})


def launches(chip: str, head_dim: int, dtype: torch.dtype, **features) -> list[Launch]:
    """The launches of a step of decoding, of an append or of attention weights with these features."""
    batch, capacity, tokens = 4, 8192, features.get("tokens", 1)
    heads, kv_heads = features["heads"], features["kv_heads"]

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def optional(name: str, *shape, dtype=torch.float32):
        return tensor(*shape, dtype=dtype) if features.get(name) else None

    def rows(*shape):
        padding = 1 if features.get("unaligned") else 0
        return tensor(*shape[:-1], shape[-1] + padding, dtype=dtype)[..., : shape[-1]]

    page = features.get("page", 0)
    shape = (batch * capacity // page, page) if page else (batch, capacity)
    values = features.get("values", head_dim)
    k_cache = rows(*shape, kv_heads, head_dim)
    v_cache = k_cache[..., head_dim - values :] if features.get("inside") else rows(*shape, kv_heads, values)
    lengths = tensor(batch, dtype=torch.int32)
    block_table = tensor(batch, capacity // page, dtype=torch.int32) if page else None
    cos = optional("rotary", 2 * capacity, head_dim // 2)
    window, softcap = features.get("window", (-1, -1)), features.get("softcap", 0.0)
    biases = (
        optional("sinks", heads), optional("slopes", heads), optional("table", 32, heads),
        optional("table", 257, dtype=torch.int32), cos, cos,
    )  # fmt: skip
    interleaved = features.get("interleaved", False)
    with compiled_launches(chip) as started:
        if features.get("append"):
            k, v = (rows(batch, tokens, kv_heads, size) for size in (head_dim, values))
            attention_decode.attention_append(
                k, v, k_cache, v_cache, lengths, block_table, cos, cos, 0, interleaved
            )  # fmt: skip
        elif features.get("checks"):
            checks.assert_range(lengths, 0, capacity, "in range")
            checks.assert_starts(lengths, capacity, True, 7, "starts", "longest")
            checks.assert_positions(lengths, lengths, 0, capacity, "first", "last")
            attention_decode.attention_decode(
                rows(batch, tokens, heads, head_dim), k_cache, v_cache, lengths, 0, block_table, head_dim**-0.5,
                *window, softcap, *biases, 0, interleaved, 0,
            )  # fmt: skip
        elif features.get("weights"):
            q, k = rows(batch, tokens, heads, head_dim), rows(batch, capacity, kv_heads, head_dim)
            attention_weights.attention_weights(
                q, k, None, None, head_dim**-0.5, *window, softcap, optional("lengths", batch, dtype=torch.int32),
                None, None, *biases, optional("ids", batch, capacity, dtype=torch.int32), 0, interleaved, 0.0, None,
            )  # fmt: skip
        else:
            attention_decode.attention_decode(
                rows(batch, tokens, heads, head_dim), k_cache, v_cache, lengths, tokens, block_table,
                head_dim**-0.5, *window, softcap, *biases, 0, interleaved, features.get("splits", 0),
            )  # fmt: skip
    return started


def judge(chip: str, start: Launch, head_dim: int, dtype: torch.dtype, case: str) -> Row:
    limits, arguments = CHIPS[chip], start.arguments
    warps = arguments["num_warps"]
    tile = arguments.get("TILE", (arguments.get("BLOCK_M", "-"), arguments.get("BLOCK_N", "-")))
    row = row_of(chip, start, tile, head_dim, dtype, case)
    wide = not CASES[case].get("unaligned") and head_dim % 16 == 0
    if wide:
        row.failures += narrow_accesses(row.code.instructions, STORES)
    if start.kernel not in (DECODE, "attention_weights_kernel"):
        return row

    features = arguments["F"]
    # Multiply-adds, by choice: NVIDIA's tensor cores have no product of fp32.
    multiplies = features.PRECISION == "ieee" and chip != "gfx942"
    if not multiplies:
        row.failures += missed_products(chip, start.compiled, tile[0])
    if start.kernel != DECODE or multiplies:
        return row
    loops = row.code.loops(CHIPS[multiplying_chip(chip, tile[0])].tensor_core)
    hot = {kind_of(loop, KINDS): loop for loop in loops}.get("masked" if features.EVEN else "unmasked")
    if hot is None:
        row.failures.append("no loop over keys")
        return row
    pieces = tile[1] * (head_dim & -head_dim) * dtype.itemsize  # bytes of a block's pieces, at least
    if wide and pieces // (warps * limits.target.warp_size) >= 16:
        row.failures += narrow_accesses(hot.instructions, LOADS)
    channels = features.HEAD_DIM + (features.HEAD_DIM_V if features.INSIDE < 0 else 0)
    block = tile[1] * channels * dtype.itemsize
    in_flight = block * buffers(start.compiled) * row.occupancy / warps  # bytes a multiprocessor
    issue = block / (hot.total() * warps / limits.issue)  # bytes a clock and multiprocessor
    row.figures = (f"{in_flight / 1024:.0f}", f"{issue:.0f} ({limits.memory:.0f})")
    if case in USUAL and dtype == torch.bfloat16 and tile[0] == 16 and issue < 2 * limits.memory:
        row.failures.append("instructions take half of memory's time")
    return row


def buffers(compiled) -> int:
    """How many blocks of keys shared memory holds at once; 1 where they wait in registers."""
    found = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", compiled.asm["ttgir"])
    return max(map(int, found), default=1)


def narrow_accesses(instructions: list[Instruction], lines: Markers) -> list[str]:
    """A complaint about accesses of global memory, by these lines, of less than 16 bytes a thread."""
    narrow = [
        i for i in instructions
        if re.match(r"LDG(?!DEPBAR)|STG|(buffer|global|flat)_(load|store)", i.opcode)
        and not re.search("128|x4", i.opcode) and lines.match(i)
    ]  # fmt: skip
    return [f"{len(narrow)} narrow: {narrow[0].opcode} of {source_of(narrow[0])[1][:40]}"] if narrow else []


def cases(chip: str, full: bool) -> Iterator[tuple[int, torch.dtype, str]]:
    """(head size of keys, dtype, name of the case)."""
    for name in CASES if full else USUAL:
        if CASES[name].get("values"):
            if full or chip == "sm_90":
                yield 576, torch.bfloat16, name
        else:
            heads = (64, 80, 128, 256) if full else (128,) if "decode" not in name else (64, 128)
            for head_dim in heads:
                yield head_dim, torch.bfloat16, name
            if full or (chip == "sm_80" and name == "decode"):
                yield 128, torch.float32, name


def audit(chip: str, head_dim: int, dtype: torch.dtype, case: str) -> list[Row]:
    started = launches(chip, head_dim, dtype, **CASES[case])
    return [judge(chip, start, head_dim, dtype, case) for start in started]
