"""What every output promises, asked of every registered one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

import ablate
from ablate.outputs import get_output, output_names


@pytest.fixture(params=output_names())
def output(request: pytest.FixtureRequest) -> ablate.Output:
    return get_output(request.param)


TOKENS = 4  # per example, for outputs of language models; the last of every third example is padding


@pytest.fixture(params=[torch.float32, torch.float64])
def logits(request: pytest.FixtureRequest, output: ablate.Output) -> Tensor:
    shape = (11, TOKENS, 5) if output.per_token else (11, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(request.param) * 3


@pytest.fixture
def targets(output: ablate.Output) -> Tensor:
    if not output.per_token:
        return torch.arange(11) % 5
    targets = torch.arange(11 * TOKENS).reshape(11, TOKENS) % 5
    targets[::3, -1] = -100
    return targets


def _next_class(targets: Tensor) -> Tensor:
    return torch.where(targets < 0, targets, (targets + 1) % 5)


def test_it_has_its_name_and_says_what_it_is(output: ablate.Output) -> None:
    assert get_output(output.name).name == output.name
    assert type(output).__doc__


def test_it_gives_one_finite_number_per_example(output: ablate.Output, logits: Tensor, targets: Tensor) -> None:
    values = output(logits, targets)
    assert values.shape == (11,)
    assert values.dtype == logits.dtype
    assert values.device == logits.device
    assert bool(values.isfinite().all())


def test_examples_are_independent(output: ablate.Output, logits: Tensor, targets: Tensor) -> None:
    values = output(logits, targets)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert torch.equal(output(logits[order], targets[order]), values[order])
    for i in range(11):
        torch.testing.assert_close(output(logits[i : i + 1], targets[i : i + 1])[0], values[i])


def test_classes_are_exchangeable(output: ablate.Output, logits: Tensor, targets: Tensor) -> None:
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    renamed = torch.where(targets < 0, targets, torch.argsort(order)[targets.clamp(min=0)])
    torch.testing.assert_close(output(logits[..., order], renamed), output(logits, targets))


def test_it_depends_on_the_target(output: ablate.Output, logits: Tensor, targets: Tensor) -> None:
    assert not torch.equal(output(logits, _next_class(targets)), output(logits, targets))


def test_it_is_a_pure_function(
    output: ablate.Output,
    logits: Tensor,
    targets: Tensor,
    untouched: Callable[..., AbstractContextManager[None]],
) -> None:
    with untouched(logits, targets):
        first = output(logits, targets)
    assert torch.equal(output(logits, targets), first)


def test_it_has_a_gradient(output: ablate.Output, logits: Tensor, targets: Tensor) -> None:
    exact = logits.double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: output(x, targets), (exact,))


@pytest.mark.parametrize("classes", [2, 1000])
def test_it_takes_any_number_of_classes(output: ablate.Output, classes: int) -> None:
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([0, 1, classes - 1])
    if output.per_token:
        logits, targets = logits[:, None], targets[:, None]
    assert output(logits, targets).shape == (3,)
