"""What a fit costs: `python -m experiments.bench.regression [--components 2300 --rows 8000 --examples 1000] [--quick]`.

Planted linear outputs with noise, 5 % ablated. In one run and one process: the product's fit with a penalty per example
by leave-one-out, scikit-learn's RidgeCV on the same grid, which answers the same question, and a loop of scikit-learn's
Ridge per example, of which a few are run and the time is scaled up. Writes docs/benchmarks/regression.md.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.linear_model import Ridge, RidgeCV
from zarr.storage import MemoryStore

import coar
from ablate import ComponentIndex, KeepPlan, Port
from coar.estimators.regression.arrays import NumpyArrays
from coar.estimators.regression.fit import RIDGE_GRID
from coar.estimators.regression.packed import PackedKeep
from coar.estimators.regression.ridge import Penalties, decompose, solve
from stores import CampaignStore
from stores.format.keepbits import pack_keep

Matrix = npt.NDArray[np.float64]
TABLE = Path("docs/benchmarks/regression.md")
HEADER = """# What a fit costs

`python -m experiments.bench.regression --components {components} --rows {rows} --examples {examples}`, {threads}
thread(s): {rows:,} keep-vectors of {components:,} components, {examples:,} examples, {grid} penalties; every row is
fitted, everybody's numbers are float64. One run, one process.

- `fit`: `coar.fit` from a campaign store in memory to an attribution store in memory, standard errors included.
- `linear algebra`: the same without stores: decomposition, leave-one-out over the grid, solution, standard errors.
- `fit, one penalty`: `coar.fit(ridge=...)`.
- `RidgeCV`: scikit-learn's `RidgeCV(alpha_per_target=True)` on all examples at once, on the same {grid} penalties:
  the same choice by leave-one-out ({same:.1%} of the examples get the same penalty), without standard errors.
- `Ridge in a loop`: one scikit-learn `Ridge` with one given penalty per example; {few} of them were run, the time is
  scaled up to {examples:,}. It chooses nothing.

Processor seconds are of all threads together; other programs on the machine disturb them less than the clock.

Largest difference of the weights from RidgeCV's, as a share of the largest weight, over examples with the same penalty:
{difference:.1e}.

"""


def make_campaign(keep: npt.NDArray[np.bool_], outputs: npt.NDArray[np.float32], fraction: float) -> CampaignStore:
    """Returns a finished campaign of these rows in memory, as `ablate.run` writes it."""
    rows, components = keep.shape
    index = ComponentIndex([Port("linear_neuron", 0, "planted", "planted.weight", "out", 0, components, 1, 1)])
    identity = {"model": "planted", "data": "planted", "index": index.hash, "output": "margin"}
    plan = KeepPlan(components, rows, fraction).describe()
    examples = outputs.shape[1]
    store = CampaignStore.create(
        MemoryStore(),
        header={
            "identity": {**identity, "plan": plan},
            "spec": {},
            "loadable": False,
            "index": index.to_json(),
            "environments": [],
        },
        components=index.columns,
        examples={
            "id": np.array([f"e{i}" for i in range(examples)], dtype=object),
            "label": np.zeros(examples, dtype=np.int64),
            "group": np.array([""] * examples, dtype=object),
        },
        rows=rows,
        block_rows=64,
    )
    for block in store.missing_blocks():
        span = store.span(block)
        store.write_block(block, keep[span], outputs[span])
    return store


def timed(what: str, work: Callable[[], Any]) -> tuple[Any, Matrix]:
    """Returns the result of a call and its seconds: by the clock, and of the processor (all threads)."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = work()
    seconds = np.array([time.perf_counter(), time.process_time()]) - start
    print(f"{what}: {seconds[0]:.2f} s, {seconds[1]:.2f} s of the processor", flush=True)
    return result, seconds


def linear_algebra(keep: npt.NDArray[np.bool_], outputs: npt.NDArray[np.float32]) -> Any:
    """Returns the solution that `coar.fit` writes, from matrices in memory."""
    Y = outputs.astype(np.float64)
    Y -= Y.mean(axis=0)
    spectrum = decompose(PackedKeep(pack_keep(keep), keep.shape[1]), NumpyArrays())
    return solve(spectrum, Penalties.of(spectrum, RIDGE_GRID * spectrum.scale), Y)


def main() -> None:
    """Runs everybody in turn, prints the ratios and writes them as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--components", type=int, default=2300)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--loop", type=int, default=5, help="how many of the loop's fits are run")
    parser.add_argument("--quick", action="store_true", help="a small problem, no table written")
    parser.add_argument("--memory-gib", type=float, default=3.0)
    given = parser.parse_args()
    if given.quick:
        given.components, given.rows, given.examples = 300, 1000, 200
    fraction, generator = 0.05, np.random.default_rng(0)
    keep = KeepPlan(given.components, given.rows, fraction).take(0, given.rows)
    weights = (
        generator.normal(size=(given.components, given.examples)) * generator.exponential(1, given.components)[:, None]
    )
    noise = np.sqrt(fraction * given.components) * generator.normal(size=(given.rows, given.examples))
    outputs = (keep @ weights + noise).astype(np.float32)
    campaign = make_campaign(keep, outputs, fraction)
    K, Y = keep.astype(np.float64), outputs.astype(np.float64)
    memory = int(given.memory_gib * 2**30)

    found, whole = timed("fit", lambda: coar.fit(campaign, held_out=False, memory=memory))
    solution, algebra = timed("linear algebra", lambda: linear_algebra(keep, outputs))
    grid = RIDGE_GRID * ((K - K.mean(axis=0)) ** 2).sum() / given.components
    one = float(grid[10])
    _, single = timed("fit, one penalty", lambda: coar.fit(campaign, ridge=one, held_out=False, memory=memory))
    model, cv = timed("RidgeCV", lambda: RidgeCV(alphas=grid, alpha_per_target=True).fit(K, Y))
    few = min(given.loop, given.examples)
    _, part = timed(f"Ridge, {few} examples", lambda: [Ridge(alpha=one).fit(K, Y[:, e]) for e in range(few)])
    loop = part / few * given.examples

    same = np.isclose(solution.ridge, model.alpha_, rtol=1e-6)
    difference = np.abs(solution.weights.T - model.coef_)[same].max() / np.abs(model.coef_).max()
    stored = np.abs(found.weights[:] - solution.weights.T).max() / np.abs(solution.weights).max()
    print(f"same penalty: {same.mean():.1%}; weights differ by {difference:.1e}; stored ones by {stored:.1e}")
    ways = {
        "fit": whole,
        "linear algebra": algebra,
        "fit, one penalty": single,
        "RidgeCV": cv,
        f"Ridge in a loop (scaled up from {few})": loop,
    }
    table = pd.DataFrame(
        {
            "way": name,
            "seconds": f"{s[0]:,.1f}",
            "times fit": f"{s[0] / whole[0]:,.2f}",
            "processor seconds": f"{s[1]:,.1f}",
            "times fit (processor)": f"{s[1] / whole[1]:,.2f}",
        }
        for name, s in ways.items()
    )
    lines = ["| " + " | ".join(table.columns) + " |", "|---|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in table.itertuples(index=False, name=None)]
    text = "\n".join(lines) + "\n"
    print(text)
    if not given.quick:
        threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
        facts = {"grid": len(grid), "same": same.mean(), "few": few, "difference": difference, "threads": threads}
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        header = HEADER.format(components=given.components, rows=given.rows, examples=given.examples, **facts)
        TABLE.write_text(header + text, encoding="utf-8")


if __name__ == "__main__":
    main()
