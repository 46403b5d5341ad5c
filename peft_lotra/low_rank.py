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

"""A linear map with an update of low rank, whose gradients are thin products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .kan.product import needs_plain_operations


def low_rank_addmm(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """
    y + x (weight + left right)^T, where a weight that needs no gradient costs none.

    Args:
        y: shape (N, O).
        x: shape (N, I).
        weight: shape (O, I).
        left, right: shapes (O, r) and (r, I).

    Returns:
        Tensor of shape (N, O).
    """
    if needs_plain_operations(y, x, weight, left, right) or weight.requires_grad or len(x) < len(weight):
        return torch.addmm(y, x, weight.t()) + F.linear(F.linear(x, right), left)
    return _LowRankAddmm.apply(y, x, weight, left, right)


class _LowRankAddmm(torch.autograd.Function):
    """With more rows than outputs, it costs less to form the sum than to multiply by both summands."""

    @staticmethod
    def forward(ctx, y, x, weight, left, right):
        ctx.save_for_backward(x, weight, left, right)
        return torch.addmm(y, x, torch.addmm(weight, left, right).t())

    @staticmethod
    def backward(ctx, gradient):
        x, weight, left, right = ctx.saved_tensors
        results = [gradient, None, None, None, None]
        if ctx.needs_input_grad[1]:
            results[1] = gradient @ torch.addmm(weight, left, right)
        if ctx.needs_input_grad[3]:
            results[3] = gradient.t() @ (x @ right.t())
        if ctx.needs_input_grad[4]:
            results[4] = (gradient @ left).t() @ x
        return tuple(results)
