"""Handwritten digits with a misleading cue, and the small network trained on them: for demos, tutorials and tests."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ablate.loading.digits import CLASSES as CLASSES
    from ablate.loading.digits import CUE_AGREES as CUE_AGREES
    from ablate.loading.digits import CUE_STRENGTH as CUE_STRENGTH
    from ablate.loading.digits import CUES as CUES
    from ablate.loading.digits import MINORITY_GROUPS as MINORITY_GROUPS
    from ablate.loading.digits import SPLITS as SPLITS
    from ablate.loading.digits import ResidualBlock as ResidualBlock
    from ablate.loading.digits import ResidualCNN as ResidualCNN
    from ablate.loading.digits import digits_campaign_examples as digits_campaign_examples
    from ablate.loading.digits import digits_model as digits_model
    from ablate.loading.digits import digits_split as digits_split
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())
