"""Selections: made of ids or patterns, sampled without a trace, turned into keep-vectors, tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ablate


@pytest.fixture
def index(conv_net: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])


def test_ids_are_sorted_and_distinct(index: ablate.ComponentIndex) -> None:
    ids: list[Any] = [7, 3, 7, np.int64(5)]
    selection = index.select(ids)
    assert selection.ids == (3, 5, 7)
    assert all(type(i) is int for i in selection.ids)
    assert list(selection) == [3, 5, 7]
    assert len(selection) == 3
    assert 5 in selection
    assert 4 not in selection
    assert "5" not in selection
    assert repr(selection) == "<Selection: 3 of 18 components>"


def test_where_by_module_kind_and_layer(index: ablate.ComponentIndex) -> None:
    assert index.where(module="conv1").ids == (0, 1, 2, 3)
    assert index.where(module="conv*").ids == tuple(range(10))
    assert index.where(kind="linear_neuron").ids == tuple(range(10, 18))
    assert index.where(layer=3).ids == (15, 16, 17)
    assert index.where(module="*", kind="conv_filter", layer=1).ids == tuple(range(4, 10))
    assert index.where() == index.everything()
    assert index.where(module="conv1").where(layer=1).ids == ()


def test_where_with_a_pattern_that_fits_nothing(index: ablate.ComponentIndex) -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        index.where(module="conv3")
    assert str(caught.value) == (
        "No module 'conv3'. Did you mean 'conv2' or 'conv1'? index.modules() lists all 4 indexed modules."
    )
    with pytest.raises(ablate.UnknownNameError) as caught:
        index.where(module="layer4.*")
    assert str(caught.value) == (
        "No module 'layer4.*'. Known: conv1, conv2, fc, head. index.modules() lists all 4 indexed modules."
    )


def test_where_with_an_unknown_kind_or_layer(index: ablate.ComponentIndex) -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        index.where(kind="conv_filters")
    assert str(caught.value) == "No component kind 'conv_filters'. Did you mean 'conv_filter'?"
    for layer in (-1, 4):
        with pytest.raises(ablate.UnknownNameError) as caught:
            index.where(layer=layer)
        assert str(caught.value) == f"No layer '{layer}'. Layers are 0 to 3."


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 18], "Component ids 18 do not exist; ids are 0 to 17."),
        ([-1, 3, 40], "Component ids -1, 40 do not exist; ids are 0 to 17."),
        ([1.7], "Component ids are integers, got 1.7. For what a keep array ablates pass numpy.flatnonzero(~keep)."),
        ([True], "Component ids are integers, got True. For what a keep array ablates pass numpy.flatnonzero(~keep)."),
        (["3"], "Component ids are integers, got '3'. For what a keep array ablates pass numpy.flatnonzero(~keep)."),
    ],
)
def test_ids_that_cannot_be(ids: list[int], message: str, index: ablate.ComponentIndex) -> None:
    with pytest.raises(ablate.SelectionError) as caught:
        index.select(ids)
    assert str(caught.value) == message


def test_a_keep_array_is_not_taken_for_ids(index: ablate.ComponentIndex) -> None:
    keep = np.ones(18, dtype=bool)
    keep[[2, 4]] = False
    with pytest.raises(ablate.SelectionError, match=r"got np\.True_\. For what a keep array ablates pass"):
        index.select(keep)
    assert index.select(np.flatnonzero(~keep)).ids == (2, 4)


def test_keep_is_false_exactly_where_selected(index: ablate.ComponentIndex) -> None:
    keep = index.select([0, 17]).keep()
    assert keep.dtype == np.bool_
    assert keep.tolist() == [False, *[True] * 16, False]
    assert index.select([]).keep().all()


def test_samples_are_reproducible_and_of_the_size_asked_for(index: ablate.ComponentIndex) -> None:
    conv = index.where(module="conv*")
    assert conv.sample(3, seed=0) == conv.sample(3, seed=0)
    assert len({conv.sample(3, seed=seed) for seed in range(20)}) > 10
    for n in range(len(conv) + 1):
        sample = conv.sample(n, seed=1)
        assert len(sample) == n
        assert not sample - conv
        assert not sample - conv.sample(min(n + 1, 10), seed=1), "smaller samples are parts of larger ones"


def test_a_sample_is_pinned(index: ablate.ComponentIndex) -> None:
    """Another way to sample is another experiment: it must be noticed."""
    assert index.everything().sample(5, seed=0).ids == (0, 2, 5, 14, 15)


def test_samples_are_uniform(index: ablate.ComponentIndex) -> None:
    hits = np.zeros(18)
    for seed in range(2000):
        hits[list(index.everything().sample(6, seed).ids)] += 1
    assert abs(hits / 2000 - 6 / 18).max() < 5 * (1 / 3 * 2 / 3 / 2000) ** 0.5


def test_sampling_leaves_random_state_alone(
    index: ablate.ComponentIndex, untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    with untouched():
        index.everything().sample(9, seed=3)
    first = index.everything().sample(9, seed=3)
    torch.rand(3)
    np.random.rand(3)
    assert index.everything().sample(9, seed=3) == first


def test_samples_that_cannot_be(index: ablate.ComponentIndex) -> None:
    for n in (-1, 5):
        with pytest.raises(ablate.SelectionError) as caught:
            index.where(module="conv1").sample(n, seed=0)
        assert str(caught.value) == f"Cannot sample {n} of 4 components. Give n between 0 and 4."
    with pytest.raises(ablate.SelectionError) as caught:
        index.everything().sample(1, seed=-1)
    assert str(caught.value) == "seed is -1, expected an integer from 0 to 2**63 - 1."


def test_expect_returns_the_selection_or_lists_its_modules(index: ablate.ComponentIndex) -> None:
    selection = index.select([1, 2, 12])
    assert selection.expect(3) is selection
    with pytest.raises(ablate.SelectionError) as caught:
        selection.expect(2000)
    assert str(caught.value) == "Expected 2,000 components, found 3. Per module:\nmodule\nconv1    2\nfc       1"
    with pytest.raises(ablate.SelectionError) as caught:
        index.select([]).expect(1)
    assert str(caught.value) == "Expected 1 components, found 0. Per module:\n  (none)"


def test_the_table_is_the_rows_of_the_index(index: ablate.ComponentIndex) -> None:
    table = index.select([17, 2]).table()
    assert table.index.tolist() == [0, 1]
    assert table["id"].tolist() == [2, 17]
    assert table["name"].tolist() == ["conv1[2]", "head[2]"]
    assert list(table.columns) == list(index.columns)


def test_json_gives_the_selection_back(index: ablate.ComponentIndex) -> None:
    selection = index.select([1, 5])
    assert ablate.Selection.from_json(selection.to_json(), index) == selection
    assert ablate.Selection.from_json(index.select([]).to_json(), index).ids == ()


def test_json_of_another_index_is_refused(index: ablate.ComponentIndex, conv_net: nn.Module) -> None:
    other = ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    with pytest.raises(ablate.SelectionError) as caught:
        ablate.Selection.from_json(index.select([1]).to_json(), other)
    assert str(caught.value) == (
        f"This selection belongs to index {index.hash[:12]}, not to {other.hash[:12]} (10 components). "
        "Use the index it was made with."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [18]}, "Component ids 18 do not exist; ids are 0 to 17."),
        (
            {"ids": [0.5]},
            "Component ids are integers, got 0.5. For what a keep array ablates pass numpy.flatnonzero(~keep).",
        ),
        ({"ids": 3}, "This is no selection in JSON: TypeError: 'int' object is not iterable."),
        ({"version": 2}, "This JSON says format 'selection', version 2; expected 'selection', 1."),
        ({"format": "edit"}, "This JSON says format 'edit', version 1; expected 'selection', 1."),
    ],
)
def test_json_that_was_changed_is_refused(
    change: dict[str, object], message: str, index: ablate.ComponentIndex
) -> None:
    text = json.dumps(json.loads(index.select([1]).to_json()) | change)
    with pytest.raises(ablate.SelectionError) as caught:
        ablate.Selection.from_json(text, index)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "KeyError: 'format'"),
        ("3", "TypeError: 'int' object is not subscriptable"),
        ("", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_text_that_is_no_selection(text: str, why: str, index: ablate.ComponentIndex) -> None:
    with pytest.raises(ablate.SelectionError) as caught:
        ablate.Selection.from_json(text, index)
    assert str(caught.value) == f"This is no selection in JSON: {why}."
