# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The record of the base that an adapter was made for, and its comparison with the model that it is loaded into."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..layers.registry import record_kind
from .layer import LoTRALayer, Target, lotra_layers


_ROW_LENGTH = 2048
# What a base that is cast, or computed anew, may differ by, as a share of its norm.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def record_layer(layer: LoTRALayer) -> dict[str, Any]:
    """Kind, shape, grid and parameters of a base layer, as `base_layers` of a file has them."""
    target = layer.base_before_merge()
    base_layer, spec, tensor = target
    return {
        "family": spec.family,
        "shape": list(tensor.shape),
        "has_residual": tensor.has_residual,
        **record_kind(spec, base_layer),
        **_sketches(target, layer.before_merge),
    }


def _sketches(target: Target, before_merge: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """The sketches of the grid and of all other parameters of a layer, of those that can be read here.

    Tensors on the meta device and shards cannot.
    """
    layer, spec, _ = target
    grid = spec.read_grid(layer)
    parameters = {
        name.replace("original_module.", ""): value  # of a part that `modules_to_save` has copied
        for name, value in layer.named_parameters()
        if name not in grid and "modules_to_save." not in name
    }
    found = {}
    for what, values in (("grid", grid), ("parameters", {**parameters, **before_merge})):
        tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
        if not any(tensor.is_meta or hasattr(tensor, "placements") for tensor in tensors):
            found[what] = sketch(values)
    return found


@torch.no_grad()
def sketch(values: Mapping[str, Any]) -> list[float]:
    """Return the norm of all numbers and eight projections of them: close values have close sketches."""
    square_sum, sums = 0.0, torch.zeros(8, dtype=torch.float64, device="cpu")
    for place, (_, value) in enumerate(sorted(values.items())):
        flat = torch.as_tensor(value, device="cpu").detach().flatten().cpu()
        flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        square_sum += flat.norm().item() ** 2
        rows = torch.nn.functional.pad(flat, (0, -len(flat) % _ROW_LENGTH)).view(-1, _ROW_LENGTH)
        with torch.autocast("cpu", enabled=False):
            projected = (rows @ _waves(0, _ROW_LENGTH).to(rows.dtype)).double()
        # 4,096 rows of waves for each tensor, so that exchanged tensors differ
        sums += (projected * _waves(place * 4096, place * 4096 + len(rows))).sum(0)
    return [square_sum**0.5, *sums.tolist()]


@lru_cache(maxsize=64)
def _waves(start: int, end: int) -> torch.Tensor:
    """Return cosines (end - start, 8) that look random: their frequencies rise with the place."""
    squares = torch.arange(start, end, dtype=torch.float64, device="cpu").square()
    frequencies = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0], device="cpu").double().sqrt()
    return 2**0.5 * torch.cos(squares.outer(frequencies))


def check_base(
    recorded: Iterable[Mapping[str, Any]],
    targets: Mapping[str, Target],
    model: nn.Module,
    choice: str | None,
    allows_other_shapes: bool = False,
) -> None:
    """Compares the base with the one that an adapter was saved with.

    Args:
        recorded: What the file says of each layer.
        targets: These layers in the model, in the same order.
        model: The model.
        choice: `check_base` of the configuration.
        allows_other_shapes: Whether layers may have other shapes (`ignore_mismatched_sizes`).

    Raises:
        ValueError: A layer is of another kind or shape, or its grid is another one.
    """
    differ: dict[str, list[str]] = {"grid": [], "parameters": []}
    before_merge = {name: layer.before_merge for name, layer in lotra_layers(model)}
    for (name, target), record in zip(targets.items(), recorded, strict=True):
        family, shape = record["family"], tuple(record["shape"])
        if family != target.spec.family or (shape != tuple(target.tensor.shape) and not allows_other_shapes):
            raise ValueError(
                f"The adapter is for another base: it was saved with a {family} layer {shape} at `{name}`, and this "
                f"model has a {target.spec.family} layer {tuple(target.tensor.shape)}."
            )
        sketches = {} if choice == "ignore" else _sketches(target, before_merge.get(name, {}))
        dtype = target.tensor.get_parameter(target.layer).dtype
        for what, now in sketches.items():
            if what in record and shape == tuple(target.tensor.shape):
                # the norm of a difference is the standard deviation of its projections: four of them
                before, limit = record[what], 4 * max(now[0], 1e-12) * _ROUNDING.get(dtype, 2e-2)
                if len(before) != len(now) or any(abs(a - b) > limit for a, b in zip(before, now, strict=True)):
                    differ[what].append(name)
    for what, names in differ.items():
        if names:
            message = f"The {what} of {', '.join(names)} did not match the base that this adapter was trained on"
            if choice == "error" or (choice is None and what == "grid"):
                raise ValueError(f'{message}. Load that base, or pass `check_base="ignore"`.')
            warnings.warn(f'{message}. `check_base="error"` refuses such a base, `"ignore"` is silent.', stacklevel=2)
