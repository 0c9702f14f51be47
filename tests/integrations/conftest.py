"""Models and calls so small that more threads than one make them slower."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(restore_process_state):
    torch.set_num_threads(1)
