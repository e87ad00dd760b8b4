"""Coverage of intervals: by hand, on planted errors of known size, and what cannot be judged is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.stats

import coar
from stores.blocks.blocks import Blocks

WriteAttributions = Callable[..., coar.Attributions]


def _with(attributions: coar.Attributions, of: dict[str, Any] | None = None, **plan: Any) -> coar.Attributions:
    """Returns the attributions as if they were of something else, or of another plan."""
    changed = coar.open_attributions(attributions.store)
    changed.header = copy.deepcopy(attributions.header)
    identity = changed.header["identity"]["of"]
    identity.update(of or {})
    identity["plan"].update(plan)
    return changed


def test_by_hand(write_attributions: WriteAttributions) -> None:
    """z are 0, 1, 2 | -3 and 1.5, a pair without errors that is left out, one that no interval covers."""
    mine = write_attributions([[1, 1, 2, 0], [-3, 1.5, 7, 7]], stderr=[[1, 1, 1, 1], [1, 1, 0, 0]], block_examples=1)
    long = write_attributions([[1, 0, 0, 0], [0, 0, 7, 6]], stderr=0)
    found = coar.calibration(mine, _with(long, seed=1), levels=(0.6, 0.9, 0.95, 0.999))
    z = np.array([0, 1, 2, 0, -3, 1.5])
    assert found.to_dict("records") == [
        {
            "pairs": 7,
            "60%": pytest.approx(2 / 7),  # |z| <= 0.84
            "90%": pytest.approx(4 / 7),  # |z| <= 1.64
            "95%": pytest.approx(4 / 7),
            "99.9%": pytest.approx(6 / 7),
            "mean z": pytest.approx(z.mean()),
            "sd z": pytest.approx(z.std()),
            "stderr zero": 0.25,
        }
    ]


def test_by_layer_by_hand(write_attributions: WriteAttributions) -> None:
    mine = write_attributions([[1, 1, 2, 0], [-3, 1.5, 7, 7]], stderr=[[1, 1, 1, 1], [1, 1, 0, 0]])
    long = _with(write_attributions([[1, 0, 0, 0], [0, 0, 7, 6]], stderr=0), seed=1)
    found = coar.calibration(mine, long, levels=[0.9], by="layer")
    assert found["layer"].tolist() == [0, 1]
    assert found["pairs"].tolist() == [4, 3]
    np.testing.assert_allclose(found["90%"], [3 / 4, 1 / 3])
    np.testing.assert_allclose(found["mean z"], [-0.125, 1])
    np.testing.assert_allclose(found["sd z"], [np.std(np.array([0, 1, -3, 1.5])), 1])
    assert found["stderr zero"].tolist() == [0, 0.5]


@pytest.mark.parametrize("claimed", [0.5, 1.0, 2.0])
def test_errors_of_known_size(write_attributions: WriteAttributions, claimed: float) -> None:
    """Errors of 0.3, and of 0.4 in the reference; the standard errors are off by a factor."""
    generator = np.random.default_rng(1)
    truth = generator.normal(size=(300, 40))
    sizes = generator.uniform(0.5, 2, size=(300, 40))
    mine, long = (
        write_attributions(
            truth + error * sizes * generator.normal(size=truth.shape),
            stderr=claimed * error * sizes,
            block_examples=block,
        )
        for error, block in ((0.3, 64), (0.4, 100))
    )
    found = coar.calibration(mine, _with(long, seed=1)).iloc[0]
    assert found["pairs"] == 12_000
    for level in (0.5, 0.8, 0.9, 0.95):
        expected = 2 * scipy.stats.norm.cdf(claimed * scipy.stats.norm.ppf((1 + level) / 2)) - 1
        assert found[f"{100 * level:g}%"] == pytest.approx(expected, abs=0.015)
    assert found["mean z"] == pytest.approx(0, abs=0.05)
    assert found["sd z"] == pytest.approx(1 / claimed, rel=0.03)


def test_a_reference_without_error_would_blame_the_attributions(write_attributions: WriteAttributions) -> None:
    """The reference's standard errors count: said to be zero, calibrated intervals cover too seldom."""
    generator = np.random.default_rng(2)
    mine, long = (generator.normal(size=(200, 30)) for _ in range(2))
    judged = write_attributions(mine, stderr=1.0, block_examples=200)
    honest = coar.calibration(judged, _with(write_attributions(long, stderr=1.0, block_examples=200), seed=1))
    unjust = coar.calibration(judged, _with(write_attributions(long, stderr=0.0, block_examples=200), seed=1))
    assert honest["95%"][0] == pytest.approx(0.95, abs=0.01)
    assert unjust["95%"][0] < 0.87


def test_nothing_to_judge(write_attributions: WriteAttributions) -> None:
    mine = write_attributions([[1.0, 2.0]], stderr=0)
    found = coar.calibration(mine, _with(mine, seed=1)).iloc[0]
    assert (found["pairs"], found["stderr zero"]) == (0, 1)
    assert found.drop(["pairs", "stderr zero"]).isna().all()


def test_no_more_than_a_block_is_read_at_a_time(
    write_attributions: WriteAttributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write_attributions(np.ones((11, 4)), block_examples=3)
    long = _with(write_attributions(np.ones((11, 4)), block_examples=2), seed=1)
    read: list[int] = []
    take = Blocks.take

    def watched(blocks: Blocks, name: str, rows: npt.NDArray[Any], *columns: Any) -> npt.NDArray[Any]:
        read.append(len(rows))
        return take(blocks, name, rows, *columns)

    monkeypatch.setattr(Blocks, "take", watched)
    coar.calibration(mine, long)
    assert (max(read), sum(read)) == (3, 4 * 11)


def test_blocks_change_nothing(write_attributions: WriteAttributions) -> None:
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(2, 50, 7))
    tables = []
    for block in (1, 7, 50):
        mine = write_attributions(first, stderr=0.5, block_examples=block)
        tables.append(coar.calibration(mine, _with(write_attributions(second, stderr=1.0), seed=1), by="layer"))
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"of": {"model": "n" * 64}}, "model: 0123456789ab" + "m" * 52 + " -> " + "n" * 64),
        ({"of": {"data": "e" * 64}}, "data: " + "d" * 64 + " -> " + "e" * 64),
        ({"of": {"output": "logit (x)"}, "ablate_fraction": 0.1}, "ablate_fraction: 0.3 -> 0.1; output: "),
    ],
)
def test_refuses_a_reference_of_something_else(
    write_attributions: WriteAttributions, change: dict[str, Any], differing: str
) -> None:
    mine = write_attributions([[1.0, 2.0]])
    with pytest.raises(coar.QueryError) as refused:
        coar.calibration(mine, _with(mine, seed=1, **change))
    assert str(refused.value).startswith(
        f"The reference {mine.store.where} is not about the same as {mine.store.where}: {differing}"
    )
    assert str(refused.value).endswith("Estimate both from the same model, examples, output and ablate fraction.")


def test_refuses_an_estimate_from_the_same_random_numbers(write_attributions: WriteAttributions) -> None:
    mine = write_attributions([[1.0, 2.0]])
    with pytest.raises(coar.QueryError) as refused:
        coar.calibration(mine, mine)
    assert str(refused.value) == (
        "Method (by hand) and seed (0) of both are the same: they share random numbers, and their difference is "
        "smaller than their errors. Estimate the reference with another seed."
    )
    other = _with(mine)
    other.header["identity"]["method"] = "another method"
    assert coar.calibration(mine, other)["pairs"][0] == 2


@pytest.mark.parametrize("levels", [(), (0.5, 1.0), (0.0,), (95,)])
def test_refuses_levels(write_attributions: WriteAttributions, levels: Any) -> None:
    mine = write_attributions([[1.0, 2.0]])
    with pytest.raises(coar.QueryError) as refused:
        coar.calibration(mine, mine, levels)
    assert str(refused.value) == (
        f"levels are {levels}, expected numbers between 0 and 1 (exclusive), e.g. (0.5, 0.8, 0.9, 0.95)."
    )


def test_refuses_other_groupings(write_attributions: WriteAttributions) -> None:
    mine = write_attributions([[1.0, 2.0]])
    with pytest.raises(coar.QueryError) as refused:
        coar.calibration(mine, mine, by="module")  # type: ignore[arg-type]  # that is the point
    assert str(refused.value) == "by is 'module', expected 'layer' or None."
