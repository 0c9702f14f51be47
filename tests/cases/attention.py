"""What the tests of attention share: cases, an eager implementation that owes nothing to pynlp, and the criterion.

The oracle is `eager_attention` in fp64 with PyTorch's autograd. PyTorch's own low-precision path, which the errors of
ours are measured against, is the same function in the low precision, as models do it: the products in that precision,
biases and softmax in fp32, the weights rounded before they meet the values. Which weights dropout keeps it is told:
that they are drawn as they should be is for test_random.py.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from pynlp.functional import attention
from pynlp.reference.common.random import attention_keeps


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 33
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    head_dim_v: int | None = None  # as head_dim
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    key_lengths: tuple[int, ...] | None = None
    alibi: str | None = None  # "heads": slopes (heads,); "batch": (batch, heads)
    relative: tuple[int, int] | None = None  # buckets, largest distance
    relative_bidirectional: bool | None = None
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    rotary_offset: int | str = 0  # "ids": a position of its own for each key
    magnitude: float = 1.0  # of the queries
    sinks: bool = False
    dropout_p: float = 0.0

    def __str__(self):
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in changed) or "plain"


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], dict]:
    """The tensors that get gradients, by name, and the other arguments of `attention`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "q": (normal(case.batch, case.seqlen_q, case.heads, case.head_dim) * case.magnitude).to(dtype),
        "k": normal(case.batch, case.seqlen_k, case.kv_heads, case.head_dim).to(dtype),
        "v": normal(case.batch, case.seqlen_k, case.kv_heads, case.head_dim_v or case.head_dim).to(dtype),
    }
    if case.sinks:
        tensors["sinks"] = normal(case.heads).float()
    if case.alibi:
        shape = (case.heads,) if case.alibi == "heads" else (case.batch, case.heads)
        tensors["alibi_slopes"] = torch.rand(shape, generator=generator) * 0.3
    if case.relative:
        tensors["relative_bias"] = normal(case.relative[0], case.heads).float()
    options = dict(
        causal=case.causal, window=case.window, softmax_scale=case.softmax_scale, softcap=case.softcap,
        relative_bidirectional=case.relative_bidirectional, rotary_interleaved=case.rotary_interleaved,
    )  # fmt: skip
    if case.dropout_p:
        options |= dict(dropout_p=case.dropout_p, seed=12345678901234567)
    if case.relative:
        options["relative_max_distance"] = case.relative[1]
    if case.key_lengths is not None:
        options["key_lengths"] = torch.tensor(case.key_lengths, dtype=torch.int32)
    if case.rotary_dim:
        ids = case.rotary_offset == "ids"
        positions = case.seqlen_k + (17 if ids else case.rotary_offset)
        frequencies = 100.0 ** -(torch.arange(case.rotary_dim // 2) / (case.rotary_dim // 2))
        angles = torch.arange(positions)[:, None] * frequencies
        options["rotary"] = (angles.cos(), angles.sin())
        options["rotary_offset"] = case.rotary_offset
        if ids:
            shape = (case.batch, case.seqlen_k)
            options["rotary_offset"] = torch.randint(0, positions, shape, generator=generator)
    return tensors, options


def eager_attention(
    q, k, v, *, causal, window, softmax_scale, softcap, alibi_slopes=None, relative_bias=None,
    relative_max_distance=128, relative_bidirectional=None, rotary=None, rotary_interleaved=False, rotary_offset=0,
    key_lengths=None, sinks=None, dropout_p=0.0, seed=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dense attention by PyTorch's operations in q's dtype; biases and softmax in fp32, or fp64 for fp64."""
    dtype, statistics = q.dtype, torch.promote_types(q.dtype, torch.float32)
    batch, seqlen_q, heads, head_dim = q.shape
    seqlen_k = k.shape[1]
    query_position = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key_position = torch.arange(seqlen_k)[None, :]
    if rotary is not None:
        table = [t.to(statistics) for t in rotary]
        if isinstance(rotary_offset, int):
            key_turn = torch.arange(seqlen_k).expand(batch, -1) + rotary_offset
            query_turn = torch.arange(seqlen_q).expand(batch, -1) + rotary_offset + seqlen_k - seqlen_q
        else:
            key_turn, query_turn = rotary_offset, rotary_offset[:, seqlen_k - seqlen_q :]
        q = turned(q, table, query_turn, rotary_interleaved)
        k = turned(k, table, key_turn, rotary_interleaved)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, S, D)
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) if heads else x for x in (k, v))

    scores = (q @ k.transpose(2, 3)).to(statistics) * (head_dim**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = (query_position - key_position).abs()
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(statistics)[..., None, None] * distance
    if relative_bias is not None:
        bidirectional = not causal if relative_bidirectional is None else relative_bidirectional
        bucket = t5_bucket(key_position - query_position, bidirectional, relative_bias.shape[0], relative_max_distance)
        scores = scores + relative_bias.to(statistics)[bucket].permute(2, 0, 1)

    left, right = window or (None, None)
    visible = torch.ones(batch, 1, seqlen_q, seqlen_k, dtype=torch.bool)
    if causal:
        visible &= key_position <= query_position
    if left is not None:
        visible &= key_position >= query_position - left
    if right is not None:
        visible &= key_position <= query_position + right
    if key_lengths is not None:
        visible &= key_position < key_lengths[:, None, None, None]
    if sinks is not None:  # one more key, which all see, and whose weight is thrown away
        scores = torch.cat((scores, sinks.to(statistics)[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
        visible = torch.cat((visible, visible.new_ones(*visible.shape[:3], 1)), dim=-1)
    sees_any = visible.any(-1, keepdim=True)
    # A row of nothing but -inf would have NaN gradients: give it zeros, and take its result back afterwards.
    scores = scores.masked_fill(~visible & sees_any, -math.inf)
    weights = torch.where(visible, torch.softmax(scores, dim=-1), 0.0)[..., :seqlen_k]
    if dropout_p:
        keeps = attention_keeps(torch.tensor(seed), dropout_p, torch.arange(batch), heads, seqlen_q, seqlen_k)
        weights = weights * keeps / (1 - round(dropout_p * 65536) / 65536)
    lse = torch.where(sees_any[..., 0], torch.logsumexp(scores, dim=-1), -math.inf)
    return (weights.to(dtype) @ v).transpose(1, 2), lse


def turned(x: Tensor, table: list[Tensor], positions: Tensor, interleaved: bool) -> Tensor:
    """Pairs of channels as complex numbers, times e^(i angle)."""
    cos, sin = (t[positions][:, :, None] for t in table)  # (B, S, 1, R / 2)
    rotary_dim = 2 * cos.shape[-1]
    pairs, rest = x[..., :rotary_dim].to(cos.dtype), x[..., rotary_dim:]
    pairs = pairs.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    real, imaginary = pairs.unbind(-1 if interleaved else -2)
    result = torch.complex(real, imaginary) * torch.complex(cos, sin)
    result = torch.stack((result.real, result.imag), dim=-1 if interleaved else -2).flatten(-2)
    return torch.cat((result.to(x.dtype), rest), dim=-1)


def t5_bucket(relative_position: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    from transformers.models.t5.modeling_t5 import T5Attention

    return T5Attention._relative_position_bucket(relative_position, bidirectional, num_buckets, max_distance)


def fused_attention(q, k, v, **options) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, return_lse=True, **options)


def evaluate(function, tensors: dict[str, Tensor], options: dict, gradients: bool = True) -> dict[str, Tensor]:
    """out, lse and, of a fixed random weighting of both, the gradient of each tensor, under its name."""
    leaves = {name: x.detach().requires_grad_(gradients) for name, x in tensors.items()}
    out, lse = function(**leaves, **options)
    results = {"out": out.detach(), "lse": lse.detach()}
    if gradients:
        torch.autograd.backward((out, lse), weights_like(out, lse))
        results |= {f"gradient of {name}": x.grad for name, x in leaves.items()}
    return results


def weights_like(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Incoming gradients of out and lse; none where the lse is -inf whatever the inputs."""
    generator = torch.Generator().manual_seed(1)
    weights = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse))
    return next(weights), next(weights).masked_fill(lse.detach() == -math.inf, 0.0)


@functools.cache
def expected_and_peer(case: Case, dtype: torch.dtype, gradients: bool) -> tuple[dict, dict, dict]:
    """By name: the fp64 results, the errors of PyTorch's low-precision path, and what keeping little costs gradients.

    Of the forward pass, fused attention keeps `lse` in fp32 and `out` in q's dtype, not the weights. Assume an error of
    one unit in the last place of either. That of lse scales all that comes from its query; that of out, and of its
    product in fp32, is one of delta = grad_out . out, which acts as the incoming gradient of lse does. So both effects
    are gradients themselves. They matter where a query has few keys, and the exact gradient all but vanishes.
    """
    tensors, options = make_inputs(case, dtype)
    low = evaluate(eager_attention, tensors, options, gradients)
    exact = {name: x.double() for name, x in tensors.items()}
    expected = evaluate(eager_attention, exact, options, gradients)
    peer = {name: errors(low[name], expected[name]) for name in expected}
    keeping = dict.fromkeys(expected, (0.0, 0.0))
    if gradients:
        leaves = [x.requires_grad_() for x in exact.values()]
        out, lse = eager_attention(**exact, **options)
        weight_out, weight_lse = weights_like(out, lse)
        generator = torch.Generator().manual_seed(2)
        for _ in range(4):  # errors of few rows may cancel: the largest effect of four draws of their signs
            sign = torch.randn(lse.shape, generator=generator).sign()  # (B, H, Sq)
            of_lse = sign * torch.finfo(torch.float32).eps * lse.detach().nan_to_num(neginf=0.0).abs()
            product = (weight_out * out.detach()).transpose(1, 2)  # (B, H, Sq, Dv)
            of_out = torch.finfo(dtype).eps * product.norm(dim=-1)
            of_out = of_out + torch.finfo(torch.float32).eps * product.abs().sum(-1)
            weights = (weight_out * of_lse.transpose(1, 2)[..., None], weight_lse * of_lse + sign * of_out)
            effects = torch.autograd.grad((out, lse), leaves, weights, retain_graph=True)
            for name, effect in zip(exact, effects, strict=True):
                drawn = errors(effect, torch.zeros_like(effect))
                keeping[f"gradient of {name}"] = tuple(map(max, drawn, keeping[f"gradient of {name}"]))
    return expected, peer, keeping


def errors(result: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error; infinite where one is infinite or NaN and the other is not the same."""
    if result.numel() == 0:
        return 0.0, 0.0
    difference = (result.double() - expected).abs()
    difference = torch.where(result.double() == expected, 0.0, difference).nan_to_num(nan=math.inf)
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_accurate(case: Case, dtype: torch.dtype, gradients: bool = True, function=fused_attention) -> None:
    """Our error against fp64 is at most twice (gradients: three times) that of PyTorch's own low-precision path.

    That is for the root mean square; the largest single error, whose ratio is a matter of luck, has twice the room.
    On top comes half a unit in the last place, what rounding the exact result may cost, and one of fp32, in which ours
    computes: the few values of a small case may happen to come out of PyTorch's path exactly.
    """
    tensors, options = make_inputs(case, dtype)
    results = evaluate(function, tensors, options, gradients)
    expected, peer, keeping = expected_and_peer(case, dtype, gradients)
    assert results.keys() == expected.keys()
    for name, value in results.items():
        source = tensors.get(name.removeprefix("gradient of "))
        assert value.shape == expected[name].shape, name
        assert value.dtype == (dtype if name == "out" else torch.float32 if source is None else source.dtype), name
        factor = 2 if source is None else 3
        exact = expected[name].masked_fill(expected[name].isinf(), 0.0)
        rounding = torch.finfo(value.dtype).eps / 2 + torch.finfo(torch.float32).eps
        for measure, error, peer_error, kept, size, room in zip(
            ("largest", "rms"),
            errors(value, expected[name]),
            peer[name],
            keeping[name],
            errors(exact, torch.zeros_like(exact)),
            (2 * factor, factor),
            strict=True,
        ):
            assert error <= room * peer_error + kept + rounding * size, (
                f"{name}: {measure} error {error:.3g}, expected at most {room} x {peer_error:.3g} + {kept:.3g} "
                f"+ {rounding * size:.3g}"
            )
