"""What can be wrong with a store. Every message says where, what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from stores.comparison import Difference
from stores.records import Failure


class StoreError(Exception):
    """Base class of everything a store can complain about."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is nothing at this place."""


class StoreExistsError(StoreError, FileExistsError):
    """There is something at this place already, and it will not be overwritten unasked."""


class StoreUnreadableError(StoreError):
    """There is something at this place, but not a store this version can read."""


class UnfinishedStoreError(StoreError):
    """Data was asked for that has not been computed yet."""


class FailedBlocksError(UnfinishedStoreError):
    """Blocks failed as often as they may, and were set aside; all others are finished.

    Attributes:
      failures: One per block, with every attempt.
    """

    def __init__(self, where: str, failures: Sequence[Failure], blocks: int, advice: str) -> None:
        self.failures = tuple(failures)
        lines = "\n".join(
            f"  block {failure.block}, failed {_times(len(failure.attempts))}: {failure.attempts[-1].why}"
            for failure in self.failures
        )
        count = f"{len(self.failures)} of {blocks} blocks"
        super().__init__(f"{where}: {count} failed and were set aside; the others are finished.\n{lines}\n{advice}")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


class DamagedBlockError(StoreError):
    """A finished block no longer holds what was written."""


class StoreMismatchError(StoreError):
    """A store was made from something else than what it is now used with.

    Attributes:
      differences: Every key that differs, with the stored and the new value.
    """

    def __init__(self, where: str, differences: Sequence[Difference], advice: str) -> None:
        self.differences = tuple(differences)
        lines = "\n".join(f"  {difference}" for difference in self.differences)
        super().__init__(f"{where} was made from something else. What differs (stored -> now):\n{lines}\n{advice}")
