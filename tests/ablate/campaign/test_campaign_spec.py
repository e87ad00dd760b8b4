"""Specs: every form of model, data and output; every problem named at once; a description that can be run again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from zarr.storage import MemoryStore

import ablate
from ablate.engine.engine import PRECISIONS
from ablate.loading import read_checkpoint

MODELS = "digits, torchvision, timm, open_clip, transformers, packaged, factory"
DATA = "digits, arrays, imagefolder, torchvision, datasets, wilds, text, factory"
OUTPUTS = "margin, logit, log_probability, loss, value, token_margin"

TOML = """
rows = 6
ablate_fraction = 0.25
seed = 4
output = "logit"
precision = "float64"
batch_size = 3
block_rows = 4
device = "cpu"
store = "runs/x.zarr"

[model]
source = "factory"
factory = "spec_nets:net"

[data]
source = "arrays"
path = "{path}"

[components]
kinds = ["linear_neuron"]
exclude = ["4"]
"""

FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
"""


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Tensor) -> Path:
    (tmp_path / "spec_nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "spec_nets", raising=False)
    np.savez(
        tmp_path / "x.npz", inputs=inputs.numpy(), targets=[0, 1, 2, 0, 1], ids=list("abcde"), groups=list("xxyyy")
    )
    path = tmp_path / "campaign.toml"
    path.write_text(TOML.format(path=tmp_path / "x.npz"))
    return path


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(6))


def _spec(**values: Any) -> ablate.CampaignSpec:
    return ablate.CampaignSpec(**{"rows": 6, "ablate_fraction": 0.25, **values})


def test_a_file_says_everything(toml: Path) -> None:
    spec = ablate.CampaignSpec.from_file(toml)
    settings = spec.settings
    assert (settings.rows, settings.ablate_fraction, settings.seed) == (6, 0.25, 4)
    assert (settings.precision, settings.batch_size, settings.block_rows) == ("float64", 3, 4)
    assert (settings.device, settings.store, spec.output) == ("cpu", "runs/x.zarr", "logit")
    model, examples = spec.load()
    assert spec.load() == (model, examples), "loaded once"
    assert examples.ids == tuple("abcde")
    assert [port.module for port in spec.make_index(model).ports] == ["0", "2"]
    assert spec.loadable


def test_defaults() -> None:
    spec = _spec(model={"source": "digits"}, data={"source": "digits", "split": "test"})
    assert spec.describe() == {
        "rows": 6,
        "passes": 100,
        "ablate_fraction": 0.25,
        "seed": 0,
        "precision": "float32",
        "ablation": "zero",
        "ablation_factor": None,
        "mode": "auto",
        "output_key": None,
        "batch_size": None,
        "memory_budget": None,
        "speed": {"fold": None, "channels_last": None, "compile": None, "attention": None},
        "block_rows": 64,
        "device": "auto",
        "store": None,
        "components": {"preset": None, "kinds": None, "include": ["*"], "exclude": []},
        "model": {"source": "digits", "seed": 0, "cache": None},
        "data": {"source": "digits", "seed": 0, "train_per_group": 0, "test_per_group": 0, "split": "test"},
        "output": "margin",
    }


def test_the_description_can_be_run_again(toml: Path) -> None:
    spec = ablate.CampaignSpec.from_file(toml)
    description = json.loads(json.dumps(spec.describe()))
    again = ablate.CampaignSpec.from_dict(description, "the store")
    assert again.describe() == spec.describe()
    model, examples = spec.load()
    other_model, other_examples = again.load()
    assert ablate.model_hash(other_model) == ablate.model_hash(model)
    assert other_examples.hash == examples.hash
    assert again.make_index(other_model) == spec.make_index(model)


Form = Callable[[Tensor], Any]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, [0, 1, 2, 0, 1]),
        lambda x: (x.numpy(), np.array([0, 1, 2, 0, 1])),
        lambda x: TensorDataset(x, torch.tensor([0, 1, 2, 0, 1])),
        lambda x: ablate.Examples(x, [0, 1, 2, 0, 1]),
        lambda x: list(zip(x, [0, 1, 2, 0, 1], strict=True)),
    ],
)
def test_data_may_be_python_objects(form: Form, inputs: Tensor, mlp: nn.Module) -> None:
    spec = _spec(model=mlp, data=form(inputs))
    model, examples = spec.load()
    assert model is mlp
    assert examples.hash == ablate.Examples(inputs, [0, 1, 2, 0, 1]).hash
    assert not spec.loadable


def test_tables_and_objects_may_be_mixed(toml: Path, inputs: Tensor, mlp: nn.Module) -> None:
    table = {"source": "arrays", "path": str(toml.parent / "x.npz")}
    model, examples = _spec(model=mlp, data=table).load()
    assert model is mlp
    assert examples.ids == tuple("abcde")

    factory = {"source": "factory", "factory": "spec_nets:net"}
    model, examples = _spec(model=factory, data=(inputs, [0, 1, 2, 0, 1])).load()
    assert isinstance(model, nn.Sequential)
    assert torch.equal(examples.inputs(), inputs)

    spec = _spec(model=factory, data=table, output=ablate.Logit())
    assert not spec.loadable, "an output object has no name that a store could load"
    assert isinstance(spec.output, ablate.Logit)
    assert _spec(model=factory, data=table, output="logit").loadable


def test_every_named_model_can_be_loaded(toml: Path) -> None:
    arrays = {"source": "arrays", "path": str(toml.parent / "x.npz")}
    for table, kind, components in (
        ({"source": "torchvision", "name": "squeezenet1_1", "classes": 3}, "conv_filter", 2944),
        ({"source": "timm", "name": "test_vit", "classes": 3}, "linear_neuron", 3072),
        ({"source": "factory", "factory": "ablate.digits:ResidualCNN"}, "conv_filter", 736),
    ):
        spec = _spec(model=table, data=arrays)
        model, examples = spec.load()
        index = spec.make_index(model).expect(components)
        assert {port.kind for port in index.ports} == {kind}
        assert len(examples) == 5
        assert spec.loadable


def test_an_index_may_be_given(inputs: Tensor, mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp, include=["2"])
    assert _spec(model=mlp, data=(inputs, [0] * 5), index=index).make_index(mlp) is index
    spec = _spec(model={"source": "digits"}, data={"source": "digits", "split": "test"}, index=index)
    assert not spec.loadable, "the description says nothing of the index"


def test_objects_are_described_by_their_type(inputs: Tensor, mlp: nn.Module) -> None:
    description = _spec(model=mlp, data=(inputs, [0] * 5), output=ablate.Logit()).describe()
    assert description["model"] == {"source": "python", "type": "torch.nn.modules.container.Sequential"}
    assert description["data"] == {"source": "python", "type": "builtins.tuple"}
    assert description["output"] == "logit"


FIVE_MISTAKES = (
    "{where}: 5 problems\n"
    "  1. rows: got 0, but it should be greater than or equal to 1.\n"
    "  2. ablate_fraction: missing. Give it.\n"
    f"  3. model.source: got 'timmm', expected one of {MODELS}. Did you mean 'timm'?\n"
    "  4. blockrows: unknown key. Did you mean 'block_rows'?\n"
    f"  5. output: got 'marginn', expected one of {OUTPUTS}. Did you mean 'margin'?"
)


def test_five_mistakes_in_a_file_are_five_messages(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(
        'rows = 0\nblockrows = 4\noutput = "marginn"\n'
        '[model]\nsource = "timmm"\nname = "test_resnet"\n[data]\nsource = "digits"\nsplit = "test"\n'
    )
    with pytest.raises(ablate.SpecError) as caught:
        ablate.CampaignSpec.from_file(path)
    assert str(caught.value) == FIVE_MISTAKES.format(where=path)
    assert len(caught.value.problems) == 5


def test_five_mistakes_in_python_are_five_messages(inputs: Tensor) -> None:
    with pytest.raises(ablate.SpecError) as caught:
        ablate.CampaignSpec(
            rows=0,
            blockrows=4,
            output="marginn",
            model={"source": "timmm", "name": "test_resnet"},
            data=(inputs, [0] * 5),
        )
    assert str(caught.value) == FIVE_MISTAKES.format(where="CampaignSpec")


DIGITS: dict[str, Any] = {"source": "digits"}
TEST: dict[str, Any] = {"source": "digits", "split": "test"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"ablate_fraction": 1}, "ablate_fraction: got 1, but it should be less than 1."),
        (
            {"ablate_fraction": "a"},
            "ablate_fraction: got 'a', but it should be a valid number, unable to parse string as",
        ),
        ({"ablate_fraction": [0.1, 2]}, "ablate_fraction.1: got 2, but it should be less than 1."),
        ({"ablate_fraction": [0.1, 0.1]}, "ablate_fraction: got [0.1, 0.1], expected numbers that differ."),
        ({"ablate_fraction": []}, "ablate_fraction: got [], but tuple should have at least 1 item"),
        ({"rows": 2.5}, "rows: got 2.5, but it should be a valid integer, got a number with a fractional part."),
        ({"seed": -1}, "seed: got -1, but it should be greater than or equal to 0."),
        (
            {"precision": "float16"},
            f"precision: got 'float16', expected one of {', '.join(PRECISIONS)}. Did you mean '",
        ),
        ({"precision": 32}, f"precision: got 32, expected one of {', '.join(PRECISIONS)}."),
        ({"output": 3}, f"output: got 3, expected one of {OUTPUTS}."),
        (
            {"output": ablate.Margin},
            f"output: got <class 'ablate.outputs.Margin'>, expected one of {OUTPUTS}.",
        ),
        ({"device": "cudaa"}, "device: got 'cudaa', expected auto, cpu, cuda or cuda:0, cuda:1, ..."),
        (
            {"components": {"kinds": ["conv_filters"]}},
            f"components.kinds: got 'conv_filters', expected one of {', '.join(ablate.component_kinds())}. "
            "Did you mean 'conv_filter'?",
        ),
        ({"components": {"includes": []}}, "components.includes: unknown key. Did you mean 'include'?"),
        ({"model": "resnet18"}, "model: got 'resnet18', expected an nn.Module or a table with a source."),
        ({"model": nn.Linear}, "model: got <class 'torch.nn.modules.linear.Linear'>, expected an nn.Module or a table"),
        ({"model": {"name": "resnet18"}}, "model: missing source. Give source = '...'."),
        ({"model": {"source": "timm"}}, "model.name: missing. Give it."),
        (
            {"model": {"source": "timm", "name": "x", "clases": 3}},
            "model.clases: unknown key. Did you mean 'classes'?",
        ),
        (
            {"model": {"source": "timm", "name": "x", "classes": 1}},
            "model.classes: got 1, but it should be greater than or equal to 2.",
        ),
        (
            {"data": {"source": "imagefolders", "path": "x"}},
            f"data.source: got 'imagefolders', expected one of {DATA}. Did you mean 'imagefolder'?",
        ),
        ({"data": "x.npz"}, "data: got 'x.npz', expected (inputs, targets), a Dataset, Examples or a table with a"),
        ({"data": DIGITS}, "data: give either split, or train_per_group and test_per_group."),
        (
            {"data": {"source": "digits", "split": "tset"}},
            "data.split: got 'tset', but it should be 'train', 'validation' or 'test'.",
        ),
        ({"index": "x"}, "index: got 'x', but it should be an instance of ComponentIndex."),
        ({"zzz": 1}, "zzz: unknown key. Remove it."),
    ],
)
def test_one_mistake_is_one_message(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ablate.SpecError) as caught:
        _spec(**({"model": DIGITS, "data": TEST} | values))
    assert str(caught.value).startswith(f"CampaignSpec: 1 problem\n  1. {problem}")
    assert len(caught.value.problems) == 1


def test_large_values_are_not_printed_whole(inputs: Tensor) -> None:
    with pytest.raises(ablate.SpecError) as caught:
        _spec(model=inputs, data=TEST)
    assert len(str(caught.value)) < 250


def test_an_index_beside_components_is_ambiguous(inputs: Tensor, mlp: nn.Module) -> None:
    index = ablate.ComponentIndex.from_model(mlp)
    with pytest.raises(ablate.SpecError) as caught:
        _spec(model=mlp, data=(inputs, [0] * 5), index=index, components={"kinds": ["linear_neuron"]})
    assert str(caught.value) == ("CampaignSpec: 1 problem\n  1. components: given beside index. Give one of the two.")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rows = ", r"is no TOML: Invalid value \(at end of document\)"),
        ("[model", "is no TOML: "),
        ('model = "resnet18"', r"model: got 'resnet18', expected a table with a source\."),
        ("data = [1, 2]", r"data: got \[1, 2\], expected a table with a source\."),
        ('where = "here"', r"where: unknown key\. Remove it\."),
        ("index = 3", r"index: unknown key\. Remove it\."),
    ],
)
def test_files_that_are_no_specs(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ablate.SpecError, match=rf"(?s)^{path}: \d problems?\n.*  \d\. {problem}"):
        ablate.CampaignSpec.from_file(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ablate.SpecError) as caught:
        ablate.CampaignSpec.from_file(tmp_path / "nothing.toml")
    assert str(caught.value) == (f"{tmp_path}/nothing.toml: 1 problem\n  1. cannot be read: No such file or directory")


def test_a_description_of_python_objects_cannot_be_loaded(inputs: Tensor, mlp: nn.Module) -> None:
    description = _spec(model=mlp, data=(inputs, [0] * 5)).describe()
    with pytest.raises(ablate.SpecError) as caught:
        ablate.CampaignSpec.from_dict(description, "x.zarr")
    assert str(caught.value) == (
        "x.zarr: 2 problems\n"
        f"  1. model.source: got 'python', expected one of {MODELS}.\n"
        f"  2. data.source: got 'python', expected one of {DATA}."
    )


def test_a_missing_checkpoint_is_named_when_loading(tmp_path: Path) -> None:
    with pytest.raises(ablate.LoadError, match=rf"^No checkpoint at {tmp_path}/x\.pt\. Give the path"):
        read_checkpoint(tmp_path / "x.pt")
    model = {"source": "timm", "name": "test_resnet", "checkpoint": str(tmp_path / "x.pt")}
    with pytest.raises(ablate.LoadError, match=rf"^No checkpoint at {tmp_path}/x\.pt\. Give the path"):
        _spec(model=model, data=TEST).load()


def test_how_it_runs_is_checked_with_everything_else() -> None:
    with pytest.raises(ablate.SpecError) as caught:
        _spec(
            model=nn.Linear(2, 2),
            data=(torch.zeros(1, 2), [0]),
            ablation="scale",
            mode="weigth",
            speed={"compil": True, "attention": "mth"},
            memory_budget=0,
        )
    assert caught.value.problems == (
        "memory_budget: got 0, but it should be greater than or equal to 1.",
        "speed.compil: unknown key. Did you mean 'compile'?",
        "mode: got 'weigth', expected one of auto, weight, activation. Did you mean 'weight'?",
        "ablation_factor: missing. Give it with ablation = 'scale', and only then.",
        "speed.attention: got 'mth', expected one of math, flash, efficient, cudnn. Did you mean 'math'?",
    )


def test_the_engine_runs_as_the_spec_says(mlp: nn.Module) -> None:
    data = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ablation": "scale", "ablation_factor": 0.5}, "scale 0.5"),
        ({"ablation": "mean"}, f"mean over {ablate.Examples(*data).hash}"),
        ({"ablation": ablate.ScaleAblation(2)}, "scale 2.0"),
    ]
    for values, described in cases:
        spec = ablate.CampaignSpec(model=mlp, data=data, rows=3, ablate_fraction=0.2, **values)
        store = ablate.run(spec, MemoryStore(), progress=False)
        assert store.header["identity"]["ablation"] == described
        engine = ablate.Engine(mlp, spec.make_index(mlp), ablation=spec.make_engine(mlp, spec.make_index(mlp)).ablation)
        assert torch.equal(torch.from_numpy(store.outputs[:]), engine.outputs(store.keep[:], *data))


def test_the_same_file_may_say_how_to_edit(tmp_path: Path) -> None:
    text = (
        'rows = 4\nablate_fraction = 0.5\n[model]\nsource = "digits"\n'
        '[data]\nsource = "digits"\ntrain_per_group = 2\ntest_per_group = 2\n'
    )
    plain, both = tmp_path / "plain.toml", tmp_path / "both.toml"
    plain.write_text(text)
    both.write_text(f'{text}[edit]\nmethod = "finetune"\n')
    assert ablate.CampaignSpec.from_file(both).describe() == ablate.CampaignSpec.from_file(plain).describe()
