"""TensorBoard curves: the points a run draws, and what is said where TensorBoard is not installed."""

from __future__ import annotations

import logging
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from zarr.storage import MemoryStore

import ablate
from ablate.work.tensorboard import scalars_to

WORK = logging.getLogger("ablate.work")
needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the points (step, value) of every curve of one run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(str(folder))
        reader.Reload()
        names = reader.Tags()["scalars"]
        return {name: [(point.step, point.value) for point in reader.Scalars(name)] for name in names}


@needs_tensorboard
def test_a_campaign_draws_curves(mlp: nn.Module, tmp_path: Path) -> None:
    data = torch.zeros(5, 4), [0, 1, 2, 0, 1]
    spec = ablate.CampaignSpec(model=mlp, data=data, rows=7, block_rows=3, ablate_fraction=0.2)
    with scalars_to(tmp_path / "curves"):
        ablate.run(spec, MemoryStore(), progress=False)
    (run,) = (tmp_path / "curves").iterdir()
    found = curves(run)
    assert found["finished_blocks"] == [(3, 1), (6, 2), (7, 3)]
    assert found["failures"] == [(3, 0), (6, 0), (7, 0)]
    assert [step for step, _ in found["rows_per_second"]] == [3, 6, 7]
    assert all(value > 0 for _, value in found["rows_per_second"])


@needs_tensorboard
def test_failures_and_what_a_block_measured(tmp_path: Path) -> None:
    finished = {"event": "block_finished", "worker": "w", "rows": 4, "seconds": 2.0, "finished_rows": 4}
    with scalars_to(tmp_path):
        WORK.info("", extra=finished | {"finished_blocks": 1, "measured": {"correlation": 0.5}})
        WORK.error("", extra={"event": "block_failed", "worker": "w"})
        WORK.error("", extra={"event": "block_set_aside", "worker": "w"})
        WORK.info("", extra=finished | {"finished_rows": 8, "finished_blocks": 2})
        WORK.info("something else")
    found = curves(tmp_path / "w")
    assert found["correlation"] == [(4, 0.5)]
    assert found["failures"] == [(4, 0), (4, 1), (4, 2), (8, 2)]
    assert found["rows_per_second"] == [(4, 2.0), (8, 2.0)]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ablate.LoadError) as refused, scalars_to(tmp_path / "curves"):
        pass
    assert str(refused.value).startswith("TensorBoard cannot be imported (")
    assert str(refused.value).endswith("). Install it: pip install 'component-attribution[tensorboard]'.")
    assert not (tmp_path / "curves").exists()
