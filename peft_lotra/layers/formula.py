# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The fast path: the output of an adapted layer by a formula, without running the base layer.

B-splines on a uniform grid are evaluated in closed form. Where it costs less, the update stays in two thin products
and the coefficients need no gradient; else it is added to them first, as in small layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from ..kan.basis import SPLINE_ORDERS, UniformGrid
from ..kan.product import spline_product
from ..modules.calls import call_with_parameters, runs_more_than_its_class, without_autocast
from ..tucker import Update, expand_inputs
from .coefficients import CoefficientTensor, get_or_none
from .compare import agree, is_linear, points_around
from .probe import moved, remembered
from .registry import KANLayerSpec


# What formula and layer may differ by, as a share of the largest output. In float64 an adapted layer starts as its
# base bit for bit.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 0.0}
# What their values and slopes in float64 may differ by: knots in float32 are not exactly uniform.
_SLOPE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
# The formula that was found, by class, and by what decides how a layer of it runs: in closed form or not.
_known_formulas: WeakKeyDictionary[type, dict[Any, bool]] = WeakKeyDictionary()


class ThinUpdate(NamedTuple):
    """An update of the coefficients, left x right, as two matrices with few columns and rows.

    Attributes:
        left: (out, r).
        right: (r, in, basis).
        right_of_residual: (r, in), where the layer has a residual branch.
    """

    left: torch.Tensor
    right: torch.Tensor
    right_of_residual: torch.Tensor | None


class Formula(NamedTuple):
    """basis(x) . (edge_scale * coefficients) + activation(x) . residual + bias.

    Attributes:
        spec, tensor: The kind of the layer, and where it keeps its coefficients.
        closed_form: Whether the basis is evaluated by the kind's `splines`, else by its `basis`.
    """

    # methods, no properties, and no sum of a generator: compiled code does not know them of tuples

    spec: KANLayerSpec
    tensor: CoefficientTensor
    closed_form: bool

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
        # layers of other libraries may flatten the leading dimensions
        fits = x.shape[-1:] == self.tensor.shape[1:2] and (x.dim() == 2 or self.spec.is_of_this_package(base_layer))
        same = x.dtype == stored.dtype and all(update.tensor[0].dtype == x.dtype for update in updates)
        return fits and same and not runs_more_than_its_class(base_layer)

    def output(self, base_layer: nn.Module, updates: Sequence[Update], x: torch.Tensor) -> torch.Tensor:
        """The output (..., out) of the base layer with the updates for inputs x (..., in).

        The update stays in factors where 2 R (I K + O) < O I K, R the sum of its ranks in the output mode, and there
        is no edge scale: the multiplications for each row in the backward pass by two thin products, and with the
        gradient of all coefficients.
        """
        out, in_features, basis = self.tensor.shape
        coefficients, residual = self.tensor.read_parts(base_layer)
        scale = self.spec.scale(base_layer)
        lefts, rights = [], []
        for gain, (core, left, *factors) in updates:
            right = expand_inputs(core if isinstance(gain, float) and gain == 1.0 else gain * core, *factors)
            lefts.append(left)
            # an update without the residual branch adds zero to it
            rights.append(right if residual is None or right.shape[-1] > basis else F.pad(right, (0, 1)))
        left, right = (
            torch.cat(parts, dim) if len(parts) > 1 else parts[0] for parts, dim in ((lefts, 1), (rights, 0))
        )
        right_of_residual = None
        if residual is not None:
            right, last = right.split([basis, 1], dim=-1)
            right_of_residual = last.squeeze(-1)
        update = ThinUpdate(left, right, right_of_residual)
        if scale is not None or 2 * len(right) * (in_features * basis + out) >= out * in_features * basis:
            coefficients = torch.addmm(coefficients.flatten(1), left, right.flatten(1)).view(self.tensor.shape)
            if residual is not None and right_of_residual is not None:
                residual = torch.addmm(residual, left, right_of_residual)
            update = None
        if scale is not None:
            coefficients = coefficients * scale.unsqueeze(-1)
        rows = x if x.dim() == 2 else x.reshape(-1, in_features)
        y = self.evaluate(base_layer, rows, coefficients, residual, update)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], out)  # a view would cost compiled code a tenth of a step

    def of_base(self, base_layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The output (rows, out) of the base layer for x (rows, in), without updates."""
        coefficients, residual = self.tensor.read_parts(base_layer)
        scale = self.spec.scale(base_layer)
        if scale is not None:
            coefficients = coefficients * scale.unsqueeze(-1)
        return self.evaluate(base_layer, x, coefficients, residual)

    def evaluate(
        self,
        base_layer: nn.Module,
        x: torch.Tensor,
        coefficients: torch.Tensor,
        residual: torch.Tensor | None,
        update: ThinUpdate | None = None,
    ) -> torch.Tensor:
        """The output (rows, out) for x (rows, in).

        Args:
            base_layer: The layer.
            x: The inputs.
            coefficients: (out, in, basis), multiplied by the scale of the layer.
            residual: The weights (out, in) of the residual branch, if there is one.
            update: What is added to both.
        """
        spec: Any = self.spec  # with the functions that are called here: see `find_formula`
        if self.closed_form:
            grid: UniformGrid = spec.splines(base_layer)
            y = spline_product(x, *grid, coefficients, None if update is None else (update.left, update.right))
        else:
            functions = spec.basis(base_layer, x).flatten(1)
            y = F.linear(functions, coefficients.flatten(1))
            if update is not None:
                y = torch.addmm(y, F.linear(functions, update.right.flatten(1)), update.left.t())
        if residual is not None:
            activation = spec.activation(base_layer, x)
            y = torch.addmm(y, activation, residual.t())  # a weight without gradient costs none in the backward pass
            if update is not None and update.right_of_residual is not None:
                y = torch.addmm(y, F.linear(activation, update.right_of_residual), update.left.t())
        bias = None if spec.bias is None else get_or_none(base_layer, spec.bias)
        return y if bias is None else y + bias


def find_obstacle(base_layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> str | None:
    """Why no formula can give what the layer computes; None if one may."""
    dtype = tensor.get_parameter(base_layer).dtype
    if tensor.shape[3:]:
        return "it is a convolution"
    if not (spec.basis or spec.splines):
        return "its kind has no `basis`"
    if tensor.has_residual and not spec.activation:
        return "its kind has no `activation`, the function of the residual branch"
    if dtype not in _TOLERANCE:
        return f"its parameters are {dtype}"
    if dtype == torch.float64 and not spec.splines:
        return "in float64 it takes `splines`"
    if runs_more_than_its_class(base_layer):
        return "it has hooks, or a `forward` of its own"
    return None if is_linear(base_layer, spec, tensor) else "its output is not linear in the coefficients"


@torch.no_grad()
def find_formula(base_layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> Formula | None:
    """The formula that gives what the layer computes in its present mode; None if there is none.

    It is found once for layers of a class, shapes and settings, closed form first, and compared with each layer. The
    layer and the random generators are left as they were.
    """
    stored = tensor.get_parameter(base_layer)
    if stored.is_meta or find_obstacle(base_layer, spec, tensor) is not None:
        return None
    if spec.is_of_this_package(base_layer):
        return Formula(spec, tensor, closed_form=True)
    grid = spec.read_grid(base_layer)
    shapes = [value.shape if isinstance(value, torch.Tensor) else repr(value) for value in grid.values()]
    key = (tensor.shape, base_layer.training, stored.dtype, *shapes)
    known = _known_formulas.setdefault(type(base_layer), {})
    likely = known.get(key, True)
    with torch.random.fork_rng([stored.device] if stored.is_cuda else []), without_autocast(stored):
        found = (it for it in (likely, not likely) if _is_right(Formula(spec, tensor, it), base_layer))
        closed_form = next(found, None)
    if closed_form is None:
        return None
    known[key] = closed_form
    return Formula(spec, tensor, closed_form)


def _is_right(formula: Formula, base_layer: nn.Module) -> bool:
    """Return whether the formula gives what the layer computes, over the grid and far from it."""
    try:
        ends = _grid_ends(base_layer, formula)
        if ends is None:
            return False
        points = points_around(*ends, formula.tensor.shape[1])
        stored = formula.tensor.get_parameter(base_layer)
        # with copies of the buffers, which a layer may update as it runs
        buffers = {name: buffer.clone() for name, buffer in base_layer.named_buffers()}
        expected = call_with_parameters(base_layer, buffers, base_layer, (points.to(stored),), {})
        result = formula.of_base(base_layer, points.to(stored))
        if result.dtype != expected.dtype or not expected.isfinite().all():
            return False
        question = "slopes", formula.closed_form, base_layer.training
        return agree(result, expected, _TOLERANCE[stored.dtype]) and remembered(
            base_layer, question, lambda: _has_right_slopes(formula, base_layer, points)
        )
    except Exception:  # foreign code, which wants more arguments, or other shapes
        return False


def _has_right_slopes(formula: Formula, base_layer: nn.Module, points: torch.Tensor) -> bool:
    """Return whether values and slopes agree in float64, at other parameters: each has its effect then."""
    stored, grid = formula.tensor.get_parameter(base_layer), formula.spec.read_grid(base_layer)

    def evaluate(function: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = points.to(stored.device).requires_grad_()
        y = function(x)
        weights = torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype, device=y.device)
        return y.detach(), torch.autograd.grad((y * weights).sum(), x)[0]

    def compare() -> bool:
        pairs = zip(evaluate(partial(formula.of_base, base_layer)), evaluate(base_layer), strict=True)
        return all(agree(result, expected, _SLOPE_TOLERANCE[stored.dtype]) for result, expected in pairs)

    # compiled code would be compiled once more, for float64
    eager = torch.compiler.set_stance("force_eager")
    with torch.inference_mode(False), torch.enable_grad(), eager:
        named = (*base_layer.named_parameters(), *base_layer.named_buffers())
        values = {name: value.detach().clone().double() for name, value in named if value.is_floating_point()}
        others = {name for name, _ in base_layer.named_parameters()}.difference(grid)
        return call_with_parameters(base_layer, moved(values, others, torch.randn), compare, (), {})


def _grid_ends(base_layer: nn.Module, formula: Formula) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both ends of the grid, as numbers or (in,); None if the basis of this layer cannot be evaluated so."""
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
