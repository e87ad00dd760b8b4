"""What a pass costs here: a few timed passes of every kind on a few examples, the first of each left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

from ablate import Engine, Examples, GatingError, KeepPlan
from coar.errors import FitError
from coar.estimators.differentiable import check_differentiable
from coar.estimators.gradient.estimator import Gradient
from coar.planning.memory import inputs_held
from coar.planning.meter import run_plain

TIMED = 80  # about how many plain forwards of the timed examples all timing together takes
FEWEST = 8  # examples that are timed, if there are so many
LEAST_ROWS = 3
FEW_PASSES, MORE_PASSES = 2, 6
_PRODUCT_SIZE, _EIGEN_SIZE = 512, 384


@dataclass(frozen=True)
class Speeds:
    """Seconds on this machine.

    Attributes:
      device: Where the model ran, e.g. "cpu" or "cuda".
      threads: Of the CPU.
      timed_examples: How many examples were timed.
      start: Once per worker: loading and checking the model, reading and hashing the data.
      read: Reading one example where they do not stay in memory, else 0.
      plain: A plain forward, per example.
      ablated: A forward under a keep-vector, per example, everything around it included.
      gradient: A pass of the gradient estimator, forward and backward, its gates and sums included, per example; None:
        there are no gradients, and `no_gradients` says why.
      finish: Of the gradient estimator after its passes, per example.
      product: One multiplication of a float64 matrix product.
      eigen: One cubed size of a float64 eigendecomposition.
    """

    device: str
    threads: int
    timed_examples: int
    start: float
    read: float
    plain: float
    ablated: float
    gradient: float | None
    finish: float
    product: float
    eigen: float
    no_gradients: str | None = None


def measure_speeds(
    engine: Engine, examples: Examples, plan: KeepPlan, estimator: Gradient | None, start: float, seconds: float
) -> Speeds:
    """Returns what passes cost here. Mutates nothing.

    Args:
      engine: What runs the model.
      examples: All of them; some are timed.
      plan: Whose first rows are run.
      estimator: Whose passes are run; None: none.
      start: Seconds that loading the model took.
      seconds: About how long the timing may take; on a slow model fewer examples are timed.
    """
    some = examples.take(range(_how_many(engine, examples, seconds)))
    read = _once(lambda: examples.take(range(len(some))).hash) / len(some)
    plain = _typical(engine, lambda: run_plain(engine, some)) / len(some)
    stacked = engine.device.type == "cuda" or engine.mode == "activation"  # several rows per forward of few examples
    rows = min(plan.rows, max(LEAST_ROWS, -(-engine.batch_size // len(some)) if stacked else LEAST_ROWS))
    keep = plan.take(0, rows)
    ablated = _typical(engine, lambda: engine.outputs(keep, some)) / (rows * len(some))
    gradient, finish, why = None, 0.0, None
    if estimator is not None:
        try:
            check_differentiable(engine, examples)
            gradient, finish = _gradient(engine, some, estimator)
        except (FitError, GatingError) as error:
            why = str(error)
    return Speeds(
        device=str(engine.device),
        threads=torch.get_num_threads(),
        timed_examples=len(some),
        start=start + read * len(examples),
        read=0.0 if _stay(engine, examples) else read,
        plain=plain,
        ablated=ablated,
        gradient=gradient,
        finish=finish,
        product=_product(),
        eigen=_eigen(),
        no_gradients=why,
    )


def fit_seconds(speeds: Speeds, rows: int, components: int, examples: int) -> float:
    """Returns about how long ridge regression with its choice of penalties takes on so many fitted rows.

    Left out: reading and writing stores, which takes some tenths of a second even for the smallest.
    """
    size = min(rows, components)
    return speeds.product * rows * components * (2 * size + 6 * examples) + speeds.eigen * float(size) ** 3


def _how_many(engine: Engine, examples: Examples, seconds: float) -> int:
    """Returns how many examples to time: a batch, or all; on the CPU fewer where those would take too long."""
    most = min(len(examples), engine.batch_size)
    if engine.device.type == "cuda":  # fewer would be stacked in one forward, as all together may not be
        return most
    few = examples.take(range(min(FEWEST, most)))
    each = _typical(engine, lambda: run_plain(engine, few), least=1) / len(few)
    return int(min(most, max(len(few), seconds / (TIMED * each))))


def _gradient(engine: Engine, examples: Examples, estimator: Gradient) -> tuple[float, float]:
    """Returns the seconds per example of a pass of the estimator, and of what comes after all passes."""

    def run(passes: int) -> float:
        own = replace(estimator, passes=passes, forward_rows=0)
        return _typical(engine, lambda: own.estimate(engine, examples, 0, 0), least=2) / len(examples)

    few, more = run(FEW_PASSES), run(MORE_PASSES)
    each = (more - few) / (MORE_PASSES - FEW_PASSES)
    if each <= 0:  # disturbed by something else on the machine
        each = more / MORE_PASSES
    return each, max(0.0, few - FEW_PASSES * each)


def _typical(engine: Engine, run: Callable[[], object], least: int = 3) -> float:
    """Returns the median seconds of a few runs, after one that does not count."""
    run()
    times: list[float] = []
    while len(times) < least:
        _wait(engine)
        begun = time.perf_counter()
        run()
        _wait(engine)
        times.append(time.perf_counter() - begun)
    return median(times)


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


def _product() -> float:
    matrix = np.random.default_rng(0).random((_PRODUCT_SIZE, _PRODUCT_SIZE))
    return _fastest(lambda: matrix @ matrix) / _PRODUCT_SIZE**3


def _eigen() -> float:
    matrix = np.random.default_rng(0).random((_EIGEN_SIZE, _EIGEN_SIZE))
    symmetric = matrix @ matrix.T
    return _fastest(lambda: np.linalg.eigh(symmetric)) / _EIGEN_SIZE**3


def _fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _once(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _stay(engine: Engine, examples: Examples) -> bool:
    """Returns whether the engine holds all examples between blocks, so that they are read once."""
    return examples.in_memory or len(examples) <= inputs_held(engine, examples.bytes_per_example)
