"""Progress: what it says of rate and time when others work, too; within a block; in a terminal, notebook and log."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zarr.storage import MemoryStore

import ablate
from ablate.engine.ticks import listening, ran
from ablate.work import progress
from ablate.work.progress import BlockProgress, progress_bar
from stores import CampaignStore
from stores.blocks.blocks import Blocks


@pytest.fixture
def store() -> CampaignStore:
    """An empty campaign of 100 rows in blocks of 10."""
    return CampaignStore.create(
        MemoryStore(),
        header={},
        components={"id": np.arange(3)},
        examples={"id": np.arange(5)},
        rows=100,
        block_rows=10,
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as the progress sees it; its thread never looks by itself."""
    monkeypatch.setattr(progress, "TICK_SECONDS", 1000.0)
    return [0.0]


def finish(store: CampaignStore, *blocks: int) -> None:
    for block in blocks:
        store.write_block(block, np.ones((10, 3), dtype=np.bool_), np.ones((10, 5), dtype=np.float32))


def shown(blocks: Blocks, clock: list[float], **options: Any) -> BlockProgress:
    return BlockProgress("ablate", "row", blocks, True, clock=lambda: clock[0], **options)


def test_rows_of_others_do_not_make_it_fast_at_the_start(store: CampaignStore, clock: list[float]) -> None:
    finish(store, 0, 1)
    with shown(store.blocks, clock) as bar:
        assert bar.rate() is None
        clock[0] = 1.0
        finish(store, 2, 3, 4)  # by others, who began long ago
        bar.look()
        assert bar.rate() is None
        bar.begin(5)
        clock[0] = 20.0
        finish(store, 5)
        bar.settle(5, True)
        assert bar.rate() == pytest.approx(40 / 20)  # four blocks since it began, by all
        clock[0] = 25.0
        finish(store, 6)
        bar.look()
        assert bar.rate() == pytest.approx(50 / 25)


def test_it_moves_within_a_block(store: CampaignStore, clock: list[float]) -> None:
    with shown(store.blocks, clock, work=5.0) as bar:
        with listening(bar.begin(0)):
            clock[0] = 2.0
            ran(20)
            assert bar.rate() == pytest.approx(4 / 2)
            ran(10)
            assert bar._bar.n == 6
            ran(1000)  # more than was foreseen
            assert bar._bar.n == 10
        bar.settle(0, False)  # it failed
        assert bar._bar.n == 0
        with listening(bar.begin(0)):
            ran(50)
            assert bar._bar.n == 10
        ran(50)  # nobody listens
        finish(store, 0)
        bar.settle(0, True)
        assert bar._bar.n == 10


def test_the_work_of_a_block_is_learnt_from_the_first(store: CampaignStore, clock: list[float]) -> None:
    with shown(store.blocks, clock) as bar:
        with listening(bar.begin(0)):
            ran(70)
            assert bar._bar.n == 0
        finish(store, 0)
        bar.settle(0, True)
        with listening(bar.begin(1)):
            ran(35)
            assert bar._bar.n == 15


def test_lines_in_a_log(store: CampaignStore, clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    failed = [0]
    with shown(store.blocks, clock, failed=lambda: failed[0]) as bar:
        for block in range(10):
            bar.begin(block)
            clock[0] += 5.0
            finish(store, block)
            bar.settle(block, True)
            if block == 3:
                failed[0] = 2
                bar.begin(9)
                bar.settle(9, False)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert "\x1b" not in err
    first, last = err.splitlines()  # nothing between: less than ten seconds have passed
    assert first.startswith("ablate:   0%|")
    assert first.endswith("| 0/100 [00:00]")
    assert last.endswith("| 100/100 [00:00, 2 rows/s, 2 failed]")


def test_a_line_now_and_then(
    store: CampaignStore, clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.05)
    with shown(store.blocks, clock) as bar:
        for block in range(4):
            bar.begin(block)
            clock[0] += 5.0
            finish(store, block)
            time.sleep(0.06)
            bar.settle(block, True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("| ")[2] for line in lines[1:-1]] == [
        f"{n}/100 [00:00, 2 rows/s, 00:{(100 - n) // 2:02} left]" for n in (10, 20, 30, 40)
    ]


def test_a_terminal_has_one_line_that_changes(
    store: CampaignStore, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown(store.blocks, clock) as bar:
        bar.begin(0)
        clock[0] = 5.0
        finish(store, 0)
        bar.settle(0, True)
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert text.split("\r")[-1].rstrip().endswith("10/100 [00:00, 2 rows/s, 00:45 left]")


def test_its_thread_sees_what_others_finish(
    store: CampaignStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.02)
    with BlockProgress("ablate", "row", store.blocks, True) as bar:
        finish(store, 0, 1, 2)
        until = time.monotonic() + 10
        while bar._bar.n != 30 and time.monotonic() < until:
            time.sleep(0.01)
        assert bar._bar.n == 30
        thread = bar._thread
    assert thread is not None
    assert not thread.is_alive()
    assert "30/100" in capsys.readouterr().err


def test_trouble_with_storage_does_not_stop_the_thread(store: CampaignStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.02)
    looked: list[int] = []
    finished = Blocks.finished

    def shaky(blocks: Blocks) -> Any:
        looked.append(1)
        if len(looked) == 2:
            raise OSError("away for a moment")
        return finished(blocks)

    monkeypatch.setattr(Blocks, "finished", shaky)
    with BlockProgress("ablate", "row", store.blocks, True) as bar:
        finish(store, 0)
        until = time.monotonic() + 10
        while bar._bar.n != 10 and time.monotonic() < until:
            time.sleep(0.01)
        assert bar._bar.n == 10


def test_nothing_is_shown_unasked_or_where_nothing_is_left(
    store: CampaignStore, capsys: pytest.CaptureFixture[str]
) -> None:
    with BlockProgress("ablate", "row", store.blocks, False) as bar:
        assert bar.begin(0) is None
        finish(store, *range(10))
        bar.settle(0, True)
    with BlockProgress("ablate", "row", store.blocks, True) as bar:
        assert bar.begin(0) is None
    with progress_bar("fit", 5, 5, "example", True):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_campaign_shows_it(mlp: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    data = torch.zeros(5, 4), [0, 1, 2, 0, 1]
    spec = ablate.CampaignSpec(model=mlp, data=data, rows=7, block_rows=3, ablate_fraction=0.2, batch_size=2)
    ablate.run(spec, MemoryStore(), progress=True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ablate 5 examples: 100%|")
    assert "| 7/7 [" in last
    assert last.endswith(" rows/s]")


@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_an_engine_tells_every_forward(mlp: nn.Module, mode: str) -> None:
    engine = ablate.Engine(mlp, ablate.ComponentIndex.from_model(mlp), mode=mode, batch_size=2)
    inputs, targets = torch.zeros(5, 4), [0, 1, 2, 0, 1]
    engine.check(inputs, targets)
    told: list[int] = []
    with listening(told.append):
        engine.outputs(np.ones((3, len(engine.index)), dtype=np.bool_), inputs, targets)
        assert (sum(told), max(told)) == (15, 2)
        engine.gate_gradients(np.ones((5, len(engine.index)), dtype=np.float32), inputs, targets)
        assert sum(told) == 15 + 3 * 5  # a backward counts as two
    engine.outputs(np.ones((3, len(engine.index)), dtype=np.bool_), inputs, targets)
    assert sum(told) == 30


NOTEBOOK = """
import sys, types
class Shell: pass
Shell.__name__ = "ZMQInteractiveShell"
python = types.ModuleType("IPython")
python.get_ipython = lambda: Shell()
sys.modules |= {"IPython": python, "ipykernel.zmqshell": types.ModuleType("ipykernel.zmqshell"), "ipywidgets": None}
from ablate.work.progress import progress_bar
with progress_bar("ablate", 4, 0, "row", True) as bar:
    bar.update(4)
"""


def test_a_notebook_without_widgets_gets_lines_and_no_warning() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", NOTEBOOK],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(progress.__file__).parents[2],
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Warning" not in done.stderr
    assert "4/4" in done.stderr.splitlines()[-1]
