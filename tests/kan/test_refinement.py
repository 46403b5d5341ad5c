# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from helpers import refused
from jet_helpers import assert_same
from torch import nn
from torch.testing import assert_close

from peft_lotra.kan import KAN, KANLinear, SlimKAN, jet, refine_grid


def inputs(rows=500, scale=1.0):
    return scale * (2 * torch.rand(rows, 2, dtype=torch.float64) - 1)


def kan(*widths, **kwargs):
    return KAN(widths or (2, 6, 5, 1), grid_size=6, dtype=torch.float64, **kwargs)


def wide(model):
    """Make the splines large compared with the base branch."""
    with torch.no_grad():
        for layer in model.layers:
            layer.spline_weight.mul_(5)
    return model


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("factor", [2, 3])
def test_a_multiple_keeps_values_and_derivatives(order, factor):
    x = inputs()
    model = kan(spline_order=order, norm="tanh")
    derivatives = jet(model, x)

    report = refine_grid(model, 6 * factor)

    assert [layer.grid_size for layer in model.layers[::2]] == [6 * factor] * 3
    assert max(report.errors.values()) < 1e-12
    assert_close(model(x), derivatives[0], rtol=1e-10, atol=1e-12)
    if order > 2:
        assert_same(jet(model, x), derivatives, 1e-8)


BEYOND = {
    "degree 2": lambda: wide(wide(kan(spline_order=2))),
    "degree 3": lambda: wide(wide(kan())),
}


@pytest.mark.parametrize("name", BEYOND)
def test_samples_extend_the_grids_to_where_activations_leave_them(name):
    """The function is kept half an interval beyond the ends, farther out, and beyond the supports of the splines."""
    x = inputs(400, 1.3)
    model = BEYOND[name]()
    derivatives = jet(model, x)

    report = refine_grid(model, 12, x)

    assert max(report.errors.values()) < 1e-11
    first, *later = [layer.grid_size for layer in model.layers]
    assert first == 16  # an interval on each side
    assert all(size in range(12, 25, 2) for size in later)
    assert_same(jet(model, x), derivatives, 1e-8)


def test_what_is_frozen_the_mode_and_hooks_are_kept():
    model = kan().eval()
    model.layers[1].base_weight.requires_grad_(False)
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))

    with torch.inference_mode():
        refine_grid(model, 12)
    model(inputs(3)).sum().backward()

    assert calls == [1]
    assert not any(layer.training for layer in model.layers)
    assert not model.layers[1].base_weight.requires_grad
    assert model.layers[1].spline_weight.grad.any()


def test_a_normalization_is_refined_in_evaluation_mode_only():
    x = inputs()
    model = KAN([2, 5, 1], grid_size=6, norm="batch", dtype=torch.float64)
    model(x)
    with refused("`layers.1`, BatchNorm, cannot be refined"):
        refine_grid(model, 12)
    y = model.eval()(x)

    refine_grid(model, 30, x)

    assert_close(model(x), y, rtol=1e-3, atol=1e-3)


class Doubled(KANLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def replace(model):
    model.layers[0] = Doubled(2, 2)


CHANGES = {
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.layers[0], "spline_weight"),
    "old weight norm": lambda model: nn.utils.weight_norm(model.layers[0], "spline_weight"),
    "subclass": replace,
    "parameter": lambda model: model.layers[0].register_parameter("gain", nn.Parameter(torch.ones(()))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_that_would_become_another_function_are_refused(change):
    model = KAN([2, 2, 2])
    CHANGES[change](model)

    with refused("`layers.0`, .* cannot be refined", model):
        refine_grid(model, 10)


X = inputs()
REFUSED = {
    "`layers.0` changes by .* on a grid of 3 intervals": lambda model: refine_grid(model, 3),
    "`grid_size` is 0": lambda model: refine_grid(model, 0),
    "finite": lambda model: refine_grid(model, 12, X.index_fill(0, torch.tensor(3), math.nan)),
    "`samples` .0, 2. must not be empty": lambda model: refine_grid(model, 12, X[:0]),
    "shape .500, 1., but KANLinear": lambda model: refine_grid(model, 12, X[:, :1]),
    "a multiple of the old ones, .6, 6, 6.": lambda model: refine_grid(model, 15, X),
    "`layers.0`, SlimKANLinear, cannot be refined": lambda model: refine_grid(SlimKAN([2, 1], 1), 10),
    "`kan` is Sequential, but must be a KAN": lambda model: refine_grid(nn.Sequential(model), 12),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_change_nothing(message):
    model = wide(kan())

    with refused(message, model, error=(TypeError, ValueError)):
        REFUSED[message](model)
