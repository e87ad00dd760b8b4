"""Two versions of the toolkit, side by side: `python -m experiments.bench.paired FOLDER` (the other one's checkout).

One process each, in turn, many short rounds, so that what else the machine does falls on both alike. Per way the median
of the rounds' ratios, this version / the other, with a 95 % interval, and the ratio of the best rounds. 1.02 is 2 %
slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from scipy.stats import bootstrap

from ablate import ComponentIndex, Engine, KeepPlan
from experiments.bench.engine import workload

HERE = Path(__file__).resolve().parents[2]
WAYS = ("plain", "weight", "activation", "gradient", "construction")


def serve(name: str, examples: int, rows: int) -> None:
    """Answers each way read from stdin with the seconds that one round of it took."""
    work = workload(name, examples)
    index, data = ComponentIndex.from_model(work.model, work.kinds), work.examples
    keep = KeepPlan(len(index), rows, 0.05).take(0, rows)
    gates = torch.ones(examples, len(index))
    weight, activation = (Engine(work.model, index, mode=mode, batch_size=64) for mode in ("weight", "activation"))

    def plain() -> None:
        with torch.no_grad():
            for first in range(0, examples, 64):
                work.model(data.inputs(first, first + 64))

    ways: dict[str, Callable[[], object]] = {
        "plain": plain,
        "weight": lambda: weight.outputs(keep, data),
        "activation": lambda: activation.outputs(keep, data),
        "gradient": lambda: activation.gate_gradients(gates, data),
        "construction": lambda: Engine(work.model, index, batch_size=2).check(data),
    }
    for way in ways.values():
        way()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        ways[line.strip()]()
        print(json.dumps(time.perf_counter() - start), flush=True)


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="the checkout of the other version")
    parser.add_argument("--model", default="resnet18", help="as experiments.bench.engine has them")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    settings = [arguments.model, str(arguments.examples), str(arguments.rows)]
    sides = [_start(Path(folder), settings, arguments.threads) for folder in (HERE, arguments.other)]
    try:
        for side in sides:
            if _pipe(side.stdout).readline().strip() != "ready":
                raise SystemExit("One version did not start, see above.")
        found: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
        for turn in range(arguments.rounds):
            for way in WAYS:
                for which in (0, 1) if turn % 2 else (1, 0):
                    found[way][which].append(_ask(sides[which], way))
    finally:
        for side in sides:
            side.kill()
            side.wait()
    print(f"{arguments.model}, {arguments.examples} examples, {arguments.rounds} rounds, {arguments.threads} threads")
    for way, (ours, theirs) in found.items():
        ratios = np.array(ours) / np.array(theirs)
        low, high = bootstrap((ratios,), np.median, method="percentile", rng=0).confidence_interval
        best = min(ours) / min(theirs)
        print(f"{way:>13}: {np.median(ratios):.3f} [{low:.3f}, {high:.3f}], best {best:.3f} ({1e3 * min(ours):.1f} ms)")


def _start(folder: Path, settings: list[str], threads: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.fspath(folder.resolve()), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", __file__, "serve", *settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )


def _ask(side: subprocess.Popen[str], way: str) -> float:
    _pipe(side.stdin).write(way + "\n")
    _pipe(side.stdin).flush()
    return float(_pipe(side.stdout).readline())


def _pipe(pipe: IO[str] | None) -> IO[str]:
    return cast(IO[str], pipe)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
