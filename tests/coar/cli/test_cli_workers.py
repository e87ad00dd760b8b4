"""The options about workers of `coar ablate` and `coar estimate`: what they start, and what they refuse."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import ablate
from ablate.errors import SpecError
from ablate.work.loop import Sharing
from coar.cli.workers.command import Workers, with_workers
from coar.cli.workers.flags import WorkerFlags
from coar.cli.workers.optional_ray import OptionalRay
from stores import CampaignStore, FailedBlocksError
from stores.records import Attempt
from stores.work.worklog import WorkLog
from tests import forking
from tests.worker_project import Project, files

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def given() -> tuple[Callable[..., Workers], list[Workers]]:
    """`given(words)`: what a command with these options is given."""
    found: list[Workers] = []
    app = typer.Typer()

    @app.callback()
    def nothing() -> None:
        """Makes `do` a sub-command, as in the real program."""

    def do(
        spec: str,
        workers: Workers,
        flag: bool = False,
        number: float = 0.1,
        text: str | None = None,
        quiet: bool = False,
    ) -> None:
        """Does something."""
        found.append(workers)

    app.command("do", cls=OptionalRay)(with_workers(do))

    def parse(*words: str) -> Workers:
        done = CliRunner().invoke(app, ["do", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return found[-1]

    return parse, found


Given = tuple[Callable[..., Workers], list[Workers]]


def test_without_options_one_process_works_and_keeps_going(given: Given) -> None:
    workers = given[0]("a.toml")
    assert workers.sharing == {"worker": None, "lease_seconds": 60.0, "keep_going": True, "retry_failed": None}
    assert (workers.device, workers.flags.several, workers.command) == (None, False, ("do", "a.toml"))


@pytest.mark.parametrize(
    ("words", "retries"),
    [
        (["--worker", "0/2"], True),
        (["--worker", "1/2"], False),
        (["--worker", "1/2", "--retry-failed"], True),
        (["--worker", "0/2", "--no-retry-failed"], False),
    ],
)
def test_one_of_several_tries_failed_blocks_anew(given: Given, words: list[str], retries: bool) -> None:
    sharing = given[0]("a.toml", *words).sharing
    assert Sharing.of(sharing["worker"], retry=sharing["retry_failed"]).retry_failed is retries


def test_the_command_for_others_has_what_was_given_and_nothing_about_workers(given: Given) -> None:
    words = ["--number=0.25", "--workers", "3", "--text", "-x y", "a b.toml", "--flag", "--lease-seconds", "7"]
    words += ["--quiet", "--devices", "cpu", "--threads", "2", "--retry-failed"]
    workers = given[0](*words)
    assert workers.command == ("do", "a b.toml", "--flag", "--number=0.25", "--text=-x y", "--lease-seconds=7.0")
    assert given[0](*workers.command[1:]).command == workers.command


@pytest.mark.parametrize(
    ("words", "address", "spec"),
    [
        (["a.toml", "--ray", "--workers", "2"], "", "a.toml"),
        (["--ray", "a.toml", "--workers", "2"], "", "a.toml"),
        (["a.toml", "--workers", "2", "--ray"], "", "a.toml"),
        (["--ray", "auto", "a.toml", "--workers", "2"], "auto", "a.toml"),
        (["--ray", "head:6379", "a.toml", "--workers", "2"], "head:6379", "a.toml"),
        (["a.toml", "--ray=ray://head:10001", "--workers", "2"], "ray://head:10001", "a.toml"),
        (["a.toml", "--ray", "ray://head:10001", "--workers", "2"], "ray://head:10001", "a.toml"),
    ],
)
def test_ray_with_and_without_an_address(given: Given, words: list[str], address: str, spec: str) -> None:
    workers = given[0](*words)
    assert (workers.flags.ray, workers.flags.several, workers.command) == (address, True, ("do", spec))


def test_one_device_is_this_process(given: Given) -> None:
    workers = given[0]("a.toml", "--devices", "cpu")
    assert (workers.device, workers.flags.several) == ("cpu", False)
    assert given[0]("a.toml", "--device", "cpu").device == "cpu"


@pytest.mark.parametrize(
    ("flags", "problems"),
    [
        ({"devices": "all", "ray": "", "workers": 2}, ["--devices and --ray: given together. Give one of them."]),
        (
            {"worker": "0/2", "workers": 3},
            ["--worker: given beside several workers. Give it to start one of them by hand."],
        ),
        ({"device": "cpu", "workers": 2}, ["--device: given beside several workers. Use --devices."]),
        (
            {"slurm_print": True, "gpus_per_worker": 1.0},
            [
                "--slurm-print: given without --slurm.",
                "--gpus-per-worker: given without --ray. On this machine use --devices.",
            ],
        ),
        ({"ray": "auto"}, ["--workers: missing beside --ray. Give how many actors to start."]),
        ({"worker": "2/2"}, ["worker: got '2/2', expected i/N with i from 0 to N - 1, for example 0/4."]),
    ],
)
def test_options_that_do_not_go_together(flags: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(SpecError) as raised:
        WorkerFlags(**flags)
    assert list(raised.value.problems) == problems


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project, which is the working directory."""
    found = Project(tmp_path / "p")
    monkeypatch.chdir(found.folder)
    monkeypatch.setenv("TINY_PROJECT", str(found.folder))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose campaign one process has run. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    assert project.coar("ablate", "spec.toml", "--quiet")[0] == 0
    return project


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_store_what_one_stores(run: Run, project: Project, undisturbed: Project) -> None:
    code, out, err = run("ablate", "spec.toml", "--devices", "cpu,cpu")
    assert (code, out) == (0, "Complete: 40 rows x 9 examples in campaign.zarr\n"), err
    assert err.startswith("campaign.zarr: 2 processes (cpu, cpu), threads of each: 1\n")
    assert files(project.store) == files(undisturbed.store)
    assert project.processes() == []
    workers = WorkLog(CampaignStore.open(project.store).blocks.store).workers()
    assert {worker.state for worker in workers} == {"ended"}
    assert sum(worker.blocks for worker in workers) == 8


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_process_beside_others_by_hand(undisturbed: Project, project: Project) -> None:
    assert project.coar("ablate", "spec.toml", "--quiet", "--worker", "1/2", "--device", "cpu")[0] == 0
    assert files(project.store) == files(undisturbed.store)
    [worker] = WorkLog(CampaignStore.open(project.store).blocks.store).workers()
    assert (worker.blocks, worker.facts["device"]) == (8, "cpu")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_another_campaigns_store_is_refused_once(project: Project) -> None:
    project.coar("ablate", "spec.toml", "--quiet")
    (project.store / "ledger" / "c" / "3" / "0").unlink()
    spec = project.folder / "spec.toml"
    spec.write_text(spec.read_text().replace("seed = 5", "seed = 6"))
    code, out, err = project.coar("ablate", "spec.toml", "--devices", "cpu,cpu", "--quiet")
    assert (code, out) == (4, "")
    assert err == (
        "error: Campaign campaign.zarr was made from something else. What differs (stored -> now):\n"
        "  plan.seed: 5 -> 6\n"
        "Give the original back, or name another store for the new campaign.\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_blocks_that_failed_are_tried_anew_by_the_same_command_only(project: Project) -> None:
    """A value that is no number comes out the same each time: its block is set aside at once, the others go on."""
    project.coar("ablate", "spec.toml", "--quiet")
    store = CampaignStore.open(project.store, mode="r+")
    (project.store / "ledger" / "c" / "3" / "0").unlink()
    log = WorkLog(store.blocks.store)
    log.add_failure(3, Attempt("ValueError: no", "ValueError", "w", "2026-01-01T00:00:00+00:00"), set_aside=True)
    with pytest.raises(FailedBlocksError):
        ablate.run(ablate.CampaignSpec.from_file("spec.toml"), keep_going=True, retry_failed=False, progress=False)
    code, _, err = project.coar("ablate", "spec.toml", "--quiet", "--workers", 2, "--no-retry-failed")
    assert code == 3
    assert "block 3, failed once: ValueError: no" in err
    assert project.coar("ablate", "spec.toml", "--quiet", "--workers", 2)[0] == 0
    assert log.failures() == {}


def test_overwrite_beside_several_workers(run: Run, project: Project) -> None:
    code, out, err = run("estimate", "spec.toml", "--workers", 2, "--overwrite")
    assert (code, out) == (2, "")
    assert err == (
        "error: Workers: 1 problem\n  1. --overwrite: given beside several workers, which would remove each other's "
        "work. Remove the store first, or name another one.\n"
    )


def test_a_store_in_memory_beside_several_workers(run: Run, project: Project) -> None:
    code, _, err = run("ablate", "spec.toml", "--workers", 2, "--store", "memory://a")
    assert code == 2
    assert "store: memory://a is seen by one process only. Name a path or a URL." in err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_printed_file_for_slurm_runs_as_a_task_does(run: Run, project: Project, undisturbed: Project) -> None:
    slurm = "partition=gpu,time=1:00:00"
    code, out, err = run("ablate", "spec.toml", "--quiet", "--workers", 2, "--slurm", slurm, "--slurm-print")
    assert (code, err) == (0, "")
    file = project.folder / "campaign.slurm" / "job.sbatch"
    assert out == f"campaign.slurm/job.sbatch (written, not submitted):\n{file.read_text()}\n"
    text = file.read_text()
    assert "\n#SBATCH --array=0-1\n" in text
    assert "\n#SBATCH --partition=gpu\n#SBATCH --time=1:00:00\n" in text
    command = f"exec {shlex.quote(sys.executable)} -m coar ablate spec.toml --no-retry-failed "
    assert text.splitlines()[-1] == f'{command}--worker "$SLURM_ARRAY_TASK_ID/2" --requeue'
    assert not project.store.exists()
    environment = project.environment(SLURM_ARRAY_TASK_ID="1")
    done = subprocess.run(
        ["bash", str(file)],
        cwd=project.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "Complete: 40 rows x 9 examples in campaign.zarr\n"), done.stderr
    assert files(project.store) == files(undisturbed.store)


def test_where_the_file_for_slurm_goes(run: Run, project: Project) -> None:
    words = ("ablate", "spec.toml", "--slurm", "workers=2", "--slurm-print")
    assert run(*words, "--slurm-folder", "jobs")[0] == 0
    assert (project.folder / "jobs" / "job.sbatch").exists()
    assert run(*words, "--store", "s3://bucket/my runs/a.zarr")[0] == 0
    assert (project.folder / "bucket-my-runs-a.slurm" / "job.sbatch").exists()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_an_actor_runs(project: Project, undisturbed: Project, tmp_path: Path, capfd: Any) -> None:
    """In another folder, without the spec: both travel with it. Its words are not printed, its error is returned."""
    program = tmp_path / "actor.py"
    program.write_text(
        "import pathlib, sys\nfrom coar.cli.workers.spread import run_command_here\n"
        "words, spec, folder = ['ablate', 'gone.toml', '--quiet'], 'gone.toml', sys.argv[2]\n"
        "print(run_command_here(words, spec, pathlib.Path(sys.argv[1]).read_text(), folder, 1, 0, 1))\n"
    )
    spec = (project.folder / "spec.toml").rename(tmp_path / "elsewhere.toml")
    command = (program, spec, project.folder)
    assert forking.start(*command, cwd=tmp_path).communicate() == ("(0, '')\n", "")
    assert files(project.store) == files(undisturbed.store)
    spec.write_text("rows = = 1")
    told, _ = forking.start(*command, cwd=tmp_path).communicate()
    assert "gone.toml: 1 problem\\n  1. is no TOML:" in told
    assert told.startswith("(2, ")
