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

"""How the four components of a LoTRA adapter start: at random, or from the gradient of the coefficient tensors.

Either way the update starts at zero, by a zero factor_out (as LoRA's B), which learned faster than a zero core on
every task tried. The other three say which combinations of inputs and basis functions each output may weigh at first.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..tucker import tucker
from .gradients import _GRADIENTS


@torch.no_grad()
def reset_components(
    core: torch.Tensor,
    factor_out: torch.Tensor,
    factor_in: torch.Tensor,
    factor_basis: torch.Tensor,
    zero_update: bool = True,
) -> None:
    """Draws the four components in place, such that the update has the size of a well-scaled layer's output.

    factor_in and factor_basis get orthogonal columns, of norm 1 and sqrt(basis): a projected basis function then has
    the size of a basis function for any width. The core is normal with variance 1 / (ri rb), which keeps that size.
    factor_out is zero, or normal with variance 1 / ro if `zero_update` is false. Parameters on the meta device are
    left alone.

    Args:
        core (`torch.Tensor`): (ro, ri, rb).
        factor_out (`torch.Tensor`): (out, ro).
        factor_in (`torch.Tensor`): (in, ri).
        factor_basis (`torch.Tensor`): (basis, rb).
        zero_update (`bool`): Whether the update is zero at first.
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
    core: torch.Tensor,
    factor_out: torch.Tensor,
    factor_in: torch.Tensor,
    factor_basis: torch.Tensor,
    layer: nn.Module,
) -> None:
    """Sets the adapter to what the gradient that `preprocess_lotra` gathered for the layer says that outputs need.

    The best Tucker approximation (HOOI) of the gradient gives factor_in and factor_basis, which get the norms that
    random ones have (1 and sqrt(basis)). With the gradient projected on them unfolded to (out, ri rb), the rows of
    the core are its leading ro right singular vectors: the orthonormal combinations of inputs and basis functions
    that the first step of full fine-tuning would use most. factor_out, the weights of these for each output, is zero,
    as in `reset_components`, whose scales and learning rates this start shares.

    The singular values themselves are dropped. A step of Adam is as large for a weak direction as for a strong one
    then, and that was better by two points of accuracy than rows of their length. It was also better by one to two
    points than factors of the gradient in all three modes with a zero core, where such a step has no such weights for
    each output, and moves all directions at once.

    Args:
        core, factor_out, factor_in, factor_basis (`torch.Tensor`): As for `reset_components`.
        layer (`nn.Module`): The KAN layer. Its gradient is used up.

    Raises:
        ValueError: No gradient was gathered for the layer.
    """
    if layer not in _GRADIENTS:
        raise ValueError(
            f'`init_weights="gradient"` needs the gradient of this {type(layer).__name__}: call '
            "`preprocess_lotra(model, config, train_step)` before the adapter is added."
        )
    gradient = _GRADIENTS[layer][..., : len(factor_basis)]
    ro, ri, rb = core.shape
    projected, *factors = tucker(gradient, (ro, ri, rb))
    factor_in.copy_(factors[1])
    factor_basis.copy_(factors[2] * math.sqrt(len(factor_basis)))
    rows = torch.linalg.svd(projected.double().flatten(1), full_matrices=False).Vh  # no more than ri rb
    nn.init.normal_(core, std=1 / math.sqrt(ri * rb))  # for outputs beyond, random ones
    core.flatten(1)[: len(rows)] = rows.to(core)
    nn.init.zeros_(factor_out)
