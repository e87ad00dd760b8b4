"""A small campaign to kill, damage and resume, and what an undisturbed run of it stores."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ablate
from stores import CampaignStore

VICTIM = Path(__file__).with_name("victim.py")
SmallSpec = Callable[..., ablate.CampaignSpec]


class Victim:
    """Runs the small campaign in processes of their own, one at a time; see `victim.serve`."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server
        self.pid = 0

    def start(self, store: Path, delay: float = 0.0, point: str = "") -> None:
        """Starts a process that runs the campaign into `store`."""
        assert self._server.stdin is not None
        job = {"store": str(store), "threads": torch.get_num_threads(), "delay": delay, "point": point}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        self.pid = self._read()

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Returns the exit code when the process has ended; -9 if it was killed."""
        return self._read()

    def _read(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


@pytest.fixture(scope="session")
def victim() -> Iterator[Victim]:
    """A program that runs the small campaign in processes that may be killed."""
    command = [sys.executable, "-W", "error", str(VICTIM)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield Victim(server)
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(30) == 0


@pytest.fixture(scope="session")
def small_spec() -> SmallSpec:
    """`small_spec(**changes)`: 10 components, 40 keep rows in 5 blocks of 7 and one of 5, 9 examples."""
    make: SmallSpec = runpy.run_path(str(VICTIM))["small_spec"]
    return make


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_spec: SmallSpec) -> Path:
    """The finished store of the small campaign. Not to be changed."""
    path = tmp_path_factory.mktemp("undisturbed") / "campaign.zarr"
    ablate.run(small_spec(), path, progress=False)
    return path


@pytest.fixture
def finished(tmp_path: Path, undisturbed: Path) -> CampaignStore:
    """A copy of the finished store, to damage."""
    shutil.copytree(undisturbed, tmp_path / "campaign.zarr")
    return CampaignStore.open(tmp_path / "campaign.zarr")


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, bytes]]:
    """`files(path)`: every file of a store with its bytes, without book-keeping and what a killed write leaves."""

    def read(path: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
        return {n: data for n, data in found.items() if not (n.endswith(".partial") or n.startswith("work/"))}

    return read


@pytest.fixture(scope="session")
def unfinish() -> Callable[..., None]:
    """`unfinish(path, blocks)` deletes the marks of these blocks: they were never finished."""

    def delete(path: Path, blocks: Any) -> None:
        for block in blocks:
            (path / "ledger" / "c" / str(block) / "0").unlink()

    return delete
