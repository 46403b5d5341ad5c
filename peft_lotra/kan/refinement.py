# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Refine the grids of a network and keep its function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from ..modules.calls import share_hooks, unwrap
from .basis import UniformGrid, change_of_basis, check_grid
from .input_map import InputMap
from .layer import KANLinear, copy_with_parameters
from .network import LayerStack, is_norm


_POINTS = 8  # for each interval of the finer grid, on which functions are fitted


@dataclass(frozen=True)
class RefinementReport:
    """The errors of `refine_grid`, layer by layer.

    Attributes:
        errors: For each KAN layer the largest change of one of its edges' functions on its new grid, as a share of
            the layer's largest value there.
    """

    errors: dict[str, float]


@torch.inference_mode(False)  # parameters made in that mode could not be trained
@torch.no_grad()
def refine_grid(
    kan: nn.Module,
    grid_size: int,
    samples: Tensor | None = None,
    *,
    tolerance: float = 1e-2,
) -> RefinementReport:
    r"""Give the layers of a network grids of another size, and keep its function.

    Without samples, the ends of the grids stay. If `grid_size` is a multiple of the old one, the old splines lie in
    the span of the new ones, and the function is kept to rounding on the grids; otherwise by least squares. Beyond the
    ends of a grid the splines fade out within `spline_order` intervals, which get shorter. If activations leave the
    grids, give samples, or move the grids first, by `KAN.update_grid`.

    With samples, the knots stay and new ones are inserted between them. A grid that activations leave is extended by
    whole intervals, at most the `spline_order` on which splines are not zero. The function is then kept to rounding at
    the samples, and the grids of layers differ in size.

    Adapters are refined exactly, at any rank, if `grid_size` is a multiple of the old one. The matrix T
    that expresses the old splines by the new ones is then the same for all inputs. factor_basis becomes
    T factor_basis, or T multiplies the core if the basis mode is full.

    The parameters are replaced by new ones: make optimizers afterwards. `LevenbergMarquardt` needs nothing.

    Args:
        kan: A `KAN`, or one that PEFT or `torch.compile` has wrapped.
        grid_size: The number of intervals of each new grid.
        samples: Inputs (N, I) of the network. `grid_size` must be a multiple of the old ones then, and a layer of G
            intervals that is extended by e gets grid_size (G + e) / G of them.
        tolerance: The largest error of a layer, see `RefinementReport`, that is accepted.

    Raises:
        TypeError: `kan` is no `KAN`.
        ValueError: An argument is out of range; a layer is of an unknown kind, or has adapters that are merged or
            cannot be carried over; samples are not finite; the function cannot be kept to `tolerance`. The network is
            as before then.

    Source: W. Boehm, "Inserting new knots into B-spline curves" (1980), for nested grids.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, refine_grid
        >>> kan = KAN([2, 5, 1], grid_size=4, dtype=torch.float64)
        >>> x = 0.5 * torch.rand(100, 2, dtype=torch.float64)
        >>> before = kan(x)
        >>> report = refine_grid(kan, 8)
        >>> kan.layers[0].grid_size, torch.allclose(kan(x), before, atol=1e-6)
        (8, True)
    """
    kan = unwrap(kan)
    if not isinstance(kan, LayerStack):
        raise TypeError(
            f"`kan` is {type(kan).__name__}, but must be a KAN: give the network inside of a wrapper, "
            "such as `model.kan`."
        )
    splines = _find_spline_layers(kan, grid_size)
    has_adapters = any(layer is not kan.layers.get_submodule(name) for name, layer in splines.items())
    sizes = [layer.grid_size for layer in splines.values()]
    is_nested = not any(grid_size % size for size in sizes)
    if not is_nested and (has_adapters or samples is not None):
        raise ValueError(
            f"Adapters and `samples` need a `grid_size` that is a multiple of the old ones, {sizes}. Merge adapters "
            "first, by `merge_and_unload()`, or move grids by `update_grid`."
        )
    if samples is not None and not (len(samples) and samples.isfinite().all()):
        raise ValueError(f"`samples` {tuple(samples.shape)} must not be empty, and finite.")

    layers: list[nn.Module] = []
    errors = {}
    refined_adapters = []
    for name, layer in kan.layers.named_children():
        base = splines.get(name)
        if base is not None:
            bounds = base.grid_bounds
            size = grid_size
            if samples is not None:
                bounds, size = _extend_grid(base, samples, grid_size)
            refined, transfer, error = _refine_layer(base, size, bounds)
            if not error <= tolerance:
                raise ValueError(
                    f"`layers.{name}` changes by {error:.1e} of its size on a grid of {size} intervals, more "
                    f"than `tolerance` ({tolerance:g}). Its old grid has {base.grid_size}: take a larger `grid_size`."
                )
            errors[name] = error
            if layer is base:
                layers.append(refined)
            else:
                refined_adapters.append((layer, refined, transfer))
                layers.append(layer)
        else:
            layers.append(layer)
        if samples is not None:
            samples = layer(samples)

    for layer, refined, transfer in refined_adapters:
        layer.move_to_grid(refined, transfer)
    kan.layers = nn.ModuleList(layers)
    return RefinementReport(errors)


def _find_spline_layers(kan: LayerStack, grid_size: int) -> dict[str, KANLinear]:
    """Return the KAN layers without adapters by name; raise a ValueError for a layer that cannot be refined."""
    splines = {}
    for name, layer in kan.layers.named_children():
        layer: Any = getattr(layer, "base_to_refine", layer)  # if its adapters can be refined too
        names = {parameter_name for parameter_name, _ in layer.named_parameters()}
        if type(layer) is KANLinear and names == {"spline_weight", "base_weight"}:
            check_grid(grid_size, layer.spline_order)
            splines[name] = layer
        elif not (isinstance(layer, InputMap) or is_norm(layer)):
            raise ValueError(
                f"`layers.{name}`, {type(layer).__name__}, cannot be refined. Unmerge its adapters, put batch "
                "normalization into evaluation mode, remove weight normalization or pruning, and call `to_dense()` of "
                "a Slim KAN."
            )
    return splines


def _extend_grid(layer: KANLinear, z: Tensor, grid_size: int) -> tuple[Tensor, int]:
    """Extend the grids by the intervals that cover the activations z; return their ends (I, 2) and their size."""
    low, high = layer.grid_bounds.unbind(-1)
    width = (high - low) / layer.grid_size
    distances = torch.stack([low - z.amin(0), z.amax(0) - high])
    counts = (distances / width).amax(1).ceil().clamp(0, layer.spline_order)
    below, above = map(int, counts.tolist())

    ends = torch.stack([low - below * width, high + above * width], -1)
    refinement = grid_size // layer.grid_size
    return ends, refinement * (layer.grid_size + below + above)


def _refine_layer(
    layer: KANLinear,
    grid_size: int,
    bounds: Tensor,
) -> tuple[KANLinear, Tensor, float]:
    """Fit a layer on another grid.

    Returns:
        The new layer; its basis in terms of the old one (K', K), for the first input; and the largest change of an
        edge's function on the new grid, as a share of the largest value.
    """
    order = layer.spline_order
    new_grid = UniformGrid.between(bounds.double(), grid_size, order)
    old_grid = UniformGrid.between(layer.grid_bounds.double(), layer.grid_size, order)
    count = _POINTS * max(grid_size, layer.grid_size) + 1
    fractions = torch.linspace(0, 1, count, dtype=torch.float64, device=bounds.device)
    points = torch.lerp(new_grid.low, new_grid.high, fractions[:, None])
    new_basis = new_grid.functions(points)
    old_basis = old_grid.functions(points)
    transfer = change_of_basis(new_basis, old_basis)  # (I, K', K)

    weight = einsum(transfer, layer.spline_weight.double(), "i new old, o i old -> o i new")
    parameters = {"spline_weight": weight, "base_weight": layer.base_weight}
    refined = copy_with_parameters(layer, parameters, grid_size)
    refined.grid_bounds.copy_(bounds)
    for name, parameter in refined.named_parameters():
        parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    share_hooks(layer, refined)

    silu = F.silu(points).unsqueeze(-1)
    old_values = _edge_functions(layer, old_basis, silu)
    new_values = _edge_functions(refined, new_basis, silu)
    smallest = torch.finfo(torch.float64).tiny
    largest = old_values.abs().max().clamp(min=smallest)
    error = (new_values - old_values).abs().max() / largest
    return refined, transfer[0], error.item()


def _edge_functions(layer: KANLinear, basis: Tensor, silu: Tensor) -> Tensor:
    """Return the values (O, I, N) of the functions of all edges, from the values (N, I, K) and (N, I, 1)."""
    functions = torch.cat([basis, silu], -1)
    base_weight = layer.base_weight.unsqueeze(-1)
    coefficients = torch.cat([layer.spline_weight, base_weight], -1).double()
    return einsum(coefficients, functions, "o i k, n i k -> o i n")
