"""Models and data by name or file, as specs say it: the one room that knows the heavy packages, imported when used.

May import: `data`, `models` and the root's basics. Start reading in `load.py`. A new source is a class in
`sources.py`, a branch in `load.py` and a file in `networks/` or `datasets/`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ablate.loading.load import check_tokens as check_tokens
    from ablate.loading.load import load_data as load_data
    from ablate.loading.load import load_model as load_model
    from ablate.loading.networks.checkpoints import load_checkpoint as load_checkpoint
    from ablate.loading.networks.checkpoints import read_checkpoint as read_checkpoint
    from ablate.loading.networks.clip import ZeroShotClassifier as ZeroShotClassifier
    from ablate.loading.networks.text import LanguageModel as LanguageModel
    from ablate.loading.sources import ArraysData as ArraysData
    from ablate.loading.sources import DigitsData as DigitsData
    from ablate.loading.sources import DigitsModel as DigitsModel
    from ablate.loading.sources import FactoryData as FactoryData
    from ablate.loading.sources import FactoryModel as FactoryModel
    from ablate.loading.sources import HuggingFaceData as HuggingFaceData
    from ablate.loading.sources import ImageFolderData as ImageFolderData
    from ablate.loading.sources import OpenClipModel as OpenClipModel
    from ablate.loading.sources import PackagedModel as PackagedModel
    from ablate.loading.sources import TextData as TextData
    from ablate.loading.sources import TimmModel as TimmModel
    from ablate.loading.sources import TorchvisionData as TorchvisionData
    from ablate.loading.sources import TorchvisionModel as TorchvisionModel
    from ablate.loading.sources import TransformersModel as TransformersModel
    from ablate.loading.sources import WildsData as WildsData
    from ablate.loading.tokens import TextTokens as TextTokens
    from ablate.loading.transforms import Transform as Transform
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())
