"""Bit packing: component c is bit c % 8, least significant first, of byte c // 8."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stores import pack_keep, unpack_keep

KEEP = hnp.arrays(np.bool_, st.tuples(st.integers(0, 6), st.integers(1, 40)))


def _bools(bits: str) -> npt.NDArray[np.bool_]:
    return np.array([[bit == "1" for bit in row] for row in bits.split()])


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("1", [[0x01]]),
        ("10000000", [[0x01]]),
        ("00000001", [[0x80]]),
        ("11010000", [[0x0B]]),
        ("000000001", [[0x00, 0x01]]),
        ("11111111 00000000 10101010", [[0xFF], [0x00], [0x55]]),
        ("01100000001 11111111111", [[0x06, 0x04], [0xFF, 0x07]]),
    ],
)
def test_bytes_computed_by_hand(bits: str, expected: list[list[int]]) -> None:
    packed = pack_keep(_bools(bits))

    assert packed.dtype == np.uint8
    assert packed.tolist() == expected


@given(KEEP)
def test_unpack_gives_back_what_was_packed(keep: npt.NDArray[np.bool_]) -> None:
    packed = pack_keep(keep)
    back = unpack_keep(packed, keep.shape[1])

    assert packed.shape == (keep.shape[0], -(-keep.shape[1] // 8))
    assert back.dtype == np.bool_
    np.testing.assert_array_equal(back, keep)


@given(KEEP)
def test_each_bit_is_where_the_definition_says(keep: npt.NDArray[np.bool_]) -> None:
    packed = pack_keep(keep)

    for row, component in np.ndindex(*keep.shape):
        assert bool(packed[row, component // 8] >> (component % 8) & 1) == keep[row, component]
    unused = np.unpackbits(packed, axis=1, bitorder="little")[:, keep.shape[1] :]
    assert not unused.any(), "bits past the last component must be zero, or equal keep-vectors have different bytes"
