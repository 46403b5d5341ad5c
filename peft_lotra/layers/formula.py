# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Finds the formula of a layer of any library, and verifies it against the layer.

Verified are values, slopes and second derivatives, over the grid and far from it. A layer that does more than its
formula, such as a subclass that clamps its inputs, has no formula and runs itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..derivatives.layers import evaluate_layer
from ..derivatives.torch_fallback import elementwise_derivatives, jet_by_transforms
from ..kan.basis import SPLINE_ORDERS, in_transform
from ..kan.formula import FunctionBasis, LayerFormula
from ..kan.update_product import compute_output
from ..modules.calls import attributes_kept, call_with_parameters, is_tracing, own_attributes, runs_more_than_its_class
from ..tucker import Update
from .coefficients import CoefficientTensor, get_or_none
from .kinds import Grid, KANLayerSpec, copy_grid, same_grid
from .probe import GOLDEN_RATIO, ask_short_copy, cached_by_class, isolated, perturbed


# Largest difference of a formula and its layer in the layer's dtype, as a share of the largest output.
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
# Largest differences of value, slope and second derivative in float64. Knots in float32 are not exactly uniform.
_JET_TOLERANCES = {torch.float32: (1e-6, 1e-5, 1e-4), torch.float64: (1e-11, 1e-10, 1e-9)}
# Rows at which they are compared, in blocks of eight: around the grid, far from it, and with inputs that are zero.
_BLOCK = 8
_NEAR = 6 * _BLOCK
_DISTANCES = (15.0, 500.0, 1e5, 1e8)  # in lengths of the grid
_BLOCKS = _NEAR // _BLOCK + len(_DISTANCES) + 1
_WIDE = 64  # inputs, of which two rows of each block have points enough
# What the forward pass of a layer may depend on besides its tensors.
_SETTINGS = (bool, int, float, str, type(None))

State = tuple[Any, ...]

# For each layer the grid and the formula, None if there is none, by the state in which it was verified.
_answers: WeakKeyDictionary[nn.Module, dict[State, tuple[Grid, FormulaReader | None]]] = WeakKeyDictionary()
# Layers that set an attribute when they run, such as a penalty. They have no formula, which would not set it.
_recorders: WeakSet[nn.Module] = WeakSet()


class FormulaReader(NamedTuple):
    """Reads the formula of a layer from its present tensors.

    Attributes:
        spec, tensor: The kind of the layer, and where it keeps its coefficients.
        is_uniform: Whether the basis is the kind's `splines`, else its `basis`.
        is_silu: Whether the function of the base branch is silu, whose derivatives have a closed form.
        is_own: Whether the layer is a `KANLinear`, whose `formula` is taken.
    """

    spec: KANLayerSpec
    tensor: CoefficientTensor
    is_uniform: bool = True
    is_silu: bool = True
    is_own: bool = False

    def read(self, layer: Any) -> LayerFormula:
        """Return the formula of the layer, without updates."""
        if self.is_own:
            return layer.formula
        spec: Any = self.spec
        coefficients, residual = self.tensor.read_parts(layer)
        if self.is_uniform:
            basis = spec.splines(layer)
        else:
            functions = partial(_evaluate_basis, spec, layer)
            basis = FunctionBasis(self.tensor.shape[2], functions)
        bias = spec.bias and get_or_none(layer, spec.bias)
        norm = spec.normalization and get_or_none(layer, spec.normalization)
        activation: Any = F.silu
        # compiled code notices when the activation is exchanged, if it is the layer's
        if residual is not None and (not self.is_silu or is_tracing()):
            activation = partial(spec.activation, layer)
        return LayerFormula(basis, coefficients, residual, (), spec.scale(layer), bias, activation, norm)

    def accepts(
        self,
        layer: nn.Module,
        stored: Tensor,
        updates: Sequence[Update],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> bool:
        """Return whether the formula may evaluate a call. If not, the layer runs."""
        if len(args) != 1 or kwargs:
            return False
        x = args[0]
        if not isinstance(x, Tensor) or x.is_nested or x.is_meta or x.layout != torch.strided:
            return False
        # layers of other libraries may flatten the leading dimensions
        if x.dim() != 2 and not self.is_own:
            return False
        if x.shape[-1:] != self.tensor.shape[1:2]:
            return False
        is_sharded = hasattr(stored, "placements")
        if is_sharded or torch.is_autocast_enabled(x.device.type) or runs_more_than_its_class(layer):
            return False
        components = [stored, *(update.tensor[0] for update in updates)]
        return all(component.dtype == x.dtype for component in components)


def _evaluate_basis(
    spec: Any,
    layer: nn.Module,
    z: Tensor,
    highest: int,
) -> list[Tensor]:
    if spec.basis is not None and (highest == 0 or spec.derivatives is None):
        return [spec.basis(layer, z)]
    return spec.derivatives(layer, z, highest)


def state_of(layer: nn.Module) -> State:
    """Return the values that outputs may depend on, besides parameters and buffers, in a form that can be compared."""
    state: list[Any] = [layer.training]
    for value in own_attributes(layer).values():
        if isinstance(value, _SETTINGS):
            state.append(value)
        elif isinstance(value, (tuple, list)) and all(isinstance(entry, _SETTINGS) for entry in value):
            state.append(tuple(value))
        elif isinstance(value, Tensor):
            version = None if value.is_inference() else value._version
            state += [id(value), version]
        elif callable(value):
            state.append(id(value))
    for child in layer._modules.values():
        if child is not None:
            state += [id(child), *state_of(child)]
    return tuple(state)


def _may_have_formula(
    layer: nn.Module,
    spec: KANLayerSpec,
    tensor: CoefficientTensor,
) -> bool:
    """Return whether a formula may give the outputs of the layer."""
    has_functions = spec.basis or spec.splines or spec.derivatives
    if not has_functions or tensor.shape[3:] or (tensor.has_residual and not spec.activation):
        return False
    if any(len(part) > 1 for part in tensor.parts):  # several layers
        return False
    return tensor.get_parameter(layer).dtype in _TOLERANCE


@torch.no_grad()
def find_formula(
    layer: nn.Module,
    spec: KANLayerSpec,
    tensor: CoefficientTensor,
    for_jets: bool = False,
) -> FormulaReader | None:
    """Return the formula of the outputs of the layer in its present mode; None if there is none.

    The layer and the random generators stay unchanged. An answer holds until the grid or a setting changes.

    Args:
        layer: The layer.
        spec, tensor: Its kind, and where it keeps its coefficients.
        for_jets: Whether the jets of the formula must be those of the layer, too. They are not if `basis` mixes the
            inputs, as a norm does that the kind does not name, or if `derivatives` is wrong.
    """
    stored = tensor.get_parameter(layer)
    if stored.is_meta or layer in _recorders or runs_more_than_its_class(layer):
        return None
    if spec.is_of_this_package(layer):
        return FormulaReader(spec, tensor, is_own=True) if _may_have_formula(layer, spec, tensor) else None

    answers = _answers.setdefault(layer, {})
    grid = spec.read_grid(layer)
    state = (id(spec), for_jets, stored.dtype, state_of(layer))
    verified_grid, reader = answers.get(state, ({}, None))
    if not is_tracing() and in_transform():  # nothing can be compared
        return reader
    if state in answers and same_grid(verified_grid, grid):
        return reader

    reader = _search(layer, spec, tensor, for_jets)
    if len(answers) > 8:  # states that come and go
        answers.clear()
    answers[state] = copy_grid(grid), reader
    return reader


def _search(
    layer: nn.Module,
    spec: KANLayerSpec,
    tensor: CoefficientTensor,
    for_jets: bool,
) -> FormulaReader | None:
    """Return the formula with the splines of the kind, or else with its basis, that gives the outputs of the layer."""
    if not _may_have_formula(layer, spec, tensor):
        return None
    reader = None
    stored = tensor.get_parameter(layer)
    with attributes_kept(layer) as has_set, isolated(stored), torch.no_grad():
        for is_uniform in (True, False):
            # foreign code may want more arguments, or other shapes
            with suppress(Exception):
                reader = reader or _verify(layer, spec, tensor, is_uniform, for_jets)
        if has_set():
            _recorders.add(layer)
            reader = None
    return reader


def _verify(
    layer: nn.Module,
    spec: Any,
    tensor: CoefficientTensor,
    is_uniform: bool,
    for_jets: bool,
) -> FormulaReader | None:
    """Return the formula if it gives the outputs of the layer."""
    ends = _grid_ends(layer, spec, is_uniform)
    if ends is None:
        return None
    points = _points_around(*ends, tensor.shape[1])
    x = points.to(tensor.get_parameter(layer))
    # bit for bit: the closed form then replaces the activation of the layer
    is_silu = not tensor.has_residual or torch.equal(spec.activation(layer, x), F.silu(x))
    reader = FormulaReader(spec, tensor, is_uniform, is_silu)

    # first with other parameters, which a layer may initialize in place at its first input
    functions = spec.basis, spec.splines, spec.derivatives, spec.activation, spec.normalization
    for compare in (_has_right_slopes, _has_right_jets)[: 1 + for_jets]:
        # a class may be registered again with other functions
        question = compare.__name__, functions, is_uniform, is_silu, layer.training
        answer = partial(_at_any_size, reader, layer, points, compare)
        if not cached_by_class(layer, question, answer):
            return None
    if x.shape[1] > _WIDE:
        x = x.unflatten(0, (_BLOCKS, -1))[:, :: _BLOCK - 1].flatten(0, 1)
    return reader if _has_right_values(reader, layer, x) else None


def _has_right_values(reader: FormulaReader, layer: nn.Module, x: Tensor) -> bool:
    """Compare values, and check that the layer does not update buffers, as the formula would not."""
    buffers = dict(layer.named_buffers())

    def run() -> bool:
        expected = layer(x)
        result = compute_output(reader.read(layer), x)
        if result.dtype != expected.dtype or not _agree(result, expected, _TOLERANCE[x.dtype]):
            return False
        return same_grid(buffers, dict(layer.named_buffers()))

    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    return call_with_parameters(layer, copies, run, (), {})


def _grid_ends(
    layer: nn.Module,
    spec: Any,
    is_uniform: bool,
) -> tuple[Any, Any] | None:
    """Return both ends of the grid, numbers or (in,); None if the layer has no such basis."""
    if is_uniform:
        grid = spec.splines and spec.splines(layer)
        if not grid or grid.spline_order not in SPLINE_ORDERS:
            return None
        return grid.low, grid.high
    if not (spec.basis or spec.derivatives):
        return None
    values = spec.read_grid(layer).values()
    tensors = [value.flatten() for value in values if isinstance(value, Tensor) and value.numel()]
    return torch.cat(tensors).aminmax() if tensors else (-2.0, 2.0)


def _points_around(low: Any, high: Any, width: int) -> Tensor:
    """Return points (rows, width) in float64 on the CPU, in blocks of eight rows.

    The first rows cover the grid and its length on either side. The next ones lie far from it, where a layer
    that clamps or squashes its inputs differs. In the last ones some inputs are zero, and in one row all.

    Args:
        low, high: Both ends of the grid, each a number or a tensor (width,).
        width: Number of inputs.
    """
    options: Any = {"dtype": torch.float64, "device": "cpu"}
    low = torch.as_tensor(low, **options).expand(width)
    high = torch.as_tensor(high, **options).expand(width)
    distances = torch.tensor(_DISTANCES, **options).repeat_interleave(_BLOCK)
    distances[::2] *= -1
    stop = _NEAR + len(distances)
    # with steps of the golden ratio, no input repeats another's points
    steps = torch.arange((stop + _BLOCK) * width, **options)
    shares = steps.mul(GOLDEN_RATIO).frac().view(-1, width)

    points = torch.lerp(low, high, 3 * shares - 1)
    lengths = distances.unsqueeze(1) * (1 + shares[_NEAR:stop])
    points[_NEAR:stop] = (low + high) / 2 + lengths * (high - low).clamp(min=2)
    points[stop:][shares[stop:] < 0.5] = 0
    points[-1] = 0
    return points


def _agree(
    result: Tensor,
    expected: Tensor,
    tolerance: float,
    floor: float = 0.0,
) -> bool:
    """Return whether two results (..., rows, out) at `_points_around` agree.

    Each difference is a share of the largest number among eight rows, or among those near the grid. Numbers that are
    not finite in `expected`, such as the slope of acos(tanh(1000)), are not compared.

    Args:
        result: The outputs of the formula.
        expected: The outputs of the layer.
        tolerance: The largest share.
        floor: The smallest number that a difference is a share of.
    """
    if result.shape != expected.shape:
        return False
    error = torch.where(expected.isfinite(), result - expected, 0)
    size = _largest_of_blocks(expected.nan_to_num(0, 0, 0))
    near = size[: _NEAR // _BLOCK].max().clamp(min=floor)
    share = tolerance * size.clamp(min=near)
    return bool((_largest_of_blocks(error) <= share).all())


def _largest_of_blocks(values: Tensor) -> Tensor:
    blocks = values.movedim(-2, 0).unflatten(0, (_BLOCKS, -1))
    return blocks.flatten(1).abs().amax(1)


def _at_any_size(
    reader: FormulaReader,
    layer: nn.Module,
    points: Tensor,
    compare: Any,
) -> bool:
    """Compare a short copy of a wide layer, or else the layer itself. See `_at_other_parameters`."""

    def ask(copy: nn.Module) -> bool:
        tensor = reader.spec.locate(copy)
        return _at_other_parameters(reader._replace(tensor=tensor), copy, points[:, : tensor.shape[1]], compare)

    return ask_short_copy(layer, ask) or _at_other_parameters(reader, layer, points, compare)


def _at_other_parameters(
    reader: FormulaReader,
    layer: nn.Module,
    points: Tensor,
    compare: Any,
) -> bool:
    """Return `compare(formula, layer, x, tolerances)` in float64, at parameters that each have an effect.

    Buffers outside of the grid are perturbed too: a mask, or a temperature, may be set later.
    """
    stored = reader.tensor.get_parameter(layer)
    x = points.to(stored.device)
    tolerances = _JET_TOLERANCES[stored.dtype]
    grid = reader.spec.read_grid(layer)
    parameters = dict(layer.named_parameters())
    buffers = dict(layer.named_buffers())
    values = {}
    for name, value in (parameters | buffers).items():
        value = value.detach().clone()
        values[name] = value.double() if value.is_floating_point() else value
    values = perturbed(values, buffers.keys() - grid.keys())
    # so far that a layer is not taken for a linear one that is linear near its parameters only
    values = perturbed(values, parameters.keys() - grid.keys(), torch.randn, 2.0)

    def run() -> bool:
        return compare(reader.read(layer), layer, x, tolerances)

    return call_with_parameters(layer, values, run, (), {})


def _has_right_slopes(
    formula: LayerFormula,
    layer: nn.Module,
    x: Tensor,
    tolerances: Sequence[float],
) -> bool:
    """Compare values, slopes, a single row, and what becomes of NaN."""
    y, slope = _differentiate(partial(compute_output, formula), x)
    expected, expected_slope = _differentiate(layer, x)
    if not _agree(y, expected, tolerances[0]):
        return False
    # slopes may be zero to rounding, e.g. behind the norm of a single input
    floor = 1e-3 * float(expected[:_NEAR].abs().max())
    if not _agree(slope, expected_slope, tolerances[1], floor):
        return False
    with_nan = x[:1].clone()
    with_nan[0, 0] = torch.nan
    for row in (x[:1], with_nan):
        output = compute_output(formula, row)
        output_of_layer = layer(row.clone())  # the layer may write into its input
        if not torch.allclose(output, output_of_layer, 1e-6, 1e-6, equal_nan=True):
            return False
    return True


def _differentiate(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return values and slopes at x."""
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        y = function(point)
        weights = torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype, device=y.device)
        (slope,) = torch.autograd.grad(y, point, weights.expand_as(y))
    return y.detach(), slope


def _has_right_jets(
    formula: LayerFormula,
    layer: nn.Module,
    x: Tensor,
    tolerances: Sequence[float],
) -> bool:
    """Compare values, slopes and second derivatives, and the higher derivatives of the functions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, x.shape[1], generator=generator, device="cpu")
    directions = directions.to(x)
    expected = jet_by_transforms(layer, x, directions, 2, None)
    result = evaluate_layer(formula, [x, directions.unsqueeze(1)], 2, None)
    if not all(map(_agree, result, expected, tolerances, [1e-3] * 3)):
        return False
    if isinstance(formula.basis, FunctionBasis):
        return _has_right_higher_derivatives(formula.basis, x)
    return True


def _has_right_higher_derivatives(basis: FunctionBasis, x: Tensor) -> bool:
    """Compare each derivative from the third on, which gradients need, with the slope of the one before."""
    derivatives = basis.derivatives(x, 5)
    for order in range(2, len(derivatives) - 1):
        derivative = lambda z, order=order: basis.derivatives(z, order)[order]  # noqa: E731
        _, slope = elementwise_derivatives(derivative, x, 1)
        following = derivatives[order + 1]
        if not _agree(following.flatten(1), slope.flatten(1), 1e-9, 1e-3):
            return False
    return True
