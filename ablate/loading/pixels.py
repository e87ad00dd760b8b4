"""Images of every kind become 8-bit pixels: upright, on white where they are transparent, never washed out unasked.

Pillow's own `convert` clips what has more than 8 bits, so that a 16-bit image comes out white and one of floats from 0
to 1 black, and it shows the colours under transparent pixels, which nobody was meant to see.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ablate.errors import DataError
from ablate.loading.packages import require

_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
_TURNS |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
_TURNED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp", "Raw profile type xmp")
_WHITES = (4095, 65535)  # of 12 and 16 bits, as cameras and scanners write them
_DARK = 255  # what holds nothing above may be an image of 8 bits, or a dark one of more
_ADVICE = "Say in the table of the data which number is white, e.g. white = {}, or save 8-bit images."


def read_image(path: Path, white: float | None = None) -> Any:
    """Returns the image in a file, decoded, upright, with 8 bits per channel. Of several pages the first.

    Raises:
      DataError: The file is empty, or its numbers do not say what is white: see `plain`.
      OSError: It is damaged or no image.
    """
    if not path.stat().st_size:
        raise DataError("The file is empty. Remove or restore it.")
    with _damaged_exif_ignored(), require("PIL.Image").open(str(path)) as image:
        image.load()
        return plain(image, white)


@contextmanager
def _damaged_exif_ignored() -> Iterator[None]:
    """Keeps Pillow's warnings of damaged EXIF away: the image may be as good as others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(possibly )?corrupt exif", category=UserWarning)
        yield


def plain(image: Any, white: float | None = None) -> Any:
    """Returns a PIL image upright, as EXIF says, and with 8 bits per channel; one that is so already, as it is.

    More bits are scaled so that `white` becomes 255. None: of floating-point numbers 1; of integers 4095 or 65535, the
    least that is not below the image's largest value.

    Raises:
      DataError: Integers of which none is above 255, and `white` is not given; values below 0, above `white` or not
        finite; or inks whose meaning the file does not say.
    """
    if image.mode == "CMYK" and getattr(image, "format", None) == "JPEG" and "adobe" not in image.info:
        raise DataError("It is a CMYK JPEG that does not say whether its inks are inverted. Save it as RGB.")
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        return require("PIL.Image").fromarray(_eight_bits(np.asarray(image), white))
    return image


def _upright(image: Any) -> Any:
    try:
        with _damaged_exif_ignored():
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever damaged EXIF makes Pillow raise
        return image
    if turn is None:
        return image
    turned = image.transpose(require("PIL.Image").Transpose[turn])
    for key in _TURNED_BY:
        turned.info.pop(key, None)
    return turned


def in_mode(image: Any, mode: str) -> Any:
    """Returns a plain image as "L" or "RGB"; what is transparent lies on white.

    Raises:
      DataError: It is white all over on white.
    """
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        return _on_white(image).convert(mode)
    return image if image.mode == mode else image.convert(mode)


def _on_white(image: Any) -> Any:
    images = require("PIL.Image")
    # La and RGBa, with colours multiplied by the opacity, become the plain ones first
    seen = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
    if seen.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    white = images.new("RGBA", seen.size, "white")
    found = images.alpha_composite(white, seen).convert("RGB")
    if all(low == 255 for low, _ in found.getextrema()) and seen.getchannel("A").getextrema()[1] > 0:
        raise DataError(
            "What can be seen of it is white, and its transparent parts are put on white. Save it without transparency."
        )
    return found


def _eight_bits(values: npt.NDArray[Any], white: float | None) -> npt.NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    kind = "floating-point" if values.dtype.kind == "f" else f"{8 * values.dtype.itemsize}-bit"
    got = f"It has {kind} values from {low:g} to {high:g}"
    if not np.isfinite(values).all():
        raise DataError(f"It has {kind} values that are not finite. Save it as an 8-bit image.")
    if white is None:
        known = (1.0,) if values.dtype.kind == "f" else _WHITES
        found = next((number for number in known if high <= number), None)
        if low < 0 or found is None:
            raise DataError(
                f"{got}, expected 0 to {known[-1]:g}. {_ADVICE.format(255 if high <= 255 else f'{high:g}')}"
            )
        if values.dtype.kind != "f" and 0 < high <= _DARK:
            raise DataError(
                f"{got}, which may be all of 8 bits or a dark image of more. {_ADVICE.format('255 or 4095')}"
            )
        white = found
    elif low < 0 or high > white:
        raise DataError(f"{got}, expected 0 to {white:g}, which the table of the data gives as white. Correct it.")
    scaled = np.rint(values.astype(np.float64) * 255 / white).astype(np.uint8)
    if low < high and scaled.min() == scaled.max():
        raise DataError(f"{got}: with {white:g} as white, all of it is one grey. {_ADVICE.format(f'{high:g}')}")
    return scaled
