"""A forward that raises or gives NaN in the middle: finished blocks stay, and the same command goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
import ablate.engine.gated_model
from stores import CampaignStore

pytestmark = pytest.mark.faults

SmallSpec = Callable[..., ablate.CampaignSpec]
Files = Callable[[Path], dict[str, bytes]]


class Trapped(nn.Module):
    """The small network, behind a trap that a test springs in one forward; not part of its weights."""

    forwards: ClassVar[int] = 0
    traps: ClassVar[dict[int, BaseException | float]] = {}

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        # the engine looks the model over, and a store compares outputs of two examples, before rows run: not counted
        if x.dtype == torch.float64 or len(x) == 2 or torch.is_grad_enabled():
            return logits
        trap = self.traps.get(Trapped.forwards)
        Trapped.forwards += 1
        if isinstance(trap, BaseException):
            raise trap
        if trap is not None:
            logits[1, :] = trap
        return logits


@pytest.fixture
def trapped_spec(small_spec: SmallSpec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ablate.CampaignSpec]:
    """`trapped_spec(traps, batch_size)`: springs `traps[n]` in forward n of the next run; forwards count from 0."""
    network, _ = small_spec().load()

    def make(traps: dict[int, BaseException | float], batch_size: int = 128) -> ablate.CampaignSpec:
        monkeypatch.setattr(Trapped, "forwards", 0)
        monkeypatch.setattr(Trapped, "traps", traps)
        monkeypatch.setattr(ablate.engine.gated_model, "PROBED", 128)  # no batch is compared with its examples alone
        return small_spec(model=Trapped(network).eval(), batch_size=batch_size)

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("batch_size", "forward", "example"), [(128, 16, 1), (4, 16 * 3 + 1, 5), (4, 16 * 3, 1)])
def test_a_number_that_is_none_names_its_row_and_example(
    tmp_path: Path,
    trapped_spec: Callable[..., ablate.CampaignSpec],
    files: Files,
    value: float,
    batch_size: int,
    forward: int,
    example: int,
) -> None:
    path = tmp_path / "a"
    with pytest.raises(ablate.NonFiniteOutputError) as raised:
        ablate.run(trapped_spec({forward: value}, batch_size), path, progress=False)

    assert str(raised.value) == (
        f"Output of keep row 16 on example {example} (id 'cat-{example}') is nan, expected a finite number. Nothing of "
        "this block was stored. Check that input and the model for overflow, or ablate a smaller fraction."
    )
    assert (raised.value.row, raised.value.example) == (16, example)
    assert CampaignStore.open(path).finished_rows.tolist() == list(range(14))
    assert not list(path.glob("outputs/c/2/*"))

    ablate.run(trapped_spec({}, batch_size), path, progress=False)
    ablate.run(trapped_spec({}, batch_size), tmp_path / "undisturbed", progress=False)
    assert files(path) == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt("ctrl-c"), MemoryError("no more")])
def test_a_forward_that_raises_leaves_finished_blocks(
    tmp_path: Path, trapped_spec: Callable[..., ablate.CampaignSpec], files: Files, error: BaseException
) -> None:
    path = tmp_path / "a"
    spec = trapped_spec({37: error})
    random_state = torch.get_rng_state()
    with pytest.raises(type(error), match=str(error)) as raised:
        ablate.run(spec, path, progress=False)

    assert torch.equal(torch.get_rng_state(), random_state)
    expected = [
        f"This happened in block 5 (keep rows 35 to 39) of {path}. Finished blocks stay: run the same command again to "
        "go on from here."
    ]
    assert getattr(raised.value, "__notes__", []) == ([] if isinstance(error, KeyboardInterrupt) else expected)
    assert CampaignStore.open(path).finished_blocks() == [0, 1, 2, 3, 4]

    ablate.run(trapped_spec({}), path, progress=False)
    assert Trapped.forwards == 5, "only the rows that were missing are run"
    ablate.run(trapped_spec({}), tmp_path / "undisturbed", progress=False)
    assert files(path) == files(tmp_path / "undisturbed")


def test_an_error_in_the_first_block_leaves_an_empty_store(
    tmp_path: Path, trapped_spec: Callable[..., ablate.CampaignSpec]
) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        ablate.run(trapped_spec({0: RuntimeError("broken")}), tmp_path / "a", progress=False)

    assert CampaignStore.open(tmp_path / "a").finished_blocks() == []
    assert ablate.run(trapped_spec({}), tmp_path / "a", progress=False).progress.complete


def test_a_memory_store_is_gone_on_with_too(trapped_spec: Callable[..., ablate.CampaignSpec]) -> None:
    memory = MemoryStore()
    with pytest.raises(RuntimeError, match="broken"):
        ablate.run(trapped_spec({20: RuntimeError("broken")}), memory, progress=False)
    assert CampaignStore.open(memory).finished_blocks() == [0, 1]

    store = ablate.run(trapped_spec({}), memory, progress=False)

    assert store.progress.complete
    assert Trapped.forwards == 26


def test_a_finished_campaign_is_returned_without_a_forward(
    tmp_path: Path, trapped_spec: Callable[..., ablate.CampaignSpec]
) -> None:
    ablate.run(trapped_spec({}), tmp_path / "a", progress=False)

    store = ablate.run(trapped_spec({0: RuntimeError("a forward was run")}), tmp_path / "a", progress=False)

    assert store.progress.complete
    assert Trapped.forwards == 0
