"""The options of a command that several workers may do: who works on a store, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ablate.errors import SpecError
from ablate.work.loop import parse_worker
from ablate.workers.shares import choose_devices
from stores.records import LEASE_SECONDS

ONE = "As one worker of several"
HERE = "Several workers on this machine"
RAY = "Workers on a Ray cluster"
SLURM = "Workers by Slurm"


@dataclass(frozen=True)
class WorkerFlags:
    """Who works on a store, and where. All workers of one store do the same, and may come and go."""

    worker: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Work as worker I of N (I from 0) beside others that were started by hand or by a scheduler. It only "
            "says where to begin; in the end each takes what is left.",
            rich_help_panel=ONE,
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1; default: the spec's.", rich_help_panel=ONE)
    ] = None
    lease_seconds: Annotated[
        float,
        typer.Option(
            help="After so long without a sign of life another worker's block is taken over.", rich_help_panel=ONE
        ),
    ] = LEASE_SECONDS
    retry_failed: Annotated[
        bool | None,
        typer.Option(
            "--retry-failed/--no-retry-failed",
            help="Try blocks anew that an earlier run set aside; default: yes, but of workers with a name only I = 0.",
            rich_help_panel=ONE,
        ),
    ] = None
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="all|D,D,...",
            help="A process per device: all, or names such as cuda:0,cuda:1 or cpu,cpu.",
            rich_help_panel=HERE,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="How many workers: processes, Ray actors, or Slurm tasks.", rich_help_panel=HERE
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Threads of each worker; default: the cores, divided among them.", rich_help_panel=HERE
        ),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Actors on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; without an address that of RAY_ADDRESS, "
            "or a Ray that is started on this machine for this run.",
            rich_help_panel=RAY,
        ),
    ] = None
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(help="GPUs of each actor, e.g. 1 or 0.5; default: 1 if there are any.", rich_help_panel=RAY),
    ] = None
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="Submit a job array: workers=8 and options of sbatch by their long names, e.g. "
            "workers=8,partition=gpu,time=4:00:00,gpus=1. exclusive=yes is a flag; at-once=4 runs 4 at a time; "
            "via=sbatch or submitit. May be repeated.",
            rich_help_panel=SLURM,
        ),
    ] = None
    slurm_folder: Annotated[
        Path | None,
        typer.Option(help="Where its file and logs go; default: beside the store.", rich_help_panel=SLURM),
    ] = None
    slurm_print: Annotated[
        bool, typer.Option("--slurm-print", help="Write and print the file, submit nothing.", rich_help_panel=SLURM)
    ] = False
    requeue: Annotated[
        bool,
        typer.Option(
            "--requeue",
            help="In a Slurm job: on SIGUSR1 (time is nearly up), go back into the queue.",
            rich_help_panel=SLURM,
        ),
    ] = False
    tied: Annotated[bool, typer.Option("--tied", hidden=True)] = False

    def __post_init__(self) -> None:
        problems = []
        where = [name for name in ("devices", "ray", "slurm") if getattr(self, name) is not None]
        named = [f"--{name}" for name in where]
        if len(named) > 1:
            problems.append(f"{' and '.join(named)}: given together. Give one of them.")
        if self.worker is not None and (named or self.workers is not None):
            problems.append("--worker: given beside several workers. Give it to start one of them by hand.")
        if self.device is not None and (named or self.workers is not None):
            problems.append("--device: given beside several workers. Use --devices.")
        if self.slurm_print and self.slurm is None:
            problems.append("--slurm-print: given without --slurm.")
        if self.gpus_per_worker is not None and self.ray is None:
            problems.append("--gpus-per-worker: given without --ray. On this machine use --devices.")
        if self.ray is not None and self.workers is None:
            problems.append("--workers: missing beside --ray. Give how many actors to start.")
        if problems:
            raise SpecError("Workers", problems)
        if self.worker is not None:
            parse_worker(self.worker)

    @property
    def sharing(self) -> dict[str, Any]:
        """Returns the arguments of `ablate.run` and `coar.estimate` that say how one process works beside others."""
        return {
            "worker": self.worker,
            "lease_seconds": self.lease_seconds,
            "keep_going": True,
            "retry_failed": self.retry_failed,
        }

    @property
    def several(self) -> bool:
        """Whether other processes are to be started to do the work."""
        if self.ray is not None or self.slurm is not None:
            return True
        return len(choose_devices(self.devices, self.workers)) > 1
