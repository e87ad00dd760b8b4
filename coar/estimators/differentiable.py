"""Whether gradients tell anything: a check before any estimate that is made of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ablate import Engine, Examples
from ablate.errors import NoGradientError
from coar.errors import FitError
from coar.estimators.plain import require_components

FEW = 4  # examples whose gradients are taken
SOME = 32  # examples that a suspect module is ablated on
ROWS = 16  # ways of ablating it
POINTS = 8  # gates between 0 and 1 at which gradients are asked for
ADVICE = (
    "Estimate by regression, which needs outputs only: run a campaign (ablate.run) and coar.fit it. Or use "
    "method='leave_one_out'."
)


def check_differentiable(engine: Engine, examples: Examples) -> None:
    """Raises FitError where gates change outputs but gradients do not see it. Mutates nothing.

    A module is suspect if the gradients of all its components are exactly zero, on all of a few examples; it is at
    fault if closing its components, all or some, changes an output nevertheless, and no gradient appears along the way
    from open to closed. Gates that reach no output (a dead branch) have gradient zero and are fine. A detached path
    beside one that is not is not seen.

    Cost: a forward and backward of at most four examples; for every suspect module 17 forwards of at most 32, and for
      those that matter eight times forward and backward of the four.

    Raises:
      FitError: The index is empty; or the output is not differentiable (an argmax, a rounding), the model detaches
        (`torch.no_grad`, `.detach()`, `.item()`, numpy) or fails when gradients are asked for; names the modules and
        offers regression.
    """
    require_components(engine)
    few = examples.take(range(min(FEW, len(examples))))
    try:
        _check(engine, examples, few)
    except NoGradientError as error:
        every = {module for module, _ in _modules(engine)}
        raise FitError(_message(engine, list(error.modules), set(error.modules) != every)) from error


def _check(engine: Engine, examples: Examples, few: Examples) -> None:
    count = len(engine.index)
    seen = _moving(engine, few, np.ones(count, dtype=np.float32))
    suspects = [(module, ids) for module, ids in _modules(engine) if not seen[ids].any()]
    some = examples.take(range(min(SOME, len(examples)))) if suspects else few
    blind = [(module, ids) for module, ids in suspects if _matters(engine, some, ids)]
    for point in (np.arange(POINTS) + 0.5) / POINTS:
        still = []
        for module, ids in blind:
            gates = np.ones(count, dtype=np.float32)
            gates[ids] = point
            if not _moving(engine, few, gates)[ids].any():
                still.append((module, ids))
        blind = still
    if blind:
        raise FitError(_message(engine, [module for module, _ in blind], bool(seen.any())))


def _message(engine: Engine, modules: list[str], some_are_seen: bool) -> str:
    names = ", ".join(map(repr, modules[:3])) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    if not some_are_seen:
        cause = (
            f"no component has a gradient, although ablating changes the output {engine.output.name!r}. Either the "
            "output is not differentiable (an argmax, a rounding, a count), or the model detaches after the last "
            "component (torch.no_grad, .detach(), .item(), numpy)"
        )
    else:
        cause = (
            f"no gradient reaches the components of {names}, although ablating them changes the output "
            f"{engine.output.name!r}. The model detaches after {modules[-1]!r} (torch.no_grad, .detach(), .item(), "
            "numpy, a rounding)"
        )
    return f"Gradients say nothing here: {cause}. {ADVICE}"


def _modules(engine: Engine) -> list[tuple[str, npt.NDArray[np.intp]]]:
    """Returns the modules in order, each with the ids of its components."""
    found: dict[str, list[npt.NDArray[np.intp]]] = {}
    for port, first, stop in engine.index.spans():
        found.setdefault(port.module, []).append(np.arange(first, stop))
    return [(module, np.concatenate(parts)) for module, parts in found.items()]


def _moving(engine: Engine, examples: Examples, gates: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Returns which components have a gradient other than zero on some example, (components,)."""
    try:
        _, gradients = engine.gate_gradients(np.tile(gates, (len(examples), 1)), examples)
    except RuntimeError as error:  # whatever torch or the model raises about gradients
        reason = (str(error).splitlines() or ["no message"])[0].rstrip(".")
        raise FitError(
            f"This model fails when gradients are asked for: {type(error).__name__}: {reason}. {ADVICE}"
        ) from error
    return np.asarray((gradients != 0).any(dim=0).numpy())


def _matters(engine: Engine, examples: Examples, ids: npt.NDArray[np.intp]) -> bool:
    """Returns whether closing components of a module, all or a random half, changes the output of an example."""
    keep = np.ones((1 + ROWS, len(engine.index)), dtype=np.bool_)
    keep[1:, ids] = np.random.default_rng(0).random((ROWS, len(ids))) < 0.5
    keep[1, ids] = False
    outputs = engine.outputs(keep, examples)
    return bool(((outputs[1:] - outputs[0]).abs() > 1e-6 * float(outputs[0].abs().max())).any())
