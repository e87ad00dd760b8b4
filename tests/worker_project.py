"""A folder as a user has it, with a spec, a model and data, for tests that start the command line in processes.

The model sleeps, writes down which blocks it is run for, and kills its process, as the environment asks:
  TINY_DELAY   seconds that every forward takes longer
  TINY_STORE   the store, whose leases say at which block this process is: noted in `computed.log`
  TINY_POISON  the block at which the process is killed, every time
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from stores.records import WorkerRecord
from stores.work.worklog import WorkLog
from tests import forking

MODEL = """
import json, os, signal, time
import torch
from torch import nn

def _block(store):
    folder = os.path.join(store, "work", "leases")
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            with open(os.path.join(folder, name)) as file:
                lease = json.load(file)
        except (OSError, ValueError):
            continue
        if f"-{os.getpid()}-" in lease["worker"]:
            return lease["block"]

class Note:
    last = None
    def __call__(self, module, inputs):
        time.sleep(float(os.environ.get("TINY_DELAY", "0")))
        store = os.environ.get("TINY_STORE")
        block = None if store is None else _block(store)
        if block is None:
            return
        if block != Note.last:
            Note.last = block
            with open("computed.log", "a") as file:
                file.write(f"{os.getpid()} {block}\\n")
        if os.environ.get("TINY_POISON") == str(block):
            os.kill(os.getpid(), signal.SIGKILL)

def net():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    model.register_forward_pre_hook(Note())
    return model.eval()
"""

SPEC = """
rows = 40
passes = 6
ablate_fraction = 0.3
seed = 5
block_rows = 5
store = "campaign.zarr"

[model]
source = "factory"
factory = "tiny_project:net"

[data]
source = "arrays"
path = "data.npz"
"""
BLOCKS = 8


class Project:
    """The folder; processes that are started in it, and the stores they fill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tiny_project.py").write_text(MODEL)
        (folder / "spec.toml").write_text(SPEC)
        inputs = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()
        np.savez(folder / "data.npz", inputs=inputs, targets=[0, 1, 2] * 3, ids=[f"cat-{i}" for i in range(9)])

    @property
    def store(self) -> Path:
        """Where the campaign goes."""
        return self.folder / "campaign.zarr"

    def environment(self, **more: str) -> dict[str, str]:
        """Returns the variables of a process here; TINY_PROJECT is what tells the processes of one test from others."""
        return {**os.environ, "TINY_PROJECT": str(self.folder), "PYTHONUNBUFFERED": "1", **more}

    def coar(self, *words: object, timeout: float = 120, **environment: str) -> tuple[int, str, str]:
        """Runs the command line in the folder; returns exit code, stdout and stderr."""
        with self.start(*words, **environment) as process:
            out, err = process.communicate(timeout=timeout)
            return process.wait(), out, err

    @contextmanager
    def start(self, *words: object, **environment: str) -> Iterator[forking.Told]:
        """Starts the command line in the folder; whatever happens, no process of it is left in the end."""
        tag = uuid.uuid4().hex
        variables = self.environment(TINY_START=tag, **environment)
        process = forking.start("-m", "coar", *words, cwd=self.folder, environment=variables)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for pid in _processes(f"TINY_START={tag}"):
                os.kill(pid, signal.SIGKILL)

    def processes(self, seconds: float = 0.0) -> list[int]:
        """Returns the processes that were started here and live; waits so long at most for them to end."""
        deadline = time.monotonic() + seconds
        while (found := _processes(f"TINY_PROJECT={self.folder}")) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def wait_for_blocks(self, count: int, store: Path | None = None, seconds: float = 60) -> None:
        """Waits until so many blocks are finished."""
        marks = (store or self.store) / "ledger" / "c"
        deadline = time.monotonic() + seconds
        while len(list(marks.glob("*/0"))) < count:
            assert time.monotonic() < deadline, f"{count} blocks were not finished in time"
            time.sleep(0.01)

    def wait_for_workers(self, count: int, store: Path | None = None, seconds: float = 60) -> list[WorkerRecord]:
        """Waits until so many workers are at a block, and returns their records."""
        from zarr.storage import LocalStore

        log = WorkLog(LocalStore(store or self.store))
        deadline = time.monotonic() + seconds
        while True:
            holders = {lease.worker for lease in log.leases().values()}
            found = [record for record in log.workers() if record.id in holders]
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, f"{count} workers were not seen at work in time"
            time.sleep(0.01)

    def computed(self) -> Counter[int]:
        """Returns how often each block was begun, where TINY_STORE was set."""
        lines = (self.folder / "computed.log").read_text().splitlines()
        return Counter(int(line.split()[1]) for line in lines)


def _processes(variable: str) -> list[int]:
    """Returns the processes that were given a variable: forked ones, and others."""

    def has_it(pid: int) -> bool:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return pid != os.getpid() and variable.encode() in variables and state not in "ZX"

    others = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if has_it(pid)]
    return forking.alive(variable) + others


def files(path: Path) -> dict[str, bytes]:
    """Returns every file of a store with its bytes, without book-keeping and what a killed write leaves."""
    found = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {str(name): data for name, data in found.items() if name.parts[0] != "work" and name.suffix != ".partial"}
