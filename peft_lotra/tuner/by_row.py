# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The output of an adapted layer for rows that have different adapters: its base once, the updates gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.row_product import PackedTucker, RowGroups, RowProduct, RowUpdates, group_rows
from ..kan.slim_kan import SlimKANLinear
from ..layers.coefficients import CoefficientTensor, get_or_none
from ..tucker import Update, full_shape
from .formula import Formula, runs_more_than_its_class
from .rows import ForwardPass, names_of_rows, run_by_name


def run_rows(
    layer: Any,
    names: Sequence[Any],
    current: ForwardPass | None,
    make_updates: Callable[[Sequence[Any]], RowUpdates | None],
    run: Callable[[Any, tuple, dict], Any],
    args: tuple,
    kwargs: dict,
) -> Any:
    """The output of a `LoTRALayer` for rows of these names: of all at once, or of each name by itself by `run`."""
    if not torch.compiler.is_compiling():
        names = names_of_rows(names, args[0] if args else next(iter(kwargs.values())), layer.lotra_name, current)
    base_layer, stored = layer._modules["base_layer"], layer.lotra_tensor.get_parameter(layer.get_base_layer())
    formula = layer._find_formula(stored)
    y = output_by_row(base_layer, formula, stored, lambda: make_updates(names), args, kwargs)
    return run_by_name(names, run, args, kwargs) if y is None else y


def output_by_row(
    base_layer: nn.Module,
    formula: Formula | None,
    stored: Tensor,
    make_updates: Callable[[], RowUpdates | None],
    args: tuple,
    kwargs: dict,
) -> Tensor | None:
    """The output of a layer whose rows have updates; None without updates, a formula or a Slim layer.

    The updates are made if they are used. A layer may get inputs (batch, ..., in), or (batch times, in) with `times`
    rows for each of the batch.
    """
    is_slim = type(base_layer) is SlimKANLinear and len(args) == 1 and not kwargs
    is_slim = is_slim and not runs_more_than_its_class(base_layer)
    if not is_slim and (formula is None or not formula.accepts(base_layer, stored, (), args, kwargs)):
        return None
    updates = make_updates()
    if updates is None:
        return None
    of_base: Any = base_layer(*args) if is_slim else None  # first, since it checks x
    x = args[0]
    index, size, order, places = updates.groups
    batch = updates.groups.batch()
    times = x.shape[1:-1].numel() if x.shape[0] == batch else x.shape[:-1].numel() // batch
    rows = x.reshape(batch, times, updates.form.shape[1])
    rows = (rows if order is None else rows.index_select(0, order)).flatten(0, 1)
    y = _product(base_layer, formula, updates._replace(groups=RowGroups(index, size * times)), rows)
    if places is not None:
        y = y.unflatten(0, (-1, times)).index_select(0, places)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if of_base is None else of_base + y


def _product(base_layer: Any, formula: Formula | None, updates: RowUpdates, rows: Tensor) -> Tensor:
    """The output (N, O) at rows (N, I) in the order of their groups; without the base, if there is no formula."""
    if formula is None:
        return RowProduct(None, updates, None, True).of_splines(rows, base_layer.grid, nn.functional.silu(rows))
    spec, tensor = formula.spec, formula.tensor
    # the base is frozen
    coefficients, residual = (None if it is None else it.detach() for it in tensor.read_parts(base_layer))
    scale: Any = spec.scale(base_layer)
    scale = None if scale is None else scale.detach()
    assert coefficients is not None
    matrix = (coefficients if scale is None else coefficients * scale.unsqueeze(-1)).permute(2, 1, 0).flatten(0, 1)
    if residual is not None:
        matrix = torch.cat([matrix, residual.t()])
    product = RowProduct(matrix, updates, scale, residual is not None)
    factors = spec.activation(base_layer, rows) if residual is not None and spec.activation is not None else None
    if formula.closed_form:
        grid = spec.splines(base_layer) if spec.splines is not None else None
        assert grid is not None
        y = product.of_splines(rows, grid, factors)
    else:
        assert spec.basis is not None
        functions = spec.basis(base_layer, rows).transpose(1, 2)
        y = product.of_functions(functions if factors is None else torch.cat([functions, factors.unsqueeze(1)], 1))
    bias = None if spec.bias is None else get_or_none(base_layer, spec.bias)
    return y if bias is None else y + bias


def updates_by_name(
    names: Sequence[str], tensor: CoefficientTensor, like: Tensor, update_of: Callable[[str], Update | None]
) -> RowUpdates | None:
    """The updates of rows with these names; None if all rows have the same, or none."""
    distinct, groups = _grouped(tuple(names))
    updates = [update_of(name) for name in distinct] if len(distinct) > 1 else []
    ranks = [update.tensor.ranks for update in updates if update is not None]
    if not ranks:
        return None
    form = PackedTucker(full_shape(tensor), tuple(map(max, *ranks)) if len(ranks) > 1 else ranks[0])
    return RowUpdates(form.pack(updates, like), groups, form)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _grouped(names: tuple[str, ...]) -> tuple[list[str], RowGroups]:
    """The names, each once, and groups of the rows by the places of their names among them."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return list(places), group_rows(torch.tensor([places[name] for name in names], device="cpu"))[1]
