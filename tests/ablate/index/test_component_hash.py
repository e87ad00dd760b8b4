"""An index as an identity: its hash, its JSON, and the refusal of every model it was not made for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from torch import nn

import ablate

GOLDEN = "77cdf59b7687"  # of `three_weights`; another value here makes every stored campaign foreign

PROGRAM = """
import ablate, torch
model = torch.nn.Sequential()
model.add_module("hidden", torch.nn.Linear(1, 3))
model.add_module("head", torch.nn.Linear(3, 2, bias=False))
print(ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["hidden"]).hash)
"""


@pytest.fixture
def index(conv_net: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(conv_net)


def test_the_hash_is_the_same_in_every_process(three_weights: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(three_weights, ["linear_neuron"], include=["hidden"])
    assert index.hash.startswith(GOLDEN)
    other = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == index.hash


def test_the_hash_changes_with_the_structure() -> None:
    def hash_of(*layers: nn.Module, **arguments: Any) -> str:
        return ablate.ComponentIndex.from_model(nn.Sequential(*layers), ["conv_filter"], **arguments).hash

    hashes = [
        hash_of(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)),
        hash_of(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)),  # another count
        hash_of(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)),  # other slices
        hash_of(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),  # another name
        hash_of(nn.Conv2d(3, 4, 3)),  # fewer
        hash_of(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), exclude=["1"]),  # fewer, chosen
    ]
    assert len(set(hashes)) == 5
    assert hashes[4] == hashes[5]
    assert hashes[0] == hash_of(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, padding=1))


def test_json_gives_the_index_back(index: ablate.ComponentIndex) -> None:
    again = ablate.ComponentIndex.from_json(index.to_json())
    assert again == index
    assert again.hash == index.hash
    assert again.table().equals(index.table())
    assert again.left_out().empty


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "KeyError: 'ports'"),
        ("[]", "TypeError: list indices must be integers or slices, not str"),
        ("none of it", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ('{"ports": []}', "KeyError: 'format'"),
    ],
)
def test_text_that_is_no_index(text: str, why: str) -> None:
    with pytest.raises(ablate.ModelMismatchError) as caught:
        ablate.ComponentIndex.from_json(text)
    assert str(caught.value) == f"This is no component index in JSON: {why}."


@pytest.mark.parametrize(
    ("key", "value"), [("count", 5), ("count", -4), ("parameter", "conv1.bias"), ("axis", 1), ("kind", "head")]
)
def test_an_index_that_was_changed_is_refused(key: str, value: object, index: ablate.ComponentIndex) -> None:
    data = json.loads(index.to_json())
    data["ports"][0][key] = value
    with pytest.raises(ablate.ModelMismatchError, match="it was changed"):
        ablate.ComponentIndex.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("key", "value"), [("format", "selection"), ("version", 2), ("hash", None), ("hash", "0" * 64)]
)
def test_a_header_that_was_changed_is_refused(key: str, value: object, index: ablate.ComponentIndex) -> None:
    data = json.loads(index.to_json()) | {key: value}
    with pytest.raises(ablate.ModelMismatchError) as caught:
        ablate.ComponentIndex.from_json(json.dumps(data))
    assert str(caught.value) == (
        f"This component index says format {data['format']!r}, version {data['version']} and hash "
        f"{str(data['hash'])[:12]}, expected 'component-index', 1 and {index.hash[:12]}: it was changed. "
        "Make it again with ComponentIndex.from_model(model)."
    )


def test_the_index_fits_its_own_model_whatever_its_weights(index: ablate.ComponentIndex, conv_net: nn.Module) -> None:
    index.check(conv_net.double().train())


def test_another_model_is_refused_with_every_difference(index: ablate.ComponentIndex, mlp: nn.Module) -> None:
    with pytest.raises(ablate.ModelMismatchError) as caught:
        ablate.Engine(mlp, index)
    assert str(caught.value) == (
        f"This index (10 components, {index.hash[:12]}) was not made for this Sequential:\n"
        "  no parameter 'conv1.weight' (nearest: '4.weight')\n"
        "  no parameter 'conv2.weight' (nearest: '2.weight')\n"
        "Make one with ComponentIndex.from_model(model)."
    )


def test_a_model_of_other_shapes_is_refused(index: ablate.ComponentIndex, conv_net: nn.Module) -> None:
    conv_net.add_module("conv1", nn.Conv2d(3, 5, 3))
    conv_net.add_module("conv2", nn.Conv2d(4, 6, 5, groups=2))
    with pytest.raises(ablate.ModelMismatchError) as caught:
        index.check(conv_net)
    assert str(caught.value) == (
        f"This index (10 components, {index.hash[:12]}) was not made for this ConvNet:\n"
        "  'conv1.weight' has shape (5, 3, 3, 3), expected 4 along axis 0\n"
        "  'conv2.weight' has shape (6, 2, 5, 5), expected 18 values per component, not 50\n"
        "Make one with ComponentIndex.from_model(model)."
    )


def test_of_many_differences_five_are_shown() -> None:
    deep = nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)])
    index = ablate.ComponentIndex.from_model(deep, ["linear_neuron"])
    with pytest.raises(ablate.ModelMismatchError, match=r"'4\.weight'\n  \.\.\. and 3 more\nMake one with"):
        index.check(nn.Identity())
