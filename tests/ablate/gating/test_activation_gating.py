"""Gates per example: the arithmetic of one gate in every layout, and how the work is cut up changes no result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ablate
from ablate.gating.gates import apply_gate
from ablate.gating.layouts import ExampleLayout

# layout -> from (examples, positions, channels) to the tensor a layer sees, and the axis of its channels
ARRANGED: dict[str, tuple[Callable[[Tensor], Tensor], ExampleLayout, int]] = {
    "(B, C)": (lambda v: v[:, 0], ExampleLayout(0), -1),
    "(B, T, C)": (lambda v: v, ExampleLayout(0), -1),
    "(T, B, C)": (lambda v: v.transpose(0, 1), ExampleLayout(1), -1),
    "(B * T, C)": (lambda v: v.flatten(0, 1), ExampleLayout(0), -1),
    "(T * B, C)": (lambda v: v.transpose(0, 1).flatten(0, 1), ExampleLayout(0, blocked=False), -1),
    "(B, C, T)": (lambda v: v.transpose(1, 2), ExampleLayout(0), 1),
    "(B * 2, T / 2, C)": (lambda v: v.reshape(4, 2, 3), ExampleLayout(0), -1),
    "(2 * B, T / 2, C)": (
        lambda v: v.reshape(2, 2, 2, 3).transpose(0, 1).flatten(0, 1),
        ExampleLayout(0, blocked=False),
        -1,
    ),
    "(T, B * 1, C, 1)": (lambda v: v.transpose(0, 1)[..., None], ExampleLayout(1), 2),
}


@pytest.mark.parametrize("name", ARRANGED)
@pytest.mark.parametrize("with_baseline", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_gate_in_every_layout(name: str, with_baseline: bool, dtype: torch.dtype) -> None:
    arrange, layout, channels = ARRANGED[name]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).to(dtype)  # 2 divides 4: traps
    gate = torch.tensor([[1, 0, 0.5], [0, 1, -2]], dtype=dtype)
    baseline = torch.tensor([3, -1, 0.25], dtype=dtype) if with_baseline else None
    base = torch.zeros(3, dtype=dtype) if baseline is None else baseline
    expected = arrange(base + (values - base).double() * gate[:, None].double())
    got = apply_gate(arrange(values), gate, baseline, layout, channels)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=float(torch.finfo(dtype).eps) * 16)
    kept, closed = (arrange(part.expand_as(values).contiguous()) for part in (values, base))
    assert torch.equal(apply_gate(arrange(values), torch.ones_like(gate), baseline, layout, channels), kept)
    assert torch.equal(apply_gate(arrange(values), torch.zeros_like(gate), baseline, layout, channels), closed)


@pytest.fixture
def index(conv_net: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])


@pytest.fixture
def keep(index: ablate.ComponentIndex) -> npt.NDArray[np.bool_]:
    return ablate.KeepPlan(len(index), rows=11, ablate_fraction=0.2, seed=1).take(0, 11)


@pytest.fixture
def expected(
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    keep: npt.NDArray[np.bool_],
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    return ablate.reference_outputs(conv_net, index, keep, images, labels)


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 14, 20, 64, 128])
def test_stacking_keep_vectors_changes_rounding_only(
    batch_size: int,
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    keep: npt.NDArray[np.bool_],
    images: Tensor,
    labels: Tensor,
    expected: Tensor,
) -> None:
    """From 7 on several keep-vectors share a forward; 11 rows leave an odd rest."""
    engine = ablate.Engine(conv_net, index, mode="activation", batch_size=batch_size)
    _close(engine.outputs(keep, images, labels), expected)
    _close(engine.outputs(keep, TensorDataset(images, labels)), expected)


@pytest.mark.parametrize(
    ("mode", "batch_size"), [("weight", 2), ("weight", 5), ("weight", 64), ("activation", 2), ("activation", 7)]
)
def test_rows_per_call_change_no_bit(
    mode: str,
    batch_size: int,
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    keep: npt.NDArray[np.bool_],
    images: Tensor,
    labels: Tensor,
) -> None:
    """Blocks of a campaign may have any number of rows: with the forward batch fixed, each row's bits are the same.

    Not so where several keep-vectors share a forward: a matrix product rounds by position. Below.
    """
    engine = ablate.Engine(conv_net, index, mode=mode, batch_size=batch_size)
    together = engine.outputs(keep, images, labels)
    for rows in (1, 2, 3, 5):
        parts = [engine.outputs(keep[r : r + rows], images, labels) for r in range(0, len(keep), rows)]
        assert torch.equal(torch.cat(parts), together), rows
    assert torch.equal(engine.outputs(keep[::-1], images, labels), together.flip(0))
    fresh = ablate.Engine(conv_net, index, mode=mode, batch_size=batch_size)
    assert torch.equal(fresh.outputs(keep[4:9], images, labels), together[4:9])


def test_rows_per_call_change_rounding_only_where_rows_share_a_forward(
    conv_net: nn.Module, index: ablate.ComponentIndex, keep: npt.NDArray[np.bool_], images: Tensor, labels: Tensor
) -> None:
    engine = ablate.Engine(conv_net, index, mode="activation", batch_size=64, precision="float64")
    together = engine.outputs(keep, images, labels)
    for rows in (1, 2, 3, 5):
        parts = [engine.outputs(keep[r : r + rows], images, labels) for r in range(0, len(keep), rows)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_chunks_change_no_bit(
    mode: str,
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    keep: npt.NDArray[np.bool_],
    images: Tensor,
    labels: Tensor,
) -> None:
    engine = ablate.Engine(conv_net, index, mode=mode, batch_size=3)
    together = engine.outputs(keep, images, labels)
    streamed = ablate.Engine(conv_net, index, mode=mode, batch_size=3, data_budget=1)
    assert torch.equal(streamed.outputs(keep, images, labels), together)
    gates = torch.tensor(keep[:7], dtype=torch.float32)
    for got, whole in zip(
        streamed.gate_gradients(gates, TensorDataset(images, labels)),
        engine.gate_gradients(gates, images, labels),
        strict=True,
    ):
        assert torch.equal(got, whole)


def test_ways_of_asking_agree(
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    keep: npt.NDArray[np.bool_],
    images: Tensor,
    labels: Tensor,
    expected: Tensor,
) -> None:
    for mode in ("weight", "activation", "auto"):
        engine = ablate.Engine(conv_net, index, mode=mode, batch_size=4)
        gates = torch.tensor(keep, dtype=torch.float32)
        _close(engine.gated_outputs(gates, images, labels), expected)
        _close(engine.example_outputs(gates[:7], images, labels), expected[:7].diagonal())
        _close(engine.gate_gradients(gates[:7], images, labels)[0], expected[:7].diagonal())
        _close(engine.outputs(keep, images, labels), expected)


def test_no_rows(conv_net: nn.Module, index: ablate.ComponentIndex, images: Tensor, labels: Tensor) -> None:
    engine = ablate.Engine(conv_net, index, mode="activation")
    assert engine.outputs(np.ones((0, len(index)), dtype=bool), images, labels).shape == (0, 7)
    assert engine.gated_outputs(np.ones((0, len(index))), images, labels).shape == (0, 7)


BAD_GATES = [
    (
        np.ones((7, 18), dtype=bool),
        "gates have dtype bool, expected floating numbers: 1 = kept, 0 = ablated. For a keep array call outputs(), or "
        "pass keep.astype('float32').",
    ),
    (
        np.ones((7, 18), dtype=np.int64),
        "gates have dtype int64, expected floating numbers: 1 = kept, 0 = ablated. For a keep array call outputs(), or "
        "pass keep.astype('float32').",
    ),
    (
        np.ones((6, 18)),
        "gates have shape (6, 18), expected (7, 18): one column per component of this index, one row per example.",
    ),
    (
        np.ones((7, 17)),
        "gates have shape (7, 17), expected (7, 18): one column per component of this index, one row per example.",
    ),
    (
        np.ones(18),
        "gates have shape (18,), expected (7, 18): one column per component of this index, one row per example.",
    ),
    (
        np.where(np.arange(7 * 18).reshape(7, 18) == 20, np.nan, 1.0),
        "The gate of component 2 in row 1 is nan, expected a finite number.",
    ),
]


@pytest.mark.parametrize(("gates", "message"), BAD_GATES)
def test_gates_of_the_wrong_kind(
    gates: npt.NDArray[np.generic],
    message: str,
    conv_net: nn.Module,
    index: ablate.ComponentIndex,
    images: Tensor,
    labels: Tensor,
) -> None:
    engine = ablate.Engine(conv_net, index)
    for refuses in (engine.gate_gradients, engine.example_outputs):
        with pytest.raises(ablate.KeepError) as caught:
            refuses(gates, images, labels)
        assert str(caught.value) == message
    if "(7, 18)" not in message:
        with pytest.raises(ablate.KeepError) as caught:
            engine.gated_outputs(gates, images, labels)
        assert str(caught.value) == message


def test_a_gradient_that_is_not_finite_names_example_and_component(three_weights: nn.Module) -> None:
    class Rooted(ablate.Output):
        name = "rooted"

        def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
            return torch.sqrt(logits[:, 0] - 1)  # the derivative of the root at 0 is infinite

    index = ablate.ComponentIndex.from_model(three_weights, ["linear_neuron"], include=["hidden"])
    engine = ablate.Engine(three_weights, index, Rooted())
    gates = np.array([[1, 1, 1], [0, 0, 0]], dtype=np.float32)
    with pytest.raises(ablate.NonFiniteOutputError) as caught:
        engine.gate_gradients(gates, torch.ones(2, 1), [0, 0])
    assert str(caught.value).startswith("The gradient of component 0 on example 1 (id '1') is inf, expected a finite ")
    assert engine.example_outputs(gates, torch.ones(2, 1), [0, 0])[1] == 0
