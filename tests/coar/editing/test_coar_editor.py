"""COAR-Edit as an editing method: what it finds, how it chooses a size, what it reports, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import coar
from ablate import ComponentIndex, Engine, Examples
from coar.editing.coar_edit.editor import COAREditor
from coar.editing.coar_edit.ranking import Ranking, rank_weights
from coar.editing.coar_edit.size import SizeRule, choose_size, size_for_target
from coar.editing.log import EditLog
from coar.editing.registry import editor_names, get_editor
from coar.editing.request import Request

# Four hidden units; unit j passes input j through. Class 0 gets units 0 and 2, class 1 units 1 and 3, minus a little.
HEAD = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])


@pytest.fixture
def four_units() -> nn.Module:
    """Logits (x0 + x2, x1 + x3): the margin is linear in the gates of the four units of `hidden`."""
    model = nn.Sequential()
    model.add_module("hidden", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model.get_parameter("hidden.weight").copy_(torch.eye(4))
        model.get_parameter("hidden.bias").zero_()
        model.get_parameter("head.weight").copy_(HEAD)
    return model.eval()


# Class 0 is right for all of them; the cue in unit 1 or 3 speaks for class 1.
TARGET = torch.tensor([[1.0, 3.0, 0.0, 0.0], [1.0, 4.0, 0.5, 0.0], [2.0, 3.5, 0.0, 0.5]])
ORDINARY = torch.tensor([[2.0, 0.0, 1.0, 0.5], [3.0, 0.0, 1.0, 1.0], [0.5, 2.0, 0.0, 1.0], [0.0, 1.5, 0.5, 2.0]])
ORDINARY_LABELS = torch.tensor([0, 0, 1, 1])


def _request(**changes: Any) -> Request:
    reference = Examples(ORDINARY, ORDINARY_LABELS)
    labels = torch.zeros(3, dtype=torch.int64)
    return Request(
        **{"inputs": TARGET, "labels": labels, "reference": reference, **changes},
    )


def _validation() -> tuple[Examples, Examples]:
    changed = Examples(TARGET + 0.25, torch.zeros(3, dtype=torch.int64))
    return changed, Examples(ORDINARY + 0.125, ORDINARY_LABELS)


def _attributions(model: nn.Module) -> coar.Attributions:
    inputs, labels = torch.cat([TARGET, ORDINARY]), torch.cat([torch.zeros(3, dtype=torch.int64), ORDINARY_LABELS])
    return coar.estimate(model, (inputs, labels), passes=4, ablate_fraction=0.25, quality_rows=10)


def test_it_is_registered() -> None:
    assert "coar" in editor_names()
    assert get_editor("coar", k=3) == COAREditor(k=3)


def test_it_ablates_the_cue_and_reports_the_harm(four_units: nn.Module, untouched: Any) -> None:
    with untouched(four_units, TARGET, ORDINARY):
        edit = COAREditor(k=1, passes=8, ablate_fraction=0.25).edit(four_units, _request())
    assert edit.selection.ids == (1,)
    assert (edit.operation.name, edit.alpha, edit.method) == ("ablate", 1.0, "COAR-Edit")
    with torch.no_grad():
        assert edit.apply(four_units)(TARGET).argmax(1).tolist() == [0, 0, 0]
    measured = edit.details["measured"]
    assert measured["target"]["examples"] == 3
    assert measured["target"]["right_before"] == 0
    assert measured["target"]["right_after"] == 3
    assert measured["target"]["margin_before"] == pytest.approx(-6.5 / 3)
    assert measured["target"]["margin_after"] == pytest.approx(4.0 / 3)
    # the harm: unit 1 also carries two of the four reference examples
    assert (measured["reference"]["right_before"], measured["reference"]["right_after"]) == (4, 4)
    assert measured["reference"]["margin_before"] - measured["reference"]["margin_after"] == pytest.approx(3.5 / 4)
    assert edit.details["predicted_change_target"] == pytest.approx(10.5 / 3, rel=0.05)
    assert edit.details["predicted_change_reference"] == pytest.approx(-3.5 / 4, rel=0.2)
    assert edit.details["log"]["stop"] == "max_steps"


def test_given_attributions_give_the_edit_of_coar_edit(four_units: nn.Module) -> None:
    attributions = _attributions(four_units)
    expected = coar.coar_edit(attributions, [0, 1, 2], [3, 4, 5, 6], k=2)
    editor = COAREditor(k=2, attributions=attributions, target=(0, 1, 2), reference=(3, 4, 5, 6))
    edit = editor.edit(four_units, _request())
    assert edit.selection == expected.selection
    for key, value in expected.details.items():
        assert edit.details[key] == value
    assert edit.details["attributions"]["held_out_correlation"] == attributions.quality_text()
    # without positions of the reference: by the ids of the request's
    reference = Examples(ORDINARY, ORDINARY_LABELS, ids=["3", "4", "5", "6"])
    by_id = COAREditor(k=2, attributions=attributions, target=(0, 1, 2)).edit(four_units, _request(reference=reference))
    assert by_id.selection == expected.selection


def test_only_selected_components_are_ablated(four_units: nn.Module) -> None:
    index = ComponentIndex.from_model(four_units)
    edit = COAREditor(k=1, passes=8, ablate_fraction=0.25).edit(four_units, _request(), index.select([0, 2, 3]))
    assert len(edit.selection) == 1
    assert 1 not in edit.selection


def test_lower_turns_right_predictions_wrong(four_units: nn.Module) -> None:
    inputs = ORDINARY[:2]
    request = Request(inputs, torch.zeros(2, dtype=torch.int64), reference=Examples(ORDINARY[2:], ORDINARY_LABELS[2:]))
    editor = COAREditor(choose="target", direction="lower", passes=8, ablate_fraction=0.25)
    edit = editor.edit(four_units, request)
    with torch.no_grad():
        assert edit.apply(four_units)(inputs).argmax(1).tolist() == [1, 1]
    assert edit.details["measured"]["target"]["right_after"] == 0


def _ranking(model: nn.Module, ids: tuple[int, ...] = (1, 3, 0, 2), direction: Any = "raise") -> Ranking:
    """All components in this order."""
    index = ComponentIndex.from_model(model)
    weights = np.zeros((1, 4))
    weights[0, list(ids)] = np.arange(4.0) if direction == "raise" else -np.arange(4.0)
    ranking = rank_weights(
        index, weights, [[-1.0] * 4, [1.0] * 4], direction=direction, base="", target=[0], reference=[0]
    )
    assert ranking.ids == ids
    return ranking


def _by_hand(ids: tuple[int, ...], inputs: Tensor, labels: Tensor) -> npt.NDArray[Any]:
    """Margins of each example after the first 0, 1, 2, ... of these units are ablated."""
    rows = []
    for k in range(len(ids) + 1):
        kept = torch.ones(4)
        kept[list(ids[:k])] = 0
        logits = (inputs * kept) @ HEAD.T
        rows.append(torch.where(labels == 0, logits[:, 0] - logits[:, 1], logits[:, 1] - logits[:, 0]).numpy())
    return np.stack(rows)


RULE = SizeRule("accuracy", None, 1, 4, 4)


def test_the_sweep_is_what_ablating_by_hand_gives(four_units: nn.Module) -> None:
    ranking, engine = _ranking(four_units), Engine(four_units, ComponentIndex.from_model(four_units))
    changed, ordinary = _validation()
    found = choose_size(ranking, engine, changed, ordinary, RULE, EditLog()).table
    margins = _by_hand(ranking.ids, changed.inputs(), changed.targets)
    others = _by_hand(ranking.ids, ordinary.inputs(), ordinary.targets)
    assert found["k"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found["accuracy"], (margins > 0).mean(axis=1))
    np.testing.assert_allclose(found["margin"], margins.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["ordinary_accuracy"], (others > 0).mean(axis=1))
    np.testing.assert_allclose(found["ordinary_margin"], others.mean(axis=1), rtol=1e-5)
    by_group = [
        (margins > 0).mean(axis=1),
        *((others[:, ORDINARY_LABELS.numpy() == c] > 0).mean(axis=1) for c in (0, 1)),
    ]
    np.testing.assert_allclose(found["worst_group"], np.min(by_group, axis=0))


@pytest.mark.parametrize(
    ("changes", "k", "why"),
    [
        ({}, 1, "accuracy is 1 with one component; the smallest size is taken"),
        ({"criterion": "margin"}, 2, "the second component speaks against class 0, too"),
        ({"criterion": "margin", "cap": 0.0}, 1, "the second costs ordinary accuracy"),
        ({"criterion": "worst_group"}, 1, "with the second the ordinary examples of class 1 are lost"),
        ({"every": 3}, 3, "1 and 2 are not tried"),
        ({"every": 3, "cap": 0.0}, 0, "three components cost ordinary accuracy"),
    ],
)
def test_the_size_is_the_best_admissible_one(four_units: nn.Module, changes: Any, k: int, why: str) -> None:
    rule = SizeRule(**{"criterion": "accuracy", "cap": None, "every": 1, "most": 4, "patience": 4, **changes})
    engine = Engine(four_units, ComponentIndex.from_model(four_units))
    assert choose_size(_ranking(four_units), engine, *_validation(), rule, EditLog()).k == k, why


def test_it_stops_early_when_nothing_gets_better(four_units: nn.Module) -> None:
    engine = Engine(four_units, ComponentIndex.from_model(four_units))
    rule = SizeRule("accuracy", None, 1, 4, 2)
    found = choose_size(_ranking(four_units), engine, *_validation(), rule, EditLog())
    assert found.table["k"].tolist() == [0, 1, 2, 3]  # 1 is best, two more are not better
    assert found.stopped == "2 sizes in a row were not better, or dropped more than the cap"
    assert found.k == 1
    assert found.protocol == (
        "Sizes from 0 in steps of 1; score: share of the examples to be changed that is predicted as asked. Of 4 "
        "settings 4 are admissible (accuracy on 4 ordinary examples drops by at most 100 percentage points from 100.00 "
        "%); of these best is 'k = 1'; chosen by the score on validation examples."
    )


def test_the_editor_chooses_on_validation_examples(four_units: nn.Module) -> None:
    editor = COAREditor(passes=8, ablate_fraction=0.25, cap=0.0)
    edit = editor.edit(four_units, _request(validation=_validation()))
    assert edit.selection.ids == (1,)
    size = edit.details["size"]
    assert size["sweep"]["k"][:2] == [0, 1]
    assert size["sweep"]["accuracy"][:2] == [0.0, 1.0]
    assert size["sweep"]["admissible"][1]
    assert "best is 'k = 1'" in size["protocol"]
    assert edit.details["log"]["stop"] == "converged"


def test_no_size_is_better_than_the_unedited_model(four_units: nn.Module, tmp_path: Any) -> None:
    ordinary = _validation()[1]
    done = Examples(ORDINARY[:2], ORDINARY_LABELS[:2])  # right already: nothing can be better
    editor = COAREditor(passes=8, ablate_fraction=0.25)
    edit = editor.edit(four_units, _request(validation=(done, ordinary)))
    assert (edit.alpha, edit.details["k"], edit.details["log"]["stop"]) == (0.0, 0, "noop")
    before, after = four_units.state_dict(), edit.apply(four_units).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert edit.details["log"]["why"] == "No component is ablated: no size tried is better."
    right = _request(
        inputs=ORDINARY[:2], labels=ORDINARY_LABELS[:2], reference=Examples(ORDINARY[2:], ORDINARY_LABELS[2:])
    )
    why = COAREditor(choose="target", passes=2).edit(four_units, right).details["log"]["why"]
    assert why == "No component is ablated: the targets are as they should be."
    edit.save(tmp_path / "none.safetensors")
    assert coar.load_edit(tmp_path / "none.safetensors") == edit


def test_model_errors_one_at_a_time_until_the_margin_is_above_0(four_units: nn.Module) -> None:
    ranking, engine = _ranking(four_units), Engine(four_units, ComponentIndex.from_model(four_units))
    one = Examples(torch.tensor([[1.0, 3.0, 0.0, 2.0]]), [0])  # margin -4; -1 without unit 1; +1 without 3
    found = size_for_target(ranking, engine, one, 4, EditLog())
    assert found.k == 2
    assert found.table["score"].tolist() == [-4.0, -1.0, 1.0]
    assert found.stopped == "the targets are as they should be"
    right = Examples(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), [0])
    assert size_for_target(ranking, engine, right, 4, EditLog()).k == 0


def test_model_errors_in_the_other_direction(four_units: nn.Module) -> None:
    ranking = _ranking(four_units, (0, 2, 1, 3), "lower")
    engine = Engine(four_units, ComponentIndex.from_model(four_units))
    one = Examples(torch.tensor([[2.0, 1.0, 3.0, 0.0]]), [0])  # margin 4; 2 without unit 0; -1 without 2
    found = size_for_target(ranking, engine, one, 4, EditLog())
    assert (found.k, found.table["margin"].tolist()) == (2, [4.0, 2.0, -1.0])


def test_model_errors_that_cannot_be_corrected(four_units: nn.Module) -> None:
    ranking, engine = _ranking(four_units), Engine(four_units, ComponentIndex.from_model(four_units))
    hopeless = Examples(torch.tensor([[-1.0, 3.0, 0.0, 0.0]]), [0])  # never above 0
    with pytest.raises(coar.EditError) as refused:
        size_for_target(ranking, engine, hopeless, 2, EditLog())
    assert str(refused.value) == (
        "With 2 components ablated the targets are still not as they should be: at best, with 1, the worst of their "
        "margins is -1.000. Allow more (most), rank with more reference examples or more exact attributions, or give "
        "fewer targets."
    )


def test_the_same_seed_gives_the_same_edit(four_units: nn.Module) -> None:
    editor = COAREditor(k=1, passes=4, reference_size=2, seed=3)
    first, second = (editor.edit(four_units, _request()) for _ in range(2))
    assert first.selection == second.selection
    assert first.details["scores"] == second.details["scores"]
    assert len(first.details["reference"]) == 2
    drawn = {
        tuple(COAREditor(k=1, passes=4, reference_size=2, seed=s).edit(four_units, _request()).details["reference"])
        for s in range(4)
    }
    assert len(drawn) > 1


def test_a_ranking_within_a_selection(four_units: nn.Module) -> None:
    ranking = _ranking(four_units)
    few = ranking.within(ranking.index.select([0, 3]))
    assert few.ids == (3, 0)
    np.testing.assert_array_equal(few.scores, ranking.scores[[1, 2]])
    assert few.keep(1).tolist() == [True, True, True, False]
    other = ComponentIndex.from_model(nn.Linear(2, 3), ["linear_neuron"])
    with pytest.raises(coar.EditError) as refused:
        ranking.within(other.everything())
    assert str(refused.value) == (
        f"The selection is of index {other.hash[:12]} (3 components), the attributions of {ranking.index.hash[:12]} "
        "(4). Select with attributions.index."
    )


def test_welchs_variances_need_two_examples() -> None:
    t, r = np.array([[1.0], [3.0]]), np.array([[0.0], [0.0], [0.0], [4.0]])
    np.testing.assert_allclose(coar.coar_scores(t, r, ddof=1), [0.707107], atol=5e-7)
    n = 8
    values = np.random.default_rng(0).normal(size=(2, n, 3))
    ratio = coar.coar_scores(values[0], values[1]) / coar.coar_scores(values[0], values[1], ddof=1)
    np.testing.assert_allclose(ratio, np.sqrt(n / (n - 1)))
    np.testing.assert_allclose(ratio, 1.069045, atol=5e-7)
    with pytest.raises(coar.EditError) as refused:
        coar.coar_scores(t[:1], r, ddof=1)
    assert str(refused.value) == (
        "The target set has 1 example, and a variance divided by n - 1 needs 2. Give more, or ddof=0."
    )
    with pytest.raises(coar.EditError) as refused:
        coar.coar_scores(t, r, ddof=2)
    assert str(refused.value) == "ddof is 2, expected 0 (variances divided by n) or 1 (by n - 1)."


def test_with_unequal_counts_the_ranking_depends_on_ddof() -> None:
    """E §1: the order by ddof = 0 and by ddof = 1 can differ where n differs (2 against 50)."""
    generator = np.random.default_rng(0)
    differ = 0
    for _ in range(20):
        t, r = generator.normal(size=(2, 6)), generator.normal(size=(50, 6))
        differ += not np.array_equal(np.argsort(coar.coar_scores(t, r)), np.argsort(coar.coar_scores(t, r, ddof=1)))
    assert differ


def test_an_ablated_filter_is_its_bias_after_batch_norm() -> None:
    """E §1: gamma 2, beta 0.5, mean 3, variance 4: what is left of the channel is -2.5, not 0."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2, eps=0)).eval()
    with torch.no_grad():
        for name, value in (("weight", 2.0), ("bias", 0.5)):
            model[1].get_parameter(name).fill_(value)
        model[1].get_buffer("running_mean").fill_(3.0)
        model[1].get_buffer("running_var").fill_(4.0)
    edited = coar.Edit(ComponentIndex.from_model(model, ["conv_filter"]).select([0])).apply(model)
    with torch.no_grad():
        out = edited(torch.randn(2, 1, 5, 5))
    assert torch.equal(out[:, 0], torch.full((2, 5, 5), -2.5))
    assert not torch.equal(out[:, 1], torch.full((2, 5, 5), -2.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "These settings cannot work: k is 0, expected an integer from 1 or None."),
        (
            {"k": "3", "passes": 2.5},
            "These settings cannot work: k is '3', expected an integer from 1 or None; passes is 2.5, expected an "
            "integer from 2.",
        ),
        (
            {"choose": "eye", "direction": "up", "every": 0, "cap": -1.0},
            "These settings cannot work: choose is 'eye', expected one of validation, target; direction is 'up', "
            "expected one of raise, lower; cap is -1.0, expected percentage points from 0 to 100 or None; every is "
            "0, expected an integer from 1.",
        ),
        (
            {"criterion": "best", "ddof": 2, "ablate_fraction": 0.7},
            "These settings cannot work: criterion is 'best', expected one of accuracy, margin, worst_group; "
            "ablate_fraction is 0.7, expected a number above 0 to 0.5; ddof is 2, expected one of 0, 1.",
        ),
        (
            {"attributions": "a.zarr"},
            "These settings cannot work: attributions are given without target: say at which positions the inputs are "
            "in them.",
        ),
        (
            {"target": (0,), "reference": (1,)},
            "These settings cannot work: target and reference: positions in attributions, which are not given.",
        ),
    ],
)
def test_settings_that_cannot_work(settings: Any, message: str) -> None:
    with pytest.raises(coar.EditError) as refused:
        COAREditor(**settings)
    assert str(refused.value) == message


def test_refuses(four_units: nn.Module) -> None:
    def refused(editor: COAREditor, request: Request, error: type[Exception] = coar.EditError) -> str:
        with pytest.raises(error) as found:
            editor.edit(four_units, request)
        return str(found.value)

    assert refused(COAREditor(), _request()) == (
        "COAR-Edit needs to know how many components to ablate: set k, give validation examples in the request, or set "
        "choose='target' to go on until the inputs are right."
    )
    assert refused(COAREditor(k=5), _request()) == "k is 5, expected 1 to 4, the number of selected components."
    assert refused(COAREditor(k=1), _request(labels=None, reference=None)) == (
        "COAR-Edit cannot edit with this request:\n"
        "  labels is missing: the class that each input should get.\n"
        "  reference is missing: ordinary examples, as ablate.Examples, whose predictions should stay."
    )
    attributions = _attributions(four_units)
    given = COAREditor(k=1, attributions=attributions, target=(0, 1), reference=(3,))
    assert refused(given, _request()) == "target has 2 positions for 3 inputs: give one per input."
    with torch.no_grad():
        four_units.get_parameter("head.weight").mul_(2)
    made_for = attributions.header["identity"]["of"]["model"][:12]
    message = refused(given, _request(), coar.EditMismatchError)
    assert message.startswith(f"{attributions.store.where} holds attributions of another model than this ")
    assert f"\n  model: {made_for}" in message
    assert message.endswith("Give the model's own, or let them be estimated.")


def test_settings_are_described_in_words(four_units: nn.Module) -> None:
    attributions = _attributions(four_units)
    editor = COAREditor(k=1, attributions=attributions, target=(0, 1, 2), reference=(3, 4))
    described = editor.describe()
    assert described["method"] == "coar"
    assert described["attributions"] == attributions.store.where
    assert described["target"] == [0, 1, 2]
