"""What a second worker brings: `python -m experiments.bench.workers [--quick] [--rounds 3]`.

Runs the same small campaign into an empty store with one and with two workers, one thread each, as processes of this
machine and as actors of a local Ray; in turn, several rounds. Quoted is the throughput at work: rows per second from
the first block that is finished to the last, without the seconds in which Python and the model are loaded. The limit
is what the machine itself gives two processes that share nothing: a plain loop of forwards, once alone and twice at
once, is timed in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ablate.workers.shares import core_count
from stores import CampaignStore

LIMIT_SECONDS = 900
BLOCK = 32

SPEC = """
rows = {rows}
ablate_fraction = 0.05
seed = 0
block_rows = {block}
device = "cpu"
store = "campaign.zarr"

[model]
source = "digits"
cache = "{model}"

[data]
source = "digits"
train_per_group = {examples}
test_per_group = {examples}
"""

FORWARDS = """
import sys, time, torch
from ablate.digits import digits_model
torch.set_num_threads(1)
model, inputs = digits_model(0, sys.argv[1]).eval(), torch.randn(200, 1, 16, 16)
with torch.inference_mode():
    for _ in range(5): model(inputs)
    print("ready", flush=True)
    sys.stdin.readline()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < float(sys.argv[2]):
        model(inputs); count += 1
print(count / (time.perf_counter() - start))
"""


def at_work(folder: Path, options: list[str]) -> float:
    """Returns rows per second of a campaign into an empty store, from its first finished block to its last."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = Path(place) / "campaign.zarr"
        command = [sys.executable, "-m", "coar", "ablate", "spec.toml", "--store", str(store), "--quiet", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(  # noqa: S603 - our own
            command, cwd=folder, env=environment, check=True, timeout=LIMIT_SECONDS, stdout=subprocess.DEVNULL
        )
        marks = sorted(mark.stat().st_mtime for mark in (store / "ledger" / "c").glob("*/0"))
        rows = CampaignStore.open(store).rows
    # Blocks that were begun before the first mark count as much as those that end after it: all but one per worker.
    workers = int(options[options.index("--workers") + 1]) if "--workers" in options else 1
    blocks = len(marks) - workers
    return blocks * (rows / len(marks)) / (marks[-1] - marks[workers - 1])


def forwards(model: str, count: int, seconds: float) -> float:
    """Returns forwards per second of so many processes at once that share nothing, in sum."""
    command = [sys.executable, "-c", FORWARDS, model, str(seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603
        for _ in range(count)
    ]
    for process in processes:
        if process.stdout is not None:
            process.stdout.readline()
    for process in processes:
        if process.stdin is not None:
            process.stdin.write("\n")
            process.stdin.flush()
    return sum(float(process.communicate(timeout=LIMIT_SECONDS)[0]) for process in processes)


def measure(rows: int, examples: int, rounds: int, ray: bool) -> dict[str, list[float]]:
    """Returns per way its throughput in each round, in rows (or forwards) per second."""
    ways = {"processes": ["--devices", "cpu"]} | ({"ray": ["--ray=local"]} if ray else {})
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="coar-bench-") as place:
        folder = Path(place)
        model = folder / "model.safetensors"
        text = SPEC.format(rows=rows, block=BLOCK, model=model, examples=examples)
        (folder / "spec.toml").write_text(text)
        at_work(folder, [])  # trains and caches the model, and warms the disk's cache
        for number in range(rounds):
            for workers in (1, 2):
                found.setdefault(f"forwards, {workers}", []).append(forwards(str(model), workers, 5.0))
                for way, options in ways.items():
                    words = [*options, "--workers", str(workers), *(["--threads", "1"] if way == "ray" else [])]
                    found.setdefault(f"{way}, {workers}", []).append(at_work(folder, words))
            shown = ", ".join(f"{way}: {values[-1]:.1f}" for way, values in found.items())
            print(f"round {number + 1}: {shown}", flush=True)
    return found


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller campaign, two rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-ray", action="store_true")
    asked = parser.parse_args()
    rounds = asked.rounds or (2 if asked.quick else 5)
    load = os.getloadavg()[0]
    print(f"{core_count()} cores, load before it began {load:.1f}; {time.strftime('%Y-%m-%d')}")
    found = measure(1024 if asked.quick else 4096, 4, rounds, not asked.no_ray)
    print("\n| way | one, per s | two, per s | gain (median of rounds) |\n|---|---|---|---|")
    for way in dict.fromkeys(name.partition(",")[0] for name in found):
        one, two = found[f"{way}, 1"], found[f"{way}, 2"]
        gain = statistics.median(b / a for a, b in zip(one, two, strict=True))
        print(f"| {way} | {statistics.median(one):.1f} | {statistics.median(two):.1f} | {gain:.2f} |")


if __name__ == "__main__":
    main()
