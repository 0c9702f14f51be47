"""Recordings of launchers: what one allocates, computes with torch and starts, to be done again for other tensors.

The recorded launcher runs as always. A recording is given up at whatever is not known to repeat: without a plan the
launcher runs again. ROCm, and versions of Triton that are not known to starts.py, get no plans.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Private names of torch: tensors in a third of the time that torch.empty takes.
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from . import starts

ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)


class _Thread(threading.local):
    recording: "Recording | None" = None


_thread = _Thread()


def recording() -> "Recording | None":
    """The recording that goes on in this thread."""
    return _thread.recording


def give_up() -> None:
    """Say that what a launcher does depends on more than the metadata of its arguments: it is not repeated."""
    if _thread.recording is not None:
        _thread.recording.is_good = False


class Step:
    """A part of what a launcher does.

    Attributes:
        make: Given the place of each slot in a list, a function of that list and a stream that appends the results to
            the list; False: it cannot.
        reads: Slots of the tensors that it takes.
        writes: Slots of its results.
        has_effects: It changes tensors, so that it is needed whoever reads its results.
    """

    def __init__(self, make: Callable, reads: list[int], writes: list[int], has_effects: bool):
        self.make, self.reads, self.writes, self.has_effects = make, reads, writes, has_effects


class Recorder:
    """Runs a launcher, once; `program` is then what it did, or None."""

    program: "Program | None" = None

    def run(self, launcher: Callable, arguments: Sequence) -> object:
        recording = _thread.recording = Recording(arguments)
        try:
            with recording:
                result = launcher(*arguments)
        finally:
            _thread.recording = None
        self.program = recording.program(result)
        return result


class Recording(TorchDispatchMode):
    """What a launcher does with these arguments."""

    def __init__(self, arguments: Sequence):
        super().__init__()
        self.is_good = True
        self.kept: list[Tensor] = []  # so that no other tensor gets the id of one of them
        self.slots: dict[int, int] = {}
        self.count = 0  # of slots
        self.steps: list[Step] = []
        self.places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        for i in self.places:
            self._add(arguments[i])
        self.inputs = [self.slots[id(arguments[i])] for i in self.places]
        self.device = arguments[self.places[0]].device

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        results = [result] if isinstance(result, Tensor) else result
        if not isinstance(results, list | tuple) or not all(isinstance(x, Tensor) for x in results):
            self.is_good = False  # numbers read from tensors
            return result
        if function.overloadpacket in ALLOCATIONS:
            self._allocated(result)
            return result
        if function is torch.ops.aten.detach.default:  # the mode's own: a launcher needs none
            self._add(result, self.slot(arguments[0]))
            return result
        take = self._takers((arguments, options))
        is_known = [id(x) in self.slots for x in results]  # what is changed in place
        reads = take.slots
        for x in results:
            self._add(x)

        def make(numbers):
            fill = take.renumbered(numbers)

            def step(slots, stream):
                filled, filled_options = fill(slots)
                made = function(*filled, **filled_options)
                if not any(is_known):
                    slots += (made,) if isinstance(made, Tensor) else made
                return True

            return step

        if any(is_known) and not all(is_known):
            self.is_good = False
        writes = [] if any(is_known) else [self.slots[id(x)] for x in results]
        self.steps.append(Step(make, reads, writes, function._schema.is_mutable))
        return result

    def launched(self, kernel, compiled: CompiledKernel | None, grid: tuple, arguments: tuple, options: dict) -> None:
        """Add the start of a kernel."""
        try:
            given = starts.arguments_of(kernel, compiled, arguments, options)
            start = starts.starter(compiled, grid, given)
        except starts.Unknown:
            self.is_good = False
            return
        describe, values = starts.describer(), given.values
        pointers = [(place, self.slot(x), may_be_null) for place, x, may_be_null in given.pointers]
        descriptors = [(place, self.slot(x), known) for place, x, known in given.descriptors]

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

        reads = [slot for _, slot, _ in pointers + descriptors]
        self.steps.append(Step(make, reads, [], True))

    def program(self, result: Tensor | Sequence[Tensor] | None) -> "Program | None":
        """What the launcher did, if it can be repeated."""
        results = [result] if isinstance(result, Tensor) else result or ()
        if not self.is_good or any(id(x) not in self.slots for x in results):
            return None
        return Program(self, [self.slots[id(x)] for x in results])

    def slot(self, x: Tensor) -> int:
        """The slot of a tensor; the recording is given up where it has none."""
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
        shape, stride, dtype, device = tuple(x.shape), x.stride(), x.dtype, x.device
        allocate = {"cpu": _empty_strided_cpu, "cuda": _empty_strided_cuda}[device.type]

        def make(numbers):
            def step(slots, stream):
                slots.append(allocate(shape, stride, dtype))
                return True

            return step

        self.steps.append(Step(make, [], [self.slots[id(x)]], False))

    def _takers(self, arguments: object) -> "_Arguments":
        return _Arguments(self, arguments)


class _Arguments:
    """Arguments of a function of torch, with slots in place of tensors."""

    def __init__(self, recording: Recording, arguments: object):
        self.slots: list[int] = []
        self.arguments = self._described(recording, arguments)

    def _described(self, recording: Recording, x: object) -> object:
        if isinstance(x, Tensor):
            self.slots.append(recording.slot(x))
            return _Slot(self.slots[-1])
        if isinstance(x, list | tuple):
            return type(x)(self._described(recording, y) for y in x)
        if isinstance(x, dict):
            return {name: self._described(recording, y) for name, y in x.items()}
        return x

    def renumbered(self, numbers: dict[int, int]) -> Callable[[list[Tensor]], object]:
        """A function of renumbered slots that gives the arguments."""

        def fill(slots, x=self.arguments):
            if isinstance(x, _Slot):
                return slots[numbers[x.number]]
            if isinstance(x, list | tuple):
                return type(x)([fill(slots, y) for y in x])
            if isinstance(x, dict):
                return {name: fill(slots, y) for name, y in x.items()}
            return x

        return fill


class _Slot:
    def __init__(self, number: int):
        self.number = number


class Program:
    """What a launcher did, to be done again for tensors of the same metadata: see pynlp.ops.common.plans."""

    def __init__(self, recording: Recording, results: list[int]):
        self.places, self.steps, self.results = recording.places, recording.steps, results
        self.inputs, self.count = recording.inputs, len(results)
        self.device, self.active = recording.device, driver.active

    def runner(self, wanted: Sequence[int] | None = None, places: Sequence[int] | None = None) -> Callable:
        """See the protocol."""
        places = self.places if places is None else places
        given = [slot if wanted is None or i in wanted else None for i, slot in enumerate(self.results)]
        numbers = {slot: i for i, slot in enumerate(self.inputs)}
        steps = []
        for step in self._live({slot for slot in given if slot is not None}):
            steps.append(step.make(numbers))
            for slot in step.writes:
                numbers[slot] = len(numbers)
        outputs = [None if slot is None else numbers[slot] for slot in given]
        active, device, hooks = self.active, self.device.index, knobs.runtime

        def run(arguments):
            if (
                driver.active is not active
                or not starts.waits_for_nobody(hooks)
                or (device is not None and active.get_current_device() != device)
            ):
                return None
            stream = active.get_current_stream(device or 0)
            slots = [arguments[i] for i in places]
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
