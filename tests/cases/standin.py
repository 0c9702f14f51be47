"""What plans hand to Triton's C launcher, held against what the launchers do, over a driver that is not there.

plans/test_standin.py runs it in a process of its own, `python -m cases.standin [draws]`: it compiles kernels, which the
other tests, in Triton's interpreter, do not.
"""

import random
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
import triton
from pynlp.kernels.common import starts
from torch import Tensor
from tqdm import tqdm
from triton.backends.nvidia import driver as nvidia

from benchmarks import standin
from pynlp.functional import (
    QuantState4bit,
    QuantStateInt4,
    QuantStateInt8,
    alibi_slopes,
    attention,
    attention_decode,
    attention_varlen,
    gelu,
    grouped_mm,
    int4_linear,
    int8_dynamic_linear,
    int8_linear,
    layer_norm,
    linear_4bit,
    linear_cross_entropy,
    moe_mlp,
    rms_norm,
    rotary_tables,
    swiglu,
)
from pynlp.ops.common import plans

launches: list[list] = []  # of the kernels that were started: all that the C launcher was given, tuples opened
descriptors: dict[int, tuple] = {}  # what TMA descriptors were made of, by their id
kept: list = []  # so that no other gets the id of one of them


def spy() -> None:
    """Has the driver's C functions note their arguments."""
    utils = standin.driver().utils
    launch, describe, annotate = utils.launch, utils.fill_tma_descriptor_tiled, nvidia.annotate_arguments
    signatures = {}  # by the id of what Triton makes of them, which cannot be read

    def noted_annotations(signature):
        result = annotate(signature)
        kept.append(result)
        signatures[id(result)] = signature
        return result

    def opened(signature, arguments) -> list:
        result = []
        for kind, argument in zip(signature, arguments, strict=True):
            if isinstance(kind, tuple):
                result += opened(kind, argument)
            elif kind != "constexpr":
                result.append(argument)
        return result

    def noted_launch(*arguments):
        *fixed, annotations, signature, values = arguments
        fixed[8:11] = [None] * 3  # metadata for hooks, and the hooks
        opened_values = opened(signatures[id(annotations)], values) if id(annotations) in signatures else values
        launches.append([*fixed, signature, *opened_values])
        return launch(*arguments)

    def noted_descriptor(address, *known):
        result = describe(address, *known)
        kept.append(result)
        descriptors[id(result)] = (address, *(list(x) if isinstance(x, list | tuple) else x for x in known))
        return result

    utils.launch, utils.fill_tma_descriptor_tiled = noted_launch, noted_descriptor
    nvidia.annotate_arguments = noted_annotations


def seen(function: Callable) -> list[list]:
    """The launches of a call."""
    launches.clear()
    function()
    return [list(launch) for launch in launches]


def is_planned(started: list[list]) -> bool:
    """Whether kernels were given addresses: the launchers give tensors."""
    return bool(started) and not any(isinstance(x, Tensor) for launch in started for x in launch)


def same(planned: object, whole: object, inputs: list[Tensor]) -> bool:
    """Whether two arguments are the same, but that each call has memory of its own for its results."""
    if isinstance(whole, Tensor):
        return isinstance(planned, int) and same_address(planned, whole.data_ptr(), inputs)
    if id(whole) in descriptors:
        (address, *known), (other, *others) = descriptors[id(planned)], descriptors[id(whole)]
        return known == others and same_address(address, other, inputs)
    return type(planned) is type(whole) and planned == whole


def same_address(planned: int, whole: int, inputs: list[Tensor]) -> bool:
    for x in inputs:
        start = x.untyped_storage().data_ptr()
        if start <= whole < start + max(1, x.untyped_storage().nbytes()):
            return planned == whole
    return (planned == 0) == (whole == 0) and planned % 16 == whole % 16


def check(function: Callable, inputs: list[Tensor], name: str) -> None:
    """A later call of a kind starts the kernels of a call without plans, with the same arguments."""
    with plans.off():
        whole = seen(function)
    for _ in range(4):  # a backward pass is planned after its forward pass is
        function()
    planned = seen(function)
    assert whole and is_planned(planned), f"{name}: no plan"
    assert len(planned) == len(whole), f"{name}: {len(planned)} launches for {len(whole)}"
    for number, (a, b) in enumerate(zip(planned, whole, strict=True)):
        assert len(a) == len(b), f"{name}: launch {number} has {len(a)} arguments for {len(b)}"
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            assert same(x, y, inputs), f"{name}: launch {number}, argument {place}: {x} for {y}"


class Draw:
    """A call with shapes, layouts and options that are drawn."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.inputs: list[Tensor] = []
        self.dtype = self.random.choice((torch.bfloat16, torch.float16, torch.float32))

    def size(self, *more: int) -> int:
        return self.random.choice((1, 2, 15, 16, 17, 48, *more))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        """A tensor that starts somewhere, and whose rows may be apart."""
        dtype, offset, gap = dtype or self.dtype, self.random.choice((0, 0, 1, 4, 8)), self.random.choice((0, 0, 1, 8))
        rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
        memory = torch.randn(offset + rows * (columns + gap)).to(dtype)
        self.inputs.append(memory)
        x = memory[offset:].view(rows, columns + gap)[:, :columns].unflatten(0, shape[:-1] or (1,))
        x = x if len(shape) > 1 else x[0]
        return x.requires_grad_() if grad else x

    def use(self, options: dict) -> dict:
        """The options, whose tensors are the call's inputs, too."""
        for value in options.values():
            self.inputs += [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, Tensor)]
        return options

    def both_ways(self, function: Callable) -> Callable:
        """The call, forward and, by chance, backward."""
        if self.random.random() < 0.4:
            return function

        def call():
            result = function()
            result = result[0] if isinstance(result, tuple) else result
            result.backward(torch.ones_like(result))

        return call


def draw_gelu(draw: Draw) -> Callable:
    x = draw.tensor(draw.size(), draw.size(100), grad=True)
    dropout = draw.random.choice((0.0, 0.3))
    return draw.both_ways(lambda: gelu(x, dropout_p=dropout))


def draw_swiglu(draw: Draw) -> Callable:
    rows, columns = draw.size(), 2 * draw.size(64)
    x, up = draw.tensor(rows, columns, grad=True), draw.tensor(rows, columns, grad=True)
    if draw.random.random() < 0.5:
        return draw.both_ways(lambda: swiglu(x))
    return draw.both_ways(lambda: swiglu(x, up))


def draw_norm(draw: Draw) -> Callable:
    rows, columns = draw.size(), draw.size(1000, 20000)
    x, residual = draw.tensor(rows, columns, grad=True), draw.tensor(rows, columns, grad=True)
    weight, bias = (draw.tensor(columns, dtype=torch.float32, grad=True) for _ in range(2))
    options = {"residual": residual} if draw.random.random() < 0.5 else {}
    options |= {"dropout_p": 0.2} if draw.random.random() < 0.3 else {}
    if draw.random.random() < 0.5:
        return draw.both_ways(lambda: rms_norm(x, weight, **options))
    return draw.both_ways(lambda: layer_norm(x, weight, bias, **options))


def draw_attention(draw: Draw) -> Callable:
    batch, heads, seqlen, dim = draw.random.choice((1, 2)), 2, draw.size(100), draw.random.choice((16, 24, 64))
    q, k, v = (draw.tensor(batch, seqlen, heads, dim, grad=True) for _ in range(3))
    options = {"causal": True} if draw.random.random() < 0.5 else {}
    if draw.random.random() < 0.3:
        options["rotary"] = rotary_tables(128, 16)
    elif draw.random.random() < 0.3:
        options["relative_bias"] = torch.randn(32, heads)
    elif draw.random.random() < 0.3:
        options["alibi_slopes"] = alibi_slopes(heads)
    if draw.random.random() < 0.3:
        options["key_lengths"] = torch.full((batch,), seqlen, dtype=torch.int32)
    draw.use(options)
    return draw.both_ways(lambda: attention(q, k, v, **options))


def draw_varlen(draw: Draw) -> Callable:
    total, heads, dim = draw.size(100), 2, draw.random.choice((16, 64))
    q, k, v = (draw.tensor(total, heads, dim, grad=True) for _ in range(3))
    starts = torch.tensor([0, total // 2, total], dtype=draw.random.choice((torch.int32, torch.int64)))
    options = {"causal": True, "rotary": rotary_tables(128, 16)} if draw.random.random() < 0.5 else {}
    draw.use(options | {"starts": starts})
    return draw.both_ways(lambda: attention_varlen(q, k, v, starts, starts, **options))


def draw_decode(draw: Draw) -> Callable:
    batch, capacity, dim = draw.random.choice((1, 3)), draw.random.choice((64, 4096)), draw.random.choice((16, 64))
    q = draw.tensor(batch, 1, 4, dim)
    k_cache, v_cache = (torch.randn(batch, capacity, 2, dim).to(draw.dtype) for _ in range(2))
    lengths, options = torch.full((batch,), 17, dtype=torch.int32), {}
    if draw.random.random() < 0.5:
        pages = torch.arange(batch * capacity // 16, dtype=torch.int32).view(batch, -1)
        k_cache, v_cache = (x.view(-1, 16, 2, dim) for x in (k_cache, v_cache))
        options["block_table"] = pages
    if draw.random.random() < 0.6:
        options |= {"k": draw.tensor(batch, 1, 2, dim), "v": draw.tensor(batch, 1, 2, dim)}
    if draw.random.random() < 0.3:
        options["rotary"] = rotary_tables(5000, 16)
    if draw.random.random() < 0.3:
        options["relative_bias"] = torch.randn(32, 4)
    draw.inputs += [k_cache, v_cache, lengths]
    draw.use(options)
    return lambda: attention_decode(q, k_cache, v_cache, lengths, **options)


def draw_linear_4bit(draw: Draw) -> Callable:
    rows, outputs, columns = draw.size(200), draw.size(500), draw.random.choice((64, 256, 1024, 96, 33))
    x, blocks = draw.tensor(rows, columns, grad=True), -(-outputs * columns // 64)
    packed = torch.randint(256, ((outputs * columns + 1) // 2, 1)).byte()
    state = QuantState4bit("nf4", 64, (outputs, columns), torch.float32, torch.rand(blocks))
    if draw.random.random() < 0.5:
        nested = torch.rand(-(-blocks // 256)), torch.rand(()), torch.randn(256)
        state = QuantState4bit(*state[:4], torch.randint(256, (blocks,)).byte(), *nested)
    bias = draw.tensor(outputs, dtype=torch.float32) if draw.random.random() < 0.5 else None
    draw.inputs += [packed, *(part for part in state if isinstance(part, Tensor))]
    return draw.both_ways(lambda: linear_4bit(x, packed, state, bias))


def draw_integers(draw: Draw) -> Callable:
    rows, outputs, columns = draw.size(200), draw.size(500), draw.random.choice((64, 256, 1024, 96, 33))
    x, group = draw.tensor(rows, columns, grad=True), draw.random.choice((16, 64, max(columns, 1)))
    scale = torch.rand(outputs, -(-columns // group))
    zero = torch.randint(-8, 8, scale.shape).to(torch.int8) if draw.random.random() < 0.5 else None
    bias = draw.tensor(outputs, dtype=torch.float32) if draw.random.random() < 0.5 else None
    activations, threshold = draw.random.choice((None, "int8")), draw.random.choice((None, 6.0))
    draw.inputs += [scale] if zero is None else [scale, zero]
    if draw.random.random() < 0.5:
        codes = torch.randint(256, (outputs, (columns + 1) // 2)).byte()
        draw.inputs.append(codes)
        state = QuantStateInt4(group, columns, torch.float32, scale, zero)
        return draw.both_ways(lambda: int4_linear(x, codes, state, bias, activations=activations))
    codes = torch.randint(-128, 128, (outputs, columns)).to(torch.int8)
    draw.inputs.append(codes)
    state = QuantStateInt8(group, torch.float32, scale, zero)
    if draw.random.random() < 0.5:
        return draw.both_ways(lambda: int8_dynamic_linear(x, codes, state, bias, outlier_threshold=threshold))
    return draw.both_ways(lambda: int8_linear(x, codes, state, bias, activations=activations))


def draw_moe(draw: Draw) -> Callable:
    tokens, experts, hidden, inner = draw.size(200), draw.random.choice((1, 4, 40)), draw.size(64), draw.size(64)
    x = draw.tensor(tokens, hidden, grad=True)
    by_lines, biased = draw.random.random() < 0.5, draw.random.random() < 0.5

    def projection(outputs: int, inputs: int) -> Tensor:
        if by_lines:
            return draw.tensor(experts, outputs, inputs, grad=True)
        return draw.tensor(experts, inputs, outputs, grad=True).mT

    if draw.random.random() < 0.3:
        weight, bias = projection(inner, hidden).mT, draw.tensor(experts, inner, dtype=torch.float32)
        offsets = torch.arange(experts, dtype=torch.int32) * tokens // experts
        draw.inputs.append(offsets)
        return draw.both_ways(lambda: grouped_mm(x, weight, offsets, bias if biased else None))
    activation, top_k = draw.random.choice(("swiglu", "gelu", "swiglu_oai")), draw.random.choice((1, 3))
    outputs = inner if activation == "gelu" else 2 * inner
    index = torch.randint(-1, experts, (tokens, top_k))
    weights = draw.tensor(tokens, top_k, dtype=torch.float32, grad=True)
    biases = [draw.tensor(experts, size, dtype=torch.float32) if biased else None for size in (outputs, hidden)]
    gate_up, down = projection(outputs, hidden), projection(hidden, inner)
    draw.inputs.append(index)
    interleaved = draw.random.random() < 0.5
    return draw.both_ways(lambda: moe_mlp(
        x, index, weights, gate_up, down, activation=activation, gate_up_bias=biases[0], down_bias=biases[1],
        interleaved=interleaved,
    ))  # fmt: skip


DRAWS = {
    "gelu": draw_gelu,
    "swiglu": draw_swiglu,
    "norm": draw_norm,
    "attention": draw_attention,
    "varlen": draw_varlen,
    "decode": draw_decode,
    "linear_4bit": draw_linear_4bit,
    "integers": draw_integers,
    "moe": draw_moe,
}


@contextmanager
def changed(owner: object, name: str, value: object):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def check_traps() -> None:
    """Where Triton is watched, or set to something else, a plan is not used."""
    x = torch.randn(8, 64)
    for _ in range(3):
        gelu(x)
    assert is_planned(seen(lambda: gelu(x)))
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        watched = []
        note = watched.append  # each access makes another one
        hook.add(note)
        assert not is_planned(seen(lambda: gelu(x))) and watched, "a hook on launches was not called"
        hook.remove(note)
    with changed(runtime, "launch_exit_hook", lambda metadata: None):
        assert not is_planned(seen(lambda: gelu(x)))
    with changed(runtime, "launch_exit_hook", None):
        assert is_planned(seen(lambda: gelu(x)))
    with changed(runtime, "add_stages_inspection_hook", lambda *arguments: ("", "")):
        assert not is_planned(seen(lambda: gelu(x)))
    with changed(runtime, "debug", True):
        assert not is_planned(seen(lambda: gelu(x)))
    y = torch.randn(8, 64)
    with changed(starts, "VERSION", ["4", "0"]):
        z = torch.randn(9, 64)
        for _ in range(4):
            assert not is_planned(seen(lambda: gelu(z))), "a plan for a version of Triton that is not known"
    y.untyped_storage().resize_(0)
    assert not is_planned(seen(lambda: gelu(y))), "a launch with an address that is null"
    assert is_planned(seen(lambda: gelu(x)))


def check_launches() -> None:
    """A step of decoding is three launches at most."""
    q, k, v = (torch.randn(2, 1, heads, 64) for heads in (4, 2, 2))
    caches = torch.randn(2, 2, 4096, 2, 64)
    options = {"rotary": rotary_tables(4096, 64), "relative_bias": torch.randn(32, 4)}
    lengths = torch.full((2,), 100, dtype=torch.int32)
    pages = {"block_table": torch.arange(256, dtype=torch.int32).view(2, 128)}
    for shape, layout in ((caches.shape, {}), ((2, 256, 32, 2, 64), pages)):
        for new in ({"k": k, "v": v}, {}):
            step = partial(attention_decode, q, *caches.view(shape), lengths, **options, **layout, **new)
            for _ in range(4):
                assert len(seen(step)) <= 3, f"{len(launches)} launches"


def check_values_in_keys() -> None:
    """Values that are channels of the keys are read with them: a plan for such a call would be wrong for others."""
    q, keys, other = torch.randn(2, 1, 4, 64), *torch.randn(2, 2, 64, 1, 64)
    lengths, inside, apart = torch.tensor([5, 9], dtype=torch.int32), keys[..., 16:48], other[..., 16:48]
    with plans.off():
        (of_apart,) = {launch[4] for launch in seen(partial(attention_decode, q, keys, apart, lengths))[1:]}
        (of_inside,) = {launch[4] for launch in seen(partial(attention_decode, q, keys, inside, lengths))[1:]}
    assert of_apart != of_inside
    for _ in range(4):
        *_, last = seen(partial(attention_decode, q, keys, inside, lengths))
        assert last[4] == of_inside
    for _ in range(4):
        *_, last = seen(partial(attention_decode, q, keys, apart, lengths))
        assert last[4] == of_apart, "values from among the keys"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that CPU kernels are overridden is meant
    spy()
    with standin.gpu():
        check_traps()
        check_launches()
        for seed in tqdm(range(count), desc="draws", disable=None):
            for name, make in DRAWS.items():
                draw = Draw(seed)
                check(make(draw), draw.inputs, f"{name}, draw {seed}")
        # The loss checks its targets' values; its op has a plan of its own.
        x, weight, target = torch.randn(4, 64, requires_grad=True), torch.randn(64, 64), torch.randint(64, (4,))
        for _ in range(3):
            linear_cross_entropy(x, weight, target)
        assert is_planned(seen(lambda: linear_cross_entropy(x, weight, target)))
        check_values_in_keys()
    print(f"{count} draws of {', '.join(DRAWS)}: the same launches")


if __name__ == "__main__":
    main()
