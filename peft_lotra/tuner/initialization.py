# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How the components of an adapter start: at random, from the base's coefficients, or from their gradient.

One component is zero (as LoRA's B, factor_out), so that the update is zero.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..tucker import KernelTucker, Tucker, truncated_hosvd, tucker


# What preprocess_lotra gathered, until an adapter starts from it; not on the layers, so that the base is not touched.
GRADIENTS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@torch.no_grad()
def reset_components(
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    factor_basis: Tensor,
    *factor_kernel: Tensor,
    zero: str | None = "factor_out",
) -> None:
    """Draws the components in place, such that the update has the size of a well-scaled layer's output.

    factor_in, factor_basis and factor_kernel get orthogonal columns, of norm 1, sqrt(basis) and 1: a projected basis
    function then has the size of a basis function for any width and kernel. The core is normal with variance
    1 / (ri rb [rk]), which keeps that size, and factor_out with variance 1 / ro. The component `zero` is zero.
    Parameters on the meta device are left alone.
    """
    if core.is_meta:
        return
    ro, *inner = core.shape
    nn.init.normal_(core, std=1 / math.sqrt(math.prod(inner)))
    gains = (1.0, math.sqrt(len(factor_basis)), 1.0)
    for factor, gain in zip((factor_in, factor_basis, *factor_kernel), gains, strict=False):
        # the QR decomposition behind it does not exist in half precision
        full = torch.empty_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32))
        factor.copy_(nn.init.orthogonal_(full, gain))
    if zero != "factor_out":  # a component that is zero anyway takes no random numbers
        nn.init.normal_(factor_out, std=1 / math.sqrt(ro))
    _set_zero((core, factor_out, factor_in, factor_basis, *factor_kernel), zero)


@torch.no_grad()
def reset_components_from_gradient(
    core: Tensor,
    factor_out: Tensor,
    factor_in: Tensor,
    factor_basis: Tensor,
    *factor_kernel: Tensor,
    layer: nn.Module,
    zero: str = "factor_out",
) -> None:
    """Sets the components to the directions that the gradient of the layer's coefficients uses most.

    The best Tucker approximation (HOOI) of the gradient gives factor_in, factor_basis and factor_kernel, with columns
    of norm 1, sqrt(basis) and 1. The gradient projected on them unfolds to a matrix (out, ri rb [rk]), whose leading
    ro right singular vectors are the rows of the core. The singular values are dropped, since a step of Adam should be
    as large for a weak direction as for a strong one.

    Where factor_out is not trained, another component is `zero`, and factor_out comes from the approximation too.
    """
    if layer not in GRADIENTS:
        raise ValueError(
            f'`init_weights="gradient"` needs the gradient of this {type(layer).__name__}: call '
            "`preprocess_lotra(model, config, train_step)` before the adapter is added."
        )
    gradient = GRADIENTS[layer][:, :, : len(factor_basis)]
    projected, out, *factors = tucker(gradient, tuple(core.shape))
    for factor, value in zip((factor_in, factor_basis, *factor_kernel), factors, strict=True):
        factor.copy_(value)
    factor_basis.mul_(math.sqrt(len(factor_basis)))
    if zero != "factor_out":
        factor_out.copy_(out).mul_(math.sqrt(len(factor_out)))
        core.copy_(projected * (math.sqrt(len(core)) / projected.norm().clamp(min=1e-30)))
        _set_zero((core, factor_out, factor_in, factor_basis, *factor_kernel), zero)
        return
    rows = torch.linalg.svd(projected.double().flatten(1), full_matrices=False).Vh  # no more than ri rb [rk]
    nn.init.normal_(core, std=1 / math.sqrt(math.prod(core.shape[1:])))  # rows above these stay random
    core.flatten(1)[: len(rows)] = rows.to(core)
    nn.init.zeros_(factor_out)


@torch.no_grad()
def reset_components_from_base(components: Tucker, coefficients: Tensor, zero: str = "core") -> None:
    """Sets the components to the truncated HOSVD of the layer's coefficients, apart from the one that is `zero`.

    Args:
        components: The components, columns of whose factors get the norms sqrt(out), 1, sqrt(basis) and 1.
        coefficients: (out, in, basis [, kernel]) of the base layer, of any dtype.
        zero: The component that is zero.

    Raises:
        ValueError: The coefficients are on the meta device, or not finite.

    Source: Y. Gao, K. C. Cheung and M. K. Ng, "SVD-PINNs", arXiv 2211.08760, for matrices.
    """
    if components.core.is_meta:
        return
    if coefficients.is_meta or not coefficients.double().isfinite().all():
        state = "on the meta device" if coefficients.is_meta else "not finite"
        raise ValueError(
            f'`init_weights="hosvd"` decomposes the coefficients of the base layers, but those of one are {state}. '
            "Load the weights of the base before the adapter is added, or pass `init_weights=True`."
        )
    ranks = tuple(components.core.shape)
    values = truncated_hosvd(coefficients[:, :, : len(components.factor_basis)], ranks).balanced()
    for component, value in zip(components, values, strict=True):
        component.copy_(value)
    _set_zero(components, zero)


def _set_zero(components: tuple[Tensor, ...], zero: str | None) -> None:
    for name, component in zip(KernelTucker._fields, components, strict=False):
        if name == zero:
            nn.init.zeros_(component)
