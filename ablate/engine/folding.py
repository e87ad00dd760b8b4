"""Making the engine's own copy of a model cheaper without changing what it computes: folding, precision, layout."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ablate.index.components import ComponentIndex
from ablate.index.convolutions import CONVOLUTIONS
from ablate.models.copies import cast


def fold_batch_norms(model: nn.Module, folds: Sequence[tuple[str, str]], gated: Collection[str]) -> dict[str, str]:
    """Folds every batch norm into the convolution before it, in place; returns the norm each convolution took in.

    The convolution's bias becomes the folded shift, so that a filter whose weights are zero still leaves what batch
    norm would have made of its bias. Norms whose own parameters are gated, and convolutions that share their weight,
    stay as they are.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    folded = {}
    for conv_name, norm_name in folds:
        conv: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        gated_norm = {f"{norm_name}.weight", f"{norm_name}.bias"} & set(gated)
        if gated_norm or owners[id(conv.weight)] > 1 or not _is_foldable(norm):
            continue
        with torch.no_grad():
            scale = norm_scale(norm)
            bias = norm.running_mean.new_zeros(()) if conv.bias is None else conv.bias
            shift = (bias - norm.running_mean) * scale
            if norm.bias is not None:
                shift = shift + norm.bias
            conv.weight.mul_(scale.view(-1, *[1] * (conv.weight.ndim - 1)))
            conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
        _replace(model, norm_name, _what_remains(norm))
        folded[conv_name] = norm_name
    return folded


def norm_scale(norm: Any) -> Tensor:
    """Returns what a batch norm in eval mode multiplies each channel by, (channels,)."""
    with torch.no_grad():
        scale: Tensor = torch.rsqrt(norm.running_var + norm.eps)
        return scale if norm.weight is None else scale * norm.weight


def _what_remains(norm: nn.Module) -> nn.Module:
    """Returns what a norm's module does after the norm: nothing, or timm's `drop` and `act`."""
    extra = [module for name in ("drop", "act") if isinstance(module := getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*extra) if extra else nn.Identity()


def _is_foldable(norm: nn.Module) -> bool:
    """Returns whether a batch norm's module does nothing that folding would lose."""
    return type(norm) is nn.BatchNorm2d or (
        isinstance(norm, nn.BatchNorm2d) and all(isinstance(getattr(norm, n, None), nn.Module) for n in ("drop", "act"))
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def add_missing_biases(model: nn.Module, index: ComponentIndex) -> None:
    """Gives gated convolutions, linear layers and attentions without bias one of zeros, in place, to hold a mean."""
    for port in index.ports:
        module: Any = model.get_submodule(port.module)
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) and getattr(module, "bias", None) is None:
            channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            zeros = module.weight.new_zeros(channels)
            module.bias = nn.Parameter(zeros, requires_grad=False)
        if isinstance(module, nn.MultiheadAttention) and getattr(module, "in_proj_bias", None) is None:
            zeros = module.out_proj.weight.new_zeros(3 * module.embed_dim)
            module.in_proj_bias = nn.Parameter(zeros, requires_grad=False)


class _Float32Head(nn.Module):
    """Mixed into a copy of a linear layer's class: computes in float32, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output in float32."""
        result: Tensor = super().forward(x.float())
        return result


@cache
def _head_class(layer: type[nn.Module]) -> type[nn.Module]:
    return type(f"Float32{layer.__name__}", (_Float32Head, layer), {"__module__": layer.__module__})


def to_precision(model: nn.Module, device: torch.device, dtype: torch.dtype, head: str | None) -> None:
    """Casts the model's weights to a precision on a device, in place.

    In bfloat16 the linear layer that makes the logits and batch norms that were not folded stay in float32.
    """
    if dtype != torch.bfloat16:
        cast(model, device, dtype)
        return
    keep: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    shared = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if head is not None:
        layer = model.get_submodule(head)
        if all(shared.count(id(p)) == 1 for p in layer.parameters()):  # a head tied to an embedding stays with it
            layer.__class__ = _head_class(type(layer))  # type: ignore[arg-type]  # a class of modules is hashable
            keep.append(layer)
    originals = [(m, {n: t.detach().clone() for n, t in _tensors(m).items()}) for m in keep]
    cast(model, device, dtype)
    for module, tensors in originals:
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                _tensors(module)[name].data = tensor.to(device, torch.float32)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
