"""Making and removing a store in any zarr store: a reader sees the whole of it or nothing, whoever is killed when.

Object storage has no rename. So everything is made in memory first, then copied, the root's metadata last: without them
there is no store. A claim, `work/creating/<n>`, says who copies and what; who finds its writer dead claims n + 1.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import ObjectStore

from stores.errors import StoreError, StoreExistsError
from stores.records import Process
from stores.storage import objects
from stores.storage.retrying import RemoteStore

ROOT = "zarr.json"
WORK = "work"  # book-keeping, never data
CLAIMS = f"{WORK}/creating"
PATIENCE_SECONDS = 30.0  # a claim that stands unchanged for so long is a dead program's
BEAT_SECONDS = 5.0  # a living one changes it as often
POLL_SECONDS = 0.2
AT_ONCE = 8  # requests; each takes some tens of milliseconds, and a store begins with dozens of small objects

Result = TypeVar("Result")

_probed: set[str] = set()


def is_empty(store: Store) -> bool:
    """Returns whether there is nothing but book-keeping, or what a store that never came to be has left."""
    names = set(objects.names(store, ""))
    return not names - {WORK} or (ROOT not in names and bool(_claims(store)))


def create_in(store: Store, made: Store, where: str) -> None:
    """Copies a group, made elsewhere, to an empty place, in one step for every reader. Waits for another who does so.

    Raises:
      StoreExistsError: Something is there, or another program has made a store meanwhile.
      StoreError: The storage cannot keep two writers apart.
    """
    require_create_if_absent(store, where)
    contents = {key: objects.read(made, key) or b"" for key in _keys(made)}
    claim = _claim(store, sorted(contents), where)
    try:
        _copy(contents, claim, where)
    except BaseException as error:
        if not isinstance(error, StoreExistsError):  # else the objects are another's
            with suppress(Exception):  # the first error is the one to tell
                claim.withdraw()
        raise
    with suppress(StoreError):  # the store is made; a claim beside its root says nothing
        claim.drop()


def _copy(contents: Mapping[str, bytes], claim: _Claim, where: str) -> None:
    inner = {key: data for key, data in contents.items() if key != ROOT}
    for _ in _each(lambda key: objects.create(claim.store, key, inner[key]), inner):
        claim.beat()
    same = all(_each(lambda key: objects.read(claim.store, key) == inner[key], inner))
    objects.flush(claim.store, inner)
    if not same or _last(claim.store) != claim.number:
        raise _exists(where)  # this program slept so long that another took it for dead, and went on
    objects.create(claim.store, ROOT, contents[ROOT])
    objects.flush(claim.store, [ROOT])
    if objects.read(claim.store, ROOT) != contents[ROOT]:
        raise _exists(where)


def clear(store: Store) -> None:
    """Deletes everything at a place, marks first and the root last: at no time is there a mark without its data."""
    keys = _keys(store)
    marks = [key for key in keys if key.startswith("ledger/c/")]
    rest = sorted({*keys} - {*marks, ROOT})
    for some in (marks, rest, [ROOT] if ROOT in keys else []):
        for _ in _each(lambda key: objects.delete(store, key), some):
            pass


def require_create_if_absent(store: Store, where: str) -> None:
    """Raises StoreError if a storage lets two writers create the same object; tries it once per server and bucket.

    Everything rests on it: a block that two workers compute at once is written by one of them.
    """
    if type(store).set_if_not_exists is Store.set_if_not_exists:
        raise StoreError(
            f"{where}: a zarr {type(store).__name__} cannot create an object only if there is none, so that two "
            "workers could overwrite each other's blocks. Give a path or an s3://, gs:// or az:// URL instead."
        )
    if not isinstance(store, ObjectStore):
        return
    server = store.server.address if isinstance(store, RemoteStore) else str(store)
    place = " ".join([server, *where.split("/")[:3]])
    if place in _probed:
        return
    key = f"{WORK}/probe-{uuid.uuid4().hex}"
    try:
        objects.create(store, key, b"first")
        objects.create(store, key, b"second")
        found = objects.read(store, key)
    finally:
        with suppress(StoreError):
            objects.delete(store, key)
    if found != b"first":
        raise StoreError(
            f"{where}: the server {server} accepts a second create of an object that is there already (asked with "
            "If-None-Match: *). Two workers could overwrite each other's blocks without a word, so nothing is written "
            "there. Use storage that refuses it, such as Amazon S3, Google Cloud Storage, Azure or MinIO, or a path."
        )
    _probed.add(place)


@dataclass
class _Claim:
    """A claim that this program holds: it alone copies objects to this place."""

    store: Store
    number: int
    content: dict[str, Any]
    beaten: float

    @property
    def key(self) -> str:
        return f"{CLAIMS}/{self.number}"

    def beat(self) -> None:
        """Changes the claim when it is time to, so that nobody takes its writer for dead."""
        if time.monotonic() - self.beaten >= BEAT_SECONDS:
            self.content["beat"] += 1
            objects.replace(self.store, self.key, objects.to_json(self.content))
            self.beaten = time.monotonic()

    def withdraw(self) -> None:
        """Deletes what was copied, and the claim, unless there is a whole store by now."""
        if objects.read(self.store, ROOT) is None:
            for key in self.content["keys"]:
                objects.delete(self.store, key)
        self.drop()

    def drop(self) -> None:
        """Deletes this claim and those before it."""
        for number in _claims(self.store):
            if number <= self.number:
                objects.delete(self.store, f"{CLAIMS}/{number}")


def _claim(store: Store, keys: list[str], where: str) -> _Claim:
    """Returns the claim to the place; waits while another program that lives holds it."""
    own = {"id": uuid.uuid4().hex, "process": asdict(Process.current()), "beat": 0, "keys": keys}
    seen: dict[str, Any] | None = None
    since = time.monotonic()
    while True:
        there = {*objects.names(store, "")} - {WORK}  # before the claims, which go when the root is there
        numbers = _claims(store)
        if ROOT in there or (there and not numbers):
            raise _exists(where)
        last = max(numbers, default=-1)
        other = objects.read_json(store, f"{CLAIMS}/{last}") if numbers else None
        if other != seen:
            seen, since = other, time.monotonic()
        if other is not None and not _is_dead(other) and time.monotonic() - since <= PATIENCE_SECONDS:
            time.sleep(POLL_SECONDS)
            continue
        claim = _Claim(store, last + 1, own, time.monotonic())
        objects.create(store, claim.key, objects.to_json(own))
        if objects.read_json(store, claim.key) == own and _last(store) == claim.number:
            try:
                _take_over(claim, where)
            except BaseException:
                objects.delete(store, claim.key)
                raise
            return claim  # else another was faster


def _take_over(claim: _Claim, where: str) -> None:
    """Deletes what the holders of earlier claims have left, unless there is a whole store by now."""
    if objects.read(claim.store, ROOT) is not None:
        claim.drop()
        raise _exists(where)
    for number in _claims(claim.store):
        if number < claim.number:
            left = (objects.read_json(claim.store, f"{CLAIMS}/{number}") or {}).get("keys")
            for key in left if isinstance(left, list) else ():
                objects.delete(claim.store, str(key))


def _each(work: Callable[[str], Result], keys: Iterable[str]) -> Iterator[Result]:
    """Yields what `work` returns for each key, in order; works on some of them at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(work, keys)


def _is_dead(claim: Mapping[str, Any]) -> bool:
    try:
        return Process(**claim["process"]).is_known_dead()
    except (KeyError, TypeError):
        return False


def _claims(store: Store) -> list[int]:
    return sorted(int(name) for name in objects.names(store, CLAIMS) if name.isascii() and name.isdigit())


def _last(store: Store) -> int:
    return max(_claims(store), default=-1)


def _exists(where: str) -> StoreExistsError:
    return StoreExistsError(f"Something appeared at {where} meanwhile. Choose another path.")


def _keys(store: Store) -> list[str]:
    async def collect() -> list[str]:
        return [key async for key in store.list()]

    return sorted(sync(collect()))
