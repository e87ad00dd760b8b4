"""Comparing two stores: every measure against scipy or by hand, examples matched by id, the rest refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics.pairwise import paired_cosine_distances

import coar
from coar.judging.comparing import Weights, strongest
from coar.statistics import mean_interval
from stores.blocks.blocks import Blocks

WriteAttributions = Callable[..., coar.Attributions]


def test_by_hand(write_attributions: WriteAttributions) -> None:
    a = write_attributions([[3, 4, 0, 0], [1, 1, 1, 1]], stderr=[[3, 4, 1, 0], [0, 0, 0, 0]], block_examples=1)
    b = write_attributions([[4, -3, 0, 0], [1, 1, 1, 2]], stderr=[[4, 3, 1, 0], [0, 0, 0, 0]])
    found = coar.compare(a, b, k=1)
    first, second = found.examples.to_dict("records")
    assert (first["id"], first["example_a"], first["example_b"]) == ("e0", 0, 0)
    assert first["cosine"] == pytest.approx(0)
    assert first["overlap"] == 0  # component 1 in a, component 0 in b
    assert first["rms"] == pytest.approx(np.sqrt((1 + 49) / 4))
    assert first["beyond"] == 0  # 7 is less than twice 5
    assert np.isnan([second["pearson"], second["spearman"]]).all()
    assert second["overlap"] == 0  # component 0, first of equals, against component 3
    assert second["beyond"] == 0.25  # 1 and 2, both said to be exact
    components = found.components()
    assert list(components) == ["component", "name", "module", "layer", "difference", "rms", "z"]
    assert components["difference"].tolist() == [-0.5, 3.5, 0, -0.5]
    np.testing.assert_allclose(components["rms"], np.sqrt([1 / 2, 49 / 2, 0, 1 / 2]))
    np.testing.assert_allclose(components["z"], [-1 / 5, 7 / 5, 0, -np.inf])
    assert found.differences == ()
    assert repr(found) == (
        f"<Comparison: 2 common examples of 2 and 2, 4 components: mean correlation {first['pearson']:.3f}, top-1 "
        "overlap 0%, 12.5% differ by more than 2 combined standard errors>"
    )


def test_measures_are_scipys(write_attributions: WriteAttributions) -> None:
    generator = np.random.default_rng(1)
    mine, other = generator.normal(size=(2, 25, 60)).astype(np.float32)
    a, b = write_attributions(mine, block_examples=4), write_attributions(other + mine, block_examples=9)
    found = coar.compare(a, b)
    table, total = found.examples, other + mine
    pairs = list(zip(mine, total, strict=True))
    np.testing.assert_allclose(table["pearson"], [np.corrcoef(x, y)[0, 1] for x, y in pairs], rtol=1e-9)
    ranked = [scipy.stats.spearmanr(x, y).statistic for x, y in pairs]
    np.testing.assert_allclose(table["spearman"], ranked, rtol=1e-9)
    np.testing.assert_allclose(table["cosine"], 1 - paired_cosine_distances(mine, total), atol=1e-6)
    np.testing.assert_allclose(table["rms"], np.sqrt(((mine - total) ** 2).mean(axis=1)), rtol=1e-6)
    expected = (np.abs(mine.astype(np.float64) - total) > 2 * np.hypot(0.125, 0.125)).mean(axis=1)
    np.testing.assert_allclose(table["beyond"], expected)
    tops = [len(set(a.top(i, 20)["component"]) & set(b.top(i, 20)["component"])) / 20 for i in range(25)]
    np.testing.assert_allclose(table["overlap"], tops)
    summary = found.summary()
    assert summary["measure"].tolist() == ["pearson", "spearman", "cosine", "overlap", "rms", "beyond"]
    for row in summary.to_dict("records"):
        values = table[row["measure"]]
        assert (row["mean"], row["median"], row["examples"]) == (
            pytest.approx(values.mean()),
            pytest.approx(values.median()),
            25,
        )
        assert (row["low"], row["high"]) == mean_interval(values)
    components = found.components()
    difference = mine.astype(np.float64) - total
    np.testing.assert_allclose(components["difference"], difference.mean(axis=0))
    np.testing.assert_allclose(components["z"], difference.sum(axis=0) / np.sqrt(25 * 2 * 0.125**2))


def test_with_itself(write_attributions: WriteAttributions) -> None:
    a = write_attributions(np.random.default_rng(2).normal(size=(5, 8)))
    found = coar.compare(a, a)
    assert found.k == 8
    means = found.summary().set_index("measure")["mean"]
    assert means[["pearson", "spearman", "cosine", "overlap"]].tolist() == pytest.approx([1, 1, 1, 1])
    assert means[["rms", "beyond"]].tolist() == [0, 0]
    assert (found.components()[["difference", "rms", "z"]] == 0).all(axis=None)


def test_examples_are_matched_by_id(write_attributions: WriteAttributions) -> None:
    """Labels are positions modulo 3, so that ids in these places have those of `a`."""
    weights = np.random.default_rng(3).normal(size=(6, 5)).astype(np.float32)
    a = write_attributions(weights, ids=list("abcdef"), block_examples=2)
    b = write_attributions(weights[[3, 4, 5, 0, 1]], ids=["d", "x", "c", "a", "e"], block_examples=3)
    found = coar.compare(a, b)
    assert found.examples[["id", "example_a", "example_b"]].to_dict("list") == {
        "id": ["a", "c", "d", "e"],
        "example_a": [0, 2, 3, 4],
        "example_b": [3, 2, 0, 4],
    }
    np.testing.assert_allclose(found.examples["rms"][[0, 2]], 0)
    assert found.examples["rms"][1] == pytest.approx(np.sqrt(((weights[2] - weights[5]) ** 2).mean()), rel=1e-6)
    assert repr(found).startswith("<Comparison: 4 common examples of 6 and 5, 5 components: mean correlation ")


def test_refuses_examples_that_only_share_their_ids(write_attributions: WriteAttributions) -> None:
    a = write_attributions(np.ones((4, 2)), ids=list("abcd"))
    b = write_attributions(np.ones((4, 2)), ids=list("dcab"))
    with pytest.raises(coar.QueryError) as refused:
        coar.compare(a, b)
    assert str(refused.value) == (
        f"3 of 4 common ids have another label, the first is 'a': 0 in {a.store.where}, 2 in {b.store.where}. These "
        "are other examples."
    )


def test_differences_are_a_minus_b(write_attributions: WriteAttributions) -> None:
    a, b = write_attributions([[2.0, 0.0]], stderr=3.0), write_attributions([[-3.0, 0.0]], stderr=4.0)
    row = coar.compare(a, b).components().iloc[0]
    assert (row["difference"], row["rms"], row["z"]) == (5.0, 5.0, 1.0)


@given(hnp.arrays(np.float32, (4, 9), elements=st.integers(-2, 2)), st.integers(1, 9))
def test_the_strongest_are_those_of_a_stable_sort(weights: Weights, k: int) -> None:
    order = np.argsort(-np.abs(weights), axis=1, kind="stable")[:, :k]
    expected = np.zeros(weights.shape, dtype=np.bool_)
    np.put_along_axis(expected, order, True, axis=1)
    np.testing.assert_array_equal(strongest(weights, k), expected)


def test_no_more_than_a_block_is_read_at_a_time(
    write_attributions: WriteAttributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_attributions(np.ones((11, 4)), block_examples=3)
    b = write_attributions(np.ones((11, 4)), block_examples=2)
    read: list[int] = []
    take = Blocks.take

    def watched(blocks: Blocks, name: str, rows: npt.NDArray[Any], *columns: Any) -> npt.NDArray[Any]:
        read.append(len(rows))
        return take(blocks, name, rows, *columns)

    monkeypatch.setattr(Blocks, "take", watched)
    coar.compare(a, b)
    assert (max(read), sum(read)) == (3, 4 * 11)


def test_blocks_change_nothing(write_attributions: WriteAttributions) -> None:
    first, second = np.random.default_rng(4).normal(size=(2, 20, 6))
    found = [
        coar.compare(write_attributions(first, block_examples=m), write_attributions(second, block_examples=n), k=3)
        for m, n in ((1, 2), (7, 5), (20, 20))
    ]
    for other in found[1:]:
        pd.testing.assert_frame_equal(other.examples, found[0].examples)
        pd.testing.assert_frame_equal(other.components(), found[0].components())


def test_the_table_of_components_is_a_copy(write_attributions: WriteAttributions) -> None:
    found = coar.compare(*(write_attributions([[1.0, 2.0]]) for _ in range(2)))
    mine = found.components()
    mine["rms"] = 9.0
    assert found.components()["rms"].tolist() == [0, 0]


def test_refuses_other_components(write_attributions: WriteAttributions) -> None:
    a, b = write_attributions([[1.0, 2.0]]), write_attributions([[1.0, 2.0, 3.0]])
    with pytest.raises(coar.QueryError) as refused:
        coar.compare(a, b)
    assert str(refused.value) == (
        f"{a.store.where} has index {a.index.hash[:12]} of 2 components, {b.store.where} index {b.index.hash[:12]} of "
        "3. Only attributions of the same components can be compared."
    )


def test_refuses_where_there_is_nothing_in_common(write_attributions: WriteAttributions) -> None:
    a, b = write_attributions([[1.0, 2.0]], ids=["one"]), write_attributions([[1.0, 2.0]], ids=["two"])
    with pytest.raises(coar.QueryError) as refused:
        coar.compare(a, b)
    assert str(refused.value) == (
        f"{a.store.where} and {b.store.where} have no example in common: ids such as 'one' and 'two'. Give "
        "attributions of the same examples, with the same ids."
    )


@pytest.mark.parametrize("k", [0, 3, -1])
def test_refuses_k(write_attributions: WriteAttributions, k: int) -> None:
    a = write_attributions([[1.0, 2.0]])
    with pytest.raises(coar.QueryError) as refused:
        coar.compare(a, a, k=k)
    assert str(refused.value) == f"k is {k}, expected 1 to 2: there are 2 components."


def test_says_what_differs_in_how_they_were_estimated(write_attributions: WriteAttributions) -> None:
    a = write_attributions([[1.0, 2.0]])
    b = coar.open_attributions(a.store)
    b.header = copy.deepcopy(a.header)
    b.header["identity"]["method"] = "by foot"
    b.header["identity"]["of"]["plan"]["ablate_fraction"] = 0.5
    assert [str(difference) for difference in coar.compare(a, b).differences] == [
        "method: by hand -> by foot",
        "of.plan.ablate_fraction: 0.3 -> 0.5",
    ]
