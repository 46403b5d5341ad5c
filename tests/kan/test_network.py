# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_lotra.kan import KAN


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_is_the_composition_of_its_layers():
    net = KAN([2, 5, 3], grid_size=4, spline_order=2, grid_range=(0, 2), dtype=torch.float64)
    assert [(layer.in_features, layer.out_features) for layer in net.layers] == [(2, 5), (5, 3)]
    assert all((layer.grid_size, layer.spline_order, layer.grid_range) == (4, 2, (0, 2)) for layer in net.layers)
    x = torch.randn(3, 7, 2, dtype=torch.float64)
    assert torch.equal(net(x), net.layers[1](net.layers[0](x)))
    assert net(x[0, 0]).shape == (3,)


def test_ten_layers_keep_the_variance():
    net = KAN([128] * 11)
    x = torch.rand(2000, 128) * 2 - 1
    variance = x.var()
    with torch.no_grad():
        for layer in net.layers:
            x = layer(x)
            assert 0.5 < x.var() / variance < 2


def test_update_grid_gives_each_layer_what_reaches_it():
    net = KAN([3, 8, 2], dtype=torch.float64)
    x = 2 * torch.rand(4, 100, 3, dtype=torch.float64)
    net.update_grid(x, margin=0.0)
    for layer in net.layers:
        low, high = layer.grid_bounds.unbind(-1)
        reached = x.reshape(-1, layer.in_features)
        torch.testing.assert_close(low, reached.amin(0))
        torch.testing.assert_close(high, reached.amax(0))
        x = layer(x)


def test_update_grid_changes_nothing_on_error():
    net = KAN([3, 8, 2])
    with torch.no_grad():
        net.layers[0].base_weight[5] = torch.inf  # of the second layer's inputs
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match="samples have shape .100, 8., .* finite"):
        net.update_grid(torch.randn(100, 3))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("widths", [[], [3], [3, 0], [3, 2.0], 3, "32"])
def test_refuses_widths(widths):
    with pytest.raises(ValueError, match="`widths` is .* at least two positive integers"):
        KAN(widths)
