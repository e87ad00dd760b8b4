"""Where a store may be, which options are taken, what is never shown, and making a store where nothing can be renamed.

gs:// and az:// are tested up to the object that obstore makes of them: there is no server for them here. What S3 does
is in tests/faults/test_object_storage.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.storage import LocalStore, MemoryStore

from stores import AttributionStore, CampaignStore, StoreError, StoreExistsError, StoreNotFoundError
from stores.storage.places import describe, resolve, storage_problems
from stores.storage.redact import redact
from stores.storage.retrying import RemoteStore

NewCampaign = Callable[..., CampaignStore]
needs_obstore = pytest.mark.skipif(importlib.util.find_spec("obstore") is None, reason="needs obstore (extra `remote`)")
SCHEMES = "Stores can be at s3://, gs://, az://, memory://, file:// or a path, not at"
S3_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away what the machine says about object storage."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)


# Places


def test_paths_stay_paths(tmp_path: Path) -> None:
    assert resolve("runs/a.zarr") == Path("runs/a.zarr")
    assert resolve(tmp_path) == tmp_path
    assert resolve(f"file://{tmp_path}/a%20b.zarr") == tmp_path / "a b.zarr"
    assert describe(f"file://{tmp_path}/a%20b.zarr") == f"{tmp_path}/a b.zarr"
    assert describe("runs/a.zarr") == "runs/a.zarr"


def test_a_store_object_is_taken_as_it_is(tmp_path: Path) -> None:
    for store in (MemoryStore(), LocalStore(tmp_path)):
        assert resolve(store) is store
        assert describe(store) == str(store)


def test_a_campaign_by_a_file_url_is_the_one_at_the_path(tmp_path: Path, new_campaign: NewCampaign) -> None:
    store = new_campaign(f"file://{tmp_path}/a.zarr")

    assert store.where == f"{tmp_path}/a.zarr"
    assert CampaignStore.open(tmp_path / "a.zarr").rows == 10


def test_memory_is_found_again_by_its_name(new_campaign: NewCampaign, keep: Any, outputs: Any) -> None:
    with pytest.raises(StoreNotFoundError, match=r"^No campaign store at memory://places/a: nothing is there"):
        CampaignStore.open("memory://places/a")
    store = new_campaign("memory://places/a")
    assert store.where == "memory://places/a"
    span = store.span(1)
    store.write_block(1, keep[span], outputs[span])

    read = CampaignStore.open("memory://places/a")

    np.testing.assert_array_equal(read.outputs[:], outputs[span])
    with pytest.raises(StoreNotFoundError):
        CampaignStore.open("memory://places/b")
    with pytest.raises(StoreExistsError, match=r"^There is something at memory://places/a already"):
        new_campaign("memory://places/a")
    with pytest.raises(ValueError, match="read-only"):
        read.write_block(0, keep[:4], outputs[:4])


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("s4://bucket/a", f"{SCHEMES} s4://. Did you mean s3://?"),
        ("gcs://bucket/a", f"{SCHEMES} gcs://. Did you mean gs://?"),
        (
            "https://server/a",
            f"{SCHEMES} https://. For other storage, pass a zarr store object.",
        ),
        ("s3://bucket", "It names no place of its own in a bucket. Give s3://BUCKET/PATH, e.g. s3://mine/a.zarr."),
        ("az://box/", "It names no place of its own in a container. Give az://CONTAINER/PATH, e.g. az://mine/a.zarr."),
        ("s3:///a", "It names no place of its own in a bucket. Give s3://BUCKET/PATH, e.g. s3://mine/a.zarr."),
        (
            "s3://bucket/a/../b",
            "Its path has an empty part, '.' or '..', which object storage takes literally. Leave that out.",
        ),
        ("memory://", "A name is missing. Give memory://NAME."),
        (
            "file://server/a",
            "A file:// URL names a file of this machine, got the host 'server'. Give file:///PATH.",
        ),
        (
            Path("s3://bucket/a"),
            "This was a URL and has become a path, with one slash too few. Give it as text, not as a Path.",
        ),
    ],
)
def test_what_is_no_place_is_told(location: Any, problem: str) -> None:
    expected = f"{location}: {problem}"

    for use in (resolve, CampaignStore.open, AttributionStore.open):
        with pytest.raises(StoreError) as raised:
            use(location)
        assert str(raised.value) == expected


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"regoin": "x"}, "Storage option 'regoin' is unknown. Did you mean 'region'?"),
        ({"endpoint_url": "https://x"}, "Storage option 'endpoint_url' is unknown. Did you mean 'endpoint'?"),
        ({"retry_seconds": -1}, "Storage option 'retry_seconds' is -1, expected a number of seconds from 0 on."),
        ({"retry_seconds": True}, "Storage option 'retry_seconds' is True, expected a number of seconds from 0 on."),
        ({"region": ["x"]}, "Storage option 'region' is list, expected text, a number or true/false."),
    ],
)
def test_options_are_checked(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(StoreError) as raised:
        resolve("s3://bucket/a", options)
    assert str(raised.value) == f"s3://bucket/a: {problem}"


def test_all_problems_are_told_at_once() -> None:
    found = storage_problems("s3://bucket", {"regoin": "x", "timeot": 3})

    assert found == [
        "It names no place of its own in a bucket. Give s3://BUCKET/PATH, e.g. s3://mine/a.zarr.",
        "Storage option 'regoin' is unknown. Did you mean 'region'?",
        "Storage option 'timeot' is unknown. Did you mean 'timeout'?",
    ]
    assert storage_problems("s3://bucket/a", {"region": "eu-central-1", "AWS_ENDPOINT": "https://x"}) == []


@pytest.mark.parametrize("location", ["runs/a", "memory://a", "file:///a", MemoryStore()])
def test_options_without_object_storage_are_refused(location: Any) -> None:
    with pytest.raises(StoreError, match=r"[Ss]torage options .*\. Leave them out\.$"):
        resolve(location, {"region": "x"})


@pytest.mark.parametrize(
    "name",
    ["access_key_id", "AWS_SECRET_ACCESS_KEY", "secret_access_key", "session_token", "token", "aws_session_token"],
)
def test_credentials_are_no_options(name: str) -> None:
    with pytest.raises(StoreError) as raised:
        resolve("s3://bucket/a", {name: "hunter2-hunter2"})
    assert str(raised.value) == (
        f"s3://bucket/a: Storage option {name!r} is a credential, whose value is not repeated here: specs are kept in "
        f"stores. Remove it, and set {S3_KEYS}."
    )


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("az", "account_key"),
        ("az", "sas_token"),
        ("az", "azure_storage_sas_key"),
        ("az", "bearer_token"),
        ("az", "client_secret"),
        ("gs", "service_account_key"),
        ("gs", "application_credentials"),
        ("gs", "service_account"),
    ],
)
def test_credentials_of_other_services_are_no_options_either(scheme: str, name: str) -> None:
    with pytest.raises(StoreError, match=f"'{name}' is a credential") as raised:
        resolve(f"{scheme}://bucket/a", {name: "hunter2-hunter2"})
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAHUNTER2HUNTER2:hunter2@bucket/a",
        "s3://AKIAHUNTER2HUNTER2:hun/ter2hunter2@bucket/a",
        "s3://hunter2@bucket/a",
        "s3://bucket/a?X-Amz-Signature=hunter2",
        "s3://bucket/a#hunter2",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str, new_campaign: NewCampaign) -> None:
    for use in (resolve, CampaignStore.open, AttributionStore.open, new_campaign):
        with pytest.raises(StoreError) as raised:
            use(url)
        assert str(raised.value) == (
            "s3://***: The URL has a user name, a password or a query in it, which is not repeated here: stores and "
            f"logs show URLs. Give s3://BUCKET/PATH alone, and set {S3_KEYS}."
        )
    with pytest.raises(StoreError, match="has a user name, a password or a query in its URL") as raised:
        resolve("s3://bucket/a", {"endpoint": "https://me:hunter2@server"})
    assert "hunter2" not in str(raised.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)

    with pytest.raises(StoreError) as raised:
        CampaignStore.open("s3://bucket/a")
    assert str(raised.value) == (
        "s3://bucket/a: stores on object storage need obstore, which is not installed. Install the extra `remote`: "
        "pip install 'component-attribution[remote]'."
    )


@needs_obstore
@pytest.mark.parametrize(
    ("url", "options", "address"),
    [
        ("s3://bucket/runs/a.zarr", {"region": "eu-central-1"}, "https://s3.amazonaws.com"),
        ("S3://bucket/runs/a.zarr/", {"endpoint": "https://minio:9000"}, "https://minio:9000"),
        ("gs://bucket/runs/a.zarr", {"timeout": 12}, "https://storage.googleapis.com"),
        ("az://box/runs/a.zarr", {"account_name": "mine"}, "https://blob.core.windows.net"),
    ],
)
def test_urls_of_all_services_become_stores(url: str, options: dict[str, Any], address: str) -> None:
    store = resolve(url, options)

    assert isinstance(store, RemoteStore)
    plain = url.lower().rstrip("/")
    assert (store.url, str(store), describe(store)) == (plain, plain, plain)
    assert store.server.address == address
    assert store.store.prefix == "runs/a.zarr"
    readable = store.with_read_only(True)
    assert (readable.read_only, readable.url, readable.server) == (True, plain, store.server)


@needs_obstore
def test_unencrypted_servers_must_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (
        "s3://bucket/a: the server http://minio:9000 speaks HTTP without encryption. If that is meant, set the storage "
        "option allow_http = true, or AWS_ALLOW_HTTP=true in the environment."
    )

    with pytest.raises(StoreError) as raised:
        resolve("s3://bucket/a", {"endpoint": "http://minio:9000"})
    assert str(raised.value) == expected
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    with pytest.raises(StoreError) as raised:
        resolve("s3://bucket/a")
    assert str(raised.value) == expected
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    assert isinstance(resolve("s3://bucket/a"), RemoteStore)


@needs_obstore
def test_an_option_of_a_wrong_value_is_named() -> None:
    with pytest.raises(StoreError, match=r'cannot be used: .*failed to parse "soon" as Duration\. Check them'):
        resolve("s3://bucket/a", {"timeout": "soon"})


# Secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PUT https://me:hunter2@server/a failed", "PUT https://***@server/a failed"),
        ("http://127.0.0.1:9000/bucket/a@b", "http://127.0.0.1:9000/bucket/a@b"),
        (
            "GET https://s/a?X-Amz-Credential=AB%2F1&X-Amz-Date=2&list-type=2",
            "GET https://s/a?X-Amz-Credential=***&X-Amz-Date=***&list-type=2",
        ),
        ("https://a.blob.core.windows.net/x?sv=1&sig=hunter2%3D", "https://a.blob.core.windows.net/x?sv=1&sig=***"),
        ("Credential=AB/1/s3, Signature=00ff", "Credential=***, Signature=***"),
        ("<AWSAccessKeyId>AB</AWSAccessKeyId>", "<AWSAccessKeyId>***</AWSAccessKeyId>"),
        ("key AKIAIOSFODNN7EXAMPLE is unknown", "key *** is unknown"),
        ("outputs/c/3/0 of s3://bucket/a: status 503", "outputs/c/3/0 of s3://bucket/a: status 503"),
    ],
)
def test_texts_are_cleared_of_secrets(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2/hunter2")
    monkeypatch.setenv("MY_API_TOKEN", "swordfish")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    monkeypatch.setenv("SHORT_KEY", "data")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")

    assert redact("hunter2/hunter2 hunter2%2Fhunter2 swordfish") == "*** *** ***"
    assert redact("parallel data in /home/me/key.json") == "parallel data in /home/me/key.json"
