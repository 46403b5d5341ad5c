# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The output of an adapted layer for rows that have different adapters: its base once, the updates gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.basis import UniformGrid
from ..kan.formula import LayerFormula
from ..kan.row_product import PackedTucker, RowGroups, RowProduct, RowUpdates, group_rows
from ..kan.slim_kan import SlimKANLinear
from ..modules.calls import is_tracing, runs_more_than_its_class
from ..tucker import full_shape
from .rows import ForwardPass, rows_of_each, run_by_name


def run_named_rows(
    layer: Any, names: Sequence[str], current: ForwardPass | None, args: tuple, kwargs: dict[str, Any]
) -> Any:
    """Evaluate a `LoTRALayer` for samples with adapters of these names."""
    known = set() if current is None else current.known
    find_updates = partial(_updates_by_name, layer, names, current)
    run = lambda name, args, kwargs: layer._run([name], current, args, kwargs)  # noqa: E731
    return run_rows(layer, len(names), lambda: names, known, find_updates, run, args, kwargs)


def run_rows(
    layer: Any,
    batch: int,
    read_adapters: Callable[[], Sequence[Any]],
    known: set[int],
    find_updates: Callable[[], RowUpdates | None],
    run: Callable[[Any, tuple, dict], Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Evaluate a `LoTRALayer` for samples with different adapters: all at once, or those of each adapter in turn.

    Args:
        layer: The layer.
        batch: The number of samples.
        read_adapters: Returns the adapter of each sample, by any key.
        known: See `ForwardPass`.
        find_updates: Returns the updates of the samples; None if all have the same, or none.
        run: `run(adapter, args, kwargs)` evaluates the layer for samples of one adapter.
        args, kwargs: The arguments of the layer.
    """
    times = rows_of_each(batch, read_adapters, layer.lotra_name, known, args, kwargs)
    run_together = find_row_evaluation(layer, args, kwargs)
    updates = None if run_together is None else find_updates()
    if run_together is not None and updates is not None:
        return run_together(updates)
    if not batch:
        return layer._run((), None, args, kwargs)
    if is_tracing():
        raise RuntimeError(
            f"`{layer.lotra_name}` ({layer.lotra_spec.family}) runs once for each adapter, which a graph cannot do. "
            "Give its kind `basis` in `register_kan_layer`, or call the model that is not compiled."
        )
    adapters = [adapter for adapter in read_adapters() for _ in range(times)]
    return run_by_name(adapters, run, args, kwargs)


def find_row_evaluation(layer: Any, args: tuple, kwargs: dict[str, Any]) -> Callable[[RowUpdates], Tensor] | None:
    """The function of the updates of rows that evaluates a call of a `LoTRALayer` for all rows at once.

    It takes the formula of the layer, or a Slim layer; None if there is neither.
    """
    base_layer = layer._modules["base_layer"]
    if type(base_layer) is SlimKANLinear:
        is_plain = len(args) == 1 and not kwargs and not runs_more_than_its_class(base_layer)
        return partial(_output, base_layer, None, args[0]) if is_plain else None
    stored = layer.lotra_tensor.get_parameter(layer.get_base_layer())
    reader = layer._find_formula(stored)
    if reader is None or not reader.accepts(base_layer, stored, (), args, kwargs):
        return None
    return partial(_output, base_layer, reader.read(base_layer), args[0])


def _output(base_layer: Any, formula: LayerFormula | None, x: Tensor, updates: RowUpdates) -> Tensor:
    """The output for inputs (batch, ..., in), or (batch times, in) with `times` rows for each of the batch."""
    of_base = base_layer(x) if formula is None else None  # of a Slim layer; first, since it checks x
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


def _product(base_layer: Any, formula: LayerFormula | None, updates: RowUpdates, rows: Tensor) -> Tensor:
    """The output (N, O) at rows (N, I) in the order of their groups; without the base, if there is no formula."""
    if formula is None:
        return RowProduct(None, updates, None, True).of_splines(rows, base_layer.grid, nn.functional.silu(rows))
    # the base is frozen
    matrix = formula.joined().detach()
    size = matrix.shape[1] - (formula.residual is None)
    matrix = matrix[:, :size].flatten(1).t()
    if updates.groups.size > 1:
        matrix = matrix.contiguous()  # else a product with few outputs takes less time
    scale = None if formula.scale is None else formula.scale.detach()
    has_residual = formula.residual is not None
    product = RowProduct(matrix, updates, scale, has_residual)
    if isinstance(formula.basis, UniformGrid):
        y = product.of_splines(rows, formula.basis, formula.activation(rows) if has_residual else None)
    else:
        y = product.of_functions(formula.functions(rows).transpose(1, 2))
    return y if formula.bias is None else y + formula.bias


def _updates_by_name(layer: Any, names: Sequence[str], current: ForwardPass | None) -> RowUpdates | None:
    """The updates of rows of a `LoTRALayer`; None if all rows have the same, or none."""
    distinct, groups = _grouped(tuple(names))
    found = [next(iter(layer._updates([name], current)), None) for name in distinct] if len(distinct) > 1 else []
    ranks = [update.tensor.ranks for update in found if update is not None]
    if not names:  # the shape of the output is all that matters
        ranks = [(1,) * len(full_shape(layer.lotra_tensor))]
        found = [None]
    if not ranks:
        return None
    form = PackedTucker(full_shape(layer.lotra_tensor), tuple(map(max, *ranks)) if len(ranks) > 1 else ranks[0])
    return RowUpdates(form.pack(found, layer.lotra_tensor.get_parameter(layer.get_base_layer())), groups, form)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _grouped(names: tuple[str, ...]) -> tuple[list[str], RowGroups]:
    """The names, each once, and groups of the rows by the places of their names among them."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return list(places), group_rows(torch.tensor([places[name] for name in names], device="cpu"))[1]
