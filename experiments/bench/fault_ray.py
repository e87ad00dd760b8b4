"""The part of `experiments.bench.faults` that kills one of two Ray workers at a random moment of its work."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zarr.storage import LocalStore

from ablate.workers.on_ray import OBJECT_STORE, QUIET, RayPlan, run_on_ray
from ablate.workers.supervise import View
from experiments.bench import fault_victims
from stores import CampaignStore, WorkLog
from stores.blocks.blocks import Blocks
from stores.records import RUNNING

START_SECONDS = 60.0


def actor(store: str, log: str, number: int, count: int) -> tuple[int, str]:
    """Works on the campaign inside an actor; returns exit code and error."""
    fault_victims.work("campaign", store, log, f"{number}/{count}")
    return 0, ""


@contextmanager
def cluster() -> Iterator[None]:
    """Starts Ray on this machine for as long as it is entered; leaves nothing of it behind."""
    os.environ.update(QUIET)
    import ray

    folder = tempfile.mkdtemp(prefix="bench-", dir="/tmp")
    options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "_temp_dir": folder}
    options["logging_level"] = "ERROR"
    ray.init(address="local", num_cpus=2, num_gpus=0, log_to_driver=False, **options)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def run_and_kill(store: Path, log: Path, moments: random.Random, seconds: float) -> bool:
    """Runs the campaign by two actors, of which one is killed; returns whether it was, before all was finished."""
    killed: list[int] = []
    done = threading.Event()
    pause = moments.uniform(0.0, seconds)
    first = moments.random() < 0.5

    def kill() -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and not done.is_set() and len(_running(store)) < 2:
            time.sleep(0.01)
        if done.wait(pause):
            return
        running = _running(store)
        if running:
            killed.append(running[0 if first else -1])
            os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        task = functools.partial(actor, str(store), str(log))
        view = View(str(store), "ablate", "row", lambda: _open(store))
        run_on_ray(RayPlan(None, 2, gpus=0, threads=1), lambda threads, gpus: task, view, progress=False)
    finally:
        done.set()
        killer.join()
    return bool(killed)


def _running(store: Path) -> list[int]:
    """Returns the process ids of the workers at a store, in the order of their names."""
    if not (store / "zarr.json").exists():
        return []
    records = WorkLog(LocalStore(store, read_only=True)).workers()
    return [r.process.pid for r in records if r.state == RUNNING and not r.process.is_known_dead()]


def _open(store: Path) -> Blocks | None:
    return CampaignStore.open(store, mode="r+").blocks if (store / "zarr.json").exists() else None
