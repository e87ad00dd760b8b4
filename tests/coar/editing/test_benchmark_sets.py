"""The sets of an editing benchmark: what is chosen, what is left out and named, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablate import Examples
from coar.editing.judging.benchmark_sets import (
    boundary_set,
    content_hashes,
    failure_groups,
    failures,
    reject_duplicates,
)
from coar.errors import CoarError


def test_the_boundary_of_two_classes() -> None:
    """Logits (1, 1 - e): the probabilities differ by tanh(e / 2)."""
    scores = np.array([[1.0, 1 - 1e-3], [1.0, 0.0], [1.0, 1.0], [1 - 1e-3, 1.0]])
    found = boundary_set(scores, [0, 0, 0, 0])
    assert found.positions.tolist() == [0]
    assert found.gaps.tolist() == pytest.approx([np.tanh(5e-4), np.tanh(0.5), 0.0, np.tanh(5e-4)])
    assert (found.examples, found.right, found.tied) == (4, 2, 1)
    assert found.protocol == (
        "Boundary set: 1 of 4 examples, those whose label is the top class of the unedited model (2) with a "
        "probability less than 0.05 above the second class (of 2 classes); 1 examples with two classes on top are left "
        "out."
    )


def test_probabilities_are_taken_as_they_are() -> None:
    p = np.array([[0.52, 0.48, 0.0], [0.6, 0.4, 0.0], [0.1, 0.46, 0.44]])
    assert boundary_set(p, [0, 0, 1], kind="probabilities").positions.tolist() == [0, 2]
    assert boundary_set(p, [0, 0, 1], gap=0.03, kind="probabilities").positions.tolist() == [2]
    assert boundary_set(p, [0, 0, 1], gap=1.0, kind="probabilities").positions.tolist() == [0, 1, 2]


def test_large_logits_do_not_overflow() -> None:
    assert boundary_set([[1000.0, 1000.01], [-1000.0, -999.99]], [1, 1]).positions.tolist() == [0, 1]


@given(st.lists(st.lists(st.integers(-40, 40), min_size=3, max_size=3), min_size=1, max_size=10), st.integers(1, 10))
def test_a_boundary_set_is_what_it_says(rows: list[list[int]], tenths: int) -> None:
    logits, gap = np.array(rows) / 10, tenths / 10
    labels = [i % 3 for i in range(len(rows))]
    chosen = boundary_set(logits, labels, gap).positions.tolist()
    for i, row in enumerate(logits):
        p = torch.softmax(torch.tensor(row), dim=0)
        others = [float(p[c]) for c in range(3) if c != labels[i]]
        ahead = float(p[labels[i]]) - max(others)
        if abs(ahead - gap) > 1e-9:
            assert (i in chosen) == (ahead > 1e-9 and ahead < gap)


def _examples(values: list[int], labels: list[int] | None = None, prefix: str = "e") -> Examples:
    inputs = torch.tensor(values, dtype=torch.float32)[:, None]
    return Examples(inputs, labels or [0] * len(values), [f"{prefix}{value}" for value in values])


def test_failures_are_what_is_not_the_label() -> None:
    assert failures([1, 2, 0], [1, 0, 1]).tolist() == [1, 2]
    assert failures([1], [1]).tolist() == []


def test_groups_keep_their_failures_and_small_ones_are_named() -> None:
    groups = {name: _examples([10 * i, 10 * i + 1, 10 * i + 2]) for i, name in enumerate(["many", "one", "none"])}
    found = failure_groups(groups, {"many": [1, 0, 2], "one": [0, 0, 3], "none": [0, 0, 0]})
    assert {name: examples.ids for name, examples in found.groups.items()} == {"many": ("e0", "e2")}
    assert found.dropped == {"one": 1, "none": 0}
    assert found.right == {"many": 1, "one": 2, "none": 3}
    assert found.protocol == (
        "Edited are 2 examples in 1 groups: all those the unedited model has wrong, whatever the wrong class. Left "
        "out, with fewer than 2 failures: one (1), none (0)."
    )


def test_ids_may_repeat_where_contents_differ() -> None:
    reject_duplicates({"a": _examples([1, 2]), "b": _examples([1, 3])}, {"locality": _examples([4, 5], prefix="e1")})
    same_ids = Examples(torch.tensor([[7.0], [8.0]]), [0, 0], ["e1", "e2"])
    reject_duplicates({"a": _examples([1, 2])}, {"locality": same_ids})


def test_content_hashes_tell_type_and_shape() -> None:
    ones = content_hashes(Examples(torch.ones(2, 4), [0, 0]))
    assert ones[0] == ones[1]
    assert content_hashes(Examples(torch.ones(1, 2, 2), [0])) != ones[:1]
    assert content_hashes(Examples(torch.ones(1, 4, dtype=torch.float64), [0])) != ones[:1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reject_duplicates({"g": _examples([1, 2])}, {"locality": _examples([3, 2], prefix="o")}),
            "Example 'o2' of set 'locality' is example 'e2' of group 'g', which is edited: it cannot be asked to "
            "change and to stay. Leave it out of one.",
        ),
        (
            lambda: reject_duplicates({"g": Examples(torch.ones(2, 1), [0, 0])}, {}),
            "Group 'g' holds one input twice, as '0' and '1': an edit would be said to generalise to what it was made "
            "with. Leave one out.",
        ),
        (
            lambda: failure_groups({"g": _examples([1])}, {}),
            "There are no predictions for group 'g'. Give those of every group.",
        ),
        (
            lambda: boundary_set([[1.0]], [0]),
            "Scores have shape (1, 1), expected (examples, classes) with at least 2 classes.",
        ),
        (lambda: boundary_set([[0.0, 1.0], [np.nan, 1.0]], [0, 0]), "The scores of example 1 hold NaN."),
        (lambda: boundary_set([[0.0, 1.0]], [2]), "Labels hold 2, the scores have classes 0 to 1."),
        (
            lambda: boundary_set([[0.0, 1.0]], [1], gap=5),
            "gap is 5, expected a difference of probabilities above 0, at most 1.",
        ),
        (
            lambda: boundary_set([[0.0, 5.0]], [1], kind="probabilities"),
            "Probabilities run from 0 to 5, expected 0 to 1. Are these logits?",
        ),
        (
            lambda: boundary_set([[0.0, 5.0]], [1], kind="scores"),  # type: ignore[arg-type]
            "kind is 'scores', expected 'logits' or 'probabilities'.",
        ),
        (
            lambda: boundary_set([[0.0, 5.0]], [1, 1]),
            "Labels are int64 of shape (2,), expected integers of shape (1,): one class number each.",
        ),
    ],
)
def test_what_is_no_benchmark_is_refused(call: Any, message: str) -> None:
    with pytest.raises(CoarError) as refused:
        call()
    assert str(refused.value) == message
