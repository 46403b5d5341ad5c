# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A normalization applied to a jet: a value with first and second derivatives along some directions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .layer_jet import by_hand_pays
from .norm_by_hand import LayerNormJet


Norm = nn.LayerNorm | nn.BatchNorm1d


def check_rows_apart(model: nn.Module) -> None:
    """Raises a `ValueError` if the model normalizes by the statistics of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                f"`{name}` is a {type(module).__name__} that normalizes by the statistics of the batch, so that a row "
                "of the output has no derivatives of its own. Put the model into evaluation mode (`model.eval()`), or "
                "use layer normalization."
            )


def norm_size(module: Norm) -> int:
    """The size of the last dimension, which the module normalizes."""
    return module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else module.num_features


def through_norm(
    norm: Norm, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The jet of the outputs; arguments as for `evaluate_layer`.

    Of layer normalization see `LayerNormJet`; batch normalization in evaluation mode is affine.
    """
    scale: Tensor | None = norm.weight  # with the bias None, if not affine
    shift: Tensor | None = norm.bias
    if isinstance(norm, nn.LayerNorm):
        y, dy, d2y = _through_layer_norm(norm.eps, scale, z, first, second, weights)
        return y if shift is None else y + shift, dy, d2y
    assert norm.running_mean is not None and norm.running_var is not None  # see `is_norm`
    first, second = _filled(z, first, second, weights)
    deviation = torch.rsqrt(norm.running_var + norm.eps)
    scale = deviation if scale is None else deviation * scale
    y = (z - norm.running_mean) * scale
    return y if shift is None else y + shift, first * scale, second * scale


def rows_last(part: Tensor, lead: torch.Size) -> Tensor:
    """(D, ..., I), where (...) may be ones, to (D, I, N) or (D, I, 1)."""
    if len(lead) == 1:  # the usual one, without operations that would leave all as it is
        return part.mT
    rows = part.shape[1:-1].numel()
    if rows > 1:
        part, rows = part.expand(len(part), *lead, part.shape[-1]), lead.numel()
    return part.reshape(len(part), rows, part.shape[-1]).mT


def all_rows_last(z: Tensor, first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """z (..., I), z' and z'' (D, ..., I) with rows last, as by `rows_last`."""
    lead = z.shape[:-1]
    flat = z if len(lead) == 1 else z.reshape(-1, z.shape[-1])
    return flat.mT, rows_last(first, lead), None if second is None else rows_last(second, lead)


def rows_first(part: Tensor, lead: torch.Size) -> Tensor:
    """(..., I, N) to (..., *lead, I)."""
    return part.mT if len(lead) == 1 else part.mT.reshape(*part.shape[:-2], *lead, part.shape[-2])


def _filled(z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """z' for each row, and zeros for a z'' that is None."""
    first = first.expand(len(first), *z.shape)
    return first, torch.zeros_like(first if weights is None else first[:1]) if second is None else second


def _through_layer_norm(
    eps: float, scale: Tensor | None, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    varies = weights is not None and weights.requires_grad
    if varies or not by_hand_pays(z[..., 0].numel(), z, first, second, scale):
        return _normalize(eps, weights, z, first, second, scale)
    found = LayerNormJet.apply(
        *all_rows_last(z, first, second), scale, weights, eps, partial(_rows_last_normalize, eps, weights)
    )
    y, dy, d2y = (rows_first(part, z.shape[:-1]) for part in found)
    return y, dy, d2y


def _rows_last_normalize(
    eps: float, weights: Tensor | None, z: Tensor, first: Tensor, second: Tensor | None, scale: Tensor | None
) -> list[Tensor]:
    second = None if second is None else second.mT
    return [part.mT for part in _normalize(eps, weights, z.mT, first.mT, second, scale)]


def _normalize(
    eps: float, weights: Tensor | None, z: Tensor, first: Tensor, second: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `LayerNormJet`, with rows first, by operations that autograd differentiates."""

    def mean(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def over_directions(x: Tensor) -> Tensor:
        return x if weights is None else torch.tensordot(weights, x, 1).unsqueeze(0)

    first, second = _filled(z, first, second, weights)
    m = z - mean(z)
    s = torch.rsqrt(mean(m.square()) + eps)
    n, a, b = m * s, (first - mean(first)) * s, (second - mean(second)) * s
    c = mean(n * a)  # s' = -s c, and s'' = s e
    e = over_directions(3 * c.square() - mean(a.square())) - mean(n * b)
    y, dy, d2y = n, torch.addcmul(a, n, c, value=-1), torch.addcmul(b - 2 * over_directions(a * c), n, e)
    return (y, dy, d2y) if scale is None else (y * scale, dy * scale, d2y * scale)
