"""Models by name: from the digits task, torchvision, timm and a user's own factory."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ablate
from ablate.digits import ResidualCNN, digits_model
from ablate.loading import DigitsModel, FactoryData, FactoryModel, TimmModel, TorchvisionModel

Untouched = Callable[..., AbstractContextManager[None]]

FACTORY = """
import torch

def net():
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).train()

def number():
    return 3

def broken():
    return 1 / 0

CLASSES = ("low", "high")

def grey(image):
    return torch.ones(1, 2, 2) * image.size[0]

def with_transform():
    return net(), grey

def with_size():
    return net(), 224

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return torch.ones(4) * i, i % 2

def pairs():
    return torch.ones(2, 4), [0, 1], ["a", "b"]

def prepared(transform):
    images = transform and torch.stack([transform(Image()) for _ in range(2)])
    return (torch.zeros(2, 3), [0, 1]) if transform is None else (images, [0, 1])

class Image:
    size = (7, 7)
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FactoryModel]:
    (tmp_path / "my_nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return lambda function: FactoryModel(source="factory", factory=f"my_nets:{function}")


def test_a_torchvision_model_is_random_by_seed() -> None:
    def load(seed: int) -> nn.Module:
        source = TorchvisionModel(source="torchvision", name="shufflenet_v2_x0_5", classes=7, seed=seed)
        model, transform = ablate.load_model(source)
        assert transform is not None
        assert not any(module.training for module in model.modules())
        return model

    first, again, other = load(0), load(0), load(1)
    assert ablate.model_hash(first) == ablate.model_hash(again) != ablate.model_hash(other)
    with torch.no_grad():
        assert first(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_a_torchvision_model_knows_how_its_images_are_prepared() -> None:
    from PIL import Image

    _, transform = ablate.load_model(TorchvisionModel(source="torchvision", name="shufflenet_v2_x0_5"))
    assert transform is not None
    assert transform(Image.new("RGB", (300, 250))).shape == (3, 224, 224)


def test_a_timm_model_is_random_by_seed_and_knows_its_transform() -> None:
    from PIL import Image

    model, transform = ablate.load_model(TimmModel(source="timm", name="test_resnet", classes=4, seed=3))
    again, _ = ablate.load_model(TimmModel(source="timm", name="test_resnet", classes=4, seed=3))
    assert ablate.model_hash(model) == ablate.model_hash(again)
    assert transform is not None
    image = transform(Image.new("RGB", (300, 250)))
    assert image.shape == (3, 160, 160)
    with torch.no_grad():
        assert model(image[None]).shape == (1, 4)


def test_a_factory_is_called_with_the_seed_set(factory: Callable[[str], FactoryModel], untouched: Untouched) -> None:
    with untouched():
        model, transform = ablate.load_model(factory("net"))
    assert transform is None
    assert not model.training
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert ablate.model_hash(model) == ablate.model_hash(expected)


def test_a_digits_model_comes_from_its_cache(tmp_path: Path) -> None:
    model = ResidualCNN()
    cache = tmp_path / "digits.safetensors"
    epochs = str(inspect.signature(digits_model).parameters["epochs"].default)
    save_file(model.state_dict(), cache, metadata={"seed": "0", "epochs": epochs})
    loaded, transform = ablate.load_model(DigitsModel(source="digits", cache=str(cache)))
    assert transform is None
    assert ablate.model_hash(loaded) == ablate.model_hash(model)


def test_an_unknown_torchvision_model_is_named_with_the_nearest() -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.load_model(TorchvisionModel(source="torchvision", name="resnet81"))
    assert caught.value.nearest[0] == "resnet18"
    assert str(caught.value) == (
        f"No torchvision model 'resnet81'. Did you mean {' or '.join(map(repr, caught.value.nearest))}? "
        "torchvision.models.list_models() lists all."
    )


def test_an_unknown_timm_model_is_named_with_the_nearest() -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.load_model(TimmModel(source="timm", name="test_resnett"))
    assert caught.value.nearest[0] == "test_resnet"
    assert str(caught.value) == (
        f"No timm model 'test_resnett'. Did you mean {' or '.join(map(repr, caught.value.nearest))}? "
        "timm.list_models() lists all."
    )
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.load_model(TimmModel(source="timm", name="zzz"))
    assert str(caught.value) == "No timm model 'zzz'. timm.list_models() lists all."


def test_a_timm_name_with_a_tag_for_pretrained_weights() -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.load_model(TimmModel(source="timm", name="resnet50.a1_in1k"))
    assert str(caught.value) == (
        "No timm model 'resnet50.a1_in1k'. Did you mean 'resnet50'? Leave the tag of the pretrained weights out; "
        "weights come from a local checkpoint."
    )


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_package_that_is_not_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    source: TorchvisionModel | TimmModel = TimmModel(source="timm", name="test_resnet")
    if package == "torchvision":
        source = TorchvisionModel(source="torchvision", name="resnet18")
    with pytest.raises(ablate.LoadError) as caught:
        ablate.load_model(source)
    assert str(caught.value) == (
        f"This needs {package}, which is not installed (import of {package} halted; None in sys.modules). "
        "Install it: pip install 'component-attribution'"
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_nets", "factory is 'my_nets', expected 'module:function'."),
        ("my_nets:", "factory is 'my_nets:', expected 'module:function'."),
        (":net", "factory is ':net', expected 'module:function'."),
        (
            "my_netz:net",
            "factory 'my_netz:net': module 'my_netz' cannot be imported: No module named 'my_netz'. Install it, or "
            "name its folder in PYTHONPATH.",
        ),
        ("my_nets:number", "factory 'my_nets:number' returned a int, expected an nn.Module."),
        ("my_nets:CLASSES", "factory 'my_nets:CLASSES' is a tuple, expected a function without arguments."),
        (
            "my_nets:with_size",
            "factory 'my_nets:with_size' returned a model and a int, expected the transform of its images.",
        ),
        ("my_nets:nett", "No function in my_nets 'nett'. Did you mean 'net'?"),
    ],
)
def test_a_factory_that_cannot_be(path: str, message: str, factory: Callable[[str], FactoryModel]) -> None:
    with pytest.raises(ablate.AblateError) as caught:
        ablate.load_model(FactoryModel(source="factory", factory=path))
    assert str(caught.value) == message


def test_an_error_inside_a_factory_says_which(factory: Callable[[str], FactoryModel], untouched: Untouched) -> None:
    source = factory("broken")
    with untouched(), pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        ablate.load_model(source)
    assert caught.value.__notes__ == ["This happened in factory 'my_nets:broken', which is called without arguments."]


def test_a_factory_may_know_how_images_are_prepared(factory: Callable[[str], FactoryModel]) -> None:
    model, transform = ablate.load_model(factory("with_transform"))
    assert isinstance(model, nn.Sequential)
    assert transform is not None
    assert transform is sys.modules["my_nets"].grey


def _data(function: str, transform: Any = None) -> ablate.Examples:
    return ablate.load_data(FactoryData(source="factory", factory=f"my_nets:{function}"), transform)


@pytest.mark.usefixtures("factory")
def test_a_factory_of_data() -> None:
    items = _data("Items")
    assert items.targets.tolist() == [0, 1, 0]
    assert not items.in_memory
    assert _data("pairs").ids == ("a", "b")
    assert _data("prepared").inputs().shape == (2, 3)
    assert _data("prepared", lambda image: torch.ones(image.size)).inputs().shape == (2, 7, 7)


@pytest.mark.usefixtures("factory")
def test_a_factory_of_data_that_cannot_be() -> None:
    with pytest.raises(ablate.DataError) as caught:
        _data("number")
    assert str(caught.value) == (
        "factory 'my_nets:number' returned a int that cannot be examples: Inputs are a int, expected a tensor, an "
        "array or a map-style Dataset. Return a Dataset, (inputs, targets) or ablate.Examples."
    )
    with pytest.raises(ablate.UnknownNameError, match=r"^No function in my_nets 'pair'\. Did you mean 'pairs'\?"):
        _data("pair")
    with pytest.raises(ZeroDivisionError) as division:
        _data("broken")
    assert division.value.__notes__ == ["This happened in factory 'my_nets:broken', which is called without arguments."]


def test_a_transformer_of_timm_at_another_image_size() -> None:
    model, transform = ablate.load_model(TimmModel(source="timm", name="test_vit", classes=3, image_size=64))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert transform is not None
    with pytest.raises(ablate.LoadError, match=r"^timm model 'test_resnet' takes no image size \(.*Leave image_size"):
        ablate.load_model(TimmModel(source="timm", name="test_resnet", classes=3, image_size=64))
