# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A normalization applied to a jet: a value with first and second derivatives along some directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..network import BatchNorm


Norm = nn.LayerNorm | nn.BatchNorm1d


def is_norm(module: nn.Module) -> bool:
    """Whether `through_norm` knows the module, which normalizes the last dimension of each row by itself."""
    if type(module) is nn.LayerNorm:
        return len(module.normalized_shape) == 1
    if not isinstance(module, nn.BatchNorm1d) or type(module) not in (BatchNorm, nn.BatchNorm1d):
        return False
    return not module.training and module.track_running_stats


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
    """The jet of the outputs, by operations that autograd differentiates; arguments as for `evaluate_layer`.

    With m = z - mean(z) and s = (mean(m^2) + eps)^(-1/2), layer normalization is m s; batch normalization in
    evaluation mode is affine.
    """
    first = first.expand(len(first), *z.shape)
    if second is None:
        second = torch.zeros_like(first if weights is None else first[:1])
    scale: Tensor | None = norm.weight  # with the bias None, if not affine
    shift: Tensor | None = norm.bias
    if isinstance(norm, nn.LayerNorm):
        y, dy, d2y = _normalize(z, first, second, weights, norm.eps)
    else:
        assert norm.running_mean is not None and norm.running_var is not None  # see `is_norm`
        y, dy, d2y = z - norm.running_mean, first, second
        deviation = torch.rsqrt(norm.running_var + norm.eps)
        scale = deviation if scale is None else deviation * scale
    if scale is not None:
        y, dy, d2y = y * scale, dy * scale, d2y * scale
    return y if shift is None else y + shift, dy, d2y


def _normalize(
    z: Tensor, first: Tensor, second: Tensor, weights: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    def mean(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def over_directions(x: Tensor) -> Tensor:
        return x if weights is None else torch.tensordot(weights, x, 1).unsqueeze(0)

    m = z - mean(z)
    s = torch.rsqrt(mean(m.square()) + eps)
    y, a, b = m * s, (first - mean(first)) * s, (second - mean(second)) * s
    c = mean(y * a)  # s' = -s c, and s'' = s e
    e = over_directions(3 * c.square() - mean(a.square())) - mean(y * b)
    return y, torch.addcmul(a, y, c, value=-1), torch.addcmul(b - 2 * over_directions(a * c), y, e)
