"""Activation gating compared with weight gating, and gradients with differences, before anything is computed.

Every component of every site stands under a gate of its own, none of them 0 or 1: a gate in the wrong place shows, and
no signal dies. A site that differs is gated where its weight is used instead of at its layer; if that differs, too, it
is listed as one that cannot be gated per example. Weight gating, which needs none of this, goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ablate.errors import NoGradientError
from ablate.gating.activation import ActivationGates
from ablate.gating.closeness import gap
from ablate.gating.routing import ROUNDING
from ablate.gating.weights import WeightGates

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of the largest logit
STEP = {torch.float64: 1e-6, torch.float32: 1e-2}  # of gates, for differences
SLOPE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 0.1}  # of all slopes together: a kink may lie within a step
COARSE = 1e-9  # of a value: a second difference in float64 is smaller, unless something was rounded to float32
COARSE_STEP, COARSE_TOLERANCE = 1e-3, 1e-2  # for models that are float64 in part


def mixed_gates(components: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns gates (components,) between 0.5 and 1.5, another for each component."""
    generator = torch.Generator().manual_seed(2718 + seed)
    return (0.5 + torch.rand(components, generator=generator, dtype=torch.float64)).to(device, dtype)


def differ(got: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Returns by how much logits differ where that is more than rounding, else 0."""
    found = gap(got, expected, TOLERANCE[dtype])
    return 0.0 if found is None else found.difference


class GateCheck:
    """Checks the gates of a model on two examples; what it finds out is noted at the gates.

    Args:
      run: Runs the model under gates; called many times only where something is wrong.
      activation: Its gates.
      weights: The same components, gated by weights.
      inputs: Two examples.
      dtype: Of the model.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        activation: ActivationGates,
        weights: WeightGates,
        inputs: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._run, self._activation, self._weights = run, activation, weights
        self._inputs, self._dtype = inputs, dtype
        self._mixed = mixed_gates(len(activation.index), 0, inputs.device, dtype)
        self._plain: Tensor | None = None  # logits of the first example under them
        self._coarse = False  # whether it computes some of it in less than its dtype

    def by_weights(self, *rows: Tensor, first: int = 0) -> Tensor:
        """Returns the logits (rows, ...) of an example per row of gates, from the first on, by changing weights."""
        try:
            found = []
            with torch.no_grad():
                for example, row in enumerate(rows, first):
                    self._weights.set_gates(row)
                    found.append(self._run(self._inputs[example : example + 1]))
            return torch.cat(found)
        finally:
            self._weights.restore()

    def by_gates(self, gates: Tensor) -> Tensor:
        """Returns the logits of the first examples, each under its own gates (examples, components)."""
        size = 1 if self._activation.alone else len(gates)
        rows = []
        with self._activation.active():
            for first in range(0, len(gates), size):
                self._activation.set(self._activation.split(gates[first : first + size]))
                rows.append(self._run(self._inputs[first : first + size]))
        return torch.cat(rows)

    def values(self, sample: Tensor, by_weights: Tensor) -> None:
        """Compares logits; notes what differs as problems.

        Args:
          sample: Gates (components,) of the second example, beside mixed ones of the first.
          by_weights: Its logits (1, ...) under them.
        """
        self._plain = self.by_weights(self._mixed)
        expected = torch.cat([self._plain, by_weights])
        gates = torch.stack([self._mixed, sample])
        with torch.no_grad():
            if not differ(self.by_gates(gates), expected, self._dtype):
                return
            wrong = {name: by for name in list(self._activation.sites) if (by := self._settled(name))}
            if not wrong and (difference := differ(self.by_gates(gates), expected, self._dtype)):
                wrong = dict.fromkeys(self._activation.sites, difference)
        for name, difference in wrong.items():
            for _, port in self._activation.sites[name].ports:
                self._activation.problems.setdefault(
                    port.module,
                    "its gates do not do what other weights of it do: logits differ by "
                    f"{difference:.3g} on two examples",
                )

    def _settled(self, name: str) -> float:
        """Returns by how much the gates of one weight miss what other weights do, gating it where that is right."""
        ones = torch.ones_like(self._mixed)
        rows = torch.stack([self._only(name, self._mixed, ones), self._only(name, self._mixed.flip(0), ones)])
        expected = self.by_weights(*rows)
        difference = differ(self.by_gates(rows), expected, self._dtype)
        if difference and self._activation.gate_where_used(name):
            difference = differ(self.by_gates(rows), expected, self._dtype)
        return difference

    def _only(self, name: str, inside: Tensor, outside: Tensor) -> Tensor:
        """Returns a row that is one row at the components of a weight, and another elsewhere."""
        row = outside.clone()
        for first, port in self._activation.sites[name].ports:
            row[first : first + port.count] = inside[first : first + port.count]
        return row

    def gradients(self, cuts: Mapping[str, str]) -> None:
        """Compares gradients with differences where something may cut them; notes modules whose gradients are wrong.

        Args:
          cuts: What the model does that autograd may not see through -> in which module.
        """
        gates = self._mixed[None].clone().requires_grad_()
        cuts = dict(cuts)
        try:
            with torch.enable_grad(), self._activation.active(), _Hooks() as hooks:
                parts = self._activation.split(gates)
                self._activation.set(parts)
                logits = self._run(self._inputs[:1])
                value = self._value(logits)
                cuts |= {f"the autograd.Function {name}": "" for name in _functions(value)}
                cuts |= dict.fromkeys(hooks.found, "")
                slopes = _slopes(value, parts) if cuts else None
        except NoGradientError as error:
            self._activation.no_gradient |= dict.fromkeys(error.modules, error.cause)
            return
        except RuntimeError as error:  # whatever torch or the model raises about gradients
            reason = (str(error).splitlines() or ["no message"])[0].rstrip(".")
            modules = [port.module for port in self._activation.index.ports]
            self._activation.no_gradient |= dict.fromkeys(
                modules, f"the model fails when gradients are asked for: {reason}"
            )
            return
        if self._plain is not None and differ(logits.detach(), self._plain, self._dtype):
            modules = [port.module for port in self._activation.index.ports]
            told = "the model computes something else while autograd is on (torch.is_grad_enabled(), requires_grad)"
            self._activation.no_gradient |= dict.fromkeys(modules, told)
        elif slopes is not None:
            self._compare(slopes, cuts)

    def _compare(self, slopes: Tensor, cuts: Mapping[str, str]) -> None:
        """Compares the gradient at the mixed gates (components,) with differences, all at once, then one by one."""
        with torch.no_grad():
            start = self._at(self._mixed)
            along = 2 * self._mixed.flip(0) - 2 + torch.sign(self._mixed.flip(0) - 1)  # of either sign, none of them 0
            self._coarse = self._is_coarse(along, start)
            if self._agree(slopes, along, start) and not any(how in cuts for how in ROUNDED):
                return
            zeros = torch.zeros_like(along)
            wrong = [
                name
                for name in self._activation.sites
                if not self._agree(slopes, self._only(name, along, zeros), start)
                or (not self._only(name, slopes, zeros).any() and self._matters(name, start))
            ]
            if not wrong and not self._agree(slopes, along, start):
                wrong = list(self._activation.sites)
        told = "; ".join(how + (f" in {where!r}" if where else "") for how, where in cuts.items())
        for name in wrong:
            for _, port in self._activation.sites[name].ports:
                self._activation.no_gradient.setdefault(port.module, f"autograd does not see the way there ({told})")

    def _is_coarse(self, along: Tensor, start: float) -> bool:
        """Returns whether a float64 model computes some of it in less, so that small steps tell of rounding only."""
        step = STEP[self._dtype]
        second = self._at(self._mixed + step * along) - 2 * start + self._at(self._mixed - step * along)
        return self._dtype == torch.float64 and abs(second) > COARSE * abs(start)

    def _agree(self, slopes: Tensor, along: Tensor, start: float) -> bool:
        if self._coarse:
            step, tolerance, rounding = COARSE_STEP, COARSE_TOLERANCE, 1e-6
            difference = (self._at(self._mixed + step * along) - self._at(self._mixed - step * along)) / (2 * step)
        else:
            step, tolerance, rounding = STEP[self._dtype], SLOPE_TOLERANCE[self._dtype], 1e-3 * TOLERANCE[self._dtype]
            difference = (self._at(self._mixed + step * along) - start) / step
        expected = float(slopes @ along)
        size = float(slopes.abs() @ along.abs()) + abs(difference)
        floor = rounding / step * abs(start)  # what rounding of the value makes of a difference
        return abs(difference - expected) <= tolerance * size + floor

    def _matters(self, name: str, start: float) -> bool:
        """Returns whether closing the components of a weight changes anything."""
        changed = self._at(self._only(name, torch.zeros_like(self._mixed), self._mixed))
        return abs(changed - start) > TOLERANCE[self._dtype] * abs(start)

    def _at(self, row: Tensor) -> float:
        return float(self._value(self.by_gates(row[None])))

    def _value(self, logits: Tensor) -> Tensor:
        """Returns one number of an example's logits that depends on each of them."""
        logits = torch.nan_to_num(logits, nan=0.0, posinf=0.0, neginf=0.0)
        weights = mixed_gates(logits.numel(), 1, logits.device, logits.dtype)
        return (logits.flatten() * weights).sum()


class _Hooks(TorchFunctionMode):
    """Notes hooks that a forward puts on tensors: what autograd brings there they may change."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            self.found.append("a hook on a tensor (register_hook)")
        return func(*args, **(kwargs or {}))


ROUNDED = tuple(f"{name}()" for name in ROUNDING)


def _slopes(value: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Returns the gradient of a number with respect to one example's gates, (components,); zero where it has none."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(part) for part in parts], dim=1)[0]
    found = torch.autograd.grad(value, parts, allow_unused=True)
    return torch.cat([torch.zeros_like(p) if g is None else g for p, g in zip(parts, found, strict=True)], dim=1)[0]


def _functions(value: Tensor) -> set[str]:
    """Returns the names of the custom functions on the way from gates to a number."""
    seen: set[Any] = set()
    found: set[str] = set()
    ahead: list[Any] = [value.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.add(type(node).__name__.removesuffix("Backward"))
        ahead += [behind for behind, _ in node.next_functions]
    return found
