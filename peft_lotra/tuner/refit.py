# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Carrying adapters over to grids that have moved: the same functions in other coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import nn

from ..kan.basis import change_of_basis, spread_points
from ..layers.coefficients import get_or_none
from ..layers.registry import same_grid, short_name
from ..modules.calls import call_with_parameters, check_module, modes_kept, unwrap
from ..modules.report import Report, TextTable
from ..tucker import Tucker, fit, relative_energy, tucker
from .grids import grid_ends
from .guards import base_layers_in_place
from .layer import LoTRALayer, lotra_layers


@dataclass(eq=False)
class RefitReport(Report):
    """What `refit_adapters` kept; prints as a table.

    The update of an adapter is here the function that it adds to the output of the layer on the samples, without the
    scales of the edges.

    Attributes:
        errors: By layer and adapter, the norm of (the new update as stored - the old one), as a share of the norm of
            the old one. Empty if no grid had moved.
        projection_errors: The same before the update is brought back to its ranks: what the new grid cannot express.
    """

    errors: dict[tuple[str, str], float]
    projection_errors: dict[tuple[str, str], float]

    def _table(self) -> TextTable:
        rows = [
            [*key, f"error {error:.2%}", f"of which {self.projection_errors[key]:.2%} by the grid"]
            for key, error in self.errors.items()
        ]
        return TextTable(["", "", ">", ">"], rows, [] if rows else ["no grid had moved"])


def refit_adapters(model: nn.Module, inputs: Any, move: Callable[[nn.Module], Any] | None = None) -> RefitReport:
    """Expresses the adapters of all layers whose grid has moved in the new bases.

    Methods that move the grid of an adapted layer raise: move those of the base layers and refit, or pass the move.

    Each update is projected onto the new basis, one input at a time: by least squares on the inputs of the layer and,
    with a hundredth of their weight, on points spread over the new grid. HOOI, and L-BFGS on the error of the
    functions, bring it back to its ranks. The layers before a layer give its inputs, already refitted.

    Args:
        model: The adapted model. Its adapters must not be merged.
        inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments. A few
            hundred rows are plenty; a layer needs memory for four bases of all rows in float64.
        move: Moves the grids. It is called with the base model, in which the bare layers stand in their places, and
            must not replace them. (`refine_grid` gives adapted layers finer grids by itself.)

    Raises:
        ValueError: Adapters are merged or disabled; the family of a layer offers no basis, or the layer is a
            convolution; `inputs` do not reach a layer whose grid moved, or are not
            finite there; the number of basis functions changed.
            Nothing is changed then, not even by `move`.
        TypeError: `model` is no module.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(KAN([2, 5, 1]), LoTRAConfig(r=2, init_weights=False))
        >>> x = torch.rand(200, 2)
        >>> def move(kan):
        ...     kan.layers[0].update_grid(x)
        >>> report = refit_adapters(model, x, move=move)
        >>> list(report.errors)
        [('layers.0', 'default')]
    """
    check_module(model)
    layers = {short_name(name): layer for name, layer in lotra_layers(model)}
    unusable = [name for name, layer in layers.items() if layer.merged or layer.disable_adapters]
    if unusable:
        raise ValueError(f"The adapters of {unusable} are merged or disabled: unmerge or enable them first.")
    report = RefitReport({}, {})

    def refit(name: str, layer: LoTRALayer, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if not is_moved(layer):
            return
        for adapter in layer.lotra_r:
            report.errors[name, adapter], report.projection_errors[name, adapter] = _refit(name, layer, adapter, x)
        layer.remember_grid()

    with _unchanged_on_error(layers), modes_kept(model), torch.no_grad():
        model.eval()
        if move is not None:
            with base_layers_in_place(model):
                move(unwrap(model))
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_pre_hook(partial(refit, name), with_kwargs=True).remove)
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
        left = [name for name, layer in layers.items() if is_moved(layer)]
        if left:
            raise ValueError(f"The grids of the layers {left} have moved, but `inputs` do not reach them.")
    return report


def is_moved(layer: LoTRALayer) -> bool:
    """Whether the grid is not the one that the adapters were made on."""
    return not same_grid(layer.lotra_grid, layer.lotra_spec.read_grid(layer.get_base_layer()))


@contextmanager
def _unchanged_on_error(layers: Mapping[str, LoTRALayer]) -> Iterator[None]:
    """Puts all tensors and grids of the layers back if an error is raised."""
    tensors = {t: t.detach().clone() for layer in layers.values() for t in layer.state_dict(keep_vars=True).values()}
    grids = {name: (layer.lotra_grid, layer.lotra_spec.read_grid(layer.base_layer)) for name, layer in layers.items()}
    try:
        yield
    except BaseException:
        for name, (at_creation, grid) in grids.items():
            layers[name].lotra_grid = at_creation
            for attribute, value in grid.items():
                owner, _, leaf = attribute.rpartition(".")
                setattr(layers[name].base_layer.get_submodule(owner), leaf, value)
        for tensor, value in tensors.items():
            tensor.data = value
        raise


def _refit(name: str, layer: LoTRALayer, adapter: str, x: torch.Tensor) -> tuple[float, float]:
    """Refits one adapter of one layer; returns the error of the function, and that before truncation."""
    if len(layer.lotra_tensor.shape) > 3:
        raise ValueError(f"`{name}` is a convolution, which cannot be refitted: merge before its grid is moved.")
    is_input = isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[-1:] == (layer.in_features,)
    if not is_input or not x.numel() or not x.isfinite().all():
        given = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(
            f"`inputs` reach `{name}` as {given}, but must be finite floating numbers (rows, {layer.in_features})."
        )
    components = _on_cpu(layer.get_components(adapter))
    old = components.dense()
    samples = x.detach().reshape(-1, layer.in_features)
    grid = layer.lotra_spec.read_grid(layer.get_base_layer())
    low, high = grid_ends(grid, layer.lotra_tensor.shape) or samples.aminmax(dim=0)
    points, weight = spread_points(samples, low.to(samples), high.to(samples), 4 * layer.lotra_tensor.shape[-1])
    weight = weight.double().cpu()
    old_basis, new_basis = (_basis(name, layer, grid, points) for grid in (layer.lotra_grid, {}))
    if old_basis.shape != new_basis.shape:
        numbers = f"{old_basis.shape[-1]} basis functions for each input and has {new_basis.shape[-1]}"
        raise ValueError(f"`{name}` had {numbers} now: merge its adapters first, or call `refine_grid`.")
    transfer = change_of_basis(weight * new_basis, weight * old_basis)
    # brings the coefficients of an edge to the values of its function
    metric = torch.linalg.qr((weight * new_basis).transpose(0, 1)).R
    if old.shape[-1] > old_basis.shape[-1]:
        # The residual branch stays, and has a block of its own: the layer may scale its splines edge by edge.
        residual = F.silu(points.double().cpu())[..., None]
        old_basis, new_basis = (torch.cat([basis, residual], dim=-1) for basis in (old_basis, new_basis))
        transfer = F.pad(transfer, (0, 1, 0, 1))
        transfer[:, -1, -1] = 1
        metric = F.pad(metric, (0, 1, 0, 1))
        metric[:, -1, -1] = (weight * residual).norm(dim=(0, 2))
    projected = einsum(transfer, old, "i new old, o i old -> o i new")

    def edge_functions(tensor: torch.Tensor) -> torch.Tensor:
        return einsum(metric, tensor, "i m k, o i k -> o i m")

    wanted = edge_functions(projected)
    start = tucker(projected, components.ranks)
    fitted = fit(start, lambda tensor: relative_energy(edge_functions(tensor - projected), wanted), steps=100)
    layer.set_components(adapter, fitted.balanced())
    stored = _on_cpu(layer.get_components(adapter)).dense()

    def outputs(basis: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return einsum(basis[: len(samples)], tensor, "n i k, o i k -> n o")

    before = outputs(old_basis, old)
    misses = [(outputs(new_basis, found) - before).norm().item() for found in (stored, projected)]
    norm = before.norm().item() or 1.0
    return misses[0] / norm, misses[1] / norm


def _on_cpu(components: Tucker) -> Tucker:
    return components.map(lambda part: part.detach().double().cpu())


def _basis(name: str, layer: LoTRALayer, grid: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """The basis functions (points, in, basis) of a layer at x (points, in), on a grid that may not be its own."""
    base, spec = layer.base_layer, layer.lotra_spec
    if spec.basis is None:
        raise ValueError(f"`{name}`, a {spec.family} layer, has no `basis`: register one, or merge before the move.")
    tensors = {key: value.to(x.device) for key, value in grid.items() if isinstance(value, torch.Tensor)}
    norm = get_or_none(base, spec.normalization or "")
    z = x if norm is None else norm(x)
    return call_with_parameters(base, tensors, partial(spec.basis, base, z), (), {}).double().cpu()
