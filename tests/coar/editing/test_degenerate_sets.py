"""Sets that no statistic can compare: by every way to COAR-Edit they are ranked by the difference, or refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import coar
from ablate import ComponentIndex, Examples
from coar.editing.coar_edit.ranking import NO_VARIANCE, rank_weights
from coar.editing.registry import get_editor
from coar.editing.request import Request
from coar.errors import EditError


def _rank(target: Any, reference: Any) -> Any:
    index = ComponentIndex.from_model(nn.Linear(2, len(target[0])), ["linear_neuron"])
    return rank_weights(index, target, reference, direction="raise", base="", target=[0], reference=[1])


def test_one_example_each_is_ranked_by_the_difference() -> None:
    ranking = _rank([[1.0, -3, 0, -1, -2]], [[0.0, 0, 0, 1, 0]])
    assert ranking.ids == (1, 3, 4, 2, 0)
    assert ranking.scores.tolist() == [-3, -2, -2, 0, 1]
    assert ranking.statistic == "difference"
    assert _rank([[1.0, -3, 0, -1, -2]], [[0.0, 0, 0, 1, 0], [0.0, 0, 0, 1, 1]]).statistic == "t"


def test_the_same_example_again_and_again_is_one_example() -> None:
    """Equal but for the rounding of float32, which must not become a variance."""
    noise = 1e-8 * np.random.default_rng(0).standard_normal((3, 5))
    ranking = _rank(np.array([[1.0, -3, 0, -1, -2]] * 3) + noise, [[0.0, 0, 0, 1, 0]] * 2)
    assert ranking.ids == (1, 3, 4, 2, 0) or ranking.ids == (1, 4, 3, 2, 0)
    assert ranking.statistic == "difference"
    np.testing.assert_allclose(ranking.scores, [-3, -2, -2, 0, 1], atol=1e-6)


def test_what_does_not_vary_is_ranked_by_its_difference_among_others_that_do() -> None:
    target, reference = [[-1.0, -2, -3, 0], [-1.0, -2, -3, 4]], [[0.0, 0, 0, 1], [0.0, 0, 0, 2]]
    ranking = _rank(target, reference)
    assert ranking.ids == (2, 1, 0, 3)
    assert np.isfinite(ranking.scores).all()
    assert ranking.statistic == "t"


def test_equal_attributions_are_refused() -> None:
    with pytest.raises(EditError) as refused:
        _rank([[1.0, 2, 3]], [[1.0, 2, 3], [1.0, 2, 3]])
    assert str(refused.value) == (
        "Target and reference have the same mean attribution in all 3 components: nothing tells them apart. Give other "
        "examples, or attributions of more passes or rows."
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
SETTINGS: dict[str, Any] = {"k": 2, "passes": 20, "ablate_fraction": 0.2}


def test_the_editor_says_that_there_is_no_t(model: nn.Module) -> None:
    request = Request(X[:1], Y[:1], reference=Examples(X[1:2], Y[1:2]))
    edit = get_editor("coar", **SETTINGS).edit(model, request)
    assert edit.details["statistic"] == "difference"
    assert edit.details["log"]["why"] == f"2 components are ablated; {NO_VARIANCE}"
    assert np.isfinite(edit.details["scores"]).all()
    json.dumps(dict(edit.details), allow_nan=False)
    attributions = coar.estimate(model, (X[:2], Y[:2]), passes=20, ablate_fraction=0.2)
    expected = np.argsort(attributions.weights[0] - attributions.weights[1], kind="stable")[:2]
    assert coar.coar_edit(attributions, [0], [1], k=2).details["ids_in_order"] == expected.tolist()


@pytest.mark.parametrize("shared", [1, 4])
def test_an_input_that_should_change_and_stay_is_refused(model: nn.Module, shared: int) -> None:
    """By content, whatever the ids are: equal sets, or a single example in both."""
    reference = Examples(torch.cat([X[4 - shared : 4], X[4:]]), torch.cat([Y[4 - shared : 4], Y[4:]]))
    with pytest.raises(EditError) as refused:
        get_editor("coar", **SETTINGS).edit(model, Request(X[:4], Y[:4], reference=reference))
    assert str(refused.value) == (
        f"{shared} of the {shared + 4} reference examples are inputs to be changed, too: reference '0' is input "
        f"{4 - shared}. What should change and what should stay must differ: leave them out of one."
    )


def test_pixels_are_compared_as_the_model_takes_them() -> None:
    pixels = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    examples = Examples(pixels, Y[:6], normalize=([0.5], [0.25]))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3)).eval()
    request = Request(examples.model_inputs(0, 2), Y[:2], reference=examples)
    with pytest.raises(EditError, match=r"^2 of the 6 reference examples are inputs to be changed, too: reference '0'"):
        get_editor("coar", **SETTINGS).edit(net, request)


def test_positions_in_both_sets_are_refused(model: nn.Module) -> None:
    attributions = coar.estimate(model, (X, Y), passes=4, ablate_fraction=0.2)
    editor = get_editor("coar", k=1, attributions=attributions, target=torch.tensor([0, 1]), reference=range(1, 4))
    request = Request(X[:2], Y[:2], reference=Examples(X[4:], Y[4:]))
    with pytest.raises(EditError, match=r"^Examples \[1\] are in target and reference"):
        editor.edit(model, request)
