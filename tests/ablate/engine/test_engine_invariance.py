"""Law 2: how the work is cut up (batches, rows, chunks, threads, kind of input) changes no result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import ablate
from ablate.engine.gated_model import Speed


@pytest.fixture
def index(conv_net: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])


@pytest.fixture
def keep(index: ablate.ComponentIndex) -> npt.NDArray[np.bool_]:
    return ablate.KeepPlan(len(index), rows=6, ablate_fraction=0.2, seed=1).take(0, 6)


@pytest.fixture
def engine(conv_net: nn.Module, index: ablate.ComponentIndex) -> ablate.Engine:
    return ablate.Engine(conv_net, index, batch_size=3)


@pytest.fixture
def expected(engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor) -> Tensor:
    return engine.outputs(keep, images, labels)


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


class Counted(Dataset[tuple[Tensor, int]]):
    """A data set that counts how often its items are read."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.reads = inputs, targets, 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        self.reads += 1
        return self.inputs[item], int(self.targets[item])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 128])
def test_batch_size_changes_rounding_only(
    batch_size: int,
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    keep: npt.NDArray[np.bool_],
    images: Tensor,
    labels: Tensor,
    expected: Tensor,
) -> None:
    outputs = ablate.Engine(conv_net, index, batch_size=batch_size).outputs(keep, images, labels)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_rows_alone_are_rows_together(
    engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor, expected: Tensor
) -> None:
    for row in range(len(keep)):
        assert torch.equal(engine.outputs(keep[row : row + 1], images, labels)[0], expected[row])


def test_rows_alone_are_rows_together_with_two_threads(
    two_threads: None, engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor
) -> None:
    together = engine.outputs(keep, images, labels)
    alone = [engine.outputs(keep[row : row + 1], images, labels)[0] for row in range(len(keep))]
    assert torch.equal(torch.stack(alone), together)


def test_the_order_of_rows_is_the_order_of_outputs(
    engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor, expected: Tensor
) -> None:
    assert torch.equal(engine.outputs(keep[::-1], images, labels), expected.flip(0))
    order = [3, 3, 0, 5]
    assert torch.equal(engine.outputs(keep[order], images, labels), expected[order])


def test_keep_may_be_an_array_a_read_only_view_a_tensor_or_a_list(
    engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor, expected: Tensor
) -> None:
    frozen = keep.copy()
    frozen.flags.writeable = False
    for form in (frozen, torch.tensor(keep), keep.tolist(), np.asfortranarray(keep)):
        assert torch.equal(engine.outputs(form, images, labels), expected)
    repeated = np.broadcast_to(keep[:1], (2, keep.shape[1]))
    assert torch.equal(engine.outputs(repeated, images, labels), expected[[0, 0]])


def test_no_rows_give_no_outputs(engine: ablate.Engine, index: ablate.ComponentIndex, images: Tensor) -> None:
    outputs = engine.outputs(np.ones((0, len(index)), dtype=bool), images, [0] * 7)
    assert outputs.shape == (0, 7)


@pytest.mark.parametrize(("fitting", "chunks"), [(0, 3), (1, 3), (3, 3), (6, 2), (7, 1), (1000, 1)])
@pytest.mark.parametrize("form", ["tensor", "dataset"])
def test_streaming_in_chunks_changes_no_bit(
    fitting: int,
    chunks: int,
    form: str,
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    keep: npt.NDArray[np.bool_],
    images: Tensor,
    labels: Tensor,
    expected: Tensor,
) -> None:
    engine = ablate.Engine(conv_net, index, batch_size=3, data_budget=fitting * images[0].nbytes)
    examples = ablate.Examples(images, labels) if form == "tensor" else ablate.Examples(TensorDataset(images, labels))
    assert len(list(engine._chunks(examples))) == chunks
    assert torch.equal(engine.outputs(keep, examples), expected)
    assert torch.equal(engine.outputs(keep, examples), expected), "a second call must not depend on the first"


def test_a_dataset_gives_the_bits_of_a_tensor(
    engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor, expected: Tensor
) -> None:
    assert torch.equal(engine.outputs(keep, TensorDataset(images, labels)), expected)
    assert torch.equal(engine.outputs(keep, images.numpy(), labels.numpy()), expected)
    assert torch.equal(engine.outputs(keep, (images, labels)), expected)
    assert torch.equal(engine.outputs(keep, ablate.Examples(images, labels)), expected)
    assert torch.equal(engine.outputs(keep, images, labels.tolist()), expected)


def test_the_layout_of_the_inputs_in_memory_changes_no_bit(
    engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor, expected: Tensor
) -> None:
    last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not last.is_contiguous()
    assert torch.equal(engine.outputs(keep, last, labels), expected)
    assert torch.equal(engine.outputs(keep, images.flip(0).numpy()[::-1], labels), expected)
    assert ablate.Examples(last, labels).hash == ablate.Examples(images, labels).hash


def test_examples_that_fit_are_read_once(
    engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor, expected: Tensor
) -> None:
    data = Counted(images, labels)
    examples = ablate.Examples(data)
    assert data.reads == 7 + 8, "once for the labels, and some again to see whether they are the same"
    for _ in range(3):
        assert torch.equal(engine.outputs(keep, examples), expected)
    assert data.reads == 7 + 8 + 1 + 7, "once for the size of an example, once for the inputs"


def test_other_examples_replace_the_resident_ones(
    engine: ablate.Engine, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor, expected: Tensor
) -> None:
    first, second = ablate.Examples(images, labels), ablate.Examples(images.flip(0), labels.flip(0))
    assert torch.equal(engine.outputs(keep, first), expected)
    torch.testing.assert_close(engine.outputs(keep, second), expected.flip(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(engine.outputs(keep, first), expected)


def test_the_engines_own_copy_is_whole_again_afterwards(
    conv_net: nn.Module, index: ablate.ComponentIndex, images: Tensor, labels: Tensor
) -> None:
    engine = ablate.Engine(conv_net, index, speed=Speed(fold=False))
    engine.outputs(np.zeros((1, len(index)), dtype=bool), images, labels)
    assert engine._gated_model is not None
    assert ablate.model_hash(engine._gated_model.model) == ablate.model_hash(conv_net)


def test_two_engines_of_one_model_do_not_meet(
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    engine: ablate.Engine,
    keep: npt.NDArray[np.bool_],
    images: Tensor,
    labels: Tensor,
    expected: Tensor,
) -> None:
    other = ablate.Engine(conv_net, index, "logit", batch_size=3)
    logits = other.outputs(keep, images, labels)
    assert torch.equal(engine.outputs(keep, images, labels), expected)
    with torch.no_grad():
        conv_net.get_parameter("head.weight").zero_()  # the engines have their own copies
    assert torch.equal(other.outputs(keep, images, labels), logits)
    assert torch.equal(engine.outputs(keep, images, labels), expected)
