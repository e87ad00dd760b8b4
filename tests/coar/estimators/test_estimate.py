"""`coar.estimate`: block by block into a store that is gone on with, in bounded memory, with its quality beside it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import ablate
import coar
from ablate import MeanAblation, ScaleAblation
from ablate.errors import UnknownNameError
from ablate.outputs import output_names
from coar.errors import FitError
from coar.estimators.differentiable import ADVICE
from coar.estimators.estimate import QUALITY_SEED
from coar.estimators.gradient.estimator import Gradient
from coar.statistics import correlation, explained_share
from stores import AttributionStore, StoreMismatchError
from stores.format.groups import Location
from tests import forking

Untouched = Callable[..., AbstractContextManager[None]]
NAMES = ("weights", "stderr", "bias")
MIB = 2**20


def _estimate(model: Any, data: Any, **settings: Any) -> coar.Attributions:
    """A cheap estimate: 6 passes, blocks of 4 examples."""
    return coar.estimate(model, data, **{"passes": 6, "block_examples": 4, "quality_rows": 10, **settings})


def _digests(place: Location) -> list[bytes]:
    store = AttributionStore.open(place)
    return [bytes(row) for row in store.blocks.digests()]


def _same(one: coar.Attributions, other: coar.Attributions) -> bool:
    return all(np.array_equal(getattr(one, name)[:], getattr(other, name)[:]) for name in NAMES) and all(
        np.array_equal(one.quality[name], other.quality[name], equal_nan=True) for name in one.quality
    )


class StopError(Exception):
    """Raised on purpose."""


def _stopping(after: int) -> Any:
    """Patches `Gradient.estimate` to raise when it is asked for a block more than so many times; counts its calls."""
    original, calls = Gradient.estimate, list[int]()

    def estimate(self: Gradient, engine: Any, examples: Any, first: int, seed: int) -> Any:
        calls.append(first)
        if len(calls) > after:
            raise StopError("enough")
        return original(self, engine, examples, first, seed)

    patch = mock.patch.object(Gradient, "estimate", estimate)
    return patch, calls


def test_a_store_holds_what_memory_holds(tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path) -> None:
    memory = _estimate(tiny_net, tiny_examples)
    disk = _estimate(tiny_net, tiny_examples, store=tmp_path / "a.zarr")
    assert _same(memory, disk)
    assert _same(disk, coar.open_attributions(tmp_path / "a.zarr"))
    assert disk.store.block_examples == 4
    assert disk.weights[:].shape == (9, 10)
    identity = dict(disk.header["identity"])
    assert set(identity.pop("versions")) == {"component-attribution", "torch", "numpy", "zarr"}
    of = identity["of"] = dict(identity["of"])
    assert of.pop("code")["calls"]["2"] == "relu()"
    assert np.shape(of.pop("sample_outputs")) == (2, 2)
    assert identity == {
        "method": "gradient",
        "passes": 6,
        "ablate_fraction": 0.05,
        "background": "continuous",
        "tolerance": 0.02,
        "most_passes": 1000,
        "forward_rows": 0,
        "quality_rows": 10,
        "of": {
            "model": ablate.model_hash(tiny_net),
            "data": tiny_examples.hash,
            "index": disk.index.hash,
            "plan": {"ablate_fraction": 0.05, "seed": 0},
            "output": "margin (ablate.outputs.Margin)",
            "output_settings": {},
            "ablation": "zero",
            "precision": "float32",
            "weights": {},
        },
    }
    disk.store.verify()


def test_each_block_is_what_the_estimator_says_of_it(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    found = _estimate(tiny_net, tiny_examples, ablate_fraction=0.2, seed=3)
    engine = ablate.Engine(tiny_net, found.index)
    for first, last in ((0, 4), (4, 8), (8, 9)):
        alone = Gradient(6, 0.2).estimate(engine, tiny_examples.take(range(first, last)), first, 3)
        for name in NAMES:
            np.testing.assert_array_equal(getattr(found, name)[first:last], getattr(alone, name))


def test_quality_is_measured_on_rows_of_its_own(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    found = _estimate(tiny_net, tiny_examples, ablate_fraction=0.2, seed=3, quality_rows=40)
    keep = ablate.KeepPlan(10, 40, 0.2, 3 ^ QUALITY_SEED).take(0, 40)
    outputs = ablate.Engine(tiny_net, found.index).outputs(keep, tiny_examples).numpy().astype(np.float64)
    predicted = keep.astype(np.float64) @ found.weights[:].T + found.bias[:]
    assert list(found.quality) == ["correlation", "r2", "residual_sd", "passes"]
    np.testing.assert_allclose(found.quality["correlation"], correlation(predicted, outputs), rtol=1e-5)
    np.testing.assert_allclose(found.quality["r2"], explained_share(predicted, outputs), rtol=1e-5)
    missed = np.sqrt(((outputs - predicted) ** 2).mean(axis=0))
    np.testing.assert_allclose(found.quality["residual_sd"], missed, rtol=1e-5)
    assert (found.quality["passes"] == 6).all()
    assert found.quality["correlation"].mean() > 0.8


def test_without_quality_rows_quality_is_nan(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    found = _estimate(tiny_net, tiny_examples, quality_rows=0)
    assert found.quality[["correlation", "r2", "residual_sd"]].isna().all(axis=None)
    assert (found.quality["passes"] == 6).all()
    assert _same(found, found)
    np.testing.assert_array_equal(found.weights[:], _estimate(tiny_net, tiny_examples).weights[:])


def test_resuming_after_an_error_gives_the_same_bytes(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path
) -> None:
    whole, path = tmp_path / "whole.zarr", tmp_path / "a.zarr"
    _estimate(tiny_net, tiny_examples, store=whole)
    patch, _ = _stopping(1)
    with patch, pytest.raises(StopError) as caught:
        _estimate(tiny_net, tiny_examples, store=path)
    assert caught.value.__notes__ == [
        f"This happened in block 1 (examples 4 to 7) of {path}. Finished blocks stay: run the same command again to go "
        "on from here."
    ]
    assert AttributionStore.open(path, finish=True).missing_blocks() == [1, 2]
    patch, calls = _stopping(99)
    with patch:
        _estimate(tiny_net, tiny_examples, store=path)
    assert calls == [4, 8], "only what was missing is computed"
    assert _digests(path) == _digests(whole)
    with patch:
        _estimate(tiny_net, tiny_examples, store=path)
    assert calls == [4, 8], "a finished store is returned as it is"


def test_going_on_with_other_blocks_keeps_those_of_the_store(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path
) -> None:
    patch, _ = _stopping(1)
    with patch, pytest.raises(StopError):
        _estimate(tiny_net, tiny_examples, store=tmp_path / "a.zarr")
    found = _estimate(tiny_net, tiny_examples, store=tmp_path / "a.zarr", block_examples=9)
    assert found.store.block_examples == 4
    assert _same(found, _estimate(tiny_net, tiny_examples))


def test_another_estimate_is_refused_naming_every_difference(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path
) -> None:
    path = tmp_path / "a.zarr"
    first = _estimate(tiny_net, tiny_examples, store=path)
    with pytest.raises(StoreMismatchError) as caught:
        _estimate(tiny_net, tiny_examples, store=path, passes=7, seed=2, ablate_fraction=0.1, quality_rows=11)
    assert str(caught.value) == (
        f"Attribution store {path} was made from something else. What differs (stored -> now):\n"
        "  ablate_fraction: 0.05 -> 0.1\n"
        "  of.plan.ablate_fraction: 0.05 -> 0.1\n"
        "  of.plan.seed: 0 -> 2\n"
        "  passes: 6 -> 7\n"
        "  quality_rows: 10 -> 11\n"
        "Name another store, or replace this one with overwrite=True (`--overwrite`)."
    )
    with pytest.raises(StoreMismatchError, match=r"of\.data"):
        _estimate(tiny_net, tiny_examples.take(range(8)), store=path)
    assert _same(coar.open_attributions(path), first)

    replaced = _estimate(tiny_net, tiny_examples, store=path, passes=7, overwrite=True)
    assert replaced.header["identity"]["passes"] == 7
    assert _same(replaced, _estimate(tiny_net, tiny_examples, passes=7))


def test_what_cannot_be_estimated_replaces_nothing(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path
) -> None:
    path = tmp_path / "a.zarr"
    first = _estimate(tiny_net, tiny_examples, store=path)
    other = ablate.Examples(torch.randn(3, 2, 6, 6), [0, 1, 2])  # two channels: the model fails
    with pytest.raises(ablate.DataError):
        _estimate(tiny_net, other, store=path, overwrite=True)
    assert _same(coar.open_attributions(path), first)
    with pytest.raises(ablate.DataError):
        _estimate(tiny_net, other, store=tmp_path / "b.zarr")
    assert not (tmp_path / "b.zarr").exists()


def _needed(components: int, examples: int, block: int, on_disk: bool) -> int:
    """Bytes that the driver counts for blocks of tiny_examples, 10 quality rows, without forward rows."""
    fixed = components * 3 * 8 * 16**2 + 32 * MIB + 9 * components * 10
    each = components * (36 + 320) + 24 * 10 + tiny_bytes
    return fixed + block * each + (0 if on_disk else 8 * components * examples)


tiny_bytes = 6 * 6 * 4


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_blocks_are_as_large_as_the_budget_lets_them(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path, on_disk: bool, block: int
) -> None:
    place = tmp_path / "a.zarr" if on_disk else None
    memory = _needed(10, 9, block, on_disk)
    found = _estimate(tiny_net, tiny_examples, store=place, memory=memory, block_examples=256)
    assert found.store.block_examples == block
    found = _estimate(tiny_net, tiny_examples, memory=_needed(10, 9, block + 1, on_disk=False) - 1, block_examples=256)
    assert found.store.block_examples == block


def test_a_budget_too_small_says_what_is_needed(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path
) -> None:
    with pytest.raises(FitError) as caught:
        _estimate(tiny_net, tiny_examples, memory=1_000_000)
    assert str(caught.value) == (
        f"memory=1,000,000 bytes is too small for 10 components: at least {_needed(10, 9, 1, False):,} are needed, "
        f"{_needed(10, 9, 9, False):,} or more are comfortable. Pass store=PATH so that the result need not be kept in "
        "memory."
    )
    with pytest.raises(FitError) as caught:
        _estimate(tiny_net, tiny_examples, memory=33_000_000, store=tmp_path / "a.zarr")
    assert str(caught.value) == (
        "memory=33,000,000 bytes is too small for 10 components: at least 33,620,716 are needed, 33,652,268 or more "
        "are comfortable."
    )
    assert not (tmp_path / "a.zarr").exists()


def test_a_store_with_larger_blocks_than_the_budget_is_not_gone_on_with(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, tmp_path: Path
) -> None:
    patch, _ = _stopping(1)
    with patch, pytest.raises(StopError):
        _estimate(tiny_net, tiny_examples, store=tmp_path / "a.zarr")
    with pytest.raises(FitError, match=f"at least {_needed(10, 9, 4, on_disk=True):,} are needed"):
        _estimate(tiny_net, tiny_examples, store=tmp_path / "a.zarr", memory=_needed(10, 9, 3, on_disk=True))


def _mlp(units: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 3)).eval()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_examples(tmp_path: Path) -> None:
    """numpy's and Python's memory; torch's is counted by the next test."""
    model, peaks = _mlp(300), []
    generator = torch.Generator().manual_seed(1)
    for count in (200, 2000):
        data = (torch.randn(count, 4, generator=generator), torch.arange(count) % 3)
        tracemalloc.start()
        try:
            settings: dict[str, Any] = {"passes": 4, "ablate_fraction": 0.2, "quality_rows": 10, "memory": 50 * MIB}
            coar.estimate(model, data, store=tmp_path / f"{count}.zarr", **settings)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + MIB
    assert peaks[1] < 50 * MIB
    assert 100 < coar.open_attributions(tmp_path / "2000.zarr").store.block_examples < 200


RESIDENT = """
import resource, sys, torch, coar
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 3)).eval()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def estimate(count, block, path):
    data = torch.randn(count, 4), torch.arange(count) % 3
    coar.estimate(model, data, passes=6, quality_rows=10, ablate_fraction=0.2, memory=150 * 2**20, batch_size=64,
        block_examples=block, store=path)
estimate(8, 8, sys.argv[1] + "/first.zarr")
before = peak()
estimate(int(sys.argv[2]), 10_000, sys.argv[1] + "/second.zarr")
print(peak() - before)
"""


@pytest.mark.slow
def test_the_process_stays_inside_the_budget(tmp_path: Path) -> None:
    def grown(count: int) -> int:
        place = tmp_path / str(count)
        place.mkdir()
        out, err = forking.start("-c", RESIDENT, place, count).communicate()
        assert err == ""
        return int(out)

    few, many = grown(300), grown(3000)
    assert many < 150 * MIB
    assert many < few + 40 * MIB
    blocks = coar.open_attributions(tmp_path / "3000" / "second.zarr").store.block_examples
    assert 200 < blocks < 400


@pytest.mark.parametrize("ablation", [ScaleAblation(0.5), ScaleAblation(2.0), "mean"])
def test_weights_are_effects_of_the_ablation_asked_for(ablation: Any) -> None:
    """On a linear network: output(kept) - output(ablated), as leaving one out measures it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double().eval()
    inputs = torch.randn(7, 5, dtype=torch.float64)
    examples = ablate.Examples(inputs, [0, 1, 2, 0, 1, 2, 0])
    chosen = MeanAblation(inputs) if ablation == "mean" else ablation
    settings: dict[str, Any] = {
        "components": {"include": ["0"]},
        "output": "logit",
        "ablation": chosen,
        "precision": "float64",
    }
    found = coar.estimate(model, examples, passes=10, quality_rows=20, ablate_fraction=0.2, **settings)
    engine = ablate.Engine(model, found.index, "logit", ablation=chosen, precision="float64")
    every = engine.outputs(np.ones((1, 6), dtype=bool), examples).numpy()
    expected = (every - engine.leave_one_out(examples).numpy()).T
    np.testing.assert_allclose(found.weights[:], expected, atol=1e-6)
    nothing = engine.outputs(np.zeros((1, 6), dtype=bool), examples).numpy()[0]
    np.testing.assert_allclose(found.bias[:], nothing, atol=1e-5)
    assert (found.quality["correlation"] > 1 - 1e-6).all()


@pytest.mark.parametrize("background", ["continuous", "mixed", "bernoulli"])
def test_all_backgrounds(tiny_net: nn.Module, tiny_examples: ablate.Examples, background: str) -> None:
    found = coar.estimate(tiny_net, tiny_examples, method=Gradient(40, 0.2, background))
    assert found.quality["correlation"].mean() > 0.85
    assert found.header["identity"]["background"] == background


def test_forward_rows_do_not_make_it_worse(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    keep = ablate.KeepPlan(10, 300, 0.2, 8).take(0, 300)

    def quality(passes: int, rows: int) -> float:
        found = coar.estimate(tiny_net, tiny_examples, method=Gradient(passes, 0.2, forward_rows=rows))
        outputs = ablate.Engine(tiny_net, found.index).outputs(keep, tiny_examples)
        return float(coar.counterfactual_correlation(found, keep, outputs).mean())

    assert quality(3, 200) > quality(3, 0) + 0.01
    assert quality(60, 200) > quality(60, 0) - 0.005


class Words(nn.Module):
    """A language model of 20 words: logits (batch, tokens, words)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        logits: Tensor = self.head(x + self.down(nn.functional.gelu(self.up(x))))
        return logits


def test_an_output_per_token() -> None:
    torch.manual_seed(0)
    model = Words().eval()
    tokens = torch.randint(0, 20, (6, 7))
    examples = ablate.Examples(tokens, torch.randint(0, 20, (6, 7)))
    components = {"kinds": ["linear_neuron"], "include": ["up"]}
    found = _estimate(model, examples, output="token_margin", components=components, passes=60, ablate_fraction=0.2)
    assert found.weights[:].shape == (6, 12)
    assert found.quality["correlation"].mean() > 0.9


def test_a_data_set(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    data = TensorDataset(tiny_examples.inputs(), tiny_examples.targets)
    found = _estimate(tiny_net, data)
    for other in (tiny_examples, (tiny_examples.inputs(), tiny_examples.targets)):
        np.testing.assert_array_equal(found.weights[:], _estimate(tiny_net, other).weights[:])


def test_a_spec_says_it_all(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    spec = ablate.CampaignSpec(model=tiny_net, data=tiny_examples, passes=6, ablate_fraction=0.2, seed=1)
    found = coar.estimate(spec, quality_rows=10, block_examples=4)
    assert _same(found, _estimate(tiny_net, tiny_examples, ablate_fraction=0.2, seed=1))
    other = coar.estimate(spec, quality_rows=10, block_examples=4, passes=4, ablate_fraction=0.1)
    assert _same(other, _estimate(tiny_net, tiny_examples, ablate_fraction=0.1, seed=1, passes=4))
    assert coar.estimate(spec, method="random", quality_rows=0).header["identity"]["method"] == "random"


def test_a_spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype("f4")
    np.savez("digits.npz", inputs=inputs, targets=np.arange(5))
    Path("spec.toml").write_text(
        "passes = 3\nablate_fraction = 0.1\nseed = 2\n"
        '[model]\nsource = "timm"\nname = "test_resnet"\nclasses = 5\n'
        '[data]\nsource = "arrays"\npath = "digits.npz"\n',
        encoding="utf-8",
    )
    found = coar.estimate("spec.toml", quality_rows=0, store="a.zarr")
    assert found.header["loadable"]
    assert found.header["identity"]["passes"] == 3
    assert found.header["identity"]["of"]["plan"] == {"ablate_fraction": 0.1, "seed": 2}
    assert _digests("a.zarr") == _digests(coar.estimate(Path("spec.toml"), quality_rows=0).store.location)


def _message(kind: type[Exception], model: Any, data: Any = None, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        coar.estimate(model, data, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passes": 1}, "passes is 1, expected an integer from 2 to 32,767, or 'auto'."),
        ({"passes": 0}, "passes is 0, expected an integer from 2 to 32,767, or 'auto'."),
        ({"passes": True}, "passes is True, expected an integer from 2 to 32,767, or 'auto'."),
        ({"passes": 2.5}, "passes is 2.5, expected an integer from 2 to 32,767, or 'auto'."),
        ({"passes": "many"}, "passes is 'many', expected an integer from 2 to 32,767, or 'auto'."),
        (
            {"ablate_fraction": 0.6},
            "ablate_fraction is 0.6, expected a number above 0 and at most 0.5 for estimates from gradients. For more, "
            "run a campaign and fit it (coar.fit).",
        ),
        (
            {"ablate_fraction": [0.1, 0.2]},
            "An estimate is about one ablate fraction, got [0.1, 0.2]. Choose one: ablate_fraction=.",
        ),
        (
            {"method": Gradient(5, 0.1), "ablate_fraction": 0.2},
            "ablate_fraction is 0.2, but the method has its own, 0.1. Give it once.",
        ),
        ({"quality_rows": 5}, "quality_rows is 5, expected 0 (none) or at least 10."),
        ({"quality_rows": -20}, "quality_rows is -20, expected 0 (none) or at least 10."),
        ({"block_examples": 0}, "block_examples is 0, expected at least 1."),
        (
            {"method": "leave_one_out", "passes": 5},
            "Method 'leave_one_out' has no setting 'passes'; it takes no settings.",
        ),
        (
            {"method": Gradient(5), "passes": 5},
            "Settings (passes) were given beside an instance of Gradient, which has its own. Give them to its "
            "constructor.",
        ),
        (
            {"index": ablate.ComponentIndex([])},
            "The engine's index has no components: there is nothing to attribute to. Make one with "
            "ComponentIndex.from_model(model), or widen its kinds or include.",
        ),
    ],
)
def test_arguments_that_make_no_sense(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, settings: dict[str, Any], message: str
) -> None:
    assert _message(FitError, tiny_net, tiny_examples, **settings) == message


def test_problems_of_the_spec_at_once(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    assert _message(ablate.SpecError, tiny_net, tiny_examples, ablate_fraction=0.0, output="margni", seed=-1) == (
        "CampaignSpec: 3 problems\n"
        "  1. ablate_fraction: got 0.0, but it should be greater than 0.\n"
        "  2. seed: got -1, but it should be greater than or equal to 0.\n"
        f"  3. output: got 'margni', expected one of {', '.join(output_names())}. Did you mean 'margin'?"
    )
    assert _message(ablate.SpecError, tiny_net, tiny_examples, ablate_fraction=float("nan")) == (
        "CampaignSpec: 1 problem\n  1. ablate_fraction: got nan, but it should be less than 1."
    )


def test_an_unknown_method(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    assert _message(UnknownNameError, tiny_net, tiny_examples, method="gradeint").startswith(
        "No method 'gradeint'. Did you mean 'gradient'?"
    )


def test_arguments_beside_a_spec(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    spec = ablate.CampaignSpec(model=tiny_net, data=tiny_examples, ablate_fraction=[0.1, 0.2])
    assert _message(FitError, spec, tiny_examples, output="logit", seed=3, precision="float64") == (
        "data, output, seed, precision: given beside a spec, which has its own. Change the spec."
    )
    assert _message(FitError, spec) == (
        "An estimate is about one ablate fraction, got (0.1, 0.2). Choose one: ablate_fraction=."
    )
    chosen = coar.estimate(spec, ablate_fraction=0.1, passes=2, quality_rows=0)
    assert chosen.header["identity"]["ablate_fraction"] == 0.1
    own = coar.estimate(spec, method=Gradient(2, 0.3), quality_rows=0)
    assert own.header["identity"]["of"]["plan"]["ablate_fraction"] == 0.3
    one = ablate.CampaignSpec(model=tiny_net, data=tiny_examples, ablate_fraction=0.1)
    assert _message(FitError, one, method=Gradient(2, 0.3)) == (
        "ablate_fraction is 0.1 in the spec, but the method has its own, 0.3. Give it once."
    )


class Correct(ablate.Output):
    """1 where the prediction is correct."""

    name = "correct"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(dim=1) == targets).float()


class Root(ablate.Output):
    """The square root of the first logit: its slope at 0 is infinite."""

    name = "root"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.sqrt(logits[:, 0])


def test_an_output_without_gradients_offers_regression(
    tiny_net: nn.Module, tiny_examples: ablate.Examples, untouched: Untouched
) -> None:
    with untouched(tiny_net):
        assert _message(FitError, tiny_net, tiny_examples, output=Correct(), ablate_fraction=0.5) == (
            "Gradients say nothing here: no component has a gradient, although ablating changes the output 'correct'. "
            "Either the output is not differentiable (an argmax, a rounding, a count), or the model detaches after the "
            "last component (torch.no_grad, .detach(), .item(), numpy). " + ADVICE
        )


def test_a_model_that_detaches() -> None:
    class Detaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.third(self.second(self.first(x).detach()))
            return logits

    torch.manual_seed(0)
    assert _message(FitError, Detaching().eval(), (torch.randn(5, 4), [0, 1, 2, 0, 1])) == (
        "Gradients say nothing here: no gradient reaches the components of 'first', although ablating them changes the "
        "output 'margin'. The model detaches after 'first' (torch.no_grad, .detach(), .item(), numpy, a rounding). "
        + ADVICE
    )


def test_a_gradient_that_is_not_finite_names_the_example_among_all(tmp_path: Path, untouched: Untouched) -> None:
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"])
    inputs = torch.tensor([[4.0], [1.0], [2.0], [3.0], [0.0]])  # the check before the first block sees four
    examples = ablate.Examples(inputs, [0] * 5, ids=["a", "b", "c", "d", "bad"])
    path = tmp_path / "a.zarr"
    with untouched(model, inputs), pytest.raises(ablate.NonFiniteOutputError) as caught:
        coar.estimate(
            model, examples, index=index, output=Root(), passes=2, quality_rows=0, block_examples=2, store=path
        )
    assert str(caught.value).startswith("The gradient of component 0 on example 4 (id 'bad') is nan, expected a finite")
    assert (caught.value.example, caught.value.component) == (4, 0)
    assert caught.value.__notes__ == [
        f"This happened in block 2 (examples 4 to 4) of {path}. Finished blocks stay: run the same command again to go "
        "on from here."
    ]
    assert AttributionStore.open(path, finish=True).missing_blocks() == [2]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["gradient", Gradient(3, forward_rows=10), "leave_one_out"])
def test_nothing_is_mutated(
    conv_net: nn.Module, images: Tensor, labels: Tensor, untouched: Untouched, method: Any, training: bool
) -> None:
    conv_net.train(training)
    with untouched(conv_net, images, labels):
        coar.estimate(conv_net, (images, labels), method=method, quality_rows=10)
    failing = mock.patch.object(ablate.Engine, "outputs", side_effect=StopError)
    with untouched(conv_net, images, labels), failing, pytest.raises(StopError):
        coar.estimate(conv_net, (images, labels), method=method, quality_rows=10)


def test_a_store_object(tiny_net: nn.Module, tiny_examples: ablate.Examples) -> None:
    place = MemoryStore()
    patch, calls = _stopping(2)
    with patch, pytest.raises(StopError):
        _estimate(tiny_net, tiny_examples, store=place)
    assert _same(_estimate(tiny_net, tiny_examples, store=place), _estimate(tiny_net, tiny_examples))
    assert calls == [0, 4, 8]
