"""What may change between start and resume, for campaigns and for gradient estimates alike: old -> new, or no word."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from zarr.storage import LocalStore

import ablate
import coar
import stores
from stores import AttributionStore, CampaignStore, StoreMismatchError

pytestmark = pytest.mark.faults

SmallSpec = Callable[..., ablate.CampaignSpec]
KINDS = ("campaign", "estimate")


def _run(kind: str, spec: ablate.CampaignSpec, path: Path, **options: Any) -> CampaignStore | AttributionStore:
    if kind == "campaign":
        return ablate.run(spec, path, progress=False, **options)
    return coar.estimate(spec, **{"passes": 4, "quality_rows": 10, "block_examples": 4, **options}, store=path).store


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, small_spec: SmallSpec) -> dict[str, Path]:
    """One store of each kind of which block 1 is missing. Not to be changed."""
    found = {}
    for kind in KINDS:
        path = found[kind] = tmp_path_factory.mktemp("started") / f"{kind}.zarr"
        _run(kind, small_spec(), path)
        (path / "ledger" / "c" / "1" / "0").unlink()
    return found


def _other_weights(spec: SmallSpec) -> ablate.CampaignSpec:
    model, _ = spec().load()
    with torch.no_grad():
        model.get_parameter("0.weight")[2, 1, 0, 0] += 1e-6
    return spec(model=model)


def _other_inputs(spec: SmallSpec) -> ablate.CampaignSpec:
    data = spec().load()[1]
    inputs = data.inputs().clone()
    inputs[3, 1, 4, 4] += 1e-6
    return spec(data=ablate.Examples(inputs, data.targets, data.ids, data.groups))


def _other_labels(spec: SmallSpec) -> ablate.CampaignSpec:
    data = spec().load()[1]
    return spec(data=ablate.Examples(data.inputs(), [1, *data.targets.tolist()[1:]], data.ids, data.groups))


def _other(**changes: Any) -> Callable[[SmallSpec], ablate.CampaignSpec]:
    return lambda spec: spec(**changes)


CHANGES: dict[str, tuple[Callable[[SmallSpec], ablate.CampaignSpec], str, tuple[str, ...]]] = {
    "model weights": (_other_weights, "model: ", KINDS),
    "inputs": (_other_inputs, "data: ", KINDS),
    "labels": (_other_labels, "data: ", KINDS),
    "index": (_other(components={"exclude": ["0"]}), "index: ", KINDS),
    "seed": (_other(seed=6), "plan.seed: 5 -> 6", KINDS),
    "ablate fraction": (_other(ablate_fraction=0.2), "plan.ablate_fraction: 0.3 -> 0.2", KINDS),
    "rows": (_other(rows=41), "plan.rows: 40 -> 41", ("campaign",)),
    "block rows": (_other(block_rows=8), "block_rows: 7 -> 8", ("campaign",)),
    "output": (_other(output="logit"), "output: margin (ablate.outputs.Margin) -> logit (ablate.outputs.Logit)", KINDS),
    "ablation": (_other(ablation="scale", ablation_factor=0.5), "ablation", KINDS),
    "precision": (_other(precision="float64"), "precision: float32 -> float64", KINDS),
}


@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for change, (_, _, kinds) in CHANGES.items() for kind in kinds]
)
def test_a_change_of_substance_is_refused_old_to_new(
    started: dict[str, Path], small_spec: SmallSpec, kind: str, change: str
) -> None:
    make, line, _ = CHANGES[change]
    before = {p: p.read_bytes() for p in started[kind].rglob("*") if p.is_file()}

    with pytest.raises(StoreMismatchError) as raised:
        _run(kind, make(small_spec), started[kind])

    lines = [text.strip() for text in str(raised.value).splitlines() if " -> " in text][1:]
    found = [text for text in lines if text.removeprefix("of.").startswith(line)]
    assert found, f"{change} is not named: {lines}"
    stored, _, now = found[0].partition(": ")[2].partition(" -> ")
    assert stored
    assert now
    assert stored != now
    assert {p: p.read_bytes() for p in started[kind].rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"passes": 6}, "passes: 4 -> 6"),
        ({"quality_rows": 12}, "quality_rows: 10 -> 12"),
        ({"method": "leave_one_out", "passes": None}, "method: gradient -> leave_one_out"),
    ],
)
def test_another_way_to_estimate_is_refused(
    started: dict[str, Path], small_spec: SmallSpec, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(StoreMismatchError) as raised:
        _run("estimate", small_spec(), started["estimate"], **options)
    assert f"  {line}" in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("package", ["torch", "numpy", "zarr", "component-attribution"])
def test_another_version_of_a_package_is_refused_unless_accepted(
    tmp_path: Path,
    started: dict[str, Path],
    small_spec: SmallSpec,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    package: str,
) -> None:
    path = tmp_path / "a.zarr"
    shutil.copytree(started[kind], path)
    monkeypatch.setattr("ablate.campaign.identity.version", lambda name: "99.0" if name == package else version(name))

    with pytest.raises(
        StoreMismatchError, match=rf"versions\.{package}: {version(package)} -> 99\.0".replace("+", r"\+")
    ):
        _run(kind, small_spec(), path)

    _run(kind, small_spec(), path, accept_versions=True)
    assert stores.verify(path).finished == stores.verify(path).blocks


HARMLESS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "batch size": ({"batch_size": 4}, {}),
    "lease": ({}, {"lease_seconds": 5.0}),
    "device count": ({}, {"worker": "1/4"}),
    "device by another name": ({"device": "auto"}, {}),
    "how failures are met": ({}, {"keep_going": True, "retry_failed": False}),
    "memory budget": ({"memory_budget": 2**30}, {}),
    "speed": ({"speed": {"fold": False}}, {}),
    "thread count": ({}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", HARMLESS)
def test_a_change_of_circumstance_is_not_refused(
    tmp_path: Path, started: dict[str, Path], small_spec: SmallSpec, kind: str, change: str
) -> None:
    path = tmp_path / "a.zarr"
    shutil.copytree(started[kind], path)
    before = {worker.id for worker in stores.WorkLog(LocalStore(path)).workers()}
    settings, options = HARMLESS[change]
    threads = torch.get_num_threads()
    try:
        if change == "thread count":
            torch.set_num_threads(threads + 1)
        store = _run(kind, small_spec(**settings), path, **options)
    finally:
        torch.set_num_threads(threads)

    assert store.missing_blocks() == []
    assert stores.verify(path).sound
    workers = [worker for worker in stores.WorkLog(store.blocks.store).workers() if worker.id not in before]
    assert [worker.blocks for worker in workers] == [1], "only the missing block was computed"
