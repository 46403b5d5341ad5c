# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Many tasks on one base, trained at once: adapters of a bank, and the rivals, whose parameters are stacked.

Tensors of all tasks are (tasks, rows, ...). Each task has its own loss on its own rows, and AdamW treats each number
by itself, so that a task is trained as it would be alone.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_lotra import (
    AdapterBank,
    BankAdamW,
    LinearPath,
    LoTRAConfig,
    fit_path,
    start_from_data,
    start_from_gradient,
)
from peft_lotra.kan import KAN


Data = tuple[Tensor, Tensor]
FROM_GRADIENT = {"core": 0.1, "factor_out": 0.5}  # as `create_lotra_optimizer` after such a start


@dataclass
class Tasks:
    """Rows (tasks, rows, features) and targets (tasks, rows) to train on, to choose by, and to test."""

    train: Data
    validation: Data
    test: Data
    loss: Callable[[Tensor, Tensor], Tensor]  # of predictions (tasks, rows, outputs), to (tasks, rows)

    def __len__(self) -> int:
        return len(self.train[0])


class Banked:
    """Adapters of a bank that is attached to the base, `on_path` each on a linear path of its own."""

    def __init__(
        self,
        base: nn.Module,
        tasks: Tasks,
        config: LoTRAConfig,
        gradient: bool,
        lr: float,
        on_path: bool = False,
    ) -> None:
        if on_path:
            base = LinearPath(copy.deepcopy(base))
        self.bank, start, (x, y) = AdapterBank(base), config, tasks.train
        if gradient or on_path:
            start = get_peft_model(copy.deepcopy(base), config)
        for task in range(len(tasks)):
            if on_path:
                start_from_data(start, x[task], y[task, :, None], F.mse_loss)
            elif gradient:  # of the loss on all rows of the task
                rows, targets = x[task : task + 1], y[task : task + 1]
                start_from_gradient(start, lambda: tasks.loss(start(rows), targets).mean())  # noqa: B023
            self.bank.add(str(task), start)
        self.model, self.ids = self.bank.attach(), self.bank.ids(self.bank.names)
        rates = FROM_GRADIENT if gradient or on_path else "width"
        self.optimizer = BankAdamW(self.bank, lr=lr, weight_decay=0.0, policy=rates)

    def __call__(self, x: Tensor) -> Tensor:
        ids = self.ids.repeat_interleave(x.shape[1])
        return self.model(x.flatten(0, 1), ids=ids).unflatten(0, x.shape[:2])

    def keep_best(self, errors: Tensor) -> None:
        ids = self.ids.repeat_interleave(errors.shape[1])
        self.optimizer.keep_best(self.bank.mean_by_adapter(errors.flatten(), ids))

    def finish(self) -> int:
        """End the training; the bytes of the file for each task."""
        self.optimizer.finish()
        with TemporaryDirectory() as folder:
            self.bank.save(folder)
            return round((Path(folder) / "adapter_bank.safetensors").stat().st_size / len(self.ids))


class Stacked:
    """Parameters (tasks, ...) of all tasks, and `forward(parameters, x)`."""

    def __init__(self, forward: Callable[[list[Tensor], Tensor], Tensor], start: Sequence[Tensor], lr: float) -> None:
        self.forward, self.parameters = forward, [nn.Parameter(part.contiguous()) for part in start]
        self.best = [part.detach().clone() for part in self.parameters]
        self.least = torch.full((len(start[0]),), torch.inf)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(self.parameters, x)

    def keep_best(self, errors: Tensor) -> None:
        losses = errors.mean(1)
        is_less = losses < self.least
        self.least[is_less] = losses[is_less]
        for best, part in zip(self.best, self.parameters, strict=True):
            best[is_less] = part.detach()[is_less]

    def finish(self) -> int:
        """End the training; the bytes of the numbers of each task."""
        for best, part in zip(self.best, self.parameters, strict=True):
            part.data = best
        return sum(4 * part[0].numel() for part in self.parameters)


Method = Banked | Stacked
Maker = Callable[[nn.Module, Tasks, float], Method]  # of the base, the tasks and the learning rate


def train(
    maker: Maker, base: nn.Module, tasks: Tasks, lr: float, steps: int, rows: int
) -> tuple[Method, dict[str, float]]:
    """AdamW on `rows` rows of each task a step; each task keeps its best values on its validation data."""
    start = time.process_time()
    method = maker(base, tasks, lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(method.optimizer, steps)
    for step in range(steps + 1):
        if step % max(1, steps // 8) == 0:
            method.keep_best(losses_of(method, tasks, tasks.validation))
        if step < steps:
            batch = torch.randint(tasks.train[0].shape[1], (rows,))
            x, y = (part[:, batch] for part in tasks.train)
            method.optimizer.zero_grad()
            tasks.loss(method(x), y).mean(1).sum().backward()
            method.optimizer.step()
            scheduler.step()
    size = method.finish()
    return method, {"seconds": time.process_time() - start, "bytes": size}


@torch.no_grad()
def losses_of(model: Callable[[Tensor], Tensor], tasks: Tasks, data: Data) -> Tensor:
    return tasks.loss(model(data[0]), data[1])


def of_tasks(tensor: Tensor, tasks: Tasks) -> Tensor:
    return tensor.detach().expand(len(tasks), *tensor.shape)


# --- the rivals ---


def lotra(r: int | tuple[int, ...], gradient: bool = False) -> Maker:
    return lambda base, tasks, lr: Banked(base, tasks, LoTRAConfig(r=r), gradient, lr)


def lotra_on_path(r: int | tuple[int | str, ...]) -> Maker:
    return lambda base, tasks, lr: Banked(base, tasks, LoTRAConfig(r=r), True, lr, on_path=True)


def path(base: nn.Module, tasks: Tasks, lr: float) -> Stacked:
    """The base times a scale plus a linear model of each task, from the closed form."""
    model = LinearPath(base)
    fits = [fit_path(model, x, y[:, None], F.mse_loss) for x, y in zip(*tasks.train, strict=True)]
    start = [
        torch.tensor([fit.scale for fit in fits])[:, None, None],
        torch.stack([fit.weight.T for fit in fits]).float(),
        torch.stack([fit.bias[None] for fit in fits]).float(),
    ]
    return Stacked(lambda parts, x: parts[0] * frozen(base, x) + torch.baddbmm(parts[2], x, parts[1]), start, lr)


def linear(base: nn.Module, tasks: Tasks, lr: float) -> Stacked:
    """A linear model of each task without the base, for one output: from its least squares, with a ridge of 1."""
    x, y = tasks.train
    rows = F.pad(x, (0, 1), value=1.0)
    matrix = rows.mT @ rows + torch.eye(rows.shape[2])
    start = torch.linalg.solve(matrix, rows.mT @ y.unsqueeze(2))
    return Stacked(lambda parts, x: torch.baddbmm(parts[1], x, parts[0]), [start[:, :-1], start[:, -1:]], lr)


def last_layer(base: nn.Module, tasks: Tasks, lr: float) -> Stacked:
    layers = layers_of(base)
    before, start = nn.Sequential(*layers[:-1]), [of_tasks(part, tasks) for part in weights(layers[-1])]
    return Stacked(lambda parts, x: stacked_layer(layers[-1], parts, frozen(before, x)), start, lr)


def copies(base: nn.Module, tasks: Tasks, lr: float) -> Stacked:
    """All parameters of each task, from the base."""
    layers = layers_of(base)
    counts = [len(weights(layer)) for layer in layers]

    def forward(parts: list[Tensor], x: Tensor) -> Tensor:
        left = iter(parts)
        for layer, count in zip(layers, counts, strict=True):
            x = stacked_layer(layer, [next(left) for _ in range(count)], x)
        return x

    return Stacked(forward, [of_tasks(part, tasks) for layer in layers for part in weights(layer)], lr)


def from_scratch(base: nn.Module, tasks: Tasks, lr: float) -> Stacked:
    """A model of each task that knows nothing of the others."""
    fresh = KAN([layer.in_features for layer in base.layers] + [base.layers[-1].out_features])
    return copies(fresh, tasks, lr)


def lora(r: int) -> Maker:
    """LoRA on the linear layers of an MLP, as PEFT starts it, scale 1."""

    def make(base: nn.Module, tasks: Tasks, lr: float) -> Stacked:
        linears = [layer for layer in layers_of(base) if isinstance(layer, nn.Linear)]
        start = []
        for layer in linears:
            down = torch.empty(len(tasks), r, layer.in_features)
            for one in down:
                nn.init.kaiming_uniform_(one, a=math.sqrt(5))
            start += [down, torch.zeros(len(tasks), layer.out_features, r)]

        def forward(parts: list[Tensor], x: Tensor) -> Tensor:
            left = iter(parts)
            for layer in layers_of(base):
                y = F.linear(x, layer.weight.detach(), layer.bias.detach()) if layer in linears else layer(x)
                x = y + (x @ next(left).mT) @ next(left).mT if layer in linears else y
            return x

        return Stacked(forward, start, lr)

    return make


@torch.no_grad()
def frozen(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def layers_of(base: nn.Module) -> list[nn.Module]:
    return list(base.layers) if isinstance(base, KAN) else list(base)


def width(base: nn.Module) -> int:
    return layers_of(base)[0].in_features


def weights(layer: nn.Module) -> list[Tensor]:
    """The matrices that `stacked_layer` takes: rows are inputs (and functions), columns are outputs."""
    if isinstance(layer, nn.Linear):
        return [layer.weight.mT, layer.bias[None]]
    if isinstance(layer, nn.SiLU):
        return []
    return [torch.cat([layer.base_weight[..., None], layer.spline_weight], -1).permute(1, 2, 0).flatten(0, 1)]


def stacked_layer(layer: nn.Module, parts: list[Tensor], x: Tensor) -> Tensor:
    """A layer whose weights are those of each task."""
    if isinstance(layer, nn.Linear):
        return torch.baddbmm(parts[1], x, parts[0])
    if isinstance(layer, nn.SiLU):
        return layer(x)
    functions = torch.cat([F.silu(x)[..., None], layer.basis(x)], -1)
    return functions.flatten(2) @ parts[0]


def mlp_like(kan: nn.Module) -> nn.Sequential:
    """An MLP with as many hidden layers and parameters as a KAN."""
    sizes = [layer.in_features for layer in kan.layers] + [kan.layers[-1].out_features]
    wanted, hidden = count(kan), 1
    while count(made := _mlp([sizes[0], *[hidden] * (len(sizes) - 2), sizes[-1]])) < wanted:
        hidden += 1
    return made


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers = [part for pair in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


def count(model: nn.Module) -> int:
    return sum(part.numel() for part in model.parameters())
