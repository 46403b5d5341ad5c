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


from __future__ import annotations

import pytest
import torch

from peft_lotra.kan.basis import cardinal_spline
from peft_lotra.kan.evaluation import Points, TruncatedPowers, integer_power


@pytest.mark.parametrize("power", range(6))
@pytest.mark.parametrize("in_place", [True, False])
def test_integer_powers(power, in_place):
    x = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    expected = x**power if power else torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    out = x if in_place else torch.empty_like(x)
    assert integer_power(x, power, out=out) is out
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("order", range(1, 6))
def test_truncated_powers_sum_to_the_cardinal_spline(order):
    powers = TruncatedPowers(order, 7, torch.empty(0, dtype=torch.float64))
    position = torch.linspace(-3, 10, 131, dtype=torch.float64)
    offsets = position * powers.unit - powers.centers[2]
    expected = cardinal_spline(position - 2 + (order - 1) / 2, order)
    others = [torch.empty_like(offsets) for _ in powers.factors[1:]]
    distances = powers.distances(offsets.abs(), others)
    out = powers.sum_into(torch.empty_like(offsets), [t**order for t in distances])
    torch.testing.assert_close(out, expected)


def test_positions_count_grid_intervals():
    points = Points(torch.tensor([[0.0, 0.5]]), torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 4.0]), 8, 3)
    assert points.position.tolist() == [[2.0, 2.0]]
