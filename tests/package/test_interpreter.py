"""The hastened interpreter of Triton: the same bits, and an unknown version keeps its own."""

import pytest
import torch
from cases.interpreter import hasten, restore
from cases.triton import GPU, NAMES, make_case, run_kernels, tiles, triton
from triton import language as tl
from triton.runtime import interpreter

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(GPU, reason="needs the interpreter, which a GPU replaces"),
]


@pytest.fixture
def own_interpreter():
    restore()
    yield
    hasten()


def changed_parts():
    return interpreter._patch_lang, interpreter._get_np_dtype, interpreter.interpreter_builder.options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_same_bits(dtype, own_interpreter, monkeypatch):
    tiles(monkeypatch)
    tensors, options = make_case(
        packed=[(5, 20), (0, 3)], heads=1, head_dim=8, dropout=0.2, window=(9, 3), softcap=5.0, table=True, slopes=2,
        sinks=True, rotary_dim=4, dtype=dtype,
    )  # fmt: skip
    theirs = run_kernels(tensors, options)
    hasten()
    for name, ours, expected in zip(NAMES, run_kernels(tensors, options), theirs, strict=True):
        assert torch.equal(ours, expected), name


def test_nothing_stays_patched_after_a_launch(monkeypatch):
    tiles(monkeypatch)
    before = dict(vars(tl)), dict(vars(tl.core)), dict(vars(tl.tensor)), dict(vars(tl.math))
    run_kernels(*make_case(seqlen_q=5, seqlen_k=7))
    assert (dict(vars(tl)), dict(vars(tl.core)), dict(vars(tl.tensor)), dict(vars(tl.math))) == before


def test_another_version_is_left_alone(own_interpreter, monkeypatch):
    own = changed_parts()
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    with pytest.warns(UserWarning, match="the interpreter of Triton 3.8.0 stays slow"):
        hasten()
    assert changed_parts() == own
    monkeypatch.undo()
    hasten()
    assert all(part is not before for part, before in zip(changed_parts(), own, strict=True))
