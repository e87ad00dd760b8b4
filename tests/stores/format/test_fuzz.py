"""Stores changed at random: whatever is asked of them, the answer is right or a clear error, never another."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.abc.store import Store
from zarr.core.buffer import Buffer as AnyBuffer
from zarr.core.buffer.cpu import Buffer
from zarr.storage import LocalStore, MemoryStore

import stores
from stores import AttributionStore, CampaignStore, StoreError, WorkLog
from stores.format.root import seal_of
from stores.work.queue import BlockQueue
from stores.work.worker import Worker

pytestmark = pytest.mark.faults

Contents = dict[str, bytes]
Keep = npt.NDArray[np.bool_]
Outputs = npt.NDArray[np.float32]

# sizes that a check lets through stay small: what is asked for is also allocated
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 3, 7, 2**63, 10**20, 1.5, "", "NaN", "../../x", "..", "/etc/passwd", "pickle", "gzip"),
    *("numcodecs.pickle", "float64", "uint8", "string", [], {}, [1], [[]], {"name": "pickle"}, ["quality"], "é\0"),
]
WORK = [
    *(
        "work/workers/w.json",
        "work/workers/other.json",
        "work/leases/0.json",
        "work/leases/1.json",
        "work/leases/x.json",
    ),
    *("work/failures/1.json", "work/failures/99.json", "work/creating/0"),
]
WORK_KEYS = ["id", "process", "began", "seen", "facts", "state", "beat", "blocks", "rows", "lease_seconds", "worker"]
WORK_KEYS += [
    "block",
    "since",
    "attempts",
    "set_aside",
    "why",
    "kind",
    "time",
    "host",
    "pid",
    "machine",
    "born",
    "keys",
]


@pytest.fixture(scope="module")
def contents(
    campaign: CampaignStore,
    attributions: AttributionStore,
    keep: Keep,
    outputs: Outputs,
    new_campaign: Callable[..., Any],
) -> list[Contents]:
    """A finished campaign, an unfinished one that workers were at, and finished attributions, file by file."""
    memory: dict[str, AnyBuffer] = {}
    unfinished = new_campaign(MemoryStore(memory))
    with Worker(unfinished.blocks.store, {"threads": 1}) as worker:
        unfinished.write_block(1, keep[4:8], outputs[4:8])
        worker.claim(2)
        worker.log.add_failure(2, stores.records.Attempt("it failed", "ValueError", worker.id, "now"), True)
    folders = [Path(store.where) for store in (campaign, attributions)]
    found = [{p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    return [*found, {key: value.to_bytes() for key, value in memory.items()}]


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths of everything in a JSON document, branches and leaves."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in _leaves(item, (*path, key)))]


def _change_json(data: bytes, chance: random.Random, sealed: bool) -> bytes:
    """Returns a JSON document with one thing in it replaced, removed or added; as if it had been written so."""
    document = json.loads(data)
    *path, last = chance.choice([found for found in _leaves(document) if found])
    place = document
    for key in path:
        place = place[key]
    way = chance.randrange(4)
    if way == 0:
        del place[last]
    elif way == 1 and isinstance(place, dict):
        place[chance.choice(["x", "../x", "storage_transformers", "must_understand"])] = chance.choice(VALUES)
    else:
        place[last] = chance.choice(VALUES)
    if sealed and isinstance(document.get("attributes"), dict):
        document["attributes"]["seal"] = seal_of(document)
    return json.dumps(document).encode()


def _change_bytes(files: Contents, key: str, chance: random.Random) -> None:
    """Removes, cuts, flips, replaces or swaps the bytes of one file."""
    data = files[key]
    at = chance.randrange(len(data)) if data else 0
    way = chance.randrange(5)
    if way == 0:
        del files[key]
    elif way == 1:
        files[key] = data[:at]
    elif way == 2 and data:
        files[key] = data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    elif way == 3:
        files[key] = chance.randbytes(chance.randrange(80))
    else:
        other = chance.choice(sorted(files))
        files[key], files[other] = files[other], data


def _book_keeping(chance: random.Random) -> bytes:
    """Returns something that might stand where book-keeping is expected."""
    if chance.random() < 0.2:
        return chance.randbytes(20)
    keys = chance.sample(WORK_KEYS, chance.randrange(len(WORK_KEYS)))
    values = [*VALUES, "running", "w", 5, {"host": "h", "pid": 1, "machine": "m", "born": "1"}, [{"why": "x"}]]
    return json.dumps({key: chance.choice(values) for key in keys}).encode()


def _fuzzed(files: Contents, chance: random.Random) -> bool:
    """Changes one to three things; returns whether every number that is still shown must be what was written."""
    honest = True
    for _ in range(chance.randrange(1, 4)):
        way = chance.randrange(4)
        if way == 0 and files.get("zarr.json", b"")[:1] == b"{":
            sealed = chance.random() < 0.7
            try:
                files["zarr.json"] = _change_json(files["zarr.json"], chance, sealed)
            except (ValueError, TypeError, KeyError):  # was changed before
                continue
            honest = honest and not sealed
        elif way == 1:
            files[chance.choice(WORK)] = _book_keeping(chance)
        elif files:
            _change_bytes(files, chance.choice(sorted(files)), chance)
    return honest


def _questions(store: Store, outputs: Outputs, keep: Keep, honest: bool) -> list[Callable[[], Any]]:
    """Everything that may be asked of a store, each to be answered or refused."""

    def read_campaign(mode: str) -> None:
        opened = CampaignStore.open(store, mode)
        _ = opened.progress, opened.fingerprint, opened.environments, opened.examples, opened.components
        for block in opened.finished_blocks():
            found_keep, found = opened.read_block(block)
            if honest:  # what is shown as checked data is what was written
                np.testing.assert_array_equal(found, outputs[opened.span(block)])
                np.testing.assert_array_equal(found_keep, keep[opened.span(block)])
        _ = opened.outputs[:], opened.keep[:]

    def read_attributions() -> None:
        opened = AttributionStore.open(store)
        _ = opened.weights[:], opened.stderr[:, 1], opened.bias[:], opened.quality, opened.examples, opened.components
        opened.verify()

    def work() -> None:
        opened = CampaignStore.open(store, "r+")
        with Worker(opened.blocks.store, {}, lease_seconds=0.05) as worker:
            queue = BlockQueue(opened.blocks, worker, (0, 1))
            for block in iter(queue.next, None):
                span = opened.span(block)
                opened.write_block(block, keep[span], outputs[span])
                queue.finished.add(block)
                worker.release(block)

    log = WorkLog(store)
    return [
        lambda: read_campaign("r"),
        lambda: read_campaign("r+"),
        read_attributions,
        lambda: (log.workers(), log.leases(), log.failures()),
        lambda: stores.verify(store).text(),
        work,
        lambda: stores.repair(store, force=True).text(),
        lambda: stores.repair(store).text(),
        lambda: stores.migrate(store).text(),
        log.clear_failures,
    ]


@pytest.mark.slow
@settings(
    max_examples=200, derandomize=True, deadline=timedelta(seconds=20), suppress_health_check=[HealthCheck.too_slow]
)
@given(seed=st.integers(0, 2**32))
def test_200_fuzzed_stores(contents: list[Contents], keep: Keep, outputs: Outputs, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    files = dict(chance.choice(contents))
    honest = _fuzzed(files, chance)
    with tempfile.TemporaryDirectory() as folder:
        store: Store = MemoryStore(dict[str, AnyBuffer]({key: Buffer.from_bytes(data) for key, data in files.items()}))
        if chance.random() < 0.5:
            for key, data in files.items():
                (Path(folder) / "a" / key).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / "a" / key).write_bytes(data)
            store = LocalStore(Path(folder) / "a")
        for ask in _questions(store, outputs, keep, honest):
            try:
                ask()
            except StoreError as error:
                unclear = len(str(error)) < 20
            except OSError as error:
                unclear = not error.filename
            else:
                unclear = False
            assert not unclear
        assert [path.name for path in Path(folder).iterdir()] in ([], ["a"]), "something was written beside the store"
