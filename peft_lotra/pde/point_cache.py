# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Distances and lifts, and their derivatives, are computed once for the points of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.basis import in_transform
from ..modules.calls import call_with_parameters, is_tracing


class PointCache:
    """The results of functions of points. An entry is used again for equal points, whatever tensor holds them.

    Attributes:
        functions: The functions whose results are kept.
    """

    def __init__(self, functions: list[Callable[..., Any]]) -> None:
        self.functions = functions
        self._entries: list[tuple[Any, list[Any], list[Tensor]]] = []

    def clear(self) -> None:
        """Drop all results."""
        self._entries = []

    def call(self, function: Any, compute: Callable[..., list[Tensor]], x: Tensor, *others: Any) -> list[Tensor]:
        """Return `compute(function, x, *others)`, or its result of an earlier call with equal arguments."""
        for of_entry, arguments, result in self._entries:
            if (
                of_entry is function
                and len(arguments) == 1 + len(others)
                and all(map(_equal, arguments, (x, *others)))
            ):
                return result
        result = [tensor.detach() for tensor in compute(function, x, *others)]
        # copies, since points may be changed in place
        arguments = [value.clone() if isinstance(value, Tensor) else value for value in (x, *others)]
        self._entries.append((function, arguments, result))
        return result


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one is other or (type(one) is int and one == other)
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


_current: ContextVar[PointCache | None] = ContextVar("point_cache", default=None)  # of a thread


@contextmanager
def using_cache(cache: PointCache) -> Iterator[None]:
    """Let `call_on_points` use a cache."""
    token = _current.set(cache)
    try:
        yield
    finally:
        _current.reset(token)


def call_on_points(function: Any, compute: Callable[..., list[Tensor]], x: Tensor, *others: Any) -> list[Tensor]:
    """Return `compute(function, x, *others)`, from the cache if there is one that keeps results of the function."""
    cache = None if is_tracing() else _current.get()
    is_kept = cache is not None and any(function is kept for kept in cache.functions)
    if not is_kept or in_transform() or x.requires_grad:
        return compute(function, x, *others)
    return cache.call(function, compute, x, *others)


@torch.no_grad()
def functions_of_points(model: nn.Module, functions: list[Callable[..., Any]], x: Tensor) -> list[Callable[..., Any]]:
    """Return those functions whose values at x do not change with the trained parameters of the model."""

    def evaluate() -> list[Tensor]:
        return [function(x) for function in functions]

    moved = {name: 1.1 * p.detach() + 0.1 for name, p in model.named_parameters() if p.requires_grad}
    pairs = zip(functions, evaluate(), call_with_parameters(model, moved, evaluate, (), {}), strict=True)
    return [function for function, before, after in pairs if torch.equal(before, after)]
