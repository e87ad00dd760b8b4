"""Checkpoints as wrappers, trainers and averages write them: the model's own names decide what is meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ablate
from ablate.loading import TimmModel, load_checkpoint

State = dict[str, Tensor]


def _net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    nn.init.normal_(net.get_buffer("1.running_mean"))
    return net


def _named(state: State, name: Callable[[str], str]) -> State:
    return {name(key): value for key, value in state.items()}


def _prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: _named(state, lambda key: prefix + key)


FORMS: dict[str, Callable[[State], Any]] = {
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state, "loss": 0.1},
    "an unusual key": lambda state: {"checkpoint": {"weights": state}},
    "beside other tensors": lambda state: {"state_dict": state, "rng_state": torch.zeros(5), "epoch": 3},
    "beside an optimiser": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(5, 4)}}}},
    "data parallel": _prefixed("module."),
    "compiled": _prefixed("_orig_mod."),
    "compiled inside data parallel": _prefixed("module._orig_mod."),
    "Lightning": lambda state: {"state_dict": _prefixed("model.")(state)},
    "Lightning, compiled": lambda state: {"state_dict": _prefixed("model._orig_mod.")(state)},
    "Lightning, with a loss": lambda state: {"state_dict": {**_prefixed("net.")(state), "loss.weight": torch.ones(3)}},
    "an attribute of any name": _prefixed("backbone.encoder."),
    "averaged by torch": lambda state: {"n_averaged": torch.tensor(7), **_prefixed("module.")(state)},
    "a part compiled": lambda state: _named(state, lambda key: key.replace("0.", "0._orig_mod.")),
    "a part data parallel": lambda state: _named(state, lambda key: key.replace("2.", "2.module.")),
    "two keys, the same weights": lambda state: {"model": state, "state_dict": dict(state)},
    "float64": lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_whatever_was_written_around_them(form: str, tmp_path: Path) -> None:
    source, target = _net(1), _net(2)
    torch.save(FORMS[form](source.state_dict()), tmp_path / "c.pt")
    load_checkpoint(target, tmp_path / "c.pt")
    assert ablate.model_hash(target) == ablate.model_hash(source)


@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_safetensors_are_read_alike(prefix: str, tmp_path: Path) -> None:
    source, target = _net(1), _net(2)
    save_file(_prefixed(prefix)(source.state_dict()), tmp_path / "c.safetensors")
    load_checkpoint(target, tmp_path / "c.safetensors")
    assert ablate.model_hash(target) == ablate.model_hash(source)


def test_old_files_have_no_counters_of_batches(tmp_path: Path) -> None:
    source, target = _net(1), _net(2)
    state = {name: value for name, value in source.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(_prefixed("module.")(state), tmp_path / "c.pt")
    load_checkpoint(target, tmp_path / "c.pt")
    assert ablate.model_hash(target) == ablate.model_hash(source)
    del state["1.running_mean"]
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ablate.LoadError, match=r"does not fit a Sequential:\n  missing: 1\.running_mean"):
        load_checkpoint(target, tmp_path / "c.pt")


class _Wrapped(nn.Module):
    """A model whose own layer has the name that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 3)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_real_module_called_module_keeps_its_name(prefix: str, tmp_path: Path) -> None:
    source, target = _Wrapped(), _Wrapped()
    torch.save(_prefixed(prefix)(source.state_dict()), tmp_path / "c.pt")
    load_checkpoint(target, tmp_path / "c.pt")
    assert torch.equal(target.module.weight, source.module.weight)


def test_a_compiled_model_takes_plain_names(tmp_path: Path) -> None:
    source, target = _net(1), _net(2)
    torch.save(source.state_dict(), tmp_path / "c.pt")
    load_checkpoint(torch.compile(target), tmp_path / "c.pt")  # type: ignore[arg-type]
    assert ablate.model_hash(target) == ablate.model_hash(source)


AVERAGES: dict[str, tuple[Callable[[State, State], Any], str, str]] = {
    "timm": (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema}, "state_dict", "state_dict_ema"),
    "two keys": (lambda raw, ema: {"model": raw, "model_ema": _prefixed("module.")(ema)}, "model", "model_ema.module"),
    "two prefixes": (
        lambda raw, ema: {"state_dict": {**_prefixed("net.")(raw), **_prefixed("ema.module.")(ema)}},
        "state_dict.net",
        "state_dict.ema.module",
    ),
    "inside the model": (lambda raw, ema: {**raw, **_prefixed("ema_model.")(ema)}, "", "ema_model"),
    "teacher": (lambda raw, ema: {**_prefixed("student.")(raw), **_prefixed("teacher.")(ema)}, "student", "teacher"),
}


@pytest.mark.parametrize("form", AVERAGES)
def test_of_averaged_and_raw_weights_the_user_says_which(form: str, tmp_path: Path) -> None:
    raw, averaged, target = _net(1), _net(2), _net(3)
    make, key, averaged_key = AVERAGES[form]
    torch.save(make(raw.state_dict(), averaged.state_dict()), tmp_path / "c.pt")
    before = ablate.model_hash(target)
    with pytest.raises(ablate.LoadError, match="several sets of weights for a Sequential, and they differ: ") as caught:
        load_checkpoint(target, tmp_path / "c.pt")
    assert ablate.model_hash(target) == before
    for name in (key, averaged_key):
        assert (repr(name) if name else "the file itself") in str(caught.value)
    load_checkpoint(target, tmp_path / "c.pt", key)
    assert ablate.model_hash(target) == ablate.model_hash(raw)
    load_checkpoint(target, tmp_path / "c.pt", averaged_key)
    assert ablate.model_hash(target) == ablate.model_hash(averaged)


@pytest.mark.parametrize(
    "average",
    [
        lambda state: {"ema": {"shadow_params": list(state.values())}},
        lambda state: {"ema_state_dict": {name: value for name, value in state.items() if "running" not in name}},
        lambda state: {"callbacks": {"EMA": {"weights": _named(state, lambda key: key.replace(".", ""))}}},
    ],
)
def test_averages_in_another_form_are_not_passed_over(average: Callable[[State], Any], tmp_path: Path) -> None:
    raw, target = _net(1), _net(3)
    torch.save({"state_dict": raw.state_dict(), **average(_net(2).state_dict())}, tmp_path / "c.pt")
    with pytest.raises(ablate.LoadError, match=r"e\.g\. checkpoint_key = 'state_dict'\.$"):
        load_checkpoint(target, tmp_path / "c.pt")
    load_checkpoint(target, tmp_path / "c.pt", "state_dict")
    assert ablate.model_hash(target) == ablate.model_hash(raw)


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": _net(1).state_dict()}, tmp_path / "c.pt")
    message = f"No weights in {tmp_path / 'c.pt'} under checkpoint_key 'state_dct'. Did you mean 'state_dict'?"
    with pytest.raises(ablate.UnknownNameError, match=re.escape(message)):
        load_checkpoint(_net(2), tmp_path / "c.pt", "state_dct")


def test_a_key_whose_weights_do_not_fit_lists_them(tmp_path: Path) -> None:
    torch.save({"a": _net(1).state_dict(), "b": {"0.wieght": torch.ones(5, 4)}}, tmp_path / "c.pt")
    with pytest.raises(ablate.LoadError, match=r"missing: 0\.weight \(nearest in the file: 0\.wieght\)"):
        load_checkpoint(_net(2), tmp_path / "c.pt", "b")


def test_a_table_names_the_key(tmp_path: Path) -> None:
    table: dict[str, Any] = {"source": "timm", "name": "test_resnet", "classes": 2}
    raw, averaged = (ablate.load_model(TimmModel(**table, seed=seed))[0] for seed in (1, 2))
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "c.pt")
    table |= {"checkpoint": str(tmp_path / "c.pt"), "checkpoint_key": "state_dict_ema"}
    assert ablate.model_hash(ablate.load_model(TimmModel(**table))[0]) == ablate.model_hash(averaged)
    with pytest.raises(ValueError, match="checkpoint_key needs a checkpoint"):
        TimmModel(source="timm", name="test_resnet", checkpoint_key="model")


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_the_second_name_of_a_shared_tensor_may_be_missing(tmp_path: Path) -> None:
    source, target = _Tied(), _Tied()
    save_file({"head.weight": source.head.weight.detach()}, tmp_path / "c.safetensors")
    load_checkpoint(target, tmp_path / "c.safetensors")
    assert torch.equal(target.embedding.weight, source.head.weight)
    assert target.embedding.weight is target.head.weight
    save_file({"head.weight": torch.ones(6, 4), "embedding.weight": torch.zeros(6, 4)}, tmp_path / "c.safetensors")
    with pytest.raises(ablate.LoadError, match=r"embedding\.weight and head\.weight: differ, but are one tensor of"):
        load_checkpoint(target, tmp_path / "c.safetensors")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    state = _net(1).state_dict()
    torch.save({**state, "0.weight": state["0.weight"].to(torch.int8)}, tmp_path / "c.pt")
    with pytest.raises(ablate.LoadError, match=r"0\.weight: torch\.int8, expected torch\.float32"):
        load_checkpoint(_net(2), tmp_path / "c.pt")
