"""Two processes that share experts compute what one does: outputs and gradients, uneven loads, no tokens at all."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pynlp.nn import MoE, TopKRouter, shard_experts_
from pynlp.training import process_group

ROOT = Path(__file__).parents[2]
WIDTH, EXPERTS = 12, 4
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")


class Chosen(torch.nn.Module):
    """A router that is told the experts."""

    num_experts = EXPERTS

    def __init__(self, index):
        super().__init__()
        self.index, self.gate = index, TopKRouter(WIDTH, EXPERTS, top_k=index.shape[-1])

    def forward(self, x, mask=None):
        routing = self.gate(x)
        weights = routing.logits.softmax(-1).gather(-1, self.index.clamp_min(0)).where(self.index >= 0, 0)
        return routing._replace(top_k_index=self.index, top_k_weights=weights)


def layer_and_tokens(case: str):
    """A layer, and the tokens of both processes."""
    torch.manual_seed(0)
    layer = MoE(WIDTH, 20, EXPERTS, bias=True, shared_ffn_dim=8)
    x = [torch.randn(9, WIDTH), torch.randn(5, WIDTH)]
    index = {
        "gate": None,
        "uneven": [torch.randint(2, (9, 2)), torch.randint(3, (5, 2))],  # hardly any for the second process
        "none for one": [torch.randint(2, (9, 2)), torch.randint(2, (5, 2))],
        "one without tokens": [torch.randint(-1, 4, (9, 2)), torch.zeros(0, 2, dtype=torch.int64)],
    }[case]
    if case == "one without tokens":
        x[1] = x[1][:0]
    return layer, x, index


def outcome(layer, x, index, grad):
    """The output, and gradients by name, x's among them."""
    if index is not None:
        torch.manual_seed(1)
        layer.router = Chosen(index)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), {name: p.grad for name, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad}


def run_in_two_processes():
    """What each of them runs: its tokens by shared experts, against all tokens by all experts here."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    for case in ("gate", "uneven", "none for one", "one without tokens"):
        layer, x, index = layer_and_tokens(case)
        both = torch.cat(x)
        grad = torch.randn(both.shape, generator=torch.Generator().manual_seed(2))
        expected, whole = outcome(copy.deepcopy(layer), both, None if index is None else torch.cat(index), grad)
        own = slice(0, len(x[0])) if rank == 0 else slice(len(x[0]), None)
        shared = shard_experts_(layer)
        assert shared.gate_up_proj.shape[0] == 2 and "(2 of them here)" in repr(shared)
        y, grads = outcome(shared, x[rank], None if index is None else index[rank], grad[own])
        torch.testing.assert_close(y, expected[own], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads["x"], whole["x"][own], rtol=1e-4, atol=1e-5)
        for name, g in grads.items():
            if name in EXPERT_PARAMETERS:
                torch.testing.assert_close(g, whole[name][2 * rank : 2 * rank + 2], rtol=1e-4, atol=1e-5, msg=name)
            elif name != "x":
                dist.all_reduce(g)
                torch.testing.assert_close(g, whole[name], rtol=1e-4, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="expected layers with all experts here, got one, which is shared"):
        shard_experts_(shared)
    with pytest.raises(ValueError, match="expected experts in multiples of 2 processes, got 3 in it"):
        shard_experts_(MoE(4, 8, 3))

    router = TopKRouter(WIDTH, EXPERTS, top_k=1, bias_update_rate=1.0)
    router.load_since_update.copy_(torch.tensor([[9, 0, 0, 3], [0, 1, 0, 3]][rank]))
    router.update_bias()  # by the loads of both
    assert router.expert_bias.tolist() == [-1.0, 1.0, 1.0, -1.0]


def test_two_processes_compute_what_one_does():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    with process_group():
        run_in_two_processes()
