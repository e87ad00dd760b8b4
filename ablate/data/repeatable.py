"""Whether a data set gives the same again: one that draws random numbers makes every number derived from it chance.

A few examples are read several times, under random states that let a random flip happen in one and not in the other;
and every later read is compared, by checksum, with the first one of the same example.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablate.errors import DataError
from ablate.state import preserved_random_state

Seeds = tuple[int, int, int]  # of torch, numpy and random

# For each of up to three examples. After the first seeds the first three numbers drawn from [0, 1) are below 0.05,
# after the second above 0.95: a random flip happens under one of them. Where a version draws otherwise, they are as
# good as others. The third are any.
_SEEDS: tuple[tuple[Seeds, ...], ...] = (
    ((10392, 7142, 8916), (3844, 27421, 12024), (1, 1, 1)),
    ((10635, 11545, 46786), (4086, 33431, 26089), (2, 2, 2)),
    ((15222, 36127, 52329), (4641, 49071, 52108)),
)

Item = tuple[Tensor, Any]


class FirstReads:
    """Remembers each example as it was when it was read first.

    Args:
      read: Gives (input, label) of an example; the label is compared too.
      count: How many examples there are.
      name: Gives an example's name, for messages.

    Memory: 8 bytes per example.
    """

    def __init__(self, read: Callable[[int], Item], count: int, name: Callable[[int], str]) -> None:
        self._read, self._name, self._count = read, name, count
        self._sums = np.full(count, -1, dtype=np.int64)
        self._tried = False

    def try_out(self) -> None:
        """Reads up to three examples up to eight times in all, once in the life of this object.

        The global random state is as before.

        Raises:
          DataError: Two reads of an example differ; says where its random numbers come from.
        """
        if self._tried:
            return
        self._tried = True
        places = dict.fromkeys((0, self._count // 2, self._count - 1))  # all different ones
        with preserved_random_state():
            for i, seeds in zip(places, _SEEDS, strict=False):
                self._try_one(i, *seeds)

    def check(self, i: int, value: Tensor) -> None:
        """Raises DataError if example i was another one when it was read first."""
        found = _checksum(value)
        if self._sums[i] < 0:
            self._sums[i] = found
        elif self._sums[i] != found:
            raise self._differs(i, "", set())

    def _try_one(self, i: int, *seeds: Seeds) -> None:
        (first, drawn), *others = (self._drawing(i, one) for one in seeds)
        for other, more in others:
            how = _difference(first, other)
            if how:
                raise self._differs(i, how, drawn | more)

    def _drawing(self, i: int, seeds: Seeds) -> tuple[Item, set[str]]:
        """Returns an example as it is under these seeds, and which global random numbers reading it draws."""
        torch.manual_seed(seeds[0])
        np.random.seed(seeds[1])
        random.seed(seeds[2])
        before = _states()
        item = self._read(i)
        after = _states()
        return item, {name for name in before if before[name] != after[name]}

    def _differs(self, i: int, how: str, drawn: set[str]) -> DataError:
        source = (
            f"it draws from the random numbers of {' and '.join(sorted(drawn))}"
            if drawn
            else ("it draws random numbers of its own, or what it reads from has changed")
        )
        return DataError(
            f"Example {self._name(i)} is another one each time it is read{how}: {source}. Is a random transform of "
            "training left in the data set? Give it the transform of evaluation; or read it once into tensors and give "
            "(inputs, targets)."
        )


def _states() -> dict[str, Any]:
    _, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }


def _difference(first: Item, other: Item) -> str:
    """Returns how two reads of an example differ, in brackets; "" if they do not."""
    one, two = first[0], other[0]
    if one.shape != two.shape or one.dtype != two.dtype:
        return f" ({tuple(one.shape)} {one.dtype}, then {tuple(two.shape)} {two.dtype})"
    if _checksum(one) != _checksum(two):
        largest = (
            float((one.double() - two.double()).abs().nan_to_num().max()) if not one.is_complex() else float("nan")
        )
        return f" (by up to {largest:.3g})"
    if not np.array_equal(np.asarray(first[1]), np.asarray(other[1])):
        return f" (its label is {first[1]}, then {other[1]})"
    return ""


def _checksum(value: Tensor) -> int:
    plain = value.detach().cpu().contiguous()
    return zlib.crc32(plain.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(str(tuple(plain.shape)).encode()))
