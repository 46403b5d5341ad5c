# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Starts of adapters from the gradient of the base's coefficients, and these gradients, which spectra use too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..layers.coefficients import CoefficientTensor
from ..modules.calls import buffers_kept, modes_kept, unwrap
from ..modules.checks import check_function
from .initialization import initialize
from .layer import check_unmerged, lotra_layers


def start_from_gradient(
    model: nn.Module, loss: Callable[..., torch.Tensor], batches: Iterable[Any] | None = None
) -> None:
    """Starts the active adapter anew, in the directions that full fine-tuning would take first.

    With G the gradient of the loss with respect to a layer's coefficients, factor_in, factor_basis and core span the
    leading right singular vectors of G, and factor_out is zero: the adapted model equals its base again. Call it
    before the optimizer is made: [`create_lotra_optimizer`] then has the rates of this start.

    Args:
        model (`nn.Module`): A model with one active LoTRA adapter, or a module around it.
        loss (`Callable`): Computes the loss of the new task, a tensor of one value: `loss()`, or `loss(batch)` for
            each of the batches, whose gradients are summed. It is not to call `backward()`.
        batches (`Iterable`, *optional*): A few hundred samples are enough.

    Raises:
        TypeError: `loss` is no function.
        ValueError: There is no active adapter, or more than one; adapters are merged; the loss does not depend on the
            coefficients, or its gradient is not finite. The adapter is as before then.
        RuntimeError: The grid is not the one that the adapter was made on.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, start_from_gradient
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 8, 1]), LoTRAConfig(r=(4, 4, 3)))
        >>> x = torch.rand(50, 2)
        >>> y, mse = x.prod(dim=1, keepdim=True), torch.nn.functional.mse_loss
        >>> start_from_gradient(model, lambda: mse(model(x), y))
    """
    check_function(loss, "loss")
    network = unwrap(model)
    active = {name for _, layer in lotra_layers(network) for name in layer.active_adapters if name in layer.lotra_r}
    if len(active) != 1:
        raise ValueError(
            f"One LoTRA adapter is to start from the gradient, but {sorted(active) or 'none'} is active. Add one by "
            "`get_peft_model(model, LoTRAConfig(...))`, or choose one by `model.set_adapter(name)`."
        )
    adapter, layers = next(iter(active)), dict(lotra_layers(network, *active))

    def train_step() -> None:
        for arguments in [()] if batches is None else ((batch,) for batch in batches):
            value = loss(*arguments)
            if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
                raise ValueError(
                    f"`loss` must return a tensor of one value with a gradient, not {value!r:.100}. Compute it from "
                    "the output of the model, and leave `backward()` out."
                )
            value.backward()

    with ExitStack() as stack:  # the gradient of the base alone
        stack.enter_context(modes_kept(model))
        for layer in layers.values():
            layer.check_grid()
            stack.callback(setattr, layer, "_disable_adapters", layer._disable_adapters)
            layer._disable_adapters = True
        targets = {name: (layer.get_base_layer(), layer.lotra_tensor) for name, layer in layers.items()}
        gradients = gather_gradients(targets, network, train_step)
    owners = [it for module in network.modules() if adapter in (it := vars(module).get("peft_config", {}))]
    config = copy.copy(owners[0][adapter])  # the object may serve other models
    config.init_weights = "gradient"
    for layer in layers.values():
        components = layer.get_components(adapter)
        _, zero = config.frozen_and_zero(components._asdict())
        initialize(components, "gradient", zero, gradients[layer.get_base_layer()])
    for configs in owners:
        configs[adapter] = config


@torch.inference_mode(False)  # gradients are wanted here, whatever the mode around
def gather_gradients(
    layers: dict[str, tuple[nn.Module, CoefficientTensor]], model: nn.Module, train_step: Callable[[], None]
) -> dict[nn.Module, torch.Tensor]:
    """Runs `train_step` and sums the gradients of the layers' coefficients (out, in, basis), by layer.

    Each gradient is taken away once it has been accumulated: the peak memory is one extra copy of the coefficients.
    """
    check_unmerged(model)
    sums: dict[torch.Tensor, torch.Tensor] = {}

    def take(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            sums[parameter] = parameter.grad if parameter not in sums else sums[parameter].add_(parameter.grad)
        parameter.grad = None

    leaves: dict[nn.Module, dict[str, nn.Parameter]] = {}
    with _left_as_it_was(model), ExitStack() as hooks:
        for parameter in model.parameters():
            parameter.requires_grad_(False).grad = None
        for layer, tensor in layers.values():
            with_update: Any = getattr(layer, "forward_with", None)
            if with_update is not None:  # a Slim layer has no such parameters: a zero that is added to them
                probe = nn.Parameter(torch.zeros_like(tensor.read(layer)))
                leaves[layer] = {"the coefficients": probe}
                layer.__dict__["forward"] = partial(with_update, probe)
                hooks.callback(layer.__dict__.pop, "forward")
            else:
                leaves[layer] = {name: layer.get_parameter(name) for name in tensor.parameters}
            for leaf in leaves[layer].values():
                hooks.callback(leaf.requires_grad_(True).register_post_accumulate_grad_hook(take).remove)
        with torch.enable_grad():
            train_step()

    gradients = {}
    for name, (layer, tensor) in layers.items():
        missing = [leaf_name for leaf_name, leaf in leaves[layer].items() if leaf not in sums]
        if missing:
            raise ValueError(
                f"No gradient arrived at {missing} of `{name}`: the loss must depend on it, and `train_step`, where "
                "there is one, call `backward()`."
            )
        parts = [sums[leaf] for leaf in leaves[layer].values()]
        if not all(part.isfinite().all() for part in parts):
            raise ValueError(f"The gradient of `{name}` is not finite: look at the loss and its data.")
        gradients[layer] = parts[0] if hasattr(layer, "forward_with") else tensor.join(parts)
    if not any(gradient.any() for gradient in gradients.values()):
        raise ValueError("The gradient of the loss is zero: no direction in the coefficients would change the loss.")
    return gradients


@contextmanager
def _left_as_it_was(model: nn.Module):
    """Restore gradients, requires_grad, training mode and buffers."""
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        with modes_kept(model), buffers_kept(model):
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad).grad = grad
