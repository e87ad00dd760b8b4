"""Log lines: what a run tells, as text and as JSON; nothing global is left behind, no credential is written."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
from ablate.work.logs import LOGGERS, log_to, warnings_to_stderr
from ablate.work.progress import progress_bar
from stores import FailedBlocksError

WORK = logging.getLogger("ablate.work")
SECRET = "correct-horse-battery"  # noqa: S105 - it is none


class Broken(ablate.Output):
    """A margin that fails in some calls."""

    name = "margin"

    def __init__(self, fails: Any) -> None:
        self.fails, self.calls = fails, 0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if len(targets) == 5 and self.fails(self.calls):
            raise RuntimeError(f"no luck with key {SECRET}")
        return ablate.Margin()(logits, targets)


def spec(model: nn.Module, output: Any = "margin") -> ablate.CampaignSpec:
    return ablate.CampaignSpec(
        model=model,
        data=(torch.zeros(5, 4), [0, 1, 2, 0, 1]),
        rows=7,
        block_rows=3,
        ablate_fraction=0.2,
        batch_size=5,
        output=output,
    )


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_campaign_as_json_lines(mlp: nn.Module, tmp_path: Path) -> None:
    target = tmp_path / "new" / "run.log"
    with log_to(target, "json"):
        ablate.run(spec(mlp), tmp_path / "a.zarr", progress=False)
    lines = lines_of(target.read_text())
    assert [line["event"] for line in lines] == ["worker_began", *["block_finished"] * 3, "worker_ended"]
    assert {line["level"] for line in lines} == {"info"}
    assert len({line["worker"] for line in lines}) == 1
    assert lines[0]["store"] == str(tmp_path / "a.zarr")
    for number, line in enumerate(lines[1:4]):
        assert (line["block"], line["rows"]) == (number, (3, 3, 1)[number])
        assert (line["finished_rows"], line["finished_blocks"], line["blocks"]) == ((3, 6, 7)[number], number + 1, 3)
        assert line["seconds"] >= 0
        if line["seconds"]:
            assert line["rows_per_second"] == pytest.approx(line["rows"] / line["seconds"], rel=0.01)
        assert line["message"].startswith(f"block {number} finished: ")
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    assert all(time.tzname() == "UTC" for time in times)
    with log_to(target, "json"):  # a file is appended to; a finished campaign has nothing to tell
        ablate.run(spec(mlp), tmp_path / "b.zarr", progress=False)
        ablate.run(spec(mlp), tmp_path / "b.zarr", progress=False)
    assert len(lines_of(target.read_text())) == 10


BROKEN = (
    "Output 'margin' fails on what the model returns, shape (5, 3), and targets of shape (5,): RuntimeError: no luck "
    "with key ***."
)


def test_failures_say_why_and_no_credential_is_written(
    mlp: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    text, as_json = io.StringIO(), io.StringIO()
    with log_to(text), log_to(as_json, "json"), pytest.raises(ablate.DataError):
        ablate.run(spec(mlp, Broken(lambda call: True)), MemoryStore(), progress=False)
    failed = next(line for line in lines_of(as_json.getvalue()) if line["event"] == "block_failed")
    assert (failed["level"], failed["block"], failed["attempt"]) == ("error", 0, 1)
    assert failed["why"] == f"DataError: {BROKEN}"
    assert "RuntimeError: no luck with key ***" in failed["trace"]
    assert SECRET not in text.getvalue() + as_json.getvalue()
    shown = text.getvalue().splitlines()
    at = next(i for i, line in enumerate(shown) if " ERROR " in line)
    assert shown[at].endswith(f" ERROR   block 0 (keep rows 0 to 2) failed, to be tried again: DataError: {BROKEN}")
    assert shown[at + 1] == "    Traceback (most recent call last):"
    assert all(line.startswith(("    ", "20")) for line in shown)


def test_blocks_set_aside(mlp: nn.Module) -> None:
    stream = io.StringIO()
    broken = Broken(lambda call: 0 < call - 2 <= 9)
    with log_to(stream, "json"), pytest.raises((FailedBlocksError, ablate.DataError)):
        ablate.run(spec(mlp, broken), MemoryStore(), progress=False, keep_going=True)
    events = [line["event"] for line in lines_of(stream.getvalue())]
    assert events.count("block_failed") >= 2
    assert "block_set_aside" in events


def test_trouble_is_told_in_brief(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_to_stderr():
        WORK.info("all is well")
        WORK.error("block %d failed", 3, extra={"trace": "a long story"})
    WORK.error("nobody listens")
    assert capsys.readouterr() == ("", "error: block 3 failed\n")


def test_lines_on_stderr_stand_above_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with log_to("-"), progress_bar("ablate", 4, 0, "row", True) as bar:
        bar.update(2)
        WORK.warning("storage is slow")
    before, line, after = terminal.getvalue().partition("storage is slow\n")
    assert line
    assert before.rpartition("\r")[2].split()[1] == "WARNING"  # a line of its own
    assert "2/4" in after  # the bar is drawn again


def test_loggers_are_as_before(mlp: nn.Module, tmp_path: Path) -> None:
    loggers = [logging.getLogger(name) for name in (*LOGGERS, "ablate.work")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    with log_to(tmp_path / "b.log"):
        assert WORK.isEnabledFor(logging.INFO)
    with pytest.raises(RuntimeError), log_to(tmp_path / "a.log"):
        raise RuntimeError
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before
    assert (tmp_path / "a.log").read_text() == ""


def test_values_that_json_does_not_know() -> None:
    stream = io.StringIO()
    with log_to(stream, "json"):
        extra = {
            "event": "odd",
            "rows": 3,
            "seconds": 1.5,
            "measured": {"correlation": float("nan")},
            "where": Path("a"),
        }
        WORK.info("two\nlines", extra=extra)
    (line,) = lines_of(stream.getvalue())
    assert (line["message"], line["measured"], line["where"]) == ("two\nlines", {"correlation": None}, "a")
    assert line["rows_per_second"] == 2.0


def test_a_full_disk_is_told_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with log_to(Full()):
        WORK.info("one")
        WORK.info("two")
    assert capsys.readouterr().err == (
        "warning: Lines cannot be logged any more: [Errno 28] No space left on device. The work goes on.\n"
    )


def test_what_cannot_be_a_log(tmp_path: Path) -> None:
    with pytest.raises(ablate.UnknownNameError) as refused, log_to(tmp_path / "a.log", "jsno"):
        pass
    assert str(refused.value) == "No log format 'jsno'. Did you mean 'json'?"
    assert not (tmp_path / "a.log").exists()
    with pytest.raises(OSError, match="Is a directory"), log_to(tmp_path):
        pass


def test_the_library_alone_shows_nothing() -> None:
    program = "import logging, ablate; logging.getLogger('ablate.work').error('a block failed')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("", "")
