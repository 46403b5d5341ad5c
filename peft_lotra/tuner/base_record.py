# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The record of the base that an adapter was trained on, and its comparison with the model that it is loaded into."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..layers.kinds import is_built_in
from .config import LoTRAConfig
from .layer import LoTRALayer, Target, Targets, Tensors, lotra_layers


_ROW_LENGTH = 2048
# the share of its norm by which a base may differ that was cast, or computed on another machine
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 0.005, torch.bfloat16: 0.02}
_PRIMES = (2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0)


def record_layer(layer: LoTRALayer) -> dict[str, Any]:
    """Return the kind, shape, grid and parameters of a base layer, as a file has them in `base_layers`."""
    target = layer.base_target()
    base_layer, spec, tensor = target
    record = {"kind": spec.kind, "shape": list(tensor.shape), "has_residual": tensor.has_residual}
    if not is_built_in(spec):
        record["description"] = spec.describe(base_layer)
    return record | _sketches(target, layer.before_merge)


def _sketches(target: Target, before_merge: Tensors) -> dict[str, list[float]]:
    """Return the sketch of the grid, and that of all other parameters; none of shards or on the meta device."""
    layer, spec, _ = target
    grid = spec.read_grid(layer)
    parameters = {}
    for name, value in layer.named_parameters():
        if name not in grid and "modules_to_save." not in name:
            name = name.replace("original_module.", "")  # of a module that `modules_to_save` has copied
            parameters[name] = before_merge.get(name, value)
    sketches = {}
    for field, values in {"grid": grid, "parameters": parameters}.items():
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        if not any(tensor.is_meta or hasattr(tensor, "placements") for tensor in tensors):
            sketches[field] = sketch(values)
    return sketches


@torch.no_grad()
def sketch(values: Mapping[str, Any]) -> list[float]:
    """Return the norm of all values and eight projections of them: close values have close sketches."""
    norms = []
    projections = torch.zeros(8, dtype=torch.float64, device="cpu")
    for index, (_, value) in enumerate(sorted(values.items())):
        flat = torch.as_tensor(value, device="cpu").flatten()
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.float()
        norms.append(flat.norm().item())
        missing = -len(flat) % _ROW_LENGTH
        rows = pad(flat, (0, missing)).view(-1, _ROW_LENGTH)
        column_waves = _waves(0, _ROW_LENGTH).to(rows.dtype)
        with torch.autocast("cpu", enabled=False):
            projected = rows @ column_waves
        # 4,096 rows of waves for each tensor, so that exchanged tensors differ
        first = index * 4096
        row_waves = _waves(first, first + len(rows))
        projections += (projected.double() * row_waves).sum(0)
    return [math.hypot(*norms), *projections.tolist()]


@lru_cache(maxsize=64)
def _waves(start: int, end: int) -> Tensor:
    """Return cosines (end - start, 8) of rising frequency, which look random."""
    squares = torch.arange(start, end, dtype=torch.float64, device="cpu").square()
    frequencies = torch.tensor(_PRIMES, dtype=torch.float64, device="cpu").sqrt()
    return 2**0.5 * torch.cos(squares.outer(frequencies))


def check_base(config: LoTRAConfig, targets: Targets, model: nn.Module) -> None:
    """Compare the base with the one that an adapter was trained on.

    Args:
        config: The configuration of the adapter, from its file.
        targets: The layers of the file in the model, in the same order.
        model: The model.

    Raises:
        ValueError: A layer has another kind or shape, or by `config.check_base` another grid or other parameters.
    """
    choice = config.check_base
    records = config.base_layers or {}
    different = {"grid": [], "parameters": []}
    before_merge = {name: layer.before_merge for name, layer in lotra_layers(model)}
    for (name, target), record in zip(targets.items(), records.values(), strict=True):
        recorded_kind = record["kind"], tuple(record["shape"])
        kind = target.spec.kind, tuple(target.tensor.shape)
        if recorded_kind != kind:
            if config.allows_other_shapes and recorded_kind[0] == kind[0]:
                continue
            raise ValueError(
                f"The adapter is for another base: it was saved with the layer {recorded_kind} at `{name}`, and this "
                f"model has {kind}."
            )

        if choice == "ignore":
            continue
        dtype = target.tensor.get_parameter(target.layer).dtype
        rounding = _ROUNDING.get(dtype, 0.02)
        sketches = _sketches(target, before_merge.get(name, {}))
        for field, present in sketches.items():
            # the norm of a difference is the standard deviation of its projections, of which four are allowed
            allowed = 4 * rounding * max(present[0], 1e-12)
            recorded = record.get(field, present)
            differences = [abs(a - b) for a, b in zip(recorded, present, strict=False)]
            is_close = all(difference <= allowed for difference in differences)
            if not is_close or len(recorded) != len(present):
                different[field].append(name)

    for field, names in different.items():
        if not names:
            continue
        message = f"The {field} of {', '.join(names)} did not match the base that this adapter was trained on"
        if choice == "error" or (choice is None and field == "grid"):
            raise ValueError(f'{message}. Load that base, or pass `check_base="ignore"`.')
        warnings.warn(f'{message}. `check_base="error"` refuses such a base, `"ignore"` is silent.', stacklevel=2)
