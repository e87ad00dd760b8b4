"""Data that is another one each time it is read is refused, however rarely; and so are numbers that a tensor loses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import ablate
from ablate.loading import ImageFolderData

COUNT = 40
X = torch.arange(COUNT * 4.0).reshape(COUNT, 4)
Change = Callable[[Tensor, int], Any]


class Data(Dataset[tuple[Tensor, int]]):
    """Inputs, changed in some way when they are read; counts the reads."""

    def __init__(self, change: Change, label: Callable[[int], int] = lambda i: i % 3) -> None:
        self.change, self.label, self.reads = change, label, 0

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        return self.change(X[i], i), self.label(i)


def _flip_if(coin: Callable[[], Any]) -> Change:
    return lambda x, i: x.flip(0) if coin() else x


def _second(draw: Callable[[], float]) -> bool:
    draw()
    return draw() < 0.5


GENERATOR = np.random.default_rng(0)
FLIPS: dict[str, tuple[Change, str]] = {
    "torch": (_flip_if(lambda: torch.rand(()) < 0.5), "it draws from the random numbers of torch"),
    "torch, in a batch": (_flip_if(lambda: torch.rand(1) < 0.5), "random numbers of torch"),
    "torch, rarely": (_flip_if(lambda: torch.rand(()) < 0.06), "random numbers of torch"),
    "torch, almost always": (_flip_if(lambda: torch.rand(()) < 0.94), "random numbers of torch"),
    "torch, at the second draw": (_flip_if(lambda: _second(lambda: float(torch.rand(())))), "numbers of torch"),
    "numpy": (_flip_if(lambda: np.random.random() < 0.5), "it draws from the random numbers of numpy"),
    "random": (_flip_if(lambda: random.random() < 0.5), "it draws from the random numbers of random"),  # noqa: S311 - no secret
    "torch and random": (
        _flip_if(lambda: torch.rand(()) + random.random() < 1),  # noqa: S311 - no secret
        "it draws from the random numbers of random and torch",
    ),
    "noise": (lambda x, i: x + 1e-6 * torch.randn(4), "random numbers of torch"),
    "a crop": (lambda x, i: x[: 2 + int(torch.randint(0, 3, ()))], "random numbers of torch"),
    "of the last example alone": (lambda x, i: x + (i == COUNT - 1) * torch.rand(()), "random numbers of torch"),
    "its own generator": (
        lambda x, i: x + GENERATOR.normal(),
        "it draws random numbers of its own, or what it reads from has changed",
    ),
}


@pytest.mark.parametrize("kind", FLIPS)
@pytest.mark.parametrize("given", ["items", "targets"])
def test_a_random_transform_is_refused(
    kind: str, given: str, untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    change, source = FLIPS[kind]
    with (
        untouched(),
        pytest.raises(ablate.DataError, match=r"^Example \d+ is another one each time it is read") as caught,
    ):
        ablate.Examples(Data(change), None if given == "items" else [0] * COUNT).inputs()
    assert source in str(caught.value)
    assert str(caught.value).endswith("or read it once into tensors and give (inputs, targets).")


def test_how_two_reads_differ_is_said() -> None:
    torch.manual_seed(0)
    with pytest.raises(ablate.DataError, match=r"^Example 0 is another one each time it is read \(by up to 3\):"):
        ablate.Examples(Data(FLIPS["torch"][0]))
    with pytest.raises(ablate.DataError, match=r"\(\(\d,\) torch\.float32, then \(\d,\) torch\.float32\)"):
        ablate.Examples(Data(FLIPS["a crop"][0]))
    with pytest.raises(ablate.DataError, match=r"\(its label is \d, then \d\)"):
        ablate.Examples(Data(lambda x, i: x, label=lambda i: int(torch.rand(()) < 0.5)))


def test_what_is_rarely_random_is_found_by_later_reads() -> None:
    turns: Iterator[int] = iter(range(10**6))
    examples = ablate.Examples(Data(lambda x, i: x + (next(turns) > 120)), [0] * COUNT)
    examples.inputs()
    examples.inputs(0, 20)
    examples.inputs()
    with pytest.raises(
        ablate.DataError, match=r"^Example 13 is another one each time it is read: it draws random numb"
    ):
        examples.inputs()


def test_the_example_is_named_by_its_id() -> None:
    with pytest.raises(ablate.DataError, match=r"^Example 0 \('cat/1\.png'\) is another"):
        ablate.Examples(Data(FLIPS["torch"][0]), ids=[f"cat/{i}.png" for i in range(1, COUNT + 1)])


def test_random_labels_beside_given_targets_do_not_matter() -> None:
    examples = ablate.Examples(Data(lambda x, i: x, label=lambda i: int(torch.rand(()) < 0.5)), [0] * COUNT)
    assert torch.equal(examples.inputs(), X)


def test_few_reads_are_added_and_only_once() -> None:
    data = Data(lambda x, i: x)
    examples = ablate.Examples(data, [0] * COUNT)
    assert data.reads == 0
    examples.inputs(0, 5)
    assert data.reads == 8 + 5
    assert torch.equal(examples.inputs(), X)
    assert data.reads == 8 + 5 + COUNT


def test_drawing_without_using_it_is_allowed() -> None:
    examples = ablate.Examples(Data(lambda x, i: (torch.rand(()), x)[1]))
    assert torch.equal(examples.inputs(), X)


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_examples(count: int) -> None:
    assert len(ablate.Examples([(X[i], 0) for i in range(count)]).inputs()) == count  # type: ignore[arg-type]
    with pytest.raises(ablate.DataError, match="is another one each time"):
        ablate.Examples(torch.utils.data.Subset(Data(FLIPS["torch"][0]), range(count)))


def test_a_random_transform_of_a_models_images(tmp_path: Path) -> None:
    from PIL import Image
    from torchvision import transforms

    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    training = transforms.Compose(
        [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )
    source = ImageFolderData(source="imagefolder", path=str(tmp_path))
    with pytest.raises(ablate.DataError, match=r"^Example 0 \('a/x\.png'\) is another one each time it is read"):
        ablate.load_data(source, training).inputs()


MASKED = np.ma.masked_equal(np.arange(6.0).reshape(3, 2), 4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (MASKED, "Inputs: 1 of 6 numbers are masked, and a model would see what the mask hides. Give numbers for them"),
        (torch.eye(3).to_sparse(), "Inputs: the tensor is sparse, expected a plain one. Give tensor.to_dense()."),
        (torch.zeros(3, 2, device="meta"), "Inputs: the tensor is on device meta, without data, expected a plain one."),
        (np.array([[1], [2, 3], [4]], dtype=object), "Inputs cannot become a tensor: can't convert np.ndarray of type"),
    ],
)
def test_numbers_that_a_tensor_loses_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ablate.DataError) as caught:
        ablate.Examples(inputs, [0, 1, 0])
    assert str(caught.value).startswith(message)


def test_masked_items_and_targets_are_refused() -> None:
    with pytest.raises(ablate.DataError, match=r"^The input of item 2: 1 of 2 numbers are masked"):
        ablate.Examples([(row, 0) for row in MASKED]).inputs()  # type: ignore[arg-type]
    with pytest.raises(ablate.DataError, match=r"^Targets: 1 of 3 numbers are masked"):
        ablate.Examples(X[:3], np.ma.masked_equal([0, 1, 2], 1))
    plain = np.ma.masked_array(np.arange(6.0).reshape(3, 2))
    assert torch.equal(ablate.Examples(plain, [0, 1, 0]).inputs(), torch.arange(6.0, dtype=torch.float64).reshape(3, 2))


def test_tables_and_sparse_matrices_of_other_packages() -> None:
    import pandas as pd
    from scipy.sparse import csr_array

    for inputs, message in (
        (pd.DataFrame(X.numpy()), r"Inputs are a DataFrame of pandas, expected .* Give its numbers: \.to_numpy\(\)\."),
        (csr_array(np.eye(3)), r"Inputs are a csr_array of scipy, expected .* Give its numbers: \.toarray\(\)\."),
    ):
        with pytest.raises(ablate.DataError, match=message):
            ablate.Examples(inputs, [0] * 3)  # type: ignore[arg-type]


def test_arrays_on_disk_are_read_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    assert torch.equal(ablate.Examples(np.load(tmp_path / "x.npy", mmap_mode="r"), [0] * COUNT).inputs(), X)
