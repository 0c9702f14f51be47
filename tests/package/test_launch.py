"""Which tile a kernel gets: the first that fits or, only on request, the fastest, which is kept on disk."""

import functools
import json

import pytest
import torch
from pynlp.kernels.attention import configs
from pynlp.kernels.attention import launch as attention
from pynlp.kernels.common import launch as launching
from triton.runtime.errors import OutOfResources

DEFAULT = attention.Config(16, 16, 4, 1, False, 16)
CPU = torch.device("cpu")


def choose(kernel, tiles, start, key=("sm_90", 64, 2), sizes=(1000, 1000), square=False):
    neighbours = functools.partial(configs.neighbours, square=square)
    return launching.choose(kernel, CPU, tiles, (key,), sizes, start, neighbours)


@pytest.fixture
def stopwatch(monkeypatch, tmp_path):
    """Tuning is on; the time of a launch is what the launch returns. Gives the list of times taken."""
    taken = []
    monkeypatch.setattr(launching, "_fitting", {})
    monkeypatch.setattr(launching, "_tuned", {})

    def time(run):
        taken.append(run())
        return taken[-1]

    monkeypatch.setenv("PYNLP_AUTOTUNE", "1")
    monkeypatch.setenv("PYNLP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(launching, "_time", time)
    return taken


def cost(config):
    """Least at 64 x 32 with 8 warps and 3 stages."""
    wrong = abs(config.block_m - 64) + abs(config.block_n - 32) + abs(config.num_warps - 8) * 9
    return 1.0 + wrong + abs(config.num_stages - 3)


class Compiled:
    """What Triton's compiled kernels tell of themselves."""

    def __init__(self, spills, too_large=False):
        self.n_spills, self.too_large = spills, too_large

    @property
    def run(self):
        if self.too_large:
            raise OutOfResources(600, 512, "tensor memory")


def test_the_first_tile_that_fits_is_taken(monkeypatch):
    monkeypatch.setattr(launching, "_fitting", {})
    tiles = [DEFAULT._replace(block_m=size) for size in (128, 64, 32, 16)]
    resources = {128: Compiled(None, too_large=True), 64: Compiled(8), 32: Compiled(0)}
    asked = []

    def start(config, compile_only):
        assert compile_only
        asked.append(config.block_m)
        return resources[config.block_m]

    assert choose("forward", tiles, start).block_m == 32
    assert choose("forward", tiles, start, sizes=(7, 7)).block_m == 32
    assert asked == [128, 64, 32]  # once, whatever the lengths
    resources[16] = Compiled(0)
    assert choose("forward", tiles[::-1], start).block_m == 16  # fewer rows ask for other tiles
    resources[32] = Compiled(4)
    assert choose("forward", tiles, start, ("sm_90", 128, 2), (7, 7)).block_m == 16
    assert not launching.fits(Compiled(None))  # Triton raises only the first time


class Kernel:
    """What Triton's kernels are to a launch."""

    arg_names = ["p_x", "rows", "BLOCK"]
    __name__ = "kernel"

    def __init__(self):
        self.started = []

    def warmup(self, *arguments, grid, **options):
        return arguments[-1]

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.started.append((grid, arguments, options))


def test_a_pretended_chip_compiles_and_starts_nothing(stopwatch):
    kernel, x = Kernel(), torch.empty(3, device="meta")
    tiles = [DEFAULT._replace(block_m=size) for size in (128, 64, 32)]

    def start(config, compile_only=False):
        return launching.launch(kernel, (1,), x, 3, config.block_m, compile_only=compile_only, **config.options())

    with launching.pretend("sm_90", lambda compiled: compiled < 128) as pretence:
        assert launching.chip_of(x) == "sm_90"
        start(choose("forward", tiles, start))
    assert [(config.block_m, compiled) for config, compiled in pretence.rejected] == [(128, 128)]
    options = dict(p_x=x, rows=3, BLOCK=64, num_warps=4, num_stages=1)
    assert pretence.launches == [("kernel", options, 64)]
    assert not kernel.started and not stopwatch and not launching._fitting

    assert launching.chip_of(x) == "interpreter"
    start(tiles[2])
    assert kernel.started == [((1,), (x, 3, 32), dict(num_warps=4, num_stages=1))]


def test_nothing_is_measured_unless_asked_for(stopwatch, monkeypatch):
    for value in ("0", ""):
        monkeypatch.setenv("PYNLP_AUTOTUNE", value)
        assert choose("forward", [DEFAULT], cost) == DEFAULT
    monkeypatch.delenv("PYNLP_AUTOTUNE")
    assert choose("forward", [DEFAULT], cost) == DEFAULT
    assert not stopwatch and not launching.cache_file().exists()


def test_the_fastest_tile_is_found_and_kept(stopwatch):
    found = choose("forward", [DEFAULT], cost)
    assert found == DEFAULT._replace(block_m=64, block_n=32, num_warps=8, num_stages=3)
    assert len(stopwatch) < 40
    measured = len(stopwatch)
    launching._tuned.clear()  # as another process
    assert choose("forward", [DEFAULT], cost, sizes=(600, 1023)) == found  # lengths of the same power of two
    assert len(stopwatch) == measured
    assert json.loads(launching.cache_file().read_text()) == {
        f"{launching._name(CPU)} | forward | [('sm_90', 64, 2)] | 10 | 10": list(found)
    }
    assert [path.name for path in launching.cache_file().parent.iterdir()] == ["tiles.json"]

    choose("keys", [DEFAULT], cost)
    choose("forward", [DEFAULT], cost, sizes=(1000, 2000))
    assert len(stopwatch) == 3 * measured and len(json.loads(launching.cache_file().read_text())) == 3


def test_a_tile_that_does_not_fit_loses(stopwatch):
    def launch(config):
        if config.block_m > 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return cost(config)

    assert choose("forward", [DEFAULT], launch).block_m == 32


def test_tiles_stay_what_the_kernels_can_do(stopwatch):
    seen = []
    square = attention.Config(64, 64, 8, 1, True, 64)

    def launch(config):
        seen.append(config)
        return 1.0 / (config.block_m * config.block_n)  # the larger the faster

    assert choose("table", [square], launch, square=True)[:2] == (128, 128)
    assert all(config.block_m == config.block_n for config in seen)
    choose("forward", [DEFAULT], launch)
    for config in seen:
        assert 16 <= config.block_m <= 128 and 16 <= config.block_n <= 128 and config.num_warps in (4, 8)
        assert config.block_n % (config.masked or 1) == 0 and config.block_m % (config.masked or 1) == 0


@pytest.mark.triton
def test_the_launchers_use_what_was_found(stopwatch, monkeypatch):
    q, k, v = (torch.randn(1, 40, 2, 16, device="cuda" if torch.cuda.is_available() else "cpu") for _ in range(3))
    causal = dict(softmax_scale=0.25, window_left=-1, window_right=0, softcap=0.0, rotary_offset=0)
    options = dict.fromkeys(attention.Options._fields) | causal | dict(rotary_interleaved=False, dropout_p=0.0)
    arguments = options.values()
    monkeypatch.setenv("PYNLP_AUTOTUNE", "0")
    out, lse = attention.attention_forward(q, k, v, *arguments)
    gradients = attention.attention_backward(q, None, q, k, v, out, lse, *arguments, False, False, False)

    monkeypatch.setenv("PYNLP_AUTOTUNE", "1")
    monkeypatch.setattr(
        launching, "_time", lambda run: (run(), stopwatch.append(1), -len(stopwatch))[2]
    )  # later: faster
    monkeypatch.setattr(configs, "LARGEST_BLOCK", 32)
    tuned = attention.attention_forward(q, k, v, *arguments)
    torch.testing.assert_close(tuned, (out, lse))
    tuned = attention.attention_backward(q, None, q, k, v, out, lse, *arguments, False, False, False)
    torch.testing.assert_close(tuned, gradients)
    kept = json.loads(launching.cache_file().read_text())
    assert [key.split(" | ")[1] for key in kept] == ["forward", "keys", "queries"]
    assert len(stopwatch) > 12
