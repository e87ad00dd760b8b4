"""Edits: a selection of components, an operation on it and a strength; methods that find them, reports that judge them.

May import: `attributions`, `estimators`, `judging`, `metrics` and the root's basics. Start reading in `edits/edit.py`,
then in `abstract.py`; a new method goes into `methods/` and gets a line in `registry.py`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coar.editing.coar_edit.editor import COAREditor as COAREditor
    from coar.editing.masks.controls import RandomMask as RandomMask
    from coar.editing.masks.editor import HypernetworkMask as HypernetworkMask
    from coar.editing.masks.editor import MeanMask as MeanMask
    from coar.editing.methods.finetune import FineTuning as FineTuning
    from coar.editing.methods.interpolation import OneLayerInterpolation as OneLayerInterpolation
    from coar.editing.methods.interpolation import Paint as Paint
    from coar.editing.methods.interpolation import interpolation_curve as interpolation_curve
    from coar.editing.methods.lowrank import DirectLowRank as DirectLowRank
    from coar.editing.methods.output_collision import OutputCollision as OutputCollision
    from coar.editing.methods.rewriting import Rewriting as Rewriting
    from coar.editing.where.defaults import last_feed_forward_blocks as last_feed_forward_blocks
    from coar.editing.where.defaults import last_layer as last_layer
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())
