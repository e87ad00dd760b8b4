"""Files of edits: any damage is noticed, and those of earlier formats are read as they are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import ablate
import coar
from ablate import ComponentIndex
from coar.editing.edits.covered import covered
from coar.editing.edits.files import read_edit_file
from coar.editing.edits.operations import Delta, Factors, LowRank, Scale
from coar.editing.edits.sealed import write_sealed

FIXTURES = Path(__file__).parent / "fixtures"  # written by the versions that had these formats


def _old_model(shift: float = 0.0) -> nn.Module:
    """The model that the fixtures were made for, if not shifted."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            values = (torch.arange(parameter.numel(), dtype=torch.float32) - 2 * k) / 8
            parameter.copy_(values.reshape(parameter.shape) + shift)
    return model


def _index(model: nn.Module) -> ComponentIndex:
    return ComponentIndex.from_model(model, ["linear_neuron"])


def _moved(model: nn.Module, ids: list[int]) -> Delta:
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    after = {name: value * 1.5 + 0.1 for name, value in before.items()}
    return Delta.between(before, after, covered(_index(model).select(ids), model), ["2.bias"])


def _edit(kind: str) -> coar.Edit:
    model = _old_model()
    index, base = _index(model), ablate.model_hash(model)
    delta = coar.Edit(index.select([0, 2]), _moved(model, [0, 2]), 0.75, base, details={"why": ["ü", 1]})
    scale = coar.Edit(index.select([4]), Scale(3.0), 0.5, base)
    factors = Factors(torch.ones(4, 1, 1), torch.arange(3.0).reshape(3, 1))
    made = {
        "ablate": coar.Edit(index.select([0, 3]), alpha=0.5, base=base),
        "delta": delta.measured(model),
        "lowrank": coar.Edit(index.select([1]), LowRank({"0.weight": factors})),
        "sum": delta + scale,
        "chain": delta.then(scale, any_weights=True).at(0.5),
    }
    return made[kind]


KINDS = ("ablate", "delta", "lowrank", "sum", "chain")


def _read(path: Path) -> coar.Edit | str:
    """Returns the edit in a file, or why it is refused."""
    try:
        return coar.load_edit(path)
    except coar.EditError as error:
        return str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_is_read(kind: str, tmp_path: Path) -> None:
    """Any one bit of the file: of sizes, of the header, of ids, of weights. All of the first ones, 200 of the rest."""
    edit, path = _edit(kind), tmp_path / "edit.safetensors"
    edit.save(path)
    assert coar.load_edit(path) == edit
    content = path.read_bytes()
    weights = 8 * (8 + struct.unpack("<Q", content[:8])[0])
    generator = np.random.default_rng(KINDS.index(kind))
    drawn = (generator.integers(64, weights, 120), generator.integers(weights, 8 * len(content), 80))
    for place in (*range(64), *map(int, np.concatenate(drawn))):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = _read(path)
        if isinstance(found, str):
            assert "damaged" in found or "was not written by Edit.save" in found
        else:
            assert (found, found.norms, found.notes) == (edit, edit.norms, edit.notes), f"bit {place}"


@pytest.mark.parametrize("kind", KINDS)
def test_cut_or_longer_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    _edit(kind).save(path)
    content = path.read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], content[:8], content + b"\0", content + content):
        path.write_bytes(changed)
        with pytest.raises(coar.EditError, match=r"It is damaged or something else; restore it from a copy"):
            coar.load_edit(path)


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    _edit("ablate").save(path)
    content = bytearray(path.read_bytes())
    content[-8] ^= 4
    path.write_bytes(content)
    with pytest.raises(coar.EditError) as refused:
        coar.load_edit(path)
    assert str(refused.value) == (
        f"{path} cannot be read as an edit: DamagedFileError: what it holds does not have the checksum that is written "
        "in it. It is damaged or something else; restore it from a copy, or make the edit again."
    )


def test_a_file_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for path in paths:
        _edit("chain").save(path)
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_checksum_cannot_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    _edit("ablate").save(path)
    with safe_open(path, "pt") as file:
        metadata, ids = file.metadata(), file.get_tensor("component_ids")
    header = json.loads(metadata["edit"])
    del header["sha256"]
    save_file({"component_ids": ids}, path, {"edit": json.dumps(header)})
    with pytest.raises(coar.EditError, match="its checksum is gone"):
        coar.load_edit(path)


@pytest.mark.parametrize(
    ("name", "description", "weight"),
    [
        ("ablate-v1", "<Edit: ablate 2 of 6 components at alpha=0.5, by by hand>", [0.0, 0.0625, 0.125]),
        (
            "delta-v2",
            "<Edit: delta 2 of 6 components and 1 whole parameters at alpha=0.75, by by hand>",
            [0.07500000298023224, 0.24687498807907104, 0.41874998807907104],
        ),
        ("lowrank-v2", "<Edit: lowrank 2 of 6 components at alpha=1, by by hand>", [0.0, 0.125, 0.25]),
        (
            "sum-v2",
            "<Edit: together 3 of 6 components and 1 whole parameters at alpha=1, by by hand + scaled>",
            [0.10000000149011612, 0.2874999940395355, 0.4749999940395355],
        ),
    ],
)
def test_earlier_formats_give_what_they_gave(name: str, description: str, weight: list[float], tmp_path: Path) -> None:
    path, model = FIXTURES / f"{name}.safetensors", _old_model()
    edit = coar.load_edit(path)
    assert repr(edit) == description
    assert not read_edit_file(path).checked
    assert edit.apply(model).get_parameter("0.weight")[0].tolist() == weight
    edit.save(tmp_path / "again.safetensors")
    again = coar.load_edit(tmp_path / "again.safetensors")
    assert again == edit
    assert read_edit_file(tmp_path / "again.safetensors").checked


@pytest.mark.parametrize("name", ["delta-v2", "sum-v2"])
def test_an_end_point_is_no_difference(name: str) -> None:
    """Until the model that it was made for says where it started."""
    path, model, other = FIXTURES / f"{name}.safetensors", _old_model(), _old_model(0.25)
    with pytest.raises(coar.EditMismatchError, match=r"It says where '0\.weight', '2\.bias' should end"):
        coar.load_edit(path).apply(other, any_weights=True)
    with pytest.raises(coar.EditMismatchError, match=r"^This edit was made for a model with weights"):
        coar.load_edit(path, base=other)
    edit = coar.load_edit(path, base=model)
    assert edit.operation.end_points == ()
    assert torch.equal(edit.apply(model)[0].weight, coar.load_edit(path).apply(model)[0].weight)  # type: ignore[index]
    change = edit.apply(model).get_parameter("0.weight") - model.get_parameter("0.weight")
    moved = edit.apply(other, any_weights=True).get_parameter("0.weight") - other.get_parameter("0.weight")
    torch.testing.assert_close(moved, change)
    assert moved.abs().max() > 0.05


def test_details_that_no_file_knows_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    edit = coar.Edit(_index(_old_model()).select([0]), details={"tensor": torch.zeros(2)})
    with pytest.raises(coar.EditError, match=r"edit\.safetensors is not written: Object of type Tensor is not JSON"):
        edit.save(tmp_path / "edit.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_holds_covered_weights_only(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1000, 100), nn.ReLU(), nn.Linear(100, 2)).eval()
    edit = coar.Edit(_index(model).select([7]), _moved(model, [7]))
    edit.save(tmp_path / "edit.safetensors")
    both_ends = 2 * 4 * (1000 + 2)
    assert both_ends < (tmp_path / "edit.safetensors").stat().st_size < both_ends + 3000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda part: part.update(alpha=2.0), "alpha is 2.0, expected 0"),
        (lambda part: part.update(operation="magic"), "operation is 'magic', expected one of ablate, scale, lowrank"),
        (lambda part: part.update(base=3), "base is a int, expected a hash or null"),
        (lambda part: part.pop("method"), "KeyError: 'method'"),
    ],
)
def test_parts_are_checked_too(change: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    _edit("chain").save(path)
    sealed = read_edit_file(path)
    header = json.loads(json.dumps(sealed.header))
    change(header["settings"]["parts"][1])
    write_sealed(path, "edit", header, sealed.tensors)
    with pytest.raises(coar.EditError) as refused:
        coar.load_edit(path)
    assert reason in str(refused.value)


def test_tensors_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    _edit("delta").save(path)
    sealed = read_edit_file(path)
    tensors: dict[str, Tensor] = {**sealed.tensors, "starts/0.weight": sealed.tensors["starts/0.weight"] / 0}
    write_sealed(path, "edit", sealed.header, tensors)
    with pytest.raises(coar.EditError, match=r"tensor 'starts/0\.weight' holds values that are not finite"):
        coar.load_edit(path)
