"""Every command that opens a store takes options of object storage, and a spec's own are used everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import pytest
import torch
import typer

import ablate
import coar
from coar.cli.app import PANELS, app
from coar.cli.storage import both_located, located, storage_options
from stores import CampaignStore, StoreError
from stores.storage.places import resolve
from tests.faults import s3
from tests.faults.proxy import FaultyProxy

environment, moto, proxy, bucket, url = s3.environment, s3.moto, s3.proxy, s3.bucket, s3.url  # fixtures
OPENS = {"store", "attributions", "a", "b", "source", "out"}  # parameters that name a store, if they are text
PLACES = {name: place.split(":") for commands in PANELS.values() for name, place in commands.items()}
COMMANDS = {name: getattr(import_module(module), function) for name, (module, function) in PLACES.items()}


def _texts(command: Callable[..., Any]) -> set[str]:
    """Returns the parameters of a command that are text; those that are files' paths are no places of stores."""
    kinds = {
        name: parameter.annotation for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
    }
    plain = {name: get_args(kind)[0] if get_origin(kind) is Annotated else kind for name, kind in kinds.items()}
    return {name for name, kind in plain.items() if str in (kind, *get_args(kind))}


def test_every_command_that_opens_a_store_takes_storage_options() -> None:
    opening = {name for name, command in COMMANDS.items() if _texts(command) & OPENS}
    taking = {name for name, command in COMMANDS.items() if "storage" in inspect.signature(command).parameters}
    assert opening == taking
    assert {"ablate", "plan", "status", "fit", "estimate", "evaluate", "verify", "edit", "import"} <= opening


def test_options_are_read_as_a_spec_has_them() -> None:
    given = ["endpoint=http://h:1/?a=b", "allow_http=true", "retry_seconds=2.5", "timeout=30", "region=eu"]
    found = {"endpoint": "http://h:1/?a=b", "allow_http": True, "retry_seconds": 2.5, "timeout": 30, "region": "eu"}
    assert storage_options(given) == found
    assert storage_options(None) == {}
    with pytest.raises(typer.BadParameter, match="got 'region', expected NAME=VALUE"):
        storage_options(["region"])


def test_options_go_to_remote_places_only_and_never_nowhere() -> None:
    assert located(None, "a.zarr") == "a.zarr"
    assert both_located(None, "a.zarr", "s3://b/c") == ("a.zarr", "s3://b/c")
    assert both_located(["region=eu"], "s3://b/c.zarr", "a.zarr")[1] == "a.zarr"
    assert both_located(["region=eu"], "a.zarr", "s3://b/c.zarr")[0] == "a.zarr"
    for call in (lambda: located(["region=eu"], "a.zarr"), lambda: both_located(["region=eu"], "a.zarr", "b.zarr")):
        with pytest.raises(StoreError, match="for object storage only"):
            call()
    with pytest.raises(StoreError, match="is a credential"):
        located(["aws_secret_access_key=x"], "s3://b/c.zarr")


@pytest.fixture
def elsewhere(environment: None, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A folder with a model and data, an environment that names another server, and the options of the right one."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "storage_net.py").write_text(
        "import torch\n\n\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()\n",
        encoding="utf-8",
    )
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).numpy()
    np.savez(tmp_path / "x.npz", inputs=inputs, targets=np.arange(6) % 3)
    return [f"endpoint=http://127.0.0.1:{proxy.port}", "allow_http=true", "region=us-east-1", "retry_seconds=1"]


def _coar(*words: str) -> None:
    app([*words], standalone_mode=False)


@s3.needs_server
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_specs_storage_is_used_by_every_command_and_given_to_the_others(
    elsewhere: list[str], url: str, tmp_path: Path
) -> None:
    lines = [f"{name} = {value if value in ('true', '1') else repr(value)}"
             for name, value in (option.split("=", 1) for option in elsewhere)]  # fmt: skip
    (tmp_path / "spec.toml").write_text(
        f"rows = 40\nablate_fraction = 0.2\nstore = '{url}'\n[storage]\n" + "\n".join(lines)
        + "\n[model]\nsource = 'factory'\nfactory = 'storage_net:net'\n[data]\nsource = 'arrays'\npath = 'x.npz'\n",
        encoding="utf-8",
    )  # fmt: skip
    spec = ablate.CampaignSpec.from_file("spec.toml")
    _coar("ablate", "spec.toml", "--quiet")
    found = coar.plan(spec, store=url, seconds=0.1)
    assert any("40 of 40 rows are finished" in note for note in found.notes)
    _coar("estimate", "spec.toml", "--passes=2", "--quality-rows=0", "--quiet")
    place = resolve(url, spec.settings.storage)
    assert CampaignStore.open(place).progress.complete

    options = [f"--storage={option}" for option in elsewhere]
    fit, estimate = url.replace(".zarr", "-attributions.zarr"), url.replace(".zarr", "-estimate.zarr")
    _coar("fit", url, "--quiet", *options)
    for words in (
        ["status", url], ["verify", url, "--quiet"], ["migrate", fit], ["compact", fit, "--quiet"],
        ["repair", fit, "--quiet"], ["top", fit, "--example=0", "-k", "3"], ["nearest", fit, "--example=0", "-k3"],
        ["compare", fit, estimate, "-k", "3"], ["export", fit, "--out=a.npz"], ["report", fit, "--out=r.html"],
        ["evaluate", fit, "--rows=4", "--run-code"], ["import", "a.npz", f"--out={url.replace('.zarr', '-again.zarr')}",
        "--quiet"], ["edit", fit, "--target=0", "--reference=1", "-k", "1", "--out=e.safetensors"],
        ["plan", "spec.toml", "--seconds=0.1"],
    ):  # fmt: skip
        _coar(*words, *options)
