"""The jobs of a run, one per task, network and seed, in processes of their own; finished ones can be kept."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from experiments.edit_comparison.config import Config
from experiments.edit_comparison.runner import Result, run_job

Job = tuple[str, str, int]


def _jobs(config: Config) -> list[Job]:
    """Returns (task, network, seed) of every job: seed by seed, in each those that take longest first."""
    jobs = [
        (task, network, seed) for task, networks in config.networks.items() for network in networks
        for seed in config.seeds
    ]  # fmt: skip
    return sorted(jobs, key=lambda job: (job[2], job[1] != "vit", job[0]))


def _place(cache: Path, name: str, job: Job) -> Path:
    return cache / name / f"{job[0]}-{job[1]}-seed{job[2]}.json"


def _run(config: Config, name: str, job: Job, cache: Path) -> Result:
    result = run_job(config, *job, cache, lambda text: print(text, flush=True))
    result.save(_place(cache, name, job))
    return result


def results_of(config: Config, name: str, cache: Path, resume: bool) -> Iterator[Result]:
    """Yields the result of every job: read where it is there and may be resumed, else run."""
    left = []
    for job in _jobs(config):
        place = _place(cache, name, job)
        found = Result.load(place) if resume and place.is_file() else None
        if found is not None and found.job["digest"] == config.digest():
            yield found
        else:
            left.append(job)
    if config.workers == 1 or len(left) < 2:
        for job in left:
            yield _run(config, name, job, cache)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that start below
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(config.workers, len(left)), mp_context=context) as pool:
        for future in as_completed([pool.submit(_run, config, name, job, cache) for job in left]):
            yield future.result()
