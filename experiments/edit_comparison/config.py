"""The configuration of the comparison."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from coar.editing.registry import editor_class, editor_names

TRAINED = "<trained>"  # stands for the file of the hypernetwork that is trained for the network at hand


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Strict):
    """One method with its fixed settings, and those that the validation images choose from."""

    label: str
    method: str
    fixed: dict[str, Any] = {}
    grid: tuple[dict[str, Any], ...] = ({},)


class Masks(_Strict):
    """The comparison of learned with random and mean masks."""

    densities: tuple[float, ...]
    rate: float
    steps: int
    training: dict[str, Any]


class Config(_Strict):
    """What is run."""

    seeds: tuple[int, ...]
    settings: int
    workers: int = 2
    cap: dict[str, float]
    alphas: int
    networks: dict[str, tuple[str, ...]]
    options: dict[str, dict[str, int]]
    masks: Masks
    places: dict[str, dict[str, str]]
    arms: tuple[Arm, ...]

    def registered_arms(self) -> tuple[Arm, ...]:
        """Returns the arms whose methods are registered; for registered methods without one, their quick settings."""
        names = editor_names()
        listed = tuple(arm for arm in self.arms if arm.method in names)
        unlisted = [name for name in names if name not in {arm.method for arm in self.arms}]
        cut = [arm.model_copy(update={"grid": arm.grid[: self.settings]}) for arm in listed]
        return (*cut, *(Arm(label=name, method=name, fixed=dict(editor_class(name).quick)) for name in unlisted))

    def unregistered(self) -> tuple[str, ...]:
        """Returns the methods that have arms here but are not registered."""
        return tuple(dict.fromkeys(arm.method for arm in self.arms if arm.method not in editor_names()))

    def digest(self) -> str:
        """Returns what identifies this configuration with the methods that are registered."""
        text = self.model_dump_json(exclude={"networks", "seeds", "workers"}) + ",".join(sorted(editor_names()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_config(name: str) -> Config:
    """Returns the part of config.toml of this name, full or quick, with the arms and places that they share."""
    values = tomllib.loads((Path(__file__).parent / "config.toml").read_text(encoding="utf-8"))
    return Config.model_validate({**values[name], "places": values["places"], "arms": values["arms"]})
