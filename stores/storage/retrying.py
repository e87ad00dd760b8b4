"""RemoteStore: zarr on object storage that waits out a network fault for a while, and then says what is wrong."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from stores.errors import StoreError
from stores.storage.redact import redact

RETRY_SECONDS = 180.0  # a server that has answered before may be away for so long
FIRST_CONTACT_SECONDS = 15.0  # one that never has: rather a wrong address than a fault
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0

log = logging.getLogger("stores.remote")
_chance = secrets.SystemRandom()  # the global random state is the user's

Result = TypeVar("Result")


class StorageError(StoreError):
    """Storage does not answer, or refuses: what is in the store, if anything, is as it was."""


class _VanishedError(Exception):
    """Storage refused a create because of an object that is not there: another create was under way."""


@dataclass
class Server:
    """The server behind a store, and how long it is waited for.

    Attributes:
      address: Its URL, without credentials.
      credentials: How credentials are given: which environment variables.
      retry_seconds: How long a fault is waited out.
      answered: Whether it has ever answered this process.
      away: Whether it was waited for in vain, and has not answered since: what follows need not wait as long again.
    """

    address: str
    credentials: str = "those that its store object was made with"
    retry_seconds: float = RETRY_SECONDS
    answered: bool = False
    away: bool = False

    @property
    def patience(self) -> float:
        """Seconds that a fault is waited out now."""
        return self.retry_seconds if self.answered and not self.away else min(self.retry_seconds, FIRST_CONTACT_SECONDS)


class RemoteStore(ObjectStore[Any]):
    """A zarr store on object storage: faults of the network are retried with growing pauses, then named.

    Every operation may be repeated: reads and deletes change nothing the second time, a write puts the same bytes, and
    a create whose answer was lost finds its own object, which is what was asked for. Errors are StorageErrors without
    credentials; `FileNotFoundError` is what it is. Warnings about retries go to the logger `stores.remote`.
    """

    def __init__(self, store: Any, *, url: str, server: Server, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.url = url
        self.server = server

    def with_read_only(self, read_only: bool = False) -> RemoteStore:
        """Returns the same store for reading only, or for writing, too."""
        return type(self)(self.store, url=self.url, server=self.server, read_only=read_only)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemoteStore({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and self._what() == other._what()

    def _what(self) -> tuple[str, str, bool]:
        return self.url, self.server.address, self.read_only

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Returns the object, or a range of it; None if there is none."""
        call = super().get
        return await self._patiently(f"reading {key}", lambda: call(key, prototype, byte_range), absent=True)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Returns ranges of objects."""
        wanted = list(key_ranges)
        call = super().get_partial_values
        what = ", ".join(sorted({key for key, _ in wanted})[:3])
        return await self._patiently(f"reading {what}", lambda: call(prototype, wanted), absent=True)

    async def exists(self, key: str) -> bool:
        """Returns whether there is such an object."""
        call = super().exists
        return await self._patiently(f"looking for {key}", lambda: call(key), absent=True)

    async def getsize(self, key: str) -> int:
        """Returns the bytes of an object; raises FileNotFoundError if there is none."""
        call = super().getsize
        return await self._patiently(f"looking for {key}", lambda: call(key), absent=True)

    async def set(self, key: str, value: Buffer) -> None:
        """Writes an object, whatever was there."""
        call = super().set
        await self._patiently(f"writing {key}", lambda: call(key, value))

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Writes an object unless there is one; the storage decides, so that one of several writers succeeds."""
        from obstore import put_async
        from obstore.exceptions import AlreadyExistsError

        self._check_writable()
        there = super().exists

        async def create() -> None:
            try:
                await put_async(self.store, key, value.as_buffer_like(), mode="create")
            except AlreadyExistsError:
                if await there(key):
                    return
                raise _VanishedError(f"{key} was said to exist and does not") from None

        await self._patiently(f"creating {key}", create)

    async def delete(self, key: str) -> None:
        """Deletes an object, if there is one."""
        call = super().delete
        await self._patiently(f"deleting {key}", lambda: call(key), absent=True)

    async def list(self) -> AsyncGenerator[str, None]:
        """Yields all keys."""
        for key in await self._keys(None):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yields all keys below a prefix."""
        for key in await self._keys(prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        """Yields the names one level below a prefix."""
        call = super().list_dir

        async def names() -> Sequence[str]:
            return [name async for name in call(prefix)]

        for name in await self._patiently(f"listing {prefix or 'it'}", names):
            yield name

    async def delete_dir(self, prefix: str) -> None:
        """Deletes all objects below a prefix."""
        for key in await self._keys(prefix):
            await self.delete(key)

    async def getsize_prefix(self, prefix: str) -> int:
        """Returns the bytes of all objects below a prefix."""
        call = super().getsize_prefix
        return await self._patiently(f"listing {prefix}", lambda: call(prefix))

    async def _keys(self, prefix: str | None) -> Sequence[str]:
        import obstore

        async def keys() -> Sequence[str]:
            found = await obstore.list(self.store, prefix=prefix or None).collect_async()
            return [item["path"] for item in found]

        return await self._patiently(f"listing {prefix or 'it'}", keys)

    async def _patiently(self, doing: str, call: Callable[[], Awaitable[Result]], absent: bool = False) -> Result:
        """Returns what a call returns; calls again after faults that may pass, as long as the server's time lasts.

        With `absent`, that an object is not there is no fault but an answer.
        """
        began = time.monotonic()
        tries = 0
        while True:
            tries += 1
            try:
                result = await call()
            except Exception as error:
                if absent and isinstance(error, FileNotFoundError):
                    self.server.answered, self.server.away = True, False
                    raise
                fault = _Fault.of(error)
                if fault is None:
                    raise
            else:
                self.server.answered, self.server.away = True, False
                return result
            # Outside of `except`: the error must not carry the library's, whose text may hold what was hidden.
            self.server.answered |= fault.answered
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(tries - 1, 20)) * _chance.uniform(0.5, 1.0)
            passed = time.monotonic() - began
            if not fault.may_pass or passed + pause > self.server.patience:
                self.server.away |= fault.may_pass
                raise StorageError(self._explain(doing, fault, tries, passed))
            log.warning(
                "%s: %s failed (%s); trying again in %.1f s",
                *(self.url, doing, fault.text, pause),
                extra={"event": "storage_retry", "store": self.url, "doing": doing, "tries": tries, "pause": pause},
            )
            await asyncio.sleep(pause)

    def _explain(self, doing: str, fault: _Fault, tries: int, passed: float) -> str:
        where = f"{self.url}: {doing} failed"
        if fault.may_pass:
            where += f" {tries} times in {passed:.0f} s"
        advice = "Finished blocks stay: run the same command again when it answers."
        if fault.refused:
            advice = f"Check the credentials ({self.server.credentials}) and what they allow."
        elif not self.server.answered:
            advice = "Nothing has answered there yet: check the address, the network and the "
            advice += f"credentials ({self.server.credentials})."
        elif not fault.may_pass:
            advice = "Check the URL and the storage options."
        return f"{where} (server {self.server.address}). The last cause: {fault.text}. {advice}"


@dataclass(frozen=True)
class _Fault:
    """What went wrong in a call to the storage library.

    Attributes:
      text: The cause, without credentials, in one line.
      may_pass: Whether trying again makes sense.
      refused: Whether credentials are missing, wrong, or allow too little.
      answered: Whether the server has answered, if only with an error.
    """

    text: str
    may_pass: bool
    refused: bool = False
    answered: bool = False

    @classmethod
    def of(cls, error: Exception) -> _Fault | None:
        """Returns what went wrong, or None if the error is not one of storage."""
        if isinstance(error, _VanishedError):
            return cls(str(error), may_pass=True, answered=True)
        from obstore import exceptions

        if not isinstance(error, (exceptions.BaseError, OSError, NotImplementedError)):
            return None
        text = told(error)
        found = _STATUS.search(text)
        status = int(found[1]) if found else None
        refused = status in (401, 403) or isinstance(
            error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError, PermissionError)
        )
        if status is not None:
            may_pass = status in _PASSING or (status >= 500 and status not in _LASTING)
        else:
            known = (
                FileNotFoundError,
                exceptions.InvalidPathError,
                exceptions.NotSupportedError,
                NotImplementedError,
                exceptions.UnknownConfigurationKeyError,
            )
            may_pass = not isinstance(error, known) and not _CONFIGURED_WRONG.search(text)
        return cls(text, may_pass and not refused, refused, answered=status is not None)


_STATUS = re.compile(r"(?i)status(?: code)?:? (\d{3})\b")
_TIMES = re.compile(r" in [\d.]+(?:ns|µs|ms|s)(?:, after \d+ retries, max_retries: \d+, retry_timeout: \w+)?(?= )")
_PASSING = {408, 409, 425, 429}
_LASTING = {501, 505}  # not implemented: trying again does not implement it
_CONFIGURED_WRONG = re.compile(
    r"(?i)scheme is not allowed|builder error|invalid certificate|unknownissuer|missing .*(bucket|account)"
)


def told(error: Exception) -> str:
    """Returns what a storage library says in an error, in one line, without credentials and without its own insides."""
    text = " ".join(redact(str(error)).partition("\n\nDebug source:")[0].split())
    text = _TIMES.sub("", text)
    return (text if len(text) <= 400 else text[:397] + "...").rstrip(".")
