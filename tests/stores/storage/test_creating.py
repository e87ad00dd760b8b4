"""Making and clearing a store where nothing can be renamed: whole or not at all, whoever is killed, slow or faster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from zarr.abc.store import Store
from zarr.storage import MemoryStore

import stores.storage.creating
from stores import CampaignStore, StoreError, StoreExistsError
from stores.records import Process
from stores.storage import objects
from stores.storage.creating import clear, create_in, is_empty

NewCampaign = Callable[..., CampaignStore]


def _snapshot(store: Store) -> dict[str, bytes | None]:
    return {key: objects.read(store, key) for key in stores.storage.creating._keys(store)}


def _made(value: bytes = b"root", more: dict[str, bytes] | None = None) -> MemoryStore:
    store = MemoryStore()
    for key, data in {"zarr.json": value, "a/zarr.json": b"a", "a/c/0": value, **(more or {})}.items():
        objects.create(store, key, data)
    return store


def test_a_store_is_copied_whole_and_nothing_else_is_left() -> None:
    target = MemoryStore()

    create_in(target, _made(), "here")

    assert _snapshot(target) == _snapshot(_made())


def test_bookkeeping_alone_is_nothing(new_campaign: NewCampaign) -> None:
    target = MemoryStore()
    objects.create(target, "work/workers/old.json", b"{}")

    assert is_empty(target)
    new_campaign(target)
    assert CampaignStore.open(target).rows == 10


def test_the_root_comes_last(monkeypatch: pytest.MonkeyPatch, new_campaign: NewCampaign) -> None:
    created: list[str] = []
    whole = objects.create

    def note(store: Store, key: str, data: bytes) -> None:
        created.append(key)
        whole(store, key, data)

    monkeypatch.setattr(objects, "create", note)

    new_campaign(MemoryStore())

    assert created[0] == "work/creating/0"
    assert created[-1] == "zarr.json"
    assert len(created) > 10


@pytest.mark.parametrize("count", range(1, 5))
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_while_copying_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException
) -> None:
    target, whole, calls = MemoryStore(), objects.create, iter(range(1, 99))

    def failing(store: Store, key: str, data: bytes) -> None:
        if next(calls) == count:
            raise error
        whole(store, key, data)

    monkeypatch.setattr(objects, "create", failing)
    with pytest.raises(type(error)):
        create_in(target, _made(), "here")
    assert _snapshot(target) == {}


@pytest.mark.parametrize("count", [2, 3, 6, 20])
def test_of_several_creators_at_once_one_wins_and_the_others_are_told(count: int) -> None:
    target = MemoryStore()
    values = [f"made by {i}".encode() for i in range(count)]
    start, ends = threading.Barrier(count), [""] * count

    def create(i: int) -> None:
        start.wait(30)
        try:
            create_in(target, _made(values[i], {f"only/{i}": b"x"}), "here")
            ends[i] = "made"
        except StoreExistsError as error:
            ends[i] = str(error)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(ends) == ["Something appeared at here meanwhile. Choose another path."] * (count - 1) + ["made"]
    winner = ends.index("made")
    assert _snapshot(target) == _snapshot(_made(values[winner], {f"only/{winner}": b"x"}))


def _begun(process: Process, beat: int = 0) -> MemoryStore:
    """A place where a creator was stopped in the middle: of another store, with an object that ours does not have."""
    store = MemoryStore()
    claim = {"id": "x", "process": asdict(process), "beat": beat, "keys": ["a/c/0", "b/c/0", "zarr.json"]}
    objects.create(store, "work/creating/0", objects.to_json(claim))
    objects.create(store, "a/c/0", b"of another store")
    objects.create(store, "b/c/0", b"of another store")
    return store


def test_what_a_dead_creator_left_is_replaced_at_once() -> None:
    dead = Process.current()
    target = _begun(Process(dead.host, 2**22 + 1, dead.machine, "1"))
    assert is_empty(target)

    began = time.monotonic()
    create_in(target, _made(), "here")

    assert time.monotonic() - began < 5
    assert _snapshot(target) == _snapshot(_made())


def test_what_a_silent_creator_of_another_machine_left_is_replaced_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stores.storage.creating, "PATIENCE_SECONDS", 0.6)
    target = _begun(Process("elsewhere", 1, "another machine", "1"))

    began = time.monotonic()
    create_in(target, _made(), "here")

    assert time.monotonic() - began >= 0.6
    assert _snapshot(target) == _snapshot(_made())


def test_a_living_creator_is_waited_for_as_long_as_it_gives_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores.storage.creating, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(stores.storage.creating, "POLL_SECONDS", 0.05)
    elsewhere = Process("elsewhere", 1, "another machine", "1")
    target = _begun(elsewhere)

    def live_and_finish() -> None:
        for beat in range(1, 6):
            time.sleep(0.3)
            sign = {"id": "x", "process": asdict(elsewhere), "beat": beat, "keys": []}
            objects.replace(target, "work/creating/0", objects.to_json(sign))
        objects.create(target, "zarr.json", b"theirs")

    other = threading.Thread(target=live_and_finish)
    other.start()
    with pytest.raises(StoreExistsError, match=r"^Something appeared at here meanwhile"):
        create_in(target, _made(), "here")
    other.join()
    assert objects.read(target, "zarr.json") == b"theirs"
    assert objects.read(target, "b/c/0") == b"of another store"


def test_a_creator_that_slept_too_long_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wakes up when another has taken it for dead and finished."""
    target, whole = MemoryStore(), objects.create
    slept: list[str] = []

    def sleepy(store: Store, key: str, data: bytes) -> None:
        whole(store, key, data)
        if key == "a/c/0" and not slept:
            slept.append(key)
            monkeypatch.setattr(stores.storage.creating, "PATIENCE_SECONDS", 0.0)
            create_in(target, _made(b"the other's"), "here")

    monkeypatch.setattr(objects, "create", sleepy)
    with pytest.raises(StoreExistsError):
        create_in(target, _made(b"the sleeper's"), "here")
    assert _snapshot(target) == _snapshot(_made(b"the other's"))


def test_something_else_at_the_place_is_never_touched() -> None:
    target = MemoryStore()
    objects.create(target, "thesis.tex", b"x")

    with pytest.raises(StoreExistsError):
        create_in(target, _made(), "here")
    assert _snapshot(target) == {"thesis.tex": b"x"}


def test_a_store_that_cannot_create_alone_is_refused_for_writing(new_campaign: NewCampaign) -> None:
    class Unsafe(MemoryStore):
        set_if_not_exists = Store.set_if_not_exists

    place = Unsafe()
    with pytest.raises(StoreError, match=r"a zarr Unsafe cannot create an object only if there is none"):
        new_campaign(place)
    assert _snapshot(place) == {}


def test_marks_are_cleared_first_and_the_root_last(
    monkeypatch: pytest.MonkeyPatch, new_campaign: NewCampaign, keep: Any, outputs: Any
) -> None:
    place = MemoryStore()
    store = new_campaign(place)
    for block in range(3):
        store.write_block(block, keep[store.span(block)], outputs[store.span(block)])
    gone: list[str] = []
    whole = objects.delete

    def note(store: Store, key: str) -> None:
        gone.append(key)
        whole(store, key)

    monkeypatch.setattr(objects, "delete", note)

    clear(place)

    assert sorted(gone[:3]) == ["ledger/c/0/0", "ledger/c/1/0", "ledger/c/2/0"]
    assert gone[-1] == "zarr.json"
    assert _snapshot(place) == {}
