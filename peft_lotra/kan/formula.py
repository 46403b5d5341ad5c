# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The formula of a KAN layer: its basis functions, its coefficients, and the updates that adapters add to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tucker import Update
from .basis import UniformGrid


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
        values = self.evaluate_basis(z)
        if self.residual is None:
            return values
        return torch.cat([values, self.activation(x).unsqueeze(-1)], -1)

    def evaluate_basis(self, z: Tensor) -> Tensor:
        """Return the functions that A multiplies (N, I, K) at normalized inputs z (N, I)."""
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
