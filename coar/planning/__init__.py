"""What a campaign or an estimate would cost, and how good it may get, before anything runs.

May import: everything in `coar` below it, not `demo` or `cli`. Start reading in `planner.py`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coar.planning.planner import SECONDS as SECONDS
    from coar.planning.planner import Plan as Plan
    from coar.planning.planner import plan as plan
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())
