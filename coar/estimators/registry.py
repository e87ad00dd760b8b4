"""Estimators by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ablate.errors import UnknownNameError
from coar.errors import FitError
from coar.estimators.abstract import Estimator
from coar.estimators.baselines.gates import GradientTimesGate, IntegratedGateGradients
from coar.estimators.baselines.input_paths import InternalInfluence, NeuronConductance
from coar.estimators.baselines.leave_one_out import LeaveOneOut
from coar.estimators.baselines.random_weights import RandomAttribution
from coar.estimators.gradient.estimator import Gradient

_ESTIMATORS: dict[str, type[Estimator]] = {
    estimator.name: estimator
    for estimator in (
        Gradient,
        LeaveOneOut,
        GradientTimesGate,
        IntegratedGateGradients,
        NeuronConductance,
        InternalInfluence,
        RandomAttribution,
    )
}


def estimator_names() -> tuple[str, ...]:
    """Returns the names of the methods that `coar.estimate` may be asked for."""
    return tuple(_ESTIMATORS)


def get_estimator(method: str | Estimator, **settings: Any) -> Estimator:
    """Returns the estimator of this name with these settings, or the instance given.

    `get_estimator(**estimator.describe())` gives an equal estimator.

    Raises:
      UnknownNameError: No such method; offers the nearest matches.
      FitError: A setting that the method does not have, or a value that it does not take; says what it takes.
    """
    if isinstance(method, Estimator):
        if settings:
            raise FitError(
                f"Settings ({', '.join(settings)}) were given beside an instance of {type(method).__name__}, which has "
                "its own. Give them to its constructor."
            )
        return method
    if method not in _ESTIMATORS:
        advice = "Or pass an instance of a subclass of Estimator."
        raise UnknownNameError("method", str(method), _ESTIMATORS, advice)
    chosen = _ESTIMATORS[method]
    known = [setting.name for setting in fields(chosen)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        takes = f"takes {', '.join(known)}" if known else "takes no settings"
        raise FitError(f"Method {method!r} has no setting {', '.join(map(repr, unknown))}; it {takes}.")
    return chosen(**settings)
