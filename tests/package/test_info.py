"""What runs where and why: info, the instruction set, and life without Triton, extension or compiler."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

import pynlp
from pynlp import backends

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, in the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def output_of(code: str, **environment: str) -> str:
    done = run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_info():
    info = pynlp.info()
    assert info["pynlp"] == pynlp.__version__ and info["torch"] == torch.__version__
    assert info["triton"] == triton.__version__
    assert info["threads"] == torch.get_num_threads() and info["devices"][0] == "cpu"
    assert info["isa"] == {"available": backends.available_isas(), "in use": pynlp.get_isa()}
    assert {"attention_forward", "attention_backward"} <= info["back ends"].keys()
    for op, served_by in info["back ends"].items():
        assert served_by["cpu"] == f"native ({pynlp.get_isa()})", f"{op}: every op has a native kernel"
        if not torch.cuda.is_available():
            assert served_by["cuda"] in ("none: no GPU found", "none: torch is built without GPU support")


def test_command_line():
    shown = subprocess.run([sys.executable, "-m", "pynlp"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in (f"torch: {torch.__version__}", "attention_forward:", f"cpu: native ({pynlp.get_isa()})"):
        assert line in shown


def test_has_bf16(monkeypatch):
    cpu = torch.device("cpu")
    assert pynlp.has_bf16(cpu) == ("avx512_bf16" in Path("/proc/cpuinfo").read_text())
    monkeypatch.setattr(backends, "_native", SimpleNamespace(detected_features=lambda: {"avx512_bf16": True}))
    assert pynlp.has_bf16(cpu)
    monkeypatch.setattr(backends, "_native", None)  # then nothing is known of the CPU
    assert not pynlp.has_bf16(cpu)


def test_info_of_an_op_without_a_kernel(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    assert pynlp.info()["back ends"]["attention_forward"]["cpu"] == "reference: no native kernel"


def test_info_of_ops_with_and_without_a_launcher(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    served_by = {op: served["cuda"] for op, served in pynlp.info()["back ends"].items()}
    assert served_by["linear"] == "reference: no Triton kernel"
    assert served_by["attention_forward"] == f"triton {triton.__version__}"


@pytest.mark.every_isa
def test_every_isa_can_be_set(isa):
    assert pynlp.get_isa() == isa
    features = backends.native().features()
    levels = list(backends.ISA_FEATURES)
    above = [feature for level in levels[levels.index(isa) + 1 :] for feature in backends.ISA_FEATURES[level]]
    assert not any(features[feature] for feature in above)
    assert pynlp.info()["back ends"]["attention_forward"]["cpu"] == f"native ({isa})"


def test_isa_reaches_the_kernels():
    """The levels round differently, so the bits tell which one ran."""
    q, k = torch.randn(2, 1, 64, 2, 64)
    results = []
    for isa in backends.available_isas():
        pynlp.set_isa(isa)
        results.append(pynlp.functional.attention(q, k, k))
    assert len(results) < 2 or any(not torch.equal(results[0], other) for other in results[1:])


def test_bad_isa(monkeypatch):
    before = pynlp.get_isa()
    with pytest.raises(ValueError, match="level: expected one of portable, avx2, avx512, avx512_bf16_vnni, got 'sse'"):
        pynlp.set_isa("sse")
    monkeypatch.setattr(backends, "available_isas", lambda: ["portable", "avx2"])  # a CPU without AVX-512
    with pytest.raises(ValueError, match="level: expected a level of this CPU, portable or avx2, got 'avx512'"):
        pynlp.set_isa("avx512")
    assert pynlp.get_isa() == before


@pytest.mark.slow
def test_isa_from_the_environment():
    show = "import pynlp; print(pynlp.get_isa())"
    for isa in backends.available_isas():
        assert output_of(show, PYNLP_ISA=isa).strip() == isa
    done = run_python(show, PYNLP_ISA="neon9")
    assert done.returncode != 0
    assert "ValueError: environment variable PYNLP_ISA: expected one of portable, avx2" in done.stderr
    lacking = "import pynlp; pynlp.backends.available_isas = lambda: ['portable']; pynlp.backends.load_native()"
    done = run_python(lacking, PYNLP_ISA=backends.available_isas()[-1])
    assert "ValueError: environment variable PYNLP_ISA: expected a level of this CPU, portable, got" in done.stderr


def test_threads_follow_torch():
    """One thread: all CPU time that attention takes is the calling thread's."""
    q = torch.randn(1, 1024, 8, 64)
    torch.set_num_threads(1)
    pynlp.functional.attention(q, q, q)
    own, cpu = time.thread_time(), time.process_time()
    for _ in range(5):
        pynlp.functional.attention(q, q, q)
    own, cpu = time.thread_time() - own, time.process_time() - cpu
    assert cpu <= 1.15 * own
    assert pynlp.info()["threads"] == 1


IMPORT = """
import sys, time
import torch
known, watched = set(sys.modules), []
sys.addaudithook(lambda event, _: event.startswith(("socket.", "subprocess.", "os.system")) and watched.append(event))
start = time.process_time()
import pynlp
seconds = time.process_time() - start
new = {name.split(".")[0] for name in set(sys.modules) - known}
assert not torch.cuda.is_initialized() and not watched, watched
print(seconds, *sorted(new - set(sys.stdlib_module_names)))
"""


def test_import_is_light():
    """Beside torch: under 150 ms of CPU time, no module of another package, no network, no process, no GPU driver."""
    seconds = []
    for _ in range(5):
        taken, *packages = output_of(IMPORT).split()
        assert packages == ["pynlp"]
        seconds.append(float(taken))
        if seconds[-1] < 0.15:
            break
    assert min(seconds) < 0.15


USE = """
import warnings, torch, pynlp
from pynlp import backends
from pynlp.functional import attention
q = torch.randn(2, 9, 2, 8, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    attention(q.detach().double(), q.detach().double(), q.detach().double())
    assert not caught, "fp64 is what the reference is for"
    for _ in range(3):
        attention(q, q, q, causal=True).sum().backward()
out = attention(q, q, q, causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(*[q.double().transpose(1, 2)] * 3, is_causal=True)
torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=0, atol=1e-5)
(wanted,) = torch.autograd.grad(expected.sum() * 3, q)
torch.testing.assert_close(q.grad, wanted, rtol=0, atol=1e-4)
"""


def test_without_triton():
    shown = output_of(
        "import sys; sys.modules['triton'] = None\n" + USE + "assert not caught, caught\nprint(pynlp.info()['triton'])"
    )
    assert shown.strip() == "Triton is not installed"


NO_EXTENSION = "import sys; sys.modules['pynlp._C'] = None\n"
BROKEN_EXTENSION = """
import sys
class Broken:
    def find_spec(name, path, target=None):
        if name == "pynlp._C":
            raise ImportError("undefined symbol: torch_of_tomorrow")
sys.meta_path.insert(0, Broken)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "prelude, reason",
    [(NO_EXTENSION, "extension not built"), (BROKEN_EXTENSION, "extension does not load: undefined symbol: torch_of")],
    ids=["not built", "broken"],
)
def test_without_extension(prelude, reason):
    """The reference serves, and says so once; all else that needs native code says why there is none."""
    shown = output_of(
        prelude
        + USE
        + "print(len(caught), caught[0].message)\n"
        + "print(backends.native_missing_reason(), pynlp.get_isa(), backends.available_isas())\n"
        + "print(pynlp.info()['isa']['in use'], pynlp.info()['back ends']['attention_backward']['cpu'])\n"
        + "for call in (lambda: pynlp.set_isa('portable'), pynlp.probes.peak_fma):\n"
        + "    try: call()\n"
        + "    except RuntimeError as error: print(error)\n"
        + "torch.library.opcheck(torch.ops.pynlp.attention_forward.default,\n"
        + "    (q, q, q, 0.3, -1, 0, 0.0, *(None,) * 10, 0, False, 0.0, None))\n"
        + "compiled = torch.compile(attention, fullgraph=True, backend='aot_eager')\n"
        + "assert torch.equal(compiled(q, q, q, causal=True), out)\n",
        PYNLP_ISA="portable",
    )
    warning, state, served_by, *refusals = shown.splitlines()
    assert warning.startswith(f"1 pynlp runs on the slow PyTorch reference on the CPU: {reason}")
    assert state.startswith(reason) and state.endswith("None []")
    assert served_by.startswith(f"none: {reason}") and f"reference: {reason}" in served_by
    assert len(refusals) == 2 and all(line.startswith(f"pynlp's native code is missing: {reason}") for line in refusals)
