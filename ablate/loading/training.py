"""Small classifiers that are trained in seconds, and cached."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablate.data.examples import Examples
from ablate.errors import LoadError
from ablate.files import written_whole
from ablate.loading.networks.checkpoints import load_weights
from ablate.state import preserved_random_state
from stores.storage.places import user_path

Model = TypeVar("Model", bound=nn.Module)
BATCH = 64


def train_classifier(model: nn.Module, examples: Examples, epochs: int, rate: float) -> None:
    """Trains a model in place, where it is, and leaves it in eval mode without gradients; draws from torch's generator.

    AdamW with one cycle of the learning rate, batches of 64.
    """
    device = next(model.parameters()).device
    inputs, targets = examples.inputs().to(device), examples.targets.to(device)
    steps = epochs * (len(examples) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(examples)).to(device)
        for first in range(0, len(examples) - BATCH + 1, BATCH):
            chosen = order[first : first + BATCH]
            loss = F.cross_entropy(model(inputs[chosen]), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()  # else a user's first backward would add to the last step's gradients
    model.eval()


def trained_or_cached(
    make: Callable[[], Model],
    train: Callable[[Model], None],
    cache: str | os.PathLike[str] | None,
    settings: Mapping[str, object],
) -> Model:
    """Returns a trained model in eval mode. Global random state is unchanged.

    Args:
      make: Returns the model as it is before training; may seed torch.
      train: Trains it in place.
      cache: A .safetensors file: read if it is there, else written after training. None: always trained.
      settings: What the training depends on; written into the cache and compared.

    Raises:
      LoadError: The cache is damaged, or was trained with other settings.
    """
    from safetensors.torch import save_file

    path = user_path(cache) if cache is not None else None
    trained = {name: str(value) for name, value in settings.items()}
    with preserved_random_state():
        model = make()
        if path is not None and path.is_file():
            load_weights(model, _read_cache(path, trained), str(path))
            return model.eval()
        train(model)
    if path is not None:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        with written_whole(path, overwrite=True) as draft:  # others may train it now, too
            save_file(weights, draft, metadata=trained)
    return model


def _read_cache(path: Path, trained: dict[str, str]) -> dict[str, Tensor]:
    """Returns the weights in a cache that was written by a training like this one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise LoadError(f"{path} is damaged ({error}). Delete it: the model is then trained again.") from error
    if found != trained:
        raise LoadError(
            f"{path} holds a model trained with {_list(found)}, expected {_list(trained)}. "
            "Name another cache, or delete it: the model is then trained again."
        )
    return weights


def _list(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(settings.items())) or "settings that it does not say"
