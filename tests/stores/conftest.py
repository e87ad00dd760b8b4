"""One small campaign and one small set of attributions, written by hand, whose every number the tests know.

Campaign: 10 keep-vectors of 11 components (two bytes, the second one half used) on 5 examples, in blocks of 4, 4 and 2.
Attributions: 7 examples, 3 components, in blocks of 3, 3 and 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stores import AttributionStore, CampaignStore

Arrays = dict[str, npt.NDArray[Any]]


def _text(prefix: str, count: int) -> npt.NDArray[Any]:
    return np.array([f"{prefix}{i}" for i in range(count)], dtype=object)


def _examples(count: int) -> Arrays:
    return {"id": _text("ü", count), "label": np.arange(count) % 3, "group": _text("g", count)}


def _components(count: int) -> Arrays:
    return {"id": np.arange(count), "name": _text("conv", count)}


@pytest.fixture(scope="session")
def keep() -> npt.NDArray[np.bool_]:
    """Keep-vectors (10, 11): row 0 keeps all, row 4 nothing, the others about half."""
    keep = np.random.default_rng(1).random((10, 11)) < 0.5
    keep[0], keep[4] = True, False
    return keep


@pytest.fixture(scope="session")
def outputs() -> npt.NDArray[np.float32]:
    """Outputs (10, 5), all different."""
    return np.random.default_rng(2).standard_normal((10, 5)).astype(np.float32)


@pytest.fixture(scope="session")
def new_campaign() -> Callable[..., CampaignStore]:
    """`new_campaign(location, rows=10, block_rows=4, components=11, examples=5, header={})`: an empty store."""

    def make(location: Any, rows: int = 10, block_rows: int = 4, **changes: Any) -> CampaignStore:
        return CampaignStore.create(
            location,
            header=changes.get("header", {"note": "by hand"}),
            components=_components(changes.get("components", 11)),
            examples=_examples(changes.get("examples", 5)),
            rows=rows,
            block_rows=block_rows,
        )

    return make


@pytest.fixture(scope="session")
def campaign(
    tmp_path_factory: pytest.TempPathFactory,
    new_campaign: Callable[..., CampaignStore],
    keep: npt.NDArray[np.bool_],
    outputs: npt.NDArray[np.float32],
) -> CampaignStore:
    """A finished campaign of `keep` and `outputs`, open for reading. Not to be written to."""
    path = tmp_path_factory.mktemp("stores") / "campaign.zarr"
    store = new_campaign(path)
    for block in range(3):
        span = store.span(block)
        store.write_block(block, keep[span], outputs[span])
    return CampaignStore.open(path)


@pytest.fixture(scope="session")
def estimates() -> Arrays:
    """What an attribution store of 7 examples and 3 components holds."""
    generator = np.random.default_rng(3)
    quality = ("correlation", "r2", "ridge", "residual_sd")
    values = {
        name: generator.standard_normal(7).astype(np.float32) for name in ("bias", *(f"quality/{q}" for q in quality))
    }
    values["quality/correlation"][5] = np.nan
    values["weights"] = generator.standard_normal((7, 3)).astype(np.float32)
    values["stderr"] = generator.random((7, 3)).astype(np.float32)
    return values


@pytest.fixture(scope="session")
def new_attributions() -> Callable[..., AttributionStore]:
    """`new_attributions(location)`: an empty store for `estimates`, open for writing."""

    def make(location: Any) -> AttributionStore:
        return AttributionStore.create(
            location, header={"note": "by hand"}, components=_components(3), examples=_examples(7), block_examples=3
        )

    return make


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """`fill(store, estimates, blocks=None)` writes these blocks of an attribution store, or all."""

    def write(store: AttributionStore, estimates: Arrays, blocks: list[int] | None = None) -> None:
        for block in range(3) if blocks is None else blocks:
            store.write_block(block, {name: value[store.span(block)] for name, value in estimates.items()})

    return write


@pytest.fixture(scope="session")
def attributions(
    tmp_path_factory: pytest.TempPathFactory,
    new_attributions: Callable[..., AttributionStore],
    fill: Callable[..., None],
    estimates: Arrays,
) -> AttributionStore:
    """A finished store of `estimates`, open for reading. Not to be written to."""
    path = tmp_path_factory.mktemp("stores") / "attributions.zarr"
    fill(new_attributions(path), estimates)
    return AttributionStore.open(path)
