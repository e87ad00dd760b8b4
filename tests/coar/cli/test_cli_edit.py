"""`coar edit` and `coar edit-info`: every method by name, the same edit as in Python, what is printed and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ablate
import coar
from ablate import CampaignSpec, Examples
from coar.editing.registry import editor_names, get_editor
from coar.editing.request import Request

Run = Callable[..., tuple[int, str, str]]
CHANGED, KEPT = "low-horizontal", "low-vertical"
FINETUNE = ["--method", "finetune", "--set", "rate=1e-3", "--set", "steps=5", "--label", "1"]  # 1 is "high"
TARGETS = ["--target-group", CHANGED, "--reference-group", KEPT, "--ids-contain", "train/"]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[torch.nn.Module, Examples]:
    """Model and examples of the spec of `folder`."""
    with ablate.preserved_random_state():
        return CampaignSpec.from_file(folder / "spec.toml").load()


def _positions(examples: Examples, group: str, contains: str = "train/") -> list[int]:
    pairs = zip(examples.groups, examples.ids, strict=True)
    return [i for i, (own, name) in enumerate(pairs) if own == group and contains in name]


def _request(examples: Examples, label: int | None = None) -> Request:
    changed = examples.take(_positions(examples, CHANGED))
    labels = changed.targets if label is None else torch.full((len(changed),), label)
    return Request(changed.model_inputs(), labels, reference=examples.take(_positions(examples, KEPT)))


def words(text: str) -> str:
    """Returns an error as one line, without the box that it is drawn in."""
    return " ".join(text.replace("│", " ").split())


def test_fine_tuning_is_the_same_as_in_python(
    run: Run, run_json: Callable[..., Any], folder: Path, tmp_path: Path, loaded: tuple[torch.nn.Module, Examples]
) -> None:
    out_file = tmp_path / "new" / "fix.safetensors"
    arguments = ["edit", folder / "spec.toml", *FINETUNE, *TARGETS, "--out", out_file, "--quiet"]
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    model, examples = loaded
    expected = get_editor("finetune", rate=1e-3, steps=5).edit(model, _request(examples, 1))
    found = coar.load_edit(out_file)
    assert found.selection == expected.selection
    assert found.operation == expected.operation
    assert out.startswith(f"{expected!r} -> {out_file}. ")
    assert "Accuracy before and after" in out
    assert "relative_change" in out

    facts = run_json(*arguments)
    assert facts["edit"] == str(out_file)
    assert facts["method"] == "Fine-tuning on labels"
    assert facts["components"] == len(expected.selection)
    assert facts["ids"] == list(expected.selection.ids)
    effect = {row["set"]: row for row in facts["effect"]}
    assert set(effect) == {"target", "reference"}
    request = _request(examples, 1)
    with torch.no_grad():
        right = (expected.apply(model)(request.inputs).argmax(1) == request.labels).float().mean()
    assert effect["target"]["after"] == pytest.approx(float(right))
    assert effect["target"]["examples"] == len(request.inputs)


def test_coar_from_a_spec_estimates_first(
    run_json: Callable[..., Any], folder: Path, tmp_path: Path, loaded: tuple[torch.nn.Module, Examples]
) -> None:
    options = ["--method", "coar", "-k", "3", "--set", "passes=2", *TARGETS, "--out", tmp_path / "a.safetensors"]
    found = run_json("edit", folder / "spec.toml", *options, "--quiet")
    model, examples = loaded
    expected = get_editor("coar", k=3, passes=2).edit(model, _request(examples))
    assert found["ids"] == list(expected.selection.ids)
    assert found["details"]["measured"] == expected.details["measured"]
    assert found["details"]["measured"]["reference"]["examples"] == 2


def test_the_edit_table_of_a_spec(run_json: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    out_file, file = tmp_path / "fix.safetensors", tmp_path / "spec.toml"
    table = f"""
[edit]
method = "finetune"
settings = {{rate = 1e-3, steps = 7}}
select = ["blocks.5.*"]
label = 1
out = "{out_file}"

[edit.target]
groups = ["{CHANGED}"]
ids_contain = "train/"
"""
    file.write_text((folder / "spec.toml").read_text() + table)
    found = run_json("edit", file, "--quiet")
    assert found["edit"] == str(out_file)
    assert found["details"]["steps"] == 7
    edit = coar.load_edit(out_file)
    assert {name.split(".")[1] for name in edit.selection.table()["module"]} == {"5"}
    # options go before it
    again = run_json("edit", file, "--quiet", "--set", "steps=2", "--alpha", "0.5", "--select", "stem")
    assert (again["details"]["steps"], again["alpha"]) == (2, 0.5)
    assert again["changes"][0]["module"] == "stem"


def test_pairs_from_files(
    run_json: Callable[..., Any], folder: Path, tmp_path: Path, loaded: tuple[torch.nn.Module, Examples]
) -> None:
    examples = loaded[1]
    originals = examples.take([0, 1, 2]).model_inputs()
    np.save(tmp_path / "originals.npy", originals.numpy())
    np.save(tmp_path / "changed.npy", (originals + 0.25).numpy())
    options = [
        "--method",
        "output-collision",
        "--set",
        "steps=3",
        "--select",
        "blocks.5.conv2",
        "--kinds",
        "conv_filter",
    ]
    options += ["--inputs", str(tmp_path / "changed.npy"), "--originals", str(tmp_path / "originals.npy")]
    found = run_json("edit", folder / "spec.toml", *options, "--describe", "--quiet")
    assert found["edit"] is None
    assert found["effect"] is None  # nothing has labels
    assert [row["module"] for row in found["changes"]] == ["blocks.5.conv2"]
    assert not list(tmp_path.glob("*.safetensors"))


def test_by_store_without_writing(run: Run, folder: Path) -> None:
    attributions = folder / "campaign-attributions.zarr"
    options = ["--target", "0", "--reference-id", coar.open_attributions(attributions).examples["id"][5]]
    code, out, _ = run("edit", attributions, *options, "--describe", "-k", "4", "--alpha", "0.5")
    assert code == 0
    assert out.startswith("<Edit: ablate 4 of 736 components at alpha=0.5, by COAR-Edit>. Predicted change of the mean")
    assert run("edit", attributions, *options, "--describe", "--method", "coar")[0] == 0


def test_methods_are_listed(run: Run, run_json: Callable[..., Any]) -> None:
    found = run_json("edit", "--methods")
    assert [row["method"] for row in found] == list(editor_names())
    assert all(row["what it is"] and row["source"] and row["cost"] for row in found)
    code, out, _ = run("edit", "--methods")
    assert code == 0
    assert out.startswith("Editing methods. More on one of them: coar edit --explain NAME\n")


@pytest.mark.parametrize("name", editor_names())
def test_every_method_is_explained(run: Run, run_json: Callable[..., Any], name: str) -> None:
    code, out, _ = run("edit", "--explain", name)
    assert code == 0
    assert f"(--method {name})\n" in out
    assert f"For example: coar edit spec.toml --method {name} " in out
    assert "Settings, each given as --set NAME=VALUE:\n" in out
    found = run_json("edit", "--explain", name)
    assert all(setting["setting"] in out for setting in found["settings"])


def test_an_explanation(run_json: Callable[..., Any]) -> None:
    found = run_json("edit", "--explain", "coar")
    assert (found["method"], found["title"], found["needs"]) == ("coar", "COAR-Edit", ["labels", "reference"])
    assert found["settings"][0] == {
        "setting": "k",
        "default": "none",
        "takes": "an integer from 1 or none",
        "meaning": "How many components to ablate; None: see `choose`.",
    }


def test_edit_info(run: Run, run_json: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "fix.safetensors"
    assert run("edit", folder / "spec.toml", *FINETUNE, *TARGETS, "--out", file, "--quiet")[0] == 0
    edit = coar.load_edit(file)
    code, out, _ = run("edit-info", file)
    assert code == 0
    assert out.startswith(
        f"{edit!r}, for the model with weights {str(edit.base)[:12]}; {file.stat().st_size:,} bytes, its checksum "
        "fits.\n"
    )
    assert "relative_change" in out
    assert "finetune" in out
    found = run_json("edit-info", file)
    assert found["ids"] == list(edit.selection.ids)
    assert found["changes"][0]["relative_change"] > 0
    assert found["details"]["log"]["steps"] <= 5
    assert found["checksum"] is True
    assert found["parts"] == []
    code, out, err = run("edit-info", tmp_path / "gone.safetensors")
    assert (code, out) == (2, "")
    assert err == f"error: No edit at {tmp_path}/gone.safetensors: there is no such file. Check the path.\n"


def test_edit_info_of_earlier_formats_and_of_parts(run: Run, run_json: Callable[..., Any]) -> None:
    fixtures = Path(__file__).parents[1] / "editing" / "fixtures"
    code, out, _ = run("edit-info", fixtures / "sum-v2.safetensors")
    assert code == 0
    assert "2,008 bytes, no checksum (format 2).\n" in out
    assert "It holds end points, not differences" in out
    assert "Its parts, in their order:" in out
    found = run_json("edit-info", fixtures / "sum-v2.safetensors")
    assert found["checksum"] is False
    assert [(part["operation"], part["alpha"], part["components"]) for part in found["parts"]] == [
        ("delta", 1.0, 2),
        ("scale", 0.5, 1),
    ]
    assert "no checksum (format 1).\n" in run("edit-info", fixtures / "ablate-v1.safetensors")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "finetun"], "error: No editing method 'finetun'. Did you mean 'finetune'?"),
        (
            ["--method", "finetune", "--set", "stepz=3", "--set", "rate=fast"],
            "error: Settings of method 'finetune':\n  stepz: no such setting. Did you mean 'steps'?\n"
            "  rate: got 'fast', expected a number above 0.\n",
        ),
        (
            ["--method", "finetune", "--set", "steps=0"],
            "error: Settings of method 'finetune':\n  steps: got '0', expected an integer from 1.",
        ),
        (["--method", "finetune", "--target-group", "low"], "error: No group 'low'."),
        (["--method", "finetune"], "error: The examples to change are missing: "),
        (
            ["--method", "finetune", "--target", "0", "--select", "nowhere.*"],
            "error: No module 'nowhere.*'.",
        ),
        (["--method", "finetune", "--target", "0", "--kinds", "filter"], "error: No component kind 'filter'."),
        (["--method", "finetune", "--target", "0", "--label", "9"], "error: labels hold 9, the model has classes 0 to"),
        (
            ["--method", "coar", "--target", "0", "-k", "2"],
            "error: COAR-Edit cannot edit with this request:\n  reference",
        ),
        (
            ["--method", "lowrank", "--target", "0"],
            "error: Direct low-rank editing cannot edit with this request:\n  ori",
        ),
    ],
)
def test_refuses(run: Run, folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    code, out, err = run("edit", folder / "spec.toml", *options, "--out", tmp_path / "fix.safetensors", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert not (tmp_path / "fix.safetensors").exists()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (None, [], "give a spec (.toml) or an attribution store; --methods lists what can be done with it"),
        ("spec.toml", ["--method", "finetune"], "give --out FILE.safetensors, or --describe to look only"),
        ("spec.toml", ["--describe"], "give --method NAME, or method in the spec's table edit; --methods lists them"),
        (
            "spec.toml",
            ["--describe", "--method", "finetune", "-k", "3", "--target", "0"],
            "-k belongs to coar, the method is finetune",
        ),
        ("campaign-attributions.zarr", ["--target", "0"], "give --out FILE.safetensors, or --describe to look only"),
        (
            "campaign-attributions.zarr",
            ["--describe", "--method", "finetune"],
            "--method finetune runs the model: give a spec (.toml) with model and data, not",
        ),
        (
            "campaign-attributions.zarr",
            ["--describe", "--set", "k=3", "--label", "1", "--validation-target-group", "a"],
            "--set, --validation-target-group, --label: only with a spec (.toml), which says how to run the model",
        ),
    ],
)
def test_refuses_wrong_usage(run: Run, folder: Path, source: str | None, options: list[str], message: str) -> None:
    arguments = [] if source is None else [folder / source]
    code, out, err = run("edit", *arguments, *options)
    assert (code, out) == (2, "")
    assert message in words(err)
