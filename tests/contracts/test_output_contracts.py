"""What every output promises, asked of every registered one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

import ablate
from ablate.outputs import ClassOutput, get_output, output_names


@pytest.fixture(params=output_names())
def output(request: pytest.FixtureRequest) -> ablate.Output:
    return get_output(request.param)


@pytest.fixture
def classes(output: ablate.Output) -> int:
    """How many numbers the output takes of an example: logits of classes or words, or a value."""
    return 5 if output.needs_labels else 1


TOKENS = 4  # per example, for outputs of language models; the last of every third example is padding


@pytest.fixture(params=[torch.float32, torch.float64])
def logits(request: pytest.FixtureRequest, output: ablate.Output, classes: int) -> Tensor:
    shape = (11, TOKENS, classes) if output.per_token else (11, classes)
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
    order = torch.randperm(logits.shape[-1], generator=torch.Generator().manual_seed(2))
    if not output.needs_labels:
        return
    renamed = torch.where(targets < 0, targets, torch.argsort(order)[targets.clamp(min=0)])
    torch.testing.assert_close(output(logits[..., order], renamed), output(logits, targets))


def test_it_depends_on_the_target_exactly_where_it_needs_labels(
    output: ablate.Output, logits: Tensor, targets: Tensor
) -> None:
    same = torch.equal(output(logits, _next_class(targets)), output(logits, targets))
    assert same != output.needs_labels


def test_it_takes_what_it_says_it_takes(output: ablate.Output, logits: Tensor) -> None:
    assert output.expected(tuple(logits.shape)) is None
    assert output.expected((11, TOKENS, 5, 5)) is not None
    assert output.classes(tuple(logits.shape)) == (5 if output.needs_labels else None)


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_a_model_with_one_logit_is_one_of_two_classes(output: ablate.Output, shape: tuple[int, ...]) -> None:
    if not isinstance(output, ClassOutput) or output.name == "logit":
        return  # the signed logit has a test of its own
    one = torch.tensor([3.0, 3.0, -2.0, -2.0], dtype=torch.float64)
    two = torch.stack([torch.zeros(4, dtype=torch.float64), one], dim=1)
    targets = torch.tensor([1, 0, 1, 0])
    assert output.expected(shape) is None
    assert output.classes(shape) == 2
    torch.testing.assert_close(output(one.view(shape), targets), output(two, targets))


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


@pytest.mark.parametrize("many", [2, 1000])
def test_it_takes_any_number_of_classes(output: ablate.Output, many: int) -> None:
    logits = torch.randn(3, many if output.needs_labels else 1, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([0, 1, many - 1])
    if output.per_token:
        logits, targets = logits[:, None], targets[:, None]
    assert output(logits, targets).shape == (3,)
