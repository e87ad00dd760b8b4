"""Judging edits on nets whose predictions anyone can follow: the driver, the report, and what is left untouched."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
from ablate import ComponentIndex, Examples, Selection
from coar.editing.abstract import Editor, Found
from coar.editing.edits.edit import Edit
from coar.editing.edits.operations import Ablate
from coar.editing.judging.evaluate import evaluate_edit
from coar.editing.judging.single_edits import evaluate_single_edits
from coar.editing.log import EditLog
from coar.editing.predicting import predictions
from coar.editing.request import TOKENS, Request
from coar.errors import EditError

Untouched = Callable[..., AbstractContextManager[None]]
CHECK = [2, 2, 2, 1, 1]  # forwards that ask whether two examples have logits of their own, the same each time


def _net() -> nn.Linear:
    """Logits are the four inputs: the prediction is the largest."""
    net = nn.Linear(4, 4)
    with torch.no_grad():
        net.weight.copy_(torch.eye(4))
        net.bias.zero_()
    return net.eval()


def _ablate(net: nn.Module, classes: list[int]) -> Edit:
    """Without these rows of the layer, the logits of these classes are 0."""
    index = ComponentIndex.from_model(net, kinds=["linear_neuron"])
    return Edit(index.select(classes))


def _examples(rows: list[list[float]], labels: list[int], prefix: str = "e") -> Examples:
    return Examples(torch.tensor(rows, dtype=torch.float32), labels, [f"{prefix}{i}" for i in range(len(rows))])


# 3 is on top, 1 second, 2 third; without 3 all are right
GROUP = _examples([[0.1, 3, 1, 5], [0.2, 3, 1, 5], [0.3, 1, 3, 5]], [1, 1, 2])
LOCAL = _examples([[9, 0, 0, 0], [0, 0, 0, 9.0], [0, 9, 0, 0]], [0, 3, 2], "o")


def _without_3(model: nn.Module, inputs: Tensor, labels: Tensor) -> Edit:
    return _ablate(model, [3])


def _nothing(model: nn.Module, inputs: Tensor, labels: Tensor) -> Edit:
    return _ablate(model, [3]).at(0)


class Always:
    """Makes a net say one class to everything, by its bias."""

    def __init__(self, label: int) -> None:
        self.label = label

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        bias = model.get_parameter("bias")
        before = bias.detach().clone()
        with torch.no_grad():
            bias[self.label] += 100
        try:
            yield model
        finally:
            with torch.no_grad():
                bias.copy_(before)


def test_predictions_are_the_largest_logit_and_the_first_of_equal_ones() -> None:
    examples = _examples([[0, 1, 0, 0], [2, 2, 0, 2], [0, 0, 0, 0]], [0, 0, 0])
    for batch_size in (1, 2, 64):
        found = predictions(_net(), examples, batch_size=batch_size)
        assert found.tolist() == [1, 0, 0]
        assert found.dtype == np.int64


def test_predictions_leave_model_and_random_state_alone(conv_net: nn.Module, untouched: Untouched) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = conv_net

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x) + 0 * torch.rand(1)
            return logits

    model = Noisy().eval()
    examples = Examples(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), [0, 1, 2, 0, 1])
    with untouched(model, examples.inputs()):
        found = predictions(model, examples, batch_size=2)
    assert found.tolist() == conv_net(examples.inputs()).argmax(dim=1).tolist()


def test_pixels_are_prepared_and_models_in_float64_work() -> None:
    net = nn.Sequential(nn.Flatten(), _net().double()).eval()
    pixels = torch.tensor([[[[0, 255], [10, 20]]]], dtype=torch.uint8)
    assert predictions(net, Examples(pixels, [0], normalize=([0.5], [0.5]))).tolist() == [1]
    assert predictions(net, Examples(pixels, [0], normalize=([0.5], [0.25]))).tolist() == [1]


def test_a_report_counts_what_an_edit_fixes_and_breaks(untouched: Untouched) -> None:
    net = _net()
    with untouched(net):
        found = evaluate_edit(net, _ablate(net, [3]), {"group": GROUP, "ordinary": LOCAL})
    group, local = found.sets["group"], found.sets["ordinary"]
    assert (group.before.right, group.after.right, group.fixed, group.broken, group.agreeing) == (0, 3, 3, 0, 0)
    assert (local.before.right, local.after.right, local.fixed, local.broken, local.agreeing) == (2, 1, 0, 1, 2)
    assert group.kept.edited.tolist() == [[1, 1, 2]]
    assert group.kept.base.tolist() == [3, 3, 3]
    assert local.agreement == pytest.approx(2 / 3)
    assert local.outcomes().n_newly_wrong == 1
    assert repr(found) == "<EditReport: group 0.0 -> 100.0 %; ordinary 66.7 -> 33.3 %>"
    assert found.table()["broken"].tolist() == [0, 1]
    assert local.protocol == (
        "Of 3 examples 2 are predicted right by the unedited and 1 by the edited model: 0 fixed, 1 broken; 2 "
        "predictions are the same (agreement); micro-average."
    )


def test_known_base_predictions_are_not_computed_again() -> None:
    net, seen = _net(), []
    hook = net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    first = evaluate_edit(net, _ablate(net, [3]), {"g": GROUP, "o": LOCAL})
    assert seen == [*CHECK, 3, 3, 3, 3]
    second = evaluate_edit(net, _ablate(net, [0]), {"g": GROUP, "o": LOCAL}, base=first.base)
    assert seen == [*CHECK, 3, 3, 3, 3, 3, 3]
    hook.remove()
    assert second.sets["g"].kept.base.tolist() == [3, 3, 3]
    assert second.sets["o"].broken == 0  # logits of 0 only: the first class, which is right


def test_single_edits_predict_group_and_locality(untouched: Untouched) -> None:
    net = _net()
    with untouched(net):
        found = evaluate_single_edits(net, _without_3, {"g": GROUP}, LOCAL)
    assert found.groups["g"].edited.tolist() == [[1, 1, 2]] * 3
    assert found.sets["locality"].edited.tolist() == [[0, 0, 1]] * 3
    assert found.sets["locality"].base.tolist() == [0, 3, 1]
    assert (found.success().value, found.generalisation().value) == (1, 1)
    assert found.locality().agreement == pytest.approx(2 / 3)
    assert found.locality().accuracy == pytest.approx(1 / 3)
    assert (found.method, found.model) == ("_without_3", ablate.model_hash(net))


def test_the_identity_editor() -> None:
    found = evaluate_single_edits(_net(), _nothing, {"g": GROUP}, LOCAL)
    assert (found.success().value, found.generalisation().value, found.locality().value) == (0, 0, 1)


def test_an_oracle_in_a_group_of_one_class_and_in_one_of_two() -> None:
    def oracle(model: nn.Module, inputs: Tensor, labels: Tensor) -> Always:
        return Always(int(labels))

    one_class = GROUP.take([0, 1])
    found = evaluate_single_edits(_net(), oracle, {"one": one_class}, LOCAL)
    assert (found.success().value, found.generalisation().value) == (1, 1)
    assert found.locality().agreement == pytest.approx(1 / 3)  # it says 1 to everything
    assert found.drawdown().disagreement == pytest.approx(2 / 3)
    mixed = evaluate_single_edits(_net(), oracle, {"two": GROUP})
    assert mixed.success().value == 1
    assert mixed.generalisation().value == pytest.approx(2 / 6)  # an edit for one class does not say another


@dataclass(frozen=True, kw_only=True)
class AblatesOthers(Editor):
    """Ablates the predicted class, if it is not the label."""

    name: ClassVar[str] = "ablates_others"
    title: ClassVar[str] = "Ablation of others"
    needs: ClassVar[tuple[str, ...]] = ("labels",)

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        """Returns the ablation."""
        predicted, label = int(model(request.inputs).argmax()), int(one(request.labels))
        return Found(Ablate(), selection.index.select([predicted]), {"wrong": predicted != label})

    def default_selection(self, model: nn.Module) -> Selection:
        """Returns all neurons."""
        index = ComponentIndex.from_model(model, kinds=["linear_neuron"])
        return index.select(range(len(index)))


def one(labels: Tensor | None) -> Tensor:
    assert labels is not None
    assert labels.shape == (1,)
    return labels


def test_a_method_gets_each_example_and_its_settings_are_kept(untouched: Untouched) -> None:
    net = _net()
    with untouched(net):
        found = evaluate_single_edits(net, AblatesOthers(seed=3), {"g": GROUP}, LOCAL)
    assert found.groups["g"].edited.tolist() == [[1, 1, 2]] * 3
    assert found.method == "Ablation of others"
    assert found.details == {"method": "ablates_others", "seed": 3}


def test_every_edit_starts_from_the_unedited_model_and_sees_one_example() -> None:
    net, seen, handed = _net(), [], []

    def editor(model: nn.Module, inputs: Tensor, labels: Tensor) -> Edit:
        assert predictions(model, GROUP).tolist() == [3, 3, 3]
        seen.append((inputs.tolist(), labels.tolist()))
        return _ablate(model, [3])

    evaluate_single_edits(
        net, editor, {"g": GROUP}, more={"fog": LOCAL}, on_edit=lambda group, name, edit: handed.append((group, name))
    )
    assert seen == [([row], [label]) for row, label in zip(GROUP.inputs().tolist(), [1, 1, 2], strict=True)]
    assert handed == [("g", "e0"), ("g", "e1"), ("g", "e2")]


def test_base_predictions_are_computed_once() -> None:
    net, batches = _net(), []
    hook = net.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    evaluate_single_edits(net, _nothing, {"g": GROUP}, LOCAL)
    hook.remove()
    assert len(batches) == len(CHECK) + 2 + 2 * 3


def test_further_sets_and_details_are_kept() -> None:
    found = evaluate_single_edits(
        _net(), _without_3, {"g": GROUP}, more={"fog": LOCAL}, method="Ablation of 3", details={"k": 1}
    )
    assert (found.method, found.details, list(found.sets)) == ("Ablation of 3", {"k": 1}, ["fog"])
    assert found.drawdown("fog").accuracy_drop == pytest.approx(1 / 3)
    with pytest.raises(EditError, match="no predictions for a set 'locality'"):
        found.locality()


def test_a_function_that_draws_leaves_the_random_state() -> None:
    def editor(model: nn.Module, inputs: Tensor, labels: Tensor) -> Edit:
        random.random()  # noqa: S311 - no cryptography
        torch.rand(3)
        return _ablate(model, [3])

    net = _net()
    before = random.getstate(), torch.get_rng_state()
    evaluate_single_edits(net, editor, {"g": GROUP})
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_progress_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_single_edits(_net(), _nothing, {"g": GROUP})
    assert capsys.readouterr().err == ""
    evaluate_single_edits(_net(), _nothing, {"g": GROUP}, progress=True)
    assert "editing" in capsys.readouterr().err


def _changes(model: nn.Module, inputs: Tensor, labels: Tensor) -> Edit:
    with torch.no_grad():
        model.get_parameter("bias")[0] += 1
    return _ablate(model, [3])


def _trains(model: nn.Module, inputs: Tensor, labels: Tensor) -> Edit:
    return _ablate(model.train(), [3])


def _breaks(model: nn.Module, inputs: Tensor, labels: Tensor) -> Always:
    class Broken(Always):
        @contextmanager
        def applied(self, model: nn.Module) -> Iterator[nn.Module]:
            yield nn.Sequential(model, nn.Linear(4, 4, bias=False).apply(_with_nan)).eval()

    return Broken(0)


def _with_nan(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.get_parameter("weight").fill_(float("nan"))


@pytest.mark.parametrize(
    ("editor", "message"),
    [
        (
            _changes,
            "The editor, or applying its edit, changed the model: the next edit would not start from the unedited "
            "model. Let the editor work on a copy and return an Edit.",
        ),
        (
            _trains,
            "This Linear is in training mode: dropout and batch norm would make predictions depend on chance. Call "
            "model.eval() first.",
        ),
        (
            _breaks,
            "The model's logits for example 'e0' hold NaN or infinity, so there is no prediction. An edit with too "
            "large steps does that; so do such inputs or weights.",
        ),
    ],
)
def test_an_editor_that_does_harm_is_named_with_its_example(editor: Any, message: str) -> None:
    with pytest.raises(EditError) as refused:
        evaluate_single_edits(_net(), editor, {"g": GROUP})
    assert str(refused.value) == message
    assert refused.value.__notes__ == ["This was the edit for example 'e0' of group 'g'."]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda net: predictions(nn.Sequential(net, nn.Dropout()).train(), GROUP),
            "This Sequential is in training mode: dropout and batch norm would make predictions depend on chance. Call "
            "model.eval() first.",
        ),
        (
            lambda net: predictions(_partly_training(net), GROUP),
            "Module '1' of this Sequential is in training mode: dropout and batch norm would make predictions depend "
            "on chance. Call model.eval() first.",
        ),
        (
            lambda net: predictions(nn.Flatten(0).eval(), GROUP),
            "The model returns shape (12,) for 3 examples, expected logits of shape (examples, classes).",
        ),
        (
            lambda net: predictions(Picky().eval(), Examples(torch.zeros(2, 5), [0, 0])),
            "The model fails on inputs of shape (2, 5) and type float32: ValueError: images only. Give inputs as the "
            "model takes them.",
        ),
        (lambda net: predictions(net, GROUP, batch_size=0), "batch_size is 0, expected at least 1."),
        (
            lambda net: predictions(net, _examples([[0, 0, 0, 1], [0, float("nan"), 0, 0]], [0, 0])),
            "The model's logits for example 'e1' hold NaN or infinity, so there is no prediction. An edit with too "
            "large steps does that; so do such inputs or weights.",
        ),
        (
            lambda net: predictions(net, _examples([[0, 0, 0, 1], [0, 0, 0, 0]], [3, 4])),
            "Example 'e1' has label 4, the model has classes 0 to 3.",
        ),
        (
            lambda net: predictions(net, Examples(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4).long())),
            f"These examples have a target per token, and predictions are one class per example. {TOKENS}",
        ),
        (
            lambda net: predictions(net, Examples.unlabelled(torch.zeros(2, 4))),
            "These examples have no labels; predictions are compared with them. Give one class each.",
        ),
        (
            lambda net: evaluate_edit(net, Always(0), {}),
            "There are no sets to judge the edit on. Give at least one, by name.",
        ),
        (
            lambda net: evaluate_edit(net, Always(0), {"g": GROUP}, base={"g": np.array([1])}),
            "base has 1 predictions for set 'g', which has 3 examples.",
        ),
        (
            lambda net: evaluate_single_edits(net, _nothing, {}),
            "There are no groups: nothing to edit. Give at least one group of examples.",
        ),
        (
            lambda net: evaluate_single_edits(net, _nothing, {"g": GROUP}, more={"locality": LOCAL}),
            "A set in `more` is called 'locality'. Give it as locality=, or another name.",
        ),
        (
            lambda net: evaluate_single_edits(net, _nothing, {"g": GROUP}, GROUP.take([1])),
            "Example 'e1' of set 'locality' is example 'e1' of group 'g', which is edited: it cannot be asked to "
            "change and to stay. Leave it out of one.",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(call: Any, message: str) -> None:
    with pytest.raises(EditError) as refused:
        call(_net())
    assert str(refused.value) == message


class Picky(nn.Module):
    """Takes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("images only.\nAnd more.")


def _partly_training(net: nn.Module) -> nn.Module:
    model = nn.Sequential(net, nn.Dropout()).eval()
    model[1].train()
    return model
