# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The formula of a KAN layer: its basis functions, its coefficients, and the updates that adapters add to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tucker import Update, expand_inputs, multiply_mode
from .basis import UniformGrid, bspline_basis
from .product import plain_product, spline_product


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
        """
        coefficients: Any = self.coefficients
        residual, basis = self.residual, self.basis
        out, in_features, count = coefficients.shape
        thin = None
        right_of_residual: Any = None
        if self.updates:
            left, right = self._join_updates(count)
            if residual is not None:
                right, last = right.split([count, 1], dim=-1)
                right_of_residual = last.squeeze(-1)
            if left is None:
                coefficients = coefficients + right
                if residual is not None:
                    residual = residual + right_of_residual
            elif self.scale is None and 2 * len(right) * (in_features * count + out) < out * in_features * count:
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
            y = plain_product(basis.derivatives(z, 0)[0], coefficients, *(thin or (None, None)))
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

    def _join_updates(self, count: int) -> tuple[Tensor | None, Tensor]:
        """Return left (O, R) and right (R, I, K or K + 1), whose product is the sum of the updates; K is `count`.

        If an update has a full out mode, left is None, and right is the sum.
        """
        lefts: list[Any] = []
        rights = []
        for gain, (core, left, *factors) in self.updates:
            scaled = core if isinstance(gain, float) and gain == 1.0 else gain * core
            right = expand_inputs(scaled, *factors)
            if self.residual is not None and right.shape[-1] == count:
                right = F.pad(right, (0, 1))
            lefts.append(left)
            rights.append(right)
        if len(lefts) == 1:
            return lefts[0], rights[0]
        if any(left is None for left in lefts):
            total: Any = 0
            for left, right in zip(lefts, rights, strict=True):
                total = total + multiply_mode(right, left, 0)
            return None, total
        return torch.cat(lefts, 1), torch.cat(rights)
