"""What the store costs a campaign: the share of writing, two workers beside one, and cost as a campaign grows."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import ablate
from ablate.loading import load_model
from ablate.loading.sources import TorchvisionModel
from experiments.bench.store_timing import files_of, markdown, paragraph

TIMEOUT = 600
COMMAND = [sys.executable, "-m", "experiments.bench.stores", "--campaign"]


@dataclass(frozen=True)
class Campaign:
    """A campaign of a torchvision network with random weights on random images; everything by seed."""

    rows: int
    examples: int
    pixels: int
    block_rows: int
    batch: int
    network: str = "resnet18"

    @property
    def pairs(self) -> int:
        """Forwards in all."""
        return self.rows * self.examples

    def spec(self) -> ablate.CampaignSpec:
        """Returns the spec."""
        model, _ = load_model(TorchvisionModel(source="torchvision", name=self.network))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.examples, 3, self.pixels, self.pixels, generator=generator)
        return ablate.CampaignSpec(
            model=model,
            data=(images, torch.arange(self.examples) % 1000),
            rows=self.rows,
            ablate_fraction=0.05,
            batch_size=self.batch,
            block_rows=self.block_rows,
            device="cpu",
            components={"kinds": ["conv_filter"]},
        )


@dataclass(frozen=True)
class Run:
    """What one process measured of its part of a campaign.

    Attributes:
      began, ended: When it began with the first block, and had ended the last one; seconds of the machine's clock.
      computing: Seconds spent in the engine; all others between `began` and `ended` are the store's.
      processor: Processor seconds of all threads between them.
      rows: How many it computed.
      peak: The largest resident memory in bytes, loading included.
    """

    began: float
    ended: float
    computing: float
    processor: float
    rows: int
    peak: int

    @property
    def seconds(self) -> float:
        """From the first block to the end."""
        return self.ended - self.began


class _Watch(logging.Handler):
    """Notes when the work on a store begins and ends, and the rows of finished blocks."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.times: dict[str, tuple[float, float]] = {}
        self.rows = 0

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", "")
        self.times[event] = time.time(), time.process_time()
        if event == "block_finished":
            self.rows += int(getattr(record, "rows", 0))


@contextmanager
def _watching() -> Iterator[_Watch]:
    log, watch = logging.getLogger("ablate.work"), _Watch()
    level = log.level
    log.addHandler(watch)
    log.setLevel(logging.INFO)
    try:
        yield watch
    finally:
        log.removeHandler(watch)
        log.setLevel(level)


def run_here(campaign: Campaign, place: str | os.PathLike[str]) -> Run:
    """Runs a campaign, or takes part in it, in this process."""
    outputs, spent = ablate.Engine.outputs, 0.0

    with _watching() as watch:

        def timed(*arguments: Any, **options: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return outputs(*arguments, **options)
            finally:
                if "worker_began" in watch.times:  # before, the network is compared with the store's
                    spent += time.perf_counter() - start

        with patch.object(ablate.Engine, "outputs", timed):
            ablate.run(campaign.spec(), place, progress=False)
    now = time.time(), time.process_time()  # where others had finished everything before
    began, ended = watch.times.get("worker_began", now), watch.times.get("worker_ended", now)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Run(began[0], ended[0], spent, ended[1] - began[1], watch.rows, peak)


def start(campaign: Campaign, place: Path, threads: int) -> subprocess.Popen[str]:
    """Returns a process that runs the campaign, or takes part in it, with so many threads."""
    settings = json.dumps(asdict(campaign) | {"store": os.fspath(place)})
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([*COMMAND, settings], stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603


def result(process: subprocess.Popen[str]) -> Run:
    """Returns what a process measured; raises if it failed."""
    try:
        text, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise RuntimeError(f"A worker ended with exit code {process.returncode}.")
    return Run(**json.loads(text.splitlines()[-1]))


def run_given(settings: str) -> None:
    """Runs the campaign that `start` describes, and prints what it measured as JSON."""
    values = json.loads(settings)
    print(json.dumps(asdict(run_here(Campaign(**{k: v for k, v in values.items() if k != "store"}), values["store"]))))


def share_part(folder: Path, campaign: Campaign, threads: int) -> list[str]:
    """Returns how much of a campaign's time is not spent computing."""
    place = folder / "share.zarr"
    found = result(start(campaign, place, threads))
    blocks = -(-campaign.rows // campaign.block_rows)
    rest = found.seconds - found.computing
    return [
        f"## What the store costs a campaign: {campaign.network} at {campaign.pixels} px",
        "",
        *paragraph(
            f"{campaign.rows} keep-vectors x {campaign.examples} images, random weights, {threads} threads, blocks of "
            f"{campaign.block_rows} rows. Everything that is not the engine counts as the store's: claiming, "
            "keep-vectors, encoding, reading back, sha256, waiting for the disk, marks, leases, records. A block of a "
            "real campaign has many more images, and so a smaller share."
        ),
        *markdown(
            ["what", "value"],
            [
                ["computing, s", f"{found.computing:.2f}"],
                ["all else, s", f"{rest:.3f}"],
                [f"all else per block ({blocks} blocks), ms", f"{1e3 * rest / blocks:.1f}"],
                ["share of all else", f"{rest / found.seconds:.2%}"],
                ["one forward, ms", f"{1e3 * found.computing / campaign.pairs:.2f}"],
            ],
        ),
    ]


def scale_part(folder: Path, campaign: Campaign) -> list[str]:
    """Returns the throughput of one worker and of two that share a store."""
    alone = result(start(campaign, folder / "one.zarr", 1))
    processes = [start(campaign, folder / "two.zarr", 1) for _ in range(2)]
    both = [result(process) for process in processes]
    one = campaign.rows / alone.seconds
    two = campaign.rows / (max(run.ended for run in both) - min(run.began for run in both))
    same = _same(folder / "one.zarr", folder / "two.zarr")
    return [
        f"## Two workers beside one: {campaign.network} at {campaign.pixels} px",
        "",
        *paragraph(
            f"{campaign.rows} keep-vectors x {campaign.examples} images in blocks of {campaign.block_rows}; the same "
            "command once, then twice at the same time, one thread each, from the first block to the last. "
            f"The two stores hold {'the same bytes' if same else 'DIFFERENT BYTES'}."
        ),
        *markdown(
            ["workers", "rows/s", "times one", "rows of each"],
            [
                ["1", f"{one:.2f}", "1.00", f"{alone.rows}"],
                ["2", f"{two:.2f}", f"{two / one:.2f}", " + ".join(str(run.rows) for run in both)],
            ],
        ),
    ]


def _same(one: Path, two: Path) -> bool:
    """Returns whether two stores are equal byte for byte, but for the book-keeping."""

    def contents(place: Path) -> dict[str, bytes]:
        found = {file.relative_to(place).as_posix(): file.read_bytes() for file in files_of(place)}
        return {name: data for name, data in found.items() if not name.startswith("work/")}

    return contents(one) == contents(two)


def linear_part(folder: Path, base: Campaign, factors: tuple[int, ...]) -> list[str]:
    """Returns what a forward costs as a campaign grows in rows and in examples, and the memory it takes."""
    grown = {f"{f} x rows": _grown(base, f, 1) for f in factors} | {
        f"{f} x examples": _grown(base, 1, f) for f in factors
    }
    runs: dict[str, list[Run]] = {"1 x": []}
    for name, campaign in grown.items():  # the small one again and again: the machine's speed changes, too
        runs["1 x"].append(_measured(folder, base))
        runs[name] = [_measured(folder, campaign)]
    runs["1 x"].append(_measured(folder, base))
    campaigns = {"1 x": base, **grown}

    def each(name: str, what: str) -> float:
        return float(np.median([getattr(run, what) for run in runs[name]])) / campaigns[name].pairs

    rows = [
        [
            name,
            f"{campaigns[name].rows} x {campaigns[name].examples}",
            f"{1e3 * each(name, 'seconds'):.3f}",
            f"{each(name, 'seconds') / each('1 x', 'seconds'):.3f}",
            f"{each(name, 'processor') / each('1 x', 'processor'):.3f}",
            f"{max(run.peak for run in found) / 2**20:.0f}",
        ]
        for name, found in runs.items()
    ]
    header = ["size", "rows x images", "ms per forward", "times 1 x", "processor, times 1 x", "peak memory, MiB"]
    return [
        f"## Cost as a campaign grows: {base.network} at {base.pixels} px",
        "",
        *paragraph(
            f"One thread, a process for each; the smallest size is run {len(runs['1 x'])} times in between, and its "
            f"median counts. An image takes {12 * base.pixels**2 / 2**10:.0f} KiB."
        ),
        *markdown(header, rows),
    ]


def _grown(base: Campaign, rows: int, examples: int) -> Campaign:
    return Campaign(base.rows * rows, base.examples * examples, base.pixels, base.block_rows, base.batch, base.network)


def _measured(folder: Path, campaign: Campaign) -> Run:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        return result(start(campaign, Path(place) / "campaign.zarr", 1))
