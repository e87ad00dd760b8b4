"""What a hypernetwork sees of an input: the vector that the model's classifier head reads, and the predictions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ablate.index.structure import mixing_axes
from coar.errors import EditError


def find_site(model: nn.Module, inputs: Tensor) -> str:
    """Returns the name of the classifier head: the last linear layer (or convolution of one pixel) that runs.

    Mutates nothing. Cost: one forward pass over the inputs.
    """
    called: list[str] = []
    layers = {name: module for name, module in model.named_modules() if name and mixing_axes(module) is not None}
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: called.append(name))
        for name, module in layers.items()
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise EditError(
            f"{type(model).__name__} runs no linear layer, so it has no classifier head to read a feature from. Name "
            "the module whose input is the feature: feature_site='...'."
        )
    return called[-1]


def predict_with_feature(model: nn.Module, site: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits (examples, classes) and the feature (examples, width) of a model, without gradients.

    Mutates nothing. A feature with two spatial axes is averaged over them.

    Args:
      model: In eval mode.
      site: Name of the module whose input is the feature.
      inputs: (examples, ...), as the model takes them.

    Raises:
      EditError: No such module, one that does not run, or an input of it that is no vector per example, or not finite.
    """
    modules = dict(model.named_modules())
    if site not in modules:
        raise EditError(f"{type(model).__name__} has no module {site!r} to read a feature from.")
    with _captured(modules[site]) as seen, torch.no_grad():
        logits: Tensor = model(inputs)
    if not seen:
        raise EditError(f"Module {site!r} does not run, so its input is no feature. Name another feature_site.")
    feature = seen[-1]
    if feature.ndim == 4:
        feature = feature.mean(dim=(2, 3))
    if feature.ndim != 2 or len(feature) != len(inputs):
        raise EditError(
            f"The input of {site!r} has shape {tuple(feature.shape)}, expected one vector per example: "
            f"({len(inputs)}, width). Name another feature_site."
        )
    bad = torch.nonzero(~torch.isfinite(feature).all(dim=1)).flatten()
    if len(bad):
        raise EditError(
            f"The feature of example {int(bad[0])}, the input of {site!r}, is not finite. Check inputs and model."
        )
    return logits, feature


def refuse_training_mode(model: nn.Module) -> None:
    """Raises EditError for a model in training mode: its features would depend on chance, and its statistics change."""
    if model.training:
        raise EditError(f"This {type(model).__name__} is in training mode, expected eval mode: call model.eval().")


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """Gives the list of the first inputs that a module is called with, in order."""
    seen: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values()))).detach())

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
