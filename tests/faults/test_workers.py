"""Several workers on one store, killed, stopped, left alone: the numbers are those of one that nobody disturbed."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from zarr.storage import LocalStore

from stores import CampaignStore
from stores.work.worklog import WorkLog
from tests.worker_project import BLOCKS, Project, files

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose campaign and estimate one process has run. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    assert project.coar("ablate", "spec.toml", "--quiet")[0] == 0
    assert project.coar("estimate", "spec.toml", "--block-examples", 3, "--quality-rows", 10, "--quiet")[0] == 0
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project of its own, nothing run."""
    return Project(tmp_path / "p")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def check(project: Project, undisturbed: Project, name: str = "campaign.zarr") -> None:
    assert files(project.folder / name) == files(undisturbed.folder / name)
    assert project.processes(seconds=10) == []
    log = WorkLog(LocalStore(project.folder / name))
    assert log.failures() == {}, "what was finished after all has not failed"


def test_kill_9_of_one_of_two_costs_at_most_its_block(project: Project, undisturbed: Project) -> None:
    with project.start(
        "ablate", "spec.toml", "--devices", "cpu,cpu", TINY_DELAY="0.08", TINY_STORE="campaign.zarr"
    ) as process:
        victim = project.wait_for_workers(2)[0]
        kill(victim.process.pid)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "Complete: 40 rows x 9 examples in campaign.zarr\n"), err
    assert "was killed by signal 9 (SIGKILL)" in err
    check(project, undisturbed)
    computed = project.computed()
    assert sorted(computed) == list(range(BLOCKS))
    assert sum(computed.values()) <= BLOCKS + 1, "more than the block of the killed worker was computed again"


def test_two_commands_started_by_hand_share_and_one_is_killed(project: Project, undisturbed: Project) -> None:
    """Nothing looks after these: the other one takes the block over, since the process of its lease is dead."""
    environment = {"TINY_DELAY": "0.08", "TINY_STORE": "campaign.zarr"}
    with (
        project.start("ablate", "spec.toml", "--quiet", "--worker", "0/2", **environment) as first,
        project.start("ablate", "spec.toml", "--quiet", "--worker", "1/2", **environment) as second,
    ):
        project.wait_for_workers(2)
        kill(first.pid)
        assert second.wait(120) == 0
    check(project, undisturbed)
    computed = project.computed()
    assert sorted(computed) == list(range(BLOCKS))
    assert sum(computed.values()) <= BLOCKS + 1


def test_an_estimate_by_two_of_which_one_is_killed(project: Project, undisturbed: Project) -> None:
    store = project.folder / "campaign-estimate.zarr"
    options = ("--block-examples", 3, "--quality-rows", 10, "--workers", 2)
    with project.start("estimate", "spec.toml", *options, TINY_DELAY="0.08") as process:
        victim = project.wait_for_workers(2, store)[1]
        kill(victim.process.pid)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("9 attributions by gradient from 6 passes per example in campaign-estimate.zarr. Correlation")
    check(project, undisturbed, "campaign-estimate.zarr")


def test_a_block_that_kills_its_worker_is_set_aside_and_the_others_are_finished(
    project: Project, undisturbed: Project
) -> None:
    command = ("ablate", "spec.toml", "--devices", "cpu,cpu", "--quiet")
    code, out, err = project.coar(*command, TINY_STORE="campaign.zarr", TINY_POISON="2", timeout=200)
    assert (code, out) == (3, ""), err
    computed = project.computed()
    assert 3 <= computed.pop(2) <= 4, "one worker may take it before the other's death is seen"
    assert computed == {block: 1 for block in range(BLOCKS) if block != 2}
    assert re.fullmatch(
        r"error: campaign.zarr: 1 of 8 blocks failed and were set aside; the others are finished.\n"
        r"  block 2, failed [34] times: The worker that computed it was killed by signal 9 \(SIGKILL\).\n"
        r"Remove the cause and run the same command again: it tries them anew.\n",
        err,
    )
    assert CampaignStore.open(project.store).missing_blocks() == [2]
    code, out, err = project.coar(*command)
    assert (code, out) == (0, "Complete: 40 rows x 9 examples in campaign.zarr\n"), err
    check(project, undisturbed)


def test_workers_that_cannot_even_start_are_given_up(project: Project) -> None:
    model = project.folder / "tiny_project.py"
    model.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    code, out, err = project.coar("ablate", "spec.toml", "--devices", "cpu,cpu", "--quiet", timeout=200)
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[0] == "error: campaign.zarr: the workers ended before all blocks were finished."
    assert "was killed by signal 9 (SIGKILL), 4 times. If memory ran out: fewer workers" in err
    assert lines[-1] == "Finished blocks stay: run the same command again to go on from here."
    assert project.processes(seconds=10) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_nothing_is_left_running_and_the_same_command_goes_on(
    project: Project, undisturbed: Project, number: signal.Signals
) -> None:
    command = ("ablate", "spec.toml", "--devices", "cpu,cpu", "--quiet")
    with project.start(*command, TINY_DELAY="0.08") as process:
        project.wait_for_workers(2)
        project.wait_for_blocks(1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "Traceback" not in err
        assert project.processes() == [], "a worker outlived the command"
    log = WorkLog(LocalStore(project.store))
    assert {record.state for record in log.workers()} == {"stopped"}
    assert log.failures() == {}
    before = CampaignStore.open(project.store).progress.finished_blocks
    assert 1 <= before < BLOCKS
    assert project.coar(*command, TINY_STORE="campaign.zarr")[0] == 0
    check(project, undisturbed)
    assert sum(project.computed().values()) == BLOCKS - before, "more than the unfinished blocks was computed"


def test_workers_end_when_the_command_that_started_them_is_killed(project: Project, undisturbed: Project) -> None:
    command = ("ablate", "spec.toml", "--devices", "cpu,cpu", "--quiet")
    with project.start(*command, TINY_DELAY="0.08") as process:
        project.wait_for_workers(2)
        kill(process.pid)
        process.wait(30)
        assert project.processes(seconds=20) == [], "workers without a master go on"
    assert project.coar(*command)[0] == 0
    check(project, undisturbed)


def test_a_worker_that_slept_past_its_lease_changes_nothing(project: Project, undisturbed: Project) -> None:
    """Stopped (as a laptop is closed) for longer than its lease, then woken up, while another has gone on."""
    options = ("ablate", "spec.toml", "--quiet", "--lease-seconds", "0.5")
    with project.start(*options, "--worker", "0/2", TINY_DELAY="0.08") as sleeper:
        [record] = project.wait_for_workers(1)
        os.kill(sleeper.pid, signal.SIGSTOP)
        with project.start(*options, "--worker", "1/2") as other:
            assert other.wait(120) == 0, "it waited for the sleeper for ever"
        finished = files(project.store)
        assert record.process.pid == sleeper.pid
        os.kill(sleeper.pid, signal.SIGCONT)
        assert sleeper.wait(60) == 0
    assert files(project.store) == finished
    check(project, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_of_two_killed_again_and_again(project: Project, undisturbed: Project) -> None:
    """Whenever two more blocks are finished, a worker that is at one is killed, until nearly all is done."""
    kills = 0
    with project.start("ablate", "spec.toml", "--devices", "cpu,cpu", "--quiet", TINY_DELAY="0.1") as process:
        deadline = time.monotonic() + 400
        for finished in range(1, BLOCKS - 1, 2):
            project.wait_for_blocks(finished, seconds=120)
            alive = set(project.processes())
            at_work = [r.process.pid for r in project.wait_for_workers(1) if r.process.pid in alive]
            if at_work and process.poll() is None:  # a lease of one that was killed lies there until it is taken over
                kill(at_work[0])
                kills += 1
        _, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    assert process.returncode == 0, err
    assert kills >= 2
    check(project, undisturbed)
