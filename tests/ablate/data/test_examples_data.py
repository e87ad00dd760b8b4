"""Examples: what may be given, what is refused, and what their hash depends on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

import ablate

INPUTS = torch.arange(24, dtype=torch.float32).reshape(4, 2, 3)
TARGETS = [2, 0, 1, 2]


class Listed(Dataset[Any]):
    """A data set of these items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> Any:
        return self.items[item]


def test_defaults() -> None:
    examples = ablate.Examples(INPUTS, TARGETS)
    assert len(examples) == 4
    assert examples.ids == ("0", "1", "2", "3")
    assert examples.groups == ("2", "0", "1", "2")
    assert examples.targets.dtype == torch.int64
    assert examples.targets.tolist() == TARGETS
    assert examples.in_memory
    assert examples.bytes_per_example == 24
    assert torch.equal(examples.input(2), INPUTS[2])
    assert torch.equal(examples.inputs(1, 3), INPUTS[1:3])
    assert repr(examples) == f"<Examples: 4 in 3 groups, {examples.hash[:12]}>"


@pytest.mark.parametrize(
    "targets",
    [
        TARGETS,
        tuple(TARGETS),
        torch.tensor(TARGETS),
        torch.tensor(TARGETS, dtype=torch.uint8),
        np.array(TARGETS),
        np.array(TARGETS, dtype=np.uint16),
        np.array([2, 9, 0, 9, 1, 9, 2])[::2],
        np.array(TARGETS[::-1])[::-1],
    ],
)
def test_targets_may_be_any_integers(targets: Any) -> None:
    examples = ablate.Examples(INPUTS, targets)
    assert examples.targets.tolist() == TARGETS
    assert examples.hash == ablate.Examples(INPUTS, TARGETS).hash


@pytest.mark.parametrize("form", ["array", "reversed", "read-only", "memory-mapped", "dataset", "list of pairs"])
def test_inputs_may_be_arrays_and_datasets(form: str, tmp_path: Path) -> None:
    array = INPUTS.numpy().copy()
    inputs: Any = {
        "array": array,
        "reversed": array[::-1].copy()[::-1],
        "read-only": np.broadcast_to(array, array.shape),
        "dataset": TensorDataset(INPUTS, torch.tensor(TARGETS)),
        "list of pairs": list(zip(array, TARGETS, strict=True)),
    }.get(form)
    if form == "memory-mapped":
        np.save(tmp_path / "inputs.npy", array)
        inputs = np.load(tmp_path / "inputs.npy", mmap_mode="r")
    plain = ablate.Examples(INPUTS, TARGETS)
    examples = ablate.Examples(inputs, TARGETS)
    assert torch.equal(examples.inputs(), INPUTS)
    assert examples.hash == plain.hash
    if form in ("dataset", "list of pairs"):
        assert ablate.Examples(inputs).targets.tolist() == TARGETS


def test_of_takes_every_form() -> None:
    plain = ablate.Examples(INPUTS, TARGETS)
    assert ablate.Examples.of(plain) is plain
    assert ablate.Examples.of((INPUTS, TARGETS)).hash == plain.hash
    assert ablate.Examples.of(INPUTS, TARGETS).hash == plain.hash
    assert ablate.Examples.of(TensorDataset(INPUTS, torch.tensor(TARGETS))).hash == plain.hash
    assert ablate.Examples.of((INPUTS, TARGETS, list("abcd"), list("xyxy"))).groups == ("x", "y", "x", "y")


def test_the_hash_depends_on_inputs_targets_ids_groups_and_order() -> None:
    changed = INPUTS.clone()
    changed[3, 1, 2] = torch.nextafter(changed[3, 1, 2], torch.tensor(1e9))
    hashes = {
        ablate.Examples(INPUTS, TARGETS).hash,
        ablate.Examples(changed, TARGETS).hash,
        ablate.Examples(INPUTS.double(), TARGETS).hash,
        ablate.Examples(INPUTS.reshape(4, 6), TARGETS).hash,
        ablate.Examples(INPUTS, [2, 0, 1, 1]).hash,
        ablate.Examples(INPUTS, TARGETS, list("abcd")).hash,
        ablate.Examples(INPUTS, TARGETS, None, list("abcd")).hash,
        ablate.Examples(INPUTS, [2, 0, 1, 1], None, list("abcd")).hash,
        ablate.Examples(INPUTS.flip(0), TARGETS[::-1]).hash,
    }
    assert len(hashes) == 9


def test_take_keeps_ids_and_groups() -> None:
    examples = ablate.Examples(INPUTS, TARGETS, list("abcd"), list("xyxz")).take([3, 1])
    assert torch.equal(examples.inputs(), INPUTS[[3, 1]])
    assert (examples.ids, examples.groups, examples.targets.tolist()) == (("d", "b"), ("z", "y"), [2, 0])


def test_columns_are_what_stores_keep() -> None:
    columns = ablate.Examples(INPUTS, TARGETS, list("abcd")).columns()
    assert {name: values.tolist() for name, values in columns.items()} == {
        "id": list("abcd"),
        "label": TARGETS,
        "group": ["2", "0", "1", "2"],
    }


def test_chunks_cover_everything_in_order() -> None:
    chunks = list(ablate.Examples(INPUTS, TARGETS).chunks(3))
    assert [(first, inputs.shape[0], targets.tolist()) for first, inputs, targets in chunks] == [
        (0, 3, [2, 0, 1]),
        (3, 1, [2]),
    ]
    assert torch.equal(torch.cat([inputs for _, inputs, _ in chunks]), INPUTS)


class Noisy(Dataset[tuple[Tensor, int]]):
    """A data set that draws random numbers, as data augmentation does."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        np.random.rand(3)
        return torch.rand(2, 3), item % 2


class Drawing(Noisy):
    """Draws random numbers whenever it is read, and does nothing with them."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(i)
        return torch.zeros_like(x), y


def test_reading_a_dataset_leaves_random_state_alone(untouched: Callable[..., AbstractContextManager[None]]) -> None:
    with untouched():
        examples = ablate.Examples(Drawing())
        examples.inputs()
        assert examples.hash
        assert examples.bytes_per_example == 24
        list(examples.chunks(2))
        examples.take([1, 2])


NOT_TENSOR = "Give numbers; images need a transform."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INPUTS,), "Labels are missing: give targets, one integer per example, beside the inputs."),
        ((3, [1]), "Inputs are a int, expected a tensor, an array or a map-style Dataset."),
        (
            (iter([]), [1]),
            "Inputs are a list_iterator, expected a tensor, an array or a map-style Dataset.",
        ),
        (
            (INPUTS, [0.5, 1, 2, 0]),
            "Targets are torch.float32 of shape (4,) with fractions, expected whole numbers of shape (examples,): the "
            "class of each. Of a model that predicts a number leave them out and take output='value'; for a loss "
            "against true values pass an Output of your own that holds them.",
        ),
        (
            (INPUTS, np.array([True, False, True, True])),
            "Targets are torch.bool of shape (4,), expected whole numbers of shape (examples,). If False is class 0 "
            "and True class 1, give targets.long().",
        ),
        (
            (INPUTS, [[0, 1, 2]] * 4),
            "Targets are torch.int64 of shape (4, 3), expected whole numbers of shape (examples,). A target per token "
            "needs inputs that are tokens, integers of shape (examples, 3); these are float32 of shape (examples, 2, "
            "3). Give one class per example.",
        ),
        (
            (torch.zeros(2, 3, dtype=torch.int64), [[1, 2, -100], [-100, -100, -1]]),
            "Example 1 has no token to score: all its targets are negative. Leave it out.",
        ),
        ((INPUTS, list("abcd")), f"Targets cannot become a tensor: too many dimensions 'str'. {NOT_TENSOR}"),
        (
            (INPUTS, [0, 1, 2]),
            "Examples do not line up: {'inputs': 4, 'targets': 3, 'ids': 3, 'groups': 3}. "
            "Expected one of each per example, at least one example.",
        ),
        (
            (INPUTS, TARGETS, ["a"], ["x", "y"]),
            "Examples do not line up: {'inputs': 4, 'targets': 4, 'ids': 1, 'groups': 2}. "
            "Expected one of each per example, at least one example.",
        ),
        (
            (INPUTS[:0], torch.zeros(0, dtype=torch.int64)),
            "Examples do not line up: {'inputs': 0, 'targets': 0, 'ids': 0, 'groups': 0}. "
            "Expected one of each per example, at least one example.",
        ),
        (
            (INPUTS, TARGETS, ["a", "b", "a", "b"]),
            "Ids must be distinct: 2 of 4 repeat another, the first is 'a'.",
        ),
        (
            (INPUTS, TARGETS, [1, "1", 2, 3]),
            "Ids must be distinct: 1 of 4 repeat another, the first is '1'.",
        ),
        (
            (Listed(INPUTS[0], INPUTS[1]),),
            "Item 0 of the Listed is a Tensor, expected (input, target).",
        ),
        ((Listed({"x": 1}),), "Item 0 of the Listed is a dict, expected (input, target)."),
        (
            (Listed((INPUTS[0], 1), (INPUTS[1], 0.5)),),
            "The label of item 1 is 0.5, expected an integer: the class.",
        ),
        ((Listed((INPUTS[0], "cat")),), "The label of item 0 is 'cat', expected an integer: the class."),
        ((Listed((INPUTS[0],)),), "The label of item 0 is nothing, expected an integer: the class."),
    ],
)
def test_examples_that_cannot_be(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ablate.DataError) as caught:
        ablate.Examples(*arguments)
    assert str(caught.value) == message


def test_a_dataset_without_length() -> None:
    class Endless(Dataset[Any]):
        def __getitem__(self, item: int) -> Any:
            return INPUTS[0], 0

    with pytest.raises(ablate.DataError) as caught:
        ablate.Examples(Endless())
    assert str(caught.value) == "A Endless has no length: give a map-style Dataset (with __len__)."


def test_inputs_of_different_shapes_are_named_when_read() -> None:
    examples = ablate.Examples(Listed((torch.zeros(2, 3), 0), (torch.zeros(2, 4), 1)))
    with pytest.raises(ablate.DataError) as caught:
        examples.inputs()
    assert str(caught.value) == (
        "Inputs have different shapes, [(2, 3), (2, 4)]: give the data set a transform that resizes."
    )


def test_images_without_a_transform_are_named_when_read() -> None:
    from PIL import Image

    images = Listed((torch.zeros(2), 0), (Image.new("RGB", (2, 2)), 1))
    with pytest.raises(ablate.DataError, match=r"^The input of item 1 cannot become a tensor: .* Give numbers; images"):
        ablate.Examples(images)
    with pytest.raises(ablate.DataError, match=r"^The input of item 1 cannot become a tensor: .* Give numbers; images"):
        ablate.Examples(images, [0, 1]).inputs()
