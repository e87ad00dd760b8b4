"""Disks that are full or read-only: the file is named, nothing half-written is data, and the same command goes on."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ablate
import coar
import stores
from stores import AttributionStore, CampaignStore
from stores.storage import objects

pytestmark = pytest.mark.faults

SmallSpec = Callable[..., ablate.CampaignSpec]
Files = Callable[[Path], dict[str, bytes]]


def _mount(where: Path, *options: str) -> None:
    """Mounts a small file system of its own, or skips the test where that is not allowed."""
    done = subprocess.run(["mount", *options, str(where)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1.5 MiB of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    _mount(where, "-t", "tmpfs", "-o", "size=1536k", "tmpfs")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def _fill(disk: Path, leave: int) -> Path:
    """Fills a disk but for so many bytes."""
    state = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, state.f_bavail * state.f_bsize - leave)))
    return ballast


def test_a_full_disk_stops_a_campaign_and_more_room_lets_it_go_on(
    small_disk: Path, small_spec: SmallSpec, undisturbed: Path, files: Files
) -> None:
    path = small_disk / "a.zarr"
    ablate.run(small_spec(), path, progress=False)  # what a whole one takes, without the files of its blocks
    for name in ("outputs", "keep", "ledger"):
        for file in (path / name / "c").glob("*/*"):
            file.unlink()
    ballast = _fill(small_disk, leave=28 * 1024)  # a page for every file: two blocks or so

    with pytest.raises(OSError, match="No space left on device") as raised:
        ablate.run(small_spec(), path, progress=False)

    assert raised.value.errno == errno.ENOSPC
    assert str(raised.value.filename).startswith(f"{path}/")
    assert raised.value.__notes__[0] == "Finished blocks stay. Make room there, then run the same command again."
    assert stores.verify(path).sound
    store = CampaignStore.open(path)
    assert 0 < store.progress.finished_blocks < 6
    whole = CampaignStore.open(undisturbed)
    for block in store.finished_blocks():
        assert store.read_block(block)[1].tobytes() == whole.read_block(block)[1].tobytes()

    ballast.unlink()
    ablate.run(small_spec(), path, progress=False)
    assert files(path) == files(undisturbed)


def test_a_disk_that_is_full_from_the_start_gets_no_store(small_disk: Path, small_spec: SmallSpec) -> None:
    ballast = _fill(small_disk, leave=16 * 1024)
    with pytest.raises(OSError, match="No space left on device"):
        ablate.run(small_spec(), small_disk / "a.zarr", progress=False)

    assert [p.name for p in small_disk.iterdir()] == ["ballast"]
    ballast.unlink()
    assert ablate.run(small_spec(), small_disk / "a.zarr", progress=False).progress.complete


@pytest.mark.parametrize("kind", ["campaign", "estimate"])
@pytest.mark.parametrize("key", ["outputs/c/3", "keep/c/3", "weights/c/1", "bias/c/1", "ledger/c/1/"])
def test_no_room_for_any_one_file(
    tmp_path: Path,
    small_spec: SmallSpec,
    undisturbed: Path,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    key: str,
) -> None:
    path = tmp_path / "a.zarr"
    create = objects.create

    def run() -> None:
        if kind == "campaign":
            ablate.run(small_spec(), path, progress=False)
        else:
            coar.estimate(small_spec(), passes=4, quality_rows=10, block_examples=3, store=path)

    def full(store: Any, name: str, data: bytes) -> None:
        if name.startswith(key):
            raise OSError(errno.ENOSPC, "No space left on device", name)
        create(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr("stores.storage.objects.create", full)
        if (kind == "campaign") == (key.partition("/")[0] in ("outputs", "keep")) or key.startswith("ledger"):
            with pytest.raises(OSError, match=f"No space left on device: '{key}"):
                run()
            missing = 3 if key.startswith(("outputs", "keep")) else 1
            opened = CampaignStore.open(path) if kind == "campaign" else AttributionStore.open(path, finish=True)
            assert opened.missing_blocks()[0] == missing
            assert stores.verify(path).sound
    run()
    assert stores.verify(path).leftovers == ()
    if kind == "campaign":
        assert files(path) == files(undisturbed)


@pytest.fixture
def read_only(tmp_path: Path, finished: CampaignStore) -> Iterator[Path]:
    """A folder with the finished campaign, on a file system mounted read-only: also root may not write there."""
    where = tmp_path / "read_only"
    where.mkdir()
    _mount(where, "--bind", str(tmp_path))
    again = subprocess.run(["mount", "-o", "remount,bind,ro", str(where)], capture_output=True, text=True, check=False)
    if again.returncode:
        subprocess.run(["umount", str(where)], check=True)
        pytest.skip(f"mounting read-only is not allowed here: {again.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_read_only_folder_is_read_and_named_when_written(
    read_only: Path, tmp_path: Path, small_spec: SmallSpec, unfinish: Callable[..., None]
) -> None:
    path = read_only / "campaign.zarr"
    assert CampaignStore.open(path).progress.complete
    assert stores.verify(path).sound
    assert ablate.run(small_spec(), path, progress=False).progress.complete  # nothing to write

    unfinish(tmp_path / "campaign.zarr", [2])
    with pytest.raises(OSError, match="Read-only file system") as raised:
        ablate.run(small_spec(), path, progress=False)
    assert Path(raised.value.filename).is_relative_to(path / "work")
    with pytest.raises(OSError, match="Read-only file system") as raised:
        ablate.run(small_spec(), read_only / "new.zarr", progress=False)
    assert str(raised.value.filename).startswith(str(read_only))
    (tmp_path / "campaign.zarr" / "outputs" / "c" / "0" / "0").write_bytes(b"")
    with pytest.raises(OSError, match="Read-only file system") as raised:
        stores.repair(path)
    assert raised.value.filename == f"{path}/outputs/c/0/0"
