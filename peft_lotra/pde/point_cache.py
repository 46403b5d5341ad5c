# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives that the trained parameters do not change are computed once for the points of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.basis import in_transform
from ..least_squares.problem import trainable_parameters
from ..modules.calls import call_with_parameters, is_tracing


class PointCache(dict[Hashable, Any]):
    """Jets, by the values of the points.

    Attributes:
        functions: The given functions that the trained parameters of the model do not change.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        functions: list[Callable[..., Any]],
        x: Tensor,
    ) -> None:
        super().__init__()

        def evaluate() -> list[Tensor]:
            return [function(x) for function in functions]

        perturbed = {name: 1.1 * parameter + 0.1 for name, parameter in trainable_parameters(model).items()}
        perturbed_values = call_with_parameters(model, perturbed, evaluate, (), {})
        triples = zip(functions, evaluate(), perturbed_values, strict=True)
        self.functions = [function for function, *pair in triples if torch.equal(*pair)]


current_cache: ContextVar[PointCache | None] = ContextVar("current_cache", default=None)  # of this thread


def is_constant(function: Callable[..., Any]) -> bool:
    """Return whether the trained parameters do not change a function, as far as the current cache knows."""
    cache = None if is_tracing() else current_cache.get()
    if cache is None:
        return False
    return any(function is constant for constant in cache.functions)


def compute_once(
    compute: Callable[..., Any],
    function: Any,
    *arguments: Any,
) -> Any:
    """Return `compute(function, *arguments)`, a jet of a constant function, from the current cache if it has one."""
    cache = None if is_tracing() or in_transform() else current_cache.get()
    if cache is None or any(getattr(argument, "requires_grad", False) for argument in arguments):
        return compute(function, *arguments)
    key = (id(function), *map(_key, arguments))
    if key not in cache:
        with torch.no_grad():
            cache[key] = compute(function, *arguments)
    return cache[key]


def _key(value: Any) -> Hashable:
    """Return the bytes of a tensor, and other values as they are."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.cpu().numpy().tobytes()
    return value
