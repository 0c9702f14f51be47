"""What attention's positional schemes are made of: ALiBi slopes, T5 buckets, rotary tables."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slopes, fp32 `(heads,)`: a geometric series from 2 ** (-8 / heads) down.

    For a count that is no power of two: the slopes of the next lower power, then every other one of the next higher.

    Source: Press et al., arXiv 2108.12409, and its published code.
    """
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, got {heads}")
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def relative_position_buckets(
    num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device | str | None = None
) -> Tensor:
    """T5's bucket of each distance `key - query` from -max_distance to max_distance, int32 `(2 max_distance + 1,)`.

    Half of the buckets hold one distance each, the others grow logarithmically; from max_distance on it is the last.
    Uni-directionally all later keys share bucket 0 with the query's own.

    Source: Raffel et al., arXiv 1910.10683, section 2.1.
    """
    exact = num_buckets // (4 if bidirectional else 2)
    if exact < 1:
        raise ValueError(
            f"relative_bias: expected at least {4 if bidirectional else 2} buckets, got {num_buckets}"
        )
    if max_distance <= exact:
        raise ValueError(f"relative_max_distance: expected more than {exact}, got {max_distance}")
    if torch.compiler.is_compiling():
        return _buckets(num_buckets, max_distance, bidirectional, device)
    return _cached_buckets(num_buckets, max_distance, bidirectional, device)


def _buckets(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device | str | None) -> Tensor:
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


@lru_cache(maxsize=64)
def _cached_buckets(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
        return _buckets(num_buckets, max_distance, bidirectional, device)
