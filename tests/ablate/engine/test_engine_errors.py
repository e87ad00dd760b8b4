"""Law 5: what the engine says when it is given something wrong. The whole text, so that it stays helpful."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate


@pytest.fixture
def index(conv_net: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])


@pytest.fixture
def engine(conv_net: nn.Module, index: ablate.ComponentIndex) -> ablate.Engine:
    return ablate.Engine(conv_net, index, batch_size=3)


KEEP = np.ones((2, 10), dtype=bool)
NOT_BOOL = "expected bool (True = kept). Convert it yourself, e.g. keep > 0.5, so that its meaning is yours."
ONE_COLUMN = "expected (rows, 10): one column per component of this index."


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (np.ones((2, 10)), f"keep has dtype float64, {NOT_BOOL}"),
        (np.ones((2, 10), dtype=np.uint8), f"keep has dtype uint8, {NOT_BOOL}"),
        (torch.ones(2, 10), f"keep has dtype float32, {NOT_BOOL}"),
        ([[1] * 10], f"keep has dtype int64, {NOT_BOOL}"),
        (KEEP[:, :9], f"keep has shape (2, 9), {ONE_COLUMN}"),
        (np.ones((2, 11), dtype=bool), f"keep has shape (2, 11), {ONE_COLUMN}"),
        (torch.ones(2, 3, 10, dtype=torch.bool), f"keep has shape (2, 3, 10), {ONE_COLUMN}"),
        (KEEP[0], f"keep has shape (10,), {ONE_COLUMN} For one keep-vector pass keep[None]."),
    ],
)
def test_a_keep_of_the_wrong_kind(
    keep: Any, message: str, engine: ablate.Engine, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(ablate.KeepError) as caught:
        engine.outputs(keep, images, labels)
    assert str(caught.value) == message


@pytest.mark.parametrize("data_budget", [None, 1])
@pytest.mark.parametrize(("example", "label"), [(5, 3), (0, -1), (6, 1000)])
def test_a_label_outside_the_classes(
    example: int,
    label: int,
    data_budget: int | None,
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    images: Tensor,
    labels: Tensor,
) -> None:
    engine = ablate.Engine(conv_net, index, batch_size=3, data_budget=data_budget)
    labels[example] = label
    with pytest.raises(ablate.LabelError) as caught:
        engine.outputs(KEEP, images, labels)
    assert str(caught.value) == (
        f"The label of example {example} is {label}, expected a class from 0 to 2: the model has 3 classes. "
        "Map the labels to them."
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_output_that_is_not_finite_names_row_and_example(
    value: float, conv_net: nn.Module, index: ablate.ComponentIndex, images: Tensor, labels: Tensor
) -> None:
    class Poisoned(ablate.Output):
        name = "poisoned"
        row = 0

        def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
            self.row += 1  # one batch per row
            return torch.where(targets.bool() & (self.row > 2), value, 1.0)

    engine = ablate.Engine(conv_net, index, Poisoned())
    examples = ablate.Examples(images, labels, ids=list("abcdefg"))
    with pytest.raises(ablate.NonFiniteOutputError) as caught:
        engine.outputs(np.ones((4, 10), dtype=bool), examples)
    assert str(caught.value) == (
        f"Output of keep row 2 on example 1 (id 'b') is {value}, expected a finite number. Nothing of this block was "
        "stored. Check that input and the model for overflow, or ablate a smaller fraction."
    )
    assert (caught.value.row, caught.value.example) == (2, 1)


def test_a_nan_in_the_input_is_found(engine: ablate.Engine, images: Tensor, labels: Tensor) -> None:
    images[4, 0, 0, 0] = float("nan")
    with pytest.raises(ablate.NonFiniteOutputError, match=r"^Output of keep row 0 on example 4 \(id '4'\) is nan, "):
        engine.outputs(KEEP, images, labels)


class Wrapped(nn.Module):
    """A model that returns something else than logits."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x: Tensor) -> Any:
        logits = self.model(x)
        return {
            "(1, 3)": logits[:1],
            "(2, 3, 1)": logits[..., None],
        }[self.how]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("(1, 3)", "shape (2, ...): an entry per example"),
        ("(2, 3, 1)", "logits of shape (2, classes), or one logit each, (2, 1) or (2,)"),
    ],
)
def test_a_model_that_returns_no_logits(
    how: str, expected: str, conv_net: nn.Module, images: Tensor, labels: Tensor
) -> None:
    model = Wrapped(conv_net, how)
    index = ablate.ComponentIndex.from_model(model, ["conv_filter"])
    with pytest.raises(ablate.DataError) as caught:
        ablate.Engine(model, index, batch_size=3).outputs(KEEP, images, labels)
    assert str(caught.value) == (
        f"The model returned shape {how} for 2 examples, expected {expected} for output 'margin'. Choose another "
        "output, or wrap the model so that it returns its logits."
    )


def test_names_that_are_not_registered(conv_net: nn.Module, index: ablate.ComponentIndex) -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.Engine(conv_net, index, "losss")
    assert str(caught.value) == (
        "No output 'losss'. Did you mean 'loss'? Or pass an instance of a subclass of ablate.Output."
    )
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.Engine(conv_net, index, precision="float16")
    assert str(caught.value) == "No precision 'float16'. Did you mean 'bfloat16' or 'float64' or 'float32'?"


def test_a_batch_needs_an_example(conv_net: nn.Module, index: ablate.ComponentIndex) -> None:
    with pytest.raises(ablate.DataError) as caught:
        ablate.Engine(conv_net, index, batch_size=0)
    assert str(caught.value) == "batch_size is 0, expected at least 1."


def test_targets_that_are_missing_or_given_twice(engine: ablate.Engine, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(ablate.DataError) as caught:
        engine.outputs(KEEP, images)
    assert str(caught.value) == "Labels are missing: give targets, one integer per example, beside the inputs."
    with pytest.raises(ablate.DataError) as caught:
        engine.outputs(KEEP, ablate.Examples(images, labels), labels)
    assert str(caught.value) == "Targets were given twice: in the Examples and beside it. Give them once."


def test_a_model_on_two_devices_needs_a_device(conv_net: nn.Module, index: ablate.ComponentIndex) -> None:
    conv_net.get_submodule("head").to("meta")
    with pytest.raises(ablate.DataError) as caught:
        ablate.Engine(conv_net, index)
    assert str(caught.value) == ("The model is spread over cpu, meta. Move it to one device, or pass device=.")


class Keeping(nn.Module):
    """Keeps its last activations, as research code does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.kept = logits
        return logits


def test_a_model_that_cannot_be_copied(conv_net: nn.Module, images: Tensor, labels: Tensor) -> None:
    model = Keeping(conv_net)
    model(images)
    index = ablate.ComponentIndex.from_model(model, ["conv_filter"])
    with pytest.raises(
        ablate.DataError, match=r"^This Keeping cannot be copied, and the engine works on a copy: Only "
    ):
        ablate.Engine(model, index)
    with torch.no_grad():
        model(images)
    assert ablate.Engine(model, index).outputs(KEEP, images, labels).shape == (2, 7)


def test_repr_says_what_runs_where(engine: ablate.Engine) -> None:
    assert repr(engine) == "<Engine: ConvNet, 10 components, margin, float32 on cpu, 3 examples per forward>"


def test_a_scripted_model_is_refused(mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to give scripting up
        scripted = torch.jit.trace(mlp, torch.zeros(2, 4))  # type: ignore[no-untyped-call]
    with pytest.raises(ablate.GatingError) as caught:
        ablate.Engine(scripted, index)
    assert str(caught.value) == "This TopLevelTracedModule is scripted. The engine gates first and compiles after."
