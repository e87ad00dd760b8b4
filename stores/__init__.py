"""Zarr v3 formats of the toolkit: campaigns (outputs under many keep-vectors) and attributions. numpy + zarr, no torch.

Conventions, stated once: arrays carry named dimensions; `keep` is True where a component is kept and is stored
bit-packed, component c in bit c % 8 of byte c // 8; a block is a run of consecutive rows that is written once, checked
by a sha256 read back from storage, then marked in the ledger. Only marked blocks are ever read as data.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stores.attributions import AttributionStore as AttributionStore
    from stores.blocks.rows import Rows as Rows
    from stores.campaign import CampaignStore as CampaignStore
    from stores.comparison import Difference as Difference
    from stores.comparison import content_hash as content_hash
    from stores.comparison import differences as differences
    from stores.errors import DamagedBlockError as DamagedBlockError
    from stores.errors import FailedBlocksError as FailedBlocksError
    from stores.errors import StoreError as StoreError
    from stores.errors import StoreExistsError as StoreExistsError
    from stores.errors import StoreMismatchError as StoreMismatchError
    from stores.errors import StoreNotFoundError as StoreNotFoundError
    from stores.errors import StoreUnreadableError as StoreUnreadableError
    from stores.errors import UnfinishedStoreError as UnfinishedStoreError
    from stores.format.groups import FORMAT_VERSION as FORMAT_VERSION
    from stores.format.keepbits import pack_keep as pack_keep
    from stores.format.keepbits import unpack_keep as unpack_keep
    from stores.format.root import OldFormatError as OldFormatError
    from stores.maintenance.compact import CopyError as CopyError
    from stores.maintenance.compact import MadeCopy as MadeCopy
    from stores.maintenance.compact import make_copies as make_copies
    from stores.maintenance.compact import remove_copies as remove_copies
    from stores.maintenance.migrate import Migration as Migration
    from stores.maintenance.migrate import migrate as migrate
    from stores.maintenance.repair import Repair as Repair
    from stores.maintenance.repair import repair as repair
    from stores.maintenance.verify import Damage as Damage
    from stores.maintenance.verify import Report as Report
    from stores.maintenance.verify import verify as verify
    from stores.storage.retrying import StorageError as StorageError
    from stores.work.liveness import StoreBusyError as StoreBusyError
    from stores.work.worklog import WorkLog as WorkLog
else:
    from stores.on_demand import on_demand as _on_demand

    __getattr__, __dir__, __all__ = _on_demand(globals())
