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

"""How the four components of a LoTRA adapter start."""

from __future__ import annotations

import math

import torch
from torch import nn


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
    factor_out starts at zero, so that the adapted model equals its base (as LoRA's B does; a zero core learned more
    slowly), or normal with variance 1 / ro if `zero_update` is false. Parameters on the meta device are left alone.

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
        factor.copy_(nn.init.orthogonal_(torch.empty_like(factor, dtype=torch.float32), gain))
    if zero_update:
        nn.init.zeros_(factor_out)
    else:
        nn.init.normal_(factor_out, std=1 / math.sqrt(ro))
