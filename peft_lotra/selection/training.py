# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Training of a network for all folds at once, and the losses of the rows that folds hold out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..modules.calls import freeze_norms, set_mode


BATCH = 128  # rows of a training step
CHUNK = 1024  # rows that are evaluated at once

Loss = Callable[[Any, Tensor], Tensor]
Tensors = dict[str, Tensor]  # by name


class Start(NamedTuple):
    """A network, and for each fold the values from which tensors are trained, and those that stay.

    `speeds` are the learning rates of the trained tensors, by name, as multiples of the common one.
    """

    network: nn.Module
    values: list[Tensors]
    fixed: list[Tensors]
    speeds: list[Tensors]

    def predict(self, fold: int, x: Tensor) -> Tensor:
        """Return the outputs of the network with the values of a fold."""
        values = {**self.fixed[fold], **self.values[fold]}
        outputs = [functional_call(self.network, values, (chunk,)) for chunk in x.split(CHUNK)]
        return torch.cat(outputs)


def losses_of_rows(loss: Loss, outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each row (rows,)."""
    try:
        return vmap(lambda output, target: loss(output.unsqueeze(0), target.unsqueeze(0)))(outputs, y)
    except Exception:  # an error of the loss itself is raised again
        pairs = zip(outputs.split(1), y.split(1), strict=True)
        return torch.stack([loss(*pair) for pair in pairs])


def weigh_rows(
    loss: Loss,
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


def standard_error(losses: Tensor, others: Tensor) -> float:
    """Return the standard error of the mean difference between the losses of two models, of independent rows."""
    deviation = (losses - others).std().item()
    return deviation / len(others) ** 0.5


def is_better(losses: Tensor, others: Tensor, errors: int = 1) -> bool:
    """Return whether the mean of losses is less than that of others, by more than some standard errors."""
    gain = (others - losses).mean().item()
    return gain > (errors and errors * standard_error(losses, others))


class Task(NamedTuple):
    """The rows of a new task, and how to train on them.

    `fold` (repeats, rows) is the fold that holds out each row in each assignment; -1 for a row that is never held out.
    `weights` (rows,) are the weights of the rows in the loss; None if all are equal. `clusters` (rows,) numbers the
    clusters of rows that depend on each other; None if each row is independent of the others.
    """

    x: Tensor
    y: Tensor
    loss: Loss
    fold: Tensor
    steps: int
    bar: Any
    weights: Tensor | None = None
    clusters: Tensor | None = None

    @property
    def rows(self) -> list[Tensor]:
        """The rows on which each fold trains."""
        folds = range(int(self.fold.max()) + 1)
        return [(self.fold != fold).all(0).nonzero().flatten() for fold in folds]

    def train(
        self,
        start: Start,
        rate: float,
        rows: Sequence[Tensor],
    ) -> Start:
        """Train by Adam on batches of the rows of each fold, at a rate that falls to zero along a cosine.

        What `vmap` cannot run is trained fold by fold.
        """
        network = start.network
        set_mode(network, True)
        freeze_norms(network)
        origins = _stack(start.values)
        fixed = _stack(start.fixed)
        # the steps of Adam do not depend on the scale of a gradient: at rate 1, each value moves at its own rate
        rates = {name: rate * speed for name, speed in _stack(start.speeds).items()}
        moves = {name: torch.zeros_like(origin).requires_grad_() for name, origin in origins.items()}

        def moved() -> Tensors:
            values = {}
            for name, origin in origins.items():
                rate_of_fold = rates[name].view(-1, *[1] * (origin.dim() - 1))
                values[name] = origin + rate_of_fold * moves[name]
            return values

        def compute_loss(values: Tensors, fixed: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(functional_call(network, {**fixed, **values}, (x,)), y)

        def compute_in_turn(values: Tensors, fixed: Tensors, x: Tensor, y: Tensor) -> Tensor:
            losses = []
            for fold in range(len(rows)):
                losses.append(compute_loss(_pick(values, fold), _pick(fixed, fold), x[fold], y[fold]))
            return torch.stack(losses)

        compute_losses = vmap(compute_loss, randomness="different")
        optimizer = torch.optim.Adam(moves.values(), lr=1.0, eps=1e-10, fused=True)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        size = min(BATCH, *map(len, rows))
        for _ in range(self.steps):
            batches = []
            for rows_of_fold in rows:
                order = torch.randperm(len(rows_of_fold))
                batches.append(rows_of_fold[order[:size]])
            batch = torch.stack(batches)
            arguments = moved(), fixed, self.x[batch], self.y[batch]
            try:
                losses = compute_losses(*arguments)
            except Exception:  # an error of the network or the loss itself is raised again
                compute_losses = compute_in_turn
                losses = compute_losses(*arguments)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            scheduler.step()
            self.bar.update()
        with torch.no_grad():
            trained = moved()
        values = [_pick(trained, fold) for fold in range(len(rows))]
        return start._replace(values=values)

    @torch.no_grad()
    def held_out_losses(self, predict: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Return the loss of each held-out row (rows,), or cluster of rows, the mean over the assignments.

        It is multiplied by the weight of the row as a share of the mean weight.

        Args:
            predict: `predict(fold, index)` returns the outputs for these rows of the model that the fold has trained.
        """
        repeats, count = self.fold.shape
        folds = (int(self.fold.max()) + 1) // repeats
        losses = self.x.new_full((repeats, count), math.inf, dtype=torch.float64)
        for fold in range(repeats * folds):
            repeat = fold // folds
            held_out = (self.fold[repeat] == fold).nonzero().flatten()
            outputs = predict(fold, held_out)
            values = losses_of_rows(self.loss, outputs, self.y[held_out])
            losses[repeat, held_out] = values.double().nan_to_num(math.inf, math.inf)
        is_held_out = self.fold[0] >= 0
        mean = losses[:, is_held_out].mean(0)
        if self.weights is not None:
            weights = self.weights[is_held_out]
            mean = mean * weights / weights.mean()
        if self.clusters is None:
            return mean
        clusters = self.clusters[is_held_out]
        return torch.stack([mean[clusters == cluster].mean() for cluster in clusters.unique()])


def _stack(values: Sequence[Tensors]) -> Tensors:
    """Return the tensors of all folds as one (folds, ...) for each name."""
    return {name: torch.stack([of_fold[name] for of_fold in values]) for name in values[0]}


def _pick(tensors: Tensors, fold: int) -> Tensors:
    """Return the tensors of one fold."""
    return {name: tensor[fold] for name, tensor in tensors.items()}
