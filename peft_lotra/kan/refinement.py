# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Other grids for a network that keep its function: finer ones, and knots where it is steep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from ..modules.calls import share_hooks
from ..modules.checks import as_number
from ..tucker import Tucker
from .basis import bspline_basis, check_dense, check_grid
from .input_map import InputMap
from .knots import KnotMap
from .layer import KANLinear, SplineLayer
from .network import LayerStack, is_norm
from .slim_kan import SlimKANLinear


_POINTS = 8  # for each interval of the finer grid, on which functions are fitted


@dataclass(frozen=True)
class RefinementReport:
    """What a refinement changed.

    Attributes:
        errors: For each KAN layer the largest change of one of its edges' functions on its new grid, as a share of
            the layer's largest value there.
        outside: For each KAN layer the share of samples that lay outside of the old grid; zeros without samples.
    """

    errors: dict[str, float]
    outside: dict[str, float]


@torch.inference_mode(False)  # parameters made in that mode could not be trained
@torch.no_grad()
def refine_grid(
    kan: LayerStack,
    grid_size: int,
    samples: Tensor | None = None,
    *,
    density: Tensor | None = None,
    exact: bool = False,
    margin: float = 0.02,
    tolerance: float = 1e-2,
) -> RefinementReport:
    r"""Gives the layers of a network grids of another size and keeps its function.

    Without samples, the ends of the grids stay. If `grid_size` is a multiple of the old one, the old splines lie in
    the span of the new ones, and the function is kept to rounding on the grids; otherwise it is the least-squares fit.
    Beyond the ends of a grid the splines fade out within `spline_order` intervals, which get shorter: if activations
    leave the grids, give samples.

    With samples, the grids of all layers but the first cover the activations of the samples (as `KAN.update_grid`
    makes them do), wherever these lie, and the functions are fitted there.

    With samples and `exact`, the knots stay and new ones are inserted between them; where activations leave a grid, it
    is extended by whole intervals, at most the `spline_order` on which splines are not zero. The function is then kept
    to rounding at the samples, and the grids of layers differ in size.

    The parameters are replaced by new ones: make optimizers afterwards. `LevenbergMarquardt` needs nothing.

    Args:
        kan: A `KAN` or a `SlimKAN`. Slim layers have one basis for all inputs: only without samples and density.
        grid_size: The number of intervals of each new grid.
        samples: Inputs (N, I) of the network.
        density: Positive numbers (I, C), the relative number of knots wanted in C equal cells of each of the first
            layer's grids, for a `KnotMap` before that layer. None keeps the map that is there.
        exact: Whether grids are extended by whole intervals, rather than moved. `grid_size` must be a multiple of the
            old ones, and a layer of G intervals that is extended by e gets grid_size (G + e) / G of them.
        margin: The share of the activations' range that is left free at each end, with samples.
        tolerance: The largest error of a layer, see `RefinementReport`, that is accepted.

    Raises:
        TypeError: `kan` is no `KAN` or `SlimKAN`.
        ValueError: An argument is out of range; a layer has an adapter or is of an unknown kind; samples are not
            finite; the function cannot be kept to `tolerance`. The network is as before then.

    Source: W. Boehm, "Inserting new knots into B-spline curves" (1980), for nested grids; C. de Boor, "A Practical
    Guide to Splines" (1978), chapter XII, for the placement of knots.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, refine_grid
        >>> kan, x = KAN([2, 5, 1], grid_size=4, dtype=torch.float64), 0.5 * torch.rand(100, 2, dtype=torch.float64)
        >>> before = kan(x)
        >>> report = refine_grid(kan, 8)
        >>> kan.layers[0].grid_size, torch.allclose(kan(x), before, atol=1e-6)
        (8, True)
    """
    if not isinstance(kan, LayerStack):
        raise TypeError(
            f"`kan` is {type(kan).__name__}, but must be a KAN or a SlimKAN. Give the network inside of a wrapper, "
            "such as `model.kan`; merge an adapter first."
        )
    if len(set(kan.layers)) < len(kan.layers):
        raise ValueError("A layer is in `kan.layers` more than once: it has one grid. Make copies of it first.")
    if not as_number(margin) >= 0 or not (tolerance == math.inf or as_number(tolerance) > 0):
        raise ValueError(
            f"`margin` is {margin!r:.100} and `tolerance` {tolerance!r:.100}, but must be finite and at least 0, and "
            "above 0."
        )
    for name, layer in kan.layers.named_children():
        if isinstance(layer, SplineLayer):
            _check_plain(name, layer)
        if not (isinstance(layer, SplineLayer | InputMap) or is_norm(layer)):
            raise ValueError(
                f"`layers.{name}` is {type(layer).__name__}, whose grid is not known. If it is an adapter on a KAN "
                "layer, merge it first (`merge_and_unload`); batch normalization must be in evaluation mode."
            )
        if isinstance(layer, SplineLayer):
            check_grid(grid_size, layer.spline_order)
        if isinstance(layer, SlimKANLinear) and not (samples is None and density is None):
            raise ValueError(
                f"`layers.{name}` is Slim, with one basis for all of its inputs: it can be refined without `samples` "
                "and `density` alone. Call `to_dense()` first."
            )
    first = next(layer for layer in kan.layers if isinstance(layer, SplineLayer))
    if samples is not None and not isinstance(samples, Tensor):
        raise TypeError(
            f"`samples` must be a tensor (N, {first.in_features}), but are of type {type(samples).__name__}."
        )
    if samples is not None:
        check_dense(samples)
    if samples is not None and not (
        not samples.is_meta and samples.shape[1:] == (first.in_features,) and len(samples) and samples.isfinite().all()
    ):
        raise ValueError(
            f"`samples` have shape {tuple(samples.shape)}, but must be (N, {first.in_features}), N >= 1, and finite, "
            "and not on the meta device."
        )
    if exact:
        _check_exact(kan, grid_size, samples, density)
    new_map = None
    if density is not None:
        if kan.layers[0] is not first and not (isinstance(kan.layers[0], KnotMap) and kan.layers[1] is first):
            raise ValueError("`density` needs a network whose first layer, but for a KnotMap, is a KAN layer.")
        if not isinstance(density, Tensor):
            raise TypeError(f"`density` must be a tensor, but is of type {type(density).__name__}.")
        low, high = first.grid_bounds.unbind(-1)
        new_map = KnotMap(low, high, density.to(low))

    layers, errors, outside = [], {}, {}
    old_map = before if isinstance(before := kan.layers[0], KnotMap) and kan.layers[1] is first else None
    for name, layer in kan.layers.named_children():
        if isinstance(layer, SplineLayer):
            size = grid_size
            outside[name] = 0.0 if samples is None else _share_outside(layer, samples)
            if exact:
                assert samples is not None
                bounds, size = _extended(name, layer, samples, grid_size)
            else:
                bounds = _new_bounds(name, layer, samples if layer is not first else None, margin)
            maps = (old_map, new_map or old_map) if layer is first else (None, None)
            new, errors[name] = _refitted(layer, size, bounds, *maps)
            if not errors[name] <= tolerance:
                raise ValueError(
                    f"`layers.{name}` cannot be kept: on a grid of {grid_size} intervals its functions change by "
                    f"{errors[name]:.1e} of their size, more than `tolerance` ({tolerance:g}). Its old grid has "
                    f"{layer.grid_size}. Take a larger `grid_size`"
                    + (", or no samples, which keeps the ends of the grids." if samples is not None else ".")
                )
            layers.append(new_map or old_map if layer is first else None)
            layers.append(new)
        elif layer is old_map:
            pass  # before the first layer
        else:
            layers.append(layer)
        samples = None if samples is None else layer(samples)
    kan.layers = nn.ModuleList(layer for layer in layers if layer is not None)
    return RefinementReport(errors, outside)


def _check_plain(name: str, layer: SplineLayer) -> None:
    """Refuses layers of which only a part would be found in the new ones."""
    plain = type(layer) in (KANLinear, SlimKANLinear)
    names = {"spline_weight", "base_weight"} if isinstance(layer, KANLinear) else set(Tucker._fields[:4])
    if not plain or {part for part, _ in layer.named_parameters()} != names:
        raise ValueError(
            f"`layers.{name}` is {type(layer).__name__}, with parameters or computations of its own (weight "
            "normalization, pruning, a subclass), which a layer on a new grid would not have. Remove these first, by "
            "`torch.nn.utils.parametrize.remove_parametrizations` for instance."
        )
    if layer.grid_bounds.is_meta:
        raise ValueError(f"`layers.{name}` is on the meta device, without values: load its parameters first.")


def _share_outside(layer: SplineLayer, z: Tensor) -> float:
    low, high = layer.grid_bounds.unbind(-1)
    return ((z < low) | (z > high)).double().mean().item()


def _check_exact(kan: LayerStack, grid_size: int, samples: Tensor | None, density: Tensor | None) -> None:
    if samples is None or density is not None:
        raise ValueError("`exact` needs `samples`, and no `density`: other knots do not keep the function exactly.")
    for name, layer in kan.layers.named_children():
        if isinstance(layer, SplineLayer) and grid_size % layer.grid_size:
            raise ValueError(
                f"`grid_size` is {grid_size}, but with `exact` it must be a multiple of the "
                f"{layer.grid_size} intervals of `layers.{name}`."
            )


def _extended(name: str, layer: SplineLayer, z: Tensor, grid_size: int) -> tuple[Tensor, int]:
    """Ends (I, 2) of the grids with as many more intervals on each side as cover the activations z, and their size."""
    _check_finite(name, z)
    low, high = layer.grid_bounds.unbind(-1)
    width = (high - low) / layer.grid_size
    below, above = ((part / width).max().ceil().int().item() for part in (low - z.amin(0), z.amax(0) - high))
    before, behind = (min(max(0, int(count)), layer.spline_order) for count in (below, above))
    ends = torch.stack([low - before * width, high + behind * width], -1)
    return ends, grid_size // layer.grid_size * (layer.grid_size + before + behind)


def _check_finite(name: str, z: Tensor) -> None:
    if not z.isfinite().all():
        raise ValueError(f"The inputs of `layers.{name}` are not finite for some samples: remove these.")


def _new_bounds(name: str, layer: SplineLayer, z: Tensor | None, margin: float) -> Tensor:
    """Ends (I, 2) that cover the activations z (N, I)."""
    if z is None:
        return layer.grid_bounds
    _check_finite(name, z)
    low, high = z.aminmax(dim=0)
    pad = margin * (high - low)
    bounds = torch.stack([low - pad, high + pad], -1)
    resolution = torch.finfo(bounds.dtype).eps * bounds.abs().amax(-1)
    wide = bounds.diff(dim=-1).squeeze(-1) > 1e3 * layer.grid_size * resolution
    return torch.where(wide[:, None], bounds, layer.grid_bounds)


def _refitted(
    layer: SplineLayer, grid_size: int, bounds: Tensor, old_map: KnotMap | None, new_map: KnotMap | None
) -> tuple[SplineLayer, float]:
    """The layer on another grid, and the largest change of its functions there, as a share of the largest value."""
    order = layer.spline_order
    low, high = bounds.double().unbind(-1)
    count = _POINTS * max(grid_size, layer.grid_size)
    s = torch.lerp(low, high, torch.linspace(0, 1, count + 1, dtype=torch.float64, device=low.device)[:, None])
    before = s
    if old_map is not new_map:
        x = s if new_map is None else new_map.inverse(s)
        before = x if old_map is None else old_map(x)
    old_low, old_high = layer.grid_bounds.double().unbind(-1)
    new_basis = bspline_basis(s, low, high, grid_size, order).transpose(0, 1)
    old_basis = bspline_basis(before, old_low, old_high, layer.grid_size, order).transpose(0, 1)
    transfer = torch.linalg.lstsq(new_basis, old_basis).solution  # (I, K', K)
    shift = F.silu(before) - F.silu(s)
    of_shift = torch.linalg.lstsq(new_basis, shift.T.unsqueeze(-1)).solution.squeeze(-1)  # (I, K')

    sizes = layer.in_features, layer.out_features
    where = {"device": layer.grid_bounds.device, "dtype": layer.grid_bounds.dtype}
    if isinstance(layer, SlimKANLinear):
        tail = layer.factor_basis[-1:].double()
        factor_basis = torch.cat([transfer[0] @ layer.factor_basis[:-1].double(), tail])
        new = SlimKANLinear(*sizes, layer.ranks, grid_size, order, layer.grid_range, **where)
        components = layer.components._replace(factor_basis=factor_basis)._asdict()
    else:
        assert isinstance(layer, KANLinear)
        weight = einsum(transfer, layer.spline_weight.double(), "i new old, o i old -> o i new")
        weight += einsum(layer.base_weight.double(), of_shift, "o i, i new -> o i new")
        new = KANLinear(*sizes, grid_size, order, layer.grid_range, **where)
        components = {"spline_weight": weight, "base_weight": layer.base_weight}
    new.grid_bounds.copy_(bounds)
    for name, value in components.items():
        parameter = getattr(new, name)
        parameter.copy_(value)
        parameter.requires_grad_(getattr(layer, name).requires_grad)

    old_weight, new_weight = layer.spline_weight.double(), new.spline_weight.double()
    base = layer.base_weight.double().unsqueeze(-1)
    old_values = einsum(old_weight, old_basis, "o i k, i n k -> o i n") + base * F.silu(before).T
    new_values = einsum(new_weight, new_basis, "o i k, i n k -> o i n") + base * F.silu(s).T
    size = old_values.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    share_hooks(layer, new)
    return new.train(layer.training), ((new_values - old_values).abs().max() / size).item()
