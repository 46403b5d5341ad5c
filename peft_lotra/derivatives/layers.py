# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""One KAN layer applied to a jet: a value with its derivatives along some directions.

The N points are inputs of the layer. At each of them the jet has S jet rows, one for the value and one for each
derivative along each direction: the factors (K + 1, I) of the coefficients in that row of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kan.basis import UniformGrid, cardinal_spline, in_transform, silu_derivatives
from ..kan.formula import Basis, FunctionBasis, LayerFormula
from ..kan.product import concatenate
from ..modules.calls import is_tracing
from ..tucker import Update
from .bases import evaluate_functions, num_functions
from .chain_rule import Jet, compose, row_counts
from .layer_jet import JetRows, LayerJet, make_features, use_layer_jet
from .norms import through_norm


def evaluate_layer(
    formula: LayerFormula,
    jet: Jet,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Return the jet of a layer's outputs.

    Args:
        formula: The formula of the layer.
        jet: The jet of the inputs, z (N, I) and its derivatives, each (D, N, I) or (D, 1, I).
        order: The highest order of the derivatives.
        weights: (D,). The derivatives of the highest order are their weighted sum, (1, N, I).
    """
    z, *derivatives = jet
    if formula.basis is None:
        matrix: Any = formula.residual
        outputs = [F.linear(z, matrix, formula.bias)]
        for derivative in derivatives:
            outputs.append(derivative.expand(-1, *z.shape) @ matrix.mT)
        return outputs

    # adapters may be in float32 and the base in half precision
    convert = partial(Tensor.to, dtype=z.dtype)
    converted = [Update(scale, tensor.map(convert)) for scale, tensor in formula.updates]
    updates = tuple(converted)
    factored: tuple[Update, ...] = ()
    if formula.scale is None and not is_tracing() and in_transform():
        # no gradient of the size of the coefficients for each row
        updates, factored = factored, updates
    coefficients = formula._replace(updates=updates).joined()

    terms = []
    start = 0
    for basis, inputs in _terms(formula, jet, order, weights):
        stop = start + num_functions(basis)
        columns = slice(start, stop)
        matrix = coefficients[:, columns].flatten(1)
        sliced = [Update(scale, tensor.sliced(columns)) for scale, tensor in factored]
        terms.append(_evaluate_term(basis, matrix, sliced, inputs, order, weights))
        start = stop
    outputs, *branches = terms
    for branch in branches:
        outputs = list(map(torch.add, outputs, branch))
    if formula.bias is not None:
        outputs[0] = outputs[0] + formula.bias
    return outputs


def _terms(
    formula: LayerFormula,
    jet: Jet,
    order: int,
    weights: Tensor | None,
) -> list[tuple[Basis, Jet]]:
    """Return the bases of a layer in the order of `LayerFormula.joined`, each with the jet of its inputs.

    In the terms, the functions of a uniform grid are the B-splines and silu.
    """
    basis: Any = formula.basis
    is_grid = isinstance(basis, UniformGrid)
    normalized = jet
    if formula.norm is not None:
        normalized = through_norm(formula.norm, jet, order, weights)
    if formula.residual is None or (is_grid and formula.activation is F.silu):
        return [(basis, normalized)]
    if is_grid:
        # without silu
        splines = partial(_spline_functions, basis)
        basis = FunctionBasis(basis.num_basis, splines, basis.tensors)
    functions = partial(_activation_functions, formula.activation)
    activation = FunctionBasis(1, functions, basis.tensors)
    return [(basis, normalized), (activation, jet)]


def _spline_functions(grid: UniformGrid, z: Tensor, highest: int) -> list[Tensor]:
    return [grid.functions(z, order) for order in range(highest + 1)]


def _activation_functions(
    activation: Callable[[Tensor], Tensor],
    z: Tensor,
    highest: int,
) -> list[Tensor]:
    if activation is F.silu:
        functions = silu_derivatives(z, highest)
    else:
        functions = [activation(z)]
    return [function.unsqueeze(-1) for function in functions]


def _evaluate_term(
    basis: Basis,
    matrix: Tensor,
    factored: Sequence[Update],
    jet: Jet,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Evaluate a term for coefficients as a matrix (O, K I), and updates that are added in factored form."""
    plain = partial(_evaluate_plainly, basis, factored, order, weights)
    transposed = _transpose(jet)  # all operations run along the points
    constants = [weights, *basis.tensors]
    is_trained = any(tensor is not None and tensor.requires_grad for tensor in constants)
    if not is_trained and use_layer_jet(jet, order, weights, matrix):
        outputs = LayerJet.apply(basis, order, weights, plain, matrix, *transposed)
    else:
        outputs = plain(matrix, *transposed)
    return [output.mT for output in outputs]


def _transpose(jet: Jet) -> Jet:
    """Return z (I, N) and its derivatives, each (D, I, N)."""
    z, *derivatives = jet
    transposed = [z.T]
    for derivative in derivatives:
        transposed.append(derivative.expand(-1, *z.shape).mT)
    return transposed


def _evaluate_plainly(
    basis: Basis,
    factored: Sequence[Update],
    order: int,
    weights: Tensor | None,
    matrix: Tensor,
    *jet: Tensor,
) -> Jet:
    """Do the same as `LayerJet` by operations that autograd differentiates, and add updates."""
    value, *derivatives = _compose(basis, jet, order, weights)
    if is_tracing():
        # compilers copy the rows of a batched product to another order, and their gradients back
        outputs = [matrix @ value.flatten(0, 1)]
        for derivative in derivatives:
            products = [matrix @ row.flatten(0, 1) for row in derivative]
            outputs.append(torch.stack(products))
        return outputs

    rows = torch.cat([value.unsqueeze(0), *derivatives])
    y = matrix @ rows.flatten(1, 2)
    for update in factored:
        y = y + _contract(rows, update)
    value, *derivatives = y.split(row_counts(jet, order, weights))
    return [value.squeeze(0), *derivatives]


def _jet_rows(
    basis: Basis,
    jet: Sequence[Tensor],
    order: int,
    weights: Tensor | None,
) -> Tensor:
    """Return the jet rows (S, K + 1, I, N), for z (I, N) and its derivatives (D, I, N)."""
    value, *derivatives = _compose(basis, jet, order, weights)
    return torch.cat([value.unsqueeze(0), *derivatives])


def _compose(
    basis: Basis,
    jet: Sequence[Tensor],
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Return the jet of the functions, value (K + 1, I, N) and derivatives (D, K + 1, I, N), for a jet of inputs."""
    z, *derivatives = jet
    functions = _functions(basis, z, order)
    factors = [derivative.unsqueeze(1) for derivative in derivatives]
    return compose(functions, factors, order, weights)


def _functions(basis: Basis, z: Tensor, highest: int) -> list[Tensor]:
    """Return the functions of a basis at z (I, N), (K, I, N), and their derivatives.

    The functions of a uniform grid are the B-splines, and silu as the last one.
    """
    if not isinstance(basis, UniformGrid):
        return evaluate_functions(basis, z, highest)
    per_unit = basis.per_unit.unsqueeze(-1)
    distance = z - basis.low.unsqueeze(-1)
    position = distance * per_unit
    centers = basis.centers(z)[:, None, None]
    offset = position - centers
    functions = []
    for order, silu in enumerate(silu_derivatives(z, highest)):
        splines = cardinal_spline(offset, basis.spline_order, order)
        if order > 0:
            splines = splines * per_unit**order
        functions.append(torch.cat([splines, silu.unsqueeze(0)]))
    return functions


@torch.no_grad()
def jet_rows(
    formula: LayerFormula,
    jet: Jet,
    order: int,
    weights: Tensor | None,
) -> Tensor:
    """Return the jet rows (N, S, K, I) of a layer in `evaluate_layer`, with its arguments, for the points z (N, I).

    K counts all functions, including the activation of the base branch. An `nn.Linear` has one function, the
    identity.

    Derivatives that jump at the knots must come from the same operations as in the jet, which depend on the number of
    points: pass all points of the jet.
    """
    if formula.basis is None:
        value, *derivatives = _transpose(jet)
        rows = torch.cat([value.unsqueeze(0), *derivatives])
        return rows.permute(2, 0, 1).unsqueeze(2)
    terms = []
    for basis, inputs in _terms(formula, jet, order, weights):
        transposed = _transpose(inputs)
        if not use_layer_jet(inputs, order, weights):
            rows = _jet_rows(basis, transposed, order, weights)
            terms.append(rows.permute(3, 0, 1, 2))
            continue

        z = transposed[0]
        features = make_features(basis, z)
        counts = row_counts(inputs, order, weights)
        factors = JetRows(features.scale, transposed, order, weights, counts)
        rows = z.new_empty(z.shape[1], sum(counts), *features.shape)
        for block in features.blocks(z, order):
            rows_of_block = factors.rows(features, block)
            for number, matrix in enumerate(features.matrices(rows_of_block)):
                rows[block, number].flatten(1).copy_(matrix.T)
        terms.append(rows)
    return concatenate(terms, 2)


def _contract(rows: Tensor, update: Update) -> Tensor:
    """Multiply jet rows (S, K + 1, I, N) by an update, (S, O, N), without a gradient larger than a factor."""
    core, factor_out, factor_in, factor_basis = update.tensor
    count = update.tensor.shape[2]
    product = rows[:, :count]
    if factor_basis is not None:
        product = factor_basis.T @ product.flatten(2)
        product = product.unflatten(2, rows.shape[2:])  # (S, rb, I, N)
    if factor_in is not None:
        product = factor_in.T @ product  # (S, rb, ri, N)
    matrix = core.transpose(1, 2).flatten(1)
    product = matrix @ product.flatten(1, 2)  # (S, ro, N)
    if factor_out is not None:
        product = factor_out @ product
    return update.scale * product
