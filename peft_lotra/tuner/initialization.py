# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Initialize the components of an adapter: at random, from the base's coefficients, or from their gradient.

One component, by default factor_out, is zero like LoRA's B, so that the update is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tucker import Tucker, truncated_hosvd, tucker


@torch.no_grad()
def initialize(
    components: Tucker,
    start: bool | str,
    zero: str,
    source: Tensor | None = None,
) -> None:
    """Fill the components of an adapter in place, except on the meta device.

    Args:
        components: The components.
        start: `init_weights` of the configuration.
        zero: The component that becomes zero, unless `start` is False.
        source: The coefficients (out, in, basis [, kernel]) of the base layer for `start="hosvd"`, their gradient for
            `"gradient"`.
    """
    if components.core.is_meta:
        return
    if source is None:
        _at_random(components, draw_out=not start or zero != "factor_out")
    else:
        # factors with columns of norm sqrt(out), 1, sqrt(basis) and 1. HOSVD of the base generalizes, to tensors, the
        # start of Y. Gao, K. C. Cheung and M. K. Ng, "SVD-PINNs", arXiv 2211.08760.
        decompose = tucker if start == "gradient" else truncated_hosvd
        approximation = decompose(source[:, :, : components.shape[2]], components.ranks)
        for name, component in approximation.balanced()._asdict().items():
            getattr(components, name).copy_(component)
        if start == "gradient":
            _set_core(components, zero, approximation.core)
    if start:
        getattr(components, zero).zero_()


def check_start(start: str, source: Tensor) -> None:
    """Raise a ValueError if an adapter cannot be initialized from the coefficients of a base layer."""
    if start != "hosvd":
        raise ValueError(
            '`init_weights="gradient"` is written by such a start. Leave it out, and call '
            "`start_from_gradient(model, loss)` once the adapter is added."
        )
    if source.is_meta or not source.isfinite().all():
        raise ValueError(
            '`init_weights="hosvd"` decomposes the coefficients of the base layers, but in one they are not finite, '
            "or on the meta device. Load the weights of the base first, or pass `init_weights=True`."
        )


def _at_random(components: Tucker, draw_out: bool) -> None:
    """Draw components whose update has the size of the output of a well-scaled layer.

    factor_in, factor_basis and factor_kernel get orthogonal columns of norm 1, sqrt(basis) and 1. A projected basis
    function then has the size of a basis function, for any width and kernel. The core is normal with variance
    1 / (ri rb [rk]), which keeps that size, and factor_out with variance 1 / ro. Without factor_basis, the core gets
    its norm.
    """
    core, factor_out, *inner = components
    core.normal_(std=_size_of_core(components))
    gains = (1.0, math.sqrt(components.shape[2]), 1.0)
    for factor, gain in zip(inner, gains, strict=False):
        if factor is not None:
            # the QR decomposition does not exist in half precision
            dtype = torch.promote_types(factor.dtype, torch.float32)
            draws = torch.randn_like(factor, dtype=dtype)
            q, r = torch.linalg.qr(draws)
            signs = r.diagonal().sign()
            factor.copy_(q * (gain * signs))  # as `nn.init.orthogonal_`, in half the time
    if draw_out and factor_out is not None:  # else the random numbers of the next layer would change
        factor_out.normal_(std=1 / math.sqrt(len(core)))


def _set_core(components: Tucker, zero: str, projected: Tensor) -> None:
    """Set the core to the leading directions of a gradient, projected on the other factors (HOOI).

    The projected gradient unfolds to a matrix (out, ri rb [rk]). Its leading ro right singular vectors are the rows of
    the core. The singular values are dropped, so that a step of Adam is as large for a weak direction as for a strong
    one.

    If `zero` is not factor_out, which is frozen or absent, the core comes from the approximation too.
    """
    core = components.core
    if zero != "factor_out":
        norm = projected.norm().clamp(min=1e-30)
        core.copy_(projected * (math.sqrt(len(core)) / norm))
        return

    unfolding = projected.double().flatten(1)
    rows = torch.linalg.svd(unfolding, full_matrices=False).Vh  # no more than ri rb [rk]
    size = _size_of_core(components)
    core.normal_(std=size)  # rows above these stay random
    norm = size * math.sqrt(rows.shape[1])
    core.flatten(1)[: len(rows)] = norm * rows.to(core)


def _size_of_core(components: Tucker) -> float:
    """Return the standard deviation of a core whose rows have the norm 1, or sqrt(basis) without factor_basis."""
    size = 1.0 if components.factor_basis is not None else components.shape[2]
    return math.sqrt(size / math.prod(components.ranks[1:]))
