"""Meta-training: fit a hypernetwork so that its masks let a model be tuned without changing what it should keep.

Source: Where to edit vision transformers (arXiv 2411.01948), Sections 3.2 to 3.5 and Appendix B.1, and its published
code; `MetaSettings` says where the two differ.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate import Examples, Selection, preserved_random_state
from ablate.logits import returning_logits
from ablate.models.copies import copy_of, device_of
from ablate.work.progress import progress_bar
from coar.editing.masks.artefact import read_artefact, save_hypernetwork
from coar.editing.masks.cutmix import paste, patch_of, random_crops
from coar.editing.masks.features import find_site, predict_with_feature, refuse_training_mode
from coar.editing.masks.free_masks import free_masks
from coar.editing.masks.hypernetwork import CLAMP_TRAINING, Hypernetwork, NetworkShape, mask_of
from coar.editing.masks.images import Images
from coar.editing.masks.inner import InnerLoop
from coar.editing.masks.layout import MaskLayout
from coar.editing.masks.network import HISTORY, MaskHypernetwork, identity_of
from coar.editing.masks.settings import MetaSettings
from coar.errors import EditError, EditMismatchError
from stores import Difference, differences
from stores.storage.places import user_path

LOG = logging.getLogger("coar.editing")
DIFFERS = 0.2  # a bit differs between two samples where their masks are this far apart
ALARM_SHARE = 0.1  # of the last iterations, in which no bit may differ before the alarm


def train_hypernetwork(
    model: nn.Module,
    selection: Selection,
    images: Tensor | Examples,
    settings: MetaSettings | None = None,
    *,
    store: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> MaskHypernetwork:
    """Returns a hypernetwork trained to say which of the selected components to edit. Mutates nothing.

    Args:
      model: A classifier in eval mode: (examples, channels, height, width) -> logits. A private copy of it is used.
      selection: The components that masks choose among, e.g. the feed-forward networks of three blocks.
      images: Ordinary images, as the model takes them; no labels are used. The more, the better: P has ImageNet's.
      settings: None: the preset `code`, whose 10 000 iterations take hours on a GPU for a ViT-B.
      store: A file for the training's state. If it is there, training goes on from it, and ends on the CPU with the
        same bytes as one that was never interrupted; more `iterations` than before make it longer. At the end the file
        is the hypernetwork's artefact.
      progress: Show a bar.

    Raises:
      EditError: A model in training mode, an empty selection, fewer than two images, images without differences, or
        numbers that are not finite.
      EditMismatchError: The store belongs to another training; each difference is named.

    Cost: per iteration `batch * free_steps * (inner_steps + 1)` forward and backward passes. Memory: as `InnerLoop`
    says, one more copy of the model, and three of the hypernetwork.
    """
    training = Training(model, selection, images, settings or MetaSettings(), store)
    total = training.settings.iterations
    bar = progress_bar("Training the mask hypernetwork", total, training.iteration, "iteration", progress)
    with bar, preserved_random_state():
        training.run(bar)
    return training.hypernetwork()


class Training:
    """The training at one iteration: what `step` takes on by one. Use `train_hypernetwork`."""

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        images: Tensor | Examples,
        settings: MetaSettings,
        store: str | os.PathLike[str] | None = None,
    ) -> None:
        refuse_training_mode(model)
        self.settings, self.selection, self.images = settings, selection, Images(images)
        self._store = None if store is None else user_path(store)
        self._model = returning_logits(copy_of(model).requires_grad_(False), of_classes=True)
        self._device = device_of(self._model)
        self._layout = MaskLayout(selection)
        for name, weight in self._layout.gated(self._model).items():
            if weight.dtype not in (torch.float32, torch.float64):
                raise EditError(
                    f"{name!r} is {str(weight.dtype).removeprefix('torch.')}: the inner steps are lost in its "
                    "rounding. Train on a copy in float32: copy.deepcopy(model).float()."
                )
        self._patch = None if settings.alignment == "pixels" else patch_of(self._model)
        if settings.alignment == "patches" and self._patch is None:
            raise EditError(
                f"alignment is 'patches', but {type(model).__name__} does not cut its images into any. Take 'pixels'."
            )
        self._inner = InnerLoop(self._model, self._layout, settings)
        example = self.images.draw([0]).to(self._device)
        with preserved_random_state():
            site = settings.feature_site or find_site(self._model, example)
            _, feature = predict_with_feature(self._model, site, example)
            width = feature.shape[1]
            torch.manual_seed(settings.seed)
            rows = [len(row.units) for row in self._layout.rows]
            self.network = Hypernetwork(NetworkShape.of(self._model, width, rows, settings)).to(self._device)
        self._optimizer = torch.optim.RMSprop(self.network.parameters(), lr=settings.rate)
        self.identity = identity_of(self._model, selection, site, width, images)
        self.iteration = 0
        self._saved = -1
        self._history = torch.full((settings.iterations, len(HISTORY)), torch.nan, dtype=torch.float64)
        if self._store is not None and self._store.exists():
            self._go_on(self._store)

    def run(self, bar: Any) -> None:
        """Takes all iterations that are left, saves the last and updates a progress bar."""
        while self.iteration < self.settings.iterations:
            self.step()
            self.save_now_and_then()
            bar.update(1)
        self.finish()

    def hypernetwork(self) -> MaskHypernetwork:
        """Returns the hypernetwork as it is now."""
        network = self.network.eval().requires_grad_(False)
        history = self._history[: self.iteration].clone()
        return MaskHypernetwork(network, self.selection, self.settings, self.identity, self.iteration, history)

    def step(self) -> None:
        """Takes the next iteration. All it draws depends on the seed and the iteration only."""
        settings = self.settings
        draw = generator_at(settings.seed, self.iteration)
        images = self.images.draw(self.images.choose(2 * settings.batch, draw)).to(self._device)
        pasted = paste(random_crops(images, settings.crop_smallest, draw), settings, self._patch, draw)
        _, feature = predict_with_feature(self._model, str(self.identity["feature"]["site"]), pasted.mixed)
        with torch.no_grad():
            teacher: Tensor = self._model(pasted.clean)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate_at(self.iteration)
        feature = feature.float()
        figures = (self._decoupled if settings.decoupled else self._direct)(feature, pasted.mixed, teacher, draw)
        if not all(np.isfinite(figures[:4])):
            raise EditError(
                f"The training of the hypernetwork is not finite at iteration {self.iteration}. Lower rate (now "
                f"{settings.rate:g}) or inner_rate (now {settings.inner_rate:g})."
            )
        self._history[self.iteration] = torch.tensor([*figures, len(feature)], dtype=torch.float64)
        self.iteration += 1

    def _decoupled(self, feature: Tensor, inputs: Tensor, teacher: Tensor, draw: torch.Generator) -> list[float]:
        """Fits free masks, then the hypernetwork to them."""
        free, label, losses = free_masks(self._inner, inputs, teacher, self._layout.bits, self.settings, draw)
        with torch.no_grad():
            predicted = self._mask(feature)
            bce = float(F.binary_cross_entropy(predicted, label))
        for _ in range(self.settings.regression_steps):
            self._update(self._fit(self._mask(feature), label))
        return [float(losses.mean()), 1 - float(free.mean()), 1 - float(predicted.mean()), bce, _differing(predicted)]

    def _direct(self, feature: Tensor, inputs: Tensor, teacher: Tensor, draw: torch.Generator) -> list[float]:
        """Takes the outer objective back through the hypernetwork's own masks, once."""
        predicted = self._mask(feature)
        losses, gradient = self._inner.objective(predicted, inputs, teacher)
        self._update(predicted, gradient)
        sparsity = 1 - float(predicted.detach().mean())
        return [float(losses.mean()), sparsity, sparsity, 0.0, _differing(predicted.detach())]

    def _mask(self, feature: Tensor) -> Tensor:
        return mask_of(self.network(feature), self.settings.slope, CLAMP_TRAINING)

    def _fit(self, mask: Tensor, label: Tensor) -> Tensor:
        if self.settings.divergence == "forward":
            return self.settings.regression_weight * F.binary_cross_entropy(mask, label)
        goal = label.clamp(CLAMP_TRAINING, 1 - CLAMP_TRAINING)
        apart = mask * (mask / goal).log() + (1 - mask) * ((1 - mask) / (1 - goal)).log()
        return self.settings.regression_weight * apart.mean()

    def _update(self, outcome: Tensor, gradient: Tensor | None = None) -> None:
        """Moves the hypernetwork by one step of its optimiser, down what `outcome` (times `gradient`) depends on."""
        parameters = list(self.network.parameters())
        for parameter, value in zip(parameters, torch.autograd.grad(outcome, parameters, gradient), strict=True):
            parameter.grad = value
        self._optimizer.step()

    def save_now_and_then(self) -> None:
        """Saves the state to the store, if there is one, every `save_every` iterations."""
        if self._store is not None and self.iteration % self.settings.save_every == 0:
            self._save(self._store)

    def finish(self) -> None:
        """Saves the end, and warns if every input gets one and the same mask."""
        if self._store is not None and self._saved != self.iteration:
            self._save(self._store)
        last = max(1, round(ALARM_SHARE * self.iteration))
        differing = self._history[: self.iteration, HISTORY.index("bits_that_differ")][-last:]
        seen = differing[~differing.isnan()]
        if len(seen) and not bool((seen > 0).any()):
            LOG.warning(
                "The hypernetwork gives every input nearly the same mask: in the last %d iterations no bit differed by "
                "more than %g between two samples. Train longer, or compare with the mean mask.",
                last,
                DIFFERS,
            )

    def _save(self, store: Path) -> None:
        state = {
            f"{number}/{key}": value
            for number, values in self._optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        network = MaskHypernetwork(
            self.network, self.selection, self.settings, self.identity, self.iteration, self._history[: self.iteration]
        )
        save_hypernetwork(network, store, optimizer=state, images=self.images.hash)
        self._saved = self.iteration

    def _go_on(self, store: Path) -> None:
        found = read_artefact(store)
        then = found.hypernetwork
        stored = _binding(then.identity, then.settings, found.images)
        now = _binding(self.identity, self.settings, self.images.hash)
        apart = differences(stored, now)
        if then.iterations > self.settings.iterations:
            apart.append(Difference("iterations", then.iterations, self.settings.iterations))
        if apart:
            lines = "\n".join(f"  {difference}" for difference in apart)
            raise EditMismatchError(
                f"{store} holds another training. What differs (old -> new):\n{lines}\n"
                "Give the same model, selection, images and settings, or another store."
            )
        self.network.load_state_dict(then.network.state_dict())
        self._history[: then.iterations] = then.history
        self.iteration = self._saved = then.iterations
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in found.optimizer.items():
            number, _, key = name.partition("/")
            states.setdefault(int(number), {})[key] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": states})


def generator_at(seed: int, iteration: int) -> torch.Generator:
    """Returns the generator of everything that one iteration draws."""
    (value,) = np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(value) >> 1)


def _binding(identity: Mapping[str, Any], settings: MetaSettings, images: str | None) -> dict[str, Any]:
    rows = {f"row {i}": row for i, row in enumerate(identity["tensors"])}
    free = {"save_every", "iterations"}  # change no byte of an iteration: a training may be made longer
    kept = {name: value for name, value in settings.describe().items() if name not in free}
    return {**identity, "tensors": rows, "settings": kept, "images": images}


def _differing(masks: Tensor) -> float:
    """Returns how many bits of the first two masks are far apart; NaN where there is one mask only."""
    if len(masks) < 2:
        return float("nan")
    return float(((masks[0] - masks[1]).abs() > DIFFERS).sum())
