"""Distance in a hierarchy, and the images on which two models disagree most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coar.editing.judging.disagreement import hop_distance, most_disagreeing
from coar.errors import EditError

PATHS = st.lists(st.sampled_from("ab"), max_size=5).map(lambda names: ["entity", *names])


@given(st.lists(PATHS, min_size=1, max_size=3), st.lists(PATHS, min_size=1, max_size=3), st.booleans())
def test_a_distance_is_symmetric_and_0_to_itself(first: Any, second: Any, weighted: bool) -> None:
    assert hop_distance(first, first, weighted) == 0
    assert hop_distance(first, second, weighted) == hop_distance(second, first, weighted) >= 0


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_siblings(depth: int) -> None:
    parent = ["entity", *(f"n{i}" for i in range(1, depth))]
    cat, dog = [*parent, "cat"], [*parent, "dog"]
    assert hop_distance([cat], [dog], weighted=False) == 2
    assert hop_distance([cat], [dog]) == 2 * 2.0 ** (1 - depth)


def test_the_nearest_of_several_paths_counts_and_stays_as_it_is() -> None:
    dog = [["entity", "animal", "dog"], ["entity", "pet", "dog"]]
    cat = [["entity", "pet", "cat"]]
    assert hop_distance(dog, cat, weighted=False) == 2
    assert hop_distance(dog[:1], cat, weighted=False) == 4
    assert hop_distance(dog[:1], cat) == 2 * (1 + 0.5)
    assert hop_distance([["entity"]], cat) == 1 + 0.5
    assert dog[0] == ["entity", "animal", "dog"]  # nothing is reversed in place


def _sure(*classes: int) -> Any:
    return np.eye(4)[list(classes)] * 0.9 + 0.025


FAR = np.array([[0, 1, 2, 3], [1, 0, 5, 6], [2, 5, 0, 1], [3, 6, 1, 0]], dtype=np.float64)


def test_farthest_first_and_few_of_one_kind() -> None:
    first = _sure(0, 0, 0, 0, 1, 2, 2)
    second = _sure(1, 3, 3, 2, 3, 2, 3)
    found = most_disagreeing(first, second, FAR)
    assert found.positions.tolist() == [4, 1, 3, 0, 6]  # 2 repeats the pair of 1; on 5 they agree
    assert found.distances.tolist() == [6, 3, 2, 1, 1]
    assert found.pairs[0].tolist() == [1, 3]
    assert most_disagreeing(first, second, FAR, per_class=1).positions.tolist() == [4, 1, 6]


def test_unsure_models_are_not_asked() -> None:
    first, second = _sure(0, 1), _sure(1, 3)
    first[1] = [0.1, 0.79, 0.06, 0.05]
    assert most_disagreeing(first, second, FAR).positions.tolist() == [0]
    assert most_disagreeing(first, second, FAR, least=0.79).positions.tolist() == [1, 0]
    assert most_disagreeing(np.zeros((0, 4)), np.zeros((0, 4)), FAR).positions.tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: hop_distance([], [["entity"]]),
            "A class has no path from the root. Give at least one path of at least one node for each.",
        ),
        (lambda: hop_distance([["a"]], [["b"]]), "Paths start at 'a' and 'b', expected one root."),
        (
            lambda: most_disagreeing(_sure(0), _sure(0, 1), FAR),
            "Probabilities have shapes (1, 4) and (2, 4) and distances (4, 4), expected (images, classes) twice and "
            "(classes, classes).",
        ),
        (
            lambda: most_disagreeing(_sure(0), 5 * _sure(1), FAR),
            "The second model's probabilities are not all between 0 and 1. Are these logits?",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(call: Any, message: str) -> None:
    with pytest.raises(EditError) as refused:
        call()
    assert str(refused.value) == message
