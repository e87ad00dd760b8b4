"""The public face changes on purpose only: names, signatures and first lines of docstrings are a golden file."""

from __future__ import annotations

import difflib
from pathlib import Path

from tests.house.public_face import public_face

GOLDEN = Path(__file__).with_name("public_face.txt")


def test_the_public_face_is_as_written_down() -> None:
    """After a wanted change: `python -m tests.house.public_face > tests/house/public_face.txt`."""
    difference = difflib.unified_diff(GOLDEN.read_text(encoding="utf-8").splitlines(), public_face().splitlines(), n=0)
    assert list(difference) == []
