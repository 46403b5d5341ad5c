# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Sums of adapters: a new adapter whose update is, or comes close to, the weighted sum of the updates of others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTuner

from ..tucker import Tucker, cap_ranks, check_ranks, tucker
from .layer import LoTRALayer
from .targets import exact_targets, pattern_key


COMBINATION_TYPES = ("cat", "linear", "svd")

# core and factors of one adapter, in float64, the core times the adapter's scale and weight


def add_weighted_adapter(
    model: BaseTuner,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: Literal["cat", "linear", "svd"] = "cat",
    ranks: int | tuple[int, int, int] | None = None,
) -> dict[str, float]:
    """Adds an adapter that sums up others with weights; `LoTRAModel.add_weighted_adapter`.

    Each adapter counts with the scale that it has now. The new one has an alpha of 1; as any other that is added, it
    is not active. A layer that only some of the adapters have is summed over those.

    - `"cat"` is exact: the cores become the blocks of one core, the factors stand side by side, the ranks add. Ranks
      above the sizes of their modes are brought down to them without loss.
    - `"linear"` averages the components themselves, and multiplies the core by the sum of the weights. It costs no
      rank, and is exact where the factors agree; the adapters must have equal ranks. Factors that were trained
      independently have nothing in common, and the sum is lost: errors of 0.7 to 0.95 were measured on two adapters
      for rotated digits, of gradient or random start, on KANs of three libraries.
    - `"svd"` is the best approximation of ranks `ranks` that HOOI finds. On the same adapters, of ranks (8, 8, 4), the
      error was 0.14 to 0.28 at ranks (8, 8, 4) and 0.03 to 0.13 at (12, 12, 6).

    Args:
        model ([`LoTRAModel`]): The model.
        adapters (`list[str]`): The adapters to sum up.
        weights (`list[float]`): Their weights, positive or negative.
        adapter_name (`str`): The name of the new adapter.
        combination_type (`str`): `"cat"`, `"linear"` or `"svd"`.
        ranks (`int` or `tuple[int, int, int]`, *optional*): For `"svd"`: the ranks of the new adapter. By default the
            largest that one of the adapters has, in each layer and mode.

    Returns:
        `dict[str, float]`: By layer, the norm of (the new update - the sum), as a share of the norm of the sum;
        measured on the adapter as it is stored. 0 to rounding for `"cat"`.

    Raises:
        ValueError: An adapter is unknown or has `modules_to_save`, which have no sum; the numbers of adapters and
            weights differ, or a weight is not finite; the name exists; for `"linear"`, ranks differ or the weights sum
            up to 0; `ranks` without `"svd"`. Nothing is changed then.
    """
    _check(model, adapters, weights, adapter_name, combination_type, ranks)
    layers = {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, LoTRALayer) and any(adapter in module.lotra_core for adapter in adapters)
    }
    components, sums = {}, {}
    for name, layer in layers.items():
        here = [(adapter, w) for adapter, w in zip(adapters, weights, strict=True) if adapter in layer.lotra_core]
        rows = max(len(layer.lotra_factor_basis[adapter]) for adapter, _ in here)  # without or with a residual slice
        parts = [_read(layer, adapter, weight, rows) for adapter, weight in here]
        if combination_type == "linear":
            components[name] = _average(name, parts, [weight for _, weight in here])
        else:
            components[name] = _concatenate(parts)
        sums[name] = sum(part.dense() for part in parts)
        if combination_type == "svd":
            largest = tuple(max(sizes) for sizes in zip(*(part.ranks for part in parts), strict=True))
            components[name] = _truncate(components[name], largest if ranks is None else check_ranks(ranks))

    config = replace(
        model.peft_config[adapters[0]],
        alpha=1.0,
        rank_pattern={pattern_key(name): sum_.ranks for name, sum_ in components.items()},
        alpha_pattern={},
        target_modules=exact_targets(components, model.model),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        adapt_residual=any(model.peft_config[adapter].adapt_residual for adapter in adapters),
        init_weights=True,  # "gradient" would ask for a gradient
        base_layers=None,
    )
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except Exception:
        del model.peft_config[adapter_name]
        raise
    errors = {}
    with torch.no_grad():
        for name, sum_ in components.items():
            layers[name].set_components(adapter_name, sum_)
            missed = (layers[name].get_delta_weight(adapter_name).double() - sums[name]).norm().item()
            norm = sums[name].norm().item()
            errors[name] = missed / norm if norm else missed
    return errors


def _check(
    model: BaseTuner,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    ranks: int | tuple[int, int, int] | None,
) -> None:
    known = list(model.peft_config)
    if not adapters or isinstance(adapters, str):
        raise ValueError(f"`adapters` must be a list of one or more adapter names, got {adapters!r}.")
    unknown = [adapter for adapter in adapters if adapter not in known]
    if unknown:
        raise ValueError(f"Adapter(s) {unknown} not found, the model has {known}.")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` must be one finite number for each of the {len(adapters)} adapters: {weights}.")
    if adapter_name in known or "." in adapter_name:
        raise ValueError(
            f"`adapter_name` is {adapter_name!r}, which must not contain a dot nor be one of the adapters that the "
            f"model has: {known}. Choose another name, or delete that adapter first (`delete_adapter`)."
        )
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"`combination_type` must be one of {COMBINATION_TYPES}, got {combination_type!r}.")
    if ranks is not None and combination_type != "svd":
        raise ValueError(f'`ranks` are for `combination_type="svd"`, got {ranks} for {combination_type!r}.')
    if ranks is not None:
        check_ranks(ranks)
    whole = [adapter for adapter in adapters if model.peft_config[adapter].modules_to_save]
    if whole:
        raise ValueError(
            f"Adapter(s) {whole} have `modules_to_save`, whole modules that cannot be summed up. Merge one adapter "
            "into the base model instead (`merge_and_unload`)."
        )


def _read(layer: LoTRALayer, adapter: str, weight: float, basis: int) -> Tucker:
    components = layer.get_components(adapter).map(lambda part: part.detach().double()).padded(basis)
    return components._replace(core=weight * layer.lotra_scaling[adapter] * components.core)


def _concatenate(parts: Sequence[Tucker]) -> Tucker:
    """The exact sum: a core of blocks. Ranks above the sizes of their modes are brought down to the sizes."""
    core = parts[0].core.new_zeros([sum(sizes) for sizes in zip(*(part.ranks for part in parts), strict=True)])
    start = (0, 0, 0)
    for part in parts:
        end = tuple(map(sum, zip(start, part.ranks, strict=True)))
        core[tuple(map(slice, start, end))] = part.core
        start = end
    factors = [torch.cat(columns, dim=1) for columns in zip(*(part.factors for part in parts), strict=True)]
    return Tucker(core, *factors).orthogonal().balanced()


def _average(name: str, parts: Sequence[Tucker], weights: Sequence[float]) -> Tucker:
    """The factors averaged by weight, with the sum of the cores, which are weighted already."""
    shapes = [part.ranks for part in parts]
    total = sum(weights)
    if len(set(shapes)) > 1:
        raise ValueError(
            f'`combination_type="linear"` averages components, but the ranks at `{name}` differ: {shapes}. Use "cat" '
            'or "svd".'
        )
    if total == 0:
        raise ValueError(
            f'`combination_type="linear"` is an average, but the weights at `{name}` sum up to 0: {weights}. Use '
            '"cat" or "svd".'
        )
    factors = [
        sum(weight / total * factor for weight, factor in zip(weights, same, strict=True))
        for same in zip(*(part.factors for part in parts), strict=True)
    ]
    return Tucker(sum(part.core for part in parts), *factors)


def _truncate(components: Tucker, r: int | tuple[int, int, int]) -> Tucker:
    """The best approximation of ranks `r`, found on the core alone, since the factors are orthogonal."""
    core, *factors = components.orthogonal()
    small, *rotations = tucker(core, cap_ranks(r, tuple(core.shape)))
    return Tucker(small, *(factor @ rotation for factor, rotation in zip(factors, rotations, strict=True))).balanced()
