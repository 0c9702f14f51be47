"""Calls drawn from the whole space of arguments. `make fuzz` draws thousands of each kind, and new ones every time."""

import functools
import os

import hypothesis
import pytest
import torch
from fuzz import attention, decode, moe, quantization, refusals
from tqdm import tqdm

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MANY = int(os.environ.get("PYNLP_FUZZ_EXAMPLES", "0"))


@pytest.fixture(autouse=True)
def one_thread():
    """For all but the calls themselves, which draw theirs."""
    torch.set_num_threads(1)


@functools.cache
def progress(name: str) -> tqdm:
    return tqdm(desc=name, total=MANY, disable=not MANY, mininterval=1.0)


def drawn(calls, few: int):
    """Makes a test of so many calls, always the same; or of as many new ones as PYNLP_FUZZ_EXAMPLES says."""

    def decorate(test):
        @hypothesis.settings(max_examples=MANY or few, derandomize=not MANY)
        @hypothesis.given(call=calls)
        @functools.wraps(test)
        def counted(call):
            progress(test.__name__).update()
            test(call)

        return counted

    return decorate


@drawn(attention.padded_calls, few=350)
def test_attention(call):
    attention.check_attention(call)


@drawn(attention.packed_calls(), few=200)
def test_attention_varlen(call):
    attention.check_attention_varlen(call)


@drawn(attention.weights_calls(), few=200)
def test_attention_weights(call):
    attention.check_attention_weights(call)


@drawn(decode.calls(), few=300)
def test_attention_decode(call):
    decode.check_attention_decode(call)


@drawn(quantization.calls(), few=150)
def test_four_bit(call):
    quantization.check_four_bit(call)


@drawn(quantization.integer_calls(), few=150)
def test_integers(call):
    quantization.check_integers(call)


@drawn(moe.calls(), few=150)
def test_moe(call):
    moe.check_moe(call)


@drawn(refusals.bad_calls(), few=800)
def test_refusals(call):
    refusals.check_refused(call)
