# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The kinds of layers that are known from the start. Importing this module registers them.

Layers are recognized by their attributes, since users copy the files and rename the classes. A predicate that reads a
missing attribute says no.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..derivatives import bases
from ..kan.basis import UniformGrid
from ..kan.layer import KANLinear
from ..kan.slim_kan import SlimKANLinear
from . import known_convolutions, slim  # noqa: F401  (register kinds)
from .registry import keep_as_built_in, register_kan_layer


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


def _chebyshev_basis(layer: Any, x: torch.Tensor) -> torch.Tensor:
    degrees = torch.arange(layer.cheby_coeffs.shape[-1], device=x.device)  # tabkan's layers have no `arange`
    return torch.cos(degrees * torch.acos(torch.tanh(x)).unsqueeze(-1))


_FEW_OUTPUTS = 16  # up to which the phases of ReLU-KAN are more than a tenth of the layer


def _pina_derivatives(layer: Any, x: torch.Tensor, highest: int) -> list[torch.Tensor]:
    spline = layer.spline
    closed = spline._boundary_interval_idx
    return bases.spline_derivatives(spline.knots, spline.order - 1, x, highest, closed)


def _rbf_derivatives(layer: Any, x: torch.Tensor, highest: int) -> list[torch.Tensor]:
    if hasattr(layer.rbf, "denominator"):
        return bases.gaussian_derivatives(layer.rbf.grid, layer.rbf.denominator, x, highest)
    return bases.bump_derivatives(layer.rbf.grid, x, highest)  # FasterKAN


_PYKAN_LAYER_METHODS = ("update_grid_from_samples", "initialize_grid_from_parent", "get_subset", "swap")
_PYKAN_NETWORK_METHODS = {
    "fit": "update_grid",
    **dict.fromkeys(("update_grid", "update_grid_from_samples", "initialize_grid_from_another_model")),
    **dict.fromkeys(("initialize_from_another_model", "refine", "copy", "rewind", "perturb")),
    **dict.fromkeys(("prune", "prune_node", "prune_input", "expand_depth", "expand_width")),
    **dict.fromkeys(("swap", "auto_swap", "auto_swap_l")),
}

register_kan_layer(
    "qkan-fourier",
    matches=lambda m: m.fourier_weight.ndim == 3 and m.freqs.ndim == 1,
    coefficients=("fourier_weight", "o i k"),
    residual=("base_weight", "o i"),
    grid=("freqs", "input_scale", "input_shift"),
    edge_scale=("fourier_scaler", "o i"),
)
register_kan_layer(
    "kanx",
    matches=lambda m: (
        m.spline_weight.ndim == 3
        and m.grid.ndim == 2
        and hasattr(m, "update_grid_from_samples")
        and not hasattr(m, "b_splines")
    ),
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
    matches=lambda m: m.spline._control_points.ndim == 3 and hasattr(m, "base_function"),
    coefficients=("spline._control_points", "i o k"),
    residual=("base_weight", "o i"),
    grid=("spline._knots",),
    basis=lambda m, x: m.spline.basis(x),
    derivatives=_pina_derivatives,
    activation=lambda m, x: m.base_function(x),
    bias="bias",
)
register_kan_layer(
    "fourier-kan",
    matches=lambda m: m.fouriercoeffs.ndim == 4,
    coefficients=("fouriercoeffs", "t o i g"),
    derivatives=lambda m, x, highest: bases.harmonic_derivatives(m.fouriercoeffs.shape[-1], x, highest),
    bias="bias",
)
register_kan_layer(
    "physicsnemo",
    matches=lambda m: m.fourier_coeffs.ndim == 4,
    coefficients=("fourier_coeffs", "t o i g"),
    derivatives=lambda m, x, highest: bases.harmonic_derivatives(m.fourier_coeffs.shape[-1], x, highest),
    bias="bias",
)
register_kan_layer(
    "cheby-kan",
    matches=lambda m: m.cheby_coeffs.ndim == 3,
    coefficients=("cheby_coeffs", "i o k"),
    basis=_chebyshev_basis,
    derivatives=lambda m, x, highest: bases.chebyshev_derivatives(m.cheby_coeffs.shape[-1] - 1, x, highest),
)
register_kan_layer(
    "fast-kan",  # FasterKAN too, which has no residual branch
    matches=lambda m: m.spline_linear.weight.ndim == 2 and m.rbf.grid.ndim == 1,
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
    # a copy may lack `scale_base`
    matches=lambda m: m.coef.ndim == 3 and m.mask.ndim == 2 and m.scale_sp.ndim == 2,
    coefficients=("coef", "i o k"),
    residual=("scale_base", "i o"),
    grid=("grid",),
    grid_methods=_PYKAN_LAYER_METHODS,
    network_methods=_PYKAN_NETWORK_METHODS,
    checkpoint_methods=("saveckpt",),
    edge_scale=("scale_sp", "i o"),
    basis=_pykan_basis,  # without `activation` no fast path: the layers also return the value of each edge
)
register_kan_layer(
    "pykan-2024",  # edges in one axis; its later layout is a 3-axis one
    matches=lambda m: m.coef.ndim == 2 and m.scale_base.ndim == 1 and len(m.coef) == m.in_dim * m.out_dim,
    coefficients=("coef", "(o i) k"),
    residual=("scale_base", "(o i)"),
    grid=("grid",),
    grid_methods=_PYKAN_LAYER_METHODS,
    network_methods=_PYKAN_NETWORK_METHODS,
    edge_scale=("scale_sp", "(o i)"),
    axes=lambda m: {"o": m.out_dim, "i": m.in_dim},
)
register_kan_layer(
    "relu-kan",
    matches=lambda m: m.phase_low.ndim == 2 and m.equal_size_conv.weight.ndim == 4,
    coefficients=("equal_size_conv.weight", "o () (i k):2"),
    grid=("phase_low", "phase_high", "phase_height"),
    bias="equal_size_conv.bias",
    axes=lambda m: {"i": m.phase_low.shape[0]},
)
for _name, _high in (("relu-kan-few", "phase_height"), ("relu-kan-few-high", "phase_high")):
    register_kan_layer(  # of few outputs: the phases, which all outputs share, are a large share of the layer
        _name,
        matches=lambda m, high=_high: (
            m.phase_low.ndim == 2
            and m.equal_size_conv.weight.ndim == 4
            and m.equal_size_conv.out_channels <= _FEW_OUTPUTS
            and {"phase_low", high} <= m._parameters.keys()
        ),
        coefficients=[("equal_size_conv.weight", "o () (i k):2"), ("phase_low", "i k"), (_high, "i k")],
        axes=lambda m: {"i": m.phase_low.shape[0]},
        linear=False,
    )
register_kan_layer(
    "torchkan",  # all layers of a network in one module
    matches=lambda m: isinstance(m.spline_weights, nn.ParameterList) and isinstance(m.base_weights, nn.ParameterList),
    coefficients=("spline_weights.*", "o i k"),
    residual=("base_weights.*", "o i"),
    linear=False,
)
register_kan_layer(
    "torchkan-polynomials",
    matches=lambda m: isinstance(m.poly_weights, nn.ParameterList) and isinstance(m.base_weights, nn.ParameterList),
    coefficients=("poly_weights.*", "o (i k)"),
    residual=("base_weights.*", "o i"),
    linear=False,
)
register_kan_layer(
    "efficient-kan",  # the delta is put on the raw parameter, not on its product with `spline_scaler`
    matches=lambda m: m.spline_weight.ndim == 3 and m.grid.ndim == 2 and hasattr(m, "b_splines"),
    coefficients=("spline_weight", "o i k"),
    residual=("base_weight", "o i"),
    grid=("grid",),
    grid_methods=("update_grid", "update_grid_from_qkan"),
    basis=lambda m, x: m.b_splines(x),
    splines=_splines_from_knots,
    derivatives=lambda m, x, highest: bases.spline_derivatives(m.grid, m.spline_order, x, highest),
    activation=lambda m, x: m.base_activation(x),
    scale=lambda m: m.spline_scaler if getattr(m, "enable_standalone_scale_spline", False) else None,
    edge_scale=("spline_scaler", "o i"),
)
register_kan_layer(
    "efficient-kan-few",  # `spline_scaler` is a sixth of the layer or more: a part, and not linear
    matches=lambda m: (
        m.spline_weight.ndim == 3
        and m.spline_weight.shape[2] <= 4
        and m.grid.ndim == 2
        and hasattr(m, "b_splines")
        and "spline_scaler" in m._parameters
    ),
    coefficients=[("spline_weight", "o i k"), ("spline_scaler", "o i")],
    residual=("base_weight", "o i"),
    grid=("grid",),
    grid_methods=("update_grid", "update_grid_from_qkan"),
    linear=False,
)
register_kan_layer(
    "peft-lotra",
    matches=KANLinear,
    coefficients=("spline_weight", "o i k"),
    residual=("base_weight", "o i"),
    grid=("grid_bounds", "grid_size", "spline_order"),
    grid_methods=("update_grid",),
    basis=lambda m, x: m.basis(x),
    splines=lambda m: UniformGrid(*m.grid_bounds.unbind(-1), m.grid_size, m.spline_order),  # pyright: ignore
    activation=lambda m, x: nn.functional.silu(x),
)
# The parameters of Slim layers are Tucker components; described here are the tensors that the components make. An
# adapter is added to the components, see `SlimLoTRALayer`.
register_kan_layer(
    "slim-kan",
    matches=SlimKANLinear,
    coefficients=("spline_weight", "o i k"),
    residual=("base_weight", "o i"),
    grid=("grid_bounds", "grid_size", "spline_order"),
    basis=lambda m, x: m.basis(x),
)
keep_as_built_in()
