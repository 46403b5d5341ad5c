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

"""The fast path of an adapted layer: its formula, evaluated without running the base layer.

A family that says how its basis is evaluated computes basis(x) . (scale * coefficients) + activation(x) . residual +
bias. In this form the frozen coefficients need no gradient, the update contracts as two thin products, and B-splines
on a uniform grid are evaluated in closed form, whatever the base layer does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..families.coefficients import get_or_none
from ..kan.basis import SPLINE_ORDERS
from ..kan.product import spline_product
from ..low_rank import low_rank_addmm


if TYPE_CHECKING:
    from ..families.coefficients import CoefficientTensor
    from ..families.registry import KANLayerSpec
    from .layer import LoTRALayer

# What formula and layer may differ by, as a share of the largest output: in double precision not at all, since there
# an adapted layer starts as its base bit for bit, whatever the family. Only our own layer's formula passes that.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 0.0}


@dataclass(frozen=True)
class Formula:
    """How a layer can be evaluated without running it.

    Attributes:
        closed_form (`bool`): By its `splines`, else by its `basis`.
        leading_shape (`bool`): Whether inputs of any leading shape are taken, and outputs keep it.
    """

    closed_form: bool
    leading_shape: bool


def find_formula(base_layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> Formula | None:
    """The formula that gives what the layer computes, closed form first; `None` if there is none.

    The two are compared on points over the grid and around it. Nothing of the layer is changed, and no random numbers
    are drawn from the global generators.
    """
    coefficients = tensor.get_parameter(base_layer)
    unusable = coefficients.is_meta or coefficients.dtype not in _TOLERANCE or has_hooks(base_layer)
    if unusable or (spec.basis is None and spec.splines is None):
        return None
    devices = [coefficients.device] if coefficients.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        for closed_form in (True, False) if coefficients.dtype == torch.float32 else (True,):
            try:
                points = _probe_points(base_layer, spec, tensor, closed_form)
                if points is None:
                    continue
                expected = _run(base_layer, points)
                result = _evaluate(base_layer, spec, points, *tensor.read_parts(base_layer), None, closed_form)
                if not _agree(result, expected):
                    continue
            except Exception:  # whatever keeps a foreign layer's formula from being evaluated
                continue
            try:
                stacked = points.unflatten(0, (2, -1))
                leading_shape = _agree(_run(base_layer, stacked), result.unflatten(0, (2, -1)))
            except Exception:  # the layer takes two-dimensional inputs only
                leading_shape = False
            return Formula(closed_form, leading_shape)
    return None


def _run(base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    # with copies of the buffers, which a layer may update as it runs
    buffers = {name: buffer.clone() for name, buffer in base_layer.named_buffers()}
    return torch.func.functional_call(base_layer, buffers, (x,))


def _agree(first: torch.Tensor, second: torch.Tensor) -> bool:
    if not isinstance(second, torch.Tensor) or first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool((first - second).abs().max() <= _TOLERANCE[first.dtype] * second.abs().max())


def _probe_points(base_layer, spec, tensor, closed_form: bool) -> torch.Tensor | None:
    """Points (48, in) over the grid and a third of its length on either side, other ones for each input."""
    coefficients, width = tensor.get_parameter(base_layer), tensor.shape[1]
    like = {"dtype": coefficients.dtype, "device": coefficients.device}
    if closed_form:
        splines = spec.splines(base_layer) if spec.splines is not None else None
        if splines is None or splines.spline_order not in SPLINE_ORDERS or splines.grid_size < 1:
            return None
        low, high = splines.low.to(**like), splines.high.to(**like)
    elif spec.basis is None:
        return None
    else:
        grids = spec.read_grid(base_layer).values()
        grids = [grid for grid in grids if isinstance(grid, torch.Tensor) and grid.numel()]
        low = torch.stack([grid.min() for grid in grids]).min() if grids else torch.tensor(-2.0)
        high = torch.stack([grid.max() for grid in grids]).max() if grids else torch.tensor(2.0)
        low, high = low.to(**like), high.to(**like)
    # steps of the golden ratio, so that no input repeats another's points
    share = torch.arange(48 * width, dtype=torch.float64, device="cpu").mul(0.6180339887498949).frac().view(48, width)
    return torch.lerp(low.expand(width), high.expand(width), share.to(**like) * 5 / 3 - 1 / 3)


def can_take_fast_path(layer: LoTRALayer, adapters: list[str], args: tuple, kwargs: dict) -> bool:
    """Whether a call of the layer with these adapters may be evaluated by its formula."""
    formula, base_layer = layer.lotra_formula, layer.base_layer
    if formula is None or not adapters or len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return False
    x, coefficients = args[0], layer.lotra_tensor.get_parameter(base_layer)
    return (
        x.dim() > 0
        and (x.dim() == 2 or formula.leading_shape)
        and x.shape[-1] == layer.in_features  # else the base layer says what is wrong
        and all(tensor.dtype == x.dtype for tensor in (coefficients, *(layer.lotra_core[name] for name in adapters)))
        and all(_is_stored(base_layer, name) for name in layer.lotra_tensor.parameters)  # else the universal path does
        and not x.is_meta
        and not torch.is_autocast_enabled(x.device.type)
        and not has_hooks(base_layer)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether running the module does more than its `forward`."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _is_stored(layer: nn.Module, name: str) -> bool:
    """Whether a parameter is there as it is, neither computed (parametrizations) nor in parts (DTensor)."""
    path, _, attribute = name.rpartition(".")
    owner = layer.get_submodule(path)
    stored = attribute in owner._parameters or attribute in owner.__dict__
    return stored and not hasattr(getattr(owner, attribute), "placements")


def fast_forward(layer: LoTRALayer, adapters: list[str], x: torch.Tensor, dropout: bool) -> torch.Tensor:
    """The output (..., out) of an adapted layer for inputs (..., in), by its formula.

    The thin products cost 2 R (I K + O) multiplications for each row in the backward pass, R the sum of the adapters'
    ranks in the output mode; to form the update, and the gradient of the whole coefficient tensor, costs O I K.
    """
    out_features, in_features, num_basis = layer.lotra_tensor.shape
    total_rank = sum(layer.lotra_r[name][0] for name in adapters)
    thin = 2 * total_rank * (in_features * num_basis + out_features) < out_features * in_features * num_basis
    spec, tensor, base_layer = layer.lotra_spec, layer.lotra_tensor, layer.base_layer
    if thin and (spec.scale is None or spec.scale(base_layer) is None):
        parts = tensor.read_parts(base_layer)
        updates = [layer.get_low_rank_update(name, dropout) for name in adapters]
        left = torch.cat([left for left, _ in updates], dim=1)
        right = torch.cat([_with_residual(right, num_basis, parts[1] is not None) for _, right in updates])
        update = left, right
    else:
        parts = tensor.read_parts(base_layer, layer.parameters_in_force(adapters, dropout))
        update = None
    closed_form = layer.lotra_formula.closed_form
    y = _evaluate(base_layer, spec, x.reshape(-1, in_features), *parts, update, closed_form)
    return y.view(*x.shape[:-1], out_features)


def _with_residual(right: torch.Tensor, num_basis: int, residual: bool) -> torch.Tensor:
    return F.pad(right, (0, 1)) if residual and right.shape[-1] == num_basis else right


def _evaluate(
    base_layer: nn.Module,
    spec: KANLayerSpec,
    x: torch.Tensor,
    coefficients: torch.Tensor,
    residual: torch.Tensor | None,
    update: tuple[torch.Tensor, torch.Tensor] | None,
    closed_form: bool,
) -> torch.Tensor:
    """basis(x) . (scale * coefficients) + activation(x) . residual + bias.

    x (N, in), coefficients (out, in, basis), residual (out, in) if there is one, and an update of both: left (out, r)
    and right (r, in, basis), or (r, in, basis + 1) with the residual branch.
    """
    num_basis = coefficients.shape[-1]
    left, right = (None, None) if update is None else update
    scale = spec.scale(base_layer) if spec.scale is not None else None
    if scale is not None:
        coefficients = coefficients * scale.unsqueeze(-1)
    if closed_form:
        spline_update = None if update is None else (left, right[..., :num_basis])
        y = spline_product(x, *spec.splines(base_layer), coefficients, spline_update)
    else:
        basis = spec.basis(base_layer, x).flatten(1)
        y = basis.new_zeros(basis.shape[0], coefficients.shape[0])
        y = _addmm(
            y, basis, coefficients.flatten(1), left, None if update is None else right[..., :num_basis].flatten(1)
        )
    if residual is not None:
        y = _addmm(y, spec.activation(base_layer, x), residual, left, None if update is None else right[..., -1])
    bias = get_or_none(base_layer, spec.bias) if spec.bias is not None else None
    return y if bias is None else y + bias


def _addmm(y, x, weight, left, right):
    return torch.addmm(y, x, weight.t()) if left is None else low_rank_addmm(y, x, weight, left, right)
