"""What users hand over as numbers, as a tensor; what would lose something on the way is refused."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablate.errors import DataError

_TABLES = {"pandas": "to_numpy()", "polars": "to_numpy()", "scipy": "toarray()", "pyarrow": "to_numpy()"}


def as_tensor(values: Any, what: str) -> Tensor:
    """Returns values as a tensor, sharing memory where possible; nothing here writes to it.

    Raises:
      DataError: They are no numbers; or they are masked, sparse, quantised, nested or without data, which a plain
        tensor cannot keep. `what` they are begins the message.
    """
    values = _unmasked(values, what)
    if isinstance(values, Tensor):
        _require_plain(values, what)
    try:
        if isinstance(values, np.ndarray) and min(values.strides, default=0) < 0:
            values = values.copy()  # torch takes no reversed views
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{what} cannot become a tensor: {reason}. Give numbers; images need a transform.") from error


def refuse_tables(values: Any, what: str) -> None:
    """Raises DataError for tables and sparse matrices of other packages, whose `[0]` is a column or nothing."""
    package = type(values).__module__.partition(".")[0]
    if package in _TABLES:
        raise DataError(
            f"{what} are a {type(values).__name__} of {package}, expected a tensor, an array or a map-style Dataset. "
            f"Give its numbers: .{_TABLES[package]}."
        )


def _unmasked(values: Any, what: str) -> Any:
    if not isinstance(values, np.ma.MaskedArray):
        return values
    hidden = int(np.ma.getmaskarray(values).sum())
    if hidden:
        raise DataError(
            f"{what}: {hidden:,} of {values.size:,} numbers are masked, and a model would see what the mask hides. "
            "Give numbers for them, e.g. values.filled(0)."
        )
    return values.data


def _require_plain(tensor: Tensor, what: str) -> None:
    kinds = {
        "nested": (tensor.is_nested, "Pad them to one length, e.g. tensor.to_padded_tensor(0)"),
        "sparse": (tensor.layout != torch.strided, "Give tensor.to_dense()"),
        "masked": (type(tensor).__name__ == "MaskedTensor", "Give tensor.to_tensor(value) with a value for the rest"),
        "quantised": (tensor.is_quantized, "Give tensor.dequantize()"),
        "on device meta, without data": (tensor.is_meta, "Give a tensor that holds numbers"),
    }
    for kind, (found, advice) in kinds.items():
        if found:
            raise DataError(f"{what}: the tensor is {kind}, expected a plain one. {advice}.")
