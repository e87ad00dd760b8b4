"""A small campaign to kill, damage and resume, and what an undisturbed run of it stores."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ablate
from stores import CampaignStore
from tests import forking
from tests.forking import Told

VICTIM = Path(__file__).with_name("victim.py")
SmallSpec = Callable[..., ablate.CampaignSpec]
StartVictim = Callable[..., Told]


@pytest.fixture(scope="session")
def victim() -> StartVictim:
    """`victim(store, delay=0.0, point="")`: starts the small campaign in a process that may be killed."""

    def start(store: object, delay: float = 0.0, point: str = "") -> Told:
        return forking.start(VICTIM, store, torch.get_num_threads(), delay, point, strict=True)

    return start


@pytest.fixture(scope="session")
def small_spec() -> SmallSpec:
    """`small_spec(**changes)`: 10 components, 40 keep rows in 5 blocks of 7 and one of 5, 9 examples."""
    make: SmallSpec = runpy.run_path(str(VICTIM))["small_spec"]
    return make


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_spec: SmallSpec) -> Path:
    """The finished store of the small campaign. Not to be changed."""
    path = tmp_path_factory.mktemp("undisturbed") / "campaign.zarr"
    ablate.run(small_spec(), path, progress=False)
    return path


@pytest.fixture
def finished(tmp_path: Path, undisturbed: Path) -> CampaignStore:
    """A copy of the finished store, to damage."""
    shutil.copytree(undisturbed, tmp_path / "campaign.zarr")
    return CampaignStore.open(tmp_path / "campaign.zarr")


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, bytes]]:
    """`files(path)`: every file of a store with its bytes, without book-keeping and what a killed write leaves."""

    def read(path: Path) -> dict[str, bytes]:
        found = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
        return {n: data for n, data in found.items() if not (n.endswith(".partial") or n.startswith("work/"))}

    return read


@pytest.fixture(scope="session")
def unfinish() -> Callable[..., None]:
    """`unfinish(path, blocks)` deletes the marks of these blocks: they were never finished."""

    def delete(path: Path, blocks: Any) -> None:
        for block in blocks:
            (path / "ledger" / "c" / str(block) / "0").unlink()

    return delete
