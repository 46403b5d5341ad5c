# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A hook that networks call when they are evaluated, by which an optimizer records their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn


class RecordingHook(Protocol):
    """Computes outputs in place of a network; None lets the network run as usual."""

    def value(self, network: nn.Module, x: Tensor) -> Tensor | None:
        """The outputs (..., O) of the network at inputs x (..., I)."""
        ...

    def jet(
        self, through: Callable[..., Any], x: Tensor, directions: Tensor, weights: Tensor | None
    ) -> list[Tensor] | None:
        """The jet `through(evaluate, x, directions, weights)` of a network, with an `evaluate` like
        `derivatives.layers.evaluate_layer`."""
        ...


_current: ContextVar[RecordingHook | None] = ContextVar("recording_hook", default=None)
_H = TypeVar("_H", bound=RecordingHook)


@contextmanager
def recording(hook: _H) -> Iterator[_H]:
    """Installs a hook in this thread; the previous one is back afterwards."""
    token = _current.set(hook)
    try:
        yield hook
    finally:
        _current.reset(token)


def current_hook() -> RecordingHook | None:
    """The hook of this thread; None in compiled graphs."""
    return None if torch.compiler.is_compiling() else _current.get()
