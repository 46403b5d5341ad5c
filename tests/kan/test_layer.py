# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, refused, refuses, state
from qkan.kan import KANLinear as EfficientKANLinear
from torch.testing import assert_close

from peft_lotra.kan import KAN, KANLinear, SlimKAN, SlimKANLinear, TanhBound
from peft_lotra.kan.layer import SPLINE_VARIANCE_SHARE


def smooth_layer(dtype=torch.float64, **kwargs):
    """Return a layer whose coefficients are values of smooth functions."""
    layer = KANLinear(3, 4, dtype=dtype, **kwargs)
    centers = torch.linspace(-1.25, 1.25, layer.spline_weight.shape[2])
    phases = torch.arange(12).view(4, 3, 1) / 3
    with torch.no_grad():
        layer.spline_weight.copy_(torch.sin(2 * centers + phases))
    return layer


def sum_over_edges(layer, x):
    splines = torch.einsum("oik,bik->bo", layer.spline_weight, layer.basis(x))
    return splines + F.silu(x) @ layer.base_weight.T


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_equals_efficient_kan_inside_the_grid(order):
    expected = EfficientKANLinear(4, 3, spline_order=order)
    layer = KANLinear(4, 3, spline_order=order)
    with torch.no_grad():
        layer.base_weight.copy_(expected.base_weight)
        layer.spline_weight.copy_(expected.scaled_spline_weight)
    x = torch.rand(50, 4) * 1.99 - 0.995

    assert_close(layer(x), expected(x), rtol=0, atol=5e-6)


LAYERS = {"dense": KANLinear, "slim": partial(SlimKANLinear, ranks=2)}
both = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@both
@pytest.mark.parametrize("leading", [(), (0,), (4,), (2, 0, 3), (2, 3, 1), (80,)])
@pytest.mark.parametrize("order, grid_size", [(1, 7), (2, 1), (3, 5), (5, 2)])
def test_inputs_may_have_any_leading_shape(make, leading, order, grid_size):
    layer = make(3, 2, grid_size=grid_size, spline_order=order)
    x = torch.randn(*leading, 3)

    y = layer(x)

    assert y.shape == (*leading, 2)
    assert_close(y.reshape(-1, 2), layer(x.reshape(-1, 3)))


@both
@pytest.mark.parametrize("rows", [6, 80])
def test_transforms_gradients_and_compiled_graphs_agree(make, rows):
    layer = make(3, 2, dtype=torch.float64)
    x = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    assert_close(torch.func.vmap(layer)(x), layer(x))
    assert torch.autograd.gradcheck(layer, x, fast_mode=rows > 6)
    assert torch.autograd.gradgradcheck(layer, x, fast_mode=rows > 6)
    assert_close(compiled(x), layer(x))


@both
@pytest.mark.parametrize("rows", [4, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_all_tensors_and_outputs_have_the_dtype(make, rows, dtype):
    layer = make(3, 2, dtype=dtype)

    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    assert layer(torch.randn(rows, 3, dtype=dtype)).dtype == dtype


@both
@pytest.mark.parametrize("rows", [4, 80])
def test_autocast_rounds_the_output(make, rows):
    layer, x = make(3, 2), torch.randn(rows, 3)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)

    assert_close(y.float(), layer(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("grid_range", [(-1, 1), (0, 1), (-3, 5)])
@pytest.mark.parametrize("order, grid_size", [(1, 5), (3, 5), (5, 20)])
def test_a_new_layer_keeps_the_variance(grid_range, order, grid_size):
    layer = KANLinear(256, 256, grid_size, order, grid_range)
    low, high = grid_range
    variance = (high - low) ** 2 / 12
    x = (low + high) / 2 + variance**0.5 * torch.randn(1000, 256)

    with torch.no_grad():
        y = layer(x)
        splines = y - F.silu(x) @ layer.base_weight.T

    share = splines.square().mean() / y.square().mean()
    assert 0.7 < y.square().mean() / variance < 1.3
    assert 0.7 * SPLINE_VARIANCE_SHARE < share < 1.4 * SPLINE_VARIANCE_SHARE


@both
def test_a_layer_on_the_meta_device_is_initialized_later(make):
    with torch.device("meta"):
        layer = make(3, 2)

    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert make(3, 2, device="meta")(torch.randn(5, 3, device="meta")).shape == (5, 2)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.grid_bounds.tolist() == [[-1.0, 1.0]] * 3
    assert layer(torch.randn(5, 3)).isfinite().all()


@pytest.mark.parametrize("order", [1, 3, 5])
def test_update_grid_changes_nothing_when_the_grid_stays(order):
    layer = KANLinear(3, 4, spline_order=order, dtype=torch.float64)
    expected = state(layer)
    x = torch.cat([torch.rand(20, 3) * 2 - 1, torch.tensor([[-1.0] * 3, [1.0] * 3])]).double()

    layer.update_grid(x, margin=0.0)

    assert_equal(layer.grid_bounds, expected["grid_bounds"])
    assert_close(state(layer), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-4), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_update_grid_keeps_a_smooth_function(dtype, tolerance):
    layer = smooth_layer(dtype, grid_size=8)
    x = (0.9 * torch.rand(4, 100, 3) - 0.6).to(dtype)
    y = layer(x).double()

    layer.update_grid(x, margin=0.05)

    low, high = x.double().flatten(0, 1).aminmax(dim=0)
    margin = 0.05 * (high - low)
    assert_close(layer.grid_bounds, torch.stack([low - margin, high + margin], dim=-1).to(dtype))
    assert_close(layer(x).double(), y, rtol=0, atol=tolerance * y.abs().max().item())


def overflowing():
    """Return a network whose second layer gets infinite inputs."""
    net = KAN([3, 8, 2])
    net.layers[0].base_weight.data[5] = torch.inf
    return net


@pytest.mark.parametrize(
    "make, spoil, shape",
    [
        (lambda: KANLinear(3, 4), lambda x: x[:, :2], "50, 2"),
        (lambda: KANLinear(3, 4), lambda x: x[:0], "0, 3"),
        (lambda: KANLinear(3, 4), lambda x: x / (x != x[0, 2]), "50, 3"),
        (overflowing, lambda x: x, "50, 8"),
    ],
)
def test_update_grid_refuses_and_changes_nothing(make, spoil, shape):
    model = make()

    with refused(f"have shape .{shape}., .* finite", model):
        model.update_grid(spoil(torch.randn(50, 3)))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("spoil", [lambda x: 7.3 + 0 * x, lambda x: 1e6 * (1 + x * torch.finfo(x.dtype).eps)])
def test_update_grid_keeps_the_grid_of_an_input_that_does_not_spread(spoil, dtype, tolerance):
    layer = KANLinear(3, 4, dtype=dtype)
    bounds = layer.grid_bounds.clone()
    x = torch.randn(50, 3, dtype=dtype)
    x[:, 1] = spoil(x[:, 1].clamp(-1, 1))
    points = torch.linspace(-1.5, 1.5, 40, dtype=dtype)[:, None].expand(-1, 3)

    def function():
        return layer.basis(points)[:, 1] @ layer.spline_weight[:, 1].T

    expected = function()

    layer.update_grid(x, margin=0.0)

    assert_equal(layer.grid_bounds[1], bounds[1])
    assert_close(function(), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    spread = x[:, [0, 2]]
    assert_close(layer.grid_bounds[[0, 2]], torch.stack(spread.aminmax(dim=0), dim=-1))


@pytest.mark.parametrize("grid_size", [1, 5, 64])
def test_extreme_inputs_affect_only_their_rows(grid_size):
    layer, x = KANLinear(32, 8, grid_size=grid_size), 2 * torch.rand(400, 32) - 1
    x[3, 4], x[7, 2], x[9, 1], x[11, 1] = torch.nan, torch.inf, -1e30, 1e30
    x.requires_grad_()
    finite = torch.ones(400, dtype=torch.bool)
    finite[[3, 7]] = False

    y = layer(x)
    y.sum().backward()

    assert_close(y[finite], sum_over_edges(layer, x)[finite], rtol=1e-4, atol=1e-4)
    assert_equal(y.isfinite().all(1), finite)
    assert_equal(x.grad.isfinite().all(1), finite)


def test_a_network_is_the_composition_of_its_layers():
    net = KAN([2, 5, 3], grid_size=4, spline_order=2, grid_range=(0, 2), dtype=torch.float64)
    assert [(layer.in_features, layer.out_features) for layer in net.layers] == [(2, 5), (5, 3)]
    assert all((layer.grid_size, layer.spline_order, layer.grid_range) == (4, 2, (0, 2)) for layer in net.layers)
    x = torch.randn(3, 7, 2, dtype=torch.float64)
    assert_equal(net(x), net.layers[1](net.layers[0](x)))
    assert net(x[0, 0]).shape == (3,)


def test_update_grid_gives_each_layer_what_reaches_it():
    net = KAN([3, 8, 2], dtype=torch.float64)
    x = 2 * torch.rand(4, 100, 3, dtype=torch.float64)

    net.update_grid(x, margin=0.0)

    for layer in net.layers:
        low, high = layer.grid_bounds.unbind(-1)
        reached = x.reshape(-1, layer.in_features)
        assert_close(low, reached.amin(0))
        assert_close(high, reached.amax(0))
        x = layer(x)


def test_update_grid_keeps_the_running_statistics_of_batch_norms():
    net = KAN([3, 8, 2], norm="batch").train()
    x = 3 * torch.randn(400, 3)
    statistics = state(net.layers[1])

    net.update_grid(x)

    assert not torch.equal(net.layers[2].grid_bounds, KAN([8, 2]).layers[0].grid_bounds)
    assert_equal(state(net.layers[1]), statistics)


test_wrong_arguments_are_refused = refuses(
    {
        "`spline_order` is 6": lambda: KANLinear(2, 2, spline_order=6),
        "`out_features` is -1": lambda: KANLinear(2, -1),
        r"`grid_range` is \(1, 1\)": lambda: KANLinear(2, 2, grid_range=(1, 1)),
        r"`grid_range` is \(0, inf\)": lambda: KANLinear(2, 2, grid_range=(0, torch.inf)),
        r"`widths` is \[\]": lambda: KAN([]),
        r"`widths` is \[3\]": lambda: KAN([3]),
        r"`widths` is \[3, 0\]": lambda: KAN([3, 0]),
        r"`widths` is \[3, 2.0\]": lambda: KAN([3, 2.0]),
        "`widths` is '32'": lambda: KAN("32"),
        "`ranks` has 3 entries, but the network has 2 layers": lambda: SlimKAN([4, 5, 2], [(2, 2, 2), None, None]),
        r"shape \(4, 3\), but TanhBound expects a last dimension of 2": lambda: TanhBound(2)(torch.rand(4, 3)),
        "`low` is 1": lambda: TanhBound(3, 1.0, 1.0),
        "`low` is 0": lambda: TanhBound(3, 0.0, torch.inf),
    }
)
