"""Where the bits of a mask are: rows per gated tensor, in the model's order, of any lengths."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from ablate import ComponentIndex, Selection
from coar.editing.edits.covered import covered
from coar.editing.masks.layout import MaskLayout
from coar.editing.where.defaults import last_feed_forward_blocks
from coar.errors import EditError


def _vit_base() -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224")
    return model


def test_the_published_sizes_of_vit_base() -> None:
    # P "8th to 10th FFN" = blocks 7, 8, 9: 6 tensors of 3,072 bits; 16.50 % of the backbone without its head
    model = _vit_base()
    layout = MaskLayout(last_feed_forward_blocks(model, 3))
    assert [row.parameter for row in layout.rows] == [
        f"blocks.{block}.mlp.{layer}.weight" for block in (7, 8, 9) for layer in ("fc1", "fc2")
    ]
    assert [row.axis for row in layout.rows] == [0, 1] * 3
    assert {len(row.units) for row in layout.rows} == {3072}
    assert layout.bits == 18_432
    gated = sum(weight.numel() for weight in layout.gated(model).values())
    backbone = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    assert gated == 6 * 768 * 3072 == 14_155_776
    assert backbone == 85_798_656
    assert round(100 * gated / backbone, 2) == 16.50
    shares = [round(100 * density * gated / backbone, 3) for density in (0.75, 0.5, 0.25, 0.1, 0.05)]
    assert shares == pytest.approx([12.37, 8.25, 4.12, 1.65, 0.825], abs=0.006)


def test_the_published_sizes_of_vit_small() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224")
    assert MaskLayout(last_feed_forward_blocks(model, 3)).bits == 9_216


@pytest.mark.parametrize("kinds", [["conv_filter"], ["conv_filter", "linear_neuron"], ["linear_input"]])
def test_a_mask_of_bits_covers_what_its_selection_covers(tiny_net: nn.Module, kinds: list[str]) -> None:
    index = ComponentIndex.from_model(tiny_net, kinds)
    layout = MaskLayout(index.everything().sample(max(1, len(index) // 2), 3))
    bits = torch.rand(layout.bits) < 0.5
    bits[0] = True
    gated = layout.gated(tiny_net)
    expanded = layout.expand(bits.float()[None], gated)
    where = covered(layout.chosen(bits), tiny_net)
    for name, mask in expanded.items():
        full = mask[0].expand(gated[name].shape)
        assert torch.equal(full.bool(), where.get(name, torch.zeros_like(full, dtype=torch.bool)))


def test_two_axes_of_one_tensor_give_the_union(tiny_net: nn.Module) -> None:
    index = ComponentIndex.from_model(tiny_net, ["linear_neuron", "linear_input"])
    layout = MaskLayout(index.everything())
    masks = torch.rand(2, layout.bits)
    (weight,) = layout.expand(masks, layout.gated(tiny_net)).values()
    rows, columns = (masks[:, row.span] for row in layout.rows)
    outside = (1 - rows)[:, :, None] * (1 - columns)[:, None]
    torch.testing.assert_close(weight, 1 - outside)


def test_a_component_of_several_slices_gates_them_all() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    layout = MaskLayout(ComponentIndex.from_model(model, ["attention_head"]).select([0, 3]))
    gated = layout.gated(model)
    first, second = layout.expand(torch.tensor([[1.0, 1.0]]), gated).values()
    assert first.shape == (1, 1, 64)
    assert first[0, 0].tolist() == [1.0] * 32 + [0.0] * 32
    assert second[0, 0].tolist() == [0.0] * 32 + [1.0] * 32


def test_bits_are_the_components_of_the_selection_in_order(tiny_net: nn.Module) -> None:
    selection = ComponentIndex.from_model(tiny_net).select([9, 1, 4, 0])
    layout = MaskLayout(selection)
    assert [(row.parameter, row.units, row.span) for row in layout.rows] == [
        ("0.weight", (0, 1), slice(0, 2)),
        ("3.weight", (0, 5), slice(2, 4)),
    ]
    assert layout.chosen(torch.tensor([False, True, False, True])).ids == (1, 9)


def _empty(model: nn.Module) -> Selection:
    return ComponentIndex.from_model(model).select([])


def _branches(model: nn.Module) -> Selection:
    vit = timm.create_model("test_vit", num_classes=3)
    return ComponentIndex.from_model(vit, ["residual_branch"]).everything()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "The selection is empty: there is nothing to mask. Select at least one component."),
        (
            _branches,
            "The selection holds residual branches ('blocks.0.attn.proj'), which take a bias with them, and masks gate "
            "weights only. Select other kinds, e.g. ffn_in and ffn_out, or conv_filter.",
        ),
    ],
)
def test_what_no_mask_can_be_made_of(tiny_net: nn.Module, make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(EditError, match=f"^{re.escape(message)}$"):
        MaskLayout(make(tiny_net))


def test_expanding_is_differentiable(tiny_net: nn.Module) -> None:
    layout = MaskLayout(ComponentIndex.from_model(tiny_net).everything())
    gated = layout.gated(tiny_net)
    masks: Tensor = torch.rand(1, layout.bits, requires_grad=True)
    total = torch.stack([(mask * gated[name]).sum() for name, mask in layout.expand(masks, gated).items()]).sum()
    (gradient,) = torch.autograd.grad(total, masks)
    expected = torch.cat([gated[name].flatten(1).sum(dim=1) for name in layout.parameters])
    torch.testing.assert_close(gradient[0], expected)
