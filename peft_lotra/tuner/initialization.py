# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How the four components of an adapter start: at random, or from the gradient of the coefficient tensors.

Either way factor_out is zero, as LoRA's B, so that the update is zero.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..tucker import tucker


# What preprocess_lotra gathered, until an adapter starts from it; not on the layers, so that the base is not touched.
GRADIENTS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@torch.no_grad()
def reset_components(
    core: Tensor, factor_out: Tensor, factor_in: Tensor, factor_basis: Tensor, zero_update: bool = True
) -> None:
    """Draws the four components in place, such that the update has the size of a well-scaled layer's output.

    factor_in and factor_basis get orthogonal columns, of norm 1 and sqrt(basis): a projected basis function then has
    the size of a basis function for any width. The core is normal with variance 1 / (ri rb), which keeps that size.
    factor_out is zero, or normal with variance 1 / ro. Parameters on the meta device are left alone.
    """
    if core.is_meta:
        return
    ro, ri, rb = core.shape
    nn.init.normal_(core, std=1 / math.sqrt(ri * rb))
    for factor, gain in ((factor_in, 1.0), (factor_basis, math.sqrt(len(factor_basis)))):
        # the QR decomposition behind it does not exist in half precision
        full = torch.empty_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32))
        factor.copy_(nn.init.orthogonal_(full, gain))
    if zero_update:
        nn.init.zeros_(factor_out)
    else:
        nn.init.normal_(factor_out, std=1 / math.sqrt(ro))


@torch.no_grad()
def reset_components_from_gradient(
    core: Tensor, factor_out: Tensor, factor_in: Tensor, factor_basis: Tensor, layer: nn.Module
) -> None:
    """Sets the components to the directions that the gradient of the layer's coefficients uses most.

    The best Tucker approximation (HOOI) of the gradient gives factor_in and factor_basis, with columns of norm 1 and
    sqrt(basis). The gradient projected on both unfolds to a matrix (out, ri rb), whose leading ro right singular
    vectors are the rows of the core. The singular values are dropped, since a step of Adam should be as large for a
    weak direction as for a strong one.
    """
    if layer not in GRADIENTS:
        raise ValueError(
            f'`init_weights="gradient"` needs the gradient of this {type(layer).__name__}: call '
            "`preprocess_lotra(model, config, train_step)` before the adapter is added."
        )
    gradient = GRADIENTS[layer][..., : len(factor_basis)]
    ro, ri, rb = core.shape
    projected, *factors = tucker(gradient, (ro, ri, rb))
    factor_in.copy_(factors[1])
    factor_basis.copy_(factors[2] * math.sqrt(len(factor_basis)))
    rows = torch.linalg.svd(projected.double().flatten(1), full_matrices=False).Vh  # no more than ri rb
    nn.init.normal_(core, std=1 / math.sqrt(ri * rb))  # rows above ri rb stay random
    core.flatten(1)[: len(rows)] = rows.to(core)
    nn.init.zeros_(factor_out)
