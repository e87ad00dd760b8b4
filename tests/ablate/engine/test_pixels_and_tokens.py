"""Examples whose pixels are normalised where the model runs, and examples with a target per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import ablate

PIXELS = torch.randint(0, 256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = [0, 1, 2, 0, 1]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOKENS = torch.tensor([[5, 6, 7, 8], [1, 2, 0, 0]])
NEXT = torch.tensor([[6, 7, 8, 9], [2, 3, -100, -100]])


def _pixels(**values: Any) -> ablate.Examples:
    return ablate.Examples(PIXELS, LABELS, **{"normalize": (MEAN, STD), **values})


def test_pixels_stay_uint8_until_they_are_prepared() -> None:
    examples = _pixels()
    assert examples.normalize == (MEAN, STD)
    assert torch.equal(examples.inputs(), PIXELS)
    assert examples.bytes_per_example == 3 * 4 * 6
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    assert torch.equal(examples.prepared(PIXELS), (PIXELS.float() / 255 - mean) / std)
    assert torch.equal(examples.model_inputs(1, 3), examples.prepared(PIXELS[1:3]))
    assert torch.equal(PIXELS, _pixels().inputs()), "the pixels themselves are as they were"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_preparing_rounds_once(dtype: torch.dtype) -> None:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    exact = (PIXELS.double() / 255 - mean) / std
    found = _pixels().prepared(PIXELS, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_without_normalize_floats_are_cast_and_integers_are_not() -> None:
    examples = ablate.Examples(torch.ones(2, 3, dtype=torch.float64), [0, 1])
    assert examples.normalize is None
    assert examples.prepared(examples.inputs()).dtype == torch.float32
    assert examples.model_inputs(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert ablate.Examples(TOKENS, NEXT).model_inputs().dtype == torch.int64
    assert ablate.Examples(PIXELS, LABELS).model_inputs().dtype == torch.uint8


def test_a_dataset_of_pixels() -> None:
    examples = ablate.Examples(TensorDataset(PIXELS, torch.tensor(LABELS)), normalize=(MEAN, STD))
    assert not examples.in_memory
    assert torch.equal(examples.model_inputs(), _pixels().model_inputs())
    assert examples.hash == _pixels().hash


def test_take_and_chunks_keep_normalize() -> None:
    taken = _pixels().take([3, 1])
    assert taken.normalize == (MEAN, STD)
    assert torch.equal(taken.inputs(), PIXELS[[3, 1]])
    assert [part.dtype for _, part, _ in _pixels().chunks(2)] == [torch.uint8] * 3


def test_the_hash_includes_normalize() -> None:
    hashes = {_pixels().hash, _pixels(normalize=None).hash, _pixels(normalize=(MEAN, MEAN)).hash}
    assert len(hashes) == 3


def test_hashes_of_other_examples_are_as_they_were() -> None:
    examples = ablate.Examples(np.arange(6, dtype=np.float32).reshape(3, 2), [0, 1, 0], list("abc"))
    assert examples.hash == "95aa87da072a95d87b63ba0acfdeb651428774f21514551e0b8d3c41141bb32f"


@pytest.mark.parametrize(
    ("inputs", "normalize", "message"),
    [
        (PIXELS, 3, "normalize is 3, expected (mean, std) with one number per channel each."),
        (PIXELS, ("a", "b"), "normalize is ('a', 'b'), expected (mean, std) with one number per channel each."),
        (
            PIXELS,
            ((0.5,), (0.1, 0.2)),
            "normalize has mean (0.5,) and std (0.1, 0.2), expected one number per channel each, std above 0.",
        ),
        (
            PIXELS,
            ((0.5, 0.5, 0.5), (0.1, 0.2, 0)),
            "normalize has mean (0.5, 0.5, 0.5) and std (0.1, 0.2, 0.0), expected one number per channel each, std "
            "above 0.",
        ),
        (
            PIXELS,
            ((0.5,), (0.5,)),
            "Inputs are torch.uint8 of shape (5, 3, 4, 6), but normalize has 1 channels: expected uint8 of shape "
            "(examples, 1, height, width). Leave normalize out for inputs that are ready.",
        ),
        (
            PIXELS.float(),
            (MEAN, STD),
            "Inputs are torch.float32 of shape (5, 3, 4, 6), but normalize has 3 channels: expected uint8 of shape "
            "(examples, 3, height, width). Leave normalize out for inputs that are ready.",
        ),
    ],
)
def test_pixels_that_cannot_be_normalised(inputs: Tensor, normalize: Any, message: str) -> None:
    with pytest.raises(ablate.DataError) as caught:
        ablate.Examples(inputs, LABELS, normalize=normalize)
    assert str(caught.value) == message


def test_a_dataset_of_floats_with_normalize_is_named_when_read() -> None:
    examples = ablate.Examples(TensorDataset(PIXELS.float(), torch.tensor(LABELS)), normalize=(MEAN, STD))
    with pytest.raises(ablate.DataError, match=r"^Inputs are torch\.float32 of shape \(1, 3, 4, 6\), but normalize"):
        examples.input(0)


def test_examples_with_a_target_per_token() -> None:
    examples = ablate.Examples(TOKENS, NEXT)
    assert examples.per_token
    assert examples.groups == ("text", "text")
    assert torch.equal(examples.targets, NEXT)
    assert examples.columns()["label"].tolist() == [-1, -1]
    assert examples.columns()["label"].dtype == np.int64
    assert torch.equal(examples.take([1]).targets, NEXT[1:])
    assert [tuple(targets.shape) for _, _, targets in examples.chunks(1)] == [(1, 4), (1, 4)]
    assert not ablate.Examples(TOKENS, [0, 1]).per_token


def test_a_dataset_with_a_target_per_token() -> None:
    examples = ablate.Examples(TensorDataset(TOKENS, NEXT))
    assert torch.equal(examples.targets, NEXT)
    assert examples.hash == ablate.Examples(TOKENS, NEXT).hash
    assert ablate.Examples.of(list(zip(TOKENS.numpy(), NEXT.numpy(), strict=True))).hash == examples.hash


def test_the_hash_of_texts_depends_on_every_target() -> None:
    changed = NEXT.clone()
    changed[1, 1] = 4
    assert len({ablate.Examples(TOKENS, targets).hash for targets in (NEXT, changed, NEXT.clamp(min=-1))}) == 3


def test_targets_of_different_lengths_are_named() -> None:
    items = [(TOKENS[0], NEXT[0]), (TOKENS[1], NEXT[1, :2])]
    with pytest.raises(ablate.DataError) as caught:
        ablate.Examples.of(items)
    assert str(caught.value) == "Targets have different shapes, [(2,), (4,)]: pad them to one length with -100."
