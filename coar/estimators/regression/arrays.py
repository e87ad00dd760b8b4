"""Where the heavy linear algebra runs: numpy on the CPU, torch in float64 on a CUDA device; the formulas are the same.

numpy's and torch's arrays share `@`, `.T`, indexing, arithmetic and `.sum(axis=0)`: formulas use nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch

from coar.errors import FitError

Matrix = npt.NDArray[np.float64]
Array = Any  # a numpy array, or a torch tensor on a device


class Arrays(ABC):
    """Makes arrays of float64 for formulas, and gives them back as numpy's.

    Attributes:
      rounding: The relative spacing of the numbers of `narrow`.
      narrow_bytes: Of one of them.
    """

    rounding: float
    narrow_bytes: int

    @abstractmethod
    def put(self, values: npt.NDArray[Any]) -> Array:
        """Returns the values as float64 where formulas are computed; may share memory."""

    @abstractmethod
    def get(self, values: Array) -> Matrix:
        """Returns the values as a numpy array; may share memory."""

    @abstractmethod
    def zeros(self, *shape: int) -> Array:
        """Returns zeros."""

    @abstractmethod
    def narrow(self, values: Array) -> Array:
        """Returns the values in the type in which many candidates are compared first; may share memory."""

    @abstractmethod
    def eigh(self, matrix: Array) -> tuple[Array, Array]:
        """Returns eigenvalues, ascending and at least 0, and eigenvectors of a symmetric matrix, which is overwritten.

        Cost: about 10 n^3 operations, and two more matrices of that size.
        """

    def solve_spectrum(self, matrix: Array) -> tuple[Matrix, Array]:
        """Returns the eigenvalues in numpy, and the eigenvectors where formulas are computed."""
        values, vectors = self.eigh(matrix)
        return np.maximum(self.get(values), 0.0), vectors


class NumpyArrays(Arrays):
    """numpy and scipy, on the CPU."""

    rounding = float(np.finfo(np.float32).eps)
    narrow_bytes = 4

    def put(self, values: npt.NDArray[Any]) -> Array:
        """Returns the values as float64."""
        return np.asarray(values, dtype=np.float64)

    def get(self, values: Array) -> Matrix:
        """Returns the values as they are."""
        return np.asarray(values, dtype=np.float64)

    def zeros(self, *shape: int) -> Array:
        """Returns zeros."""
        return np.zeros(shape)

    def narrow(self, values: Array) -> Array:
        """Returns the values as float32: twice as fast."""
        return np.asarray(values, dtype=np.float32)

    def eigh(self, matrix: Array) -> tuple[Array, Array]:
        """Returns LAPACK's divide and conquer."""
        # its transpose is in LAPACK's order: no copy
        values, vectors = scipy.linalg.eigh(matrix.T, overwrite_a=True, check_finite=False, driver="evd")
        return values, vectors


class TorchArrays(Arrays):
    """torch in float64 on a device."""

    rounding = float(np.finfo(np.float64).eps)
    narrow_bytes = 8

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def put(self, values: npt.NDArray[Any]) -> Array:
        """Returns a tensor on the device; small types travel as they are."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device).double()

    def get(self, values: Array) -> Matrix:
        """Returns a copy in numpy."""
        return np.asarray(values.cpu().numpy(), dtype=np.float64)

    def zeros(self, *shape: int) -> Array:
        """Returns zeros on the device."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def narrow(self, values: Array) -> Array:
        """Returns the values as they are: the user's settings may round float32 products to TF32."""
        return values

    def eigh(self, matrix: Array) -> tuple[Array, Array]:
        """Returns torch's decomposition."""
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


def arrays_on(device: str) -> Arrays:
    """Returns the arrays of a device: `cpu`, or `cuda`, `cuda:0`, ...

    Raises:
      FitError: There is no such device here.
    """
    expected = "expected cpu, cuda or cuda:0, cuda:1, ..."
    try:
        found = torch.device(device)
    except RuntimeError:
        raise FitError(f"device is {device!r}, {expected}.") from None
    if found.type not in ("cpu", "cuda"):
        raise FitError(f"device is {device!r}, {expected}: float64 is needed.")
    if found.type == "cpu":
        return NumpyArrays()
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise FitError(
            f"device is {device!r}, but there are {count} CUDA devices here. Give cpu, or one that is there."
        )
    return TorchArrays(found)
