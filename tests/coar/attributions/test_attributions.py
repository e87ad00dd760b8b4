"""Asking attributions: every answer against numpy or scikit-learn, and nothing read that was not asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from sklearn.metrics.pairwise import cosine_similarity

import ablate
import coar
from stores import CampaignStore
from stores.blocks.blocks import Blocks

Attributions = coar.Attributions
Floats = npt.NDArray[np.floating[Any]]
WriteAttributions = Callable[..., Attributions]

WEIGHTS = np.array([[1, -3, 0, 3, 0.5], [0, 0, 0, 0, 0], [2, -1, 4, 1, -4], [-2, 6, 0, -6, -1], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def attributions(write_attributions: WriteAttributions) -> Attributions:
    """`WEIGHTS` of 5 examples, `a` to `e`, in groups x and y, stored in blocks of 3 and 2; biases 0 to 4."""
    return write_attributions(
        WEIGHTS, bias=np.arange(5), stderr=np.abs(WEIGHTS) / 4, ids=list("abcde"), groups=["x", "y", "x", "y", "y"]
    )


def test_shapes_length_and_repr(attributions: Attributions) -> None:
    assert len(attributions) == 5
    assert attributions.weights.shape == attributions.stderr.shape == (5, 5)
    assert attributions.bias.shape == (5,)
    assert attributions.index.hash == attributions.header["identity"]["of"]["index"]
    assert repr(attributions) == (
        f"<Attributions: 5 examples x 5 components, held-out correlation 1.000, {attributions.store.where}>"
    )
    assert attributions.examples.to_dict("list") == {
        "id": list("abcde"),
        "label": [0, 1, 2, 0, 1],
        "group": ["x", "y", "x", "y", "y"],
    }
    assert list(attributions.quality) == ["correlation", "r2", "ridge", "residual_sd"]


@pytest.mark.parametrize(
    ("sign", "expected"),
    [("both", [1, 3, 0, 4, 2]), ("positive", [3, 0, 4]), ("negative", [1])],
)
def test_top_by_sign_with_ties_by_id(attributions: Attributions, sign: Any, expected: list[int]) -> None:
    table = attributions.top(0, k=5, sign=sign)
    assert list(table) == ["component", "name", "module", "layer", "weight", "stderr", "z"]
    assert table["component"].tolist() == expected
    assert table["weight"].tolist() == WEIGHTS[0][expected].tolist()
    assert table["stderr"].tolist() == (np.abs(WEIGHTS[0][expected]) / 4).tolist()
    np.testing.assert_array_equal(table["z"], [np.nan if i == 2 else np.sign(WEIGHTS[0][i]) * 4 for i in expected])
    assert table["name"].tolist() == [attributions.index[i].name for i in expected]
    assert table["layer"].tolist() == [0 if i < 3 else 1 for i in expected]


def test_top_k(attributions: Attributions) -> None:
    assert attributions.top(2, k=2)["component"].tolist() == [2, 4]
    assert attributions.top(2, k=1, sign="negative")["component"].tolist() == [4]
    assert attributions.top(1, k=3)["component"].tolist() == [0, 1, 2]
    assert attributions.top(1, k=3, sign="positive").empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example": 5}, "No example 5: positions are 0 to 4. Find one by id with locate([...])."),
        ({"example": -1}, "No example -1: positions are 0 to 4. Find one by id with locate([...])."),
        ({"example": "a"}, "No example 'a': positions are 0 to 4. Find one by id with locate([...])."),
        ({"example": 0, "k": 0}, "k is 0, expected 1 to 5: there are 5 components."),
        ({"example": 0, "k": 6}, "k is 6, expected 1 to 5: there are 5 components."),
        ({"example": 0, "k": 1, "sign": "positiv"}, "No sign 'positiv'. Did you mean 'positive'?"),
    ],
)
def test_top_refuses(attributions: Attributions, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LookupError) as refused:
        attributions.top(**arguments)
    assert str(refused.value) == message


def test_predict_is_the_linear_model(attributions: Attributions) -> None:
    keep = np.random.default_rng(1).random((40, 5)) < 0.5
    expected = keep @ WEIGHTS.T + np.arange(5)
    found = attributions.predict(keep)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(attributions.predict(keep, [4, 0, 4, 1]), expected[:, [4, 0, 4, 1]])
    np.testing.assert_array_equal(attributions.predict(np.ones((1, 5), dtype=np.bool_)), [WEIGHTS.sum(1) + range(5)])
    assert attributions.predict(keep, []).shape == (40, 0)
    assert attributions.predict(keep[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (np.ones((2, 4), dtype=np.bool_), "keep has shape (2, 4), expected (rows, 5)."),
        (np.ones(5, dtype=np.bool_), "keep has shape (5,), expected (rows, 5)."),
        (np.ones((2, 5)), "keep has dtype float64, expected bool (True = kept)."),
    ],
)
def test_predict_refuses_other_keeps(attributions: Attributions, keep: Any, message: str) -> None:
    with pytest.raises(ablate.KeepError) as refused:
        attributions.predict(keep)
    assert str(refused.value) == message


def test_predict_refuses_other_examples(attributions: Attributions) -> None:
    with pytest.raises(coar.QueryError, match="No example 7: positions are 0 to 4"):
        attributions.predict(np.ones((1, 5), dtype=np.bool_), [0, 7])


def test_nearest_is_scikit_learns_cosine(fitted: Attributions) -> None:
    similarity = cosine_similarity(fitted.weights[:])[7]
    order = [i for i in np.argsort(-similarity, kind="stable") if i != 7][:6]
    found = fitted.nearest(7, k=6)
    assert list(found) == ["example", "id", "label", "group", "similarity"]
    assert found["example"].tolist() == order
    assert found["id"].tolist() == [f"e{i}" for i in order]
    np.testing.assert_allclose(found["similarity"], similarity[order], rtol=1e-6)


def test_nearest_with_weights_that_are_all_zero(attributions: Attributions) -> None:
    assert attributions.nearest(1, k=2)["similarity"].tolist() == [0, 0]
    found = attributions.nearest(0, k=4)
    assert found["id"].iloc[-1] == "d"  # the opposite of `a`
    assert found.set_index("id")["similarity"]["b"] == 0
    with pytest.raises(coar.QueryError) as refused:
        attributions.nearest(0, k=5)
    assert str(refused.value) == "k is 5, expected 1 to 4: there are 4 other examples."


def _clusters(examples: int, components: int, each: int, spread: float, seed: int = 0) -> Floats:
    """Examples in clusters of `each`, whose cosines among themselves are about 1 / (1 + spread^2)."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(-(-examples // each), components))
    weights = np.repeat(centres, each, axis=0)[:examples] + spread * generator.normal(size=(examples, components))
    return weights[generator.permutation(examples)].astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_the_projections_candidates_hold_the_true_neighbours(write_attributions: WriteAttributions, seed: int) -> None:
    weights = _clusters(400, 700, each=6, spread=1.0, seed=seed)
    weights[17] = 0.0
    many = write_attributions(weights, block_examples=64)
    for example in (0, 5, 17, 399):
        exact, found = (many.nearest(example, k=5, exact=way) for way in (True, False))
        if example != 17:  # nothing is similar to nothing
            assert found["example"].tolist() == exact["example"].tolist()
        np.testing.assert_allclose(found["similarity"], exact["similarity"], rtol=1e-12)
        assert example not in found["example"].tolist()


@pytest.mark.parametrize("each", [1, 250])
def test_where_hardly_anything_stands_out_candidates_are_many_enough(
    write_attributions: WriteAttributions, each: int
) -> None:
    """Cosines are alike, so that the projection alone would not find the neighbours."""
    many = write_attributions(_clusters(500, 900, each, spread=1.0), block_examples=100)
    for example in (3, 77):
        pd.testing.assert_frame_equal(many.nearest(example, 4, exact=False), many.nearest(example, 4, exact=True))


def test_equal_attributions_are_all_found(write_attributions: WriteAttributions) -> None:
    weights = _clusters(200, 600, each=1, spread=1.0)
    weights[[5, 50, 90, 199]] = weights[5]
    found = write_attributions(weights, block_examples=100).nearest(50, k=3, exact=False)
    assert found["example"].tolist() == [5, 90, 199]
    np.testing.assert_allclose(found["similarity"], 1, rtol=1e-12)


def test_the_projection_is_made_once_and_only_where_it_pays(
    write_attributions: WriteAttributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_attributions(_clusters(300, 40, each=5, spread=0.5), tmp_path / "a.zarr", block_examples=50)
    read: list[int] = []
    take = Blocks.take

    def watched(blocks: Blocks, name: str, rows: npt.NDArray[Any], *columns: Any) -> npt.NDArray[Any]:
        if name != "weights":
            return take(blocks, name, rows, *columns)
        assert len(rows) <= 50, "more than a block was read at a time"
        read.append(len(rows))
        return take(blocks, name, rows, *columns)

    monkeypatch.setattr(Blocks, "take", watched)
    opened = coar.open_attributions(tmp_path / "a.zarr")
    opened.nearest(0, k=2)  # 48 kB: all are compared
    assert sum(read) == 1 + 300
    read.clear()
    monkeypatch.setattr("coar.attributions.attributions.EXACT_BYTES", 1000)
    first = opened.nearest(0, k=2)
    candidates = sum(read) - 1 - 300
    assert 14 <= candidates < 100
    read.clear()
    pd.testing.assert_frame_equal(opened.nearest(0, k=2), first)
    assert sum(read) == 1 + candidates
    read.clear()
    opened.nearest(0, k=145)  # 300 candidates are all there are
    assert sum(read) == 1 + 300


def test_for_component(attributions: Attributions) -> None:
    found = attributions.for_component(1, k=3)
    assert list(found) == ["example", "id", "label", "group", "weight", "stderr"]
    assert found["id"].tolist() == ["d", "a", "c"]  # 6, -3, -1 before the equal 1 of e
    assert found["weight"].tolist() == [6, -3, -1]
    assert found["stderr"].tolist() == [1.5, 0.75, 0.25]
    assert attributions.for_component(1, k=5, sign="positive")["id"].tolist() == ["d", "e"]
    assert attributions.for_component(1, k=5, sign="negative")["id"].tolist() == ["a", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"component": 5}, "No component 5: ids are 0 to 4."),
        ({"component": -1}, "No component -1: ids are 0 to 4."),
        ({"component": 1, "k": 6}, "k is 6, expected 1 to 5: there are 5 examples."),
        ({"component": 1, "k": 2, "sign": "neg"}, "No sign 'neg'. Known: both, positive, negative."),
    ],
)
def test_for_component_refuses(attributions: Attributions, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LookupError) as refused:
        attributions.for_component(**arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize("examples", [None, 2, [2], [0, 3], np.array([3, 0, 1])], ids=str)
def test_by_layer_sums_each_module(attributions: Attributions, examples: Any) -> None:
    chosen = WEIGHTS if examples is None else WEIGHTS[np.atleast_1d(examples)]
    expected = pd.DataFrame(
        {
            "layer": [0, 1],
            "module": ["front", "back"],
            "components": [3, 2],
            "weight": [chosen[:, :3].sum(1).mean(), chosen[:, 3:].sum(1).mean()],
            "absolute": [np.abs(chosen[:, :3]).sum(1).mean(), np.abs(chosen[:, 3:]).sum(1).mean()],
        }
    )
    pd.testing.assert_frame_equal(attributions.by_layer(examples), expected)


def test_by_layer_of_no_example(attributions: Attributions) -> None:
    with pytest.raises(coar.QueryError) as refused:
        attributions.by_layer([])
    assert str(refused.value) == "No examples given: pass the positions of at least one, or None for all."
    with pytest.raises(coar.QueryError, match="No example 9"):
        attributions.by_layer([0, 9])


def test_locate(write_attributions: WriteAttributions, attributions: Attributions) -> None:
    assert attributions.locate(["d", "a"]) == [3, 0]
    assert attributions.locate([]) == []
    named = write_attributions(np.ones((2, 2)), ids=["train/digit-0815", "test/digit-0001"])
    with pytest.raises(ablate.UnknownNameError) as refused:
        named.locate(["train/digit-0816"])
    assert str(refused.value) == (
        "No example with id 'train/digit-0816'. Did you mean 'train/digit-0815' or 'test/digit-0001'? "
        "attributions.examples lists all."
    )
    with pytest.raises(coar.QueryError) as no_list:
        named.locate("train/digit-0815")
    assert str(no_list.value) == "ids is the string 'train/digit-0815', expected a list: locate(['train/digit-0815'])."


def test_group(write_attributions: WriteAttributions, attributions: Attributions) -> None:
    assert attributions.group("x") == [0, 2]
    assert attributions.group("y", contains="d") == [3]
    assert attributions.group("y", contains="nothing") == []
    dots = write_attributions(np.ones((2, 2)), ids=["a.b", "axb"], groups=["low", "low"])
    assert dots.group("low", "a.b") == [0]
    with pytest.raises(ablate.UnknownNameError) as refused:
        dots.group("lwo")
    assert str(refused.value) == "No group 'lwo'. Did you mean 'low'?"


def test_opening_reads_no_weights(
    write_attributions: WriteAttributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_attributions(WEIGHTS, tmp_path / "a.zarr")
    read: list[str] = []
    take = Blocks.take

    def watched(blocks: Blocks, name: str, rows: npt.NDArray[Any], *columns: Any) -> npt.NDArray[Any]:
        read.append(name)
        assert name != "weights" or len(rows) <= 3, "more than a block was read at a time"
        return take(blocks, name, rows, *columns)

    monkeypatch.setattr(Blocks, "take", watched)
    opened = coar.open_attributions(tmp_path / "a.zarr")
    assert (len(opened), opened.weights.shape, len(opened.index)) == (5, (5, 5), 5)
    assert opened.examples["id"].tolist() == ["e0", "e1", "e2", "e3", "e4"]
    assert read == []
    opened.top(1, k=2)
    assert read == ["weights", "stderr"]
    read.clear()
    opened.predict(np.ones((1, 5), dtype=np.bool_))
    assert read == ["weights", "bias"] * 2
    opened.nearest(0, k=1)
    opened.by_layer()


def test_reopened_from_disk_it_says_the_same(write_attributions: WriteAttributions, tmp_path: Path) -> None:
    kept = write_attributions(WEIGHTS, tmp_path / "a.zarr", bias=np.arange(5))
    opened = coar.open_attributions(str(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(opened.weights[:], kept.weights[:])
    pd.testing.assert_frame_equal(opened.top(3, 5), kept.top(3, 5))
    pd.testing.assert_frame_equal(opened.nearest(3, 4), kept.nearest(3, 4))
    pd.testing.assert_frame_equal(opened.quality, kept.quality)
    assert opened.index == kept.index
    assert opened.header == kept.header


def test_says_where_quality_was_not_measured(write_attributions: WriteAttributions, planted: CampaignStore) -> None:
    good = write_attributions([[1, 2], [3, 4]], correlation=[0.5, np.nan])
    assert (good.quality_measured, good.quality_text()) == (True, "0.500")
    constant = write_attributions([[1, 2]], correlation=np.nan)
    assert (constant.quality_measured, constant.quality_text()) == (True, "undefined: outputs are constant")
    all_fitted = coar.fit(planted, held_out=False)
    assert (all_fitted.quality_measured, all_fitted.quality_text()) == (False, "not measured")
    assert repr(all_fitted) == (
        f"<Attributions: 30 examples x 12 components, held-out correlation not measured, {all_fitted.store.where}>"
    )
