"""Routers: who is chosen and how much that weighs, ties and infinities, groups, capacity, losses, and the bias."""

import copy
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pynlp.nn import ExpertChoiceRouter, HashRouter, MoE, TopKRouter, router_loss, update_router_biases
from pynlp.nn.routers import first_of_largest

TOKENS, WIDTH, EXPERTS = 50, 16, 8


def with_logits(router: TopKRouter, logits: torch.Tensor):
    """What a router makes of these logits."""
    with mock.patch("pynlp.nn.routers.gate_logits", lambda x, weight: x):
        return router(logits)


def gate(**options) -> TopKRouter:
    return TopKRouter(4, 4, **options)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_scores_and_weights(scoring_func, norm_topk_prob):
    router = TopKRouter(
        WIDTH, EXPERTS, top_k=3, scoring_func=scoring_func, norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5
    )
    x = torch.randn(5, 10, WIDTH)
    output = router(x)
    logits = F.linear(x, router.weight)
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    values, index = scores.topk(3)
    weights = values / values.sum(-1, keepdim=True) if norm_topk_prob else values
    assert torch.equal(output.top_k_index, index)
    torch.testing.assert_close(output.top_k_weights, 2.5 * weights)
    torch.testing.assert_close(output.logits, logits)
    assert output.load.tolist() == [(index == expert).sum().item() for expert in range(EXPERTS)]
    if norm_topk_prob:
        torch.testing.assert_close(output.top_k_weights.sum(-1), torch.full((5, 10), 2.5))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_gate_learns(top_k, scoring_func):
    layer = MoE(WIDTH, 24, EXPERTS, top_k=top_k, scoring_func=scoring_func)
    layer(torch.randn(TOKENS, WIDTH)).square().sum().backward()
    assert (layer.router.weight.grad.abs().sum(1) > 0).sum() >= EXPERTS // 2


def test_logits_are_fp32():
    router = TopKRouter(WIDTH, EXPERTS, dtype=torch.bfloat16)
    x = torch.randn(TOKENS, WIDTH).bfloat16()
    output = router(x)
    assert output.logits.dtype == output.top_k_weights.dtype == torch.float32
    assert torch.equal(output.logits, F.linear(x.float(), router.weight.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x).logits, output.logits)


def test_of_equal_scores_the_first():
    output = with_logits(gate(), torch.zeros(3, 4))
    assert output.top_k_index.tolist() == [[0, 1]] * 3 and (output.top_k_weights == 0.5).all()
    scores = torch.tensor([0.0, -0.0, 2.0, 2.0, -3.0, -math.inf, math.inf])
    assert first_of_largest(scores, 7).tolist() == [6, 2, 3, 0, 1, 4, 5]


def test_infinite_logits():
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, 1.0, -inf], [inf, 0.0, 0.0, 0.0], [inf, 1.0, inf, 0.0], [-inf, 2.0, -inf, -inf]])
    output = with_logits(gate(), logits)
    assert output.top_k_index.tolist() == [[2, 0], [0, 1], [0, 2], [1, 0]]
    assert output.top_k_weights[1:].tolist() == [[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]
    assert with_logits(gate(), torch.full((1, 4), -inf)).top_k_weights.tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match="x: expected values whose logits are numbers, got NaN"):
        gate()(torch.full((1, 4), math.nan))


def test_groups():
    """The groups with the highest sums of two scores, then experts of these alone, as in DeepSeek-V3's gate."""
    router = TopKRouter(WIDTH, 8, top_k=2, scoring_func="sigmoid", n_group=4, topk_group=2, bias_update_rate=0.01)
    router.expert_bias.copy_(torch.randn(8) * 0.1)
    x = torch.randn(TOKENS, WIDTH) * 30
    output = router(x)
    scores = F.linear(x, router.weight).sigmoid()
    choice = scores + router.expert_bias
    for token in range(TOKENS):
        sums = [choice[token, 2 * group : 2 * group + 2].sum().item() for group in range(4)]
        best = sorted(range(4), key=lambda group: -sums[group])[:2]
        allowed = [expert for group in best for expert in (2 * group, 2 * group + 1)]
        expected = sorted(allowed, key=lambda expert: -choice[token, expert].item())[:2]
        assert output.top_k_index[token].tolist() == expected
        values = scores[token, expected]
        torch.testing.assert_close(output.top_k_weights[token], values / values.sum())


def test_capacity():
    """First choices come before second ones, earlier tokens before later ones; what is dropped is counted, gives 0."""
    layer = MoE(4, 8, 4, router=gate(capacity_factor=1.0))
    logits = torch.tensor([[3.0, 2.0, 0.0, 1.0]] * 3 + [[2.0, 3.0, 0.0, 1.0]])  # 4 tokens, 8 choices: 2 places
    output = with_logits(layer.router, logits)
    assert output.top_k_index.tolist() == [[0, 1], [0, -1], [-1, -1], [1, -1]]
    assert output.dropped == 4 and output.load.tolist() == [2, 2, 0, 0]
    assert (output.top_k_weights[2] == 0).all() and output.top_k_weights[1, 1] == 0
    with mock.patch("pynlp.nn.routers.gate_logits", lambda x, weight: x):
        y = layer(logits)
    assert (y[2] == 0).all() and (y[0] != 0).any() and layer.dropped == 4
    nothing = with_logits(gate(capacity_factor=1e-9), torch.zeros(0, 4))
    assert nothing.dropped == 0 and nothing.load.sum() == 0


def test_a_mask():
    router = TopKRouter(WIDTH, EXPERTS, router_aux_loss_coef=1.0, router_z_loss_coef=0.1)
    x = torch.randn(2, 10, WIDTH)
    mask = torch.arange(10) < torch.tensor([[10], [4]])
    output, alone = router(x, mask), router(x[mask])
    assert (output.top_k_index[~mask] == -1).all() and (output.top_k_weights[~mask] == 0).all()
    assert torch.equal(output.top_k_index[mask], alone.top_k_index) and torch.equal(output.load, alone.load)
    for name in ("balance", "z"):
        torch.testing.assert_close(output.losses[name], alone.losses[name])
    poisoned = x.masked_fill(~mask[..., None], math.nan).requires_grad_()
    again = router(poisoned, mask)
    (again.top_k_weights.sum() + sum(again.losses.values())).backward()
    assert router.weight.grad.isfinite().all() and (poisoned.grad[~mask] == 0).all()
    limited = TopKRouter(WIDTH, EXPERTS, capacity_factor=0.5)
    few, masked = limited(x[mask]), limited(x, mask)
    assert few.dropped == masked.dropped > 0 and torch.equal(masked.top_k_index[mask], few.top_k_index)
    assert limited.eval()(x).dropped == 0


def test_transforms_and_meta_tensors():
    for router in (TopKRouter(WIDTH, EXPERTS, bias_update_rate=0.1), ExpertChoiceRouter(WIDTH, EXPERTS)):
        layer = MoE(WIDTH, 8, EXPERTS, router=router)
        x = torch.randn(3, 10, WIDTH)
        torch.func.grad(lambda x, layer=layer: layer(x).sum())(x)
        copy.deepcopy(layer)
        assert int(layer.load.sum()) >= 60
        torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(one) for one in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_the_balance_loss(scoring_func):
    """num_experts * sum of shares and mean scores; 1 where all are alike, more where not; differentiable."""
    options = dict(scoring_func=scoring_func, router_aux_loss_coef=1.0)
    router = TopKRouter(WIDTH, EXPERTS, top_k=2, **options)
    x = torch.randn(400, WIDTH, requires_grad=True)
    output = router(x)
    scores = output.logits.softmax(-1) if scoring_func == "softmax" else output.logits.sigmoid()
    scores = scores / scores.sum(-1, keepdim=True)
    expected = EXPERTS * (output.load / 800 * scores.mean(0)).sum()
    torch.testing.assert_close(output.losses["balance"], expected)
    output.losses["balance"].backward()
    assert x.grad.abs().sum() > 0 and router.weight.grad.abs().sum() > 0
    even = torch.eye(4).repeat(10, 1)
    torch.testing.assert_close(with_logits(gate(**options), even).losses["balance"].detach(), torch.tensor(1.0))
    assert with_logits(gate(**options), 5 * torch.tensor([[1.0, 1.0, 0.0, 0.0]])).losses["balance"] > 1.2


def test_the_z_loss():
    router = TopKRouter(WIDTH, EXPERTS, router_z_loss_coef=0.5)
    output = router(torch.randn(TOKENS, WIDTH))
    torch.testing.assert_close(output.losses["z"], 0.5 * output.logits.logsumexp(-1).square().mean())


def collapsed(**options) -> MoE:
    """A mixture of which two experts get nearly all tokens of `batch`."""
    torch.manual_seed(0)
    layer = MoE(WIDTH, 8, EXPERTS, **options)
    with torch.no_grad():
        layer.router.weight.mul_(8)
        layer.router.weight[:2, 0] += 0.6
    return layer


def batch(seed: int) -> torch.Tensor:
    x = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = 3.0  # what the collapsed experts read
    return x


def imbalance(layer: MoE) -> float:
    with torch.no_grad():
        layer.eval()(batch(1000))
        layer.train()
    return (layer.load.max() / layer.load.double().mean()).item()


@pytest.mark.parametrize("how", ["loss", "bias"])
def test_a_collapsed_router_recovers(how):
    """Each way of balancing brings all experts within a tenth of the mean."""
    options = dict(router_aux_loss_coef=1.0) if how == "loss" else dict(bias_update_rate=0.01)
    layer = collapsed(**options)
    assert imbalance(layer) > 2
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
    for step in range(250):
        if how == "bias" and step == 150:
            layer.router.bias_update_rate = 0.001
        y = layer(batch(step))
        optimizer.zero_grad()
        (router_loss(layer) + 0 * y.sum()).backward()
        optimizer.step()
        update_router_biases(layer)
    load = layer.load.double()
    assert imbalance(layer) <= 1.1 and (load - load.mean()).abs().max() <= 0.1 * load.mean(), load


def test_z_loss_alone_lowers_the_logits():
    layer = collapsed(router_z_loss_coef=0.1)
    before = layer.router(batch(0)).logits.logsumexp(-1).square().mean()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    for step in range(60):
        layer(batch(step))
        optimizer.zero_grad()
        router_loss(layer).backward()
        optimizer.step()
    assert layer.router(batch(0)).logits.logsumexp(-1).square().mean() < 0.5 * before


def test_the_bias_decides_and_does_not_weigh():
    router = TopKRouter(WIDTH, EXPERTS, bias_update_rate=0.1)
    x = torch.randn(TOKENS, WIDTH)
    before = router(x)
    router.expert_bias[3] = 100.0
    output = router(x)
    assert (output.top_k_index == 3).any(-1).all()
    scores = output.logits.softmax(-1).gather(-1, output.top_k_index)
    torch.testing.assert_close(output.top_k_weights, scores / scores.sum(-1, keepdim=True))
    assert torch.equal(output.logits, before.logits) and not router.expert_bias.requires_grad
    assert "expert_bias" in router.state_dict() and router.bfloat16().expert_bias.dtype == torch.float32


def test_the_bias_is_updated_once_a_step():
    """By the sum of all passes in training since the last time; checkpointing and evaluation change nothing."""
    router = TopKRouter(WIDTH, EXPERTS, bias_update_rate=0.5)
    batches = torch.randn(3, TOKENS, WIDTH, requires_grad=True)
    loads = sum(router(x).load for x in batches).double()
    expected = 0.5 * torch.sign(loads.mean() - loads)
    router.update_bias()
    torch.testing.assert_close(router.expert_bias.double(), expected)
    router.update_bias()  # nothing since then
    torch.testing.assert_close(router.expert_bias.double(), expected)

    router.expert_bias.zero_()
    with torch.no_grad():
        router.eval()(10 * batches[0])
    router.train()
    for x in batches:
        checkpoint(lambda x: router(x).top_k_weights, x, use_reentrant=False).sum().backward()
    router.update_bias()
    torch.testing.assert_close(router.expert_bias.double(), expected)


@pytest.mark.parametrize("method", ["modulo", "balanced", "random"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_hashes(method, top_k):
    router = HashRouter(EXPERTS, 1000, top_k=top_k, method=method)
    ids = torch.randint(1000, (4, 30))
    output = router(ids)
    assert output.logits is None and output.losses == {} and not list(router.parameters())
    assert torch.equal(output.top_k_index, router(ids).top_k_index)  # of the id alone
    assert torch.equal(output.top_k_index, HashRouter(EXPERTS, 1000, top_k=top_k, method=method)(ids).top_k_index)
    assert all(len(set(row)) == top_k for row in router.table.tolist())
    torch.testing.assert_close(output.top_k_weights.sum(-1), torch.ones(4, 30))
    load = torch.bincount(router.table.flatten(), minlength=EXPERTS)
    assert load.min() > 0 and (method == "random" or load.max() - load.min() <= 2 * top_k)
    masked = router(torch.where(ids > 500, ids, -100), ids > 500)
    assert torch.equal(masked.top_k_index[ids > 500], output.top_k_index[ids > 500])
    if top_k > 1 and method != "modulo":  # experts meet in all ways
        assert len({frozenset(row) for row in router.table.tolist()}) > 0.9 * math.comb(EXPERTS, top_k)


def test_a_balanced_hash_knows_how_often_ids_occur():
    frequencies = 1 / torch.arange(1.0, 2001)  # Zipf's law
    router = HashRouter(4, 2000, frequencies=frequencies)
    load = torch.zeros(4).index_add_(0, router.table[:, 0], frequencies)
    assert load.max() / load.mean() < 1.01
    blind = HashRouter(4, 2000, method="modulo")
    load = torch.zeros(4).index_add_(0, blind.table[:, 0], frequencies)
    assert load.max() / load.mean() > 1.1


def test_experts_choose():
    """Each the tokens with its highest scores; all get as many, and a token's experts come with their scores."""
    router = ExpertChoiceRouter(WIDTH, EXPERTS, capacity_factor=2.0)
    x = torch.randn(5, 10, WIDTH, requires_grad=True)
    output = router(x)
    scores = output.logits.softmax(-1).flatten(0, 1)
    assert output.load.tolist() == [13] * EXPERTS
    index, weights = output.top_k_index.flatten(0, 1), output.top_k_weights.flatten(0, 1)
    for expert in range(EXPERTS):
        chosen = set(scores[:, expert].topk(13).indices.tolist())
        assert chosen == set((index == expert).any(-1).nonzero().flatten().tolist())
    for token in range(50):
        for place, expert in enumerate(index[token].tolist()):
            expected = 0.0 if expert < 0 else scores[token, expert].item()
            assert weights[token, place].item() == pytest.approx(expected)
    mask = torch.arange(10) < torch.tensor([[10], [3], [10], [10], [0]])
    assert (router(x, mask).top_k_index[~mask] == -1).all()
    assert router(x[:0]).load.tolist() == [0] * EXPERTS
    layer = MoE(WIDTH, 24, EXPERTS, router=router)
    layer(x).square().sum().backward()
    assert router.weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


def test_errors():
    for match, make in {
        r"top_k: expected 1 to num_experts = 4, got 5": lambda: gate(top_k=5),
        r"num_experts: expected at least 1, got 0": lambda: TopKRouter(4, 0),
        r"scoring_func: expected 'softmax' or 'sigmoid', got 'tanh'": lambda: gate(scoring_func="tanh"),
        r"norm_topk_prob: expected False with top_k=1": lambda: gate(top_k=1, norm_topk_prob=True),
        r"n_group: expected a divisor of num_experts = 4, got 3": lambda: gate(n_group=3),
        r"topk_group: expected 1 to n_group = 2, got 3": lambda: gate(n_group=2, topk_group=3),
        r"top_k: expected at most the 2 experts of the chosen groups, got 3": lambda: gate(n_group=2, top_k=3),
        r"jitter: expected at least 0 and less than 1, got 1": lambda: gate(jitter=1),
        r"capacity_factor: expected a positive number or None, got 0": lambda: gate(capacity_factor=0),
        r"router_aux_loss_coef: expected 0 \(none\) or a positive number, got -1": lambda: gate(
            router_aux_loss_coef=-1
        ),
        r"method: expected one of 'modulo'.*got 'sha'": lambda: HashRouter(4, 10, method="sha"),
        r"frequencies: expected shape \(10,\), got \(9,\)": lambda: HashRouter(4, 10, frequencies=torch.ones(9)),
        r"frequencies: expected numbers from 0 on": lambda: HashRouter(2, 2, frequencies=torch.tensor([1.0, -1.0])),
        r"frequencies: expected none with method='modulo'": lambda: HashRouter(
            2, 2, method="modulo", frequencies=torch.ones(2)
        ),
        r"x: expected shape \(.., 4\), got \(2, 5\)": lambda: gate()(torch.ones(2, 5)),
        r"token_ids: expected values of 0 to 9, got 3 to 10": lambda: HashRouter(4, 10)(torch.tensor([3, 10])),
        r"token_ids: expected the ids of x's tokens": lambda: MoE(4, 8, 4, router=HashRouter(4, 10))(torch.ones(2, 4)),
        r"token_ids: expected shape \(2,\), got \(3,\)": lambda: MoE(4, 8, 4, router=HashRouter(4, 10))(
            torch.ones(2, 4), torch.tensor([1, 2, 3])
        ),
        r"router: expected one of 4 experts, got 8": lambda: MoE(4, 8, 4, router=HashRouter(8, 10)),
        r"jitter: expected no arguments of the default router with a router": lambda: MoE(
            4, 8, 4, router=gate(), jitter=0.1
        ),
        r"top_k: expected no arguments of the default router": lambda: MoE(4, 8, 4, router=gate(), top_k=2),
        r"mask: expected bool \(2,\), got torch.bool \(2, 1\)": lambda: gate()(
            torch.ones(2, 4), torch.ones(2, 1, dtype=torch.bool)
        ),
        r"ffn_dim: expected at least 1, got 0": lambda: MoE(4, 0, 4),
        r"activation: expected one of .*, got 'silu'": lambda: MoE(4, 8, 4, activation="silu"),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()
    assert MoE(4, 8, 4, device="meta")(torch.ones(3, 4, device="meta")).shape == (3, 4)
    with pytest.raises(TypeError, match="token_ids: expected dtype int32 or int64, got torch.bool: a mask is mask="):
        MoE(4, 8, 4)(torch.ones(2, 4), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="router: expected a module, as TopKRouter, got str"):
        MoE(4, 8, 4, router="hash")
    with pytest.raises(TypeError, match="top_k: expected an int, got float"):
        gate(top_k=2.0)
    with pytest.raises(
        TypeError, match="token_ids: expected dtype int32 or int64, got torch.float32: a hash is of ids"
    ):
        HashRouter(4, 10)(torch.ones(3))
