"""Which rows of a campaign are fitted, which choose a penalty, which measure quality; and reading them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coar.errors import FitError
from coar.estimators.regression.arrays import Matrix
from coar.estimators.regression.packed import PackedKeep
from stores import CampaignStore
from stores.format.keepbits import pack_keep

LEAST_ROWS = 20
NOT_USED, FIT, CHOOSE, TEST = 0, 1, 2, 3  # what a row is for
_CHOICE_DIGIT, _TEST_DIGIT = 8, 9


@dataclass(frozen=True)
class CampaignRows:
    """The rows of a campaign that were finished when it was opened: it may be running, later ones are not used.

    What a row is for depends on its number in the plan alone: of the rows of one ablate fraction, each tenth measures
    quality (`held_out`), and another tenth chooses the penalty (`choose`).

    Attributes:
      blocks: The finished blocks.
      roles: Of each block, what each of its rows is for.
    """

    campaign: CampaignStore
    blocks: list[int]
    roles: list[npt.NDArray[np.int64]]

    @classmethod
    def finished(cls, campaign: CampaignStore, fraction: float | None, held_out: bool, choose: bool) -> CampaignRows:
        """Returns the finished rows, all or those of one ablate fraction.

        Raises:
          FitError: They are too few to fit, choose and measure with, or there is no such fraction.
        """
        fractions = campaign_fractions(campaign)
        if fraction is not None and fraction not in fractions:
            known = ", ".join(map(str, fractions))
            raise FitError(f"{campaign.where} has no rows of ablate_fraction={fraction}; it has {known}.")
        blocks, roles = campaign.finished_blocks(), []
        for block in blocks:
            span = campaign.span(block)
            turn, which = np.divmod(np.arange(span.start, span.stop), len(fractions))
            role = np.full(len(turn), FIT)
            if choose:
                role[turn % 10 == _CHOICE_DIGIT] = CHOOSE
            if held_out:
                role[turn % 10 == _TEST_DIGIT] = TEST
            if fraction is not None:
                role[which != fractions.index(fraction)] = NOT_USED
            roles.append(role)
        rows = cls(campaign, blocks, roles)
        needed = [FIT, *([CHOOSE] if choose else []), *([TEST] if held_out else [])]
        if len(rows) < LEAST_ROWS or not all(rows.count(role) for role in needed):
            lacking = ""
            if len(rows) >= LEAST_ROWS:
                without = next(role for role in needed if not rows.count(role))
                purpose = {FIT: "fit", CHOOSE: "choose a penalty with", TEST: "hold out"}[without]
                lacking = f", none of them one to {purpose}"
            of = "" if fraction is None else f" of ablate_fraction={fraction}"
            raise FitError(
                f"{campaign.where} has {len(rows)} finished rows{of}{lacking}; a fit needs at least {LEAST_ROWS} (and "
                "as a rule several times as many as there are components). Run more of the campaign first."
            )
        return rows

    def __len__(self) -> int:
        return sum(int((roles != NOT_USED).sum()) for roles in self.roles)

    def count(self, role: int) -> int:
        """Returns the number of rows of a role."""
        return sum(int((roles == role).sum()) for roles in self.roles)

    def keep(self) -> dict[int, PackedKeep]:
        """Returns the keep-vectors of every role. Cost: reads the campaign once, and checks every block's sha256."""
        packed: dict[int, list[npt.NDArray[np.uint8]]] = {FIT: [], CHOOSE: [], TEST: []}
        for block, roles in zip(self.blocks, self.roles, strict=True):
            keep, _ = self.campaign.read_block(block)
            for role, parts in packed.items():
                parts.append(pack_keep(keep[roles == role]))
        return {role: PackedKeep.gather(parts, self.campaign.component_count) for role, parts in packed.items()}

    def outputs(self, examples: slice) -> dict[int, Matrix]:
        """Returns the outputs (rows, examples) float64 of every role, for a slab of examples."""
        count = examples.stop - examples.start
        result = {role: np.empty((self.count(role), count)) for role in (FIT, CHOOSE, TEST)}
        done = dict.fromkeys(result, 0)
        for block, roles in zip(self.blocks, self.roles, strict=True):
            outputs = self.campaign.read_outputs(block, examples)
            for role, values in result.items():
                found = outputs[roles == role]
                values[done[role] : done[role] + len(found)] = found
                done[role] += len(found)
        return result


def campaign_fractions(campaign: CampaignStore) -> tuple[float, ...]:
    """Returns the ablate fractions of a campaign's plan: row i has fraction i % their number."""
    fraction = campaign.header["identity"]["plan"]["ablate_fraction"]
    return tuple(fraction) if isinstance(fraction, list) else (fraction,)
