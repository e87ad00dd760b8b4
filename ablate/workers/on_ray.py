"""Workers on a Ray cluster: actors that load model and data once, then take blocks as every worker does.

Ray starts processes, gives them GPUs and tells when one is lost; blocks, leases and results lie in the store alone. An
actor has one call in flight for its whole life, so nothing piles up anywhere. Lost actors are started again from here,
not by Ray: Ray would try a block that kills its worker for ever.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.errors import FAILED, AblateError, SpecError
from ablate.workers.supervise import End, View, supervise

OBJECT_STORE = 100 * 2**20  # bytes; nothing but a few words goes through it
GET_SECONDS = 60.0  # for an answer that is there already
CONNECT_SECONDS = 10.0
# Without these, Ray writes a token into the home directory and reports its use to its makers.
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
THIS_MACHINE = "local"

Task = Callable[[int, int], tuple[int, str]]


class RayError(AblateError):
    """Ray is missing, cannot be reached, or has not what was asked for."""


@dataclass(frozen=True)
class RayPlan:
    """What to start on a cluster.

    Args:
      address: "local": a cluster of this machine, started for this run; else what `ray.init` takes: "auto",
        "host:port", "ray://host:port". None: the RAY_ADDRESS of the environment, or else local.
      workers: How many actors.
      gpus: Of each actor; parts of a GPU are possible. None: 1 if the cluster has any, else 0.
      threads: Of each actor; None: the cluster's cores divided among them.
    """

    address: str | None
    workers: int
    gpus: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.workers < 1:
            problems.append(f"workers: got {self.workers}, expected at least 1.")
        if self.gpus is not None and not self.gpus >= 0:
            problems.append(f"gpus_per_worker: got {self.gpus}, expected 0 or more.")
        if self.threads is not None and self.threads < 1:
            problems.append(f"threads: got {self.threads}, expected at least 1.")
        if problems:
            raise SpecError("Ray", problems)


def run_on_ray(
    plan: RayPlan,
    make_task: Callable[[int, float], Task],
    view: View,
    *,
    progress: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Starts actors on a Ray cluster that work until every block of the store is finished.

    Args:
      plan: Where, how many, and with what.
      make_task: Returns what an actor runs, given its threads and GPUs: a function that is imported on the nodes, or a
        `functools.partial` of one. It is called with (worker, workers) and returns exit code and error.
      view: The store they fill, as seen from here.
      progress: Show rows per second and time left on stderr.
      tell: Is told in a sentence what was started.

    Raises:
      RayError: Ray is not installed, cannot be reached, or has too few GPUs.
      stores.FailedBlocksError: Blocks were set aside; all others are finished.
      ablate.workers.supervise.WorkersError: All workers have ended, and blocks are left.
    """
    ray = _import_ray()
    with _connected(ray, plan.address) as where:
        resources = ray.cluster_resources()
        gpus = float(resources.get("GPU", 0) >= 1) if plan.gpus is None else plan.gpus
        have = resources.get("GPU", 0)
        if where == THIS_MACHINE and gpus * plan.workers > have:
            raise RayError(
                f"{plan.workers} workers with {gpus:g} GPUs each were asked for, this machine has {have:g}. Start "
                "fewer, or share GPUs: --gpus-per-worker 0.5."
            )
        threads = plan.threads or max(1, int(resources.get("CPU", 1)) // plan.workers)
        # An actor with a CPU to itself would hold it for life, and others might wait for one for ever.
        actor = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")(WorkerActor)
        task = make_task(threads, gpus)
        tell(f"{plan.workers} Ray workers ({where}); of each: threads {threads}, GPUs {gpus:g}")
        handles = [RayWorker(ray, actor, task, number, plan.workers) for number in range(plan.workers)]
        supervise(handles, view, progress=progress)


class WorkerActor:
    """What lives on a node of the cluster: one worker."""

    def process(self) -> tuple[str, int]:
        """Returns host and id of the process."""
        return socket.gethostname(), os.getpid()

    def work(self, task: Task, number: int, count: int) -> tuple[int, str]:
        """Works until nothing is left to do; returns exit code and error."""
        return task(number, count)


class RayWorker:
    """A worker that is an actor; a `WorkerHandle`."""

    def __init__(self, ray: Any, actor: Any, task: Task, number: int, count: int) -> None:
        self.name = f"worker {number}/{count}"
        self._ray, self._class, self._task, self._number, self._count = ray, actor, task, number, count
        self._actor: Any = None
        self._answer: Any = None
        self._process: tuple[str, int] | None = None
        self._stopped = False

    def start(self) -> None:
        """Asks for an actor; it begins to work when there is room for it on the cluster."""
        self._process, self._stopped = None, False
        self._actor = self._class.remote()
        self._answer = self._actor.process.remote()

    def poll(self) -> End | None:
        """Returns how it ended, None while it works or waits for room."""
        if self._actor is None:
            return End()
        ready, _ = self._ray.wait([self._answer], timeout=0)
        if not ready:
            return None
        try:
            found = self._ray.get(self._answer, timeout=GET_SECONDS)
        except self._ray.exceptions.RayActorError as error:
            return End(died=f"was lost ({_first_line(error)})")
        except self._ray.exceptions.RayError as error:
            return End(FAILED, f"{type(error).__name__}: {error}")
        if self._process is None:
            self._process = found
            if self._stopped:
                return End()
            self._answer = self._actor.work.remote(self._task, self._number, self._count)
            return None
        return End(*found)

    def process(self) -> tuple[str, int] | None:
        """Returns host and id of the actor's process, once it runs."""
        return self._process

    def stop(self) -> None:
        """Ends the actor: what it was computing is lost, and nothing else. `poll` says when it is gone."""
        if self._actor is not None and not self._stopped:
            self._ray.kill(self._actor, no_restart=True)
            self._stopped = True

    def kill(self) -> None:
        """Ends the actor if there is one."""
        self.stop()
        self._actor = self._answer = None


def _import_ray() -> Any:
    os_names = {**QUIET, **os.environ}
    with _environment({name: os_names[name] for name in QUIET}):
        try:
            import ray
            import ray.exceptions
        except ImportError as error:
            raise RayError(
                f"--ray needs the package ray, which cannot be imported ({error}). Install it: "
                "pip install 'component-attribution[ray]'."
            ) from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[str]:
    """Connects to a cluster, or starts one of this machine; leaves nothing of it behind."""
    if ray.is_initialized():  # by whoever called: theirs to shut down
        yield "the cluster that is connected"
        return
    chosen = address or os.environ.get("RAY_ADDRESS") or THIS_MACHINE
    environment = {name: os.environ.get(name, value) for name, value in QUIET.items()}
    local = chosen == THIS_MACHINE
    folder = tempfile.mkdtemp(prefix="coar-ray-", dir=_short_folder()) if local else None
    options: dict[str, Any] = {"address": chosen, "log_to_driver": False, "logging_level": "ERROR"}
    if local:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "_temp_dir": folder}
    try:
        with _environment(environment):
            try:
                _require_listening(chosen)
                ray.init(**options)
            except Exception as error:
                raise RayError(
                    f"The Ray cluster {chosen!r} cannot be reached or started: {_first_line(error)} Check the address, "
                    "or leave it out to start Ray on this machine."
                ) from error
            yield chosen
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _require_listening(address: str) -> None:
    """Raises OSError if nobody listens at an address of a host and a port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _short_folder() -> str | None:
    """Returns a folder with a short name: Ray makes sockets below it, whose paths have at most 107 characters."""
    return "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - mkdtemp makes a folder of our own in it


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables, for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
