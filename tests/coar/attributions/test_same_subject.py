"""An engine beside attributions is of the same weights, code, output and ablation, or is refused key by key."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ablate
import coar
from coar.editing.coar_edit.ranking import rank_components
from coar.editing.coar_edit.size import size_for_target
from coar.editing.log import EditLog

Judge = Callable[[coar.Attributions, ablate.Engine, ablate.Examples], Any]


def _net(activation: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def examples() -> ablate.Examples:
    return ablate.Examples(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), [0, 1, 2, 0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def fitted(examples: ablate.Examples) -> coar.Attributions:
    model = _net(nn.ReLU())
    return coar.fit(ablate.run(ablate.CampaignSpec(model=model, data=examples, rows=40, ablate_fraction=0.2),
                               "memory://same-subject", progress=False))  # fmt: skip


def _evaluate(attributions: coar.Attributions, engine: ablate.Engine, examples: ablate.Examples) -> Any:
    return coar.evaluate(attributions, engine, examples, rows=4)


def _sweep(attributions: coar.Attributions, engine: ablate.Engine, examples: ablate.Examples) -> Any:
    return coar.sweep_edit_size(rank_components(attributions, [0, 1], [2, 3]), engine, examples, [0, 1])


def _size(attributions: coar.Attributions, engine: ablate.Engine, examples: ablate.Examples) -> Any:
    ranking = rank_components(attributions, [0, 1], [2, 3])
    try:
        return size_for_target(ranking, engine, examples, 1, EditLog(False))
    except coar.EditError as error:
        if "still not as they should be" not in str(error):
            raise
        return str(error)


JUDGES = (_evaluate, _sweep, _size)


def _engine(model: nn.Module, **options: Any) -> ablate.Engine:
    return ablate.Engine(model, ablate.ComponentIndex.from_model(model), **options)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    ("model", "options", "line"),
    [
        (_net(nn.ReLU(), seed=1), {}, "  model: "),
        (_net(nn.ReLU()), {"ablation": ablate.ScaleAblation(0.5)}, "  ablation: zero -> scale 0.5"),
        (_net(nn.GELU()), {}, "  code.types.1: torch.nn.modules.activation.ReLU -> torch.nn.modules.activation.GELU"),
    ],
    ids=["weights", "ablation", "code"],
)
def test_another_engine_is_refused_key_by_key(
    fitted: coar.Attributions, examples: ablate.Examples, judge: Judge, model: nn.Module, options: Any, line: str
) -> None:
    with pytest.raises(coar.CoarError) as refused:
        judge(fitted, _engine(model, **options), examples)
    assert f"\n{line}" in str(refused.value)
    assert "sample_outputs" not in str(refused.value) or "code." in line


@pytest.mark.parametrize("judge", JUDGES)
def test_the_same_engine_judges_also_in_another_precision_and_elsewhere(
    fitted: coar.Attributions, examples: ablate.Examples, judge: Judge
) -> None:
    for options in ({}, {"precision": "float64"}, {"precision": "bfloat16"}, {"batch_size": 3}):
        judge(fitted, _engine(_net(nn.ReLU()), **options), examples)


def test_a_sweep_on_other_examples_compares_the_code(fitted: coar.Attributions, examples: ablate.Examples) -> None:
    other = ablate.Examples(examples.inputs() + 1, examples.targets)
    _sweep(fitted, _engine(_net(nn.ReLU())), other)
    with pytest.raises(coar.EditError, match=r"code\.calls\.1: relu -> gelu"):
        _sweep(fitted, _engine(_net(nn.GELU())), other)


class Named(ablate.Output):
    def __init__(self, name: str, factor: float = 1.0) -> None:
        self.name, self.factor = name, factor

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.factor * logits.gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("name", ["two words", "a (b) c", "logit"])
def test_an_output_of_any_name_is_itself_and_no_other(examples: ablate.Examples, name: str) -> None:
    model = _net(nn.ReLU())
    found = coar.estimate(model, examples, output=Named(name), passes=2, quality_rows=0, ablate_fraction=0.2)
    _evaluate(found, _engine(model, output=Named(name)), examples)
    with pytest.raises(coar.QueryError, match=r"output_settings\.factor: 1\.0 -> 1000\.0"):
        _evaluate(found, _engine(model, output=Named(name, 1000.0)), examples)
    with pytest.raises(coar.QueryError, match="The engine's output is two"):
        _evaluate(found, _engine(model, output=Named("two")), examples)


def test_attributions_of_before_say_less_and_are_compared_in_that(
    fitted: coar.Attributions, examples: ablate.Examples
) -> None:
    old = copy.copy(fitted)
    of = {key: fitted.header["identity"]["of"][key] for key in ("model", "data", "index", "plan", "output")}
    old.header = {**fitted.header, "identity": {**fitted.header["identity"], "of": of}}
    _evaluate(old, _engine(_net(nn.ReLU())), examples)
    with pytest.raises(coar.QueryError, match="\n  model: "):
        _evaluate(old, _engine(_net(nn.ReLU(), seed=1)), examples)


def test_an_editor_refuses_attributions_of_other_code(fitted: coar.Attributions, examples: ablate.Examples) -> None:
    editor = coar.get_editor("coar", k=1, attributions=fitted, target=(0, 1), reference=(2, 3))
    first = examples.take([0, 1])
    request = coar.Request(first.inputs(), first.targets, reference=examples.take([2, 3]))
    editor.edit(_net(nn.ReLU()), request)
    with pytest.raises(coar.EditMismatchError, match=r"code\.types\.1: .*ReLU -> .*GELU"):
        editor.edit(_net(nn.GELU()), request)
