"""Campaigns and attributions whose every number the tests know, written straight into stores, without any model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from zarr.storage import MemoryStore

import ablate
import coar
from ablate import ComponentIndex, KeepPlan, Port
from coar.cli.app import main
from stores import AttributionStore, CampaignStore

Floats = npt.NDArray[np.floating[Any]]

PLAN_SEED = 0


def _index(components: int) -> ComponentIndex:
    """Two modules, `front` and `back`, of which the first has the odd component."""
    sizes = {"front": components - components // 2, "back": components // 2}
    return ComponentIndex(
        [
            Port("linear_neuron", layer, name, f"{name}.weight", "out", 0, size, 1, 3)
            for layer, (name, size) in enumerate(sizes.items())
            if size
        ]
    )


def _header(index: ComponentIndex, rows: int, ablate_fraction: float | Sequence[float]) -> dict[str, Any]:
    plan = KeepPlan(len(index), rows, ablate_fraction, PLAN_SEED)
    return {
        "identity": {
            "model": "0123456789ab" + "m" * 52,
            "data": "d" * 64,
            "index": index.hash,
            "plan": plan.describe(),
            "output": "margin (ablate.outputs.Margin)",
        },
        "spec": {"rows": rows, "model": {"source": "python", "type": "planted"}},
        "loadable": False,
        "index": index.to_json(),
        "environments": [{"versions": {"torch": "1", "numpy": "2"}, "device": "cpu"}],
    }


def _examples(count: int, ids: Sequence[str] | None, groups: Sequence[str] | None) -> dict[str, npt.NDArray[Any]]:
    return {
        "id": np.array([f"e{i}" for i in range(count)] if ids is None else list(ids), dtype=object),
        "label": np.arange(count) % 3,
        "group": np.array([f"g{i % 2}" for i in range(count)] if groups is None else list(groups), dtype=object),
    }


@pytest.fixture(scope="session")
def write_campaign() -> Callable[..., CampaignStore]:
    """`write_campaign(keep, outputs, location=memory, block_rows=20, blocks=None, ids=None, groups=None)`.

    Writes these keep-vectors (rows, components) and outputs (rows, examples); of them only `blocks`, if given.
    """

    def write(
        keep: npt.NDArray[np.bool_],
        outputs: Floats,
        location: Any = None,
        *,
        block_rows: int = 20,
        blocks: Sequence[int] | None = None,
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        ablate_fraction: float | Sequence[float] = 0.3,
    ) -> CampaignStore:
        index = _index(keep.shape[1])
        store = CampaignStore.create(
            MemoryStore() if location is None else location,
            header=_header(index, len(keep), ablate_fraction),
            components=index.columns,
            examples=_examples(outputs.shape[1], ids, groups),
            rows=len(keep),
            block_rows=block_rows,
        )
        for block in store.missing_blocks() if blocks is None else blocks:
            span = store.span(block)
            store.write_block(block, keep[span], np.asarray(outputs[span], dtype=np.float32))
        return store

    return write


@pytest.fixture(scope="session")
def draw_keep() -> Callable[..., npt.NDArray[np.bool_]]:
    """`draw_keep(rows, components, ablate_fraction=0.3, seed=0)`: keep-vectors (rows, components) bool."""

    def draw(rows: int, components: int, ablate_fraction: float = 0.3, seed: int = PLAN_SEED) -> npt.NDArray[np.bool_]:
        return KeepPlan(components, rows, ablate_fraction, seed).take(0, rows)

    return draw


@pytest.fixture(scope="session")
def truth() -> tuple[Floats, Floats]:
    """The planted weights (30 examples, 12 components) and biases (30,); multiples of 1/64, so float32 is exact."""
    generator = np.random.default_rng(5)
    return generator.integers(-128, 128, (30, 12)) / 64, generator.integers(-128, 128, 30) / 64


@pytest.fixture(scope="session")
def planted_keep(draw_keep: Callable[..., npt.NDArray[np.bool_]]) -> npt.NDArray[np.bool_]:
    """The keep-vectors of `planted`, (200, 12)."""
    return draw_keep(200, 12)


@pytest.fixture(scope="session")
def planted(
    write_campaign: Callable[..., CampaignStore], planted_keep: npt.NDArray[np.bool_], truth: tuple[Floats, Floats]
) -> CampaignStore:
    """A finished campaign of 200 rows whose outputs are exactly linear: `keep @ weights.T + bias` of `truth`."""
    weights, bias = truth
    return write_campaign(planted_keep, planted_keep @ weights.T + bias)


@pytest.fixture(scope="session")
def noisy(
    write_campaign: Callable[..., CampaignStore], planted_keep: npt.NDArray[np.bool_], truth: tuple[Floats, Floats]
) -> CampaignStore:
    """As `planted`, with normal noise of standard deviation 0.5 on every output."""
    weights, bias = truth
    noise = np.random.default_rng(6).normal(0, 0.5, (len(planted_keep), len(bias)))
    return write_campaign(planted_keep, planted_keep @ weights.T + bias + noise)


@pytest.fixture(scope="session")
def fitted(planted: CampaignStore) -> coar.Attributions:
    """Ordinary least squares on `planted`: its weights are those of `truth`."""
    return coar.fit(planted, ridge=0)


@pytest.fixture(scope="session")
def write_attributions() -> Callable[..., coar.Attributions]:
    """`write_attributions(weights, location=memory, bias=0, stderr=0.1, correlation=1, ids=None, groups=None)`."""

    def write(
        weights: npt.ArrayLike,
        location: Any = None,
        *,
        bias: npt.ArrayLike = 0.0,
        stderr: npt.ArrayLike = 0.125,
        correlation: npt.ArrayLike = 1.0,
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        block_examples: int = 3,
    ) -> coar.Attributions:
        table = np.asarray(weights, dtype=np.float32)
        count, components = table.shape
        index = _index(components)
        header = _header(index, 100, 0.3)
        place = MemoryStore() if location is None else location
        store = AttributionStore.create(
            place,
            header={**header, "identity": {"method": "by hand", "rows": 100, "of": header["identity"]}},
            components=index.columns,
            examples=_examples(count, ids, groups),
            block_examples=block_examples,
        )
        values = {
            "weights": table,
            "stderr": np.broadcast_to(np.asarray(stderr, dtype=np.float32), table.shape),
            "bias": np.broadcast_to(np.asarray(bias, dtype=np.float32), count),
            "quality/correlation": np.broadcast_to(np.asarray(correlation, dtype=np.float32), count),
            **{f"quality/{name}": np.ones(count, dtype=np.float32) for name in ("r2", "ridge", "residual_sd")},
        }
        for block in store.missing_blocks():
            store.write_block(block, {name: value[store.span(block)] for name, value in values.items()})
        return coar.open_attributions(place)

    return write


@pytest.fixture(scope="session")
def tiny_net(randomise: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
    """Two convolutions with batch norm between, 4 + 6 filters, for inputs (examples, 1, 6, 6) and 3 classes."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 3),
    )
    return randomise(model, 11).eval()


@pytest.fixture(scope="session")
def tiny_examples() -> ablate.Examples:
    """Nine examples for `tiny_net`, in the groups a, b and c."""
    generator = torch.Generator().manual_seed(12)
    return ablate.Examples(
        torch.randn(9, 1, 6, 6, generator=generator), [0, 1, 2] * 3, [f"image-{i}" for i in range(9)], list("abc") * 3
    )


@pytest.fixture(scope="session")
def tiny_campaign(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> CampaignStore:
    """A campaign of 300 rows of `tiny_net` on `tiny_examples`, 20 % ablated."""
    spec = ablate.CampaignSpec(model=tiny_net, data=tiny_examples, rows=300, ablate_fraction=0.2, seed=1)
    return ablate.run(spec, store=MemoryStore(), progress=False)


@pytest.fixture(scope="session")
def tiny_fit(tiny_campaign: CampaignStore) -> coar.Attributions:
    """Attributions of `tiny_net` on `tiny_examples`."""
    return coar.fit(tiny_campaign)


DIGITS_SPEC = """
rows = 60
passes = 4
ablate_fraction = 0.05
seed = {seed}
block_rows = 20
store = "{store}"

[model]
source = "digits"
cache = "{folder}/model.safetensors"

[data]
source = "digits"
train_per_group = 2
test_per_group = 2
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run("status", store)`: runs the command line; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["coar", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.fixture
def run_json(run: Callable[..., tuple[int, str, str]]) -> Callable[..., Any]:
    """`run_json("status", store)`: the same with `--json`; gives what it printed, strictly parsed."""

    def call(*arguments: object) -> Any:
        code, out, _ = run(*arguments, "--json")
        assert code == 0

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is no JSON")

        return json.loads(out, parse_constant=refuse)

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec of digits, its finished campaign, attributions and estimate; not to be changed."""
    path = tmp_path_factory.mktemp("cli")
    (path / "spec.toml").write_text(DIGITS_SPEC.format(folder=path, store=path / "campaign.zarr", seed=0))
    campaign = ablate.run(path / "spec.toml", progress=False)
    coar.fit(campaign, path / "campaign-attributions.zarr")
    coar.estimate(path / "spec.toml", store=path / "campaign-estimate.zarr", quality_rows=10)
    return path


@pytest.fixture(scope="session")
def digits_spec(folder: Path) -> Callable[..., str]:
    """`digits_spec(store=None, seed=0)`: the spec of `folder` as text, for another store or seed."""

    def text(store: Path | None = None, seed: int = 0) -> str:
        return DIGITS_SPEC.format(folder=folder, store=folder / "campaign.zarr" if store is None else store, seed=seed)

    return text


@pytest.fixture
def unfinished(folder: Path, tmp_path: Path) -> Path:
    """A copy of the campaign of `folder` whose last block is not finished."""
    copied = tmp_path / "unfinished.zarr"
    shutil.copytree(folder / "campaign.zarr", copied)
    (copied / "ledger" / "c" / "2" / "0").unlink()
    return copied
