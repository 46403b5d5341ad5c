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


def _kind(row: str, where: Callable[[Any], bool] | None = None, **others: Any) -> None:
    """Registers a kind.

    Args:
        row: Its columns: name | attributes of its layers, see `has` | coefficients | residual | edge scale | grid.
            Columns at the end may be absent. A parameter is given by its name and its pattern, parts of the
            coefficients are separated by commas. `name()` is a method that moves the grid.
        where: What else is true of its layers, if they have the attributes.
        **others: The other fields of `KANLayerSpec`.
    """
    kind, attributes, *columns = map(str.strip, row.split("|"))
    coefficients, residual, edge_scale, grid = (*columns, "", "", "")[:4]
    register_kan_layer(
        kind,
        matches=has(attributes, where),
        coefficients=[part.split(None, 1) for part in coefficients.split(", ")],
        residual=tuple(residual.split(None, 1)) or None,
        edge_scale=tuple(edge_scale.split(None, 1)) or None,
        grid=tuple(name for name in grid.split() if "()" not in name),
        grid_methods=tuple(name[:-2] for name in grid.split() if "()" in name),
        **others,
    )


def _degrees(layer: Any) -> dict[str, int]:
    return {"k": layer.degree + 1}


# torch-conv-kan: a norm follows the sum. The first versions have a list of convolutions, one for each group.
_BASE = "base_conv.*.weight o i ..."
_GROUPED: dict[str, Any] = {
    "where": lambda m: not hasattr(m, "inner_proj"),  # of bottlenecks, which compute more than the sum
    "groups": "g",
}
# and Legendre, Jacobi, Bernstein, with the degrees outside
_kind(f"gram-conv | poly_weights base_conv.0 | poly_weights g o (k i) ... | {_BASE} | | beta_weights", **_GROUPED)
_kind(
    f"cheby-conv | poly_conv.0.weight degree | poly_conv.*.weight o (i k) ... | {_BASE} | | beta_weights",
    axes=_degrees,
    **_GROUPED,
)
# B-splines and Gaussians
_kind(
    f"spline-conv | spline_conv.0 base_conv.0 | spline_conv.*.weight o (i k) ... | {_BASE} | | grid rbf.grid",
    **_GROUPED,
)
_kind(
    f"relu-conv | relukan_conv.0 phase_low | relukan_conv.*.weight o (i k) ... | {_BASE} | | phase_low phase_high",
    **_GROUPED,
)
_WAVELETS = "wavelet_conv.*.wavelet_weights.weight o i ..."
for _dims in (1, 2, 3):
    _edges = " ".join(["() o i", *["()"] * _dims])
    _kind(
        f"wav-conv-{_dims}d | wavelet_conv.0.wavelet_weights.weight:{_dims + 2} wavelet_conv.0.scale:{_dims + 3} | "
        f"{_WAVELETS}, wavelet_conv.*.scale {_edges}, wavelet_conv.*.translation {_edges} | {_BASE}",
        **_GROUPED,
    )
_kind(  # one convolution; its groups cut the degrees, so that a layer with groups is no sum of functions
    "gram-conv-2 | poly_conv degree | poly_conv.weight o (k i) ... | base_conv.weight o i ... | | beta_weights",
    where=lambda m: m.poly_conv.groups == 1 and m.degree > 0,
    axes=_degrees,
)
_kind(  # U-KAN: the functions outside, other than in torch-conv-kan
    "fast-kan-conv | spline_conv rbf | spline_conv.weight o (k i) ... | base_conv.weight o i ... | | rbf.grid",
    where=lambda m: m.spline_conv.groups == 1 and (hasattr(m, "base_conv") or hasattr(m.rbf, "grid")),
    bias="base_conv.bias",
    axes=lambda m: {} if hasattr(m, "base_conv") else {"k": m.rbf.grid.numel()},
)
_kind(  # on patches: rows (..., groups, in)
    "convkan | spline_weight:4 base_weight:3 grid:3 | spline_weight g o i k | base_weight g o i "
    "| spline_scaler g o i | grid update_grid()",
    groups="g",
)
_kind(
    "kanlib-conv | coefficients basis | coefficients (g o) i ... k | weight_residual (g o) i ... "
    "| weight_spline (g o) i ... | basis.grid update_grid() refine_grid()",
    where=lambda m: m.coefficients.ndim > 3 and isinstance(m.basis, nn.Module),
    groups="g",
    bias="bias_output",
    axes=lambda m: {"g": m.groups},
)
_kind(
    "lkan-conv | coeff scale_base | coeff t (g o) i ... k | scale_base (g o) i ... | scale_spline (g o) i ...",
    where=lambda m: m.coeff.ndim > 4 and m.scale_base.ndim == m.coeff.ndim - 2,
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


_kind(
    "qkan-fourier | fourier_weight:3 freqs:1 | fourier_weight o i k | base_weight o i | fourier_scaler o i "
    "| freqs input_scale input_shift"
)
_kind(
    "kanx | spline_weight:3 grid:2 update_grid_from_samples | spline_weight i o k | base_weight i o "
    "| | grid update_grid_from_samples()"
)
_kind(  # its splines, in float32, are too far from the closed form
    "flashkan | spline_weight:3 grid_starts:1 | spline_weight o i k | base_weight o i | | grid_starts inv_h",
    where=lambda m: "spline_weight" in m._parameters,  # in inkan's it is a view
)
_kind(
    "inkan | weight:2 grid_starts:1 | weight o ((i k) + i) | | | grid_starts inv_h",
    where=lambda m: m.dim == 1,  # dim=2 is a tensor-product surface of two inputs, not a sum of functions of one
    splines=_splines_from_starts,
    activation=lambda m, x: m.base_activation(x),
    axes=lambda m: {"i": m.in_features},
)
_kind(
    "pina | spline._control_points:3 base_function | spline._control_points i o k | base_weight o i | | spline._knots",
    basis=lambda m, x: m.spline.basis(x),
    derivatives=_pina_derivatives,
    activation=lambda m, x: m.base_function(x),
    bias="bias",
)
for _library, _name in (("fourier-kan", "fouriercoeffs"), ("physicsnemo", "fourier_coeffs")):
    _kind(
        f"{_library} | {_name}:4 | {_name} t o i g",
        derivatives=lambda m, x, highest, name=_name: bases.harmonic_derivatives(
            getattr(m, name).shape[-1], x, highest
        ),
        bias="bias",
    )
_kind(
    "cheby-kan | cheby_coeffs:3 | cheby_coeffs i o k",
    basis=lambda m, x: _chebyshev_derivatives(m, x, 0)[0],
    derivatives=_chebyshev_derivatives,
)
_kind(  # FasterKAN too, which has no base branch
    "fast-kan | spline_linear.weight:2 rbf.grid:1 | spline_linear.weight o (i k) | base_linear.weight o i | "
    "| rbf.grid rbf.denominator rbf.inv_denominator",
    basis=lambda m, x: m.rbf(x),
    derivatives=_rbf_derivatives,
    normalization="layernorm",
    activation=lambda m, x: m.base_activation(x),
    bias="base_linear.bias",
    axes=lambda m: {"k": m.rbf.grid.numel()},
)
_PYKAN_GRID = "grid update_grid_from_samples() initialize_grid_from_parent() get_subset() swap()"
_OF_PYKAN: dict[str, Any] = {
    "network_methods": {
        "fit": "update_grid",
        **dict.fromkeys(
            "update_grid update_grid_from_samples initialize_grid_from_another_model initialize_from_another_model "
            "refine copy rewind perturb prune prune_node prune_input expand_depth expand_width "
            "swap auto_swap auto_swap_l".split()
        ),
    },
}
_kind(  # a copy may lack `scale_base`
    f"pykan | coef:3 mask:2 scale_sp:2 | coef i o k | scale_base i o | scale_sp i o | {_PYKAN_GRID}",
    checkpoint_methods=("saveckpt",),
    basis=_pykan_basis,  # without `activation` no fast path: the layers also return the value of each edge
    **_OF_PYKAN,
)
_kind(  # edges in one axis; its later layout is a 3-axis one
    f"pykan-2024 | coef:2 scale_base:1 | coef (o i) k | scale_base (o i) | scale_sp (o i) | {_PYKAN_GRID}",
    where=lambda m: len(m.coef) == m.in_dim * m.out_dim,
    axes=lambda m: {"o": m.out_dim, "i": m.in_dim},
    **_OF_PYKAN,
)
_RELU_KAN = "phase_low:2 equal_size_conv.weight:4 | equal_size_conv.weight o () (i k):2"
_kind(
    f"relu-kan | {_RELU_KAN} | | | phase_low phase_high phase_height",
    bias="equal_size_conv.bias",
    axes=lambda m: {"i": len(m.phase_low)},
)
for _library, _name in (("relu-kan-few", "phase_height"), ("relu-kan-few-high", "phase_high")):
    _kind(  # of few outputs: the phases, which all outputs share, are more than a tenth of the layer
        f"{_library} | {_RELU_KAN}, phase_low i k, {_name} i k",
        where=lambda m, high=_name: len(m.equal_size_conv.weight) <= 16 and {"phase_low", high} <= {*m._parameters},
        axes=lambda m: {"i": len(m.phase_low)},
    )
# all layers of a network in one module
_kind("torchkan | spline_weights.0 base_weights.0 | spline_weights.* o i k | base_weights.* o i")
_kind("torchkan-polynomials | poly_weights.0 base_weights.0 | poly_weights.* o (i k) | base_weights.* o i")
_EFFICIENT_KAN = "spline_weight:3 grid:2 b_splines | spline_weight o i k"
_ITS_GRID = "grid update_grid() update_grid_from_qkan()"
_kind(  # the delta is put on the raw parameter, not on its product with `spline_scaler`
    f"efficient-kan | {_EFFICIENT_KAN} | base_weight o i | spline_scaler o i | {_ITS_GRID}",
    basis=lambda m, x: m.b_splines(x),
    splines=_splines_from_knots,
    derivatives=lambda m, x, highest: bases.spline_derivatives(m.grid, m.spline_order, x, highest),
    activation=lambda m, x: m.base_activation(x),
)
_kind(  # of few functions `spline_scaler` is a fifth of them or more: a part
    f"efficient-kan-few | {_EFFICIENT_KAN}, spline_scaler o i | base_weight o i | | {_ITS_GRID}",
    where=lambda m: m.spline_weight.shape[2] <= 4 and "spline_scaler" in m._parameters,
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
    splines=KANLinear.grid.fget,
    activation=lambda m, x: nn.functional.silu(x),
    **_OURS,
)
# The parameters of Slim layers are Tucker components; described here are the tensors that the components make. An
# adapter is added to the components, see `SlimLoTRALayer`.
register_kan_layer("slim-kan", matches=SlimKANLinear, **_OURS)
BUILT_IN.update(REGISTERED)
