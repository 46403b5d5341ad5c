# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Networks of the coordinates of a box."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..kan.layer import KANLinear, SplineLayer
from ..kan.network import LayerStack, pairs
from ..least_squares.problem import check_trainable
from ..modules.calls import unwrap
from .constraints import HardConstraint
from .features import BoxFeatures, OutputScale
from .polynomials import BoxPolynomials


WIDTHS = (16, 20, 20)  # of a new network: a layer of splines, then tanh layers
TANH_WIDTHS = (25, 25, 25)  # of a new network of tanh layers only
SPLINE_ORDER = 5
GRID_SIZES = {1: 8, 2: 8, 3: 5}  # by the dimension of the box
SMALLEST_GRID = 3


def new_network(
    features: BoxFeatures,
    outputs: int,
    seed: int,
    first: str = "splines",
    scale: float = 1.0,
) -> nn.Module:
    """Return a network of tanh layers behind features. Its first layer has splines, or tanh too for `first="tanh"`.

    Its outputs are multiplied by `scale`.
    """
    widths = WIDTHS if first == "splines" else TANH_WIDTHS
    size = features.out_features, widths[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if first == "splines":
            grid_size = GRID_SIZES.get(len(features.low), SMALLEST_GRID)
            first_layer = KANLinear(*size, grid_size, SPLINE_ORDER)
        else:
            first_layer = nn.Linear(*size)
        layers: list[nn.Module] = [features, first_layer]
        for pair in pairs([*widths, outputs]):
            layers += [nn.Tanh(), nn.Linear(*pair)]
    if scale != 1.0:
        layers.append(OutputScale(outputs, scale))
    network: Any = nn.Sequential(*layers)
    network.record = {"features": features.arguments, "layers": [outputs, seed, first, scale]}
    return network


def prepare_network(network: nn.Module, features: BoxFeatures) -> nn.Module:
    """Return a network of the box's coordinates: behind features that scale the box, unless it has them."""
    if isinstance(network, HardConstraint):  # of a solution, which stays as it is
        network = copy.deepcopy(network.kan)
    elif isinstance(unwrap(network), HardConstraint):
        raise ValueError("`network` wraps a solution with its conditions. Wrap `result.model.kan` instead.")
    check_trainable(network)
    if first_module(network, BoxPolynomials) is not None:
        return network
    present = first_module(network, BoxFeatures)
    if present is not None:
        if features.periodic not in ([], present.periodic):
            raise ValueError(f"`periodic` is {features.periodic}, but the network was made with {present.periodic}.")
        return network
    layer = first_module(network, SplineLayer)
    if layer is not None and not features.periodic:
        box = torch.stack([features.low, features.high], 1)
        if torch.equal(layer.grid_bounds.double(), box):
            return network
    prepared: Any = nn.Sequential(features, network)
    prepared.record = {"features": features.arguments}
    return prepared


def find_kan(network: nn.Module) -> LayerStack | None:
    """Return the KAN in a network whose grids get finer: trained from scratch as a whole, without adapters."""
    if isinstance(network, HardConstraint):  # of a solution
        return None
    kan = first_module(network, LayerStack)
    if kan is None or not all(parameter.requires_grad for parameter in kan.parameters()):
        return None
    return kan


def first_module(model: nn.Module, kind: type) -> Any:
    """Return the first module of a kind in the model; None if there is none."""
    for module in model.modules():
        if isinstance(module, kind):
            return module
    return None
