# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What can be trained for a new task, given a network that has learned the old one: our adapters and their rivals.

A method is a function (base, x, y, loss) -> model. It may change `base`. With learning rates to choose from, it takes
`lr` too, and with rows in time, `blocked`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Adam

from peft_lotra import (
    LinearPath,
    LoTRAConfig,
    create_lotra_optimizer,
    fit_adapter,
    fit_path,
    start_from_data,
    start_from_gradient,
)


STEPS = 300
STEPS_ON_PATH = 100
Loss = Callable[[Tensor, Tensor], Tensor]
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FEWER_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


class Method(NamedTuple):
    """A function, the learning rates among which validation data choose, and the network that it adapts."""

    adapt: Callable[..., nn.Module]
    rates: tuple[float, ...] = ()
    network: str = "kan"


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_mlp(widths: list[int], parameters: int) -> nn.Sequential:
    """Return an MLP with as many hidden layers as the KAN of these widths, and about as many parameters."""

    def make(hidden: int) -> nn.Sequential:
        sides = [widths[0], *[hidden] * (len(widths) - 2), widths[-1]]
        layers = [layer for pair in pairwise(sides) for layer in (nn.Linear(*pair), nn.SiLU())]
        return nn.Sequential(*layers[:-1])

    with torch.device("meta"):
        hidden = min(
            range(1, 1000),
            key=lambda hidden: abs(count(make(hidden)) - parameters),
        )
    return make(hidden)


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    optimizer: Any,
    steps: int = STEPS,
) -> nn.Module:
    """Train on batches of 128 rows, drawn with replacement, at rates that fall to zero along a cosine."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        scheduler.step()
    return model


def train_all(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    lr: float,
    steps: int = STEPS,
) -> nn.Module:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return train(model, x, y, loss, Adam(parameters, lr=lr, fused=True), steps)


# --- on a linear path ---


def path(base: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> nn.Module:
    model = LinearPath(base, x.shape[1])
    fit_path(model, x, y, loss)
    return model


def adapter_on_path(r: Any, base: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> nn.Module:
    """Train an adapter of these ranks on a path, at the default rate."""
    model = get_peft_model(LinearPath(base, x.shape[1]), LoTRAConfig(r=r))
    start_from_data(model, x, y, loss)
    return train(model, x, y, loss, create_lotra_optimizer(model, Adam), STEPS_ON_PATH)


def full_on_path(base: nn.Module, x: Tensor, y: Tensor, loss: Loss, lr: float = 1e-3) -> nn.Module:
    return train_all(path(base, x, y, loss), x, y, loss, lr, STEPS_ON_PATH)


class Mean(nn.Module):
    """The mean of the outputs of two networks."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.second(x)) / 2


def full_and_path(base: nn.Module, x: Tensor, y: Tensor, loss: Loss, lr: float) -> nn.Module:
    """Full fine-tuning, and its mean with the path of the base: the strongest control."""
    linear = path(copy.deepcopy(base), x, y, loss)
    return Mean(train_all(base, x, y, loss, lr), linear)


class Zero(nn.Module):
    """A network whose outputs are zero."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.outputs)


def linear(base: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> nn.Module:
    """A linear model, by the solver of the path."""
    with torch.no_grad():
        outputs = base(x[:1]).shape[1]
    return path(Zero(outputs), x, y, loss)


# --- without a path ---


def one_shape(base: nn.Module, x: Tensor, y: Tensor, loss: Loss, lr: float = 3e-2) -> nn.Module:
    model = get_peft_model(base, LoTRAConfig())
    start_from_gradient(model, lambda: loss(model(x), y))
    return train(model, x, y, loss, create_lotra_optimizer(model, Adam, lr=lr))


def last_layer(base: nn.Module, x: Tensor, y: Tensor, loss: Loss, lr: float) -> nn.Module:
    base.requires_grad_(False)
    base.layers[-1].requires_grad_(True)
    return train_all(base, x, y, loss, lr)


def lora_of_slices(base: nn.Module, x: Tensor, y: Tensor, loss: Loss, lr: float) -> nn.Module:
    """LoRA on the coefficients, one matrix (in, basis) of rank 1 for each output."""
    names = [name for name, _ in base.named_parameters() if name.endswith("spline_weight")]
    config = LoraConfig(r=1, lora_alpha=1, target_modules=[], target_parameters=names)
    return train_all(get_peft_model(base, config), x, y, loss, lr)


def mlp_from_scratch(base: nn.Sequential, x: Tensor, y: Tensor, loss: Loss, lr: float) -> nn.Module:
    for layer in base:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return train_all(base, x, y, loss, lr)


def advised(base: nn.Module, x: Tensor, y: Tensor, loss: Loss, blocked: bool = False) -> nn.Module:
    return fit_adapter(base, (x, y), loss, blocked=blocked, progress=False).model


def unchanged(base: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> nn.Module:
    return base


ONE_SHAPE = ("full", "full", 1)
METHODS: dict[str, Method] = {
    "base": Method(unchanged),
    "full": Method(train_all, RATES),
    "path": Method(path),
    "path + one shape": Method(partial(adapter_on_path, ONE_SHAPE)),
    "path + (8, 8, 4)": Method(partial(adapter_on_path, (8, 8, 4))),
    "fit_adapter": Method(advised),
    "full on the path": Method(full_on_path),
    "mean of full and path": Method(full_and_path, FEWER_RATES[:3]),
    "one shape": Method(one_shape),
    "LoRA of slices": Method(lora_of_slices, FEWER_RATES),
    "last layer": Method(last_layer, FEWER_RATES),
    "linear model": Method(linear),
    "MLP, full": Method(train_all, RATES[:4], "mlp"),
    "MLP, full on the path": Method(full_on_path, (), "mlp"),
    "MLP from scratch": Method(mlp_from_scratch, FEWER_RATES[:3], "mlp"),
}
