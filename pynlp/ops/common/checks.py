"""Checks and conversions of arguments that all families share; every error names the argument."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

# Private names of torch, the only ones here: the values behind what torch.func's transforms wrap.
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from pynlp.ops.common import asserts
from pynlp.ops.common.plans import cannot_be_kept, derive
from pynlp.reference.common.dtypes import compute_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on, fp64 aside."""
    if not isinstance(tensors[0], Tensor):  # the checks that follow say so
        return tensors
    kind = tensors[0].device.type
    if not is_autocast_on(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in tensors)


def promoted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y in autocast in one dtype, as in PyTorch's sums and products; else as they are."""
    if x.dtype == y.dtype or not is_autocast_on(x.device.type):
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def is_autocast_on(kind: str) -> bool:
    """Whether autocast is on for a kind of device; meta, like others, has none."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def check_is_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def check_dtype(name: str, x: Tensor) -> None:
    check_is_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected dtype float32, bfloat16, float16 or float64, got {x.dtype}")


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name}: expected a number, got {value if value is None else type(value).__name__}")


def as_int(name: str, value: int) -> int:
    """An integer of whatever kind, numpy's among them."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None


def check_not_negative(name: str, value: float) -> None:
    check_number(name, value)
    if not value >= 0:
        raise ValueError(f"{name}: expected 0 (none) or a positive number, got {value}")


def check_share(name: str, share: float) -> None:
    check_number(name, share)
    if not 0 <= share < 1:
        raise ValueError(f"{name}: expected at least 0 and less than 1, got {share}")


def rows_in_place(x: Tensor) -> Tensor:
    """x, copied unless its last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else derive(Tensor.contiguous, x)


def rows_at_one_stride(x: Tensor) -> Tensor:
    """x (.., columns), copied unless its rows are contiguous and all at one distance from each other."""
    if x.is_contiguous():
        return x
    strides, sizes = x.stride(), x.shape
    if strides[-1] == 1 or sizes[-1] == 1:
        outer = [(size, stride) for size, stride in zip(sizes[:-1], strides[:-1], strict=True) if size != 1]
        if all(above == size * stride for (_, above), (size, stride) in zip(outer, outer[1:], strict=False)):
            return x
    return derive(Tensor.contiguous, x)


def as_matrix(x: Tensor) -> Tensor:
    """x (.., columns) as (rows, columns), without rows or columns, too."""
    return x if x.dim() == 2 else x.unsqueeze(0).flatten(0, -2)


def prepare_dropout(
    dropout_p: float, seed: int | Tensor | None, x: Tensor, of: str = "q"
) -> tuple[float, Tensor | None]:
    """The probability, and the seed as int64 `(1,)`, drawn from torch's generator if none is given."""
    check_share("dropout_p", dropout_p)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(
                f"seed: expected an int or one int64 value, got shape {tuple(seed.shape)}, dtype {seed.dtype}"
            )
        if seed.device != x.device:
            raise ValueError(f"seed: expected {of}'s device {x.device}, got {seed.device}")
    elif seed is not None and not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or one int64 value, got {type(seed).__name__}")
    if dropout_p == 0:
        return 0.0, None
    return dropout_p, derive(_drawn, x.device) if seed is None else derive(_as_seed, seed, x.device)


def _drawn(device: torch.device) -> Tensor:
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def _as_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    return seed.view(1) if isinstance(seed, Tensor) else torch.tensor([seed], dtype=torch.int64, device=device)


def check_tensor(name: str, x: Tensor, like: Tensor, shapes: list[tuple[int, ...]], of: str = "q") -> None:
    """Check for a floating-point tensor of one of these shapes on the device of `like`, the argument called `of`."""
    check_is_tensor(name, x)
    if not any(has_shape(x, shape) for shape in shapes):
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected {of}'s device {like.device}, got {x.device}")


def has_shape(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether x has this shape; size by size, for torch.compile finds no symbolic size in a tuple of shapes."""
    return x.dim() == len(shape) and all(a == b for a, b in zip(x.shape, shape, strict=True))


def as_fp32(x: Tensor, like: Tensor) -> Tensor:
    """x contiguous in fp32, in which ops take biases, tables and weights of norms; in fp64 where `like` is."""
    dtype = compute_dtype(like)
    return x if x.dtype == dtype and x.is_contiguous() else derive(_contiguous, x, dtype)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def check_range(name: str, x: Tensor, low: int, high: int) -> None:
    if x.numel() == 0:
        return
    if asserts.are_on_device(x):
        asserts.assert_range(x, low, high, f"{name}: expected values in range")
        return
    smallest, largest = extremes(x)
    check(
        (smallest >= low) & (largest <= high),
        f"{name}: expected values in range",
        lambda: f"got {smallest} to {largest}",
        lambda: f"{name}: expected values of {low} to {high}",
    )


def extremes(x: Tensor) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """The smallest and the largest value: numbers where a CPU has them at once, else tensors of one value."""
    cannot_be_kept()  # each call's values are to be seen
    x = untransformed(x)
    smallest, largest = torch.aminmax(x)
    return (smallest.item(), largest.item()) if at_once(x) else (smallest, largest)


def check(
    condition: bool | Tensor, expected: str, got: Callable[[], str], exactly: Callable[[], str] | None = None
) -> None:
    """Raise ValueError at once on a CPU; where reading the condition would wait, assert it on the device.

    Args:
        condition: What must hold, of one value; of many samples inside of vmap.
        expected: How the message begins, without sizes: with them torch.compile would compile once a size.
        got: How the message ends.
        exactly: How the message begins where nothing is compiled, with sizes; by default as `expected`.
    """
    on_host = not isinstance(condition, Tensor)
    if not on_host:
        cannot_be_kept()  # each call's values are to be seen
        condition = untransformed(condition)
        if condition.dim():
            condition = condition.all()
    if on_host or at_once(condition):
        if not condition:
            raise ValueError(f"{expected if exactly is None else exactly()}, {got()}")
    elif exactly is None or torch.compiler.is_compiling():
        torch._assert_async(condition, expected)
    else:
        torch._assert_async(condition, exactly())


def at_once(x: Tensor) -> bool:
    """Whether values of x can be read without waiting for a device, and are there: fake tensors have none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(x)


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor with values of its own: no fake, quantized, sharded or other kind."""
    return type(x) in (Tensor, nn.Parameter)


def untransformed(x: Tensor) -> Tensor:
    """The values of x inside of torch.func's transforms; of all samples under vmap."""
    while not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x
