"""Tapes of launchers: what one allocates, computes with torch and starts, to be done again for other tensors.

The launcher runs as always while the tape is made. A tape is given up at whatever is not known to repeat; without one
the launcher runs again. ROCm, and versions of Triton that are not known to starts.py, get none.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from . import starts

try:  # private: a tensor in a third of the time that torch.empty takes
    from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda
except ImportError:
    ALLOCATORS = {}
else:
    ALLOCATORS = {"cpu": _empty_strided_cpu, "cuda": _empty_strided_cuda}
ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)


class _Thread(threading.local):
    tape: "Tape | None" = None


_thread = _Thread()


def tape() -> "Tape | None":
    """The tape that is being made in this thread."""
    return _thread.tape


def give_up() -> None:
    """Say that what a launcher does depends on more than the metadata of its arguments: it is not repeated."""
    if _thread.tape is not None:
        _thread.tape.is_good = False


class Step(NamedTuple):
    """A part of what a launcher does.

    Attributes:
        make: Given the place of each slot in a list, a function of that list and a stream, which appends its results to
            the list. It gives False, and does nothing, where it cannot.
        reads: Slots of the tensors that it takes.
        writes: Slots of its results.
        has_effects: It changes tensors, so that it is needed whoever reads its results.
        is_torchs: It calls a function of torch, which must see no gradients.
    """

    make: Callable
    reads: list[int]
    writes: list[int]
    has_effects: bool
    is_torchs: bool = False


class Recorder:
    """Runs a launcher, once; `program` is then what it did, or None."""

    program: "Program | None" = None

    def run(self, launcher: Callable, *arguments: object) -> object:
        tape = _thread.tape = Tape(arguments)
        try:
            with tape:
                result = launcher(*arguments)
        finally:
            _thread.tape = None
        self.program = tape.program(result)
        return result


class Tape(TorchDispatchMode):
    """What a launcher does with these arguments. Each tensor has a slot, a number of its own."""

    def __init__(self, arguments: Sequence):
        super().__init__()
        self.is_good = starts.is_unwatched(knobs.runtime)  # else kernels are compiled otherwise
        self.kept: list[Tensor] = []  # so that no other tensor gets the id of one of them
        self.slots: dict[int, int] = {}
        self.count = 0  # of slots
        self.steps: list[Step] = []
        given = [x for x in arguments if isinstance(x, Tensor)]
        for x in given:
            self._add(x)
        self.inputs = [self.slots[id(x)] for x in given]
        self.device = given[0].device

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, list | tuple) or not all(isinstance(x, Tensor) for x in results):
            self.is_good = False  # numbers read from tensors
        elif function.overloadpacket in ALLOCATIONS:
            self._allocated(result)
        elif function is torch.ops.aten.detach.default:  # the mode's own: a launcher needs none
            self._add(result, self._slot_or_give_up(arguments[0]))
        else:
            self._computed(function, arguments, options, results)
        return result

    def _computed(self, function: Callable, arguments: Sequence, options: dict, results: Sequence[Tensor]) -> None:
        """Add the call of a function of torch."""
        reads: list[int] = []
        described = self._described((arguments, options), reads)
        known = [id(x) in self.slots for x in results]
        is_in_place = any(known)
        if is_in_place and not all(known):
            self.is_good = False
        for x in results:
            self._add(x)

        def make(numbers):
            def step(slots, stream):
                filled, filled_options = _filled(described, slots, numbers)
                made = function(*filled, **filled_options)
                if not is_in_place:
                    slots += (made,) if isinstance(made, Tensor) else made
                return True

            return step

        writes = [] if is_in_place else [self.slots[id(x)] for x in results]
        self.steps.append(Step(make, reads, writes, function._schema.is_mutable, is_torchs=True))

    def launched(self, kernel, compiled: CompiledKernel | None, grid: tuple, arguments: tuple, options: dict) -> None:
        """Add the start of a kernel."""
        try:
            given = starts.arguments_of(kernel, compiled, arguments, options)
            start, describe = starts.starter(compiled, grid, given), starts.describer()
        except (starts.Unknown, AttributeError, IndexError, KeyError, TypeError, ValueError):
            self.is_good = False  # what is private to Triton is another thing than it was
            return
        values = given.values
        pointers = [(place, self._slot_or_give_up(x), may_be_null) for place, x, may_be_null in given.pointers]
        descriptors = [(place, self._slot_or_give_up(x), known) for place, x, known in given.descriptors]

        def make(numbers):
            own_pointers = [(place, numbers[slot], may_be_null) for place, slot, may_be_null in pointers]
            own_descriptors = [(place, numbers[slot], known) for place, slot, known in descriptors]

            def step(slots, stream):
                filled = values.copy()
                for place, slot, may_be_null in own_pointers:
                    filled[place] = address = slots[slot].data_ptr()
                    if not address and not may_be_null:  # memory that was freed, or that never was
                        return False
                for place, slot, known in own_descriptors:
                    filled[place] = describe(slots[slot].data_ptr(), *known)
                start(stream, filled)
                return True

            return step

        self.steps.append(Step(make, [slot for _, slot, _ in pointers + descriptors], [], True))

    def program(self, result: Tensor | Sequence[Tensor] | None) -> "Program | None":
        """What the launcher did, if it can be repeated."""
        results = [result] if isinstance(result, Tensor) else result or ()
        if not self.is_good or any(id(x) not in self.slots for x in results):
            return None
        return Program(self, [self.slots[id(x)] for x in results])

    def _slot_or_give_up(self, x: Tensor) -> int:
        """The slot of a tensor; the tape is given up where it has none."""
        if id(x) not in self.slots:
            self.is_good = False
        return self.slots.get(id(x), 0)

    def _add(self, x: Tensor, slot: int | None = None) -> None:
        """Give a tensor a slot: this one, or one of its own."""
        if id(x) not in self.slots:
            self.slots[id(x)] = self.count if slot is None else slot
            self.count += slot is None
            self.kept.append(x)

    def _allocated(self, x: Tensor) -> None:
        self._add(x)
        allocate = ALLOCATORS.get(x.device.type)
        if allocate is None:
            self.is_good = False
            return
        known = tuple(x.shape), x.stride(), x.dtype

        def make(numbers):
            def step(slots, stream):
                slots.append(allocate(*known))
                return True

            return step

        self.steps.append(Step(make, [], [self.slots[id(x)]], False))

    def _described(self, x: object, slots: list[int]) -> object:
        """Arguments with a _Slot in place of each tensor; its number is added to `slots`."""
        if isinstance(x, Tensor):
            slots.append(self._slot_or_give_up(x))
            return _Slot(slots[-1])
        if isinstance(x, list | tuple):
            return type(x)([self._described(y, slots) for y in x])
        if isinstance(x, dict):
            return {name: self._described(y, slots) for name, y in x.items()}
        return x


class _Slot:
    def __init__(self, number: int):
        self.number = number


def _filled(x: object, tensors: Sequence[Tensor], numbers: dict[int, int]) -> object:
    """Described arguments with the tensors in them."""
    if isinstance(x, _Slot):
        return tensors[numbers[x.number]]
    if isinstance(x, list | tuple):
        return type(x)([_filled(y, tensors, numbers) for y in x])
    if isinstance(x, dict):
        return {name: _filled(y, tensors, numbers) for name, y in x.items()}
    return x


class Program:
    """What a launcher did, to be done again for tensors of the same metadata: see pynlp.ops.common.plans."""

    def __init__(self, tape: Tape, results: list[int]):
        self.inputs, self.steps, self.results = tape.inputs, tape.steps, results
        self.count, self.device, self.active = len(results), tape.device, driver.active
        first = {slot: i for i, slot in reversed(list(enumerate(self.inputs)))}
        # Of arguments that are one tensor the launcher may mean either.
        self.same = [(first[slot], i) for i, slot in enumerate(self.inputs) if first[slot] != i]

    def runner(self, places: Sequence[int], wanted: Sequence[int] | None = None) -> Callable:
        """See the protocol."""
        given = [slot if wanted is None or i in wanted else None for i, slot in enumerate(self.results)]
        numbers = {slot: i for i, slot in enumerate(self.inputs)}
        count = len(self.inputs)
        live, steps = self._live({slot for slot in given if slot is not None}), []
        for step in live:
            steps.append(step.make(numbers))
            for slot in step.writes:
                numbers[slot] = count
                count += 1
        outputs = [None if slot is None else numbers[slot] for slot in given]
        active, device, runtime, same = self.active, self.device.index, knobs.runtime, self.same
        mode = torch.no_grad if any(step.is_torchs for step in live) else contextlib.nullcontext

        def run(arguments):
            if (
                driver.active is not active
                or not starts.is_unwatched(runtime)
                or (device is not None and active.get_current_device() != device)
            ):
                return None
            stream = active.get_current_stream(device or 0)
            slots = [arguments[i] for i in places]
            for one, other in same:
                if slots[one] is not slots[other]:
                    return None
            with mode():
                for step in steps:
                    if not step(slots, stream):
                        return None
            made = [None if i is None else slots[i] for i in outputs]
            made.append(None)
            return made

        return run

    def _live(self, needed: set[int]) -> list[Step]:
        """The steps that the slots that are needed depend on, and those with effects."""
        live = []
        for step in reversed(self.steps):
            if step.has_effects or needed.intersection(step.writes):
                live.append(step)
                needed = needed.union(step.reads)
        return live[::-1]
