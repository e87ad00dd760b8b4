"""Workers on a Ray cluster: the numbers of one process, lost actors, and nothing left running."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from zarr.storage import LocalStore

from ablate.errors import SpecError
from ablate.workers.on_ray import RayError, RayPlan, run_on_ray
from ablate.workers.supervise import View
from stores.work.worklog import WorkLog
from tests.worker_project import BLOCKS, Project, files

VIEW = View("campaign.zarr", "ablate", "row", lambda: None)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    before = dict(os.environ)
    with pytest.raises(RayError) as raised:
        run_on_ray(RayPlan(None, 2), lambda threads, gpus: lambda number, count: (0, ""), VIEW)
    assert str(raised.value).startswith("--ray needs the package ray, which cannot be imported (")
    assert str(raised.value).endswith("). Install it: pip install 'component-attribution[ray]'.")
    assert dict(os.environ) == before


def test_a_plan_that_makes_no_sense() -> None:
    with pytest.raises(SpecError) as raised:
        RayPlan(None, 0, gpus=-1, threads=0)
    assert str(raised.value) == (
        "Ray: 3 problems\n"
        "  1. workers: got 0, expected at least 1.\n"
        "  2. gpus_per_worker: got -1, expected 0 or more.\n"
        "  3. threads: got 0, expected at least 1."
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose campaign one process has run. Not to be changed."""
    project = Project(tmp_path_factory.mktemp("undisturbed"))
    assert project.coar("ablate", "spec.toml", "--quiet")[0] == 0
    return project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of its own, nothing run; no Ray of the user's is used."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'component-attribution[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Project(tmp_path / "p")


def check(project: Project, undisturbed: Project) -> None:
    assert files(project.store) == files(undisturbed.store)
    assert project.processes(seconds=90) == [], "Ray left processes"
    assert WorkLog(LocalStore(project.store)).failures() == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_actors_store_what_one_process_stores(project: Project, undisturbed: Project, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    command = ("ablate", "spec.toml", "--ray", "--workers", 2, "--threads", 1)
    code, out, err = project.coar(*command, timeout=200, HOME=str(home), TINY_DELAY="0.02", TINY_STORE="campaign.zarr")
    assert (code, out) == (0, "Complete: 40 rows x 9 examples in campaign.zarr\n"), err
    assert err.startswith("campaign.zarr: 2 Ray workers (local); of each: threads 1, GPUs 0\n")
    check(project, undisturbed)
    assert project.computed() == dict.fromkeys(range(BLOCKS), 1)
    workers = WorkLog(LocalStore(project.store)).workers()
    assert sum(worker.blocks for worker in workers) == BLOCKS
    assert {(worker.facts["device"], worker.facts["threads"]) for worker in workers} == {("cpu", 1)}
    assert list(home.rglob("auth_token")) == []


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_killed_actor_costs_at_most_its_block(project: Project, undisturbed: Project) -> None:
    environment = {"TINY_DELAY": "0.05", "TINY_STORE": "campaign.zarr"}
    with project.start("ablate", "spec.toml", "--ray=local", "--workers", 2, **environment) as process:
        victim = project.wait_for_workers(2, seconds=120)[0]
        os.kill(victim.process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert "warning: worker " in err
    assert " was lost (" in err
    check(project, undisturbed)
    computed = project.computed()
    assert sorted(computed) == list(range(BLOCKS))
    assert sum(computed.values()) <= BLOCKS + 1


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_an_interrupt_shuts_the_cluster_down(project: Project, undisturbed: Project) -> None:
    with project.start("ablate", "spec.toml", "--ray", "--workers", 2, TINY_DELAY="0.05") as process:
        project.wait_for_workers(2, seconds=120)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert project.processes(seconds=90) == []
    assert {record.state for record in WorkLog(LocalStore(project.store)).workers()} == {"stopped"}
    assert project.coar("ablate", "spec.toml", "--quiet")[0] == 0
    check(project, undisturbed)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_killed_driver_leaves_a_sound_store_and_no_workers(project: Project, undisturbed: Project) -> None:
    with project.start("ablate", "spec.toml", "--ray", "--workers", 2, TINY_DELAY="0.05") as process:
        workers = project.wait_for_workers(2, seconds=120)
        process.kill()
        process.wait(30)
        for worker in workers:
            deadline = 40.0
            while worker.process.pid in project.processes() and deadline > 0:
                project.processes(seconds=0.5)
                deadline -= 0.5
            assert deadline > 0, "an actor outlived its driver"
    assert project.coar("ablate", "spec.toml", "--quiet")[0] == 0
    check(project, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_of_all_actors_is_told_once_and_as_one_process_tells_it(project: Project) -> None:
    spec = project.folder / "spec.toml"
    spec.write_text(spec.read_text().replace("tiny_project:net", "tiny_project:nett"))
    alone = project.coar("ablate", "spec.toml", "--quiet")
    by_ray = project.coar("ablate", "spec.toml", "--quiet", "--ray", "--workers", 2, timeout=200)
    assert alone[0] == 2
    assert by_ray == alone
    assert project.processes(seconds=90) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cluster_that_is_not_there(project: Project) -> None:
    code, out, err = project.coar("ablate", "spec.toml", "--ray", "127.0.0.1:1", "--workers", 2, timeout=200)
    assert (code, out) == (2, "")
    assert err.startswith("error: The Ray cluster '127.0.0.1:1' cannot be reached or started: ")
    assert err.endswith("Check the address, or leave it out to start Ray on this machine.\n")
    assert project.processes(seconds=90) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_more_gpus_than_there_are(project: Project) -> None:
    words = ("ablate", "spec.toml", "--ray", "--workers", 2, "--gpus-per-worker", 64)
    code, _, err = project.coar(*words, timeout=200)
    assert code == 2
    assert "error: 2 workers with 64 GPUs each were asked for, this machine has " in err
    assert err.endswith(". Start fewer, or share GPUs: --gpus-per-worker 0.5.\n")
    assert project.processes(seconds=90) == []
