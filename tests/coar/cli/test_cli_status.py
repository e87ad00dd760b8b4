"""`coar status` on small real stores: what it prints, its JSON, its exit codes, and watching."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ablate.work.status import Watch, status
from coar.cli.status import short_bytes, short_time, told
from stores import CampaignStore, WorkLog
from stores.records import Attempt, Process, WorkerRecord, utc_now
from stores.storage import objects
from stores.work.worklog import LEASES, WORKERS

Run = Callable[..., tuple[int, str, str]]
SEEN = "2026-01-02T03:04:05+00:00"


def work_on(path: Path, **changes: Any) -> None:
    """Writes the record and lease of a worker elsewhere that is at block 2."""
    store = CampaignStore.open(path, mode="r+").blocks.store
    record = WorkerRecord("node7-17-abc", Process("node7", 17, "another", "1"), SEEN, utc_now(), {"device": "cuda:0"})
    record = replace(record, **({"blocks": 2, "rows": 40, "seconds": 8.0} | changes))
    objects.replace(store, f"{WORKERS}/{record.id}.json", objects.to_json(asdict(record)))
    value = {"block": 2, "worker": record.id, "since": SEEN}
    objects.replace(store, f"{LEASES}/2.json", objects.to_json(value))


def set_aside(path: Path) -> None:
    """Lets block 2 have failed three times."""
    log = WorkLog(CampaignStore.open(path, mode="r+").blocks.store)
    for attempt in range(3):
        log.add_failure(2, Attempt("RuntimeError: a broken\ncable", "RuntimeError", "w", SEEN), attempt == 2)


def finish(path: Path, folder: Path) -> None:
    """Gives the unfinished campaign its last mark."""
    shutil.copy(folder / "campaign.zarr" / "ledger" / "c" / "2" / "0", path / "ledger" / "c" / "2" / "0")


def test_a_complete_campaign(run: Run, run_json: Callable[..., Any], folder: Path) -> None:
    store = folder / "campaign.zarr"
    code, out, err = run("status", store)
    assert (code, err) == (0, "")
    size = short_bytes(sum(file.stat().st_size for file in store.rglob("*") if file.is_file()))
    assert out == (
        f"{store}: complete, 60 of 60 rows (100%), 3 of 3 blocks; 16 examples, 736 components.\n"
        f"Workers: 1 ended. {size} stored.\n"
    )
    found = run_json("status", store)
    assert found.pop("spec")["rows"] == 60
    assert set(found.pop("versions")) == {"component-attribution", "torch", "numpy", "zarr"}
    (worker,) = found.pop("workers")
    assert (worker["state"], worker["blocks"], worker["rows"], worker["device"]) == ("ended", 3, 60, "cpu")
    assert found.pop("bytes") > 0
    assert found == {
        "store": str(store),
        "kind": "campaign",
        "unit": "row",
        "complete": True,
        "finished_rows": 60,
        "rows": 60,
        "finished_blocks": 3,
        "blocks": 3,
        "running_blocks": 0,
        "failed_blocks": 0,
        "set_aside_blocks": 0,
        "left_blocks": 0,
        "examples": 16,
        "components": 736,
        "rows_per_second": None,
        "eta_seconds": 0.0,
        "worker_hours_left": 0.0,
        "failures": [],
        "damaged": [],
    }


def test_an_estimate(run: Run, folder: Path) -> None:
    code, out, _ = run("status", folder / "campaign-estimate.zarr")
    assert code == 0
    first, second = out.splitlines()
    assert first == (
        f"{folder}/campaign-estimate.zarr: complete, 16 of 16 examples (100%), 1 of 1 blocks; 736 components."
    )
    assert second.startswith("Workers: 1 ended. ")
    code, out, _ = run("status", folder / "campaign-attributions.zarr")  # of a fit: one process, no records
    assert (code, out.splitlines()[1].startswith("No worker has left a record. ")) == (0, True)


def test_an_unfinished_campaign(run: Run, unfinished: Path) -> None:
    code, out, _ = run("status", unfinished)
    assert code == 3
    lines = out.splitlines()
    assert lines[0] == f"{unfinished}: not finished, 40 of 60 rows (67%), 2 of 3 blocks; 16 examples, 736 components."
    assert lines[1].startswith("Nobody is at it: run the same command again to go on. About ")
    assert lines[1].endswith(" of one worker's time are left.")
    code, out, _ = run("status", unfinished, "--json")
    assert code == 3
    assert json.loads(out)["complete"] is False


def test_a_campaign_that_is_worked_on(run: Run, unfinished: Path) -> None:
    shutil.rmtree(unfinished / "work")
    work_on(unfinished)
    code, out, _ = run("status", unfinished)
    assert code == 3
    assert out.splitlines()[1:3] == [
        "Blocks that are not finished: 1 running.",
        "5 rows/s; finished in about 4 s. About 4 s of one worker's time are left.",
    ]
    assert out.splitlines()[4:] == [
        "Workers:",
        "  node7-17-abc (cuda:0): alive, at block 2, 2 blocks, 40 rows, 5/s",
    ]
    work_on(unfinished, seen="2020-01-01T00:00:00+00:00")
    _, out, _ = run("status", unfinished)
    assert "The speed is not known yet." in out
    assert out.splitlines()[-1].startswith(
        "  node7-17-abc (cuda:0): silent, at block 2, 2 blocks, 40 rows, 5/s, last seen "
    )
    assert out.splitlines()[-1].endswith(" ago by its own clock (2020-01-01T00:00:00+00:00)")


def test_a_block_that_was_set_aside(run: Run, run_json: Any, unfinished: Path) -> None:
    set_aside(unfinished)
    code, out, _ = run("status", unfinished)
    assert code == 3
    lines = out.splitlines()
    assert lines[1:3] == [
        "Blocks that are not finished: 1 set aside.",
        "All others are finished. Remove the causes below and run the same command again.",
    ]
    assert lines[4:] == [
        "Failed blocks:",
        "  block 2 (rows 40 to 59) failed 3 times, set aside: RuntimeError: a broken",
        "    cable",
        "    Remove the cause and run the same command again: it tries the block anew.",
    ]
    code, out, _ = run("status", unfinished, "--json")
    assert code == 3
    (failure,) = json.loads(out)["failures"]
    assert (failure["block"], failure["attempts"], failure["set_aside"]) == (2, 3, True)


def test_damage_is_told_with_all_else(run: Run, unfinished: Path) -> None:
    (unfinished / "outputs" / "c" / "1" / "0").unlink()
    code, out, err = run("status", unfinished)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{unfinished}: damaged, 40 of 60 rows (67%), ")
    at = lines.index("Damaged:")
    assert lines[at + 1].startswith(
        f"  {unfinished}: block 1 (rows 20 to 39) is damaged: the file of 'outputs' is gone (outputs/c/1/0). `coar "
    )
    assert lines[at + 2] == f"  `coar verify {unfinished}` reads everything and names all damaged blocks."
    assert run("status", unfinished, "--json")[0] == 1


def test_watching_ends_when_it_is_complete(run: Run, unfinished: Path, folder: Path) -> None:
    def later() -> None:
        time.sleep(0.5)
        finish(unfinished, folder)

    other = threading.Thread(target=later)
    other.start()
    code, out, err = run("status", unfinished, "--watch", "--every", "0.1")
    other.join()
    assert (code, err) == (0, "")
    first, last = out.splitlines()  # a line per change only
    assert first.partition(" ")[2] == "40 of 60 rows (67%), 2 of 3 blocks, 0 workers alive"
    assert last.partition(" ")[2] == "60 of 60 rows (100%), 3 of 3 blocks, 0 workers alive"


def test_watching_as_json_lines(run: Run, unfinished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coar.cli.status.time.sleep", lambda seconds: finish(unfinished, folder))
    code, out, _ = run("status", unfinished, "--watch", "--json")
    assert code == 0
    assert [json.loads(line)["finished_rows"] for line in out.splitlines()] == [40, 60]


def test_watching_ends_where_blocks_were_set_aside(run: Run, unfinished: Path) -> None:
    set_aside(unfinished)
    code, out, _ = run("status", unfinished, "--watch")
    assert code == 3
    assert out.partition(" ")[2] == "40 of 60 rows (67%), 2 of 3 blocks, 1 set aside, 0 workers alive\n"


def test_watching_in_a_terminal(run: Run, unfinished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("coar.cli.status.time.sleep", lambda seconds: finish(unfinished, folder))
    code, out, _ = run("status", unfinished, "--watch")
    assert code == 0
    assert "not finished, 40 of 60 rows" in out
    assert "complete, 60 of 60 rows" in out
    assert "\x1b[?25l" in out  # the cursor is hidden meanwhile,
    assert out.rindex("\x1b[?25h") > out.rindex("60 of 60 rows")  # and comes back


def test_ctrl_c_ends_watching(run: Run, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coar.cli.status.time.sleep", interrupt)
    code, out, err = run("status", unfinished, "--watch")
    assert (code, err) == (3, "")
    assert len(out.splitlines()) == 1


def test_long_lists_are_cut(folder: Path) -> None:
    found = status(folder / "campaign.zarr")
    worker = replace(found.workers[0], state="alive")
    many = replace(found, workers=(worker,) * 25, left_blocks=1, complete=False)
    lines = told(many).splitlines()
    assert lines[-1] == "  and 5 more workers: see --json"
    assert sum(line.startswith(f"  {worker.id}") for line in lines) == 20


def test_a_watch_tells_a_worker_that_went_silent(unfinished: Path) -> None:
    shutil.rmtree(unfinished / "work")
    work_on(unfinished)
    now = [0.0]
    watch = Watch(str(unfinished), clock=lambda: now[0])
    assert "alive, at block 2" in told(watch.look())
    now[0] = 61.0
    text = told(watch.look())
    assert "node7-17-abc (cuda:0): lost, at block 2" in text
    assert "Nobody is at it: run the same command again to go on." in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 * 2**30, "5.0 GiB"), (2**51, "2048.0 TiB")],
)
def test_bytes(count: int, text: str) -> None:
    assert short_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (125, "2 min 5 s"), (7260, "2 h 1 min"), (90000, "1 d 1 h")],
)
def test_times(seconds: float, text: str) -> None:
    assert short_time(seconds) == text
