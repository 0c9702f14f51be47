"""Norms and feed-forward layers as modules, against torch.nn's with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pynlp.nn import FeedForward, LatentAttention, LayerNorm, Linear, MultiHeadAttention, RMSNorm

NORMS = {
    "layer": (LayerNorm(40), nn.LayerNorm(40)),
    "layer, no bias, eps": (LayerNorm(40, bias=False, eps=0.1), nn.LayerNorm(40, bias=False, eps=0.1)),
    "rms": (RMSNorm(40), nn.RMSNorm(40, eps=1e-6)),
    "rms, eps": (RMSNorm(40, eps=0.1), nn.RMSNorm(40, eps=0.1)),
}


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norms_equal_torchs(name, has_residual):
    ours, theirs = NORMS[name]
    theirs.load_state_dict(randomized(ours).state_dict())
    inputs = [torch.randn(3, 7, 40, requires_grad=True) for _ in range(1 + has_residual)]
    y = ours(*inputs)
    new = sum(inputs)
    expected = theirs(new)
    if has_residual:
        y, ours_new = y
        torch.testing.assert_close(ours_new, new)
    torch.testing.assert_close(y, expected)
    weight = torch.randn(3, 7, 40)
    gradients = torch.autograd.grad((y * weight).sum(), [*inputs, *ours.parameters()])
    expected = torch.autograd.grad((expected * weight).sum(), [*inputs, *theirs.parameters()])
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_norms_drop_what_is_added_to_a_residual_in_training(name):
    ours, theirs = (LayerNorm, nn.LayerNorm) if name == "layer" else (RMSNorm, lambda dim: nn.RMSNorm(dim, eps=1e-6))
    ours, theirs = ours(64, dropout=0.25), theirs(64)
    x, residual = torch.rand(50, 64) + 1, torch.randn(50, 64)
    y, new = ours(x, residual)
    torch.testing.assert_close(y, theirs(new))
    added = new - residual
    dropped = added == 0
    assert 0.2 < dropped.float().mean() < 0.3
    torch.testing.assert_close(added[~dropped], x[~dropped] / 0.75)
    assert not torch.equal(ours(x, residual)[1], new)  # others the next time
    torch.testing.assert_close(ours(x), theirs(x))  # nothing is added, so nothing is dropped
    torch.testing.assert_close(ours.eval()(x, residual)[1], residual + x, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_feed_forward_equals_torchs_operations(activation, bias):
    layer = randomized(FeedForward(24, 40, activation=activation, bias=bias))
    assert (layer.up_proj.bias is not None) == (layer.down_proj.bias is not None) == bias

    def eager(x):
        inner = F.linear(x, layer.up_proj.weight, layer.up_proj.bias)  # (.., 40) or (.., 80)
        if activation == "swiglu":
            inner = F.silu(inner[..., :40]) * inner[..., 40:]
        else:
            inner = getattr(F, activation)(inner)
        return F.linear(inner, layer.down_proj.weight, layer.down_proj.bias)

    x, weight = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 24)
    y, expected = layer(x), eager(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    gradients, expected = (
        torch.autograd.grad((result * weight).sum(), [x, *layer.parameters()]) for result in (y, expected)
    )
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
def test_feed_forward_drops_activations_in_training(activation):
    layer = FeedForward(24, 32, activation=activation, dropout=0.25)
    layer.down_proj = nn.Identity()
    x = torch.randn(200, 24)
    kept_all = layer.eval()(x)
    some = layer.train()(x)
    active = kept_all != 0
    dropped = (some == 0) & active
    assert dropped.sum() / active.sum() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(some[~dropped], kept_all[~dropped] / 0.75)


MADE = {
    "feed-forward": lambda **where: FeedForward(8, 12, activation="swiglu", **where),
    "layer norm": lambda **where: LayerNorm(8, **where),
    "rms norm": lambda **where: RMSNorm(8, **where),
    "linear": lambda **where: Linear(8, 4, **where),
    "attention": lambda **where: MultiHeadAttention(8, 2, positions="relative", sinks=True, **where),
    "latent attention": lambda **where: LatentAttention(8, 2, kv_rank=4, nope_dim=4, rope_dim=2, q_rank=6, **where),
}


@pytest.mark.parametrize("name", MADE)
def test_made_with_a_device_and_a_dtype(name):
    torch.manual_seed(0)
    usual = MADE[name]()
    torch.manual_seed(0)
    exact = MADE[name](dtype=torch.float64)
    meta = MADE[name](device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in usual.parameters()} == {"cpu"}
    assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.bfloat16)}
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    assert {name: p.shape for name, p in meta.named_parameters()} == {n: p.shape for n, p in usual.named_parameters()}
    meta = meta.to_empty(device="cpu")
    meta.load_state_dict(usual.state_dict())
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(meta.float()(x), usual(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LayerNorm(0), "dim: expected at least 1, got 0"),
        (lambda: RMSNorm(8, dropout=1.0), r"dropout: expected at least 0 and less than 1, got 1\.0"),
        (lambda: FeedForward(0, 8), "embed_dim: expected at least 1, got 0"),
        (lambda: FeedForward(8, -1), "ffn_dim: expected at least 1, got -1"),
        (lambda: FeedForward(8, 8, activation="silu"), "activation: expected one of 'gelu', 'relu', 'swiglu', got"),
        (lambda: FeedForward(8, 8, dropout=-0.1), r"dropout: expected at least 0 and less than 1, got -0\.1"),
    ],
)
def test_refuses_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
