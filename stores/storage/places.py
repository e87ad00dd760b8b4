"""Where stores can be: local paths, `s3://`, `gs://` and `az://` URLs, `memory://`, and zarr store objects."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from zarr.abc.store import Store
from zarr.storage import MemoryStore, ObjectStore

from stores.errors import StoreError
from stores.storage.redact import HIDDEN, has_credentials, is_secret_name, redact
from stores.storage.retrying import RETRY_SECONDS, RemoteStore, Server, told

Location = str | os.PathLike[str] | Store

_CLIENT = (
    *("allow_http", "connect_timeout", "read_timeout", "timeout", "pool_idle_timeout", "proxy_url", "proxy_excludes"),
    *("http1_only", "http2_only", "user_agent"),
)
_SECONDS = ("connect_timeout", "read_timeout", "timeout", "pool_idle_timeout")
# Slow lines move a block of 64 MiB within `timeout`; what stands still for `read_timeout` is a fault.
_CLIENT_DEFAULTS: Mapping[str, Any] = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "600s"}
# The library itself only repeats what failed a moment ago, e.g. a conflict of two creates; patience is RemoteStore's.
_QUICK_RETRIES: Mapping[str, Any] = {
    "max_retries": 2,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
}


@dataclass(frozen=True)
class _Service:
    """One kind of object storage.

    Attributes:
      store: The class of obstore.
      first: What the first part of a URL names there.
      options: Its options, beside those of every HTTP client.
      prefixes: What other tools put before the names of options.
      address: The server without an `endpoint`.
      credentials: Where credentials come from.
    """

    store: str
    first: str
    options: tuple[str, ...]
    prefixes: tuple[str, ...]
    address: str
    credentials: str


_SERVICES: Mapping[str, _Service] = {
    "s3": _Service(
        "S3Store",
        "bucket",
        (
            *("endpoint", "region", "virtual_hosted_style_request", "skip_signature", "request_payer"),
            *("unsigned_payload", "checksum_algorithm", "server_side_encryption", "sse_kms_key_id"),
            *("sse_bucket_key_enabled", "disable_tagging", "s3_express"),
        ),
        ("aws_",),
        "https://s3.amazonaws.com",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
    ),
    "gs": _Service(
        "GCSStore",
        "bucket",
        ("skip_signature",),
        ("google_",),
        "https://storage.googleapis.com",
        "GOOGLE_APPLICATION_CREDENTIALS (the path of a file) in the environment",
    ),
    "az": _Service(
        "AzureStore",
        "container",
        ("account_name", "endpoint", "use_emulator", "use_fabric_endpoint", "skip_signature", "disable_tagging"),
        ("azure_storage_", "azure_"),
        "https://blob.core.windows.net",
        "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY in the environment",
    ),
}
_SCHEMES = (*_SERVICES, "memory", "file")
_ALIASES = {"gcs": "gs", "s3a": "s3", "s3n": "s3", "abfs": "az", "abfss": "az", "adl": "az", "azure": "az"}

_memories: dict[str, MemoryStore] = {}
_servers: dict[str, Server] = {}


class NamedMemory(MemoryStore):
    """A store in the memory of this process that is found again by its URL."""

    def __init__(self, store_dict: Any = None, *, read_only: bool = False, url: str = "memory://") -> None:
        super().__init__(store_dict, read_only=read_only)
        self.url = url

    def with_read_only(self, read_only: bool = False) -> NamedMemory:
        """Returns the same store for reading only, or for writing, too."""
        return NamedMemory(self._store_dict, read_only=read_only, url=self.url)

    def __str__(self) -> str:
        return self.url


def resolve(location: Location, storage: Mapping[str, Any] | None = None) -> Path | Store:
    """Returns a local path, or the zarr store behind a URL. Mutates nothing; nothing is read or written yet.

    `s3://BUCKET/PATH`, `gs://BUCKET/PATH` and `az://CONTAINER/PATH` need the extra `remote`; credentials come from the
    environment only. `memory://NAME` is one store per name and process. `file://` is a path. A zarr store object is
    returned as it is, but for zarr's own `ObjectStore`, which gets retries.

    Args:
      location: A path, a URL or a zarr store object.
      storage: Options of object storage: `endpoint`, `region`, `allow_http`, `timeout`, ... as of obstore, and
        `retry_seconds`, how long a fault of the network is waited out (default 180).

    Raises:
      StoreError: Not such a place: an unknown scheme or option, a URL without a path, credentials where they would be
        stored or shown, or the package for it is not installed. Credentials are not repeated.
    """
    problems = storage_problems(location, storage)
    if problems:
        raise StoreError(f"{describe(location)}: " + " ".join(problems))
    if isinstance(location, Store):
        if type(location) is not ObjectStore:
            return location
        url = redact(str(location))
        server = _servers.setdefault(url, Server(url))
        return RemoteStore(location.store, url=url, server=server, read_only=location.read_only)
    scheme, rest = _split(location)
    if scheme is None:
        return user_path(location)
    if scheme == "file":
        return Path(unquote(urlsplit(os.fspath(location)).path))
    if scheme == "memory":
        name = rest.strip("/")
        return _memories.setdefault(name, NamedMemory(url=f"memory://{name}"))
    return _remote(scheme, rest, dict(storage or {}))


def is_remote(location: Location) -> bool:
    """Returns whether a place is a URL of object storage, to which storage options belong."""
    return not isinstance(location, Store) and _split(location)[0] in _SERVICES


def user_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path as a user wrote it, `~` at its beginning as the home folder, as a shell would have it."""
    return Path(os.path.expanduser(path))


def describe(location: Location) -> str:
    """Returns a place as users know it, never with credentials: a path, a URL, or the name of a zarr store object."""
    if isinstance(location, Store):
        return redact(str(location))
    scheme, _ = _split(location)
    text = os.fspath(location)
    if scheme == "file" and not urlsplit(text).netloc:
        return unquote(urlsplit(text).path)
    if scheme is not None and has_credentials(text):
        return f"{scheme}://{HIDDEN}"
    return text


def storage_problems(location: Location, storage: Mapping[str, Any] | None = None) -> list[str]:
    """Returns what is wrong with a place and its storage options, a sentence each, without credentials; often none."""
    options = dict(storage or {})
    if isinstance(location, Store):
        return (
            ["Storage options do not go with a zarr store object, which has its own. Leave them out."]
            if options
            else []
        )
    scheme, rest = _split(location)
    text = os.fspath(location)
    if scheme is not None and scheme in _SERVICES:
        return [*_url_problems(scheme, text, rest), *_option_problems(scheme, options)]
    problems = []
    if scheme is None and re.match(rf"({'|'.join(_SCHEMES)}):/", text):
        problems += ["This was a URL and has become a path, with one slash too few. Give it as text, not as a Path."]
    elif scheme == "file" and urlsplit(text).netloc:
        host = urlsplit(text).netloc
        problems += [f"A file:// URL names a file of this machine, got the host {host!r}. Give file:///PATH."]
    elif scheme == "memory" and not rest.strip("/"):
        problems += ["A name is missing. Give memory://NAME."]
    elif scheme is not None and scheme not in _SCHEMES:
        nearest = [_ALIASES[scheme]] if scheme in _ALIASES else difflib.get_close_matches(scheme, _SCHEMES, 1, 0.5)
        hint = f"Did you mean {nearest[0]}://?" if nearest else "For other storage, pass a zarr store object."
        known = ", ".join(f"{s}://" for s in _SCHEMES)
        problems += [f"Stores can be at {known} or a path, not at {scheme}://. {hint}"]
    if options:
        problems += [f"Storage options ({', '.join(options)}) are for object storage only. Leave them out."]
    return problems


def _url_problems(scheme: str, url: str, rest: str) -> list[str]:
    service = _SERVICES[scheme]
    if has_credentials(url):
        return [
            f"The URL has a user name, a password or a query in it, which is not repeated here: stores and logs show "
            f"URLs. Give {scheme}://{service.first.upper()}/PATH alone, and set {service.credentials}."
        ]
    first, _, path = rest.partition("/")
    if not first or not path.strip("/"):
        what = f"{service.first.upper()}/PATH"
        return [
            f"It names no place of its own in a {service.first}. Give {scheme}://{what}, e.g. {scheme}://mine/a.zarr."
        ]
    if any(part in (".", "..", "") for part in path.rstrip("/").split("/")):
        return ["Its path has an empty part, '.' or '..', which object storage takes literally. Leave that out."]
    return []


def _option_problems(scheme: str, options: Mapping[str, Any]) -> list[str]:
    service = _SERVICES[scheme]
    known = (*service.options, *_CLIENT, "retry_seconds")
    problems = []
    for name, value in options.items():
        plain = _plain(name, service)
        if is_secret_name(plain):
            problems.append(
                f"Storage option {name!r} is a credential, whose value is not repeated here: specs are kept in stores. "
                f"Remove it, and set {service.credentials}."
            )
        elif plain not in known:
            nearest = difflib.get_close_matches(plain, known, n=1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else f"Known: {', '.join(known)}."
            problems.append(f"Storage option {name!r} is unknown. {hint}")
        elif isinstance(value, str) and "://" in value and has_credentials(value):
            problems.append(
                f"Storage option {name!r} has a user name, a password or a query in its URL, which is not repeated "
                f"here. Give the URL alone, and set {service.credentials}."
            )
        elif plain == "retry_seconds" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            problems.append(f"Storage option 'retry_seconds' is {value!r}, expected a number of seconds from 0 on.")
        elif not isinstance(value, (str, int, float, bool)):
            problems.append(
                f"Storage option {name!r} is {type(value).__name__}, expected text, a number or true/false."
            )
    return problems


def _remote(scheme: str, rest: str, storage: Mapping[str, Any]) -> RemoteStore:
    service = _SERVICES[scheme]
    first, _, path = rest.partition("/")
    url = f"{scheme}://{first}/{path.strip('/')}"
    try:
        import obstore.store
    except ImportError:
        raise StoreError(
            f"{url}: stores on object storage need obstore, which is not installed. Install the extra `remote`: "
            "pip install 'component-attribution[remote]'."
        ) from None
    options = {_plain(name, service): value for name, value in storage.items()}
    patience = float(options.pop("retry_seconds", RETRY_SECONDS))
    client = _from_environment(service)  # which the library no longer reads when it is given a single one of them
    client |= {name: _seconds(name, options.pop(name)) for name in _CLIENT if name in options}
    address = options.get("endpoint") or _endpoint(service)
    if address.startswith("http://") and str(client.get("allow_http")).lower() not in ("true", "1", "yes", "on"):
        raise StoreError(
            f"{url}: the server {redact(address)} speaks HTTP without encryption. If that is meant, set the storage "
            f"option allow_http = true, or {service.prefixes[-1].upper()}ALLOW_HTTP=true in the environment."
        )
    made: Any = getattr(obstore.store, service.store)
    problem = ""
    try:
        store = made(
            first,
            prefix=path.strip("/"),
            config=options,
            client_options={**_CLIENT_DEFAULTS, **client},
            retry_config=dict(_QUICK_RETRIES),
        )
    except Exception as error:  # of the library, which checks every option; types differ
        problem = told(error)
    if problem:
        raise StoreError(
            f"{url}: the storage options or the environment cannot be used: {problem}. Check them, and "
            f"{service.credentials}."
        )
    key = f"{redact(address)} {first} {patience}"
    server = _servers.setdefault(key, Server(redact(address), service.credentials, patience))
    return RemoteStore(store, url=url, server=server)


def _split(location: str | os.PathLike[str]) -> tuple[str | None, str]:
    """Returns the scheme of a URL, in small letters, and what follows; None for a path."""
    text = os.fspath(location)
    scheme, found, rest = text.partition("://")
    if not found or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return None, text
    return scheme.lower(), rest


def _plain(name: str, service: _Service) -> str:
    """Returns an option's name without what other tools put before it: `AWS_REGION` is `region`."""
    plain = name.lower()
    for prefix in service.prefixes:
        plain = plain.removeprefix(prefix)
    return plain


def _seconds(name: str, value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{round(value * 1000)}ms" if number and name in _SECONDS else value


def _endpoint(service: _Service) -> str:
    """Returns the server that the environment names, or the service's own."""
    names = [f"{prefix}{end}".upper() for prefix in service.prefixes for end in ("endpoint_url", "endpoint")]
    return next((os.environ[name] for name in names if os.environ.get(name)), service.address)


def _from_environment(service: _Service) -> dict[str, Any]:
    """Returns the options of the HTTP client that the environment sets, such as AWS_ALLOW_HTTP."""
    names = {option: f"{prefix}{option}".upper() for prefix in service.prefixes for option in _CLIENT}
    return {option: os.environ[name] for option, name in names.items() if os.environ.get(name)}
