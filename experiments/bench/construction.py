"""What an engine costs before its first number: `python -m experiments.bench.construction [--model NAME]`.

Seconds to make one and check it with the first inputs, beside a plain forward of the same two examples. To compare two
versions run it in both, in turn: it prints the median and the best of its rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ablate import ComponentIndex, Engine
from experiments.bench.engine import workload


def main() -> None:
    """Prints the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="as experiments.bench.engine has them")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    work = workload(arguments.model, 2)
    model, index = work.model.to(arguments.device), ComponentIndex.from_model(work.model, work.kinds)
    seconds, forwards = [], []
    for turn in range(arguments.rounds + 1):
        start = time.perf_counter()
        engine = Engine(model, index, batch_size=2)
        engine.check(work.examples)
        taken = time.perf_counter() - start
        start = time.perf_counter()
        with torch.no_grad():
            model(work.examples.inputs().to(arguments.device))
        if turn:
            seconds.append(taken)
            forwards.append(time.perf_counter() - start)
    print(
        f"{arguments.model} at {work.pixels} px, {len(index):,} components on {arguments.device}: made and checked in "
        f"{statistics.median(seconds):.3f} s (best {min(seconds):.3f} s); a forward of two examples takes "
        f"{statistics.median(forwards):.3f} s."
    )


if __name__ == "__main__":
    main()
