"""Low-rank adapters of a layer: their numbers and gradients, and that merges lose nothing that cannot be had back."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import pynlp.nn
from pynlp.nn import Linear4bit, Linear8bit, LoRALinear

BASES = {
    "dense": lambda: nn.Linear(48, 24),
    "dense without bias": lambda: pynlp.nn.Linear(48, 24, bias=False),
    "conv": lambda: Conv1D(24, 48),
    "nf4": lambda: Linear4bit(48, 24, double_quant=True),
    "mxfp4": lambda: Linear4bit(48, 24, bias=False, quant_type="mxfp4"),
    "int8": lambda: Linear8bit(48, 24, scheme="affine", granularity="group", group_size=16),
}
DENSE, QUANTIZED = list(BASES)[:3], list(BASES)[3:]
bases = pytest.mark.parametrize("kind", BASES)
dense = pytest.mark.parametrize("kind", DENSE)
quantized = pytest.mark.parametrize("kind", QUANTIZED)


def adapted(kind, rank=5, alpha=7, dropout=0.0, dtype=torch.float32, **options) -> LoRALinear:
    """A layer whose adapter is not 0."""
    layer = LoRALinear(BASES[kind]().to(dtype), rank, alpha, dropout, **options)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def weight_of(layer) -> torch.Tensor:
    """The weight (out, in) of a layer without adapter, in fp64."""
    if isinstance(layer, Linear4bit | Linear8bit):
        return layer.dequantize(torch.float64)
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().double()


def sum_of(layer: LoRALinear) -> torch.Tensor:
    """The base's weight and the adapter's product, in fp64."""
    return weight_of(layer.base) + layer.scaling * (layer.lora_B.double() @ layer.lora_A.double()).detach()


def state_of(module: nn.Module) -> dict:
    return {name: x.clone() for name, x in module.state_dict().items()}


def assert_same_state(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert all(actual[name].dtype == x.dtype and torch.equal(actual[name], x) for name, x in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rslora", [False, True])
@bases
def test_outputs_and_gradients(kind, rslora, dtype):
    layer = adapted(kind, dtype=dtype, rslora=rslora)
    x, grad = torch.randn(2, 3, 48, dtype=dtype, requires_grad=True), torch.randn(2, 3, 24, dtype=dtype)
    y = layer(x)
    y.backward(grad)
    assert y.dtype == dtype and layer.lora_A.dtype == (torch.float32 if kind in QUANTIZED else dtype)
    scaling = 7 / 5**0.5 if rslora else 7 / 5
    exact = [t.detach().double().requires_grad_(True) for t in (x, layer.lora_A, layer.lora_B)]
    expected = exact[0] @ weight_of(layer.base).T + scaling * (exact[0] @ exact[1].T) @ exact[2].T
    if layer.base.bias is not None:
        expected = expected + layer.base.bias.double()
    expected.backward(grad.double())
    share = 1e-5 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    gradients = [t.grad for t in (x, layer.lora_A, layer.lora_B)]
    for ours, truth in zip([y, *gradients], [expected, *(t.grad for t in exact)], strict=True):
        assert (ours.double() - truth).norm() / truth.norm() < share


@bases
def test_it_starts_as_the_base_and_only_the_adapter_trains(kind):
    base, x = BASES[kind](), torch.randn(3, 48)
    expected = base(x)
    layer = LoRALinear(base)
    assert torch.equal(layer(x), expected)
    assert layer.lora_A.shape == (8, 48) and layer.lora_B.shape == (24, 8) and layer.scaling == 2
    assert 0.7 < layer.lora_A.abs().max() * 48**0.5 <= 1  # uniform
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@bases
def test_unload_gives_the_base_back(kind):
    base = BASES[kind]().eval()
    if base.bias is not None:
        base.bias.requires_grad_(False)
    before, trained = state_of(base), {name for name, p in base.named_parameters() if p.requires_grad}
    layer = LoRALinear(base)
    assert not layer.training
    assert layer.train().unload() is base and base.training
    assert {name for name, p in base.named_parameters() if p.requires_grad} == trained
    assert_same_state(base.state_dict(), before)


def test_dropout():
    """It thins out what the adapter sees, and not what the base does; not in eval."""
    layer, x = adapted("int8", dropout=0.4), torch.randn(50, 48)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    thinned = nn.functional.dropout(x, 0.4)
    update = layer.scaling * thinned @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(y, layer.base(x) + update, rtol=1e-4, atol=1e-5)
    update = layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@dense
def test_merge_into_a_dense_weight(kind, dtype):
    layer, x = adapted(kind, dtype=dtype), torch.randn(3, 48, dtype=dtype)
    before, separate = state_of(layer), layer(x)
    exact = sum_of(layer)
    error = layer.merge()
    merged = weight_of(layer._merged)
    if dtype == torch.bfloat16:
        assert torch.equal(merged, exact.float().to(dtype).double())
        assert error == pytest.approx(((merged - exact).norm() / exact.norm()).item(), rel=1e-3) and 5e-4 < error < 4e-3
    else:
        torch.testing.assert_close(merged, exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
        assert error == 0
    assert layer.merged and torch.equal(layer(x), layer._merged(x))
    torch.testing.assert_close(layer(x), separate, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(x), separate)
    assert_same_state(layer.state_dict(), before)


@quantized
def test_merge_into_a_quantized_weight(kind):
    layer, x = adapted(kind), torch.randn(3, 48)
    before, separate, exact = state_of(layer), layer(x), sum_of(layer)
    error = layer.merge()
    merged = layer._merged
    assert type(merged) is type(layer.base) and merged._options() == layer.base._options()
    assert error == pytest.approx(((weight_of(merged) - exact).norm() / exact.norm()).item(), rel=1e-3)
    assert 1e-3 < error < (0.01 if kind == "int8" else 0.2)
    plain = nn.Linear(48, 24, bias=False)
    plain.weight.data = exact.float()
    again = type(merged).from_linear(plain, **merged._options())
    assert ((weight_of(again) - weight_of(merged)).norm() / exact.norm()) < 1e-3  # but for a tie of two codes
    bias = 0 if merged.bias is None else merged.bias
    torch.testing.assert_close(layer(x), x @ merged.dequantize().T + bias, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert torch.equal(layer(x), separate)
    assert_same_state(layer.state_dict(), before)


def test_a_merged_layer_dequantizes_to_the_dtype_that_the_base_does():
    layer = LoRALinear(Linear8bit(48, 24, dtype=torch.bfloat16))
    layer.merge()
    assert layer.unload().dequantize().dtype == layer.base.dequantize().dtype == torch.bfloat16


@bases
def test_merges_do_not_add_up(kind):
    layer = adapted(kind)
    error = layer.merge()
    weight = weight_of(layer._merged)
    assert layer.merge() == error and torch.equal(weight_of(layer._merged), weight)
    with torch.inference_mode():
        layer.merge()
    layer(torch.randn(3, 48, requires_grad=True)).sum().backward()
    assert layer.lora_A.grad is None


@bases
def test_unload_of_a_merged_layer(kind):
    base = BASES[kind]()
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    layer = LoRALinear(base)
    nn.init.normal_(layer.lora_B)
    layer.merge()
    layer.eval()
    merged, x = layer.unload(), torch.randn(3, 48)
    assert not merged.training
    assert type(merged) is type(base) and merged is not base and torch.equal(merged(x), layer(x))
    assert {name for name, p in merged.named_parameters() if p.requires_grad} == trained


@bases
def test_a_checkpoint_of_a_merged_layer_is_that_of_the_unmerged(kind):
    layer, other, x = adapted(kind), adapted(kind), torch.randn(3, 48)
    before = state_of(layer)
    layer.merge()
    expected = layer(x)
    assert_same_state(layer.state_dict(), before)
    assert {name for name, _ in layer.named_parameters()} == {name for name, _ in adapted(kind).named_parameters()}
    other.merge()
    other.load_state_dict(layer.state_dict())
    assert other.merged and torch.equal(other(x), expected)  # merged again, of what was loaded
    other.unmerge()
    assert_same_state(other.state_dict(), before)


@pytest.mark.parametrize("merged", [False, True])
@bases
def test_copies_and_moves(kind, merged):
    layer, x = adapted(kind), torch.randn(3, 48)
    if merged:
        layer.merge()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.merged == merged and torch.equal(other(x), layer(x))
        assert other.base is not layer.base and other.lora_A is not layer.lora_A
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert moved.lora_A.dtype == torch.bfloat16 and moved(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(moved(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.05)
    assert layer.to("meta")(x.to("meta")).shape == (3, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@bases
def test_autocast(kind, dtype):
    layer, x = adapted(kind), torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.to(dtype))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32 and x.grad.isfinite().all()


def test_a_wider_adapter_is_rounded_once():
    """The base's result and the adapter's are added in fp32."""
    layer = LoRALinear(nn.Linear(48, 24, dtype=torch.bfloat16), dtype=torch.float32)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(30, 48, dtype=torch.bfloat16)
    update = layer.scaling * x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T
    expected = layer.base(x).double() + update
    difference = (layer(x).double() - expected).abs()
    assert (difference <= expected.abs() * 2**-8 * 1.001).all()  # half a unit in the last of bf16's 8 places


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_checkpointing(kind, reentrant):
    """The same bits, and the same dropout when the forward is done again."""
    layer, x = adapted(kind, dropout=0.3), torch.randn(5, 48, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        for tensor in (x, layer.lora_A, layer.lora_B):
            tensor.grad = None
        run(x).square().sum().backward()
        gradients.append([tensor.grad for tensor in (x, layer.lora_A, layer.lora_B)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@bases
def test_compiled(kind):
    torch._dynamo.reset()
    layer, x = adapted(kind), torch.randn(3, 48)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    layer.merge()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_compiled_to_machine_code():
    """torch 2.13's inductor drops the factor of a sum whose other term is a product of matrices."""
    torch._dynamo.reset()
    layer, x = adapted("nf4", rank=4, alpha=16), torch.randn(5, 48)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
@bases
def test_who_reads_the_weight_gets_the_sum_in_the_bases_layout(kind, merged):
    layer = adapted(kind)
    if merged:
        layer.merge()
    expected = weight_of(layer._merged) if merged else sum_of(layer)
    weight = layer.weight.T if kind == "conv" else layer.weight
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert layer.bias is layer.base.bias and layer.compute_dtype == torch.float32
    if not merged:
        factor = torch.randn(24, 48)
        (weight * factor).sum().backward()
        torch.testing.assert_close(layer.lora_B.grad, layer.scaling * factor @ layer.lora_A.T)


def test_latent_attention_reads_a_weight_when_it_decodes():
    module = pynlp.nn.LatentAttention(16, 2, kv_rank=8, nope_dim=4, rope_dim=4, causal=True).eval()
    module.kv_up_proj = LoRALinear(module.kv_up_proj, rank=2)
    nn.init.normal_(module.kv_up_proj.lora_B)
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        expected = module(x)
        cache = pynlp.nn.KVCache(2, 8, **module.cache_shape)
        steps = [module(x[:, i : i + 1], cache=cache.append(1)[0]) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-5)


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(base=nn.Conv1d(1, 1, 1)), TypeError, "base: expected a quantized layer .*, got Conv1d"),
        (dict(base=Own(4, 4)), TypeError, "base: expected .* without a forward of its own, got Own"),
        (dict(base=LoRALinear(nn.Linear(4, 4))), TypeError, "base: expected .*, got LoRALinear"),
        (dict(base=nn.LazyLinear(4)), TypeError, "base.weight: expected a parameter .* got one that is not there yet"),
        (dict(base=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), TypeError, "base"),
        (dict(base=nn.Linear(4, 4, dtype=torch.complex64)), TypeError, "base.weight: .* got torch.complex64"),
        (dict(rank=0), ValueError, "rank: expected at least 1, got 0"),
        (dict(rank=1.5), TypeError, "rank: expected an int, got float"),
        (dict(alpha="16"), TypeError, "alpha: expected a number, got str"),
        (dict(alpha=float("nan")), ValueError, "alpha: expected a finite number, got nan"),
        (dict(dropout=1.0), ValueError, "dropout: expected at least 0 and less than 1, got 1.0"),
        (dict(rslora=1), TypeError, "rslora: expected True or False, got 1"),
        (dict(dtype=torch.int8), TypeError, "dtype: expected float32, bfloat16, float16 or float64, got torch.int8"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    base = arguments.pop("base", nn.Linear(4, 4))
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    with pytest.raises(error, match=message):
        LoRALinear(base, **arguments)
    assert {name for name, p in base.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@bases
def test_a_sum_that_is_not_finite_is_not_merged(kind, value):
    layer = adapted(kind)
    layer.lora_B.data[3, 2] = value
    layer.lora_A.data[2] = 100
    with pytest.raises(
        ValueError, match=r"base.weight \+ scaling \* lora_B @ lora_A: expected finite values in torch.f"
    ):
        layer.merge()
    assert not layer.merged


def test_on_the_meta_device_and_of_zeros():
    assert LoRALinear(nn.Linear(4, 4, device="meta")).merge() != 0  # NaN
    layer = LoRALinear(nn.Linear(4, 4))
    nn.init.zeros_(layer.base.weight)
    assert layer.merge() == 0


def test_print():
    layer = LoRALinear(nn.Linear(4, 4), 2, 3, rslora=True)
    layer.merge()
    assert "rank=2, alpha=3, dropout=0.0, rslora=True, merged" in repr(layer)
