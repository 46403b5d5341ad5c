# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A hook that evaluated networks call, for optimizers that record their layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from ..modules.calls import is_tracing


_current: ContextVar[Any] = ContextVar("recording_hook", default=None)
_H = TypeVar("_H")


@contextmanager
def recording(hook: _H) -> Iterator[_H]:
    """Install a hook in this thread, and restore the previous one afterwards.

    Its methods compute outputs in place of a network, or return None to let the network run:

    * `value(network, x)` the outputs (..., O) at inputs x (..., I);
    * `jet(through, x, directions, weights)` the jet `through(evaluate, x, directions, weights)` with an `evaluate`
      like `derivatives.layers.evaluate_layer`.
    """
    token = _current.set(hook)
    try:
        yield hook
    finally:
        _current.reset(token)


def current_hook() -> Any:
    """Return the hook of this thread; None in compiled graphs."""
    return None if is_tracing() else _current.get()
