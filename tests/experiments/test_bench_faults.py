"""The soak command as a user gives it: twenty kills, every store equal to one that was never killed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest


def _alive(group: int) -> list[int]:
    """Returns the ids of the living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(600)
def test_twenty_kills_change_no_bit() -> None:
    command = [sys.executable, "-W", "error", "-m", "experiments.bench.faults", "--kills", "20", "--seed", "7"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        out, err = process.communicate(timeout=540)
        group = process.pid
    assert (process.returncode, err) == (0, ""), out + err
    rows = re.findall(r"^\| (campaign|estimate|two workers) \| (\d+) \|.* (\d+) of (\d+) \|$", out, re.MULTILINE)
    assert [(name, int(kills)) for name, kills, _, _ in rows] == [("campaign", 8), ("estimate", 6), ("two workers", 6)]
    assert all(equal == stores for _, _, equal, stores in rows)
    end = time.monotonic() + 20
    while _alive(group) and time.monotonic() < end:  # the one that all were forked from ends after its parent
        time.sleep(0.1)
    assert _alive(group) == []
