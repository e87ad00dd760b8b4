"""What tests of the loaders share: no network, and images with every grey level in them."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to reach another machine fails the test, also where a library would catch the error."""

    def refuse(*arguments: Any, **_: Any) -> None:
        pytest.fail(f"tried to reach the network: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail(f"tried to look up a host: {a}"))


@pytest.fixture(scope="session")
def photo() -> Any:
    """A PIL image, 61 x 83, of smooth colours and noise."""
    from PIL import Image

    y, x = np.mgrid[0:83, 0:61]
    noise = np.random.default_rng(0).integers(0, 60, (83, 61, 3))
    pixels = np.stack([3 * x, 2 * y, x + y], axis=2) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
