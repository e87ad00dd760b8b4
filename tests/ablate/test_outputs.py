"""Outputs against their formulas in numpy; a user's own output, in five lines, wherever an output goes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
from ablate.outputs import get_output, output_names, predictions_correct

LOGITS = np.array([[2.0, -1.0, 0.5], [1.0, 1.0, 0.0], [-3.0, 4.0, 4.5], [0.0, 0.0, 0.0]])
TARGETS = np.array([0, 1, 1, 2])


def _measure(output: ablate.Output, dtype: torch.dtype = torch.float64) -> npt.NDArray[np.float64]:
    return output(torch.tensor(LOGITS, dtype=dtype), torch.tensor(TARGETS)).numpy()


def test_margin_by_hand() -> None:
    assert _measure(ablate.Margin()).tolist() == [1.5, 0.0, -0.5, 0.0]


def test_logit_by_hand() -> None:
    assert _measure(ablate.Logit()).tolist() == [2.0, 1.0, 4.0, 0.0]


def test_formulas_on_random_logits() -> None:
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((200, 7)) * 5
    targets = generator.integers(0, 7, 200)
    own = logits[np.arange(200), targets]
    others = np.where(np.eye(7, dtype=bool)[targets], -np.inf, logits).max(axis=1)
    tensors = torch.tensor(logits), torch.tensor(targets)
    np.testing.assert_allclose(ablate.Margin()(*tensors).numpy(), own - others, rtol=1e-12)
    np.testing.assert_array_equal(ablate.Logit()(*tensors).numpy(), own)
    shifted = logits - logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(200), targets]
    np.testing.assert_allclose(ablate.CrossEntropyLoss()(*tensors).numpy(), loss, rtol=1e-10)
    np.testing.assert_allclose(ablate.LogProbability()(*tensors).numpy(), -loss, rtol=1e-10)


def test_a_token_margin_by_hand() -> None:
    logits = torch.tensor([[[2.0, -1.0, 0.5], [1.0, 3.0, 0.0], [9.0, 9.0, 9.0]], [[0.0, 5.0, 1.0]] * 3])
    targets = torch.tensor([[0, 2, -100], [-100, -1, 1]])
    assert ablate.TokenMeanMargin()(logits, targets).tolist() == [(1.5 - 3.0) / 2, 4.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_margin_is_the_mean_of_margins(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 8, 11, generator=generator).round(decimals=1).to(dtype)  # rounded: there are ties
    targets = torch.randint(-2, 11, (5, 8), generator=generator)
    expected = []
    for rows, own in zip(logits.double(), targets, strict=True):
        expected.append(ablate.Margin()(rows[own >= 0], own[own >= 0]).mean())
    found = ablate.TokenMeanMargin()(logits, targets)
    assert found.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=tolerance, atol=tolerance)


def test_padding_has_no_gradient() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    ablate.TokenMeanMargin()(logits, torch.tensor([[0, 1, -100], [2, -100, -100]])).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert (logits.grad != 0).any(dim=2).tolist() == [[True, True, False], [True, False, False]]


def test_only_token_outputs_are_per_token() -> None:
    assert [name for name in output_names() if get_output(name).per_token] == ["token_margin"]


def test_a_positive_margin_is_a_correct_prediction_and_a_tie_is_not() -> None:
    margins = torch.tensor([0.5, 0.0, -0.1])
    assert predictions_correct(margins).tolist() == [True, False, False]
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(100, 5, generator=generator), torch.randint(5, (100,), generator=generator)
    assert torch.equal(predictions_correct(ablate.Margin()(logits, targets)), logits.argmax(dim=1) == targets)


def test_huge_logits_give_finite_losses() -> None:
    loss = ablate.CrossEntropyLoss()(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert loss.tolist() == [2e4]


def test_registered_names() -> None:
    assert output_names() == ("margin", "logit", "log_probability", "loss", "value", "token_margin")
    assert isinstance(get_output("loss"), ablate.CrossEntropyLoss)
    own = ablate.Margin()
    assert get_output(own) is own


def test_an_unknown_output_is_named_with_the_nearest() -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        get_output("margn")
    assert str(caught.value) == (
        "No output 'margn'. Did you mean 'margin'? Or pass an instance of a subclass of ablate.Output."
    )


def test_a_class_instead_of_an_instance_is_named(mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp)
    with pytest.raises(ablate.UnknownNameError, match=r"Margin.*Or pass an instance of a subclass of ablate\.Output\."):
        ablate.Engine(mlp, index, ablate.Margin)  # type: ignore[arg-type]


class Confidence(ablate.Output):
    name = "confidence"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.softmax(dim=1).gather(1, targets[:, None])[:, 0]


def test_an_output_of_ones_own_in_engine_and_campaign(mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp)
    inputs, targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    keep = ablate.KeepPlan(len(index), 6, 0.3, seed=2).take(0, 6)
    outputs = ablate.Engine(mlp, index, Confidence()).outputs(keep, inputs, targets)
    losses = ablate.Engine(mlp, index, "loss").outputs(keep, inputs, targets)
    torch.testing.assert_close(outputs, torch.exp(-losses))

    spec = ablate.CampaignSpec(
        model=mlp, data=(inputs, targets), rows=6, ablate_fraction=0.3, seed=2, output=Confidence()
    )
    store = ablate.run(spec, MemoryStore(), progress=False)
    np.testing.assert_array_equal(store.outputs[:], outputs.numpy())
    assert store.header["spec"]["output"] == "confidence"
    assert store.header["identity"]["output"].endswith("test_outputs.Confidence)")
    assert not spec.loadable


class Reduced(ablate.Output):
    name = "reduced"

    def __init__(self, shape: str) -> None:
        self.shape = shape

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.mean() if self.shape == "()" else logits[:, :1]


@pytest.mark.parametrize("shape", ["()", "(4, 1)"])
def test_an_output_that_is_not_one_number_per_example_is_refused(shape: str, mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp)
    engine = ablate.Engine(mlp, index, Reduced(shape))
    with pytest.raises(ablate.DataError) as caught:
        engine.outputs(np.ones((2, len(index)), dtype=bool), torch.ones(4, 4), [0, 1, 2, 0])
    assert str(caught.value) == (
        f"Output 'reduced' returned shape {shape} for 4 examples, expected (4,): one number per example."
    )
