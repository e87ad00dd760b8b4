"""Metrics of models and edits on stored predictions (integers). Every result says in words what was counted.

Nothing here runs a model; `coar.editing.judging.evaluate` makes and keeps the predictions.

May import: `statistics` and errors. Start reading in `checks.py`, then in `accuracy.py`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coar.metrics.accuracies import Accuracy as Accuracy
    from coar.metrics.accuracies import accuracy as accuracy
    from coar.metrics.admission import Choice as Choice
    from coar.metrics.admission import Setting as Setting
    from coar.metrics.admission import accuracy_drop as accuracy_drop
    from coar.metrics.admission import choose_setting as choose_setting
    from coar.metrics.admission import is_admissible as is_admissible
    from coar.metrics.admission import sweep_caps as sweep_caps
    from coar.metrics.checks import MetricError as MetricError
    from coar.metrics.corrected import CorrectedCells as CorrectedCells
    from coar.metrics.corrected import ErrorsCorrected as ErrorsCorrected
    from coar.metrics.corrected import Outcomes as Outcomes
    from coar.metrics.corrected import errors_corrected as errors_corrected
    from coar.metrics.corrected import errors_corrected_cells as errors_corrected_cells
    from coar.metrics.corrected import outcomes as outcomes
    from coar.metrics.corrected import percent_corrected as percent_corrected
    from coar.metrics.curves import AlphaChoice as AlphaChoice
    from coar.metrics.curves import InterpolationCurve as InterpolationCurve
    from coar.metrics.curves import is_concave as is_concave
    from coar.metrics.curves import is_convex as is_convex
    from coar.metrics.curves import second_differences as second_differences
    from coar.metrics.drawdowns import Drawdown as Drawdown
    from coar.metrics.drawdowns import EditSuccess as EditSuccess
    from coar.metrics.drawdowns import drawdown as drawdown
    from coar.metrics.drawdowns import edit_success as edit_success
    from coar.metrics.groups import GroupAccuracy as GroupAccuracy
    from coar.metrics.groups import group_accuracy as group_accuracy
    from coar.metrics.overlap import SelectionOverlap as SelectionOverlap
    from coar.metrics.overlap import iou as iou
    from coar.metrics.overlap import null_iou as null_iou
    from coar.metrics.overlap import selection_overlap as selection_overlap
    from coar.metrics.pareto import OperatingPoint as OperatingPoint
    from coar.metrics.pareto import TradeoffCurve as TradeoffCurve
    from coar.metrics.pareto import hypervolume as hypervolume
    from coar.metrics.pareto import pareto_front as pareto_front
    from coar.metrics.penalties import Penalty as Penalty
    from coar.metrics.penalties import editing_task_penalty as editing_task_penalty
    from coar.metrics.penalties import original_task_penalty as original_task_penalty
    from coar.metrics.rates import GeneralisationRate as GeneralisationRate
    from coar.metrics.rates import LocalityRate as LocalityRate
    from coar.metrics.rates import SuccessRate as SuccessRate
    from coar.metrics.rates import generalisation_rate as generalisation_rate
    from coar.metrics.rates import locality_rate as locality_rate
    from coar.metrics.rates import success_rate as success_rate
    from coar.metrics.robustness import Baseline as Baseline
    from coar.metrics.robustness import EffectiveRobustness as EffectiveRobustness
    from coar.metrics.robustness import effective_robustness as effective_robustness
    from coar.metrics.robustness import fit_baseline as fit_baseline
    from coar.metrics.robustness import vertical_gap as vertical_gap
    from coar.metrics.stopping import EarlyStop as EarlyStop
    from coar.metrics.stopping import StopRule as StopRule
    from coar.metrics.stopping import early_stop as early_stop
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())
