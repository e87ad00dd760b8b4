"""What is run to get from a layer's input to the value that it computes: a layer and what follows it, or its block.

A value is what the next layer reads, as Santurkar et al. (arXiv 2112.01008, A.4) have it: behind normalisation,
activation and pooling; in a residual network behind the sum, so that the skip connection is part of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ablate.index.residual import ResidualBlocks
from ablate.index.structure import Structure
from coar.errors import EditError

Captured = tuple[tuple[Any, ...], dict[str, Any], Tensor]

_FOLLOWERS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.dropout._DropoutNd,
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Block:
    """What is run to get from an input to a layer's value.

    Attributes:
      layer: Name of the layer in it whose weights are edited.
      modules: Names of the modules that are run, each on the output of the one before.
    """

    layer: str
    modules: tuple[str, ...]


def find_block(model: nn.Module, layer: str, around: str | None = None) -> Block:
    """Returns the block of a layer. Mutates nothing.

    It is the residual or transformer block around the layer; else, inside an `nn.Sequential`, the layer with the
    normalisation, activation and local pooling that follow it; else the module around it that is an item of an
    `nn.Sequential` or `nn.ModuleList`; else the layer alone.

    Args:
      model: The model.
      layer: Name of the layer.
      around: Name of the module to take instead: the layer, or one that contains it.

    Raises:
      EditError: No such module, or `around` does not contain the layer.
    """
    modules = dict(model.named_modules())
    for name in (layer, around):
        if name is not None and name not in modules:
            raise EditError(f"This {type(model).__name__} has no module {name!r}. See model.named_modules().")
    if around is not None:
        if around not in _lineage(layer):
            raise EditError(f"around is {around!r}, which does not contain the layer {layer!r}.")
        return Block(layer, (around,))
    residual = set(ResidualBlocks(Structure(model)).branches.values())
    nearest = next((name for name in _lineage(layer)[1:] if name in residual), None)
    if nearest is not None:
        return Block(layer, (nearest,))
    followers = _followers(modules, layer)
    if followers or _is_chain(modules[_parent(layer)]):
        return Block(layer, (layer, *followers))
    return Block(layer, (next((n for n in _lineage(layer)[1:] if _is_item(modules, n)), layer),))


def branch_ends(model: nn.Module) -> dict[str, str]:
    """Returns convolution or linear layer -> block, for the last such layer of each residual branch.

    A branch that ends in a normalisation ends, here, with the layer before it: the one whose weights can be edited.
    """
    blocks = ResidualBlocks(Structure(model))
    found = {}
    for end, block in blocks.branches.items():
        before = ""
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, (nn.Conv2d, nn.Linear)) and name not in blocks.shortcuts:
                before = name
            if name == end:
                break
        if before:
            found[before] = block
    return found


def capture(model: nn.Module, block: Block, inputs: Tensor, batch_size: int = 64) -> list[Captured]:
    """Returns (args, kwargs, output) of a block per batch of inputs, detached copies. Mutates nothing; no gradient.

    Memory: the block's inputs and outputs for all inputs.

    Raises:
      EditError: The model does not call the block once in a forward, or running it alone gives another output.
    """
    found = []
    with torch.no_grad():
        for batch in torch.split(inputs, batch_size):
            found.append(captured(model, block, batch))
            if len(found) == 1:
                _check_again(model, block, found[0])
    return found


def run_block(model: nn.Module, block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the output of a block on what `capture` gave, with the weights that it has now; with gradient.

    Mutates nothing: args are copied where the block works in place.
    """
    modules = [model.get_submodule(name) for name in block.modules]
    if any(getattr(part, "inplace", False) for module in modules for part in module.modules()):
        args, kwargs = _copied((args, dict(kwargs)))
    with _hooked():
        value: Any = modules[0](*args, **kwargs)
        for module in modules[1:]:
            value = module(value)
    return _tensor_of(value, block)


def run_until(model: nn.Module, block: Block, inputs: Tensor) -> Tensor:
    """Returns the output of a block for inputs of the model, with gradient; what comes after it is not run."""
    return _until(model, model.get_submodule(block.modules[-1]), inputs, lambda _, out: _tensor_of(out, block), block)


def layer_keys(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """Returns what a layer reads for inputs of the model, (n, positions..., channels in). No gradient; mutates nothing.

    Positions: height and width of a convolution's input, the tokens (or whatever lies between) of a linear layer's;
    none where the layer reads one vector per example.

    Raises:
      EditError: The model does not call the layer as a module, or not with one row per example.
    """
    module = model.get_submodule(layer)
    with torch.no_grad():
        key = _until(model, module, inputs, lambda args, _: args[0].detach().clone(), Block(layer, (layer,)))
    if len(key) != len(inputs):
        raise EditError(
            f"{layer!r} reads a tensor of shape {tuple(key.shape)} for {len(inputs)} examples, expected the examples "
            "on the first axis."
        )
    return key.movedim(1, -1) if isinstance(module, nn.Conv2d) else key


class _Stop(Exception):  # noqa: N818  # not an error: ends a forward
    """Ends a forward whose rest is not needed."""


def _until(
    model: nn.Module, module: nn.Module, inputs: Tensor, take: Callable[[tuple[Any, ...], Any], Tensor], block: Block
) -> Tensor:
    taken: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        taken.append(take(args, output))
        raise _Stop

    with _hooked(module.register_forward_hook(stop)):
        try:
            model(inputs)
        except _Stop:
            return taken[0]
    raise _never_called(model, block, 0)


def captured(model: nn.Module, block: Block, batch: Tensor) -> Captured:
    """Returns what `capture` does for one batch, without running the block again to check it."""
    starts: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    ends: list[Tensor] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        starts.append(_copied((args, kwargs)))

    def end(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ends.append(_tensor_of(output, block).detach().clone())

    first, last = (model.get_submodule(block.modules[i]) for i in (0, -1))
    with _hooked(first.register_forward_pre_hook(begin, with_kwargs=True), last.register_forward_hook(end)):
        model(batch)
    if len(starts) != 1 or len(ends) != 1:
        raise _never_called(model, block, max(len(starts), len(ends)))
    return *starts[0], ends[0]


def _check_again(model: nn.Module, block: Block, captured: Captured) -> None:
    args, kwargs, output = captured
    again = run_block(model, block, args, kwargs)
    tolerance = 1e-4 * float(output.abs().max()) + 1e-6 if output.numel() else 0.0
    if again.shape != output.shape or not torch.allclose(again, output, rtol=0, atol=tolerance, equal_nan=True):
        raise EditError(
            f"Running {' then '.join(map(repr, block.modules))} alone does not give what the model computes there: its "
            f"forward does something else. Name a module that contains the layer {block.layer!r} with around=."
        )


def _never_called(model: nn.Module, block: Block, count: int) -> EditError:
    where = " then ".join(map(repr, block.modules))
    return EditError(
        f"This {type(model).__name__} calls {where} {count} times in a forward, expected once: "
        + ("its weights are used without calling it as a module, or not at all. " if not count else "it is shared. ")
        + "Select another layer."
    )


@contextmanager
def _hooked(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Removes hooks at the end; until then attention takes no short cut past the modules that they are on."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    """Returns a structure with its tensors detached and copied."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


def _tensor_of(output: Any, block: Block) -> Tensor:
    """Returns the tensor that a block returns, the first if it returns a tuple."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise EditError(f"{block.modules[-1]!r} returns a {type(output).__name__}, expected a tensor.")
    return first


def _followers(modules: Mapping[str, nn.Module], layer: str) -> tuple[str, ...]:
    """Returns the modules that follow a layer in the sequence it is in, up to the next that mixes channels."""
    found: list[str] = []
    name = layer
    while name and _is_chain(modules[_parent(name)]):
        parent = _parent(name)
        names = [f"{parent}.{child}" if parent else child for child in modules[parent]._modules]
        for follower in names[names.index(name) + 1 :]:
            leaves = [leaf for leaf, _ in modules[follower].named_modules()] if _is_chain(modules[follower]) else [""]
            parts = [modules[f"{follower}.{leaf}" if leaf else follower] for leaf in leaves]
            if not all(_follows(part) for part in parts if not _is_chain(part)):
                return tuple(found)
            found.append(follower)
        name = parent
    return tuple(found)


def _follows(module: nn.Module) -> bool:
    activation = type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, nn.MultiheadAttention
    )
    return activation or isinstance(module, _FOLLOWERS)


def _is_chain(module: nn.Module) -> bool:
    """Returns whether a module does nothing but to run its children one after another."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_item(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Returns whether a module is an item of a list of modules and small: not a network with such items in turn."""
    if not name or _is_chain(modules[name]) or not isinstance(modules[_parent(name)], _LISTS):
        return False
    layers = {other for other, module in modules.items() if isinstance(module, (nn.Conv2d, nn.Linear))}
    if all(_within(other, name) for other in layers):
        return False  # all of the model, e.g. behind a normalisation of its inputs
    return not any(
        _within(other, name) and len(list(module.children())) and isinstance(modules[_parent(other)], _LISTS)
        for other, module in modules.items()
        if other != name and not isinstance(module, _LISTS)
    )


def _within(name: str, around: str) -> bool:
    return not around or name == around or name.startswith(f"{around}.")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _lineage(name: str) -> list[str]:
    """Returns the names of a module and of all around it, from the inside out, the root's "" last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
