"""Layouts: parts of equal size that waste little, and costs that rank layouts as they are read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stores.format.layout import (
    COLUMN,
    COPY_KINDS,
    LONGEST,
    MOST_ACROSS,
    ROW,
    SLAB_COLUMNS,
    Layout,
    copy_layout,
    slab_width,
    tile_width,
)

EVERYTHING = slice(None)
BLOCKS = Layout((256, 20_096), (256, 128), 4)
SHAPE = (50_000, 20_000)


@pytest.mark.parametrize(
    ("columns", "width"), [(0, 1), (1, 1), (700, 700), (2048, 2048), (2049, 1025), (5000, 1667), (50_000, 2000)]
)
def test_slabs_are_about_equal(columns: int, width: int) -> None:
    assert slab_width(columns) == width


@given(st.integers(1, 4096), st.integers(1, 60_000), st.sampled_from([1, 2, 4, 8]))
def test_tiles_cover_all_columns_and_waste_less_than_one_each(block: int, columns: int, itemsize: int) -> None:
    width = tile_width(block, columns, itemsize)
    tiles = -(-columns // width)

    assert 1 <= width <= min(columns, SLAB_COLUMNS)
    assert tiles * width - columns < tiles


@given(
    st.sampled_from(COPY_KINDS),
    st.integers(1, 300_000),
    st.integers(1, 5_000),
    st.sampled_from([4, 8]),
    st.integers(2**20, 2**27),
)
def test_a_copy_holds_whole_rows_or_columns_in_shards_of_bounded_size(
    kind: str, length: int, count: int, itemsize: int, shard_bytes: int
) -> None:
    shape = (length, count) if kind == COLUMN else (count, length)
    layout = copy_layout(kind, shape, itemsize, shard_bytes)
    along, across = (0, 1) if kind == COLUMN else (1, 0)

    assert all(s % i == 0 for s, i in zip(layout.shard, layout.inner, strict=True))
    assert layout.inner[along] == layout.shard[along] == (length if length <= LONGEST else layout.inner[along])
    assert layout.inner[along] <= LONGEST
    assert 1 <= layout.inner[across] <= min(count, MOST_ACROSS)
    least = layout.inner[0] * layout.inner[1] * itemsize
    assert layout.shard[0] * layout.shard[1] * itemsize <= max(shard_bytes, least)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_regions_cover_a_matrix_once(rows: int, columns: int, down: int, across: int) -> None:
    covered = np.zeros((rows, columns), dtype=int)
    for region in Layout((down, across), (1, 1), 4).regions((rows, columns)):
        covered[region] += 1

    assert (covered == 1).all()


def test_files_are_those_that_hold_what_is_asked_for() -> None:
    layout = Layout((4, 6), (4, 2), 4)

    assert layout.files((10, 20), np.array([9, 0, 1]), slice(5, 7)) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert layout.files((10, 20), slice(None), np.array([19])) == [(0, 3), (1, 3), (2, 3)]
    assert layout.files((10, 20), slice(0, 10, 8), slice(0, 0)) == []


def test_costs_rank_layouts_as_they_are_read() -> None:
    row, column = copy_layout(ROW, SHAPE, 4), copy_layout(COLUMN, SHAPE, 4)
    one, everything = np.array([7]), EVERYTHING

    def cost(layout: Layout, rows: object, columns: object) -> float:
        return layout.seconds(SHAPE, rows, columns)  # type: ignore[arg-type]

    assert cost(row, one, everything) * 10 < cost(BLOCKS, one, everything) < cost(column, one, everything)
    assert cost(column, everything, one) * 10 < cost(BLOCKS, everything, one) < cost(row, everything, one)
    assert cost(BLOCKS, slice(0, 256), everything) < 2 * cost(row, slice(0, 256), everything), (
        "whole blocks are good as is"
    )
