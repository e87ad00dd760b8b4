"""Where to edit: a planted layer is found, ties go to the first, leaks are refused, every number can be recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coar
from ablate import ComponentIndex, Examples, Selection
from ablate.errors import UnknownNameError
from coar.editing.abstract import Editor, Found
from coar.editing.edits.covered import covered
from coar.editing.edits.operations import Delta
from coar.editing.judging.where_search import LayerSearch, search_layers
from coar.editing.log import EditLog
from coar.editing.request import Request
from coar.editing.training.descent import Descent, descend
from coar.editing.where.layers import default_layer_kinds, layers_of, windows


@dataclass(frozen=True, kw_only=True)
class FewSteps(Editor):
    """Some steps of gradient descent on the cross-entropy; notes where it was asked to edit."""

    name: ClassVar[str] = "few-steps"
    title: ClassVar[str] = "Few steps"
    source: ClassVar[str] = "none"
    needs: ClassVar[tuple[str, ...]] = ("labels",)

    rate: float = 0.5
    steps: int = 20

    def find(self, model: nn.Module, selection: Selection, request: Request, log: EditLog) -> Found:
        where = covered(selection, model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert request.labels is not None
        labels = request.labels
        plan = Descent(optimizer="sgd", rate=self.rate, steps=self.steps)
        descend(model, where, lambda: F.cross_entropy(model(request.inputs), labels), plan, log)
        return Found(Delta.between(before, dict(model.named_parameters()), where))


class Lanes(nn.Module):
    """Four linear layers beside each other; only those in `heard` influence the logits."""

    def __init__(self, heard: tuple[int, ...]) -> None:
        super().__init__()
        self.heard = heard
        self.lanes = nn.ModuleList(nn.Linear(4, 6) for _ in range(4))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        # every lane runs; those that are not heard have the weight 0
        hidden = sum(torch.tanh(lane(x)) * float(i in self.heard) for i, lane in enumerate(self.lanes))
        logits: Tensor = self.head(hidden)
        return logits


def _lanes(heard: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(1)
    return Lanes(heard).eval()


def _groups(model: nn.Module, count: int = 3) -> dict[str, Examples]:
    """Two groups, each of examples around one point that should get a class they do not have."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name in ("a", "b"):
        inputs = torch.randn(1, 4, generator=generator) + 0.1 * torch.randn(count, 4, generator=generator)
        with torch.no_grad():
            wrong = (model(inputs).argmax(1) + 1) % 3
        found[name] = Examples(inputs, wrong, [f"{name}{i}" for i in range(count)])
    return found


def _ordinary() -> Examples:
    return Examples(
        torch.randn(8, 4, generator=torch.Generator().manual_seed(5)) * 2, torch.zeros(8, dtype=torch.int64)
    )


def _search(model: nn.Module, **options: Any) -> LayerSearch:
    options = {"kinds": ["module"], "window": 1, **options}
    return search_layers(model, FewSteps(), _groups(model), _ordinary(), **options)


@pytest.mark.parametrize("lane", [0, 2, 3])
@pytest.mark.parametrize("criterion", ["hypervolume", "min"])
def test_the_only_layer_that_influences_the_logits_wins(lane: int, criterion: Any, untouched: Any) -> None:
    model = _lanes((lane,))
    with untouched(model):
        found = _search(model, criterion=criterion)
    assert found.chosen is not None
    assert found.chosen.layers == (f"lanes.{lane}",)
    assert set(found.selection.table()["module"]) == {f"lanes.{lane}"}
    deaf = found.places[found.places["place"] != found.chosen.name]
    assert (deaf["hypervolume"] == 0).all()  # a layer that is not heard corrects nothing
    assert found.places["chosen"].sum() == 1


@pytest.mark.parametrize(("lane", "first"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_a_window_with_the_layer_wins_the_first_of_equal_ones(lane: int, first: int) -> None:
    found = _search(_lanes((lane,)), window=2)
    assert found.chosen is not None
    assert found.chosen.layers == (f"lanes.{first}", f"lanes.{first + 1}")


def test_equal_scores_give_the_first() -> None:
    found = _search(_lanes(()))
    assert found.places["hypervolume"].tolist() == [0, 0, 0, 0]
    assert found.chosen is not None
    assert found.chosen.layers == ("lanes.0",)
    assert found.protocol == (
        "Searched 4 windows of 1 layer (module); 6 single-example edits in 2 groups per place and setting, each "
        "judged on the rest of its group and on 8 ordinary examples. Criterion: largest hypervolume of its points, "
        "then min(generalisation, locality), then the first; chosen: module lanes.0. These examples chose the place: "
        "report results on others."
    )


def test_greedy_adds_the_layers_that_help() -> None:
    found = _search(_lanes((2,)), how="greedy")
    assert found.chosen is not None
    assert found.chosen.layers == ("lanes.2",)  # with another lane it is not better
    assert len(found.places) == 4 + 3
    alone = found.places.set_index("layers")["hypervolume"]
    assert (alone[[f"lanes.2, lanes.{i}" for i in (0, 1, 3)]] == alone["lanes.2"]).all()


def test_greedy_stops_at_the_most_layers_and_without_any() -> None:
    assert len(_search(_lanes((0, 1)), how="greedy", most=1).places) == 4
    found = _search(_lanes(()), how="greedy")
    assert found.chosen is None
    assert "none is better than no edit" in found.protocol
    assert repr(found) == "<LayerSearch: nothing better than no edit, of 4 places>"
    with pytest.raises(coar.EditError, match="No layer is better than no edit"):
        _ = found.selection


def test_points_are_those_of_edits_by_hand() -> None:
    model, strengths = _lanes((0, 1, 2, 3)), (0.5, 1.0)
    groups, ordinary = _groups(model), _ordinary()
    settings: Mapping[str, Editor] = {"slow": FewSteps(rate=0.05), "fast": FewSteps(rate=0.5)}
    found = search_layers(model, settings, groups, ordinary, kinds=["module"], window=2, strengths=strengths)
    assert [point.name for point in found.curve.points[:4]] == [
        f"{name}, alpha {alpha:g}" for name in settings for alpha in strengths
    ]
    place = windows(layers_of(model, ["module"]), 2)[1]
    point = next(p for p in found.curve.points if (p.method, p.name) == (place.name, "fast, alpha 0.5"))
    general, local, success = [], [], []
    with torch.no_grad():
        base = model(ordinary.inputs()).argmax(1)
    for examples in groups.values():
        right = np.zeros((len(examples), len(examples)), dtype=bool)
        for i in range(len(examples)):
            wish = Request(examples.inputs(i, i + 1), examples.targets[i : i + 1])
            edited = settings["fast"].edit(model, wish, place.selection).at(0.5).apply(model)
            with torch.no_grad():
                right[i] = (edited(examples.inputs()).argmax(1) == examples.targets).numpy()
                local.append(float((edited(ordinary.inputs()).argmax(1) == base).float().mean()))
        others = right[~np.eye(len(examples), dtype=bool)]
        general.append(others.mean())
        success += np.diagonal(right).tolist()
    assert point.generalisation == pytest.approx(np.mean(general))
    assert point.locality == pytest.approx(np.mean(local))
    assert point.success == pytest.approx(np.mean(success))
    kept = found.predictions[place.name, "fast, alpha 0.5"]
    assert kept.point(point.name) == point
    rows = found.places.set_index("place")
    own = [(p.locality, p.generalisation) for p in found.curve.points if p.method == place.name]
    assert rows.loc[place.name, "hypervolume"] == coar.metrics.hypervolume(own)
    assert rows.loc[place.name, "min_rate"] == max(min(pair) for pair in own)
    assert len(found.front) == len(found.curve.front)


def test_search_examples_must_not_be_test_examples() -> None:
    model = _lanes((0,))
    groups, ordinary = _groups(model), _ordinary()
    test = Examples(torch.cat([torch.randn(1, 4), groups["b"].inputs(1, 2)]), [0, 0], ["new", "leaked"])
    with pytest.raises(coar.EditError) as refused:
        search_layers(model, FewSteps(), groups, ordinary, kinds=["module"], test=test)
    assert str(refused.value) == (
        "Example 'b1' of group 'b' is test example 'leaked': the place would be chosen with what it is judged on. "
        "Search with other examples."
    )
    with pytest.raises(coar.EditError) as refused:
        search_layers(model, FewSteps(), groups, ordinary, kinds=["module"], test=[_ordinary().take([3])])
    assert str(refused.value).startswith("Example '3' of locality is test example '3': ")
    found = search_layers(model, FewSteps(), groups, ordinary, kinds=["module"], window=4, test=test.take([0]))
    assert found.chosen is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, "There are 4 layers of kind 'module', too few for a window of 5."),
        ({"window": 0}, "window is 0, expected at least 1 layer."),
        ({"kinds": []}, "kinds is [], expected a list of some of: ffn, attention, residual, module."),
        ({"kinds": ["ffn"]}, "This Lanes has no layer of kind 'ffn'. Leave it out of kinds."),
        (
            {"strengths": (1.0, 2.0), "criterion": "eye", "how": "slowly", "most": 0},
            "This search cannot work: strengths are [1.0, 2.0], expected more than 0, at most 1; criterion is 'eye', "
            "expected 'hypervolume' or 'min'; how is 'slowly', expected 'windows' or 'greedy'; most is 0, expected at "
            "least 1, and only with how='greedy'.",
        ),
        ({"strengths": ()}, "This search cannot work: strengths are [], expected at least one, all distinct."),
    ],
)
def test_refuses(options: Any, message: str) -> None:
    with pytest.raises(coar.EditError) as refused:
        _search(_lanes((0,)), **options)
    assert str(refused.value) == message


def test_refuses_groups_in_which_nothing_can_generalise() -> None:
    model = _lanes((0,))
    with pytest.raises(coar.EditError) as refused:
        search_layers(model, {}, _groups(model, 1), _ordinary())
    assert str(refused.value) == (
        "This search cannot work: editor holds no method; no group has two examples, so nothing can generalise."
    )
    with pytest.raises(UnknownNameError, match="No kind of layer 'conv'"):
        _search(model, kinds=["conv"])


def test_the_layers_of_a_vision_transformer() -> None:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=8, depth=4, num_heads=2
    ).eval()
    assert default_layer_kinds(model) == ("ffn", "attention")
    layers = layers_of(model, ["ffn", "attention"])
    assert [place.name for place in layers[:2]] == ["ffn blocks.0.mlp", "ffn blocks.1.mlp"]
    assert len(layers) == 8
    weights = covered(layers[2].selection, model)
    assert set(weights) == {"blocks.2.mlp.fc1.weight", "blocks.2.mlp.fc2.weight"}
    assert all(mask.all() for mask in weights.values())  # all of both
    weights = covered(layers[5].selection, model)
    assert set(weights) == {"blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight"}
    assert all(mask.all() for mask in weights.values())
    names = [place.name for place in windows(layers, 3)]
    assert names == [
        f"{kind} blocks.{i}.{part} to blocks.{i + 2}.{part}"
        for kind, part in (("ffn", "mlp"), ("attention", "attn"))
        for i in range(2)
    ]
    mixed = layers[0] + layers[5]
    assert mixed.kind == "ffn + attention"


def test_the_layers_of_a_residual_network() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=3).eval()
    assert default_layer_kinds(model) == ("residual",)
    blocks = layers_of(model, ["residual"])
    assert [place.layers[0] for place in blocks] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert set(covered(blocks[2].selection, model)) == {
        f"layer2.0.{name}.weight" for name in ("conv1", "conv2", "downsample.0")
    }
    modules = layers_of(model, ["module"])
    assert len(modules) == 17  # 20 convolutions without the three shortcuts
    assert all(
        len(place.selection.index) == len(ComponentIndex.from_model(model, ["conv_filter", "linear_neuron"]))
        for place in modules
    )
