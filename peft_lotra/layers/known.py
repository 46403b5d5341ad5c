# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The kinds of layers that are known from the start. Importing this module registers them.

Layers are recognized by their attributes, since users copy the files and rename the classes. Of the kinds that match,
the last one here is taken.

The sums of the first ones are convolutions, of 1, 2 or 3 dimensions: the coefficients have the axes of a kernel too.
With groups each block of inputs and outputs has coefficients of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..derivatives import bases
from ..kan.basis import UniformGrid
from ..kan.layer import KANLinear
from ..kan.slim_kan import SlimKANLinear
from . import slim  # noqa: F401  (registers a kind)
from .description import REGISTERED, has
from .registry import BUILT_IN, register_kan_layer


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


def _splines_from_knots(layer: Any) -> UniformGrid:
    order = layer.spline_order
    grid_size = layer.grid.shape[-1] - 2 * order - 1
    return UniformGrid(layer.grid[:, order], layer.grid[:, order + grid_size], grid_size, order)


def _splines_from_starts(layer: Any) -> UniformGrid:
    order, step = layer.spline_order, 1 / layer.inv_h
    low = layer.grid_starts[:1] + order * step
    grid_size = len(layer.grid_starts) - order
    return UniformGrid(low, low + grid_size * step, grid_size, order)


def _pykan_basis(layer: Any, x: torch.Tensor) -> torch.Tensor:
    from kan.spline import B_batch

    return B_batch(x, layer.grid, k=layer.k)


def _chebyshev_derivatives(layer: Any, x: torch.Tensor, highest: int) -> list[torch.Tensor]:
    return bases.chebyshev_derivatives(layer.cheby_coeffs.shape[-1] - 1, x, highest)


def _pina_derivatives(layer: Any, x: torch.Tensor, highest: int) -> list[torch.Tensor]:
    spline = layer.spline
    closed = spline._boundary_interval_idx
    return bases.spline_derivatives(spline.knots, spline.order - 1, x, highest, closed)


def _rbf_derivatives(layer: Any, x: torch.Tensor, highest: int) -> list[torch.Tensor]:
    if hasattr(layer.rbf, "denominator"):
        return bases.gaussian_derivatives(layer.rbf.grid, layer.rbf.denominator, x, highest)
    return bases.bump_derivatives(layer.rbf.grid, x, highest)  # FasterKAN


_FEW_OUTPUTS = 16  # up to which the phases of ReLU-KAN are more than a tenth of the layer
_RELU_KAN = has("phase_low:2 equal_size_conv.weight:4")
_EFFICIENT_KAN = has("spline_weight:3 grid:2 b_splines")
_OF_EFFICIENT_KAN: dict[str, Any] = {
    "residual": ("base_weight", "o i"),
    "grid": ("grid",),
    "grid_methods": ("update_grid", "update_grid_from_qkan"),
}
_REBUILDING = (
    *(
        "update_grid",
        "update_grid_from_samples",
        "initialize_grid_from_another_model",
        "initialize_from_another_model",
    ),
    *("refine", "copy", "rewind", "perturb", "prune", "prune_node", "prune_input", "expand_depth", "expand_width"),
    *("swap", "auto_swap", "auto_swap_l"),
)
_OF_PYKAN: dict[str, Any] = {
    "grid": ("grid",),
    "grid_methods": ("update_grid_from_samples", "initialize_grid_from_parent", "get_subset", "swap"),
    "network_methods": {"fit": "update_grid", **dict.fromkeys(_REBUILDING)},
}

register_kan_layer(
    "qkan-fourier",
    matches=has("fourier_weight:3 freqs:1"),
    coefficients=("fourier_weight", "o i k"),
    residual=("base_weight", "o i"),
    grid=("freqs", "input_scale", "input_shift"),
    edge_scale=("fourier_scaler", "o i"),
)
register_kan_layer(
    "kanx",
    matches=has("spline_weight:3 grid:2 update_grid_from_samples"),
    coefficients=("spline_weight", "i o k"),
    residual=("base_weight", "i o"),
    grid=("grid",),
    grid_methods=("update_grid_from_samples",),
)
register_kan_layer(
    "flashkan",
    matches=lambda m: "spline_weight" in m._parameters and m.grid_starts.ndim == 1,
    coefficients=("spline_weight", "o i k"),
    residual=("base_weight", "o i"),
    grid=("grid_starts", "inv_h"),  # its splines, in float32, are too far from the closed form
)
register_kan_layer(
    "inkan",
    # dim=2 is a tensor-product surface of two inputs, not a sum of univariate functions
    matches=lambda m: "weight" in m._parameters and m.grid_starts.ndim == 1 and m.dim == 1,
    coefficients=("weight", "o ((i k) + i)"),
    grid=("grid_starts", "inv_h"),
    splines=_splines_from_starts,
    activation=lambda m, x: m.base_activation(x),
    axes=lambda m: {"i": m.in_features},
)
register_kan_layer(
    "pina",
    matches=has("spline._control_points:3 base_function"),
    coefficients=("spline._control_points", "i o k"),
    residual=("base_weight", "o i"),
    grid=("spline._knots",),
    basis=lambda m, x: m.spline.basis(x),
    derivatives=_pina_derivatives,
    activation=lambda m, x: m.base_function(x),
    bias="bias",
)
for _kind, _name in (("fourier-kan", "fouriercoeffs"), ("physicsnemo", "fourier_coeffs")):
    register_kan_layer(
        _kind,
        matches=has(f"{_name}:4"),
        coefficients=(_name, "t o i g"),
        derivatives=lambda m, x, highest, name=_name: bases.harmonic_derivatives(
            getattr(m, name).shape[-1], x, highest
        ),
        bias="bias",
    )
register_kan_layer(
    "cheby-kan",
    matches=has("cheby_coeffs:3"),
    coefficients=("cheby_coeffs", "i o k"),
    basis=lambda m, x: _chebyshev_derivatives(m, x, 0)[0],
    derivatives=_chebyshev_derivatives,
)
register_kan_layer(
    "fast-kan",  # FasterKAN too, which has no residual branch
    matches=has("spline_linear.weight:2 rbf.grid:1"),
    coefficients=("spline_linear.weight", "o (i k)"),
    residual=("base_linear.weight", "o i"),
    grid=("rbf.grid", "rbf.denominator", "rbf.inv_denominator"),
    basis=lambda m, x: m.rbf(x if m.layernorm is None else m.layernorm(x)),
    derivatives=_rbf_derivatives,
    normalization="layernorm",
    activation=lambda m, x: m.base_activation(x),
    bias="base_linear.bias",
    axes=lambda m: {"k": m.rbf.grid.numel()},
)
register_kan_layer(
    "pykan",
    matches=has("coef:3 mask:2 scale_sp:2"),  # a copy may lack `scale_base`
    coefficients=("coef", "i o k"),
    residual=("scale_base", "i o"),
    checkpoint_methods=("saveckpt",),
    edge_scale=("scale_sp", "i o"),
    basis=_pykan_basis,  # without `activation` no fast path: the layers also return the value of each edge
    **_OF_PYKAN,
)
register_kan_layer(
    "pykan-2024",  # edges in one axis; its later layout is a 3-axis one
    matches=lambda m: m.coef.ndim == 2 and m.scale_base.ndim == 1 and len(m.coef) == m.in_dim * m.out_dim,
    coefficients=("coef", "(o i) k"),
    residual=("scale_base", "(o i)"),
    edge_scale=("scale_sp", "(o i)"),
    axes=lambda m: {"o": m.out_dim, "i": m.in_dim},
    **_OF_PYKAN,
)
register_kan_layer(
    "relu-kan",
    matches=_RELU_KAN,
    coefficients=("equal_size_conv.weight", "o () (i k):2"),
    grid=("phase_low", "phase_high", "phase_height"),
    bias="equal_size_conv.bias",
    axes=lambda m: {"i": m.phase_low.shape[0]},
)
for _kind, _name in (("relu-kan-few", "phase_height"), ("relu-kan-few-high", "phase_high")):
    register_kan_layer(  # of few outputs: the phases, which all outputs share, are a large share of the layer
        _kind,
        matches=lambda m, high=_name: (
            _RELU_KAN(m) and len(m.equal_size_conv.weight) <= _FEW_OUTPUTS and {"phase_low", high} <= {*m._parameters}
        ),
        coefficients=[("equal_size_conv.weight", "o () (i k):2"), ("phase_low", "i k"), (_name, "i k")],
        axes=lambda m: {"i": m.phase_low.shape[0]},
    )
for _kind, _name, _pattern in (
    ("torchkan", "spline_weights", "o i k"),
    ("torchkan-polynomials", "poly_weights", "o (i k)"),
):
    register_kan_layer(  # all layers of a network in one module
        _kind,
        matches=has(f"{_name}.0 base_weights.0"),
        coefficients=(f"{_name}.*", _pattern),
        residual=("base_weights.*", "o i"),
    )
register_kan_layer(
    "efficient-kan",  # the delta is put on the raw parameter, not on its product with `spline_scaler`
    matches=_EFFICIENT_KAN,
    coefficients=("spline_weight", "o i k"),
    basis=lambda m, x: m.b_splines(x),
    splines=_splines_from_knots,
    derivatives=lambda m, x, highest: bases.spline_derivatives(m.grid, m.spline_order, x, highest),
    activation=lambda m, x: m.base_activation(x),
    edge_scale=("spline_scaler", "o i"),
    **_OF_EFFICIENT_KAN,
)
register_kan_layer(
    "efficient-kan-few",  # of few functions `spline_scaler` is a fifth of them or more: a part
    matches=lambda m: _EFFICIENT_KAN(m) and m.spline_weight.shape[2] <= 4 and "spline_scaler" in m._parameters,
    coefficients=[("spline_weight", "o i k"), ("spline_scaler", "o i")],
    **_OF_EFFICIENT_KAN,
)
_OURS: dict[str, Any] = {
    "coefficients": ("spline_weight", "o i k"),
    "residual": ("base_weight", "o i"),
    "grid": ("grid_bounds", "grid_size", "spline_order"),
    "basis": lambda m, x: m.basis(x),
}
register_kan_layer(
    "peft-lotra",
    matches=KANLinear,
    grid_methods=("update_grid",),
    splines=lambda m: UniformGrid(*m.grid_bounds.unbind(-1), m.grid_size, m.spline_order),  # pyright: ignore
    activation=lambda m, x: nn.functional.silu(x),
    **_OURS,
)
# The parameters of Slim layers are Tucker components; described here are the tensors that the components make. An
# adapter is added to the components, see `SlimLoTRALayer`.
register_kan_layer("slim-kan", matches=SlimKANLinear, **_OURS)
BUILT_IN.update(REGISTERED)
