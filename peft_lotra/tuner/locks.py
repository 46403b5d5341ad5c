# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Locks of adapted layers: one thread at a time exchanges parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch


class LayerLock:
    """A re-entrant lock; a copied, or unpickled, layer gets a new one. `held` is the lock, which C code takes."""

    def __init__(self) -> None:
        self.held = threading.RLock()

    def __enter__(self) -> None:
        self.held.acquire()

    def __exit__(self, *args: Any) -> None:
        self.held.release()

    def __reduce__(self):
        return LayerLock, ()


def exclusively(method: Callable) -> Callable:
    """Lets one thread at a time run a method of a layer. Compiled graphs exchange no parameters and take no lock."""

    @wraps(method)
    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        with self.lotra_lock.held:
            return method(self, *args, **kwargs)

    return run


def exclusively_within(method: Callable) -> Callable:
    """Lets one thread at a time be within the context that a method returns."""

    @wraps(method)
    @contextmanager
    def run(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with nullcontext() if torch.compiler.is_compiling() else self.lotra_lock.held:
            with method(self, *args, **kwargs) as context:
                yield context

    return run
