# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The jet of a dense KAN layer, as one operation with its own backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from math import comb

import torch
from torch import Tensor

from ..kan.basis import UniformGrid
from ..kan.formula import Basis
from ..kan.product import is_plain_backward, needs_plain_operations, plain_gradients
from .bases import FunctionFeatures
from .chain_rule import Jet, bell_polynomials, row_counts, weigh
from .splines import SplineFeatures


# Up to so many jet rows of all points, plain operations are faster. `least_squares.problem` tries functions with more.
PLAIN_UP_TO = 64


class LayerJet(torch.autograd.Function):
    """Maps the coefficients as a matrix (O, (K + 1) I), and a jet, z (I, N) and its derivatives (D or 1, I, N), to the
    jet of y, see `evaluate_layer`.

    The functions of the basis are evaluated in blocks of points that fit the cache. The functions of a single block
    are saved for the backward pass. Otherwise they are evaluated again.

    Args of `apply`:
        basis, order, weights: As for `evaluate_layer`.
        plain: A function of the matrix and the jet that does the same by operations that autograd differentiates.
        matrix, *jet: The tensors that are differentiated.
    """

    @staticmethod
    def forward(
        ctx,
        basis,
        order,
        weights,
        plain,
        matrix,
        *jet,
    ):
        z = jet[0]
        features = make_features(basis, z)
        counts = row_counts(jet, order, weights)
        jet_rows = JetRows(features.scale, jet, order, weights, counts)
        # the gradient in z needs one more derivative of the functions
        ctx.highest = order + any(ctx.needs_input_grad[5:])
        evaluated = []
        if any(ctx.needs_input_grad) and z.shape[1] <= features.block_size:
            evaluated = features.evaluate(z, ctx.highest)

        value = z.new_empty(len(matrix), z.shape[1])  # no view, since views cannot be changed in place
        derivatives = [z.new_empty(count, *value.shape) for count in counts[1:]]
        outputs = [value]
        for derivative in derivatives:
            outputs.extend(derivative)
        for block in features.blocks(z, order, evaluated):
            rows = jet_rows.rows(features, block)
            for row, output in zip(features.matrices(rows), outputs, strict=True):
                torch.mm(matrix, row, out=output[:, block])

        # with the tensors of the basis, so that a change of them is noticed
        ctx.save_for_backward(matrix, weights, *jet, *evaluated, *basis.tensors)
        ctx.set_materialize_grads(False)
        ctx.order = order
        ctx.plain = plain
        ctx.make_features = partial(make_features, basis)
        ctx.num_evaluated = len(evaluated)
        return value, *derivatives

    @staticmethod
    def backward(ctx, *grads):
        matrix, weights, *saved = ctx.saved_tensors
        num_jet = len(ctx.needs_input_grad) - 5
        jet = saved[:num_jet]
        evaluated = saved[num_jet : num_jet + ctx.num_evaluated]
        _, _, _, _, needs_matrix, *needs_jet = ctx.needs_input_grad
        if is_plain_backward(*grads):
            needed = [needs_matrix, *needs_jet]
            return *[None] * 4, *plain_gradients(ctx.plain, [matrix, *jet], needed, grads)

        # each row of a gradient that is not None
        counts = []
        gradients = []
        for grad in grads:
            rows = () if grad is None else grad.view(-1, *grad.shape[-2:])
            counts.append(len(rows))
            gradients += rows

        z = jet[0]
        features = ctx.make_features(z)
        jet_rows = JetRows(features.scale, jet, ctx.order, weights, counts)
        transposed = matrix.t()
        matrix_gradient = None
        if needs_matrix:
            # transposed, since this product takes less time
            matrix_gradient = torch.zeros_like(transposed)
        jet_gradients = []
        if any(needs_jet):
            jet_gradients = [torch.zeros_like(derivative) for derivative in jet]
        for block in features.blocks(z, ctx.highest, evaluated):
            of_block = [gradient[:, block] for gradient in gradients]
            if matrix_gradient is not None:
                rows = jet_rows.rows(features, block)
                for row, gradient in zip(features.matrices(rows), of_block, strict=True):
                    matrix_gradient.addmm_(row, gradient.t())
            if jet_gradients:
                row_gradients = features.pull_back(transposed, of_block)
                sums = [gradient[..., block] for gradient in jet_gradients]
                jet_rows.add_input_gradients(sums, features, block, row_gradients)

        # from the unit of the functions to the unit of the inputs
        if features.scale is not None:
            for gradient in jet_gradients:
                gradient.mul_(features.scale)
        if matrix_gradient is not None:
            matrix_gradient = matrix_gradient.t()
        return *[None] * 4, matrix_gradient, *(jet_gradients or [None] * num_jet)


def use_layer_jet(
    jet: Sequence[Tensor],
    order: int,
    weights: Tensor | None,
    *constants: Tensor | None,
) -> bool:
    """Return whether to use `LayerJet`: for many jet rows, outside of transforms and compilation."""
    rows = len(jet[0]) * sum(row_counts(jet, order, weights))
    return rows > PLAIN_UP_TO and not needs_plain_operations(*jet, weights, *constants)


def make_features(basis: Basis, z: Tensor) -> FunctionFeatures:
    """Return the functions of a basis for inputs z (I, N). A uniform grid has silu too."""
    if isinstance(basis, UniformGrid):
        return SplineFeatures(basis, z)
    return FunctionFeatures(basis, z)


class JetRows:
    """The factors of the coefficients in the jet of a layer: sum_j f^(j) B_nj, see `bell_polynomials`.

    Args:
        scale: The unit of the inputs in which the functions f are differentiated, (I, 1).
        jet, order, weights: As for `evaluate_layer`, but functions first, z (I, N).
        counts: The number of rows of each order that are needed.
    """

    def __init__(
        self,
        scale: Tensor | None,
        jet: Sequence[Tensor],
        order: int,
        weights: Tensor | None,
        counts: list[int],
    ) -> None:
        derivatives = jet[1:]
        if scale is not None:
            derivatives = [derivative * scale for derivative in derivatives]
        self.bells = bell_polynomials(derivatives, order, weights)
        self.counts = counts
        self.order = order
        self.weights = weights

    def rows(self, features: FunctionFeatures, block: slice) -> list[Tensor]:
        """Return the rows for a block of points, each of the shape of the functions."""
        functions = features.functions
        counts = self.counts[1:]
        memory = features.memory("rows", sum(counts))
        rows_of_order = memory.split(counts) if counts else ()
        last = 0
        for (n, j), bell in self.bells.items():
            if self.counts[n] == 0:
                continue
            rows = rows_of_order[n - 1]
            factor = bell[..., block].unsqueeze(1)
            # the first term of an order overwrites what the memory held
            if n > last:
                torch.mul(functions[j], factor, out=rows)
            else:
                rows.addcmul_(functions[j], factor)
            last = n
        rows_of_value = [functions[0]] * self.counts[0]
        return [*rows_of_value, *memory.unbind()]

    def add_input_gradients(
        self,
        jet_gradients: Jet,
        features: FunctionFeatures,
        block: slice,
        row_gradients: Tensor,
    ) -> None:
        """Add the gradients in z, z', ... of a block of points.

        B_nj has the derivative binom(n, i) B_{n-i,j-1} in z^(i), and f^(j) has f^(j+1) in z.

        Args:
            jet_gradients: The gradients that are added to, z (I, R).
            features: The functions of the block.
            block: The block.
            row_gradients: The gradients in the rows, (S, K, I, R).
        """
        starts = [0, *accumulate(self.counts)]
        for j in range(self.order + 1):
            # rows of the orders from j on have f^(j); f does not depend on derivatives that are zero
            last = self.order if j else len(jet_gradients) - 1
            start, stop = starts[j], starts[last + 1]
            if start == stop:
                continue
            sums = _sum_over_functions(row_gradients[start:stop], features.functions[j + 1])
            sums_of_order = sums.split(self.counts[j : last + 1])
            for n, gradient in enumerate(sums_of_order, j):
                if self.counts[n] == 0:
                    continue
                if j == 0:
                    jet_gradients[n] += gradient.view_as(jet_gradients[n])
                    continue
                # the gradient of f^(j) B_nj in z
                if (n, j) in self.bells:
                    bell = self.bells[n, j][..., block]
                    for left, right in zip(gradient.unbind(), bell.unbind(), strict=True):
                        jet_gradients[0].addcmul_(left, right)
                # the gradients of f^(j+1) B_n,j+1 in the derivatives
                highest = min(n - j, len(jet_gradients) - 1)
                for i in range(1, highest + 1):
                    if (n - i, j) not in self.bells:
                        continue
                    factor = self.bells[n - i, j][..., block]
                    if n == self.order and self.weights is not None:
                        factor = weigh(factor, self.weights)
                    jet_gradients[i].addcmul_(gradient, factor, value=comb(n, i))


def _sum_over_functions(row_gradients: Tensor, functions: Tensor) -> Tensor:
    """Return the sums over K of row gradients (S, K, I, R) times functions (K, I, R)."""
    gradients = row_gradients.unbind(1)
    total = gradients[0] * functions[0]
    for gradient, function in zip(gradients[1:], functions[1:], strict=True):
        total.addcmul_(gradient, function)
    return total
