"""The file of a hypernetwork: what comes back, what is refused, and that each difference is named."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ablate import ComponentIndex, Examples, Selection
from coar.editing.masks import MetaSettings, load_hypernetwork, save_hypernetwork, train_hypernetwork
from coar.editing.masks.meta_training import Training
from coar.errors import EditError, EditMismatchError

SETTINGS = MetaSettings.preset(
    "code", iterations=2, batch=2, free_steps=2, inner_steps=1, blocks=1, width=8, save_every=1
)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def selection(tiny_net: nn.Module) -> Selection:
    return ComponentIndex.from_model(tiny_net, ["conv_filter"]).everything()


@pytest.fixture(scope="module")
def artefact(
    tiny_net: nn.Module, selection: Selection, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    train_hypernetwork(tiny_net, selection, images, SETTINGS, store=path)
    return path


def test_what_was_saved_comes_back(
    tiny_net: nn.Module, selection: Selection, images: Tensor, artefact: Path, tmp_path: Path
) -> None:
    random = torch.get_rng_state()
    first = load_hypernetwork(artefact, tiny_net, selection, images)
    assert torch.equal(torch.get_rng_state(), random)
    save_hypernetwork(first, tmp_path / "new" / "copy.safetensors")
    second = load_hypernetwork(tmp_path / "new" / "copy.safetensors", tiny_net)
    assert second.selection == first.selection == selection
    assert second.settings == first.settings == SETTINGS
    assert second.identity == first.identity
    assert (second.iterations, len(second.log())) == (2, 2)
    assert second.log().equals(first.log())
    assert torch.equal(second.masks(tiny_net, images), first.masks(tiny_net, images))
    assert torch.equal(second.masks(tiny_net, images, batch_size=6), first.masks(tiny_net, images, batch_size=6))


def _other_weights(model: nn.Module) -> nn.Module:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.parameters()).add_(1)
    return changed


def _refused(call: Callable[[], object]) -> str:
    with pytest.raises(EditMismatchError) as refused:
        call()
    return re.sub(r"[0-9a-f]{64}", "HASH", str(refused.value))


def test_another_model_is_refused(tiny_net: nn.Module, artefact: Path) -> None:
    assert _refused(lambda: load_hypernetwork(artefact, _other_weights(tiny_net))) == (
        f"{artefact}: this mask hypernetwork was made for something else. What differs (old -> new):\n"
        "  model.hash: HASH -> HASH\n"
        "Give what it was trained with, or train one for this: train_hypernetwork(model, selection, images)."
    )


def test_other_components_are_refused_and_the_rows_named(
    tiny_net: nn.Module, selection: Selection, artefact: Path
) -> None:
    fewer = selection.index.select(selection.ids[:-1])
    assert _refused(lambda: load_hypernetwork(artefact, tiny_net, fewer)) == (
        f"{artefact}: this mask hypernetwork was made for something else. What differs (old -> new):\n"
        "  selection: HASH -> HASH\n"
        "  tensors.row 1: conv_filter of 3.weight, 6 bits along axis 0 -> conv_filter of 3.weight, 5 bits along axis "
        "0\n"
        "Give what it was trained with, or train one for this: train_hypernetwork(model, selection, images)."
    )
    neurons = ComponentIndex.from_model(tiny_net, ["linear_neuron"]).everything()
    text = _refused(lambda: load_hypernetwork(artefact, tiny_net, neurons))
    assert "\n  index: HASH -> HASH\n" in text
    assert "\n  tensors.row 0: conv_filter of 0.weight, 4 bits along axis 0 -> linear_neuron of 6.weight, " in text
    assert "\n  tensors.row 1: conv_filter of 3.weight, 6 bits along axis 0 -> nothing\n" in text


def test_other_inputs_are_refused(tiny_net: nn.Module, images: Tensor, artefact: Path) -> None:
    text = _refused(lambda: load_hypernetwork(artefact, tiny_net, inputs=images.expand(6, 2, 6, 6)))
    assert "\n  inputs.shape: [1, 6, 6] -> [2, 6, 6]\n" in text
    pixels = Examples(torch.zeros(2, 1, 6, 6, dtype=torch.uint8), [0, 1], normalize=((0.5,), (0.5,)))
    text = _refused(lambda: load_hypernetwork(artefact, tiny_net, inputs=pixels))
    assert "\n  inputs.normalize: nothing -> [[0.5], [0.5]]\n" in text
    network = load_hypernetwork(artefact, tiny_net)
    text = _refused(lambda: network.masks(_other_weights(tiny_net), images))
    assert text.startswith("This mask hypernetwork was made for something else.")
    assert "\n  inputs.shape: [1, 6, 6] -> [1, 7, 7]\n" in _refused(
        lambda: network.masks(tiny_net, torch.zeros(1, 1, 7, 7))
    )


def test_a_model_in_training_mode_is_refused(tiny_net: nn.Module, images: Tensor, artefact: Path) -> None:
    network, training = load_hypernetwork(artefact, tiny_net), copy.deepcopy(tiny_net).train()
    message = "This Sequential is in training mode, expected eval mode: call model.eval()."
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        network.masks(training, images)


def test_an_unfinished_one_is_refused_unless_wanted(
    tiny_net: nn.Module, selection: Selection, images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "masks.safetensors"
    training = Training(tiny_net, selection, images, SETTINGS, path)
    training.step()
    training.save_now_and_then()
    message = (
        f"The training of {path} is at iteration 1 of 2. Go on with train_hypernetwork(..., store=...), or take it as "
        "it is with unfinished=True."
    )
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        load_hypernetwork(path, tiny_net)
    assert load_hypernetwork(path, tiny_net, unfinished=True).iterations == 1


def test_files_that_are_none(tiny_net: nn.Module, artefact: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def refuse(message: str) -> None:
        with pytest.raises(EditError, match=f"^{message}$"):
            load_hypernetwork(path, tiny_net)

    refuse(re.escape(f"There is no file {path}. Train a hypernetwork: train_hypernetwork(..., store={str(path)!r})."))
    path.write_bytes(artefact.read_bytes()[:-100])
    refuse(re.escape(f"{path} is damaged or no safetensors file (") + r".*\)\.")
    flipped = bytearray(artefact.read_bytes())
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    refuse(
        re.escape(f"{path} is damaged or no safetensors file (what it holds does not have the checksum that ") + ".*"
    )
    save_file({"weight": torch.zeros(2)}, path)
    refuse(re.escape(f"{path} says format None, version None; expected 'mask-hypernetwork', 1: it is no mask ") + ".*")
    save_file({"weight": torch.zeros(2)}, path, {"hypernetwork": json.dumps({**_header(), "network": {}})})
    refuse(re.escape(f"{path} is damaged: its header and tensors do not fit together (") + r".*\)\.")


def _header() -> dict[str, Any]:
    return {"format": "mask-hypernetwork", "format_version": 1}
