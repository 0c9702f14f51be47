"""Tiles by measurement: only on request, kept on disk, and never a tile that changes the result."""

import json

import pytest
import torch
from triton.runtime.errors import OutOfResources

from pynlp.kernels import attention, autotune

DEFAULT = attention.Config(16, 16, 4, 1, False, 16)
WORK = (("sm_90", 64, 2), 1000, 1000)


@pytest.fixture
def stopwatch(monkeypatch, tmp_path):
    """Tuning is on; the time of a launch is what the launch returns. Gives the list of times taken."""
    taken = []

    def time(run):
        taken.append(run())
        return taken[-1]

    monkeypatch.setenv("PYNLP_AUTOTUNE", "1")
    monkeypatch.setenv("PYNLP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_time", time)
    return taken


def cost(config):
    """Least at 64 x 32 with 8 warps and 3 stages."""
    wrong = abs(config.block_m - 64) + abs(config.block_n - 32) + abs(config.num_warps - 8) * 9
    return 1.0 + wrong + abs(config.num_stages - 3)


def test_nothing_is_measured_unless_asked_for(stopwatch, monkeypatch):
    for value in ("0", ""):
        monkeypatch.setenv("PYNLP_AUTOTUNE", value)
        assert autotune.choose("forward", DEFAULT, WORK, cost) == DEFAULT
    monkeypatch.delenv("PYNLP_AUTOTUNE")
    assert autotune.choose("forward", DEFAULT, WORK, cost) == DEFAULT
    assert not stopwatch and not autotune.cache_file().exists()


def test_the_fastest_tile_is_found_and_kept(stopwatch):
    found = autotune.choose("forward", DEFAULT, WORK, cost)
    assert found == DEFAULT._replace(block_m=64, block_n=32, num_warps=8, num_stages=3)
    assert len(stopwatch) < 40
    measured = len(stopwatch)
    assert autotune.choose("forward", DEFAULT, (WORK[0], 600, 1023), cost) == found  # lengths of the same power of two
    assert len(stopwatch) == measured
    assert json.loads(autotune.cache_file().read_text()) == {
        f"{autotune._device()} | forward | [('sm_90', 64, 2)] | 10 | 10": list(found)
    }
    assert [path.name for path in autotune.cache_file().parent.iterdir()] == ["tiles.json"]

    autotune.choose("keys", DEFAULT, WORK, cost)
    autotune.choose("forward", DEFAULT, (WORK[0], 1000, 2000), cost)
    assert len(stopwatch) == 3 * measured and len(json.loads(autotune.cache_file().read_text())) == 3


def test_a_tile_that_does_not_fit_loses(stopwatch):
    def launch(config):
        if config.block_m > 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return cost(config)

    assert autotune.choose("forward", DEFAULT, WORK, launch).block_m == 32


def test_tiles_stay_what_the_kernels_can_do(stopwatch):
    seen = []
    square = attention.Config(64, 64, 8, 1, True, 64)

    def launch(config):
        seen.append(config)
        return 1.0 / (config.block_m * config.block_n)  # the larger the faster

    assert autotune.choose("queries, square", square, WORK, launch)[:2] == (128, 128)
    assert all(config.block_m == config.block_n for config in seen)
    autotune.choose("forward", DEFAULT, WORK, launch)
    for config in seen:
        assert 16 <= config.block_m <= 128 and 16 <= config.block_n <= 128 and config.num_warps in (4, 8)
        assert config.block_n % (config.masked or 1) == 0 and config.block_m % (config.masked or 1) == 0


def test_the_launchers_use_what_was_found(stopwatch, monkeypatch):
    q, k, v = (torch.randn(1, 40, 2, 16, device="cuda" if torch.cuda.is_available() else "cpu") for _ in range(3))
    arguments = (0.25, -1, 0, 0.0, *[None] * 7, 0, False)
    monkeypatch.setenv("PYNLP_AUTOTUNE", "0")
    out, lse = attention.attention_forward(q, k, v, *arguments)
    gradients = attention.attention_backward(q, None, q, k, v, out, lse, *arguments, False, False)

    monkeypatch.setenv("PYNLP_AUTOTUNE", "1")
    monkeypatch.setattr(
        autotune, "_time", lambda run: (run(), stopwatch.append(1), -len(stopwatch))[2]
    )  # later: faster
    monkeypatch.setattr(autotune, "LARGEST_BLOCK", 32)
    tuned = attention.attention_forward(q, k, v, *arguments)
    torch.testing.assert_close(tuned, (out, lse))
    tuned = attention.attention_backward(q, None, q, k, v, out, lse, *arguments, False, False)
    torch.testing.assert_close(tuned, gradients)
    kept = json.loads(autotune.cache_file().read_text())
    assert [key.split(" | ")[1] for key in kept] == ["forward", "keys", "queries"]
    assert len(stopwatch) > 12
