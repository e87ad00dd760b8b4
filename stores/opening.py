"""Opening a store of whichever kind is there."""

from __future__ import annotations

from stores.attributions import KIND as ATTRIBUTIONS
from stores.attributions import AttributionStore
from stores.campaign import KIND as CAMPAIGN
from stores.campaign import CampaignStore
from stores.format.groups import Location, open_group
from stores.format.root import OtherKindError

OpenStore = CampaignStore | AttributionStore


def open_any(location: Location, mode: str = "r") -> OpenStore:
    """Returns a campaign or attribution store, finished or not, also if blocks have lost files. Mutates nothing.

    Raises:
      StoreNotFoundError, StoreUnreadableError: Nothing, or something else, is there, or its root is damaged.
    """
    try:
        return CampaignStore(open_group(location, CAMPAIGN, mode), location)
    except OtherKindError as error:
        if error.found != ATTRIBUTIONS:
            raise
        return AttributionStore(open_group(location, ATTRIBUTIONS, mode), location)
