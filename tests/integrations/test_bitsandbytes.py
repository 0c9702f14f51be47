"""bitsandbytes on pynlp's kernels, against fp64 and, where its own are right, against its own.

Where the comments say what bitsandbytes gets wrong, the test fails if `register()` is taken out of the fixture.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pynlp import backends
from pynlp.integrations import bitsandbytes as integration
from pynlp.integrations.bitsandbytes import registration
from pynlp.reference.quantization.formats import FP4, NF4

CODES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor([*FP4, *(-x for x in FP4)])}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def theirs(monkeypatch):
    """bitsandbytes as it is, which `register` may change."""
    monkeypatch.setenv("PYNLP_BITSANDBYTES", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes

    monkeypatch.setenv("PYNLP_BITSANDBYTES", "1")
    integration.unregister()
    yield bitsandbytes
    integration.unregister()


@pytest.fixture
def bnb(theirs):
    """bitsandbytes on our kernels."""
    integration.register()
    return theirs


@pytest.fixture
def with_bf16_instructions(theirs, monkeypatch):
    """Whatever the CPU, bitsandbytes takes it for one with AVX-512 BF16, on which its layers pack their weights."""
    monkeypatch.setattr(theirs.cextension.lib, "has_avx512bf16_cpu", lambda: 1, raising=False)


def exactly(packed, state):
    """The values of 4-bit codes in fp64."""
    bytes_ = packed.reshape(-1).view(torch.uint8)
    codes = torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).view(-1)[: state.shape.numel()]
    absmax = state.absmax.double()
    if state.nested:
        outer = state.state2.absmax.double().repeat_interleave(256)[: absmax.numel()]
        absmax = state.state2.code.double()[state.absmax.int()] * outer + state.offset.double()
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (CODES[state.quant_type].double()[codes.int()] * scales).view(state.shape)


def layer_of(bnb, inputs, outputs, dtype=torch.float32, **options):
    """A quantized layer, and its weight in fp64."""
    options = dict(quant_type="nf4", compute_dtype=dtype) | options
    layer = bnb.nn.Linear4bit(inputs, outputs, **options)
    layer.weight.data /= 3  # so that absmax is no round number
    layer = layer.to("cpu")
    return layer.to(dtype), exactly(layer.weight.data, layer.weight.quant_state)


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize(("shape", "blocksize"), [((5, 48), 64), ((3, 16), 1024), ((7, 33), 32), ((129,), 64)])
def test_dequantize_4bit(shape, blocksize, quant_type, dtype, bnb):
    """Also where blocks straddle rows, which bitsandbytes' own kernel gets wrong without a word."""
    functional = bnb.functional
    x = torch.randn(shape, dtype=DTYPES[dtype])
    packed, state = functional.quantize_4bit(x, blocksize=blocksize, quant_type=quant_type)
    expected = exactly(packed, state)
    actual = functional.dequantize_4bit(packed, state)
    assert actual.dtype == x.dtype and actual.shape == x.shape
    assert torch.equal(actual, expected.to(torch.float32).to(x.dtype))
    out = torch.empty_like(x)
    assert functional.dequantize_4bit(packed, state, out=out) is out and torch.equal(out, actual)
    assert error(actual, x.double()) < 0.15


@pytest.mark.parametrize("shape", [(64, 64), (7, 33), (1,)])
@pytest.mark.parametrize("blocksize", [32, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_4bit(dtype, blocksize, shape, theirs):
    """A kernel, which bitsandbytes has not; NF4's bytes and scales are its own, FP4's values, too, but for ties."""
    x = torch.randn(shape, dtype=DTYPES[dtype])
    quantize = theirs.functional.quantize_4bit
    expected = {kind: quantize(x, blocksize=blocksize, quant_type=kind) for kind in CODES}
    integration.register()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU")
    for kind, (their_packed, their_state) in expected.items():
        packed, state = quantize(x, blocksize=blocksize, quant_type=kind)
        assert packed.shape == ((x.numel() + 1) // 2, 1) and packed.dtype == torch.uint8
        assert torch.equal(state.absmax, their_state.absmax)
        if kind == "nf4":
            assert torch.equal(packed, their_packed)
        same = exactly(packed, state) == exactly(their_packed, their_state)
        assert same.double().mean() > 0.99


def test_no_values(bnb):
    packed, state = bnb.functional.quantize_4bit(torch.empty(0, 4), quant_type="nf4")
    assert packed.shape == (0, 1) and bnb.functional.dequantize_4bit(packed, state).shape == (0, 4)
    layer, _ = layer_of(bnb, 64, 32)
    x = torch.empty(0, 64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 32) and x.grad.shape == (0, 64)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_quant_storage(storage, bnb):
    weight = torch.randn(8, 24)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    plain, _ = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    assert packed.dtype == storage and packed.shape == (96 // storage.itemsize, 1)
    assert torch.equal(packed.view(torch.uint8).view(-1, 1), plain)
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), exactly(packed, state).float())
    x = torch.randn(3, 24)
    assert error(bnb.matmul_4bit(x, packed.t(), quant_state=state), x.double() @ exactly(packed, state).T) < 1e-6
    if storage == torch.float32:
        with pytest.raises(
            ValueError, match="quant_storage: expected one whose values fill 9 bytes, got torch.float32"
        ):
            bnb.functional.quantize_4bit(weight[:1, :17], quant_storage=storage)


# Outputs that are no multiple of 32, an odd number of inputs, and rows of no whole number of blocks.
SIZES = [(64, 37), (33, 64), (48, 32), (64, 64)]
TOLERANCE = {"fp32": 1e-6, "bf16": 4e-3, "fp16": 5e-4}  # a rounding of the result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_a_layer_in_eval(inputs, outputs, quant_type, double_quant, dtype, bnb, with_bf16_instructions):
    """On CPUs with BF16 instructions bitsandbytes refuses such sizes, and rounds fp32 to bf16."""
    layer, weight = layer_of(
        bnb, inputs, outputs, DTYPES[dtype], quant_type=quant_type, compress_statistics=double_quant
    )
    x = torch.randn(2, 5, inputs).to(DTYPES[dtype])
    with torch.no_grad():
        y = layer.eval()(x)
    assert y.dtype == x.dtype
    assert error(y, x.double() @ weight.T + layer.bias.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_gradients(inputs, outputs, double_quant, dtype, bnb):
    layer, weight = layer_of(bnb, inputs, outputs, DTYPES[dtype], compress_statistics=double_quant)
    x = torch.randn(2, 5, inputs).to(DTYPES[dtype]).requires_grad_()
    grad = torch.randn(2, 5, outputs).to(DTYPES[dtype])
    layer.bias.requires_grad_()
    layer.train()(x).backward(grad)
    assert x.grad.dtype == x.dtype and layer.bias.grad.dtype == x.dtype
    assert error(x.grad, grad.double() @ weight) < TOLERANCE[dtype]
    assert error(layer.bias.grad, grad.double().sum((0, 1))) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_offset_of_another_dtype(dtype, bnb):
    """The mean of scales, where the layers of a model were cast."""
    packed, state = bnb.functional.quantize_4bit(torch.randn(32, 48), quant_type="nf4", compress_statistics=True)
    state.offset = state.offset.to(dtype)
    x = torch.randn(3, 48)
    assert error(bnb.matmul_4bit(x, packed, quant_state=state), x.double() @ exactly(packed, state).T) < 1e-6


def test_the_gradient_after_an_eval(bnb, with_bf16_instructions):
    """bitsandbytes loses it: the weight that it packed in eval has none."""
    layer, weight = layer_of(bnb, 64, 96)
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    x = torch.randn(3, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    assert error(x.grad, weight.sum(0).expand(3, -1)) < 1e-6


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_state_dict_after_an_eval(double_quant, bnb, with_bf16_instructions):
    """bitsandbytes leaves the scales turned, in bf16, or quantizes them anew."""
    layer, weight = layer_of(bnb, 64, 96, compress_statistics=double_quant)
    before = {name: x.clone() for name, x in layer.state_dict().items()}
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name, x in before.items():
        assert after[name].dtype == x.dtype and torch.equal(after[name], x), name
    parts = {name.removeprefix("weight."): x for name, x in after.items() if name.startswith("weight.")}
    loaded = bnb.nn.Params4bit.from_prequantized(after["weight"], parts, device="cpu")
    assert torch.equal(exactly(loaded.data, loaded.quant_state), weight)


class Watch(TorchDispatchMode):
    """The names of the ops that run, and whether one of them makes a floating-point tensor of a weight's size."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names, self.dense = size, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel() >= self.size:
            self.dense.append(str(function))
        return result


@pytest.mark.parametrize("double_quant", [False, True])
def test_forward_and_backward_are_fused(double_quant, bnb):
    layer, _ = layer_of(bnb, 64, 96, compress_statistics=double_quant)
    x = torch.randn(2, 64, requires_grad=True)
    with Watch(64 * 96) as watch:
        layer.train()(x).sum().backward()
    assert watch.names.count("pynlp.linear_4bit.default") == 1
    assert watch.names.count("pynlp.linear_4bit_backward.default") == 1
    assert watch.dense == []


@pytest.mark.parametrize("quant_type", CODES)
def test_gemv_4bit(quant_type, bnb):
    functional = bnb.functional
    packed, state = functional.quantize_4bit(torch.randn(37, 48), quant_type=quant_type, compress_statistics=True)
    x, out = torch.randn(1, 48), torch.empty(1, 37)
    y = functional.gemv_4bit(x, packed.t(), state=state)
    assert error(y, x.double() @ exactly(packed, state).T) < 1e-6
    assert functional.gemv_4bit(x, packed.t(), out=out, state=state) is out and torch.equal(out, y)


def test_gemv_4bit_of_a_weight_that_bitsandbytes_packed(theirs):
    """Its own kernel reads it, where it has one."""
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("gemv_4bit", lambda A, B, shapeB, absmax, code, blocksize: torch.full((1, 96), 7.0), "CPU")
    try:
        integration.register()
        functional, x = theirs.functional, torch.randn(1, 64)
        packed, state = functional.quantize_4bit(torch.randn(96, 64), quant_type="nf4")
        assert error(functional.gemv_4bit(x, packed, state=state), x.double() @ exactly(packed, state).T) < 1e-6
        packed, state = functional._convert_weight_packed_for_cpu(packed, state)
        assert (functional.gemv_4bit(x, packed, state=state) == 7).all()
        assert (theirs.matmul_4bit(x, packed, quant_state=state) == 7).all()
    finally:
        integration.unregister()
        library._destroy()


def test_matmul_4bit_of_what_is_not_ours(bnb):
    """`out`, and a weight that was quantized as (K, N)."""
    packed, state = bnb.functional.quantize_4bit(torch.randn(48, 32), quant_type="nf4")
    weight, x = exactly(packed, state), torch.randn(3, 48)
    out = torch.empty(3, 48)
    assert bnb.matmul_4bit(x[:, :32], packed, quant_state=state, out=out) is out
    assert error(out, x[:, :32].double() @ weight.T) < 1e-6
    with pytest.warns(DeprecationWarning, match="was quantized from a"):
        assert error(bnb.matmul_4bit(x, packed, quant_state=state), x.double() @ weight) < 1e-6
    with pytest.raises(ValueError, match="quant_state is required"):
        bnb.matmul_4bit(x, packed, quant_state=None)


def test_autocast_gives_its_dtype(bnb):
    layer, weight = layer_of(bnb, 64, 96)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = bnb.matmul_4bit(x, layer.weight, quant_state=layer.weight.quant_state)
    assert y.dtype == torch.bfloat16 and error(y, x.double() @ weight.T) < 6e-3


def test_int8_scaled_mm(bnb):
    """Three dimensions are kept, which bitsandbytes makes two of; its error is 1.8e-5."""
    A, B = (torch.randint(100, 128, shape, dtype=torch.int8) for shape in ((2, 3, 3001), (7, 3001)))
    rows, columns, bias = torch.rand(6) + 0.1, torch.rand(7) + 0.1, torch.randn(7)
    y = torch.ops.bitsandbytes.int8_scaled_mm(A, B, rows, columns, bias=bias, dtype=torch.float32)
    expected = (A.double() @ B.double().T) * rows.double().view(2, 3, 1) * columns.double() / 127**2 + bias.double()
    assert y.shape == (2, 3, 7) and error(y, expected) < 1e-6
    assert torch.ops.bitsandbytes.int8_scaled_mm(A, B, rows, columns).dtype == torch.float16


@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_8_bit_layers(threshold, bnb):
    dense = nn.Linear(64, 40).half()
    layer = bnb.nn.Linear8bitLt(64, 40, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu").eval()
    x = torch.randn(5, 64).half()
    x[1, 3] = 9.0
    expected = F.linear(x.double(), dense.weight.double(), dense.bias.double())
    with torch.no_grad():
        assert error(layer(x), expected) < (0.03 if threshold == 0 else 0.015)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(A=torch.zeros(3, dtype=torch.uint8)), "A: expected 32 bytes for state.shape"),
        (dict(A=torch.zeros(32)), "A: expected 32 bytes"),
        (dict(absmax=torch.ones(2)), "absmax: expected 1 values, got 2"),
        (dict(blocksize=48), "blocksize: expected 32, 64"),
        (dict(quant_type="mxfp4"), "quant_type: expected 'nf4' or 'fp4', got 'mxfp4'"),
        (dict(dtype=torch.int32), "dtype: expected float32"),
        (dict(out=torch.empty(4, 4)), r"out: expected shape \(4, 16\), dtype torch.float32, got \(4, 4\)"),
    ],
)
def test_errors(change, message, bnb):
    arguments = dict(
        A=torch.zeros(32, 1, dtype=torch.uint8), absmax=torch.ones(1), blocksize=64, quant_type="nf4", shape=[4, 16],
        dtype=torch.float32, out=torch.empty(4, 16),
    ) | change  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.bitsandbytes.dequantize_4bit.out(**arguments)


def test_errors_of_int8(bnb):
    A, B = torch.zeros(2, 4, dtype=torch.int8), torch.zeros(3, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match="A: expected dtype torch.int8, got torch.float32"):
        registration.kernels.int8_scaled_mm(A.float(), B, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="scale: expected shape"):
        registration.kernels.int8_scaled_mm(A, B, torch.ones(2), torch.ones(4))


@pytest.mark.slow
def test_compiled(bnb):
    layer, weight = layer_of(bnb, 33, 37, compress_statistics=True)
    x = torch.randn(3, 33, requires_grad=True)
    y = torch.compile(layer, fullgraph=True)(x)
    y.sum().backward()
    assert error(y, x.double() @ weight.T + layer.bias.double()) < 1e-6
    assert error(x.grad, weight.sum(0).expand(3, -1)) < 1e-6


def test_transformers_load_in_4bit(bnb, tmp_path, with_bf16_instructions):
    """A model as users load it: logits in eval, and a training step of what is below the quantized layers."""
    import transformers as hf

    config = hf.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    options = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=options, device_map="cpu")
    dense = hf.LlamaForCausalLM.from_pretrained(tmp_path).double()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data = exactly(layer.weight.data, layer.weight.quant_state)
    tokens = torch.randint(50, (2, 9))
    expected = dense(tokens, labels=tokens)
    with torch.no_grad():
        assert error(model.eval()(tokens).logits, expected.logits) < 1e-5
    model.train()(tokens, labels=tokens).loss.backward()
    expected.loss.backward()
    names = [name for name, x in dense.named_parameters() if name.endswith(("norm.weight", "embed_tokens.weight"))]
    assert len(names) == 6
    for name in names:
        assert error(model.get_parameter(name).grad, dense.get_parameter(name).grad) < 1e-5, name


def test_unregister_leaves_all_as_it_was(theirs):
    packed, state = theirs.functional.quantize_4bit(torch.randn(5, 48), quant_type="nf4")
    names = theirs.matmul_4bit, theirs.nn.modules.has_avx512bf16
    before = theirs.functional.dequantize_4bit(packed, state)
    integration.register()
    integration.register()
    assert theirs.matmul_4bit is not names[0]
    integration.unregister()
    integration.unregister()
    assert (theirs.matmul_4bit, theirs.nn.modules.has_avx512bf16) == names
    assert torch.equal(theirs.functional.dequantize_4bit(packed, state), before)


def assert_refused(theirs, reason):
    own = theirs.matmul_4bit
    backends.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"bitsandbytes keeps its own CPU kernels instead of pynlp's: {reason}"):
        integration.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration.register()
    assert theirs.matmul_4bit is own and not registration._undo
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::quantize_4bit", "CPU")


def test_other_versions_keep_their_own(theirs, monkeypatch):
    """One warning names the reason."""
    others = dict(registration.KERNELS)
    kernel = others.pop(
        "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor"
    )
    with monkeypatch.context() as patch:
        patch.setattr(registration, "KERNELS", {**others, "gemv_4bit(Tensor A, Tensor B) -> Tensor": kernel})
        assert_refused(
            theirs, r"expected an op gemv_4bit\(Tensor A, Tensor B\) -> Tensor, got bitsandbytes::gemv_4bit\("
        )
    with monkeypatch.context() as patch:
        patch.setattr(registration, "KERNELS", {**others, "gemv_5bit(Tensor A) -> Tensor": kernel})
        assert_refused(theirs, "expected an op gemv_5bit, got none")
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "matmul_4bit", lambda A, B: None)
        assert_refused(theirs, r"expected matmul_4bit\(A, B, quant_state, out, bias\), got \(A, B\)")
    with monkeypatch.context() as patch:
        patch.delattr(theirs, "matmul_4bit")
        reason = registration._difference(theirs)
    assert reason == "expected matmul_4bit(A, B, quant_state, out, bias), got no such name"
    with monkeypatch.context() as patch:
        patch.delattr(theirs.nn.modules, "has_avx512bf16")
        assert_refused(theirs, "expected bitsandbytes.nn.modules.has_avx512bf16, got no such name")


def test_the_environment_variable(theirs, monkeypatch):
    own = theirs.matmul_4bit
    monkeypatch.setenv("PYNLP_BITSANDBYTES", "0")
    integration.register()
    assert theirs.matmul_4bit is own
    monkeypatch.setenv("PYNLP_BITSANDBYTES", "off")
    with pytest.raises(ValueError, match="environment variable PYNLP_BITSANDBYTES: expected 0 or 1, got 'off'"):
        integration.register()


FRESH = """
import json, sys
import pynlp
import pynlp.integrations.bitsandbytes as ours
assert "bitsandbytes" not in sys.modules and "transformers" not in sys.modules
ours.register()
assert "transformers" not in sys.modules
import bitsandbytes
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
import torch
x = torch.randn(5, 48)
packed, state = quantize_4bit(x, quant_type="nf4")
error = (dequantize_4bit(packed, state) - x).norm() / x.norm()
print(json.dumps([error.item(), bitsandbytes.matmul_4bit.__module__]))
"""


@pytest.mark.slow
def test_a_fresh_process(tmp_path):
    """`import pynlp` does not import bitsandbytes, registering not more than that."""
    environment = {**os.environ, "PYNLP_BITSANDBYTES": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error:Warning only once", "-c", FRESH], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    error, module = json.loads(result.stdout.splitlines()[-1])
    assert error < 0.12 and module == "pynlp.integrations.bitsandbytes.kernels"
    assert "Overriding" not in result.stderr


def test_the_entry_point():
    """bitsandbytes calls what this names."""
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    section = pyproject.partition('[project.entry-points."bitsandbytes.backends"]\n')[2].partition("\n[")[0]
    points = dict(re.findall(r'^(\w+) = "(.*)"$', section, re.MULTILINE))
    assert list(points) == ["pynlp"]
    assert EntryPoint("pynlp", points["pynlp"], "bitsandbytes.backends").load() is integration.register
