"""Workers as a Slurm job array: the file for sbatch, and submitting it, by sbatch itself or by submitit.

Tasks of the array have nothing in common but the store. Any number may wait, run, be preempted or start again; each
takes blocks that nobody has finished.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ablate.errors import AblateError, SpecError, nearest

SIGNAL_SECONDS = 90  # before the time is up, the worker is told
OURS = ("workers", "at-once", "via")
VIA = ("submitit", "sbatch")
TAKEN = {"array": "workers=8 and at-once=4 make it", "wrap": "the file says what is run"}
TASK = "$SLURM_ARRAY_TASK_ID"
_NEXT = re.compile(r",(?=\s*[A-Za-z][A-Za-z0-9_-]*=)")  # a comma within a value is followed by no name=
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_COMMON = (
    *("partition", "time", "gpus", "gres", "mem", "cpus-per-task", "account", "qos", "constraint", "nodelist"),
    *(
        "exclude",
        "requeue",
        "signal",
        "job-name",
        "output",
        "mail-type",
        "mail-user",
        "nice",
        "reservation",
        "exclusive",
    ),
)


class SlurmError(AblateError):
    """Slurm is missing or does not take the job."""


@dataclass(frozen=True)
class SlurmJob:
    """A job array that works on a store.

    Args:
      command: What every task runs, without the name of the worker.
      workers: How many tasks.
      folder: Where the file, the logs and what submitit keeps go.
      name: Of the job.
      options: Of sbatch, by their long names; True: a flag, False: left out, also where there is a default.
      at_once: How many tasks run at the same time at most; None: all.
      via: "submitit" or "sbatch"; None: submitit where it is installed.
    """

    command: tuple[str, ...]
    workers: int
    folder: Path
    name: str
    options: Mapping[str, str | bool] = field(default_factory=dict)
    at_once: int | None = None
    via: str | None = None

    @property
    def file(self) -> Path:
        """Where the file for sbatch is written."""
        return self.folder / "job.sbatch"

    def all_options(self) -> dict[str, str | bool]:
        """Returns the options of sbatch with the defaults: started again after preemption, told before time is up."""
        throttle = "" if self.at_once is None else f"%{self.at_once}"
        defaults: dict[str, str | bool] = {
            "job-name": self.name,
            "array": f"0-{self.workers - 1}{throttle}",
            "output": str(self.folder.absolute() / "%A_%a.log"),
            "open-mode": "append",
            "requeue": True,
            "signal": f"B:USR1@{SIGNAL_SECONDS}",
            "chdir": str(Path.cwd()),
        }
        return {**defaults, **self.options}

    def text(self) -> str:
        """Returns the file for sbatch."""
        note = "# Each task takes blocks that nobody has finished: any number may run, end, start again."
        lines = ["#!/bin/bash", note]
        for name, value in self.all_options().items():
            if value is True:
                lines.append(f"#SBATCH --{name}")
            elif value is not False:
                lines.append(f"#SBATCH --{name}={shlex.quote(str(value))}")
        lines += [
            'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
            "# exec: Slurm's signals reach the worker, and no shell can die and leave it behind.",
            f'exec {shlex.join(self.command)} --worker "{TASK}/{self.workers}" --requeue',
        ]
        return "\n".join(lines) + "\n"

    def write(self) -> Path:
        """Writes the file for sbatch and returns its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(self.text(), encoding="utf-8")
        return self.file


def parse_slurm(texts: Sequence[str]) -> dict[str, str | bool]:
    """Returns options as "workers=8,partition=gpu,nodelist=n1,n2" gives them; `_` in a name is `-`.

    A comma begins the next option where `name=` follows it. `exclusive=yes` is the flag --exclusive, `requeue=no`
    leaves a default out.

    Raises:
      SpecError: With all problems.
    """
    problems: list[str] = []
    found: dict[str, str | bool] = {}
    for piece in (piece.strip() for text in texts for piece in _NEXT.split(text)):
        given, equals, value = piece.partition("=")
        name = given.strip().lower().replace("_", "-").removeprefix("--")
        if not equals or not _NAME.fullmatch(name) or not value:
            problems.append(f"{piece!r}: expected name=value, for example partition=gpu, or exclusive=yes for a flag.")
        elif "\n" in value or "\r" in value:
            problems.append(f"{name}: {value!r} has a line break, expected one line.")
        elif name in TAKEN:
            problems.append(f"{name}: not for you to give: {TAKEN[name]}.")
        elif name in found:
            problems.append(f"{name}: given twice. Give it once.")
        else:
            found[name] = {"yes": True, "no": False}.get(value, value)
    for name in ("workers", "at-once"):
        value_ = found.get(name, "1")
        if not (isinstance(value_, str) and value_.isdecimal() and int(value_) > 0):
            problems.append(f"{name}: got {value_!r}, expected a number from 1 on.")
    if found.get("via", VIA[0]) not in VIA:
        problems.append(f"via: got {found['via']!r}, expected one of {', '.join(VIA)}.")
    if problems:
        raise SpecError("--slurm", problems)
    return found


def make_job(
    command: Sequence[str], options: Mapping[str, str | bool], folder: Path, name: str, workers: int | None = None
) -> SlurmJob:
    """Returns the job of parsed options; `workers` is how many are asked for elsewhere."""
    asked = int(options["workers"]) if "workers" in options else workers
    if asked is None:
        raise SpecError("--slurm", ["workers: missing. Give how many tasks the array has, for example workers=8."])
    if workers is not None and asked != workers:
        raise SpecError("--slurm", [f"workers: got {asked} here and {workers} with --workers. Give it once."])
    return SlurmJob(
        tuple(command),
        asked,
        folder,
        name,
        {key: value for key, value in options.items() if key not in OURS},
        int(options["at-once"]) if "at-once" in options else None,
        str(options["via"]) if "via" in options else None,
    )


def submit(job: SlurmJob) -> tuple[str, Path]:
    """Submits a job array and returns its id and the file that was submitted.

    By submitit, where it is installed and the job does not say otherwise, which writes a file of its own and keeps the
    tasks' logs and ends in the job's folder.

    Raises:
      SlurmError: There is no sbatch, or it does not take the job.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "sbatch was not found: this is no machine from which Slurm jobs are submitted. Run the same command on a "
            "login node of the cluster, or only write the file: --slurm-print."
        )
    if job.via == "submitit" or (job.via is None and find_spec("submitit") is not None):
        jobs = submit_by_submitit(job)
        array = str(jobs[0].job_id).partition("_")[0]
        return array, Path(jobs[0].paths.submission_file)
    file = job.write()
    done = subprocess.run(  # noqa: S603 - the file is our own
        [shutil.which("sbatch") or "sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SlurmError(_refused(done.stderr.strip(), job))
    return done.stdout.strip().partition(";")[0], file


def _refused(message: str, job: SlurmJob) -> str:
    hints = [
        f"{name!r}: did you mean {close[0]!r}?"
        for name in job.options
        if name not in _COMMON and (close := nearest(name, _COMMON))
    ]
    return " ".join([f"sbatch does not take {job.file}: {message}", *hints])


def submit_by_submitit(job: SlurmJob, cluster: str = "slurm") -> list[Any]:
    """Submits the tasks through submitit and returns its jobs; cluster "local" runs them as processes, without Slurm.

    Raises:
      SlurmError: submitit is not installed, or sbatch does not take the job.
    """
    try:
        import submitit
    except ImportError as error:
        raise SlurmError(
            f"via=submitit needs the package submitit, which cannot be imported ({error}). Install it: "
            "pip install 'component-attribution[slurm]', or say via=sbatch."
        ) from error
    skipped = ("array", "output", "open-mode", "signal", "chdir", "job-name")  # submitit has its own
    options = {name: value for name, value in job.all_options().items() if name in job.options or name not in skipped}
    job.folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=str(job.folder.absolute()), cluster=cluster)
    executor.update_parameters(name=job.name)
    if cluster == "slurm":
        executor.update_parameters(
            slurm_array_parallelism=job.at_once or job.workers,
            slurm_signal_delay_s=SIGNAL_SECONDS,
            slurm_additional_parameters={name: value for name, value in options.items() if value is not False},
        )
    task = Task(job.command, job.workers, str(Path.cwd()))
    try:
        return list(executor.map_array(task, range(job.workers)))
    except submitit.core.utils.FailedJobError as error:
        raise SlurmError(_refused(str(error), job)) from error


class Task:
    """What a task that submitit starts does: it runs the command, and begins anew when its time is up."""

    def __init__(self, command: Sequence[str], workers: int, folder: str) -> None:
        self.command, self.workers, self.folder = list(command), workers, folder
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int) -> int:
        """Runs worker `number` and returns exit code 0; raises what else it ended with."""
        threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        command = [*self.command, "--worker", f"{number}/{self.workers}", "--tied"]
        with subprocess.Popen(  # noqa: S603 - the command is our own
            command, cwd=self.folder, env={**os.environ, "OMP_NUM_THREADS": threads}, stdin=subprocess.PIPE
        ) as process:
            self._process = process
            while (code := process.poll()) is None:  # `wait` would hold a lock that `checkpoint` needs
                time.sleep(0.2)
        if code:
            raise SlurmError(f"Worker {number}/{self.workers} ended with exit code {code}; its log says why.")
        return code

    def checkpoint(self, number: int) -> Any:
        """Ends the command in order and returns what submitit puts back into the queue."""
        import submitit

        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + SIGNAL_SECONDS / 2
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(Task(self.command, self.workers, self.folder), number)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: all but a process."""
        return {**vars(self), "_process": None}


def requeue() -> None:
    """Puts the Slurm job in which this process runs back into the queue; it begins anew when there is room.

    Raises:
      SlurmError: This is no Slurm job, or Slurm refuses.
    """
    job = os.environ.get("SLURM_JOB_ID")
    program = shutil.which("scontrol")
    if job is None or program is None:
        raise SlurmError("--requeue: this process is not in a Slurm job (SLURM_JOB_ID or scontrol is missing).")
    done = subprocess.run(  # noqa: S603 - our own job
        [program, "requeue", job], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SlurmError(f"Slurm did not put job {job} back into the queue: {done.stderr.strip()}")


def python_command() -> list[str]:
    """Returns what starts the command line with this Python, wherever it runs."""
    return [sys.executable, "-m", "coar"]
