"""Having a command done by others: processes of this machine, Ray actors, or a Slurm job array."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import typer

from ablate.campaign.spec import CampaignSpec
from ablate.errors import SpecError
from ablate.workers.on_ray import RayPlan, Task, run_on_ray
from ablate.workers.on_slurm import SlurmJob, make_job, parse_slurm, python_command, submit
from ablate.workers.processes import ChildProcess, thread_variables
from ablate.workers.shares import choose_devices, share_threads
from ablate.workers.supervise import View, WorkersError, supervise
from coar.cli.common import say
from coar.cli.workers.flags import WorkerFlags
from coar.cli.workers.on_node import run_command_here
from stores import AttributionStore, CampaignStore, StoreNotFoundError
from stores.blocks.blocks import Blocks
from stores.storage.places import user_path
from stores.work.worklog import WorkLog

Opener = Callable[[CampaignSpec, str], CampaignStore | AttributionStore]


class Outcome(Enum):
    """What became of a command that others may do."""

    HERE = "to be done by this process"
    DONE = "done by others"
    SUBMITTED = "to be done by others, some time"


@dataclass(frozen=True)
class Spread:
    """A command that is to be done by others.

    Args:
      flags: Who does it, and where.
      command: The command line, without what is about workers.
      path: The spec's file.
      spec: What is in it.
      store: Where the work is stored, as users know it.
      opened: Opens the store for writing; raises StoreNotFoundError while there is none.
      name: What the progress says.
      unit: What the rows of the store are: "row" or "example".
      progress: Show rows per second and time left on stderr.
    """

    flags: WorkerFlags
    command: tuple[str, ...]
    path: Path
    spec: CampaignSpec
    store: str
    opened: Opener
    name: str
    unit: str
    progress: bool

    def run(self) -> Outcome:
        """Returns when the work is done or submitted, or is left to this process, as nothing of it is left."""
        if self.store.startswith("memory:"):
            raise SpecError("Workers", [f"store: {self.store} is seen by one process only. Name a path or a URL."])
        if "--overwrite" in self.command:
            raise SpecError(
                "Workers",
                ["--overwrite: given beside several workers, which would remove each other's work. Remove the store "
                 "first, or name another one."],
            )  # fmt: skip
        if self.flags.slurm_print:
            return self._print()
        blocks = self.blocks()
        if blocks is not None and blocks.finished().all():
            return Outcome.HERE  # which checks that it is this campaign's
        try:
            return self._run(blocks)
        except WorkersError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.code) from error

    def blocks(self) -> Blocks | None:
        """Returns the blocks of the store, None while there is none."""
        try:
            return self.opened(self.spec, self.store).blocks
        except StoreNotFoundError:
            return None

    def _run(self, blocks: Blocks | None) -> Outcome:
        retry = self.flags.retry_failed is not False
        if retry and blocks is not None:
            WorkLog(blocks.store).clear_failures()
        if self.flags.slurm is not None:
            return self._submit()
        view = View(self.store, self.name, self.unit, self.blocks)
        if self.flags.ray is not None:
            plan = RayPlan(
                self.flags.ray or None, self.flags.workers or 1, self.flags.gpus_per_worker, self.flags.threads
            )
            run_on_ray(plan, self._ray_task, view, progress=self.progress, tell=self._tell)
            return Outcome.DONE
        devices = choose_devices(self.flags.devices, self.flags.workers)
        threads = share_threads(len(devices), self.flags.threads)
        names = ", ".join(device or self.spec.settings.device for device in devices)
        self._tell(f"{len(devices)} processes ({names}), threads of each: {threads}")
        handles = [
            ChildProcess(
                f"worker {i}/{len(devices)} ({device or self.spec.settings.device})",
                [*self._worker_command(), f"--worker={i}/{len(devices)}", "--tied"]
                + ([] if device is None else [f"--device={device}"]),
                thread_variables(threads),
            )
            for i, device in enumerate(devices)
        ]
        supervise(handles, view, progress=self.progress)
        return Outcome.DONE

    def _tell(self, text: str) -> None:
        if self.progress:
            typer.echo(f"{self.store}: {text}", err=True)

    def _worker_command(self) -> list[str]:
        return [*python_command(), *self.command, "--no-retry-failed", "--quiet"]

    def _ray_task(self, threads: int, gpus: float) -> Task:
        """Returns what an actor runs: the same command, in its own process."""
        device = self.spec.settings.device
        if gpus == 0 and device.startswith("cuda"):
            raise SpecError("Ray", [f"device: the spec says {device!r}, but actors get no GPU: --gpus-per-worker."])
        if gpus or device == "auto":
            device = "cuda" if gpus else "cpu"
        words = [*self.command, "--no-retry-failed", "--quiet", f"--device={device}"]
        text = self.path.read_text(encoding="utf-8")
        return functools.partial(run_command_here, words, str(self.path), text, str(Path.cwd()), threads)

    def _job(self) -> SlurmJob:
        command = [*python_command(), *self.command, "--no-retry-failed"]
        folder = self.flags.slurm_folder or _folder_beside(self.store)
        options = parse_slurm(self.flags.slurm or [])
        return make_job(command, options, folder, f"coar-{self.command[0]}", self.flags.workers)

    def _print(self) -> Outcome:
        file = self._job().write()
        say(f"{file} (written, not submitted):\n{file.read_text(encoding='utf-8')}")
        return Outcome.SUBMITTED

    def _submit(self) -> Outcome:
        job = self._job()
        array, file = submit(job)
        say(
            f"{file}:\n{file.read_text(encoding='utf-8')}\nSubmitted as Slurm job array {array}: {job.workers} workers "
            f"on {self.store}. `coar status {self.store}` tells how far it is; logs are in {job.folder}."
        )
        return Outcome.SUBMITTED


def open_campaign(spec: CampaignSpec, place: str) -> CampaignStore:
    """Returns the campaign store of a spec, open for writing."""
    return CampaignStore.open(spec.place(place) or place, mode="r+")


def open_estimate(spec: CampaignSpec, place: str) -> AttributionStore:
    """Returns the attribution store of a spec's estimate, open for writing."""
    return AttributionStore.open(spec.place(place) or place, finish=True)


def _folder_beside(store: str) -> Path:
    """Returns the folder for what Slurm needs and leaves: beside a local store, in the working directory for others."""
    plain = store.rstrip("/").removesuffix(".zarr")
    if "://" in store:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", plain.partition("://")[2]).strip("-.") or "coar"
    return user_path(f"{plain}.slurm")
