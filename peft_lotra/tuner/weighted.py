# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Sums of adapters: a new adapter whose update is, or approximates, the weighted sum of other updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from operator import mul
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTuner

from ..modules.calls import check_loaded
from ..modules.checks import as_number
from ..tucker import Ranks, check_ranks, direct_sum
from .config import LoTRAConfig, pattern_key
from .layer import lotra_layers
from .linear_path import PATH, LinearPath, linear_paths
from .targets import exact_targets


COMBINATION_TYPES = ("cat", "svd")


def add_weighted_adapter(
    model: BaseTuner,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: Literal["cat", "svd"] = "cat",
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Add an adapter whose update is the weighted sum of other updates.

    Each adapter counts with its present scale. The new adapter has an alpha of 1 and is not active. A layer that only
    some of the adapters have is summed over these. The path of a [`LinearPath`] becomes the path of the base plus the
    weighted sum of its changes by the adapters.

    - `"cat"` is exact: the cores become the blocks of one core, and the ranks add. Ranks above the sizes of their
      modes are reduced to the sizes without loss.
    - `"svd"` is the best approximation that HOOI finds with the given `ranks`.

    Args:
        model: The tuner, a [`LoTRAModel`].
        adapters: The adapters to sum up.
        weights: Their weights, positive or negative.
        adapter_name: The name of the new adapter.
        combination_type: `"cat"` or `"svd"`.
        ranks: For `"svd"`, the ranks of the new adapter; by default the largest of the adapters, layer by layer.

    Returns:
        By layer, the norm of (the stored update - the sum), as a share of the norm of the sum.

    Raises:
        ValueError: An adapter is unknown or has `modules_to_save`, which cannot be summed; the numbers of adapters and
            weights differ, or a weight is not finite; the name exists; `ranks` without `"svd"`. Nothing is
            changed then.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([8, 9]), LoTRAConfig(r=2, init_weights=False))
        >>> model.add_adapter("other", LoTRAConfig(r=3, init_weights=False))
        >>> errors = model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "sum")
        >>> model.base_model.model.layers[0].lotra_r["sum"], errors["layers.0"] < 1e-6
        ((5, 5, 5), True)
    """
    configs: Any = model.peft_config
    _check(configs, adapters, weights, adapter_name, combination_type, ranks)
    check_loaded(model, "model")
    totals = {}
    sums = {}
    for name, layer in lotra_layers(model.model):
        tensors = []
        for adapter, weight in zip(adapters, weights, strict=True):
            if adapter not in layer.lotra_r:
                continue
            components = layer.get_components(adapter).map(lambda component: component.detach().double())
            scale = weight * layer.lotra_scaling[adapter]
            tensors.append(components._replace(core=scale * components.core))

        if not tensors:
            continue

        basis = max(tensor.shape[2] for tensor in tensors)  # without or with a residual slice
        tensors = [tensor.padded(basis) for tensor in tensors]
        dense = [tensor.dense() for tensor in tensors]
        sums[name] = torch.stack(dense).sum(0)
        total = direct_sum(tensors).orthogonal()
        if combination_type == "svd":
            modes = zip(*(tensor.ranks for tensor in tensors), strict=True)
            largest = tuple(map(max, modes))
            total = total.truncated(largest if ranks is None else check_ranks(ranks))
        totals[name] = total.balanced()

    first = configs[adapters[0]]
    train = first.train
    if any(configs[adapter].train != train for adapter in adapters):
        train = None
    # a sum has no factors of modes that become full
    if train is not None:
        if any(total._asdict().keys().isdisjoint(train) for total in totals.values()):
            train = None
    rank_pattern = {pattern_key(name): total.form for name, total in totals.items()}
    adapt_residual = any(configs[adapter].adapt_residual for adapter in adapters)

    configs[adapter_name] = LoTRAConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        rank_pattern=rank_pattern,
        target_modules=exact_targets(totals, model.model),
        adapt_residual=adapt_residual,
        storage=first.storage,
        train=train,
    )
    try:
        model.inject_adapter(model.model, adapter_name)
    except Exception:
        del configs[adapter_name]
        raise
    for network in linear_paths(model.model):
        _sum_paths(network, adapters, weights, adapter_name)
    errors = {}
    for name, layer in lotra_layers(model.model, adapter_name):
        layer.set_components(adapter_name, totals[name])
        stored = layer.get_delta_weight(adapter_name).detach().double()
        error = stored - sums[name]
        norm = sums[name].norm().item()
        errors[name] = error.norm().item() / (norm or 1.0)
    return errors


@torch.no_grad()
def _sum_paths(network: LinearPath, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Write the path of the base plus the weighted sum of its changes into the path of the new adapter."""
    base = network.path_of("__base__").state_dict()
    for name, total in network.path_of(adapter_name).state_dict().items():
        changes = [network.path_of(adapter).get_parameter(name) - base[name] for adapter in adapters]
        total.add_(sum(map(mul, weights, changes)))


def check_known(adapters: Iterable[str], configs: Mapping[str, object]) -> None:
    """Raise a ValueError if one of the adapters has no config."""
    if isinstance(adapters, str):
        raise ValueError(f"Adapters are named by a list of strings, got {adapters!r:.200}.")
    unknown = [adapter for adapter in adapters if adapter not in configs]
    if unknown:
        raise ValueError(f"Adapter(s) {unknown} not found, the model has {list(configs)}.")


def _check(
    configs: dict[str, LoTRAConfig],
    adapters,
    weights,
    adapter_name,
    combination_type,
    ranks,
) -> None:
    """Raise a ValueError for arguments of `add_weighted_adapter` that cannot be used."""
    check_known(adapters, configs)
    are_finite = not any(math.isnan(as_number(weight)) for weight in weights)
    if not adapters or len(weights) != len(adapters) or not are_finite:
        raise ValueError(f"`weights` must be a finite number for each of one or more adapters: {weights}, {adapters}.")
    if adapter_name in configs:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which the model has already: choose another name.")
    if combination_type not in COMBINATION_TYPES or (ranks is not None and combination_type != "svd"):
        raise ValueError(
            f"`combination_type` must be one of {COMBINATION_TYPES}, and with `ranks` 'svd', got {combination_type!r}."
        )
    whole = [adapter for adapter in adapters if {*(configs[adapter].modules_to_save or ())} - {PATH}]
    if whole:
        raise ValueError(f"Adapter(s) {whole} have `modules_to_save`, which have no sum: use `merge_and_unload`.")
