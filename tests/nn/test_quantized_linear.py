"""Linear layers of quantized weights as modules: what is kept, saved and loaded, and bitsandbytes' checkpoints."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pynlp.nn import Linear4bit, Linear8bit, Linear8bitDynamic, LinearInt4

LAYERS = [
    (Linear4bit, dict()),
    (Linear4bit, dict(double_quant=True, bias=False)),
    (Linear4bit, dict(quant_type="fp4", blocksize=128, double_quant=True)),
    (Linear4bit, dict(quant_type="mxfp4")),
    (Linear8bit, dict()),
    (Linear8bit, dict(granularity="tensor", bias=False)),
    (Linear8bit, dict(scheme="affine", granularity="group", group_size=64)),
    (LinearInt4, dict()),
    (LinearInt4, dict(scheme="symmetric", granularity="channel", bias=False)),
    (Linear8bitDynamic, dict()),
]
layers = pytest.mark.parametrize(("cls", "options"), LAYERS, ids=lambda x: getattr(x, "__name__", str(x)))


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes

    return bitsandbytes


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype and torch.equal(actual[name], expected[name]), name


@layers
def test_forward_is_that_of_the_dense_weight(cls, options):
    layer = cls(96, 40, **options)
    x = torch.randn(2, 3, 96, requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
    if cls is Linear8bitDynamic:
        assert 0 < (y - expected).norm() < 0.02 * expected.norm()
    else:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert x.grad.isfinite().all()
    if layer.bias is not None:
        layer.bias.grad = None
        layer(torch.randn(96)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.ones(40))
    assert {name for name, _ in layer.named_parameters()} == ({"bias"} if layer.bias is not None else set())


def test_inputs_that_are_rounded():
    dense = nn.Linear(96, 40)
    x = torch.randn(5, 96)
    x[:, 3] *= 100
    for rounds, plain in (
        (Linear8bitDynamic.from_linear(dense), Linear8bitDynamic.from_linear(dense, outlier_threshold=6.0)),
        (LinearInt4.from_linear(dense, activations="int8"), LinearInt4.from_linear(dense)),
    ):
        exact = nn.functional.linear(x, rounds.dequantize(), rounds.bias)
        assert (plain(x) - exact).norm() < 0.1 * (rounds(x) - exact).norm() < 0.01 * exact.norm()
    assert repr(LinearInt4(256, 40, activations="int8")).endswith("group_size=128, activations='int8')")
    assert Linear8bitDynamic(96, 40, outlier_threshold=6.0).outlier_threshold == 6.0
    with pytest.raises(ValueError, match="activations: expected None or 'int8', got 'int4'"):
        LinearInt4(96, 40, activations="int4")
    with pytest.raises(ValueError, match="outlier_threshold: expected more than 0, got -1"):
        Linear8bitDynamic.from_linear(dense, outlier_threshold=-1)


def test_from_linear():
    dense = nn.Linear(64, 32).eval()
    layer = Linear4bit.from_linear(dense, double_quant=True)
    assert layer.bias is dense.bias and not layer.training
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in layer.buffers())  # files refuse views
    assert (layer.dequantize() - dense.weight).abs().max() < 0.2 * dense.weight.abs().max()
    with pytest.raises(TypeError, match="linear: expected a dense nn.Linear, got Conv1d"):
        Linear4bit.from_linear(nn.Conv1d(1, 1, 1))
    dense.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="expected finite values"):
        Linear4bit.from_linear(dense)


@layers
def test_the_state_stays_the_same(cls, options, tmp_path):
    """After a forward, a backward, changes of mode, copies, moves and other dtypes; and through a file."""
    layer = cls(96, 40, **options)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    x = torch.randn(4, 96, requires_grad=True)
    layer(x).sum().backward()
    layer.eval()(x)
    layer.train()(x)
    assert_same_state(layer.state_dict(), before)
    assert_same_state(copy.deepcopy(layer).state_dict(), before)
    halved = copy.deepcopy(layer).half().to(torch.bfloat16).to("cpu")
    weights = {name for name in before if name != "bias"}
    assert_same_state({k: x for k, x in halved.state_dict().items() if k in weights}, {k: before[k] for k in weights})
    assert halved(x.bfloat16()).dtype == torch.bfloat16 and halved.compute_dtype == torch.bfloat16

    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = cls(96, 40, bias=layer.bias is not None)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert_same_state(other.state_dict(), before)
    assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)


@layers
def test_a_dense_weight_is_quantized_when_it_is_loaded(cls, options):
    bias = options.get("bias", True)
    model, dense = nn.Sequential(cls(64, 32, **options)), nn.Sequential(nn.Linear(64, 32, bias=bias))
    model.load_state_dict(dense.state_dict())
    options = {name: value for name, value in options.items() if name != "bias"}
    assert_same_state(model[0].state_dict(), cls.from_linear(dense[0], **options).state_dict())


def test_bitsandbytes_8_bit_layers(bnb):
    """Their codes, and the rows' largest magnitudes."""
    dense = nn.Linear(128, 96)
    theirs = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")  # which quantizes
    state = theirs.state_dict()
    assert state["weight"].dtype == torch.int8
    ours = Linear8bit(128, 96)
    ours.load_state_dict(state)
    assert torch.equal(ours.weight, state["weight"])
    torch.testing.assert_close(ours.dequantize(), state["weight"] * state["SCB"][:, None] / 127)
    written = ours.bitsandbytes_state_dict()
    assert written.keys() == state.keys()
    loaded = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False).to("cpu")
    loaded.load_state_dict(written)
    x = torch.randn(4, 128)
    torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-6, atol=1e-6)
    for layer in (Linear8bit(128, 96, scheme="affine"), Linear8bit(128, 96, granularity="tensor")):
        with pytest.raises(ValueError, match="bitsandbytes' layers have symmetric codes with a scale a row"):
            layer.bitsandbytes_state_dict()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_loads_ours_and_we_load_theirs(quant_type, double_quant, bnb):
    dense = nn.Linear(128, 96)
    theirs = bnb.nn.Linear4bit(128, 96, compress_statistics=double_quant, quant_type=quant_type)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")  # which quantizes
    their_weight = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)

    for stored in (torch.uint8, torch.bfloat16):  # their quant_storage
        ours, state = Linear4bit(128, 96), theirs.state_dict()
        ours.load_state_dict(state | {"weight": state["weight"].view(-1).view(stored)[:, None]})
        assert torch.equal(ours.dequantize(), their_weight) and ours.weight.dtype == torch.uint8

    ours = Linear4bit.from_linear(dense, quant_type=quant_type, double_quant=double_quant)
    state = {name.removeprefix("weight."): x for name, x in ours.state_dict().items() if name.startswith("weight.")}
    loaded = bnb.nn.Params4bit.from_prequantized(ours.weight.clone(), state, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(loaded.data, loaded.quant_state), ours.dequantize())
    if quant_type == "nf4":  # of fp4, versions and devices differ in the sign of 0
        assert torch.equal(theirs.weight.data, ours.weight)


def damaged(**changes):
    state = Linear4bit(64, 32, double_quant=True).state_dict()
    key = "weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(state[key].tolist())) | changes
    return {**state, key: torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)}


def without(*names):
    return {name: x for name, x in Linear4bit(64, 32, double_quant=True).state_dict().items() if name not in names}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: Linear4bit(32, 64).state_dict(), r"weight: expected shape \(32, 64\), got \(64, 32\)"),
        (lambda: nn.Linear(64, 31).state_dict(), r"weight: expected shape \(32, 64\), got \(31, 64\)"),
        (lambda: without("weight.quant_state.bitsandbytes__nf4"), "a quant_state beside it"),
        (lambda: without("weight.absmax"), "weight: expected absmax"),
        (lambda: without("weight.nested_quant_map"), "weight: state.nested_code: expected a tensor"),
        (lambda: without("weight"), "Missing key.*weight"),
        (lambda: damaged(blocksize=48), "weight: blocksize: expected 32"),
        (lambda: damaged(quant_type="int8"), "weight: expected quant_type 'nf4', got 'int8'"),
        (lambda: damaged(nested_blocksize=128), "nested_blocksize 256, got 128"),
        (lambda: damaged(dtype="complex65"), "weight: expected dtype to be one of"),
        (lambda: {**damaged(), "weight": torch.zeros(7, 1, dtype=torch.uint8)}, "packed: expected 1024 bytes"),
        (lambda: {**damaged(), "weight.quant_map": torch.zeros(16)}, "quant_map to be nf4's codes"),
        (
            lambda: {**damaged(), "weight.quant_state.bitsandbytes__nf4": torch.zeros(5, dtype=torch.uint8)},
            "weight: expected JSON in the quant_state beside it",
        ),
    ],
)
def test_a_foreign_or_damaged_checkpoint_changes_nothing(state, message):
    layer = Linear4bit(64, 32, double_quant=True, bias=False)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    checkpoint = {name: x for name, x in state().items() if name != "bias"}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(checkpoint)
    assert_same_state(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("weight.quant_state.pynlp__int8"), "a quant_state or SCB beside it"),
        (lambda state: state.pop("weight.scale"), "weight: expected scale beside it"),
        (lambda state: state.update({"weight.scale": torch.ones(31, 1)}), r"state.scale: expected shape \(32, 1\)"),
        (lambda state: state.pop("weight.codes"), "Missing key.*weight.codes"),
        (
            lambda state: state.update({"weight.codes": torch.ones(31, 64, dtype=torch.int8)}),
            r"weight: expected shape \(32, 64\), got \(31, 64\)",
        ),
    ],
)
def test_a_foreign_or_damaged_8_bit_checkpoint_changes_nothing(change, message):
    layer = Linear8bit(64, 32, bias=False)
    before, checkpoint = {name: x.clone() for name, x in layer.state_dict().items()}, layer.state_dict()
    change(checkpoint)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(checkpoint)
    assert_same_state(layer.state_dict(), before)


@layers
def test_a_dense_layer_refuses_codes(cls, options):
    quantized = cls(64, 64, **options)
    with pytest.raises(RuntimeError):
        nn.Linear(64, 64, bias=quantized.bias is not None).load_state_dict(quantized.state_dict())


def test_memory_of_a_layer():
    layer = Linear4bit(1024, 1024, bias=False)
    assert sum(x.nbytes for x in layer.buffers()) / 2**20 <= 0.57
    layer = Linear4bit(1024, 1024, bias=False, double_quant=True)
    assert sum(x.nbytes for x in layer.buffers()) / 2**20 <= 0.53
    layer = Linear8bit(1024, 1024, bias=False)
    assert sum(x.nbytes for x in layer.buffers()) / 2**20 <= 1.01
