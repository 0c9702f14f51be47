"""Norms, activations and the loss.

Memory bounds them. So beside spills a kernel fails on accesses of less than 16 bytes a thread, where rows allow these,
and if the instructions of its loop over rows, or all where there is none, cannot be issued at the bar's share of the
rate at which memory delivers what they work on.
"""

import math
import re
from collections.abc import Iterator

import torch
from pynlp.kernels.common.launch import Launch
from pynlp.kernels.layers import activation, loss, norm

from benchmarks.audit.chips import CHIPS, compiled_launches
from benchmarks.audit.machine_code import Instruction, MachineCode, work
from benchmarks.audit.report import Markers, Row, row_of, source_of

FIGURES = ("instructions", "B/clock by issue (memory)")
# Layer norms are centred; "wide" residuals are fp32.
CASES = {
    "layer norm": dict(norm="layer"),
    "layer norm, residual, dropout": dict(norm="layer", residual=True, dropout=0.1),
    "rms norm": dict(norm="rms"),
    "rms norm, residual": dict(norm="rms", residual=True),
    "rms norm, fp32 residual, dropout": dict(norm="rms", residual=True, wide=True, dropout=0.1),
    "layer norm, unaligned": dict(norm="layer", residual=True, dropout=0.1, unaligned=True),
    "gelu": dict(kind="gelu"),
    "gelu, dropout": dict(kind="gelu", dropout=0.1),
    "relu, dropout": dict(kind="relu", dropout=0.1),
    "swiglu": dict(kind="swiglu", up=True),
    "swiglu, packed, dropout": dict(kind="swiglu", dropout=0.1),
    "swiglu, unaligned": dict(kind="swiglu", dropout=0.1, unaligned=True),
    "loss": dict(loss=dict(label_smoothing=0.0, softcap=0.0, z_loss=0.0)),
    "loss, smoothing, softcap, z": dict(loss=dict(label_smoothing=0.1, softcap=30.0, z_loss=1e-4)),
}
# Lines that may read and write in pieces: one number a row, little a program, or what a cache holds ("evict_last").
NARROW = Markers(
    {
        "common/random.py": ("tl.load(p_seed",),
        "layers/norm.py": (
            "tl.load(p_mean",
            "tl.store(p_mean",
            "tl.load(p_rstd",
            "tl.store(p_rstd",
            "_sums + o_sum",
            "tl.store(p_grad_weight",
            "tl.store(p_grad_bias",
            "evict_last",
        ),
        "layers/loss.py": ("tl.load(p_target", "tl.load(p_scale", "tl.store(p_losses"),
    }
)
LOAD = r"LDG(?!DEPBAR)|(buffer|global|flat)_load"
ACCESS = rf"{LOAD}|STG|(buffer|global|flat)_store"
# The share of memory's rate at which instructions must be issued. Memory of sm_100 is twice as fast as that of the
# others: there dropout, 12 instructions a value, takes longer than a read and a write of 16 bits, and so does the error
# function with its 30 on any chip.
BARS = {"norm": 0.9, "relu": 0.8, "swiglu": 0.7, "gelu": 0.33, "loss": 0.3}


def launches(chip: str, columns: int, dtype: torch.dtype, features: dict) -> list[Launch]:
    """The launches of an op with these features, forward and backward."""

    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(size=columns, dtype=dtype):
        padding = 1 if features.get("unaligned") else 0
        return tensor(4096, size + padding, dtype=dtype)[:, :size]

    dropout = features.get("dropout", 0.0)
    seed = tensor(1, dtype=torch.int64) if dropout else None
    with compiled_launches(chip) as started:
        if "kind" in features:
            up = rows() if features.get("up") else None
            x = rows(2 * columns if features["kind"] == "swiglu" and up is None else columns)
            options = (activation.KINDS.index(features["kind"]), dropout, seed)
            activation.activation_forward(x, up, *options)
            activation.activation_backward(rows(), x, up, *options)
        elif "loss" in features:  # columns are the vocabulary
            x, weight, bias = tensor(512, 64, dtype=dtype), tensor(columns, 64, dtype=dtype), tensor(columns)
            target, scale = tensor(512, dtype=torch.int64), tensor(512)
            options = dict(ignore_index=-100, **features["loss"])
            loss.linear_cross_entropy(x, weight, bias, target, scale, True, True, True, **options)
        elif "norm" in features:
            centred, weight = features["norm"] == "layer", tensor(columns)
            bias = weight if centred else None
            residual = (
                rows(dtype=torch.float32 if features.get("wide") else dtype) if features.get("residual") else None
            )
            _, new, mean, rstd = norm.norm_forward(rows(), residual, weight, bias, centred, 1e-5, dropout, seed)
            new = new if new.numel() else rows()
            grad_new = None if residual is None else new
            norm.norm_backward(rows(), grad_new, new, weight, mean, rstd, centred, dropout, seed, centred)
        else:
            raise ValueError(f"expected a case of a norm, of a kind of activation or of a loss, got {features}")
    return started


def judge(chip: str, start: Launch, columns: int, dtype: torch.dtype, case: str) -> Row:
    limits, features = CHIPS[chip], start.arguments["F"]
    if "loss" in CASES[case]:
        tile, align, bar = (1, features.BLOCK), math.gcd(16, features.V), BARS["loss"]
    else:
        tile, align = (features.ROWS, features.BLOCK_D), features.ALIGN
        bar = BARS["norm" if start.kernel.startswith("norm") else features.KIND]
    if start.kernel == "norm_sums_kernel":  # what it reads is little beside what norm_backward_kernel does
        bar = 0.0
    row = row_of(chip, start, tile, columns, dtype, case)
    hot = hot_path(row.code)
    issue = moved_bytes(hot) * limits.target.warp_size / (work(hot) / limits.issue)  # bytes a clock and multiprocessor
    row.figures = (str(work(hot)), f"{issue:.0f} ({limits.memory:.0f})")
    if align * dtype.itemsize >= 16:
        row.failures += narrow_accesses(row.code.instructions)
        if issue < bar * limits.memory:
            row.failures.append(f"{issue / limits.memory:.2f} of memory's rate, bar {bar}")
    return row


def hot_path(code: MachineCode) -> list[Instruction]:
    """The longest loop that reads memory, or all of a kernel without one."""
    loops = code.loops(LOAD)
    return max((loop.instructions for loop in loops), key=len, default=code.instructions)


def access_bytes(instruction: Instruction) -> int:
    """Bytes of global memory that an instruction reads or writes a thread."""
    if not re.match(ACCESS, instruction.opcode):
        return 0
    if width := re.search(r"\.(64|128)\b|dwordx(\d)", instruction.opcode):
        return int(width[1]) // 8 if width[1] else 4 * int(width[2])
    return 2 if re.search(r"U16|short", instruction.opcode) else 4


def narrow_accesses(instructions: list[Instruction]) -> list[str]:
    """A complaint about accesses of less than 16 bytes a thread."""
    narrow = [i for i in instructions if 0 < access_bytes(i) < 16 and not NARROW.match(i)]
    # Of 16 values a thread several would be narrow; a single one is the seed, where the compiler has lost its line.
    if len(narrow) < 2:
        return []
    return [f"{len(narrow)} narrow: {narrow[0].opcode} of {source_of(narrow[0])[1][:40]}"]


def moved_bytes(instructions: list[Instruction]) -> int:
    """Bytes a thread that come from memory or go there, and not to and from a cache."""
    return sum(access_bytes(i) for i in instructions if not NARROW.match(i))


def cases(_: str, full: bool) -> Iterator[tuple[int, torch.dtype, str]]:
    """(columns, dtype, name of the case), alike on every chip."""
    for columns in (20, 64, 256, 768, 1000, 4096, 8192, 12000, 16384, 32768) if full else (768, 4096):
        for dtype in (torch.bfloat16, torch.float32) if full else (torch.bfloat16,):
            for case in CASES:
                yield columns, dtype, case


def audit(chip: str, columns: int, dtype: torch.dtype, case: str) -> list[Row]:
    return [judge(chip, start, columns, dtype, case) for start in launches(chip, columns, dtype, CASES[case])]
