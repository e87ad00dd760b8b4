"""Data of other programs: attributions as files they read, their campaigns and attributions as our stores.

May import: `attributions`, `estimators`. Start reading in `exporting.py` and `importing.py`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coar.interchange.attribution_files import import_attributions as import_attributions
    from coar.interchange.errors import InterchangeError as InterchangeError
    from coar.interchange.exporting import export as export
    from coar.interchange.importing import import_campaign as import_campaign
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())
