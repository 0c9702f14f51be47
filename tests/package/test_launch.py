"""Which tile a kernel gets: the first that fits or, only on request, the fastest, which is kept on disk."""

import json

import pytest
import torch
from pynlp.kernels.attention import launch as attention
from pynlp.kernels.common import launch as choice
from triton.runtime.errors import OutOfResources

DEFAULT = attention.Config(16, 16, 4, 1, False, 16)
WORK = (("sm_90", 64, 2), 1000, 1000)


@pytest.fixture
def stopwatch(monkeypatch, tmp_path):
    """Tuning is on; the time of a launch is what the launch returns. Gives the list of times taken."""
    taken = []
    monkeypatch.setattr(choice, "_fitting", {})
    monkeypatch.setattr(choice, "_tuned", {})

    def time(run):
        taken.append(run())
        return taken[-1]

    monkeypatch.setenv("PYNLP_AUTOTUNE", "1")
    monkeypatch.setenv("PYNLP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_time", time)
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
    monkeypatch.setattr(choice, "_fitting", {})
    tiles = [DEFAULT._replace(block_m=size) for size in (128, 64, 32, 16)]
    resources = {128: Compiled(None, too_large=True), 64: Compiled(8), 32: Compiled(0)}
    asked = []

    def start(config, compile_only):
        assert compile_only
        asked.append(config.block_m)
        return resources[config.block_m]

    assert choice.choose("forward", tiles, WORK, start).block_m == 32
    assert choice.choose("forward", tiles, (WORK[0], 7, 7), start).block_m == 32
    assert asked == [128, 64, 32]  # once, whatever the lengths
    resources[16] = Compiled(0)
    assert choice.choose("forward", tiles[::-1], WORK, start).block_m == 16  # fewer rows ask for other tiles
    resources[32] = Compiled(4)
    assert choice.choose("forward", tiles, (("sm_90", 128, 2), 7, 7), start).block_m == 16
    assert not choice.fits(Compiled(None))  # Triton raises only the first time


def test_nothing_is_measured_unless_asked_for(stopwatch, monkeypatch):
    for value in ("0", ""):
        monkeypatch.setenv("PYNLP_AUTOTUNE", value)
        assert choice.choose("forward", [DEFAULT], WORK, cost) == DEFAULT
    monkeypatch.delenv("PYNLP_AUTOTUNE")
    assert choice.choose("forward", [DEFAULT], WORK, cost) == DEFAULT
    assert not stopwatch and not choice.cache_file().exists()


def test_the_fastest_tile_is_found_and_kept(stopwatch):
    found = choice.choose("forward", [DEFAULT], WORK, cost)
    assert found == DEFAULT._replace(block_m=64, block_n=32, num_warps=8, num_stages=3)
    assert len(stopwatch) < 40
    measured = len(stopwatch)
    choice._tuned.clear()  # as another process
    assert choice.choose("forward", [DEFAULT], (WORK[0], 600, 1023), cost) == found  # lengths of the same power of two
    assert len(stopwatch) == measured
    assert json.loads(choice.cache_file().read_text()) == {
        f"{choice._device()} | forward | [('sm_90', 64, 2)] | 10 | 10": list(found)
    }
    assert [path.name for path in choice.cache_file().parent.iterdir()] == ["tiles.json"]

    choice.choose("keys", [DEFAULT], WORK, cost)
    choice.choose("forward", [DEFAULT], (WORK[0], 1000, 2000), cost)
    assert len(stopwatch) == 3 * measured and len(json.loads(choice.cache_file().read_text())) == 3


def test_a_tile_that_does_not_fit_loses(stopwatch):
    def launch(config):
        if config.block_m > 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return cost(config)

    assert choice.choose("forward", [DEFAULT], WORK, launch).block_m == 32


def test_tiles_stay_what_the_kernels_can_do(stopwatch):
    seen = []
    square = attention.Config(64, 64, 8, 1, True, 64)

    def launch(config):
        seen.append(config)
        return 1.0 / (config.block_m * config.block_n)  # the larger the faster

    assert choice.choose("table", [square], WORK, launch)[:2] == (128, 128)
    assert all(config.block_m == config.block_n for config in seen)
    choice.choose("forward", [DEFAULT], WORK, launch)
    for config in seen:
        assert 16 <= config.block_m <= 128 and 16 <= config.block_n <= 128 and config.num_warps in (4, 8)
        assert config.block_n % (config.masked or 1) == 0 and config.block_m % (config.masked or 1) == 0


def test_the_launchers_use_what_was_found(stopwatch, monkeypatch):
    q, k, v = (torch.randn(1, 40, 2, 16, device="cuda" if torch.cuda.is_available() else "cpu") for _ in range(3))
    causal = dict(softmax_scale=0.25, window_left=-1, window_right=0, softcap=0.0, rotary_offset=0)
    options = dict.fromkeys(attention.Options._fields) | causal | dict(rotary_interleaved=False, dropout_p=0.0)
    arguments = options.values()
    monkeypatch.setenv("PYNLP_AUTOTUNE", "0")
    out, lse = attention.attention_forward(q, k, v, *arguments)
    gradients = attention.attention_backward(q, None, q, k, v, out, lse, *arguments, False, False, False)

    monkeypatch.setenv("PYNLP_AUTOTUNE", "1")
    monkeypatch.setattr(choice, "_time", lambda run: (run(), stopwatch.append(1), -len(stopwatch))[2])  # later: faster
    monkeypatch.setattr(choice, "LARGEST_BLOCK", 32)
    tuned = attention.attention_forward(q, k, v, *arguments)
    torch.testing.assert_close(tuned, (out, lse))
    tuned = attention.attention_backward(q, None, q, k, v, out, lse, *arguments, False, False, False)
    torch.testing.assert_close(tuned, gradients)
    kept = json.loads(choice.cache_file().read_text())
    assert [key.split(" | ")[1] for key in kept] == ["forward", "keys", "queries"]
    assert len(stopwatch) > 12
