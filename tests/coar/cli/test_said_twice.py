"""What is said beside a spec is never dropped; what is told by any of the packages reaches a log; who retries."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ablate
import coar
import stores
from ablate.work.logs import log_to
from ablate.work.loop import Sharing


def _spec(**changes: Any) -> ablate.CampaignSpec:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    data = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])
    return ablate.CampaignSpec(
        model=model, data=data, **{"ablate_fraction": 0.2, "seed": 5, "output": "logit", **changes}
    )


@pytest.mark.parametrize(("argument", "value"), [("seed", 0), ("seed", 1), ("output", "margin")])
def test_an_estimate_refuses_what_the_spec_says_otherwise(argument: str, value: Any) -> None:
    with pytest.raises(coar.FitError, match=f"^{argument}: given beside a spec, which has its own"):
        coar.estimate(_spec(), passes=2, quality_rows=0, **{argument: value})


def test_an_estimate_takes_what_the_spec_says_too() -> None:
    found = coar.estimate(_spec(), passes=2, quality_rows=0, seed=5, output="logit")
    of = found.header["identity"]["of"]
    assert (of["plan"]["seed"], of["output"]) == (5, "logit (ablate.outputs.Logit)")
    model, examples = _spec().load()
    of = coar.estimate(model, examples, passes=2, quality_rows=0).header["identity"]["of"]
    assert (of["plan"]["seed"], of["output"]) == (0, "margin (ablate.outputs.Margin)")


@pytest.mark.parametrize("name", ["ablate", "coar", "stores"])
def test_every_package_reaches_the_log(name: str, tmp_path: Path) -> None:
    with log_to(tmp_path / "a.log"):
        logging.getLogger(f"{name}.part").info("a line of %s", name)
    assert f"a line of {name}" in (tmp_path / "a.log").read_text(encoding="utf-8")


def test_of_several_workers_the_first_alone_tries_anew() -> None:
    assert [Sharing.of(worker).retry_failed for worker in (None, "0/2", "1/2")] == [True, True, False]
    assert Sharing.of("1/2", retry=True).retry_failed
    assert not Sharing.of(None, retry=False).retry_failed


class Failing(ablate.Output):
    name = "failing"
    _fails = True

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._fails and len(targets) == 4:
            raise RuntimeError("no luck")
        return logits[:, 0]


def test_a_later_worker_leaves_what_another_has_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, place = _spec(output=Failing(), rows=4, block_rows=2), tmp_path / "a.zarr"
    with pytest.raises(stores.FailedBlocksError):
        ablate.run(spec, place, progress=False, keep_going=True)
    monkeypatch.setattr(Failing, "_fails", False)
    with pytest.raises(stores.FailedBlocksError):
        ablate.run(spec, place, progress=False, keep_going=True, worker="1/2")
    assert ablate.run(spec, place, progress=False, worker="0/2").progress.complete
