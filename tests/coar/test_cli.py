"""The command line on a small real campaign: what it prints, its JSON, its exit codes; never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ablate
import coar
import stores
from coar.cli import main

COMMANDS = ("demo", "index", "ablate", "status", "fit", "evaluate", "top", "nearest", "compare", "edit", "report")
SPEC = """
rows = 60
ablate_fraction = 0.05
seed = {seed}
block_rows = 20
store = "{folder}/campaign.zarr"

[model]
source = "digits"
cache = "{folder}/model.safetensors"

[data]
source = "digits"
train_per_group = 2
test_per_group = 2
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("status", store)`: runs the command line; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["coar", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """`run_json("status", store)`: the same with `--json`; gives what it printed, strictly parsed."""

    def call(*arguments: object) -> Any:
        code, out, _ = run(*arguments, "--json")
        assert code == 0

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is no JSON")

        return json.loads(out, parse_constant=refuse)

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec, its finished campaign and attributions; not to be changed."""
    path = tmp_path_factory.mktemp("cli")
    (path / "spec.toml").write_text(SPEC.format(folder=path, seed=0))
    campaign = ablate.run(path / "spec.toml", progress=False)
    coar.fit(campaign, path / "campaign-attributions.zarr")
    return path


@pytest.fixture(scope="module")
def attributions(folder: Path) -> Path:
    """The attribution store of `folder`."""
    return folder / "campaign-attributions.zarr"


@pytest.fixture
def unfinished(folder: Path, tmp_path: Path) -> Path:
    """A copy of the campaign whose last block is not finished."""
    copied = tmp_path / "unfinished.zarr"
    shutil.copytree(folder / "campaign.zarr", copied)
    (copied / "ledger" / "c" / "2" / "0").unlink()
    return copied


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"coar {command}" in out
    assert len(out.splitlines()) > 6


def test_the_installed_command_lists_every_command() -> None:
    coar_command = Path(sys.executable).parent / "coar"
    done = subprocess.run([coar_command, "--help"], capture_output=True, text=True, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)


def test_the_installed_command_fails_without_a_traceback(tmp_path: Path) -> None:
    coar_command = Path(sys.executable).parent / "coar"
    done = subprocess.run([coar_command, "status", tmp_path / "none.zarr"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: No campaign store at {tmp_path}/none.zarr: nothing is there. Check the path, or make one first.\n"
    )


def test_index(run: Run, run_json: Callable[..., Any], folder: Path) -> None:
    code, out, _ = run("index", folder / "spec.toml")
    assert code == 0
    assert out.startswith("736 components in 14 modules; index ")
    assert "blocks.5.conv2" in out
    assert "Left out:" in out
    found = run_json("index", folder / "spec.toml")
    store = stores.CampaignStore.open(folder / "campaign.zarr")
    assert (found["components"], found["hash"]) == (736, store.header["identity"]["index"])
    assert sum(module["components"] for module in found["modules"]) == 736


def test_index_explains_how_each_module_is_gated(run: Run, run_json: Callable[..., Any], folder: Path) -> None:
    code, out, _ = run("index", folder / "spec.toml", "--explain")
    assert code == 0
    assert "How each module is gated:" in out
    gating = run_json("index", folder / "spec.toml", "--explain")["gating"]
    assert [row["module"] for row in gating][:2] == ["stem", "blocks.0.conv1"]
    assert {row["activation gating"] for row in gating} == {"gated layer"}
    assert "batch norm 'bn' folded in" in gating[0]["notes"]


def test_a_factory_in_the_working_directory(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_for_cli.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(2, 3)\n")
    text = (folder / "spec.toml").read_text()
    start, end = text.index("[model]"), text.index("[", text.index("[model]") + 1)
    factory = '[model]\nsource = "factory"\nfactory = "mine_for_cli:net"\n'
    (tmp_path / "spec.toml").write_text(text[:start] + factory + text[end:])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    code, out, _ = run("index", "spec.toml")
    assert (code, out[:26]) == (0, "3 components in 1 modules;")


def test_ablate_again_finds_it_complete(run: Run, folder: Path) -> None:
    code, out, _ = run("ablate", folder / "spec.toml")
    assert code == 0
    assert out == f"Complete: 60 rows x 16 examples in {folder}/campaign.zarr\n"


def test_ablate_goes_on_where_it_stopped(run: Run, folder: Path, unfinished: Path) -> None:
    code, out, err = run("ablate", folder / "spec.toml", "--store", unfinished, "--quiet")
    assert (code, err) == (0, "")
    assert out == f"Complete: 60 rows x 16 examples in {unfinished}\n"
    whole, again = (stores.CampaignStore.open(path) for path in (folder / "campaign.zarr", unfinished))
    np.testing.assert_array_equal(again.outputs[:], whole.outputs[:])


def test_ablate_refuses_another_campaigns_store(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC.format(folder=folder, seed=5))
    code, out, err = run("ablate", tmp_path / "spec.toml")
    assert (code, out) == (4, "")
    assert err == (
        f"error: Campaign {folder}/campaign.zarr was made from something else. What differs (stored -> now):\n"
        "  plan.seed: 0 -> 5\n"
        "Give the original back, or name another store for the new campaign.\n"
    )


def test_ablate_with_other_versions(run: Run, folder: Path, unfinished: Path) -> None:
    metadata = unfinished / "zarr.json"
    header = json.loads(metadata.read_text())
    header["attributes"]["identity"]["versions"]["torch"] = "1.0"
    metadata.write_text(json.dumps(header))
    command = ("ablate", folder / "spec.toml", "--store", unfinished, "--quiet")
    code, _, err = run(*command)
    assert code == 4
    assert "versions.torch: 1.0 -> " in err
    assert "`coar ablate --accept-versions`" in err
    assert run(*command, "--accept-versions")[0] == 0


def test_ablate_stops_at_an_output_that_is_no_number(run: Run, folder: Path, tmp_path: Path) -> None:
    inputs = np.zeros((3, 1, 16, 16), dtype=np.float32)
    inputs[1, 0, 3, 3] = np.nan
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=[0, 1, 0], ids=["fine", "sick", "well"])
    text = SPEC.format(folder=folder, seed=0).split("[data]")[0].replace("campaign.zarr", "sick.zarr")
    (tmp_path / "spec.toml").write_text(f'{text}\n[data]\nsource = "arrays"\npath = "{tmp_path}/data.npz"\n')
    code, out, err = run("ablate", tmp_path / "spec.toml", "--store", tmp_path / "sick.zarr", "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("error: Output of keep row 0 on example 1 (id 'sick') is nan, expected a finite number.")


def test_status(run: Run, run_json: Callable[..., Any], folder: Path) -> None:
    store = folder / "campaign.zarr"
    code, out, err = run("status", store)
    assert (code, err) == (0, "")
    assert out == f"{store}: complete, 60 of 60 rows (100%), 3 of 3 blocks; 16 examples, 736 components.\n"
    found = run_json("status", store)
    assert found.pop("spec")["rows"] == 60
    assert found == {
        "store": str(store),
        "complete": True,
        "finished_rows": 60,
        "rows": 60,
        "finished_blocks": 3,
        "blocks": 3,
        "examples": 16,
        "components": 736,
    }


def test_status_of_an_unfinished_campaign(run: Run, unfinished: Path) -> None:
    code, out, _ = run("status", unfinished)
    assert code == 3
    assert out == f"{unfinished}: not finished, 40 of 60 rows (67%), 2 of 3 blocks; 16 examples, 736 components.\n"
    code, out, _ = run("status", unfinished, "--json")
    assert code == 3
    assert json.loads(out)["complete"] is False


def test_fit(run: Run, run_json: Callable[..., Any], unfinished: Path) -> None:
    target = unfinished.parent / "unfinished-attributions.zarr"
    code, out, err = run("fit", unfinished, "--quiet")
    assert (code, err) == (0, "")
    mean = coar.open_attributions(target).quality["correlation"].mean()
    assert out == (f"16 attributions from 40 rows in {target}. Held-out correlation, mean over examples: {mean:.3f}\n")
    found = run_json("fit", unfinished, "--quiet")
    assert found == {
        "store": str(target),
        "rows": 40,
        "examples": 16,
        "held_out_correlation": pytest.approx(mean),
    }


def test_fit_with_every_option(run: Run, unfinished: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    options = ("--method", "lasso", "--ablate-fraction", "0.05", "--fit-all", "--device", "cpu", "--quiet")
    code, out, err = run("fit", unfinished, "--out", target, *options)
    assert (code, err) == (0, "")
    assert out == f"16 attributions from 40 rows in {target}. No rows were held out.\n"
    identity = coar.open_attributions(target).header["identity"]
    assert (identity["method"], identity["held_out"]) == ("lasso", False)
    code, _, err = run("fit", unfinished, "--out", target, "--method", "forest")
    assert (code, err) == (2, "error: method is 'forest', expected one of ridge, ols, lasso.\n")


def test_fit_refuses_to_replace_another_fit_unasked(run: Run, unfinished: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    assert run("fit", unfinished, "--out", target, "--quiet")[0] == 0
    code, out, err = run("fit", unfinished, "--out", target, "--ridge", "3")
    assert (code, out) == (4, "")
    assert err.startswith(f"error: Attribution store {target} was made from something else.")
    assert "  ridge: chosen per example -> 3.0\n" in err
    assert run("fit", unfinished, "--out", target, "--ridge", "3", "--overwrite", "--quiet")[0] == 0
    assert (coar.open_attributions(target).quality["ridge"] == 3).all()


def test_fit_in_too_little_memory(run: Run, folder: Path, tmp_path: Path) -> None:
    code, _, err = run("fit", folder / "campaign.zarr", "--out", tmp_path / "a.zarr", "--memory-gib", "0.01")
    assert code == 2
    assert err.startswith("error: memory=10,737,418 bytes is too small to fit 736 components: at least ")


def test_evaluate(run: Run, run_json: Callable[..., Any], attributions: Path) -> None:
    found = run_json("evaluate", attributions, "--rows", "12", "--ablate-fraction", "0.1", "--seed", "3")
    assert (found["rows"], found["seed"], len(found["fractions"])) == (12, 3, 1)
    statistics = ["mean", "low", "high", "25%", "median", "75%", "share below 0.5", "spearman", "examples"]
    assert list(found["fractions"][0]) == ["ablate_fraction", *statistics]
    assert (found["fractions"][0]["ablate_fraction"], found["fractions"][0]["examples"]) == (0.1, 16)
    code, out, _ = run("evaluate", attributions, "--rows", "12", "--seed", "3")
    assert code == 0
    assert out.startswith("Correlation on 12 fresh keep-vectors; low and high: 95 % interval of the mean.\n")
    assert "0.050" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--seed", "0"],
            "error: seed=0 is the campaign's: its keep-vectors were used for fitting. Give another seed.",
        ),
        (["--ablate-fraction", "2"], "error: ablate_fraction is 2.0, expected a number between 0 and 1 (exclusive)."),
    ],
)
def test_evaluate_refuses(run: Run, attributions: Path, options: list[str], message: str) -> None:
    assert run("evaluate", attributions, "--rows", "12", *options) == (2, "", message + "\n")


def test_top(run: Run, run_json: Callable[..., Any], attributions: Path) -> None:
    opened = coar.open_attributions(attributions)
    name = opened.examples["id"][3]
    table = opened.top(3, 4)
    code, out, _ = run("top", attributions, "--id", name, "-k", "4")
    assert code == 0
    assert out.startswith(f"Example 3: id {name}, label {opened.examples['label'][3]}, group ")
    assert all(component in out for component in table["name"])
    found = run_json("top", attributions, "--example", "3", "-k", "4")
    assert [row["component"] for row in found] == table["component"].tolist()
    assert list(found[0]) == list(table)
    positive = run_json("top", attributions, "--example", "3", "-k", "4", "--sign", "positive")
    assert all(row["weight"] > 0 for row in positive)


def test_top_draws_a_figure(run: Run, attributions: Path, tmp_path: Path) -> None:
    figure = tmp_path / "new" / "top.png"
    assert run("top", attributions, "--example", "0", "--figure", figure)[0] == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--id", "train/digit-99999"], "error: No example with id 'train/digit-99999'. Did you mean 'train/digit-"),
        (["--example", "16"], "error: No example 16: positions are 0 to 15. Find one by id with locate([...])."),
        (["--example", "0", "-k", "0"], "error: k is 0, expected 1 to 736: there are 736 components."),
        (["--example", "0", "--sign", "up"], "error: No sign 'up'. Known: both, positive, negative."),
    ],
)
def test_top_refuses(run: Run, attributions: Path, options: list[str], message: str) -> None:
    code, out, err = run("top", attributions, *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --example or --id"),
        (["--example", "0", "--id", "a"], "give either --example or --id"),
        (["--example", "0", "--figure", "top.doc"], "--figure is top.doc; its name must end in one of"),
        (["--example", "first"], "Invalid value for '--example'"),
    ],
)
def test_top_refuses_wrong_usage(run: Run, attributions: Path, options: list[str], message: str) -> None:
    code, out, err = run("top", attributions, *options)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_ids_are_printed_as_they_are(
    run: Run, write_attributions: Callable[..., coar.Attributions], tmp_path: Path
) -> None:
    write_attributions([[1, 2]], tmp_path / "a.zarr", ids=["[/red]:cat:[b]"], groups=["[bold]"])
    code, out, _ = run("top", tmp_path / "a.zarr", "--example", "0", "-k", "1")
    assert code == 0
    assert out.startswith("Example 0: id [/red]:cat:[b], label 0, group [bold]\n")


def test_edit_and_report(run: Run, run_json: Callable[..., Any], attributions: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "fix.safetensors"
    changed, kept = ("low-horizontal", "high-vertical"), ("low-vertical", "high-horizontal")
    options = ["--ids-contain", "train/", "-k", "7", "--out", str(out_file)]
    for option, groups in (("--target-group", changed), ("--reference-group", kept)):
        options += [word for group in groups for word in (option, group)]
    opened = coar.open_attributions(attributions)
    target, reference = ([i for g in groups for i in opened.group(g, "train/")] for groups in (changed, kept))
    code, out, _ = run("edit", attributions, *options)
    assert code == 0
    assert out.startswith(f"<Edit: ablate 7 of 736 components at alpha=1, by COAR-Edit> -> {out_file}. Predicted ")
    expected = coar.coar_edit(opened, target, reference, k=7)
    assert coar.load_edit(out_file) == expected
    found = run_json("edit", attributions, *options)
    assert found["ids"] == list(expected.selection.ids)
    assert found["details"] == json.loads(json.dumps(dict(expected.details)))

    page = tmp_path / "report.html"
    assert run("report", attributions, "--out", page, "--edit", out_file) == (0, f"Report: {page}\n", "")
    text = page.read_text()
    assert "The edit" in text
    assert opened.header["identity"]["of"]["model"] in text


def test_infinite_scores_are_null_in_json(run_json: Callable[..., Any], attributions: Path, tmp_path: Path) -> None:
    found = run_json(
        "edit", attributions, "--target", "0", "--reference", "1", "-k", "3", "--out", tmp_path / "fix.safetensors"
    )
    assert found["details"]["scores"] == [None, None, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "error: The target set is empty: give the positions of at least one example."),
        (["--target", "0"], "error: The reference set is empty: give the positions of at least one example."),
        (["--target", "0", "--reference", "0"], "error: Examples [0] are in target and reference: each example can be"),
        (["--target-group", "low"], "error: No group 'low'."),
        (["--target", "0", "--reference", "1", "-k", "0"], "error: k is 0, expected 1 to 736, the number of component"),
        (
            ["--target", "0", "--reference", "1", "--direction", "up"],
            "error: direction is 'up', expected 'raise' or 'lower'.",
        ),
    ],
)
def test_edit_refuses(run: Run, attributions: Path, tmp_path: Path, options: list[str], message: str) -> None:
    code, out, err = run("edit", attributions, "--out", tmp_path / "fix.safetensors", *options)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert not (tmp_path / "fix.safetensors").exists()


def test_a_place_where_nothing_can_be_written(run: Run, attributions: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    out = tmp_path / "file" / "report.html"
    code, _, err = run("report", attributions, "--out", out)
    assert code == 1
    assert err.startswith("error: [Errno ")
    assert str(tmp_path / "file") in err


@pytest.mark.parametrize("command", ["evaluate", "top", "report"])
def test_attributions_that_are_not_there(run: Run, tmp_path: Path, command: str) -> None:
    options = {"top": ["--example", "0"], "report": ["--out", str(tmp_path / "r.html")]}.get(command, [])
    code, out, err = run(command, tmp_path / "none.zarr", *options)
    assert (code, out) == (2, "")
    assert err == (
        f"error: No attributions store at {tmp_path}/none.zarr: nothing is there. Check the path, or make one first.\n"
    )


def test_attributions_that_are_not_finished(run: Run, attributions: Path, tmp_path: Path) -> None:
    copied = tmp_path / "a.zarr"
    shutil.copytree(attributions, copied)
    (copied / "ledger" / "c" / "0" / "0").unlink()
    code, out, err = run("evaluate", copied)
    assert (code, out) == (3, "")
    assert err == (
        f"error: {copied}: only 0 of 1 blocks of examples are estimated. Run the same fit again to finish it.\n"
    )


def test_a_campaign_given_where_attributions_belong(run: Run, folder: Path) -> None:
    code, _, err = run("top", folder / "campaign.zarr", "--example", "0")
    assert code == 2
    assert err == (
        f"error: {folder}/campaign.zarr is no attributions store: its format is 'campaign'. Check the path.\n"
    )


def test_a_damaged_block(run: Run, unfinished: Path, tmp_path: Path) -> None:
    (unfinished / "outputs" / "c" / "1" / "0").unlink()
    code, out, err = run("status", unfinished)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {unfinished}: block 1 (rows 20 to 39) is damaged: the file of 'outputs' is gone.")


def test_all_problems_of_a_spec_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(
        """
rows = 0
ablate_fractoin = 0.05
output = "margn"
precision = "float16"

[model]
source = "torchvison"

[data]
source = "arrays"
path = "x.npz"
"""
    )
    code, out, err = run("ablate", tmp_path / "spec.toml")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == f"error: {tmp_path}/spec.toml: 6 problems"
    for start in (
        "rows: got 0, but it should be greater than or equal to 1",
        "ablate_fraction: missing. Give it.",
        "ablate_fractoin: unknown key. Did you mean 'ablate_fraction'?",
        "output: got 'margn', expected one of margin, logit, log_probability, loss, token_margin. Did",
        "precision: got 'float16', expected one of float32, float64",
        "model.source: got 'torchvison', expected one of digits, torchvision, timm, open_clip",
    ):
        assert any(start in line for line in lines[1:]), f"{start!r} is missing in\n{err}"


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read: No such file"), ("rows = = 1", "is no TOML")])
def test_a_spec_that_cannot_be_read(run: Run, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "spec.toml").write_text(content)
    for command in ("index", "ablate"):
        code, _, err = run(command, tmp_path / "spec.toml")
        assert code == 2
        assert err.startswith(f"error: {tmp_path}/spec.toml: 1 problem\n  1. {message}")


def test_a_spec_without_a_store(run: Run, folder: Path, tmp_path: Path) -> None:
    text = "\n".join(line for line in (folder / "spec.toml").read_text().splitlines() if not line.startswith("store"))
    (tmp_path / "spec.toml").write_text(text)
    code, _, err = run("ablate", tmp_path / "spec.toml")
    assert code == 2
    assert "store: missing. Name one in the spec, or pass store=." in err


def test_report_refuses_an_edit_of_another_index(run: Run, attributions: Path, tmp_path: Path) -> None:
    index = ablate.ComponentIndex.from_model(torch.nn.Linear(2, 3), ["linear_neuron"])
    coar.Edit(index.select([0])).save(tmp_path / "other.safetensors")
    page = tmp_path / "report.html"
    code, _, err = run("report", attributions, "--out", page, "--edit", tmp_path / "other.safetensors")
    assert code == 2
    assert "Give an edit of the same model." in err
    assert not page.exists()


def test_version(run: Run) -> None:
    assert run("--version") == (0, "coar 0.1.0\n", "")


def test_evaluate_at_several_fractions(run: Run, run_json: Callable[..., Any], attributions: Path) -> None:
    options = ["--rows", "4", "--ablate-fraction", "0.2", "--ablate-fraction", "0.0000001"]
    found = run_json("evaluate", attributions, *options)["fractions"]
    assert [row["ablate_fraction"] for row in found] == [0.2, 1e-7]
    assert found[:1] == run_json("evaluate", attributions, *options[:4])["fractions"]
    assert (found[1]["mean"], found[1]["examples"]) == (None, 0)
    code, out, _ = run("evaluate", attributions, *options)
    assert code == 0
    assert out.endswith(
        "At 1e-07, 16 of 16 examples have no correlation: their predicted or true outputs are the same in all rows.\n"
    )


def test_nearest(run: Run, run_json: Callable[..., Any], attributions: Path) -> None:
    opened = coar.open_attributions(attributions)
    table = opened.nearest(3, 2)
    code, out, _ = run("nearest", attributions, "--example", "3", "-k", "2")
    assert code == 0
    assert out.startswith(f"Example 3: id {opened.examples['id'][3]}, label ")
    assert all(name in out for name in table["id"])
    found = run_json("nearest", attributions, "--id", opened.examples["id"][3], "-k", "2")
    assert list(found[0]) == list(table)
    assert [row["example"] for row in found] == table["example"].tolist()
    assert run("nearest", attributions, "--example", "3", "-k", "16") == (
        2,
        "",
        "error: k is 16, expected 1 to 15: there are 15 other examples.\n",
    )


def test_compare(
    run: Run, run_json: Callable[..., Any], folder: Path, attributions: Path, tmp_path: Path, write_attributions: Any
) -> None:
    other = coar.fit(folder / "campaign.zarr", tmp_path / "b.zarr", ridge=5.0)
    expected = coar.compare(coar.open_attributions(attributions), other, k=7)
    code, out, _ = run("compare", attributions, tmp_path / "b.zarr", "-k", "7")
    assert code == 0
    assert out.startswith(f"{expected!r}\n")
    assert out.endswith("\nEstimated differently: ridge: chosen per example -> 5.0\n")
    found = run_json("compare", attributions, tmp_path / "b.zarr", "-k", "7")
    assert (found["examples"], found["k"]) == (16, 7)
    assert found["differences"] == ["ridge: chosen per example -> 5.0"]
    means = {row["measure"]: row["mean"] for row in found["measures"]}
    assert means == pytest.approx(expected.summary().set_index("measure")["mean"].to_dict())
    write_attributions([[1, 2]], tmp_path / "c.zarr")
    code, out, err = run("compare", attributions, tmp_path / "c.zarr")
    assert (code, out) == (2, "")
    assert err.endswith("Only attributions of the same components can be compared.\n")
