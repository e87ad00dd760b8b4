"""Models and data sets by name or path: the one place that knows torchvision and timm, imported when used."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ablate.data import Examples
from ablate.digits import digits_campaign_examples, digits_model, digits_split, load_weights
from ablate.errors import DataError, LoadError, UnknownNameError
from ablate.state import preserved_random_state

Transform = Callable[[Any], Tensor]


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DigitsModel(_Source):
    """The demo's residual CNN on handwritten digits, trained by seed and cached."""

    source: Literal["digits"]
    seed: int = Field(default=0, ge=0)
    cache: str | None = None


class TorchvisionModel(_Source):
    """A torchvision classification model by name. Weights: a local checkpoint, or random by seed."""

    source: Literal["torchvision"]
    name: str
    checkpoint: str | None = None
    classes: int = Field(default=1000, ge=2)
    seed: int = Field(default=0, ge=0)


class TimmModel(_Source):
    """A timm model by name. Weights: a local checkpoint, or random by seed."""

    source: Literal["timm"]
    name: str
    checkpoint: str | None = None
    classes: int = Field(default=1000, ge=2)
    seed: int = Field(default=0, ge=0)


class FactoryModel(_Source):
    """A user's own model: `module:function`, called without arguments, returns an nn.Module."""

    source: Literal["factory"]
    factory: str
    checkpoint: str | None = None
    seed: int = Field(default=0, ge=0)


class DigitsData(_Source):
    """Examples of the digits task: the first so many of each group, or a whole split."""

    source: Literal["digits"]
    seed: int = Field(default=0, ge=0)
    train_per_group: int = Field(default=0, ge=0)
    test_per_group: int = Field(default=0, ge=0)
    split: Literal["train", "validation", "test"] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> DigitsData:
        if (self.split is None) == (self.train_per_group + self.test_per_group == 0):
            raise ValueError("give either split, or train_per_group and test_per_group")
        return self


class ArraysData(_Source):
    """A .npz file with `inputs`, `targets` and, if wanted, `ids` and `groups`."""

    source: Literal["arrays"]
    path: str


class ImageFolderData(_Source):
    """A folder with one sub-folder of images per class, prepared as the model wants its images."""

    source: Literal["imagefolder"]
    path: str


ModelSource = Annotated[DigitsModel | TorchvisionModel | TimmModel | FactoryModel, Field(discriminator="source")]
DataSource = Annotated[DigitsData | ArraysData | ImageFolderData, Field(discriminator="source")]


def load_model(source: DigitsModel | TorchvisionModel | TimmModel | FactoryModel) -> tuple[nn.Module, Transform | None]:
    """Returns a model in eval mode on the CPU, and the transform from a PIL image to its input (None: not known).

    Changes no global random state. Downloads nothing: weights come from a local checkpoint (.safetensors, or a .pt of
    plain tensors) or are random by seed.

    Raises:
      UnknownNameError: No model of that name; offers the nearest.
      LoadError: A package or file is missing, or the checkpoint does not fit.
    """
    with preserved_random_state():
        if isinstance(source, DigitsModel):
            return digits_model(source.seed, source.cache), None
        torch.manual_seed(source.seed)
        if isinstance(source, TorchvisionModel):
            model, transform = _torchvision(source)
        elif isinstance(source, TimmModel):
            model, transform = _timm(source)
        else:
            model, transform = _factory(source.factory), None
        if source.checkpoint is not None:
            load_weights(model, read_checkpoint(source.checkpoint), source.checkpoint)
    return model.eval(), transform


def load_data(source: DigitsData | ArraysData | ImageFolderData, transform: Transform | None = None) -> Examples:
    """Returns the examples of a data source; `transform` prepares the images of an image folder.

    Raises:
      LoadError: A file is missing or has not the stated layout.
    """
    if isinstance(source, DigitsData):
        if source.split is not None:
            return digits_split(source.split, source.seed)
        return digits_campaign_examples(source.train_per_group, source.test_per_group, source.seed)
    if isinstance(source, ArraysData):
        return _arrays(Path(source.path))
    return _image_folder(Path(source.path), transform)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors file or of a PyTorch checkpoint of plain tensors; runs no code from it.

    A checkpoint may hold them under `state_dict` or `model`, and their names may begin with `module.`.
    """
    file = Path(path)
    if not file.is_file():
        raise LoadError(f"No checkpoint at {file}. Give the path of a .safetensors or .pt file.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types
        # torch's own text advises to load the file all the same: never repeat that
        code = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if code is not None:
            why = f"it asks for {code[1]}, which is code. Files that contain code are refused, and none of it ran"
        else:
            why = f"it is damaged or of another format ({type(error).__name__})"
        raise LoadError(
            f"{file} is no checkpoint of plain tensors: {why}. Save the state_dict as .safetensors."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise LoadError(f"{file} holds a {type(loaded).__name__}, expected a mapping from names to tensors.")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


def _require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise LoadError(
            f"This needs {package}, which is not installed ({error}). "
            f"Install it: pip install 'component-attribution[{extra}]'"
        ) from error


def _torchvision(source: TorchvisionModel) -> tuple[nn.Module, Transform]:
    models = _require("torchvision", "vision").models
    names = models.list_models(module=models)
    if source.name not in names:
        raise UnknownNameError("torchvision model", source.name, names, "torchvision.models.list_models() lists all.")
    model = models.get_model(source.name, weights=None, num_classes=source.classes)
    return model, models.get_model_weights(source.name).DEFAULT.transforms()


def _timm(source: TimmModel) -> tuple[nn.Module, Transform]:
    timm = _require("timm", "vision")
    names = timm.list_models()
    if source.name not in names:
        stem = source.name.partition(".")[0]
        if stem in names:  # a name with timm's tag for pretrained weights
            advice = "Leave the tag of the pretrained weights out; weights come from a local checkpoint."
            raise UnknownNameError("timm model", source.name, [stem], advice)
        raise UnknownNameError("timm model", source.name, names, "timm.list_models() lists all.")
    model = timm.create_model(source.name, pretrained=False, num_classes=source.classes)
    config = timm.data.resolve_model_data_config(model)
    return model, timm.data.create_transform(**config, is_training=False)


def _factory(path: str) -> nn.Module:
    module_name, _, function = path.partition(":")
    if not module_name or not function:
        raise LoadError(f"factory is {path!r}, expected 'module:function'.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise LoadError(f"factory {path!r}: module {module_name!r} cannot be imported: {error}.") from error
    if not hasattr(module, function):
        known = [name for name in vars(module) if not name.startswith("_")]
        raise UnknownNameError(f"function in {module_name}", function, known)
    factory = getattr(module, function)
    if not callable(factory):
        raise LoadError(f"factory {path!r} is a {type(factory).__name__}, expected a function without arguments.")
    try:
        model = factory()
    except Exception as error:
        error.add_note(f"This happened in factory {path!r}, which is called without arguments.")
        raise
    if not isinstance(model, nn.Module):
        raise LoadError(f"factory {path!r} returned a {type(model).__name__}, expected an nn.Module.")
    return model


def _arrays(path: Path) -> Examples:
    if not path.is_file():
        raise LoadError(f"No file at {path}. Make one with numpy.savez(path, inputs=..., targets=...).")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # numpy and zipfile raise many types
        raise LoadError(f"{path} cannot be read as .npz: {type(error).__name__}: {error}.") from error
    missing = [name for name in ("inputs", "targets") if name not in arrays]
    if missing:
        raise LoadError(
            f"{path} has no {' and no '.join(missing)}; it has {', '.join(sorted(arrays)) or 'nothing'}. "
            "Expected inputs, targets and, if wanted, ids and groups."
        )
    try:
        return Examples(arrays["inputs"], arrays["targets"], arrays.get("ids"), arrays.get("groups"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _image_folder(path: Path, transform: Transform | None) -> Examples:
    datasets = _require("torchvision", "vision").datasets
    if not path.is_dir():
        raise LoadError(f"No folder at {path}. Expected one sub-folder of images per class.")
    if transform is None:
        raise LoadError(
            "An image folder needs a model that knows how its images are prepared: torchvision or timm. For your own "
            "model, prepare the images yourself and pass source = 'arrays'."
        )
    try:
        folder = datasets.ImageFolder(str(path), transform=transform)
    except FileNotFoundError as error:
        raise LoadError(f"{path} is no image folder: {str(error).rstrip('.')}.") from error
    ids = [Path(file).relative_to(path).as_posix() for file, _ in folder.samples]
    groups = [folder.classes[label] for label in folder.targets]
    return Examples(folder, folder.targets, ids, groups)
