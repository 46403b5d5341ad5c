# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Starts of adapters from a few steps of full fine-tuning."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.basis import in_transform
from ..modules.calls import is_tracing, unwrap
from ..modules.checks import check_count, check_function, check_number
from ..tucker import Tucker, form_text
from ..tuner.config import LoTRAConfig, pattern_key
from ..tuner.gradients import (
    DENSE,
    check_changes,
    compute_losses,
    dense_updates,
    find_active_adapter,
    holds_any,
    replace_config,
    warn_of_optimizers,
)
from ..tuner.layer import LoTRALayer
from .data_weights import DataWeights, first_output, gather_weights
from .extract import decompose_updates
from .spectra import choose_ranks, weighted_spectra
from .updates import CoefficientUpdate, edge_scales


ROWS = 1000  # that weigh the update
WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}

Call = tuple[tuple, dict[str, Any]]  # arguments of the network


@torch.inference_mode(False)  # parameters made in that mode could not be trained
def start_from_training(
    model: nn.Module,
    loss: Callable[..., Tensor],
    batches: Iterable[Any] | None = None,
    steps: int = 60,
    lr: float = 1e-2,
) -> None:
    """Start the active adapter from what a few steps of full fine-tuning change.

    Adam moves all coefficients of the adapted layers, from the base. The adapter becomes the Tucker tensors that come
    closest to this update in the outputs of the layers, weighted by J^T J of the model's outputs, for the inputs that
    `loss` passes to the network in the first pass over the batches. If `loss` calls the network through `jet` or
    `torch.func`, they are closest in the coefficients. With a `budget` in the configuration, the ranks are chosen
    again.

    **The adapted model does not equal its base afterwards.** The base itself is unchanged. Create the optimizer
    afterwards: with a `budget` the components are new parameters. [`create_lotra_optimizer`] then trains each
    component at lr times its root mean square. If it was called before the start, the start warns. The steps need the
    gradient and two moments of all coefficients: for wide layers take [`start_from_gradient`].

    Args:
        model (`nn.Module`): A model with one active LoTRA adapter.
        loss (`Callable`): Computes the loss of the new task, a tensor of one value: `loss()`, or `loss(batch)` for one
            of the batches. It is not to call `backward()`.
        batches (`Iterable`, *optional*): A list or a loader, which is passed over again and again.
        steps (`int`): The number of steps.
        lr (`float`): The learning rate of the steps.

    Raises:
        TypeError: `loss` is no function.
        ValueError: There is no active adapter, or more than one; adapters are merged; `train` leaves nothing to train
            with the chosen ranks; the model is wrapped for training in parallel; an optimizer holds components that a
            budget would replace; there are no batches; the loss does not depend on the coefficients, or becomes
            infinite. The adapter is as before then.
        RuntimeError: The grid is not the one that the adapter was made on.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig, start_from_training
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 8, 1]), LoTRAConfig(budget=0.3))
        >>> x = torch.rand(50, 2)
        >>> y, mse = x.prod(dim=1, keepdim=True), torch.nn.functional.mse_loss
        >>> start_from_training(model, lambda: mse(model(x), y))
    """
    check_function(loss, "loss")
    steps = check_count(steps, "steps")
    check_number(lr, "lr", "(0, inf)")
    network = unwrap(model)
    adapter, config, layers = find_active_adapter(network)
    components = {name: layer.get_components(adapter) for name, layer in layers.items()}
    _check_replaceable(model, components, config)

    with dense_updates(model, layers, config) as cores:
        calls = _train(network, cores, loss, batches, steps, lr)
        reached = {name: core if core.grad is not None else None for name, core in cores.items()}
        check_changes("update", reached)
        weights = _weigh(network, layers, cores, calls)
        updates = {}
        for name, layer in layers.items():
            tensor = cores[name].detach().double()
            scale = None
            if name in weights:
                scale = edge_scales(layer.base_target(), tensor)
            if scale is not None:
                tensor = scale * tensor
            updates[name] = CoefficientUpdate(tensor, scale)

    ranks = {name: tensor.ranks for name, tensor in components.items()}
    if config.budget is not None:
        tensors = {name: update.tensor for name, update in updates.items()}
        size = sum(tensor.numel() for tensor in tensors.values())
        budget = int(config.budget * size + 1e-6)
        ranks = choose_ranks(weighted_spectra(tensors, weights), budget=budget)
    started = decompose_updates(updates, weights, ranks)

    frozen = {}
    for name, tensor in started.items():
        names = tensor._asdict()
        frozen[name], _ = config.frozen_and_zero(names)
        if len(frozen[name]) == len(names):
            raise ValueError(
                f"`train={config.train}` leaves nothing to train in `{name}`, which gets the ranks "
                f"{form_text(tensor.form)}. Train the core too, or pass another budget."
            )

    config.init_weights = "training"
    pattern = {}
    for name, layer in layers.items():
        former = components[name]
        tensor = started[name].map(lambda component, core=former.core: component.to(core))
        tensor = tensor._replace(core=tensor.core / layer.lotra_alpha[adapter])
        if config.budget is None:
            layer.set_components(adapter, tensor)
            continue

        is_trained = any(component.requires_grad for component in former._asdict().values())
        layer.replace_components(adapter, tensor)
        layer.frozen_peft_weight_names[adapter] = tuple(f"lotra_{component}" for component in frozen[name])
        for component, parameter in layer.get_components(adapter)._asdict().items():
            parameter.requires_grad_(is_trained and component not in frozen[name])
        pattern[pattern_key(layer.lotra_name)] = tensor.form
    config.rank_pattern = pattern or config.rank_pattern
    replace_config(network, adapter, config)
    warn_of_optimizers(layers, adapter)


def _check_replaceable(
    model: nn.Module,
    components: Mapping[str, Tucker],
    config: LoTRAConfig,
) -> None:
    """Raise a ValueError for models wrapped for training in parallel, or components that an optimizer holds."""
    for module in model.modules():
        wrappers = WRAPPERS & {cls.__name__ for cls in type(module).__mro__}
        if wrappers:
            raise ValueError(
                f"The model is wrapped by {wrappers.pop()}, which holds the components that the start would replace. "
                "Call `start_from_training` in each process with the same batches, before the model is wrapped."
            )
    if config.budget is None:
        return
    gc.collect()  # of optimizers that were deleted
    # `isinstance` would ask proxies for their class
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.optim.Optimizer)]
    for name, tensor in components.items():
        if holds_any(optimizers, {*tensor._asdict().values()}):
            raise ValueError(
                f"An optimizer was created before this start. A start with a `budget` replaces the components of "
                f"`{name}`, so that optimizer would train parameters that the model no longer uses. Create the "
                "optimizer after `start_from_training`, or delete it first."
            )


def _train(
    network: nn.Module,
    cores: Mapping[str, nn.Parameter],
    loss: Callable[..., Tensor],
    batches: Iterable[Any] | None,
    steps: int,
    lr: float,
) -> list[Call]:
    """Train the dense updates, and return the calls of the network in the first pass over the batches."""
    calls: list[Call] = []

    def record(
        module: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> None:
        if is_tracing() or not in_transform():
            calls.append((args, kwargs))

    optimizer = torch.optim.Adam(cores.values(), lr=lr)
    losses = compute_losses(loss, batches)
    with network.register_forward_pre_hook(record, with_kwargs=True) as handle:
        for _ in range(steps):
            value = next(losses, None)
            if value is None:  # the next pass over the batches
                handle.remove()
                losses = compute_losses(loss, batches)
                value = next(losses, None)
            if value is None:
                raise ValueError("`batches` has no more batch: pass a list or a loader, to be passed over repeatedly.")
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return calls


def _weigh(
    network: nn.Module,
    layers: Mapping[str, LoTRALayer],
    cores: Mapping[str, Tensor],
    calls: Sequence[Call],
) -> dict[str, DataWeights]:
    """Compute the data weights of the layers with their dense updates; none without calls of the network."""
    if not calls:
        return {}

    def run(network: nn.Module) -> Tensor:
        outputs = []
        for args, kwargs in calls:
            if sum(map(len, outputs)) >= ROWS:
                break
            output = first_output(network(*args, **kwargs))
            outputs.append(output.flatten(0, -2))
        return torch.cat(outputs)

    with ExitStack() as stack:
        for layer in layers.values():
            layer.merge(adapter_names=[DENSE])
            stack.callback(layer.unmerge)
        return gather_weights(network, cores, run)
