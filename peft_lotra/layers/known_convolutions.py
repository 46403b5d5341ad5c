# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The kinds of convolutional KAN layers that are known from the start. Importing this module registers them.

Their sums are convolutions, of 1, 2 or 3 dimensions: the coefficients have the axes of a kernel besides those of
outputs, inputs and basis functions. With groups each block of inputs and outputs has coefficients of its own. As in
known.py a layer is recognized by what it consists of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .description import has
from .registry import register_kan_layer


_BLOCKS: dict[str, Any] = {"groups": "g", "residual": ("base_conv.*.weight", "o i ...")}


def _is_convolution(layer: Any, name: str) -> bool:
    found = getattr(layer, name)
    return isinstance(found, nn.modules.conv._ConvNd) and found.groups == 1


def _has(attributes: str) -> Callable[[Any], bool]:
    return has(attributes, without="inner_proj")  # of bottlenecks, which compute more than the sum


def _degrees(layer: Any) -> dict[str, int]:
    return {"k": layer.degree + 1}


# torch-conv-kan: a norm follows the sum. The first versions have a list of convolutions, one for each group.
for _kind, _attributes, _name, _pattern, _grid, _axes in (
    # gram-conv: and Legendre, Jacobi, Bernstein, with the degrees outside
    ("gram-conv", "poly_weights base_conv.0", "poly_weights", "g o (k i) ...", "beta_weights", None),
    ("cheby-conv", "poly_conv.0.weight degree", "poly_conv.*.weight", "o (i k) ...", "beta_weights", _degrees),
    # spline-conv: B-splines and Gaussians
    ("spline-conv", "spline_conv.0 base_conv.0", "spline_conv.*.weight", "o (i k) ...", "grid rbf.grid", None),
    ("relu-conv", "relukan_conv.0 phase_low", "relukan_conv.*.weight", "o (i k) ...", "phase_low phase_high", None),
    # wav-conv: of older files: scale and translation stay as they are
    (
        *("wav-conv", "wavelet_conv.0.wavelet_weights.weight", "wavelet_conv.*.wavelet_weights.weight", "o i ..."),
        *("wavelet_conv.*.scale wavelet_conv.*.translation", None),
    ),
):
    register_kan_layer(
        _kind, matches=_has(_attributes), coefficients=(_name, _pattern), grid=(*_grid.split(),), axes=_axes, **_BLOCKS
    )
register_kan_layer(
    "gram-conv-2",  # one convolution; its groups cut the degrees, so that a layer with groups is no sum of functions
    matches=lambda m: _is_convolution(m, "poly_conv") and m.degree > 0,
    coefficients=("poly_conv.weight", "o (k i) ..."),
    residual=("base_conv.weight", "o i ..."),
    grid=("beta_weights",),
    axes=_degrees,
)
for _dims in (1, 2, 3):
    _edges = " ".join(["()", "o", "i", *["()"] * _dims])
    register_kan_layer(
        f"wav-conv-{_dims}d",
        matches=_has(f"wavelet_conv.0.wavelet_weights.weight:{_dims + 2} wavelet_conv.0.scale:{_dims + 3}"),
        coefficients=[
            ("wavelet_conv.*.wavelet_weights.weight", "o i ..."),
            ("wavelet_conv.*.scale", _edges),
            ("wavelet_conv.*.translation", _edges),
        ],
        **_BLOCKS,
    )


register_kan_layer(
    "fast-kan-conv",  # U-KAN: the functions outside, other than in torch-conv-kan
    matches=lambda m: (
        _is_convolution(m, "spline_conv")
        and isinstance(m.rbf, nn.Module)
        and (hasattr(m, "base_conv") or hasattr(m.rbf, "grid"))
    ),
    coefficients=("spline_conv.weight", "o (k i) ..."),
    residual=("base_conv.weight", "o i ..."),
    grid=("rbf.grid",),
    bias="base_conv.bias",
    axes=lambda m: {} if hasattr(m, "base_conv") else {"k": m.rbf.grid.numel()},
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
