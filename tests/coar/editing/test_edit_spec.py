"""The `edit` table of a spec: which examples, labels and files become a request, and every problem of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ablate
import coar
from ablate import Examples
from ablate.errors import UnknownNameError
from coar.cli.editing.spec import EditSpec, read_spec

COUNT = 6
BASE = """
[model]
source = "digits"

[data]
source = "digits"
split = "test"
"""


@pytest.fixture
def examples() -> Examples:
    """Six, in the groups even and odd; ids train/0, val/1, train/2, ..."""
    ids = [f"{'val' if i % 2 else 'train'}/{i}" for i in range(COUNT)]
    groups = ["even", "odd", "odd", "even", "even", "odd"]
    return Examples(torch.randn(COUNT, 1, 4, 4), torch.arange(COUNT) % 3, ids, groups)


def _spec(**values: Any) -> EditSpec:
    return EditSpec.model_validate(values)


def test_examples_by_position_id_and_group(examples: Examples) -> None:
    table = {"positions": [3], "ids": ["train/0"], "groups": ["odd"], "ids_contain": "val/"}
    spec = _spec(target=table, reference={"groups": ["even"]})
    request = spec.request(examples)
    assert torch.equal(request.inputs, examples.take([3, 0, 1, 5]).inputs())
    assert request.labels is not None
    assert request.labels.tolist() == [0, 0, 1, 2]
    assert request.reference is not None
    assert request.reference.ids == ("train/0", "val/3", "train/4")
    assert (request.originals, request.masks, request.validation) == (None, None, None)
    # the same example twice counts once
    assert len(_spec(target={"positions": [1], "groups": ["odd"]}).request(examples).inputs) == 3


def test_one_label_for_all_also_where_a_strength_is_chosen(examples: Examples) -> None:
    validation = {"target": {"positions": [4]}, "reference": {"positions": [5]}}
    request = _spec(target={"positions": [0, 1]}, label=2, validation=validation).request(examples)
    assert request.labels is not None
    assert request.labels.tolist() == [2, 2]
    assert request.validation is not None
    changed, ordinary = request.validation
    assert (changed.ids, changed.targets.tolist()) == (("train/4",), [2])
    assert (ordinary.ids, ordinary.targets.tolist()) == (("val/5",), [2])


def test_prepared_as_the_model_takes_them() -> None:
    pixels = torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)
    examples = Examples(pixels, [0, 1], normalize=([0.5], [0.25]))
    request = _spec(target={"positions": [0]}).request(examples)
    assert torch.equal(request.inputs, torch.full((1, 1, 2, 2), 2.0))


def _files(folder: Path) -> dict[str, Tensor]:
    tensors = {
        "inputs": torch.randn(2, 1, 4, 4, dtype=torch.float64),
        "originals": torch.randn(2, 1, 4, 4),
        "masks": torch.rand(2, 4, 4),
        "labels": torch.tensor([2, 1]),
    }
    for name, tensor in tensors.items():
        np.save(folder / f"{name}.npy", tensor.numpy())
    save_file(tensors, folder / "all.safetensors")
    save_file({"anything": tensors["masks"]}, folder / "one.safetensors")
    return tensors


def test_tensors_from_files(examples: Examples, tmp_path: Path) -> None:
    tensors = _files(tmp_path)
    by_name = _spec(**{name: str(tmp_path / f"{name}.npy") for name in tensors}).request(examples)
    together = _spec(**dict.fromkeys(tensors, str(tmp_path / "all.safetensors"))).request(examples)
    for name, tensor in tensors.items():
        for request in (by_name, together):
            found = getattr(request, name)
            assert found.dtype == (torch.int64 if name == "labels" else torch.float32)
            assert torch.equal(found, tensor.to(found.dtype))
    alone = _spec(inputs=str(tmp_path / "inputs.npy"), masks=str(tmp_path / "one.safetensors")).request(examples)
    assert alone.masks is not None
    assert torch.equal(alone.masks, tensors["masks"])
    assert alone.labels is None


def test_refuses_files(examples: Examples, tmp_path: Path) -> None:
    _files(tmp_path)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    (tmp_path / "masks.txt").write_text("1")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")

    def refused(name: str) -> str:
        with pytest.raises(coar.EditError) as found:
            _spec(target={"positions": [0]}, masks=str(tmp_path / name)).request(examples)
        return str(found.value).replace(f"{tmp_path}/", "")

    assert refused("gone.npy") == "masks: no file at gone.npy. Check the path."
    assert refused("masks.txt") == "masks: masks.txt is neither .npy nor .safetensors."
    assert refused("two.safetensors") == (
        "masks: two.safetensors holds a, b, expected one tensor, or one called 'masks'."
    )
    assert refused("labels.npy") == (
        "masks: labels.npy holds int64, expected floating point: as the model takes them (masks: 0 to 1)."
    )
    assert refused("objects.npy").startswith("masks: objects.npy cannot be read: ValueError: Object arrays cannot be")
    assert refused("damaged.safetensors").startswith("masks: damaged.safetensors cannot be read: SafetensorError: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {},
            "The examples to change are missing: name some of the spec's examples (target), or a file (inputs).",
        ),
        (
            {"target": {"positions": [0]}, "inputs": "a.npy"},
            "The examples to change are given twice, as target and as inputs: name some of the spec's examples "
            "(target), or a file (inputs).",
        ),
        ({"target": {"positions": [6]}}, "The target has no example 6: positions are 0 to 5."),
        (
            {"target": {"groups": ["odd", "even"], "ids_contain": "test/"}},
            "The target is empty: no example of odd, even has 'test/' in its id.",
        ),
        (
            {"target": {"positions": [0]}, "label": 1, "labels": "a.npy"},
            "Labels are given twice, as label and as labels. Give one class for all, or a file.",
        ),
    ],
)
def test_refuses(examples: Examples, values: Any, message: str) -> None:
    with pytest.raises(coar.EditError) as refused:
        _spec(**values).request(examples)
    assert str(refused.value) == message


def test_unknown_names_offer_the_nearest(examples: Examples) -> None:
    with pytest.raises(UnknownNameError, match=r"No group 'evn'\. Did you mean 'even'"):
        _spec(target={"groups": ["evn"]}).request(examples)
    with pytest.raises(UnknownNameError, match=r"No example with id 'train/O'\."):
        _spec(target={"ids": ["train/O"]}).request(examples)


def test_the_selection(mlp: nn.Module) -> None:
    assert _spec().selection(mlp) is None
    index = ablate.ComponentIndex.from_model(mlp)
    assert _spec(select=["0", "2"]).selection(mlp) == index.where(module="0") | index.where(module="2")
    whole = _spec(kinds=["linear_input"]).selection(mlp)
    assert whole is not None
    assert whole == ablate.ComponentIndex.from_model(mlp, ["linear_input"]).everything()
    with pytest.raises(UnknownNameError, match="No module 'layer4"):
        _spec(select=["layer4.*"]).selection(mlp)


def test_a_spec_file_has_two_parts(tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(BASE + '[edit]\nmethod = "finetune"\nsettings = {steps = 5}\n[edit.target]\ngroups = ["a"]\n')
    spec, edit = read_spec(file)
    assert spec.settings.ablate_fraction == 0.05  # which an edit does not need
    assert (edit.method, edit.settings, edit.target.groups) == ("finetune", {"steps": 5}, ("a",))
    # what is given beside it goes before it; tables are joined
    _, edit = read_spec(file, {"method": "coar", "target": {"ids_contain": "train/"}, "label": 1})
    assert (edit.method, edit.label) == ("coar", 1)
    assert (edit.target.groups, edit.target.ids_contain) == (("a",), "train/")
    file.write_text(BASE)
    assert read_spec(file)[1] == EditSpec()


def test_all_problems_of_a_spec_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(BASE + 'row = 3\n[edit]\nmetod = "finetune"\nalpha = 2.0\n[edit.target]\ngroup = ["a"]\n')
    with pytest.raises(ablate.SpecError) as refused:
        read_spec(file)
    problems = refused.value.problems
    assert any("row: unknown key." in problem for problem in problems)
    assert "edit.metod: unknown key. Did you mean 'method'?" in problems
    assert "edit.alpha: got 2.0, but it should be less than or equal to 1." in problems
    assert any(problem.startswith("edit.target.group: unknown key.") for problem in problems)
    assert len(problems) == 4
    file.write_text("[edit")
    with pytest.raises(ablate.SpecError, match="is no TOML"):
        read_spec(file)
    with pytest.raises(ablate.SpecError, match="cannot be read: No such file"):
        read_spec(tmp_path / "gone.toml")
    file.write_text(BASE.replace("[model]", "edit = 3\n[model]"))
    with pytest.raises(ablate.SpecError, match=r"edit\.: "):
        read_spec(file)
