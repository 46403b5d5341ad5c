# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A slot for an observer of the KANs that are evaluated, such as an optimizer that records what passes the layers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn


class Observer(Protocol):
    """What a network asks the observer of its thread. None lets the network run as usual."""

    def value(self, network: nn.Module, x: Tensor) -> Tensor | None:
        """The outputs (..., O) of the network at inputs x (..., I)."""
        ...

    def jet(
        self, through: Callable[..., Any], x: Tensor, directions: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The jet `through(evaluate, x, directions, weights)` of a network, where `evaluate` may be any function like
        `jets.layers.evaluate_layer`."""
        ...


_state = threading.local()
_O = TypeVar("_O", bound=Observer)


@contextmanager
def observing(observer: _O) -> Iterator[_O]:
    """Makes the observer that of this thread; the one before is back afterwards."""
    before, _state.observer = getattr(_state, "observer", None), observer
    try:
        yield observer
    finally:
        _state.observer = before


def current_observer() -> Observer | None:
    """The observer of this thread, or None. Compiled graphs have none."""
    return None if torch.compiler.is_compiling() else getattr(_state, "observer", None)
