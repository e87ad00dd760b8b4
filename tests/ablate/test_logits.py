"""What a model returns: the logits are taken out of it by one rule, in the engine, in campaigns and when editing."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
import coar
from stores import StoreMismatchError

ONE, TWO = torch.arange(6.0).view(2, 3), torch.ones(2, 5)


@dataclass
class Answer:
    scores: Tensor
    hidden: Any = None


Heads = namedtuple("Heads", ["logits", "auxiliary"])  # as torchvision's GoogLeNet returns them


class Plain:
    def __init__(self) -> None:
        self.logits, self.other = ONE, TWO


@pytest.mark.parametrize(
    ("returned", "key"),
    [
        (ONE, None),
        ({"logits": ONE, "loss": TWO}, None),
        (OrderedDict(out=ONE), None),
        ({"a": TWO, "b": ONE}, "b"),
        (Answer(ONE), None),
        (Answer(ONE, TWO), "scores"),
        (Heads(ONE, TWO), None),
        (Heads(TWO, ONE), 1),
        (Heads(TWO, ONE), "auxiliary"),
        ((ONE, None), None),
        ([ONE], None),
        ((TWO, ONE), 1),
        ((TWO, ONE), -1),
        (Plain(), None),
    ],
)
def test_the_logits_are_taken_by_name_or_where_there_is_one_tensor(returned: Any, key: str | int | None) -> None:
    assert ablate.logits_of(returned, key) is ONE


@pytest.mark.parametrize(
    ("returned", "key", "message"),
    [
        (
            {"out": ONE, "aux": TWO},
            None,
            "The model returns a dict of 'out' (2, 3), 'aux' (2, 5), and which of it are the logits is not told. Give "
            "output_key='out' or output_key='aux', or wrap the model so that it returns its logits.",
        ),
        (
            (ONE, (TWO, TWO)),
            None,
            "The model returns a tuple of 0 (2, 3), 1 (tuple), and which of it are the logits is not told. Give "
            "output_key=0, or wrap the model so that it returns its logits.",
        ),
        (
            {"out": ONE},
            "aux",
            "The logits were looked for at 'aux'. The model returns a dict of 'out' (2, 3): it has no such entry. Give "
            "output_key='out', or wrap the model so that it returns its logits.",
        ),
        (
            {"logits": (ONE, TWO)},
            None,
            "The logits were looked for at 'logits'. The model returns a dict of 'logits' (tuple): it holds a tuple "
            "there, expected a tensor. Wrap the model so that it returns its logits.",
        ),
        (
            ONE,
            "logits",
            "output_key is 'logits', but the model returns one tensor of shape (2, 3): there is nothing to choose "
            "from. Leave output_key out.",
        ),
        (
            7,
            None,
            "The model returns an int, which holds no tensor. Wrap the model so that it returns its logits.",
        ),
    ],
)
def test_what_is_not_told_apart_is_refused_with_what_there_is(
    returned: Any, key: str | int | None, message: str
) -> None:
    with pytest.raises(ablate.DataError) as caught:
        ablate.logits_of(returned, key)
    assert str(caught.value) == message


class Wrapped(nn.Module):
    """A network whose logits are wrapped into something."""

    def __init__(self, inner: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = inner, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


def _dict(logits: Tensor) -> dict[str, Tensor]:
    return {"logits": logits, "twice": 2 * logits}


def _two(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits, 2 * logits


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize(("wrap", "key", "factor"), [(_dict, None, 1), (_dict, "twice", 2), (_two, 0, 1), (_two, 1, 2)])
def test_the_engine_sees_the_logits_in_every_mode(
    mlp: nn.Module, data: tuple[Tensor, Tensor], wrap: Callable[[Tensor], Any], key: str | int | None, factor: int
) -> None:
    kinds = ["linear_neuron"]
    plain = ablate.Engine(mlp, ablate.ComponentIndex.from_model(mlp, kinds))
    model = Wrapped(mlp, wrap)
    index = ablate.ComponentIndex.from_model(model, kinds)
    keep = ablate.KeepPlan(len(index), 6, 0.3, seed=2).take(0, 6)
    gates = torch.rand(5, len(index), generator=torch.Generator().manual_seed(1))
    expected = plain.outputs(keep, *data) * factor
    for mode in ("weight", "activation"):
        engine = ablate.Engine(model, index, output_key=key, mode=mode)
        torch.testing.assert_close(engine.outputs(keep, *data), expected)
    torch.testing.assert_close(engine.gate_gradients(gates, *data)[1], plain.gate_gradients(gates, *data)[1] * factor)
    torch.testing.assert_close(engine.leave_one_out(*data), plain.leave_one_out(*data) * factor)
    torch.testing.assert_close(ablate.reference_outputs(model, index, keep, *data, output_key=key), expected)
    assert not model._forward_hooks


def test_an_engine_names_the_choices(mlp: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    model = Wrapped(mlp, _two)
    engine = ablate.Engine(model, ablate.ComponentIndex.from_model(model, ["linear_neuron"]))
    with pytest.raises(ablate.DataError, match=r"returns a tuple of 0 \(2, 3\), 1 \(2, 3\), .* Give output_key=0 or"):
        engine.check(*data)


def test_a_campaign_keeps_which_output_it_measured(mlp: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    model, place = Wrapped(mlp, _two), MemoryStore()
    settings: dict[str, Any] = {"model": model, "data": data, "rows": 6, "ablate_fraction": 0.3}
    settings["components"] = {"kinds": ["linear_neuron"]}
    once = ablate.run(ablate.CampaignSpec(**settings, output_key=0), place, progress=False).outputs[:]
    twice = ablate.run(ablate.CampaignSpec(**settings, output_key=1), MemoryStore(), progress=False).outputs[:]
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-5)
    with pytest.raises(StoreMismatchError, match="output_key"):
        ablate.run(ablate.CampaignSpec(**settings, output_key=1), place, progress=False)


def test_a_spec_file_names_the_output(tmp_path: Path) -> None:
    text = 'rows = 4\nablate_fraction = 0.1\noutput_key = "out"\n'
    text += 'model = {source = "digits"}\ndata = {source = "digits", split = "test"}\n'
    (tmp_path / "spec.toml").write_text(text)
    spec = ablate.CampaignSpec.from_file(tmp_path / "spec.toml")
    assert spec.settings.output_key == "out"
    assert spec.describe()["output_key"] == "out"


@pytest.mark.parametrize(("wrap", "key"), [(_dict, None), (_two, 0)])
def test_editing_and_predictions_take_the_same_logits(
    mlp: nn.Module, data: tuple[Tensor, Tensor], wrap: Callable[[Tensor], Any], key: int | None
) -> None:
    model = Wrapped(mlp, wrap).eval()
    inputs, labels = data
    request = coar.Request(inputs, labels)
    selection = ablate.ComponentIndex.from_model(model, ["linear_neuron"]).everything()
    edit = coar.get_editor("finetune", rate=1e-2, steps=3).edit(model, request, selection, output_key=key)
    plain = ablate.ComponentIndex.from_model(mlp, ["linear_neuron"]).everything()
    expected = coar.get_editor("finetune", rate=1e-2, steps=3).edit(mlp, request, plain).apply(mlp)
    for one, two in zip(edit.apply(model).parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two)
    report = coar.evaluate_edit(model, edit, {"all": ablate.Examples(inputs, labels)}, output_key=key)
    assert report.sets["all"].kept.base.tolist() == mlp(inputs).argmax(1).tolist()
    assert report.sets["all"].kept.edited[0].tolist() == expected(inputs).argmax(1).tolist()


def test_a_classifier_of_transformers_runs_as_it_is(data: tuple[Tensor, Tensor]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    images, labels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)), data[1]
    index = ablate.ComponentIndex.from_model(model, ["attention_head"])
    with torch.no_grad():
        expected = ablate.Margin()(model(images).logits, labels)
    found = ablate.Engine(model, index).outputs(np.ones((1, 2), dtype=bool), images, labels)
    torch.testing.assert_close(found[0], expected)
    attributions = coar.estimate(model, (images, labels), index=index, passes=4, quality_rows=0)
    assert attributions.weights[:].shape == (5, 2)
    edit = coar.get_editor("finetune", rate=1e-3, steps=2).edit(model, coar.Request(images, labels))
    report = coar.evaluate_edit(model, edit, {"all": ablate.Examples(images, labels)})
    assert len(report.sets["all"].kept) == 5
