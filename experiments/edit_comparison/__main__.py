"""`python -m experiments.edit_comparison`: all registered editing methods on three tasks, in one run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from experiments.edit_comparison.config import read_config
from experiments.edit_comparison.jobs import results_of
from experiments.edit_comparison.report import write_report


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A small version, into runs/ instead of docs/.")] = False,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Only this, into runs/; repeatable.")] = None,
    networks: Annotated[list[str] | None, typer.Option("--network", help="Only this, into runs/; repeatable.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Only this, into runs/; repeatable.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, of one thread each. Default: 2.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished jobs of the same configuration.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for tables and figures.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder for networks and finished jobs.")] = Path("runs/edit_comparison"),
) -> None:
    """Compare all registered editing methods: what they repair, what they keep, which published findings reappear."""
    name = "quick" if quick else "full"
    config = read_config(name)
    chosen = {
        t: tuple(n for n in ns if n in (networks or ns)) for t, ns in config.networks.items() if t in (tasks or [t])
    }
    if not any(chosen.values()):
        raise typer.BadParameter(f"nothing is left to run; there are {config.networks}.")
    changes = {
        "networks": {t: ns for t, ns in chosen.items() if ns},
        "seeds": tuple(seeds) if seeds else config.seeds,
        "workers": workers or config.workers,
    }
    config = config.model_copy(update=changes)
    partial = bool(tasks or networks or seeds)  # what is small or a part never replaces the tables of the whole
    folder = out or (cache / name / "report" if quick or partial else Path("docs/benchmarks"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results = list(results_of(config, name, cache, resume))
    minutes = (time.perf_counter() - started) / 60
    for finding in write_report(folder, name, config, results, None if resume else minutes):
        print(f"\n{finding.claim}\n  {finding.verdict}. {finding.numbers}")
    print(f"\n{minutes:.1f} minutes; tables and figures in {folder}")


if __name__ == "__main__":
    typer.run(main)
