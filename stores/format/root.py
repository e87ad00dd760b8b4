"""What the root of a store must say before anything else of it is believed: our format, our codecs, shapes that agree.

Metadata come from a file, and files may be damaged, of another version, or made by somebody who means harm. zarr looks
codecs up by name among all that is installed, and some of them (pickle) run what they read; so only the few that stores
are written with are let through, and only arrays that the consolidated metadata of the root describe are ever opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from zarr.abc.store import Store

from stores.errors import StoreError, StoreUnreadableError
from stores.storage import objects

FORMAT_VERSION = 2
"""The version of the format that is written."""
OLDEST_VERSION = 1  # that is still read

ROOT = "zarr.json"
SEAL = "seal"  # attribute of the root: the sha256 of all the rest of it
CODECS = frozenset({"sharding_indexed", "bytes", "crc32c", "zstd", "vlen-utf8"})
MOST_BLOCKS = 100_000  # the ledger has an object for each, and every start of a worker looks at all
MOST_NUMBERS = 2**53  # of one array
BROKEN = (
    "Its metadata is damaged or it was not written by this toolkit; restore it from a copy, or delete it and run again."
)

_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|string")
_ARRAY_KEYS = {
    *("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs"),
    *("attributes", "dimension_names", "storage_transformers"),
}
_PIPELINES = {("bytes", "crc32c"), ("bytes", "zstd", "crc32c"), ("vlen-utf8", "zstd", "crc32c")}
_KEYS = {"name": "default", "configuration": {"separator": "/"}}

Document = dict[str, Any]


class OtherKindError(StoreUnreadableError):
    """A store of this toolkit, but of another kind than was asked for.

    Attributes:
      found: Its kind; None if it is no store of this toolkit.
    """

    def __init__(self, message: str, found: Any) -> None:
        self.found = found
        super().__init__(message)


class OldFormatError(StoreUnreadableError):
    """A store of an older format, which is read as it is but written only after it was migrated."""


class DamagedMetadataError(StoreUnreadableError):
    """The metadata of a store of this toolkit are not what was written; nothing in the store can be told for sure."""


def require_sound(store: Store, kind: str, mode: str, where: str) -> None:
    """Raises StoreUnreadableError unless the root of a store is of this kind, of a version for this mode, and whole."""
    document = read_root(store, where, kind)
    if document.get("node_type") != "group" or document.get("zarr_format") != 3:
        raise OtherKindError(f"{where} is no {kind} store: it is no group of zarr format 3. Check the path.", None)
    header = document["attributes"]
    found, version = header.get("format"), header.get("format_version")
    if found != kind:
        reason = "it was not written by this toolkit" if found is None else f"its format is {found!r}"
        raise OtherKindError(f"{where} is no {kind} store: {reason}. Check the path.", found)
    _check_version(version, mode, where)
    if version >= 2 and header.get(SEAL) != seal_of(document):
        raise DamagedMetadataError(
            f"{where}/{ROOT} was changed after it was written: its seal, the sha256 of its content, does not fit. "
            f"{BROKEN}"
        )
    problem = next(_problems(kind, header, document["consolidated_metadata"]["metadata"]), None)
    if problem is not None:
        raise DamagedMetadataError(f"{where}/{ROOT}: {problem}. {BROKEN}")


def read_root(store: Store, where: str, kind: str = "component attribution") -> Document:
    """Returns the root's metadata as JSON with `attributes` and consolidated metadata, both perhaps empty.

    Raises:
      StoreUnreadableError: There are none, or something else.
    """
    data = objects.read(store, ROOT)
    if data is None:
        raise StoreUnreadableError(f"{where} exists but is no store of this toolkit: it has no {ROOT}. Check the path.")
    try:
        document = json.loads(data)
        attributes = document.setdefault("attributes", {})
        inner = document.get("consolidated_metadata") or {"metadata": {}}
        document["consolidated_metadata"] = inner
        sound = isinstance(attributes, dict) and isinstance(inner["metadata"], dict)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise StoreUnreadableError(
            f"{where} cannot be read as a {kind} store: {ROOT}: {type(error).__name__}: {error}. {BROKEN}"
        ) from error
    if not sound:
        raise StoreUnreadableError(
            f"{where} cannot be read as a {kind} store: {ROOT} holds no attributes and arrays. {BROKEN}"
        )
    return dict(document)


def seal(store: Store) -> None:
    """Writes into a new store's root the sha256 of all that it says, so that a change of a single letter is seen.

    Raises:
      StoreError: Such a store could not be opened again: it has too many blocks, say.
    """
    document = read_root(store, str(store))
    header, nodes = document["attributes"], document["consolidated_metadata"]["metadata"]
    problem = next(_problems(header["format"], header, nodes), None) if "format" in header else None
    if problem is not None:
        raise StoreError(f"Such a store cannot be made: {problem}. Choose larger blocks, or fewer rows or examples.")
    document["attributes"][SEAL] = seal_of(document)
    objects.replace(store, ROOT, json.dumps(document, indent=2).encode())


def seal_of(document: Mapping[str, Any]) -> str:
    """Returns the sha256 (hex) of a root's metadata, whatever its layout as text, without the seal itself."""
    header = {key: value for key, value in document["attributes"].items() if key != SEAL}
    text = json.dumps({**document, "attributes": header}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_version(version: Any, mode: str, where: str) -> None:
    if type(version) is not int or version < OLDEST_VERSION:
        raise DamagedMetadataError(f"{where}/{ROOT} has format version {version!r}, expected a number. {BROKEN}")
    if version > FORMAT_VERSION:
        raise StoreUnreadableError(
            f"{where} was written by a newer version of the toolkit (format {version}; this version reads up to "
            f"{FORMAT_VERSION}). Upgrade: pip install --upgrade component-attribution."
        )
    if version < FORMAT_VERSION and mode != "r":
        raise OldFormatError(
            f"{where} was written by an older version of the toolkit (format {version}; this version writes "
            f"{FORMAT_VERSION}). It can be read as it is. To go on with it, run `coar migrate {where}` once: no number "
            "changes, but older versions will not open it any more."
        )


def _problems(kind: str, header: Mapping[str, Any], nodes: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the arrays and tables that a root describes; what comes first is to be told."""
    for path, node in nodes.items():
        yield from _node_problems(path, node)
    try:
        if kind == "campaign":
            yield from _campaign_problems(header, nodes)
        else:
            yield from _attribution_problems(header, nodes)
    except _Missing as missing:
        yield str(missing)


def node_problem(path: str, node: Any) -> str | None:
    """Returns what is wrong with the metadata of an array or group that the root does not describe; None: nothing."""
    return next(_node_problems(path, node), None)


def _node_problems(path: str, node: Any) -> Iterator[str]:
    if any(part in ("", ".", "..") or set(part) & set("\\:\0") or len(part) > 200 for part in path.split("/")):
        yield f"the name {path!r} leads out of the store"
    if not isinstance(node, dict) or node.get("zarr_format") != 3 or node.get("node_type") not in ("array", "group"):
        yield f"{path!r} is no array or group of zarr format 3"
        return
    if node["node_type"] == "group":
        inner = node.get("consolidated_metadata")
        if inner is not None and not (isinstance(inner, dict) and inner.get("metadata") == {}):
            yield f"the group {path!r} describes arrays itself, expected the root to"
        return
    unknown = sorted(set(node) - _ARRAY_KEYS)
    if unknown:
        yield f"the array {path!r} has {unknown[0]!r}, which stores have not"
    if node.get("storage_transformers"):
        yield f"the array {path!r} has storage transformers, which stores have not"
    if not isinstance(node.get("data_type"), str) or not _DTYPES.fullmatch(node["data_type"]):
        yield f"the array {path!r} has the data type {_short(node.get('data_type'))}, which stores have not"
    if node.get("chunk_key_encoding") != _KEYS:
        yield f"the array {path!r} names its files in another way than stores do"
    for name in _codec_names(node.get("codecs")):
        if name not in CODECS:
            known = ", ".join(sorted(CODECS))
            yield f"the array {path!r} asks for the codec {_short(name)}, expected one of {known}"
    if not _is_checked(path, node.get("codecs")):
        yield f"the array {path!r} is encoded otherwise than stores are, so that damage might not be seen"
    shape, chunks = node.get("shape"), _chunks(node)
    if not _sizes(shape, 0) or not _sizes(chunks, 1) or len(shape) != len(chunks):  # type: ignore[arg-type]
        yield f"the array {path!r} has shape {_short(shape)} in chunks of {_short(chunks)}"
    elif max(prod(shape), prod(chunks)) > MOST_NUMBERS:  # type: ignore[arg-type]
        yield f"the array {path!r} has shape {_short(shape)} in chunks of {_short(chunks)}: more than a store can hold"


def _is_checked(path: str, codecs: Any) -> bool:
    """Returns whether an array is encoded as stores are: everything but the ledger, which is checksums, by crc32c."""
    names = tuple(codec.get("name") for codec in codecs if isinstance(codec, dict)) if isinstance(codecs, list) else ()
    if names == ("sharding_indexed",):
        inner = codecs[0].get("configuration")
        return isinstance(inner, dict) and all(
            [codec.get("name") for codec in inner[part]] == ["bytes", "crc32c"] for part in ("codecs", "index_codecs")
        )
    return names in _PIPELINES or (path == "ledger" and names == ("bytes",))


def _codec_names(codecs: Any, depth: int = 0) -> Iterator[Any]:
    """Yields the names of an array's codecs, and of those inside its shards; None for what is no list of codecs."""
    if not isinstance(codecs, list) or depth > 2:
        yield None
        return
    for codec in codecs:
        if not isinstance(codec, dict):
            yield codec
            continue
        yield codec.get("name")
        if codec.get("name") == "sharding_indexed":
            configuration = codec.get("configuration")
            for inner in ("codecs", "index_codecs"):
                yield from _codec_names(
                    configuration.get(inner) if isinstance(configuration, dict) else None, depth + 1
                )


def _chunks(node: Mapping[str, Any]) -> Any:
    grid = node.get("chunk_grid")
    if not isinstance(grid, dict) or grid.get("name") != "regular" or not isinstance(grid.get("configuration"), dict):
        return None
    return grid["configuration"].get("chunk_shape")


def _sizes(value: Any, least: int) -> bool:
    return isinstance(value, list) and bool(value) and all(type(size) is int and size >= least for size in value)


class _Missing(Exception):  # noqa: N818 - told as a sentence, never raised out of here
    """An array or a table that is not there, or has another shape."""


def _campaign_problems(header: Mapping[str, Any], nodes: Mapping[str, Any]) -> Iterator[str]:
    components = header.get("component_count")
    if type(components) is not int or not 1 <= components <= MOST_NUMBERS:
        yield f"component_count is {_short(components)}, expected a number of components"
        return
    rows, examples = _shape(nodes, "outputs", 2)
    arrays = {"outputs": ("float32", [rows, examples]), "keep": ("uint8", [rows, (components + 7) // 8])}
    yield from _block_problems(nodes, arrays, "outputs")
    yield from _table_problems(nodes, {"examples": examples, "components": components})


def _attribution_problems(header: Mapping[str, Any], nodes: Mapping[str, Any]) -> Iterator[str]:
    quality = header.get("quality")
    if not isinstance(quality, list) or not all(isinstance(name, str) for name in quality):
        yield f"quality is {_short(quality)}, expected a list of names"
        return
    examples, components = _shape(nodes, "weights", 2)
    arrays: dict[str, tuple[str, list[int]]] = {n: ("float32", [examples, components]) for n in ("weights", "stderr")}
    for name in ("bias", *(f"quality/{name}" for name in quality)):
        arrays[name] = ("float32", [examples])
    yield from _block_problems(nodes, arrays, "weights")
    yield from _table_problems(nodes, {"examples": examples, "components": components})


def _block_problems(nodes: Mapping[str, Any], arrays: Mapping[str, tuple[str, list[int]]], first: str) -> Iterator[str]:
    """Yields what keeps arrays from having the same rows in the same blocks, each block in one file."""
    rows, block = nodes[first]["shape"][0], _chunks(nodes[first])[0]
    if rows < 1 or -(-rows // block) > MOST_BLOCKS:
        yield f"the array {first!r} has {rows:,} rows in blocks of {block:,}, expected 1 to {MOST_BLOCKS:,} blocks"
        return
    for name, (dtype, shape) in arrays.items():
        _shape(nodes, name, len(shape))
        node, chunks = nodes[name], _chunks(nodes[name])
        if node["data_type"] != dtype or node["shape"] != shape:
            found = f"{node['data_type']} of shape {node['shape']}"
            yield f"the array {name!r} is {found}, expected {dtype} of shape {shape}"
        if chunks[0] != block or any(chunk < max(1, size) for chunk, size in zip(chunks[1:], shape[1:], strict=True)):
            yield f"the array {name!r} lies in files of {chunks}, expected blocks of {block} whole rows"
    count = -(-rows // block)
    _shape(nodes, "ledger", 2)
    ledger = nodes["ledger"]
    marks = (ledger["data_type"], ledger["shape"], _chunks(ledger), ledger.get("fill_value"))
    if marks != ("uint8", [count, 32], [1, 32], 0):
        yield f"the ledger is {marks[0]} of shape {marks[1]} in chunks of {marks[2]}, expected {count} marks"


def _table_problems(nodes: Mapping[str, Any], lengths: Mapping[str, int]) -> Iterator[str]:
    for table, length in lengths.items():
        if nodes.get(table, {}).get("node_type") != "group":
            yield f"the table {table!r} is missing"
        for path, node in nodes.items():
            if path.startswith(f"{table}/") and (node.get("shape") != [length] or _chunks(node) != [max(1, length)]):
                yield f"the column {path!r} has shape {_short(node.get('shape'))}, expected [{length}] in one file"


def _shape(nodes: Mapping[str, Any], name: str, dimensions: int) -> list[int]:
    node = nodes.get(name, {})
    if node.get("node_type") != "array":
        raise _Missing(f"the array {name!r} is missing")
    if len(node["shape"]) != dimensions:
        raise _Missing(f"the array {name!r} has shape {node['shape']}, expected {dimensions} dimensions")
    return list(node["shape"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
