"""The module of a mixture of experts: against a loop over experts, shared ones, up-cycling, copies."""

import copy

import pytest
import torch
from cases.layers import assert_as_accurate

from pynlp.nn import FeedForward, HashRouter, MoE, router_loss


def loop(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes, expert by expert, with the routing of its router."""
    routing = layer.router(x)
    y = torch.zeros_like(x)
    for expert in range(layer.num_experts):
        dense = FeedForward(x.shape[-1], layer.down_proj.shape[2], activation=layer.activation, bias=False).to(x.dtype)
        dense.load_state_dict(
            {"up_proj.weight": layer.gate_up_proj[expert], "down_proj.weight": layer.down_proj[expert]}
        )
        weight = (routing.top_k_weights * (routing.top_k_index == expert)).sum(-1, keepdim=True)
        y = y + weight.to(x.dtype) * dense(x)
    return y if layer.shared_expert is None else y + layer.shared_expert(x)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("shared", [0, 24])
def test_as_a_loop(activation, shared):
    layer = MoE(16, 40, 8, activation=activation, shared_ffn_dim=shared)
    x = torch.randn(3, 20, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), loop(layer, x), rtol=1e-4, atol=1e-5)


def test_gradients():
    """Gradients of all parameters, the router's among them, against fp64."""
    layer = MoE(16, 40, 4)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *weights):
        module = layer.double() if x.dtype == torch.float64 else layer.float()
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    tensors = {"x": torch.randn(30, 16)} | {n.replace(".", "_"): p.detach() for n, p in layer.named_parameters()}
    assert_as_accurate(lambda **t: run(*t.values()), lambda **t: run(*t.values()), tensors)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_up_cycling_begins_with_the_dense_layers_results(activation, bias):
    dense = FeedForward(16, 40, activation=activation, bias=bias)
    x = torch.randn(3, 20, 16)
    for options in (dict(top_k=2), dict(top_k=3, scoring_func="sigmoid"), dict(router=HashRouter(4, 100))):
        layer = MoE.from_feed_forward(dense, 4, **options)
        torch.testing.assert_close(layer(x, torch.randint(100, (3, 20))), dense(x), rtol=1e-4, atol=1e-5)
    assert layer.gate_up_proj.data_ptr() != dense.up_proj.weight.data_ptr()


def test_a_mask_and_what_is_kept():
    layer = MoE(16, 40, 4, router_aux_loss_coef=0.1)
    x, mask = torch.randn(2, 10, 16), torch.arange(10) < torch.tensor([[10], [4]])
    y = layer(x, mask=mask)
    assert (y[~mask] == 0).all() and layer.load.sum() == 2 * 14
    torch.testing.assert_close(y[mask], layer(x[mask]))
    assert router_loss(torch.nn.Sequential(layer, torch.nn.Linear(2, 2))) > 0
    assert router_loss(torch.nn.Linear(2, 2)) == 0
    other = copy.deepcopy(layer)
    assert other.losses == {} and torch.equal(other(x), layer(x))


def test_compiled_in_one_graph():
    layer = MoE(16, 40, 4, router_aux_loss_coef=0.1, shared_ffn_dim=16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), layer(x))


def test_it_learns():
    torch.manual_seed(0)
    layer = MoE(8, 16, 4, router_aux_loss_coef=0.01)
    x = torch.randn(256, 8)
    y = torch.where(x[:, :1] > 0, x.roll(1, 1), -x)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        (loss + router_loss(layer)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
