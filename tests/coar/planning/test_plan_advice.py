"""Which option is recommended, on options whose every figure the test sets; and how numbers are said."""

from __future__ import annotations

from typing import Any

import pytest

from coar.planning.advice import advise, duration, need_said, round_up, size
from coar.planning.curve import Expected, Need
from coar.planning.options import Option


def _option(way: str, budget: int, wall: float, *correlations: float, **others: Any) -> Option:
    networks = {f"net{i}": value for i, value in enumerate(correlations)}
    values: dict[str, Any] = {
        "purpose": "spec",
        "forwards": 1,
        "backwards": 0,
        "blocks": 4,
        "blocks_left": 4,
        "seconds": wall,
        "fit_seconds": 0.0,
        "hours": 1.0,
        "bytes": 1,
        "engine_memory": 1,
        "memory": 1,
        "fit_memory": 0,
    }
    quality = Expected(networks, below=False, above=False)
    return Option(way=way, budget=budget, quality=quality, wall_seconds=wall, **{**values, **others})


def test_better_and_faster() -> None:
    found = advise([_option("regression", 1000, 600, 0.8, 0.9), _option("gradient", 50, 30, 0.85, 0.95)], None)
    assert found == (
        "Take gradient, 50 passes (30 s, expected correlation 0.85 to 0.95): expected to be as good or better on all 2 "
        "measured networks, and faster than regression, 1,000 rows (10 min, expected correlation 0.80 to 0.90)."
    )


def test_regression_where_it_is_better_and_faster() -> None:
    found = advise([_option("regression", 1000, 20, 0.9, 0.95), _option("gradient", 50, 30, 0.8, 0.9)], None)
    assert found.startswith("Take regression, 1,000 rows (20 s, ")


def test_the_faster_of_two_that_are_as_good() -> None:
    regression = _option("regression", 1000, 20, 0.9, 0.95)
    assert advise([regression, _option("gradient", 50, 30, 0.902, 0.951)], None).startswith("Take regression")
    assert advise([regression, _option("gradient", 50, 10, 0.898, 0.949)], None).startswith("Take gradient")


def test_better_but_slower_says_that_the_other_is_faster() -> None:
    found = advise([_option("regression", 1000, 20, 0.5, 0.6), _option("gradient", 50, 30, 0.9, 0.9)], None)
    assert found.startswith("Take gradient, 50 passes")
    assert found.endswith("; regression, 1,000 rows is faster (20 s, expected correlation 0.50 to 0.60).")


def test_not_better_everywhere_is_not_called_so() -> None:
    found = advise([_option("regression", 1000, 200, 0.95, 0.5), _option("gradient", 50, 30, 0.9, 0.9)], None)
    assert "expected to be better on average over the measured networks" in found
    assert "on all" not in found


def test_of_several_numbers_of_rows_the_cheapest_as_good_is_the_rival() -> None:
    rows = [_option("regression", n, n / 10, q, q, purpose="choice") for n, q in ((100, 0.5), (400, 0.9), (800, 0.91))]
    assert "faster than regression, 400 rows" in advise([*rows, _option("gradient", 50, 30, 0.9, 0.9)], None)


def test_without_gradients() -> None:
    assert advise([_option("regression", 1000, 20, 0.5, 0.6)], None) == (
        "Take regression, 1,000 rows (20 s, expected correlation 0.50 to 0.60): an estimate from gradients is not "
        "possible here."
    )


def test_the_faster_way_to_a_target() -> None:
    options = [
        _option("regression", 1000, 20, 0.5, 0.6),
        _option("regression", 9000, 180, 0.9, 0.95, purpose="target"),
        _option("gradient", 8, 9, 0.9, 0.95, purpose="target"),
    ]
    assert advise(options, 0.9) == (
        "Take gradient, 8 passes (9 s, expected correlation 0.90 to 0.95): to a correlation of 0.9 it is the faster "
        "way, regression, 9,000 rows takes 3 min."
    )
    assert "the only way that reached 0.9" in advise([options[0], options[2]], 0.9)
    assert "no measured network had a correlation of 0.999" in advise(
        [*options[:1], _option("gradient", 9, 9, 1)], 0.999
    )


def test_what_is_left_is_called_so() -> None:
    half = _option("regression", 1000, 20, 0.9, blocks_left=1)
    assert "(20 s for what is left, expected" in advise([half, _option("gradient", 50, 30, 0.8)], None)
    fit = _option("regression", 1000, 0.5, 0.9, blocks_left=0, fit_memory=1)
    assert "(500 ms for the fit, all blocks are done, expected" in advise([fit, _option("gradient", 50, 30, 0.8)], None)
    done = _option("gradient", 50, 0.0, 0.9, blocks_left=0)
    assert "(done already, expected" in advise([fit, done], None)


def test_needs_in_words() -> None:
    need = Need(0.9, {"a": 2.0, "b": 4.5}, {"c": 0.76})
    assert need_said(need, "regression", 100.0, "1,100 rows") == (
        "A correlation of 0.9 by regression: 200 to 450 rows, as on a, b; not reached with 1,100 rows on the others "
        "(c 0.760)."
    )
    assert need_said(Need(0.9, {}, {"c": 0.76}), "gradient", 1.0, "200 passes") == (
        "A correlation of 0.9 by gradient: never reached (c 0.760)."
    )
    assert need_said(Need(0.9, {"a": 4.2}, {}), "gradient", 1.0, "200 passes") == (
        "A correlation of 0.9 by gradient: 5 passes, as on a."
    )


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.2, 1), (7, 7), (7.2, 8), (99, 99), (99.5, 100), (101, 110), (1234, 1300), (8000, 8000)]
)
def test_rounding_up(value: float, rounded: int) -> None:
    assert round_up(value) == rounded


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (1.5, "1.5 s"), (119, "119 s"), (600, "10 min"), (7200, "2 h"), (100 * 86400, "100.0 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(3, "3 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (2**41, "2.0 TiB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
