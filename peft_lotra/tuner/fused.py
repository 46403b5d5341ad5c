# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The output of an adapted layer by its formula, without running the base layer.

The frozen coefficients need no gradient then, the update contracts as two thin products, and B-splines on a uniform
grid are evaluated in closed form.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from ..kan.basis import SPLINE_ORDERS, UniformGrid
from ..kan.product import spline_product
from ..layers.coefficients import CoefficientTensor, get_or_none
from ..layers.registry import KANLayerSpec, is_built_in
from ..modules.calls import call_with_parameters
from ..tucker import Update, expand_inputs


LowRank = tuple[torch.Tensor, torch.Tensor]  # left (out, r) and right (r, in, basis [+ 1])

# What formula and layer may differ by, as a share of the largest output. In float64 an adapted layer starts as its
# base bit for bit.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 0.0}
_ROWS = 48  # points at which formula and layer are compared
# The formula that was found, by class, and by what decides how a layer of it runs.
_FOUND: WeakKeyDictionary[type, dict[Any, Formula | None]] = WeakKeyDictionary()
_warned: set[str] = set()  # kinds of layers whose registered functions were found wrong


class Formula(NamedTuple):
    """basis(x) . (scale * coefficients) + activation(x) . residual + bias.

    Attributes:
        spec, tensor: The kind of the layer, and where it keeps its coefficients.
        closed_form: Whether the basis is evaluated by the kind's `splines`, else by its `basis`.
        leading_shape: Whether inputs of any leading shape are taken, and outputs keep it; None if it is not known.
    """

    spec: KANLayerSpec
    tensor: CoefficientTensor
    closed_form: bool
    leading_shape: bool | None = None

    def accepts(
        self,
        base_layer: nn.Module,
        stored: torch.Tensor,
        updates: Sequence[Update],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> bool:
        """Whether the formula may evaluate a call; if not, the base layer runs."""
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, torch.Tensor) or x.is_nested or x.is_meta or x.layout != torch.strided:
            return False
        if hasattr(stored, "placements") or torch.is_autocast_enabled(x.device.type):  # a DTensor
            return False
        fits = x.shape[-1:] == self.tensor.shape[1:2] and (x.dim() == 2 or bool(self.leading_shape))
        same = x.dtype == stored.dtype and all(update.tensor.core.dtype == x.dtype for update in updates)
        return fits and same and not runs_more_than_its_class(base_layer)

    # no property or sum of a generator: compiled code does not know them of tuples
    def output(self, base_layer: nn.Module, updates: Sequence[Update], x: torch.Tensor) -> torch.Tensor:
        """The output (..., out) of the base layer with the updates for inputs x (..., in).

        The thin products cost 2 R (I K + O) multiplications for each row in the backward pass, R the sum of the
        updates' ranks in the output mode. To form the update, and the gradient of the whole coefficient tensor, costs
        O I K.
        """
        out, in_features, basis = self.tensor.shape
        coefficients, residual = self.tensor.read_parts(base_layer)
        scale = self.spec.scale(base_layer) if self.spec.scale is not None else None
        pairs = [
            (left, expand_inputs(core if isinstance(factor, float) and factor == 1.0 else factor * core, *factors))
            for factor, (core, left, *factors) in updates
        ]
        rank, low_rank = sum([left.shape[1] for left, _ in pairs]), None
        if scale is None and 2 * rank * (in_features * basis + out) < out * in_features * basis:
            if self.tensor.has_residual:  # an update without the residual branch adds zero to it
                pairs = [(left, F.pad(r, (0, 1)) if r.shape[-1] == basis else r) for left, r in pairs]
            low_rank = torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs])
        else:
            for left, right in pairs:
                flat = right[..., :basis].flatten(1)
                coefficients = torch.addmm(coefficients.flatten(1), left, flat).view(out, in_features, basis)
                if residual is not None and right.shape[-1] > basis:
                    residual = torch.addmm(residual, left, right[..., basis])
        if scale is not None:
            coefficients = coefficients * scale.unsqueeze(-1)
        y = self.evaluate(base_layer, x.reshape(-1, in_features), coefficients, residual, low_rank)
        return y.view(*x.shape[:-1], out)

    def evaluate(
        self,
        base_layer: nn.Module,
        x: torch.Tensor,
        coefficients: torch.Tensor,
        residual: torch.Tensor | None,
        update: LowRank | None,
    ) -> torch.Tensor:
        """The output (rows, out) for x (rows, in), of scaled coefficients (out, in, basis), with an update of both."""
        spec, basis = self.spec, coefficients.shape[-1]
        of_splines = None if update is None else (update[0], update[1][..., :basis])
        if self.closed_form:
            assert spec.splines is not None
            grid = spec.splines(base_layer)
            assert grid is not None
            y = spline_product(x, *grid, coefficients, of_splines)
        else:
            assert spec.basis is not None
            functions = spec.basis(base_layer, x).flatten(1)
            y = functions.new_zeros(functions.shape[0], len(coefficients))  # `len` would fix the batch of an export
            flat = None if of_splines is None else (of_splines[0], of_splines[1].flatten(1))
            y = addmm(y, functions, coefficients.flatten(1), flat)
        if residual is not None:
            assert spec.activation is not None
            of_residual = None if update is None else (update[0], update[1][..., -1])
            y = addmm(y, spec.activation(base_layer, x), residual, of_residual)
        bias = get_or_none(base_layer, spec.bias or "")
        return y if bias is None else y + bias


def runs_more_than_its_class(layer: nn.Module) -> bool:
    """Whether running a layer does more, or other things, than the `forward` of its class."""
    return "forward" in vars(layer) or bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


@torch.no_grad()
def find_formula(base_layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> Formula | None:
    """The formula that gives what the layer computes in its present mode; `None` if there is none.

    It is found once for layers of a class, shapes and settings, closed form first, and compared with each layer. The
    layer and the random generators are left as they were.
    """
    stored = tensor.get_parameter(base_layer)
    described = spec.basis is not None or spec.splines is not None
    described = described and not (tensor.has_residual and spec.activation is None)  # as for Slim layers
    is_dense = spec.linear and not tensor.shape[3:]
    if not (described and is_dense) or stored.is_meta or stored.dtype not in _TOLERANCE:
        return None
    if runs_more_than_its_class(base_layer):
        return None
    if spec.is_of_this_package(base_layer):
        return Formula(spec, tensor, closed_form=True, leading_shape=True)
    grid = spec.read_grid(base_layer)
    shapes = [value.shape if isinstance(value, torch.Tensor) else value for value in grid.values()]
    key = (spec.family, tensor.shape, base_layer.training, stored.dtype, *shapes)
    known = _FOUND.setdefault(type(base_layer), {})
    tried = [known[key]] if key in known else [Formula(spec, tensor, closed) for closed in (True, False)]
    devices = [stored.device] if stored.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(stored.device.type, enabled=False):
        found = (_verified(it._replace(spec=spec, tensor=tensor), base_layer) for it in tried if it is not None)
        formula = next((it for it in found if it is not None), None)
    known.setdefault(key, formula)
    return formula


def _verified(formula: Formula, base_layer: nn.Module) -> Formula | None:
    """The formula, if it gives what the layer computes at points over the grid and around it."""
    spec, tensor = formula.spec, formula.tensor
    coefficients, residual = tensor.read_parts(base_layer)
    try:
        ends = _grid_ends(base_layer, formula)
        if ends is None:
            return None
        points = _probe_points(*ends, coefficients)
        # with copies of the buffers, which a layer may update as it runs
        buffers = {name: buffer.clone() for name, buffer in base_layer.named_buffers()}
        expected = call_with_parameters(base_layer, buffers, base_layer, (points,), {})
    except Exception:  # foreign code, which wants more arguments, or other shapes
        return None
    try:
        scale = spec.scale(base_layer) if spec.scale is not None else None
        scaled = coefficients if scale is None else coefficients * scale.unsqueeze(-1)
        result = formula.evaluate(base_layer, points, scaled, residual, None)
        problem = None if _agree(result, expected) else "does not give what the layer computes"
    except Exception as error:  # foreign code
        problem = f"raised {type(error).__name__}: {error}"
    if problem is None and formula.leading_shape is None:
        try:
            stacked = call_with_parameters(base_layer, buffers, base_layer, (points.unflatten(0, (2, -1)),), {})
            return formula._replace(leading_shape=_agree(stacked.flatten(0, 1), expected))
        except Exception:  # it takes two dimensions alone
            return formula._replace(leading_shape=False)
    if problem is None:
        return formula
    if not formula.closed_form and not is_built_in(spec) and spec.family not in _warned:
        _warned.add(spec.family)
        warnings.warn(
            f"`basis` of the kind of layer {spec.family!r}, with its `activation`, `scale` and `bias`, {problem}. "
            "Adapted layers run their base layer, which may be slower: correct it in `register_kan_layer`.",
            stacklevel=2,
        )
    return None


def _agree(first: Any, second: Any) -> bool:
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False
    if first.shape != second.shape or first.dtype != second.dtype or not torch.isfinite(second).all():
        return False
    return bool((first - second).abs().max() <= _TOLERANCE[first.dtype] * second.abs().max())


def _grid_ends(base_layer: nn.Module, formula: Formula) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both ends of the grid, as numbers or (in,), or `None` if the basis of this layer cannot be evaluated so."""
    spec = formula.spec
    if formula.closed_form:
        splines = spec.splines(base_layer) if spec.splines is not None else None
        if not isinstance(splines, UniformGrid) or splines.spline_order not in SPLINE_ORDERS or splines.grid_size < 1:
            return None
        return (splines.low, splines.high) if splines.num_basis == formula.tensor.shape[2] else None
    if spec.basis is None or formula.tensor.get_parameter(base_layer).dtype != torch.float32:
        return None
    grids = [v.flatten() for v in spec.read_grid(base_layer).values() if isinstance(v, torch.Tensor) and v.numel()]
    return torch.cat(grids or [torch.tensor([-2.0, 2.0], device="cpu")]).aminmax()


def _probe_points(low: Any, high: Any, coefficients: torch.Tensor) -> torch.Tensor:
    """Points (rows, in) over the grid and its length on either side."""
    width = coefficients.shape[1]
    # steps of the golden ratio, so that no input repeats another's points
    share = torch.arange(_ROWS * width, dtype=torch.float64, device="cpu").mul(0.6180339887498949).frac()
    device = coefficients.device
    low, high = (torch.as_tensor(end, device=device).to(coefficients).expand(width) for end in (low, high))
    return torch.lerp(low, high, (share.view(_ROWS, width) * 3 - 1).to(coefficients))


def addmm(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, update: LowRank | None) -> torch.Tensor:
    """y (N, O) + x (N, I) times (weight (O, I) + left (O, r) right (r, I))^T. A weight without gradient costs none."""
    if update is None:
        return torch.addmm(y, x, weight.t())
    left, right = update
    return torch.addmm(y, x, weight.t()) + F.linear(F.linear(x, right), left)
