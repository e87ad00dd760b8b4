"""Which module's forward is running: calls of forwards recorded by hooks that are removed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass
class Frame:
    """One call of one module's forward."""

    module: str
    input: Any = None
    output: Any = None
    uses: int = 0


class Stack:
    """Records which module's forward is running, by hooks that `with` removes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._open: list[Frame] = []
        self.frames: list[Frame] = []
        self.failed: str | None = None

    @contextmanager
    def watching(self) -> Iterator[Stack]:
        """Adds the hooks for the time of a `with` block; on an error, `failed` names the innermost module."""
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield self
        except Exception:
            self.failed = self._open[-1].module if self._open else None
            raise
        finally:
            for handle in handles:
                handle.remove()

    @property
    def top(self) -> Frame:
        """The call that is running."""
        return self._open[-1] if self._open else Frame("")

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            frame = Frame(name, args[0] if args else next(iter(kwargs.values()), None))
            self._open.append(frame)
            self.frames.append(frame)

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._open.pop().output = output
