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

from torch import Tensor, nn

from ..derivatives import bases
from ..kan.basis import UniformGrid
from ..kan.layer import KANLinear
from .kinds import BUILT_IN, REGISTERED, has, register_kan_layer


def _register(
    table: str,
    where: Callable[[Any], bool] | None = None,
    **others: Any,
) -> None:
    """Register the kinds of a table.

    Args:
        table: Rows, with an empty line between two of them: kind | attributes of the layers, see `has` | coefficients
            | residual | edge scale | grid. Columns at the end may be absent. A parameter is given by its name and its
            pattern, parts of the coefficients are separated by commas. `name()` is a method that moves the grid.
        where: What else is true of the layers, if they have the attributes.
        **others: The other fields of `KANLayerSpec`.
    """
    for row in table.split("\n\n"):
        kind, attributes, *columns = [" ".join(column.split()) for column in row.split("|")]
        coefficients, residual, edge_scale, grid = (*columns, "", "", "")[:4]
        register_kan_layer(
            kind,
            matches=has(attributes, where),
            coefficients=[part.split(maxsplit=1) for part in coefficients.split(", ")],
            residual=tuple(residual.split(maxsplit=1)) or None,
            edge_scale=tuple(edge_scale.split(maxsplit=1)) or None,
            grid=tuple(name for name in grid.split() if "()" not in name),
            grid_methods=tuple(name[:-2] for name in grid.split() if "()" in name),
            **others,
        )


def _degrees(layer: Any) -> dict[str, int]:
    return {"k": layer.degree + 1}


def _groups(layer: Any) -> dict[str, int]:
    return {"g": layer.groups}


def _phases(layer: Any) -> dict[str, int]:
    return {"i": len(layer.phase_low)}


def _trains_phases(layer: Any) -> bool:
    phases = [getattr(layer, f"phase_{name}", None) for name in ("low", "height", "high")]
    return all(phase is None or isinstance(phase, nn.Parameter) for phase in phases)


def _is_whole(layer: Any) -> bool:
    """Return whether a convolution is no bottleneck, which computes more than the sum."""
    return not hasattr(layer, "inner_proj")


# torch-conv-kan: a norm follows the sum. The first versions have a list of convolutions, one for each group.
# `gram-conv` are also Legendre, Jacobi and Bernstein polynomials, with the degrees outside; `spline-conv` Gaussians.
_register(
    """
    gram-conv | poly_weights base_conv.0
    | poly_weights g o (k i) ... | base_conv.*.weight o i ... | | beta_weights

    spline-conv | spline_conv.0 base_conv.0
    | spline_conv.*.weight o (i k) ... | base_conv.*.weight o i ... | | grid rbf.grid

    relu-conv | relukan_conv.0 phase_low
    | relukan_conv.*.weight o (i k) ... | base_conv.*.weight o i ... | | phase_low phase_high

    wav-conv-1d | wavelet_conv.0.wavelet_weights.weight:3 wavelet_conv.0.scale:4
    | wavelet_conv.*.wavelet_weights.weight o i ...,
      wavelet_conv.*.scale () o i (),
      wavelet_conv.*.translation () o i ()
    | base_conv.*.weight o i ...

    wav-conv-2d | wavelet_conv.0.wavelet_weights.weight:4 wavelet_conv.0.scale:5
    | wavelet_conv.*.wavelet_weights.weight o i ...,
      wavelet_conv.*.scale () o i () (),
      wavelet_conv.*.translation () o i () ()
    | base_conv.*.weight o i ...

    wav-conv-3d | wavelet_conv.0.wavelet_weights.weight:5 wavelet_conv.0.scale:6
    | wavelet_conv.*.wavelet_weights.weight o i ...,
      wavelet_conv.*.scale () o i () () (),
      wavelet_conv.*.translation () o i () () ()
    | base_conv.*.weight o i ...
    """,
    where=_is_whole,
    groups="g",
)
_register(
    """
    cheby-conv | poly_conv.0.weight degree
    | poly_conv.*.weight o (i k) ... | base_conv.*.weight o i ... | | beta_weights
    """,
    where=_is_whole,
    groups="g",
    axes=_degrees,
)
_register(  # one convolution; groups would cut the degrees: such a layer is no sum of functions
    """
    gram-conv-2 | poly_conv degree
    | poly_conv.weight o (k i) ... | base_conv.weight o i ... | | beta_weights
    """,
    where=lambda m: m.poly_conv.groups == 1 and m.degree > 0,
    axes=_degrees,
)
_register(  # U-KAN: the functions outside, other than in torch-conv-kan
    "fast-kan-conv | spline_conv rbf | spline_conv.weight o (k i) ... | base_conv.weight o i ... | | rbf.grid",
    where=lambda m: m.spline_conv.groups == 1 and (hasattr(m, "base_conv") or hasattr(m.rbf, "grid")),
    bias="base_conv.bias",
    axes=lambda m: {} if hasattr(m, "base_conv") else {"k": m.rbf.grid.numel()},
)
_register(  # on patches: rows (..., groups, in)
    """
    convkan | spline_weight:4 base_weight:3 grid:3
    | spline_weight g o i k | base_weight g o i | spline_scaler g o i | grid update_grid()
    """,
    groups="g",
)
_register(
    """
    kanlib-conv | coefficients basis
    | coefficients (g o) i ... k | weight_residual (g o) i ... | weight_spline (g o) i ...
    | basis.grid update_grid() refine_grid()
    """,
    where=lambda m: m.coefficients.ndim > 3 and isinstance(m.basis, nn.Module),
    groups="g",
    bias="bias_output",
    axes=_groups,
)
_register(
    """
    lkan-conv | coeff scale_base
    | coeff t (g o) i ... k | scale_base (g o) i ... | scale_spline (g o) i ...
    """,
    where=lambda m: m.coeff.ndim > 4 and m.scale_base.ndim == m.coeff.ndim - 2,
    groups="g",
    bias="bias",
    axes=_groups,
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


def _chebyshev_derivatives(layer: Any, x: Tensor, highest: int) -> list[Tensor]:
    return bases.chebyshev_derivatives(layer.cheby_coeffs.shape[-1] - 1, x, highest)


def _fourier_derivatives(layer: Any, x: Tensor, highest: int) -> list[Tensor]:
    coefficients = layer.fouriercoeffs if hasattr(layer, "fouriercoeffs") else layer.fourier_coeffs
    return bases.harmonic_derivatives(coefficients.shape[-1], x, highest)


def _pina_derivatives(layer: Any, x: Tensor, highest: int) -> list[Tensor]:
    spline = layer.spline
    closed = spline._boundary_interval_idx
    return bases.spline_derivatives(spline.knots, spline.order - 1, x, highest, closed)


def _rbf_derivatives(layer: Any, x: Tensor, highest: int) -> list[Tensor]:
    if hasattr(layer.rbf, "denominator"):
        return bases.gaussian_derivatives(layer.rbf.grid, layer.rbf.denominator, x, highest)
    return bases.bump_derivatives(layer.rbf.grid, x, highest)  # FasterKAN


_register(
    """
    qkan-fourier | fourier_weight:3 freqs:1
    | fourier_weight o i k | base_weight o i | fourier_scaler o i | freqs input_scale input_shift

    kanx | spline_weight:3 grid:2 update_grid_from_samples
    | spline_weight i o k | base_weight i o | | grid update_grid_from_samples()
    """
)
_register(  # its splines, in float32, are too far from the closed form
    "flashkan | spline_weight:3 grid_starts:1 | spline_weight o i k | base_weight o i | | grid_starts inv_h",
    where=lambda m: "spline_weight" in m._parameters,  # in inkan's it is a view
)
_register(
    "inkan | weight:2 grid_starts:1 | weight o ((i k) + i) | | | grid_starts inv_h",
    where=lambda m: m.dim == 1,  # dim=2 is a tensor-product surface of two inputs, not a sum of functions of one
    splines=_splines_from_starts,
    activation=lambda m, x: m.base_activation(x),
    axes=lambda m: {"i": m.in_features},
)
_register(
    """
    pina | spline._control_points:3 base_function
    | spline._control_points i o k | base_weight o i | | spline._knots
    """,
    basis=lambda m, x: m.spline.basis(x),
    derivatives=_pina_derivatives,
    activation=lambda m, x: m.base_function(x),
    bias="bias",
)
_register(
    """
    fourier-kan | fouriercoeffs:4 | fouriercoeffs t o i g

    physicsnemo | fourier_coeffs:4 | fourier_coeffs t o i g
    """,
    derivatives=_fourier_derivatives,
    bias="bias",
)
_register(
    "cheby-kan | cheby_coeffs:3 | cheby_coeffs i o k",
    basis=lambda m, x: _chebyshev_derivatives(m, x, 0)[0],
    derivatives=_chebyshev_derivatives,
)
_register(  # FasterKAN too, which has no base branch
    """
    fast-kan | spline_linear.weight:2 rbf.grid:1
    | spline_linear.weight o (i k) | base_linear.weight o i | | rbf.grid rbf.denominator rbf.inv_denominator
    """,
    basis=lambda m, x: m.rbf(x),
    derivatives=_rbf_derivatives,
    normalization="layernorm",
    activation=lambda m, x: m.base_activation(x),
    bias="base_linear.bias",
    axes=lambda m: {"k": m.rbf.grid.numel()},
)
_PYKAN_METHODS = {
    "fit": "update_grid",
    **dict.fromkeys(
        "update_grid update_grid_from_samples initialize_grid_from_another_model initialize_from_another_model "
        "refine copy rewind perturb prune prune_node prune_input expand_depth expand_width "
        "swap auto_swap auto_swap_l".split()
    ),
}
_register(  # a copy may lack `scale_base`
    """
    pykan | coef:3 mask:2 scale_sp:2 | coef i o k | scale_base i o | scale_sp i o
    | grid update_grid_from_samples() initialize_grid_from_parent() get_subset() swap()
    """,
    checkpoint_methods=("saveckpt",),
    network_methods=_PYKAN_METHODS,
)
_register(  # edges in one axis; its later layout is a 3-axis one
    """
    pykan-2024 | coef:2 scale_base:1 | coef (o i) k | scale_base (o i) | scale_sp (o i)
    | grid update_grid_from_samples() initialize_grid_from_parent() get_subset() swap()
    """,
    where=lambda m: len(m.coef) == m.in_dim * m.out_dim,
    axes=lambda m: {"o": m.out_dim, "i": m.in_dim},
    network_methods=_PYKAN_METHODS,
)
_register(
    """
    relu-kan | phase_low:2 equal_size_conv.weight:4
    | equal_size_conv.weight o () (i k):2 | | | phase_low phase_high phase_height
    """,
    bias="equal_size_conv.bias",
    axes=_phases,
)
_register(  # of few outputs: the phases, which all outputs share, are more than a tenth of the layer
    """
    relu-kan-few | phase_low:2 phase_height:2 equal_size_conv.weight:4
    | equal_size_conv.weight o () (i k):2, phase_low i k, phase_height i k

    relu-kan-few-high | phase_low:2 phase_high:2 equal_size_conv.weight:4
    | equal_size_conv.weight o () (i k):2, phase_low i k, phase_high i k
    """,
    where=lambda m: len(m.equal_size_conv.weight) <= 16 and _trains_phases(m),
    axes=_phases,
)
_register(  # all layers of a network in one module
    """
    torchkan | spline_weights.0 base_weights.0 | spline_weights.* o i k | base_weights.* o i

    torchkan-polynomials | poly_weights.0 base_weights.0 | poly_weights.* o (i k) | base_weights.* o i
    """
)
_register(  # the delta is put on the raw parameter, not on its product with `spline_scaler`
    """
    efficient-kan | spline_weight:3 grid:2 b_splines
    | spline_weight o i k | base_weight o i | spline_scaler o i | grid update_grid() update_grid_from_qkan()
    """,
    basis=lambda m, x: m.b_splines(x),
    splines=_splines_from_knots,
    derivatives=lambda m, x, highest: bases.spline_derivatives(m.grid, m.spline_order, x, highest),
    activation=lambda m, x: m.base_activation(x),
)
_register(  # of few functions `spline_scaler` is a fifth of them or more: a part
    """
    efficient-kan-few | spline_weight:3 grid:2 b_splines
    | spline_weight o i k, spline_scaler o i | base_weight o i | | grid update_grid() update_grid_from_qkan()
    """,
    where=lambda m: m.spline_weight.shape[2] <= 4 and "spline_scaler" in m._parameters,
)
register_kan_layer(
    "peft-lotra",
    matches=KANLinear,
    coefficients=("spline_weight", "o i k"),
    residual=("base_weight", "o i"),
    grid=("grid_bounds", "grid_size", "spline_order"),
    grid_methods=("update_grid",),
    basis=lambda m, x: m.basis(x),
    splines=KANLinear.grid.fget,
    activation=lambda m, x: nn.functional.silu(x),
)
BUILT_IN.update(REGISTERED)
