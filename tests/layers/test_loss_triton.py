"""The loss's launcher and kernel against PyTorch in fp64: in Triton's interpreter, on a GPU where there is one.

Not bf16 in the interpreter, which cuts off what should be rounded.
"""

import pytest
import torch
import torch.nn.functional as F
from cases.attention import errors
from cases.triton import DEVICE, GuardedAllocations, in_a_sea_of_nan
from pynlp.kernels.layers import loss

CASES = {
    "plain": dict(),
    "smoothing": dict(label_smoothing=0.1),
    "softcap": dict(softcap=2.0, label_smoothing=0.2),
    "z_loss": dict(z_loss=0.01),
    "all": dict(softcap=5.0, label_smoothing=0.1, z_loss=0.01, ignore_index=3),
}
NAMES = ("loss", "gradient of x", "gradient of weight", "gradient of bias")


def make_case(rows, dim, vocabulary, dtype, ignore_index=-100):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, dim, generator=generator).to(dtype).to(DEVICE)
    weight = (torch.randn(vocabulary, dim, generator=generator) * dim**-0.5).to(dtype).to(DEVICE)
    bias = torch.randn(vocabulary, generator=generator).to(DEVICE)
    target = torch.randint(vocabulary, rows, generator=generator)
    target = target.masked_fill(torch.rand(rows, generator=generator) < 0.2, ignore_index).to(DEVICE)
    row_scale = torch.rand(rows, generator=generator).to(DEVICE) / 100
    return x, weight, bias, target, row_scale


def pytorch(x, weight, bias, target, row_scale, *, label_smoothing, ignore_index, softcap, z_loss):
    """The weighted sum of the losses and its gradients by PyTorch's operators, projected in x's dtype."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    logits = F.linear(leaves[0], leaves[1]).to(torch.promote_types(x.dtype, torch.float32)) + leaves[2]
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options).view(target.shape)
    losses = losses + z_loss * logits.logsumexp(-1).square() * (target != ignore_index)
    # As with a scaler of fp16: gradients of a sum a thousand times as large.
    gradients = torch.autograd.grad((losses * row_scale * 1024).sum(), leaves)
    return (losses * row_scale).sum().detach(), *(gradient.float() / 1024 for gradient in gradients), losses.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "dim", "vocabulary"), [((5, 3), 20, 33), ((300,), 8, 100), ((2,), 16, 5000)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_match_pytorch(name, rows, dim, vocabulary, dtype, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 1)  # chunks of 256 rows
    options = dict(label_smoothing=0.0, ignore_index=-100, softcap=0.0, z_loss=0.0) | CASES[name]
    x, weight, bias, target, row_scale = make_case(rows, dim, vocabulary, dtype, options["ignore_index"])
    peer = pytorch(x, weight, bias, target, row_scale, **options)
    exact = pytorch(x.double(), weight.double(), bias.double(), target, row_scale.double(), **options)
    apart = in_a_sea_of_nan(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
    allocations = GuardedAllocations()
    with allocations.active():
        ours = loss.linear_cross_entropy(apart, weight, bias, target, row_scale, True, True, True, **options)
        losses, *nothing = loss.linear_cross_entropy(apart, weight, bias, target, None, False, False, False, **options)
    allocations.check()
    assert all(x.numel() == 0 for x in nothing)
    for name, value, expected, other in zip((*NAMES, "losses"), (*ours, losses), exact, peer, strict=True):
        assert value.shape == expected.shape and value.dtype == torch.float32, name
        size, _ = errors(expected, torch.zeros_like(expected))
        allowed = (3 if name.startswith("gradient") else 2) * errors(other, expected.double())[0]
        allowed += (torch.finfo(dtype).eps if name.startswith("gradient") else torch.finfo(torch.float32).eps) * size
        error, _ = errors(value, expected.double())
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def test_only_what_is_needed():
    x, weight, bias, target, row_scale = make_case((7,), 8, 20, torch.float32)
    options = dict(label_smoothing=0.0, ignore_index=-100, softcap=0.0, z_loss=0.0)
    whole = loss.linear_cross_entropy(x, weight, bias, target, row_scale, True, True, True, **options)
    for number in range(3):
        needs = [n == number for n in range(3)]
        some = loss.linear_cross_entropy(x, weight, bias, target, row_scale, *needs, **options)
        assert torch.equal(some[0], whole[0])
        for n in range(3):
            assert torch.equal(some[1 + n], whole[1 + n]) if needs[n] else some[1 + n].numel() == 0


def test_no_rows():
    x, weight, bias, target, row_scale = make_case((2, 0), 8, 20, torch.float32)
    options = dict(label_smoothing=0.0, ignore_index=-100, softcap=0.0, z_loss=0.0)
    value, grad_x, grad_weight, grad_bias = loss.linear_cross_entropy(
        x, weight, bias, target, row_scale, True, True, True, **options
    )
    assert value == 0 and grad_x.shape == x.shape and (grad_weight == 0).all() and (grad_bias == 0).all()


def test_masked_and_spoiled_logits():
    """-inf of a whole block costs nothing; NaN of one row stays in that row."""
    x, weight, bias, target, _ = make_case((6,), 8, 5000, torch.float32)
    bias[:4096] = -float("inf")
    target = 4100 + target.clamp_min(0) % 800
    x[2] = float("nan")
    options = dict(label_smoothing=0.0, ignore_index=-100, softcap=0.0, z_loss=0.0)
    losses, *_ = loss.linear_cross_entropy(x, weight, bias, target, None, False, False, False, **options)
    rows = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    expected = F.cross_entropy((x.double() @ weight.double().T + bias)[rows], target[rows], reduction="none")
    torch.testing.assert_close(losses[rows].double(), expected, rtol=1e-5, atol=1e-5)
    assert losses[2].isnan()
