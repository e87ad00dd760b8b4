"""Residual branches of a model, and the shortcuts beside them: what a block adds to its input, found by structure.

A branch is named by its last affine module: with that module's weight and bias zero the branch adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ablate.errors import SelectionError
from ablate.index.structure import Structure, mixing_axes, sizes, squeezes

_SHORTCUTS = ("downsample", "shortcut")  # the child beside the branch; None, empty or an identity where nothing changes
_SKIPS = ("has_skip", "use_res_connect")  # whether an inverted bottleneck adds its input (timm, torchvision)
_AFFINE = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)

_registered: dict[type[nn.Module], tuple[str, ...]] = {}


def register_residual(module_type: type[nn.Module], branches: Sequence[str]) -> None:
    """Makes a class of residual blocks known to the kind `residual_branch`.

    Args:
      module_type: The class; its subclasses are meant too.
      branches: Attribute path of the last affine module of each branch (`attn.proj`, `mlp.fc2`).
    """
    if isinstance(branches, str):
        raise SelectionError(f"branches is the string {branches!r}, expected a list: branches=[{branches!r}].")
    _registered[module_type] = tuple(branches)


class ResidualBlocks:
    """The residual blocks of a model.

    Attributes:
      branches: Last affine module of a branch -> its block.
      shortcuts: Convolution of a shortcut -> its block.
    """

    def __init__(self, structure: Structure) -> None:
        self.branches: dict[str, str] = {}
        self.shortcuts: dict[str, str] = {}
        self._structure = structure
        self._names = {id(module): name for name, module in structure.modules.items()}
        self._units = self._units_by_block()
        around: set[str] = set()  # modules that contain a block: stages and whole networks
        for name, module in reversed(structure.modules.items()):
            if name in around:
                continue
            ends = self._ends(name, module)
            if ends:
                self.branches |= dict.fromkeys((self._names[id(end)] for end in ends), name)
                self._note_shortcut(name, module)
                around |= _ancestors(name)
        self.branches |= {
            network.second.module: owner
            for network in structure.feed_forwards.values()
            if (owner := self._block_of(network.name)) in structure.attentions  # a latent attention pool
        }

    def _units_by_block(self) -> dict[str, list[str]]:
        """Returns block -> its attentions and feed-forward networks, for what may be a transformer block."""
        structure = self._structure
        units: dict[str, list[str]] = {}
        for name, attention in structure.attentions.items():
            if attention.width_in == attention.width_out:
                units.setdefault(self._block_of(name), []).append(name)
        for name in structure.feed_forwards:
            block = name if name in units else self._block_of(name)  # torch's layers hold theirs without a module
            units.setdefault(block, []).append(name)
        return units

    def _block_of(self, name: str) -> str:
        """Returns the nearest module around this one that does more than to list modules."""
        while name:
            name = name.rpartition(".")[0]
            if not isinstance(self._structure.modules[name], nn.Sequential | nn.ModuleList | nn.ModuleDict):
                return name
        return "<none>"

    def _ends(self, name: str, module: nn.Module) -> list[nn.Module]:
        """Returns the last affine module of every residual branch of this module."""
        for module_type, paths in _registered.items():
            if isinstance(module, module_type):
                return [_module_at(name, module, path) for path in paths]
        units = self._units.get(name, [])
        convnext = len(units) == 1 and units[0] in self._structure.feed_forwards and self._has_depthwise(name, units[0])
        if len(units) > 1 or convnext:
            return [self._end(module, unit) for unit in units]
        if units or any(network.startswith(f"{name}.") for network in self._structure.feed_forwards):
            return []  # a stage, or a block of a form unknown here
        end = _end_of_convolutions(module)
        return [] if end is None else [end]

    def _has_depthwise(self, name: str, network: str) -> bool:
        second = self._structure.modules[self._structure.feed_forwards[network].second.module]
        _, width = sizes(second)
        convolutions = [m for m in self._structure.modules[name].modules() if isinstance(m, nn.Conv2d)]
        return any(m.groups == m.in_channels == m.out_channels == width for m in convolutions)

    def _end(self, block: nn.Module, unit: str) -> nn.Module:
        """Returns the last affine module of the branch of one attention or feed-forward network."""
        structure = self._structure
        attentions = [n for n in self._units[self._names[id(block)]] if n in structure.attentions]
        cosine = any(hasattr(structure.modules[n], "cpb_mlp") for n in attentions)  # Swin v2: its norms come last
        after = ("ln_attn", "norm1") if unit in structure.attentions else ("", "norm2")
        norm = getattr(block, after[1] if cosine else after[0], None)  # open_clip's `scale_attn`
        if isinstance(norm, nn.Module) and isinstance(getattr(norm, "weight", None), nn.Parameter):
            return norm
        if unit in structure.attentions:
            return structure.modules[structure.attentions[unit].out.module]
        return structure.modules[structure.feed_forwards[unit].second.module]

    def _note_shortcut(self, name: str, module: nn.Module) -> None:
        shortcut = _shortcut(module)
        if shortcut is not None:
            found = [m for m in shortcut.modules() if isinstance(m, nn.Conv2d)]
            self.shortcuts |= dict.fromkeys((self._names[id(m)] for m in found), name)


def _shortcut(module: nn.Module) -> nn.Module | None:
    found = (getattr(module, name, None) for name in _SHORTCUTS)
    return next((child for child in found if isinstance(child, nn.Module)), None)


def _end_of_convolutions(module: nn.Module) -> nn.Module | None:
    """Returns the last affine module of the branch if `module` is a residual block of convolutions."""
    skips = [skip for name in _SKIPS if isinstance(skip := getattr(module, name, None), bool)]
    if not all(skips) or not (skips or any(hasattr(module, name) for name in _SHORTCUTS)):
        return None
    shortcut = _shortcut(module)
    steps = [m for child in module.children() if child is not shortcut for m in _without_gates(child) if _acts(m)]
    convolutions = [m for m in steps if isinstance(m, nn.Conv2d)]
    shallow = [m for child in module.children() for m in (child, *child.children())]
    if not skips and any(m not in shallow for m in convolutions):
        return None  # a stage of blocks of a form unknown here
    if len(convolutions) < 2 or not isinstance(getattr(steps[-1], "weight", None), nn.Parameter):
        return None  # statistics without weights (frozen, not affine): a branch that cannot be silenced by its weights
    beside = [m for m in shortcut.modules() if isinstance(m, nn.Conv2d)] if shortcut is not None else []
    carries = shortcut is None or isinstance(shortcut, nn.Identity) or not list(shortcut.modules())[1:]
    if beside or carries:
        expected = beside[-1].out_channels if beside else convolutions[0].in_channels
        if _channels(steps[-1]) != expected:
            return None
    return steps[-1]


def _without_gates(module: nn.Module) -> list[nn.Module]:
    """Returns the modules below `module` in order, leaving out squeeze-and-excitations, which scale and add nothing."""
    if squeezes(module):
        return []
    return [module, *(m for child in module.children() for m in _without_gates(child))]


def _acts(module: nn.Module) -> bool:
    """Returns whether a module has a weight per channel, or would have if it were not frozen."""
    weighted = isinstance(module, _AFFINE) and getattr(module, "weight", None) is not None
    return weighted or hasattr(module, "running_mean")


def _channels(module: nn.Module) -> int:
    if mixing_axes(module) is not None:
        return sizes(module)[1]
    weight = module.weight
    return len(weight) if isinstance(weight, Tensor) else 0


def _module_at(name: str, module: nn.Module, path: str) -> nn.Module:
    try:
        end = module.get_submodule(path)
    except AttributeError as error:
        raise SelectionError(
            f"Module {name!r} is a {type(module).__name__}, registered as a residual block with the branch {path!r}, "
            "which it has not. Correct ablate.register_residual(...)."
        ) from error
    if not isinstance(getattr(end, "weight", None), nn.Parameter):
        raise SelectionError(
            f"Module {name!r}: the branch {path!r} ends in a {type(end).__name__} without a weight. Give the last "
            "module that has one in ablate.register_residual(...)."
        )
    return end


def _ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))} if name else set()
