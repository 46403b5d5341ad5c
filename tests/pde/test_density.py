# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from jet_helpers import network
from torch import nn

from peft_lotra.pde import HardConstraint, knot_density


BOX = (-1.0, 0.0), (1.0, 2.0)


def steep() -> nn.Module:
    """tanh(20 x) at all times."""
    return HardConstraint(network(2, 3, 1), 0.0, lambda x: torch.tanh(20 * x[..., :1]))


def test_density_of_a_known_function():
    density = knot_density(steep(), *BOX, cells=40)
    assert density.shape == (2, 40)
    torch.testing.assert_close(density.mean(1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(density[1], torch.ones(40, dtype=torch.float64))  # no function of time
    x = -1 + 2 * (torch.arange(160, dtype=torch.float64) + 0.5) / 160
    bend = -800 * torch.tanh(20 * x) / torch.cosh(20 * x) ** 2
    expected = bend.square().view(40, 4).mean(1).pow(1 / 6)
    torch.testing.assert_close(density[0], 0.4 + 0.6 * expected / expected.mean(), rtol=0, atol=1e-4)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`cells` is 0"):
        knot_density(steep(), *BOX, cells=0)
    with pytest.raises(ValueError, match="along coordinate 0 are not finite"):
        knot_density(HardConstraint(network(2, 3, 1), 1.0, lambda x: torch.sqrt(x[..., :1])), *BOX)
