"""What launchers count with, on plain integers: Triton's own, made for kernels as well, take 5 us a call."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def tile_width(size: int) -> int:
    """Of the narrowest tile that holds so many values: a power of 2, at least the 16 of a tensor core."""
    return max(16, next_power_of_2(size))
