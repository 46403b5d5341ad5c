# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_lotra.derivatives.torch_fallback import jet_by_transforms
from peft_lotra.kan import KAN, jet
from peft_lotra.pde import BoxDistance, HardConstraint
from peft_lotra.pde.windows import Windows


ENDS = [0.0, 0.3, 0.6, 1.0]


def tanh_network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))


def spline_network() -> nn.Module:
    return KAN([2, 3, 2], 4, 5)


def new_windows(smoothness: int, network=tanh_network) -> Windows:
    torch.manual_seed(0)
    return Windows([network() for _ in range(3)], ENDS, time=1, smoothness=smoothness).double()


def at_ends(step: float) -> Tensor:
    return torch.tensor([[0.2, 0.3 + step], [0.7, 0.6 + step]], dtype=torch.float64)


@pytest.mark.parametrize("smoothness", [1, 2])
def test_the_value_and_the_prescribed_derivatives_are_continuous(smoothness):
    windows = new_windows(smoothness)

    values, (slope, velocity), _ = jet(windows, at_ends(-1e-9))
    values_after, (slope_after, velocity_after), _ = jet(windows, at_ends(1e-9))

    torch.testing.assert_close(values, values_after, rtol=0, atol=1e-6)
    torch.testing.assert_close(slope, slope_after, rtol=0, atol=1e-6)
    jump = (velocity - velocity_after).abs().max()
    assert (jump < 1e-6) == (smoothness == 2)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("network", [tanh_network, spline_network])
@pytest.mark.parametrize("smoothness", [1, 2])
def test_the_jet_is_the_one_by_transforms(smoothness, network, order):
    windows = new_windows(smoothness, network)
    x, directions = torch.rand(7, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    weights = None if order == 1 else torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    derivatives = jet(windows, x, directions, order=order, collapse=False if weights is None else weights)

    expected = jet_by_transforms(windows.__call__, x, directions, order, weights)
    torch.testing.assert_close(list(derivatives), list(expected), rtol=1e-9, atol=1e-8)


def test_the_active_window_is_the_one_that_rows_with_its_times_take():
    windows = new_windows(2)
    x = torch.tensor([[0.4, 0.7], [0.1, 0.9]], dtype=torch.float64)
    expected = jet(windows, x)

    windows.activate(2)

    torch.testing.assert_close(jet(windows, x), expected)
    for name, parameter in windows.named_parameters():
        assert parameter.requires_grad == name.startswith("networks.2.")


def test_windows_keep_exact_conditions():
    distance = BoxDistance((0, 0), (1, 1), [(0, "low"), (0, "high"), (1, "low")])
    model = HardConstraint(new_windows(1), distance, lambda x: x[..., :1]).double()
    walls = torch.tensor([[0.0, 0.2], [1.0, 0.5], [0.0, 0.8], [1.0, 1.0]], dtype=torch.float64)

    torch.testing.assert_close(model(walls), walls[:, :1].expand(4, 2))


def test_rows_may_have_more_dimensions():
    windows, x = new_windows(2), torch.rand(2, 3, 2, dtype=torch.float64)

    torch.testing.assert_close(windows(x).flatten(0, 1), windows(x.flatten(0, 1)))
