# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The network of the coordinates of a box: a new one, or one that the caller gives."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.layer import KANLinear, SplineLayer
from ..kan.network import pairs
from ..least_squares.problem import check_trainable
from ..modules.calls import check_module, unwrap
from .constraints import HardConstraint
from .features import BoxFeatures


WIDTHS = (16, 20, 20)  # of a new network: a layer of splines, then tanh layers
SPLINE_ORDER = 5
GRID_SIZES = {1: 8, 2: 8, 3: 5}  # by the dimension of the box
SMALLEST_GRID = 3


def prepare_network(
    network: nn.Module | None, low: Tensor, high: Tensor, outputs: int | None, periodic: Collection[int], seed: int
) -> nn.Module:
    """Return the network of the box's coordinates."""
    features = BoxFeatures(low.tolist(), high.tolist(), periodic)
    if network is None:
        grid_size = GRID_SIZES.get(len(low), SMALLEST_GRID)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = [features]
            layers += [KANLinear(features.out_features, WIDTHS[0], grid_size, SPLINE_ORDER)]
            for pair in pairs([*WIDTHS, outputs or 1]):
                layers += [nn.Tanh(), nn.Linear(*pair)]
        return nn.Sequential(*layers)
    check_module(network, "network")
    if isinstance(network, HardConstraint):  # of a solution, which stays as it is
        network = copy.deepcopy(network.kan)
    elif isinstance(unwrap(network), HardConstraint):
        raise ValueError("`network` wraps a solution with its conditions. Wrap `result.model.kan` alone.")
    check_trainable(network)
    present = first_module(network, BoxFeatures)
    if present is not None:
        if sorted(periodic) not in ([], present.periodic):
            raise ValueError(f"`periodic` is {periodic}, but the network's own `BoxFeatures` have {present.periodic}.")
        return network
    layer = first_module(network, SplineLayer)
    on_box = layer is not None and torch.equal(layer.grid_bounds.double(), torch.stack([low, high], 1))
    return network if on_box and not periodic else nn.Sequential(features, network)


def first_module(model: nn.Module, kind: type) -> Any:
    """Return the first module of a kind in the model; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, kind)), None)
