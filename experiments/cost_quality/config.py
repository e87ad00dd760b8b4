"""The configuration of the comparison."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class NetworkConfig(BaseModel):
    """What is run on one network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ablate_fraction: float
    rows: tuple[int, ...]
    lasso_rows: tuple[int, ...]
    passes: tuple[int, ...]
    target: float | Literal["regression"]
    calibrate: bool


class Config(BaseModel):
    """What is run on all networks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: int
    test_rows: int
    calibration_examples: int
    long_rows: int
    long_passes: int
    calibrated_passes: int
    baselines: tuple[str, ...]
    networks: dict[str, NetworkConfig]


def read_config(name: str) -> Config:
    """Returns the part of config.toml of this name: full, quick or resnet50."""
    values = tomllib.loads((Path(__file__).parent / "config.toml").read_text(encoding="utf-8"))
    return Config.model_validate(values[name])
