"""The same calls on a GPU and on the CPU: public functions, autograd, compilation, models, decoding and training.

The CPU's are in fp64, on the reference. The kernels themselves have their tests in test_*_triton.py.
"""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from pynlp.decoding import beam_search, greedy, sample
from pynlp.functional import (
    QuantState4bit,
    QuantStateInt8,
    alibi_slopes,
    attention,
    attention_decode,
    attention_varlen,
    attention_weights,
    dequantize_4bit,
    gelu,
    grouped_mm,
    int4_linear,
    int8_dynamic_linear,
    int8_linear,
    layer_norm,
    linear_4bit,
    linear_cross_entropy,
    moe_mlp,
    quantize_4bit,
    quantize_int4,
    quantize_int8,
    relu,
    rms_norm,
    rotary_tables,
    swiglu,
)
from pynlp.models import Decoder, EncoderDecoder, TransformerConfig
from pynlp.models.config import POSITIONS
from pynlp.ops.common import plans
from pynlp.training import Batches, Trainer, TrainingConfig, WarmupCosine, teacher_forcing

pytestmark = pytest.mark.gpu

SEED = 2**40 + 5
# Largest error over the largest value: matrix products, sums and roundings of the dtype.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CU_SEQLENS = [0, 100, 100, 297]


def packed(q, k, v):
    cu = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=q.device)
    return attention_varlen(q[0], k[0], v[0], cu, cu, causal=True, dropout_p=0.2, seed=SEED)


def biased(q, k, v, bias, sinks):
    slopes, tables = alibi_slopes(q.shape[2]).to(q.device), rotary_tables(k.shape[1], q.shape[3])
    return attention(
        q, k, v, causal=True, window=(200, None), softcap=20.0, sinks=sinks, alibi_slopes=slopes, relative_bias=bias,
        rotary=tuple(x.to(q.device) for x in tables),
    )  # fmt: skip


def cross_entropy(x, weight, bias):
    target = (torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) * 7919 % weight.shape[0]).to(x.device)
    target[:, ::5] = -100
    return linear_cross_entropy(x, weight, target, bias, label_smoothing=0.1, z_loss=1e-3, softcap=30.0)


def four_bit(x):
    weight = (torch.arange(300 * 520) * 7919 % 2003 / 1000 - 1).view(300, 520)
    packed, state = quantize_4bit(weight, double_quant=True)
    state = QuantState4bit(*(part.to(x.device) if isinstance(part, Tensor) else part for part in state))
    return linear_4bit(x, packed.to(x.device), state)


def four_bit_decoded(x):
    """A weight that is quantized and read back where x is."""
    packed, state = quantize_4bit(x, quant_type="mxfp4")
    return dequantize_4bit(packed, state, dtype=x.dtype) + 0 * x


def eight_bit(x):
    weight = (torch.arange(300 * 520) * 7919 % 2003 / 1000 - 1).view(300, 520)
    codes, state = quantize_int8(weight, scheme="affine", granularity="group", group_size=64)
    state = QuantStateInt8(*(part.to(x.device) if isinstance(part, Tensor) else part for part in state))
    return int8_linear(x, codes.to(x.device), state)


def eight_bit_rounded(x):
    weight = (torch.arange(300 * 520) * 7919 % 2003 / 1000 - 1).view(300, 520)
    codes, state = quantize_int8(weight)
    state = QuantStateInt8(*(part.to(x.device) if isinstance(part, Tensor) else part for part in state))
    return int8_dynamic_linear(x, codes.to(x.device), state, outlier_threshold=3.5)


def four_bit_integers(x):
    """A product with a weight that is quantized where x is."""
    weight = (torch.arange(300 * 520, device=x.device) * 7919 % 2003 / 1000 - 1).view(300, 520)
    return int4_linear(x, *quantize_int4(weight, group_size=64))


def experts(x, scores, gate_up, down):
    """Two experts of eight for each token, and a token of nine without any."""
    index = torch.arange(2 * len(x), device=x.device).view(-1, 2) * 7 % 9
    return moe_mlp(x, index, scores.sigmoid(), gate_up, down)


def groups(x, gate_up, bias):
    offsets = torch.tensor([0, 30, 31, 200, 200, 201, 280, 290], device=x.device)
    return grouped_mm(x, gate_up.mT, offsets, bias)


QKV = dict(q=(2, 297, 8, 64), k=(2, 297, 2, 64), v=(2, 297, 2, 64))
ROWS = dict(x=(3, 297, 520), weight=(520,), bias=(520,), residual=(3, 297, 520))
# Name: the call, the shapes of its tensors; those of `WIDE` stay fp32.
CALLS = {
    "attention": (lambda q, k, v: attention(q, k, v, causal=True), QKV),
    "attention, biases": (biased, QKV | dict(bias=(32, 8), sinks=(8,))),
    "attention, dropout": (lambda q, k, v: attention(q, k, v, dropout_p=0.3, seed=SEED), QKV),
    "attention_varlen": (packed, QKV),
    "layer_norm": (layer_norm, {name: ROWS[name] for name in ("x", "weight", "bias")}),
    "layer_norm, all": (lambda x, weight, bias, residual: layer_norm(
        x, weight, bias, residual=residual, dropout_p=0.2, seed=SEED), ROWS),
    "rms_norm": (rms_norm, {name: ROWS[name] for name in ("x", "weight")}),
    "rms_norm, all": (lambda x, weight, residual: rms_norm(
        x, weight, residual=residual, dropout_p=0.2, seed=SEED), {n: ROWS[n] for n in ("x", "weight", "residual")}),
    "gelu": (lambda x: gelu(x, dropout_p=0.1, seed=SEED), dict(x=ROWS["x"])),
    "relu": (relu, dict(x=ROWS["x"])),
    "swiglu": (lambda x, residual: swiglu(x, residual), dict(x=ROWS["x"], residual=ROWS["x"])),
    "swiglu, packed": (lambda x: swiglu(x, dropout_p=0.5, seed=SEED), dict(x=ROWS["x"])),
    "int8_linear": (eight_bit, dict(x=ROWS["x"])),
    "int8_dynamic_linear": (eight_bit_rounded, dict(x=ROWS["x"])),
    "quantize_int4": (four_bit_integers, dict(x=ROWS["x"])),
    "linear_4bit": (four_bit, dict(x=ROWS["x"])),
    "quantize_4bit": (four_bit_decoded, dict(x=ROWS["x"])),
    "moe_mlp": (experts, dict(x=(297, 136), scores=(297, 2), gate_up=(8, 400, 136), down=(8, 136, 200))),
    "grouped_mm": (groups, dict(x=(297, 136), gate_up=(8, 400, 136), bias=(8, 400))),
    "linear_cross_entropy": (cross_entropy, dict(x=(3, 297, 64), weight=(5000, 64), bias=(5000,))),
}  # fmt: skip
WIDE = ("weight", "bias", "sinks")


def tensors_of(shapes, dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    dtypes = {name: torch.float32 if name in WIDE and len(shape) == 1 else dtype for name, shape in shapes.items()}
    dtypes |= {"bias": torch.float32} if "bias" in shapes else {}
    return {name: torch.randn(shape).to(dtypes[name]) for name, shape in shapes.items()}


def outputs_and_gradients(call, tensors) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    results = call(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(1)
    weights = [torch.randn(x.shape).bfloat16().to(x) for x in results]
    return [*results, *torch.autograd.grad(results, list(leaves.values()), weights)]


def on_gpu(tensors):
    return {name: x.cuda() for name, x in tensors.items()}


def assert_near(ours: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    error = (ours.detach().cpu().double() - expected.detach()).abs().max()
    assert error <= tolerance * expected.detach().abs().max(), f"{name}: {error:.3g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_functions(name, dtype):
    call, shapes = CALLS[name]
    tensors = tensors_of(shapes, dtype)
    ours = outputs_and_gradients(call, on_gpu(tensors))
    expected = outputs_and_gradients(call, {n: x.double() for n, x in tensors.items()})
    for i, (x, exact) in enumerate(zip(ours, expected, strict=True)):
        assert x.is_cuda
        assert_near(x, exact, TOLERANCE[dtype], f"result {i}")


@pytest.mark.parametrize("name", CALLS)
def test_compiled_functions(name):
    call, shapes = CALLS[name]
    tensors = on_gpu(tensors_of(shapes, torch.bfloat16))
    compiled = outputs_and_gradients(torch.compile(call, fullgraph=True), tensors)
    for i, (x, expected) in enumerate(zip(compiled, outputs_and_gradients(call, tensors), strict=True)):
        assert_near(x, expected.cpu().double(), TOLERANCE[torch.bfloat16], f"result {i}")


@pytest.mark.parametrize("name", CALLS)
def test_later_calls(name):
    """By the plans that earlier ones leave, the bits are those without plans."""
    call, shapes = CALLS[name]
    for _ in range(6):
        tensors = {n: x + torch.randn_like(x) for n, x in on_gpu(tensors_of(shapes, torch.bfloat16)).items()}
        ours = outputs_and_gradients(call, tensors)
        with plans.off():
            expected = outputs_and_gradients(call, tensors)
        for i, (x, exact) in enumerate(zip(ours, expected, strict=True)):
            assert torch.equal(x, exact), f"result {i}"


@pytest.mark.parametrize("paged", [False, True])
def test_decode_in_a_graph(paged):
    """A captured step does with other values what a call does, and asserts what a call asserts."""
    q, k, v = (torch.randn(2, 1, heads, 64, device="cuda").bfloat16() for heads in (8, 2, 2))
    caches = [torch.randn(2, 256, 2, 64, device="cuda").bfloat16() for _ in range(2)]
    lengths = torch.tensor([3, 100], dtype=torch.int32, device="cuda")
    options = {"rotary": rotary_tables(256, 64, device="cuda")}
    if paged:
        caches = [x.view(32, 16, 2, 64) for x in caches]
        options["block_table"] = torch.arange(32, dtype=torch.int32, device="cuda").view(2, 16)

    def step(caches):
        return attention_decode(q, *caches, lengths, k=k, v=v, **options)

    for _ in range(3):
        step(caches)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = step(caches)
    for _ in range(3):
        for x in (q, k, v):
            x.normal_()
        lengths += 7
        copies = [x.clone() for x in caches]
        expected = step(copies)
        graph.replay()
        assert torch.equal(out, expected) and all(map(torch.equal, caches, copies))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lengths[0] = 257", "cache_lengths: expected values in range"),
        ("lengths[1] = -1", "cache_lengths: expected values in range"),
        ("lengths[1] = 202", "rotary: expected tables that reach the last position"),
        ("pages[1, 0] = 99", "block_table: expected pages of the cache"),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_decode_asserts_on_the_device(change, message, new):
    """In a process of its own, for it ends the use of the GPU."""
    program = f"""
import torch
from pynlp.functional import attention_decode, rotary_tables
q, k, v = (torch.randn(2, 1, heads, 64, device="cuda") for heads in (8, 2, 2))
k_cache, v_cache = torch.randn(2, 32, 16, 2, 64, device="cuda")
lengths = torch.tensor([3, 100], dtype=torch.int32, device="cuda")
pages = torch.arange(32, dtype=torch.int32, device="cuda").view(2, 16)
options = dict(block_table=pages, rotary=rotary_tables(201, 64, device="cuda"), **(dict(k=k, v=v) if {new} else {{}}))
for _ in range(4):
    attention_decode(q, k_cache, v_cache, lengths, **options)
torch.cuda.synchronize()
{change}
attention_decode(q, k_cache, v_cache, lengths, **options)
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stderr + result.stdout


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU beside the first")
def test_another_device_than_the_current_one():
    x = torch.randn(64, 256, device="cuda:1", requires_grad=True)
    for _ in range(6):
        y = gelu(x)
        torch.testing.assert_close(y, torch.nn.functional.gelu(x), atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.device == x.device and grad.isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_and_weights(dtype):
    torch.manual_seed(0)
    q, new_k, new_v = (torch.randn(3, 1, heads, 64).to(dtype) for heads in (8, 2, 2))
    caches = [torch.randn(3, 400, 2, 64).to(dtype) for _ in range(2)]
    lengths = torch.tensor([0, 150, 399], dtype=torch.int32)

    def decode(convert):
        k_cache, v_cache = map(convert, caches)
        out = attention_decode(
            convert(q), k_cache, v_cache, lengths.to(k_cache.device), k=convert(new_k), v=convert(new_v), causal=True
        )
        return out, k_cache, v_cache, attention_weights(convert(q), k_cache)

    ours = decode(lambda x: x.cuda())
    for name, x, exact in zip("out k v weights".split(), ours, decode(lambda x: x.double()), strict=True):
        assert_near(x, exact, TOLERANCE[dtype], name)


def make_model(kind, positions, **options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=500, embed_dim=64, layers=2, heads=4, max_positions=64)
    model = kind(TransformerConfig(**sizes, positions=positions, **options))
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a wrong part shows
            parameter.normal_(std=0.15).add_(1 if parameter.dim() == 1 else 0)
    return model


def make_batch():
    torch.manual_seed(1)
    return (
        torch.randint(3, 500, (4, 33)),
        torch.tensor([33, 1, 20, 7], dtype=torch.int32),
        torch.randint(3, 500, (4, 29)),
    )


def loss_and_gradients(model, autocast=None):
    device = model.output_weight.device
    source, lengths, target = (x.to(device) for x in make_batch())
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        features = model.features(source, lengths, target[:, :-1])
        loss = linear_cross_entropy(features, model.output_weight, target[:, 1:])
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", ["rms pre swiglu", "layer post gelu"])
def test_encoder_decoder(kind, positions, autocast):
    """Its loss and the gradient of each parameter: as near to exact as on the CPU in the same precision."""
    norm, place, activation = kind.split()
    options = dict(norm=norm, pre_norm=place == "pre", activation=activation)
    model = make_model(EncoderDecoder, positions, **options)
    expected = loss_and_gradients(copy.deepcopy(model).double())
    cpu = loss_and_gradients(copy.deepcopy(model), autocast)
    ours = loss_and_gradients(model.cuda(), autocast)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, x, peer, exact in zip(names, ours, cpu, expected, strict=True):
        exact = exact.detach()
        error, allowed = ((y.detach().cpu().double() - exact).norm() / exact.norm() for y in (x, peer))
        # A single value, the loss, may be far nearer to exact by chance.
        least = 1e-3 if autocast is not None and name == "loss" else 1e-5
        assert error <= 3 * allowed + least, f"{name}: {error:.3g}, on the CPU {allowed:.3g}"


@pytest.mark.parametrize("positions", ["rope", "relative", "alibi", "learned"])
def test_decoding(positions):
    """Greedy, beam search and sampling choose on the GPU what they choose on the CPU."""
    model = make_model(EncoderDecoder, positions).eval()
    wide, model = copy.deepcopy(model).double(), model.cuda()
    source, lengths, _ = make_batch()
    found = []
    for each in (wide, model):
        device = each.output_weight.device

        def state(each=each, device=device):
            return each.decoding_state(source.to(device), lengths.to(device), 24)

        prefix = torch.ones(4, 1, dtype=torch.long, device=device)
        found.append(
            [
                greedy(state(), prefix, end=2, max_length=20),
                beam_search(state(), prefix, end=2, max_length=20, beam_size=4),
            ]
        )
        assert len(sample(state(), prefix, end=2, max_length=20, top_k=5, seed=0)) == 4
    exact, ours = found
    assert [h.tokens for h in ours[0]] == [h.tokens for h in exact[0]]
    assert [h[0].tokens for h in ours[1]] == [h[0].tokens for h in exact[1]]


class Interrupt(Exception):
    pass


def trainer(folder, fails_at=None, steps=12):
    torch.manual_seed(0)
    model = make_model(Decoder, "rope", dropout=0.2).cuda()
    sentences = [[3 + (7 * i + j) % 400 for j in range(3 + i % 17)] for i in range(60)]
    calls = []

    def collate(items):
        inputs, targets, lengths = teacher_forcing([sentences[i] for i in items], 1, 2, padding=0)
        return inputs.cuda(), targets.cuda(), lengths.cuda()

    def loss(model, batch):
        calls.append(1)
        if len(calls) == fails_at:
            raise Interrupt
        inputs, targets, lengths = batch
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(inputs)
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
        ), lengths.sum()

    config = TrainingConfig(steps, 1e-3, WarmupCosine(2, 12), save_every=4, ema_decay=0.9)
    batches = Batches([len(s) + 1 for s in sentences], 200, collate)
    return Trainer(model, loss, config, batches, folder)


def test_training_resumes(tmp_path):
    """After a crash, to the bit: weights, moving average, dropout."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(Interrupt):
        trainer(tmp_path / "parts", fails_at=7).train()
    parts = trainer(tmp_path / "parts")
    parts.train(resume=True)
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(parts.ema.state_dict(), whole.ema.state_dict(), rtol=0, atol=0)
