"""Where in a model to edit, if the user does not say: the last layer before the classes, some feed-forward networks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ablate import ComponentIndex, Selection
from ablate.index.flow import flow_of
from ablate.index.kinds import Anatomy
from ablate.index.structure import is_transposed_linear
from coar.errors import EditError

# Yang et al. (arXiv 2411.01948), Section 3.3, edit blocks 8 to 10 of 12: two are left behind them.
BLOCKS_BEHIND = 2 / 12


def last_layer(model: nn.Module) -> Selection:
    """Returns all units of the last layer before the classes: filters of a convolution, neurons of a linear layer.

    Shortcuts of residual blocks do not count.
    """
    return _last_layers(model, 1)


def last_feed_forward_blocks(model: nn.Module, blocks: int = 3) -> Selection:
    """Returns the rows of the first and the columns of the second layer of some feed-forward networks.

    Of `blocks` networks in a row, a sixth of all behind them: 8 to 10 of 12 (Yang et al., arXiv 2411.01948). In a model
    without feed-forward networks: the filters of its last convolutions, as many.
    """
    anatomy = Anatomy(model)
    if not anatomy.ffn_first:
        return _last_layers(model, blocks)
    index = ComponentIndex.from_model(model, ["ffn_in", "ffn_out"])
    firsts = by_use(model, [port.module for port in index.ports if port.kind == "ffn_in"])
    seconds = by_use(model, [port.module for port in index.ports if port.kind == "ffn_out"])
    stop = max(min(blocks, len(firsts)), round(len(firsts) * (1 - BLOCKS_BEHIND)))
    chosen = {*firsts[max(0, stop - blocks) : stop], *seconds[max(0, stop - blocks) : stop]}
    return index.select(c for name in chosen for c in index.where(module=_literally(name)).ids)


def _last_layers(model: nn.Module, count: int) -> Selection:
    index = ComponentIndex.from_model(model)
    shortcuts = Anatomy(model).residual.shortcuts
    modules = by_use(model, [port.module for port in index.ports if port.module not in shortcuts])
    return index.select(c for name in modules[-count:] for c in index.where(module=_literally(name)).ids)


def by_use(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Returns these modules, each once, in the order in which a forward pass uses them; without those it does not.

    Where that cannot be found out, in the order given: that of their declaration.
    """
    names = list(dict.fromkeys(modules))
    flow = flow_of(model)
    return names if flow is None else sorted((n for n in names if n in flow.order), key=flow.position)


def one_layer(selection: Selection, model: nn.Module, method: str) -> tuple[str, nn.Module]:
    """Returns name and module of the one layer that a selection lies in: a convolution or a linear layer.

    Raises:
      EditError: It lies in several, or in something else.
    """
    names = list(dict.fromkeys(selection.table()["module"]))
    if len(names) > 1:
        raise EditError(
            f"{method} edits one layer, the selection lies in {len(names)}: {', '.join(names[:5])}"
            f"{' ...' if len(names) > 5 else ''}. Select with index.where(module=...)."
        )
    module = model.get_submodule(names[0])
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or is_transposed_linear(module):
        raise EditError(f"{method} edits a linear layer or a 2-d convolution, {names[0]!r} is {_kind(module)}.")
    return names[0], module


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _literally(name: str) -> str:
    """Returns the pattern that fits one name only."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
