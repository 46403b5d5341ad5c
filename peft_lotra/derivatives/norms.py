# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A normalization applied to a jet: a value with first and second derivatives along some directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    """The jet of the outputs of a normalization; arguments as for `evaluate_layer`.

    Batch normalization in evaluation mode is affine. Layer normalization is n = m s with m = z - mean(z) and
    s = (mean(m^2) + eps)^(-1/2), so that with the mean c of m m'

        n' = m' s + m s',                 s' = -s^3 c,
        n'' = m'' s + 2 m' s' + m s'',    s'' = 3 s^5 c^2 - s^3 (mean(m'^2) + mean(m m'')).
    """
    lead = z.shape[:-1]
    z, first, second = all_rows_last(z, first, second)
    first = first.expand(len(first), *z.shape)
    if second is None:
        second = torch.zeros_like(first if weights is None else first[:1])
    scale, shift = (None if part is None else part.unsqueeze(-1) for part in (norm.weight, norm.bias))
    if isinstance(norm, nn.LayerNorm):
        y, dy, d2y = _normalize(norm.eps, z, first, second, weights)
    else:
        assert norm.running_mean is not None and norm.running_var is not None  # see `is_norm`
        s = torch.rsqrt(norm.running_var + norm.eps).unsqueeze(-1)
        y, dy, d2y = (z - norm.running_mean.unsqueeze(-1)) * s, first * s, second * s
    if scale is not None:
        y, dy, d2y = y * scale, dy * scale, d2y * scale
    y, dy, d2y = (rows_first(part, lead) for part in (y if shift is None else y + shift, dy, d2y))
    return y, dy, d2y


def _normalize(
    eps: float, z: Tensor, first: Tensor, second: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The jet of layer normalization without scale and shift, for z (I, N), z' (D, I, N) and z'' (D or 1, I, N)."""
    sizes = [1, len(first), len(second)]
    parts = torch.cat([z.unsqueeze(0), first, second])
    parts = parts - parts.mean(1, keepdim=True)
    m, dm, _ = parts.split(sizes)
    variance, c, of_second = (parts * m).mean(1, keepdim=True).split(sizes)
    s = torch.rsqrt(variance + eps)
    ds = -(s**3) * c
    squares = 3 * s**5 * c.square() - s**3 * dm.square().mean(1, keepdim=True)
    mixed = 2 * dm * ds if weights is None else dm * (2 * weights[:, None, None] * ds)
    if weights is not None:
        squares, mixed = torch.tensordot(weights, squares, 1).unsqueeze(0), mixed.sum(0, keepdim=True)
    y, slopes = (parts * s).split([1, len(first) + len(second)])
    slopes = torch.addcmul(slopes, m, torch.cat([ds, squares - s**3 * of_second]))
    dy, d2y = slopes.split(sizes[1:])
    return y.squeeze(0), dy, d2y + mixed


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
