"""A store goes on with the campaign it was made from and no other; what differs is named, old -> new."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ablate
from stores import CampaignStore, StoreMismatchError, StoreNotFoundError

SmallSpec = Callable[..., ablate.CampaignSpec]
Files = Callable[[Path], dict[str, bytes]]
Unfinish = Callable[..., None]

ADVICE = "Give the original back, or name another store for the new campaign."
ADVICE_VERSIONS = (
    "Other versions may round differently. Install the stored ones, or go on all the same with accept_versions=True "
    "(`--accept-versions`)."
)


def _refusal(store: CampaignStore, spec: ablate.CampaignSpec, **options: Any) -> str:
    with pytest.raises(StoreMismatchError, match="was made from something else") as raised:
        ablate.run(spec, store.location, progress=False, **options)
    return str(raised.value)


def _text(store: CampaignStore, *lines: str, advice: str = ADVICE) -> str:
    listing = "\n".join(f"  {line}" for line in lines)
    return f"Campaign {store.where} was made from something else. What differs (stored -> now):\n{listing}\n{advice}"


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"seed": 6}, ["plan.seed: 5 -> 6"]),
        ({"rows": 41}, ["plan.rows: 40 -> 41"]),
        ({"rows": 3}, ["block_rows: 7 -> 3", "plan.rows: 40 -> 3"]),
        ({"ablate_fraction": 0.31}, ["plan.ablate_fraction: 0.3 -> 0.31"]),
        ({"block_rows": 8}, ["block_rows: 7 -> 8"]),
        ({"block_rows": 64}, ["block_rows: 7 -> 40"]),
        ({"precision": "float64"}, ["precision: float32 -> float64"]),
        ({"output": "logit"}, ["output: margin (ablate.outputs.Margin) -> logit (ablate.outputs.Logit)"]),
        (
            {"seed": 6, "output": "loss", "ablate_fraction": 0.5},
            [
                "output: margin (ablate.outputs.Margin) -> loss (ablate.outputs.CrossEntropyLoss)",
                "plan.ablate_fraction: 0.3 -> 0.5",
                "plan.seed: 5 -> 6",
            ],
        ),
    ],
)
def test_every_setting_that_differs_is_named(
    finished: CampaignStore, small_spec: SmallSpec, changes: dict[str, Any], lines: list[str]
) -> None:
    assert _refusal(finished, small_spec(**changes)) == _text(finished, *lines)


@pytest.mark.parametrize("components", [{"kinds": ["linear_neuron"]}, {"exclude": ["0"]}, {"include": ["0"]}])
def test_another_index_is_named(
    finished: CampaignStore, small_spec: SmallSpec, components: dict[str, list[str]]
) -> None:
    spec = small_spec(components=components)
    index = spec.make_index(spec.load()[0])

    assert _refusal(finished, spec) == _text(
        finished,
        f"index: {finished.header['identity']['index']} -> {index.hash}",
        f"plan.components: 10 -> {len(index)}",
    )


def test_another_model_is_named(finished: CampaignStore, small_spec: SmallSpec) -> None:
    spec = small_spec()
    model, _ = spec.load()
    with torch.no_grad():
        model.get_parameter("5.bias")[1] += 1e-6  # one bit of one weight that is no component's
    was = finished.header["identity"]["model"]

    assert _refusal(finished, spec) == _text(finished, f"model: {was} -> {ablate.model_hash(model)}")


def _other_input(data: ablate.Examples) -> ablate.Examples:
    inputs = data.inputs().clone()
    inputs[8, 2, 7, 7] += 1e-6
    return ablate.Examples(inputs, data.targets, data.ids, data.groups)


def _other_label(data: ablate.Examples) -> ablate.Examples:
    return ablate.Examples(data.inputs(), [*data.targets.tolist()[:-1], 0], data.ids, data.groups)


def _other_id(data: ablate.Examples) -> ablate.Examples:
    return ablate.Examples(data.inputs(), data.targets, [*data.ids[:-1], "dog-8"], data.groups)


def _other_group(data: ablate.Examples) -> ablate.Examples:
    return ablate.Examples(data.inputs(), data.targets, data.ids, [*data.groups[:-1], "dogs"])


def _other_order(data: ablate.Examples) -> ablate.Examples:
    return data.take([8, *range(8)])


def _fewer(data: ablate.Examples) -> ablate.Examples:
    return data.take(range(8))


@pytest.mark.parametrize("change", [_other_input, _other_label, _other_id, _other_group, _other_order, _fewer])
def test_other_data_are_named(
    finished: CampaignStore, small_spec: SmallSpec, change: Callable[[ablate.Examples], ablate.Examples]
) -> None:
    data = change(small_spec().load()[1])
    was = finished.header["identity"]["data"]

    said, expected = _refusal(finished, small_spec(data=data)), _text(finished, f"data: {was} -> {data.hash}")
    before, advice, after = expected.partition("Give the original back")
    assert said.startswith(before)  # and then, which example or label is another one, where that can be told
    assert said.endswith(advice + after)


def test_what_changes_no_number_is_not_refused(
    finished: CampaignStore, small_spec: SmallSpec, unfinish: Unfinish, undisturbed: Path
) -> None:
    unfinish(Path(str(finished.location)), [2])

    store = ablate.run(small_spec(batch_size=4), finished.location, progress=False)

    store.require_complete()
    assert [environment["batch_size"] for environment in store.environments] == [128, 4]
    np.testing.assert_allclose(store.outputs[:], CampaignStore.open(undisturbed).outputs[:], rtol=1e-5, atol=1e-6)


def test_a_refusal_changes_nothing(
    finished: CampaignStore, small_spec: SmallSpec, files: Files, unfinish: Unfinish
) -> None:
    path = Path(str(finished.location))
    unfinish(path, [0, 5])
    before = files(path)

    _refusal(finished, small_spec(seed=6))

    assert files(path) == before


def test_a_campaign_of_other_hands_is_not_gone_on_with(tmp_path: Path, small_spec: SmallSpec) -> None:
    columns = {"id": np.arange(10)}
    store = CampaignStore.create(tmp_path / "a", header={}, components=columns, examples=columns, rows=40, block_rows=7)

    text = _refusal(store, small_spec())

    assert "\n  block_rows: nothing -> 7\n" in text
    assert "\n  plan.seed: nothing -> 5\n" in text


def _other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "9.9", "zarr": "8.8"}
    monkeypatch.setattr("ablate.campaign.identity.version", lambda package: versions.get(package) or version(package))


def test_other_versions_are_named_and_can_be_accepted(
    finished: CampaignStore,
    small_spec: SmallSpec,
    monkeypatch: pytest.MonkeyPatch,
    unfinish: Unfinish,
    files: Files,
    undisturbed: Path,
) -> None:
    path = Path(str(finished.location))
    unfinish(path, [1, 3])
    stored = finished.header["identity"]["versions"]
    lines = [f"versions.torch: {stored['torch']} -> 9.9", f"versions.zarr: {stored['zarr']} -> 8.8"]
    _other_versions(monkeypatch)

    assert _refusal(finished, small_spec()) == _text(finished, *lines, advice=ADVICE_VERSIONS)
    assert _refusal(finished, small_spec(seed=6)) == _text(finished, "plan.seed: 5 -> 6", *lines)
    assert _refusal(finished, small_spec(seed=6), accept_versions=True) == _text(finished, "plan.seed: 5 -> 6")

    store = ablate.run(small_spec(), path, progress=False, accept_versions=True)

    store.require_complete()
    assert store.header["identity"]["versions"] == stored
    assert [environment["versions"]["torch"] for environment in store.environments] == [
        stored["torch"],
        "9.9",
    ]
    written, whole = files(path), files(undisturbed)
    assert written == whole  # who wrote it is book-keeping
    assert CampaignStore.open(path).header == store.header


def test_opening_a_store_that_is_not_there_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="nothing is there"):
        CampaignStore.open(tmp_path / "a", mode="r+")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_store_is_returned_also_by_other_versions(
    finished: CampaignStore, small_spec: SmallSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = finished.environments
    _other_versions(monkeypatch)
    store = ablate.run(small_spec(), finished.location, progress=False)
    assert store.progress.complete
    assert store.environments == environments  # nothing was written
