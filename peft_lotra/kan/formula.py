# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The formula of a KAN layer: its basis functions, its coefficients, and the updates that adapters add to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tucker import Update, expand_inputs
from .basis import UniformGrid
from .product import plain_product, spline_product


# Multiplications for each output and row, in units of K, from which a second evaluation of the functions costs less
# than a gradient of the size of the coefficients: even at widths of 200 to 256.
_SHAPES_FROM = 128


class FunctionBasis(NamedTuple):
    """K functions of one input.

    Attributes:
        size: The number K of functions.
        derivatives: Maps z (N, I) and an order to the values and the derivatives up to this order, each (N, I, K). The
            list may end earlier. Transforms of `torch.func` compute the missing ones.
        tensors: The tensors that the functions depend on besides z.
    """

    size: int
    derivatives: Callable[[Tensor, int], list[Tensor]]
    tensors: tuple[Tensor, ...] = ()


# The functions of a uniform grid are its B-splines.
Basis = UniformGrid | FunctionBasis


class LayerFormula(NamedTuple):
    r"""The output of a KAN layer as a formula of its inputs.

        y = B(norm(x)) . (scale (A + updates)) + act(x) . (R + updates) + bias

    Updates (O, I, K) add to the coefficients A. Updates (O, I, K + 1) add to the residual weights R too. An
    `nn.Linear` has no basis, and R is its weight.

    Attributes:
        basis: The functions B. None for `nn.Linear`.
        coefficients: A (O, I, K). None for `nn.Linear`.
        residual: R (O, I). None without a base branch.
        updates: The updates of the applied adapters.
        scale: (O, I). None stands for 1.
        bias: (O,).
        activation: The elementwise function act of the base branch.
        norm: The module that normalizes the inputs of B.
    """

    basis: Basis | None
    coefficients: Tensor | None
    residual: Tensor | None = None
    updates: tuple[Update, ...] = ()
    scale: Tensor | None = None
    bias: Tensor | None = None
    activation: Callable[[Tensor], Tensor] = F.silu
    norm: Any = None

    # methods instead of properties: compiled code does not know properties of tuples

    def functions(self, x: Tensor) -> Tensor:
        """Return the functions that A multiplies, and act(x) as the last one if there is a base branch.

        Args:
            x: (N, I).

        Returns:
            (N, I, K) or (N, I, K + 1).
        """
        z = x if self.norm is None else self.norm(x)
        values = self._evaluate_basis(z)
        if self.residual is None:
            return values
        return torch.cat([values, self.activation(x).unsqueeze(-1)], -1)

    def _evaluate_basis(self, z: Tensor) -> Tensor:
        basis: Any = self.basis
        if isinstance(basis, UniformGrid):
            return basis.functions(z)
        return basis.derivatives(z, 0)[0]

    def joined(self) -> Tensor:
        """Return scale (A + updates) and R + updates as one tensor (O, K + 1, I). Zeros stand for a missing R."""
        coefficients: Any = self.coefficients
        residual = self.residual
        if residual is None:
            residual = torch.zeros_like(coefficients[:, :, 0])
        total = torch.cat([coefficients.mT, residual.unsqueeze(1)], 1)
        for update in self.updates:
            delta = update.dense().mT
            missing = total.shape[1] - delta.shape[1]
            total = total + F.pad(delta, (0, 0, 0, missing))
        if self.scale is None:
            return total
        splines, last = total.split([total.shape[1] - 1, 1], 1)
        scaled = splines * self.scale.unsqueeze(1)
        return torch.cat([scaled, last], 1)

    def output(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I)."""
        coefficients, residual, factored, shapes = self._add_updates()
        out, in_features, _ = coefficients.shape
        # the last digits of a batched product depend on what requires a gradient
        rows = x if x.dim() == 2 else x.reshape(-1, in_features)
        z = rows if self.norm is None else self.norm(rows)

        weights = [coefficients]
        if factored is not None:
            weights.append(factored.right)
        functions: Any = None
        if isinstance(self.basis, UniformGrid):
            products = spline_product(z, self.basis, *weights)
        else:
            functions = self._evaluate_basis(z)
            products = plain_product(functions, *weights)
        y = products[:, :out]
        sums = products[:, out:]

        activated: Any = None
        if residual is not None:
            activated = self.activation(rows)
            # in the backward pass, `addmm` computes no gradient of a frozen weight
            y = torch.addmm(y, activated, residual.t())
            if factored is not None:
                sums = torch.addmm(sums, activated, factored.right_of_residual.t())
        if factored is not None:
            y = torch.addmm(y, sums, factored.left.t())
        for core, weight in shapes:
            values = self._evaluate_shapes(z, functions, activated, weight)
            y = torch.addmm(y, values.flatten(1), core.flatten(1).t())
        if self.bias is not None:
            y = y + self.bias
        # a view would cost compiled code a tenth of a step
        if x.dim() == 2:
            return y
        return y.reshape(*x.shape[:-1], out)

    def _evaluate_shapes(
        self,
        z: Tensor,
        functions: Tensor,
        activated: Tensor | None,
        weights: Tensor,
    ) -> Tensor:
        """Return r functions of each input (N, I, r), with weights (K, r) or (K + 1, r), of normalized inputs z."""
        basis: Any = self.basis
        if isinstance(basis, UniformGrid):
            count = basis.num_basis
            # the inputs are points of one grid
            positions = (z - basis.low) * basis.per_unit
            points = positions.reshape(-1, 1)
            low = points.new_zeros(1)
            grid = basis._replace(low=low, high=low + basis.grid_size)
            of_splines = weights[:count].t().unsqueeze(1)  # (r, 1, K)
            values = spline_product(points, grid, of_splines)
            values = values.view(*z.shape, -1)
        else:
            count = functions.shape[-1]
            values = functions @ weights[:count]
        if activated is None or len(weights) == count:
            return values
        return values + activated.unsqueeze(-1) * weights[count]

    def _add_updates(self) -> tuple[Tensor, Any, _FactoredUpdate | None, list[tuple[Tensor, Tensor]]]:
        """Add the updates to the coefficients and the residual weights, but those that cost less by themselves.

        Updates with factor_out stay in factors where two thin products cost less than a sum with the coefficients.
        They do if 2 R (I K + O) < O I K, the multiplications of a backward pass for each row. R is the sum of the
        output ranks. In wide layers, updates with a full out mode are evaluated as r functions of each input.

        Returns:
            scale (A + updates), R + updates, the updates in factors, and of updates as functions the cores (O, I, r)
            and weights (K + 1, r).
        """
        coefficients: Any = self.coefficients
        residual = self.residual
        out, in_features, count = coefficients.shape
        thin = []
        shapes = []
        for gain, (core, left, factor_in, weights) in self.updates:
            if not isinstance(gain, float) or gain != 1.0:
                core = gain * core
            rank = count if weights is None else weights.shape[1]
            if left is None and self.scale is None and _SHAPES_FROM * count < out * (count - 3 * rank):
                # evaluated as functions of each input
                core = expand_inputs(core, factor_in, None)
                shapes.append((core, weights))
                continue
            expanded = expand_inputs(core, factor_in, weights)
            right, right_of_residual = _split_residual(expanded, count)
            if left is not None:
                thin.append(_FactoredUpdate(left, right, right_of_residual))
                continue
            coefficients = coefficients + right
            if residual is not None:
                residual = residual + right_of_residual

        factored = None
        if thin:
            factored = thin[0] if len(thin) == 1 else _concatenate(thin)
            left, right, right_of_residual = factored
            width = in_features * count
            if self.scale is not None or 2 * len(right) * (width + out) >= out * width:
                factored = None
                matrix = torch.addmm(coefficients.flatten(1), left, right.flatten(1))
                coefficients = matrix.view(coefficients.shape)
                if residual is not None:
                    residual = torch.addmm(residual, left, right_of_residual)
        if self.scale is not None:
            coefficients = coefficients * self.scale.unsqueeze(-1)
        return coefficients, residual, factored, shapes


class _FactoredUpdate(NamedTuple):
    """The update left x right of the coefficients, and left x right_of_residual of the residual weights.

    Attributes:
        left: (O, R).
        right: (R, I, K).
        right_of_residual: (R, I).
    """

    left: Tensor
    right: Tensor
    right_of_residual: Tensor


def _concatenate(updates: Sequence[_FactoredUpdate]) -> _FactoredUpdate:
    """Return the sum of updates as one product, with the sum of their ranks."""
    lefts, rights, rights_of_residual = zip(*updates, strict=True)
    return _FactoredUpdate(torch.cat(lefts, 1), torch.cat(rights), torch.cat(rights_of_residual))


def _split_residual(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split weights (..., K + 1) into the first K = `count` and the last, which is zero for weights (..., K)."""
    if weights.shape[-1] == count:
        return weights, weights.new_zeros(weights.shape[:-1])
    of_basis, of_residual = weights.split([count, 1], dim=-1)
    return of_basis, of_residual.squeeze(-1)
