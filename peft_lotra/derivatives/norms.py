# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A normalization applied to a jet: a value with its derivatives along some directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .chain_rule import Jet, compose, multiply


NORMS = (nn.LayerNorm, nn.BatchNorm1d)


def check_rows_apart(model: nn.Module) -> None:
    """Raise a `ValueError` if the model normalizes by the statistics of the batch."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.training or not module.track_running_stats:
            raise ValueError(
                f"`{name}` is a {type(module).__name__} that normalizes by the statistics of the batch. Its outputs "
                "depend on all rows. Put the model into evaluation mode (`model.eval()`), or use layer normalization."
            )


def through_norm(
    norm: Any,
    jet: Jet,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Return the jet of the outputs of a normalization, with arguments as for `evaluate_layer`.

    Batch normalization in evaluation mode is affine. Layer normalization is the product of m = z - mean(z) and
    s = v^(-1/2), v = mean(m^2) + eps.
    """
    if isinstance(norm, nn.LayerNorm):
        zero = jet[0].new_zeros(1, 1, 1)
        missing = [zero] * (order + 1 - len(jet))
        m = [derivative - derivative.mean(-1, keepdim=True) for derivative in (*jet, *missing)]
        squares = multiply(m, m, order, weights)
        v, *derivatives = [square.mean(-1, keepdim=True) for square in squares]

        # v^(-1/2) and its derivatives in v
        v = v + norm.eps
        powers = [torch.rsqrt(v)]
        for n in range(order):
            power = powers[-1] * (-0.5 - n) / v
            powers.append(power)
        s = compose(powers, derivatives, order, weights)
        jet = multiply(m, s, order, weights)
    else:
        z, *derivatives = jet
        scale = torch.rsqrt(norm.running_var + norm.eps)
        centered = [z - norm.running_mean, *derivatives]
        jet = [derivative * scale for derivative in centered]
    if norm.weight is not None:
        jet = [derivative * norm.weight for derivative in jet]
    if norm.bias is not None:
        jet[0] = jet[0] + norm.bias
    return jet
