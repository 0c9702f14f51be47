"""Plans: what calls of one kind come down to, kept by their metadata, so that a later one goes to the kernels at once.

The first call of a kind runs as always, and so does the second, which is recorded: the ops that it runs, which of its
tensors they take, and what their back ends do with them. From the third on a call repeats that, without checks,
conversions that change nothing, and the dispatcher. Calls are of one kind if all but the values of their tensors is the
same: dtypes, shapes, strides, devices, alignments on GPUs, numbers, and whether gradients are wanted. What may not
follow from that is not kept; and where a plan turns out not to fit, the call runs as always.
"""

import copy
import enum
import functools
import importlib
import inspect
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad, profiler
from torch.compiler import is_compiling
from torch.nn import Parameter

try:  # private names; tests/plans/test_plans.py says that they are there
    from torch._C import (
        _are_functorch_transforms_active,
        _get_tracing_state,
        _is_any_autocast_enabled,
        _is_torch_function_mode_enabled,
        _len_torch_dispatch_stack,
    )

    ARE_POSSIBLE = True
except ImportError:
    ARE_POSSIBLE = False

MOST = 4096  # kinds of calls of a function; beyond them the one that was not used for longest is forgotten
triton_serves_cpu = False  # so that alignments of CPU tensors matter: in tests and benchmarks of the launchers
_SIMPLE = frozenset((int, float, bool, str, NoneType))


class Verdict(enum.Enum):
    """What is kept in place of a plan: the next call of the kind is recorded, or none is."""

    AGAIN = 1
    NEVER = 2


class Stale(Exception):
    """Raised where a plan does not fit a call."""


class Program(Protocol):
    """What a back end did for a call of an op, to be done again for other tensors of the same metadata.

    Attributes:
        count: Number of the op's results.
    """

    count: int

    def runner(self, places: Sequence[int], wanted: Sequence[int] | None = None) -> Callable:
        """A function that does it, of a sequence that has the op's tensors at `places`.

        It gives a list of the results, with None for those whose number is not in `wanted`: by default all are. Behind
        them stands one more None, for `picker`. Where it does not fit the call it gives None in place of the list.
        """


class _Thread(threading.local):
    recording: "Recording | None" = None
    launches: Callable | None = None


_thread = _Thread()
_is_off = not ARE_POSSIBLE


def launch_by() -> Callable | None:
    """What runs a launcher while what it does is recorded; None: nothing is."""
    return _thread.launches


@contextmanager
def launching_by(launches: Callable) -> Iterator[None]:
    """Lets launchers run by `launches(launcher, *arguments)`."""
    _thread.launches = launches
    try:
        yield
    finally:
        _thread.launches = None


def triton_recorder():
    """A new Recorder, see kernels/common/replay.py."""
    return importlib.import_module("pynlp.kernels.common.replay").Recorder()


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
        is_backward_watched()
        or _is_any_autocast_enabled()
        or _is_torch_function_mode_enabled()
        or _get_tracing_state() is not None
    )


def is_backward_watched() -> bool:
    """The same for a backward pass, to which autocast and what sees calls of Python do not matter."""
    return (
        _is_off
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )


class Table(OrderedDict):
    """Plans by the kind of call."""

    def keep(self, kind: tuple, plan: object) -> None:
        self[kind] = plan
        if len(self) > MOST:
            self.popitem(last=False)

    def used(self, kind: tuple) -> None:
        """Keep what was used now for longer than what was used before."""
        try:
            self.move_to_end(kind)
        except KeyError:  # another thread's new plan took its place
            pass


def describe(values: Iterable, kind: list, tensors: list[Tensor]) -> None:
    """Add what is known of values without reading tensors to a kind of call, and their tensors to a list.

    A kind begins with whether gradients are enabled; else it does not matter which tensors require some.

    Raises:
        Stale: of a value too little is known.
        RuntimeError: torch knows too little of a tensor: a sparse one has no strides.
    """
    is_enabled = kind[0]
    for x in values:
        what = type(x)
        if what is Tensor or what is Parameter:
            if x.is_neg():  # its values are not in memory as they are
                raise Stale
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
        same: Pairs of arguments that are one tensor: an op that takes one of them may mean the other.
        last: The last op that the call has run.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = list(tensors)  # kept, so that no other tensor gets the id of one of them
        self.numbers = {id(x): i for i, x in enumerate(tensors)}
        self.same = [(i, self.numbers[id(x)]) for i, x in enumerate(tensors) if self.numbers[id(x)] != i]
        self.steps: list[Callable[[list[Tensor]], None]] = []
        self.last: LastOp | None = None
        self.verdict: Verdict | None = None
        self.is_enabled = is_grad_enabled()

    def add(self, results: Iterable[Tensor]) -> None:
        for x in results:
            self.numbers.setdefault(id(x), len(self.tensors))
            self.tensors.append(x)

    def numbers_or_give_up(self, arguments: Sequence) -> list[int]:
        """The numbers of the tensors among them; where nobody knows where one came from, no plan can be made."""
        ids = [id(x) for x in arguments if isinstance(x, Tensor)]
        if any(i not in self.numbers for i in ids):
            self.verdict = Verdict.NEVER
        return [self.numbers.get(i, 0) for i in ids]


def cannot_be_kept() -> None:
    """Say that what a call does depends on more than its metadata: no plan is made of it."""
    if not is_compiling() and _thread.recording is not None:
        _thread.recording.verdict = Verdict.NEVER


def derive(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """`function(*arguments)`, a tensor that an op takes or that a call gives; a plan calls it again."""
    result = function(*arguments)
    recording = None if is_compiling() else _thread.recording
    if recording is not None and id(result) not in recording.numbers:
        fill, is_enabled = filler(arguments, recording.numbers_or_give_up(arguments)), is_grad_enabled()

        def step(tensors):
            tensors.append(function(*fill(tensors)))

        def step_without_gradients(tensors):
            with torch.no_grad():
                step(tensors)

        recording.steps.append(step if is_enabled == recording.is_enabled else step_without_gradients)
        recording.add([result])
    return result


def act(function: Callable[..., object], *arguments: object) -> None:
    """Call `function(*arguments)` for what it changes; a plan calls it again."""
    function(*arguments)
    recording = None if is_compiling() else _thread.recording
    if recording is not None:
        fill = filler(arguments, recording.numbers_or_give_up(arguments))
        recording.steps.append(lambda tensors: function(*fill(tensors)))


def planned(function: Callable) -> Callable:
    """A public function that runs by plans where it can."""
    table = Table()
    signature = inspect.signature(function)
    of_tensors = {name for name, x in signature.parameters.items() if "Tensor" in str(x.annotation)}

    def has_tensors_in_place(arguments: tuple, options: dict) -> bool:
        """Whether no tensor stands for a flag or a number, on whose value it would depend what a call does."""
        try:
            given = signature.bind(*arguments, **options).arguments
        except TypeError:
            return False
        return not any(_holds_tensors(x) for name, x in given.items() if name not in of_tensors)

    @functools.wraps(function)
    def call(*arguments, **options):
        if is_compiling() or is_watched():
            return function(*arguments, **options)
        kind, tensors = [is_grad_enabled(), *options], []
        try:
            describe(arguments, kind, tensors)
            if options:
                describe(options.values(), kind, tensors)
        except (Stale, RuntimeError):
            return function(*arguments, **options)
        return serve(table, tuple(kind), tensors, function, arguments, options, has_tensors_in_place)

    return call


def _holds_tensors(x: object) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, tuple) and any(map(_holds_tensors, x)))


def _always(arguments: tuple, options: dict) -> bool:
    return True


_NO_OPTIONS: dict[str, object] = {}


def serve(
    table: Table, kind: tuple, tensors: list[Tensor], slow: Callable, arguments: tuple,
    options: dict = _NO_OPTIONS, can_be_kept: Callable[[tuple, dict], bool] = _always,
) -> object:  # fmt: skip
    """The result of a call of this kind: by its plan or, where that is not possible, `slow(*arguments, **options)`."""
    plan = table.get(kind)
    if plan is None:
        table.keep(kind, Verdict.AGAIN if can_be_kept(arguments, options) else Verdict.NEVER)
    elif _thread.recording is not None or plan is Verdict.NEVER:  # a part of what is recorded runs as always
        pass
    elif plan is not Verdict.AGAIN:
        table.used(kind)
        try:
            return plan(tensors)
        except Stale:
            pass
    else:
        _thread.recording = recording = Recording(tensors)
        try:
            result = slow(*arguments, **options)
        finally:
            _thread.recording = None
        table.keep(kind, recording.verdict or _plan(recording, result))
        return result
    return slow(*arguments, **options)


def _plan(recording: Recording, result: Tensor | tuple[Tensor | None, ...]) -> Callable[[list[Tensor]], object]:
    """A function of a call's tensors that gives its result; or a verdict."""
    results = as_list(result)
    numbers = [None if x is None else recording.numbers.get(id(x), -1) for x in results]
    is_one_of_a_tuple = isinstance(result, tuple) and len(result) == 1  # for which `picker` gives the element
    if recording.last is None or not results or -1 in numbers or is_one_of_a_tuple:
        return Verdict.NEVER
    steps, last = recording.steps, recording.last
    if steps[-1] is last.step and all(i is None or i >= last.first for i in numbers):
        # Of the last op's results no others are made.
        steps, places = steps[:-1], [None if i is None else i - last.first for i in numbers]
        make = last.served.maker([i for i in places if i is not None], last.numbers)
    else:
        places = numbers

        def make(tensors):
            tensors.append(None)
            return tensors

    pick, same = picker(places), recording.same

    def plan(tensors):
        for one, other in same:
            if tensors[one] is not tensors[other]:
                raise Stale
        for step in steps:
            step(tensors)
        made = make(tensors)
        if made is None:
            raise Stale
        return pick(made)

    return plan


def picker(places: Sequence[int | None]) -> Callable[[Sequence], object]:
    """A function of a sequence that gives its element at one place, or a tuple of those at several.

    The sequence ends with None, which is what it gives for the place None.
    """
    return operator.itemgetter(*(-1 if i is None else i for i in places))


def as_list(result: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    """An op's results: it may have one, several or none."""
    return [result] if isinstance(result, Tensor) else result or ()


class Served:
    """How calls of one kind of an op are served.

    Attributes:
        runner: The back end: of the op's tensors a list of its results, see Program.
        apply: The autograd.Function's, of the op's tensors and a Served; None: no gradient is needed.
        places: Of the tensors among the arguments.
        argument_count: Of the op.
        arguments_of: A function of the tensors that gives the arguments.
        pick: Of the results and the None behind them, those that callers want, in their places; None: all.
    """

    def __init__(self, program: Program, apply: Callable | None, arguments: Sequence, is_single: bool):
        self.program, self.apply, self.is_single, self.pick = program, apply, is_single, None
        self.places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        self.argument_count = len(arguments)
        self.arguments_of = filler(arguments, range(len(self.places)))
        self.runner = program.runner(range(len(self.places)))

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The op's own result."""
        made = self.runner(tensors) if self.apply is None else self.apply(*tensors, self)
        if made is None:
            raise Stale
        return made[0] if self.is_single else tuple(made[:-1])

    def maker(self, wanted: Sequence[int], numbers: Sequence[int]) -> Callable:
        """A function of numbered tensors that gives the results in `wanted`, at their places."""
        apply = self.apply
        if apply is None:
            return self.program.runner(numbers, wanted)
        served = copy.copy(self)
        served.pick = picker([i if i in wanted else None for i in range(self.program.count + 1)])
        return lambda tensors: apply(*[tensors[i] for i in numbers], served)


def filler(arguments: Sequence, numbers: Sequence[int]) -> Callable[[Sequence[Tensor]], list]:
    """A function of numbered tensors that gives arguments like these, with the tensors of these numbers in them."""
    template = [None if isinstance(x, Tensor) else x for x in arguments]
    places = list(zip([i for i, x in enumerate(arguments) if isinstance(x, Tensor)], numbers, strict=True))

    def fill(tensors: Sequence[Tensor]) -> list:
        result = template.copy()
        for place, number in places:
            result[place] = tensors[number]
        return result

    return fill


class LastOp(NamedTuple):
    """The last op that a recorded call has run.

    Attributes:
        step: Its step.
        numbers: Of its tensors.
        first: Number of its first result.
    """

    step: Callable
    served: Served
    numbers: list[int]
    first: int


def planned_op(slow: Callable, apply: Callable | None, record: Callable, of_tensors: Collection[int]) -> Callable:
    """An op for callers in Python, which runs by plans where it can.

    Args:
        slow: The op.
        apply: Runs it by its autograd.Function, given its tensors and a Served; None for an op without gradient.
        record: Runs it, given the arguments; gives its result, and a Program or None.
        of_tensors: Places of the arguments that are tensors, or None. One elsewhere is read as a number.
    """
    table = Table()

    def call(*arguments):
        if is_watched():
            _give_up_recording(Verdict.AGAIN)
            return slow(*arguments)
        kind, tensors = [is_grad_enabled()], []
        try:
            describe(arguments, kind, tensors)
        except (Stale, RuntimeError):
            _give_up_recording(Verdict.AGAIN)
            return slow(*arguments)
        kind = tuple(kind)
        served = table.get(kind)
        if isinstance(served, Served):
            table.used(kind)
            try:
                result = served(tensors)
            except Stale:
                _give_up_recording(Verdict.AGAIN)
                return slow(*arguments)
        elif served is Verdict.AGAIN:
            result, program = record(arguments)
            served = Verdict.NEVER
            if program is not None:
                needs_gradient = is_grad_enabled() and any(x.requires_grad for x in tensors)
                served = Served(program, apply if needs_gradient else None, arguments, isinstance(result, Tensor))
            table.keep(kind, served)
        else:
            if served is None:
                in_place = all(i in of_tensors for i, x in enumerate(arguments) if isinstance(x, Tensor))
                served = Verdict.AGAIN if in_place else Verdict.NEVER
                table.keep(kind, served)
            _give_up_recording(served)
            return slow(*arguments)
        _note(served, arguments, result)
        return result

    return call


def _give_up_recording(verdict: Verdict) -> None:
    """Make no plan of the call that is recorded, if one is."""
    recording = _thread.recording
    if recording is not None and recording.verdict is not Verdict.NEVER:
        recording.verdict = verdict


def _note(served: Served | Verdict, arguments: tuple, result: Tensor | tuple[Tensor, ...] | None) -> None:
    """Add the call of an op to the recording, if there is one."""
    recording = _thread.recording
    if recording is None:
        return
    if isinstance(served, Verdict):
        _give_up_recording(served)
        return
    numbers = recording.numbers_or_give_up(arguments)

    def step(tensors):
        tensors += as_list(served([tensors[i] for i in numbers]))

    recording.steps.append(step)
    recording.last = LastOp(step, served, numbers, len(recording.tensors))
    recording.add(as_list(result))
