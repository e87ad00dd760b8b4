"""Compilation of the engine's own model: the repeated block where there is one, else the whole."""

from __future__ import annotations

from collections import Counter

from torch import nn

LEAST = 3  # blocks of one kind
SHARE = 0.6  # of the parameters, in blocks of one kind


def repeated_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the blocks that a model repeats: children of one list, of one type and shape, with most parameters.

    Compiling one of them serves all: a ViT of 12 blocks compiles in seconds instead of a minute.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    for name, parent in model.named_modules():
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
            continue
        kinds = Counter(_kind(child) for child in parent.children())
        if not kinds:
            continue
        kind, count = kinds.most_common(1)[0]
        blocks = [(f"{name}.{leaf}", child) for leaf, child in parent.named_children() if _kind(child) == kind]
        size = sum(parameter.numel() for _, block in blocks for parameter in block.parameters())
        if count >= LEAST and size >= SHARE * total:
            return blocks
    return []


def _kind(module: nn.Module) -> tuple[type[nn.Module], tuple[tuple[int, ...], ...]]:
    return type(module), tuple(tuple(parameter.shape) for parameter in module.parameters())


def compile_model(model: nn.Module, mode: str | None, whole: bool = False) -> str:
    """Compiles a model in place, for fixed shapes, at its first forward; returns what was compiled.

    Args:
      model: Owned by the engine, its gates in place: what is hooked or gated after compilation may be ignored.
      mode: Of `torch.compile`: None, "max-autotune", "reduce-overhead" (CUDA graphs), ...
      whole: Do not look for repeated blocks: where gates are found by the identity of each weight, no two are alike.
    """
    blocks = [] if whole else repeated_blocks(model)
    for _, block in blocks:
        block.compile(mode=mode, dynamic=False)
    if blocks:
        return f"{len(blocks)} blocks {blocks[0][0]} to {blocks[-1][0]}"
    model.compile(mode=mode, dynamic=False)
    return "the whole model"
