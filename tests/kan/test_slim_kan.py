# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers import refused
from torch.testing import assert_close

from peft_lotra.kan import KAN, KANLinear, SlimKAN, SlimKANLinear


def by_edges(layer, x):
    """Sum over edges with the whole coefficient tensor."""
    tensor = layer.components.dense()
    return torch.einsum("oik,bik->bo", tensor[..., :-1], layer.basis(x)) + F.silu(x) @ tensor[..., -1].T


@pytest.mark.parametrize("ranks", [(3, 2, 4), (1, 1, 1), (6, 5, 9), (2, 5, 3), ("full", "full", 1), ("full", 2, 9)])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])  # few and many rows are computed in different orders
def test_values_and_gradients_are_those_of_the_sum_over_edges(ranks, rows):
    layer, x = SlimKANLinear(5, 6, ranks, dtype=torch.float64), torch.randn(rows, 5, dtype=torch.float64)
    tensors = [x.requires_grad_(), *layer.parameters()]
    expected = by_edges(layer, x)
    direction = torch.randn_like(expected)

    y = layer(x)
    gradients = torch.autograd.grad(y, tensors, direction)

    assert_close(y, expected)
    assert_close(gradients, torch.autograd.grad(expected, tensors, direction))
    assert_close(layer(x.view(-1, 1, 5)).view_as(expected), expected)


@pytest.mark.parametrize(
    "ranks, shapes",
    [
        ((3, 2, 4), {"core": (3, 2, 4), "factor_out": (6, 3), "factor_in": (5, 2), "factor_basis": (9, 4)}),
        (("full", "full", 1), {"core": (6, 5, 1), "factor_basis": (9, 1)}),
        ((6, 5, 1), {"core": (6, 5, 1), "factor_basis": (9, 1)}),
    ],
)
def test_its_parameters_are_the_core_and_a_factor_for_each_mode_that_is_not_full(ranks, shapes):
    layer = SlimKANLinear(5, 6, ranks)

    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == shapes
    assert list(layer.state_dict()) == [*shapes, "grid_bounds"]
    assert layer.ranks == shapes["core"]
    assert (layer.factor_out is None) == ("factor_out" not in shapes)
    assert (layer.factor_in is None) == ("factor_in" not in shapes)


@pytest.mark.parametrize("ranks", [("full", "full", 1), ("full", 8, 4), (8, "full", "full"), "full"])
def test_a_layer_with_full_modes_keeps_the_variance(ranks):
    x = torch.rand(2000, 40) * 2 - 1
    variances, of_splines = [], []

    for _ in range(20):
        layer = SlimKANLinear(40, 30, ranks)
        y = layer(x)
        variances.append(y.square().mean())
        of_splines.append((y - F.silu(x) @ layer.base_weight.T).square().mean())

    variance = torch.stack(variances).mean()
    assert 0.8 < variance / x.square().mean() < 1.25
    if layer.factor_basis is None:  # with one shape for all edges, the share of the splines is random
        assert 0.02 < torch.stack(of_splines).mean() / variance < 0.1


def test_compiles_once_for_all_batch_sizes_of_an_order():
    layer = SlimKANLinear(40, 30, (8, 8, 3))
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)

    for rows in (64, 100, 333, 1000):
        x = torch.randn(rows, 40)
        assert_close(compiled(x), layer(x))

    assert counter.frame_count == 1


@pytest.mark.parametrize("make", [lambda: KAN([128] * 11), lambda: SlimKAN([128] * 11, (32, 32, 4))])
def test_ten_layers_keep_the_variance(make):
    x = torch.rand(500, 128) * 2 - 1

    ratios = []
    for seed in range(10):
        torch.manual_seed(seed)
        with torch.no_grad():
            ratios.append(make()(x).var() / x.var())

    mean = torch.stack(ratios).log().mean().exp()
    assert 0.4 < mean < 2.5  # a tenth in each layer
    assert min(ratios) > 0.1
    assert max(ratios) < 10


@pytest.mark.parametrize("ranks", [(3, 2, 6), ("full", "full", 1)])
def test_a_dense_layer_has_the_grid_and_the_values(ranks):
    layer = SlimKANLinear(5, 4, ranks, grid_size=4, spline_order=2, grid_range=(0, 2), dtype=torch.float64)
    layer.grid_bounds[2] = torch.tensor([-3.0, 4.0])
    x = torch.randn(7, 5, dtype=torch.float64)

    dense = layer.to_dense()

    assert type(dense) is KANLinear
    assert (dense.grid_size, dense.spline_order, dense.grid_range) == (4, 2, (0, 2))
    assert_close(dense(x), layer(x))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_dense_network_has_the_values_and_moves_its_grids(norm):
    net = SlimKAN([3, 6, 2], [(2, 3, 4), None], norm=norm).eval()
    x = torch.randn(5, 3)

    dense = net.to_dense()

    assert type(dense) is KAN
    assert not any(isinstance(module, SlimKANLinear) for module in dense.modules())
    assert_close(dense(x), net(x))
    dense.update_grid(x)


def test_ranks_above_the_modes_are_capped_with_a_warning():
    with pytest.warns(UserWarning, match=r"SlimKANLinear\(4, 3\): \(3, 3, 100\) for \(3, 4, 9\), made \(3, 3, 9\)"):
        assert SlimKANLinear(4, 3, (3, 3, 100)).ranks == (3, 3, 9)
    with pytest.warns(UserWarning, match=r"SlimKANLinear\(5, 2\): 4 for \(2, 5, 9\), made \(2, 4, 4\)$"):
        assert [layer.ranks for layer in SlimKAN([4, 5, 2], 4).layers] == [(4, 4, 4), (2, 4, 4)]


@pytest.mark.parametrize("ranks", [0, 2.0, (4, 4), (4, 0, 4), (4, 4, 4, 4), None, [(2, 2, 2), (2, 0, 2)]])
def test_wrong_ranks_are_refused(ranks):
    with refused("`ranks` should be a positive integer"):
        SlimKAN([4, 5, 2], ranks)
