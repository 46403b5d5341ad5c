# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The fast path of an adapted layer: its formula, evaluated without running the base layer.

The frozen coefficients need no gradient then, the update contracts as two thin products, and B-splines on a uniform
grid are evaluated in closed form, whatever the base layer does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..families.coefficients import CoefficientTensor, get_or_none
from ..families.registry import KANLayerSpec, is_built_in
from ..kan.basis import SPLINE_ORDERS, UniformGrid
from ..kan.product import needs_plain_operations, spline_product
from ..modules.calls import call_with_parameters
from ..tucker import Update, expand_inputs
from .grid_watch import has_hooks
from .merging import add_updates, are_stored


# What formula and layer may differ by, as a share of the largest output: nothing in double precision, where an adapted
# layer starts as its base bit for bit.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 0.0}

# How far beyond the grid, in half lengths of it, formula and layer are compared: a layer may clamp its inputs there.
_FAR = (10, 100)
_ROWS = 48  # in the grid and at each of these distances

# Families with the name of a function of theirs that has raised, and was warned about.
_warned: set[tuple[str, str]] = set()

LowRank = tuple[torch.Tensor, torch.Tensor]  # left (out, r) and right (r, in, basis [+ 1])


class Formula(NamedTuple):
    """basis(x) . (scale * coefficients) + activation(x) . residual + bias: `formula.output(base_layer, updates, x)`.

    Attributes:
        spec, tensor: The family of the layer, and where the layer keeps its coefficients.
        closed_form: Whether the basis is evaluated by the family's `splines`, else by its `basis`.
        leading_shape: Whether inputs of any leading shape are taken, and outputs keep it.
    """

    spec: KANLayerSpec
    tensor: CoefficientTensor
    closed_form: bool
    leading_shape: bool = False

    def accepts(self, base_layer: nn.Module, updates: Sequence[Update], args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the formula may evaluate a call; if not, the base layer says what is wrong with the arguments."""
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            return False
        x, stored = args[0], list(self.tensor.read_parameters(base_layer).values())
        return (
            x.dim() > 0
            and x.layout == torch.strided
            and not x.is_nested
            and (x.dim() == 2 or self.leading_shape)
            and x.shape[-1] == self.tensor.shape[1]
            and x.dtype == stored[0].dtype
            and all(update.tensor.core.dtype == x.dtype for update in updates)
            and not any(hasattr(parameter, "placements") for parameter in stored)  # DTensors
            and are_stored(base_layer, self.tensor.parameters)
            and not x.is_meta
            and not torch.is_autocast_enabled(x.device.type)
            and not has_hooks(base_layer)
        )

    # no `__call__`, property or sum of a generator: up to torch 2.10, compiled code knows them not of tuples
    def output(self, base_layer: nn.Module, updates: Sequence[Update], x: torch.Tensor) -> torch.Tensor:
        """The output (..., out) of the base layer with the updates for inputs x (..., in).

        The thin products cost 2 R (I K + O) multiplications for each row in the backward pass, R the sum of the
        updates' ranks in the output mode. To form the update, and the gradient of the whole coefficient tensor, costs
        O I K.
        """
        out, in_features, basis = self.tensor.shape
        total_rank = sum([update.tensor.core.shape[0] for update in updates])
        thin = 2 * total_rank * (in_features * basis + out) < out * in_features * basis
        scale = self.spec.scale(base_layer) if self.spec.scale is not None else None
        parameters: dict[str, torch.Tensor] = {}
        low_rank = None
        if thin and scale is None:
            rights = [expand_inputs(factor * core, *factors) for factor, (core, _, *factors) in updates]
            if self.tensor.has_residual:  # an update without the residual branch adds zero to it
                rights = [F.pad(right, (0, 1)) if right.shape[-1] == basis else right for right in rights]
            low_rank = torch.cat([tensor.factor_out for _, tensor in updates], dim=1), torch.cat(rights)
        else:
            parameters = add_updates(self.tensor, base_layer, updates)
        coefficients, residual = self.tensor.read_parts(base_layer, parameters)
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


@torch.no_grad()
def find_formula(base_layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> Formula | None:
    """The formula that gives what the layer computes, closed form first; `None` if there is none.

    Formula and layer are compared on points over the grid, around it, and 10 and 100 times as far out. A function of
    the family that raises, or returns a tensor of another shape or dtype, is named in a warning. The layer and the
    global random generators are left as they were.
    """
    coefficients = tensor.get_parameter(base_layer)
    if (
        not spec.linear
        or (spec.basis is None and spec.splines is None)
        or (tensor.has_residual and spec.activation is None)  # as for Slim layers
        or tensor.shape[3:]  # a convolution
        or coefficients.is_meta
        or coefficients.dtype not in _TOLERANCE
        or has_hooks(base_layer)
    ):
        return None
    if spec.is_of_this_package(base_layer) and "forward" not in vars(base_layer):
        return Formula(spec, tensor, closed_form=True, leading_shape=True)
    share = None
    devices = [coefficients.device] if coefficients.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(coefficients.device.type, enabled=False):
        for closed_form in (True, False) if coefficients.dtype == torch.float32 else (True,):
            formula = Formula(spec, tensor, closed_form)
            ends = _grid_ends(base_layer, formula)
            if ends is None:
                continue
            points = _probe_points(*ends, coefficients, tensor.shape[1])
            expected = _run(base_layer, points)
            if not isinstance(expected, torch.Tensor):
                return None
            if not _can_evaluate(base_layer, formula, points):
                continue
            parameters, residual = tensor.read_parts(base_layer)
            scale = spec.scale(base_layer) if spec.scale is not None else None
            scaled = parameters if scale is None else parameters * scale.unsqueeze(-1)
            result = formula.evaluate(base_layer, points, scaled, residual, None)
            if _agree(result, expected):
                stacked = _run(base_layer, points.unflatten(0, (2, -1)))
                takes_any = isinstance(stacked, torch.Tensor) and stacked.shape[:2] == (2, len(points) // 2)
                return formula._replace(leading_shape=takes_any and _agree(stacked.flatten(0, 1), result))
            share = _difference(result, expected)
    if share is not None and not is_built_in(spec):  # those of this package are known to differ in some versions
        _warn(base_layer, spec, "basis", f"gives, with `activation`, `scale` and `bias`, outputs that {share}")
    return None


def _run(base_layer: nn.Module, x: torch.Tensor) -> Any:
    """What the layer returns, `None` if it does not take such inputs."""
    # with copies of the buffers, which a layer may update as it runs
    buffers = {name: buffer.clone() for name, buffer in base_layer.named_buffers()}
    try:
        return call_with_parameters(base_layer, buffers, base_layer, (x,), {})
    except Exception:  # foreign code, which may raise anything: it wants more arguments, or other shapes
        return None


def _agree(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two outputs at the points of `_probe_points` are the same, up to rounding.

    They are compared at each distance by itself: outputs far out are large, and so is what they may differ by.
    """
    if (
        first.shape != second.shape
        or first.dtype != second.dtype
        or not torch.equal(first.isfinite(), second.isfinite())
    ):
        return False
    difference, size = (
        t.nan_to_num(0.0, 0.0, 0.0).abs().view(-1, _ROWS * second.shape[1]).amax(1)
        for t in (torch.where(first == second, 0, first - second), second)
    )
    return bool((difference <= _TOLERANCE[first.dtype] * size).all())


def _difference(result: torch.Tensor, expected: torch.Tensor) -> str:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"are {tuple(result.shape)}, {result.dtype}, and those of the layer {tuple(expected.shape)}"
    share = (result - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    return f"differ from those of the layer by {share:.1e} of the largest"


def _can_evaluate(base_layer: nn.Module, formula: Formula, x: torch.Tensor) -> bool:
    """Whether the functions of the family return what the formula needs, for x (rows, in)."""
    spec, (out, in_features, basis) = formula.spec, formula.tensor.shape
    expected: dict[str, tuple[int, ...]] = {"scale": (out, in_features)}
    if not formula.closed_form:
        expected["basis"] = (len(x), in_features, basis)
    if formula.tensor.has_residual:
        expected["activation"] = (len(x), in_features)
    for name, shape in expected.items():
        value = _ask(base_layer, spec, name, *([] if name == "scale" else [x]))
        if isinstance(value, Exception):
            return False
        if name == "scale" and value is None:
            continue
        if not isinstance(value, torch.Tensor) or value.shape != shape or value.dtype != x.dtype:
            found = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
            _warn(base_layer, spec, name, f"returned {found} instead of {shape}, {x.dtype}")
            return False
    bias = get_or_none(base_layer, spec.bias or "")
    if bias is not None and bias.shape not in ((out,), (1, out), (1,), ()):
        _warn(base_layer, spec, "bias", f"has the shape {tuple(bias.shape)} instead of {(out,)}")
        return False
    return True


def _ask(base_layer: nn.Module, spec: KANLayerSpec, name: str, *args: Any) -> Any:
    """What a function of the family returns, or the exception that it raises; `None` without such a function."""
    function = getattr(spec, name)
    try:
        return None if function is None else function(base_layer, *args)
    except Exception as error:  # a user's function
        _warn(base_layer, spec, name, f"raised {type(error).__name__}: {error}")
        return error


def _warn(base_layer: nn.Module, spec: KANLayerSpec, name: str, what: str) -> None:
    if (spec.family, name) not in _warned:
        _warned.add((spec.family, name))
        warnings.warn(
            f"`{name}` of the KAN family {spec.family!r} {what}, for a {type(base_layer).__name__}. Without it, "
            "adapted layers of this family run their base layer, which may be slower. Correct it in "
            "`register_kan_layer`, or leave it out.",
            stacklevel=2,
        )


def _grid_ends(base_layer: nn.Module, formula: Formula) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both ends of the grid, as numbers or (in,), or `None` if the family cannot evaluate this layer's basis so."""
    spec = formula.spec
    if formula.closed_form:
        splines = _ask(base_layer, spec, "splines")
        if not isinstance(splines, UniformGrid) or splines.spline_order not in SPLINE_ORDERS or splines.grid_size < 1:
            return None
        fits = splines.grid_size + splines.spline_order == formula.tensor.shape[2]
        return (splines.low, splines.high) if fits else None
    if spec.basis is None:
        return None
    grids = [grid for grid in spec.read_grid(base_layer).values() if isinstance(grid, torch.Tensor) and grid.numel()]
    low = torch.stack([grid.min() for grid in grids]).min() if grids else torch.tensor(-2.0, device="cpu")
    high = torch.stack([grid.max() for grid in grids]).max() if grids else torch.tensor(2.0, device="cpu")
    return low, high


def _probe_points(low: torch.Tensor, high: torch.Tensor, like: torch.Tensor, width: int) -> torch.Tensor:
    """Points (rows, in) over the grid and a third of its length on either side, and then far out."""
    # steps of the golden ratio, so that no input repeats another's points
    rows = _ROWS * (1 + len(_FAR))
    share = torch.arange(rows * width, dtype=torch.float64, device="cpu").mul(0.6180339887498949).frac()
    low, high = (end.to(dtype=like.dtype, device=like.device).expand(width) for end in (low, high))
    sides = torch.tensor([5 / 3, *_FAR], dtype=torch.float64, device="cpu").repeat_interleave(_ROWS)  # in half lengths
    share = (share.view(rows, width) * 2 - 1) * sides.unsqueeze(1) / 2 + 0.5
    return torch.lerp(low, high, share.to(low))


def addmm(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, update: LowRank | None) -> torch.Tensor:
    """y (N, O) + x (N, I) times (weight (O, I) + left (O, r) right (r, I))^T. A weight without gradient costs none."""
    if update is None:
        return torch.addmm(y, x, weight.t())
    left, right = update
    if needs_plain_operations(y, x, weight, left, right) or weight.requires_grad or len(x) < len(weight):
        return torch.addmm(y, x, weight.t()) + F.linear(F.linear(x, right), left)
    return _LowRankAddmm.apply(y, x, weight, left, right)


class _LowRankAddmm(torch.autograd.Function):
    """With more rows than outputs, it costs less to form the sum than to multiply by both summands."""

    @staticmethod
    def forward(ctx, y, x, weight, left, right):
        ctx.save_for_backward(x, weight, left, right)
        return torch.addmm(y, x, torch.addmm(weight, left, right).t())

    @staticmethod
    def backward(ctx, gradient):
        x, weight, left, right = ctx.saved_tensors
        results = [gradient, None, None, None, None]
        if ctx.needs_input_grad[1]:
            results[1] = gradient @ torch.addmm(weight, left, right)
        if ctx.needs_input_grad[3]:
            results[3] = gradient.t() @ (x @ right.t())
        if ctx.needs_input_grad[4]:
            results[4] = (gradient @ left).t() @ x
        return tuple(results)
