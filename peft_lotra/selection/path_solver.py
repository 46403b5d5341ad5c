# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The closed form of a linear path, for squares and other smooth convex losses, for all folds at once.

The outputs are f = scale * network + features B, with a ridge penalty on B. A row that is left out changes its own
output by its leverage: exactly for squares, by one Newton step for other losses. Everything is in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .training import Loss, losses_of_rows, weigh_rows


# strength, coefficients B (folds, k, scales, out), constant (folds, 1, scales, out), and outputs of rows left out
# (folds, rows, scales, out)
Solution = tuple[float, Tensor, Tensor, Tensor]

_GRID = torch.linspace(0.05, 1, 20, dtype=torch.float64)  # of scales; not 0, from which no adapter could start
# of the penalty, as shares of the features' mean squared norm
_STRENGTHS = (100.0, 10.0, 3.0, 1.0, 0.3, 0.1, 3e-2, 1e-2, 1e-3)
_STRENGTHS_OF_CLASSES = (1.0, 0.3, 0.1, 3e-2, 1e-2, 1e-3)
# Inputs of a KAN are on its grid, about (-1, 1). One that hardly varies in a few rows may be far outside in others.
_LEAST_DEVIATION = 0.05
_ITERATIONS, _HISTORY, _HALVINGS = 300, 10, 30  # of L-BFGS


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
    """Standardized inputs, in coordinates in which the weighted Gram matrix of a fold is diagonal.

    Attributes:
        rows: The coordinates (folds, rows, k).
        weights: The weight of each row (folds, rows).
        squares: The diagonals of the Gram matrices (folds, k).
        to_inputs: The maps from coefficients (k, out) to W^T and, with a constant, to b, (folds, in + 1, k).
        mean: The inputs (folds, 1, in) whose coordinates are 0.
    """

    rows: Tensor
    weights: Tensor
    squares: Tensor
    to_inputs: Tensor
    mean: Tensor

    @property
    def mean_square(self) -> Tensor:
        """The mean squared norm of a row (folds, 1)."""
        return self.squares.sum(1, keepdim=True) / self.weights.sum(1, keepdim=True)

    def product(self, coefficients: Tensor) -> Tensor:
        """Return rows @ coefficients, (folds, rows, scales, out), for coefficients (folds, k, scales, out)."""
        return (self.rows @ coefficients.flatten(2)).unflatten(2, coefficients.shape[2:])

    def transposed_product(self, values: Tensor) -> Tensor:
        """Return the sums of weight * row * value, (folds, k, scales, out)."""
        weighted = self.weights.unsqueeze(2) * values.flatten(2)
        return (self.rows.mT @ weighted).unflatten(2, values.shape[2:])


class _SmoothLoss:
    """The loss of each row as a function of outputs (folds, rows, scales, out), by automatic differentiation."""

    strengths = _STRENGTHS
    has_constant = True
    curvature = 1.0  # the mean of the second derivatives

    def __init__(self, loss: Loss, y: Tensor) -> None:
        self._loss = loss
        self._y = y

    def values(self, f: Tensor) -> Tensor:
        """Return the loss of each row (folds, rows, scales)."""
        shape = f.shape[:3]
        rows = torch.arange(shape[1]).view(-1, 1).expand(shape).flatten()
        return losses_of_rows(self._loss, f.flatten(0, 2), self._y[rows.to(self._y.device)]).view(shape)

    def differentiate(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each row, and its gradient in the outputs."""
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            values = self.values(f)
            (gradients,) = torch.autograd.grad(values.sum(), f, materialize_grads=True)
        return values.detach(), gradients

    def hessians(self, f: Tensor) -> Tensor:
        """Return the second derivatives (folds, rows, scales, out, out)."""
        columns = []
        with torch.enable_grad():
            f = f.detach().requires_grad_()
            (gradients,) = torch.autograd.grad(self.values(f).sum(), f, create_graph=True, materialize_grads=True)
            for column in gradients.sum((0, 1, 2)) + 0 * f.sum():  # some losses have constant gradients
                columns += torch.autograd.grad(column, f, retain_graph=True)
        return torch.stack(columns, -1)

    def curvatures(self, f: Tensor) -> Tensor:
        """Return the second derivative in each output, for the step of a row left out."""
        return self.hessians(f).diagonal(dim1=3, dim2=4)

    def solve(self, features: _Features, offset: Tensor) -> Iterator[Solution]:
        """Minimize sum w loss(offset + rows B) + penalty / 2 |B|^2 by L-BFGS for each strength, each from the last."""
        rows, weights, squares, *_ = features
        coefficients = rows.new_zeros(*squares.shape, *offset.shape[2:])
        for strength in self.strengths:
            penalty = strength * features.mean_square * self.curvature
            # in these units the second derivatives are about 1
            units = torch.rsqrt(0.5 * self.curvature * squares + penalty)[..., None, None]
            penalties = penalty[..., None, None] * units.square()

            def evaluate(
                scaled: Tensor, units: Tensor = units, penalties: Tensor = penalties
            ) -> tuple[Tensor, Tensor]:
                values, gradients = self.differentiate(offset + features.product(units * scaled))
                pull = penalties * scaled
                value = torch.einsum("fn,fns->fs", weights, values)[:, None, :, None] + 0.5 * _dot(pull, scaled)
                return value, units * features.transposed_product(gradients) + pull

            coefficients = units * _minimize(evaluate, coefficients / units)
            f = offset + features.product(coefficients)
            _, gradients = self.differentiate(f)
            curvatures = weights[..., None, None] * self.curvatures(f)
            left_out = f.clone()
            for scale in range(f.shape[2]):
                for column in range(f.shape[3]):
                    curvature = curvatures[:, :, scale, column]
                    matrices = rows.mT @ (curvature.unsqueeze(2) * rows)
                    matrices.diagonal(dim1=1, dim2=2).add_(penalty)
                    factors, _ = torch.linalg.cholesky_ex(matrices)
                    leverage = (rows @ torch.cholesky_inverse(factors) * rows).sum(2)
                    remaining = (1 - curvature * leverage).clamp(min=1e-3)
                    left_out[:, :, scale, column] += weights * leverage * gradients[:, :, scale, column] / remaining
            yield strength, coefficients, torch.zeros_like(coefficients[:, :1]), left_out


class _CrossEntropy(_SmoothLoss):
    """Cross entropy, with shares of the classes (rows, out) as targets."""

    strengths = _STRENGTHS_OF_CLASSES

    def __init__(self, shares: Tensor) -> None:
        self._shares = shares.unsqueeze(1)

    def values(self, f: Tensor) -> Tensor:
        return self.differentiate(f)[0]

    def differentiate(self, f: Tensor) -> tuple[Tensor, Tensor]:
        logarithms = f.log_softmax(3)
        return -(self._shares * logarithms).sum(3), logarithms.exp() - self._shares

    def curvatures(self, f: Tensor) -> Tensor:
        p = f.softmax(3)
        classes = f.shape[3]
        # the factor makes up for the second derivatives in two classes
        return p * (1 - p) * classes / (classes - 1)


class _Squares(_SmoothLoss):
    """Squared distances from targets (rows, out), times half the curvature."""

    has_constant = False  # it has no penalty, so that a shift of the targets shifts the path

    def __init__(self, targets: Tensor, curvature: float) -> None:
        self._targets = targets.unsqueeze(1)
        self.curvature = curvature

    def values(self, f: Tensor) -> Tensor:
        return 0.5 * self.curvature * (f - self._targets).square().sum(3)

    def solve(self, features: _Features, offset: Tensor) -> Iterator[Solution]:
        """Solve the normal equations for each strength."""
        rows, weights, squares, *_ = features
        residual = self._targets - offset
        total = weights.sum(1)[:, None, None, None]
        constant = torch.einsum("fn,fnso->fso", weights, residual).unsqueeze(1) / total
        right_side = features.transposed_product(residual - constant)
        for strength in self.strengths:
            inverse = 1 / (squares + strength * (1 + features.mean_square))
            coefficients = inverse[..., None, None] * right_side
            leverage = weights * ((rows.square() @ inverse.unsqueeze(2)).squeeze(2) + 1 / weights.sum(1, keepdim=True))
            error = (residual - constant - features.product(coefficients)) / (1 - leverage)[..., None, None]
            yield strength, coefficients, constant, self._targets - error


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of coefficients (folds, k, scales, out), by fold and scale, (folds, 1, scales, 1)."""
    return (a * b).sum((1, 3), keepdim=True)


def _minimize(evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], point: Tensor) -> Tensor:
    """Minimize a convex function for each fold and scale by L-BFGS.

    Args:
        evaluate: From coefficients (folds, k, scales, out) to values (folds, 1, scales, 1) and gradients.
        point: The coefficients to start from.
    """
    value, gradient = evaluate(point)
    history: list[tuple[Tensor, Tensor, Tensor]] = []  # steps, changes of the gradient, 1 / their products
    for _ in range(_ITERATIONS):
        direction = -gradient
        factors = []
        for step, change, inverse in reversed(history):
            factors.append(inverse * _dot(step, direction))
            direction = direction - factors[-1] * change
        if history:
            step, change, inverse = history[-1]
            direction = direction * torch.where(inverse > 0, _dot(step, change) / _dot(change, change), 1.0)
        for (step, change, inverse), factor in zip(history, reversed(factors), strict=True):
            direction = direction + (factor - inverse * _dot(change, direction)) * step

        slope = _dot(direction, gradient)
        length = torch.ones_like(value)
        for _ in range(_HALVINGS):
            candidate = point + length * direction
            new_value, new_gradient = evaluate(candidate)
            is_lower = new_value <= value + 1e-4 * length * slope + 1e-12 * value.abs()
            if is_lower.all():
                break
            length = torch.where(is_lower, length, length / 2)
        step = torch.where(is_lower, candidate - point, 0.0)
        change = torch.where(is_lower, new_gradient - gradient, 0.0)
        product = _dot(step, change)
        inverse = torch.where(product > 0, 1 / product, 0.0)
        history = [*history[1 - _HISTORY :], (step, change, inverse)]
        gain = torch.where(is_lower, value - new_value, 0.0)
        point = point + step
        gradient = gradient + change
        value = value - gain
        if gradient.abs().max() < 1e-3 or (gain <= 1e-8 * value.abs().clamp(min=1)).all():
            break
    return point


def fit_scale(loss: Loss, outputs: Tensor, y: Tensor) -> float:
    """Return the factor of the outputs (rows, out), from 0.05 to 1, with the least loss."""
    with torch.no_grad():
        return min(reversed(_GRID.tolist()), key=lambda scale: loss(scale * outputs, y).item())


def solve_paths(
    x: Tensor,
    outputs: Tensor,
    y: Tensor,
    loss: Loss,
    weights: Tensor,
) -> list[PathFit]:
    """Find the path with the least loss of rows left out, for each fold.

    Args:
        x: The inputs (rows, in).
        outputs: The outputs of the network (rows, out).
        y: The targets, (rows, out), or classes (rows,).
        loss: As for `fit_path`.
        weights: The weights of the rows in each fold (folds, rows).

    Raises:
        ValueError: `fit_path` names the reasons that are in the loss and the targets.
    """
    row_losses, of_loss = recognize_loss(loss, outputs, y)
    w = of_loss * weights.detach().cpu().double()
    w = w * (w.sum(1) / w.square().sum(1)).unsqueeze(1)  # their sum is the effective number of rows
    x = x.detach().cpu().double()
    outputs = outputs.detach().cpu().double()[None, :, None]

    losses = row_losses.values(outputs * _GRID.view(-1, 1))
    best_scales = _GRID[(w @ losses[0]).argmin(1)]
    fixed_scales = torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64).expand(len(w), 3)
    scales = torch.cat([fixed_scales, best_scales.unsqueeze(1)], 1)
    features = _make_features(x, w, row_losses.has_constant)
    least = [math.inf] * len(w)
    fits: dict[int, PathFit] = {}
    for strength, coefficients, constant, left_out in row_losses.solve(features, outputs * scales[:, None, :, None]):
        losses = row_losses.values(left_out)
        values = torch.einsum("fn,fns->fs", w, losses).nan_to_num(math.inf)
        for fold, (value, index) in enumerate(zip(*values.min(1), strict=True)):
            if value >= least[fold]:
                continue
            least[fold] = value.item()
            solution = features.to_inputs[fold] @ coefficients[fold, :, index]
            weight = solution[: x.shape[1]].T
            bias = solution[x.shape[1] :].sum(0) + constant[fold, 0, index] - weight @ features.mean[fold, 0]
            scale = scales[fold, index].item()
            fits[fold] = PathFit(scale, weight, bias, strength, losses[fold, :, index])
    if len(fits) < len(w):
        raise ValueError("`loss` is not finite for any path: look at the targets and the outputs of the network.")
    return [fits[fold] for fold in range(len(w))]


def _make_features(x: Tensor, w: Tensor, has_constant: bool) -> _Features:
    """Return the features of inputs (rows, in), whose mean squared norm is about 1, or 2 with a constant."""
    count, inputs = x.shape
    total = w.sum(0)
    mean = total @ x / total.sum()
    centered = x - mean
    deviation = (total @ centered.square() / total.sum()).sqrt()
    least = _LEAST_DEVIATION * min(1.0, centered.abs().max().item())
    units = deviation.clamp(min=least) * inputs**0.5
    left, lengths, right = torch.linalg.svd(centered / units, full_matrices=False)
    is_kept = lengths > 1e-6 * lengths[0]
    rows = (left[:, is_kept] * lengths[is_kept]).expand(len(w), -1, -1)
    to_inputs = (right[is_kept] / units).mT
    means = mean.expand(len(w), 1, inputs)
    if has_constant:
        rows = torch.cat([rows, rows.new_ones(len(w), count, 1)], 2)
        to_inputs = torch.block_diag(to_inputs, to_inputs.new_ones(1, 1))
    else:
        center = (w / w.sum(1, keepdim=True)).unsqueeze(1) @ rows
        rows = rows - center
        means = (w @ x / w.sum(1, keepdim=True)).unsqueeze(1)

    squares, vectors = torch.linalg.eigh(rows.mT @ (w.unsqueeze(2) * rows))
    return _Features(rows @ vectors, w, squares.clamp(min=0), to_inputs @ vectors, means)


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
    w = weigh_rows(evaluate, y, f[:1]).cpu() if are_classes else f.new_ones(count)
    total = evaluate(f, y)
    f = f[None, :, None]
    row_losses = _SmoothLoss(evaluate, y)
    values = w @ row_losses.values(f).flatten()
    is_mean = torch.isclose(total, values / w.sum(), rtol=1e-3)
    is_sum = torch.isclose(total, values, rtol=1e-3)
    if not (is_mean or is_sum):
        raise ValueError(
            f"`loss` is {total.item():.4g} for all rows, but must be finite, and the mean or the sum of the losses of "
            f"single rows, {values.item() / count:.4g} or {values.item():.4g}."
        )

    shift = torch.linspace(-1, 1, width).to(f)
    points = [f, torch.zeros_like(f), f.roll(1, 1) + shift]
    gradients = [row_losses.differentiate(point)[1] for point in points]
    shares = [point.softmax(3) - gradient for point, gradient in zip(points, gradients, strict=True)]
    if width > 1 and all(torch.allclose(share, shares[0], rtol=0, atol=1e-4) for share in shares):
        return _CrossEntropy(shares[0].view(count, width)), w
    if are_classes:
        raise ValueError(
            f"`y` has the shape {tuple(y.shape)}, and the network returns {tuple(outputs.shape)}. They must be equal, "
            "unless `y` has classes and `loss` is cross entropy."
        )
    hessians = torch.cat([row_losses.hessians(point) for point in points])
    curvature = hessians.diagonal(dim1=3, dim2=4).mean().item()
    tolerance = 1e-4 * hessians.abs().max().item()
    if not torch.linalg.eigvalsh(hessians).min() >= -tolerance:  # also if one is NaN
        raise ValueError(
            "`loss` is not convex in the outputs, or not finite, so that no closed form exists. Pass mse_loss, "
            "cross_entropy, or another convex loss of outputs without a sigmoid or softmax."
        )
    if not curvature > 0:
        raise ValueError("`loss` has no second derivatives. Pass a smooth loss, such as huber_loss for l1_loss.")
    if torch.allclose(hessians, curvature * torch.eye(width).to(f), rtol=0, atol=tolerance):
        return _Squares((f - gradients[0] / curvature).view(count, width), curvature), w
    row_losses.curvature = curvature
    return row_losses, w


def _check_classes(y: Tensor, outputs: Tensor) -> None:
    """Raise a ValueError unless targets are classes (rows,) from 0 to out - 1; warn of those without a row."""
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
        warnings.warn(
            f"The classes {missing[:3]} have no row in `y`, so that the path will hardly ever predict them. Add rows "
            f"of each class from 0 to {width - 1}.",
            stacklevel=4,
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
