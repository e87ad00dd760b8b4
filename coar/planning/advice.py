"""Which of the planned options to take, and why, in one sentence; and how numbers are said."""

from __future__ import annotations

from collections.abc import Sequence

from coar.planning.curve import GRADIENT, REGRESSION, Need
from coar.planning.options import Option

AS_GOOD = 0.005  # correlations that differ by less are the same


def advise(options: Sequence[Option], target: float | None) -> str:
    """Returns which option to take and why, one sentence."""
    regressions = [option for option in options if option.way == REGRESSION]
    gradients = [option for option in options if option.way == GRADIENT]
    if not gradients:
        best = _only(regressions, target)
        return f"Take {best.name} ({said(best)}): an estimate from gradients is not possible here."
    if target is not None:
        return _for_target(regressions, gradients, target)
    chosen = next((option for option in gradients if option.purpose == "spec"), gradients[-1])
    return _between(_rival(regressions, chosen), chosen)


def said(option: Option) -> str:
    """Returns an option's time and expected correlation, in words."""
    time = duration(option.wall_seconds)
    if not option.blocks_left:
        time = f"{time} for the fit, all blocks are done" if option.fit_memory else "done already"
    elif option.blocks_left < option.blocks:
        time = f"{time} for what is left"
    return f"{time}, expected correlation {option.quality}"


def _for_target(regressions: Sequence[Option], gradients: Sequence[Option], target: float) -> str:
    reaching = [o for o in (*regressions, *gradients) if o.purpose == "target"]
    if not reaching:
        best = max((*regressions, *gradients), key=lambda option: (option.quality.low, -option.wall_seconds))
        return (
            f"Take {best.name} ({said(best)}), and see what it reaches: no measured network had a correlation of "
            f"{target:g}."
        )
    best = min(reaching, key=lambda option: option.wall_seconds)
    others = [option for option in reaching if option.way != best.way]
    if not others:
        return f"Take {best.name} ({said(best)}): the only way that reached {target:g} on a measured network."
    return (
        f"Take {best.name} ({said(best)}): to a correlation of {target:g} it is the faster way, {others[0].name} takes "
        f"{duration(others[0].wall_seconds)}."
    )


def _between(regression: Option, gradient: Option) -> str:
    """Returns the choice between one regression and one gradient estimate."""
    networks = gradient.quality.networks
    gains = [value - regression.quality.networks[name] for name, value in networks.items()]
    good, other = (gradient, regression) if sum(gains) >= -AS_GOOD * len(gains) else (regression, gradient)
    sign = 1 if good is gradient else -1
    everywhere = all(sign * gain >= -AS_GOOD for gain in gains)
    quality = (
        f"expected to be as good or better on all {len(gains)} measured networks"
        if everywhere
        else "expected to be better on average over the measured networks"
    )
    if good.wall_seconds <= other.wall_seconds:
        return f"Take {good.name} ({said(good)}): {quality}, and faster than {other.name} ({said(other)})."
    if max(abs(gain) for gain in gains) <= AS_GOOD:
        return f"Take {other.name} ({said(other)}): as good as {good.name} ({said(good)}), and faster."
    return f"Take {good.name} ({said(good)}): {quality}; {other.name} is faster ({said(other)})."


def _rival(regressions: Sequence[Option], gradient: Option) -> Option:
    """Returns the regression to compare with: the cheapest that is as good on every network, else the best."""
    as_good = [
        option
        for option in regressions
        if all(option.quality.networks[name] >= value - AS_GOOD for name, value in gradient.quality.networks.items())
    ]
    if as_good:
        return min(as_good, key=lambda option: option.wall_seconds)
    return max(regressions, key=lambda option: sum(option.quality.networks.values()))


def _only(options: Sequence[Option], target: float | None) -> Option:
    wanted = "spec" if target is None else "target"
    return next((option for option in options if option.purpose == wanted), options[-1])


def need_said(need: Need, way: str, scale: float, largest: str) -> str:
    """Returns what a target correlation took on the measured networks, in words; `scale` turns budgets into units."""
    unit = "rows" if way == REGRESSION else "passes"
    parts = []
    if need.budgets:
        low, high = (
            f"{round_up(value * scale):,}" for value in (min(need.budgets.values()), max(need.budgets.values()))
        )
        amount = f"{low} {unit}" if low == high else f"{low} to {high} {unit}"
        parts.append(f"{amount}, as on {', '.join(need.budgets)}")
    if need.short:
        best = ", ".join(f"{name} {value:.3f}" for name, value in need.short.items())
        parts.append(
            f"not reached with {largest} on the others ({best})" if need.budgets else f"never reached ({best})"
        )
    return f"A correlation of {need.target:g} by {way}: {'; '.join(parts)}."


def round_up(value: float) -> int:
    """Returns a number of rows or passes, rounded up to two digits that count."""
    whole = max(1, -int(-value // 1))
    step = int(10 ** max(0, len(str(whole)) - 2))
    return -(-whole // step) * step


def duration(seconds: float) -> str:
    """Returns a time in the unit that people would use."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{_short(seconds)} s"
    if seconds < 2 * 3600:
        return f"{_short(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"{_short(seconds / 3600)} h"
    return f"{seconds / 86400:,.1f} days"


def size(count_of_bytes: float) -> str:
    """Returns a number of bytes in the unit that people would use."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_of_bytes < 1024:
            return f"{_short(count_of_bytes)} {unit}"
        count_of_bytes /= 1024
    return f"{count_of_bytes:,.1f} TiB"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
