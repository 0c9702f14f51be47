"""What all tests share; in `cases/silence.py`, the rule that a test which silently does not run fails the run."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYNLP_BITSANDBYTES", "0")  # a peer: tests compare with its own kernels
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: their threads must not wait in loops
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels, Triton's own too, are decorated: before it is imported

import pynlp
from pynlp import backends

pytest_plugins = ["cases.silence"]

hypothesis.settings.register_profile(
    "pynlp", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("pynlp")


@pytest.fixture(autouse=True)
def restore_process_state():
    """Every test starts from one seed, and leaves threads and instruction set as they were."""
    threads, isa = torch.get_num_threads(), pynlp.get_isa()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        pynlp.set_isa(isa)


@pytest.fixture
def one_thread_and_pythons_ctrl_c():
    """For models so small that they only wait for a second thread, and training that Ctrl-C interrupts."""
    torch.set_num_threads(1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN, so what a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def isa(request):
    """The instruction set in use; without the extension, which test_build.py refuses, the reference."""
    if request.param != "reference":
        pynlp.set_isa(request.param)
    return request.param


def pytest_generate_tests(metafunc):
    """Tests with `isa` run at the best one of this CPU; at the lesser ones too if marked, or if PYNLP_EVERY_ISA=1."""
    if "isa" not in metafunc.fixturenames:
        return
    *lesser, best = backends.available_isas() or ["reference"]
    every = metafunc.definition.get_closest_marker("every_isa") or os.environ.get("PYNLP_EVERY_ISA") == "1"
    lesser = [pytest.param(level, marks=pytest.mark.lesser_isa) for level in lesser] if every else []
    metafunc.parametrize("isa", [*lesser, best], indirect=True)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Marks what is interpreted and what cannot run; files with slow tests come first, lest they end last."""
    for item in items:
        if item.path.stem.endswith("_triton"):
            item.add_marker(pytest.mark.triton)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)
