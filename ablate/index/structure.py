"""Attentions and feed-forward networks of a model, found by type, shape and exact layout, never by part of a name.

A layout says under which attributes a module keeps its projections; it counts only where the shapes fit too. Layouts
of modules unknown here are made known with `register_attention` and `register_feed_forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ablate.errors import SelectionError

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_HEAD_WIDTHS = ("head_dim", "attention_head_size")


@dataclass(frozen=True)
class Weight:
    """A weight by its place: the module that owns it, its attribute there, and which axis is the output's."""

    module: str
    attribute: str
    out_axis: int


@dataclass(frozen=True)
class Attention:
    """A multi-head attention: where its query, key and value weights and its output projection are."""

    name: str
    qkv: tuple[Weight, ...]
    out: Weight
    heads: int
    width_in: int
    width_out: int


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network: its first layers (two where it is gated) and its second, which reads the hidden units."""

    name: str
    first: tuple[Weight, ...]
    second: Weight


@dataclass(frozen=True)
class _AttentionLayout:
    """Attribute paths below an attention: `qkv` lead to modules or weights, the others to numbers."""

    qkv: tuple[str, ...]
    out: str
    heads: tuple[str, ...] = _HEAD_COUNTS
    widths: tuple[str, ...] = _HEAD_WIDTHS


_ATTENTIONS = (
    _AttentionLayout(("in_proj_weight",), "out_proj"),  # torch, open_clip
    _AttentionLayout(("q_proj_weight", "k_proj_weight", "v_proj_weight"), "out_proj"),  # torch, other key widths
    _AttentionLayout(("qkv",), "proj"),  # timm, torchvision's Swin
    _AttentionLayout(("to_qkv",), "merge"),  # torchvision's MaxViT
    _AttentionLayout(("q_proj", "k_proj", "v_proj"), "proj"),  # timm, unfused
    _AttentionLayout(("q_proj", "k_proj", "v_proj"), "c_proj"),  # the attention pool of CLIP's ResNets
    _AttentionLayout(("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama and most of transformers
    _AttentionLayout(("q_proj", "k_proj", "v_proj"), "out_proj"),  # transformers' CLIP, OPT
    _AttentionLayout(("q", "kv"), "proj"),  # timm's latent attention pool
    _AttentionLayout(("kv",), "proj"),  # the same, its latent being the query
    _AttentionLayout(("q", "k", "v"), "proj"),
    _AttentionLayout(("q", "k", "v"), "o"),  # T5
    _AttentionLayout(("q_attn", "c_attn"), "c_proj"),  # GPT-2's cross-attention
    _AttentionLayout(("c_attn",), "c_proj"),  # GPT-2
    _AttentionLayout(
        ("self.query", "self.key", "self.value"), "output.dense", ("self.num_attention_heads",), ()
    ),  # BERT
)
_FEED_FORWARDS = ((("intermediate.dense",), "output.dense"),)  # BERT: its two layers are no siblings

_registered_attentions: dict[type[nn.Module], _AttentionLayout] = {}
_registered_feed_forwards: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {}


def register_attention(module_type: type[nn.Module], *, qkv: Sequence[str], out: str, heads: str) -> None:
    """Makes a class of attention modules known to the kinds `attention_head` and `qkv_neuron`.

    Args:
      module_type: The class; its subclasses are meant too.
      qkv: Attribute paths of the query, key and value projections (`to_qkv`), linear layers or weights (rows, inputs).
      out: Attribute path of the output projection (`to_out.0`), whose input is the heads side by side.
      heads: Attribute path of the number of heads.
    """
    if isinstance(qkv, str):
        raise SelectionError(f"qkv is the string {qkv!r}, expected a list: qkv=[{qkv!r}].")
    _registered_attentions[module_type] = _AttentionLayout(tuple(qkv), out, (heads,), ())


def register_feed_forward(module_type: type[nn.Module], *, first: Sequence[str], second: str) -> None:
    """Makes a class that holds a feed-forward network known to the kinds `ffn_in`, `ffn_hidden` and `ffn_out`.

    Args:
      module_type: The class; its subclasses are meant too.
      first: Attribute paths of the first linear layers: one, or two where the network is gated.
      second: Attribute path of the linear layer that reads the hidden units.
    """
    if isinstance(first, str):
        raise SelectionError(f"first is the string {first!r}, expected a list: first=[{first!r}].")
    _registered_feed_forwards[module_type] = (tuple(first), second)


def linear_axes(module: object) -> tuple[int, int] | None:
    """Returns the (output, input) axes of a linear layer's weight, None for anything else.

    A layer of transformers' type Conv1D is a linear layer with its weight the other way round: (inputs, outputs).
    """
    if isinstance(module, nn.Linear):
        return 0, 1
    return (1, 0) if is_transposed_linear(module) else None


def is_transposed_linear(module: object) -> bool:
    """Returns whether this is transformers' Conv1D, known by its `nf` outputs, weight (inputs, nf) and bias."""
    if not isinstance(module, nn.Module) or isinstance(module, nn.Linear):
        return False
    outputs, weight, bias = (getattr(module, name, None) for name in ("nf", "weight", "bias"))
    return (
        isinstance(outputs, int)
        and isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.ndim == 2
        and weight.shape[1] == outputs == bias.numel()
    )


def mixing_axes(module: object) -> tuple[int, int] | None:
    """Returns `linear_axes`, for convolutions of one pixel too: linear layers at every place of an image."""
    if isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1:
        return 0, 1
    return linear_axes(module)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Returns the numbers of (inputs, outputs) of a layer that `mixing_axes` knows."""
    outputs, inputs = mixing_axes(module) or (0, 1)
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight.")
    return int(weight.shape[inputs]), int(weight.shape[outputs])


class Structure:
    """The attentions and feed-forward networks of one model, in the order of `named_modules()`."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self._names = {id(module): name for name, module in self.modules.items()}

    @cached_property
    def attentions(self) -> dict[str, Attention]:
        """The attentions by name."""
        found = ((name, self._attention(name, module)) for name, module in self.modules.items())
        return {name: attention for name, attention in found if attention is not None}

    @cached_property
    def feed_forwards(self) -> dict[str, FeedForward]:
        """The feed-forward networks by name of the module that holds their layers."""
        return {
            name: FeedForward(name, tuple(self._weight(layer) for layer in layers[:-1]), self._weight(layers[-1]))
            for name, module in self.modules.items()
            if name not in self.attentions
            and (layers := self._feed_forward(name, module))
            and self._at_home(name, layers)
        }

    @cached_property
    def heads(self) -> dict[str, int]:
        """Output projection -> number of heads."""
        return {attention.out.module: attention.heads for attention in self.attentions.values()}

    @cached_property
    def qkv(self) -> dict[str, list[Weight]]:
        """Module -> its query, key and value weights."""
        return _by_module(weight for attention in self.attentions.values() for weight in attention.qkv)

    @cached_property
    def ffn_first(self) -> dict[str, list[Weight]]:
        """Module -> its weight, for first layers of feed-forward networks."""
        return _by_module(weight for network in self.feed_forwards.values() for weight in network.first)

    @cached_property
    def ffn_second(self) -> dict[str, list[Weight]]:
        """Module -> its weight, for second layers of feed-forward networks."""
        return _by_module(network.second for network in self.feed_forwards.values())

    def _at_home(self, name: str, layers: list[nn.Module]) -> bool:
        """Returns whether a network inside an attention works on its tokens: others compute its table of positions."""
        around = [
            attention for other, attention in self.attentions.items() if name.startswith(f"{other}." if other else "")
        ]
        return all(attention.width_out == sizes(layers[-1])[1] for attention in around)

    def _weight(self, layer: nn.Module) -> Weight:
        return Weight(self._names[id(layer)], "weight", (mixing_axes(layer) or (0, 1))[0])

    def _attention(self, name: str, module: nn.Module) -> Attention | None:
        for module_type, layout in _registered_attentions.items():
            if isinstance(module, module_type):
                found = self._match(name, module, layout)
                if found is None:
                    raise SelectionError(
                        f"Module {name!r} is a {type(module).__name__}, registered as an attention with qkv="
                        f"{list(layout.qkv)}, out={layout.out!r}, heads={layout.heads[0]!r}, but these are not there "
                        "or their shapes do not fit. Correct ablate.register_attention(...)."
                    )
                return found
        return next((found for layout in _ATTENTIONS if (found := self._match(name, module, layout))), None)

    def _match(self, name: str, module: nn.Module, layout: _AttentionLayout) -> Attention | None:
        """Returns the attention that `module` is by this layout, None if a part is missing or a shape does not fit."""
        out = _reach(module, layout.out)
        if not isinstance(out, nn.Module) or mixing_axes(out) is None:
            return None
        width, width_out = sizes(out)
        count = next((n for path in layout.heads if isinstance(n := _reach(module, path), int)), None)
        if count is None:
            one = next((n for path in layout.widths if isinstance(n := _reach(module, path), int)), 0)
            count = width // one if one > 0 else 0
        if count < 1 or width % count:
            return None
        qkv = []
        for path in layout.qkv:
            part = _reach(module, path)
            if isinstance(part, nn.Module) and mixing_axes(part) is not None:
                width_in, rows = sizes(part)
                weight = self._weight(part)
            elif isinstance(part, Tensor) and part.ndim == 2:
                rows, width_in = part.shape
                owner, _, attribute = path.rpartition(".")
                weight = Weight(self._names[id(_reach(module, owner))], attribute, 0)
            else:
                return None
            if rows % (width // count):
                return None
            qkv.append((weight, width_in))
        return Attention(name, tuple(weight for weight, _ in qkv), self._weight(out), count, qkv[0][1], width_out)

    def _feed_forward(self, name: str, module: nn.Module) -> list[nn.Module] | None:
        """Returns the first layers and then the second of the feed-forward network that `module` is or holds."""
        for module_type, (first, second) in _registered_feed_forwards.items():
            if isinstance(module, module_type):
                found = _layers_at(module, first, second)
                if found is None:
                    raise SelectionError(
                        f"Module {name!r} is a {type(module).__name__}, registered as a feed-forward network with "
                        f"first={list(first)}, second={second!r}, but these are not there or their shapes do not fit. "
                        "Correct ablate.register_feed_forward(...)."
                    )
                return found
        by_layout = (_layers_at(module, first, second) for first, second in _FEED_FORWARDS)
        return next((layers for layers in by_layout if layers), None) or self._siblings(name, module)

    def _siblings(self, name: str, module: nn.Module) -> list[nn.Module] | None:
        """Returns the layers if the linear layers that are children of `module` are those of a feed-forward network."""
        children = list(module.children())
        layers = [child for child in children if mixing_axes(child) is not None]
        if not 2 <= len(layers) <= 3:
            return None
        if any(isinstance(getattr(module, heads, None), int) for heads in _HEAD_COUNTS) and not any(
            other.startswith(f"{name}." if name else "") for other in self.attentions
        ):
            return None  # an attention of a layout unknown here
        found = next((ordered for ordered in _orders(layers) if _fits(ordered)), None)
        if found is None or squeezes(module):
            return None
        if any(isinstance(layer, nn.Conv2d) for layer in found):
            inside = children[children.index(layers[0]) : children.index(layers[-1])]
            convolutions = [m for child in inside for m in child.modules() if isinstance(m, nn.Conv2d)]
            if len(convolutions) > len(layers) - 1:
                return None  # an inverted bottleneck: another convolution between the two
        return found


def squeezes(module: nn.Module) -> bool:
    """Returns whether `module` is a squeeze-and-excitation: d -> h -> d, narrow or with a gate behind it."""
    children = [child for child in module.children() if not isinstance(child, nn.Dropout | nn.Identity)]
    layers = [child for child in children if mixing_axes(child) is not None]
    if len(layers) != 2 or sizes(layers[0]) != sizes(layers[1])[::-1]:
        return False
    if all(isinstance(layer, nn.Conv2d) for layer in layers):
        inputs, hidden = sizes(layers[0])
        return hidden < inputs or children[-1] is not layers[1]
    return isinstance(children[-1], nn.Sigmoid | nn.Hardsigmoid)


def _orders(layers: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yields the layers with the second layer of the network last: of three, some libraries list it in the middle."""
    for second in reversed(layers) if len(layers) > 2 else layers[-1:]:
        yield [*(layer for layer in layers if layer is not second), second]


def _fits(layers: list[nn.Module]) -> bool:
    """Returns whether the shapes are those of d -> h (or twice, or d -> 2h in one layer) and then h -> d."""
    *first, second = layers
    hidden, width = sizes(second)
    if len(first) == 2:
        return hidden != width and all(sizes(layer) == (width, hidden) for layer in first)
    return sizes(first[0]) in ((width, hidden), (width, 2 * hidden))


def _layers_at(module: nn.Module, first: Sequence[str], second: str) -> list[nn.Module] | None:
    layers = [layer for path in (*first, second) if isinstance(layer := _reach(module, path), nn.Module)]
    whole = len(layers) == len(first) + 1 > 1 and all(mixing_axes(layer) is not None for layer in layers)
    return layers if whole and _fits(layers) else None


def _reach(module: object, path: str) -> object:
    """Returns what an attribute path leads to, None where it leads nowhere."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module


def _by_module(weights: Iterator[Weight]) -> dict[str, list[Weight]]:
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.module, []).append(weight)
    return found
