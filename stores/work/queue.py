"""Which block next: the unfinished blocks of a store, handed out to one of any number of workers."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from stores.blocks.blocks import Blocks
from stores.work.worker import Worker

POLL_SECONDS = 1.0


class BlockQueue:
    """Hands the unfinished blocks of a store to one worker; others take theirs from queues of their own.

    Args:
      blocks: The blocks, open for writing.
      worker: Who takes them.
      share: (i, n): this is worker i of n, and begins at the i-th n-th of the blocks. Only where it begins: in the end
        every worker takes what is left.
      aside: Returns the blocks that are not to be tried any more.
    """

    def __init__(
        self, blocks: Blocks, worker: Worker, share: tuple[int, int], aside: Callable[[], set[int]] = lambda: set()
    ) -> None:
        self._blocks, self._worker, self._aside = blocks, worker, aside
        first = share[0] * blocks.count // share[1]
        self._order = [*range(first, blocks.count), *range(first)]
        self.finished: set[int] = set()  # as far as is known
        self.refresh()

    def next(self) -> int | None:
        """Returns a block that this worker has claimed; None when all are finished or set aside.

        Where others are at all that is left, waits until they have finished or their leases are stale.
        """
        while True:
            block = self._claim_one()
            if block is None:  # nothing is free as far as we knew: look again before giving up
                self.refresh()
                block = self._claim_one()
            if block is not None:
                return block
            if not self._left():
                return None
            time.sleep(min(POLL_SECONDS, self._worker.record.lease_seconds / 10))

    def _left(self) -> list[int]:
        aside = self._aside()
        return [block for block in self._order if block not in self.finished and block not in aside]

    def _claim_one(self) -> int | None:
        for block in self._left():
            if self._worker.claim(block):
                if not self._blocks.is_finished(block):
                    return block
                self.finished.add(block)
                self._worker.release(block)
        return None

    def refresh(self) -> None:
        """Looks which blocks are finished by now, whoever finished them."""
        self.finished = {int(block) for block in np.flatnonzero(self._blocks.finished())}
