"""What the tests of the ops between attention and matrix products share: how near to exact they must come."""

from collections.abc import Callable

import torch
from cases.attention import errors
from torch import Tensor


def outputs_and_gradients(function: Callable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `function(**tensors)` returns, and the gradients of all tensors for a fixed weighting of it."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    results = function(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    # The same in every dtype.
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), weights)
    named = {f"output {i}": x.detach() for i, x in enumerate(results)}
    return named | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}


def assert_as_accurate(function: Callable, eager: Callable, tensors: dict[str, Tensor]) -> None:
    """Our errors against `eager` in fp64 are at most twice (gradients: three times) those of `eager` in our dtype.

    That is for the root mean square; the largest single error, whose ratio is a matter of luck, has twice the room. On
    top comes half a unit in the last place, what rounding the exact result may cost, and one of fp32, in which ours
    computes.
    """
    ours = outputs_and_gradients(function, tensors)
    peer = outputs_and_gradients(eager, tensors)
    expected = outputs_and_gradients(eager, {name: x.double() for name, x in tensors.items()})
    for name, value in ours.items():
        assert value.shape == expected[name].shape and value.dtype == peer[name].dtype, name
        factor = 3 if name.startswith("gradient") else 2
        sizes = errors(expected[name], torch.zeros_like(expected[name]))
        rounding = torch.finfo(value.dtype).eps / 2 + torch.finfo(torch.float32).eps
        for measure, error, missed, size, room in zip(
            ("largest", "rms"), errors(value, expected[name]), errors(peer[name], expected[name]), sizes,
            (2 * factor, factor), strict=True,
        ):  # fmt: skip
            assert error <= room * missed + rounding * size, (
                f"{name}: {measure} error {error:.3g}, expected at most {room} x {missed:.3g} + {rounding * size:.3g}"
            )
