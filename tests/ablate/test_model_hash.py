"""A model's content as one hash: what stores and edits are bound to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ablate


def test_equal_models_have_equal_hashes(conv_net: nn.Module, images: Tensor) -> None:
    expected = ablate.model_hash(conv_net)
    assert len(expected) == 64
    assert ablate.model_hash(copy.deepcopy(conv_net)) == expected
    conv_net.requires_grad_(False).train()
    assert ablate.model_hash(conv_net) == expected, "mode and gradients are no content"
    conv_net.to(memory_format=torch.channels_last)
    assert ablate.model_hash(conv_net) == expected, "the layout in memory is no content"


@pytest.mark.parametrize(
    "name", ["conv1.weight", "conv1.bias", "bn1.running_mean", "bn1.running_var", "bn2.num_batches_tracked"]
)
def test_every_tensor_counts(name: str, conv_net: nn.Module) -> None:
    before = ablate.model_hash(conv_net)
    with torch.no_grad():
        conv_net.state_dict()[name].add_(1)
    assert ablate.model_hash(conv_net) != before


def test_names_shapes_and_dtypes_count() -> None:
    weight = torch.arange(6.0)

    def hash_of(**tensors: Tensor) -> str:
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, tensor)
        return ablate.model_hash(model)

    hashes = {
        hash_of(a=weight),
        hash_of(b=weight),
        hash_of(a=weight.reshape(2, 3)),
        hash_of(a=weight.view(torch.int32)),
        hash_of(a=weight.to(torch.bfloat16)),
        hash_of(a=weight, b=torch.zeros(0)),
    }
    assert len(hashes) == 6
    assert hash_of(a=weight, b=weight[:2]) == hash_of(b=weight[:2], a=weight), "the order of definition does not"


def test_nan_and_negative_zero_count() -> None:
    def hash_of(value: float) -> str:
        model = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(value)
        return ablate.model_hash(model)

    assert hash_of(float("nan")) == hash_of(float("nan"))
    assert hash_of(0.0) != hash_of(-0.0)
