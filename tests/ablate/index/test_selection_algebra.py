"""The algebra of selections is the algebra of sets, and stays inside one index."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ablate

INDEX = ablate.ComponentIndex.from_model(nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 5)), ["linear_neuron"])
selections = st.sets(st.integers(0, len(INDEX) - 1)).map(INDEX.select)


@given(selections, selections)
def test_operations_are_those_of_sets(a: ablate.Selection, b: ablate.Selection) -> None:
    assert set((a | b).ids) == set(a.ids) | set(b.ids)
    assert set((a & b).ids) == set(a.ids) & set(b.ids)
    assert set((a - b).ids) == set(a.ids) - set(b.ids)
    assert set((~a).ids) == set(range(len(INDEX))) - set(a.ids)
    for result in (a | b, a & b, a - b, ~a):
        assert list(result.ids) == sorted(set(result.ids))
        assert result.index is INDEX


@given(selections, selections, selections)
def test_laws(a: ablate.Selection, b: ablate.Selection, c: ablate.Selection) -> None:
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert ~~a == a
    assert a - b == a & ~b
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (b & c) == (a | b) & (a | c)
    assert a | ~a == INDEX.everything()
    assert len(a & ~a) == 0
    assert (a == b) == (a.ids == b.ids)
    assert (hash(a) == hash(b)) or a != b
    assert len(a | b) == len(a) + len(b) - len(a & b)


@given(selections, selections)
def test_keep_vectors_follow(a: ablate.Selection, b: ablate.Selection) -> None:
    assert np.array_equal((a | b).keep(), a.keep() & b.keep())
    assert np.array_equal((~a).keep(), ~a.keep())
    assert INDEX.select(np.flatnonzero(~a.keep())) == a
    assert ablate.Selection.from_json(a.to_json(), INDEX) == a


@given(selections, st.integers(0, 2**63 - 1), st.data())
def test_samples_are_parts(a: ablate.Selection, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, len(a)))
    sample = a.sample(n, seed)
    assert len(sample) == n
    assert sample & a == sample


@pytest.mark.parametrize("operation", [operator.or_, operator.and_, operator.sub])
def test_selections_of_two_indices_do_not_mix(operation: Callable[[Any, Any], Any]) -> None:
    other = ablate.ComponentIndex.from_model(nn.Linear(3, 6), ["linear_neuron"])
    with pytest.raises(ablate.SelectionError) as caught:
        operation(INDEX.select([1]), other.select([1]))
    assert str(caught.value) == (
        f"These selections belong to different indices: {INDEX.hash[:12]} (11 components) and {other.hash[:12]} (6). "
        "Combine selections of one index only."
    )
    with pytest.raises(ablate.SelectionError) as caught:
        operation(INDEX.select([1]), [1])
    assert str(caught.value) == "A selection combines with selections only, got a list."


def test_selections_of_equal_indices_are_equal() -> None:
    again = ablate.ComponentIndex.from_json(INDEX.to_json())
    assert again.select([1, 2]) == INDEX.select([2, 1])
    assert again.select([1]) | INDEX.select([2]) == INDEX.select([1, 2])
    assert INDEX.select([1]) != INDEX.select([2])
    assert INDEX.select([1]) != (1,)
