"""An S3 server on the loopback address (moto's), a faulty proxy before it, and what a user sets to reach it.

Fixtures for the modules that say so: `moto, proxy, ... = s3.moto, s3.proxy, ...`. The server is a mock that keeps
objects in memory: how durable real storage is cannot be seen here.
"""

from __future__ import annotations

import atexit
import http.client
import importlib.util
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import ablate
import stores.storage.retrying
from tests.faults.proxy import FaultyProxy

KEY, SECRET, TOKEN = "AKIAQUITESECRET00042", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "FwoGZXIvYXdzEJrSESSION"
SmallSpec = Callable[..., ablate.CampaignSpec]
Files = Callable[[Path], dict[str, bytes]]
Contents = Callable[[str], dict[str, bytes]]

missing = [name for name in ("moto", "obstore") if importlib.util.find_spec(name) is None]
needs_server = pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}, of the extra `dev`")


@cache
def _server() -> int:
    """Starts an S3 server on 127.0.0.1 that ends with this process; returns its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    atexit.register(_stop, server)
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, "moto's server has ended"
        assert time.monotonic() < deadline, "moto's server does not answer"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return port


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


@pytest.fixture(scope="session")
def moto() -> int:
    """The port of the S3 server, the same one for all modules."""
    return _server()


@pytest.fixture
def proxy(moto: int) -> Iterator[FaultyProxy]:
    """A proxy before the server that makes no faults until it is told to."""
    with FaultyProxy(moto) as proxy:
        yield proxy


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, proxy: FaultyProxy) -> None:
    """Address and credentials as a user sets them; short pauses."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(stores.storage.retrying, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory, small_spec: SmallSpec) -> Path:
    """The small campaign with three blocks only, on the local disk. Not to be changed."""
    path = tmp_path_factory.mktemp("short") / "campaign.zarr"
    ablate.run(small_spec(rows=21), path, progress=False)
    return path


@pytest.fixture
def bucket(moto: int) -> str:
    """The name of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    connection = http.client.HTTPConnection("127.0.0.1", moto, timeout=30)
    connection.request("PUT", f"/{name}", headers={"Host": f"127.0.0.1:{moto}"})
    assert connection.getresponse().status == 200
    connection.close()
    return name


@pytest.fixture
def url(bucket: str) -> str:
    """Where a store may be made."""
    return f"s3://{bucket}/runs/campaign.zarr"


@pytest.fixture
def contents(moto: int) -> Contents:
    """`contents(url)`: every object below a URL with its bytes, read past the proxy and the code under test."""

    def read(url: str) -> dict[str, bytes]:
        from obstore.store import S3Store

        name, _, prefix = url.removeprefix("s3://").partition("/")
        store = S3Store(name, prefix=prefix, endpoint=f"http://127.0.0.1:{moto}", client_options={"allow_http": True})
        keys = [item["path"] for batch in store.list() for item in batch]
        return {key: store.get(key).bytes().to_bytes() for key in keys}

    return read


def data(objects: dict[str, bytes]) -> dict[str, bytes]:
    """Returns what a store is made of: everything but book-keeping."""
    return {key: data for key, data in objects.items() if not key.startswith("work/")}


def assert_same_store(objects: dict[str, bytes], local: dict[str, bytes]) -> None:
    found, expected = data(objects), data(local)
    assert sorted(found) == sorted(expected)
    assert [key for key in found if found[key] != expected[key]] == []
