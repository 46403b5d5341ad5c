# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives of distances and lifts are computed once for the points of a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.chain_rule import Jet
from ..kan.basis import in_transform
from ..modules.calls import call_with_parameters, is_tracing


class PointCache(dict[Hashable, Jet]):
    """Jets by the values of points, so that it does not matter which tensor holds them, or whether it is changed.

    Attributes:
        functions: The functions whose jets are kept: those that the trained parameters of the model do not change.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, functions: list[Callable[..., Any]], x: Tensor) -> None:
        super().__init__()

        def evaluate() -> list[Tensor]:
            return [function(x) for function in functions]

        perturbed = {name: 1.1 * p.detach() + 0.1 for name, p in model.named_parameters() if p.requires_grad}
        pairs = zip(evaluate(), call_with_parameters(model, perturbed, evaluate, (), {}), strict=True)
        self.functions = [function for function, pair in zip(functions, pairs, strict=True) if torch.equal(*pair)]


current_cache: ContextVar[PointCache | None] = ContextVar("current_cache", default=None)  # of this thread


def compute_once(compute: Callable[..., Jet], function: Any, x: Tensor, *others: Any) -> Jet:
    """Return `compute(function, x, *others)`, from the present cache if it keeps jets of the function."""
    cache = current_cache.get() if can_keep(x) else None
    if cache is None or all(function is not kept for kept in cache.functions):
        return compute(function, x, *others)
    key = id(function), *map(key_of, (x, *others))
    if key not in cache:
        cache[key] = [part.detach() for part in compute(function, x, *others)]
    return cache[key]


def can_keep(x: Tensor) -> bool:
    """Return whether what is computed at these points has no graph, and may be kept."""
    return not (is_tracing() or in_transform() or x.requires_grad)


def key_of(value: Any) -> Hashable:
    """Return a key that equal tensors, and equal values, share."""
    is_tensor = isinstance(value, Tensor)
    return (value.dtype, value.shape, value.cpu().numpy().tobytes()) if is_tensor else value
