"""What an estimate tells while it runs: the work it foresees is the work it does, and its blocks tell their quality."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from torch import nn

import ablate
import coar
from ablate.engine.ticks import listening
from ablate.work.logs import log_to
from coar.estimators.baselines.leave_one_out import LeaveOneOut


@pytest.mark.parametrize(
    "estimator", [coar.Gradient(passes=4), coar.Gradient(passes=3, forward_rows=10), LeaveOneOut()], ids=str
)
def test_the_work_foreseen_is_the_work_done(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, estimator: coar.Estimator
) -> None:
    engine = ablate.Engine(tiny_net, ablate.ComponentIndex.from_model(tiny_net))
    engine.check(tiny_examples)
    told: list[int] = []
    with listening(told.append):
        estimator.estimate(engine, tiny_examples, 0, 0)
    work = estimator.work(len(engine.index))
    assert work is not None
    assert sum(told) == work * len(tiny_examples)
    assert max(told) <= 2 * len(tiny_examples)  # told pass by pass


def test_work_that_cannot_be_foreseen() -> None:
    assert coar.Gradient(passes="auto").work(10) is None


@pytest.mark.parametrize("quality_rows", [0, 10])
def test_a_block_tells_its_held_out_correlation(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, quality_rows: int
) -> None:
    stream = io.StringIO()
    with log_to(stream, "json"):
        found = coar.estimate(tiny_net, tiny_examples, passes=4, quality_rows=quality_rows)
    lines: list[dict[str, Any]] = [json.loads(line) for line in stream.getvalue().splitlines()]
    (finished,) = [line for line in lines if line["event"] == "block_finished"]
    if quality_rows:
        assert finished["measured"] == {"correlation": pytest.approx(float(found.quality["correlation"].mean()))}
    else:
        assert "measured" not in finished
    assert logging.getLogger("ablate").level == logging.NOTSET


def test_an_estimate_shows_progress(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, capsys: pytest.CaptureFixture[str]
) -> None:
    coar.estimate(tiny_net, tiny_examples, passes=4, quality_rows=10, progress=True)
    last = capsys.readouterr().err.splitlines()[-1]
    count = len(tiny_examples)
    assert last.startswith("estimate (gradient): 100%|")
    assert f"| {count}/{count} [" in last
    assert last.endswith(" examples/s]")
