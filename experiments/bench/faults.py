"""Kills campaigns and estimates at random moments: `python -m experiments.bench.faults [--kills 200] [--seed 0]`.

After every `kill -9` the store is read back whole and compared with that of a run that was never killed, then the same
command is given again, until the store is finished; it must then be the same to the last bit (but for the book-keeping
under `work/`), and no more blocks may have been begun than there are blocks and kills. Three parts: a campaign in one
process, a gradient estimate in one process, and one of two workers that share a campaign; with --ray also one of two
workers on a Ray cluster, beside the --kills of the others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

import stores
from experiments.bench import fault_ray, fault_victims
from stores.opening import open_any

SHARES = {"campaign": 0.4, "estimate": 0.3, "two workers": 0.3}
PATIENCE = 120.0  # seconds until a process counts as hanging


class BrokenStoreError(AssertionError):
    """A store that is not what it should be."""


@dataclass
class Tally:
    """What happened in one part.

    Attributes:
      kills: How often a process was killed while it ran.
      stores: How many stores were finished.
      blocks: How many blocks those have.
      begun: How many blocks were begun.
      torn: Kills that left new data without a mark or half a file: proven to have hit a write.
      unborn: Kills before there was a store.
    """

    name: str
    kills: int = 0
    stores: int = 0
    blocks: int = 0
    begun: int = 0
    torn: int = 0
    unborn: int = 0
    seen: set[str] = field(default_factory=set)  # what kills of the store at hand have left

    @property
    def again(self) -> int:
        """How many blocks were begun more often than once."""
        return self.begun - self.blocks


class Bench:
    """Runs victims in processes forked from one that has imported everything."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.moments = random.Random(seed)  # noqa: S311
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["experiments.bench.fault_victims"])
        self.whole: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        for kind in fault_victims.COMMANDS:
            self._measure(kind)

    def _measure(self, kind: str) -> None:
        """Makes the store of a run that is never killed, and tells how long that takes; the first one warms up."""
        for name in ("warm", "whole"):
            self.whole[kind] = self.folder / f"{name}-{kind}.zarr"
            start = time.monotonic()
            self.finish(self.start(kind, self.whole[kind]))
            self.seconds[kind] = time.monotonic() - start

    def start(self, kind: str, store: Path, worker: str = "0/1") -> BaseProcess:
        """Starts the command of a kind."""
        arguments = (kind, str(store), str(_log(store)), worker)
        process = self.context.Process(target=fault_victims.work, args=arguments)
        process.start()
        return process

    def finish(self, process: BaseProcess) -> None:
        """Waits for a process that nobody kills."""
        process.join(PATIENCE)
        if process.exitcode != 0:
            process.kill()
            raise BrokenStoreError(f"a command ended with {process.exitcode}, expected 0")

    def kill(self, process: BaseProcess, kind: str) -> bool:
        """Kills a process at a random moment of its time; returns False if it had ended before."""
        process.join(self.moments.uniform(0.0, self.seconds[kind]))
        process.kill()
        process.join(PATIENCE)
        if process.exitcode not in (0, -9):
            raise BrokenStoreError(f"a command ended with {process.exitcode} before it was killed")
        return process.exitcode == -9

    def alone(self, kind: str, kills: int) -> Tally:
        """Kills one process again and again, store after store."""
        tally = Tally(kind)
        while tally.kills < kills:
            store = self.folder / f"{kind}-{tally.stores}.zarr"
            process = self.start(kind, store)
            while tally.kills < kills and self.kill(process, kind):
                tally.kills += 1
                self._look(store, kind, tally)
                process = self.start(kind, store)
            self.finish(process)
            self._compare(store, kind, tally)
        return tally

    def shared(self, kills: int) -> Tally:
        """Kills one of two workers that share a campaign, and gives its command again."""
        tally = Tally("two workers")
        while tally.kills < kills:
            store = self.folder / f"shared-{tally.stores}.zarr"
            victim, other = (self.start("campaign", store, f"{i}/2") for i in range(2))
            if self.kill(victim, "campaign"):
                tally.kills += 1
                self.finish(self.start("campaign", store, "0/2"))
            self.finish(other)
            self._compare(store, "campaign", tally)
        return tally

    def on_ray(self, kills: int) -> Tally:
        """Kills one of two actors on a Ray cluster of this machine; what was lost is started again by itself."""
        tally = Tally("two Ray workers")
        with fault_ray.cluster():
            while tally.kills < kills:
                store = self.folder / f"ray-{tally.stores}.zarr"
                tally.kills += fault_ray.run_and_kill(store, _log(store), self.moments, self.seconds["campaign"] / 2)
                self._compare(store, "campaign", tally)
        return tally

    def _look(self, store: Path, kind: str, tally: Tally) -> None:
        """Raises BrokenStoreError unless all that a killed program's store shows as data is what it should be."""
        if not store.exists():
            tally.unborn += 1
            return
        report = stores.verify(store)
        if not report.sound:
            raise BrokenStoreError(report.text())
        left = {key for key in (*report.leftovers, *report.partials) if not key.startswith("work/")}
        tally.torn += bool(left - tally.seen)
        tally.seen |= left
        found, whole = open_any(store).blocks.digests(), open_any(self.whole[kind]).blocks.digests()
        marked = found.any(axis=1)
        if not np.array_equal(found[marked], whole[marked]):
            raise BrokenStoreError(f"{store}: a finished block is not what an undisturbed run computes")

    def _compare(self, store: Path, kind: str, tally: Tally) -> None:
        """Raises BrokenStoreError unless a finished store equals the undisturbed one; counts and removes it."""
        found, whole = _files(store), _files(self.whole[kind])
        differing = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
        if differing:
            raise BrokenStoreError(f"{store} differs from {self.whole[kind]} in {', '.join(differing[:5])}")
        tally.stores += 1
        tally.seen.clear()
        tally.blocks += open_any(store).blocks.count
        tally.begun += len(_log(store).read_text().splitlines())
        if tally.again > tally.kills:
            raise BrokenStoreError(
                f"{tally.again} blocks were begun again after {tally.kills} kills, expected at most one per kill"
            )
        shutil.rmtree(store)
        _log(store).unlink()


def _log(store: Path) -> Path:
    return store.with_suffix(".begun")


def _files(store: Path) -> dict[str, bytes]:
    """Returns every file of a store but the book-keeping and what killed writes have left."""
    found = {p.relative_to(store).as_posix(): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if not (name.startswith("work/") or name.endswith(".partial"))}


def table(tallies: list[Tally]) -> str:
    """Returns the result as Markdown."""
    rows: list[tuple[Any, ...]] = [
        (
            "killed",
            "kills",
            "of these in a write",
            "before there was a store",
            "stores",
            "blocks",
            "begun again",
            "equal",
        )
    ]
    rows.append(("---",) * len(rows[0]))
    rows += [
        (t.name, t.kills, t.torn, t.unborn, t.stores, t.blocks, t.again, f"{t.stores} of {t.stores}") for t in tallies
    ]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts and prints a table; ends with exit code 1 at the first store that is not what it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills of processes in all")
    parser.add_argument("--ray", action="store_true", help="also kill one of two workers on a Ray cluster, as often")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, default=None, help="where the stores are made; default: a temporary one")
    options = parser.parse_args(arguments)
    kills = {name: max(1, round(share * options.kills)) for name, share in SHARES.items()}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(Path(folder), options.seed)
        print(", ".join(f"{kind}: {seconds:.1f} s undisturbed" for kind, seconds in bench.seconds.items()))
        try:
            tallies = [bench.alone(kind, kills[kind]) for kind in fault_victims.COMMANDS]
            tallies.append(bench.shared(kills["two workers"]))
            if options.ray:
                tallies.append(bench.on_ray(kills["two workers"]))
        except BrokenStoreError as error:
            print(f"BROKEN: {error}", file=sys.stderr)
            sys.exit(1)
    print(table(tallies))
    print(f"{sum(tally.kills for tally in tallies)} kills in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
