"""Weights from local files: data, never code, and every name and shape must fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ablate
from ablate.loading import TimmModel, read_checkpoint
from ablate.loading.networks.checkpoints import load_weights


def _small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def _save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "plain", "state_dict", "model", "data-parallel"])
def test_a_checkpoint_gives_its_weights_back(form: str, tmp_path: Path) -> None:
    source, target = _small(), _small()
    weights = source.state_dict()
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
    else:
        content: Any = {
            "plain": weights,
            "state_dict": {"epoch": 3, "state_dict": weights},
            "model": {"model": weights, "optimizer": {"lr": 0.1}},
            "data-parallel": {f"module.{name}": value for name, value in weights.items()},
        }[form]
        path = _save(tmp_path / "weights.pt", content)
    load_weights(target, read_checkpoint(path), str(path))
    assert ablate.model_hash(target) == ablate.model_hash(source)


def test_a_spec_may_name_a_checkpoint(tmp_path: Path) -> None:
    trained, _ = ablate.load_model(TimmModel(source="timm", name="test_resnet", classes=4, seed=8))
    path = tmp_path / "trained.safetensors"
    save_file(trained.state_dict(), path)
    source = TimmModel(source="timm", name="test_resnet", classes=4, seed=0, checkpoint=str(path))
    loaded, _ = ablate.load_model(source)
    assert ablate.model_hash(loaded) == ablate.model_hash(trained)


def test_a_checkpoint_that_does_not_fit_lists_every_problem(tmp_path: Path) -> None:
    weights: dict[str, Tensor] = dict(_small().state_dict())
    weights["head.weight"] = weights.pop("2.weight")
    weights["0.weight"] = weights["0.weight"].T.contiguous()
    path = _save(tmp_path / "weights.pt", weights)
    model = _small()
    before = ablate.model_hash(model)
    with pytest.raises(ablate.LoadError) as caught:
        load_weights(model, read_checkpoint(path), str(path))
    assert str(caught.value) == (
        f"{path} does not fit a Sequential:\n"
        "  missing: 2.weight (nearest in the file: head.weight)\n"
        "  unexpected: head.weight\n"
        "  0.weight: shape (4, 5), expected (5, 4)"
    )
    assert ablate.model_hash(model) == before


def test_of_many_problems_eight_are_shown(tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(6)])
    with pytest.raises(
        ablate.LoadError, match=r"^empty does not fit a Sequential:\n(  missing: \d\.\w+\n){8}"
    ) as caught:
        load_weights(model, {}, "empty")
    assert str(caught.value).endswith("\n  ... and 4 more")


class Malicious:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    path = _save(tmp_path / "evil.pt", {"weight": torch.zeros(2), "extra": Malicious(proof)})
    with pytest.raises(ablate.LoadError) as caught:
        read_checkpoint(path)
    assert not proof.exists()
    message = str(caught.value)
    assert message.startswith(f"{path} is no checkpoint of plain tensors: it asks for ")
    assert message.endswith(
        ", which is code. Files that contain code are refused, and none of it ran. Save the state_dict as .safetensors."
    )
    assert "weights_only" not in message, "torch's advice to load it all the same must not be passed on"


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "model.pt", nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ablate.LoadError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"{path} is no checkpoint of plain tensors: it asks for torch.nn.modules.container.Sequential, which is code. "
        "Files that contain code are refused, and none of it ran. Save the state_dict as .safetensors."
    )


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("empty.pt", b"", "EOFError"),
        ("noise.pt", b"no checkpoint at all", "UnpicklingError"),
        ("noise.safetensors", b"no checkpoint at all", "SafetensorError"),
    ],
)
def test_a_damaged_checkpoint(name: str, content: bytes, error: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ablate.LoadError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"{path} is no checkpoint of plain tensors: it is damaged or of another format ({error}). "
        "Save the state_dict as .safetensors."
    )


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "nothing.pt"
    with pytest.raises(ablate.LoadError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"No checkpoint at {path}. Give the path of a .safetensors or .pt file."


@pytest.mark.parametrize(
    ("content", "kind"), [([torch.zeros(2)], "list"), (torch.zeros(2), "Tensor"), ({"lr": 0.1}, "dict")]
)
def test_a_file_of_something_else(content: Any, kind: str, tmp_path: Path) -> None:
    path = _save(tmp_path / "other.pt", content)
    with pytest.raises(ablate.LoadError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"{path} holds a {kind}, expected a mapping from names to tensors."


def test_numpy_arrays_are_no_checkpoint(tmp_path: Path) -> None:
    path = _save(tmp_path / "arrays.pt", {"0.weight": np.zeros((2, 2))})
    with pytest.raises(ablate.LoadError, match=r"is no checkpoint of plain tensors|expected a mapping from names"):
        read_checkpoint(path)
