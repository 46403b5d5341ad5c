# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Densities of knots for `peft_lotra.kan.refine_grid`: high where a solution bends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..derivatives.api import jet
from ..modules.calls import check_module
from ..modules.checks import check_count
from .boxes import check_box
from .points import box_points


_ALONG = 4  # points in each cell of a coordinate
_ACROSS = 32  # points in the other coordinates for each of these


@torch.inference_mode(False)
@torch.no_grad()
def knot_density(model: nn.Module, low: Sequence[float], high: Sequence[float], cells: int = 64) -> Tensor:
    r"""The relative number of knots that each cell of each coordinate of a box needs, for `KnotMap`:

        0.4 + 0.6 m / mean(m),   m = (mean of u_ii^2 over the cell and all other coordinates)^(1 / 6).

    Args:
        model: A network of the coordinates, as for `jet`; of several outputs all count.
        low, high: The ends of the box, I numbers each.
        cells: Equal cells of each coordinate.

    Returns:
        Positive numbers (I, cells) with mean 1, float64.

    Raises:
        ValueError: The box is empty, `cells` is below 1, or the derivatives are not finite.
        TypeError: `model` is no module.

    Source: C. de Boor, "Good approximation by splines with variable knots II" (1974): knots that make a power of a
    derivative equal in all intervals.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra.pde import knot_density
        >>> knot_density(KAN([2, 5, 1]).double(), (-1, -1), (1, 1), cells=16).shape
        torch.Size([2, 16])
    """
    check_module(model)
    low_end, high_end = check_box(low, high)
    cells = check_count(cells, "cells")
    across = box_points(low, high, _ACROSS)
    along = (torch.arange(cells * _ALONG, dtype=torch.float64, device="cpu") + 0.5) / (cells * _ALONG)
    like = next(iter(model.parameters()), low_end)
    found = []
    for i, direction in enumerate(torch.eye(len(low_end), dtype=torch.float64, device="cpu")):
        points = across.repeat(len(along), 1)
        points[:, i] = (low_end[i] + (high_end[i] - low_end[i]) * along).repeat_interleave(_ACROSS)
        bends = jet(model, points.to(like), direction.unsqueeze(0).to(like))[2].double()
        means = bends.square().view(cells, _ALONG * _ACROSS, -1).sum(-1).mean(1)
        if not means.isfinite().all():
            raise ValueError(f"The second derivatives of the model along coordinate {i} are not finite.")
        density = means.pow(1 / 6)
        density = density / density.mean() if density.any() else torch.ones_like(density)
        found.append(0.4 + 0.6 * density)
    return torch.stack(found)
