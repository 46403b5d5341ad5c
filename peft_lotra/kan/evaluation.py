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

"""The splines of `basis.py` once more, by operations in given memory: with as few passes over it as torch allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .basis import spline_factors


Pair = tuple[Tensor, Tensor]  # left (O, r) and right (r, I, K) of an update
Gradients = tuple[Tensor | None, ...]  # towards x, weight, left and right


class Points(NamedTuple):
    """Points on the grids of a layer."""

    x: Tensor  # (N, I)
    low: Tensor  # lower ends of the grids, (I,) or ()
    scale: Tensor  # grid intervals per unit, (I,) or ()
    num_basis: int
    spline_order: int

    @property
    def position(self) -> Tensor:
        """The points in grid intervals from `low`, (N, I)."""
        return (self.x - self.low) * self.scale


class TruncatedPowers:
    r"""
    The truncated powers whose sum is the cardinal spline, see `bspline_basis`.

    A grid interval is `unit` long, with unit^p = 1 / p!, so that no pass divides by p!: with the distances
    t_m = max(half_width - |offset| - m unit, 0) the spline is  sum_m factors[m] t_m^p.
    """

    def __init__(self, spline_order: int, num_basis: int, like: Tensor) -> None:
        self.factors = spline_factors(spline_order)
        self.unit, self.half_width, self.centers = _constants(spline_order, num_basis, like.dtype, like.device)

    def distances(self, offsets: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        """The t_m, in the memory of `offsets`, which holds |offset|, and of `others`."""
        found = [torch.sub(self.half_width, offsets, out=offsets).relu_()]
        for buffer in others:
            found.append(torch.sub(found[-1], self.unit, out=buffer).relu_())
        return found

    def sum_into(self, out: Tensor, powers: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the powers; `out` may be the first of them."""
        total = powers[0]
        for factor, power in zip(self.factors[1:], powers[1:], strict=True):
            total = torch.add(total, power, alpha=factor, out=out)
        return total if total is out else out.copy_(total)


@lru_cache(maxsize=64)
def _constants(
    spline_order: int, num_basis: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, Tensor, Tensor]:
    unit = math.factorial(spline_order) ** (-1 / spline_order)
    with torch.inference_mode(False):  # see `workspace`
        centers = (torch.arange(num_basis, dtype=dtype, device=device) - (spline_order - 1) / 2) * unit
        return unit, torch.tensor((spline_order + 1) / 2 * unit, dtype=dtype, device=device), centers


def integer_power(x: Tensor, n: int, out: Tensor) -> Tensor:
    """x^n for x >= 0, where 0^0 is 0, written into `out`, which may be `x`."""
    if n == 0:
        return torch.sign(x, out=out)
    if n == 1:
        return x if out is x else out.copy_(x)
    if n <= 3:  # the exponents that torch.pow is fast for
        return torch.pow(x, n, out=out)
    if n == 4:
        return torch.square(x, out=out).square_()
    return torch.mul(x, x.square().square_(), out=out)
