"""Packaged networks as they are installed, where they are: they see, they write, and the engine is exact on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ablate
from ablate.gating.reference import reference_outputs
from ablate.loading import PackagedModel
from ablate.loading.imagenet import ImageNetClasses

VISION = ("mobilenet_v2", "efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
ALICE = "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do:"


def _load(name: str) -> tuple[nn.Module, Any]:
    try:
        return ablate.load_model(PackagedModel(source="packaged", name=name))
    except ablate.LoadError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


def _palace() -> Any:
    """A photo of the Summer Palace that ships with scikit-learn."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_a_palace_is_seen_as_one(name: str) -> None:
    model, transform = _load(name)
    with torch.no_grad():
        logits = model(transform(_palace())[None])
    assert logits.shape == (1, 1000)
    assert ImageNetClasses("imagenet-1k").names[int(logits.argmax())] == "palace"


def test_a_network_takes_the_transform_its_weights_were_trained_with() -> None:
    _, lite = _load("efficientnet_lite0")
    normalize = lite.transforms[-1]
    assert (normalize.mean.tolist(), normalize.std.tolist()) == ([0.5] * 3, [0.5] * 3)
    assert lite.transforms[0].interpolation.value == "bicubic"
    _, mobile = _load("mobilenet_v2")
    assert (mobile.resize_size, mobile.crop_size) == ([256], [224])


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION[:2])
def test_the_engine_is_literal_zeroing_on_a_real_vision_network(name: str) -> None:
    model, transform = _load(name)
    image = transform(_palace().resize((96, 96)).crop((0, 0, 96, 96)))
    inputs = torch.stack([image, image.flip(2)])[:, :, :96, :96]
    targets = torch.tensor([698, 663])
    index = ablate.ComponentIndex.from_model(model, ["conv_filter"])
    assert len(index) == {"mobilenet_v2": 17_056, "efficientnet_lite0": 21_008}[name]
    keep = ablate.KeepPlan(len(index), 3, 0.003, seed=1).take(0, 3)
    found = ablate.Engine(model, index).outputs(keep, inputs, targets)
    torch.testing.assert_close(found, reference_outputs(model, index, keep, inputs, targets), atol=1e-3, rtol=1e-4)
    assert found.std(dim=0).min() > 0.1, "keep-vectors must matter, else equality says nothing"


def test_glassllm_is_what_its_own_code_computes() -> None:
    model, tokens = _load("glassllm")
    glassllm = pytest.importorskip("glassllm")
    own, tokenizer = glassllm.load_pretrained("en")
    ids = tokens(ALICE)
    assert ids.tolist() == tokenizer.encode(ALICE)
    assert tokens.text(ids) == ALICE
    with torch.no_grad():
        logits = model(ids[None])
    np.testing.assert_allclose(logits, own.forward(ids.numpy()).data, atol=3e-5)
    perplexity = nn.functional.cross_entropy(logits[0, :-1], ids[1:]).exp()
    assert float(perplexity) < 60, "of 1,024 tokens"


def test_the_engine_is_literal_zeroing_on_a_real_language_model() -> None:
    model, tokens = _load("glassllm")
    ids = tokens(ALICE)
    inputs, targets = ids[None, :-1], ids[None, 1:]
    index = ablate.ComponentIndex.from_model(model, ["attention_head", "ffn_hidden"])
    assert len(index) == 16 + 1364
    keep = ablate.KeepPlan(len(index), 4, 0.05, seed=0).take(0, 4)
    found = ablate.Engine(model, index, "token_margin").outputs(keep, inputs, targets)
    expected = reference_outputs(model, index, keep, inputs, targets, "token_margin")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    model, tokens = _load("smollm2")
    ids = tokens("The capital city of France is")
    with torch.no_grad():
        following = model(ids[None])[0, -1].argmax()
    assert tokens.text([int(following)]) == " Paris"
    assert tokens("in 1865").tolist() == [*tokens("in "), *(t for digit in "1865" for t in tokens(digit).tolist())]
    index = ablate.ComponentIndex.from_model(model, ["attention_head", "ffn_hidden"])
    assert len(index) == 270 + 46_080


@pytest.mark.slow
def test_minilm_finds_the_sentence_that_means_the_same() -> None:
    model, tokens = _load("minilm")
    sentences = [tokens(text) for text in ("A man is eating food.", "A man eats something.", "It rains in the hills.")]
    padded = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True)
    with torch.no_grad():
        embeddings = model(padded)
        alone = torch.cat([model(sentence[None]) for sentence in sentences])
    torch.testing.assert_close(embeddings, alone, atol=1e-5, rtol=0)
    similar = embeddings @ embeddings.T
    assert similar[0, 1] > 0.7 > 0.3 > similar[0, 2]


@pytest.mark.slow
def test_rxnmapper_reads_a_reaction() -> None:
    model, tokens = _load("rxnmapper")
    ids = tokens("CC(C)S.Fc1cccnc1F>>CC(C)Sc1ncccc1F")
    assert tokens.text(ids).startswith("[CLS] C C ( C ) S . F c 1")
    with torch.no_grad():
        logits = model(ids[None])
    assert float((logits[0].argmax(dim=1) == ids).float().mean()) > 0.8
