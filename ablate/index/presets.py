"""Published enumerations of a model's components, by name, so that counts can be compared with those of the papers."""

from __future__ import annotations

from collections.abc import Callable

from ablate.errors import SelectionError, UnknownNameError
from ablate.index.kinds import Anatomy
from ablate.index.listing import neuron_kinds
from ablate.index.structure import is_transposed_linear, linear_axes

# A preset: from a model to the kinds it lists and the modules it leaves out (name -> why).
Preset = tuple[tuple[str, ...], dict[str, str]]


def _coar_resnet(anatomy: Anatomy) -> Preset:
    """Every convolution filter but those of shortcuts (arXiv 2404.11534): 22,720 on ResNet-50."""
    return ("conv_filter",), dict.fromkeys(anatomy.residual.shortcuts, "a shortcut convolution")


def _coar_vit(anatomy: Anatomy) -> Preset:
    """Rows of every linear layer but the classification head, and of in-projections: 82,944 on ViT-B/16."""
    if not anatomy.attentions:
        raise SelectionError(
            "Preset 'coar-vit' is for vision transformers, and no attention was found in this "
            f"{type(anatomy.modules['']).__name__}. Make one known with ablate.register_attention, or give kinds to "
            "ComponentIndex.from_model(model, kinds=[...])."
        )
    places = (anatomy.qkv, anatomy.heads, anatomy.ffn_first, anatomy.ffn_second)
    order = list(anatomy.modules)
    last = max(i for i, name in enumerate(order) if any(name in place for place in places))
    head = [name for name in order[last + 1 :] if linear_axes(anatomy.modules[name])]
    return neuron_kinds(anatomy), dict.fromkeys(head, "the classification head")


def _coar_gpt2(anatomy: Anatomy) -> Preset:
    """Input rows of every Conv1D, as published (a Conv1D's weight is (inputs, outputs)): 64,512 on GPT-2."""
    others = [name for name, m in anatomy.modules.items() if linear_axes(m) and not is_transposed_linear(m)]
    return ("linear_input",), dict.fromkeys(others, "a linear layer that is no Conv1D")


def _heads(anatomy: Anatomy) -> Preset:
    """Every attention head."""
    return ("attention_head",), {}


def _ffn(anatomy: Anatomy) -> Preset:
    """Every hidden unit of every feed-forward network."""
    return ("ffn_hidden",), {}


_PRESETS: dict[str, Callable[[Anatomy], Preset]] = {
    "coar-resnet": _coar_resnet,
    "coar-vit": _coar_vit,
    "coar-gpt2": _coar_gpt2,
    "heads": _heads,
    "ffn": _ffn,
}


def preset_names() -> tuple[str, ...]:
    """Returns the names of the presets."""
    return tuple(_PRESETS)


def preset_parts(anatomy: Anatomy, name: str, shortcuts: bool) -> Preset:
    """Returns the kinds that a preset lists and the modules that it leaves out; see `ComponentIndex.from_preset`."""
    if name not in _PRESETS:
        raise UnknownNameError("preset", name, _PRESETS)
    if shortcuts and name != "coar-resnet":
        raise SelectionError(f"shortcuts=True belongs to preset 'coar-resnet', not to {name!r}. Leave it out.")
    kinds, left_out = _PRESETS[name](anatomy)
    return kinds, {} if shortcuts else left_out
