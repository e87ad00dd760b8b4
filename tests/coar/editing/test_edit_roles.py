"""One tensor in two roles, layers inside of adapters, models inside of wrappers: told where one looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import coar
from ablate import ComponentIndex
from coar.editing.methods.finetune import FineTuning
from coar.editing.request import Request


class Words(nn.Module):
    """Tokens to classes; the head is the embedding, as one parameter or as two views of one memory."""

    def __init__(self, by_view: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if by_view:
            self.head.weight.data = self.words.weight.data
        else:
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(self.words(x)).relu().mean(dim=1))
        return logits


@pytest.fixture(params=[False, True], ids=["one parameter", "one memory"])
def words(request: pytest.FixtureRequest) -> nn.Module:
    return Words(request.param).eval()


class Adapted(nn.Module):
    """A wrapper as peft makes it: the layer inside, low-rank maps beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return out


class AdaptedLinear(nn.Linear):
    """An adapter inside of the layer, as loralib has it."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.lora_A = nn.Parameter(torch.randn(2, 4))
        self.lora_B = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + x @ self.lora_A.T @ self.lora_B.T
        return out


class AdaptedBeside(nn.Module):
    """Another wrapper, with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.lora = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.lora(x)
        return out


def _index(model: nn.Module) -> ComponentIndex:
    return ComponentIndex.from_model(model, ["linear_neuron"])


def _notes(edit: coar.Edit, model: nn.Module | None = None) -> dict[str, str]:
    table = edit.describe(model)
    return dict(zip(table["module"], table["note"], strict=True)) if "note" in table else {}


def test_every_use_of_a_tied_weight_is_described(words: nn.Module, tmp_path: Path) -> None:
    index = _index(words)
    edit = coar.Edit(index.where(module="head").sample(1, seed=0))
    expected = {"head": "one tensor, changes as words.weight, head.weight"}
    assert _notes(edit, words) == expected
    measured = edit.measured(words)
    assert _notes(measured) == expected
    measured.save(tmp_path / "edit.safetensors")
    assert _notes(coar.load_edit(tmp_path / "edit.safetensors")) == expected
    beside = coar.Edit(index.where(module="hidden").sample(1, seed=0)).measured(words)
    assert _notes(beside) == {}
    assert _notes(measured + beside) == {**expected, "hidden": ""}
    assert _notes(measured.then(beside)) == {**expected, "hidden": ""}


def test_a_name_in_the_index_tells_of_a_tie_without_the_model() -> None:
    index = _index(Words().eval())
    head = index.where(module="head")
    assert _notes(coar.Edit(head)) == {"head": "one tensor, changes as words.weight, too"}
    assert _notes(coar.Edit(index.where(module="hidden"))) == {}


def test_a_method_that_moves_an_embedding_says_that_it_is_the_head(words: nn.Module) -> None:
    tokens = torch.randint(6, (4, 3), generator=torch.Generator().manual_seed(2))
    request = Request(tokens, torch.tensor([1, 2, 3, 4]))
    edit = FineTuning(rate=1e-2, steps=2).edit(words, request, _index(words).where(module="head"))
    assert _notes(edit)["head"] == "one tensor, changes as words.weight, head.weight"


def test_applying_keeps_ties(words: nn.Module, untouched: Any) -> None:
    """The new model's embedding is its head, and no other model's, shared or not."""
    tokens = torch.randint(6, (4, 3), generator=torch.Generator().manual_seed(2))
    edit = coar.Edit(_index(words).where(module="head").sample(2, seed=1))
    with untouched(words), torch.no_grad():
        with edit.applied(words):
            expected = words(tokens)
        for share in (False, True):
            edited = edit.apply(words, share=share)
            assert torch.equal(edited(tokens), expected)
            one, two = edited.get_submodule("words").weight, edited.get_submodule("head").weight
            assert isinstance(one, Tensor)
            assert isinstance(two, Tensor)
            assert one.data_ptr() == two.data_ptr() != words.get_parameter("words.weight").data_ptr()
            assert (
                edited.get_parameter("hidden.weight").data_ptr() == words.get_parameter("hidden.weight").data_ptr()
            ) is share


def test_one_tensor_cannot_get_two_values() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False)).eval()
    index = _index(model)  # of a model in which they are two
    model[2].weight.data = model[0].weight.data
    both = coar.Edit(index.select([0, 4]))  # one row of each: the same row
    assert not both.apply(model).get_parameter("2.weight")[0].any()
    with pytest.raises(coar.EditError) as refused:
        coar.Edit(index.select([0, 5])).apply(model)
    assert str(refused.value) == (
        "'0.weight' and '2.weight' are one tensor in this Sequential, and the edit gives them different values. Select "
        "components of one of the two."
    )


@pytest.mark.parametrize(
    ("wrapper", "layer", "beside"),
    [
        (Adapted, "0.base_layer", "0.lora_A.default.weight, 0.lora_B.default.weight"),
        (AdaptedLinear, "0", "0.lora_A, 0.lora_B"),
        (AdaptedBeside, "0.linear", "0.lora.0.weight, 0.lora.1.weight"),
    ],
)
def test_an_adapter_beside_an_ablated_layer_stays(wrapper: type[nn.Module], layer: str, beside: str) -> None:
    model = nn.Sequential(wrapper(), nn.Linear(4, 2)).eval()
    edit = coar.Edit(_index(model).where(module=layer))
    assert _notes(edit, model) == {layer: f"stays beside it: {beside}"}
    assert _notes(coar.Edit(_index(model).where(module="1")), model) == {}
    model.get_parameter("1.bias").data.zero_()
    with torch.no_grad():
        assert edit.apply(model)(torch.ones(1, 4)).any(), "what the adapter adds is still there"


def test_an_index_tells_of_a_wrapped_layer_without_the_model() -> None:
    model = nn.Sequential(Adapted(), nn.Linear(4, 2)).eval()
    edit = coar.Edit(_index(model).where(module="0.base_layer"))
    assert _notes(edit) == {"0.base_layer": "stays beside it: what else is in '0'"}


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (
            lambda model: torch.compile(model, backend="eager"),
            "It is compiled: give the module it was made of, model._orig_mod.",
        ),
        (nn.DataParallel, "It wraps another model: give that one, model.module."),
        (torch.optim.swa_utils.AveragedModel, "It wraps another model: give that one, model.module."),
    ],
    ids=["compiled", "parallel", "averaged"],
)
def test_wrappers_are_named(wrap: Any, advice: str, mlp: nn.Module) -> None:
    edit = coar.Edit(_index(mlp).select([0]))
    with pytest.raises(coar.EditMismatchError, match=r"nearest: '(_orig_mod|module)\.0\.weight'") as refused:
        edit.apply(wrap(mlp).eval())
    assert str(refused.value).endswith(advice)
