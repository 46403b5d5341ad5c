# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A normalisation applied to a jet: a value with first and second derivatives along some directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..network import BatchNorm


def is_norm(module: nn.Module) -> bool:
    """Whether `through_norm` knows the module: layer normalisation of the last dimension, and batch normalisation by
    running statistics (in evaluation mode)."""
    if type(module) is nn.LayerNorm:
        return len(module.normalized_shape) == 1
    return type(module) in (BatchNorm, nn.BatchNorm1d) and not module.training and module.track_running_stats


def check_rows_apart(model: nn.Module) -> None:
    """Raises a `ValueError` if the model normalises by the statistics of the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                f"`{name}` is a {type(module).__name__} that normalises by the statistics of the batch, so that a row "
                "of the output has no derivatives of its own. Put the model into evaluation mode (`model.eval()`), or "
                "use layer normalisation."
            )


def norm_size(module: nn.Module) -> int:
    """The size of the last dimension that it normalises."""
    return module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else module.num_features


def through_norm(
    norm: nn.Module, z: Tensor, first: Tensor, second: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    (z, z', z'') to (y, y', y''), with arguments and shapes as in `through_layer`, by operations that autograd
    differentiates.

    With m = z - mean(z), v = mean(m^2) + eps and s = v^(-1/2), layer normalisation is m s; batch normalisation in
    evaluation mode is affine.
    """
    first = first.expand(len(first), *z.shape)
    if second is None:
        second = torch.zeros_like(first if weights is None else first[:1])
    if isinstance(norm, nn.LayerNorm):
        y = _normalise(z, first, second, weights, norm.eps)
        scale, shift = norm.weight, norm.bias
    else:
        y, scale, shift = (z - norm.running_mean, first, second), torch.rsqrt(norm.running_var + norm.eps), norm.bias
        scale = scale if norm.weight is None else scale * norm.weight
    if scale is not None:
        y = tuple(part * scale for part in y)
    return (y[0] if shift is None else y[0] + shift, *y[1:])


def _normalise(
    z: Tensor, first: Tensor, second: Tensor, weights: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    def mean(x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)

    def over_directions(x: Tensor) -> Tensor:
        return x if weights is None else torch.tensordot(weights, x, 1).unsqueeze(0)

    m, dm, d2m = (part - mean(part) for part in (z, first, second))
    v, dv = mean(m.square()) + eps, 2 * mean(m * dm)
    d2v = 2 * mean(over_directions(dm.square()) + m * d2m)
    s = torch.rsqrt(v)
    slope, bend = s**3 / -2, 3 * s**5 / 4  # of s in v
    ds, d2s = slope * dv, bend * over_directions(dv.square()) + slope * d2v
    return m * s, dm * s + m * ds, d2m * s + 2 * over_directions(dm * ds) + m * d2s
