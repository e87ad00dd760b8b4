"""Runs a PyTorch model without some of its components: index, keep-vectors, engine, campaigns.

Conventions, stated once: `keep` is boolean, True = kept; outputs are (rows, examples), one number per keep-vector and
example; an attribution's sign follows from that: positive means that keeping the component raises the output.
"""

import logging as _logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ablate.ablation import Ablation as Ablation
    from ablate.ablation import MeanAblation as MeanAblation
    from ablate.ablation import ScaleAblation as ScaleAblation
    from ablate.ablation import ZeroAblation as ZeroAblation
    from ablate.campaign.run import run as run
    from ablate.campaign.spec import CampaignSpec as CampaignSpec
    from ablate.data.examples import Examples as Examples
    from ablate.engine.engine import Engine as Engine
    from ablate.engine.gated_model import Speed as Speed
    from ablate.errors import AblateError as AblateError
    from ablate.errors import DataError as DataError
    from ablate.errors import GatingError as GatingError
    from ablate.errors import ImmutableError as ImmutableError
    from ablate.errors import KeepError as KeepError
    from ablate.errors import LabelError as LabelError
    from ablate.errors import LoadError as LoadError
    from ablate.errors import ModelMismatchError as ModelMismatchError
    from ablate.errors import NoGradientError as NoGradientError
    from ablate.errors import NonFiniteOutputError as NonFiniteOutputError
    from ablate.errors import OutOfMemoryError as OutOfMemoryError
    from ablate.errors import SelectionError as SelectionError
    from ablate.errors import SpecError as SpecError
    from ablate.errors import UnknownNameError as UnknownNameError
    from ablate.gating.literal import ablated as ablated
    from ablate.gating.reference import reference_outputs as reference_outputs
    from ablate.index.components import ComponentIndex as ComponentIndex
    from ablate.index.components import Selection as Selection
    from ablate.index.kinds import component_kinds as component_kinds
    from ablate.index.presets import preset_names as preset_names
    from ablate.index.residual import register_residual as register_residual
    from ablate.index.structure import register_attention as register_attention
    from ablate.index.structure import register_feed_forward as register_feed_forward
    from ablate.index.table import Component as Component
    from ablate.index.table import Port as Port
    from ablate.keep import KeepPlan as KeepPlan
    from ablate.loading.load import load_data as load_data
    from ablate.loading.load import load_model as load_model
    from ablate.logits import logits_of as logits_of
    from ablate.outputs import CrossEntropyLoss as CrossEntropyLoss
    from ablate.outputs import Logit as Logit
    from ablate.outputs import LogProbability as LogProbability
    from ablate.outputs import Margin as Margin
    from ablate.outputs import Output as Output
    from ablate.outputs import TokenMeanMargin as TokenMeanMargin
    from ablate.outputs import Value as Value
    from ablate.state import model_hash as model_hash
    from ablate.state import preserved_random_state as preserved_random_state
    from ablate.work.logs import log_to as log_to
    from ablate.work.status import Status as Status
    from ablate.work.status import status as status
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())

_logging.getLogger(__name__).addHandler(_logging.NullHandler())  # else Python itself would show warnings
