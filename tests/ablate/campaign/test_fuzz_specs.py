"""Specs changed at random: each is refused with all its problems, or it is a campaign that runs."""

from __future__ import annotations

import random
import string
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zarr.storage import MemoryStore

import ablate
from stores import StoreError

BASE: dict[str, Any] = {
    "rows": 4,
    "passes": 10,
    "ablate_fraction": 0.25,
    "seed": 3,
    "precision": "float32",
    "mode": "auto",
    "batch_size": 2,
    "block_rows": 3,
    "device": "cpu",
    "output": "margin",
    "ablation": "zero",
    "components": {"kinds": ["linear_neuron"], "include": ["*"], "exclude": []},
    "speed": {"fold": None, "channels_last": None, "compile": None, "attention": None},
}
KEYS = [
    *(*BASE, "model", "data", "store", "storage", "compact", "memory_budget", "ablation_factor", "preset", "source"),
    *("name", "path", "checkpoint", "row", "factory", "seeds", "", "é", "../x"),
]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 64, 2**31, 2**63, 10**30, -0.0, 0.5, 1.0, 1e-300, float("nan"), float("inf")),
    *("", "auto", "margin", "logit", "loss", "mean", "scale", "float64", "bfloat16", "int8", "cuda", "cuda:9", "mps"),
    *(
        "weights",
        "activations",
        "linear_neuron",
        "conv_filter",
        "nowhere.*",
        "*",
        "[",
        "\0",
        "../../etc/passwd",
        "é" * 90,
    ),
    *([], [0.1, 0.2], [0.1, 0.1], [[]], ["linear_neuron", "linear_neuron"], [None], (), {}, {"source": "digits"}),
    *(
        {"source": "nothing"},
        {"source": ["torchvision"]},
        {"source": "factory", "factory": "nowhere:net"},
        {"a": {"b": 1}},
    ),
    *({"source": "torchvision", "name": "resnet0"}, {"source": "arrays", "path": "nowhere.npz"}, {1: 2}, b"bytes"),
]
EXPECTED = (ablate.AblateError, StoreError)
MOST = 200  # rows that are run


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def _data() -> ablate.Examples:
    return ablate.Examples(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), [0, 1, 2, 0, 1])


def _changed(chance: random.Random) -> dict[str, Any]:
    """Returns the spec with one to four keys replaced, removed or added, at the top or in a table."""
    spec: dict[str, Any] = {"model": _network(), "data": _data()}
    spec |= {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for _ in range(chance.randrange(1, 4)):
        tables = [spec, *(value for value in spec.values() if isinstance(value, dict))]
        table = chance.choice(tables)
        key = chance.choice(KEYS if chance.random() < 0.3 or not table else list(table))
        if chance.random() < 0.15:
            table.pop(key, None)
        else:
            alike = [value for value in VALUES if key in table and type(value) is type(table[key])]
            table[key] = chance.choice(alike if alike and chance.random() < 0.7 else VALUES)
    return spec


def _must_be_clear(error: Exception, name: str = "") -> None:
    assert len(str(error)) > 20
    assert name in str(error)
    assert "Traceback" not in str(error)


@pytest.mark.slow
@settings(
    max_examples=400, derandomize=True, deadline=timedelta(seconds=20), suppress_health_check=[HealthCheck.too_slow]
)
@given(seed=st.integers(0, 2**32))
def test_400_fuzzed_specs_are_refused_or_run(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    values = _changed(random.Random(seed))  # noqa: S311
    values = {
        key if isinstance(key, str) and key.isidentifier() else f"x{key!r}": value for key, value in values.items()
    }
    try:
        spec = ablate.CampaignSpec(**values)
        spec.describe()
        rows = spec.settings.rows
        # what is valid but long is not run, and what is somewhere else is not written there
        if rows is not None and rows <= MOST and not spec.settings.speed.compile:
            store = ablate.run(spec, MemoryStore(), progress=False)
            assert store.progress.complete
            assert np.isfinite(store.outputs[:]).all()
    except EXPECTED as error:
        _must_be_clear(error)
    except OSError as error:
        _must_be_clear(error, str(error.filename))


TOML = """
rows = 4
ablate_fraction = 0.25
device = "cpu"
output = "margin"

[model]
source = "torchvision"
name = "squeezenet1_1"

[data]
source = "arrays"
path = "x.npz"

[components]
kinds = ["conv_filter"]
"""


@settings(
    max_examples=100, derandomize=True, deadline=timedelta(seconds=5), suppress_health_check=[HealthCheck.too_slow]
)
@given(seed=st.integers(0, 2**32))
def test_100_fuzzed_files_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    text = bytearray(TOML.encode())
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(text))
        way = chance.randrange(3)
        if way == 0:
            del text[at : at + chance.randrange(1, 20)]
        else:
            text[at : at + way - 1] = chance.choice([*string.printable.encode(), 0, 255, 195]).to_bytes(1, "big")
    path = tmp_path_factory.mktemp("fuzz") / "spec.toml"
    path.write_bytes(text)
    try:
        ablate.CampaignSpec.from_file(path).describe()
    except ablate.SpecError as error:
        _must_be_clear(error, str(path))


@pytest.mark.parametrize("path", [Path("nowhere.toml"), Path("."), Path("a\0b")])
def test_a_spec_that_is_no_file(path: Path) -> None:
    with pytest.raises(ablate.SpecError, match=r"cannot be read"):
        ablate.CampaignSpec.from_file(path)
