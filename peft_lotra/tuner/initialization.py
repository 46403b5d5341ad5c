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

Either way factor_out is zero, as LoRA's B, so that the update is zero. The other three components say which
combinations of inputs and basis functions each output may weigh at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..tucker import tucker


# The gradients that preprocess_lotra has gathered, until an adapter starts from them. They are kept beside the layers,
# not on them, so that the base model is not touched.
_GRADIENTS: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()


def keep_gradients(gradients: Mapping[nn.Module, torch.Tensor]) -> None:
    """Keeps the gradients of the layers for `reset_components_from_gradient`."""
    _GRADIENTS.update(gradients)


def drop_gradients(layers: Iterable[nn.Module]) -> None:
    """Forgets the gradients of the layers, once the adapter is made."""
    for layer in layers:
        _GRADIENTS.pop(layer, None)


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
    factor_out is zero, or normal with variance 1 / ro. Parameters on the meta device are left alone.

    Args:
        core (`torch.Tensor`): (ro, ri, rb).
        factor_out (`torch.Tensor`): (out, ro).
        factor_in (`torch.Tensor`): (in, ri).
        factor_basis (`torch.Tensor`): (basis, rb).
        zero_update (`bool`): Whether the update is zero at first.

    Example:
        >>> core, factor_out = torch.empty(2, 3, 4), torch.empty(5, 2)
        >>> factor_in, factor_basis = torch.empty(6, 3), torch.empty(8, 4)
        >>> reset_components(core, factor_out, factor_in, factor_basis)
        >>> factor_out.any().item(), (factor_in.T @ factor_in).allclose(torch.eye(3), atol=1e-6)
        (False, True)
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
    """Sets the components to the directions that the gradient of the layer's coefficients uses most.

    The best Tucker approximation (HOOI) of the gradient gives factor_in and factor_basis, with columns of norm 1 and
    sqrt(basis), as random ones have. The gradient projected on both unfolds to a matrix (out, ri rb), whose leading ro
    right singular vectors are the rows of the core: the orthonormal combinations of inputs and basis functions that
    the first step of full fine-tuning would use most. The singular values are dropped, since a step of Adam should be
    as large for a weak direction as for a strong one. factor_out is zero, as in `reset_components`.

    Args:
        core, factor_out, factor_in, factor_basis (`torch.Tensor`): As for `reset_components`.
        layer (`nn.Module`): The KAN layer, for which `preprocess_lotra` gathered a gradient.

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
    nn.init.normal_(core, std=1 / math.sqrt(ri * rb))  # rows above ri rb stay random
    core.flatten(1)[: len(rows)] = rows.to(core)
    nn.init.zeros_(factor_out)
