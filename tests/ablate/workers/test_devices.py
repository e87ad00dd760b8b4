"""Workers of this machine: which devices, how many threads, what a parent makes of how its workers end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zarr.storage import MemoryStore

import ablate
from ablate.campaign.spec import on_device
from ablate.errors import SpecError
from ablate.workers import supervise as supervising
from ablate.workers.processes import ChildProcess
from ablate.workers.shares import choose_devices, share_threads
from ablate.workers.supervise import End, View, WorkersError, supervise
from stores import CampaignStore, FailedBlocksError
from stores.records import Attempt, Process
from stores.work.worker import Worker
from stores.work.worklog import WorkLog

EXAMPLES, COMPONENTS = 5, 3


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`gpus(n)`: this machine seems to have n CUDA devices."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.mark.parametrize(
    ("count", "asked", "workers", "chosen"),
    [
        (0, None, None, [None]),
        (4, None, 3, [None, None, None]),
        (0, "all", None, ["cpu"]),
        (3, "all", None, ["cuda:0", "cuda:1", "cuda:2"]),
        (2, "all", 3, ["cuda:0", "cuda:1", "cuda:0"]),
        (2, "cuda:1, cpu", None, ["cuda:1", "cpu"]),
        (0, "cpu,cpu", None, ["cpu", "cpu"]),
        (0, "cpu,cpu,cpu", 2, ["cpu", "cpu"]),
    ],
)
def test_devices(
    gpus: Callable[[int], None], count: int, asked: str | None, workers: int | None, chosen: list[str | None]
) -> None:
    gpus(count)
    assert choose_devices(asked, workers) == chosen


@pytest.mark.parametrize(
    ("asked", "workers", "problem"),
    [
        ("gpu", None, "device: got 'gpu', expected cpu, cuda, cuda:0, cuda:1, ..., or auto."),
        ("cpu,", None, "devices: got 'cpu,', expected all, or names such as cuda:0,cuda:1 or cpu,cpu."),
        ("all,cpu", None, "devices: got 'all,cpu', expected all, or names such as cuda:0,cuda:1 or cpu,cpu."),
        ("cuda:2", None, "device: got 'cuda:2', expected cuda:0 to cuda:1: there are 2."),
        (None, 0, "workers: got 0, expected 1 to 1024."),
    ],
)
def test_devices_that_are_none(
    gpus: Callable[[int], None], asked: str | None, workers: int | None, problem: str
) -> None:
    gpus(2)
    with pytest.raises(SpecError) as raised:
        choose_devices(asked, workers)
    assert str(raised.value) == f"Workers: 1 problem\n  1. {problem}"


def test_no_cuda_here(gpus: Callable[[int], None]) -> None:
    gpus(0)
    with pytest.raises(SpecError, match="device: got 'cuda:0', but there is no CUDA device here"):
        choose_devices("cuda:0", None)


@pytest.mark.parametrize(
    ("cores", "environment", "workers", "asked", "threads"),
    [
        (8, "", 2, None, 4),
        (8, "", 3, None, 2),
        (2, "", 5, None, 1),
        (8, "1", 2, None, 1),
        (8, "16", 2, None, 4),
        (8, "many", 2, None, 4),
        (8, "1", 2, 6, 6),
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch, cores: int, environment: str, workers: int, asked: int | None, threads: int
) -> None:
    monkeypatch.setattr("ablate.workers.shares.core_count", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    assert share_threads(workers, asked) == threads


def test_no_threads() -> None:
    with pytest.raises(SpecError, match="threads: got 0, expected at least 1"):
        share_threads(2, 0)


def test_a_spec_on_another_device_is_the_same_campaign(gpus: Callable[[int], None]) -> None:
    model = torch.nn.Linear(2, 3)
    spec = ablate.CampaignSpec(
        model=model,
        data=(torch.zeros(2, 2), [0, 1]),
        components={"kinds": ["linear_neuron"]},
        rows=4,
        ablate_fraction=0.5,
        device="auto",
    )
    assert on_device(spec, None) is spec
    placed = on_device(spec, "cpu")
    assert (placed.settings.device, spec.settings.device) == ("cpu", "auto")
    assert placed.describe() == spec.describe()
    assert placed.load() is placed.load()
    engine = placed.make_engine(model, placed.make_index(model), placed.load()[1])
    assert str(engine.device) == "cpu"
    gpus(0)
    with pytest.raises(SpecError, match="no CUDA device here"):
        on_device(spec, "cuda:1")


class Script:
    """A worker without a process, which ends as it is told: once per start, after it has done something."""

    def __init__(self, name: str, *acts: Callable[[], End | None]) -> None:
        self.name, self.acts, self.starts, self.running = name, list(acts), 0, False

    def start(self) -> None:
        self.starts += 1
        self.running = True

    def poll(self) -> End | None:
        if not self.running:
            return End()
        act = self.acts[0] if len(self.acts) == 1 else self.acts.pop(0)
        return act()

    def process(self) -> tuple[str, int] | None:
        return ("here", 100 + self.starts) if self.running else None

    def stop(self) -> None:
        self.running = False

    def kill(self) -> None:
        self.running = False


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> CampaignStore:
    """An empty campaign of four blocks of one row; nobody sleeps."""
    monkeypatch.setattr(supervising, "POLL_SECONDS", 0.0)
    columns = {name: np.arange(EXAMPLES) for name in ("id", "label", "group")}
    components: Any = {"id": np.arange(COMPONENTS)}
    return CampaignStore.create(MemoryStore(), header={}, components=components, examples=columns, rows=4, block_rows=1)


def view(store: CampaignStore) -> View:
    return View("a.zarr", "ablate", "row", lambda: store.blocks)


def finish(store: CampaignStore, *blocks: int) -> End:
    for block in blocks:
        keep, outputs = np.ones((1, COMPONENTS), dtype=np.bool_), np.zeros((1, EXAMPLES), dtype=np.float32)
        store.write_block(block, keep, outputs)
    return End()


def at_block(store: CampaignStore, block: int, pid: int) -> None:
    """Writes down that a process is at a block."""
    worker = Worker(store.blocks.store, {})
    worker.record.process = Process("here", pid, "", "")
    worker._write()
    assert worker.claim(block)


DEATH = End(died="was killed by signal 9 (SIGKILL)")


def test_all_done(store: CampaignStore, capsys: pytest.CaptureFixture[str]) -> None:
    first = Script("one", lambda: None, lambda: finish(store, 0, 1))
    second = Script("two", lambda: finish(store, 2, 3))
    supervise([first, second], view(store))
    assert (first.starts, second.starts) == (1, 1)
    assert "4/4" in capsys.readouterr().err


def test_one_fails_the_others_do_its_work(store: CampaignStore, caplog: pytest.LogCaptureFixture) -> None:
    broken = Script("worker 0/2 (cuda:0)", lambda: End(1, "CUDA error: device-side assert"))
    supervise([broken, Script("two", lambda: finish(store, 0, 1, 2, 3))], view(store), progress=False)
    assert caplog.messages == [
        "worker 0/2 (cuda:0) ended early, the others did its work: CUDA error: device-side assert"
    ]


def test_all_fail(store: CampaignStore) -> None:
    finish(store, 2)
    texts = ["disk full", "disk full", ""]
    handles = [Script(f"worker {i}/3", partial(End, 1, text)) for i, text in enumerate(texts)]
    with pytest.raises(WorkersError) as raised:
        supervise(handles, view(store), progress=False)
    assert raised.value.code == 1
    assert str(raised.value) == (
        "a.zarr: the workers ended before all blocks were finished (1 of 4 are).\n"
        "worker 0/3 and worker 1/3: disk full\n"
        "worker 2/3: ended with exit code 1.\n"
        "Finished blocks stay: run the same command again to go on from here."
    )


def test_an_interrupt_before_the_first_look_at_the_store_is_written_down(store: CampaignStore) -> None:
    class Process(Script):
        def process(self) -> tuple[str, int] | None:
            return "here", 101

    def work() -> End | None:
        at_block(store, 1, 101)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise([Process("worker 0/1", work)], view(store), progress=False)
    assert [record.state for record in WorkLog(store.blocks.store).workers()] == ["stopped"]


@pytest.mark.parametrize("finished", [(), (0, 1, 2, 3)])
def test_all_are_refused_alike(store: CampaignStore, finished: tuple[int, ...]) -> None:
    finish(store, *finished)
    said = "Campaign a.zarr was made from something else. What differs (stored -> now):\n  plan.seed: 0 -> 5"
    with pytest.raises(WorkersError) as raised:
        supervise([Script(name, lambda: End(4, said)) for name in "ab"], view(store), progress=False)
    assert (str(raised.value), raised.value.code) == (said, 4)


def test_a_store_that_was_never_made() -> None:
    nothing = View("a.zarr", "ablate", "row", lambda: None)
    with pytest.raises(WorkersError) as raised:
        supervise([Script("one", lambda: End(2, "no such model"))], nothing, progress=False)
    assert (str(raised.value), raised.value.code) == ("no such model", 2)


def test_blocks_that_were_set_aside(store: CampaignStore) -> None:
    finish(store, 0, 1, 2)
    attempt = Attempt("ValueError: no", "ValueError", "w", "2026-01-01T00:00:00+00:00")
    WorkLog(store.blocks.store).add_failure(3, attempt, set_aside=True)
    with pytest.raises(FailedBlocksError, match="1 of 4 blocks failed and were set aside; the others are finished"):
        supervise([Script("one", lambda: End(3, "some text"))], view(store), progress=False)


def test_one_that_dies_is_started_again_and_its_block_has_failed_once(
    store: CampaignStore, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def die() -> End:
        at_block(store, 1, 101)
        return DEATH

    def go_on() -> End:
        failure = WorkLog(store.blocks.store).failure(1)
        assert failure is not None
        seen.append(len(failure.attempts))
        return finish(store, 0, 1, 2, 3)

    handle = Script("worker 0/1", die, go_on)
    supervise([handle], view(store), progress=False)
    assert (handle.starts, seen) == (2, [1])
    assert caplog.messages[0] == "worker 0/1 was killed by signal 9 (SIGKILL) at block 1"
    assert WorkLog(store.blocks.store).failures() == {}, "it was finished after all"


def test_a_block_that_kills_is_set_aside(store: CampaignStore) -> None:
    finish(store, 0, 2, 3)
    handle = Script("worker 0/1", lambda: DEATH)

    def die() -> End:
        failure = WorkLog(store.blocks.store).failure(1)
        if failure is not None and failure.set_aside:
            return End(3)
        at_block(store, 1, 100 + handle.starts)
        return DEATH

    handle.acts = [die]
    with pytest.raises(FailedBlocksError, match=r"block 1, failed 3 times: .* was killed by signal 9"):
        supervise([handle], view(store), progress=False)
    assert handle.starts == 4


def test_one_that_cannot_start_is_given_up_the_other_goes_on(store: CampaignStore) -> None:
    turns = iter(range(1000))
    other = Script("other", lambda: finish(store, 0, 1, 2, 3) if next(turns) == 20 else None)
    broken = Script("broken", lambda: DEATH)
    supervise([broken, other], view(store), progress=False)
    assert (broken.starts, other.starts) == (4, 1)


def test_where_every_block_kills_it_ends(store: CampaignStore) -> None:
    handle = Script("worker 0/1", lambda: DEATH)

    def die() -> End:
        at_block(store, handle.starts % 4, 100 + handle.starts)
        return DEATH

    handle.acts = [die]
    with pytest.raises(WorkersError, match=r"was killed by signal 9 \(SIGKILL\), again and again\. If memory ran out"):
        supervise([handle], view(store), progress=False)
    assert handle.starts == supervising.MOST_DEATHS


def test_an_interrupt_ends_all(store: CampaignStore) -> None:
    def interrupt() -> End:
        raise KeyboardInterrupt

    at_block(store, 1, 101)
    handles = [Script("one", lambda: None), Script("two", lambda: None, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        supervise(handles, view(store), progress=False)
    assert not any(handle.running for handle in handles)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], ChildProcess]]:
    """`child(program)`: a worker that is a process running this Python program."""
    made: list[ChildProcess] = []

    def make(program: str) -> ChildProcess:
        made.append(ChildProcess("worker 0/1", [sys.executable, "-c", program], {"MINE": "yes"}))
        return made[-1]

    yield make
    for one in made:
        one.kill()


def ended(child: ChildProcess, seconds: float = 30) -> End:
    deadline = time.monotonic() + seconds
    while (end := child.poll()) is None:
        assert time.monotonic() < deadline, "it did not end"
        time.sleep(0.01)
    return end


@pytest.mark.timeout(60)
def test_a_process_that_ends_with_an_error(
    child: Callable[[str], ChildProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import os, sys; print('noise'); print('a word', os.environ['MINE'], file=sys.stderr); "
    one = child(program + "print('error: it is\\n  so', file=sys.stderr); sys.exit(4)")
    assert one.poll() == End(), "it was not started"
    one.start()
    assert ended(one) == End(4, "it is\n  so")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a word yes\n")


@pytest.mark.timeout(60)
def test_a_process_that_is_killed_and_started_again(child: Callable[[str], ChildProcess]) -> None:
    one = child("import time; time.sleep(50)")
    one.start()
    first = one.process()
    assert first is not None
    os.kill(first[1], 9)
    assert ended(one) == End(died="was killed by signal 9 (SIGKILL)")
    one.kill()
    one.start()
    second = one.process()
    assert second is not None
    assert second[1] != first[1]
    one.stop()
    assert ended(one) == End(died="was killed by signal 15 (SIGTERM)")


@pytest.mark.timeout(60)
def test_a_process_sees_that_its_parent_is_gone(child: Callable[[str], ChildProcess]) -> None:
    one = child("import sys; sys.stdin.read(); sys.exit(7)")
    one.start()
    assert one._process is not None
    assert one._process.stdin is not None
    one._process.stdin.close()
    assert ended(one) == End(7)
