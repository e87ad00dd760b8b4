"""Stores and edits made by somebody who means harm: nothing in them is run, and no name leads out of them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.numpy import save_file
from zarr.storage import LocalStore

import ablate
import coar
import stores
from stores import AttributionStore, CampaignStore, StoreError, StoreUnreadableError
from stores.format.root import seal_of
from stores.records import Lease, Process, WorkerRecord
from stores.storage import objects
from stores.work.worklog import WorkLog

pytestmark = pytest.mark.faults

SmallSpec = Callable[..., ablate.CampaignSpec]
Change = Callable[[dict[str, Any]], None]


class Bomb:
    """What makes a file of this name when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "harm")))  # noqa: S301
    assert (tmp_path / "harm").exists()


def _open_all(path: Path) -> list[Callable[[], Any]]:
    return [
        lambda: CampaignStore.open(path),
        lambda: CampaignStore.open(path, mode="r+"),
        lambda: AttributionStore.open(path),
        lambda: AttributionStore.open(path, finish=True),
        lambda: stores.verify(path),
        lambda: stores.repair(path),
        lambda: stores.migrate(path),
        lambda: coar.fit(path),
    ]


@pytest.mark.parametrize(
    "array",
    [
        {"filters": [{"id": "pickle"}]},
        {"compressor": {"id": "pickle"}},
        {"dtype": "|O", "filters": [{"id": "pickle"}], "fill_value": None},
        {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "fill_value": ""},
    ],
)
@pytest.mark.parametrize("kind", ["campaign", "attributions"])
def test_arrays_of_pickles_are_not_read(tmp_path: Path, array: dict[str, Any], kind: str) -> None:
    path = tmp_path / "a.zarr"  # zarr's format 2 knows pickle as a codec
    plain = {"shape": [4, 2], "chunks": [4, 2], "dtype": "<f4", "compressor": None, "fill_value": 0, "filters": None}
    for name in ("outputs", "keep", "weights", "stderr", "bias", "ledger", "examples/id", "components/id"):
        (path / name).mkdir(parents=True)
        metadata = {"zarr_format": 2, "order": "C", **plain, **array}
        (path / name / ".zarray").write_text(json.dumps(metadata))
        (path / name / "0.0").write_bytes(pickle.dumps(Bomb(tmp_path / "harm")))
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    header = {"format": kind, "format_version": 1, "component_count": 2, "quality": []}
    (path / ".zattrs").write_text(json.dumps(header))

    for look in _open_all(path):
        with pytest.raises(StoreUnreadableError, match=r"is no store of this toolkit: it has no zarr\.json"):
            look()
    assert not (tmp_path / "harm").exists()


def _nodes(document: dict[str, Any]) -> Any:
    return document["consolidated_metadata"]["metadata"]


def _codec(name: str, where: str) -> Change:
    def change(document: dict[str, Any]) -> None:
        codecs = _nodes(document)[where]["codecs"]
        codecs[-1]["configuration"]["codecs"].append({"name": name, "configuration": {}}) if where == "outputs" else (
            codecs.append({"name": name, "configuration": {}})
        )

    return change


def _rename(node: str, name: str) -> Change:
    def change(document: dict[str, Any]) -> None:
        _nodes(document)[name] = _nodes(document)[node]

    return change


def _inside_a_group(document: dict[str, Any]) -> None:
    inner = {"id": _nodes(document)["examples/id"]}
    _nodes(document)["examples"]["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": inner,
    }


def _set(node: str, key: str, value: Any) -> Change:
    def change(document: dict[str, Any]) -> None:
        _nodes(document)[node][key] = value

    return change


def _v2_node(document: dict[str, Any]) -> None:
    _nodes(document)["keep"] = {"zarr_format": 2, "shape": [40, 2], "chunks": [7, 2], "dtype": "|u1", "order": "C"}


EXPECTED = "expected one of bytes, crc32c, sharding_indexed, vlen-utf8, zstd"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_codec("pickle", "ledger"), f"the array 'ledger' asks for the codec 'pickle', {EXPECTED}"),
        (_codec("numcodecs.zlib", "outputs"), f"the array 'outputs' asks for the codec 'numcodecs.zlib', {EXPECTED}"),
        (_codec("gzip", "examples/id"), f"the array 'examples/id' asks for the codec 'gzip', {EXPECTED}"),
        (
            _set("examples/id", "codecs", [{"name": "vlen-utf8"}]),
            "the array 'examples/id' is encoded otherwise than st",
        ),
        (_set("keep", "codecs", [{"name": "bytes"}]), "the array 'keep' is encoded otherwise than stores are"),
        (_set("keep", "codecs", [{"name": "sharding_indexed"}]), "the array 'keep' asks for the codec None"),
        (_set("keep", "codecs", 5), "the array 'keep' asks for the codec None"),
        (_set("keep", "storage_transformers", [{"name": "x"}]), "the array 'keep' has storage transformers"),
        (_set("keep", "zarr_plugin", "os"), "the array 'keep' has 'zarr_plugin', which stores have not"),
        (_set("keep", "data_type", "variable_length_bytes"), "the array 'keep' has the data type 'variable_length_byt"),
        (_set("keep", "chunk_key_encoding", {"name": "../v2"}), "the array 'keep' names its files in another way"),
        (_set("keep", "shape", [40, 2**60]), "the array 'keep' has shape [40, 1152921504606846976] in chunks of"),
        (_set("ledger", "fill_value", 1), "the ledger is uint8 of shape [6, 32]"),
        (_rename("examples/id", "examples/../../../etc"), "the name 'examples/../../../etc' leads out of the store"),
        (_rename("examples/id", "/etc/passwd"), "the name '/etc/passwd' leads out of the store"),
        (_rename("examples/id", "examples/C:\\x"), "the name 'examples/C:\\\\x' leads out of the store"),
        (_rename("examples/id", "examples/" + "x" * 999), "the name 'examples/xxx"),
        (_inside_a_group, "the group 'examples' describes arrays itself"),
        (_v2_node, "'keep' is no array or group of zarr format 3"),
    ],
)
def test_metadata_that_would_lead_elsewhere_are_refused(finished: CampaignStore, change: Change, problem: str) -> None:
    path = Path(finished.where)
    document = json.loads((path / "zarr.json").read_text())
    change(document)
    document["attributes"]["seal"] = seal_of(document)  # a seal keeps no secret: anybody can make it
    (path / "zarr.json").write_text(json.dumps(document))

    for look in (CampaignStore.open, stores.verify, stores.repair):
        with pytest.raises(StoreUnreadableError) as raised:
            look(path)
        assert problem in str(raised.value)
        assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("names", [["../../x"], ["correlation", ".."], "correlation", [5], None, ["a/../../b"]])
def test_quality_that_would_lead_elsewhere_is_refused(tmp_path: Path, small_spec: SmallSpec, names: Any) -> None:
    path = tmp_path / "a.zarr"
    coar.estimate(small_spec(), passes=4, quality_rows=10, store=path)
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["quality"] = names
    document["attributes"]["seal"] = seal_of(document)
    (path / "zarr.json").write_text(json.dumps(document))

    with pytest.raises(StoreUnreadableError, match=r"zarr\.json: "):
        AttributionStore.open(path)


def test_arrays_outside_the_roots_description_are_not_opened(finished: CampaignStore, tmp_path: Path) -> None:
    path = Path(finished.where)
    document = json.loads((path / "zarr.json").read_text())
    del document["consolidated_metadata"]
    document["attributes"].pop("seal")
    document["attributes"]["format_version"] = 1  # which has no seal
    (path / "zarr.json").write_text(json.dumps(document))

    with pytest.raises(StoreUnreadableError, match="the array 'outputs' is missing"):
        CampaignStore.open(path)


@pytest.mark.parametrize("key", ["../../thesis", "/etc/passwd", "work/../../thesis", "a\\..\\b", "", "a//b"])
def test_keys_do_not_lead_out_of_a_store(tmp_path: Path, key: str) -> None:
    (tmp_path / "thesis.json").write_text("{}")
    (tmp_path / "a").mkdir()
    store = LocalStore(tmp_path / "a")
    uses: list[Callable[[], Any]] = [
        lambda: objects.read(store, key),
        lambda: objects.create(store, key, b""),
        lambda: objects.replace(store, key, b""),
        lambda: objects.delete(store, key),
    ]
    for use in uses:
        with pytest.raises(StoreError, match=r"leads out of the store\. Its book-keeping was changed: remove"):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "thesis.json"]
    assert (tmp_path / "thesis.json").read_text() == "{}"


def test_a_lease_cannot_name_a_file_elsewhere(
    finished: CampaignStore, small_spec: SmallSpec, tmp_path: Path, unfinish: Callable[..., None]
) -> None:
    path = Path(finished.where)
    unfinish(path, [2])
    process = Process("h", 1, "m", "1")
    elsewhere = tmp_path / "w.json"
    elsewhere.write_bytes(objects.to_json(asdict(WorkerRecord("w", process, "", "", {}))))
    lease = objects.to_json(asdict(Lease(2, "../../../w", "")))
    objects.replace(LocalStore(path), "work/leases/2.json", lease)

    with pytest.raises(StoreError, match=r"'work/workers/\.\./\.\./\.\./w\.json' leads out of the store"):
        ablate.run(small_spec(), path, progress=False)
    (path / "work" / "leases" / "2.json").unlink()
    assert ablate.run(small_spec(), path, progress=False).progress.complete


@pytest.mark.parametrize("seconds", [1e300, float("inf"), -1, "60", None])
def test_a_lease_that_never_ends_is_none(
    finished: CampaignStore, small_spec: SmallSpec, unfinish: Callable[..., None], seconds: Any
) -> None:
    path = Path(finished.where)
    unfinish(path, [2])
    record = asdict(WorkerRecord("w", Process("h", 1, "m", "1"), "", "", {}))
    store = LocalStore(path)
    objects.replace(store, "work/workers/w.json", json.dumps({**record, "lease_seconds": seconds}).encode())
    objects.replace(store, "work/leases/2.json", objects.to_json(asdict(Lease(2, "w", ""))))

    assert WorkLog(store).worker("w") is None
    assert ablate.run(small_spec(), path, progress=False).progress.complete


def test_a_claim_to_create_cannot_delete_elsewhere(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    claim = {"id": "x", "process": asdict(Process("h", 1, "m", "1")), "beat": 0, "keys": ["../thesis.tex"]}
    store = LocalStore(tmp_path / "a")
    objects.replace(store, "work/creating/0", json.dumps(claim).encode())
    whole = CampaignStore.open(undisturbed)

    monkeypatch.setattr("stores.storage.creating.PATIENCE_SECONDS", 0.1)
    columns = {"components": whole.components, "examples": whole.examples}
    with pytest.raises(StoreError, match="leads out of the store"):
        CampaignStore.create(store, header={}, **columns, rows=4, block_rows=2)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.fixture
def edit(tmp_path: Path, small_spec: SmallSpec) -> Path:
    """A file with an edit of the small network."""
    spec = small_spec()
    model, _ = spec.load()
    index = spec.make_index(model)
    coar.Edit(index.select([1, 3]), base=ablate.model_hash(model)).save(tmp_path / "e.safetensors")
    return tmp_path / "e.safetensors"


def test_an_edit_is_never_unpickled(tmp_path: Path, edit: Path) -> None:
    for data in (pickle.dumps(Bomb(tmp_path / "harm")), b"\x80\x04" + edit.read_bytes()):
        (tmp_path / "bad.safetensors").write_bytes(data)
        with pytest.raises(coar.EditError, match="cannot be read as an edit"):
            coar.load_edit(tmp_path / "bad.safetensors")
    torch.save({"edit": Bomb(tmp_path / "harm")}, tmp_path / "bad.safetensors")
    with pytest.raises(coar.EditError, match="cannot be read as an edit"):
        coar.load_edit(tmp_path / "bad.safetensors")
    assert not (tmp_path / "harm").exists()


def _load(path: Path) -> coar.Edit | None:
    """Returns the edit in a file, None if it is refused by its name."""
    try:
        return coar.load_edit(path)
    except coar.EditError as error:
        if str(path) not in str(error):
            raise
        return None


def test_a_changed_edit_is_refused_or_is_data(tmp_path: Path, edit: Path) -> None:
    from safetensors import safe_open

    with safe_open(edit, framework="np") as file:
        header = json.loads(file.metadata()["edit"])
    weird: list[Any] = [None, -1, 2**70, "x", "../../x", [], {}, [[1]], True, 1e400]
    bad = tmp_path / "bad.safetensors"
    for key in header:
        for value in weird:
            ids = np.array([1, 3], dtype=np.int64)
            save_file({"component_ids": ids}, bad, {"edit": json.dumps({**header, key: value})})
            found = _load(bad)
            if found is not None:
                allowed = {"method": "x", "settings": {}, "details": {}, "norms": {}, "notes": {}}
                if key == "base":
                    assert value in (None, "x", "../../x")
                elif key == "method":
                    assert isinstance(value, str)
                elif key == "extrapolates":
                    assert value is True
                else:
                    assert value == allowed[key]
                assert found.selection.ids == (1, 3)
    for ids in (np.array([1, 99]), np.array([-1]), np.array([[1]]), np.array([1.5]), np.zeros(0, dtype=np.int64)):
        save_file({"component_ids": ids}, bad, {"edit": json.dumps(header)})
        with pytest.raises(coar.EditError, match="cannot be read as an edit"):
            coar.load_edit(bad)
    data = edit.read_bytes()
    for at in range(0, len(data), 7):
        bad.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        _load(bad)


def test_a_pickle_in_the_place_of_a_chunk_is_noise(finished: CampaignStore, tmp_path: Path) -> None:
    path = Path(finished.where)
    for file in (path / "outputs" / "c" / "1" / "0", path / "examples" / "id" / "c" / "0"):
        file.write_bytes(pickle.dumps(Bomb(tmp_path / "harm")))

    report = stores.verify(path)

    assert [damage.what for damage in report.damages] == ["block", "table"]
    assert not (tmp_path / "harm").exists()
    assert isinstance(zarr.open_group(str(path), mode="r")["outputs"], zarr.Array)
