# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from peft_lotra.kan import KAN, KANConfig, KANLinear, KANModel, SlimKAN, SlimKANLinear


def by_edges(layer, x):
    """The sum over edges, with the coefficient tensor as it is defined."""
    tensor, *factors = layer.components
    for mode, factor in enumerate(factors):
        if factor is not None:
            tensor = torch.tensordot(tensor, factor, ([mode], [1])).movedim(-1, mode)
    return torch.einsum("oik,bik->bo", tensor[..., :-1], layer.basis(x)) + F.silu(x) @ tensor[..., -1].T


@pytest.mark.parametrize("ranks", [(3, 2, 4), (1, 1, 1), (6, 5, 9), (2, 5, 3), ("full", "full", 1), ("full", 2, 9)])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])  # few rows and many go different ways
def test_equals_the_sum_over_edges(ranks, rows):
    layer, x = SlimKANLinear(5, 6, ranks, dtype=torch.float64), torch.randn(rows, 5, dtype=torch.float64)
    x.requires_grad_()
    expected = by_edges(layer, x)
    torch.testing.assert_close(layer(x), expected)
    inputs, direction = [x, *layer.parameters()], torch.randn_like(expected)
    gradients = torch.autograd.grad(layer(x), inputs, direction)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, direction))
    dense = torch.einsum("oik,bik->bo", layer.spline_weight, layer.basis(x)) + F.silu(x) @ layer.base_weight.T
    torch.testing.assert_close(dense, expected)
    leading = x.view(-1, 1, 5)
    torch.testing.assert_close(layer(leading).view_as(expected), expected)


def test_its_parameters_are_core_and_factors():
    layer = SlimKANLinear(5, 6, (3, 2, 4))
    shapes = {"core": (3, 2, 4), "factor_out": (6, 3), "factor_in": (5, 2), "factor_basis": (9, 4)}
    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == shapes
    assert list(layer.state_dict()) == [*shapes, "grid_bounds"] and layer.ranks == (3, 2, 4)


@pytest.mark.parametrize("ranks", [("full", "full", 1), (6, 5, 1)])
def test_a_full_mode_has_no_parameter(ranks):
    layer = SlimKANLinear(5, 6, ranks)

    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}

    assert shapes == {"core": (6, 5, 1), "factor_basis": (9, 1)} and layer.ranks == (6, 5, 1)
    assert layer.factor_out is None and layer.factor_in is None


@pytest.mark.parametrize("ranks", [("full", "full", 1), ("full", 8, 4), (8, "full", "full"), "full"])
def test_a_layer_with_full_modes_keeps_the_variance(ranks):
    x, variances, of_splines = torch.rand(2000, 40) * 2 - 1, [], []
    for _ in range(20):
        layer = SlimKANLinear(40, 30, ranks)
        variances.append(layer(x).square().mean())
        of_splines.append((layer(x) - F.silu(x) @ layer.base_weight.T).square().mean())

    assert 0.8 < torch.stack(variances).mean() / x.square().mean() < 1.25
    if layer.factor_basis is None:  # with one shape for all edges, its share is random
        assert 0.02 < torch.stack(of_splines).mean() / torch.stack(variances).mean() < 0.1


def test_compiles_once_for_all_batch_sizes_of_an_order():
    layer = SlimKANLinear(40, 30, (8, 8, 3))
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for rows in (64, 100, 333, 1000):
        x = torch.randn(rows, 40)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", [lambda: KAN([128] * 11), lambda: SlimKAN([128] * 11, (32, 32, 4))])
def test_ten_layers_keep_the_variance(make):
    x, ratios = torch.rand(500, 128) * 2 - 1, []
    for seed in range(10):
        torch.manual_seed(seed)
        with torch.no_grad():
            ratios.append(make()(x).var() / x.var())
    mean = torch.stack(ratios).log().mean().exp()
    assert 0.4 < mean < 2.5 and 0.1 < min(ratios) and max(ratios) < 10  # by a tenth in a layer


def test_to_dense():
    layer = SlimKANLinear(5, 4, (3, 2, 6), grid_size=4, spline_order=2, grid_range=(0, 2), dtype=torch.float64)
    with torch.no_grad():
        layer.grid_bounds[2] = torch.tensor([-3.0, 4.0])
    dense = layer.to_dense()
    assert type(dense) is KANLinear and (dense.grid_size, dense.spline_order, dense.grid_range) == (4, 2, (0, 2))
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(dense(x), layer(x))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_network_to_dense(norm):
    net = SlimKAN([3, 6, 2], [(2, 3, 4), None], norm=norm).eval()
    assert type(net.layers[-1]) is KANLinear  # None in the list of ranks
    dense = net.to_dense()
    assert type(dense) is KAN and not any(isinstance(module, SlimKANLinear) for module in dense.modules())
    x = torch.randn(5, 3)
    torch.testing.assert_close(dense(x), net(x))
    dense.update_grid(x)


def test_ranks_above_the_modes_are_capped_with_a_warning():
    with pytest.warns(UserWarning, match=r"SlimKANLinear\(4, 3\): \(3, 3, 100\) for \(3, 4, 9\), made \(3, 3, 9\)"):
        assert SlimKANLinear(4, 3, (3, 3, 100)).ranks == (3, 3, 9)
    with pytest.warns(UserWarning, match=r"SlimKANLinear\(5, 2\): 4 for \(2, 5, 9\), made \(2, 4, 4\)$"):
        assert [layer.ranks for layer in SlimKAN([4, 5, 2], 4).layers] == [(4, 4, 4), (2, 4, 4)]


@pytest.mark.parametrize("ranks", [0, 2.0, (4, 4), (4, 0, 4), (4, 4, 4, 4), None, [(2, 2, 2), (2, 0, 2)]])
def test_refuses_ranks(ranks):
    with pytest.raises(ValueError, match="`ranks` should be a positive integer"):
        SlimKAN([4, 5, 2], ranks)
    with pytest.raises(ValueError, match="`ranks` has 3 entries, but the network has 2 layers"):
        SlimKAN([4, 5, 2], [(2, 2, 2), None, None])


# A new model needs no warning about the ranks that were capped when it was first made
@pytest.mark.parametrize(
    "ranks", [(2, 3, 4), [(2, 3, 4), None], [[2, 3, 4], [1, 2, 2]], [[2, 3, 4], ["full", "full", 1]]]
)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_model_is_saved_as_its_factors(ranks, norm, tmp_path):
    model = KANModel(KANConfig(widths=(40, 30, 10), ranks=ranks, norm=norm)).eval()
    assert isinstance(model.kan, SlimKAN)
    model.save_pretrained(tmp_path)
    loaded = KANModel.from_pretrained(tmp_path)
    assert loaded.config.ranks == ((2, 3, 4), model.kan.layers[-1].ranks if ranks[-1] else None)
    x = torch.randn(20, 40)
    assert torch.equal(loaded(x).logits, model(x).logits)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert (tmp_path / "model.safetensors").stat().st_size < size + 2500  # its header
