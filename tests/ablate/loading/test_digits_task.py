"""The digits task: real images, a cue that misleads in two of four groups, and a network that can be re-trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ablate
from ablate.digits import (
    CUE_AGREES,
    CUES,
    MINORITY_GROUPS,
    SPLITS,
    ResidualCNN,
    digits_campaign_examples,
    digits_model,
    digits_split,
)

Untouched = Callable[..., AbstractContextManager[None]]
GROUPS = {"low-vertical", "low-horizontal", "high-vertical", "high-horizontal"}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_has_its_size_shape_and_groups(split: str) -> None:
    examples = digits_split(split)
    inputs = examples.inputs()
    assert inputs.shape == (SPLITS[split], 1, 16, 16)
    assert inputs.dtype == torch.float32
    assert -1 <= float(inputs.min()) < float(inputs.max()) <= 2
    assert set(examples.groups) == GROUPS
    assert set(examples.targets.tolist()) == {0, 1}
    for label, group in zip(examples.targets.tolist(), examples.groups, strict=True):
        assert group.startswith(("low-", "high-")[label])


@pytest.mark.parametrize("split", SPLITS)
def test_the_cue_agrees_with_the_label_as_often_as_stated(split: str) -> None:
    examples = digits_split(split)
    for label, name in enumerate(("low", "high")):
        members = [group for group in examples.groups if group.startswith(name)]
        agreeing = members.count(f"{name}-{CUES[label]}")
        assert abs(agreeing - CUE_AGREES[split] * len(members)) <= 0.5
    assert set(MINORITY_GROUPS) == {"low-horizontal", "high-vertical"}


def test_every_image_is_in_one_split() -> None:
    ids = [name for split in SPLITS for name in digits_split(split).ids]
    assert len(ids) == len(set(ids)) == sum(SPLITS.values()) == 1797


def test_the_stripes_can_be_seen() -> None:
    examples = digits_split("test")
    corner = examples.inputs()[:, 0, :, 0]  # the digits leave the first column empty
    varies = (corner.amax(dim=1) - corner.amin(dim=1)) > 0.25
    horizontal = torch.tensor([group.endswith("horizontal") for group in examples.groups])
    assert float((varies == horizontal).float().mean()) > 0.9


def test_splits_depend_on_the_seed_and_on_nothing_else(untouched: Untouched) -> None:
    with untouched():
        first = digits_split("validation", seed=0)
    torch.manual_seed(4)
    assert digits_split("validation", seed=0).hash == first.hash
    assert digits_split("validation", seed=1).hash != first.hash


def test_campaign_examples_are_the_first_of_each_group() -> None:
    examples = digits_campaign_examples(train_per_group=3, test_per_group=2)
    assert len(examples) == 4 * 5
    for split, count in (("train", 3), ("test", 2)):
        whole = digits_split(split)
        for group in GROUPS:
            first = [f"{split}/{name}" for name, g in zip(whole.ids, whole.groups, strict=True) if g == group][:count]
            mine = [
                name
                for name, g in zip(examples.ids, examples.groups, strict=True)
                if g == group and name.startswith(split)
            ]
            assert mine == first


def test_more_examples_than_there_are() -> None:
    with pytest.raises(ablate.LoadError) as caught:
        digits_campaign_examples(train_per_group=0, test_per_group=1000)
    members = digits_split("test").groups.count("high-horizontal")
    assert str(caught.value) == (f"Group 'high-horizontal' of the test split has {members} examples, not 1000.")
    with pytest.raises(ablate.LoadError) as caught:
        digits_campaign_examples(0, 0)
    assert str(caught.value) == "No digits asked for: give train_per_group or test_per_group (or a split)."


def test_an_unknown_split() -> None:
    with pytest.raises(ablate.LoadError) as caught:
        digits_split("tset")
    assert str(caught.value) == ("No split 'tset' of the digits task; splits are train, validation, test.")


def test_training_is_reproducible_and_leaves_no_trace(untouched: Untouched) -> None:
    with untouched():
        model = digits_model(seed=3, epochs=1)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(5)
    assert ablate.model_hash(digits_model(seed=3, epochs=1)) == ablate.model_hash(model)


def test_the_cache_is_written_once_and_read_again(tmp_path: Path, untouched: Untouched) -> None:
    cache = tmp_path / "deeper" / "model.safetensors"
    model = digits_model(seed=1, cache=cache, epochs=1)
    written = cache.stat().st_mtime_ns
    with untouched():
        again = digits_model(seed=1, cache=cache, epochs=1)
    assert ablate.model_hash(again) == ablate.model_hash(model)
    assert not again.training
    assert cache.stat().st_mtime_ns == written
    assert list(cache.parent.iterdir()) == [cache], "no draft is left"


def test_a_cache_of_another_training_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "model.safetensors"
    save_file(ResidualCNN().state_dict(), cache, metadata={"seed": "0", "epochs": "8"})
    with pytest.raises(ablate.LoadError) as caught:
        digits_model(seed=1, cache=cache, epochs=8)
    assert str(caught.value) == (
        f"{cache} holds a model trained with epochs 8, seed 0, expected epochs 8, seed 1. "
        "Name another cache, or delete it: the model is then trained again."
    )


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "model.safetensors"
    cache.write_bytes(b"no weights")
    with pytest.raises(ablate.LoadError, match=rf"^{cache} is damaged \(.*\)\. Delete it: the model is then trained"):
        digits_model(cache=cache)


def test_a_cache_of_another_network_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "model.safetensors"
    save_file(nn.Linear(2, 2).state_dict(), cache, metadata={"seed": "0", "epochs": "8"})
    with pytest.raises(
        ablate.LoadError, match=rf"^{cache} does not fit a ResidualCNN:\n  missing: stem\.weight \(nearest"
    ):
        digits_model(cache=cache, epochs=8)


@pytest.mark.slow
def test_the_network_is_good_on_average_and_bad_where_the_cue_misleads() -> None:
    model = digits_model(seed=0)
    examples = digits_split("test")
    with torch.no_grad():
        correct = model(examples.inputs()).argmax(dim=1) == examples.targets
    minority = torch.tensor([group in MINORITY_GROUPS for group in examples.groups])
    assert float(correct[~minority].float().mean()) > 0.95
    assert float(correct[minority].float().mean()) < float(correct[~minority].float().mean()) - 0.1
