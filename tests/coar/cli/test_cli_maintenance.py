"""`coar verify`, `repair` and `migrate`: what they print, their exit codes, and that the advice they give works."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from stores import CampaignStore

Run = Callable[..., tuple[int, str, str]]
OLD = Path(__file__).parents[2] / "stores" / "fixtures" / "v1.tar.gz"


@pytest.fixture
def store(tmp_path: Path, folder: Path) -> Path:
    """A copy of the finished campaign of `folder`, to damage."""
    shutil.copytree(folder / "campaign.zarr", tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def test_a_sound_store(run: Run, store: Path) -> None:
    code, out, err = run("verify", store, "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith(f"{store}: sound. ")
    assert run("repair", store, "--quiet") == (0, f"{store}: nothing to repair.\n", "")


def test_progress_goes_to_stderr(run: Run, store: Path) -> None:
    code, out, err = run("verify", store)
    assert code == 0
    assert "read back" in err
    assert "read back:" not in out


def test_damage_is_exit_code_1_until_it_is_repaired(run: Run, store: Path) -> None:
    file = store / "outputs" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-1])

    code, out, _ = run("verify", store, "--quiet")
    assert code == 1
    assert out.startswith(f"{store}: DAMAGED. ")
    assert "\n  block 0: the file was cut: " in out
    assert out.splitlines()[-1] == (
        f"`coar repair {store}` forgets what is damaged; then run the same command again to make it anew."
    )
    code, out, _ = run("verify", store, "--json", "--quiet")
    facts = json.loads(out)
    assert (code, facts["sound"], facts["damaged_blocks"]) == (1, False, [0])
    assert facts["damages"][0]["files"] == [str(file)]

    code, out, _ = run("repair", store, "--quiet")
    assert code == 0
    assert out.splitlines()[:2] == [f"{store}: 1 damaged block was forgotten: 0.", out.splitlines()[1]]
    assert "Run the same command again: it computes it anew, and nothing else." in out
    assert run("verify", store, "--quiet")[0] == 0
    assert CampaignStore.open(store).missing_blocks() == [0]


def test_what_cannot_be_repaired_is_exit_code_1(run: Run, store: Path) -> None:
    (store / "examples" / "id" / "c" / "0").write_bytes(b"")

    assert run("verify", store, "--quiet")[0] == 1
    code, out, _ = run("repair", store, "--json", "--quiet")
    assert code == 1
    assert json.loads(out)["left"][0]["files"] == [f"{store}/examples/id/c/0"]
    assert run("repair", store, "--quiet")[0] == 1


def test_a_damaged_root_is_an_error(run: Run, store: Path) -> None:
    (store / "zarr.json").write_text((store / "zarr.json").read_text().replace('"uint8"', '"int8"', 1))

    for command in ("verify", "repair", "migrate"):
        code, out, err = run(command, store)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {store}/zarr.json was changed after it was written")
        assert "restore it from a copy" in err


@pytest.mark.parametrize("command", ["verify", "repair", "migrate"])
def test_nothing_there(run: Run, tmp_path: Path, command: str) -> None:
    code, out, err = run(command, tmp_path / "none.zarr")
    assert (code, out) == (2, "")
    assert "nothing is there" in err


def test_an_old_store_is_migrated_once(run: Run, tmp_path: Path) -> None:
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "v1" / "finished.zarr"

    code, _, err = run("repair", path)
    assert code == 2
    assert f"run `coar migrate {path}` once" in err
    assert run("migrate", path) == (0, f"{path}: format 1 became format 2. No number was changed.\n", "")
    assert run("migrate", path) == (0, f"{path} has format 2 already: nothing to do.\n", "")
    code, out, _ = run("migrate", path, "--json")
    assert (code, json.loads(out)) == (0, {"store": str(path), "before": 2, "after": 2})
    assert run("verify", path, "--quiet")[0] == 0
