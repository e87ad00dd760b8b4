"""The comparison of estimators: how costs are read off at equal correlation; shorter campaigns are real ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from zarr.storage import MemoryStore

import ablate
import coar
from experiments.cost_quality.config import read_config
from experiments.cost_quality.measure import Bench, first_rows, to_frame
from experiments.cost_quality.networks import SmallViT, digits_examples
from experiments.cost_quality.report import markdown
from experiments.cost_quality.summary import cost_at, headline
from stores import CampaignStore


def _curve(*points: tuple[float, float]) -> pd.DataFrame:
    return pd.DataFrame(points, columns=["cost", "mean"])


def test_cost_at_a_correlation_is_read_in_log_cost() -> None:
    curve = _curve((1000.0, 0.9), (10.0, 0.5), (100.0, 0.7))
    assert cost_at(curve, 0.7) == pytest.approx(100)
    assert cost_at(curve, 0.6) == pytest.approx(10**1.5)
    assert cost_at(curve, 0.4) == 10.0, "no cheaper budget was run: an upper bound"
    assert np.isnan(cost_at(curve, 0.95)), "never reached"


def test_the_first_time_a_target_is_reached_counts() -> None:
    assert cost_at(_curve((1.0, 0.2), (10.0, 0.8), (100.0, 0.6), (1000.0, 0.9)), 0.8) == pytest.approx(10)


def _records(**gradient: float) -> pd.DataFrame:
    rows = [("gradient", 10, 10.0, gradient.get("low", 0.5)), ("gradient", 100, 100.0, 0.96)]
    rows += [("regression, ridge", 1000, 1000.0, 0.8), ("regression, ridge", 4000, 4000.0, gradient.get("best", 0.96))]
    table = pd.DataFrame(rows, columns=["estimator", "budget", "cost", "mean"])
    return table.assign(network="cnn-736", components=736)


def _only(name: str) -> object:
    config = read_config("full")
    return config.model_copy(update={"networks": {name: config.networks[name]}})


def test_headline_compares_at_the_target() -> None:
    row = headline(_records(best=0.955), _only("cnn-736")).iloc[0]  # type: ignore[arg-type]
    assert (row["best regression"], round(row["its cost"]), row["ratio is"]) == ("regression, ridge", 4000, "exact")
    share = (0.955 - 0.5) / (0.96 - 0.5)
    assert row["gradient's cost"] == pytest.approx(10 ** (1 + share))
    assert row["ratio"] == pytest.approx(4000 / 10 ** (1 + share))


def test_headline_says_when_no_regression_reaches_the_target() -> None:
    row = headline(_records(best=0.9), _only("cnn-736")).iloc[0]  # type: ignore[arg-type]
    assert (row["best regression"], row["its cost"], row["ratio is"]) == ("none reaches it", 4000.0, "at least")


def test_configs_are_whole_blocks_and_sorted() -> None:
    for name in ("full", "quick", "resnet50"):
        for network in read_config(name).networks.values():
            assert all(rows % 250 == 0 for rows in network.rows)
            assert set(network.lasso_rows) <= set(network.rows)
            assert list(network.passes) == sorted(network.passes)
            assert min(network.passes) >= 2


def test_the_vit_has_as_many_neurons_as_its_name_says() -> None:
    index = ablate.ComponentIndex.from_model(SmallViT(), ["linear_neuron"], exclude=("head",))
    assert len(index) == 2304


def test_digits_are_split_once() -> None:
    train, test = digits_examples("train"), digits_examples("test", 8, 3)
    assert not set(train.ids) & set(test.ids)
    assert len(train) + len(test) == 1797
    assert test.inputs(0, 2).shape == (2, 3, 8, 8)
    assert set(test.targets.tolist()) == {0, 1}
    assert all((int(group) >= 5) == bool(target) for group, target in zip(test.groups, test.targets, strict=True))


def _campaign(rows: int) -> CampaignStore:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = (torch.randn(6, 4), torch.arange(6) % 2)
    spec = ablate.CampaignSpec(
        model=model, data=data, components={"kinds": ["linear_neuron"]}, rows=rows, ablate_fraction=0.2, block_rows=20
    )
    return ablate.run(spec, MemoryStore(), progress=False)


def test_the_first_rows_are_the_shorter_campaign() -> None:
    part, real = first_rows(_campaign(100), 40), _campaign(40)
    np.testing.assert_array_equal(part.outputs[:], real.outputs[:])
    np.testing.assert_array_equal(part.keep[:], real.keep[:])
    assert part.header["identity"] == real.header["identity"]
    with pytest.raises(ValueError, match="30 rows are no whole blocks of 20"):
        first_rows(_campaign(100), 30)


def test_markdown_rounds_numbers_to_what_they_are_worth() -> None:
    table = pd.DataFrame({"a": ["x"], "b": [1234.56], "c": [0.955512], "d": [7]})
    assert markdown(table) == "| a | b | c | d |\n| --- | --- | --- | --- |\n| x | 1,235 | 0.9555 | 7 |"


@pytest.mark.slow
def test_a_bench_measures_every_estimator() -> None:
    config = read_config("quick")
    network = config.networks["cnn-736"].model_copy(update={"rows": (250,), "passes": (2,)})
    config = config.model_copy(update={"examples": 10, "test_rows": 20, "networks": {"cnn-736": network}})
    model = ablate.digits.ResidualCNN((4, 4, 4)).eval()
    index = ablate.ComponentIndex.from_model(model, ["conv_filter"])
    said: list[str] = []
    bench = Bench("cnn-736", config, model, index, said.append)
    table = to_frame(list(bench.records()))
    assert table["estimator"].tolist() == [
        "gradient",
        "gradient, mixed background",
        "gradient, 300 forward rows",
        "regression, ridge",
        "gradient_times_gate",
        "random",
    ]
    assert len(said) == len(table)
    assert (table["cost"] > 0).all()
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).all()
    best = table.set_index("estimator")["mean"]
    assert best["gradient"] > best["random"] + 0.3
    assert isinstance(bench.estimate(passes=2), coar.Attributions)
