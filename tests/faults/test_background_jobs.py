"""Commands that a shell started in the background, with signals ignored, end in order when they are told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from zarr.storage import LocalStore

from stores import CampaignStore
from stores.work.worklog import WorkLog
from tests.signals import default_signals
from tests.worker_project import BLOCKS, Project

IN_BACKGROUND = """trap "" TERM; "$@" & wait $!"""  # without job control a job ignores interrupts; here SIGTERM, too
pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_background_job_hears_that_it_should_end(tmp_path: Path, number: signal.Signals) -> None:
    project = Project(tmp_path)
    command = [sys.executable, "-m", "coar", "ablate", "spec.toml", "--quiet"]
    with subprocess.Popen(
        ["sh", "-c", IN_BACKGROUND, "sh", *command], cwd=tmp_path, env=project.environment(TINY_DELAY="0.15")
    ) as shell:
        try:
            [record] = project.wait_for_workers(1)
            project.wait_for_blocks(1)
            os.kill(record.process.pid, number)
            assert shell.wait(30) == 128 + number
        finally:
            for pid in project.processes():
                os.kill(pid, signal.SIGKILL)
    assert {record.state for record in WorkLog(LocalStore(project.store)).workers()} == {"stopped"}
    assert 1 <= CampaignStore.open(project.store).progress.finished_blocks < BLOCKS


def test_tests_start_commands_that_hear_signals() -> None:
    """What `Project` relies on, where the tests themselves run in the background."""
    program = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with default_signals():
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.stdout == "False\n"
