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

"""The path of large grids beside that of the whole basis; both are compared with the formula in test_product.py."""

from __future__ import annotations

import pytest
import torch

from peft_lotra.kan import KANLinear, sparse_product


def results(layer: KANLinear, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("order", [1, 3, 5])
@pytest.mark.parametrize("outputs", [1, 9])
def test_both_paths_agree(monkeypatch, order, outputs):
    layer, x = KANLinear(7, outputs, grid_size=60, spline_order=order), 3 * torch.rand(300, 7) - 1.5
    gathered = results(layer, x)
    monkeypatch.setattr(sparse_product, "_SPARSE_FROM", 1000)
    for a, e in zip(gathered, results(layer, x), strict=True):
        assert (a - e).abs().max() <= 1e-4 * e.abs().max()


@pytest.mark.parametrize(
    "grid_size, rows, dtype, sparse",
    [
        (60, 300, torch.float32, True),
        (5, 300, torch.float32, False),
        (60, 3, torch.float32, False),
        (60, 300, torch.float64, False),
    ],
)
def test_only_large_grids_and_many_points_take_it(monkeypatch, grid_size, rows, dtype, sparse):
    taken = []
    table = sparse_product._table
    monkeypatch.setattr(sparse_product, "_table", lambda *args: taken.append(True) or table(*args))
    layer = KANLinear(7, 9, grid_size=grid_size, dtype=dtype)
    layer(torch.rand(rows, 7, dtype=dtype))
    assert bool(taken) == sparse
