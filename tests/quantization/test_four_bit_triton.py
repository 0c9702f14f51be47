"""The kernels of 4-bit weights against the reference: in Triton's interpreter, on a GPU where there is one.

Not bf16 in the interpreter, which cuts off what should be rounded.
"""

import pytest
import torch
import torch.nn.functional as F
from cases.attention import errors
from cases.triton import DEVICE, GuardedAllocations, guarded, in_a_sea_of_nan, triton
from pynlp.kernels.quantization import formats, linear
from pynlp.kernels.quantization.codes import pair_table, pairs_of
from triton import language as tl

from pynlp.reference.quantization import formats as reference
from pynlp.reference.quantization import linear as reference_linear

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")  # NumPy's, of the interpreter
NF4, FP4, MXFP4 = range(3)
NOT_NESTED = (None, None, None)


def among_nan(x):
    """A contiguous tensor with NaN, or for bytes 255, before and behind it."""
    if x is None:
        return None
    sea = torch.full((x.numel() + 128,), 255 if x.dtype == torch.uint8 else torch.nan, dtype=x.dtype, device=x.device)
    sea[64 : 64 + x.numel()] = x.flatten()
    return sea[64 : 64 + x.numel()].view(x.shape)


def weight_of(kind, outputs, columns, blocksize, nested=False):
    """A weight's tensors, as the launchers take them."""
    generator = torch.Generator().manual_seed(outputs * columns)
    weight = (torch.randn(outputs, columns, generator=generator) * columns**-0.5).to(DEVICE)
    packed, absmax = reference.quantize_4bit(weight, blocksize, kind)
    return [packed, *(reference.nest(absmax) if nested else (absmax, *NOT_NESTED))]


def dense(weight, outputs, columns, blocksize, kind, dtype=torch.float64):
    count = outputs * columns
    return reference.dequantize_4bit(*weight, count, blocksize, kind, dtype).view(outputs, columns)


def assert_as_pytorch(ours, exact, theirs, dtype, factor):
    """An error at most `factor` times PyTorch's, and half a unit in the last place of dtype and of fp32."""
    assert ours.shape == exact.shape and ours.dtype == dtype
    size, _ = errors(exact, torch.zeros_like(exact))
    allowed = factor * errors(theirs, exact)[0] + (torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps) * size
    assert errors(ours, exact)[0] <= allowed, f"error {errors(ours, exact)[0]:.3g}, allowed {allowed:.3g}"


def check(kind, rows, outputs, columns, blocksize=64, nested=False, bias=False, dtype=torch.float32, strided=False):
    """Forward and gradient against fp64, by twice and three times the errors of PyTorch with the dense weight."""
    weight = weight_of(kind, outputs, columns, blocksize, nested)
    shape = (outputs, columns, blocksize, kind)
    exact, own = dense(weight, *shape), dense(weight, *shape, torch.float32).to(dtype)
    x = torch.randn(rows, columns, device=DEVICE).to(dtype)
    grad = torch.randn(rows, outputs, device=DEVICE).to(dtype)
    bias = torch.randn(outputs, device=DEVICE) if bias else None
    seas = [among_nan(t) for t in (*weight, bias)]
    given, given_grad = (in_a_sea_of_nan(t) if strided else among_nan(t) for t in (x, grad))
    out = guarded(linear.linear_4bit, given, *seas, outputs, blocksize, kind)
    grad_x = guarded(linear.linear_4bit_backward, given_grad, *seas[:-1], columns, blocksize, kind)
    wide = None if bias is None else bias.double()
    theirs = F.linear(x, own, None if bias is None else bias.to(dtype))
    assert_as_pytorch(out, F.linear(x.double(), exact, wide), theirs, dtype, 2)
    assert_as_pytorch(grad_x, grad.double() @ exact, grad @ own, dtype, 3)
    return out, grad_x


@pytest.mark.parametrize("kind", [NF4, FP4, MXFP4])
def test_the_constants_are_the_references(kind):
    name, form = formats.KINDS[kind], reference.FORMATS[kind]
    assert reference.QUANT_TYPES[kind] == name
    assert formats.codes(name) == torch.tensor(form.codes).tolist() and formats.order(name) == form.order
    middles, included = torch.tensor(formats.middles(name)), torch.tensor(formats.included(name))
    below = torch.nextafter(middles, torch.tensor(-torch.inf))
    torch.testing.assert_close(torch.where(included, below, middles), reference.thresholds(kind), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("kind", [NF4, FP4, MXFP4])
def test_the_references_bytes(kind, blocksize, dtype):
    """Odd numbers of values, blocks of zeros and of subnormal numbers, and values between two codes."""
    if kind == MXFP4:
        blocksize = 32
    form = reference.FORMATS[kind]
    codes = torch.tensor(form.codes)[list(form.order)]
    steps = torch.stack((codes[:-1], (codes[:-1] + codes[1:]) / 2, codes[1:])).flatten()
    steps = torch.cat((steps, torch.nextafter(steps, torch.tensor(1.0)), steps.new_tensor([-0.0])))
    tiny = torch.tensor([1e-40, -3e-41, 1e-45, 0.0]) if dtype == torch.float32 else torch.tensor([6e-8, -1.2e-7, 0.0])
    for x in (torch.randn(1), torch.zeros(33), torch.randn(3, 64), torch.randn(10203) * 3, steps, tiny):
        x = x.to(dtype).to(DEVICE)
        packed, absmax = guarded(formats.quantize_4bit, among_nan(x), blocksize, kind)
        expected = reference.quantize_4bit(x, blocksize, kind)
        assert torch.equal(absmax, expected[1]) and torch.equal(packed, expected[0])


@pytest.mark.parametrize("kind", [NF4, FP4])
def test_a_scale_tells_of_nan(kind):
    x = torch.ones(4, 64, device=DEVICE)
    x[1, 5], x[2, 6], x[2, 7] = torch.nan, torch.inf, torch.nan
    x[3, 8] = -torch.inf
    _, absmax = formats.quantize_4bit(x, 64, kind)
    torch.testing.assert_close(absmax.cpu(), torch.tensor([1.0, torch.nan, torch.nan, torch.inf]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", [NF4, FP4, MXFP4])
def test_the_references_values(kind, nested, dtype):
    for count, blocksize in ((1, 64), (64, 64), (9000, 32), (20001, 64), (16384, 4096)):
        blocksize = 32 if kind == MXFP4 else blocksize
        weight = weight_of(kind, 1, count, blocksize, nested and kind != MXFP4)
        values = guarded(formats.dequantize_4bit, *map(among_nan, weight), count, blocksize, kind, dtype)
        assert torch.equal(values, reference.dequantize_4bit(*weight, count, blocksize, kind, dtype))


def test_every_byte_and_every_scale_of_mxfp4():
    packed = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat_interleave(16).roll(8)
    for kind, absmax in ((NF4, torch.rand(256)), (FP4, torch.rand(256)), (MXFP4, torch.arange(256).byte())):
        arguments = (packed, absmax.to(DEVICE), *NOT_NESTED, 8192, 32, kind, torch.float32)
        values, expected = formats.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments)
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
        known = ~expected.isnan()
        assert torch.equal(values.signbit()[known], expected.signbit()[known])


LINEAR = {
    "one row": dict(kind=NF4, rows=1, outputs=50, columns=128),
    "one row, ragged": dict(kind=NF4, rows=1, outputs=7, columns=192, blocksize=32, bias=True),
    "one row, nested": dict(kind=NF4, rows=1, outputs=50, columns=256, nested=True),
    "one row, mxfp4": dict(kind=MXFP4, rows=1, outputs=50, columns=96, blocksize=32, bias=True),
    "nested": dict(kind=NF4, rows=17, outputs=50, columns=64, nested=True, bias=True),
    "fp4": dict(kind=FP4, rows=3, outputs=7, columns=128, blocksize=32),
    "mxfp4": dict(kind=MXFP4, rows=17, outputs=33, columns=96, blocksize=32, bias=True),
    "65 rows": dict(kind=NF4, rows=65, outputs=7, columns=64),
    "one output": dict(kind=NF4, rows=3, outputs=1, columns=64, bias=True),
    "large blocks": dict(kind=FP4, rows=5, outputs=33, columns=256, blocksize=256),
    "columns in no whole blocks": dict(kind=NF4, rows=17, outputs=50, columns=80, bias=True),
    "odd columns": dict(kind=NF4, rows=3, outputs=33, columns=65, nested=True),
    "odd columns, mxfp4": dict(kind=MXFP4, rows=1, outputs=50, columns=33, blocksize=32),
    "one column": dict(kind=FP4, rows=2, outputs=7, columns=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_products_match_pytorch(name, dtype):
    check(**LINEAR[name], dtype=dtype, strided="row" in name)


@pytest.mark.parametrize("name", ["one row, nested", "nested", "odd columns", "mxfp4", "65 rows"])
def test_sums_in_parts(name, monkeypatch):
    """The same bits again, near those of whole sums, by two kernels a product."""
    case = LINEAR[name] | dict(columns=LINEAR[name]["columns"] * 2)
    torch.manual_seed(0)
    whole = check(**case)
    monkeypatch.setattr(linear, "LEAST", 1)
    started, launch = [], linear.launch

    def counted(kernel, *arguments, **options):
        started.append(kernel)
        return launch(kernel, *arguments, **options)

    monkeypatch.setattr(linear, "launch", counted)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(check(**case))
    assert linear.linear_combine_kernel in started and len(started) <= 8
    for x, y, z in zip(*results, whole, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)


@triton.jit
def pairs_kernel(p_first, p_second, KIND: tl.constexpr, NARROW: tl.constexpr):
    b_byte = tl.arange(0, 256)
    b_first, b_second = pairs_of(pair_table(KIND, NARROW), b_byte, KIND)
    tl.store(p_first + b_byte, b_first)
    tl.store(p_second + b_byte, b_second)


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
@pytest.mark.parametrize("kind", [NF4, FP4, MXFP4])
def test_pairs_of_each_byte(kind, narrow):
    """Exact or, but for mxfp4's, to 8 significant bits."""
    first, second = torch.empty(2, 256, device=DEVICE)
    pairs_kernel[(1,)](first, second, KIND=formats.KINDS[kind], NARROW=narrow)
    codes, byte = torch.tensor(formats.codes(formats.KINDS[kind]), device=DEVICE), torch.arange(256, device=DEVICE)
    halves = [codes[byte >> 4], codes[byte & 15]]
    for ours, exact in zip((first, second), halves[::-1] if kind == MXFP4 else halves, strict=True):
        if narrow and kind != MXFP4:
            assert ((ours - exact).abs() <= exact.abs() * 2.0**-8 + 1e-40).all()
            assert torch.equal(ours.signbit(), exact.signbit())
        else:
            assert torch.equal(ours.view(torch.int32), exact.view(torch.int32))


@pytest.mark.parametrize("name", ["one row, nested", "fp4", "nested", "mxfp4", "odd columns"])
def test_products_with_narrow_codes(name, monkeypatch):
    """Forward and gradient with the codes of bf16, as near as PyTorch with a weight in bf16."""
    case = dict(bias=False, blocksize=64, nested=False) | LINEAR[name]
    kind, rows, outputs, columns, blocksize = (case[k] for k in ("kind", "rows", "outputs", "columns", "blocksize"))
    monkeypatch.setattr(linear, "NARROW", (torch.float32,))
    weight, shape = weight_of(kind, outputs, columns, blocksize, case["nested"]), (outputs, columns, blocksize, kind)
    exact, theirs = dense(weight, *shape), dense(weight, *shape, torch.float32).bfloat16().float()
    x, grad = torch.randn(rows, columns, device=DEVICE), torch.randn(rows, outputs, device=DEVICE)
    out = linear.linear_4bit(x, *weight, None, outputs, blocksize, kind)
    grad_x = linear.linear_4bit_backward(grad, *weight, columns, blocksize, kind)
    assert_as_pytorch(out, x.double() @ exact.T, x @ theirs.T, torch.float32, 2)
    assert_as_pytorch(grad_x, grad.double() @ exact, grad @ theirs, torch.float32, 3)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("columns", [64, 65])
def test_many_rows_by_a_weight_in_pieces(columns, bias, monkeypatch):
    """A piece at a time is made in x's dtype, and no more than that."""
    monkeypatch.setattr(linear, "DENSE_ROWS", 20)
    monkeypatch.setattr(linear, "DENSE_BYTES", 64 * 65 * 2)
    sizes, empty = [], torch.empty
    original = GuardedAllocations._allocate

    def allocate(self, shape, *more):
        sizes.append(torch.Size(shape).numel())
        return original(self, shape, *more)

    monkeypatch.setattr(GuardedAllocations, "_allocate", allocate)
    check(NF4, 20, 150, columns, nested=True, bias=bias, dtype=torch.float16)
    assert torch.empty is empty and max(sizes) <= max(64 * 65, 20 * 150)


def test_nothing_to_do():
    for rows, outputs, columns in ((0, 7, 64), (3, 0, 64), (3, 7, 0), (0, 0, 0)):
        weight = [
            x.to(DEVICE) for x in (torch.empty(outputs * columns // 2, 1).byte(), torch.empty(outputs * columns // 64))
        ]
        x, grad = torch.randn(rows, columns, device=DEVICE), torch.randn(rows, outputs, device=DEVICE)
        bias = torch.randn(outputs, device=DEVICE)
        for offset in (None, bias):
            out = linear.linear_4bit(x, *weight, *NOT_NESTED, offset, outputs, 64, NF4)
            expected = torch.zeros_like(grad) if offset is None else bias.expand(rows, outputs)
            assert out.shape == (rows, outputs) and (torch.equal(out, expected) or columns > 0)
        grad_x = linear.linear_4bit_backward(grad, *weight, *NOT_NESTED, columns, 64, NF4)
        assert grad_x.shape == (rows, columns) and (grad_x == 0).all()
    packed, absmax = formats.quantize_4bit(torch.empty(0, 5, device=DEVICE), 64, NF4)
    assert packed.shape == (0, 1) and absmax.shape == (0,)
    assert formats.dequantize_4bit(packed, absmax, *NOT_NESTED, 0, 64, NF4, torch.float16).shape == (0,)


def test_rows_of_any_shape():
    weight = weight_of(NF4, 50, 64, 64)
    for shape in ((64,), (2, 3, 64), (1, 1, 64)):
        x = torch.randn(shape, device=DEVICE)
        out = linear.linear_4bit(x, *weight, None, 50, 64, NF4)
        expected = reference_linear.linear_4bit(x, *weight, None, 50, 64, NF4)
        torch.testing.assert_close(out, expected)
        grad = linear.linear_4bit_backward(out, *weight, 64, 64, NF4)
        torch.testing.assert_close(grad, reference_linear.linear_4bit_backward(out, *weight, 64, 64, NF4))


def test_a_spoiled_row_stays_alone():
    weight = weight_of(NF4, 33, 80, 64)
    x = torch.randn(5, 80, device=DEVICE)
    x[3, 7] = torch.nan
    out = linear.linear_4bit(x, *weight, None, 33, 64, NF4)
    grad = linear.linear_4bit_backward(out, *weight, 80, 64, NF4)
    for y in (out, grad):
        assert y.isnan().any(dim=1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"])
def test_the_tiles_of_each_number_of_rows(chip):
    """None has a step more rows than there are."""
    for kernel in ("forward", "backward"):
        for item_size, ragged in ((2, False), (4, False), (2, True)):
            every = [c.block_m for c in linear.configs(kernel, chip, 5000, item_size, ragged)]
            assert every == sorted(every, reverse=True)
            for rows in (1, 16, 17, 64, 100):
                tiles = [c.block_m for c in linear.configs(kernel, chip, rows, item_size, ragged)]
                assert tiles == [
                    size for size in every if size <= min((s for s in every if s >= rows), default=every[0])
                ]
