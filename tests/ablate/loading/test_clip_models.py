"""open_clip: a zero-shot classifier is the whole CLIP model's own logits; nothing is downloaded."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ablate
from ablate.loading import OpenClipModel, ZeroShotClassifier

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PROMPTS = ("a photo of a cat.", "a photo of a dog.", "a photo of a ship.")

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module", autouse=True)
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Registers tiny models with open_clip, in a second; its smallest own one has 60 M parameters."""
    import open_clip

    folder = tmp_path_factory.mktemp("configs")
    resnet = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    variants: dict[str, dict[str, Any]] = {
        "tiny": CONFIG,
        "tiny-rn": CONFIG | {"vision_cfg": resnet},
        "tiny-timm": CONFIG | {"vision_cfg": {"timm_model_name": "test_vit", "timm_proj": "linear", "image_size": 160}},
        "tiny-hf": CONFIG | {"text_cfg": {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base"}},
        "tiny-hf-tokenizer": CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"hf_tokenizer_name": "timm/SigLIP"}},  # type: ignore[operator]
    }
    for name, config in variants.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def _source(**values: Any) -> OpenClipModel:
    return OpenClipModel(**{"source": "open_clip", "name": "tiny", "prompts": PROMPTS} | values)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _whole(name: str, seed: int) -> Any:
    """Returns open_clip's whole model, as the loader must have made it."""
    import open_clip

    torch.manual_seed(seed)
    return open_clip.create_model(name).eval()


@pytest.mark.parametrize("name", ["tiny", "tiny-rn"])
def test_a_zero_shot_classifier_gives_open_clips_logits(name: str, images: Tensor) -> None:
    import open_clip

    model, transform = ablate.load_model(_source(name=name, seed=3))
    assert isinstance(model, ZeroShotClassifier)
    assert transform is not None
    assert not any(module.training for module in model.modules())
    whole = _whole(name, 3)
    with torch.no_grad():
        expected, _ = whole.get_logits(images, open_clip.get_tokenizer(name)(list(PROMPTS)))
        torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_classes_and_templates_are_open_clips_own_ensemble(images: Tensor) -> None:
    import open_clip

    classes, templates = ["cat", "dog"], ["a {}.", "a drawing of the {}.", "{}"]
    model, _ = ablate.load_model(_source(prompts=None, classes=classes, templates=templates))
    weights = open_clip.build_zero_shot_classifier(
        _whole("tiny", 0), open_clip.get_tokenizer("tiny"), classes, templates
    )
    torch.testing.assert_close(model.get_buffer("text"), weights.T, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert model(images).shape == (4, 2)


def test_the_text_tower_is_dropped() -> None:
    model, _ = ablate.load_model(_source())
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"visual"}
    assert [name for name, _ in model.named_buffers()] == ["text", "scale"]
    torch.testing.assert_close(model.get_buffer("text").norm(dim=1), torch.ones(3))


def test_without_texts_the_visual_tower_alone(images: Tensor) -> None:
    tower, transform = ablate.load_model(_source(prompts=None))
    assert transform is not None
    with torch.no_grad():
        assert torch.equal(tower(images), _whole("tiny", 0).visual(images))


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_checkpoint_is_of_both_towers(form: str, tmp_path: Path, images: Tensor) -> None:
    whole = _whole("tiny", 7)
    path = tmp_path / f"clip.{form}"
    if form == "pt":
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}}, path)
    else:
        save_file(whole.state_dict(), path)
    loaded, _ = ablate.load_model(_source(checkpoint=str(path)))
    expected, _ = ablate.load_model(_source(seed=7))
    assert ablate.model_hash(loaded) == ablate.model_hash(expected)
    weights = whole.state_dict()
    del weights["visual.proj"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(ablate.LoadError) as caught:
        ablate.load_model(_source(checkpoint=str(tmp_path / "part.safetensors")))
    assert str(caught.value) == f"{tmp_path}/part.safetensors does not fit a CLIP:\n  missing: visual.proj"


def test_random_by_seed_and_nothing_else_changes(untouched: Callable[..., AbstractContextManager[None]]) -> None:
    handlers = logging.root.handlers[:]
    with untouched():
        first, again, other = (ablate.load_model(_source(seed=seed))[0] for seed in (1, 1, 2))
    assert ablate.model_hash(first) == ablate.model_hash(again) != ablate.model_hash(other)
    assert logging.root.handlers == handlers, "open_clip would give the root logger a handler"


def test_images_prepared_as_open_clip_does_and_run_through_a_campaign(tmp_path: Path, photo: Any) -> None:
    for i, name in enumerate(("cat", "dog", "ship")):
        (tmp_path / "images" / name).mkdir(parents=True)
        photo.rotate(30 * i).save(tmp_path / "images" / name / "0.png")
    spec = ablate.CampaignSpec(
        model={"source": "open_clip", "name": "tiny", "prompts": list(PROMPTS)},
        data={"source": "imagefolder", "path": str(tmp_path / "images")},
        rows=4,
        ablate_fraction=0.2,
        components={"kinds": ["linear_neuron"], "include": ["visual.*"]},
    )
    model, examples = spec.load()
    _, transform = ablate.load_model(_source())
    assert transform is not None
    assert examples.inputs().dtype == torch.uint8
    assert torch.equal(examples.model_inputs(0, 1)[0], transform(photo))
    engine = spec.make_engine(model, spec.make_index(model))
    whole = engine.outputs(torch.ones(1, len(engine.index), dtype=torch.bool), examples)
    with torch.no_grad():
        expected = ablate.Margin()(model(examples.model_inputs()), examples.targets)
    torch.testing.assert_close(whole[0], expected, rtol=1e-4, atol=1e-4)


def test_a_tower_of_timm() -> None:
    model, transform = ablate.load_model(_source(name="tiny-timm"))
    assert transform is not None
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 3)


class Pair(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean(dim=(2, 3)), images


def test_a_tower_that_returns_its_tokens_too(images: Tensor) -> None:
    model = ZeroShotClassifier(Pair(), torch.eye(3), torch.tensor(2.0))
    features = images.mean(dim=(2, 3))
    torch.testing.assert_close(model(images), 2 * features / features.norm(dim=1, keepdim=True))


def test_an_unknown_model_is_named_with_the_nearest() -> None:
    with pytest.raises(ablate.UnknownNameError) as caught:
        ablate.load_model(_source(name="ViT-B32"))
    assert caught.value.nearest[0] == "ViT-B-32"
    assert str(caught.value).startswith("No open_clip model 'ViT-B32'. Did you mean 'ViT-B-32'")
    assert str(caught.value).endswith("open_clip.list_models() lists all.")
    for name in ("hf-hub:org/model", "local-dir:x"):
        with pytest.raises(ablate.UnknownNameError, match=r"^No open_clip model"):
            ablate.load_model(_source(name=name))


def test_what_would_need_the_network_is_refused() -> None:
    with pytest.raises(ablate.LoadError) as caught:
        ablate.load_model(_source(name="tiny-hf"))
    assert str(caught.value) == (
        "open_clip's tiny-hf takes the configuration of its text tower, roberta-base, from the network, and nothing is "
        "downloaded here. Choose a model whose text tower is open_clip's own."
    )
    with pytest.raises(ablate.LoadError) as caught:
        ablate.load_model(_source(name="tiny-hf-tokenizer"))
    assert str(caught.value) == (
        "open_clip's tiny-hf-tokenizer needs a tokenizer that does not ship with it, timm/SigLIP, and nothing is "
        "downloaded here. Give tokenizer = a local folder with its files."
    )
    tower, _ = ablate.load_model(_source(name="tiny-hf-tokenizer", prompts=None))
    assert isinstance(tower, nn.Module), "the visual tower needs no tokenizer"


def test_a_local_tokenizer(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "cat</w>": 2, "dog</w>": 3, "c": 4, "a": 5, "t</w>": 6}
    CLIPTokenizer(vocabulary, []).save_pretrained(tmp_path / "tokenizer")
    source = _source(name="tiny-hf-tokenizer", prompts=("cat", "dog"), tokenizer=str(tmp_path / "tokenizer"))
    model, _ = ablate.load_model(source)
    assert model.get_buffer("text").shape == (2, 16)
    with pytest.raises(ablate.LoadError, match=r"^No folder at .*/x\. tokenizer names a local folder with the files"):
        ablate.load_model(source.model_copy(update={"tokenizer": str(tmp_path / "x")}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ablate.LoadError, match=r"/empty holds no tokenizer: \w+: "):
        ablate.load_model(source.model_copy(update={"tokenizer": str(tmp_path / "empty")}))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ablate.LoadError, match=r"Install it: pip install 'component-attribution\[clip\]'$"):
        ablate.load_model(_source())
