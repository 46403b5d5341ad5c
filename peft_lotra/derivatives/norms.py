# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A normalization applied to a jet: a value with its derivatives along some directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .chain_rule import Jet, compose, multiply


NormLayer = nn.LayerNorm | nn.BatchNorm1d


def check_rows_apart(model: nn.Module) -> None:
    """Raises a `ValueError` if the model normalizes by the statistics of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                f"`{name}` is a {type(module).__name__} that normalizes by the statistics of the batch, so that a row "
                "of the output has no derivatives of its own. Put the model into evaluation mode (`model.eval()`), or "
                "use layer normalization."
            )


def norm_size(module: NormLayer) -> int:
    """The size of the last dimension, which the module normalizes."""
    return module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else module.num_features


def through_norm(norm: NormLayer, jet: Jet, order: int, weights: Tensor | None) -> Jet:
    """The jet of the outputs of a normalization; arguments as for `evaluate_layer`.

    Batch normalization in evaluation mode is affine. Layer normalization is the product of m = z - mean(z) and
    s = v^(-1/2), v = mean(m^2) + eps.
    """
    jet = [part.mT for part in jet]
    scale, shift = (None if part is None else part.unsqueeze(-1) for part in (norm.weight, norm.bias))
    if isinstance(norm, nn.LayerNorm):
        jet = _normalize(norm.eps, jet, order, weights)
    else:
        assert norm.running_mean is not None and norm.running_var is not None  # see `is_norm`
        s = torch.rsqrt(norm.running_var + norm.eps).unsqueeze(-1)
        jet = [(part if n else part - norm.running_mean.unsqueeze(-1)) * s for n, part in enumerate(jet)]
    if scale is not None:
        jet = [part * scale for part in jet]
    if shift is not None:
        jet[0] = jet[0] + shift
    return [part.mT for part in jet]


def _normalize(eps: float, jet: Jet, order: int, weights: Tensor | None) -> Jet:
    """The jet of layer normalization without scale and shift, for z (I, N) and its derivatives (D or 1, I, N)."""
    zeros = [jet[0].new_zeros(1, 1, 1)] * (order + 1 - len(jet))
    m = [part - part.mean(-2, keepdim=True) for part in [*jet, *zeros]]
    v, *of_v = [part.mean(-2, keepdim=True) for part in multiply(m, m, order, weights)]
    v = v + eps
    powers = [torch.rsqrt(v)]
    for n in range(order):
        powers.append(powers[-1] * (-0.5 - n) / v)
    return multiply(m, compose(powers, of_v, order, weights), order, weights)
