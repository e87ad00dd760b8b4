"""Kept predictions: every metric from them, bit-equal files, and files that are something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from coar.editing.judging.edit_predictions import EditPredictions, KeptPredictions, load_edit_predictions
from coar.errors import CoarError, EditError


def _kept(labels: list[int], base: list[int], edited: list[list[int]], prefix: str = "x") -> KeptPredictions:
    ids = tuple(f"{prefix}{i}" for i in range(len(labels)))
    return KeptPredictions(ids, np.array(labels), np.array(base), np.array(edited).reshape(-1, len(labels)))


THREE = _kept([7, 7, 7], [0, 0, 5], [[7, 7, 0], [0, 7, 0], [0, 0, 0]])
PAIR = _kept([1, 1], [2, 2], [[1, 1], [1, 1]], "y")
LOCAL = _kept([3, 4], [3, 0], [[3, 0], [3, 4], [3, 0], [0, 0], [3, 0]], "z")
FOUND = EditPredictions({"a/b": THREE, "c": PAIR}, {"locality": LOCAL}, "By hand", "0123456789abcdef", {"rate": 0.1})


def test_every_metric_comes_from_what_is_kept() -> None:
    assert (FOUND.edits, FOUND.edit_groups) == (5, ("a/b", "a/b", "a/b", "c", "c"))
    success = FOUND.success()
    assert (success.successes, success.edits, success.already_right) == (4, 5, 0)
    assert FOUND.generalisation().value == pytest.approx((1 / 6 + 1) / 2)
    assert FOUND.generalisation("code").value == pytest.approx((0 + 1 / 2) / 2)
    assert FOUND.edit_success().value == pytest.approx((2 / 3 + 1 / 3 + 0 + 1 + 1) / 5)
    local = FOUND.locality()
    assert (local.agreeing, local.right, local.predictions, local.base_accuracy) == (8, 5, 10, 0.5)
    assert local.by_group == {"a/b": pytest.approx(5 / 6), "c": 0.75}
    assert FOUND.drawdown().accuracy_drop == pytest.approx(0.0)
    assert FOUND.drawdown().disagreement == pytest.approx(0.2)
    point = FOUND.point("as it is")
    assert (point.locality, point.success, point.method, point.name) == (0.8, 0.8, "By hand", "as it is")
    assert point.generalisation == FOUND.generalisation().value


def test_the_table_has_every_metric_with_its_protocol() -> None:
    table = FOUND.table()
    assert table[["metric", "set"]].to_numpy().tolist() == [
        ["success rate", "edited"],
        ["edit success", "edited"],
        ["generalisation rate", "edited"],
        ["locality (agreement)", "locality"],
        ["locality (accuracy)", "locality"],
        ["drawdown (accuracy drop)", "locality"],
    ]
    assert table["count"].tolist() == [4, 7, 3, 8, 5, 5]
    assert table["of"].tolist() == [5, 13, 8, 10, 10, 10]
    assert all(protocol.endswith(".") and len(protocol) > 80 for protocol in table["protocol"])
    assert FOUND.protocol == (
        "Single-example editing: 5 edits by By hand in 2 groups, each from the unedited model 0123456789ab; after each "
        "edit all examples of its group, 2 of locality are predicted, and the edit is forgotten."
    )


def test_an_edit_that_does_nothing_keeps_everything() -> None:
    group = _kept([1, 1, 1], [0, 2, 0], [[0, 2, 0]] * 3)
    ordinary = _kept([3, 4], [3, 4], [[3, 4]] * 3)
    found = EditPredictions({"g": group}, {"locality": ordinary})
    assert (found.success().value, found.generalisation().value, found.locality().value) == (0, 0, 1)
    assert found.locality().value == 1 - found.drawdown().accuracy_drop


def test_files_keep_everything(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.safetensors"
    FOUND.save(path)
    FOUND.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["predictions.safetensors"]
    found = load_edit_predictions(path)
    assert (found.method, found.model, found.details) == (FOUND.method, FOUND.model, FOUND.details)
    assert list(found.groups) == ["a/b", "c"]
    for then, now in zip((THREE, PAIR, LOCAL), (*found.groups.values(), *found.sets.values()), strict=True):
        assert then.ids == now.ids
        for name in ("labels", "base", "edited"):
            assert getattr(now, name).dtype == np.uint16
            assert np.array_equal(getattr(then, name), getattr(now, name))
    assert found.table().equals(FOUND.table())


@given(st.integers(1, 4), st.integers(0, 4), st.sampled_from([3, 300, 70_000]), st.integers(0, 2**32 - 1))
def test_any_predictions_survive_a_file(
    tmp_path_factory: pytest.TempPathFactory, edits: int, ordinary: int, classes: int, seed: int
) -> None:
    draw = np.random.default_rng(seed).integers
    labels, base = draw(0, classes, (2, edits)).tolist()
    group = _kept(labels, base, draw(0, classes, (edits, edits)).tolist())
    ids = tuple(f"o{i}" for i in range(ordinary))
    beside = KeptPredictions(ids, np.zeros(ordinary, int), np.ones(ordinary, int), draw(0, classes, (edits, ordinary)))
    path = tmp_path_factory.mktemp("any") / "p.safetensors"
    EditPredictions({"g": group}, {"o": beside}).save(path)
    found = load_edit_predictions(path)
    assert np.array_equal(found.groups["g"].edited, group.edited)
    assert np.array_equal(found.sets["o"].edited, beside.edited)
    assert found.sets["o"].edited.shape == (edits, ordinary)


def test_nothing_in_a_file_is_code(tmp_path: Path) -> None:
    """Integers and one JSON text: read here without the toolkit."""
    FOUND.save(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="np") as file:
        header = json.loads(file.metadata()["predictions"])
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"uint16"}  # noqa: SIM118 - no mapping
        assert file.get_tensor("groups/0/edited").tolist() == THREE.edited.tolist()
    assert header["groups"][0] == {"name": "a/b", "ids": ["x0", "x1", "x2"]}


def test_arrays_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        THREE.edited[0, 0] = 1


def test_given_arrays_stay_as_they_are() -> None:
    labels = np.array([1, 2])
    kept = KeptPredictions(("a", "b"), labels, labels, labels[None])
    labels[0] = 5
    assert kept.labels.tolist() == [1, 2]


def _write(path: Path, header: Any, arrays: dict[str, Any]) -> Path:
    save_file({name: np.asarray(value) for name, value in arrays.items()}, path, header)
    return path


def test_what_is_no_file_of_predictions_is_refused(tmp_path: Path) -> None:
    missing, text = tmp_path / "missing", tmp_path / "text"
    text.write_text("hello")
    with pytest.raises(EditError) as refused:
        load_edit_predictions(missing)
    assert str(refused.value) == f"No predictions at {missing}: there is no such file. Check the path."
    with pytest.raises(EditError, match="cannot be read as predictions of edits: SafetensorError"):
        load_edit_predictions(text)
    plain = _write(tmp_path / "plain", None, {"a": [1]})
    with pytest.raises(EditError) as refused:
        load_edit_predictions(plain)
    assert str(refused.value) == (
        f"{plain} holds tensors but no predictions: EditPredictions.save did not write it. Check the path."
    )
    newer = _write(
        tmp_path / "newer", {"predictions": '{"format": "edit-predictions", "format_version": 9}'}, {"a": [1]}
    )
    with pytest.raises(EditError) as refused:
        load_edit_predictions(newer)
    assert str(refused.value) == (
        f"{newer} has format 'edit-predictions' version 9, this version of the toolkit reads 'edit-predictions' "
        "version 1."
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda header, arrays: arrays.pop("groups/0/base"), "KeyError: 'groups/0/base'"),
        (lambda header, arrays: header.pop("sets"), "KeyError: 'sets'"),
        (
            lambda header, arrays: arrays.update({"groups/1/base": np.array([1, 2, 3])}),
            "Predictions kept as 'base' are int64 of shape (3,), expected integers of shape (2,): one class number "
            "each",
        ),
        (
            lambda header, arrays: arrays.update({"groups/1/base": np.array([0.5, 0.5])}),
            "Predictions kept as 'base' are float64 of shape (2,), expected integers of shape (2,): one class number "
            "each",
        ),
        (
            lambda header, arrays: arrays.update({"sets/0/edited": np.zeros((4, 2), np.uint16)}),
            "Set 'locality' has predictions of 4 edits, the groups of 5",
        ),
        (
            lambda header, arrays: arrays.update({"groups/1/edited": np.zeros((3, 2), np.uint16)}),
            "Group 'c' has 2 examples and 3 edits, expected an edit per example",
        ),
    ],
)
def test_damaged_files_are_refused_with_the_reason(change: Any, why: str, tmp_path: Path) -> None:
    FOUND.save(tmp_path / "p")
    with safe_open(tmp_path / "p", framework="np") as file:
        header = json.loads(file.metadata()["predictions"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    change(header, arrays)
    path = _write(tmp_path / "damaged", {"predictions": json.dumps(header)}, arrays)
    with pytest.raises(EditError) as refused:
        load_edit_predictions(path)
    assert str(refused.value) == (
        f"{path} cannot be read as predictions of edits: {why}. It is damaged or something else; restore it from a "
        "copy, or evaluate the edits again."
    )


def test_a_set_that_was_not_predicted_is_named() -> None:
    with pytest.raises(CoarError) as refused:
        FOUND.drawdown("fog")
    assert str(refused.value) == (
        "There are no predictions for a set 'fog'. Known: 'locality'. Evaluate the edits on it."
    )
