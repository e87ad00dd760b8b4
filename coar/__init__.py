"""Attributions: estimating them, asking them, judging them, and editing models with them.

An attribution is linear: `output(keep) ~ bias + sum_i weights_i * keep_i`, keep True = kept. A positive weight means
that the component supports the output.
"""

import logging as _logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coar.attributions.attributions import Attributions as Attributions
    from coar.attributions.attributions import open_attributions as open_attributions
    from coar.editing.abstract import Editor as Editor
    from coar.editing.coar_edit.ranking import Ranking as Ranking
    from coar.editing.coar_edit.ranking import coar_edit as coar_edit
    from coar.editing.coar_edit.ranking import coar_scores as coar_scores
    from coar.editing.coar_edit.ranking import rank_components as rank_components
    from coar.editing.coar_edit.ranking import sweep_edit_size as sweep_edit_size
    from coar.editing.edits.edit import Edit as Edit
    from coar.editing.edits.files import load_edit as load_edit
    from coar.editing.judging.benchmark_sets import boundary_set as boundary_set
    from coar.editing.judging.benchmark_sets import failure_groups as failure_groups
    from coar.editing.judging.edit_predictions import EditPredictions as EditPredictions
    from coar.editing.judging.edit_predictions import load_edit_predictions as load_edit_predictions
    from coar.editing.judging.evaluate import EditReport as EditReport
    from coar.editing.judging.evaluate import evaluate_edit as evaluate_edit
    from coar.editing.judging.single_edits import evaluate_single_edits as evaluate_single_edits
    from coar.editing.judging.where_search import LayerSearch as LayerSearch
    from coar.editing.judging.where_search import search_layers as search_layers
    from coar.editing.predicting import predictions as predictions
    from coar.editing.registry import editor_names as editor_names
    from coar.editing.registry import get_editor as get_editor
    from coar.editing.request import Request as Request
    from coar.errors import CoarError as CoarError
    from coar.errors import EditError as EditError
    from coar.errors import EditMismatchError as EditMismatchError
    from coar.errors import FitError as FitError
    from coar.errors import QueryError as QueryError
    from coar.estimators.abstract import Estimator as Estimator
    from coar.estimators.estimate import estimate as estimate
    from coar.estimators.gradient.estimator import Gradient as Gradient
    from coar.estimators.registry import estimator_names as estimator_names
    from coar.estimators.regression.fit import fit as fit
    from coar.interchange import InterchangeError as InterchangeError
    from coar.interchange import export as export
    from coar.interchange import import_attributions as import_attributions
    from coar.interchange import import_campaign as import_campaign
    from coar.judging.calibration import calibration as calibration
    from coar.judging.comparing import Comparison as Comparison
    from coar.judging.comparing import compare as compare
    from coar.judging.evaluate import ABLATE_FRACTIONS as ABLATE_FRACTIONS
    from coar.judging.evaluate import Evaluation as Evaluation
    from coar.judging.evaluate import FractionEvaluation as FractionEvaluation
    from coar.judging.evaluate import counterfactual_correlation as counterfactual_correlation
    from coar.judging.evaluate import evaluate as evaluate
    from coar.metrics import GroupAccuracy as GroupAccuracy
    from coar.metrics import MetricError as MetricError
    from coar.metrics import group_accuracy as group_accuracy
    from coar.planning import Plan as Plan
    from coar.planning import plan as plan
    from coar.planning.fraction import FractionChoice as FractionChoice
    from coar.planning.fraction import choose_fraction as choose_fraction
    from coar.planning.meter import Cost as Cost
    from coar.planning.meter import CostMeter as CostMeter
    from coar.statistics import mean_interval as mean_interval
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())

_logging.getLogger(__name__).addHandler(_logging.NullHandler())  # else Python itself would show warnings
