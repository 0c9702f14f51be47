"""Products of groups of rows: against fp64, in both layouts of weights, and what lies behind the last group."""

import pytest
import torch
from cases.layers import assert_as_accurate
from cases.pairs import every_pair
from torch import Tensor

from pynlp.functional import grouped_mm

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, E, K, N: whole panels and blocks; one more and one less; one expert; more experts than rows; nothing.
SHAPES = [
    (64, 2, 64, 128), (37, 4, 33, 17), (700, 3, 70, 130), (1100, 2, 300, 65), (5, 1, 8, 4), (3, 40, 5, 7), (0, 2, 3, 4),
    (9, 3, 0, 5), (9, 3, 5, 0), (4, 0, 3, 2),
]  # fmt: skip


def eager(x: Tensor, weight: Tensor, bias: Tensor, offsets: list[int]) -> Tensor:
    """Products in x's dtype and a bias added in fp32, as PyTorch computes in low precision."""
    rows = []
    for expert, (first, last) in enumerate(zip([0, *offsets], offsets, strict=False)):
        y = x[first:last] @ weight[expert]
        rows.append((y.to(bias.dtype) + bias[expert]).to(x.dtype))
    last = offsets[-1] if offsets else 0
    nothing = 0 * (x.sum() + weight.sum() + bias.sum())
    return torch.cat((*rows, (x.new_zeros(len(x) - last, weight.shape[2]) + nothing).to(x.dtype)))


def case(shape, dtype, by_lines):
    rows, experts, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    weight = randn(experts, outputs, inputs).to(dtype).mT if by_lines else randn(experts, inputs, outputs).to(dtype)
    offsets = torch.randint(rows + 1, (experts,), generator=generator).sort().values
    return randn(rows, inputs).to(dtype), weight, randn(experts, outputs), offsets


@pytest.mark.every_isa
@every_pair(shape=SHAPES, dtype=DTYPES, by_lines=[False, True])
def test_output_and_gradients(shape, dtype, by_lines, isa):
    x, weight, bias, offsets = case(shape, dtype, by_lines)

    def ours(x, weight, bias):
        return grouped_mm(x, weight, offsets, bias)

    def theirs(x, weight, bias):
        return eager(x, weight, bias.double() if x.dtype == torch.float64 else bias, offsets.tolist())

    assert_as_accurate(ours, theirs, {"x": x, "weight": weight, "bias": bias})


@pytest.mark.parametrize("by_lines", [False, True])
def test_as_torchs(by_lines):
    x, weight, _, _ = case((48, 3, 16, 32), torch.bfloat16, by_lines)
    offsets = torch.tensor([16, 24, 48], dtype=torch.int32)
    expected = torch.nn.functional.grouped_mm(x, weight, offs=offsets)
    torch.testing.assert_close(grouped_mm(x, weight, offsets), expected, rtol=2e-2, atol=2e-2)


def test_rows_behind_the_last_group_are_not_read():
    """Nor does their gradient count; the gradients of a group without rows are exactly 0."""
    x, weight, bias, _ = case((40, 4, 24, 12), torch.float32, True)
    offsets = torch.tensor([10, 10, 31, 31])
    x[31:] = torch.nan
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y = grouped_mm(x, weight, offsets, bias)
    assert y[:31].isfinite().all() and (y[31:] == 0).all()
    grad = torch.randn_like(y)
    grad[31:] = torch.inf
    grads = torch.autograd.grad(y, (x, weight, bias), grad)
    assert all(g.isfinite().all() for g in grads) and (grads[0][31:] == 0).all()
    for of_weights in grads[1:]:
        assert (of_weights[[1, 3]] == 0).all() and (of_weights[[0, 2]] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_strides(dtype, isa):
    x, weight, bias, offsets = case((900, 5, 130, 90), dtype, False)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = grouped_mm(*leaves[:2], offsets, leaves[2])
        results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    y = results[0][0]
    wide = torch.full((900, 200), torch.nan, dtype=dtype)
    wide[:, 7:137] = x
    every_other = torch.full((10, 131, 95), torch.nan, dtype=dtype)
    every_other[::2, :130, :90] = weight
    assert torch.equal(grouped_mm(wide[:, 7:137], every_other[::2, :130, :90], offsets, bias), y)
    assert torch.equal(grouped_mm(x.T.contiguous().T, weight.repeat_interleave(2, 2)[..., ::2], offsets, bias), y)


@pytest.mark.parametrize("by_lines", [False, True])
def test_gradcheck_and_opcheck(by_lines):
    x, weight, bias, offsets = case((9, 3, 4, 5), torch.float32, by_lines)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, weight, bias: grouped_mm(x, weight, offsets, bias), exact)
    op = torch.ops.pynlp.grouped_mm
    torch.library.opcheck(op, (x.requires_grad_(), weight.requires_grad_(), offsets.int(), bias.requires_grad_()))
    torch.library.opcheck(
        torch.ops.pynlp.grouped_mm_weight_backward, (torch.randn(9, 5), x.detach(), offsets.int(), by_lines, True)
    )


def test_only_what_is_needed():
    x, weight, bias, offsets = case((9, 3, 4, 5), torch.float32, False)
    for needed in range(3):
        leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate((x, weight, bias))]
        y = grouped_mm(*leaves[:2], offsets, leaves[2])
        first, again = (torch.autograd.grad(y.sum(), leaves[needed], retain_graph=True) for _ in range(2))
        assert torch.equal(first[0], again[0])
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_mm(x, weight, offsets, bias)
    assert y.dtype == torch.bfloat16


def test_one_input_and_what_compiled_code_is_given():
    x, weight = torch.randn(5, 1), torch.randn(2, 4, 8)[:, :, :1].mT
    assert torch.equal(grouped_mm(x, weight, torch.tensor([2, 5]))[2:], x[2:] @ weight[1])
    compiled = torch.compile(grouped_mm, backend="eager")
    with pytest.raises(RuntimeError, match="offsets: expected numbers from 0 to 5 that never fall, got 500000"):
        compiled(x, weight, torch.tensor([2, 500000]))


def test_errors():
    x, weight, bias, offsets = case((9, 3, 4, 5), torch.float32, False)
    for bad, shown in (([1, 0, 9], r"\[1, 0, 9\]"), ([1, 2, 10], r"\[1, 2, 10\]"), ([-1, 2, 3], r"\[-1, 2, 3\]")):
        with pytest.raises(ValueError, match=f"offsets: expected numbers from 0 to 9 that never fall, got {shown}"):
            grouped_mm(x, weight, torch.tensor(bad))
    with pytest.raises(ValueError, match=r"offsets: expected shape \(3,\), got \(2,\)"):
        grouped_mm(x, weight, offsets[:2])
    with pytest.raises(TypeError, match="offsets: expected dtype int32 or int64, got torch.float32"):
        grouped_mm(x, weight, offsets.float())
    with pytest.raises(ValueError, match=r"weight: expected shape \(E, 4, N\), got \(3, 5, 4\)"):
        grouped_mm(x, weight.mT, offsets)
    with pytest.raises(TypeError, match="weight: expected x's dtype torch.float32, got torch.float16"):
        grouped_mm(x, weight.half(), offsets)
    with pytest.raises(ValueError, match=r"bias: expected shape \(3, 5\), got \(5,\)"):
        grouped_mm(x, weight, offsets, bias[0])
    with pytest.raises(ValueError, match=r"x: expected shape \(M, K\), got \(4,\)"):
        grouped_mm(x[0], weight, offsets)
