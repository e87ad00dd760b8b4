"""Bit packing of keep-vectors: component c is bit c % 8 (least significant first) of byte c // 8; True = kept."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]


def packed_width(components: int) -> int:
    """Returns the number of bytes one keep-vector takes."""
    return (components + 7) // 8


def pack_keep(keep: BoolArray) -> ByteArray:
    """Returns the keep-vectors (rows, components) bool as bytes (rows, ceil(components / 8)) uint8."""
    return np.packbits(keep, axis=-1, bitorder="little")


def unpack_keep(packed: ByteArray, components: int) -> BoolArray:
    """Returns the keep-vectors (rows, components) bool of `packed` (rows, ceil(components / 8)) uint8."""
    return np.unpackbits(packed, axis=-1, count=components, bitorder="little").astype(np.bool_)
