"""What the layers of a model read: runs of calibration data through it, to the layers in question and no further.

Layers are looked at in the order of their calls, in units: a block (an entry of a ModuleList or a Sequential), or
layers outside of blocks that read one tensor. What is before a unit does not change any more, so blocks before it are
not computed again: the last one gives what it gave before. A first run shows whether the model bears this.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Unit(NamedTuple):
    """Layers that are looked at together.

    Attributes:
        place: In the order of calls.
        groups: Layers that read one tensor, in the order of their calls.
    """

    place: int
    groups: list[list[nn.Module]]


class _Stop(BaseException):  # which no model catches
    """All that a run was for has been seen."""


class Runs:
    """Runs of batches through a model in evaluation mode, by `running`.

    Attributes:
        order: The places of layers and blocks in the order of their first calls; of those that are called.
        calls: For each batch how often layers, norms and blocks are called.
        norms: The module with a weight `(K,)` whose result a layer reads, by layer.
        units: In the order of their calls.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], layers: Mapping[str, nn.Module]):
        self.model, self.batches = model, batches
        self.order: dict[nn.Module, int] = {}
        self.calls: list[Counter] = [Counter() for _ in batches]
        self.norms: dict[nn.Module, nn.Module] = {}
        self.stage = 0  # the place of the unit that is looked at
        self.batch = 0  # the number of the one that runs
        self._leaders: dict[nn.Module, nn.Module] = {}  # the first layer that reads the same tensor
        self._lists, self._block_of = _blocks(model, layers)
        self._saved: dict[tuple[nn.Module, int], tuple[int, Any]] = {}  # by list and batch: place and result of a block
        inputs = self._trace(list(layers.values()))
        called_once = all(calls[block] <= 1 for calls in self.calls for block in self._lists)
        self._is_replaying = called_once and self._replays(inputs)
        self._saved.clear()
        self.units = self._units()

    def read(self, unit: Unit, layers: Sequence[nn.Module], take: Callable[[nn.Module, Tensor], None]) -> None:
        """Gives `take` each layer of a unit and what it reads, as rows `(n, K)`, batch by batch."""
        self.stage = unit.place

        def see(layer, args, kwargs):
            nonlocal left
            x = _input(args, kwargs)
            if x.numel():
                take(layer, x.reshape(-1, x.shape[-1]))
            left -= 1
            if not left:
                raise _Stop

        with _hooks(layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers):
            for number in range(len(self.batches)):
                left = sum(self.calls[number][layer] for layer in layers)
                if left:
                    self._run(number)

    def results(self, unit: Unit) -> list[Tensor]:
        """What the model gives for the first batch, with a unit and all that is behind it computed."""
        self.stage = unit.place
        return [x.clone() for x in tensors_in(self._run(0))]

    def _run(self, number: int) -> Any:
        self.batch, batch = number, self.batches[number]
        try:
            return self.model(**batch) if isinstance(batch, Mapping) else self.model(batch)
        except _Stop:
            return None

    def _trace(self, layers: list[nn.Module]) -> dict[nn.Module, list[Tensor]]:
        """Runs all batches and takes down what is called; of the first batch what blocks read."""
        read, made, inputs = {}, {}, {}

        def see_layer(layer, args, kwargs):
            self.calls[self.batch][layer] += 1
            if layer not in self.order:
                self.order[layer] = len(self.order)
                x, block = _input(args, kwargs), self._block_of.get(layer)
                self._leaders[layer] = _known(read, x, block) or layer
                read[id(x), block] = weakref.ref(x), self._leaders[layer]
                if norm := _known(made, x):
                    self.norms[layer] = norm

        def see_block(block, args, kwargs):
            self.calls[self.batch][block] += 1
            self.order.setdefault(block, len(self.order))
            if self.batch == 0:
                inputs[block] = [x.clone() for x in tensors_in((args, kwargs))]

        def see_norm(norm, args, result):
            self.calls[self.batch][norm] += 1
            for x in tensors_in(result)[:1]:
                made[id(x), None] = weakref.ref(x), norm

        def hooks():
            for layer in layers:
                yield layer.register_forward_pre_hook(see_layer, with_kwargs=True)
            for block in self._lists:
                yield block.register_forward_pre_hook(see_block, with_kwargs=True)
            for module in self.model.modules():
                weight = module._parameters.get("weight")
                if weight is not None and weight.dim() == 1:
                    yield module.register_forward_hook(see_norm)

        with _hooks(hooks()):
            for number in range(len(self.batches)):
                self._run(number)
        return inputs

    def _replays(self, inputs: dict[nn.Module, list[Tensor]]) -> bool:
        """Lets blocks before the stage give what they gave before; whether each block still reads the same then."""
        for block in self._lists:
            if block in self.order:
                block.forward = self._replayed(block, block.forward)
        self._is_replaying = True
        for block, expected in inputs.items():
            self.stage = self.order[block]
            found = []

            def see(block, args, kwargs, found=found):
                found += [x.clone() for x in tensors_in((args, kwargs))]
                raise _Stop

            with _hooks([block.register_forward_pre_hook(see, with_kwargs=True)]):
                self._run(0)
            if not same(found, expected):
                return False
        return True

    def _replayed(self, block: nn.Module, forward: Callable) -> Callable:
        place, blocks = self.order[block], self._lists[block]

        def run(*args, **kwargs):
            if place >= self.stage or not self._is_replaying:
                return forward(*args, **kwargs)
            key = blocks, self.batch  # of a list's blocks only the latest result is kept
            if key not in self._saved or self._saved[key][0] < place:
                self._saved[key] = place, forward(*args, **kwargs)
            return copy.deepcopy(self._saved[key][1])  # which the model may change

        return run

    def _units(self) -> list[Unit]:
        units = {}
        for layer in sorted(self._leaders, key=self.order.get):
            leader, block = self._leaders[layer], self._block_of.get(layer)
            groups = units.setdefault(leader if block is None else block, {})
            groups.setdefault(leader, []).append(layer)
        return sorted(Unit(self.order[key], list(groups.values())) for key, groups in units.items())


@contextmanager
def running(model: nn.Module, batches: Sequence[Any], layers: Mapping[str, nn.Module]) -> Iterator[Runs]:
    """Runs of a model, which is afterwards as it was: its modes, forwards and hooks."""
    modes = {module: module.training for module in model.modules()}
    forwards = {module: module.forward for module in modes if "forward" in vars(module)}
    runs = None
    try:
        model.eval()
        runs = Runs(model, batches, layers)
        yield runs
    finally:
        for module, mode in modes.items():
            module.training = mode
            if module in forwards:
                module.forward = forwards[module]
            else:
                vars(module).pop("forward", None)


def tensors_in(x: Any) -> list[Tensor]:
    """All tensors of a result, or of arguments."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        x = list(x.values())
    return [y for part in x for y in tensors_in(part)] if isinstance(x, list | tuple) else []


def same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    """Whether tensors have the same shapes and values, NaN where the others have it."""
    return len(xs) == len(ys) and all(
        x.shape == y.shape and ((x == y) | ((x != x) & (y != y))).all() for x, y in zip(xs, ys, strict=True)
    )


def _blocks(
    model: nn.Module, layers: Mapping[str, nn.Module]
) -> tuple[dict[nn.Module, nn.Module], dict[nn.Module, nn.Module]]:
    """The entries of lists that have layers inside, each with its list; and the block of each layer in one."""
    lists, block_of = {}, {}
    for name, layer in layers.items():
        parts = name.split(".")
        path = [model]
        for part in parts[:-1]:
            path.append(getattr(path[-1], part))
        for parent, block in zip(path, path[1:], strict=False):
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                lists.update((entry, parent) for entry in parent if entry not in layers.values())
                block_of[layer] = block
                break
    return lists, block_of


@contextmanager
def _hooks(handles: Iterable) -> Iterator[None]:
    made = []
    try:
        for handle in handles:
            made.append(handle)
        yield
    finally:
        for handle in made:
            handle.remove()


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _known(notes: dict, x: Tensor, block: nn.Module | None = None) -> nn.Module | None:
    """What was noted of a tensor, if it is not another one at the same address."""
    reference, module = notes.get((id(x), block), (lambda: None, None))
    return module if reference() is x else None
