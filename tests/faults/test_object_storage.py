"""Campaigns and attributions on object storage, with an S3 server on the loopback address; see s3.py.

gs:// and az:// go through the same code and library, but there is no server for them here: only their URLs and options
are tested, in tests/stores/test_places.py.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ablate
import coar
from stores import AttributionStore, CampaignStore, StoreError, StoreExistsError, StoreNotFoundError
from stores.storage.places import resolve
from stores.storage.retrying import StorageError
from tests import forking
from tests.faults import s3
from tests.faults.proxy import BUSY, DENIED, RESET, UNCONDITIONAL, FaultyProxy
from tests.faults.s3 import KEY, SECRET, TOKEN, Contents, Files, SmallSpec, assert_same_store, data
from tests.forking import Told

environment, moto, proxy, bucket = s3.environment, s3.moto, s3.proxy, s3.bucket  # fixtures
contents, short, url = s3.contents, s3.short, s3.url
pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("environment"),
    s3.needs_server,
]


def test_a_campaign_is_stored_as_on_a_local_disk_and_read_from_there(
    url: str, undisturbed: Path, small_spec: SmallSpec, files: Files, contents: Contents
) -> None:
    with pytest.raises(StoreNotFoundError, match=f"^No campaign store at {url}: nothing is there"):
        CampaignStore.open(url)

    campaign = ablate.run(small_spec(), url, progress=False)

    assert campaign.where == url
    assert_same_store(contents(url), files(undisturbed))
    read, whole = CampaignStore.open(url), CampaignStore.open(undisturbed)
    np.testing.assert_array_equal(read.outputs[:], whole.outputs[:])
    np.testing.assert_array_equal(read.keep[[3, 20]], whole.keep[[3, 20]])
    np.testing.assert_array_equal(read.outputs[:, 2:5], whole.outputs[:, 2:5])
    assert read.fingerprint == whole.fingerprint
    assert read.examples["id"].tolist() == whole.examples["id"].tolist()
    with pytest.raises(StoreExistsError, match=f"^There is something at {url} already"):
        CampaignStore.create(url, header={}, components=whole.components, examples=whole.examples, rows=4, block_rows=4)


def test_attributions_are_fitted_replaced_and_read_there(
    url: str, short: Path, small_spec: SmallSpec, contents: Contents
) -> None:
    campaign = ablate.run(small_spec(rows=21), url, progress=False)
    target = url.replace("campaign", "attributions")

    there = coar.fit(campaign, target, ridge=1.0, held_out=False)

    here = coar.fit(short, ridge=1.0, held_out=False)
    np.testing.assert_array_equal(there.weights[:], here.weights[:])
    assert there.store.where == target
    again = coar.fit(url, target, ridge=2.0, held_out=False, overwrite=True)
    assert not np.array_equal(again.weights[:], here.weights[:])
    np.testing.assert_array_equal(AttributionStore.open(target).weights[:], again.weights[:])
    assert len(data(contents(target))) > 10


def test_the_options_of_a_spec_reach_the_storage(
    url: str, proxy: FaultyProxy, small_spec: SmallSpec, monkeypatch: pytest.MonkeyPatch, short: Path
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_REGION"):
        monkeypatch.delenv(name)
    endpoint = f"http://127.0.0.1:{proxy.port}"

    place = resolve(url, {"endpoint": endpoint, "allow_http": True, "region": "us-east-1", "timeout": 20})
    campaign = ablate.run(small_spec(rows=21), place, progress=False)

    assert campaign.where == url
    assert CampaignStore.open(place).fingerprint == CampaignStore.open(short).fingerprint


def test_a_stopped_campaign_goes_on_and_writes_no_finished_block_again(
    url: str, proxy: FaultyProxy, undisturbed: Path, small_spec: SmallSpec, files: Files, contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, written = CampaignStore.write_block, 0

    def stop_after_three(store: CampaignStore, *args: Any) -> Any:
        nonlocal written
        written += 1
        if written == 4:
            raise KeyboardInterrupt
        return whole(store, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CampaignStore, "write_block", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            ablate.run(small_spec(), url, progress=False)
    stopped = CampaignStore.open(url)
    finished = stopped.finished_blocks()
    assert len(finished) == 3
    assert len(stopped.outputs) == sum(stopped.span(b).stop - stopped.span(b).start for b in finished)
    before = len(proxy.requests)

    ablate.run(small_spec(), url, progress=False)

    again = {request.path.partition("?")[0] for request in proxy.requests[before:] if request.method == "PUT"}
    for block in finished:
        assert not [path for path in again if re.search(rf"/(outputs|keep|ledger)/c/{block}/0$", path)]
    assert_same_store(contents(url), files(undisturbed))


@pytest.mark.slow
def test_two_programs_that_start_at_once_share_the_work(
    url: str, victim: Callable[..., Told], undisturbed: Path, files: Files, contents: Contents
) -> None:
    workers = [victim(url, delay=0.02) for _ in range(2)]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=100)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    objects = contents(url)
    assert_same_store(objects, files(undisturbed))
    blocks = [json.loads(data)["blocks"] for key, data in objects.items() if key.startswith("work/workers/")]
    assert sum(blocks) == 6
    assert not [key for key in objects if key.startswith("work/creating")]


CREATE_AND_DIE = """
import os, signal, sys
import numpy as np
import stores.storage.objects
from stores import CampaignStore
create, left = stores.storage.objects.create, int(sys.argv[2])
def dying(store, key, data):
    global left
    create(store, key, data)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
stores.storage.objects.create = dying
columns = {"id": np.arange(int(sys.argv[3]))}
CampaignStore.create(sys.argv[1], header={}, components=columns, examples=columns, rows=4, block_rows=2)
"""


@pytest.mark.parametrize("objects", [3, 4, 9])  # 1 and 2 are the probe's; 3 is the claim
def test_a_killed_creator_leaves_nothing_that_is_in_the_way(
    url: str, contents: Contents, tmp_path: Path, files: Files, objects: int
) -> None:
    killed = forking.start("-c", CREATE_AND_DIE, url, objects, 7)
    assert killed.wait(60) == -9, killed.communicate()[1]
    assert any(key.startswith("work/creating/") for key in contents(url))
    with pytest.raises(StoreNotFoundError):
        CampaignStore.open(url)
    columns = {"id": np.arange(5)}  # another store than the one that was begun
    given: dict[str, Any] = {"header": {}, "components": columns, "examples": columns, "rows": 6, "block_rows": 3}

    began = time.monotonic()
    CampaignStore.create(url, **given)

    assert time.monotonic() - began < 10, "it waited for a dead program"
    CampaignStore.create(tmp_path / "local", **given)
    assert contents(url) == data(files(tmp_path / "local"))


def test_storage_that_accepts_a_second_create_is_refused_before_anything_is_written(
    url: str, proxy: FaultyProxy, small_spec: SmallSpec, contents: Contents
) -> None:
    proxy.choose = lambda number, method, path: UNCONDITIONAL

    with pytest.raises(StoreError) as raised:
        ablate.run(small_spec(rows=21), url, progress=False)

    assert str(raised.value) == (
        f"{url}: the server http://127.0.0.1:{proxy.port} accepts a second create of an object that is there already "
        "(asked with If-None-Match: *). Two workers could overwrite each other's blocks without a word, so nothing is "
        "written there. Use storage that refuses it, such as Amazon S3, Google Cloud Storage, Azure or MinIO, or a "
        "path."
    )
    assert contents(url) == {}


def test_the_probe_runs_once_per_bucket_and_leaves_nothing(
    url: str, proxy: FaultyProxy, small_spec: SmallSpec, contents: Contents
) -> None:
    ablate.run(small_spec(rows=7), url, progress=False)
    CampaignStore.open(url, mode="r+")
    ablate.run(small_spec(rows=7), url.replace("campaign", "other"), progress=False)

    probes = [request for request in proxy.requests if "probe" in request.path]
    assert [request.method for request in probes if request.conditional] == ["PUT", "PUT"]
    assert not [key for key in contents(url) if "probe" in key]


def test_reading_asks_for_no_write(url: str, proxy: FaultyProxy, small_spec: SmallSpec) -> None:
    ablate.run(small_spec(rows=7), url, progress=False)
    before = len(proxy.requests)

    CampaignStore.open(url).outputs[:]

    assert {request.method for request in proxy.requests[before:]} <= {"GET", "HEAD"}


def test_a_bucket_that_is_not_there_is_named(small_spec: SmallSpec) -> None:
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket-here/a\.zarr: .*NoSuchBucket"):
        ablate.run(small_spec(rows=7), "s3://no-such-bucket-here/a.zarr", progress=False)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_refused_credentials_are_named_and_not_shown(
    url: str, proxy: FaultyProxy, small_spec: SmallSpec, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """S3's answer to a wrong signature repeats the key, what was signed, and the signature."""
    proxy.choose = lambda number, asked, path: DENIED if asked == method else None

    began = time.monotonic()
    with pytest.raises(StorageError) as raised:
        ablate.run(small_spec(rows=7), url, progress=False)

    text = str(raised.value)
    assert time.monotonic() - began < 30, "it was tried again and again"
    assert text.startswith(f"{url}: {'listing it' if method == 'GET' else 'creating work/'}")
    assert text.endswith(
        "Check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment) and what they allow."
    )
    seen, error = [text, *(record.getMessage() for record in caplog.records)], raised.value.__context__
    while error is not None:
        seen.append(repr(error))
        error = error.__context__
    assert not [part for part in ("AKIA", SECRET, TOKEN, "Signature=") if part in "\n".join(seen)]


def test_credentials_are_in_no_object_no_log_and_no_error(
    url: str, proxy: FaultyProxy, small_spec: SmallSpec, contents: Contents, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    proxy.choose = lambda number, method, path: RESET if number % 3 == 1 else None
    ablate.run(small_spec(rows=21), url, progress=False)
    proxy.choose = lambda number, method, path: BUSY
    place = resolve(url, {"retry_seconds": 0.5})
    with pytest.raises(StorageError) as raised:
        CampaignStore.open(place)

    shown = "\n".join([str(raised.value), repr(place), str(place), *(str(vars(record)) for record in caplog.records)])
    stored = b"\n".join(contents(url).values()) + "\n".join(contents(url)).encode()
    for secret in (KEY, SECRET, TOKEN):
        assert secret not in shown
        assert secret.encode() not in stored
