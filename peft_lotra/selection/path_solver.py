# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The closed form of a linear path, for squares and other smooth convex losses.

The outputs are f = scale * network + features B, with a ridge penalty on B. A row that is left out changes its own
output by its leverage: exactly for squares, by one Newton step for other losses. Everything is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from scipy.optimize import minimize
from torch import Tensor

from .training import Loss, losses_of_rows, weigh_rows


Solution = tuple[float, Tensor, Tensor, Tensor]  # strength, coefficients B, constant, outputs of rows left out

# of the penalty, as shares of the features' mean squared norm
_STRENGTHS = (100.0, 10.0, 3.0, 1.0, 0.3, 0.1, 3e-2, 1e-2, 1e-3)
_STRENGTHS_OF_CLASSES = (1.0, 0.3, 0.1, 3e-2, 1e-2, 1e-3)
_OPTIONS = {"maxiter": 300, "gtol": 1e-3, "ftol": 1e-8, "maxcor": 20}  # of L-BFGS
# Inputs of a KAN are on its grid, about (-1, 1). One that hardly varies in a few rows may be far outside in others.
_LEAST_DEVIATION = 0.05


class PathFit(NamedTuple):
    """A fitted path, scale * network(x) + W x + b, and its loss on rows that were left out.

    Attributes:
        scale: The factor of the network.
        weight: W, (out, in) in float64.
        bias: b, (out,) in float64.
        strength: The strength of the ridge penalty, as a share of the features' mean squared norm.
        losses: The loss (rows,) of each row, by the path that is fitted to the other rows.
    """

    scale: float
    weight: Tensor
    bias: Tensor
    strength: float
    losses: Tensor

    @classmethod
    def of_scale(cls, scale: float, in_features: int, out_features: int) -> PathFit:
        """Return the path that only scales the network."""
        weight = torch.zeros(out_features, in_features, dtype=torch.float64)
        return cls(scale, weight, weight.new_zeros(out_features), math.inf, weight.new_zeros(0))

    def predict(self, x: Tensor, outputs: Tensor) -> Tensor:
        """Return the outputs (rows, out) for inputs (rows, in) and outputs of the network (rows, out)."""
        return self.scale * outputs + x @ self.weight.T.to(x) + self.bias.to(x)


class _Features(NamedTuple):
    """Standardized inputs, in coordinates in which their weighted Gram matrix is diagonal.

    Attributes:
        rows: The coordinates (rows, k).
        squares: The diagonal of the Gram matrix (k,).
        to_inputs: The map from coefficients (k, out) to W^T and, with a constant, to b, (in + 1, out).
        mean_square: The mean squared norm of a row.
    """

    rows: Tensor
    squares: Tensor
    to_inputs: Tensor
    mean_square: float


class _SmoothLoss:
    """The loss of each row as a function of the outputs (rows, out), by automatic differentiation."""

    strengths = _STRENGTHS
    has_constant = True
    curvature = 1.0  # the mean of the second derivatives

    def __init__(self, loss: Loss, y: Tensor) -> None:
        self._loss = loss
        self._y = y

    def values(self, f: Tensor) -> Tensor:
        """Return the loss of each row (rows,)."""
        return losses_of_rows(self._loss, f, self._y)

    def differentiate(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, and its gradient in the outputs (rows, out)."""
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            values = self.values(f)
            (gradients,) = torch.autograd.grad(values.sum(), f, materialize_grads=True)
        return values.detach(), gradients

    def hessians(self, f: Tensor) -> Tensor:
        """Return the second derivatives (rows, out, out)."""
        columns = []
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (gradients,) = torch.autograd.grad(self.values(f).sum(), f, create_graph=True, materialize_grads=True)
            for column in gradients.sum(0) + 0 * f.sum():  # some losses have constant gradients
                columns += torch.autograd.grad(column, f, retain_graph=True)
        return torch.stack(columns, 2)

    def curvatures(self, f: Tensor) -> Tensor:
        """Return the second derivative (rows, out) in each output, for the step of a row left out."""
        return self.hessians(f).diagonal(dim1=1, dim2=2)

    def _evaluate(self, flat: Any, rows: Tensor, penalties: Tensor, offset: Tensor, w: Tensor) -> tuple[float, Any]:
        """Return the penalized loss of coefficients (k out,), and its gradient."""
        coefficients = torch.from_numpy(flat).view(rows.shape[1], -1)
        pull = penalties * coefficients
        values, gradients = self.differentiate(offset + rows @ coefficients)
        value = w @ values + 0.5 * (pull * coefficients).sum()
        gradient = rows.T @ (w.unsqueeze(1) * gradients) + pull
        return value.item(), gradient.flatten().numpy()

    def solve(self, features: _Features, offset: Tensor, w: Tensor) -> Iterator[Solution]:
        """Minimize sum w loss(offset + rows B) + penalty / 2 |B|^2 by L-BFGS for each strength, each from the last."""
        rows, squares, _, mean_square = features
        coefficients = rows.new_zeros(rows.shape[1], offset.shape[1])
        for strength in self.strengths:
            penalty = strength * mean_square * self.curvature
            # in these units the second derivatives are about 1
            units = torch.rsqrt(0.5 * self.curvature * squares + penalty).unsqueeze(1)
            scaled_rows = rows * units.T
            penalties = penalty * units.square()

            start = (coefficients / units).flatten().numpy()
            arguments = scaled_rows, penalties, offset, w
            result: Any = minimize(self._evaluate, start, arguments, "L-BFGS-B", jac=True, options=_OPTIONS)
            coefficients = torch.from_numpy(result.x).view_as(coefficients) * units

            f = offset + rows @ coefficients
            _, gradients = self.differentiate(f)
            curvatures = self.curvatures(f)
            left_out = f.clone()
            for column in range(f.shape[1]):
                curvature = w * curvatures[:, column]
                matrix = rows.T @ (curvature.unsqueeze(1) * rows)
                matrix.diagonal().add_(penalty)
                factor, _ = torch.linalg.cholesky_ex(matrix)
                leverage = (rows @ torch.cholesky_inverse(factor) * rows).sum(1)
                remaining = (1 - curvature * leverage).clamp(min=1e-3)
                left_out[:, column] += w * leverage * gradients[:, column] / remaining
            yield strength, coefficients, rows.new_zeros(()), left_out


class _CrossEntropy(_SmoothLoss):
    """Cross entropy, with shares of the classes (rows, out) as targets."""

    strengths = _STRENGTHS_OF_CLASSES

    def __init__(self, shares: Tensor) -> None:
        self._shares = shares

    def values(self, f: Tensor) -> Tensor:
        return self.differentiate(f)[0]

    def differentiate(self, f: Tensor) -> tuple[Tensor, Tensor]:
        logarithms = f.log_softmax(1)
        return -(self._shares * logarithms).sum(1), logarithms.exp() - self._shares

    def curvatures(self, f: Tensor) -> Tensor:
        p = f.softmax(1)
        classes = f.shape[1]
        # the factor makes up for the second derivatives in two classes
        return p * (1 - p) * classes / (classes - 1)


class _Squares(_SmoothLoss):
    """Squared distances from targets (rows, out), times half the curvature."""

    has_constant = False  # it has no penalty, so that a shift of the targets shifts the path

    def __init__(self, targets: Tensor, curvature: float) -> None:
        self._targets = targets
        self.curvature = curvature

    def values(self, f: Tensor) -> Tensor:
        return 0.5 * self.curvature * (f - self._targets).square().sum(1)

    def solve(self, features: _Features, offset: Tensor, w: Tensor) -> Iterator[Solution]:
        """Solve the normal equations for each strength."""
        rows, squares, _, mean_square = features
        residual = self._targets - offset
        constant = w @ residual / w.sum()
        right_side = rows.T @ (w.unsqueeze(1) * (residual - constant))
        for strength in self.strengths:
            inverse = 1 / (squares + strength * (1 + mean_square))
            coefficients = inverse.unsqueeze(1) * right_side
            leverage = w * (rows.square() @ inverse + 1 / w.sum())
            error = (residual - constant - rows @ coefficients) / (1 - leverage).unsqueeze(1)
            yield strength, coefficients, constant, self._targets - error


def fit_scale(loss: Loss, outputs: Tensor, y: Tensor) -> float:
    """Return the factor of the outputs (rows, out), from 0.05 to 1, with the least loss."""
    scales = [step / 20 for step in range(20, 0, -1)]
    with torch.no_grad():
        return min(scales, key=lambda scale: loss(scale * outputs, y).item())


def solve_path(
    x: Tensor,
    outputs: Tensor,
    y: Tensor,
    loss: Loss,
    weights: Tensor | None = None,
) -> PathFit:
    """Find the path with the least loss of rows left out.

    Args:
        x: The inputs (rows, in).
        outputs: The outputs of the network (rows, out).
        y: The targets, (rows, out), or classes (rows,).
        loss: As for `fit_path`.
        weights: The weights of the rows (rows,).

    Raises:
        ValueError: `fit_path` names the reasons that are in the loss and the targets.
    """
    row_losses, w = recognize_loss(loss, outputs, y)
    if weights is not None:
        w = w * weights.detach().cpu().double()
    w = w * w.sum() / w.square().sum()  # their sum is the effective number of rows
    x = x.detach().cpu().double()
    outputs = outputs.detach().cpu().double()

    grid = [step / 20 for step in range(1, 21)]
    best_scale = min(grid, key=lambda scale: w @ row_losses.values(scale * outputs))
    mean = w @ x / w.sum()
    features = _make_features(x - mean, w, row_losses.has_constant)
    least = math.inf
    best = None
    # not 0, from which no adapter could start
    for scale in sorted({grid[0], 0.5, 1.0, best_scale}):
        for strength, coefficients, constant, left_out in row_losses.solve(features, scale * outputs, w):
            losses = row_losses.values(left_out)
            value = (w @ losses).item()
            if value < least:
                least = value
                best = scale, strength, coefficients, constant, losses
    if best is None:
        raise ValueError("`loss` is not finite for any path: look at the targets and the outputs of the network.")

    scale, strength, coefficients, constant, losses = best
    solution = features.to_inputs @ coefficients
    weight = solution[: x.shape[1]].T
    bias = solution[x.shape[1] :].sum(0) + constant - weight @ mean
    return PathFit(scale, weight, bias, strength, losses)


def _make_features(centered: Tensor, w: Tensor, has_constant: bool) -> _Features:
    """Return the features of centered inputs (rows, in), whose mean squared norm is about 1, or 2 with a constant."""
    count, inputs = centered.shape
    deviation = (w @ centered.square() / w.sum()).sqrt()
    least = _LEAST_DEVIATION * min(1.0, centered.abs().max().item())
    units = deviation.clamp(min=least) * inputs**0.5
    matrix = centered / units
    to_inputs = torch.diag(1 / units)
    if has_constant:
        matrix = torch.cat([matrix, matrix.new_ones(count, 1)], 1)
        to_inputs = torch.block_diag(to_inputs, to_inputs.new_ones(1, 1))

    # on the smaller side
    weighted = w.sqrt().unsqueeze(1) * matrix
    if count < weighted.shape[1]:
        squares, vectors = torch.linalg.eigh(weighted @ weighted.T)
        vectors = weighted.T @ (vectors / squares.clamp(min=1e-300).sqrt())
    else:
        squares, vectors = torch.linalg.eigh(weighted.T @ weighted)
    kept = squares > 1e-12 * squares[-1]
    squares = squares[kept]
    vectors = vectors[:, kept]
    mean_square = squares.sum() / w.sum()
    return _Features(matrix @ vectors, squares, to_inputs @ vectors, mean_square.item())


def recognize_loss(loss: Loss, outputs: Tensor, y: Tensor) -> tuple[_SmoothLoss, Tensor]:
    """Return squares, cross entropy or another convex loss, and its weights of the rows (rows,), from its derivatives.

    Raises:
        ValueError: The loss is no mean or sum over rows, not convex, or without curvature, or the targets do not fit.
    """
    are_classes = y.shape != outputs.shape
    count, width = outputs.shape
    if are_classes:
        _check_classes(y, outputs)
    evaluate = _in_double(loss, outputs, y)
    f = outputs.detach().cpu().double()
    row_losses = _SmoothLoss(evaluate, y)
    w = weigh_rows(evaluate, y, f[:1]).cpu() if are_classes else f.new_ones(count)
    values = w @ row_losses.values(f)
    total = evaluate(f, y)
    is_mean = torch.isclose(total, values / w.sum(), rtol=1e-3)
    is_sum = torch.isclose(total, values, rtol=1e-3)
    if not (is_mean or is_sum):
        raise ValueError(
            f"`loss` is {total.item():.4g} for all rows, but must be finite, and the mean or the sum of the losses of "
            f"single rows, {values.item() / count:.4g} or {values.item():.4g}."
        )

    shift = torch.linspace(-1, 1, width).to(f)
    points = [f, torch.zeros_like(f), f.roll(1, 0) + shift]
    gradients = [row_losses.differentiate(point)[1] for point in points]
    shares = [point.softmax(1) - gradient for point, gradient in zip(points, gradients, strict=True)]
    if width > 1 and all(torch.allclose(share, shares[0], rtol=0, atol=1e-4) for share in shares):
        return _CrossEntropy(shares[0]), w
    if are_classes:
        raise ValueError(
            f"`y` has the shape {tuple(y.shape)}, and the network returns {tuple(outputs.shape)}. They must be equal, "
            "unless `y` has classes and `loss` is cross entropy."
        )
    hessians = torch.cat([row_losses.hessians(point) for point in points])
    curvature = hessians.diagonal(dim1=1, dim2=2).mean().item()
    tolerance = 1e-4 * hessians.abs().max().item()
    if not torch.linalg.eigvalsh(hessians).min() >= -tolerance:  # also if one is NaN
        raise ValueError(
            "`loss` is not convex in the outputs, or not finite, so that no closed form exists. Pass mse_loss, "
            "cross_entropy, or another convex loss of outputs without a sigmoid or softmax."
        )
    if not curvature > 0:
        raise ValueError("`loss` has no second derivatives. Pass a smooth loss, such as huber_loss for l1_loss.")
    if torch.allclose(hessians, curvature * torch.eye(width).to(f), rtol=0, atol=tolerance):
        return _Squares(f - gradients[0] / curvature, curvature), w
    row_losses.curvature = curvature
    return row_losses, w


def _check_classes(y: Tensor, outputs: Tensor) -> None:
    """Raise a ValueError unless targets are classes (rows,) from 0 to out - 1, each with a row."""
    count, width = outputs.shape
    if y.shape != (count,) or y.is_floating_point():
        raise ValueError(
            f"`y` is {tuple(y.shape)} of {y.dtype}, but must have the shape of the outputs, {tuple(outputs.shape)}, "
            f"or be integer classes {(count,)}."
        )
    classes = set(y.tolist())
    others = sorted(classes - set(range(width)))
    if others:
        raise ValueError(
            f"`y` has the classes {others[:3]}, but a network of {width} outputs knows 0 to {width - 1}. Remove these "
            "rows, or take a network of more outputs."
        )
    missing = sorted(set(range(width)) - classes)
    if missing:
        raise ValueError(
            f"The classes {missing[:3]} have no row in `y`. Add rows of each class from 0 to {width - 1}, or take a "
            "network of fewer outputs."
        )


def _in_double(loss: Loss, outputs: Tensor, y: Tensor) -> Loss:
    """Return a loss of outputs in float64 on the CPU; one with weights in float32 is computed in float32.

    Raises:
        ValueError: The loss does not take the outputs and targets, or returns no scalar.
    """
    problem = "it returns no scalar"
    for dtype in (torch.float64, torch.float32):

        def evaluate(f: Tensor, target: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            target = target.to(dtype) if target.is_floating_point() else target
            return loss(f.to(outputs.device, dtype), target).cpu().double()

        try:
            if evaluate(outputs.detach(), y).dim() == 0:
                return evaluate
        except Exception as error:  # any, from the code of users
            problem = f"it raised {type(error).__name__}: {error}"
    raise ValueError(
        f"`loss` must map outputs {tuple(outputs.shape)} and targets {tuple(y.shape)} to a scalar, but {problem:.300}."
        " Outputs are any real numbers: logits, without a sigmoid."
    )
