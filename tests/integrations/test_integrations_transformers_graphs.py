"""Models of transformers on pynlp's attention in one graph, and with tensors that have no values."""

import copy

import pytest
import torch
from cases.transformers import SEQLEN, VOCABULARY, assert_same_logits, inputs_of, pair
from torch._subclasses import FakeTensorMode

from pynlp.ops.attention import positions

pytestmark = pytest.mark.filterwarnings("ignore:attn_implementation='pynlp'")


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """A back end for torch.compile, and the graphs that it was given."""
    seen = []

    def backend(graph, inputs):
        seen.append(str(graph.graph))
        return graph

    return backend, seen


PADDING = {"no": "no", "right": "right", "left": "left", "gap": "left"}


def padded(name, padding):
    inputs, kept = inputs_of(name, PADDING[padding])
    if padding == "gap":
        inputs["attention_mask"][1, 4] = 0
        kept[1, 4] = False
    return inputs, kept


OWN = ("bloom", "gptj", "falcon")


@pytest.mark.parametrize("padding", ["no", "right", "gap"])
@pytest.mark.parametrize("name", ["mistral", "bert", *(pytest.param(name, marks=pytest.mark.slow) for name in OWN)])
@torch.no_grad()
def test_a_forward_pass_is_one_graph(name, padding, graphs, fallbacks):
    """On the kernel where no values decide: of the mask, or of position ids, which may tell of packed sequences."""
    eager, fused = pair(name)
    inputs, kept = padded(name, padding)
    backend, seen = graphs
    actual = torch.compile(fused, fullgraph=True, backend=backend)(**inputs, **uncached(name)).logits
    assert_same_logits(actual[kept], eager(**inputs).logits[kept])
    (graph,) = seen
    served = padding == "no" and name in ("bloom", "falcon", "bert")
    assert ("pynlp.attention_forward" in graph) == served
    assert len(fallbacks()) == (0 if served else 1)
    assert all("cannot be looked at, as under fullgraph=True" in message for message in fallbacks())


def uncached(name):
    return {} if name == "bert" else dict(use_cache=False)


STATIC = [("mistral", "left"), ("gemma2", "no"), ("gemma2", "gap")]


@pytest.mark.parametrize(
    "name, padding", [("llama", "no"), *(pytest.param(*x, marks=pytest.mark.slow) for x in STATIC)]
)
@torch.no_grad()
def test_generation_with_a_static_cache_in_one_graph(name, padding, graphs, fallbacks):
    """generate() makes the mask outside of the graph, so the kernel serves all but gaps."""
    eager, fused = pair(name)
    inputs, _ = padded(name, padding)
    options = dict(
        max_new_tokens=6, min_new_tokens=6, cache_implementation="static", disable_compile=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    expected = eager.generate(**inputs, **options)
    backend, seen = graphs
    model = copy.copy(fused)
    model.forward = torch.compile(fused.forward, fullgraph=True, backend=backend)
    actual = model.generate(**inputs, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert_same_logits(ours, theirs)
    kernel = ["pynlp.attention" in graph for graph in seen]
    assert all(kernel) if padding != "gap" else not all(kernel)  # a window moves past the gap
    assert len(seen) <= 4, "a graph a step"
    assert len(fallbacks()) == (padding == "gap")
    assert all("there is padding between tokens of a row" in message for message in fallbacks())


@torch.no_grad()
def test_a_fallback_is_told_once_outside_of_graphs_too(fallbacks):
    _, fused = pair("llama")
    inputs, _ = padded("llama", "gap")
    fused(**inputs)
    fused(**inputs)
    assert len(fallbacks()) == 1


@torch.no_grad()
def test_weights_of_a_graph_are_eagers(graphs):
    eager, fused = pair("gpt2")
    inputs, _ = inputs_of("gpt2")
    backend, _ = graphs
    options = dict(output_attentions=True, use_cache=False)
    for model in (eager, fused):
        model(**inputs, **options)  # installs the hooks that collect the weights
    actual = torch.compile(fused, fullgraph=True, backend=backend)(**inputs, **options).attentions
    for ours, theirs in zip(actual, eager(**inputs, **options).attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", ["no", "left"])
@pytest.mark.parametrize("name", ["llama", "bloom", "mpt", "gpt-neo"])
@torch.no_grad()
def test_fake_tensors_leave_nothing_behind(name, padding):
    """Neither a pass with fake tensors before one with real ones nor the other way round."""
    positions._kept.clear()
    eager, fused = pair(name)
    inputs, kept = inputs_of(name, padding)
    expected = eager(**inputs).logits[kept]
    for _ in range(2):
        mode = FakeTensorMode()
        model = copy.deepcopy(fused)
        for module in model.modules():
            for members in (module._parameters, module._buffers):
                members.update((key, mode.from_tensor(x)) for key, x in members.items() if x is not None)
        with mode:
            out = model(**{key: mode.from_tensor(x) for key, x in inputs.items()}, use_cache=False)
        assert out.logits.shape == (*kept.shape, VOCABULARY)
        assert_same_logits(fused(**inputs).logits[kept], expected)


@torch.no_grad()
def test_an_exported_model_matches_eager():
    eager, fused = pair("bert")
    ids = torch.randint(3, VOCABULARY, (2, SEQLEN))

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = fused

        def forward(self, ids):
            return self.model(ids).logits

    exported = torch.export.export(Logits(), (ids,))
    assert "pynlp.attention_forward" in str(exported.graph)
    assert_same_logits(exported.module()(ids), eager(ids).logits)
