"""The record of experts' loads: counts, what is summed up of them, the CSV file and the picture."""

import csv
import math

import pytest
import torch
from torch import nn

from pynlp.models import Decoder, TransformerConfig
from pynlp.nn import MoE
from pynlp.training import ExpertLoad
from pynlp.training.expert_load import summary


def model(**options) -> nn.Module:
    return nn.Sequential(MoE(8, 16, 4, **options), nn.ReLU(), MoE(8, 16, 6, **options))


def test_counts_are_those_of_all_passes_since_the_last_record():
    layers = model()
    load = ExpertLoad(layers)
    expected = {"0": torch.zeros(4, dtype=torch.int64), "2": torch.zeros(6, dtype=torch.int64)}
    for step in (10, 20):
        sums = {name: x.clone() for name, x in expected.items()}
        for _ in range(3):
            layers(torch.randn(50, 8))
            for name in sums:
                sums[name] += layers[int(name)].load
        load.record(step)
        assert all(torch.equal(load.counts[-1][name], sums[name]) for name in sums)
    load.record(30)  # no pass since then
    assert load.steps == [10, 20] and [row["tokens"] for row in load.rows()] == [300] * 4
    load.close()
    layers(torch.randn(50, 8))
    load.record(40)
    assert load.steps == [10, 20]


def test_what_is_summed_up():
    assert summary(torch.tensor([5, 5, 5, 5])) == {"entropy": 1.0, "max_over_mean": 1.0}
    assert summary(torch.tensor([8, 0, 0, 0])) == {"entropy": 0.0, "max_over_mean": 4.0}
    assert summary(torch.tensor([4, 4, 0, 0])) == {"entropy": 0.5, "max_over_mean": 2.0}
    assert summary(torch.zeros(4, dtype=torch.int64)) == {"entropy": 1.0, "max_over_mean": 1.0}
    layers = model(capacity_factor=0.5)
    load = ExpertLoad(layers)
    layers(torch.randn(50, 8))
    load.record(1)
    rows = load.rows()
    assert all(row["dropped"] == 100 - row["tokens"] > 0 for row in rows)


def test_files(tmp_path):
    layers = model()
    load = ExpertLoad(layers)
    for step in range(4):
        layers(torch.randn(50, 8))
        load.record(step)
    load.write_csv(tmp_path / "load.csv")
    load.plot(tmp_path / "load.png")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["load.csv", "load.png"]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(open(tmp_path / "load.csv")))
    assert len(lines) == 4 * (4 + 6)
    shares = [float(x["share"]) for x in lines if x["step"] == "2" and x["layer"] == "2"]
    assert math.isclose(sum(shares), 1, abs_tol=1e-4)
    assert torch.allclose(torch.tensor(shares), load.counts[2]["2"] / 100, atol=1e-5)
    assert torch.allclose(load.shares(last=2)["0"], (load.counts[2]["0"] + load.counts[3]["0"]) / 200)


def test_a_layer_alone_has_the_name_of_its_class():
    layer = MoE(8, 16, 4)
    load = ExpertLoad(layer)
    layer(torch.randn(50, 8))
    load.record(0)
    assert [row["layer"] for row in load.rows()] == ["MoE"]
    with pytest.raises(ValueError, match="last: expected at least 1, got 0"):
        load.shares(0)


def test_errors():
    with pytest.raises(ValueError, match="model: expected mixtures of experts in it, got none in Decoder"):
        ExpertLoad(Decoder(TransformerConfig(vocab_size=10, embed_dim=16, layers=1, heads=2)))
