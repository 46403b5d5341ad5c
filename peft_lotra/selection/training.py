# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Training of a network for all folds and learning rates at once, and its losses on the rows that folds hold out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..modules.calls import freeze_norms, set_mode


RATES = (3e-3, 1e-2, 3e-2)
BATCH = 128  # rows of a training step
CHUNK = 1024  # rows that are evaluated at once

Tensors = dict[str, Tensor]  # by name


class Start(NamedTuple):
    """A network, and the values from which tensors are trained, for each fold.

    Buffers among the tensors are not trained.
    """

    network: nn.Module
    values: list[Tensors]


class Fit(NamedTuple):
    """The best rate, the values (folds, ...) trained at it, and the loss (rows,) of each held-out row."""

    rate: float
    values: Tensors
    losses: Tensor


def mapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Map `function(values, *rows)` over values (folds, rates, ...) and rows (folds, ...), all entries at once.

    What `vmap` cannot run is evaluated entry by entry.
    """

    def in_turn(values: Tensors, *rows: Tensor) -> Tensor:
        results = []
        for entry, arguments in enumerate(zip(*rows, strict=True)):
            values_of_entry = {name: value[entry] for name, value in values.items()}
            results.append(function(values_of_entry, *arguments))
        return torch.stack(results)

    run = vmap(function, randomness="different")

    def run_all(values: Tensors, *rows: Tensor) -> Tensor:
        nonlocal run
        sizes = next(iter(values.values())).shape[:2]
        values = {name: value.flatten(0, 1) for name, value in values.items()}
        # not by a second `vmap` over the rates: `mse_loss` fails in it
        repeated = [of_fold.repeat_interleave(sizes[1], 0) for of_fold in rows]
        try:
            results = run(values, *repeated)
        except Exception:  # an error of the function itself is raised again
            run = in_turn
            results = run(values, *repeated)
        return results.unflatten(0, sizes)

    return run_all


def weigh_rows(
    loss: Callable[[Any, Tensor], Tensor],
    y: Tensor,
    output: Tensor,
) -> Tensor:
    """Return the weights (rows,) of classes in the mean that a loss computes, all 1 if it has none.

    The weight of a row is by what factor its gradient is smaller than that of the loss of this row.

    Args:
        loss: The loss.
        y: The class of each row.
        output: An output of the network (1, classes).
    """
    classes, index = y.unique(return_inverse=True)
    outputs = torch.zeros_like(output).repeat(len(classes), 1).requires_grad_()
    mean = loss(outputs, classes)
    pairs = zip(outputs.split(1), classes.split(1), strict=True)
    losses = torch.stack([loss(*pair) for pair in pairs])
    (gradient,) = torch.autograd.grad(mean, outputs)
    (single_gradients,) = torch.autograd.grad(losses.sum(), outputs)
    weights = gradient.norm(dim=1) / single_gradients.norm(dim=1)
    is_mean = torch.isclose(weights @ losses, mean, rtol=1e-3)
    # not by rounding
    is_weighted = weights.max() > 1.001 * weights.min()
    if not (is_mean and is_weighted):
        weights = torch.ones_like(weights)
    return weights[index].detach()


def standard_error(losses: Tensor, least: Tensor) -> float:
    """Return the standard error of the mean difference between the losses (rows,) of two models."""
    deviation = (losses - least).std().item()
    return deviation / len(least) ** 0.5


def are_within_error(losses: Tensor, least: Tensor) -> bool:
    """Return whether the mean of losses (rows,) is within one standard error of the mean of the least ones."""
    change = (losses - least).mean().item()
    return change <= standard_error(losses, least)


class Task(NamedTuple):
    """The rows of a new task, and how to train on them.

    `fold` (repeats, rows) is the fold that holds out each row in each assignment; -1 for a row that is never held out.
    `weights` (rows,) are the weights of the rows in the loss; None if all are equal.
    """

    x: Tensor
    y: Tensor
    loss: Callable[[Any, Tensor], Tensor]
    fold: Tensor
    are_classes: bool
    steps: int
    bar: Any
    weights: Tensor | None = None

    @property
    def rows(self) -> list[Tensor]:
        """The rows on which each fold trains."""
        rows = []
        for fold in range(int(self.fold.max()) + 1):
            is_trained = (self.fold != fold).all(0)
            rows.append(is_trained.nonzero().flatten())
        return rows

    def train(
        self,
        start: Start,
        rates: Sequence[float],
        rows: Sequence[Tensor],
    ) -> Tensors:
        """Train by Adam on batches of the rows of each fold, at rates that fall to zero along a cosine.

        Returns:
            The trained values (folds, rates, ...).
        """
        network = start.network
        set_mode(network, True)
        freeze_norms(network)
        buffers = dict(network.named_buffers())
        origins = {}
        moves = {}
        for name, value in start.values[0].items():
            origin = torch.stack([values[name] for values in start.values]).unsqueeze(1)
            origins[name] = origin
            move = value.new_zeros(len(rows), len(rates), *value.shape)
            moves[name] = move.requires_grad_(name not in buffers)

        def moved() -> Tensors:
            values = {}
            for name, origin in origins.items():
                singles = [1] * (origin.dim() - 2)
                values[name] = origin + origin.new_tensor(rates).view(-1, *singles) * moves[name]
            return values

        def compute_loss(values: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(functional_call(network, values, (x,)), y)

        losses_of = mapped(compute_loss)
        # the steps of Adam do not depend on the scale of a gradient: at rate 1, each value moves at its own rate
        trained = [move for move in moves.values() if move.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1.0, eps=1e-10, fused=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        size = min(BATCH, *map(len, rows))
        for _ in range(self.steps):
            batches = []
            for rows_of_fold in rows:
                order = torch.randperm(len(rows_of_fold))
                batches.append(rows_of_fold[order[:size]])
            batch = torch.stack(batches)
            optimizer.zero_grad()
            losses = losses_of(moved(), self.x[batch], self.y[batch])
            losses.sum().backward()
            optimizer.step()
            scheduler.step()
            self.bar.update()
        with torch.no_grad():
            return moved()

    def compare(self, start: Start, usual: float | None = None) -> Fit:
        """Train at all rates in all folds, and return the fit with the least mean loss of held-out rows.

        The fit at the rate `usual` is returned if its loss is within one standard error of the least.
        """
        values = self.train(start, RATES, self.rows)
        losses = self.held_out_losses(start.network, values)
        best = min(range(len(RATES)), key=lambda index: losses[index].mean())
        if usual is not None:
            index = RATES.index(usual)
            if are_within_error(losses[index], losses[best]):
                best = index
        best_values = {name: value[:, best] for name, value in values.items()}
        return Fit(RATES[best], best_values, losses[best])

    @torch.no_grad()
    def held_out_losses(self, network: nn.Module, values: Tensors) -> list[Tensor]:
        """Compute the loss of each held-out row by the values (folds, rates, ...) of its folds, for each rate.

        The loss of a row is the mean over the assignments, times the weight of the row as a share of the mean weight.
        The outputs for classes are divided by the best temperature of all rows.
        """
        set_mode(network, False)
        outputs_of = mapped(lambda values, x: functional_call(network, values, (x,)))
        rows = (self.fold[0] >= 0).nonzero().flatten()
        repeats = len(self.fold)
        chunks = []
        for chunk in rows.split(CHUNK):
            x = self.x[chunk]
            outputs = outputs_of(values, x.expand(len(self.rows), *x.shape))
            numbers = torch.arange(len(chunk))
            chunks.append(outputs[self.fold[:, chunk], :, numbers])
        outputs_of_rates = torch.cat(chunks, 1).flatten(0, 1).unbind(1)

        y = torch.cat([self.y[rows]] * repeats)
        losses = []
        for outputs in outputs_of_rates:
            if self.are_classes and outputs.dim() == 2:
                outputs = outputs * self._find_scale(outputs, y)
            pairs = zip(outputs.split(1), y.split(1), strict=True)
            by_row = [self.loss(output, target) for output, target in pairs]
            by_row = torch.stack(by_row).nan_to_num(math.inf, math.inf)
            losses.append(by_row.view(repeats, -1).mean(0))
        if self.weights is not None:
            shares = self.weights[rows] / self.weights[rows].mean()
            losses = [shares * of_rate for of_rate in losses]
        return losses

    def _find_scale(self, outputs: Tensor, y: Tensor) -> float:
        """Return the factor, an inverse temperature, of the outputs with the least loss."""

        def compute_loss(log: float) -> float:
            return self.loss(outputs * math.exp(log), y).item()

        result: Any = minimize_scalar(compute_loss, bounds=(-3, 3))
        return math.exp(result.x)
