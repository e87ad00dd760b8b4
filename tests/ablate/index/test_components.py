"""The component index: how many there are, what a row says, and which slice of which weight it means."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import ablate
from ablate.digits import ResidualCNN

COLUMNS = ["id", "name", "kind", "layer", "module", "parameter", "port", "axis", "start", "stop", "n_parameters"]


@pytest.fixture
def index(conv_net: nn.Module) -> ablate.ComponentIndex:
    return ablate.ComponentIndex.from_model(conv_net, ["conv_filter", "linear_neuron"])


def _on_meta(name: str) -> nn.Module:
    import torchvision

    with torch.device("meta"):
        model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def test_resnet50_has_26560_filters_of_which_22720_are_outside_the_shortcuts() -> None:
    model = _on_meta("resnet50")
    index = ablate.ComponentIndex.from_model(model, ["conv_filter"]).expect(26_560)
    assert len(index.ports) == 53
    ablate.ComponentIndex.from_model(model, ["conv_filter"], exclude=["*.downsample.0"]).expect(22_720)


def test_vit_b_16_has_its_published_neurons_by_default() -> None:
    model = _on_meta("vit_b_16")
    index = ablate.ComponentIndex.from_model(model).expect(12 * (2304 + 768 + 3072 + 768))
    assert "heads.head" not in index.columns["module"]


def test_the_digits_network_has_736_filters() -> None:
    ablate.ComponentIndex.from_model(ResidualCNN()).expect(736)


def test_the_table_has_the_columns_of_the_design_in_this_order(index: ablate.ComponentIndex) -> None:
    table = index.table()
    assert list(table.columns) == list(index.columns) == COLUMNS
    assert len(table) == len(index) == 4 + 6 + 5 + 3
    assert table["id"].tolist() == list(range(18))


def test_rows_in_full(index: ablate.ComponentIndex) -> None:
    rows = [list(row) for row in index.table().itertuples(index=False)]
    assert rows[1] == [1, "conv1[1]", "conv_filter", 0, "conv1", "conv1.weight", "out", 0, 1, 2, 3 * 9]
    assert rows[9] == [9, "conv2[5]", "conv_filter", 1, "conv2", "conv2.weight", "out", 0, 5, 6, 2 * 9]
    assert rows[17] == [17, "head[2]", "linear_neuron", 3, "head", "head.weight", "out", 0, 2, 3, 5]


def test_a_component_is_its_row(index: ablate.ComponentIndex) -> None:
    rows = index.table().to_dict("records")
    for component, row in zip(index, rows, strict=True):
        assert vars(component) == row
    assert index[-1] == index[17]
    assert type(index[np.int64(4)].id) is int


@pytest.mark.parametrize("component", [18, -19, 1000])
def test_a_component_that_does_not_exist(component: int, index: ablate.ComponentIndex) -> None:
    with pytest.raises(IndexError, match=f"^Component {component} does not exist; ids are 0 to 17.$"):
        index[component]


def test_narrow_gives_the_slice_of_each_component(index: ablate.ComponentIndex, conv_net: nn.Module) -> None:
    parameters = dict(conv_net.named_parameters())
    rest = {name: parameter.clone() for name, parameter in parameters.items()}
    for c in index:
        part = rest[c.parameter].detach().narrow(c.axis, c.start, c.stop - c.start)
        assert part.numel() == c.n_parameters
        assert part.all(), "two components share a weight"
        part.zero_()
    assert {name for name, value in rest.items() if not value.any()} == {p.parameter for p in index.ports}


def test_modules_gives_one_row_per_module(index: ablate.ComponentIndex) -> None:
    expected = pd.DataFrame(
        [
            ("conv1", "conv_filter", 0, "out", 4, 108),
            ("conv2", "conv_filter", 1, "out", 6, 108),
            ("fc", "linear_neuron", 2, "out", 5, 30),
            ("head", "linear_neuron", 3, "out", 3, 15),
        ],
        columns=["module", "kind", "layer", "port", "components", "parameters"],
    )
    pd.testing.assert_frame_equal(index.modules(), expected)


def test_a_model_that_is_one_layer_has_components_of_the_empty_module() -> None:
    index = ablate.ComponentIndex.from_model(nn.Linear(2, 3), ["linear_neuron"]).expect(3)
    assert (index[2].name, index[2].module, index[2].parameter) == ("[2]", "", "weight")


def test_repr_says_how_many_and_which(index: ablate.ComponentIndex) -> None:
    assert repr(index) == f"<ComponentIndex: 18 components in 4 modules, {index.hash[:12]}>"


def test_indices_of_equal_models_are_equal_and_hashable(index: ablate.ComponentIndex, conv_net: nn.Module) -> None:
    same = ablate.ComponentIndex.from_model(copy.deepcopy(conv_net).double().train(), ["linear_neuron", "conv_filter"])
    assert same == index
    assert {same, index} == {index}
    assert index != ablate.ComponentIndex.from_model(conv_net, ["conv_filter"])
    assert index != "index"


def test_expect_lists_the_modules_when_the_count_is_wrong(index: ablate.ComponentIndex) -> None:
    assert index.expect(18) is index
    with pytest.raises(ablate.SelectionError) as caught:
        index.expect(1736)
    assert str(caught.value) == (
        "Expected 1,736 components, found 18:\n"
        "  module           kind  layer port  components  parameters\n"
        "0  conv1    conv_filter      0  out           4         108\n"
        "1  conv2    conv_filter      1  out           6         108\n"
        "2     fc  linear_neuron      2  out           5          30\n"
        "3   head  linear_neuron      3  out           3          15"
    )
