# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Initialize adapters from the gradient of the base's coefficients."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..modules.calls import buffers_kept, check_loaded, modes_kept, unwrap
from ..modules.checks import check_function
from .config import LoTRAConfig
from .initialization import initialize
from .layer import LoTRALayer, check_unmerged, lotra_layers


_DENSE = "dense update"  # the name of an adapter that layers have while a start is computed
# optimizers whose learning rates depend on how the adapter started, see `_warn_of_optimizers`
OPTIMIZERS: WeakSet[Optimizer] = WeakSet()


def start_from_gradient(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterable[Any] | None = None,
) -> None:
    """Initialize the active adapter with the directions that full fine-tuning would take first.

    Let G be the gradient of the loss with respect to the coefficients of a layer. factor_in, factor_basis and core
    span the leading right singular vectors of G, and factor_out is zero, so that the adapted model equals its base.
    Call it before [`create_lotra_optimizer`], which then sets the learning rates of this start; in the other order it
    warns.

    Args:
        model (`nn.Module`): A model with one active LoTRA adapter, or a module around it.
        loss (`Callable`): Computes the loss of the new task, a tensor of one value: `loss()`, or `loss(batch)` for
            each batch, whose gradients are summed. It must not call `backward()`.
        batches (`Iterable`, *optional*): A few hundred samples are enough.

    Raises:
        TypeError: `loss` is no function.
        ValueError: There is no active adapter, or more than one; adapters are merged; the loss does not depend on the
            coefficients, or its gradient is not finite. The adapter is unchanged then.
        RuntimeError: The grid has moved since the adapter was made.

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
    adapter, config, layers = _find_active_adapter(network)
    with _dense_updates(model, layers, config) as cores:
        for value in compute_losses(loss, batches):
            value.backward()
    gradients = {name: core.grad for name, core in cores.items()}
    _check_gradients(gradients)
    config.init_weights = "gradient"
    for name, layer in layers.items():
        components = layer.get_components(adapter)
        _, zero = config.frozen_and_zero(components._asdict())
        initialize(components, "gradient", zero, gradients[name])
    # the former object may serve other models
    for configs in _find_configs(network, adapter):
        configs[adapter] = config
    _warn_of_optimizers(layers, adapter)


def _find_active_adapter(network: nn.Module) -> tuple[str, LoTRAConfig, dict[str, LoTRALayer]]:
    """Return the active adapter, a copy of its configuration, and its layers by name; warn if it has an update.

    Raises:
        ValueError: No adapter is active, or more than one, or adapters are merged.
    """
    check_unmerged(network)
    check_loaded(network, "model")
    active = set()
    for _, layer in lotra_layers(network):
        active.update(name for name in layer.active_adapters if name in layer.lotra_r)
    if len(active) != 1:
        raise ValueError(
            f"One LoTRA adapter must be active, but {sorted(active) or 'none'} is active. Add one by "
            "`get_peft_model(model, LoTRAConfig(...))`, or choose one by `model.set_adapter(name)`."
        )
    (adapter,) = active
    configs = next(_find_configs(network, adapter))
    layers = dict(lotra_layers(network, adapter))
    for layer in layers.values():
        components = layer.get_components(adapter)._asdict().values()
        # a new adapter has a component that is zero
        if all(component.any() for component in components):
            warnings.warn(f"The start overwrites {adapter!r}, which was trained or started before.", stacklevel=3)
            break
    return adapter, copy.copy(configs[adapter]), layers


def _warn_of_optimizers(layers: Mapping[str, LoTRALayer], adapter: str) -> None:
    """Warn if `create_lotra_optimizer` was called before the start, and set the learning rates of the former one."""
    components = set()
    for layer in layers.values():
        components.update(layer.get_components(adapter)._asdict().values())
    if not _holds_any(components):
        return
    gc.collect()  # of optimizers that were deleted, to which their schedulers refer
    if _holds_any(components):
        warnings.warn(
            "An optimizer was created before this start, so its learning rates do not fit the start. Call "
            "`create_lotra_optimizer` again, after the start.",
            stacklevel=3,
        )


def _holds_any(parameters: set[Tensor]) -> bool:
    """Return whether one of `OPTIMIZERS` holds one of the parameters."""
    for optimizer in list(OPTIMIZERS):
        if any(not parameters.isdisjoint(group["params"]) for group in optimizer.param_groups):
            return True
    return False


def _find_configs(network: nn.Module, adapter: str) -> Iterator[dict[str, LoTRAConfig]]:
    for module in network.modules():
        configs = vars(module).get("peft_config", {})
        if adapter in configs:
            yield configs


@contextmanager
def _dense_updates(
    model: nn.Module,
    layers: Mapping[str, LoTRALayer],
    config: LoTRAConfig,
) -> Iterator[dict[str, nn.Parameter]]:
    """Make dense updates, initialized to zero, the only active adapters and the only trained parameters.

    Yields:
        The updates (out, in, basis) by layer. Afterwards the model is restored.
    """
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    # `inference_mode(False)` enables gradients, too
    with modes_kept(model), buffers_kept(model), ExitStack() as stack, torch.inference_mode(False):
        for parameter, requires_grad, grad in parameters:
            stack.callback(setattr, parameter, "grad", grad)
            stack.callback(parameter.requires_grad_, requires_grad)
            parameter.requires_grad_(False).grad = None
        updates = {}
        for name, layer in layers.items():
            layer.check_grid()
            stack.callback(layer.delete_adapter, _DENSE)
            stack.callback(setattr, layer, "_active_adapter", layer._active_adapter)
            stack.callback(setattr, layer, "_disable_adapters", layer._disable_adapters)
            layer.update_layer(_DENSE, LoTRAConfig(r="full", adapt_residual=config.adapt_residual))
            layer._active_adapter = [_DENSE]
            layer._disable_adapters = False
            core = layer.get_components(_DENSE).core
            if core.itemsize < 4:
                core.data = core.data.float()
            updates[name] = core
        yield updates


def compute_losses(
    loss: Callable[..., Tensor],
    batches: Iterable[Any] | None,
) -> Iterator[Tensor]:
    """Yield the loss of each batch, or without batches the loss; raise a ValueError unless it has one value."""
    calls = [()] if batches is None else ((batch,) for batch in batches)
    for arguments in calls:
        value = loss(*arguments)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"`loss` must return a tensor of one value with a gradient, not {value!r:.100}. Compute it from the "
                "output of the model, and leave `backward()` out."
            )
        yield value


class NoGradientError(ValueError):
    """The gradient of a loss is zero."""


def _check_gradients(gradients: Mapping[str, Tensor | None]) -> None:
    """Raise a ValueError for gradients of layers that are missing, not finite, or all zero."""
    is_zero = True
    for name, tensor in gradients.items():
        if tensor is None or not tensor.isfinite().all():
            raise ValueError(
                f"The gradient of `{name}` is missing or not finite: look at the loss, which must depend on the "
                "coefficients of this layer, and at its data."
            )
        is_zero = is_zero and not tensor.any()
    if is_zero:
        raise NoGradientError(
            "The gradient of the loss is zero: no direction in the coefficients would change the loss. If the loss is "
            "small, the base fits the data and needs no adapter. Otherwise look at the loss and its data."
        )
