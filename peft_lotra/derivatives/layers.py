# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One KAN layer applied to a jet: a value with its derivatives along some directions.

The N points are inputs of the layer. At each of them the jet has S jet rows, one for the value and one for each
derivative along each direction: the factors (K + 1, I) of the coefficients in that part of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kan.basis import UniformGrid, bspline_basis, cardinal_spline, in_transform, silu_derivatives
from ..kan.formula import Basis, FunctionBasis, LayerFormula
from ..modules.calls import is_tracing
from ..tucker import Update
from .bases import evaluate_functions, num_functions, tensors_of
from .chain_rule import Jet, compose, row_counts
from .layer_jet import JetRows, LayerJet, by_hand_pays, make_features
from .norms import through_norm


def evaluate_layer(formula: LayerFormula, jet: Jet, order: int, weights: Tensor | None) -> Jet:
    """Return the jet of a layer's outputs.

    Args:
        formula: The formula of the layer.
        jet: The jet of the inputs, z (N, I) and its derivatives, each (D, N, I) or (D, 1, I).
        order: The highest order of the derivatives.
        weights: (D,). The derivatives of the highest order are their weighted sum, (1, N, I).
    """
    z = jet[0]
    if formula.basis is None:
        matrix: Any = formula.residual
        slopes = [part.expand(len(part), *z.shape) @ matrix.mT for part in jet[1:]]
        return [F.linear(z, matrix, formula.bias), *slopes]

    # adapters may be in float32 beside a base in half precision
    updates = [Update(gain, tensor.map(partial(Tensor.to, dtype=z.dtype))) for gain, tensor in formula.updates]
    # in transforms, a gradient of the size of the coefficients for each row is avoided
    stays_factored = in_transform() and formula.scale is None
    coefficients = None
    if formula.coefficients is not None or not stays_factored:
        coefficients = formula._replace(updates=() if stays_factored else tuple(updates)).joined()
    start = 0
    total: Any = None
    for basis, norm in _terms(formula):
        functions = slice(start, start + num_functions(basis))
        matrix = None if coefficients is None else coefficients[:, functions]
        factored = []
        if stays_factored:
            factored = [update._replace(tensor=update.tensor.sliced(functions)) for update in updates]
        inputs = jet if norm is None else through_norm(norm, jet, order, weights)
        term = _through(basis, matrix, factored, inputs, order, weights)
        total = term if total is None else [first + second for first, second in zip(total, term, strict=True)]
        start = functions.stop
    if formula.bias is not None:
        total[0] = total[0] + formula.bias
    return total


def _terms(formula: LayerFormula) -> list[tuple[Basis, Any]]:
    """Return the bases of a layer in the order of `LayerFormula.joined`, each with the norm of its inputs.

    In the terms, the functions of a uniform grid are the B-splines and silu.
    """
    basis, activation = formula.basis, formula.activation
    assert basis is not None
    is_silu = activation is F.silu
    if isinstance(basis, UniformGrid):
        if is_silu or formula.residual is None:
            return [(basis, formula.norm)]
        grid = basis
        basis = FunctionBasis(grid.num_basis, partial(_spline_functions, grid), (grid.low, grid.high))
    terms: list[tuple[Basis, Any]] = [(basis, formula.norm)]
    if formula.residual is not None:
        functions = _silu_functions if is_silu else lambda z, highest: [activation(z).unsqueeze(-1)]
        terms.append((FunctionBasis(1, functions, basis.tensors), None))
    return terms


def _spline_functions(grid: UniformGrid, z: Tensor, highest: int) -> list[Tensor]:
    return [bspline_basis(z, *grid, derivative=order) for order in range(highest + 1)]


def _silu_functions(z: Tensor, highest: int) -> list[Tensor]:
    return [values.unsqueeze(-1) for values in silu_derivatives(z, highest)]


def _through(
    basis: Basis,
    coefficients: Tensor | None,
    factored: Sequence[Update],
    jet: Jet,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """`evaluate_layer` for coefficients (O, K, I), functions first, and updates that are added in factored form."""
    by_hand = by_hand_pays(jet, order, weights, coefficients)
    z, *derivatives = [part.mT for part in jet]  # all operations run along the points
    matrix = None if coefficients is None else coefficients.flatten(1)
    plain = partial(_by_plain_operations, basis, factored, order, weights)
    # the weights of the directions, and the tensors that functions depend on, must be constants
    if by_hand and not any(it is not None and it.requires_grad for it in (weights, *tensors_of(basis))):
        derivatives = [part.expand(len(part), *z.shape) for part in derivatives]
        y = LayerJet.apply(basis, order, weights, plain, matrix, z, *derivatives)
    else:
        y = plain(matrix, z, *derivatives)
    return [part.mT for part in y]


def _by_plain_operations(
    basis: Basis, factored: Sequence[Update], order: int, weights: Tensor | None, matrix: Tensor | None, *jet: Tensor
) -> Jet:
    """As `LayerJet` by operations that autograd differentiates; `matrix` may be None, and updates are added."""
    rows = _jet_rows(basis, jet, order, weights)
    if is_tracing() and matrix is not None and not factored:
        # a product for each, so that the rows need not be written into one tensor, and what is not used is left out
        product = lambda row: matrix @ row.flatten(0, 1)  # noqa: E731
        if len(matrix) <= 3:  # a sum that the compiler forms together with the rows
            each = matrix.unflatten(1, rows[0].shape[:2]).unsqueeze(-1)
            product = lambda row: torch.stack([(one * row).sum((0, 1)) for one in each])  # noqa: E731
        return [product(rows[0]), *(torch.stack([product(row) for row in part]) for part in rows[1:])]
    joined = _joined(rows)
    y: Any = 0 if matrix is None else matrix @ joined.flatten(1, 2)
    y = sum((_contract(joined, update) for update in factored), y)
    value, *derivatives = y.split(row_counts(jet, order, weights))
    return [value.squeeze(0), *derivatives]


def _jet_rows(basis: Basis, jet: Sequence[Tensor], order: int, weights: Tensor | None) -> Jet:
    """The jet rows, for z (I, N) and its derivatives (D, I, N): (K + 1, I, N), and (D, K + 1, I, N) for each order."""
    z, *derivatives = jet
    return compose(_functions(basis, z, order), [part.unsqueeze(1) for part in derivatives], order, weights)


def _joined(rows: Jet) -> Tensor:
    """All jet rows (S, K + 1, I, N)."""
    return torch.cat([rows[0].unsqueeze(0), *rows[1:]])


def _functions(basis: Basis, z: Tensor, highest: int) -> list[Tensor]:
    """The functions of a basis at z (I, N), (K, I, N), and derivatives of them; those of a uniform grid are the
    B-splines, and silu as the last one."""
    if not isinstance(basis, UniformGrid):
        return evaluate_functions(basis, z, highest)
    per_unit = basis.per_unit.unsqueeze(-1)
    centers = torch.arange(basis.num_basis, dtype=z.dtype, device=z.device) - (basis.spline_order - 1) / 2
    offset = (z - basis.low.unsqueeze(-1)) * per_unit - centers[:, None, None]
    found = []
    for d, silu in enumerate(silu_derivatives(z, highest)):
        splines = cardinal_spline(offset, basis.spline_order, d)
        found.append(torch.cat([splines * per_unit**d if d else splines, silu.unsqueeze(0)]))
    return found


@torch.no_grad()
def jet_rows(formula: LayerFormula, jet: Jet, order: int, weights: Tensor | None) -> Tensor:
    """Return the jet rows (N, S, K, I) of a layer in `evaluate_layer`, with its arguments, for the points z (N, I).

    K counts all functions, that of the residual branch included.

    Derivatives that jump at the knots must come from the same operations there as in the jet, which depend on the
    number of points: pass all points of the jet.
    """
    rows = []
    for basis, norm in _terms(formula):
        inputs = jet if norm is None else through_norm(norm, jet, order, weights)
        rows.append(_rows_of_basis(basis, inputs, order, weights))
    return rows[0] if len(rows) == 1 else torch.cat(rows, 2)


def _rows_of_basis(basis: Basis, jet: Jet, order: int, weights: Tensor | None) -> Tensor:
    z, *derivatives = jet
    transposed = [z.T, *(part.expand(len(part), *z.shape).mT for part in derivatives)]
    if not by_hand_pays(jet, order, weights):
        return _joined(_jet_rows(basis, transposed, order, weights)).permute(3, 0, 1, 2)
    features, counts = make_features(basis, transposed[0]), row_counts(jet, order, weights)
    rows = z.new_empty(len(z), sum(counts), *features.shape)
    of_jet = JetRows(features.scale, transposed, order, weights, counts)
    for part, found in features.parts(transposed[0], of_jet.orders(False), ()):
        for number, matrix in found.matrices(of_jet.rows(found, part)):
            rows[part, number].flatten(1).copy_(matrix.T)
    return rows


def _contract(rows: Tensor, update: Update) -> Tensor:
    """Jet rows (S, K + 1, I, N) times the update, (S, O, N), so that no gradient of a factor is larger than it."""
    core, factor_out, factor_in, factor_basis = update.tensor
    t = rows[:, : update.tensor.shape[2]]
    if factor_basis is not None:
        t = (factor_basis.T @ t.flatten(2)).unflatten(2, rows.shape[2:])  # (S, rb, I, N)
    if factor_in is not None:
        t = factor_in.T @ t  # (S, rb, ri, N)
    products = core.transpose(1, 2).flatten(1) @ t.flatten(1, 2)  # (S, ro, N)
    return update.scale * products if factor_out is None else (update.scale * factor_out) @ products
