"""More than one process, as torchrun starts them; a script without torchrun is one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join this process with the others that torchrun started, for the time of a `with` block.

    Without torchrun it stays alone. NCCL on GPUs, gloo on CPUs.

    Yields:
        The device of this process.

    Example:
        >>> from pynlp.training import process_group
        >>> with process_group() as device:  # torchrun --nproc-per-node 2 train.py: two processes, without it one
        ...     print(device.type in ("cpu", "cuda"))
        True
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        yield device
        return
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    if not dist.is_initialized():
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather(value: Any) -> list[Any]:
    """The values of all processes in the order of their numbers, in each of them."""
    rank, world = rank_and_world()
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values
