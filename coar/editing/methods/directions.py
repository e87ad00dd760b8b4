"""The directions in which a layer's keys tell a concept from the ordinary, and weights that move along them only."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coar.editing.methods.second_moment import FLOOR, SecondMoment
from coar.errors import EditError

DirectionsBy = Literal["whitened", "raw_eig"]
ORTHONORMAL = 1e-5  # how far D Dᵀ may be from the identity
HELD = 2**24  # numbers of keys that are kept
DEPENDENT = 1e-6  # singular values below this part of the largest are rounding


def key_directions(
    keys: Tensor,
    weights: Tensor,
    moment: SecondMoment,
    rank: int,
    how: DirectionsBy = "whitened",
    floor: float = FLOOR,
) -> tuple[Tensor, int]:
    """Returns directions D (rank, channels), orthonormal rows, float64 on the CPU; and how many eigenvalues of C were
    raised to the floor. Mutates nothing.

    `whitened`, as in the code of Santurkar et al. (context_helpers.py): with Z = C^-1/2 and Y = weights * (keys Z), the
    first right singular vectors e of Y, and D = Z e. `raw_eig`, as in their eq. 1: C^-1 times the first right singular
    vectors of weights * keys. The two agree for one key, and for parallel keys.

    Args:
      keys: (positions, channels).
      weights: (positions,), 0 where a position is not of the concept; those are left out.
      moment: Of ordinary keys.
      rank: How many directions.
      how: See above.
      floor: See `SecondMoment.power`.

    Raises:
      EditError: Fewer independent keys of the concept than directions, or a key that is not finite.
    """
    rows = ConceptKeys()
    rows.add(keys, weights)
    return rows.directions(moment, rank, how, floor)


class ConceptKeys:
    """Keys of a concept with their weights, from which directions are taken; given batch by batch.

    Memory: of the keys while they are few; beyond `HELD` numbers they are replaced by a square matrix with the same
    right singular vectors, (channels, channels), which changes directions by rounding only.
    """

    def __init__(self, held: int = HELD) -> None:
        self._held = held
        self._keys: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._sum: Tensor | None = None  # of weighted keys, once they are replaced
        self.count = 0

    def add(self, keys: Tensor, weights: Tensor) -> None:
        """Takes keys (positions, channels) and weights (positions,); see `key_directions`."""
        used = weights > 0
        keys, weights = keys[used].double().cpu(), weights[used].double().cpu()
        if not torch.isfinite(keys).all():
            raise EditError("The layer reads NaN or infinite values for the inputs.")
        self.count += len(keys)
        self._keys.append(keys)
        self._weights.append(weights)
        if sum(part.numel() for part in self._keys) > self._held:
            self._replace()

    def directions(self, moment: SecondMoment, rank: int, how: DirectionsBy, floor: float) -> tuple[Tensor, int]:
        """Returns what `key_directions` does."""
        if not self.count:
            raise EditError(
                "The masks are zero at every position of this layer: there is no key to take a direction from. Give "
                "masks of a larger region, or select an earlier layer, which has more positions."
            )
        keys, weights = torch.cat(self._keys), torch.cat(self._weights)
        transform, floored = moment.power(-0.5 if how == "whitened" else -1.0, floor)
        whiten = transform if how == "whitened" else torch.eye(len(transform), dtype=transform.dtype)
        rows = weights[:, None] * (keys @ transform if how == "whitened" else keys)
        total = rows.sum(0) if self._sum is None else self._sum @ whiten
        _, sizes, vectors = torch.linalg.svd(rows, full_matrices=False)
        independent = int((sizes > DEPENDENT * sizes[0]).sum()) if sizes[0] > 0 else 0
        if rank > independent:
            raise EditError(
                f"rank is {rank}, but the concept has {self.count} keys, of which {independent} are independent: "
                f"expected a rank of 1 to {independent}."
                if independent
                else f"All {self.count} keys of the concept are zero: the layer does not see it. Select another layer."
            )
        directions = torch.linalg.qr((vectors[:rank] @ transform).T)[0].T
        signs = torch.where(directions @ total < 0, -1.0, 1.0)
        return directions * signs[:, None], floored

    def _replace(self) -> None:
        """Puts a square matrix in the place of the keys: R of their QR decomposition, weights included."""
        weighted = torch.cat([w[:, None] * k for w, k in zip(self._weights, self._keys, strict=True)])
        seen = weighted if self._sum is None else weighted[len(self._keys[0]) :]  # the first are replaced ones
        self._sum = seen.sum(0) + (0 if self._sum is None else self._sum)
        square = torch.linalg.qr(weighted, mode="r").R
        self._keys, self._weights = [square], [torch.ones(len(square), dtype=square.dtype)]


def along(change: Tensor, directions: Tensor) -> Tensor:
    """Returns the part of a change of weights that lies in the span of directions over the input channels.

    Args:
      change: (outputs, inputs[, height, width]).
      directions: (rank, inputs), orthonormal rows.

    Raises:
      EditError: The rows are not orthonormal: projecting twice would differ from once.
    """
    gram = directions @ directions.T
    if not torch.allclose(gram, torch.eye(len(gram)).to(gram), rtol=0, atol=ORTHONORMAL):
        raise EditError(
            "The directions are not orthonormal (D Dᵀ is not the identity): expected the rows of torch.linalg.qr(...)."
        )
    return torch.einsum("oj...,rj,ri->oi...", change, directions, directions)


def coordinates(change: Tensor, directions: Tensor) -> Tensor:
    """Returns the coordinates (outputs, taps, rank) of a change of weights along directions; taps row by row."""
    return torch.einsum("oit,ri->otr", change.flatten(2) if change.ndim > 2 else change[..., None], directions)


def key_weights(regions: Tensor, module: nn.Module, positions: tuple[int, ...], prefix: int | None) -> Tensor:
    """Returns the weight of each position of a layer's keys, (n, positions...), from masks of images.

    For a convolution: the masks resized with antialiased bilinear weights, as floating point. For tokens: the mean over
    each patch; 0 for tokens before the patches (class tokens). For one vector per example: the mean of the mask.

    Args:
      regions: Masks, (n, height, width) from 0 to 1.
      module: The layer.
      positions: Sizes of the axes of positions of the keys.
      prefix: Tokens before the patches; None: the fewest that leave a grid.
    """
    if isinstance(module, nn.Conv2d):
        resized = F.interpolate(regions[:, None], positions, mode="bilinear", antialias=True, align_corners=False)
        return resized[:, 0]
    return pooled(regions, positions, prefix)


def pooled(regions: Tensor, positions: tuple[int, ...], prefix: int | None = None) -> Tensor:
    """Returns the mean of masks over each position, (n, positions...): of a grid, of tokens, or of no axis at all."""
    if len(positions) == 0:
        return regions.mean((1, 2))
    if len(positions) == 2:
        return F.adaptive_avg_pool2d(regions[:, None], positions)[:, 0]
    if len(positions) != 1:
        raise EditError(
            f"Masks have 2 axes, the layer has {len(positions)} axes of positions: they cannot be told for it."
        )
    before, grid = _token_grid(positions[0], (regions.shape[1], regions.shape[2]), prefix)
    patches = F.adaptive_avg_pool2d(regions[:, None], grid).flatten(1)
    return torch.cat([patches.new_zeros(len(patches), before), patches], 1)


def _token_grid(tokens: int, size: tuple[int, int], prefix: int | None) -> tuple[int, tuple[int, int]]:
    """Returns how many tokens come before the patches, and the grid of the patches: of the form of the image."""
    for before in range(tokens) if prefix is None else (prefix,):
        rows = round(((tokens - before) * size[0] / size[1]) ** 0.5)
        if rows and (tokens - before) % rows == 0 and rows * size[1] == (tokens - before) // rows * size[0]:
            return before, (rows, (tokens - before) // rows)
    raise EditError(
        f"{tokens} tokens are no grid of patches of a {size[0]} x {size[1]} image"
        f"{'' if prefix is None else f' behind {prefix} others'}: masks cannot be told for them."
    )
