"""What a plan says: its numbers as a table and as JSON-able values, and all of it as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from coar.planning.advice import duration, need_said, round_up, size
from coar.planning.curve import CAVEAT, GRADIENT, Need, curves
from coar.planning.memory import with_held_out
from coar.planning.options import Option
from coar.planning.speeds import Speeds
from coar.planning.unablated import Unablated


@dataclass(frozen=True)
class Plan:
    """What a spec would cost, before it runs. `print(plan.text())` says all of it.

    Attributes:
      components, examples: Of the model and the data.
      block_rows: Keep-vectors per block of a campaign.
      ablate_fraction: As in the spec.
      workers: How many are planned for, each as fast as this machine.
      speeds: What passes cost here.
      options: Regressions and gradient estimates side by side.
      needs: For a target correlation, what it took on the measured networks, per way: rows per component, or passes.
      recommendation: Which option, and why.
      notes: What else to know.
      unablated: How often the model is right before anything is ablated; None where it does not predict classes.
    """

    components: int
    examples: int
    block_rows: int
    ablate_fraction: float | tuple[float, ...]
    workers: int
    speeds: Speeds
    options: tuple[Option, ...]
    needs: Mapping[str, Need]
    recommendation: str
    notes: tuple[str, ...]
    unablated: Unablated | None = None

    def __repr__(self) -> str:
        return f"<Plan: {self.components:,} components, {self.examples:,} examples, {len(self.options)} options>"

    def table(self) -> pd.DataFrame:
        """Returns one row per option; seconds and hours of what is left, bytes when finished."""
        rows = []
        for option in self.options:
            values = {key: value for key, value in asdict(option).items() if key != "quality"}
            quality = {"correlation_low": option.quality.low, "correlation_high": option.quality.high}
            rows.append({**values, **quality})
        return pd.DataFrame(rows)

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON-able values."""
        own = ("components", "examples", "block_rows", "ablate_fraction", "workers", "recommendation")
        return {
            **{name: getattr(self, name) for name in own},
            "speeds": asdict(self.speeds),
            "options": [option.as_dict() for option in self.options],
            "needs": {way: asdict(need) for way, need in self.needs.items()},
            "unablated": None if self.unablated is None else self.unablated.as_dict(),
            "notes": list(self.notes),
            "caveat": CAVEAT,
        }

    def text(self) -> str:
        """Returns the plan for people: facts, what was timed, the options, the recommendation, the notes."""
        accuracy = [] if self.unablated is None else [self.unablated.text()]
        parts = [self._facts(), *accuracy, self._timed(), self._shown().to_string(index=False)]
        parts += [self._need(way, need) for way, need in self.needs.items()]
        parts += [self.recommendation, *self.notes, CAVEAT]
        return "\n".join(parts)

    def _facts(self) -> str:
        return (
            f"{self.components:,} components x {self.examples:,} examples, ablate fraction {self.ablate_fraction}, "
            f"blocks of {self.block_rows} rows; {self.workers} {'worker' if self.workers == 1 else 'workers'}."
        )

    def _timed(self) -> str:
        speeds = self.speeds
        gradient = "not possible" if speeds.gradient is None else _milliseconds(speeds.gradient)
        return (
            f"Timed on {speeds.device} (CPU threads: {speeds.threads}) on {speeds.timed_examples} examples, per "
            f"example: plain forward {_milliseconds(speeds.plain)}, ablated forward {_milliseconds(speeds.ablated)}, "
            f"gradient pass {gradient}. A worker takes {duration(speeds.start)} to start."
        )

    def _shown(self) -> pd.DataFrame:
        hours = "CPU core hours" if self.speeds.device == "cpu" else "GPU hours"
        rows = []
        for option in self.options:
            row = {
                "way": option.name,
                "expected correlation": str(option.quality),
                "1 worker": duration(option.seconds),
            }
            if self.workers > 1:
                row[f"{self.workers} workers"] = duration(option.wall_seconds)
            rows.append(
                {
                    **row,
                    hours: f"{option.hours:.3g}",
                    "passes of an example": f"{(option.forwards + option.backwards) // self.examples:,}",
                    "blocks left": f"{option.blocks_left:,} of {option.blocks:,}",
                    "on disk": size(option.bytes),
                    "memory": size(option.engine_memory + option.memory),
                    "fit": "-"
                    if not option.fit_memory
                    else f"{duration(option.fit_seconds)}, {size(option.fit_memory)}",
                }
            )
        return pd.DataFrame(rows)

    def _need(self, way: str, need: Need) -> str:
        most = max((curve.budgets[-1] for curve in curves(way) if curve.network in need.short), default=0.0)
        if way == GRADIENT:
            return need_said(need, way, 1.0, f"{most:g} passes")
        scale = with_held_out(self.components)
        return need_said(need, way, scale, f"{round_up(most * scale):,} rows")


def _milliseconds(seconds: float) -> str:
    """Returns the time of a single pass in milliseconds."""
    return f"{seconds * 1000:.3g} ms"
