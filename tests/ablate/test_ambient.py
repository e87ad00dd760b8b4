"""What stands around a call changes no number: autocast, default dtype and device, TF32, inference mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from zarr.storage import MemoryStore

import ablate
from ablate.ambient import neutral_ambient, no_tf32

NEW = hasattr(torch._C, "_get_fp32_precision_getter")
SETTINGS = [
    ("generic", "all"),
    *((backend, what) for backend in ("cuda", "mkldnn") for what in ("all", "matmul", "conv", "rnn")),
]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: _default_dtype(torch.float64),
    "bfloat16 by default": lambda: _default_dtype(torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": _deterministic,
}


class MakesTensors(nn.Module):
    """Its forward makes tensors without saying of which dtype, or where."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x) * torch.linspace(1, 2, 3)
        return logits


@pytest.mark.parametrize("name", AROUND)
def test_no_number_of_the_engine_changes(name: str, mlp: nn.Module, untouched: Callable[..., object]) -> None:
    model = MakesTensors(mlp).eval()
    inputs, targets = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    index = ablate.ComponentIndex.from_model(model)
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    gates = torch.rand(6, len(index), generator=torch.Generator().manual_seed(1))

    def everything() -> list[Tensor]:
        engine = ablate.Engine(model, index)
        one_out = engine.leave_one_out(inputs, targets)
        return [engine.outputs(keep, inputs, targets), one_out, *engine.gate_gradients(gates, inputs, targets)]

    expected = everything()
    with AROUND[name](), untouched(model, inputs):  # type: ignore[attr-defined]
        found = everything()
    assert [value.dtype for value in found] == [torch.float32] * 4
    for got, value in zip(found, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=0)


def test_a_campaign_within_autocast(mlp: nn.Module) -> None:
    inputs, targets = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    spec = ablate.CampaignSpec(model=mlp, data=(inputs, targets), rows=4, ablate_fraction=0.2)
    expected = ablate.run(spec, MemoryStore(), progress=False).outputs[:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (ablate.run(spec, MemoryStore(), progress=False).outputs[:] == expected).all()


def test_inside_all_is_neutral_and_outside_as_before(untouched: Callable[..., object]) -> None:
    with (
        _default_dtype(torch.float64),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.device("meta"),
        torch.inference_mode(),
    ):
        with untouched(), neutral_ambient():  # type: ignore[attr-defined]
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert torch.zeros(1).dtype == torch.float32
            assert torch.zeros(1).device.type == "cpu"
        assert torch.is_autocast_enabled("cpu")
        assert torch.zeros(1).device.type == "meta"
        assert torch.zeros(1).dtype == torch.float64


def _precisions() -> dict[object, object]:
    """Returns what can be read of float32's precision, old settings and new; an error where torch raises."""
    found: dict[object, object] = {}
    reads: dict[object, Callable[[], object]] = {
        "products": torch.get_float32_matmul_precision,
        "cuBLAS": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cuDNN": lambda: torch.backends.cudnn.allow_tf32,
    }
    if NEW:
        reads |= {key: partial(torch._C._get_fp32_precision_getter, *key) for key in SETTINGS}
    for name, read in reads.items():
        try:
            found[name] = read()
        except RuntimeError as error:
            found[name] = str(error)[:40]
    return found


def _set_new(backend: str, what: str, value: str) -> Callable[[], object]:
    return lambda: torch._C._set_fp32_precision_setter(backend, what, value)


USERS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "old, medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old, high": lambda: torch.set_float32_matmul_precision("high"),
    "old, cuDNN off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "old, cuDNN on": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
}
if NEW:
    USERS |= {
        "new, products": _set_new("cuda", "matmul", "tf32"),
        "new, convolutions": _set_new("cuda", "conv", "tf32"),
        "new, all of CUDA": _set_new("cuda", "all", "tf32"),
        "new, everywhere": _set_new("generic", "all", "tf32"),
        "new, exact everywhere": _set_new("generic", "all", "ieee"),
        "new, bfloat16 on the CPU": _set_new("mkldnn", "matmul", "bf16"),
    }


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts float32's precision back after a test, as near as torch allows."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    new = [torch._C._get_fp32_precision_getter(*key) for key in SETTINGS] if NEW else []
    yield
    torch.set_float32_matmul_precision(matmul)
    if _precisions()["cuDNN"] != cudnn:
        torch.backends.cudnn.allow_tf32 = cudnn
    for key, value in zip(SETTINGS, new, strict=False):  # parents first; what follows them is not set
        if torch._C._get_fp32_precision_getter(*key) != value:
            torch._C._set_fp32_precision_setter(*key, value)


def _followed() -> list[dict[object, object]]:
    """Returns what all settings read while a parent is exact: those that follow it, and those that do not."""
    found = []
    for backend in ("cuda", "mkldnn", "generic") if NEW else ():
        value = torch._C._get_fp32_precision_getter(backend, "all")
        _set_new(backend, "all", "ieee")()
        found.append(_precisions())
        _set_new(backend, "all", value)()
    return found


@pytest.mark.parametrize("name", USERS)
@pytest.mark.usefixtures("precision")
def test_float32_is_exact_inside_and_set_as_before_outside(name: str) -> None:
    USERS[name]()
    before, followed = _precisions(), _followed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with no_tf32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.backends.cuda.matmul.allow_tf32 is False
            inside = _precisions()
            assert {inside[key] for key in SETTINGS if NEW} <= {"ieee"}
            with no_tf32():
                assert _precisions() == inside
            assert _precisions() == inside
    assert _precisions() == before
    assert followed == _followed()


@pytest.mark.skipif(not NEW, reason="these settings came after torch 2.8")
@pytest.mark.usefixtures("precision")
def test_an_engine_under_the_new_settings(mlp: nn.Module) -> None:
    inputs, targets = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    index = ablate.ComponentIndex.from_model(mlp)
    keep = ablate.KeepPlan(len(index), 4, 0.3).take(0, 4)
    expected = ablate.Engine(mlp, index).outputs(keep, inputs, targets)
    _set_new("generic", "all", "bf16")()
    assert torch.equal(ablate.Engine(mlp, index).outputs(keep, inputs, targets), expected)
