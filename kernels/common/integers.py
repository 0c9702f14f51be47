"""Arithmetic of launchers on plain integers: Triton's own, made for kernels as well, takes 5 us a call."""

from collections.abc import Iterable


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def tile_width(size: int) -> int:
    """The width of the narrowest tile that holds `size` values: a power of 2, at least the 16 of a tensor core."""
    return max(16, next_power_of_2(size))


def are_multiples(unit: int, numbers: Iterable[int]) -> bool:
    """Whether all numbers are multiples of `unit`."""
    return not any(number % unit for number in numbers)
