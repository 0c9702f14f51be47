"""Plans: what calls of one kind come down to, kept by their metadata, so that a later one goes to the kernels at once.

The first call of a kind runs as always, and so does the second, which is recorded: the ops that it runs, which of its
tensors they take, and what their back ends do with them. From the third on a call repeats that, without checks,
conversions that change nothing, and the dispatcher. Calls are of one kind if all but the values of their tensors is the
same: dtypes, shapes, strides, devices, alignments, numbers, and whether gradients are wanted. What may not follow from
that is not kept; and where a plan turns out not to fit, the call runs as always.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Protocol

import torch
from torch import Tensor

# Private names of torch; tests/package/test_library.py compares what is built on them with torch's.
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

MOST = 4096  # kinds of calls of a function; beyond them the one that was not used for longest is forgotten
triton_serves_cpu = False  # so that alignments of CPU tensors matter: in tests and benchmarks of the launchers
_ONCE, _NEVER = "seen once", "cannot be kept"  # in place of a plan
_SIMPLE = frozenset((int, float, bool, str, NoneType))


class Stale(Exception):
    """Raised where a plan does not fit a call."""


class Program(Protocol):
    """What a back end did for a call of an op, to be done again for other tensors of the same metadata."""

    def runner(self, wanted: Sequence[int] | None = None, places: Sequence[int] | None = None) -> Callable:
        """A function that does it: of a sequence that has the op's tensors at `places`, by default its arguments.

        It gives a list of the op's results, with None for those whose number is not in `wanted`, by default all; or
        None where it does not fit the call.
        """


class _Thread(threading.local):
    recording: "Recording | None" = None
    launches: Callable | None = None


_thread = _Thread()
_is_off = False


def launch_by() -> Callable | None:
    """What runs a launcher with arguments while what it does is recorded; None: nothing is."""
    return _thread.launches


@contextmanager
def launching_by(launches: Callable) -> Iterator[None]:
    """Lets launchers run by `launches(launcher, arguments)`."""
    _thread.launches = launches
    try:
        yield
    finally:
        _thread.launches = None


@contextmanager
def off() -> Iterator[None]:
    """Lets calls run as if there were no plans; for tests and comparisons."""
    global _is_off
    before, _is_off = _is_off, True
    try:
        yield
    finally:
        _is_off = before


def is_watched() -> bool:
    """Whether something sees or changes calls that a plan leaves out: autocast, modes, transforms, a profiler."""
    return (
        _is_any_autocast_enabled()
        or _is_torch_function_mode_enabled()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or _is_off
    )


def is_backward_watched() -> bool:
    """The same for a backward pass."""
    return (
        _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or _is_off
    )


class Table(OrderedDict):
    """Plans by the kind of call."""

    def keep(self, kind: tuple, plan: object) -> None:
        self[kind] = plan
        if len(self) > MOST:
            self.popitem(last=False)


def describe(values: Iterable, kind: list, tensors: list[Tensor]) -> None:
    """Add what is known of values without reading tensors to a kind of call, and their tensors to a list.

    A kind begins with whether gradients are enabled; else it does not matter which tensors require some.

    Raises:
        Stale: of a value too little is known.
    """
    is_enabled = kind[0]
    for x in values:
        what = type(x)
        if what is Tensor or what is Parameter:
            tensors.append(x)
            if x.is_cpu and not triton_serves_cpu:
                kind += (x.dtype, x.shape, x.stride(), is_enabled and x.requires_grad)
            else:
                needs_gradient = is_enabled and x.requires_grad
                kind += (x.dtype, x.shape, x.stride(), needs_gradient, x.device, x.data_ptr() & 15)
        elif what in _SIMPLE:
            kind += (what, x)
        elif what is tuple:
            kind += (what, len(x))
            describe(x, kind, tensors)
        else:
            raise Stale


class Recording:
    """A call that is being recorded: its tensors, numbered, and the steps that make more of them.

    Attributes:
        verdict: What is kept in place of a plan, if none can be made.
        last: The last op that the call has run.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)  # kept, so that no other tensor gets the id of one of them
        self.numbers = {id(x): i for i, x in enumerate(tensors)}
        self.steps: list[Callable[[list[Tensor]], None]] = []
        self.last: LastOp | None = None
        self.verdict = None if are_plain(tensors) else _ONCE

    def add(self, results: Iterable[Tensor]) -> None:
        for x in results:
            self.numbers.setdefault(id(x), len(self.tensors))
            self.tensors.append(x)

    def filler(self, arguments: Sequence) -> Callable[[Sequence[Tensor]], list]:
        """A function of the numbered tensors that gives arguments like these."""
        template, places = list(arguments), []
        for i, x in enumerate(arguments):
            if isinstance(x, Tensor):
                if id(x) not in self.numbers:
                    self.verdict = _NEVER  # nobody knows where it came from
                    return list
                template[i] = None
                places.append((i, self.numbers[id(x)]))

        def fill(tensors: Sequence[Tensor]) -> list:
            result = template.copy()
            for i, number in places:
                result[i] = tensors[number]
            return result

        return fill


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether a recording tells tensors apart, and each has values in memory as they are.

    A tensor that is to be negated is a part of a complex one: all of its strides are even.
    """
    if len({id(x) for x in tensors}) < len(tensors):
        return False
    return all(
        not x.is_neg() and (x.dim() == 0 or x.numel() == 0 or any(stride % 2 for stride in x.stride())) for x in tensors
    )


def cannot_be_kept() -> None:
    """Say that what a call does depends on more than its metadata: no plan is made of it."""
    if not torch.compiler.is_compiling() and _thread.recording is not None:
        _thread.recording.verdict = _NEVER


def derive(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """`function(*arguments)`, a tensor that an op takes; a plan calls it again."""
    result = function(*arguments)
    recording = None if torch.compiler.is_compiling() else _thread.recording
    if recording is not None and id(result) not in recording.numbers:
        fill = recording.filler(arguments)
        recording.steps.append(lambda tensors: tensors.append(function(*fill(tensors))))
        recording.add([result])
    return result


def planned(function: Callable) -> Callable:
    """A public function that runs by plans where it can."""
    table = Table()

    @functools.wraps(function)
    def call(*arguments, **options):
        if torch.compiler.is_compiling() or is_watched():
            return function(*arguments, **options)
        kind, tensors = [torch.is_grad_enabled(), *options], []
        try:
            describe(arguments, kind, tensors)
            describe(options.values(), kind, tensors)
        except (Stale, RuntimeError):  # RuntimeError: sparse tensors, say, have no strides
            return function(*arguments, **options)
        return serve(table, tuple(kind), tensors, function, arguments, options)

    return call


_NO_OPTIONS: dict[str, object] = {}


def serve(
    table: Table, kind: tuple, tensors: list[Tensor], slow: Callable, arguments: tuple, options: dict = _NO_OPTIONS
) -> object:
    """The result of a call of this kind: by its plan or, where that is not possible, `slow(*arguments, **options)`."""
    plan = table.get(kind)
    if plan is None:
        table.keep(kind, _ONCE)
    elif _thread.recording is not None or plan is _NEVER:  # a part of what is recorded runs as always
        pass
    elif plan is _ONCE:
        _thread.recording = recording = Recording(tensors)
        try:
            result = slow(*arguments, **options)
        finally:
            _thread.recording = None
        table.keep(kind, recording.verdict or _plan(recording, result))
        return result
    else:
        table.move_to_end(kind)
        try:
            return plan(tensors)
        except Stale:
            pass
    return slow(*arguments, **options)


def _plan(recording: Recording, result: Tensor | tuple[Tensor | None, ...]) -> Callable[[list[Tensor]], object] | str:
    """A function of a call's tensors that gives its result."""
    is_single, results = isinstance(result, Tensor), as_list(result)
    numbers = [None if x is None else recording.numbers.get(id(x), -1) for x in results]
    if recording.last is None or -1 in numbers:
        return _NEVER
    steps, last = recording.steps, recording.last
    if steps[-1] is last.step and all(i is None or i >= last.first for i in numbers):
        # Of the last op's results no others are made.
        steps, places = steps[:-1], [None if i is None else i - last.first for i in numbers]
        make = last.served.maker([i for i in places if i is not None], last.fill, last.numbers)
    else:
        places = numbers

        def make(tensors):
            return tensors

    if is_single:
        (place,) = places

    def plan(tensors):
        for step in steps:
            step(tensors)
        made = make(tensors)
        if made is None:
            raise Stale
        return made[place] if is_single else tuple([None if i is None else made[i] for i in places])

    return plan


def as_list(result: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    """An op's results: it may have one, several or none."""
    return [result] if isinstance(result, Tensor) else result or ()


class Served:
    """How calls of one kind of an op are served.

    Attributes:
        wanted: Numbers of the results that callers see; None: all.
        apply: The autograd.Function's; None: no gradient is needed.
    """

    def __init__(self, program: Program, apply: Callable | None, is_single: bool, wanted: Sequence[int] | None = None):
        self.program, self.apply, self.is_single, self.wanted = program, apply, is_single, wanted
        self.runner = program.runner()

    def run(self, arguments: Sequence) -> list[Tensor]:
        """All results, below autograd."""
        made = self.runner(arguments)
        if made is None:
            raise Stale
        return made

    def __call__(self, *arguments) -> Tensor | tuple[Tensor, ...]:
        """The op's own result."""
        made = self.run(arguments) if self.apply is None else self.apply(*arguments, self)
        return made[0] if self.is_single else tuple(made)  # an op without results is not asked for them

    def maker(self, wanted: Sequence[int], fill: Callable, numbers: Sequence[int]) -> Callable:
        """A function of numbered tensors that gives the results in `wanted`, at their places."""
        if self.apply is None:
            return self.program.runner(wanted, numbers)
        served, apply = Served(self.program, self.apply, self.is_single, wanted), self.apply
        return lambda tensors: apply(*fill(tensors), served)


class LastOp:
    """The last op that a recorded call has run.

    Attributes:
        step: Its step.
        fill: A function of the numbered tensors that gives its arguments.
        numbers: Of its tensors.
        first: Number of its first result.
    """

    def __init__(self, step: Callable, served: Served, fill: Callable, numbers: list[int], first: int):
        self.step, self.served, self.fill, self.numbers, self.first = step, served, fill, numbers, first


def planned_op(slow: Callable, apply: Callable | None, record: Callable) -> Callable:
    """An op for callers in Python, which runs by plans where it can.

    Args:
        slow: The op.
        apply: Runs it by its autograd.Function, given the arguments and a Served; None for an op without gradient.
        record: Runs it, given the arguments; gives its result, and a Program or None.
    """
    table = Table()

    def call(*arguments):
        if is_watched():
            cannot_be_kept()
            return slow(*arguments)
        kind, tensors = [torch.is_grad_enabled()], []
        try:
            describe(arguments, kind, tensors)
        except (Stale, RuntimeError):
            cannot_be_kept()
            return slow(*arguments)
        kind = tuple(kind)
        served = table.get(kind)
        if served is None:
            table.keep(kind, _ONCE)
            _note(_ONCE, arguments, None)
            return slow(*arguments)
        if served is _ONCE:
            result, program = record(arguments)
            if program is None:
                served = _NEVER
            elif are_plain(tensors):
                needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
                served = Served(program, apply if needs_gradient else None, isinstance(result, Tensor))
            table.keep(kind, served)
        elif served is _NEVER:
            result = slow(*arguments)
        else:
            table.move_to_end(kind)
            try:
                result = served(*arguments)
            except Stale:
                served, result = _ONCE, slow(*arguments)
        _note(served, arguments, result)
        return result

    return call


def _note(served: Served | str, arguments: tuple, result: Tensor | tuple[Tensor, ...] | None) -> None:
    """Add the call of an op to the recording, if there is one."""
    recording = _thread.recording
    if recording is None:
        return
    if not isinstance(served, Served):
        recording.verdict = _NEVER if _NEVER in (served, recording.verdict) else _ONCE
        return
    fill = recording.filler(arguments)
    if recording.verdict is not None:
        return

    def step(tensors):
        made = served(*fill(tensors))
        tensors += as_list(made)

    recording.steps.append(step)
    numbers = [recording.numbers[id(x)] for x in arguments if isinstance(x, Tensor)]
    recording.last = LastOp(step, served, fill, numbers, len(recording.tensors))
    recording.add(as_list(result))
