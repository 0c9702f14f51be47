"""The kernels of weights in integers against the reference: in Triton's interpreter, on a GPU where there is one.

Not bf16 in the interpreter, which cuts off what should be rounded.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cases.attention import errors
from cases.triton import DEVICE, GuardedAllocations, guarded, in_a_sea_of_nan
from pynlp.kernels.quantization import integer_linear, integers, linear, rounded_linear

from pynlp.reference.quantization import integers as reference

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")  # NumPy's, of the interpreter


def among_nan(x):
    """A contiguous tensor with NaN, or for integers 127, before and behind it."""
    if x is None:
        return None
    sea = torch.full((x.numel() + 128,), torch.nan if x.is_floating_point() else 127, dtype=x.dtype, device=x.device)
    sea[64 : 64 + x.numel()] = x.flatten()
    return sea[64 : 64 + x.numel()].view(x.shape)


def weight_of(bits, outputs, columns, group, affine=False, minimum=False, half=False):
    """A weight's tensors, as the launchers take them. group 0: one scale for all."""
    generator = torch.Generator().manual_seed(outputs * columns)
    weight = (torch.randn(outputs, columns, generator=generator) * columns**-0.5).to(DEVICE)
    codes, scale, zero = reference.quantize_integers(weight, bits, affine or minimum, group)
    least = (scale * (-128.0 - zero) if bits == 8 else scale * -zero) + 128 * scale * (bits == 8) if minimum else None
    dtype = torch.float16 if half else torch.float32
    parts = codes, scale.to(dtype), zero if affine else None, least.to(dtype) if minimum else None
    return [None if x is None else x.contiguous() for x in parts]


def assert_as_pytorch(ours, exact, theirs, dtype, factor):
    """An error at most `factor` times PyTorch's, and half a unit in the last place of dtype and of fp32."""
    assert ours.shape == exact.shape and ours.dtype == dtype
    size, _ = errors(exact, torch.zeros_like(exact))
    allowed = factor * errors(theirs, exact)[0] + (torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps) * size
    assert errors(ours, exact)[0] <= allowed, f"error {errors(ours, exact)[0]:.3g}, allowed {allowed:.3g}"


def check(bits, rows, outputs, columns, group=None, bias=False, dtype=torch.float32, strided=False, **kind):
    """Forward and gradient against fp64, by twice and three times the errors of PyTorch with the dense weight."""
    group = columns if group is None else group
    weight, own = weight_of(bits, outputs, columns, group, **kind), group or columns
    exact = reference.dequantize_integers(*weight, columns, own, torch.float64)
    dense = reference.dequantize_integers(*weight, columns, own, torch.float32).to(dtype)
    x = torch.randn(rows, columns, device=DEVICE).to(dtype)
    grad = torch.randn(rows, outputs, device=DEVICE).to(dtype)
    bias = torch.randn(outputs, device=DEVICE) if bias else None
    seas = [among_nan(t) for t in (*weight, bias)]
    given, given_grad = (in_a_sea_of_nan(t) if strided else among_nan(t) for t in (x, grad))
    out = guarded(integer_linear.integer_linear, given, *seas, own)
    grad_x = guarded(integer_linear.integer_linear_backward, given_grad, *seas[:-1], columns, own)
    wide = None if bias is None else bias.double()
    theirs = F.linear(x, dense, None if bias is None else bias.to(dtype))
    assert_as_pytorch(out, F.linear(x.double(), exact, wide), theirs, dtype, 2)
    assert_as_pytorch(grad_x, grad.double() @ exact, grad @ dense, dtype, 3)
    return out, grad_x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_references_codes_and_values(bits, affine, dtype):
    """Odd sizes, groups that end early, zeros, and values that are tiny, or none."""
    for shape, group in (
        ((5, 33), 33),
        ((5, 33), 0),
        ((3, 100), 48),
        ((3, 5000), 5000),
        ((3, 9000), 4800),
        ((4, 1), 1),
    ):
        x = torch.randn(shape, device=DEVICE).to(dtype)
        x[1] = 0
        x[2, :3], x[0, 0] = 0, 1e-45 if dtype == torch.float32 else 6e-8
        if group == 48:
            x[1, 50], x[2, 3] = torch.nan, torch.inf
        ours = guarded(integers.quantize_integers, among_nan(x), bits, affine, group)
        expected = [t.contiguous() for t in reference.quantize_integers(x, bits, affine, group)]
        for own, theirs in zip(ours, expected, strict=True):
            assert own.dtype == theirs.dtype
            torch.testing.assert_close(own, theirs, rtol=0, atol=0, equal_nan=True)
        codes, scale, zero = expected
        for minimum in (None, torch.randn_like(scale)):
            weight = codes, scale, zero if affine and minimum is None else None, minimum
            for half in (False, True):
                own = [t.half() if half and t is not None and t.is_floating_point() else t for t in weight]
                arguments = shape[1], group or shape[1], dtype
                values = guarded(integers.dequantize_integers, *map(among_nan, own), *arguments)
                theirs = reference.dequantize_integers(*own, *arguments)
                torch.testing.assert_close(values, theirs, rtol=0, atol=0, equal_nan=True)


LINEAR = {
    "one row": dict(bits=8, rows=1, outputs=50, columns=128),
    "one row, bias, groups": dict(bits=8, rows=1, outputs=7, columns=192, group=48, affine=True, bias=True),
    "one row, ragged": dict(bits=8, rows=1, outputs=7, columns=131, affine=True),
    "one row, 4 bits": dict(bits=4, rows=1, outputs=33, columns=128, group=32, affine=True, half=True),
    "one row, 4 bits, minima": dict(bits=4, rows=1, outputs=33, columns=96, minimum=True, bias=True),
    "channels": dict(bits=8, rows=17, outputs=50, columns=128, bias=True),
    "one scale": dict(bits=8, rows=3, outputs=7, columns=80, group=0, affine=True),
    "one scale, 4 bits": dict(bits=4, rows=17, outputs=33, columns=65, group=0),
    "blocks": dict(bits=8, rows=17, outputs=33, columns=200, group=128, affine=True, bias=True),
    "blocks, 4 bits": dict(bits=4, rows=65, outputs=33, columns=192, group=64, affine=True),
    "small groups": dict(bits=4, rows=5, outputs=7, columns=150, group=16, half=True, bias=True),
    "minima": dict(bits=8, rows=17, outputs=7, columns=128, group=64, minimum=True),
    "odd columns, 4 bits": dict(bits=4, rows=3, outputs=33, columns=65, affine=True),
    "one column": dict(bits=8, rows=2, outputs=7, columns=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_products_match_pytorch(name, dtype):
    check(**LINEAR[name], dtype=dtype, strided="row" in name)


@pytest.mark.parametrize("name", ["one row", "channels", "blocks, 4 bits", "odd columns, 4 bits"])
def test_sums_in_parts(name, monkeypatch):
    """The same bits again, near those of whole sums."""
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
    assert linear.linear_combine_kernel in started
    for x, y, z in zip(*results, whole, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_by_a_weight_in_pieces(bits, monkeypatch):
    """A piece at a time is made in x's dtype, and no more than that."""
    monkeypatch.setattr(linear, "DENSE_ROWS", 20)
    monkeypatch.setattr(linear, "DENSE_BYTES", 40 * 65 * 2)
    sizes, original = [], GuardedAllocations._allocate

    def allocate(self, shape, *more):
        sizes.append(torch.Size(shape).numel())
        return original(self, shape, *more)

    monkeypatch.setattr(GuardedAllocations, "_allocate", allocate)
    check(bits, 20, 150, 65, affine=True, bias=True, dtype=torch.float16)
    assert 40 * 65 in sizes and max(sizes) <= 20 * 150


# In parts: the sums of codes and the outliers belong to one of them.
ROUNDED = {
    "channels": dict(bits=8, rows=17, outputs=50, columns=130),
    "channels, affine": dict(bits=8, rows=3, outputs=7, columns=128, affine=True, bias=True),
    "4 bits": dict(bits=4, rows=17, outputs=33, columns=65),
    "4 bits, minima": dict(bits=4, rows=3, outputs=33, columns=96, minimum=True),
    "groups": dict(bits=8, rows=3, outputs=33, columns=200, group=128, affine=True),
    "groups, 4 bits, minima": dict(bits=4, rows=3, outputs=7, columns=128, group=64, minimum=True, half=True),
    "small groups": dict(bits=4, rows=3, outputs=7, columns=100, group=16, affine=True),
    "one scale": dict(bits=8, rows=3, outputs=7, columns=33, group=0),
    "one row": dict(bits=8, rows=1, outputs=33, columns=128, affine=True, bias=True),
    "groups of x": dict(bits=4, rows=3, outputs=7, columns=100, x_group=32),
}


def check_rounded(bits, rows, outputs, columns, group=None, bias=False, x_group=0, threshold=math.inf, **kind):
    """fp32 against the reference's products in fp64 with the x that the reference rounded."""
    group = columns if group is None else group
    weight, own = weight_of(bits, outputs, columns, group, **kind), group or columns
    x = torch.randn(rows, columns, device=DEVICE)
    x[:, columns // 2] *= 20
    if rows > 2:
        x[2] = 0
    bias = torch.randn(outputs, device=DEVICE) if bias else None
    seas = [among_nan(t) for t in (*weight, bias)]
    out = guarded(
        rounded_linear.dynamic_integer_linear, in_a_sea_of_nan(x), *seas, own, x_group, threshold
    )  # fmt: skip
    far = (x.abs() >= threshold).any(0)
    codes, scale, _ = reference.quantize_integers(x.masked_fill(far, 0.0), 8, False, x_group or columns)
    near = reference.dequantize_integers(codes, scale, None, None, columns, x_group or columns, torch.float64)
    near = torch.where(far, x.double(), near)
    exact = near @ reference.dequantize_integers(*weight, columns, own, torch.float64).T
    exact = exact if bias is None else exact + bias
    assert errors(out, exact)[0] <= 1e-6 * exact.abs().max()
    return out


@pytest.mark.parametrize(
    ("threshold", "parts"), [(math.inf, False), (math.inf, True), (10.0, True), (0.01, False)],
    ids=["rounded", "rounded, in parts", "outliers, in parts", "all outliers"],
)  # fmt: skip
@pytest.mark.parametrize("name", ROUNDED)
def test_products_with_rounded_rows(name, threshold, parts, monkeypatch):
    if parts:
        monkeypatch.setattr(linear, "LEAST", 1)
    check_rounded(**ROUNDED[name], threshold=threshold)


def test_sums_that_32_bits_do_not_hold(monkeypatch):
    """Rows of more columns than are exact go another way, to the same values."""
    torch.manual_seed(0)
    whole = check_rounded(**ROUNDED["channels, affine"])
    monkeypatch.setattr(rounded_linear, "EXACT", 100)
    monkeypatch.setattr(rounded_linear, "rounded_linear_kernel", None)
    torch.manual_seed(0)
    torch.testing.assert_close(check_rounded(**ROUNDED["channels, affine"]), whole, rtol=1e-5, atol=1e-5)


def test_a_spoiled_row_stays_alone():
    for bits in (8, 4):
        weight = weight_of(bits, 33, 80, 80, affine=True)
        for value in (torch.nan, torch.inf):
            x = torch.randn(5, 80, device=DEVICE)
            x[3, 7] = value
            out = integer_linear.integer_linear(x, *weight, None, 80)
            grad = integer_linear.integer_linear_backward(out, *weight, 80, 80)
            rounded = rounded_linear.dynamic_integer_linear(x, *weight, None, 80, 0, math.inf)
            for y in (out, grad, rounded):
                assert y.isfinite().all(dim=1).tolist() == [True, True, True, False, True]
            assert rounded[3].isnan().all()


def test_nothing_to_do():
    for bits in (8, 4):
        for rows, outputs, columns in ((0, 7, 64), (3, 0, 64), (3, 7, 0), (0, 0, 0)):
            weight = reference.quantize_integers(torch.empty(outputs, columns, device=DEVICE), bits, True, columns or 1)
            weight = [*weight, None]
            x, grad = torch.randn(rows, columns, device=DEVICE), torch.randn(rows, outputs, device=DEVICE)
            bias = torch.randn(outputs, device=DEVICE)
            for offset in (None, bias):
                out = integer_linear.integer_linear(x, *weight, offset, columns or 1)
                rounded = rounded_linear.dynamic_integer_linear(x, *weight, offset, columns or 1, 0, 6.0)
                expected = torch.zeros_like(grad) if offset is None else bias.expand(rows, outputs)
                assert out.shape == rounded.shape == (rows, outputs)
                assert columns > 0 or (torch.equal(out, expected) and torch.equal(rounded, expected))
            grad_x = integer_linear.integer_linear_backward(grad, *weight, columns, columns or 1)
            assert grad_x.shape == (rows, columns) and (grad_x == 0).all()
        empty = torch.empty(0, 5, device=DEVICE)
        for own, theirs in zip(
            integers.quantize_integers(empty, bits, True, 5), reference.quantize_integers(empty, bits, True, 5),
            strict=True,
        ):  # fmt: skip
            assert own.shape == theirs.shape and own.dtype == theirs.dtype


def test_rows_of_any_shape():
    weight = weight_of(8, 50, 64, 64)
    for shape in ((64,), (2, 3, 64), (1, 1, 64)):
        x = torch.randn(shape, device=DEVICE)
        out = integer_linear.integer_linear(x, *weight, None, 64)
        torch.testing.assert_close(out, reference.integer_linear(x, *weight, None, 64))
        grad = integer_linear.integer_linear_backward(out, *weight, 64, 64)
        torch.testing.assert_close(grad, reference.integer_linear_backward(out, *weight, 64, 64))
        out = rounded_linear.dynamic_integer_linear(x, *weight, None, 64, 0, 1.0)
        torch.testing.assert_close(out, reference.dynamic_integer_linear(x, *weight, None, 64, 0, 1.0))
