"""Attributions in a file that another program wrote, or that we exported: opened, checked, read slab by slab."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ablate import ComponentIndex, ModelMismatchError
from coar.interchange.errors import InterchangeError
from coar.interchange.npz import HEADER, NpzRows
from coar.interchange.slabs import SLAB_BYTES
from coar.interchange.subject import Subject
from coar.interchange.torch_file import OPTIONAL, read_torch_file

Array = npt.NDArray[Any]

PUBLISHED_FILE = "datamodels.pt"  # what the published regression writes into its folder
_EXAMPLE_COLUMNS = ("id", "label", "group")


@dataclass
class ForeignAttributions:
    """Attributions in an open file.

    Attributes:
      weights, stderr: Give (examples, components) of a run of examples; no stderr where the file has none.
      bias: (examples,).
      quality: Columns (examples,); `correlation` is among them, NaN where it is not known.
      header, columns: What an .npz of ours says of its making, and its table of examples; empty for other files.
      ablate_fraction: Of the fit, where the file says it.
    """

    path: Path
    examples: int
    components: int
    weights: Callable[[slice], Array]
    stderr: Callable[[slice], Array] | None
    bias: Array
    quality: dict[str, Array]
    header: Mapping[str, Any] = field(default_factory=dict)
    columns: dict[str, Array] = field(default_factory=dict)
    ablate_fraction: float | None = None

    def not_finite(self) -> tuple[npt.NDArray[np.int64], str]:
        """Returns the examples with a number that is not finite in float32, ascending, and the first such number.

        Cost: reads all weights, standard errors and biases.
        """
        lost: list[npt.NDArray[np.int64]] = []
        first = ""
        step = max(1, SLAB_BYTES // (8 * self.components))
        for start in range(0, self.examples, step):
            span = slice(start, min(start + step, self.examples))
            parts = {"weights": self.weights(span), "bias": self.bias[span]}
            if self.stderr is not None:
                parts["stderr"] = self.stderr(span)
            for name, values in parts.items():
                with np.errstate(over="ignore"):  # what float32 cannot hold is infinite then
                    found = np.argwhere(~np.isfinite(values.astype(np.float32)))
                if len(found):
                    example, *component = (int(i) for i in found[0])
                    at = f"example {start + example}" + "".join(f", component {c}" for c in component)
                    first = first or f"{name} of {at} is {values[tuple(found[0])]}"
                    lost.append(start + found[:, 0])
        return np.unique(np.concatenate(lost)) if lost else np.zeros(0, dtype=np.int64), first

    def only(self, kept: npt.NDArray[np.int64]) -> ForeignAttributions:
        """Returns these attributions of some examples alone, ascending."""

        def some(read: Callable[[slice], Array]) -> Callable[[slice], Array]:
            def rows(span: slice) -> Array:
                wanted = kept[span]
                found: Array = read(slice(int(wanted[0]), int(wanted[-1]) + 1))[wanted - wanted[0]]
                return found

            return rows

        return replace(
            self,
            examples=len(kept),
            weights=some(self.weights),
            stderr=None if self.stderr is None else some(self.stderr),
            bias=self.bias[kept],
            quality={name: values[kept] for name, values in self.quality.items()},
            columns={name: values[kept] for name, values in self.columns.items()},
        )

    def own_subject(self) -> Subject:
        """Returns what an .npz of ours says it is about. A spec in a file is never loaded: `loadable` is False."""
        try:
            identity, index = self.header["identity"], ComponentIndex.from_json(self.header["index"])
            of, spec = identity["of"], dict(self.header["spec"])
            found = Subject(index, self.columns, of["model"], of["data"], of["output"], spec, loadable=False)
            known = {"ablate_fraction", "seed"} <= set(of["plan"]) and "method" in identity
        except (KeyError, TypeError, ValueError, ModelMismatchError) as error:
            raise InterchangeError(
                f"{self.path}: its header is not what coar.export writes ({type(error).__name__}: {error}). Export it "
                "again."
            ) from error
        if not known or len(index) != self.components:
            raise InterchangeError(
                f"{self.path}: its header is about {len(index)} components of a campaign or estimate, its weights are "
                f"about {self.components}. Export it again."
            )
        return found


@contextmanager
def opened(path: Path) -> Iterator[ForeignAttributions]:
    """Gives the attributions in a .pt or .npz file, open for reading while the block runs.

    Raises:
      InterchangeError: The file cannot be read as data, or holds other arrays or shapes than expected.
    """
    if path.suffix.lower() != ".npz":
        yield _published(path, read_torch_file(path))
        return
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            arrays = stack.enter_context(np.load(path, allow_pickle=False))
            names = set(arrays.files)
            if {HEADER, "weights"} <= names:
                weights = stack.enter_context(closing(NpzRows(path, archive, "weights")))
                stderr = stack.enter_context(closing(NpzRows(path, archive, "stderr")))
                source = _exported(path, weights, stderr, arrays)
            else:
                source = _published(path, {name: arrays[name] for name in names & {"weight", "bias", *OPTIONAL}})
        except InterchangeError:
            raise
        except Exception as error:  # numpy, zipfile and json raise many types
            raise InterchangeError(
                f"{path} cannot be read as attributions ({type(error).__name__}: {str(error).rstrip('.')}). Write the "
                "file again, without pickled objects."
            ) from error
        yield source


def _published(path: Path, arrays: Mapping[str, Array]) -> ForeignAttributions:
    """Returns the attributions in arrays as the published code names and shapes them."""
    for name in ("weight", "bias"):
        if name not in arrays or arrays[name].dtype.kind != "f":
            raise InterchangeError(
                f"{path} has no {name!r} of floating-point numbers. Expected `weight` (components, examples) and "
                "`bias` (examples,), or an .npz of coar.export."
            )
    weight, bias = arrays["weight"], arrays["bias"]
    if weight.ndim != 2 or not weight.size or bias.shape != weight.shape[1:]:
        turned = weight.ndim == 2 and bias.shape == weight.shape[:1]
        advice = "It seems to be transposed: store weight.T." if turned else "Is it an attribution file?"
        raise InterchangeError(
            f"{path}: weight has shape {weight.shape}, bias {bias.shape}, expected (components, examples) and "
            f"(examples,). {advice}"
        )
    quality = {"correlation": np.full(len(bias), np.nan, dtype=np.float32)}
    if "lam" in arrays:
        quality["lam"] = arrays["lam"]
        if quality["lam"].shape != bias.shape:
            raise InterchangeError(
                f"{path}: lam has shape {quality['lam'].shape}, expected {bias.shape}, one penalty per example. Leave "
                "it out of the file if it is something else."
            )
    fraction = arrays.get("ablate_fraction")
    if fraction is not None and fraction.shape != ():
        raise InterchangeError(f"{path}: ablate_fraction has shape {fraction.shape}, expected one number.")
    return ForeignAttributions(
        path,
        weight.shape[1],
        weight.shape[0],
        lambda span: weight[:, span].T,
        None,
        bias,
        quality,
        ablate_fraction=None if fraction is None else float(fraction),
    )


def _exported(path: Path, weights: NpzRows, stderr: NpzRows, arrays: Mapping[str, Array]) -> ForeignAttributions:
    """Returns the attributions in an .npz of `coar.export`."""
    if len(weights.shape) != 2 or not all(weights.shape) or stderr.shape != weights.shape:
        raise InterchangeError(
            f"{path}: weights and stderr have shapes {weights.shape} and {stderr.shape}, expected (examples, "
            "components) of both. Export it again."
        )
    header = json.loads(str(arrays[HEADER]))
    names = [str(name) for name in header["quality"]]
    if "correlation" not in names or not all(name.isidentifier() for name in names):  # they become names of arrays
        raise InterchangeError(
            f"{path}: its columns of quality are {', '.join(names)}, expected names, and correlation."
        )
    quality = {name: arrays[f"quality_{name}"] for name in names}
    columns = {name: arrays[f"example_{name}"] for name in _EXAMPLE_COLUMNS}
    kinds = {"id": "U", "group": "U", "label": "iu"}
    words = {"U": "text", "iu": "integers", "f": "floating-point numbers"}
    for name, values in {"bias": arrays["bias"], **quality, **columns}.items():
        kind = kinds.get(name, "f") if name in columns else "f"
        if values.shape != weights.shape[:1] or values.dtype.kind not in kind:
            raise InterchangeError(
                f"{path}: {name} is {values.dtype} of shape {values.shape}, expected {words[kind]} of shape "
                f"({weights.shape[0]},). Export it again."
            )
    examples, components = weights.shape
    return ForeignAttributions(
        path, examples, components, weights.take, stderr.take, arrays["bias"], quality, header, columns
    )
