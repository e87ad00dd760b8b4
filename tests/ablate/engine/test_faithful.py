"""Law 9: a copy is proven to respond. What would go on running the original's weights is found and named."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ablate
import coar
from ablate.engine.faithful import UnprovenError, prove
from ablate.errors import GatingError
from ablate.models.copies import copy_of, copy_with
from ablate.models.lending import lent

Untouched = Callable[..., AbstractContextManager[None]]
INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(6) % 3
ADVICE = (
    "Make it a method of a class that finds its layers on self (for another forward: a module of your own that holds "
    "this model and calls it), or remove it."
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(torch.relu(self.first(x)))
        return logits

    def first(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y


class Calls(Net):
    """Calls what it keeps as an attribute."""

    act: Callable[[Tensor], Tensor]
    own: list[object]

    def first(self, x: Tensor) -> Tensor:
        return self.act(x)


class Child(nn.Module):
    parent: Callable[[], Net | None]

    def forward(self, x: Tensor) -> Tensor:
        parent = self.parent()
        assert parent is not None
        y: Tensor = parent.a(x)
        return y


class Holder:
    """Not a module."""

    call: Callable[[Tensor], Tensor]


class Asks(Net):
    holder: Holder

    def first(self, x: Tensor) -> Tensor:
        return self.holder.call(x)


def _closure() -> nn.Module:
    net = Calls()
    net.act = lambda x: net.a(x)
    return net


def _default() -> nn.Module:
    net = Calls()

    def act(x: Tensor, layer: Callable[[Tensor], Tensor] = net.a) -> Tensor:
        return layer(x)

    net.act = act
    return net


def _tensor_in_a_closure() -> nn.Module:
    net = Calls()
    weight = net.a.weight.data
    net.act = lambda x: x @ weight.T
    return net


def _partial() -> nn.Module:
    net = Calls()
    net.act = functools.partial(lambda layer, x: net.a(x), net.a)
    return net


def _builtin() -> nn.Module:
    net = Calls()
    net.act = net.a.weight.matmul
    return net


def _cached() -> nn.Module:
    net = Calls()
    net.act = functools.lru_cache(lambda x: net.a(x))
    return net


def _patched() -> nn.Module:
    net = Net()
    plain = net.forward
    net.forward = lambda x: plain(x) * 1.0  # type: ignore[method-assign]
    return net


def _of_a_class() -> nn.Module:
    layer = nn.Linear(4, 5)

    class Local(Net):
        def __init__(self) -> None:
            super().__init__()
            self.a = layer

        def first(self, x: Tensor) -> Tensor:
            y: Tensor = layer(x)
            return y

    return Local()


def _weak() -> nn.Module:
    net = Calls()
    net.act = Child()
    net.act.parent = weakref.ref(net)
    return net


def _proxy() -> nn.Module:
    net = Net()
    net.__dict__["alias"] = weakref.proxy(net.a)
    net.__class__ = type("Proxied", (Net,), {"first": lambda self, x: self.alias(x)})
    return net


def _hook() -> nn.Module:
    net = Net()

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        net.seen = output

    net.a.register_forward_hook(keep)
    return net


class Own(nn.Linear):
    """Is its own copy."""

    def __deepcopy__(self, memo: dict[int, object]) -> Own:
        return self


def _own_copy() -> nn.Module:
    net = Net()
    net.a = Own(4, 5)
    return net


HOLDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a closure": (_closure, "act of the Calls itself (a function with a variable 'net') holds the whole"),
    "a default value": (_default, "act of the Calls itself (a default value) holds module 'a'"),
    "a tensor": (
        _tensor_in_a_closure,
        "act of the Calls itself (a function with a variable 'weight') holds 'a.weight'",
    ),
    "a partial function": (
        _partial,
        "act of the Calls itself (a partial function) (a function with a variable 'net') holds the whole",
    ),
    "a method of a weight": (_builtin, "act of the Calls itself (a method, matmul) holds 'a.weight'"),
    "a cached function": (
        _cached,
        "act of the Calls itself (a cached function) (a function with a variable 'net') holds the whole",
    ),
    "another forward": (
        _patched,
        "forward of the Net itself (a function with a variable 'plain') (a method, forward) holds the whole",
    ),
    "a method of a local class": (
        _of_a_class,
        "first of class Local (a function with a variable 'layer') holds module 'a'",
    ),
    "a weak reference": (_weak, "parent of module 'act' (a weak reference) holds the whole"),
    "a weak proxy": (_proxy, "alias of the Proxied itself (a weak proxy) holds module 'a'"),
    "a hook": (_hook, "_forward_hooks of module 'a' (a function with a variable 'net') holds the whole"),
    "a module that is its own copy": (_own_copy, "module 'a', which is its own copy, holds module 'a'"),
}


@pytest.mark.parametrize("name", HOLDS)
def test_what_holds_the_original_is_named_whoever_copies(name: str, untouched: Untouched) -> None:
    build, where = HOLDS[name]
    model = build().eval()
    index = ablate.ComponentIndex.from_model(model, ["linear_neuron"], include=["b"])
    expected = (
        f"A copy of this {type(model).__name__} would go on running the original's weights: {where} of the original, "
        f"and no copy can rebind that. {ADVICE}"
    )
    edit = coar.Edit(index.select([0]))
    for use in (
        lambda: ablate.Engine(model, index),
        lambda: copy_of(model),
        lambda: edit.apply(model),
        lambda: coar.get_editor("finetune", steps=1).edit(model, coar.Request(INPUTS, TARGETS), index.select([0])),
    ):
        with untouched(model), pytest.raises(GatingError) as caught:
            use()
        assert str(caught.value) == expected


def test_functions_that_hold_nothing_of_the_model_are_fine() -> None:
    seen: list[Tensor] = []
    model = Calls().eval()
    model.act = functools.partial(Net.first, model)  # a copy rebinds what partial functions and methods hold
    model.a.register_forward_hook(lambda module, args, output: seen.append(output))
    model.own = [model.a, {"b": model.b}]
    copied = copy_of(model)
    with torch.no_grad():
        copied.get_parameter("a.weight").zero_()
    assert not torch.equal(copied(INPUTS), model(INPUTS))


wrapped = Net()  # a global of the name that Wrapper has for an attribute


class Wrapper(nn.Module):
    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.wrapped(x)
        return logits


class Global(Net):
    def first(self, x: Tensor) -> Tensor:
        y: Tensor = wrapped.a(x)
        return y


def test_a_global_is_told_from_an_attribute_of_its_name() -> None:
    copy_of(Wrapper(wrapped))
    model = Global()
    model.a = wrapped.a
    where = r"first of class Global \(a function that uses the global 'wrapped'\) holds"
    copy_of(model)  # the layer that it shares is found by running: the global itself is none of its modules
    model.inner = wrapped
    with pytest.raises(GatingError, match=where):
        copy_of(model)


def _engine_says(model: nn.Module) -> str:
    index = ablate.ComponentIndex.from_model(model.eval())
    with pytest.raises(GatingError) as caught:
        ablate.Engine(model, index, self_check=False).outputs(np.ones((1, len(index)), dtype=bool), INPUTS, TARGETS)
    return str(caught.value)


def test_what_only_running_tells(untouched: Untouched) -> None:
    """An object of no module holds the original: what it is for cannot be known without a run."""
    model = Asks()
    model.holder = Holder()
    model.holder.call = lambda x: model.a(x)
    model.eval()
    with untouched(model):
        assert _engine_says(model).startswith(
            "A copy of this Asks reads 'a.weight', 'a.bias' of the original's memory. "
        )


def test_a_weight_that_the_copy_does_not_use() -> None:
    class Twice(Net):
        """Its copy calls a copy of the layer that is none of its own."""

        def __deepcopy__(self, memo: dict[int, object]) -> Net:
            made = Calls()
            made.load_state_dict(self.state_dict())
            layer = nn.Linear(4, 5)
            layer.load_state_dict(self.a.state_dict())
            made.act = functools.partial(_run_first, [layer])
            return made

    assert _engine_says(Twice()).startswith(
        "A copy of this Twice does not use 'a.weight', 'a.bias', which the model uses. "
    )


def _run_first(layers: list[nn.Module], x: Tensor) -> Tensor:
    y: Tensor = layers[0](x)
    return y


def test_numbers_tell_what_memory_does_not() -> None:
    class Counts(Net):
        """Its copy knows that it is one."""

        original = True

        def __deepcopy__(self, memo: dict[int, object]) -> Net:
            made = type(self)()
            made.load_state_dict(self.state_dict())
            made.original = False
            return made

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.original else super().forward(x).abs()

    assert _engine_says(Counts()).startswith(
        "A copy of this Counts does not respond as the model itself: with weights "
    )


class Writes(Net):
    """Writes a buffer, attributes and its own weight whenever it runs."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.log: list[int] = []
        self.cache = torch.zeros(2)

    def first(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(len(x))
        self.cache += 1
        self.last = x
        self.a.weight.data = torch.renorm(self.a.weight.data, 2, 0, 0.5)
        self.b.weight.data.mul_(1.0).clamp_(-0.1, 0.1)
        if bool((x == 99).any()):
            raise RuntimeError("on purpose")
        return super().first(x)


@pytest.mark.parametrize("raises", [False, True])
def test_a_live_model_is_put_back_whatever_it_writes(raises: bool, untouched: Untouched) -> None:
    model = Writes().train()
    model.b.eval()
    with torch.no_grad():
        model.a.weight[0, 0], model.a.weight[0, 1] = -0.0, float("nan")
    model(INPUTS).sum().backward()
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    state = dict(vars(model)), list(model.log), model.cache.clone()
    values = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name == "b.weight"}
    values |= {name: p.detach().clone() for name, p in model.named_parameters() if name == "a.weight"}
    with untouched(model):
        try:
            with lent(model, values) as memory, torch.no_grad():
                assert not model.training
                memory["a.bias"].fill_(3)
                assert not model.b.weight.any()
                model(torch.full((1, 4), 99.0) if raises else INPUTS)
        except RuntimeError:
            assert raises
    assert [tensor._version for tensor in (*model.parameters(), *model.buffers())] == versions
    assert (dict(vars(model)), model.log) == state[:2]
    assert torch.equal(model.cache, state[2])


def test_an_engine_is_of_the_time_when_it_was_made(untouched: Untouched) -> None:
    """The proof comes with the first inputs; the user may have trained on by then, and moved the model."""
    model = Net().eval()
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 4, 0.4).take(0, 4)
    expected = ablate.reference_outputs(model, index, keep, INPUTS, TARGETS)
    engine = ablate.Engine(model, index)
    with torch.no_grad():
        model.a.weight.mul_(2)
    model.double().train()
    with untouched(model):
        torch.testing.assert_close(engine.outputs(keep, INPUTS, TARGETS), expected)


def test_a_model_that_was_rebuilt_meanwhile() -> None:
    model = Net().eval()
    index = ablate.ComponentIndex.from_model(model)
    engine = ablate.Engine(model, index)
    model.b = nn.Linear(5, 7)
    with pytest.raises(
        UnprovenError, match=r"^This Net has changed since it was copied \('b\.weight' is not what it was"
    ):
        engine.outputs(np.ones((1, len(index)), dtype=bool), INPUTS, TARGETS)


def test_weights_made_in_inference_mode(untouched: Untouched) -> None:
    with torch.inference_mode():
        model = Net().eval()
    index = ablate.ComponentIndex.from_model(model)
    with untouched(model):
        prove(model, copy_of(model), index.select([0]), INPUTS[:2])


def test_a_lazy_model_is_told_to_run_once() -> None:
    with pytest.raises(
        GatingError, match=r"^The parameter 'weight' of this LazyLinear has no shape yet .* Run the model"
    ):
        copy_of(nn.LazyLinear(3))


@pytest.mark.parametrize("share", [False, True])
def test_a_copy_with_other_weights_keeps_what_lies_together(share: bool) -> None:
    model = Net()
    model.c = nn.Linear(5, 4)
    model.c.weight.data = model.a.weight.data.T
    changed = torch.ones(5, 4)
    copied = copy_with(model, {"a.weight": changed}, share)
    assert torch.equal(copied.get_parameter("c.weight"), changed.T)
    assert not torch.equal(model.a.weight, changed)
    other = copy_with(model, {}, share)
    with torch.no_grad():
        other.get_parameter("c.weight").zero_()
    assert not other.get_parameter("a.weight").any()
    assert bool(model.a.weight.any()) != share
