# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The kinds of convolutional KAN layers that are known from the start. Importing this module registers them.

Their sums are convolutions, of 1, 2 or 3 dimensions: the coefficients have the axes of a kernel besides those of
outputs, inputs and basis functions. With groups each block of inputs and outputs has coefficients of its own. As in
known.py a layer is recognized by what it consists of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .description import has
from .registry import register_kan_layer


_BOTTLENECK = "inner_proj"  # the attribute of bottlenecks, which compute more than the sum
_BLOCKS: dict[str, Any] = {"groups": "g", "residual": ("base_conv.*.weight", "o i ...")}


def _is_convolution(layer: Any, name: str) -> bool:
    found = getattr(layer, name)
    return isinstance(found, nn.modules.conv._ConvNd) and found.groups == 1


# torch-conv-kan: a norm follows the sum. The first versions have a list of convolutions, one for each group.
register_kan_layer(
    "gram-conv",  # and Legendre, Jacobi, Bernstein, with the degrees outside
    matches=lambda m: has("poly_weights base_conv.0", _BOTTLENECK)(m) and m.poly_weights.ndim > 3,
    coefficients=("poly_weights", "g o (k i) ..."),
    grid=("beta_weights",),
    **_BLOCKS,
)
register_kan_layer(
    "cheby-conv",
    matches=has("poly_conv.0.weight degree", _BOTTLENECK),
    coefficients=("poly_conv.*.weight", "o (i k) ..."),
    axes=lambda m: {"k": m.degree + 1},
    grid=("beta_weights",),
    **_BLOCKS,
)
register_kan_layer(
    "gram-conv-2",  # one convolution; its groups cut the degrees, so that a layer with groups is no sum of functions
    matches=lambda m: _is_convolution(m, "poly_conv") and m.degree > 0,
    coefficients=("poly_conv.weight", "o (k i) ..."),
    residual=("base_conv.weight", "o i ..."),
    grid=("beta_weights",),
    axes=lambda m: {"k": m.degree + 1},
)
register_kan_layer(
    "spline-conv",  # B-splines and Gaussians
    matches=has("spline_conv.0.weight base_conv.0", _BOTTLENECK),
    coefficients=("spline_conv.*.weight", "o (i k) ..."),
    grid=("grid", "rbf.grid"),
    **_BLOCKS,
)
register_kan_layer(
    "relu-conv",
    matches=has("relukan_conv.0.weight phase_low", _BOTTLENECK),
    coefficients=("relukan_conv.*.weight", "o (i k) ..."),
    grid=("phase_low", "phase_high"),
    **_BLOCKS,
)
register_kan_layer(
    "wav-conv",  # of older files: scale and translation stay as they are
    matches=has("wavelet_conv.0.wavelet_weights.weight", _BOTTLENECK),
    coefficients=("wavelet_conv.*.wavelet_weights.weight", "o i ..."),
    grid=("wavelet_conv.*.scale", "wavelet_conv.*.translation"),
    **_BLOCKS,
)
for _dims in (1, 2, 3):
    _edges = " ".join(["()", "o", "i", *["()"] * _dims])
    register_kan_layer(
        f"wav-conv-{_dims}d",
        matches=has(
            f"wavelet_conv.0.wavelet_weights.weight:{_dims + 2} wavelet_conv.0.scale:{_dims + 3}", _BOTTLENECK
        ),
        coefficients=[
            ("wavelet_conv.*.wavelet_weights.weight", "o i ..."),
            ("wavelet_conv.*.scale", _edges),
            ("wavelet_conv.*.translation", _edges),
        ],
        **_BLOCKS,
    )


def _count_functions(layer: Any) -> int:
    """How many functions of each input a layer has: a copy may have other ones than radial, without their grid."""
    if (grid := getattr(layer.rbf, "grid", None)) is not None:
        return grid.numel()
    with torch.no_grad():
        return layer.rbf(layer.spline_conv.weight.new_zeros(2, 2, 2)).shape[-1]


register_kan_layer(
    "fast-kan-conv",  # U-KAN: the functions outside, other than in torch-conv-kan
    matches=lambda m: _is_convolution(m, "spline_conv") and isinstance(m.rbf, nn.Module),
    coefficients=("spline_conv.weight", "o (k i) ..."),
    residual=("base_conv.weight", "o i ..."),
    grid=("rbf.grid",),
    bias="base_conv.bias",
    axes=lambda m: {} if hasattr(m, "base_conv") else {"k": _count_functions(m)},
)
register_kan_layer(
    "convkan",  # on patches: rows (..., groups, in)
    matches=has("spline_weight:4 base_weight:3 grid:3"),
    coefficients=("spline_weight", "g o i k"),
    residual=("base_weight", "g o i"),
    edge_scale=("spline_scaler", "g o i"),
    groups="g",
    grid=("grid",),
    grid_methods=("update_grid",),
)
register_kan_layer(
    "kanlib-conv",
    matches=lambda m: m.coefficients.ndim > 3 and isinstance(m.basis, nn.Module),
    coefficients=("coefficients", "(g o) i ... k"),
    residual=("weight_residual", "(g o) i ..."),
    edge_scale=("weight_spline", "(g o) i ..."),
    groups="g",
    grid=("basis.grid",),
    grid_methods=("update_grid", "refine_grid"),
    bias="bias_output",
    axes=lambda m: {"g": m.groups},
)
register_kan_layer(
    "lkan-conv",
    matches=lambda m: m.coeff.ndim > 4 and m.scale_base.ndim == m.coeff.ndim - 2,
    coefficients=("coeff", "t (g o) i ... k"),
    residual=("scale_base", "(g o) i ..."),
    edge_scale=("scale_spline", "(g o) i ..."),
    groups="g",
    bias="bias",
    axes=lambda m: {"g": m.groups},
)
