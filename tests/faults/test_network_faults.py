"""A network that fails between a campaign and its object storage: waited out, then named; no number changes.

The S3 server is on the loopback address, and a proxy before it makes the faults; see s3.py and proxy.py.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import ablate
import stores.storage.retrying
from stores import CampaignStore
from stores.storage.places import resolve
from stores.storage.retrying import StorageError
from tests.faults import s3
from tests.faults.proxy import BUSY, CUT, LOST, RESET, SLOW, FaultyProxy
from tests.faults.s3 import Contents, Files, SmallSpec, assert_same_store

environment, moto, proxy, bucket = s3.environment, s3.moto, s3.proxy, s3.bucket  # fixtures
contents, short, url = s3.contents, s3.short, s3.url
pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("environment"),
    s3.needs_server,
]


FAULTS = (RESET, LOST, CUT, BUSY)


@pytest.mark.slow
def test_faults_of_the_network_change_nothing_but_the_time(
    url: str, proxy: FaultyProxy, short: Path, small_spec: SmallSpec, files: Files, contents: Contents,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Every third request, each fault in turn."""
    proxy.choose = lambda number, method, path: FAULTS[number // 3 % 4] if number % 3 == 1 else None
    caplog.set_level(logging.WARNING, "stores.remote")

    ablate.run(small_spec(rows=21), url, progress=False)
    proxy.choose = lambda number, method, path: None

    assert min(Counter(request.fault for request in proxy.requests)[fault] for fault in FAULTS) > 5
    assert_same_store(contents(url), files(short))
    np.testing.assert_array_equal(CampaignStore.open(url).outputs[:], CampaignStore.open(short).outputs[:])


@pytest.mark.slow
@pytest.mark.parametrize("faults", [[LOST], [RESET, CUT, BUSY]], ids=["lost", "others in turn"])
def test_each_create_that_fails_first_is_done_in_the_end(
    url: str, proxy: FaultyProxy, short: Path, small_spec: SmallSpec, files: Files, contents: Contents,
    faults: list[str],
) -> None:  # fmt: skip
    """The hard case is LOST: the object is there, and the second try is told that it is."""
    met: set[str] = set()

    def first_put(number: int, method: str, path: str) -> str | None:
        if method != "PUT" or path in met:
            return None
        met.add(path)
        return faults[len(met) % len(faults)]

    proxy.choose = first_put
    ablate.run(small_spec(rows=21), url, progress=False)

    assert len([path for path in met if re.search(r"/(outputs|keep)/c/\d+/0", path)]) == 6
    assert_same_store(contents(url), files(short))


def test_slow_answers_are_waited_for_and_asked_for_again(
    url: str, proxy: FaultyProxy, short: Path, small_spec: SmallSpec, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "stores.remote")
    place = resolve(url, {"read_timeout": 0.5, "timeout": 1})
    proxy.delay = 2.0
    slow = ["PUT /outputs/c/1/0", "PUT /ledger/c/1/0", "GET /outputs/c/1/0"]

    def each_once(number: int, method: str, path: str) -> str | None:
        found = [entry for entry in slow if entry == f"{method} {path.partition('campaign.zarr')[2]}"]
        for entry in found:
            slow.remove(entry)
        return SLOW if found else None

    proxy.choose = each_once
    ablate.run(small_spec(rows=21), place, progress=False)

    assert slow == []
    assert any("creating outputs/c/1/0 failed" in record.message for record in caplog.records)
    assert CampaignStore.open(url).fingerprint == CampaignStore.open(short).fingerprint


@pytest.mark.parametrize("fault", [RESET, BUSY])
def test_a_server_that_stays_away_is_named_in_time(
    url: str, proxy: FaultyProxy, small_spec: SmallSpec, contents: Contents, fault: str
) -> None:
    place = resolve(url, {"retry_seconds": 1.5})
    ablate.run(small_spec(rows=7), place, progress=False)
    before = contents(url)
    proxy.choose = lambda number, method, path: fault

    began = time.monotonic()
    with pytest.raises(StorageError) as raised:
        CampaignStore.open(place)

    assert time.monotonic() - began < 10
    text = re.sub(r"failed \d+ times in \d s", "failed N times in S s", str(raised.value))
    text = re.sub(r"The last cause: .*?\. Finished", "The last cause: CAUSE. Finished", text)
    assert text == (
        f"{url}: listing it failed N times in S s (server http://127.0.0.1:{proxy.port}). The last cause: CAUSE. "
        "Finished blocks stay: run the same command again when it answers."
    )
    assert ("503" in str(raised.value)) == (fault == BUSY)
    assert contents(url) == before


def test_nobody_at_the_address_is_told_soon(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores.storage.retrying, "FIRST_CONTACT_SECONDS", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)

        with pytest.raises(StorageError) as raised:
            CampaignStore.open(url)

    assert str(raised.value).startswith(f"{url}: listing it failed ")
    assert f"(server {address})" in str(raised.value)
    assert str(raised.value).endswith(
        "Nothing has answered there yet: check the address, the network and the credentials (AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY in the environment)."
    )


def test_storage_that_goes_away_while_a_campaign_runs_stops_it_and_it_goes_on_later(
    url: str, proxy: FaultyProxy, short: Path, small_spec: SmallSpec, files: Files, contents: Contents
) -> None:
    place = resolve(url, {"retry_seconds": 0.5})
    marks = 0

    def after_one_mark(number: int, method: str, path: str) -> str | None:
        nonlocal marks
        marks += method == "PUT" and "/ledger/c/" in path
        return RESET if marks > 1 else None

    proxy.choose = after_one_mark
    with pytest.raises(StorageError, match=r"failed \d+ times in \d s \(server"):
        ablate.run(small_spec(rows=21), place, progress=False, lease_seconds=2)
    proxy.choose = lambda number, method, path: None
    assert CampaignStore.open(url).progress.finished_blocks == 1

    ablate.run(small_spec(rows=21), url, progress=False)
    assert_same_store(contents(url), files(short))
