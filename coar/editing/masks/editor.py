"""Hypernetwork masks as an editing method: predict which components to tune for this request, then tune only those."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ablate import Selection
from coar.editing.log import EditLog
from coar.editing.masks.artefact import load_hypernetwork, read_artefact
from coar.editing.masks.binarise import binarise
from coar.editing.masks.layout import MaskLayout
from coar.editing.masks.masked import MaskedEditor
from coar.editing.masks.meta_training import Training
from coar.editing.masks.network import MaskHypernetwork
from coar.editing.masks.settings import MetaSettings, Preset
from coar.editing.request import Request
from coar.editing.settings import Count
from coar.errors import EditError

TRAINING = 'settings of MetaSettings by name, e.g. {"width": 16}'


@dataclass(frozen=True, kw_only=True)
class HypernetworkMask(MaskedEditor):
    """Tunes the components that a hypernetwork names for the inputs of the request.

    Several inputs: their continuous masks are averaged, then made bits once; the cross-entropy is their mean.

    Cost: two forward passes, one of the hypernetwork, and a forward and a backward pass over the inputs per step.
    Without `hypernetwork` also its training, for every edit: `batch * free_steps * (inner_steps + 1)` forward and
    backward passes per iteration.

    Attributes:
      threshold: Instead of a density (then None): tune the components whose value is above it.
      hypernetwork: File of a trained one. None: one is trained for every edit, on `request.reference`.
      preset: Of that training: `code` or `paper`, see `MetaSettings`.
      iterations: Of that training; None: the preset's, thousands.
      batch: Of that training; None: the preset's.
      blocks: Of the hypernetwork; None: the preset's.
      training: Any other setting of `MetaSettings`, by name.
    """

    name: ClassVar[str] = "hypernetwork-mask"
    title: ClassVar[str] = "Hypernetwork mask"
    source: ClassVar[str] = "Yang et al., Learning where to edit vision transformers (arXiv 2411.01948), Section 3"
    needs: ClassVar[tuple[str, ...]] = ("labels",)
    quick: ClassVar[Mapping[str, Any]] = {
        "density": 0.25,
        "rate": 1e-3,
        "steps": 10,
        "iterations": 2,
        "batch": 2,
        "blocks": 1,
        "training": {"free_steps": 2, "inner_steps": 1, "width": 16},
    }

    threshold: float | None = None
    hypernetwork: str | None = None
    preset: Preset = "code"
    iterations: int | None = None
    batch: int | None = None
    blocks: int | None = None
    training: Annotated[Mapping[str, Any], Field(description=TRAINING)] = field(default_factory=dict, hash=False)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        self.meta_settings()
        return problems

    @property
    def limit(self) -> float | None:
        """The threshold."""
        return self.threshold

    def meta_settings(self) -> MetaSettings:
        """Returns the settings of the training."""
        named = {name: getattr(self, name) for name in ("iterations", "batch", "blocks")}
        given = {name: value for name, value in named.items() if value is not None}
        return MetaSettings.preset(self.preset, **{"seed": self.seed, **self.training, **given})

    def default_selection(self, model: nn.Module) -> Selection:
        """Returns the components that the file's hypernetwork was trained for; without a file, as the base does."""
        if self.hypernetwork is not None:
            return read_artefact(self.hypernetwork).hypernetwork.selection
        return super().default_selection(model)

    def bits(self, model: nn.Module, layout: MaskLayout, request: Request, log: EditLog) -> Tensor:
        """Returns the components that the hypernetwork names for the request."""
        network = self.network(model, layout.selection, request, log)
        mask = self.mask(network, model, request)
        log.entries["mask_values"] = {
            "mean": float(mask.mean()),
            "smallest": float(mask.min()),
            "largest": float(mask.max()),
        }
        return binarise(mask, density=self.density, threshold=self.threshold)

    def mask(self, network: MaskHypernetwork, model: nn.Module, request: Request) -> Tensor:
        """Returns the continuous mask, (bits,): the mean over the inputs."""
        return network.predict(model, request.inputs).mean(dim=0)

    def network(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> MaskHypernetwork:
        """Returns the hypernetwork in the file, or one trained on the reference images."""
        if self.hypernetwork is not None:
            network = load_hypernetwork(self.hypernetwork, model, selection, request.inputs)
            log.entries["hypernetwork"] = {"file": self.hypernetwork, "iterations": network.iterations}
            return network
        if request.reference is None:
            raise EditError(
                f"{self.title} needs a hypernetwork: give the file of a trained one "
                "(hypernetwork='masks.safetensors'), or ordinary images to train one on (request.reference)."
            )
        shapes = tuple(request.inputs.shape[1:]), tuple(request.reference.input(0).shape)
        if shapes[0] != shapes[1]:
            raise EditError(
                f"inputs have shape {shapes[0]}, the reference images {shapes[1]}: the hypernetwork sees both, so they "
                "must be alike."
            )
        settings = self.meta_settings()
        training = Training(model, selection, request.reference, settings)
        with log.progress(settings.iterations, "Training the mask hypernetwork") as bar:
            training.run(bar)
        network = training.hypernetwork()
        last = network.log().iloc[-1]
        log.entries["hypernetwork"] = {
            "file": None,
            "iterations": network.iterations,
            "settings": settings.describe(),
            "kl_last": float(last["kl"]),
            "bce_last": float(last["bce"]),
            "bits_that_differ_last": None if math.isnan(last["bits_that_differ"]) else int(last["bits_that_differ"]),
        }
        return network


@dataclass(frozen=True, kw_only=True)
class MeanMask(HypernetworkMask):
    """Control: tunes the components that the hypernetwork names on average over the reference images.

    What it reaches as well as `HypernetworkMask` does not come from looking at the request.

    Cost: that of `HypernetworkMask`, and a forward pass over the reference images.

    Attributes:
      images: Reference images in the mean, at most; drawn by the seed.
    """

    name: ClassVar[str] = "mean-mask"
    title: ClassVar[str] = "Mean mask (control)"
    needs: ClassVar[tuple[str, ...]] = ("labels", "reference")

    images: Count = 256

    def mask(self, network: MaskHypernetwork, model: nn.Module, request: Request) -> Tensor:
        """Returns the mean mask over the reference images, (bits,)."""
        reference = request.reference
        if reference is None:
            raise EditError("reference is missing: ordinary examples, over which the mean mask is taken.")
        draw = torch.Generator().manual_seed(self.seed)
        positions = torch.randperm(len(reference), generator=draw)[: self.images].tolist()
        drawn = reference.prepared(torch.stack([reference.input(position) for position in positions]))
        return network.predict(model, drawn.to(request.inputs.device)).mean(dim=0)
