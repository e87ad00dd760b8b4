"""Image classifiers by name, from torchvision and timm."""

from __future__ import annotations

from torch import nn

from ablate.errors import LoadError, UnknownNameError
from ablate.loading.packages import require
from ablate.loading.transforms import Transform


def torchvision_model(name: str, classes: int) -> tuple[nn.Module, Transform]:
    """Returns a torchvision classifier with random weights, and how its images are prepared."""
    models = require("torchvision").models
    names = models.list_models(module=models)
    if name not in names:
        raise UnknownNameError("torchvision model", name, names, "torchvision.models.list_models() lists all.")
    model = models.get_model(name, weights=None, num_classes=classes)
    return model, models.get_model_weights(name).DEFAULT.transforms()


def timm_model(name: str, classes: int, image_size: int | None = None) -> tuple[nn.Module, Transform]:
    """Returns a timm classifier with random weights, and how its images are prepared."""
    timm = require("timm")
    names = timm.list_models()
    if name not in names:
        stem = name.partition(".")[0]
        if stem in names:  # a name with timm's tag for pretrained weights
            advice = "Leave the tag of the pretrained weights out; weights come from a local checkpoint."
            raise UnknownNameError("timm model", name, [stem], advice)
        raise UnknownNameError("timm model", name, names, "timm.list_models() lists all.")
    options = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=False, num_classes=classes, **options)
    except TypeError as error:
        raise LoadError(
            f"timm model {name!r} takes no image size ({error}): it takes images of any. Leave image_size out."
        ) from error
    config = timm.data.resolve_model_data_config(model)
    return model, timm.data.create_transform(**config, is_training=False)
