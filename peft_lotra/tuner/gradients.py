# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Gradients of the coefficient tensors, gathered for `init_weights="gradient"` and for spectra."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from ..layers.coefficients import CoefficientTensor
from ..modules.calls import modes_kept, read_at_rest, unwrap
from .config import LoTRAConfig
from .initialization import GRADIENTS
from .layer import lotra_layers
from .targets import find_targets


def preprocess_lotra(model: nn.Module, config: LoTRAConfig, train_step: Callable[[], None]) -> None:
    """Gathers what `init_weights="gradient"` needs; call it before `get_peft_model`, as PEFT's `preprocess_loraga`.

    The adapter then begins with the combinations of inputs and basis functions that the first step of full fine-tuning
    would use most, instead of random ones. The model is left as it was; the gradients are kept until the adapter is
    made. This start pays for new data of the old task at small ranks; train it with a small rate for the core.

    Args:
        model (`nn.Module`): The base model, or a PEFT model that is to get one more adapter.
        config ([`LoTRAConfig`]): The configuration that the adapter will be made with.
        train_step (`Callable[[], None]`): Computes a loss and calls `backward()`, for one or more batches. A few
            hundred samples are enough.

    Raises:
        ValueError: `init_weights` of the configuration is not `"gradient"`; a target is no KAN layer; no gradient, or
            one that is not finite, arrived at a layer. Nothing is kept then.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, create_lotra_optimizer, preprocess_lotra
        >>> from peft_lotra.kan import KAN
        >>> kan, x = KAN([2, 8, 1]), torch.rand(50, 2)
        >>> config = LoTRAConfig(r=(4, 4, 3), init_weights="gradient")
        >>> preprocess_lotra(kan, config, lambda: (kan(x).squeeze() - x.prod(dim=1)).square().mean().backward())
        >>> model = get_peft_model(kan, config)
        >>> policy = {"core": 0.03, "factor_out": 0.5}
        >>> optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-2, policy=policy)
    """
    if config.init_weights != "gradient":
        raise ValueError(f"`init_weights` of the configuration is {config.init_weights!r}, but must be 'gradient'.")
    model = unwrap(model)
    with read_at_rest(model):
        layers = {name: (target.layer, target.coefficients) for name, target in find_targets(config, model).items()}
    GRADIENTS.update(gather_gradients(layers, model, train_step))


@torch.inference_mode(False)  # gradients are wanted here, whatever the mode around
def gather_gradients(
    layers: dict[str, tuple[nn.Module, CoefficientTensor]], model: nn.Module, train_step: Callable[[], None]
) -> dict[nn.Module, torch.Tensor]:
    """Runs `train_step` and sums the gradients of the layers' coefficients (out, in, basis), by layer.

    Each gradient is taken away once it has been accumulated: the peak memory is one extra copy of the coefficients.
    """
    if any(layer.merged for _, layer in lotra_layers(model)):
        raise ValueError("Adapters are merged into the model: call `unmerge_adapter` first.")
    sums: dict[torch.Tensor, torch.Tensor] = {}

    def take(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            sums[parameter] = parameter.grad if parameter not in sums else sums[parameter].add_(parameter.grad)
        parameter.grad = None

    targets, probes = {}, {}
    for name, (layer, tensor) in layers.items():
        if hasattr(layer, "forward_with"):  # a Slim layer has no such parameters: a zero that is added to them
            probes[layer] = nn.Parameter(torch.zeros_like(tensor.read(layer)))
            targets[name, "probe"] = probes[layer]
        else:
            targets |= {(name, parameter): layer.get_parameter(parameter) for parameter in tensor.parameters}
    with _left_as_it_was(model), ExitStack() as hooks:
        for parameter in model.parameters():
            parameter.requires_grad_(False).grad = None
        for parameter in targets.values():
            parameter.requires_grad_(True)
            hooks.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        for layer, probe in probes.items():
            layer.__dict__["forward"] = partial(layer.forward_with, probe)
            hooks.callback(layer.__dict__.pop, "forward")
        with torch.enable_grad():
            train_step()

    gradients = {}
    for name, (layer, tensor) in layers.items():
        names = ["probe"] if layer in probes else list(tensor.parameters)
        missing = [n for n in names if targets[name, n] not in sums]
        if missing:
            raise ValueError(f"No gradient arrived at {missing} of `{name}`: `train_step` must call `backward()`.")
        parts = [sums[targets[name, n]] for n in names]
        if not all(part.isfinite().all() for part in parts):
            raise ValueError(f"The gradient of `{name}` is not finite: look at the loss and the data of `train_step`.")
        gradients[layer] = parts[0] if layer in probes else tensor.join(parts)
    return gradients


@contextmanager
def _left_as_it_was(model: nn.Module):
    """Restores gradients, requires_grad, training mode and buffers (running statistics)."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    try:
        with modes_kept(model):
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad).grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
