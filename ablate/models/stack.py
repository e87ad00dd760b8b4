"""Which module's forward is running: calls of forwards recorded by hooks that are removed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Frame:
    """One call of one module's forward; `version` is its input's when it began (see `version_of`)."""

    module: str
    input: Any = None
    output: Any = None
    uses: int = 0
    version: int = 0


def version_of(value: Any) -> int:
    """Returns how often the memory of a tensor was written to; 0 where torch does not count."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class Stack:
    """Records which module's forward is running, by hooks that `with` removes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._open: list[Frame] = []
        self.frames: list[Frame] = []
        self.left: Callable[[Frame], None] = lambda frame: None  # called at the end of every call
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
            given = args[0] if args else next(iter(kwargs.values()), None)
            frame = Frame(name, given, version=version_of(given))
            self._open.append(frame)
            self.frames.append(frame)

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self._open.pop()
        frame.output = output
        self.left(frame)
