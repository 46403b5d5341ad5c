# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One thread at a time exchanges what a layer holds, and a forked process starts with nothing exchanged.

A fork copies the memory of a process, but of its threads only the one that forks. In the child, a lock that another
thread holds would never be released, and what that thread has exchanged, never be put back. So the child renews the
locks and undoes what other threads have in progress.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, wraps
from typing import Any
from weakref import WeakSet

import torch


_locks: WeakSet[LayerLock] = WeakSet()
# By a key of each: the thread that has something in progress, and how to undo it. An `undo` may be called at any point
# between its entry and its removal, so it writes what was there before, whatever is there now.
IN_PROGRESS: dict[object, tuple[int, Callable[[], Any]]] = {}


class LayerLock:
    """A re-entrant lock; a copied, or unpickled, layer gets a new one. `held` is the lock, which C code takes."""

    def __init__(self) -> None:
        self.held = threading.RLock()
        _locks.add(self)

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


@contextmanager
def undone_by_a_fork(undo: Callable[[], Any]) -> Iterator[None]:
    """A process that another thread forks within the context calls `undo`; see `IN_PROGRESS` for what it may do."""
    key = object()
    IN_PROGRESS[key] = threading.get_ident(), undo
    try:
        yield
    finally:
        del IN_PROGRESS[key]


@contextmanager
def put_back_by(undo: Callable[[], Any]) -> Iterator[None]:
    """Calls `undo` at the end, and in a process that another thread forks within the context."""
    with undone_by_a_fork(undo):
        try:
            yield
        finally:
            undo()


def _start_child() -> None:
    """What a forked process does first, in its only thread."""
    this_thread = threading.get_ident()
    for lock in _locks:
        if not lock.held._is_owned():  # pyright: ignore[reportAttributeAccessIssue] (threading.Condition uses it)
            lock.held = threading.RLock()
    with ExitStack() as undos:  # the last one first, and all of them
        for key, (thread, undo) in list(IN_PROGRESS.items()):
            if thread != this_thread:
                undos.callback(undo)
                del IN_PROGRESS[key]


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_start_child)


class cached(cached_property):  # in lower case, as `property`
    """`functools.cached_property` without the lock that it takes up to Python 3.11, which no fork renews."""

    def __init__(self, func: Callable[[Any], Any]) -> None:
        super().__init__(func)
        self.lock = nullcontext()
