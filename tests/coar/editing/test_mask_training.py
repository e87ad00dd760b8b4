"""Meta-training: it lowers its objective, goes on after an interruption with the same bytes, and says what is wrong."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate import ComponentIndex, Examples, Selection
from coar.editing.masks import MaskHypernetwork, MetaSettings, train_hypernetwork
from coar.editing.masks.cutmix import paste
from coar.editing.masks.inner import InnerLoop
from coar.editing.masks.layout import MaskLayout
from coar.editing.masks.meta_training import Training, generator_at
from coar.editing.masks.network import HISTORY
from coar.errors import EditError, EditMismatchError

Untouched = Callable[..., AbstractContextManager[None]]


def _images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise of 8 x 8 pixels with one bright quarter, which is the class."""
    draw = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(count, 1, 8, 8, generator=draw), torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 1.5
    return images, labels


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small CNN that knows the bright quarter."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip
    images, labels = _images(256, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def selection(trained: nn.Module) -> Selection:
    return ComponentIndex.from_model(trained, ["conv_filter"]).everything()


def _quick(**changes: Any) -> MetaSettings:
    quick: dict[str, Any] = {"batch": 4, "free_steps": 3, "inner_steps": 2, "blocks": 1, "width": 16, "iterations": 4}
    return MetaSettings.preset("code", **{**quick, **changes})


def _outer(model: nn.Module, selection: Selection, settings: MetaSettings, network: MaskHypernetwork) -> float:
    """The outer objective of its masks on pairs that were not trained on, per pair."""
    pasted = paste(_images(64, 5)[0], settings, None, torch.Generator().manual_seed(6))
    masks = network.masks(model, pasted.mixed)
    frozen = copy.deepcopy(model).requires_grad_(False)
    inner = InnerLoop(frozen, MaskLayout(selection), settings)
    losses, _ = inner.objective(masks, pasted.mixed, frozen(pasted.clean))
    return float(losses.mean()) + settings.sparsity * float(masks.mean()) / settings.batch


@pytest.mark.parametrize(("decoupled", "sparsity"), [(True, 0.1), (False, 0.1), (True, 4.0)])
def test_it_lowers_the_outer_objective(
    trained: nn.Module, selection: Selection, decoupled: bool, sparsity: float
) -> None:
    settings = _quick(
        iterations=30,
        inner_steps=3,
        inner_rate=0.03,
        rate=3e-3,
        decoupled=decoupled,
        sparsity=sparsity,
        crop_smallest=1.0,
    )
    images, _ = _images(128, 2)
    start = Training(trained, selection, images, settings).hypernetwork()
    end = train_hypernetwork(trained, selection, images, settings)
    assert _outer(trained, selection, settings, end) < 0.85 * _outer(trained, selection, settings, start)
    log = end.log()
    assert list(log.columns) == ["iteration", *HISTORY]
    grown = log["sparsity_predicted"].iloc[-1] - log["sparsity_predicted"].iloc[0]
    assert grown > 0.1 if sparsity == 4.0 else grown < -0.1


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_a_vision_transformer_is_left_as_it_was(untouched: Untouched, preset: Any) -> None:
    model = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8).eval()
    index = ComponentIndex.from_model(model, ["ffn_in", "ffn_out"])
    images = torch.randn(9, 3, 32, 32)
    settings = MetaSettings.preset(preset, iterations=2, batch=2, free_steps=2, inner_steps=1)
    with untouched(model, images):
        network = train_hypernetwork(model, index.where(module="blocks.[23].*"), images, settings)
        masks = network.masks(model, images)
    assert network.site == "head"
    assert network.network.shape.feature == 64
    assert masks.shape == (9, 4 * 192)
    assert 0 < float(masks.min()) < float(masks.max()) < 1
    order = torch.randperm(9)
    torch.testing.assert_close(network.masks(model, images[order]), masks[order], rtol=1e-5, atol=1e-6)


def test_the_feature_of_a_vision_transformer_is_its_normalised_class_token() -> None:
    model: Any = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8).eval()
    images = torch.randn(4, 3, 32, 32)
    selection = ComponentIndex.from_model(model, ["ffn_in"]).everything()
    training = Training(model, selection, images, _quick())
    seen: list[Tensor] = []
    training.network.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    training.hypernetwork().masks(model, images)
    with torch.no_grad():
        assert torch.equal(seen[0], model.forward_features(images)[:, 0])


def test_the_same_seed_gives_the_same_and_another_one_another(trained: nn.Module, selection: Selection) -> None:
    images, _ = _images(16, 3)
    first, second, other = (
        train_hypernetwork(trained, selection, images, _quick(seed=seed)).masks(trained, images) for seed in (4, 4, 5)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_training_ends_with_the_same_bytes(
    trained: nn.Module, selection: Selection, tmp_path: Path, stop: int
) -> None:
    images, _ = _images(16, 3)
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    settings = _quick(iterations=5, save_every=2)
    undisturbed = train_hypernetwork(trained, selection, images, settings, store=whole)
    training = Training(trained, selection, images, settings, broken)
    for _ in range(stop):
        training.step()
        training.save_now_and_then()
    assert broken.exists() == (stop >= 2)  # what came after the last saving is lost, and done again
    resumed = train_hypernetwork(trained, selection, images, settings, store=broken)
    assert broken.read_bytes() == whole.read_bytes()
    assert torch.equal(resumed.masks(trained, images), undisturbed.masks(trained, images))
    assert resumed.log().equals(undisturbed.log())
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".draft"] == []


def test_a_training_can_be_made_longer_but_not_shorter(
    trained: nn.Module, selection: Selection, tmp_path: Path
) -> None:
    images, _ = _images(16, 3)
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    train_hypernetwork(trained, selection, images, _quick(iterations=5), store=once)
    for iterations in (2, 5):
        train_hypernetwork(trained, selection, images, _quick(iterations=iterations), store=twice)
    assert twice.read_bytes() == once.read_bytes()
    with pytest.raises(EditMismatchError, match=r"\n  iterations: 5 -> 3\n"):
        train_hypernetwork(trained, selection, images, _quick(iterations=3), store=once)


def test_a_finished_store_is_not_trained_again(
    trained: nn.Module, selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = _images(16, 3)
    store = tmp_path / "masks.safetensors"
    first = train_hypernetwork(trained, selection, images, _quick(), store=store)
    monkeypatch.setattr(Training, "step", None)
    again = train_hypernetwork(trained, selection, images, _quick(save_every=1), store=store)
    assert torch.equal(again.masks(trained, images), first.masks(trained, images))


KILLED = """
import sys, torch
from torch import nn
torch.set_num_threads(1)
from ablate import ComponentIndex
from coar.editing.masks import MetaSettings
from coar.editing.masks.meta_training import Training
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3)).eval()
selection = ComponentIndex.from_model(model, ["conv_filter"]).everything()
images = torch.randn(8, 1, 8, 8)
quick = dict(batch=2, free_steps=2, inner_steps=1, blocks=1, width=8)
settings = MetaSettings.preset("code", iterations=40, save_every=3, **quick)
class Bar:
    def update(self, n):
        print("at", training.iteration, flush=True)
for store in sys.argv[1:]:
    training = Training(model, selection, images, settings, store)
    print("from", training.iteration, flush=True)
    training.run(Bar())
"""


@pytest.mark.faults
@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def start(*stores: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, *map(str, stores)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})

    broken, whole = tmp_path / "broken.safetensors", tmp_path / "whole.safetensors"
    with start(broken) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line == "at 8\n":
                    process.send_signal(signal.SIGKILL)
            process.wait(60)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    with start(broken, whole) as again:
        try:
            said = again.communicate(timeout=120)[0]
        finally:
            again.kill()
    assert again.returncode == 0
    assert 6 <= int(said.split()[1]) < 40
    assert broken.read_bytes() == whole.read_bytes()


def test_the_store_of_another_training_is_refused(trained: nn.Module, selection: Selection, tmp_path: Path) -> None:
    images, _ = _images(16, 3)
    store = tmp_path / "masks.safetensors"
    train_hypernetwork(trained, selection, images, _quick(), store=store)
    with pytest.raises(EditMismatchError) as refused:
        train_hypernetwork(trained, selection, images + 1, _quick(temperature=2.0), store=store)
    text = re.sub(r"[0-9a-f]{64}", "HASH", str(refused.value))
    assert text == (
        f"{store} holds another training. What differs (old -> new):\n"
        "  images: HASH -> HASH\n"
        "  settings.temperature: 5.0 -> 2.0\n"
        "Give the same model, selection, images and settings, or another store."
    )


def test_one_mask_for_every_input_is_told(
    trained: nn.Module, selection: Selection, caplog: pytest.LogCaptureFixture
) -> None:
    images, _ = _images(16, 3)
    with caplog.at_level(logging.WARNING, "coar.editing"):
        train_hypernetwork(trained, selection, images, _quick())
    assert caplog.messages == [
        "The hypernetwork gives every input nearly the same mask: in the last 1 iterations no bit differed by more "
        "than 0.2 between two samples. Train longer, or compare with the mean mask."
    ]
    caplog.clear()
    training = Training(trained, selection, images, _quick(iterations=1))
    training.step()
    for masks, silent in (([3.0], True), ([math.nan], True), ([0.0], False)):
        training._history[:, HISTORY.index("bits_that_differ")] = torch.tensor(masks, dtype=torch.float64)
        training.finish()
        assert (caplog.messages == []) == silent


def test_examples_are_read_and_normalised_when_drawn(trained: nn.Module, selection: Selection) -> None:
    pixels = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8)
    labels = torch.zeros(10, dtype=torch.int64)
    examples = Examples(pixels, labels, normalize=((0.5,), (0.25,)))
    ready = examples.model_inputs()
    first = train_hypernetwork(trained, selection, examples, _quick())
    second = train_hypernetwork(trained, selection, ready, _quick())
    assert torch.equal(first.masks(trained, ready), second.masks(trained, ready))
    assert first.identity["inputs"] == {"shape": [1, 8, 8], "normalize": [[0.5], [0.25]]}


def test_a_model_of_double_precision(trained: nn.Module, selection: Selection) -> None:
    images, _ = _images(16, 3)
    single = train_hypernetwork(trained, selection, images, _quick(iterations=2, inner_rate=0.03))
    double = train_hypernetwork(
        copy.deepcopy(trained).double(), selection, images.double(), _quick(iterations=2, inner_rate=0.03)
    )
    first, second = single.log()["kl"].to_numpy(), double.log()["kl"].to_numpy()
    assert first == pytest.approx(second, rel=1e-2)


def test_fewer_images_than_a_batch_takes(trained: nn.Module, selection: Selection) -> None:
    network = train_hypernetwork(trained, selection, _images(5, 3)[0], _quick(iterations=1))
    assert network.log()["pairs"].tolist() == [2]
    network = train_hypernetwork(trained, selection, _images(2, 3)[0], _quick(iterations=1))
    assert math.isnan(network.log()["bits_that_differ"][0])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """The divergence of Bernoulli distributions, mean over bits."""
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def test_the_regression_in_both_directions(trained: nn.Module, selection: Selection) -> None:
    images, _ = _images(4, 3)
    mask, label = torch.rand(2, 3, 20).clamp(0.01, 0.99)
    entropy = -(label * label.log() + (1 - label) * (1 - label).log()).mean()
    forward = Training(trained, selection, images, _quick(regression_weight=1.0))
    torch.testing.assert_close(forward._fit(mask, label), _kl(label, mask) + entropy)
    reverse = Training(trained, selection, images, _quick(regression_weight=0.5, divergence="reverse"))
    torch.testing.assert_close(reverse._fit(mask, label), 0.5 * _kl(mask, label))
    reverse.step()
    assert reverse.iteration == 1


def test_the_regression_fits_fixed_labels(trained: nn.Module, selection: Selection) -> None:
    training = Training(trained, selection, _images(4, 3)[0], _quick(rate=1e-2))
    feature, label = torch.randn(3, 48), (torch.rand(3, 20) < 0.5).float()
    for _ in range(60):
        training._update(training._fit(training._mask(feature), label))
    assert ((training._mask(feature) > 0.5) == label.bool()).float().mean() > 0.95


def test_everything_drawn_depends_on_seed_and_iteration() -> None:
    draws = {tuple(torch.rand(3, generator=generator_at(*key)).tolist()) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(draws) == 4
    assert torch.equal(torch.rand(3, generator=generator_at(7, 9)), torch.rand(3, generator=generator_at(7, 9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train", "This Sequential is in training mode, expected eval mode: call model.eval()."),
        (
            "one",
            "Images have shape (1, 1, 8, 8), expected (examples, channels, height, width) with at least 2 examples: a "
            "rectangle of one is pasted into another.",
        ),
        (
            "nan",
            "Images are torch.float32 or hold values that are not finite; expected floats as the model takes them. For "
            "uint8 pixels give ablate.Examples(..., normalize=(mean, std)).",
        ),
        (
            "half",
            "'0.weight' is bfloat16: the inner steps are lost in its rounding. Train on a copy in float32: "
            "copy.deepcopy(model).float().",
        ),
        ("patches", "alignment is 'patches', but Sequential does not cut its images into any. Take 'pixels'."),
        ("site", "Sequential has no module 'neck' to read a feature from."),
    ],
)
def test_what_cannot_be_trained(trained: nn.Module, selection: Selection, change: str, message: str) -> None:
    images, _ = _images(16, 3)
    settings = _quick()
    if change == "train":
        trained.train()
    elif change == "one":
        images = images[:1]
    elif change == "nan":
        images[3, 0, 0, 0] = math.nan
    elif change == "half":
        trained = copy.deepcopy(trained).bfloat16()
    elif change == "patches":
        settings = _quick(alignment="patches")
    else:
        settings = _quick(feature_site="neck")
    try:
        with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
            train_hypernetwork(trained, selection, images, settings)
    finally:
        trained.eval()
