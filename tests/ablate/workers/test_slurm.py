"""Slurm: the options, the file for sbatch, and job arrays on a real Slurm of one node where it is installed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ablate.errors import SpecError
from ablate.workers import on_slurm as slurm
from ablate.workers.on_slurm import SlurmError, SlurmJob, Task, make_job, parse_slurm, submit, submit_by_submitit
from tests.worker_project import Project, files

PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
COMMAND = ("/opt/python", "-m", "coar", "ablate", "my spec.toml", "--no-retry-failed")


def test_options() -> None:
    texts = ["workers=8,partition=gpu,time=4:00:00,gpus=1"]
    texts += ["nodelist=n1,n2,Mail_Type=END,FAIL , exclusive=yes,requeue=no"]
    assert parse_slurm(texts) == {
        "workers": "8",
        "partition": "gpu",
        "time": "4:00:00",
        "gpus": "1",
        "nodelist": "n1,n2",
        "mail-type": "END,FAIL",
        "exclusive": True,
        "requeue": False,
    }


def test_options_that_are_wrong_all_at_once() -> None:
    with pytest.raises(SpecError) as raised:
        parse_slurm(["=3", "gpu,workers=0,array=0-3,time=", "qos=a,qos=b,via=ssh,at-once=x,comment=a\nb"])
    assert str(raised.value) == (
        "--slurm: 9 problems\n"
        "  1. '=3': expected name=value, for example partition=gpu, or exclusive=yes for a flag.\n"
        "  2. 'gpu': expected name=value, for example partition=gpu, or exclusive=yes for a flag.\n"
        "  3. array: not for you to give: workers=8 and at-once=4 make it.\n"
        "  4. 'time=': expected name=value, for example partition=gpu, or exclusive=yes for a flag.\n"
        "  5. qos: given twice. Give it once.\n"
        "  6. comment: 'a\\nb' has a line break, expected one line.\n"
        "  7. workers: got '0', expected a number from 1 on.\n"
        "  8. at-once: got 'x', expected a number from 1 on.\n"
        "  9. via: got 'ssh', expected one of submitit, sbatch."
    )


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        ({}, None, "workers: missing. Give how many tasks the array has, for example workers=8."),
        ({"workers": "8"}, 4, "workers: got 8 here and 4 with --workers. Give it once."),
    ],
)
def test_how_many_workers(options: dict[str, str], workers: int | None, message: str) -> None:
    with pytest.raises(SpecError, match="1 problem") as raised:
        make_job(COMMAND, options, Path("f"), "coar-ablate", workers)
    assert str(raised.value) == f"--slurm: 1 problem\n  1. {message}"


def test_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse_slurm(["workers=8,at-once=4,partition=gpu,exclusive=yes,requeue=no,comment=it's mine"])
    job = make_job(COMMAND, options, Path("runs/a.slurm"), "coar-ablate")
    assert job.write() == Path("runs/a.slurm/job.sbatch")
    assert job.file.read_text() == (
        "#!/bin/bash\n"
        "# Each task takes blocks that nobody has finished: any number may run, end, start again.\n"
        "#SBATCH --job-name=coar-ablate\n"
        "#SBATCH --array=0-7%4\n"
        f"#SBATCH --output={tmp_path}/runs/a.slurm/%A_%a.log\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --signal=B:USR1@90\n"
        f"#SBATCH --chdir={tmp_path}\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --exclusive\n"
        "#SBATCH --comment='it'\"'\"'s mine'\n"
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"\n'
        "# exec: Slurm's signals reach the worker, and no shell can die and leave it behind.\n"
        "exec /opt/python -m coar ablate 'my spec.toml' --no-retry-failed "
        '--worker "$SLURM_ARRAY_TASK_ID/8" --requeue\n'
    )
    subprocess.run(["bash", "-n", str(job.file)], check=True)


def test_without_sbatch_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError) as raised:
        submit(SlurmJob(COMMAND, 2, tmp_path / "a.slurm", "coar-ablate"))
    assert str(raised.value) == (
        "sbatch was not found: this is no machine from which Slurm jobs are submitted. Run the same command on a login "
        "node of the cluster, or only write the file: --slurm-print."
    )
    assert not (tmp_path / "a.slurm").exists()


def test_without_submitit_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SlurmError, match=r"via=submitit needs the package submitit.*attribution\[slurm\]"):
        submit_by_submitit(SlurmJob(COMMAND, 2, tmp_path, "coar-ablate"))


def test_requeue_outside_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SlurmError, match="--requeue: this process is not in a Slurm job"):
        slurm.requeue()


@pytest.mark.timeout(60)
def test_a_task_whose_time_is_up_ends_its_command_and_can_begin_anew(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'component-attribution[slurm]'")
    program = tmp_path / "p.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    pathlib.Path('ended').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end)\npathlib.Path('began').write_text(' '.join(sys.argv[1:]))\ntime.sleep(50)\n"
    )
    task = Task([sys.executable, str(program)], 3, str(tmp_path))
    anew: list[Any] = []

    def time_is_up(*_: object) -> None:
        anew.append(task.checkpoint(1))

    before = signal.signal(signal.SIGALRM, time_is_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, 3.0)
        with pytest.raises(SlurmError, match=r"Worker 1/3 ended with exit code 143; its log says why\."):
            task(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "began").read_text() == "--worker 1/3 --tied"
    assert (tmp_path / "ended").exists()
    [submission] = anew
    assert submission.args == (1,)
    assert submission.function.__getstate__() == {**vars(task), "_process": None}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose campaign one process has run. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    assert project.coar("ablate", "spec.toml", "--quiet")[0] == 0
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project of its own, nothing run."""
    return Project(tmp_path / "p")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_tasks_by_submitit_without_slurm(
    project: Project, undisturbed: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'component-attribution[slurm]'")
    monkeypatch.chdir(project.folder)
    for name, value in project.environment().items():
        monkeypatch.setenv(name, value)
    job = SlurmJob((sys.executable, "-m", "coar", "ablate", "spec.toml", "--quiet"), 2, Path("a.slurm"), "coar-ablate")
    jobs = submit_by_submitit(job, cluster="local")
    assert [task.exception() for task in jobs] == [None, None], [task.stderr() for task in jobs]
    assert [task.result() for task in jobs] == [0, 0]
    assert files(project.store) == files(undisturbed.store)
    assert project.processes(seconds=20) == []


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Slurm of one node with two cores, on this machine; SLURM_CONF points to it."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)} missing): apt-get install slurm-wlm munge")
    if os.getuid() != 0:
        pytest.skip("slurmd runs jobs as root only")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(_configure(folder)))
        servers = _start(folder)
        try:
            _wait(lambda: "idle" in _ask("sinfo", "-h", "-o", "%T"), 60, "the node did not come up")
            yield
            _ask("scancel", "--full", "--user=root")
            _wait(lambda: _ask("squeue", "-h") == "", 30, "jobs were left")
        finally:
            for server in reversed(servers):
                server.terminate()
            for server in reversed(servers):
                server.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> Path:
    host = socket.gethostname().partition(".")[0]
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o600)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = [_free_port() for _ in range(2)]
    settings = {
        "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmUser": "root", "SlurmdUser": "root",
        "AuthType": "auth/munge", "AuthInfo": f"socket={folder}/munge.socket", "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none", "MpiDefault": "none", "ReturnToService": "2", "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core", "JobAcctGatherType": "jobacct_gather/none", "KillWait": "5",
        "StateSaveLocation": f"{folder}/state", "SlurmdSpoolDir": f"{folder}/spool",
        "SlurmctldPidFile": f"{folder}/ctld.pid", "SlurmdPidFile": f"{folder}/d.pid",
        "SlurmctldLogFile": f"{folder}/ctld.log", "SlurmdLogFile": f"{folder}/d.log",
        "SlurmctldPort": str(ports[0]), "SlurmdPort": str(ports[1]),
    }  # fmt: skip
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN", "PartitionName=main Nodes=ALL Default=YES"]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    return folder / "slurm.conf"


def _start(folder: Path) -> list[subprocess.Popen[bytes]]:
    files_ = {name: f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")}
    munge = ["munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.socket"]
    commands = [[*munge, *files_.values()], ["slurmctld", "-D", "-c"], ["slurmd", "-D"]]
    servers = []
    for command in commands:
        servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(1.0)
    return servers


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()


def _wait(until: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def _submit(project: Project, options: str, **environment: str) -> str:
    """Submits by the command line; returns the id of the array."""
    command = [sys.executable, "-m", "coar", "ablate", "spec.toml", "--quiet", "--slurm", options]
    done = subprocess.run(  # not project.start, which ends what has its environment: the jobs have it, too
        command, cwd=project.folder, env=project.environment(**environment), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "\n#SBATCH --" in out
    assert "Submitted as Slurm job array " in out
    return out.partition("Submitted as Slurm job array ")[2].partition(":")[0]


def _logs(project: Project) -> str:
    return "\n".join(p.read_text() for p in sorted((project.folder / "campaign.slurm").glob("*.log")))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_an_array_of_two_tasks_on_slurm(project: Project, undisturbed: Project, via: str) -> None:
    if via == "submitit":
        pytest.importorskip("submitit", reason="submitit is not installed: pip install 'component-attribution[slurm]'")
    array = _submit(project, f"workers=2,time=5,cpus-per-task=1,via={via}", TINY_STORE="campaign.zarr")
    _wait(lambda: _ask("squeue", "-h", "-j", array) == "", 200, f"the jobs did not end: {_logs(project)}")
    assert files(project.store) == files(undisturbed.store), _logs(project)
    assert set(project.computed().values()) == {1}
    assert project.processes(seconds=20) == []
    if via == "sbatch":
        assert _logs(project).count("Complete: 40 rows x 9 examples in campaign.zarr") == 2


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("cluster")
def test_a_task_whose_time_is_nearly_up_goes_back_into_the_queue(project: Project, undisturbed: Project) -> None:
    array = _submit(project, "workers=1,time=5,cpus-per-task=1,via=sbatch", TINY_DELAY="0.3")
    [record] = project.wait_for_workers(1, seconds=120)
    _ask("scancel", "--batch", "--signal=USR1", f"{array}_0")
    _wait(lambda: "Restarts=1" in _ask("scontrol", "show", "job", f"{array}_0"), 60, f"not requeued: {_logs(project)}")
    assert record.process.pid not in project.processes(seconds=20)
    assert "Ended by SIGUSR1." in _logs(project)
    assert "The job goes back into the queue." in _logs(project)
    _ask("scancel", array)
    _wait(lambda: _ask("squeue", "-h", "-j", array) == "", 60, "the job was not cancelled")
    assert project.processes(seconds=20) == []
    assert project.coar("ablate", "spec.toml", "--quiet")[0] == 0, "the rest, without waiting for Slurm's delay"
    assert files(project.store) == files(undisturbed.store)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("cluster")
def test_what_sbatch_does_not_take_is_told(project: Project) -> None:
    code, out, err = project.coar("ablate", "spec.toml", "--slurm", "workers=2,partiton=gpu,via=sbatch")
    assert (code, out) == (2, "")
    assert err.startswith("error: sbatch does not take campaign.slurm/job.sbatch: sbatch: ")
    assert err.endswith("'partiton': did you mean 'partition'?\n")
