# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Express adapters on grids that have moved: the same functions with other coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from ..kan.basis import change_of_basis, spread_points
from ..layers.coefficients import get_or_none
from ..layers.registry import same_grid, short_name
from ..modules.calls import call_with_inputs, call_with_parameters, check_module, modes_kept, unwrap
from ..modules.report import Report, TextTable
from ..tucker import Tucker, fit, relative_energy, tucker
from .by_row import first_argument
from .grids import grid_ends
from .guards import base_layers_in_place
from .layer import LoTRALayer, lotra_layers


@dataclass(eq=False)
class RefitReport(Report):
    """The errors of `refit_adapters`; prints as a table.

    An update is measured as the function that it adds to the output of the layer on the samples, without the scales of
    the edges.

    Attributes:
        errors: By layer and adapter, the norm of (the stored update - the old one), as a share of the norm of the old
            one. Empty if no grid had moved.
    """

    errors: dict[tuple[str, str], float]

    def _table(self) -> TextTable:
        rows = [[*key, f"error {error:.2%}"] for key, error in self.errors.items()]
        notes = [] if rows else ["no grid had moved"]
        return TextTable(["", "", ">"], rows, notes)


def refit_adapters(
    model: nn.Module,
    inputs: Any,
    move: Callable[[nn.Module], Any] | None = None,
) -> RefitReport:
    """Express the adapters of all layers whose grid has moved in the new bases.

    Methods that move the grid of an adapted layer raise. Move the grids of the base layers and refit, or pass the
    move.

    Each update is projected onto the new basis, one input at a time, by least squares on the inputs of the layer.
    Points spread over the new grid count too, with a hundredth of the weight. HOOI, then L-BFGS on the error of the
    functions, reduce the update to its ranks. The inputs of a layer come from the layers before it, already refitted.

    Args:
        model: The adapted model. Its adapters must not be merged.
        inputs: The arguments of the model: a tensor, a tuple of arguments, or a dict of keyword arguments. A few
            hundred rows are plenty; a layer needs memory for four bases of all rows in float64.
        move: Moves the grids. It is called with the base model, whose adapted layers are replaced by their base
            layers, and must not replace these. (`refine_grid` itself keeps the adapters.)

    Raises:
        ValueError: Adapters are merged or disabled; the kind of a layer offers no basis; `inputs` do not reach a layer
            whose grid moved, or are not finite there. Nothing is changed then, not even by `move`.
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
    errors = {}

    def refit(name: str, layer: LoTRALayer, args: tuple, kwargs: dict) -> None:
        if _is_moved(layer):
            x = first_argument(args, kwargs)
            for adapter in layer.lotra_r:
                errors[name, adapter] = _refit(name, layer, adapter, x)
            layer.remember_grid()

    with _unchanged_on_error(layers), modes_kept(model), torch.no_grad(), ExitStack() as hooks:
        model.eval()
        if move is not None:
            with base_layers_in_place(model):
                move(unwrap(model))
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(refit, name), with_kwargs=True))
        call_with_inputs(model, inputs)
        unreached = [name for name, layer in layers.items() if _is_moved(layer)]
        if unreached:
            raise ValueError(f"The grids of the layers {unreached} have moved, but `inputs` do not reach them.")
    return RefitReport(errors)


def _is_moved(layer: LoTRALayer) -> bool:
    return not same_grid(layer.lotra_grid, layer.copy_grid())


@contextmanager
def _unchanged_on_error(layers: Mapping[str, LoTRALayer]) -> Iterator[None]:
    """Restore all tensors and grids of the layers if an error is raised."""
    tensors = {}
    grids = []
    for layer in layers.values():
        for tensor in layer.state_dict(keep_vars=True).values():
            tensors[tensor] = tensor.detach().clone()
        grid = layer.lotra_spec.read_grid(layer.base_layer)
        grids.append((layer, layer.lotra_grid, grid))
    try:
        yield
    except BaseException:
        for layer, grid_at_attach, grid in grids:
            layer.lotra_grid = grid_at_attach
            for attribute, value in grid.items():
                owner, _, leaf = attribute.rpartition(".")
                setattr(layer.base_layer.get_submodule(owner), leaf, value)
        for tensor, value in tensors.items():
            tensor.data = value
        raise


def _refit(name: str, layer: LoTRALayer, adapter: str, x: Any) -> float:
    """Refit one adapter of one layer, and return the error of its function."""
    width = layer.in_features
    is_input = isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1:] == (width,)
    if not (is_input and x.numel() and x.isfinite().all()):
        raise ValueError(f"`inputs` that reach `{name}` must be finite floating numbers (rows, {width}).")
    samples = x.detach().reshape(-1, width)
    shape = layer.lotra_tensor.shape
    ends = grid_ends(layer.copy_grid(), shape) or samples.aminmax(dim=0)
    low, high = (end.to(samples) for end in ends)
    points, weight = spread_points(samples, low, high, 4 * shape[-1])
    weight = weight.double().cpu()
    old_splines = _basis(name, layer, layer.lotra_grid, points)
    new_splines = _basis(name, layer, {}, points)
    num_basis = old_splines.shape[-1]

    components = _on_cpu(layer.get_components(adapter))
    old = components.dense()
    weighted = weight * new_splines
    transfer = change_of_basis(weighted, weight * old_splines)
    projected = old.clone()  # its residual slice, if there is one, stays
    projected[..., :num_basis] = einsum(transfer, old[..., :num_basis], "i new old, o i old -> o i new")

    # brings the coefficients of an edge to the values of its function; the base branch is a block of its own,
    # since the layer may scale its splines edge by edge
    metric = torch.linalg.qr(weighted.transpose(0, 1)).R
    residual_columns = old.shape[-1] - num_basis  # 1 or 0
    residual = F.silu(points.double().cpu()).unsqueeze(-1)
    residual = residual[..., :residual_columns]
    residual_norm = (weight * residual).norm(dim=0)

    def edge_functions(tensor: Tensor) -> Tensor:
        splines = einsum(metric, tensor[..., :num_basis], "i m k, o i k -> o i m")
        base_branch = residual_norm * tensor[..., num_basis:]
        return torch.cat([splines, base_branch], dim=-1)

    target = edge_functions(projected)

    def loss(tensor: Tensor) -> Tensor:
        return relative_energy(edge_functions(tensor - projected), target)

    start = tucker(projected, components.ranks)
    fitted = fit(start, loss, steps=100)
    layer.set_components(adapter, fitted.balanced())
    stored = _on_cpu(layer.get_components(adapter)).dense()

    def outputs(splines: Tensor, tensor: Tensor) -> Tensor:
        functions = torch.cat([splines, residual], dim=-1)
        return einsum(functions[: len(samples)], tensor, "n i k, o i k -> n o")

    old_outputs = outputs(old_splines, old)
    error = (outputs(new_splines, stored) - old_outputs).norm().item()
    return error / (old_outputs.norm().item() or 1.0)


def _on_cpu(components: Tucker) -> Tucker:
    return components.map(lambda component: component.detach().double().cpu())


def _basis(
    name: str,
    layer: LoTRALayer,
    grid: Mapping[str, Any],
    x: Tensor,
) -> Tensor:
    """Return the basis functions (points, in, basis) of a layer at x (points, in); `grid` replaces its grid."""
    base, spec = layer.base_layer, layer.lotra_spec
    if spec.basis is None:
        raise ValueError(f"`{name}`, a {spec.kind} layer, has no `basis`: register one, or merge before the move.")
    tensors = {}
    for key, value in grid.items():
        if isinstance(value, Tensor):
            tensors[key] = value.to(x.device)
    norm = get_or_none(base, spec.normalization or "")
    if norm is not None:
        x = norm(x)
    basis = call_with_parameters(base, tensors, spec.basis, (base, x), {})
    return basis.double().cpu()
