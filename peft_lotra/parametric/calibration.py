# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The parameter of a family that fits data, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .interpolation import MemberSpace, Point
from .members import argument
from .report import text_of


STARTS = 8  # members at most, of which the best one is the first guess
STEPS = 30  # Gauss-Newton steps at most
CONVERGED = 0.02  # of a standard error, by the last step
WIDTH = 1e-3  # of differences, as a share of the range
SINGULAR = 3e-3  # a direction whose effect is a smaller share of the largest is lost in the errors of the members
FLAT = 0.5  # the standard error along a direction, as a share of the range, from which data say nothing
BEYOND = 1.0  # standard error outside of the range is left to noise


@dataclass(frozen=True, eq=False)
class Calibration:
    """The most likely parameter for data with independent Gaussian errors, all of the same unknown size.

    Attributes:
        parameter: The parameter, a number or a tuple.
        error: Its standard error, the same; 95 % intervals are about `parameter` plus and minus twice as much.
        covariance: The covariance (dim, dim) of the parameters, s^2 (J^T J)^-1 with the Jacobian J of the residuals.
        noise: s, the standard deviation of the residuals.
        prediction: The prediction of the family at the parameter.
    """

    parameter: float | Point
    error: float | Point
    covariance: np.ndarray = field(repr=False)
    noise: float
    prediction: Any = field(repr=False)


def minimize(space: MemberSpace, residuals_at: Callable[[Point, np.ndarray], Any]) -> tuple[Point, np.ndarray, float]:
    """The parameter in the range of the members with the least sum of squared residuals, its covariance, and the
    standard deviation of the residuals. A ValueError if data do not determine it."""
    dim, low, high = space.places.shape[1], space.places.amin(0), space.places.amax(0)

    def evaluate(places: Tensor) -> Tensor:
        rows = zip(space.points_at(places), space.vectors_at(places, list(range(len(space.members)))), strict=True)
        return torch.stack([_checked(residuals_at(point, vector), dim) for point, vector in rows])

    def linearized(place: Tensor) -> tuple[Tensor, Tensor]:
        """The residuals (n,) and their Jacobian (n, dim) by differences, toward the inside of the range."""
        shifts = WIDTH * torch.where(place + WIDTH > high, -1.0, 1.0)
        first, *others = evaluate(torch.cat([place.unsqueeze(0), place + torch.diag(shifts)]))
        return first, (torch.stack(others) - first).T / shifts

    starts = space.places[:: math.ceil(len(space.places) / STARTS)]
    place = starts[evaluate(starts).norm(dim=1).argmin()]
    residuals, slopes = linearized(place)
    for _ in range(STEPS):
        step = _step(slopes, residuals)
        held = ((place <= low) & (step < 0)) | ((place >= high) & (step > 0))
        step = _step(slopes.masked_fill(held, 0.0), residuals)  # along the ends of the range
        if (slopes @ step).norm() < CONVERGED * residuals.norm() / math.sqrt(len(residuals)):
            break
        for share in (1.0, 0.3, 0.1, 0.01):
            candidate = (place + share * step).clamp(low, high)
            new, new_slopes = linearized(candidate)
            if new.norm() < residuals.norm():
                break
        else:
            break
        place, residuals, slopes = candidate, new, new_slopes
    noise = residuals.norm().item() / math.sqrt(len(residuals) - dim)
    (point,) = space.points_at(place.unsqueeze(0))
    scale = space.extent * torch.where(space.log, torch.tensor(point, dtype=torch.float64, device="cpu"), 1.0)
    _, values, directions = torch.linalg.svd(slopes, full_matrices=False)
    covariance = noise**2 * (directions.T / values**2) @ directions
    ahead = place + _step(slopes, residuals)
    outside = torch.maximum(low - ahead, ahead - high) > BEYOND * covariance.diagonal().sqrt()
    if outside.any():
        raise ValueError(
            f"The data ask for a parameter outside of the fitted members: the best one inside, {argument(point)}, is "
            "at their end. Fit the family farther."
        )
    if not values[-1] > max(SINGULAR * values[0], noise / FLAT):
        weak = (directions[-1] * scale).tolist()
        raise ValueError(
            f"The data do not determine the parameter: near {argument(point)} the residuals hardly change along the "
            f"direction ({text_of(weak)}). Give data that do, or a family of fewer parameters."
        )
    return point, (scale.unsqueeze(1) * covariance * scale).numpy(), noise


def _step(jacobian: Tensor, residuals: Tensor) -> Tensor:
    return -(torch.linalg.pinv(jacobian, rtol=1e-8) @ residuals)


def _checked(residuals: Any, dim: int) -> Tensor:
    """The residuals (n,) in float64; a ValueError if they are malformed."""
    if not isinstance(residuals, Tensor) or not residuals.is_floating_point() or residuals.numel() <= dim:
        given = f"shape {tuple(residuals.shape)}" if isinstance(residuals, Tensor) else f"a {type(residuals).__name__}"
        raise ValueError(f"`residuals` returns {given}, but must return a tensor with more than {dim} real numbers.")
    if residuals.dim() == 2 and (n := len(residuals)) == residuals.shape[1]:
        raise ValueError(f"`residuals` returns ({n}, {n}): values (n, 1) minus data (n,) are all pairs; reshape one.")
    if wrong := int((~residuals.isfinite()).sum()):
        raise ValueError(f"{wrong} of {residuals.numel()} residuals are NaN or infinite: leave such data out.")
    return residuals.detach().double().cpu().flatten()
