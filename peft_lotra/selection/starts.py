# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The starts that `fit_adapter` compares: of an adapter, and of references without adapters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import safetensors.torch
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call

from ..compress.data_weights import recorded_calls
from ..layers.search import walk_kan_layers
from ..modules.calls import evaluating_without_trace, set_mode, unwrap
from ..tuner.config import LoTRAConfig
from ..tuner.gradients import NoGradientError, start_from_gradient
from ..tuner.saving import cast_to_storage
from .training import BATCH, CHUNK, Start, Task, Tensors


Ranks = dict[str, Any]  # a `rank_pattern`


class Size(NamedTuple):
    """The parameters that are stored for a task, and the bytes of their file."""

    parameters: int
    bytes: int


def adapt(base: nn.Module, **config: Any) -> Any:
    """Adapt the KAN layers of a base, in place, and return the `PeftModel`."""
    return get_peft_model(base, LoTRAConfig(**config))


def file_size(tensors: Tensors) -> Size:
    """Return the size of a safetensors file with these tensors."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    file = safetensors.torch.save(contiguous, {"format": "pt"})
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Size(parameters, len(file))


def stored_tensors(model: Any) -> Tensors:
    """Return the tensors of an adapter in the dtype of the file that PEFT writes."""
    tensors = get_peft_model_state_dict(model)
    storage = model.peft_config["default"].storage
    return tensors if storage is None else cast_to_storage(tensors, storage)


def choose_ranks(
    base: nn.Module,
    task: Task,
    budget: float,
) -> Ranks | None:
    """Return the ranks within a budget, see `LoTRAConfig`; None if the gradient of the loss is zero."""
    model = adapt(deepcopy(base), budget=budget)
    batches = torch.arange(len(task.x)).split(BATCH)
    try:
        start_from_gradient(model, partial(_batch_loss, model, task), batches)
    except NoGradientError:
        return None
    return model.peft_config["default"].rank_pattern


def start_adapter(
    base: nn.Module,
    task: Task,
    ranks: Ranks,
    rows: Sequence[Tensor],
) -> Start:
    """Start an adapter on the rows of each fold."""
    values = []
    network = base
    for of_fold in rows:
        model = adapt(deepcopy(base), rank_pattern=ranks)
        network = unwrap(model)
        with suppress(NoGradientError):  # the rows with a gradient are held out: no update
            start_from_gradient(model, partial(_batch_loss, model, task), of_fold.split(BATCH))
        values.append(trained_values(network))
    return Start(network.requires_grad_(False), values)


def _batch_loss(model: nn.Module, task: Task, batch: Tensor) -> Tensor:
    return task.loss(model(task.x[batch]), task.y[batch])


def trained_values(network: nn.Module) -> Tensors:
    """Return copies of the parameters that require a gradient; if none does, of all except grids."""
    parameters = dict(network.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not trained:
        grids = set()  # pykan stores them as parameters
        for layer, module, spec in walk_kan_layers(network):
            for name in spec.read_grid(module):
                grids.add(f"{layer}.{name}".removeprefix("."))
        trained = [name for name in parameters if name not in grids]
    return {name: parameters[name].detach().clone() for name in trained}


@torch.no_grad()
def make_references(base: nn.Module, task: Task) -> dict[str, Start]:
    """Return the references of an adapter by name."""
    network = deepcopy(base)
    set_mode(network, False)
    values = trained_values(network)
    network.requires_grad_(False)
    outputs = network(task.x[:2])
    fresh = _draw_anew(network)
    scratch = {name: fresh[name] for name in values}
    last_layer = _find_last_layer(network, task.x[:CHUNK], values)
    folds = len(task.rows)
    references = {
        "last layer": Start(network, [last_layer] * folds),
        "full": Start(network, [values] * folds),
        "scratch": Start(network, [scratch] * folds),
    }
    if task.x.is_floating_point():
        references["linear"] = _start_linear(task, outputs)
    return references


def _find_last_layer(network: nn.Module, x: Tensor, values: Tensors) -> Tensors:
    """Return the values of the last KAN layer, or other module, that a forward pass calls.

    Modules around it, and modules without an effect on the outputs (the symbolic layers of pykan), are left out.
    """
    layers = {name: layer for name, layer, _ in walk_kan_layers(network)}
    inside = tuple(f"{name}." for name in layers)
    for name, module in network.named_modules():
        if name and module._parameters and not name.startswith(inside):
            layers[name] = module
    calls = []
    with evaluating_without_trace(network), torch.enable_grad():
        parameters = {name: value.clone().requires_grad_() for name, value in values.items()}
        with recorded_calls(layers, lambda name, x, y: calls.append(name)):
            outputs = functional_call(network, parameters, (x,)).flatten()
        weights = torch.linspace(1, 2, len(outputs)).to(outputs)
        gradients = torch.autograd.grad(outputs, list(parameters.values()), weights, materialize_grads=True)
    with_effect = {name for name, gradient in zip(values, gradients, strict=True) if gradient.any()}

    last = values
    for name in calls:
        prefix = f"{name}."
        layer_values = {key: value for key, value in values.items() if key.startswith(prefix)}
        is_container = any(call.startswith(prefix) for call in calls)
        if not is_container and with_effect & layer_values.keys():
            last = layer_values
    return last


def _draw_anew(network: nn.Module) -> Tensors:
    """Return new parameters: by `reset_parameters`, or in a random order where a module has no such method."""
    fresh = deepcopy(network)
    for parameter in fresh.parameters():
        order = torch.randperm(parameter.numel())
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    module: Any
    for module in fresh.modules():
        with suppress(Exception):  # no such method, or one that cannot be called so
            module.reset_parameters()
    return dict(fresh.named_parameters())


def _start_linear(task: Task, outputs: Tensor) -> Start:
    """Start a linear model at zero, of inputs that are standardized by the rows of each fold, and clipped."""
    width = task.x[0].numel()
    last = nn.Flatten(0) if outputs.dim() == 1 else nn.Unflatten(1, outputs.shape[1:])
    linear = nn.Linear(width, outputs[0].numel())
    # what was rarely active in the training rows may be far outside of them
    standardize = nn.BatchNorm1d(width, affine=False)
    network = nn.Sequential(nn.Flatten(), standardize, nn.Hardtanh(-3, 3), linear, last)
    network.to(outputs).requires_grad_(False)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    values = []
    for rows in task.rows:
        inputs = task.x[rows].flatten(1)
        variance, mean = torch.var_mean(inputs, 0, correction=0)
        variance[variance < 1e-12] = 1
        values.append({**zeros, "1.running_mean": mean, "1.running_var": variance})
    return Start(network, values)
