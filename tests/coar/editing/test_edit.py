"""An edit is a value: it never changes the model it is given, equals zeroing by hand, and survives a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

import ablate
import coar
from ablate import ComponentIndex
from coar.editing.edits.sealed import read_sealed, write_sealed

IDS = (0, 3, 5, 9)  # of the 10 filters: two of conv1, two of conv2
Randomise = Callable[[nn.Module, int], nn.Module]


@pytest.fixture
def index(conv_net: nn.Module) -> ComponentIndex:
    """The index of `conv_net`'s filters."""
    return ComponentIndex.from_model(conv_net, ["conv_filter"])


@pytest.fixture
def edit(conv_net: nn.Module, index: ComponentIndex) -> coar.Edit:
    """Ablates `IDS` of `conv_net`, and of no other model."""
    return coar.Edit(
        index.select(IDS), base=ablate.model_hash(conv_net), method="a test", details={"why": ["ü", 1, 0.1, None]}
    )


def _bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def _zeroed_by_hand(model: nn.Module, index: ComponentIndex, factor: float = 0.0) -> nn.Module:
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for i in IDS:
            c = index[i]
            part = parameters[c.parameter].narrow(c.axis, c.start, c.stop - c.start)
            part.copy_(part * factor if factor else torch.zeros_like(part))
    return changed


def test_apply_zeroes_the_weights_and_nothing_else(
    conv_net: nn.Module, index: ComponentIndex, edit: coar.Edit, images: Tensor, untouched: Any
) -> None:
    with untouched(conv_net, images):
        edited = edit.apply(conv_net)
    assert _bits(edited) == _bits(_zeroed_by_hand(conv_net, index))
    assert type(edited) is type(conv_net)
    assert not edited.training
    with torch.no_grad():
        outputs = edited(images)
        with ablate.ablated(conv_net, index.select(IDS)):
            assert torch.equal(outputs, conv_net(images))


def test_apply_equals_the_reference(
    conv_net: nn.Module, index: ComponentIndex, edit: coar.Edit, images: Tensor, labels: Tensor
) -> None:
    keep = edit.selection.keep()[None]
    expected = ablate.reference_outputs(conv_net, index, keep, images, labels, "logit")
    with torch.no_grad():
        logits = edit.apply(conv_net)(images)
    assert torch.equal(logits.gather(1, labels[:, None])[:, 0], expected[0])


def _shared(model: nn.Module, edited: nn.Module) -> list[str]:
    old = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    new = [*edited.named_parameters(), *edited.named_buffers()]
    return [name for name, tensor in new if tensor.data_ptr() in old and tensor.numel()]


def test_the_new_model_shares_nothing(conv_net: nn.Module, edit: coar.Edit) -> None:
    for strength in (1.0, 0.0):
        assert _shared(conv_net, edit.at(strength).apply(conv_net)) == []


def test_the_new_model_shares_what_is_not_edited_if_asked(conv_net: nn.Module, edit: coar.Edit) -> None:
    names = [name for name, _ in conv_net.named_parameters()]
    edited = edit.apply(conv_net, share=True)
    assert _shared(conv_net, edited) == [n for n in names if n not in ("conv1.weight", "conv2.weight")]
    assert _shared(conv_net, edit.at(0).apply(conv_net, share=True)) == names
    own, others = set(map(id, conv_net.parameters())), set(map(id, edited.parameters()))
    assert not own & others, "gradients and requires_grad are the copy's own"


def test_mode_and_requires_grad_are_kept(conv_net: nn.Module, edit: coar.Edit, untouched: Any) -> None:
    conv_net.train()
    parameters = dict(conv_net.named_parameters())
    parameters["conv1.weight"].requires_grad_(False)
    with untouched(conv_net):
        edited = edit.apply(conv_net)
        with edit.applied(conv_net):
            pass
    assert edited.training
    flags = {name: parameter.requires_grad for name, parameter in edited.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in parameters.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-42])
def test_alpha_zero_is_the_original_bit_for_bit(
    conv_net: nn.Module, index: ComponentIndex, value: float, untouched: Any
) -> None:
    with torch.no_grad():
        conv_net.get_parameter("conv1.weight")[0, 0, 0, 0] = value
    edit = coar.Edit(index.select(IDS), base=ablate.model_hash(conv_net))
    before = _bits(conv_net)
    assert _bits(edit.at(0).apply(conv_net)) == before
    with untouched(conv_net), edit.at(0).applied(conv_net) as same:
        assert same is conv_net
        assert _bits(conv_net) == before
    full = edit.at(1).apply(conv_net)
    assert torch.equal(full.get_parameter("conv1.weight")[0], torch.zeros(3, 3, 3))


@pytest.mark.parametrize("alpha", [0.5, 0.25, 0.9])
def test_alpha_scales_what_is_left(conv_net: nn.Module, index: ComponentIndex, edit: coar.Edit, alpha: float) -> None:
    expected = _bits(_zeroed_by_hand(conv_net, index, 1 - alpha))
    assert _bits(edit.at(alpha).apply(conv_net)) == expected
    with edit.at(alpha).applied(conv_net):
        assert _bits(conv_net) == expected


def test_at_gives_a_new_edit(edit: coar.Edit) -> None:
    half = edit.at(0.5)
    assert (half.alpha, edit.alpha) == (0.5, 1.0)
    assert (half.selection, half.base, half.method, half.details) == (
        edit.selection,
        edit.base,
        edit.method,
        edit.details,
    )
    assert half.at(1.0) == edit
    assert half != edit


def test_applied_restores_bit_for_bit(
    conv_net: nn.Module, index: ComponentIndex, edit: coar.Edit, images: Tensor, untouched: Any
) -> None:
    expected = _bits(_zeroed_by_hand(conv_net, index))
    with untouched(conv_net, images):
        with edit.applied(conv_net) as edited:
            assert edited is conv_net
            assert _bits(conv_net) == expected
        with pytest.raises(KeyError, match="user"), edit.applied(conv_net):
            raise KeyError("user")


def test_applied_inside_applied(conv_net: nn.Module, index: ComponentIndex, untouched: Any) -> None:
    first, second = coar.Edit(index.select([0, 1])), coar.Edit(index.select([1, 2]), alpha=0.5)
    original = conv_net.get_parameter("conv1.weight").detach().clone()
    with untouched(conv_net):
        with first.applied(conv_net), second.applied(conv_net):
            weight = conv_net.get_parameter("conv1.weight").detach()
            assert not weight[:2].any()
            assert torch.equal(weight[2], original[2] * 0.5)
        assert torch.equal(conv_net.get_parameter("conv1.weight").detach(), original)


def test_saved_and_loaded_it_is_the_same_edit(
    conv_net: nn.Module, edit: coar.Edit, tmp_path: Path, untouched: Any
) -> None:
    path = tmp_path / "new" / "fix.safetensors"
    with untouched(conv_net):
        edit.at(0.5).save(path)
        loaded = coar.load_edit(str(path))
        assert loaded == edit.at(0.5)
        assert loaded.selection.index.hash == edit.selection.index.hash
        assert _bits(loaded.apply(conv_net)) == _bits(edit.at(0.5).apply(conv_net))
    edit.save(path)
    assert coar.load_edit(path) == edit
    assert [file.name for file in path.parent.iterdir()] == ["fix.safetensors"]
    assert path.stat().st_size < 4000, "an edit holds no weights"


def test_a_coar_edit_survives_a_file(tiny_fit: coar.Attributions, tiny_net: nn.Module, tmp_path: Path) -> None:
    edit = coar.coar_edit(tiny_fit, [0], [1], k=4)  # one example each: there is no t
    assert edit.details["statistic"] == "difference"
    assert np.isfinite(edit.details["scores"]).all()
    edit.save(tmp_path / "fix.safetensors")
    loaded = coar.load_edit(tmp_path / "fix.safetensors")
    assert loaded == edit
    assert _bits(loaded.apply(tiny_net)) == _bits(edit.apply(tiny_net))


def test_other_weights_are_refused_unless_allowed(
    conv_net: nn.Module, edit: coar.Edit, randomise: Randomise, untouched: Any
) -> None:
    other = randomise(copy.deepcopy(conv_net), 99)
    expected = (
        f"This edit was made for a model with weights {ablate.model_hash(conv_net)[:12]}, this ConvNet has "
        f"{ablate.model_hash(other)[:12]}: its components mean something else. Give the original model; or, if that is "
        "what you want (e.g. a second edit on top of a first), pass any_weights=True."
    )
    with untouched(other):
        with pytest.raises(coar.EditMismatchError) as refused:
            edit.apply(other)
        assert str(refused.value) == expected
        with pytest.raises(coar.EditMismatchError) as refused, edit.applied(other):
            pass
        assert str(refused.value) == expected
        assert not edit.apply(other, any_weights=True).get_parameter("conv1.weight")[[0, 3]].any()
        with edit.applied(other, any_weights=True):
            assert not other.get_parameter("conv1.weight")[[0, 3]].any()


def test_an_edit_by_hand_fits_any_weights(conv_net: nn.Module, index: ComponentIndex, randomise: Randomise) -> None:
    edit = coar.Edit(index.select(IDS))
    assert edit.base is None
    edit.apply(randomise(copy.deepcopy(conv_net), 99))


def test_another_structure_is_always_refused(edit: coar.Edit, mlp: nn.Module, untouched: Any) -> None:
    with untouched(mlp), pytest.raises(coar.EditMismatchError) as refused:
        edit.apply(mlp, any_weights=True)
    assert str(refused.value) == (
        "This edit was made for another model: give that one, or find an edit for this one. This index (10 components, "
        f"{edit.selection.index.hash[:12]}) was not made for this Sequential:\n"
        "  no parameter 'conv1.weight' (nearest: '4.weight')\n"
        "  no parameter 'conv2.weight' (nearest: '2.weight')\n"
        "Make one with ComponentIndex.from_model(model)."
    )


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), float("inf")])
def test_alpha_outside(edit: coar.Edit, alpha: float) -> None:
    with pytest.raises(coar.EditError) as refused:
        edit.at(alpha)
    assert str(refused.value) == f"alpha is {alpha}, expected 0 (the original model) to 1 (the full edit)."


def test_an_edit_of_nothing(index: ComponentIndex) -> None:
    with pytest.raises(coar.EditError) as refused:
        coar.Edit(index.select([]))
    assert str(refused.value) == "The selection is empty: there is nothing to edit. Select at least one component."


def test_an_unknown_operation(index: ComponentIndex) -> None:
    with pytest.raises(coar.EditError) as refused:
        coar.Edit(index.select([0]), operation="lowrank")  # type: ignore[arg-type]
    assert str(refused.value) == (
        "operation is 'lowrank', expected one of coar.editing.edits.operations: Ablate(), Scale(factor), LowRank(...), "
        "Delta(...)."
    )


def test_describe_and_repr(edit: coar.Edit) -> None:
    assert edit.describe().to_dict("records") == [
        {"module": "conv1", "kind": "conv_filter", "edited": 2, "parameters": 54, "components": 4},
        {"module": "conv2", "kind": "conv_filter", "edited": 2, "parameters": 36, "components": 6},
    ]
    assert repr(edit.at(0.5)) == "<Edit: ablate 4 of 10 components at alpha=0.5, by a test>"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(coar.EditError) as refused:
        coar.load_edit(tmp_path / "none.safetensors")
    assert str(refused.value) == f"No edit at {tmp_path}/none.safetensors: there is no such file. Check the path."


def test_a_file_of_weights_is_no_edit(conv_net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.detach().numpy() for name, tensor in conv_net.named_parameters()}, path)
    with pytest.raises(coar.EditError) as refused:
        coar.load_edit(path)
    assert str(refused.value) == (f"{path} holds tensors but no edit: it was not written by Edit.save. Check the path.")


def _rewrite(path: Path, change: Callable[[dict[str, Any]], None], ids: Any = IDS) -> None:
    """Writes the edit again with a changed header, and a checksum that fits it."""
    header = dict(read_sealed(path, "edit").header)
    change(header)
    write_sealed(path, "edit", header, {"component_ids": torch.tensor(ids)})


def test_an_edit_of_another_format_version(edit: coar.Edit, tmp_path: Path) -> None:
    path = tmp_path / "fix.safetensors"
    edit.save(path)
    _rewrite(path, lambda header: header.update(format_version=4))
    with pytest.raises(coar.EditError) as refused:
        coar.load_edit(path)
    assert str(refused.value) == (
        f"{path} has format 'component-edit' version 4, this version of the toolkit reads 'component-edit' versions "
        "1, 2 and 3."
    )


@pytest.mark.parametrize(
    ("change", "ids", "reason"),
    [
        (lambda header: header.update(alpha=2.0), IDS, "EditError: alpha is 2.0, expected 0"),
        (lambda header: header.pop("base"), IDS, "KeyError: 'base'"),
        (lambda header: None, [3, 10], "SelectionError: Component ids 10 do not exist; ids are 0 to 9"),
        (lambda header: None, [0.5], "SelectionError: Component ids are integers, got 0.5"),
        (
            lambda header: header.update(index=header["index"].replace("conv1", "conv9")),
            IDS,
            "ModelMismatchError: This component index says format",
        ),
    ],
    ids=["alpha", "a key is gone", "ids outside", "ids are no integers", "index changed"],
)
def test_a_changed_edit(
    edit: coar.Edit, tmp_path: Path, change: Callable[[dict[str, Any]], None], ids: Any, reason: str
) -> None:
    path = tmp_path / "fix.safetensors"
    edit.save(path)
    _rewrite(path, change, ids)
    with pytest.raises(coar.EditError) as refused:
        coar.load_edit(path)
    assert str(refused.value).startswith(f"{path} cannot be read as an edit: {reason}")
    assert str(refused.value).endswith(
        "It is damaged or something else; restore it from a copy, or make the edit again."
    )


@pytest.mark.parametrize("content", [b"", b"no edit at all, but some text", None], ids=["empty", "text", "cut"])
def test_a_damaged_file(edit: coar.Edit, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "fix.safetensors"
    edit.save(path)
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(coar.EditError, match=r"fix\.safetensors cannot be read as an edit: SafetensorError: "):
        coar.load_edit(path)


def test_edits_can_be_kept_in_sets(edit: coar.Edit) -> None:
    assert len({edit, edit.at(1.0), edit.at(0.5)}) == 2
