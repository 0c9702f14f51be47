"""Tables for attention's positional schemes: ALiBi slopes, T5 buckets, rotary tables."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pynlp.ops.common.checks import is_plain
from pynlp.ops.common.plans import derive


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slopes, fp32 `(heads,)`: a geometric series from 2 ** (-8 / heads) down.

    For a count that is no power of two: the slopes of the next lower power, then every other one of the next higher.

    Source: Press et al., arXiv 2108.12409, and its published code.

    Example:
        >>> from pynlp.functional import alibi_slopes
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, got {heads}")
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


ROTARY_SCALINGS = (None, "linear", "ntk", "yarn", "llama3")


def rotary_tables(
    positions: int,
    rotary_dim: int,
    *,
    base: float = 10000.0,
    scaling: str | None = None,
    factor: float | None = None,
    original_positions: int | None = None,
    attention_factor: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles `position * base ** (-2 i / rotary_dim)`, each `(positions, rotary_dim / 2)`.

    Angles are computed in fp64 and their cosines and sines rounded once to fp32.

    Args:
        positions: Number of positions, from 0 on.
        rotary_dim: Channels of a head that are turned, even; `head_dim` or less.
        base: The longest wavelength is about `2 pi base` positions.
        scaling: How a model trained on `original_positions` reaches `factor` times as many.
            None: not at all.
            "linear": every position divided by `factor` (position interpolation; Chen et al., arXiv 2306.15595).
            "ntk": NTK-aware, static: `base * factor ** (d / (d - 2))` at every length (Peng et al., arXiv 2309.00071,
            definition 1), so the fastest channel keeps its frequency and the slowest is divided by `factor`.
            "yarn": channels that turn more than `beta_fast` times in `original_positions` are kept, those below
            `beta_slow` turns interpolated, a linear ramp between; cosines and sines are multiplied by
            `attention_factor` (Peng et al., arXiv 2309.00071, section 3.4).
            "llama3": wavelengths below `original_positions / high_freq_factor` are kept, those above
            `original_positions / low_freq_factor` interpolated, blended between (Llama 3.1's published code).
        factor: How many times longer the context gets, at least 1; needed by every scaling.
        original_positions: Context length of the first training; needed by "yarn" and "llama3".
        attention_factor: YaRN's factor of cosines and sines; by default `0.1 ln(factor) + 1`.
        beta_fast, beta_slow: YaRN's ends of the ramp in turns.
        low_freq_factor, high_freq_factor: Llama 3's ends of the blend in turns.

    Raises:
        ValueError: an argument is out of range, or a scaling lacks one that it needs; the message names it.

    Source: Su et al., arXiv 2104.09864.

    Example:
        >>> from pynlp.functional import rotary_tables
        >>> cos, sin = rotary_tables(8192, 128, base=500000.0, scaling="llama3", factor=8.0, original_positions=8192)
        >>> cos.shape
        torch.Size([8192, 64])
    """
    if positions < 0:
        raise ValueError(f"positions: expected 0 or more, got {positions}")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even number of at least 2, got {rotary_dim}")
    if base <= 1:
        raise ValueError(f"base: expected more than 1, got {base}")
    if scaling not in ROTARY_SCALINGS:
        raise ValueError(f"scaling: expected one of {', '.join(map(repr, ROTARY_SCALINGS))}, got {scaling!r}")
    if scaling is None and factor is not None:
        raise ValueError(f"factor: expected a scaling with it, got scaling=None and factor={factor}")
    if scaling is not None and (factor is None or factor < 1):
        raise ValueError(f"factor: expected at least 1 for scaling={scaling!r}, got {factor}")
    if scaling in ("yarn", "llama3") and (original_positions is None or original_positions < 1):
        raise ValueError(f"original_positions: expected at least 1 for scaling={scaling!r}, got {original_positions}")
    if scaling != "yarn" and attention_factor is not None:
        raise ValueError(f"attention_factor: expected scaling='yarn' with it, got scaling={scaling!r}")
    if scaling == "ntk":
        if rotary_dim == 2:
            raise ValueError("rotary_dim: expected at least 4 for scaling='ntk', got 2")
        base = base * factor ** (rotary_dim / (rotary_dim - 2))

    magnitude = 1.0
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    frequencies = base**-exponents  # (rotary_dim / 2,), radians a position
    if scaling == "linear":
        frequencies = frequencies / factor
    elif scaling == "yarn":
        if not beta_fast > beta_slow > 0:
            raise ValueError(f"beta_fast: expected beta_fast > beta_slow > 0, got {beta_fast} and {beta_slow}")
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1.0
        magnitude = attention_factor
        kept = _yarn_kept(rotary_dim, base, original_positions, beta_fast, beta_slow, device)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    elif scaling == "llama3":
        if not high_freq_factor > low_freq_factor > 0:
            raise ValueError(
                "high_freq_factor: expected high_freq_factor > low_freq_factor > 0, "
                f"got {high_freq_factor} and {low_freq_factor}"
            )
        turns = original_positions * frequencies / (2 * math.pi)
        kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)

    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * frequencies
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


def _yarn_kept(
    rotary_dim: int,
    base: float,
    original_positions: int,
    beta_fast: float,
    beta_slow: float,
    device: torch.device | str | None,
) -> Tensor:
    """The share of each channel's own frequency that YaRN keeps, from 1 (fast channels) to 0 (slow ones)."""

    def channel_of(turns: float) -> float:
        """The (fractional) channel that turns this many times in the original context."""
        return rotary_dim * math.log(original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(channel_of(beta_fast)), 0)
    last = min(math.ceil(channel_of(beta_slow)), rotary_dim - 1)
    # The published code's guard against a ramp without length.
    length = last - first if last != first else 0.001
    channel = torch.arange(rotary_dim // 2, dtype=torch.float64, device=device)
    return 1 - ((channel - first) / length).clamp(0, 1)


def relative_position_buckets(
    num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device | str | None = None
) -> Tensor:
    """T5's bucket of each distance `key - query` from -max_distance to max_distance, int32 `(2 max_distance + 1,)`.

    Half of the buckets hold one distance each, the others grow logarithmically; the last has all from max_distance on.
    In one direction only, all later keys share bucket 0 with the query's own.

    Source: Raffel et al., arXiv 1910.10683, section 2.1.

    Example:
        >>> from pynlp.functional import relative_position_buckets
        >>> relative_position_buckets(8, max_distance=6, bidirectional=True).tolist()
        [3, 3, 3, 2, 2, 1, 0, 5, 6, 6, 7, 7, 7]
    """
    _check_buckets("num_buckets", "max_distance", num_buckets, max_distance, bidirectional)
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    if bidirectional:
        num_buckets //= 2
        side = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        side = torch.zeros_like(distance)
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return (side + torch.where(distance < exact, distance, logarithmic)).to(torch.int32).to(device)


def _check_buckets(buckets_name: str, distance_name: str, num_buckets: int, max_distance: int, bidirectional: bool):
    exact = num_buckets // (4 if bidirectional else 2)
    if exact < 1:
        raise ValueError(f"{buckets_name}: expected at least {4 if bidirectional else 2} buckets, got {num_buckets}")
    if max_distance <= exact:
        raise ValueError(f"{distance_name}: expected more than {exact}, got {max_distance}")


def buckets_like(q: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The result of `relative_position_buckets` on q's device, as `kept` gives it."""
    _check_buckets("relative_bias", "relative_max_distance", num_buckets, max_distance, bidirectional)
    return derive(kept, relative_position_buckets, q, num_buckets, max_distance, bidirectional)


MOST_KEPT = 64
_kept: dict[tuple, Tensor] = {}


def kept(table: Callable[..., Tensor], q: Tensor, *arguments: object) -> Tensor:
    """`table(*arguments, device=q.device)`, kept for later calls and not to be written to.

    What is made while torch.compile traces, or beside fake tensors, has no values and is not kept.
    """
    key = (table, *arguments, q.device)
    if torch.compiler.is_compiling() or not is_plain(q):
        return table(*arguments, device=q.device)
    if key not in _kept:
        with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
            made = table(*arguments, device=q.device)
        if not is_plain(made):
            return made
        if len(_kept) == MOST_KEPT:
            _kept.clear()
        _kept[key] = made
    return _kept[key]
