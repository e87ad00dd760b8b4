"""Where values go in a model: the order in which its layers are used, and which of them make what it returns.

Found by running the model where there are inputs. Without, a copy of its modules is called with a symbol instead of a
tensor, which notes what is done to it: nothing is computed, and nothing of the model is touched. Most models can be
followed so; one whose forward asks for numbers or shapes cannot, and then nothing is claimed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ablate.index.convolutions import filters_of
from ablate.index.structure import linear_axes
from ablate.logits import LOGITS, entries_of
from ablate.models.copies import copy_of, device_of
from ablate.state import preserved_random_state

_Result = TypeVar("_Result")

# functions whose every output is made of many inputs, by their names in torch
MIXING = {
    "linear", "bilinear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "tensordot", "embedding",
    "scaled_dot_product_attention", "multi_head_attention_forward", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
# the same in an autograd graph
MIXING_BACKWARD = ("Addmm", "Mm", "Bmm", "Baddbmm", "Mv", "Convolution", "Linear", "Scaled", "Embedding")


@dataclass(frozen=True)
class Flow:
    """What was seen of a model's forward.

    Attributes:
      order: Names of the modules whose own parameters it uses, in the order of first use.
      makers: Layers each output of which is one entry of what the model returns: of a classifier, those that make the
        classes. Empty where there are none, e.g. where the sum of many layers is returned.
      how: How it was seen, in words.
    """

    order: tuple[str, ...]
    makers: tuple[str, ...]
    how: str

    def position(self, module: str) -> int:
        """Returns when a module is used, of those that are not: after all others."""
        return self.order.index(module) if module in self.order else len(self.order)


_inputs: ContextVar[tuple[nn.Module, Tensor] | None] = ContextVar("inputs", default=None)


@contextmanager
def seen_with(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Makes `flow_of` run this model on these inputs for the time of a `with` block, where it can."""
    token = _inputs.set((model, inputs))
    try:
        yield
    finally:
        _inputs.reset(token)


def flow_of(model: nn.Module, inputs: Tensor | None = None) -> Flow | None:
    """Returns how values flow through a model, None if that cannot be told. Mutates nothing.

    Args:
      model: Any module; seen in eval mode.
      inputs: One or more, (examples, ...), to run a copy of the model on the first; None: those of `seen_with`, else it
        is followed without inputs.

    Cost: with inputs a forward and a copy; else neither memory nor computation worth mentioning.
    """
    known = _inputs.get()
    if inputs is None and known is not None and known[0] is model:
        try:
            return run_flow(model, known[1])
        except Exception:  # what the model has against these inputs is told where they are used
            return traced_flow(model)
    return traced_flow(model) if inputs is None else run_flow(model, inputs)


def run_flow(model: nn.Module, inputs: Tensor) -> Flow:
    """Returns how values flow through a model as a copy of it runs on the first input; raises what the model raises."""
    with preserved_random_state(), torch.inference_mode(False), torch.enable_grad():
        own = copy_of(model).eval()
        for parameter in own.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        first = inputs[:1].detach().clone().to(device_of(own))
        names, returned = _used_by(own, first)
        makers = _makers_by_gradient(own, list(_results(returned, Tensor)))
    return Flow(tuple(dict.fromkeys(map(_owner, names))), makers, "seen by running example inputs")


def traced_flow(model: nn.Module) -> Flow | None:
    """Returns how a symbol flows through a copy of a model's modules, None if its forward asks for more than that."""
    try:
        with preserved_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outline = _outline(model)
            tracer = _Tracer(outline)
            result = outline(fx.Proxy(tracer.graph.placeholder("x"), tracer))
            returned = [symbol.node for symbol in _results(result, fx.Proxy)]
            if not returned:
                return None
            return Flow(_order(tracer.graph, outline), _makers(returned, outline), "seen by following values")
    except Exception:  # whatever a forward does with what is no tensor
        return None


def order_of_use(model: nn.Module, inputs: Tensor) -> list[str]:
    """Returns the names of the parameters that a forward pass uses, in the order of their first use. Mutates nothing.

    Found by running the model on the first input, not from the order of its attributes: that may be another one.
    """
    return list(dict.fromkeys(all_uses(model, inputs)))


def all_uses(model: nn.Module, inputs: Tensor) -> list[str]:
    """Returns the parameter's name at every use in a forward pass of the first input, in order. Mutates nothing."""
    with torch.no_grad():
        return _used_by(model, inputs[:1])[0]


def _used_by(model: nn.Module, inputs: Tensor) -> tuple[list[str], Any]:
    with _Uses({id(parameter): name for name, parameter in model.named_parameters()}) as uses:
        returned = model(inputs)
    return uses.names_in_order, returned


class _Uses(TorchFunctionMode):
    """Notes which parameters are arguments of calls that give tensors."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.names_in_order: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if next(_tensors(result), None) is not None:  # not for a look at the shape or dtype
            for tensor in _tensors([args, kwargs]):
                if id(tensor) in self.names:
                    self.names_in_order.append(self.names[id(tensor)])
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _makes_rows(module: nn.Module) -> bool:
    return linear_axes(module) is not None or filters_of(module) is not None


def _makers_by_gradient(model: nn.Module, returned: list[Tensor]) -> tuple[str, ...]:
    """Returns the layers whose weights are met first on the way back from what is returned to the inputs."""
    owners = {id(parameter): _owner(name) for name, parameter in model.named_parameters()}
    steps: dict[Any, list[Any]] = {}

    def before(node: Any) -> list[Any]:
        return steps.setdefault(node, [child for child, _ in node.next_functions if child is not None])

    def weights(node: Any) -> list[str]:
        """The owners of the weights that a mixing node multiplies by."""
        found = []
        for child in before(node):
            # a mixing step behind is another layer's: this child is the layer's input, not its weight
            while not hasattr(child, "variable") and len(before(child)) == 1 and not mixes(child):
                child = before(child)[0]
            weight = getattr(child, "variable", None)
            if weight is not None and weight.ndim > 1 and id(weight) in owners:
                found.append(owners[id(weight)])
        return found

    def mixes(node: Any) -> bool:
        return str(node.name()).startswith(MIXING_BACKWARD)

    start = [tensor.grad_fn for tensor in returned if tensor.grad_fn is not None]
    return _first_met(start, before, mixes, weights, model)


def _first_met(
    start: list[Any],
    before: Callable[[Any], list[Any]],
    mixes: Callable[[Any], bool],
    weights: Callable[[Any], list[str]],
    model: nn.Module,
) -> tuple[str, ...]:
    """Returns the layers at the first mixing steps on the way back; none if one of these steps depends on another."""
    ends = [node for node in _back(start, before, mixes) if mixes(node)]
    behind = set(_back([child for node in ends for child in before(node)], before, lambda node: False))
    if len(ends) > 1 and behind & set(ends):
        return ()  # a residual stream: no layer makes it by itself
    found = dict.fromkeys(name for node in ends for name in weights(node))
    return tuple(name for name in found if _makes_rows(model.get_submodule(name)))


def _back(start: list[Any], before: Callable[[Any], list[Any]], stop: Callable[[Any], bool]) -> list[Any]:
    """Returns every step on the way back, up to those at which it stops, these included."""
    seen: dict[Any, None] = {}
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen[node] = None
            if not stop(node):
                waiting += before(node)
    return list(seen)


def _outline(model: nn.Module) -> nn.Module:
    """Returns a copy of a model's modules without values, hooks or memory, in eval mode."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("A scripted model cannot be followed.")
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    outline: nn.Module = copy.deepcopy(model, memo)
    if {id(module) for module in outline.modules()} & {id(module) for module in model.modules()}:
        raise TypeError("A module is its own copy.")
    outline.eval()
    for module in outline.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return outline


def _is_leaf(module: nn.Module) -> bool:
    """Returns whether a module counts as one step: layers, and what torch brings but its containers."""
    own = type(module).__module__.startswith("torch.nn") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )
    return own or _makes_rows(module)


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Notes what is done to a symbol; unlike `fx.Tracer` it changes no class of torch meanwhile."""

    def __init__(self, outline: nn.Module) -> None:
        super().__init__(fx.Graph())
        self._names = {id(t): n for n, t in (*outline.named_parameters(), *outline.named_buffers())}
        self._storages = {_storage(p): n for n, p in outline.named_parameters()}
        for name, module in list(outline.named_modules()):
            if name and _is_leaf(module):
                vars(module)["forward"] = self._step(name)
            else:
                self._replace_parameters(module)

    def _replace_parameters(self, module: nn.Module) -> None:
        """Makes symbols of the parameters that a module's own forward uses: they meet symbols there."""
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            del module._parameters[leaf]
            vars(module)[leaf] = fx.Proxy(self.create_arg(parameter), self)

    def _step(self, name: str) -> Callable[..., fx.Proxy]:
        def forward(*args: Any, **kwargs: Any) -> fx.Proxy:
            return self.create_proxy("call_module", name, args, kwargs)

        return forward

    def create_arg(self, a: Any) -> Any:
        """Returns an argument as the graph keeps it: tensors by name."""
        if isinstance(a, nn.Parameter) and id(a) not in self._names:
            raise TypeError("A weight that is none of the copy's: what runs is not the copy.")
        if isinstance(a, Tensor):
            name = self._names.get(id(a)) or self._storages.get(_storage(a))  # a view (`weight.T`) is its weight
            if name is None and a.is_meta:
                raise TypeError("Something was computed of weights alone: of which is not known.")
            return self.graph.create_node("get_attr", name or "a constant")
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return repr(type(a))


def _storage(tensor: Tensor) -> int:
    """Returns what a tensor has in common with its views, on device meta, too."""
    return int(tensor.untyped_storage()._cdata)


def _results(returned: Any, kind: type[_Result]) -> Iterator[_Result]:
    """Yields the tensors, or symbols, in what was returned: the logits, where they are told apart, else all."""
    if isinstance(returned, kind):
        yield returned
        return
    entries = entries_of(returned)
    for value in [entries[LOGITS]] if LOGITS in entries else entries.values():
        if isinstance(value, (kind, Mapping, tuple, list)):
            yield from _results(value, kind)


def _order(graph: fx.Graph, outline: nn.Module) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            if used.op == "get_attr":
                found.setdefault(_owner(str(used.target)))
        if node.op == "call_module":
            for name, module in outline.get_submodule(node.target).named_modules(prefix=node.target):
                if next(module.parameters(recurse=False), None) is not None:
                    found.setdefault(name)
    return tuple(found)


def _makers(returned: list[fx.Node], outline: nn.Module) -> tuple[str, ...]:
    def before(node: fx.Node) -> list[fx.Node]:
        return list(node.all_input_nodes)

    def mixes(node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(parameter.ndim > 1 for parameter in outline.get_submodule(str(node.target)).parameters())
        return str(getattr(node.target, "__name__", node.target)) in MIXING

    def weights(node: fx.Node) -> list[str]:
        if node.op == "call_module":
            return [str(node.target)]
        constant = [n for n in before(node) if all(m.op != "placeholder" for m in _back([n], before, lambda m: False))]
        return [_owner(str(n.target)) for n in _back(constant, before, lambda m: False) if n.op == "get_attr"]

    return _first_met(list(returned), before, mixes, weights, outline)
