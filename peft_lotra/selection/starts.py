# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The starts of what `fit_adapter` trains: an adapter, and all parameters, each next to the path of its fold."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

from peft import get_peft_model
from torch import Tensor, nn

from ..layers.search import walk_kan_layers
from ..modules.calls import set_mode, unwrap
from ..tuner.config import LoTRAConfig
from ..tuner.gradients import NoGradientError, start_from_gradient
from ..tuner.linear_path import LinearPath
from .path_solver import PathFit
from .training import BATCH, Start, Task, Tensors


Paths = Sequence[PathFit | None]  # of the folds


def adapt(
    base: nn.Module,
    path: PathFit | None,
    **config: Any,
) -> Any:
    """Adapt a base in place by an adapter without an update, and return the `PeftModel`; its path stays as it is."""
    model = get_peft_model(base, LoTRAConfig(r=("full", "full", 1), **config))
    network = unwrap(model)
    if path is not None and isinstance(network, LinearPath):
        network.path.set(path.scale, path.weight, path.bias)
    return model


def start_adapter(
    base: nn.Module,
    task: Task,
    rows: Sequence[Tensor],
    paths: Paths,
) -> Start:
    """Start an adapter from the gradient on the rows of each fold."""
    values = []
    fixed = []
    speeds = []
    network = base
    for of_fold, path in zip(rows, paths, strict=True):
        model = adapt(deepcopy(base), path)
        network = unwrap(model)

        def compute_loss(batch: Tensor, model: Any = model) -> Tensor:
            return task.loss(model(task.x[batch]), task.y[batch])

        with suppress(NoGradientError):  # of these rows: no update
            start_from_gradient(model, compute_loss, of_fold.split(BATCH))
        values.append(_copy_parameters(network, trained=True))
        fixed.append(_copy_path(network))
        speeds.append(_find_speeds(network, values[-1], path, "lotra_core."))
    return Start(network.requires_grad_(False), values, fixed, speeds)


def start_all(
    base: nn.Module,
    paths: Paths,
) -> Start:
    """Start from all parameters of the base, but its grids and its path."""
    network = deepcopy(base)
    set_mode(network, False)
    values = _copy_parameters(network, trained=False)
    fixed = []
    speeds = []
    for path in paths:
        if path is not None and isinstance(network, LinearPath):
            network.path.set(path.scale, path.weight, path.bias)
        fixed.append(_copy_path(network))
        speeds.append(_find_speeds(network, values, path, ""))
    return Start(network.requires_grad_(False), [values] * len(paths), fixed, speeds)


def _find_speeds(
    network: nn.Module,
    values: Tensors,
    path: PathFit | None,
    component: str,
) -> Tensors:
    """Return the multiples of the learning rate: 1 / scale in the last KAN layer, so that the scale is of the base."""
    scale = 1.0 if path is None else path.scale
    last = [name for name, _, _ in walk_kan_layers(network)][-1]
    prefix = f"{last}.{component}".removeprefix(".")
    speeds = {}
    for name, value in values.items():
        speed = 1 / scale if name.startswith(prefix) else 1.0
        speeds[name] = value.new_tensor(speed)
    return speeds


def _copy_parameters(network: nn.Module, trained: bool) -> Tensors:
    """Return copies of the parameters that are trained; or else of all but grids and paths."""
    parameters = dict(network.named_parameters())
    left_out = set(_path_names(network))
    for layer, module, spec in walk_kan_layers(network):
        for name in spec.read_grid(module):  # pykan stores them as parameters
            left_out.add(f"{layer}.{name}".removeprefix("."))
    names = [name for name in parameters if name not in left_out]
    if trained:
        names = [name for name in names if parameters[name].requires_grad]
    return {name: parameters[name].detach().clone() for name in names}


def _path_names(network: nn.Module) -> list[str]:
    """Return the names of the parameters of the path in use."""
    if not isinstance(network, LinearPath):
        return []
    path = set(map(id, network.path.parameters()))
    return [name for name, parameter in network.named_parameters() if id(parameter) in path]


def _copy_path(network: nn.Module) -> Tensors:
    return {name: network.get_parameter(name).detach().clone() for name in _path_names(network)}
