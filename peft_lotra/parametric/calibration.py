# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The parameter of a family that fits data, with its standard error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.special import fdtrc

from .interpolation import MemberSpace, Point, text_of


STARTS = 8  # members at most, the best one is the first guess
CONVERGED = 1e-5  # of the range, by the last step
WIDTH = 1e-3  # of differences, as a share of the range
SHIFT = 1.0  # of positions from [0, 1], since scipy's differences are relative to the coordinates
SINGULAR = 3e-3  # a direction whose effect is a smaller share of the largest is lost in the errors of the members
FLAT = 0.5  # the standard error along a direction, as a share of the range, from which data say nothing
BEYOND = 1.0  # standard error outside of the range is left to noise
REPEATED = 1e-5  # of the residuals: two evaluations of the same model differ by rounding only
# Squared residuals that may be a misfit, as a share of the largest change between members: anywhere, and at an end
POOR, POOR_AT_END = 0.5, 3.0
CHANCE = 1e-3  # of noise that looks like a misfit
UNSURE = 0.25  # of the family's own error may be left after its correction
ROUNDS = 2  # Gauss-Newton steps with the refitted network
REFIT_WIDTH = 0.02  # of their differences, as a share of the range: refits differ by more than rounding


@dataclass(frozen=True, eq=False)
class Calibration:
    """The result of `calibrate`: the most likely parameter for data.

    The errors of the data are independent and Gaussian, all of the same unknown size. The predictions of the family
    have an error d too. It is found by training the whole network at and near the estimate, and corrected.

    Attributes:
        parameter: The parameter, a number or a tuple.
        error: Its standard error, the same; 95 % intervals are about `parameter` plus and minus twice as much.
        covariance: The covariance (dim, dim) of the parameters, (s^2 + |d|^2 / 16) (J^T J)^-1 with the Jacobian J of
            the residuals of the trained network, since a part of d may be left.
        noise: s, the standard deviation of the residuals.
        prediction: The prediction of the family at the parameter.
    """

    parameter: float | Point
    error: float | Point
    covariance: np.ndarray = field(repr=False)
    noise: float
    prediction: Any = field(repr=False)


def minimize(
    space: MemberSpace,
    residuals_at: Callable[[Point, np.ndarray], Any],
    refitted_at: Callable[[Point, np.ndarray], Any],
    ignore_missing: bool,
) -> tuple[Point, np.ndarray, float]:
    """Find the parameter in the range of the members with the least sum of squared residuals.

    Args:
        space: The members.
        residuals_at: The residuals at a parameter and its coordinates.
        refitted_at: The same after a refit of the whole network, without the error of the family.
        ignore_missing: Whether to leave out residuals that are NaN.

    Returns:
        The parameter, its covariance, and the standard deviation of the residuals.

    Raises:
        ValueError: The residuals are malformed or random, or the data do not determine the parameter.
    """
    low, high = space.positions.aminmax(dim=0)
    dim = len(low)

    def evaluate(shifted: np.ndarray, residuals_at: Callable = residuals_at) -> np.ndarray:
        position = torch.from_numpy(shifted - SHIFT).unsqueeze(0)
        (point,) = space.points_at(position)
        (vector,) = space.vectors_at(position)
        residuals = residuals_at(point, vector)
        count = len(residuals)
        if count > 1 and residuals.shape == (count, count):
            raise ValueError(
                f"`residuals` returns ({count}, {count}): values (n, 1) minus data (n,) are all pairs. Reshape one, "
                "or flatten the residuals if each of them counts."
            )
        return residuals.detach().double().cpu().flatten().numpy()

    stride = math.ceil(len(space.positions) / STARTS)
    starts = space.positions[::stride].numpy() + SHIFT
    first = evaluate(starts[0])
    check_equal(first, evaluate(starts[0]))
    is_present = ~(np.isnan(first) & ignore_missing)
    if is_present.sum() <= dim:
        raise ValueError(f"`residuals` has {is_present.sum()} values without NaN, but must have more than {dim}.")

    def residuals_of(shifted: np.ndarray, residuals_at: Callable = residuals_at) -> np.ndarray:
        values = evaluate(shifted, residuals_at)[is_present]
        wrong = np.sum(~np.isfinite(values))
        if wrong:
            raise ValueError(
                f"`residuals` returns NaN or infinite numbers for {wrong} of {values.size} values. If NaN stand for "
                "missing data, pass `ignore_missing=True`."
            )
        return values

    at_starts = np.stack([residuals_of(start) for start in starts])
    norms = np.linalg.norm(at_starts, axis=1)
    # scipy's tolerance of the gradient would depend on the units of the residuals
    unit = norms.min() or 1.0

    def scaled_residuals(shifted: np.ndarray) -> np.ndarray:
        return residuals_of(shifted) / unit

    start = starts[norms.argmin()]
    upper = high.maximum(low + WIDTH)
    bounds = low.numpy() + SHIFT, upper.numpy() + SHIFT
    solution = least_squares(scaled_residuals, start, bounds=bounds, diff_step=WIDTH, xtol=CONVERGED, ftol=1e-6)

    position = torch.from_numpy(solution.x - SHIFT)

    def refitted(position: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(residuals_of(position.numpy() + SHIFT, refitted_at))

    family_error = torch.from_numpy(unit * solution.fun) - refitted(position)
    for _ in range(ROUNDS):
        residuals = refitted(position)
        # toward the middle, so within the range
        widths = torch.where(2 * position > low + high, -REFIT_WIDTH, REFIT_WIDTH)
        columns = [refitted(position + step) - residuals for step in widths.diag()]
        slopes = torch.stack(columns, dim=1) / widths
        _, values, directions = torch.linalg.svd(slopes, full_matrices=False)
        inverse = torch.linalg.pinv(slopes, rtol=1e-8)
        ahead = position - inverse @ residuals  # where a step without bounds leads
        residuals = residuals + slopes @ (ahead.clamp(low, high) - position)
        position = ahead.clamp(low, high)

    (point,) = space.points_at(position.unsqueeze(0))
    noise = residuals.norm().item() / math.sqrt(len(residuals) - dim)
    inverse_gram = inverse @ inverse.T
    beyond = (ahead - position).abs()
    is_outside = beyond > BEYOND * noise * inverse_gram.diagonal().sqrt()
    to_end = torch.minimum(position - low, high - position)
    is_at_end = bool((to_end < WIDTH).any())
    if is_outside.any() or is_misfit(residuals.numpy(), at_starts, dim, is_at_end):
        raise ValueError(
            "The data ask for a parameter outside of the fitted members, or for another equation. The best one "
            f"inside, {text_of(point)}, is at their end, or does not explain the data. Fit members farther out, or "
            "check the data and the equation."
        )

    # the derivative of the parameter in the position
    scale = space.extent * torch.where(space.log, position.new_tensor(point), 1.0)
    if not values[-1] > max(SINGULAR * values[0], noise / FLAT):
        weak = (directions[-1] * scale).tolist()
        raise ValueError(
            f"The data do not determine the parameter: near {text_of(point)} the residuals hardly change along the "
            f"direction ({text_of(weak)}). Give data that do, or a family of fewer parameters."
        )
    unsure = UNSURE * family_error.norm().item()
    if unsure > noise:
        warnings.warn(
            "The family's own error makes most of the standard error, more than the noise of the data. Fit a member "
            "at the parameter, and calibrate again.",
            stacklevel=3,
        )
    covariance = (noise**2 + unsure**2) * scale.unsqueeze(1) * inverse_gram * scale  # of the parameter
    return point, covariance.numpy(), noise


def check_equal(residuals: np.ndarray, again: np.ndarray) -> None:
    """Raise a `ValueError` if two evaluations of the same model differ by more than rounding."""
    largest = np.abs(residuals[np.isfinite(residuals)]).max(initial=0.0)
    tolerance = REPEATED * largest
    if residuals.shape != again.shape or not np.allclose(residuals, again, 0.0, tolerance, equal_nan=True):
        raise ValueError(
            "`residuals` returns different values for the same model: noise, dropout, or a batch that it draws. Draw "
            "once, outside of the function."
        )


def is_misfit(
    residuals: np.ndarray,
    of_members: np.ndarray,
    dim: int,
    is_at_end: bool,
) -> bool:
    """Return whether the least residuals (n,) are no noise, compared with the residuals of members (m, n).

    They are a misfit if they are large, compared with the changes between members, and either the best parameter is at
    an end of the range, or a combination of members fits better than noise of this size lets it by chance (F-test).
    """
    changes = of_members - residuals
    squares = residuals @ residuals
    largest = np.square(changes).sum(1).max()
    share = squares / max(largest, 1e-300)
    # where nothing changes, no parameter is better than another
    if share <= POOR or largest <= REPEATED**2 * squares:
        return False
    if is_at_end and share > POOR_AT_END:
        return True

    count = len(residuals)
    _, sizes, directions = np.linalg.svd(changes, full_matrices=False)
    rank = int((sizes > SINGULAR * sizes[0]).sum())
    rank = min(rank, count // 3)
    if rank <= dim:
        return False
    explained = np.square(directions[:rank] @ residuals).sum()
    unexplained = max(squares - explained, 1e-300)
    freedom = rank - dim
    rest = count - rank
    ratio = (explained / freedom) / (unexplained / rest)
    return bool(fdtrc(freedom, rest, ratio) < CHANCE)
