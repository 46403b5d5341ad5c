# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How the components of an adapter start: at random, from the base's coefficients, or from their gradient.

One component is zero (as LoRA's B, factor_out), so that the update is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tucker import Tucker, truncated_hosvd, tucker


@torch.no_grad()
def initialize(components: Tucker, start: bool | str, zero: str, source: Tensor | None = None) -> None:
    """Fills the components of an adapter in place; those on the meta device are left alone.

    Args:
        components: The components.
        start: `init_weights` of the configuration.
        zero: The component that is zero, so that the update is; none with `start=False`.
        source: The coefficients (out, in, basis [, kernel]) of the base layer for `start="hosvd"`, their gradient for
            `"gradient"`.
    """
    if components.core.is_meta:
        return
    if isinstance(start, bool) or source is None:
        _at_random(components, draw_out=not start or zero != "factor_out")
    elif start == "gradient":
        _from_gradient(components, zero, source)
    else:
        _from_base(components, source)
    if start:
        getattr(components, zero).zero_()


def check_start(start: bool | str, source: Tensor | None) -> None:
    """Raises a ValueError if an adapter cannot start so."""
    if start in ("gradient", "training"):
        raise ValueError(
            f'`init_weights="{start}"` is what files say of such a start. Leave it out, and call '
            f"`start_from_{start}(model, loss)` once the adapter is added."
        )
    if start == "hosvd" and (source is None or source.is_meta or not source.isfinite().all()):
        state = "not finite" if source is not None and not source.is_meta else "on the meta device"
        raise ValueError(
            f'`init_weights="hosvd"` decomposes the coefficients of the base layers, but those of one are {state}. '
            "Load the weights of the base before the adapter is added, or pass `init_weights=True`."
        )


def _at_random(components: Tucker, draw_out: bool) -> None:
    """Draws the components such that the update has the size of a well-scaled layer's output.

    factor_in, factor_basis and factor_kernel get orthogonal columns, of norm 1, sqrt(basis) and 1: a projected basis
    function then has the size of a basis function for any width and kernel. The core is normal with variance
    1 / (ri rb [rk]), which keeps that size, and factor_out with variance 1 / ro. The core takes the norm of a
    factor_basis that is absent.
    """
    core, factor_out, *inner = components
    core.normal_(std=_size_of_core(components))
    gains = (1.0, math.sqrt(components.shape[2]), 1.0)
    for factor, gain in zip(inner, gains, strict=False):
        if factor is None:
            continue
        # the QR decomposition does not exist in half precision
        q, r = torch.linalg.qr(torch.randn_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32)))
        factor.copy_(q * (gain * r.diagonal().sign()))  # as `nn.init.orthogonal_`, in half the time
    if draw_out and factor_out is not None:  # a component that is zero anyway takes no random numbers
        factor_out.normal_(std=1 / math.sqrt(len(core)))


def _from_gradient(components: Tucker, zero: str, gradient: Tensor) -> None:
    """Sets the components to the directions that the gradient of a layer's coefficients uses most.

    The best Tucker approximation (HOOI) of the gradient gives factor_in, factor_basis and factor_kernel, with columns
    of norm 1, sqrt(basis) and 1. The gradient projected on them unfolds to a matrix (out, ri rb [rk]), whose leading
    ro right singular vectors are the rows of the core. The singular values are dropped, since a step of Adam should be
    as large for a weak direction as for a strong one.

    Where factor_out is not trained, or the out mode is full, another component is `zero`, and the factors that there
    are come from the approximation.
    """
    core = components.core
    gradient = gradient[:, :, : components.shape[2]]
    approximation = tucker(gradient, components.ranks)
    projected = approximation.core
    for name, factor in approximation.balanced()._asdict().items():
        if name != "core":
            getattr(components, name).copy_(factor)
    if zero != "factor_out":
        core.copy_(projected * (math.sqrt(len(core)) / projected.norm().clamp(min=1e-30)))
        return
    rows = torch.linalg.svd(projected.double().flatten(1), full_matrices=False).Vh  # no more than ri rb [rk]
    size = _size_of_core(components)
    core.normal_(std=size)  # rows above these stay random
    core.flatten(1)[: len(rows)] = rows.to(core) * (size * math.sqrt(rows.shape[1]))


def _size_of_core(components: Tucker) -> float:
    """Return the standard deviation of a core whose rows have the norm 1, or sqrt(basis) without factor_basis."""
    size = 1.0 if components.factor_basis is not None else components.shape[2]
    return math.sqrt(size / math.prod(components.ranks[1:]))


def _from_base(components: Tucker, coefficients: Tensor) -> None:
    """Sets the components to the truncated HOSVD of the layer's coefficients.

    Columns of the factors get the norms sqrt(out), 1, sqrt(basis) and 1.

    Source: Y. Gao, K. C. Cheung and M. K. Ng, "SVD-PINNs", arXiv 2211.08760, for matrices.
    """
    values = truncated_hosvd(coefficients[:, :, : components.shape[2]], components.ranks).balanced()
    for name, component in components._asdict().items():
        component.copy_(getattr(values, name))
