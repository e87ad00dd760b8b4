"""Specs of every source: what each table may say, one sentence per mistake; presets of components."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import ablate
from ablate.loading.sources import DATA_SOURCES, MODEL_SOURCES

MODEL: dict[str, Any] = {"source": "digits"}
DATA: dict[str, Any] = {"source": "digits", "split": "test"}


def _spec(**values: Any) -> ablate.CampaignSpec:
    defaults: dict[str, Any] = {"rows": 6, "ablate_fraction": 0.25, "model": MODEL, "data": DATA}
    return ablate.CampaignSpec(**defaults | values)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"components": {"preset": "coar-resnt"}},
            f"components.preset: got 'coar-resnt', expected one of {', '.join(ablate.preset_names())}. "
            "Did you mean 'coar-resnet'?",
        ),
        (
            {"components": {"preset": 3}},
            f"components.preset: got 3, expected one of {', '.join(ablate.preset_names())}.",
        ),
        (
            {"components": {"preset": "heads", "kinds": ["conv_filter"]}},
            "components.kinds: given beside preset, which has its own. Give one of the two.",
        ),
        (
            {"model": {"source": "open_clip", "name": "RN50", "prompt": ["a", "b"]}},
            "model.prompt: unknown key. Did you mean 'prompts'?",
        ),
        (
            {"model": {"source": "open_clip", "name": "RN50", "prompts": ["a"]}},
            "model.prompts: got ['a'], but tuple should have at least 2 items after validation, not 1.",
        ),
        (
            {"model": {"source": "open_clip", "name": "RN50", "prompts": ["a", "b"], "classes": ["a", "b"]}},
            "model: give either prompts, or classes and templates.",
        ),
        (
            {"model": {"source": "open_clip", "name": "RN50", "templates": ["a {}"]}},
            "model: templates need classes to be put into them.",
        ),
        (
            {"model": {"source": "open_clip", "name": "RN50", "classes": ["a", "b"], "templates": ["a"]}},
            "model: the template 'a' needs one {}, where the class goes.",
        ),
        (
            {"model": {"source": "transformers"}},
            "model: give either path, a local folder with a config.json, or config with a model_type.",
        ),
        (
            {"model": {"source": "transformers", "config": {"n_layer": 2}}},
            "model: config needs a model_type, e.g. 'gpt2'.",
        ),
        (
            {"data": {"source": "wilds", "name": "waterbird", "root": "x", "split": "test"}},
            "data.name: got 'waterbird', but it should be 'waterbirds' or 'celebA'.",
        ),
        (
            {"data": {"source": "text", "path": "x", "per": "lines"}},
            "data.per: got 'lines', but it should be 'window' or 'line'.",
        ),
        ({"data": {"source": "torchvision", "name": "MNIST"}}, "data.root: missing. Give it."),
        (
            {"data": {"source": "datasets", "path": "x", "image_colum": "img"}},
            "data.image_colum: unknown key. Did you mean 'image_column'?",
        ),
    ],
)
def test_one_mistake_is_one_message(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ablate.SpecError) as caught:
        _spec(**values)
    assert str(caught.value) == f"CampaignSpec: 1 problem\n  1. {problem}"


def test_a_preset_makes_the_index() -> None:
    model = {"source": "torchvision", "name": "resnet18", "classes": 3}
    data = torch.zeros(2, 3, 32, 32), [0, 1]
    spec = _spec(model=model, data=data, components={"preset": "coar-resnet", "include": ["layer1.*"]})
    loaded, _ = spec.load()
    expected = ablate.ComponentIndex.from_preset(loaded, "coar-resnet", include=["layer1.*"])
    assert spec.make_index(loaded).hash == expected.hash
    assert spec.describe()["components"]["preset"] == "coar-resnet"


def test_every_source_can_be_named_in_a_file() -> None:
    models: list[dict[str, Any]] = [
        {"source": "open_clip", "name": "RN50", "classes": ["cat", "dog"], "templates": ["a {}.", "the {}."]},
        {"source": "transformers", "config": {"model_type": "gpt2", "n_layer": 2}},
        {"source": "transformers", "path": "models/gpt2"},
        {"source": "packaged", "name": "glassllm"},
    ]
    data: list[dict[str, Any]] = [
        {"source": "torchvision", "name": "CIFAR10", "root": "data", "split": "test"},
        {"source": "datasets", "path": "data/pets", "group_column": "breed"},
        {"source": "wilds", "name": "celebA", "root": "data", "split": "val"},
        {"source": "text", "path": "notes.txt", "length": 64, "per": "line"},
        {"source": "factory", "factory": "my_data:test_split"},
    ]
    for model in models:
        for table in data:
            spec = _spec(model=model, data=table, output="token_margin")
            description = json.loads(json.dumps(spec.describe()))
            assert ablate.CampaignSpec.from_dict(description, "a store").describe() == spec.describe()
            assert spec.loadable
    assert {table["source"] for table in models} | {"digits", "torchvision", "timm", "factory"} == _tags(MODEL_SOURCES)
    assert {table["source"] for table in data} | {"digits", "arrays", "imagefolder"} == _tags(DATA_SOURCES)


def _tags(sources: Any) -> set[str]:
    return {source.tag() for source in sources}
