# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The output of an adapted layer for rows that have different adapters: its base once, the updates gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.row_product import PackedTucker, RowProduct, RowUpdates
from ..kan.slim_kan import SlimKANLinear
from ..layers.coefficients import CoefficientTensor, get_or_none
from ..tucker import Update, full_shape
from .fused import Formula, runs_more_than_its_class


def output_by_row(
    base_layer: nn.Module, formula: Formula | None, stored: Tensor, updates: RowUpdates, args: tuple, kwargs: dict
) -> Tensor | None:
    """The output of a layer whose rows have these updates; None if neither a formula nor a Slim layer gives it.

    `updates.index` has an entry for each row of the batch; a layer may get inputs (batch, ..., in).
    """
    is_slim = type(base_layer) is SlimKANLinear and len(args) == 1 and not kwargs
    is_slim = is_slim and not runs_more_than_its_class(base_layer)
    of_base: Any = base_layer(*args) if is_slim else None  # first, since it checks x
    if not is_slim and (formula is None or not formula.accepts(base_layer, stored, (), args, kwargs)):
        return None
    x = args[0]
    rows = x.reshape(-1, updates.form.shape[1])
    times = x.shape[1:-1].numel()
    if times != 1:
        updates = updates._replace(index=updates.index.repeat_interleave(times))
    if formula is None:
        product = RowProduct(None, updates, None, has_residual=True)
        y = product.of_splines(rows, base_layer.grid, nn.functional.silu(rows))  # pyright: ignore
        return of_base + y.view_as(of_base)
    spec, tensor = formula.spec, formula.tensor
    coefficients, residual = tensor.read_parts(base_layer)
    scale = spec.scale(base_layer) if spec.scale is not None else None
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
    bias = get_or_none(base_layer, spec.bias or "")
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], y.shape[1])


def updates_by_name(
    names: Sequence[str], tensor: CoefficientTensor, like: Tensor, update_of: Callable[[str], Update | None]
) -> RowUpdates | None:
    """The updates of rows with these names; None if all rows have the same, or none."""
    distinct, index = _numbered(tuple(names))
    updates = [update_of(name) for name in distinct] if len(distinct) > 1 else []
    ranks = [update.tensor.ranks for update in updates if update is not None]
    if not ranks:
        return None
    form = PackedTucker(full_shape(tensor), tuple(map(max, *ranks)) if len(ranks) > 1 else ranks[0])
    return RowUpdates(form.pack(updates, like), index, form)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _numbered(names: tuple[str, ...]) -> tuple[list[str], Tensor]:
    """The names, each once, and for each row the place of its name among them."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return list(places), torch.tensor([places[name] for name in names], device="cpu")
