"""The headline: what estimators cost at equal correlation."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.cost_quality.config import Config


def cost_at(curve: pd.DataFrame, target: float) -> float:
    """Returns the cost at which a curve first reaches a correlation, by interpolation in log cost; NaN if never.

    If the cheapest budget is above the target already, its cost: an upper bound.
    """
    ordered = curve.sort_values("cost")
    cost, mean = ordered["cost"].to_numpy(float), ordered["mean"].to_numpy(float)
    reached = np.flatnonzero(mean >= target)
    if not len(reached):
        return float("nan")
    first = int(reached[0])
    if first == 0:
        return float(cost[0])
    share = (target - mean[first - 1]) / (mean[first] - mean[first - 1])
    return float(np.exp(np.log(cost[first - 1]) + share * (np.log(cost[first]) - np.log(cost[first - 1]))))


def headline(records: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Returns per network: the target correlation, what each way costs there, and the ratio."""
    rows = []
    for name, network in config.networks.items():
        mine = records[records["network"] == name]
        regression = mine[mine["estimator"].str.startswith("regression")]
        most = regression[regression["budget"] == regression["budget"].max()]
        target = float(most["mean"].max()) if network.target == "regression" else network.target
        ways = {way: cost_at(part, target) for way, part in regression.groupby("estimator")}
        reached = {way: cost for way, cost in ways.items() if np.isfinite(cost)}
        best = min(reached, key=lambda way: reached[way]) if reached else "none reaches it"
        gradient = mine[mine["estimator"] == "gradient"]
        cost = cost_at(gradient, target)
        # at least: where no regression reaches the target, all of its rows were not enough
        spent = reached[best] if reached else float(regression["cost"].max())
        rows.append(
            {
                "network": name,
                "components": int(mine["components"].iloc[0]),
                "ablate fraction": network.ablate_fraction,
                "target": target,
                "best regression": best,
                "its cost": spent,
                "gradient's cost": cost,
                "ratio": spent / cost,
                "ratio is": ("exact" if reached else "at least")
                + ("" if gradient["mean"].min() < target else ", at its cheapest"),
            }
        )
    return pd.DataFrame(rows)
