"""Which attributions point the same way: exact cosines, and a random projection that finds candidates for them."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

DIMENSIONS = 512  # a projected cosine is off by (1 - cosine^2) / sqrt(512), at most 0.044 (standard deviation)
EXACT_BYTES = 64 * 2**20  # weights up to this size are compared with all others, without a projection
FAST_JL = "fast_jl"
FAST_JL_STEP = 512  # its dimensions are a multiple of this
FAST_JL_BATCHES = (8, 16, 32)  # rows per kernel; each size has a function of its own
FAST_JL_TILES = 128  # parts of a row that run at a time; the random signs depend on it, so it is the same on every card


def shortlist_size(k: int) -> int:
    """Returns with how many candidates the search for k neighbours begins: from them it learns how good those are."""
    return 2 * k + 10


def projection_error(cosine: float, dimensions: int) -> float:
    """Returns by how much a projected cosine is too small once in 30,000 times: four standard errors, and rounding."""
    return 4 * (1 - cosine**2) / math.sqrt(dimensions) + 1e-5


def cosines(weights: Floats, own: Floats) -> npt.NDArray[np.float64]:
    """Returns the cosine of each row of weights (examples, components) with own (components,); 0 if one is all zero."""
    rows, mine = weights.astype(np.float64), own.astype(np.float64)
    length = np.linalg.norm(rows, axis=1) * np.linalg.norm(mine)
    return np.asarray((rows @ mine) / np.where(length > 0, length, 1.0))


def projected(
    blocks: Iterable[Floats], examples: int, components: int, *, dimensions: int = DIMENSIONS, seed: int = 0
) -> Floats:
    """Returns random projections of weights, each of length one (or all zero), (examples, dimensions) float32.

    Their inner products are the cosines of the weights, up to an error of (1 - cosine^2) / sqrt(dimensions). On CUDA
    with the package fast-jl the matrix is of random signs and never stored; otherwise it is scikit-learn's Gaussian
    one. Global random state is unchanged.

    Args:
      blocks: Weights (some examples, components), all examples in order.
      examples, components: How many in all.
      dimensions: Of the projection, at most the number of components.
      seed: Of the random matrix.

    Cost: one pass over the weights; examples x components x dimensions multiplications. Memory: the result, one block,
      and on the CPU the matrix, components x dimensions float32 (twice as float64 while it is drawn).
    Source: Johnson-Lindenstrauss; the CUDA kernel is that of TRAK (arXiv 2303.14186).
    """
    project = fast_jl_projection if can_use_fast_jl(dimensions) else gaussian_projection
    apply = project(components, dimensions, seed)
    result = np.empty((examples, dimensions), dtype=np.float32)
    start = 0
    for block in blocks:
        part = apply(block)
        length = np.linalg.norm(part, axis=1, keepdims=True)
        result[start : start + len(part)] = part / np.where(length > 0, length, 1.0)
        start += len(part)
    return result


def gaussian_projection(components: int, dimensions: int, seed: int) -> Callable[[Floats], Floats]:
    """Returns a function that projects (examples, components) to (examples, dimensions) on the CPU."""
    from sklearn.random_projection import GaussianRandomProjection  # slow to import

    projection = GaussianRandomProjection(n_components=dimensions, random_state=seed)
    projection.fit(np.zeros((1, components), dtype=np.float32))

    def apply(weights: Floats) -> Floats:
        return np.asarray(projection.transform(weights), dtype=np.float32)

    return apply


def fast_jl_projection(components: int, dimensions: int, seed: int) -> Callable[[Floats], Floats]:
    """Returns a function that projects (examples, components) to (examples, dimensions) on CUDA, by fast-jl.

    Its kernel rounds to half precision: rows are first scaled, so that none overflows or vanishes. Their projections
    are of the scaled rows.
    """
    import torch

    fast_jl = importlib.import_module(FAST_JL)

    def apply(weights: Floats) -> Floats:
        rows = torch.from_numpy(np.ascontiguousarray(weights)).to("cuda", torch.float32)
        largest = rows.abs().amax(dim=1, keepdim=True)
        rows = rows / torch.where(largest > 0, largest, 1.0)  # first, so that squares neither overflow nor vanish
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True) / math.sqrt(components)
        rows = (rows / torch.where(length > 0, length, 1.0)).contiguous()  # numbers of about one
        size = next((size for size in FAST_JL_BATCHES if len(rows) <= size), FAST_JL_BATCHES[-1])
        kernel: Any = getattr(fast_jl, f"project_rademacher_{size}")
        return np.asarray(kernel(rows, dimensions, seed, FAST_JL_TILES).float().cpu().numpy())

    return apply


def can_use_fast_jl(dimensions: int) -> bool:
    """Returns whether the package fast-jl and a CUDA device are there, and can project to so many dimensions."""
    if dimensions % FAST_JL_STEP or importlib.util.find_spec(FAST_JL) is None:
        return False
    import torch

    return torch.cuda.is_available()
