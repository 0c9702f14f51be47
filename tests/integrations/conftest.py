"""Models and calls so small that more threads than one make them slower."""

import warnings

import pytest
import torch

from pynlp import backends


@pytest.fixture(autouse=True)
def one_thread(restore_process_state):
    torch.set_num_threads(1)


@pytest.fixture
def fallbacks():
    """The messages of the fallbacks in a test, each told once."""
    backends.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if "transformers' own attention" in str(w.message)]
