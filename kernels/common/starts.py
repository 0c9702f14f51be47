"""The start of a compiled kernel by Triton's own C function, which is private: of the versions 3.6 and 3.7, for NVIDIA.

What lies between is left out: the search for the kernel that fits the arguments, and hooks: see is_unwatched.
"""

import inspect
from collections.abc import Callable

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

try:
    from triton.backends.nvidia import driver as nvidia
except ImportError:  # a Triton for other chips
    nvidia = None
VERSION = triton.__version__.split(".")[:2]
KNOWN_VERSIONS = (["3", "6"], ["3", "7"])


class Unknown(Exception):
    """Raised where it is not known how a kernel is started."""


class KernelArguments:
    """A kernel's arguments without constants, tuples opened, and where its tensors go.

    Attributes:
        values: The arguments as they reach the kernel, None where an address or a TMA descriptor goes.
        pointers: Place, tensor, and whether its address may be null.
        descriptors: Place, tensor, and all but the address that makes its TMA descriptor.
        nested: Places as the kernel's parameters have them: numbers, tuples of such, None for a constant.
    """

    def __init__(self, signature: dict[str, str | tuple], arguments: dict[str, object], metadata: object):
        self.values: list = []
        self.pointers: list[tuple[int, Tensor, bool]] = []
        self.descriptors: list[tuple[int, Tensor, tuple]] = []
        self.nested: list = []
        described = iter(getattr(metadata, "tensordesc_meta", None) or ())
        for name, kind in signature.items():
            if isinstance(kind, str) and kind.startswith("tensordesc"):
                first = len(self.values)
                self._add_descriptor(arguments[name], next(described, None))
                self.nested += range(first, len(self.values))
            else:
                self.nested.append(self._add(kind, arguments[name]))

    def _add(self, kind: str | tuple, value: object) -> int | tuple | None:
        """The places of an argument."""
        if isinstance(kind, tuple):
            return tuple(self._add(part, inner) for part, inner in zip(kind, value, strict=True))
        if kind == "constexpr":
            return None
        if isinstance(value, Tensor):
            self.pointers.append((len(self.values), value, value.numel() == 0))
            value = None
        elif not isinstance(value, int | float):
            raise Unknown
        self.values.append(value)
        return len(self.values) - 1

    def _add_descriptor(self, x: TensorDescriptor, meta: dict | None) -> None:
        sizes, pads, rounds = [*x.shape, *x.strides], x.padding == "nan", getattr(x, "round_f32_to_tf32", False)
        if rounds or (meta is not None and meta["fp4_padded"]):
            raise Unknown
        if meta is None:  # a chip without TMA
            self.pointers.append((len(self.values), x.base, False))
            self.values += [None, *sizes, pads, *([rounds] if VERSION == ["3", "7"] else []), *sizes]
            return
        element = nvidia.TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
        known = meta["swizzle"], meta["elem_size"], element, meta["block_size"], x.shape, x.strides, int(pads)
        self.descriptors.append((len(self.values), x.base, known))
        self.values += [None, *sizes]


def arguments_of(kernel, compiled: CompiledKernel | None, arguments: tuple, options: dict) -> KernelArguments:
    """The arguments of a kernel that was compiled for them.

    Raises:
        Unknown: they are started in a way that is not known here.
    """
    if compiled is None or nvidia is None or VERSION not in KNOWN_VERSIONS or kernel.pre_run_hooks:
        raise Unknown
    started = compiled.run
    if not isinstance(started, nvidia.CudaLauncher) or started.global_scratch_size or started.profile_scratch_size:
        raise Unknown
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    return KernelArguments(compiled.src.signature, values, compiled.metadata)


def describer() -> Callable:
    """Triton's function that makes a TMA descriptor of an address and the rest."""
    utils = driver.active.utils
    return utils.fill_tma_descriptor_tiled if VERSION == ["3", "7"] else utils.fill_tma_descriptor


def starter(compiled: CompiledKernel, grid: tuple[int, ...], arguments: KernelArguments) -> Callable[[int, list], None]:
    """A function that starts the kernel on a stream, given values like those of `arguments`, filled in."""
    started, size = compiled.run, (*grid, 1, 1)[:3]
    fixed = compiled.function, started.launch_cooperative_grid, started.launch_pdl
    packed = compiled.packed_metadata
    if VERSION == ["3", "6"]:
        launch, nested = _behind_descriptors(started.launch), arguments.nested

        def start(stream, values):
            given = [
                None if place is None else values[place] if type(place) is int else _filled(place, values)
                for place in nested
            ]
            launch(*size, stream, *fixed, None, None, packed, None, None, None, *given)

        return start
    launch, signature = driver.active.utils.launch, started.kernel_signature
    if len(signature) != len(arguments.values):
        raise Unknown
    kinds = [nvidia.PyKernelArg(nested_tuple=None, type=nvidia.ARG_KERNEL) for _ in signature]

    def start(stream, values):
        launch(*size, stream, *fixed, packed, None, None, None, None, None, kinds, signature, values)

    return start


def _filled(places: tuple, values: list) -> tuple:
    return tuple([None if x is None else _filled(x, values) if isinstance(x, tuple) else values[x] for x in places])


def _behind_descriptors(launch: Callable) -> Callable:
    """The C function itself, where a function that makes TMA descriptors stands before it."""
    return inspect.getclosurevars(launch).nonlocals["launcher"] if inspect.isfunction(launch) else launch


def is_unwatched(runtime) -> bool:
    """Whether no one watches launches, and Triton compiles as by default: `runtime` are its knobs."""
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # of a chain of hooks those that there are
            return False
    return not runtime.debug and runtime.add_stages_inspection_hook is None
