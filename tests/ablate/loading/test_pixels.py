"""Images of every kind come out as people see them, neither white nor black all over, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ablate
from ablate.loading import ImageFolderData, TimmModel
from ablate.loading.pixels import in_mode, plain, read_image

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
GREY = np.rint(RAMP * 255)


def _saved(path: Path, values: Any, **options: Any) -> Path:
    Image.fromarray(values).save(path, **options)
    return path


DEEP: dict[str, tuple[str, Any]] = {
    "16 bits": ("x.png", (RAMP * 65535).astype(np.uint16)),
    "16 bits, TIFF": ("x.tif", (RAMP * 65535).astype(np.uint16)),
    "16 bits, big-endian": ("x.pgm", (RAMP * 65535).astype(np.uint16)),
    "12 bits in 16": ("x.png", (RAMP * 4095).astype(np.uint16)),
    "16 bits in 32": ("x.tif", (RAMP * 65535).astype(np.int32)),
    "floats": ("x.tif", RAMP.astype(np.float32)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_scaled_to_8(kind: str, tmp_path: Path) -> None:
    name, values = DEEP[kind]
    image = read_image(_saved(tmp_path / name, values))
    assert image.mode == "L"
    np.testing.assert_allclose(np.asarray(image), GREY, atol=1)


def test_big_endian_images_in_memory() -> None:
    image = Image.frombytes("I;16B", (64, 64), (RAMP * 65535).astype(">u2").tobytes())
    np.testing.assert_allclose(np.asarray(plain(image)), GREY, atol=1)


def test_16_bits_are_divided_by_257(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 65278, 65535]], dtype=np.uint16)
    assert np.asarray(read_image(_saved(tmp_path / "x.png", values))).tolist() == [[0, 0, 1, 1, 254, 255]]


def test_the_user_says_what_is_white(tmp_path: Path) -> None:
    path = _saved(tmp_path / "x.tif", np.array([[0.0, 50.0, 100.0]], dtype=np.float32))
    assert np.asarray(read_image(path, 200)).tolist() == [[0, 64, 128]]
    with pytest.raises(ablate.DataError, match=r"values from 0 to 100, expected 0 to 90, which the table of the data"):
        read_image(path, 90)
    path = _saved(tmp_path / "x.png", GREY.astype(np.uint16))
    np.testing.assert_array_equal(np.asarray(read_image(path, 255)), GREY)
    path = _saved(tmp_path / "x.png", (RAMP * 1000).astype(np.uint16))
    assert np.asarray(read_image(path, 65535)).max() == 4, "a dark scene of 16 bits stays dark where the user says so"


def test_an_image_of_nothing_but_black_needs_no_white(tmp_path: Path) -> None:
    image = read_image(_saved(tmp_path / "x.png", np.zeros((4, 4), dtype=np.uint16)))
    assert not np.asarray(image).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            RAMP.astype(np.float32) * 200,
            r"^It has floating-point values from 0 to 200, expected 0 to 1\. .*white = 255,",
        ),
        (RAMP.astype(np.float32) * 900, r"floating-point values from 0 to 900, expected 0 to 1\. .* white = 900, or"),
        (RAMP.astype(np.float32) - 0.5, r"floating-point values from -0\.5 to 0\.5, expected 0 to 1"),
        (np.array([[0.0, np.nan]], dtype=np.float32), r"floating-point values that are not finite"),
        ((RAMP * 2**20).astype(np.int32), r"32-bit values from 0 to 1\.04858e\+06, expected 0 to 65535\."),
        ((RAMP * 100).astype(np.int32) - 9, r"32-bit values from -9 to 91, expected 0 to 65535\."),
        (
            GREY.astype(np.uint16),
            r"16-bit values from 0 to 255, which may be all of 8 bits or a dark .* white = 255 or",
        ),
        (RAMP.astype(np.float32) / 1e6, r"from 0 to 1e-06: with 1 as white, all of it is one grey\."),
    ],
)
def test_where_white_cannot_be_known_it_is_asked_for(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ablate.DataError, match=message):
        read_image(_saved(tmp_path / "x.tif", values))


def _half_transparent(mode: str) -> Image.Image:
    """Black on the left, nothing on the right: all black if the transparency is dropped."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 2))
    if mode == "P":
        palette = Image.new("P", (4, 2), 1)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(0, (0, 0, 2, 2))
        palette.info["transparency"] = 1
        return palette
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
@pytest.mark.parametrize("target", ["RGB", "L"])
def test_what_is_transparent_lies_on_white(mode: str, target: str, tmp_path: Path) -> None:
    image = _half_transparent(mode)
    if mode != "PA":  # no format keeps it
        image.save(tmp_path / "x.png")
        image = read_image(tmp_path / "x.png")
        assert image.mode == mode
    found = np.asarray(in_mode(image, target))
    assert (found[:, :2] == 0).all()
    assert (found[:, 2:] == 255).all()


def test_a_transparent_colour_of_an_rgb_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), (1, 2, 3))
    image.paste((9, 9, 9), (0, 0, 2, 2))
    image.save(tmp_path / "x.png", transparency=(1, 2, 3))
    found = np.asarray(in_mode(read_image(tmp_path / "x.png"), "RGB"))
    assert found[0].tolist() == [[9, 9, 9]] * 2 + [[255, 255, 255]] * 2


def test_white_on_nothing_is_refused() -> None:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 2, 2))
    with pytest.raises(
        ablate.DataError, match=r"is white, and its transparent parts are put on white\. Save it without"
    ):
        in_mode(image, "RGB")


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_inks_become_colours(ending: str, tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / f"x.{ending}")  # in a JPEG, inverted as Adobe does
    found = np.asarray(in_mode(read_image(tmp_path / f"x.{ending}"), "RGB"))
    np.testing.assert_allclose(found[0, 0], [255, 0, 0], atol=4)


def test_inks_of_unknown_meaning_are_refused(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    at = content.index(b"\xff\xee")  # Adobe's mark: two bytes, then its length and as much
    (tmp_path / "x.jpg").write_bytes(content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :])
    with pytest.raises(
        ablate.DataError, match=r"CMYK JPEG that does not say whether its inks are inverted\. Save it as"
    ):
        read_image(tmp_path / "x.jpg")


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(RAMP > 0.5).save(tmp_path / "x.png")
    found = np.asarray(in_mode(read_image(tmp_path / "x.png"), "L"))
    np.testing.assert_array_equal(found, np.where(RAMP > 0.5, 255, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_seen_upright(orientation: int, tmp_path: Path) -> None:
    from PIL import ImageOps

    image = Image.fromarray((np.arange(48).reshape(6, 8) * 5).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as raw:
        expected = np.asarray(ImageOps.exif_transpose(raw))
    found = read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(np.asarray(plain(found)), expected, err_msg="turned once, not twice")


def test_damaged_exif_does_not_spoil_an_image(tmp_path: Path) -> None:
    image = Image.fromarray(GREY.astype(np.uint8))
    image.save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05")
    assert read_image(tmp_path / "x.jpg").size == (64, 64)


def _truncated(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("empty.png", lambda path: path.write_bytes(b""), "The file is empty. Remove or restore it."),
        (
            "text.png",
            lambda path: path.write_text("no image"),
            "cannot be read: UnidentifiedImageError: cannot identify",
        ),
        ("cut.jpg", _truncated, "cannot be read: OSError: "),
        ("cut.png", _truncated, "cannot be read: "),
        (
            "floats.tif",
            lambda path: _saved(path, RAMP.astype(np.float32) * 300),
            "It has floating-point values from 0 to 300, expected 0 to 1.",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    name: str, write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / name)
    _, transform = ablate.load_model(TimmModel(source="timm", name="test_resnet"))
    with pytest.raises(ablate.DataError) as caught:
        ablate.load_data(ImageFolderData(source="imagefolder", path=str(tmp_path)), transform)
    assert str(caught.value).startswith(f"Image 'a/{name}'")
    assert message in str(caught.value)


def test_a_table_says_what_is_white(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    _saved(tmp_path / "a" / "x.tif", np.full((64, 64), 100.0, dtype=np.float32))
    _, transform = ablate.load_model(TimmModel(source="timm", name="test_resnet"))
    source = ImageFolderData(source="imagefolder", path=str(tmp_path), white=200)
    assert torch.unique(ablate.load_data(source, transform).inputs()).tolist() == [128]
