"""From an attribution store alone back to its model and data: the very same ones, or a refusal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ablate
import coar
import stores
from ablate.loading import read_checkpoint
from coar.attributions.reload import reload_engine

FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
"""
SPEC = """
rows = 60
ablate_fraction = 0.3
output = "logit"
batch_size = 4
store = "{folder}/campaign.zarr"

[model]
source = "factory"
factory = "reloaded_net:net"
checkpoint = "{folder}/net.safetensors"

[data]
source = "arrays"
path = "{folder}/data.npz"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlp: nn.Module) -> Iterator[Path]:
    """A user's folder: a model factory, a checkpoint, data, a spec, its campaign and attributions."""
    (tmp_path / "reloaded_net.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    generator = torch.Generator().manual_seed(1)
    weights = {
        "0.weight": torch.randn(6, 4, generator=generator),
        "0.bias": torch.randn(6, generator=generator),
        "2.weight": torch.randn(3, 6, generator=generator),
        "2.bias": torch.randn(3, generator=generator),
    }
    save_file(weights, tmp_path / "net.safetensors")
    np.savez(tmp_path / "data.npz", inputs=np.random.default_rng(2).normal(size=(7, 4)), targets=np.arange(7) % 3)
    (tmp_path / "spec.toml").write_text(SPEC.format(folder=tmp_path))
    campaign = ablate.run(tmp_path / "spec.toml", progress=False)
    coar.fit(campaign, tmp_path / "attributions.zarr")
    yield tmp_path
    sys.modules.pop("reloaded_net", None)


def test_the_engine_gives_the_campaigns_outputs_again(folder: Path, untouched: Any) -> None:
    attributions = coar.open_attributions(folder / "attributions.zarr")
    with untouched():
        engine, examples = reload_engine(attributions, run_code=True)
    campaign = stores.CampaignStore.open(folder / "campaign.zarr")
    assert engine.index == attributions.index
    assert (engine.output.name, engine.precision, engine.batch_size) == ("logit", "float32", 4)
    assert examples.ids == tuple(attributions.examples["id"])
    np.testing.assert_array_equal(engine.outputs(campaign.keep[:], examples).numpy(), campaign.outputs[:])
    assert coar.evaluate(attributions, engine, examples, rows=20).correlations.shape == (7,)


def test_an_estimate_leads_back_as_well(folder: Path, untouched: Any) -> None:
    text = (folder / "spec.toml").read_text().replace("rows = 60\n", "")
    (folder / "spec.toml").write_text(f'ablation = "mean"\n{text}')
    estimate = coar.estimate(folder / "spec.toml", passes=6, quality_rows=20, store=folder / "estimate.zarr")
    attributions = coar.open_attributions(folder / "estimate.zarr")
    with untouched():
        engine, examples = reload_engine(attributions, run_code=True)
    assert engine.ablation.describe() == attributions.header["identity"]["of"]["ablation"] != "zero"
    weights = coar.estimate(folder / "spec.toml", passes=6, quality_rows=0).weights[:]
    found = coar.Gradient(passes=6, ablate_fraction=0.3).estimate(engine, examples, 0, 0)
    np.testing.assert_array_equal(found.weights, weights)
    np.testing.assert_array_equal(estimate.weights[:], weights)
    assert coar.evaluate(attributions, engine, examples, rows=20).ablate_fraction == 0.3


def test_the_campaign_store_is_not_needed(folder: Path) -> None:
    shutil.rmtree(folder / "campaign.zarr")
    _, examples = reload_engine(coar.open_attributions(folder / "attributions.zarr"), run_code=True)
    assert len(examples) == 7


def test_changed_weights_are_refused(folder: Path) -> None:
    weights = {name: tensor + 1 for name, tensor in read_checkpoint(folder / "net.safetensors").items()}
    stored = coar.open_attributions(folder / "attributions.zarr").header["identity"]["of"]["model"]
    save_file(weights, folder / "net.safetensors")
    with pytest.raises(stores.StoreMismatchError) as refused:
        reload_engine(coar.open_attributions(folder / "attributions.zarr"), run_code=True)
    (difference,) = refused.value.differences
    assert (difference.key, difference.stored) == ("model", stored)
    assert str(refused.value) == (
        f"{folder}/attributions.zarr was made from something else. What differs (stored -> now):\n"
        f"  model: {stored} -> {difference.now}\n"
        "The checkpoint or data file has changed since. Restore the original."
    )


def test_changed_data_is_refused(folder: Path) -> None:
    np.savez(folder / "data.npz", inputs=np.zeros((7, 4)), targets=np.arange(7) % 3)
    with pytest.raises(stores.StoreMismatchError, match=r"data: \w{64} -> \w{64}\nThe checkpoint or data file has"):
        reload_engine(coar.open_attributions(folder / "attributions.zarr"), run_code=True)


def test_lost_data_is_named(folder: Path) -> None:
    (folder / "data.npz").unlink()
    with pytest.raises(ablate.LoadError, match=r"No file at .*data\.npz"):
        reload_engine(coar.open_attributions(folder / "attributions.zarr"), run_code=True)


def test_python_objects_cannot_be_loaded_again(tiny_fit: coar.Attributions) -> None:
    with pytest.raises(coar.QueryError) as refused:
        reload_engine(tiny_fit)
    assert str(refused.value) == (
        f"{tiny_fit.store.where} was made from Python objects, which a store cannot load again. Use the Python "
        "functions (coar.evaluate, Edit.apply) with your model and data, or start from a spec file."
    )


def test_code_that_a_store_names_is_not_run_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    attributions = coar.open_attributions(folder / "attributions.zarr")
    with pytest.raises(coar.QueryError) as refused:
        reload_engine(attributions)
    assert str(refused.value) == (
        f"{folder}/attributions.zarr names Python functions to import and call: reloaded_net:net. Nothing that a store "
        "names is run unasked. If you know them and trust whoever wrote the store, allow it with --run-code "
        "(run_code=True)."
    )
