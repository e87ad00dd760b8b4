"""Campaigns: a store holds what the engine gives, whatever form the spec has and wherever the run stopped."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
from stores import CampaignStore, StoreMismatchError

FACTORY = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
"""

TOML = """
rows = 7
ablate_fraction = 0.25
seed = 4
batch_size = 2
block_rows = 3
store = "{store}"
model = {{ source = "factory", factory = "run_nets:net", seed = 9 }}
data = {{ source = "arrays", path = "{data}" }}
"""

SETTINGS: dict[str, Any] = {"rows": 7, "ablate_fraction": 0.25, "seed": 4, "batch_size": 2, "block_rows": 3}


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def data(inputs: Tensor) -> tuple[Tensor, list[int], list[str], list[str]]:
    return inputs, [0, 1, 2, 0, 1], list("abcde"), list("xxyyy")


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[Tensor, Any, Any, Any]) -> Path:
    (tmp_path / "run_nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "run_nets", raising=False)
    np.savez(tmp_path / "x.npz", inputs=data[0].numpy(), targets=data[1], ids=data[2], groups=data[3])
    path = tmp_path / "campaign.toml"
    path.write_text(TOML.format(store=tmp_path / "file.zarr", data=tmp_path / "x.npz"))
    return path


def _net() -> nn.Module:
    with ablate.preserved_random_state():
        torch.manual_seed(9)
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def _assert_same(a: CampaignStore, b: CampaignStore) -> None:
    assert a.fingerprint == b.fingerprint
    assert np.asarray(a.outputs[:]).tobytes() == np.asarray(b.outputs[:]).tobytes()
    assert np.array_equal(a.keep[:], b.keep[:])
    for ours, theirs in ((a.examples, b.examples), (a.components, b.components)):
        assert {name: values.tolist() for name, values in ours.items()} == {
            name: values.tolist() for name, values in theirs.items()
        }
    assert a.header["identity"] == b.header["identity"]
    assert a.header["index"] == b.header["index"]


def test_a_store_holds_what_the_engine_gives(data: tuple[Tensor, Any, Any, Any]) -> None:
    model = _net()
    store = ablate.run(ablate.CampaignSpec(model=model, data=data, **SETTINGS), MemoryStore(), progress=False)
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 7, 0.25, seed=4).take(0, 7)
    expected = ablate.Engine(model, index, batch_size=2).outputs(keep, data[0], data[1])
    assert np.array_equal(store.keep[:], keep)
    assert np.array_equal(store.outputs[:], expected.numpy())
    assert store.examples["id"].tolist() == list("abcde")
    assert store.examples["group"].tolist() == list("xxyyy")
    assert store.examples["label"].tolist() == [0, 1, 2, 0, 1]
    table = index.table()
    assert all(store.components[name].tolist() == table[name].tolist() for name in table.columns)
    assert ablate.ComponentIndex.from_json(store.header["index"]) == index
    assert store.header["loadable"] is False


def test_a_file_and_python_objects_give_the_same_store(toml: Path, data: tuple[Tensor, Any, Any, Any]) -> None:
    from_file = ablate.run(toml, progress=False)
    from_python = ablate.run(
        ablate.CampaignSpec(model=_net(), data=data, **SETTINGS), toml.parent / "python.zarr", progress=False
    )
    tables: dict[str, Any] = {
        "model": {"source": "factory", "factory": "run_nets:net", "seed": 9},
        "data": {"source": "arrays", "path": str(toml.parent / "x.npz")},
    }
    from_tables = ablate.run(ablate.CampaignSpec(**tables, **SETTINGS), MemoryStore(), progress=False)
    _assert_same(from_file, from_python)
    _assert_same(from_file, from_tables)
    assert from_file.header["loadable"]


def test_the_spec_in_a_store_runs_into_the_same_store(toml: Path) -> None:
    store = ablate.run(toml, progress=False)
    spec = ablate.CampaignSpec.from_dict(store.header["spec"], "the store")
    _assert_same(ablate.run(spec, progress=False), store)
    _assert_same(ablate.run(spec, MemoryStore(), progress=False), store)


class StopAfter(ablate.Output):
    """A margin that stops the run at a given call, as a user would."""

    name = "margin"

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return ablate.Margin()(logits, targets)


def test_a_run_that_stopped_goes_on_to_the_same_bytes(data: tuple[Tensor, Any, Any, Any]) -> None:
    whole = ablate.run(
        ablate.CampaignSpec(model=_net(), data=data, output=StopAfter(1000), **SETTINGS), MemoryStore(), progress=False
    )
    place = MemoryStore()
    for calls in (2, 17, 1000):  # two compare the network with the store's; three make a row, three rows a block
        spec = ablate.CampaignSpec(model=_net(), data=data, output=StopAfter(calls), **SETTINGS)
        try:
            ablate.run(spec, place, progress=False)
        except KeyboardInterrupt:
            finished = CampaignStore.open(place).progress.finished_rows
            assert finished == (calls - 2) // 9 * 3
    _assert_same(CampaignStore.open(place), whole)


def test_a_finished_campaign_is_returned_without_work(data: tuple[Tensor, Any, Any, Any]) -> None:
    place = MemoryStore()
    output = StopAfter(23 + 2)  # two compare the network with the store's
    spec = ablate.CampaignSpec(model=_net(), data=data, output=output, **SETTINGS)
    first = ablate.run(spec, place, progress=False)
    _assert_same(ablate.run(spec, place, progress=False), first)


def test_the_size_of_blocks_changes_no_output(data: tuple[Tensor, Any, Any, Any]) -> None:
    results = [
        ablate.run(
            ablate.CampaignSpec(model=_net(), data=data, **(SETTINGS | {"block_rows": rows})),
            MemoryStore(),
            progress=False,
        )
        for rows in (1, 3, 7, 64)
    ]
    for result in results:
        assert np.array_equal(result.outputs[:], results[0].outputs[:])
        assert np.array_equal(result.keep[:], results[0].keep[:])


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"rows": 8}, ["plan.rows"]),
        ({"seed": 5}, ["plan.seed"]),
        ({"ablate_fraction": 0.5}, ["plan.ablate_fraction"]),
        ({"output": "logit"}, ["output"]),
        ({"precision": "float64"}, ["precision"]),
        ({"block_rows": 2}, ["block_rows"]),
        ({"components": {"exclude": ["2"]}}, ["index", "plan.components"]),
    ],
)
def test_another_campaign_is_refused_and_every_difference_named(
    change: dict[str, Any], keys: list[str], data: tuple[Tensor, Any, Any, Any]
) -> None:
    place = MemoryStore()
    ablate.run(ablate.CampaignSpec(model=_net(), data=data, **SETTINGS), place, progress=False)
    with pytest.raises(StoreMismatchError, match="was made from something else") as caught:
        ablate.run(ablate.CampaignSpec(model=_net(), data=data, **(SETTINGS | change)), place, progress=False)
    assert [difference.key for difference in caught.value.differences] == keys


def test_several_ablate_fractions(data: tuple[Tensor, Any, Any, Any], toml: Path) -> None:
    """Row i has fraction i % 3, from Python as from a file; the header says which, and the spec in it runs again."""
    settings = SETTINGS | {"ablate_fraction": [0.1, 0.4, 0.8]}
    result = ablate.run(ablate.CampaignSpec(model=_net(), data=data, **settings), MemoryStore(), progress=False)
    keep = result.keep[:]
    for i, row in enumerate(keep):
        assert np.array_equal(row, ablate.KeepPlan(keep.shape[1], 7, (0.1, 0.4, 0.8)[i % 3], 4).row(i))
    assert result.header["identity"]["plan"]["ablate_fraction"] == [0.1, 0.4, 0.8]
    assert result.header["spec"]["ablate_fraction"] == [0.1, 0.4, 0.8]

    toml.write_text(toml.read_text().replace("ablate_fraction = 0.25", "ablate_fraction = [0.1, 0.4, 0.8]"))
    from_file = ablate.run(toml, progress=False)
    assert np.array_equal(from_file.keep[:], keep)
    again = ablate.CampaignSpec.from_dict(from_file.header["spec"], "header")
    assert again.settings.ablate_fraction == (0.1, 0.4, 0.8)
    assert ablate.run(again, progress=False).fingerprint == from_file.fingerprint  # the same store: nothing differs
    with pytest.raises(StoreMismatchError) as caught:
        ablate.run(ablate.CampaignSpec.from_dict({**from_file.header["spec"], "ablate_fraction": 0.1}, "header"))
    assert "plan.ablate_fraction" in [difference.key for difference in caught.value.differences]


def test_another_model_or_data_set_is_refused(data: tuple[Tensor, Any, Any, Any]) -> None:
    place = MemoryStore()
    ablate.run(ablate.CampaignSpec(model=_net(), data=data, **SETTINGS), place, progress=False)
    other = _net()
    with torch.no_grad():
        other.get_parameter("4.bias")[0] += 1
    with pytest.raises(StoreMismatchError, match=r"\n  data: \w{64} -> \w{64}\n  model: \w{64} -> \w{64}\n"):
        ablate.run(ablate.CampaignSpec(model=other, data=data[:2], **SETTINGS), place, progress=False)


def test_an_output_that_is_not_finite_names_the_row_of_the_plan(data: tuple[Tensor, Any, Any, Any]) -> None:
    model = _net()
    index = ablate.ComponentIndex.from_model(model)
    settings = SETTINGS | {"ablate_fraction": 0.6}
    keep = ablate.KeepPlan(len(index), 7, 0.6, seed=4).take(0, 7)
    first = np.where(keep.any(axis=0), keep.argmax(axis=0), -1)  # the first row that keeps it
    component, row = int(first.argmax()), int(first.max())
    assert row >= 3, "in the second block, so that the block's first row has to be added"
    with torch.no_grad():
        c = index[component]
        model.get_parameter(c.parameter)[c.start] = float("nan")
    place = MemoryStore()
    with pytest.raises(ablate.NonFiniteOutputError) as caught:
        ablate.run(ablate.CampaignSpec(model=model, data=data, **settings), place, progress=False)
    assert str(caught.value) == (
        f"Output of keep row {row} on example 0 (id 'a') is nan, expected a finite number. Nothing of this block was "
        "stored. Check that input and the model for overflow, or ablate a smaller fraction."
    )
    assert CampaignStore.open(place).finished_blocks() == list(range(row // 3))


def test_a_spec_without_a_store(data: tuple[Tensor, Any, Any, Any]) -> None:
    with pytest.raises(ablate.SpecError) as caught:
        ablate.run(ablate.CampaignSpec(model=_net(), data=data, **SETTINGS))
    assert str(caught.value) == ("CampaignSpec: 1 problem\n  1. store: missing. Name one in the spec, or pass store=.")


def test_a_campaign_on_an_image_folder(tmp_path: Path) -> None:
    from PIL import Image

    for name, colours in {"cat": ("red", "green"), "dog": ("blue",)}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for colour in colours:
            Image.new("RGB", (40, 30), colour).save(tmp_path / "images" / name / f"{colour}.png")
    spec = ablate.CampaignSpec(
        model={"source": "timm", "name": "test_resnet", "classes": 2},
        data={"source": "imagefolder", "path": str(tmp_path / "images")},
        rows=2,
        ablate_fraction=0.1,
    )
    store = ablate.run(spec, MemoryStore(), progress=False)
    assert store.examples["id"].tolist() == ["cat/green.png", "cat/red.png", "dog/blue.png"]
    assert store.outputs.shape == (2, 3)
    assert store.keep.shape == (2, 1040)


def test_what_run_returns_cannot_be_written_by_accident(mlp: nn.Module, data: Any, tmp_path: Path) -> None:
    spec = ablate.CampaignSpec(model=mlp, data=data, **SETTINGS)
    for place in (tmp_path / "a.zarr", MemoryStore()):
        for _ in range(2):  # a new store, and one that is finished
            store = ablate.run(spec, place, progress=False)
            assert store.progress.complete
            before = store.outputs[:]
            with pytest.raises(ValueError, match="read-only"):
                store.blocks.arrays["outputs"][:] = 0.0
            np.testing.assert_array_equal(CampaignStore.open(place).outputs[:], before)
