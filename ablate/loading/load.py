"""Models and data sets by name or path; each source has a file that imports its packages when used."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ablate.data.examples import Examples
from ablate.errors import DataError
from ablate.loading.datasets.arrays import arrays_data
from ablate.loading.datasets.image_folder import image_folder
from ablate.loading.datasets.images import hf_images, torchvision_data
from ablate.loading.datasets.textfiles import text_data
from ablate.loading.datasets.wilds import wilds_data
from ablate.loading.digits import digits_campaign_examples, digits_model, digits_split
from ablate.loading.factories import factory_data, factory_model
from ablate.loading.networks.by_name import timm_model, torchvision_model
from ablate.loading.networks.checkpoints import load_checkpoint
from ablate.loading.networks.clip import clip_model
from ablate.loading.networks.packaged import packaged_model
from ablate.loading.networks.text import LanguageModel, language_model_from_config, language_model_from_folder
from ablate.loading.sources import (
    AnyData,
    AnyModel,
    ArraysData,
    DigitsData,
    DigitsModel,
    FactoryData,
    FactoryModel,
    HuggingFaceData,
    ImageFolderData,
    OpenClipModel,
    PackagedModel,
    TextData,
    TimmModel,
    TorchvisionData,
    TorchvisionModel,
    TransformersModel,
    WildsData,
)
from ablate.loading.tokens import TextTokens
from ablate.loading.transforms import Transform
from ablate.state import preserved_random_state


def load_model(source: AnyModel) -> tuple[nn.Module, Transform | None]:
    """Returns a model in eval mode on the CPU, and the transform from a PIL image to its input (None: not known).

    The transform of a packaged language model is its tokenizer, from a text to its tokens. Changes no global random
    state. Downloads nothing: weights come from a local checkpoint (.safetensors, or a .pt of plain tensors), from an
    installed package, or are random by seed.

    Raises:
      UnknownNameError: No model of that name; offers the nearest.
      LoadError: A package or file is missing, or the checkpoint does not fit.
    """
    with preserved_random_state():
        if isinstance(source, DigitsModel):
            return digits_model(source.seed, source.cache), None
        if isinstance(source, PackagedModel):
            trained, reads = packaged_model(source.name)
            return trained.eval(), reads
        torch.manual_seed(source.seed)
        model, transform = _make(source)
    return model.eval(), transform


def _make(source: AnyModel) -> tuple[nn.Module, Transform | None]:
    if isinstance(source, OpenClipModel):  # with its weights: they are needed to embed the texts
        return clip_model(source.name, source.checkpoint, source.texts, source.tokenizer, source.checkpoint_key)
    if isinstance(source, TransformersModel):  # with its weights: a folder has them beside the configuration
        if source.path is not None:
            return language_model_from_folder(Path(source.path), source.checkpoint, source.checkpoint_key), None
        return language_model_from_config(source.config or {}, source.checkpoint, source.checkpoint_key), None
    transform: Transform | None
    if isinstance(source, TorchvisionModel):
        model, transform = torchvision_model(source.name, source.classes)
    elif isinstance(source, TimmModel):
        model, transform = timm_model(source.name, source.classes, source.image_size)
    elif isinstance(source, FactoryModel):
        model, transform = factory_model(source.factory)
    else:
        raise TypeError(f"A {type(source).__name__} is no source of models.")
    if source.checkpoint is not None:
        load_checkpoint(model, source.checkpoint, source.checkpoint_key)
    return model, transform


def load_data(source: AnyData, transform: Transform | None = None, model: nn.Module | None = None) -> Examples:
    """Returns the examples of a data source; `transform` is the model's, and prepares images or reads text.

    With `model`, the class folders of images are checked against the model's number of classes, by one forward.

    Where the transform is one of torchvision's, timm's or open_clip's, images stay uint8 pixels, and their
    normalisation becomes `Examples.normalize`: `Examples.model_inputs` equals the transform. Images are decoded when
    they are used. Changes no global random state, downloads nothing.

    Raises:
      UnknownNameError: No data set, column or split of that name; offers the nearest.
      LoadError: A package or file is missing, or has not the stated layout.
      DataError: What was read cannot be examples, or the transform cannot prepare it.
    """
    with preserved_random_state():
        return _read(source, transform, model)


def _read(source: AnyData, transform: Transform | None, model: nn.Module | None) -> Examples:
    own = transform if isinstance(transform, TextTokens) else None
    if own is not None and not isinstance(source, (TextData, FactoryData)):
        transform = None  # a tokenizer prepares no images
    match source:
        case DigitsData(split=str(split)):
            return digits_split(split, source.seed)
        case DigitsData():
            return digits_campaign_examples(source.train_per_group, source.test_per_group, source.seed)
        case ArraysData():
            return arrays_data(Path(source.path))
        case ImageFolderData():
            return image_folder(Path(source.path), transform, source.classes, model, source.white)
        case TorchvisionData():
            return torchvision_data(source.name, Path(source.root), source.split, transform)
        case HuggingFaceData():
            columns = source.image_column, source.label_column, source.group_column
            return hf_images(Path(source.path), source.split, *columns, transform)
        case WildsData():
            return wilds_data(source.name, Path(source.root), source.split, transform)
        case TextData():
            return text_data(Path(source.path), source.tokenizer or own, source.length, source.per)
        case FactoryData():
            return factory_data(source.factory, transform)
    raise TypeError(f"A {type(source).__name__} is no source of data.")


def check_tokens(model: nn.Module, examples: Examples) -> None:
    """Raises DataError unless a language model knows every token of the examples."""
    if not isinstance(model, LanguageModel):
        return
    for start, tokens, _ in examples.chunks(4096):
        if tokens.is_floating_point():
            raise DataError(f"A language model takes integer tokens, but inputs are {tokens.dtype}.")
        outside = torch.nonzero((tokens < 0) | (tokens >= model.vocabulary))
        if len(outside):
            example, place = (int(i) for i in outside[0])
            raise DataError(
                f"Token {place} of example {examples.ids[start + example]!r} is {int(tokens[example, place])}, "
                f"expected 0 to {model.vocabulary - 1}: the model knows {model.vocabulary:,} tokens. Give the "
                "tokenizer that belongs to the model."
            )
