"""What correlation to expect of a budget: the guide's measured curves, read between their points.

`python -m coar.planning.curve docs/benchmarks/cost_quality.csv` writes the package's copy of them anew.
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from coar.planning.curve_table import SOURCE, TABLE

REGRESSION, GRADIENT = "regression", "gradient"
_ESTIMATORS = {"regression, ridge": REGRESSION, "gradient": GRADIENT}
COLUMNS = ("network", "components", "ablate_fraction", "estimator", "budget", "mean")
CAVEAT = (
    f"Expected correlations were measured on small networks trained on handwritten digits ({SOURCE}); they are a "
    "guide, not a promise. What they are for your model, `coar estimate` and `coar fit` measure on held-out "
    "keep-vectors."
)


@dataclass(frozen=True)
class Curve:
    """One network's correlation against budget; ascending.

    Attributes:
      budgets: Of regression, fitted rows per component; of gradients, passes.
      correlations: Held-out correlation at each budget, mean over examples.
    """

    network: str
    way: str
    budgets: tuple[float, ...]
    correlations: tuple[float, ...]

    def at(self, budget: float) -> float:
        """Returns the correlation at a budget, between points linear in log budget; outside, that of the end point."""
        if budget <= self.budgets[0]:
            return self.correlations[0]
        for i, (low, high) in enumerate(zip(self.budgets, self.budgets[1:], strict=False)):
            if budget <= high:
                share = math.log(budget / low) / math.log(high / low)
                return self.correlations[i] + share * (self.correlations[i + 1] - self.correlations[i])
        return self.correlations[-1]

    def needed(self, target: float) -> float | None:
        """Returns the budget at which the curve first reaches a correlation; None: it does not within what was run.

        If the least budget is above the target already, that budget: an upper bound.
        """
        if self.correlations[0] >= target:
            return self.budgets[0]
        for i, after in enumerate(self.correlations[1:]):
            if after >= target:
                before, low, high = self.correlations[i], self.budgets[i], self.budgets[i + 1]
                return float(low * (high / low) ** ((target - before) / (after - before)))
        return None


@dataclass(frozen=True)
class Expected:
    """The correlations of all measured networks at one budget.

    Attributes:
      networks: Correlation per network.
      below: The budget is smaller than the smallest that was measured on some network: there it is at most so much.
      above: It is larger than the largest on some network: no more was measured.
    """

    networks: dict[str, float]
    below: bool
    above: bool

    @property
    def low(self) -> float:
        """The lowest of the measured networks."""
        return min(self.networks.values())

    @property
    def high(self) -> float:
        """The highest of the measured networks."""
        return max(self.networks.values())

    def __str__(self) -> str:
        bound = "at most " if self.below else ""
        return f"{bound}{self.low:.2f} to {self.high:.2f}"


@dataclass(frozen=True)
class Need:
    """What budgets the measured networks needed for a correlation.

    Attributes:
      target: The correlation.
      budgets: Of the networks that reached it.
      short: Of the others, the best correlation that was measured.
    """

    target: float
    budgets: dict[str, float]
    short: dict[str, float]


def expected(way: str, budget: float) -> Expected:
    """Returns what to expect of a way ("regression": fitted rows per component; "gradient": passes) at a budget."""
    found = curves(way)
    below = any(budget < curve.budgets[0] for curve in found)
    above = any(budget > curve.budgets[-1] for curve in found)
    return Expected({curve.network: curve.at(budget) for curve in found}, below, above)


def needed(way: str, target: float) -> Need:
    """Returns what a correlation took on each of the measured networks; units as for `expected`."""
    budgets, short = {}, {}
    for curve in curves(way):
        budget = curve.needed(target)
        if budget is None:
            short[curve.network] = max(curve.correlations)
        else:
            budgets[curve.network] = budget
    return Need(target, budgets, short)


@cache
def curves(way: str) -> tuple[Curve, ...]:
    """Returns the measured curves of a way, one per network."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(io.StringIO(TABLE)):
        if _ESTIMATORS[row["estimator"]] == way:
            unit = float(row["components"]) if way == REGRESSION else 1.0
            points.setdefault(row["network"], []).append((float(row["budget"]) / unit, float(row["mean"])))
    found = []
    for network, pairs in points.items():
        budgets, correlations = zip(*sorted(pairs), strict=True)
        found.append(Curve(network, way, budgets, correlations))
    return tuple(found)


def table_of(lines: Sequence[str]) -> str:
    """Returns the part of the benchmark's CSV (its lines) that the package has a copy of."""
    return "".join(_kept(lines))


def _kept(lines: Sequence[str]) -> Iterator[str]:
    yield ",".join(COLUMNS) + "\n"
    for row in csv.DictReader(lines):
        if row["estimator"] in _ESTIMATORS:
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerow(row[column] for column in COLUMNS)
            yield out.getvalue()


def write_table(source: Path, target: Path) -> None:
    """Writes the module with the package's copy of the benchmark's CSV."""
    table = table_of(source.read_text(encoding="utf-8").splitlines())
    target.write_text(
        '"""The guide\'s curves: a copy that `python -m coar.planning.curve CSV` writes. Do not edit it by hand."""\n\n'
        f'from __future__ import annotations\n\nSOURCE = "{SOURCE}"\nTABLE = """\\\n{table}"""\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    write_table(Path(sys.argv[1]), Path(__file__).with_name("curve_table.py"))
