"""What a process has set around a call, made neutral for its time: autocast, defaults, TF32, inference mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# The new settings of float32's precision. What is "none" follows its parent: (backend, "all"), then the generic one.
_NEW = hasattr(torch._C, "_get_fp32_precision_getter")  # not in torch 2.8
_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all")) if _NEW else ()
_PRODUCTS = (("cuda", "matmul"), ("mkldnn", "matmul")) if _NEW else ()
_OTHERS = (("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "conv"), ("mkldnn", "rnn")) if _NEW else ()
_DTYPE = torch.float32


@contextmanager
def neutral_ambient(device: torch.device | None = None) -> Iterator[None]:
    """Runs a `with` block as in a fresh process: float32 means float32, whatever stands around the call.

    Switched off: inference mode (gradients are possible inside: say `torch.no_grad()` where none are wanted), autocast,
    TF32 and its like, a default dtype other than float32. A default device, where one is set, is `device`. All is as
    before on exit, also on error. Algorithms stay deterministic where they have to be: that changes no number.

    Args:
      device: Where a model that makes tensors without saying where makes them; None: on the CPU.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # tensors made in it could have no gradients
        for kind in {"cpu", "cuda", "cpu" if device is None else device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.cuda.is_available() or not _exact_on_cpu():
            stack.enter_context(no_tf32())
        if torch.get_default_dtype() != _DTYPE:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(_DTYPE)
        wanted = torch.device("cpu") if device is None else device
        if torch.get_default_device().type not in ("cpu", wanted.type):
            stack.enter_context(wanted)
        yield


@contextmanager
def no_tf32() -> Iterator[None]:
    """Switches TF32, and bfloat16 in its place, off for the time of a `with` block: float32 then means float32.

    Torch keeps this in two sets of settings, old and new, and raises when one is read while the other contradicts it.
    So both are put away, and put back as they were, those that follow a parent still following it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions warn that the old settings will go
        before = _Float32Settings()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before.put_back()


class _Float32Settings:
    """All of torch's settings of how exact float32 is: taken, and made exact, then put back."""

    def __init__(self) -> None:
        self._parents = {setting: _own(setting) for setting in _PARENTS}
        self._products = {setting: _own(setting) for setting in _PRODUCTS}
        self._matmul = torch.get_float32_matmul_precision()  # readable: nothing contradicts it any more
        torch.set_float32_matmul_precision("highest")
        for parent in self._parents:
            _set(parent, "ieee")
        # A setting that follows its parent is exact by now, and is not touched: torch has defaults that cannot be set.
        self._others = {other: value for other in _OTHERS if (value := _get(other)) != "ieee"}
        self._cudnn = _allows_cudnn()
        if self._cudnn:
            torch.backends.cudnn.allow_tf32 = False
        for other in self._others:
            _set(other, "ieee")

    def put_back(self) -> None:
        """Sets all as they were; the old settings first, for they write into the new."""
        torch.set_float32_matmul_precision(self._matmul)
        if self._cudnn:
            torch.backends.cudnn.allow_tf32 = True
        for setting, value in {**self._products, **self._others, **self._parents}.items():
            _set(setting, value)


def _exact_on_cpu() -> bool:
    """Returns whether float32 means float32 on the CPU; what is not touched there is not fought over by threads."""
    if not _NEW:
        return torch.get_float32_matmul_precision() == "highest"
    return all(_get(setting) in ("ieee", "none") for setting in (*_PRODUCTS, *_OTHERS) if setting[0] == "mkldnn")


def _get(setting: tuple[str, str]) -> str:
    value: str = torch._C._get_fp32_precision_getter(*setting)
    return value


def _set(setting: tuple[str, str], value: str) -> None:
    torch._C._set_fp32_precision_setter(*setting, value)


def _own(setting: tuple[str, str]) -> str:
    """Returns a setting's own value, its parents being "none", and makes it "none"."""
    value = _get(setting)
    _set(setting, "none")
    return value


def _allows_cudnn() -> bool:
    """Returns whether the old setting allows cuDNN TF32, False if the new ones contradict it: those count."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return False
