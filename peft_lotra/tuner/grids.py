# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Grids of KAN layers: their ends, their changes, and inputs that lie outside of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from ..layers.kinds import Grid


def refuse_grid_change(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    """Raise the error of a call that changes what the coefficients of the adapters mean."""
    raise RuntimeError(
        f"`{name}` would change what the coefficients of the adapters mean. Merge them first (`merge_and_unload()`), "
        "move the grid, and adapt the model again."
    )


def holds_meta_tensors(grid: Grid) -> bool:
    return any(isinstance(value, Tensor) and value.is_meta for value in grid.values())


def grid_ends(grid: Grid, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Return both ends (in,) of the grid of each input of a layer (out, in, basis); None if it is no tensor by input.

    The knots of B-splines beyond the grid are left out.
    """
    _, in_features, num_basis = shape[:3]
    for value in grid.values():
        if isinstance(value, Tensor) and value.dim() == 2 and len(value) == in_features:
            knots = value.detach().sort(dim=1).values
            beyond = max(0, knots.shape[1] - num_basis - 1)  # the order of the splines
            return knots[:, beyond], knots[:, -1 - beyond]
    return None


def warn_of_far_inputs(
    name: str,
    grid: Grid,
    shape: Sequence[int],
    x: Any,
) -> None:
    """Warn if most inputs of a layer (out, in, basis) lie further from its grid than it is long."""
    ends = grid_ends(grid, shape)
    has_values = isinstance(x, Tensor) and not x.is_meta
    if ends is None or not has_values or x.shape[-1:] != (shape[1],):
        return
    low, high = ends
    middle = (low + high) / 2
    distance = (x.detach() - middle).abs()
    is_far = distance > 1.5 * (high - low)
    if is_far.double().mean() > 0.5:
        warnings.warn(
            f"Most inputs of `{name}` lie far outside of its grid, from {low.min():.3g} to {high.max():.3g}, where "
            "splines are zero. Scale the inputs of the network to the grid of its first layer. If they are scaled, "
            "bound the inputs of hidden layers by a norm such as tanh.",
            stacklevel=2,
        )
