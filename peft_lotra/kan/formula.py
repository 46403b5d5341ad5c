# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The formula of a KAN layer: its basis functions, its coefficients, and the updates that adapters add to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tucker import Update, expand_inputs
from .basis import UniformGrid, bspline_basis
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
        coefficients: A (O, I, K). None for a Slim layer, which consists of updates.
        residual: R (O, I). None without a residual branch.
        updates: The updates of the applied adapters.
        scale: (O, I). None stands for 1.
        bias: (O,).
        activation: The elementwise function act of the residual branch.
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
        """Return the functions that A multiplies, and act(x) as the last one if there is a residual branch.

        Args:
            x: (N, I).

        Returns:
            (N, I, K) or (N, I, K + 1).
        """
        z = x if self.norm is None else self.norm(x)
        basis: Any = self.basis
        values = bspline_basis(z, *basis) if isinstance(basis, UniformGrid) else basis.derivatives(z, 0)[0]
        if self.residual is None:
            return values
        return torch.cat([values, self.activation(x).unsqueeze(-1)], -1)

    def joined(self) -> Tensor:
        """Return scale (A + updates) and R + updates as one tensor (O, K + 1, I). Zeros stand for a missing R."""
        total = None
        if self.coefficients is not None:
            residual = torch.zeros_like(self.coefficients[:, :, 0]) if self.residual is None else self.residual
            total = torch.cat([self.coefficients.mT, residual.unsqueeze(1)], 1)
        for update in self.updates:
            delta = update.dense().mT
            if total is None:
                total = delta
            else:
                total = total + F.pad(delta, (0, 0, 0, total.shape[1] - delta.shape[1]))
        assert total is not None
        if self.scale is None:
            return total
        return torch.cat([total[:, :-1] * self.scale.unsqueeze(1), total[:, -1:]], 1)

    def output(self, x: Tensor) -> Tensor:
        """Return y (..., O) for x (..., I).

        The updates stay in factors where two thin products cost less than a sum with the coefficients. They do if
        2 R (I K + O) < O I K, the multiplications of a backward pass for each row. R is the sum of the output ranks.
        An update with a full out mode is added to the coefficients, or in wide layers evaluated as r functions of each
        input, whose products are with (O, I r).
        """
        coefficients: Any = self.coefficients
        residual, basis = self.residual, self.basis
        out, in_features, count = coefficients.shape
        lefts, rights, shaped = [], [], []
        for gain, (core, left, *factors) in self.updates:
            scaled = core if isinstance(gain, float) and gain == 1.0 else gain * core
            if left is not None:
                right = expand_inputs(scaled, *factors)
                if residual is not None and right.shape[-1] == count:
                    right = F.pad(right, (0, 1))
                lefts.append(left)
                rights.append(right)
                continue
            factor_in, functions = factors
            rank = count if functions is None else functions.shape[1]
            if self.scale is None and _SHAPES_FROM * count < out * (count - 3 * rank):
                shaped.append((expand_inputs(scaled, factor_in, None).flatten(1), functions))
                continue
            right = expand_inputs(scaled, *factors)
            of_splines, of_residual = right.split([count, right.shape[2] - count], dim=-1)
            coefficients = coefficients + of_splines
            if residual is not None and right.shape[2] > count:
                residual = residual + of_residual.squeeze(-1)
        thin = None
        right_of_residual: Any = None
        if lefts:
            left = lefts[0] if len(lefts) == 1 else torch.cat(lefts, 1)
            right = rights[0] if len(rights) == 1 else torch.cat(rights)
            if residual is not None:
                right, last = right.split([count, 1], dim=-1)
                right_of_residual = last.squeeze(-1)
            if self.scale is None and 2 * len(right) * (in_features * count + out) < out * in_features * count:
                thin = left, right
            else:
                coefficients = torch.addmm(coefficients.flatten(1), left, right.flatten(1)).view(coefficients.shape)
                if residual is not None:
                    residual = torch.addmm(residual, left, right_of_residual)
        if self.scale is not None:
            coefficients = coefficients * self.scale.unsqueeze(-1)

        # the last digits of a batched product depend on what requires a gradient
        rows = x if x.dim() == 2 else x.reshape(-1, in_features)
        z = rows if self.norm is None else self.norm(rows)
        if isinstance(basis, UniformGrid):
            y = spline_product(z, *basis, coefficients, thin)
        else:
            assert basis is not None
            values = basis.derivatives(z, 0)[0]
            y = plain_product(values, coefficients, *(thin or (None, None)))
        for matrix, weights in shaped:
            if isinstance(basis, UniformGrid):
                # the inputs are points of one grid
                points = ((z - basis.low) * basis.per_unit).reshape(-1, 1)
                ends = points.new_zeros(1), points.new_full((1,), basis.grid_size)
                shapes = spline_product(points, *ends, *basis[2:], weights[:count].t().unsqueeze(1))
            else:
                shapes = values @ weights[:count]
            shapes = shapes.view(*z.shape, -1)
            if residual is not None and len(weights) > count:
                shapes = shapes + self.activation(rows).unsqueeze(-1) * weights[count]
            y = torch.addmm(y, shapes.flatten(1), matrix.t())
        if residual is not None:
            values = self.activation(rows)
            # in the backward pass, `addmm` computes no gradient of a frozen weight
            y = torch.addmm(y, values, residual.t())
            if thin is not None:
                y = torch.addmm(y, F.linear(values, right_of_residual), thin[0].t())
        if self.bias is not None:
            y = y + self.bias
        # a view would cost compiled code a tenth of a step
        return y if x.dim() == 2 else y.view(*x.shape[:-1], out)
