"""The states of the random generators that training draws from: torch's, the GPU's and Python's."""

import base64
import random
from typing import Any

import torch
from torch import Tensor


def seed_generators(*numbers: int) -> None:
    """Seed all generators by several numbers; unlike a sum of them, other numbers give other seeds."""
    draw = random.Random(" ".join(map(str, numbers)))
    torch.manual_seed(draw.getrandbits(63))
    random.seed(draw.getrandbits(63))


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of all generators, as JSON can hold them."""
    states = {"python": random.getstate(), "cpu": _text(torch.get_rng_state())}
    if device.type == "cuda":
        states["cuda"] = _text(torch.cuda.get_rng_state(device))
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_bytes(states["cpu"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_bytes(states["cuda"]), device)


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
