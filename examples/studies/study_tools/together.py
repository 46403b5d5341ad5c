# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks of one architecture trained at once, each as it would be trained alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import Optimizer


Data = tuple[Tensor, Tensor]


def draw(data: Data, steps: int, rows: int = 128) -> Tensor:
    """The rows of each step."""
    return torch.stack([torch.randint(len(data[0]), (rows,)) for _ in range(steps)])


def batches(data: Sequence[Data], rows: Sequence[Tensor]) -> Callable[[int], Data]:
    """The inputs and targets (models, rows, ...) of a step, of the data of each model and the rows that were drawn."""

    def batch(step: int) -> Data:
        found = [(x[r[step]], y[r[step]]) for (x, y), r in zip(data, rows, strict=True)]
        return tuple(torch.stack(part) for part in zip(*found, strict=True))

    return batch


def train(
    models: Sequence[nn.Module],
    optimizers: Sequence[Optimizer],
    batches: Callable[[int], tuple],
    loss: Callable[[Tensor, Any], Tensor],
    steps: int,
    decay: bool = True,
    call: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda model, x: model(x),
) -> Tensor:
    """Train the parameters that require a gradient; return the losses (steps, models).

    Args:
        models: Networks that differ in their numbers alone.
        optimizers: Of one class, together for all parameters of all networks; the rates are those of their groups.
        batches: From a step to the inputs (models, rows, features) and the targets (models, rows, ...).
        loss: Of the outputs and the targets of one network, to a number.
        steps: How many.
        decay: Whether the rates fall to zero along a cosine.
        call: What the loss takes of a network and its inputs.
    """
    own = [{name: p for name, p in model.named_parameters() if p.requires_grad} for model in models]
    parameters, buffers = stack_module_state(list(models))
    rest = {name: part.detach() for name, part in parameters.items() if name not in own[0]} | buffers
    skeleton, losses = copy.deepcopy(models[0]), []

    def loss_of(trained: dict[str, Tensor], others: dict[str, Tensor], x: Tensor, y: Any) -> Tensor:
        return loss(call(lambda rows: functional_call(skeleton, {**trained, **others}, (rows,)), x), y)

    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
    for step in range(steps):
        trained = {name: torch.stack([parts[name] for parts in own]) for name in own[0]}
        values = vmap(loss_of)(trained, rest, *batches(step))
        losses.append(values.detach())
        for optimizer in optimizers:
            optimizer.zero_grad()
        values.sum().backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            if decay:
                scheduler.step()
    return torch.stack(losses)
