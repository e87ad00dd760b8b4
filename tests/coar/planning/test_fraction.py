"""The ablate fraction by measurement: what is planted is found, what it cost is counted, what decides is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import ablate
import coar
from coar.planning.fraction import FRACTIONS, MOST_ROWS
from coar.planning.halves import HalvesMeter

Run = Callable[..., tuple[int, str, str]]
Untouched = Callable[..., AbstractContextManager[None]]


class Shares(nn.Module):
    """Logits (bend(share of units kept) - limit, 0), of 2,000 units that each say the same: all inputs are ones."""

    def __init__(self, bend: Callable[[Tensor], Tensor], limit: float = 0.0) -> None:
        super().__init__()
        self.units = nn.Linear(1, 2000, bias=False)
        nn.init.constant_(self.units.weight, 1.0)
        self.head = nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[1.0], [0.0]])
        self.head.bias.data = torch.tensor([-limit, 0.0])
        self.bend = bend

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits (batch, 2)."""
        logits: Tensor = self.head(self.bend(self.units(x).mean(dim=1, keepdim=True)))
        return logits


def _examples(count: int = 3) -> tuple[Tensor, list[int]]:
    return torch.ones(count, 1), [0] * count


def _choose(model: Shares, examples: Any, **options: Any) -> coar.FractionChoice:
    """Chooses a share of the units."""
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["units"])
    return coar.choose_fraction(model, examples, index=index, **options)


def test_a_linear_network_takes_the_largest() -> None:
    choice = _choose(Shares(lambda share: share), _examples())
    assert choice.ablate_fraction == 0.1
    table = choice.table()
    assert tuple(table["ablate_fraction"]) == FRACTIONS
    assert table["recommended"].tolist() == [False] * 5 + [True]
    np.testing.assert_allclose(table["halves"], 1, atol=1e-3)
    np.testing.assert_array_equal(table["right_kept"], 1)
    assert re.search(
        r"^0\.1 keeps 100% of the right predictions, .* r = 1\.00; it is the largest tried\.$", choice.reason
    )
    assert choice.forwards == 1 + 3 * table["rows"].sum() == 1 + 3 * 8 * 6, "where all is clear, eight rows suffice"


def test_the_numbers_are_those_of_the_keep_vectors() -> None:
    """Mean drop and deviation of a linear network are those of the share ablated."""
    choice = _choose(Shares(lambda share: share), _examples(), fractions=[0.1])
    (m,) = choice.measures
    assert m.mean_drop == pytest.approx(0.1, abs=0.01)
    assert m.sd == pytest.approx((0.1 * 0.9 / 2000) ** 0.5, rel=0.7)
    assert m.drops.shape == m.sums.shape == (8, 3)
    np.testing.assert_allclose(m.drops, m.sums, atol=1e-6)


@pytest.mark.parametrize(("limit", "expected"), [(0.95, 0.03), (0.98, 0.01), (0.995, 0.003), (0.998, 0.001)])
def test_the_largest_that_keeps_predictions_right(limit: float, expected: float) -> None:
    """The margin is the share kept less a limit: right as long as fewer than 1 - limit are off."""
    choice = _choose(Shares(lambda share: share, limit), _examples())
    assert choice.ablate_fraction == expected
    larger = choice.table().set_index("ablate_fraction")["right_kept"].loc[expected:].iloc[1]
    assert larger < 2 / 3
    assert f"keeps {larger:.0%} of the right predictions" in choice.reason.partition(";")[2]


def test_a_network_that_bends_takes_what_a_line_explains() -> None:
    """Beyond 1 % off the output moves with the square of the number off, in both directions: no line explains it."""

    def bend(share: Tensor) -> Tensor:
        off = 1 - share
        return 1 + torch.where(off < 0.015, off, torch.cos(off * 2e4))

    choice = _choose(Shares(bend), _examples())
    assert choice.ablate_fraction == 0.01
    assert choice.at(0.01).halves > 0.9 > choice.at(0.03).halves


def test_halves_are_one_for_a_line_and_less_for_a_product() -> None:
    """Of a product of two parts, what both lose together is not what they lose one by one: by hand, for one row."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units, self.head = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
            nn.init.constant_(self.units.weight, 1.0)
            self.head.weight.data = torch.tensor([[1.0], [0.0]])

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.units(x).prod(dim=1, keepdim=True))
            return logits

    model = Product()
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["units"])
    meter = HalvesMeter(ablate.Engine(model, index), None, ablate.Examples.of(_examples(1)), True, 0)
    found = meter.measure(0.5, 200)
    assert set(found.drops.ravel()) == {0.0, 1.0}, "without either unit the product is lost"
    assert set(found.sums.ravel()) == {0.0, 1.0, 2.0}, "one by one it is lost twice"
    assert (found.sums[found.drops == 0] == 0).all()
    assert 0.7 < found.halves < 0.98
    assert found.kept is not None
    np.testing.assert_array_equal(found.kept[:, 0], found.drops[:, 0] == 0)


def test_the_standard_error_is_that_of_repetition() -> None:
    model = Shares(lambda share: 1 + torch.cos((1 - share) * 60))
    engine = ablate.Engine(model, ablate.ComponentIndex.from_model(model, include=["units"]))
    examples = ablate.Examples.of(_examples(1))
    found = [HalvesMeter(engine, None, examples, True, seed).measure(0.05, 30) for seed in range(40)]
    spread = np.std([m.halves for m in found])
    assert 0.5 < np.median([m.halves_error for m in found]) / spread < 2


def test_more_rows_are_run_only_where_it_is_not_clear() -> None:
    choice = _choose(Shares(lambda share: share, 1 - 0.0105), _examples())  # 0.01 keeps about 60 %
    rows = choice.table().set_index("ablate_fraction")["rows"]
    assert rows[0.01] == MOST_ROWS
    assert (rows.drop(0.01) == 8).all()
    assert choice.forwards == 1 + 3 * rows.sum()


def test_rows_added_are_the_rows_of_one_measurement(mlp: nn.Module) -> None:
    engine = ablate.Engine(mlp, ablate.ComponentIndex.from_model(mlp))
    examples = ablate.Examples(torch.randn(5, 4), [0, 1, 2, 0, 1])
    meter = HalvesMeter(engine, None, examples, True, 3)
    whole, parts = meter.measure(0.2, 12), meter.extend(meter.measure(0.2, 5), 12)
    assert meter.forwards == 1 + 3 * 12 * 2
    for name in ("drops", "sums", "kept"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_it_is_the_same_by_seed_and_changes_nothing(mlp: nn.Module, untouched: Untouched) -> None:
    inputs, labels = torch.randn(6, 4), [0, 1, 2, 0, 1, 2]
    with untouched(mlp, inputs):
        first = coar.choose_fraction(mlp, (inputs, labels), fractions=[0.2, 0.4], seed=1)
    again = coar.choose_fraction(mlp, (inputs, labels), fractions=[0.4, 0.2], seed=1)
    pd.testing.assert_frame_equal(first.table(), again.table())
    other = coar.choose_fraction(mlp, (inputs, labels), fractions=[0.2, 0.4], seed=2)
    assert not first.table().equals(other.table())


def test_wrong_examples_do_not_say_whether_a_network_works() -> None:
    """All are predicted wrong: c alone counts, and the reason says so."""
    inputs, _ = _examples()
    choice = _choose(Shares(lambda share: share), (inputs, [1, 1, 1]))
    assert choice.ablate_fraction == 0.1
    assert choice.table()["right_kept"].isna().all()
    assert choice.reason.endswith("Judged by what a line explains alone: 0% are right at first.")


def test_a_loss_is_judged_by_the_margin_too() -> None:
    model = Shares(lambda share: share, 0.98)
    by_margin = _choose(model, _examples())
    by_loss = _choose(model, _examples(), output="loss")
    assert by_loss.ablate_fraction == by_margin.ablate_fraction == 0.01
    np.testing.assert_array_equal(by_loss.at(0.01).kept, by_margin.at(0.01).kept)
    assert (by_loss.at(0.01).drops <= 0).all(), "a loss rises"
    assert by_loss.forwards == 2 + 4 * by_loss.table()["rows"].sum()


def test_a_users_own_output_is_judged_by_a_line_alone() -> None:
    class Second(ablate.Output):
        name = "first"

        def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
            return logits[:, 0]

    choice = _choose(Shares(lambda share: share, 0.98), _examples(), output=Second())
    assert choice.ablate_fraction == 0.1
    assert choice.reason.endswith("alone: its output does not say what is right.")


def test_where_nothing_is_good_the_smallest_is_named() -> None:
    choice = _choose(Shares(lambda share: share, 0.99999), _examples())
    assert choice.ablate_fraction == 0.001  # 0.0003 ablates less than one of 2,000 on average
    assert choice.reason.startswith("none of those tried is good (c >= 0.9, 67% kept); the smallest, 0.001 keeps ")


def test_outputs_that_are_no_numbers_are_no_choice() -> None:
    choice = _choose(Shares(lambda share: share + torch.log(share - 0.95) * 0), _examples())
    assert choice.ablate_fraction == 0.03
    assert choice.at(0.1).broken
    assert choice.reason.endswith("0.1 gives NaN or infinite outputs.")
    assert choice.table()["rows"].iloc[-1] == 0


def test_mean_ablation_is_measured_as_such() -> None:
    """Every unit always says its mean, so that ablating to it changes nothing."""
    choice = _choose(Shares(lambda share: share, 0.98), _examples(), ablation="mean")
    assert choice.ablate_fraction == 0.1
    assert choice.at(0.1).mean_drop == pytest.approx(0, abs=1e-6)
    assert np.isnan(choice.at(0.1).halves)
    assert choice.reason == "0.1 keeps 100% of the right predictions, changes no output; it is the largest tried."


def test_of_many_examples_some_are_run() -> None:
    choice = _choose(Shares(lambda share: share), _examples(50), fractions=[0.1], most_examples=5)
    assert choice.examples == 5
    assert choice.measures[0].drops.shape == (8, 5)


@pytest.mark.slow
def test_a_spec_says_everything_and_the_digits_network_takes_a_tenth(folder: Path) -> None:
    """As three measurements of it say: at 0.1 most predictions stay right, and a line explains up to 0.95."""
    choice = coar.choose_fraction(folder / "spec.toml")
    assert (choice.ablate_fraction, choice.components, choice.examples) == (0.1, 736, 16)
    assert choice.at(0.1).right_kept > 2 / 3
    assert choice.at(0.1).halves == pytest.approx(0.95, abs=0.05)
    assert (choice.table()["halves"][1:5] > 0.97).all()
    with pytest.raises(coar.QueryError, match=r"^examples, output: given beside a spec, which has its own\. Change"):
        coar.choose_fraction(folder / "spec.toml", _examples(), output="loss")


@pytest.mark.slow
def test_the_command_prints_the_table_and_draws_it(folder: Path, tmp_path: Path, run: Run) -> None:
    code, out, err = run("choose-fraction", folder / "spec.toml", "--figure", tmp_path / "fraction.png")
    assert (code, err) == (0, "")
    assert out.startswith("736 components, 16 examples, ")
    assert "0.0003" in out
    assert re.search(r"Recommended: 0\.1 keeps \d+% of the right predictions, a line explains up to r = 0\.", out)
    assert (tmp_path / "fraction.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("choose-fraction", folder / "spec.toml", "--json", "--most-examples", 2)
    found = json.loads(out)
    assert (code, found["ablate_fraction"], found["examples"], len(found["fractions"])) == (0, 0.1, 2, 6)
    code, _, err = run("choose-fraction", folder / "spec.toml", "--figure", "table.xyz")
    assert (code, err.startswith("error: --figure is table.xyz, expected a name that ends in .")) == (2, True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fractions": []}, coar.QueryError, r"fractions are \[\], expected one or more numbers that differ"),
        ({"fractions": [0.1, 0.1]}, coar.QueryError, "expected one or more numbers that differ"),
        ({"fractions": [0.1, 1.5]}, ablate.KeepError, "ablate_fraction is 1.5, expected a number between 0 and 1"),
        ({"most_examples": 0}, coar.QueryError, "most_examples is 0, expected at least 1"),
        ({"examples": None}, coar.QueryError, "examples are missing"),
        ({"output": "margn"}, ablate.SpecError, "Did you mean 'margin'"),
        ({"rows": 3, "mode": "fast"}, ablate.SpecError, "mode: got 'fast'"),
    ],
)
def test_what_makes_no_sense_is_refused(mlp: nn.Module, changes: dict[str, Any], error: type, message: str) -> None:
    arguments: dict[str, Any] = {"examples": (torch.randn(3, 4), [0, 1, 2])} | changes
    with pytest.raises(error, match=message):
        coar.choose_fraction(mlp, **arguments)


def test_an_unknown_fraction_is_named() -> None:
    choice = _choose(Shares(lambda share: share), _examples(), fractions=[0.1, 0.2])
    with pytest.raises(coar.QueryError, match=r"Nothing was measured at ablate fraction 0\.3, only at 0\.1, 0\.2\."):
        choice.at(0.3)


def test_the_figure_draws_the_table() -> None:
    choice = _choose(Shares(lambda share: share, 0.98), _examples())
    (axes,) = choice.figure().axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    halves, kept = axes.get_lines()[0], lines["right predictions kept"]
    np.testing.assert_array_equal(halves.get_xdata(), FRACTIONS)
    np.testing.assert_array_equal(halves.get_ydata(), choice.table()["halves"])
    np.testing.assert_array_equal(kept.get_ydata(), choice.table()["right_kept"])
    assert "recommended: 0.01" in lines
